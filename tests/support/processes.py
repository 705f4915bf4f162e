"""Run pytest in a subprocess with a changed environment."""

import os
import subprocess
import sys


def run_pytest(*arguments, may_skip=False, **environment):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert may_skip or "skipped" not in result.stdout
    assert "passed" in result.stdout

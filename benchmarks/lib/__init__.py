"""Parts that the benchmark programs share."""

import sys
from pathlib import Path

# Parts that these programs share with those in python/ are in python/shared.
sys.path.append(str(Path(__file__).parents[2] / "python"))

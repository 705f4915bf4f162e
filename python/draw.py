"""Run ``moe-kernels draw`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["draw", *sys.argv[1:]]))

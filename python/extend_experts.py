"""Run ``moe-kernels extend`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["extend", *sys.argv[1:]]))

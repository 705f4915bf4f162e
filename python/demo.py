"""Run ``moe-kernels demo`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))

"""Run ``moe-kernels analyze-routing`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["analyze-routing", *sys.argv[1:]]))

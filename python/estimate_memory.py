"""Run ``moe-kernels estimate-memory`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["estimate-memory", *sys.argv[1:]]))

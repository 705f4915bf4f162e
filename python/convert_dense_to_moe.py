"""Run ``moe-kernels convert`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

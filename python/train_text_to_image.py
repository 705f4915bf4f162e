"""Run ``moe-kernels train-text-to-image`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["train-text-to-image", *sys.argv[1:]]))

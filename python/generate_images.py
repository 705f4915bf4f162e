"""Run ``moe-kernels generate-images`` from a checkout."""

import sys

from moe_kernels.programs.commands import main

if __name__ == "__main__":
    sys.exit(main(["generate-images", *sys.argv[1:]]))

"""The one place through which Triton kernels are launched."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel on a grid; one without programs launches nothing.

    Fused multiply-add is pinned: a release of Triton that changes its default (3.10) then changes
    no bit.

    Args:
        kernel: a function under ``triton.jit``.
        grid: programs on one to three axes.
        arguments: of the kernel, and options of its compilation.

    Example:
        >>> launch(combine_kernel, (tokens, blocks), rows_ptr=rows, ..., BLOCK_N=1024)
    """
    if all(grid):
        kernel[grid](**arguments, enable_fp_fusion=True)

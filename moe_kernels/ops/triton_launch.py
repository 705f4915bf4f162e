"""The one place through which Triton kernels are launched."""

from typing import Any

import torch


def next_power_of_2(number: int) -> int:
    """Return the least power of 2 that is at least ``number``, and 1 for 0.

    Triton's own, and its ``cdiv``, may also run in a kernel, which costs the host microseconds.
    """
    return 1 << max(0, number - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel on a grid; one without programs launches nothing.

    Fused multiply-add is pinned: a release of Triton that changes its default (3.10) then changes
    no bit.

    Args:
        kernel: a function under ``triton.jit``.
        grid: programs on one to three axes.
        arguments: of the kernel, and options of its compilation.

    Raises:
        RuntimeError: the launch failed while a CUDA graph is captured, in which a kernel cannot be
            compiled and loaded.

    Example:
        >>> launch(combine_kernel, (tokens, blocks), rows_ptr=rows, ..., BLOCK_N=1024)
    """
    if not all(grid):
        return
    try:
        kernel[grid](**arguments, enable_fp_fusion=True)
    except Exception as error:
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            raise
        raise RuntimeError(
            f"{kernel.__name__} could not be launched while a CUDA graph is captured ({error}). A "
            "kernel that was not launched before is compiled and loaded, which a capture may not "
            "allow: run the layer once before the capture, forward and backward, with the same "
            "dtypes and shapes"
        ) from error

"""Raise an exception at any line of the library that a call executes, as Ctrl-C may, or kill."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import moe_kernels

LIBRARY = str(Path(moe_kernels.__file__).parent) + "/"


def lines_of(call: Callable[[], object]) -> list[str]:
    """Return the lines of the library that ``call()`` executes, in order, as "file:line"."""
    lines = []
    with _each_line(lambda frame: lines.append(_place(frame))):
        call()
    return lines


def interrupt(
    call: Callable[[], object], line: int, exception: type[BaseException] = KeyboardInterrupt
) -> str:
    """Raise ``exception`` just before ``call()`` executes a line; check that the caller sees it.

    Args:
        call: what to interrupt. An exception that it raises itself, or none at all, is an error.
        line: how many lines of the library ``call()`` executes first; an index of :func:`lines_of`.
        exception: what to raise.

    Returns:
        The line before which it was raised, as "file:line".
    """
    raised = exception("raised by support.interrupts")
    place, left = "", line

    def count(frame: FrameType) -> None:
        nonlocal place, left
        if left == 0 and not place:
            place = _place(frame)
            raise raised
        left -= 1

    try:
        with _each_line(count):
            call()
    except BaseException as error:
        if error is not raised:
            error.add_note(f"interrupted at {place or 'no line'}")
            raise
        return place
    raise AssertionError(f"the {exception.__name__} at {place or 'no line'} was hidden")


def kill(call: Callable[[], object], line: int) -> None:
    """Fork a process, and kill it just before its ``call()`` executes a line of the library.

    line: an index of :func:`lines_of`
    """
    child = os.fork()
    if not child:
        left = line

        def count(frame: FrameType) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        try:
            with _each_line(count):
                call()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the call ended before line {line}"


@contextmanager
def _each_line(see: Callable[[FrameType], None]) -> Iterator[None]:
    """Call ``see(frame)`` before each line of the library that this thread executes.

    Python stops tracing when ``see`` raises.
    """

    def trace_line(frame, event, argument):
        if event == "line":
            see(frame)
        return trace_line

    def trace_call(frame, event, argument):
        return trace_line if frame.f_code.co_filename.startswith(LIBRARY) else None

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        yield
    finally:
        sys.settrace(before)


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.removeprefix(LIBRARY)}:{frame.f_lineno}"

"""Progress of long work: a bar on a terminal, else a line every half minute.

A bar that is drawn over itself is a page of noise in a file, and no bar at all looks as if the work
hung.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Self, TypeAlias, TypeVar

from tqdm import tqdm

_EVERY = 30.0  # seconds between two lines

Item = TypeVar("Item")


class Lines(Generic[Item]):
    """Progress as lines, with the methods of tqdm that the package uses.

        fitting: 1,200 of 5,000 steps, elapsed 2 min, about 6 min left, loss=0.0312

    The first line comes after half a minute, so that short work prints nothing. Work of which a
    line has been printed ends with one.

    Args:
        iterable: what is gone through; None: ``update`` counts.
        total: number of all steps; default: the length of the iterable, if it has one.
        initial: steps that an earlier run has made.
        desc: name of the work.
        unit: what steps are, in the plural.
        clock: gives seconds.
    """

    def __init__(
        self,
        iterable: Iterable[Item] | None = None,
        *,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        unit: str = "steps",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._iterable, self._desc, self._unit, self._clock = iterable, desc, unit, clock
        self._total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self._initial = self._done = initial
        self._started = self._said = clock()
        self._postfix = ""

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._iterable or ():
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """Count steps, and print a line if the last one is half a minute old."""
        self._done += steps
        if self._clock() - self._said >= _EVERY:
            self._say()

    def set_postfix(self, refresh: bool = True, **values: object) -> None:
        """Set what ends the lines from now on, such as a loss."""
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def write(self, text: str) -> None:
        """Print a line of other content."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print a last line, if the work was long enough for one before."""
        if self._said != self._started and self._clock() != self._said:
            self._say()
        self._said = self._started

    def _say(self) -> None:
        self._said = self._clock()
        elapsed, made = self._said - self._started, self._done - self._initial
        of = "" if self._total is None else f" of {self._total:,}"
        left = ""
        if self._total is not None and made > 0 and self._total > self._done:
            left = f", about {duration(elapsed * (self._total - self._done) / made)} left"
        name = f"{self._desc}: " if self._desc else ""
        self.write(
            f"{name}{self._done:,}{of} {self._unit}, elapsed {duration(elapsed)}{left}"
            f"{self._postfix}"
        )


Bar: TypeAlias = tqdm | Lines


def bar(
    iterable: Iterable[Item] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str,
    unit: str = "steps",
    shown: bool = True,
) -> Bar:
    """Return the progress of work on standard error, to go through or to ``update``.

    Args:
        iterable, total, initial, desc, unit: see :class:`Lines`.
        shown: False: nothing is printed.

    Example:
        >>> with bar(total=5000, desc="fitting") as progress:
        ...     progress.update()
    """
    options: dict[str, Any] = {"total": total, "initial": initial, "desc": desc}
    if not shown or _draws(sys.stderr):
        return tqdm(iterable, disable=not shown, unit=f" {unit}", **options)
    return Lines(iterable, unit=unit, **options)


def _draws(stream: Any) -> bool:
    """Return whether a bar on this stream can be drawn over itself: a terminal or a notebook."""
    return "ipykernel" in sys.modules or bool(getattr(stream, "isatty", lambda: False)())


def duration(seconds: float) -> str:
    """Return a duration in words, such as "40 s", "5 min" or "1 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

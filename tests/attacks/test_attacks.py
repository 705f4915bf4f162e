"""Tests of the attacks' own tools: how tries are chosen, and how a line is interrupted."""

import pytest
from support.attacks import Attack
from support.interrupts import interrupt, lines_of

from moe_kernels import env


def hides_interrupts():
    try:
        env.check_values()
    except KeyboardInterrupt:
        return


@pytest.mark.parametrize(
    ("share", "count"), [("7", 7), ("100%", 1000), ("5%", 50), ("0.01%", 1), ("5000", 1000)]
)
def test_tries_are_spread_evenly(share, count):
    tries = Attack(seed=3, share=share).tries(1000)
    assert len(tries) == count
    assert [number * count // 1000 for number in tries] == list(range(count))
    assert tries == Attack(seed=3, share=share).tries(1000)


def test_each_line_is_interrupted():
    lines = lines_of(hides_interrupts)
    assert lines and all(line.startswith("env.py:") for line in lines)
    for number, line in enumerate(lines):
        assert interrupt(lambda: env.check_values(), number) == line


def test_a_hidden_interrupt_is_an_error():
    with pytest.raises(AssertionError, match=r"the KeyboardInterrupt at env\.py:\d+ was hidden"):
        interrupt(hides_interrupts, 0)
    with pytest.raises(AssertionError, match="at no line was hidden"):
        interrupt(hides_interrupts, 10_000)

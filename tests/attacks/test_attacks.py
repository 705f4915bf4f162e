"""Tests of the attacks' own tools: how tries are chosen, and how a line is interrupted."""

import datetime
from pathlib import Path

import pytest
from support.attacks import Attack, today
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


def test_another_day_has_other_tries_and_says_which(pytestconfig, attack, monkeypatch):
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2030, 1, 2)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert today() == 20300102
    assert Attack(today(), "24").tries(10_000) != Attack(today() + 1, "24").tries(10_000)
    said = pytestconfig.hook.pytest_report_header(config=pytestconfig, start_path=Path())
    assert any(f"--attack-seed {attack.seed} " in line for line in said)


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

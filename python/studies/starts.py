"""Runs that differ in their start alone, and how those are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from studies import report
from studies.report import FAILS, HOLDS, UNDECIDED, Get, NotMeasured, Results, Verdict

GW = "gromov_wasserstein"
_LARGE = 1000  # ratios of at least this are written with an exponent


def log_gradient(result: Results) -> float:
    return math.log(result["largest_gradient_norm"])


def gradient_ratio(data: Results, name: str, baseline: str) -> str:
    """Ratio of the largest gradient norms, geometric over seeds, with its interval."""
    apart = report.paired(data, name, baseline, log_gradient)
    if name == baseline:
        return ""
    mean, low, high = (
        f"{x:.2f}" if x < _LARGE else f"{x:.1e}" for x in np.exp(report.interval(apart))
    )
    return f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Starts:
    """Starts by group, and how they are compared.

    groups: names of runs that are compared with each other; those named after GW are judged
    speed: name and figure of the speed of learning, lower is better
    """

    groups: Mapping[str, Sequence[str]]
    speed: tuple[str, Get]

    @property
    def measures(self) -> dict[str, Get]:
        return {"loss": "test_nll", **dict([self.speed]), "largest gradient": log_gradient}

    def outcomes(self, data: Results, where: str, name: str) -> dict[str, list[str]]:
        """Outcomes against each control that was run, by measure."""
        controls = [each for each in self.groups[where] if GW not in each and each in data["runs"]]
        if not controls:
            raise NotMeasured("controls")
        return {
            measure: [
                report.outcome(report.paired(data, name, control, get)) for control in controls
            ]
            for measure, get in self.measures.items()
        }

    def verdict(self, data: Results, where: str, name: str) -> Verdict:
        """Judge a start: it holds where every control is beaten in one of the measures."""
        found = self.outcomes(data, where, name)
        wins = any(set(outcomes) == {HOLDS} for outcomes in found.values())
        evidence = "; ".join(
            f"{measure}: better than {outcomes.count(HOLDS)} of {len(outcomes)}, worse than "
            f"{outcomes.count(FAILS)}"
            for measure, outcomes in found.items()
        )
        return Verdict(HOLDS if wins else FAILS if FAILS in found["loss"] else UNDECIDED, evidence)

    def best(self, data: Results) -> str:
        """Say whether any start beats all of its controls in loss or in speed."""
        found = {
            name: self.outcomes(data, where, name)
            for where, names in self.groups.items()
            for name in names
            if GW in name
        }
        speed, _ = self.speed
        helped = [
            name for name, by in found.items() if {HOLDS} in (set(by["loss"]), set(by[speed]))
        ]
        if helped:
            return (
                f"These runs beat all of their controls in loss or in {speed}: {', '.join(helped)}."
            )
        return f"**No Gromov-Wasserstein start beats all of its controls in loss or in {speed}.**"

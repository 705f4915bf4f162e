"""Figures out of the JSON of moextend.py that its tables, verdicts and plots share."""

from __future__ import annotations

import numpy as np

from moe_kernels.moextend import LayerScores
from studies.moextend.runs import DRAWS, KINDS
from studies.report import (
    Get,
    NotMeasured,
    Results,
    at,
    by_seed,
    forgotten,
    paired,
    seeds_of,
    test_nll,
)

RANDOM = tuple(f"layers-{draw}" for draw in DRAWS)
changed_logits = at("text", "logits_changed_by_training")


def words(result: Results) -> float:
    """Questions in words, without pictures: per cent right, over both kinds alike."""
    return 100 * float(np.mean([result["words"]["accuracy"][kind] for kind in KINDS]))


def at_step_0(result: Results) -> float:
    return result["text_nll_at_step_0"] - result["text"]["nll_before_training"]


def setups(data: Results, get: Get) -> np.ndarray:
    """One number for each seed, out of the figures that hold for all of its runs."""
    return np.array([get(setup) for setup in by_seed(data["setups"]).values()])


def words_lost(data: Results, name: str) -> np.ndarray:
    """Per cent of questions in words, seed by seed, that the base answers and a run does not."""
    return np.array([
        words(data["setups"][seed]) - words(result)
        for seed, result in seeds_of(data, name).items()
    ])  # fmt: skip


def since_start(data: Results, name: str) -> np.ndarray:
    """Change of the loss on the task since the aligned projector, or since the base, of code."""
    found = seeds_of(data, name).items()
    is_code = data["runs"][name]["settings"]["task"] == "code"
    starts = {
        seed: setup["code_nll"] if is_code else setup["test"]["nll"]
        for seed, setup in data["setups"].items()
    }
    return np.array([test_nll(result) - starts[seed] for seed, result in found])


def layer_scores(data: Results, scored: str, found: str = "scores") -> list[LayerScores]:
    """Seed by seed; scored: task and gate, such as "code-modality"."""
    return [
        LayerScores.from_dict(setup[found][scored]) for setup in by_seed(data["setups"]).values()
    ]


def tried_rates(data: Results) -> dict[str, dict[str, tuple[float, float]]]:
    """Return change of text loss and test loss, by what trains and learning rate, of all that
    changes text.
    """
    found = {}
    for trains, rates in data["tuning"]["figures"].items():
        # A rate that is too high to train at all leaves none, or no numbers.
        finite = {
            lr: figures
            for lr, figures in rates.items()
            if "text" in figures and np.isfinite([forgotten(figures), figures["test_nll"]]).all()
        }
        if any(changed_logits(figures) for figures in finite.values()):
            found[trains] = {lr: (forgotten(f), f["test_nll"]) for lr, f in finite.items()}
    return found


def random_differences(data: Results) -> np.ndarray:
    """Loss of the top half by shift less the mean of a seed's random halves, one a seed."""
    made = [name for name in RANDOM if name in data["runs"]]
    if not made:
        raise NotMeasured("random halves")
    return np.mean([paired(data, "sequence", name) for name in made], axis=0)

"""What the page of moextend.py calls its runs, and the figures that it takes out of the JSON."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_kernels.moextend import LayerScores
from studies.moextend.runs import DRAWS
from studies.report import Results, present, test_nll

NAME = "moextend"
METHODS = {
    "gated": "experts, gate by token",
    "sequence": "experts, gate by sequence",
    "published": "experts, no gate (as published)",
    "no-gate": "experts, no gate, our start",
    "lora": "masked LoRA",
    "lora-sequence": "masked LoRA by sequence",
    "lora-all-tokens": "the same LoRA on all tokens",
    "projector": "the projector goes on alone",
    "full": "full fine-tuning",
    "full-slow": "full fine-tuning, at a low rate",
}
CODE = {
    "code-gated": "experts, gated by the task's id",
    "code-published": "experts, no gate (as published)",
    "code-no-gate": "experts, no gate, our start",
    "code-lora": "masked LoRA",
    "code-lora-all-tokens": "the same LoRA on all tokens",
    "code-full": "full fine-tuning",
    "code-layers-random": "experts, gated, one random half of the layers",
}
RANDOM = tuple(f"layers-{draw}" for draw in DRAWS)
LAYERS = {
    "sequence": "top half by shift",
    "layers-interval": "every second",
    "layers-first-half": "first half",
    "layers-second-half": "second half",
    **{name: f"a random half ({name[-1]})" for name in RANDOM},
    "layers-all": "all (twice the parameters)",
}
CALIBRATIONS = {
    "sequence": "additive (published code)",
    "calibration-multiplicative": "multiplicative (paper)",
    "calibration-none": "none",
}
STARTS = {
    "sequence": "copy of the most selected",
    "published": "copy of the most selected after tuning (published; no gate)",
    "init-mean": "mean of the base's",
    "init-random": "random",
}
NUMBERS = {
    "sequence": "one in each of the top half",
    "two-experts": "two in each of the top half",
    "layers-all": "one in every layer",
}
LEARNERS = ("gated", "sequence", "published")
SCORED = {
    "pictures-modality": "pictures, gate by token",
    "pictures-sequence": "pictures, gate by sequence",
    "code-modality": "code",
}
COST = {
    "gated": "added experts, gated, every second layer",
    "published": "added experts, no gate, every second layer",
    "experts": "all experts and routers of these layers",
    "full": "full fine-tuning",
}


def accuracy(kind: str) -> Callable[[Results], float]:
    return lambda result: 100 * result["test"]["accuracy"][kind]


def words(result: Results) -> float:
    """Questions in words, without pictures: per cent right, over both kinds alike."""
    return 100 * float(np.mean(list(result["words"]["accuracy"].values())))


def forgotten(result: Results) -> float:
    return result["text"]["nll_after_training"] - result["text"]["nll_before_training"]


def changed_logits(result: Results) -> float:
    return result["text"]["logits_changed_by_training"]


def at_step_0(result: Results) -> float:
    return result["text_nll_at_step_0"] - result["text"]["nll_before_training"]


def plain(kind: str, figure: str) -> Callable[[Results], float]:
    """Of text without ids, "code" or "words"."""
    return lambda result: result["plain"][kind][figure]


def plain_forgotten(kind: str) -> Callable[[Results], float]:
    before, after = plain(kind, "nll_before"), plain(kind, "nll_after")
    return lambda result: after(result) - before(result)


def grounds(data: Results, get: Callable[[Results], float]) -> np.ndarray:
    return np.array([get(data["grounds"][seed]) for seed in sorted(data["grounds"], key=int)])


def words_lost(data: Results, name: str) -> np.ndarray:
    """Per cent of questions in words, seed by seed, that the base answers and a run does not."""
    seeds = data["runs"][name]["seeds"]
    return np.array([
        words(data["grounds"][seed]) - words(seeds[seed]) for seed in sorted(seeds, key=int)
    ])  # fmt: skip


def since_start(data: Results, name: str) -> np.ndarray:
    """Seed by seed, of the loss on the task."""
    seeds = data["runs"][name]["seeds"]
    of_code = data["runs"][name]["settings"]["task"] == "code"
    return np.array([
        test_nll(seeds[seed])
        - (data["grounds"][seed]["code_nll"] if of_code else data["grounds"][seed]["test"]["nll"])
        for seed in sorted(seeds, key=int)
    ])  # fmt: skip


def layer_scores(data: Results, scored: str, found: str = "scores") -> list[LayerScores]:
    """Seed by seed; scored: task and gate, such as "code-modality"."""
    return [
        LayerScores.from_dict(data["grounds"][seed][found][scored])
        for seed in sorted(data["grounds"], key=int)
    ]


def tried_rates(data: Results) -> dict[str, dict[str, tuple[float, float]]]:
    """What trains and changes text -> learning rate -> change of text loss, loss on the task."""
    found = {}
    for trains, rates in data["tuning"]["figures"].items():
        # A rate that is too high to train at all leaves none, or no numbers.
        told = {
            lr: figures
            for lr, figures in rates.items()
            if "text" in figures and np.isfinite([forgotten(figures), figures["test_nll"]]).all()
        }
        points = {lr: (forgotten(each), each["test_nll"]) for lr, each in told.items()}
        if any(each["text"]["logits_changed_by_training"] for each in told.values()):
            found[trains] = points
    return found


def all_methods(data: Results) -> dict[str, str]:
    """Runs of both tasks that the page compares in what they do to text."""
    described = METHODS | {name: f"code: {label}" for name, label in CODE.items()}
    return {name: described[name] for name in present(data, described)}


def count_or_zero(numbers: np.ndarray) -> str:
    return "0" if not numbers.any() else f"{numbers.mean():,.0f}"

"""Figures out of the JSON of moextend.py, and verdicts on MoExtend (arXiv 2408.03511)."""

import numpy as np

from moe_kernels.moextend import LayerScores
from studies import report
from studies.moextend.runs import DRAWS, KINDS, Run
from studies.report import SETUP, Block, NotMeasured, Results

RANDOM = tuple(f"layers-{draw}" for draw in DRAWS)


def words(result: Results) -> float:
    """Questions in words, without pictures: per cent right, over both kinds alike."""
    return 100 * float(np.mean([result["words"]["accuracy"][kind] for kind in KINDS]))


def at_step_0(result: Results) -> float:
    return result["text_nll_at_step_0"] - result["text"]["nll_before_training"]


def since_start(data: Results, name: str) -> np.ndarray:
    """Change of the loss on the task since the aligned projector, or since the base, of code."""
    is_code = data["runs"][name]["settings"]["task"] == "code"
    start = "code_nll" if is_code else "test.nll"
    starts = [report.figure(data["setups"][seed], start) for seed in report.seeds_of(data, name)]
    return report.values(data, name, "test_nll") - starts


def layer_scores(data: Results, scored: str, found: str = "scores") -> list[LayerScores]:
    """Seed by seed; scored: task and gate, such as "code-modality"."""
    setups = report.seeds_of(data, SETUP).values()
    return [LayerScores.from_dict(setup[found][scored]) for setup in setups]


def tried_rates(data: Results) -> dict[str, dict[str, tuple[float, float]]]:
    """Change of text loss and test loss, by what trains and learning rate, where text changes."""
    found = {}
    for trains, rates in data["tuning"]["figures"].items():
        # A rate that is too high to train at all leaves none, or no numbers.
        made = {lr: result for lr, result in rates.items() if "text" in result}
        points = {lr: (report.forgotten(each), each["test_nll"]) for lr, each in made.items()}
        finite = {lr: point for lr, point in points.items() if np.isfinite(point).all()}
        if any(made[lr]["text"]["logits_changed_by_training"] for lr in finite):
            found[trains] = finite
    return found


def random_differences(data: Results) -> np.ndarray:
    """Loss of the top half by shift less the mean of a seed's random halves, one a seed."""
    made = [name for name in RANDOM if name in data["runs"]]
    if not made:
        raise NotMeasured("random halves")
    return np.mean([report.paired(data, "sequence", name) for name in made], axis=0)


VERDICTS: dict[str, Block] = {
    "text-kept": report.text_kept(
        lambda settings: not Run(**settings).changes_text,
        lambda tokens: f"{len(tokens)} runs on {sum(tokens) // len(tokens):,} tokens of "
        "documentation, code and questions without ids each"),
    "adding-hurts": report.verdict_on(
        "change of text loss at step 0",
        lambda data, name: report.values(data, name, at_step_0), above=True),
    "forgets-words": report.verdict_on(
        "no longer right, percentage points",
        lambda data, name: report.paired(data, SETUP, name, words), above=True),
    "forgets-less": report.verdict_on(
        "difference of changes of text loss",
        lambda data, *pair: report.paired(data, *pair, report.forgotten)),
    "learns": report.verdict_on("test loss less the aligned projector's", since_start),
    "beats-random": report.verdict_on(
        "test loss less the mean of a seed's random halves", random_differences),
}  # fmt: skip

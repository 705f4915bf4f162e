"""Rows, tables and values of the page of redundancy.py."""

import numpy as np
import torch

from studies import looks, report
from studies.looks import MODALITIES
from studies.redundancy import verdicts
from studies.redundancy.runs import FIXED_LOSS, WINDOW
from studies.report import Block, NotMeasured, Results, mean_and_spread, spread
from studies.starts import gradient_ratio

# --- columns of a run


def rounding(data: Results, name: str, _: str) -> str:
    """Median difference of a logit to the unpatched model, where text is as it was."""
    found = report.values(data, name, "text.median_logit_difference_to_unpatched").mean()
    return f"{found:.1g}" if verdicts.is_masked(data["runs"][name]["settings"]) else ""


def share(data: Results, name: str, _: str) -> str:
    """Share of the parameters that full fine-tuning trains."""
    if "full" not in data["runs"]:
        return ""
    return f"{100 * report.parameters(data, name) / report.parameters(data, 'full'):.1f} %"


def met(data: Results, name: str, _: str) -> str:
    """Share of the adapters that a token meets."""
    settings = data["runs"][name]["settings"]
    experts, top_k = map(int, settings["base"].split("x"))
    return "100 %" if settings["method"] == "copy" else f"{100 * top_k / experts:.0f} %"


def slower(data: Results, name: str, baseline: str) -> str:
    apart = report.paired(data, name, baseline, verdicts.steps)
    apart = apart[np.isfinite(apart)]
    return "" if name == baseline or not len(apart) else report.mean_and_interval(apart, 0)


# --- rows that are not of one run


def layer_row(data: Results, layer: str) -> str:
    """Similarity of a layer's experts before training, and the loss where it is adapted alone."""
    alike = (verdicts.layer_similarity(data, modality)[:, int(layer)] for modality in MODALITIES)
    columns = (*alike, report.values(data, f"layer-{layer}", "test_nll"))
    return " | ".join(mean_and_spread(column) for column in columns)


def between_layers(data: Results, of: str) -> str:
    """Rank "correlation" of similarity with low loss; "share" of orders with as high a one."""
    alike, losses = verdicts.layer_similarity(data, "text"), verdicts.layer_losses(data)
    found, share = verdicts.joint_rank_correlation(alike, -losses)
    return f"{found:+.2f}" if of == "correlation" else f"{100 * share:.0f} %"


def kinds_row(data: Results, layer: str) -> str:
    """Numbers of a layer's experts that serve one modality alone, or none, in the first seed."""
    statistics = looks.routings(data, "plora", "after")[0]
    unused = statistics.unused("text", "image")
    share = statistics.specialisation("text", "image").masked_fill(unused, torch.nan)
    kinds = (kind[int(layer)].nonzero().flatten() for kind in (share <= 0.1, share >= 0.9, unused))
    return " | ".join(", ".join(map(str, kind.tolist())) or "none" for kind in kinds)


def guidance_row(data: Results, guidance: str) -> str:
    """Shares of the samples that are read as their caption, and that copy a training picture."""
    shares = (spread(f"guidance.{guidance}.{key}", 1, scale=100) for key in ("read", "copies"))
    return report.row(*shares)(data, "plora")


# --- values within sentences


def real_model(data: Results) -> str:
    if "real" not in data:
        raise NotMeasured("a pretrained model")
    shape = "{name}: {layers} layers, hidden size {hidden_size}, {experts} experts, {top_k} chosen"
    return shape.format(**data["real"])


def setting(data: Results, name: str, key: str) -> str:
    report.seeds_of(data, name)
    return f"{data['runs'][name]['settings'][key]:g}"


def budget_kept(data: Results) -> str:
    hours = data["budget"]["core_hours"] + data["budget"]["core_hours_later"]
    return "within the budget" if data["seconds"] <= 3600 * hours else "beyond the budget"


LOSS = (spread("test_nll"), report.difference)
BLOCKS: dict[str, Block] = {
    **verdicts.VERDICTS,
    "text": report.row(
        report.SEEDS, spread("text.nll_unpatched"), spread("text.nll_before_training"),
        spread("text.nll_after_training"), spread(report.forgotten),
        report.count("text.logits_changed_by_training"), rounding,
    ),
    "method": report.row(
        report.PARAMETERS, share, *LOSS, spread("samples.read_as_their_caption", 1, scale=100),
        spread("samples.pairwise_distance.generated", 2),
        spread("samples.nearest_training_distance.generated", 2),
    ),
    "held-out": report.row(
        spread("samples.classifier_held_out_accuracy.tokenized", 1, scale=100),
        spread("samples.pairwise_distance.held_out_real", 2),
        spread("samples.nearest_training_distance.held_out_real", 2),
    ),
    "loss": report.row(report.PARAMETERS, *LOSS),
    "source-row": report.row(report.PARAMETERS, met, spread("text.nll_unpatched"), *LOSS),
    "start-row": report.row(
        spread(verdicts.steps, 0), slower,
        report.column(verdicts.steps, lambda numbers: str(np.isnan(numbers).sum())), *LOSS,
        spread("largest_gradient_norm", 1), gradient_ratio,
    ),
    "layer": layer_row,
    "between-layers": between_layers,
    "step": report.cost_row,
    "best-start": verdicts.JUDGED.best,
    "routing": lambda data, when: looks.routing_row(data, "plora", when),
    "kinds": kinds_row,
    "guidance": guidance_row,
    "every-run": report.runs_table({
        "lr": ("lr", "g"),
        "parameters": ("trained_parameters", ","),
        "image loss": ("test_nll", ".3f"),
        "change of text loss": (report.forgotten, "+.4f"),
        "seconds": ("seconds", ".0f"),
    }),
    "real-model": real_model,
    "setting": setting,
    "seeds": report.row(report.SEEDS),
    "tested": lambda data: str(data["budget"]["held_out"] // 2),
    "budget-kept": budget_kept,
    "fixed-loss": lambda data, of: str(FIXED_LOSS[of]),
    "window": lambda data: str(WINDOW),
    "experts": lambda data: str(int(looks.routings(data, "plora", "after")[0].exists().sum())),
}  # fmt: skip

"""Rows, tables and values of the page of redundancy.py."""

from __future__ import annotations

import numpy as np
import torch

from studies.redundancy import figures
from studies.redundancy.runs import FIXED_LOSS, WINDOW
from studies.redundancy.verdicts import VERDICTS, best_start, is_masked, joint_rank_correlation
from studies.report import (
    Block,
    NotMeasured,
    Results,
    at,
    count,
    difference,
    forgotten,
    interval,
    mean_and_interval,
    mean_and_spread,
    paired,
    parameters,
    row,
    seeds_of,
    spread,
    table,
    test_nll,
    total,
    values,
)


def seeds(data: Results, name: str, _: str = "") -> str:
    return str(len(seeds_of(data, name)))


def rounding(data: Results, name: str, _: str) -> str:
    """Median difference of a logit to the unpatched model, where text is as it was."""
    found = values(data, name, at("text", "median_logit_difference_to_unpatched")).mean()
    return f"{found:.1g}" if is_masked(data["runs"][name]["settings"]) else ""


def share(data: Results, name: str, _: str) -> str:
    """Share of the parameters that full fine-tuning trains."""
    if "full" not in data["runs"]:
        return ""
    return f"{100 * parameters(data, name) / parameters(data, 'full'):.1f} %"


def met(data: Results, name: str, _: str) -> str:
    """Share of the adapters that a token meets."""
    settings = data["runs"][name]["settings"]
    experts, top_k = map(int, settings["base"].split("x"))
    return "100 %" if settings["method"] == "copy" else f"{100 * top_k / experts:.0f} %"


def slower(data: Results, name: str, baseline: str) -> str:
    apart = paired(data, name, baseline, figures.steps)
    apart = apart[np.isfinite(apart)]
    return "" if name == baseline or not len(apart) else mean_and_interval(apart, 0)


def failures(data: Results, name: str, _: str) -> str:
    return str(int(np.isnan(values(data, name, figures.steps)).sum()))


def gradient_ratio(data: Results, name: str, baseline: str) -> str:
    ratio = np.exp(interval(paired(data, name, baseline, figures.log_gradient)))
    return "" if name == baseline else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


MODALITIES = ("text", "image")
LOSS = (spread(test_nll), difference)


# --- rows that are not of one run


def layer_row(data: Results, layer: str) -> str:
    """Similarity of a layer's experts before training, and the loss where it is adapted alone."""
    alike = (figures.layer_similarity(data, modality)[:, int(layer)] for modality in MODALITIES)
    columns = (*alike, values(data, f"layer-{layer}", test_nll))
    return " | ".join(mean_and_spread(column) for column in columns)


def between_layers(data: Results, of: str) -> str:
    """Rank "correlation" of similarity with low loss; "share" of orders with as high a one."""
    alike, losses = figures.layer_similarity(data, "text"), figures.layer_losses(data)
    found, share = joint_rank_correlation(alike, -losses)
    return f"{found:+.2f}" if of == "correlation" else f"{100 * share:.0f} %"


def routing_row(data: Results, when: str) -> str:
    looks = figures.looks(data, when)
    kinds = [figures.routing(look).expert_kinds("text", "image") for look in looks]
    return " | ".join((
        mean_and_spread(figures.divergence(looks)),
        *(mean_and_spread(np.array([float(getattr(k, kind).sum()) for k in kinds]), 1)
          for kind in ("only_first", "only_second", "agnostic", "unused")),
        *(mean_and_spread(figures.similarity(looks, modality)) for modality in MODALITIES),
    ))  # fmt: skip


def kinds_row(data: Results, layer: str) -> str:
    """Numbers of a layer's experts that serve one modality alone, or none, in the first seed."""
    statistics = figures.routing(figures.looks(data, "after")[0])
    unused = statistics.unused("text", "image")
    share = statistics.specialisation("text", "image").masked_fill(unused, torch.nan)
    kinds = (kind[int(layer)].nonzero().flatten() for kind in (share <= 0.1, share >= 0.9, unused))
    return " | ".join(", ".join(map(str, kind.tolist())) or "none" for kind in kinds)


def guidance_row(data: Results, guidance: str) -> str:
    """Shares of the samples that are read as their caption, and that copy a training picture."""
    keys = (("guidance", guidance, key) for key in ("read", "copies"))
    return " | ".join(
        mean_and_spread(values(data, "plora", at(*each, scale=100)), 1) for each in keys
    )


def runs_table(data: Results) -> str:
    rows = [
        [name, seed, f"{result['lr']:g}", f"{result['trained_parameters']:,}",
         f"{test_nll(result):.3f}", f"{forgotten(result):+.4f}", f"{result['seconds']:.0f}"]
        for name in data["runs"]
        for seed, result in seeds_of(data, name).items()
    ]  # fmt: skip
    head = ["run", "seed", "lr", "parameters", "image loss", "change of text loss", "seconds"]
    return table(head, rows)


# --- values within sentences


def real_model(data: Results) -> str:
    if "real" not in data:
        raise NotMeasured("a pretrained model")
    real = data["real"]
    return (
        f"{real['name']}: {real['layers']} layers, hidden size {real['hidden_size']}, "
        f"{real['experts']} experts, {real['top_k']} chosen"
    )


def setting(data: Results, name: str, key: str) -> str:
    seeds_of(data, name)
    return f"{data['runs'][name]['settings'][key]:g}"


def budget_kept(data: Results) -> str:
    hours = data["budget"]["core_hours"] + data["budget"]["core_hours_later"]
    return "within the budget" if data["seconds"] <= 3600 * hours else "beyond the budget"


def experts(data: Results) -> str:
    return str(int(figures.routing(figures.looks(data, "after")[0]).exists().sum()))


BLOCKS: dict[str, Block] = {
    **VERDICTS,
    "text": row(
        seeds, *(spread(at("text", f"nll_{when}"))
                 for when in ("unpatched", "before_training", "after_training")),
        spread(forgotten), count(at("text", "logits_changed_by_training")), rounding,
    ),
    "method": row(
        total, share, *LOSS, spread(at("samples", "read_as_their_caption", scale=100), 1),
        spread(at("samples", "pairwise_distance", "generated"), 2),
        spread(at("samples", "nearest_training_distance", "generated"), 2),
    ),
    "held-out": row(
        spread(at("samples", "classifier_held_out_accuracy", "tokenized", scale=100), 1),
        spread(at("samples", "pairwise_distance", "held_out_real"), 2),
        spread(at("samples", "nearest_training_distance", "held_out_real"), 2),
    ),
    "loss": row(total, *LOSS),
    "source-row": row(total, met, spread(at("text", "nll_unpatched")), *LOSS),
    "start-row": row(
        spread(figures.steps, 0), slower, failures, *LOSS,
        spread(at("largest_gradient_norm"), 1), gradient_ratio,
    ),
    "layer": layer_row,
    "between-layers": between_layers,
    "best-start": best_start,
    "routing": routing_row,
    "kinds": kinds_row,
    "guidance": guidance_row,
    "every-run": runs_table,
    "real-model": real_model,
    "setting": setting,
    "seeds": seeds,
    "tested": lambda data: str(data["budget"]["held_out"] // 2),
    "budget-kept": budget_kept,
    "fixed-loss": lambda data, of: str(FIXED_LOSS[of]),
    "window": lambda data: str(WINDOW),
    "experts": experts,
}  # fmt: skip

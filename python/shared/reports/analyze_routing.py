"""The report of analyze_routing.py: its figures as JSON, its pictures, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from moe_kernels.analysis import (
    ExpertRedundancy,
    RoutingStatistics,
    plot_divergence,
    plot_expert_load,
    plot_redundancy,
    plot_specialisation,
)
from shared.cli import console


def describe(
    routing: Mapping[str, RoutingStatistics], redundancy: Mapping[str, ExpertRedundancy],
    modality: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of report.json; routing: by state, "before" and perhaps "after"."""
    first = routing["before"]
    report = {
        "layers": first.layers,
        "num_experts": first.num_experts,
        "rows": dict(zip(first.modalities, first.rows[0].tolist(), strict=True)),
        "routing": {state: figures(found, modality) for state, found in routing.items()},
        "redundancy": {
            name: {"rows": found.rows, "mean": nullable(found.mean())}
            for name, found in redundancy.items()
        },
    }
    if "after" in routing:
        texts = [found.counts[:, 0] for found in routing.values()]
        report["text_routing_unchanged"] = torch.equal(*texts)
    return report


def figures(statistics: RoutingStatistics, modality: str | None) -> dict[str, Any]:
    """Return figures of the routing, each by layer."""
    entropy = statistics.entropy()
    found = {
        "entropy_nats": {
            name: entropy[:, statistics.modalities.index(name)].tolist()
            for name in statistics.seen()
        },
        "highest_load": {
            name: (load * torch.tensor(statistics.num_experts)).tolist()
            for name, load in zip(
                statistics.modalities, statistics.load().amax(-1).unbind(1), strict=True
            )
            if name in statistics.seen()
        },
    }
    if modality:
        kinds = statistics.expert_kinds("text", modality)
        found["jensen_shannon_divergence_bits"] = statistics.divergence("text", modality).tolist()
        found["experts"] = {
            "text_only": kinds.only_first.tolist(),
            f"{modality}_only": kinds.only_second.tolist(),
            "agnostic": kinds.agnostic.tolist(),
            "unused": kinds.unused.tolist(),
        }
    return found


def nullable(values: Tensor) -> list[float | None]:
    """Replace NaN, which JSON does not have."""
    return [value if value == value else None for value in values.tolist()]


def draw_figures(
    routing: Mapping[str, RoutingStatistics], redundancy: Mapping[str, ExpertRedundancy],
    modality: str | None, out: Path,
) -> None:  # fmt: skip
    names = ("text", modality) if modality else ("text",)
    plot_redundancy(redundancy["text"], path=out / "redundancy_text.png")
    for state, statistics in routing.items():
        title = "Expert load by layer" + (f", {state}" if modality else "")
        plot_expert_load(statistics, out / f"load_{state}.png", modalities=names, title=title)
        if modality:
            plot_specialisation(
                statistics, out / f"specialisation_{state}.png", modalities=names,
                title=f"Specialisation of the experts, {state}",
            )  # fmt: skip
    if modality:
        plot_divergence(routing, out / "divergence.png", modalities=names)
        both = (redundancy[f"{modality}_{state}"] for state in routing)
        plot_redundancy(*both, out / f"redundancy_{modality}.png")


def summarize(report: dict[str, Any], modality: str | None) -> None:
    """Print a table: means over layers, and experts summed over layers."""
    states = report["routing"]
    table = Table(title=f"Routing of text and {modality}" if modality else "Routing of text")
    table.add_column("mean over layers; experts in all")
    for state in states:
        table.add_column(state if modality else "text", justify="right")
    for kind, label in (("entropy_nats", "router entropy, nats"), ("highest_load", "highest load")):
        for name in states["before"][kind]:
            cells = (f"{mean(found[kind][name]):.3f}" for found in states.values())
            table.add_row(f"{label}, {name}", *cells)
    if modality:
        key = "jensen_shannon_divergence_bits"
        table.add_row("divergence, bits", *(f"{mean(found[key]):.3f}" for found in states.values()))
        for kind in states["before"]["experts"]:
            cells = (str(sum(found["experts"][kind])) for found in states.values())
            table.add_row(f"experts: {kind.replace('_', ' ')}", *cells)
    redundancy = {
        name: f"{mean(found['mean']):.3f}" for name, found in report["redundancy"].items()
    }
    table.add_row("redundancy, text", *[redundancy["text"]] * len(states))
    if modality:
        table.add_row(
            f"redundancy, {modality}", *(redundancy[f"{modality}_{state}"] for state in states)
        )
    console.print(table)
    if not report.get("text_routing_unchanged", True):
        console.print("[red]error: the adapters changed the routing of text[/]")


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")

"""The report of moe-kernels analyze-routing: its figures as JSON, its pictures, and its table."""

from __future__ import annotations

import dataclasses
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
from moe_kernels.programs.shared.cli import console

_LABELS = {"entropy_nats": "router entropy, nats", "highest_load": "highest load"}


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
    experts = torch.tensor(statistics.num_experts)[:, None]
    found: dict[str, Any] = {
        kind: {
            name: by_layer.tolist()
            for name, by_layer in zip(statistics.modalities, values.unbind(1), strict=True)
            if name in statistics.seen()
        }
        for kind, values in (
            ("entropy_nats", statistics.entropy()),
            ("highest_load", statistics.load().amax(-1) * experts),
        )
    }
    if modality:
        kinds = dataclasses.asdict(statistics.expert_kinds("text", modality))
        names = {"only_first": "text_only", "only_second": f"{modality}_only"}
        found["jensen_shannon_divergence_bits"] = statistics.divergence("text", modality).tolist()
        found["experts"] = {names.get(k, k): counts.tolist() for k, counts in kinds.items()}
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
    for label, values in rows_of(states, report["redundancy"], modality).items():
        table.add_row(label, *values)
    console.print(table)
    if not report.get("text_routing_unchanged", True):
        console.print("[red]error: the adapters changed the routing of text[/]")


def rows_of(
    states: dict[str, Any], redundancy: dict[str, Any], modality: str | None
) -> dict[str, list[str]]:
    """Return the table's rows: by label, a cell for each state."""
    rows = {
        f"{label}, {name}": [mean(found[kind][name]) for found in states.values()]
        for kind, label in _LABELS.items()
        for name in states["before"][kind]
    }
    if modality:
        key = "jensen_shannon_divergence_bits"
        rows["divergence, bits"] = [mean(found[key]) for found in states.values()]
        for kind in states["before"]["experts"]:
            counts = [str(sum(found["experts"][kind])) for found in states.values()]
            rows[f"experts: {kind.replace('_', ' ')}"] = counts
    rows["redundancy, text"] = [mean(redundancy["text"]["mean"])] * len(states)
    if modality:
        names = [f"{modality}_{state}" for state in states]
        rows[f"redundancy, {modality}"] = [mean(redundancy[name]["mean"]) for name in names]
    return rows


def mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "nan"

"""Measures which experts of a Mixture of Experts serve which modality, and how alike they are.

    python python/analyze_routing.py MODEL
    python python/analyze_routing.py MODEL --adapter out/run/adapter

MODEL is a local folder or a hub id (OLMoE, Mixtral, Qwen-MoE, ...). Alone it is measured on
held-out text. With an adapter that moe_kernels has saved, text and sequences of the adapter's
modality are measured twice: before (low-rank updates off) and after (on).

Sequences are a safetensors file with `input_ids` (N, S) int64 and, if there is padding,
`attention_mask` (N, S) int64, such as train_text_to_image.py writes as held_out.safetensors.

Under --out: report.json, the routing counts and similarities as JSON, and pictures. Every stage is
kept there, keyed by its settings: a second run, or one that was interrupted, goes on where the
first stopped. docs/routing.md says what the figures mean and what a full-size model needs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from shared.cli import console, exit_code, settle_device
from shared.files import write_text
from shared.models import DTYPES, load_causal_lm
from shared.stages import Stages, Workspace, model_identity
from shared.texts import documentation, text_blocks
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

import moe_kernels
from moe_kernels import ModalityLoraConfig, PatchedModel, patch_model
from moe_kernels.analysis import (
    ExpertRedundancy,
    RoutingRecorder,
    RoutingStatistics,
    expert_redundancy,
    modality_by_token_id,
    plot_divergence,
    plot_expert_load,
    plot_redundancy,
    plot_specialisation,
)

HELD_OUT = "held_out.safetensors"


@dataclass(frozen=True)
class Settings:
    model: str
    tokenizer: str
    adapter: str | None
    modality: str | None
    sequences: str | None
    text: str | None
    text_tokens: int
    block: int
    max_sequences: int
    batch: int
    max_tokens: int
    metric: str
    dtype: str
    device: str
    backend: str | None
    seed: int

    @property
    def states(self) -> tuple[str, ...]:
        return ("before",) if self.adapter is None else ("before", "after")


# --- what is measured on


def held_out_text(settings: Settings) -> Tensor:
    """(N, block) token ids, spread evenly over the text."""
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    text = Path(settings.text).read_text() if settings.text else documentation()["test"]
    blocks = text_blocks(tokenizer, text, settings.block, settings.block)
    return spread(blocks, max(1, settings.text_tokens // settings.block))


def held_out_sequences(settings: Settings) -> dict[str, Tensor]:
    """input_ids and attention_mask, (N, S) int64."""
    path = Path(settings.sequences)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if "input_ids" not in tensors:
        raise ValueError(f"{path} has no tensor input_ids, it has {', '.join(sorted(tensors))}")
    input_ids = tensors["input_ids"]
    mask = tensors.get("attention_mask", torch.ones_like(input_ids))
    for name, tensor in (("input_ids", input_ids), ("attention_mask", mask)):
        if tensor.dtype != torch.int64 or tensor.shape != input_ids.shape or tensor.ndim != 2:
            raise ValueError(
                f"{path}: {name} must be (N, S) int64, is {tuple(tensor.shape)} {tensor.dtype}"
            )
    both = {"input_ids": input_ids, "attention_mask": mask}
    return {name: spread(tensor, settings.max_sequences) for name, tensor in both.items()}


def spread(rows: Tensor, wanted: int) -> Tensor:
    """At most so many of the rows, evenly spaced."""
    return rows[:: max(1, len(rows) // wanted)][:wanted]


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(
            f"{name}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()
        )
    return found.hexdigest()[:12]


# --- the model


class Subject:
    """The model, patched if there is an adapter, and its batches."""

    def __init__(self, settings: Settings, text: Tensor, sequences: dict[str, Tensor]):
        self.settings = settings
        self.model = load_causal_lm(settings.model, settings.dtype, settings.device)
        self.patched = self._patch() if settings.adapter else None
        RoutingRecorder(self.model)  # says so if there is no router
        self._check_ids(text, sequences)
        self.text = self._batches({"input_ids": text})
        self.sequences = self._batches(sequences)

    def _patch(self) -> PatchedModel:
        folder = self.settings.adapter
        config = ModalityLoraConfig.from_adapter(folder, backend=self.settings.backend)
        patched = patch_model(self.model, config)
        patched.load_adapter(folder)
        return patched

    def _check_ids(self, text: Tensor, sequences: dict[str, Tensor]) -> None:
        known = self.model.config.vocab_size
        for name, ids in (("text", text), ("sequences", sequences.get("input_ids"))):
            if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
                raise ValueError(
                    f"the {name} has token ids {int(ids.min())}..{int(ids.max())}, the model knows "
                    f"0..{known - 1}: another tokenizer, or sequences made for another adapter?"
                )
        if sequences:
            wanted = self.modality_of(sequences["input_ids"]) == self._modality_id
            if not (wanted & (sequences["attention_mask"] == 1)).any():
                raise ValueError(f"no sequence has a token of modality {self.settings.modality!r}")

    @property
    def _modality_id(self) -> int:
        return self.patched.config.modalities.index(self.settings.modality) + 1

    def modality_of(self, input_ids: Tensor) -> Tensor:
        names = self.patched.config.modalities
        ranges = {name: self.patched.modality_token_ids(name) for name in names}
        return modality_by_token_id(ranges)(input_ids)

    def _batches(self, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        parts = {
            name: tensor.to(self.model.device).split(self.settings.batch)
            for name, tensor in tensors.items()
        }
        # Only what the layers do is of interest: no logits, no cache.
        return [
            dict(zip(parts, batch, strict=True)) | {"logits_to_keep": 1, "use_cache": False}
            for batch in zip(*parts.values(), strict=True)
        ]

    def in_state(self, state: str) -> contextlib.AbstractContextManager:
        off = self.patched is not None and state == "before"
        return self.patched.adapters_disabled() if off else contextlib.nullcontext()

    @torch.no_grad()
    def routing(self, state: str) -> RoutingStatistics:
        """Text of the text file alone: captions in the sequences are not counted."""
        with self.in_state(state), RoutingRecorder(self.model) as recorder:
            for batch in tqdm(self.text, desc="text"):
                self.model(**batch)
            for batch in tqdm(self.sequences, desc="sequences", disable=not self.sequences):
                modality = self.modality_of(batch["input_ids"])
                recorder.observe(modality.masked_fill(modality == 0, -1))
                self.model(**batch)
        return recorder.statistics()

    def redundancy(self, state: str, modality: str, *, adapted: bool = True) -> ExpertRedundancy:
        batches = self.text if modality == "text" else self.sequences
        with self.in_state(state):
            return expert_redundancy(
                self.model, batches, modality=modality, adapted=adapted,
                metric=self.settings.metric, max_tokens=self.settings.max_tokens,
                seed=self.settings.seed, progress=True,
            )  # fmt: skip


# --- stages


class Program:
    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out, self.stages = settings, out, Stages(out / "stages")
        self.text = held_out_text(settings)
        self.sequences = held_out_sequences(settings) if settings.sequences else {}
        kept = ("dtype", "device", "backend", "batch")
        self.source = {
            "model": model_identity(settings.model),
            "adapter": model_identity(settings.adapter) if settings.adapter else None,
            "modality": settings.modality,
            "inputs": digest({"text": self.text, **self.sequences}),
            **{name: getattr(settings, name) for name in kept},
        }

    @functools.cached_property
    def subject(self) -> Subject:
        """Loaded when the first stage needs it."""
        return Subject(self.settings, self.text, self.sequences)

    def routing(self, state: str) -> RoutingStatistics:
        def build(workspace: Workspace) -> dict[str, Any]:
            return self.subject.routing(state).to_dict()

        name = f"routing-{state}"
        return RoutingStatistics.from_dict(self.stages.run(name, self.source, build).result)

    def redundancy(self, name: str, state: str, modality: str, **options) -> ExpertRedundancy:
        kept = ("metric", "max_tokens", "seed")
        inputs = self.source | {key: getattr(self.settings, key) for key in kept}

        def build(workspace: Workspace) -> dict[str, Any]:
            return self.subject.redundancy(state, modality, **options).to_dict()

        return ExpertRedundancy.from_dict(
            self.stages.run(f"redundancy-{name}", inputs, build).result
        )

    def run(self) -> dict[str, Any]:
        routing = {state: self.routing(state) for state in self.settings.states}
        # Adapters do not act on text: one figure.
        redundancy = {"text": self.redundancy("text", "before", "text")}
        if modality := self.settings.modality:
            for state, name, adapted in (
                ("before", f"{modality}_before", True),
                ("after", f"{modality}_after", True),
                ("after", f"{modality}_after_base_experts", False),
            ):
                redundancy[name] = self.redundancy(name, state, modality, adapted=adapted)
        report = self.describe(routing, redundancy)
        self.write(report, routing, redundancy)
        summarize(report, self.settings.modality)
        console.print(f"written: {self.out}", markup=False, soft_wrap=True)
        return report

    def describe(
        self, routing: dict[str, RoutingStatistics], redundancy: dict[str, ExpertRedundancy]
    ) -> dict[str, Any]:
        modality, first = self.settings.modality, routing["before"]
        report = {
            "layers": first.layers,
            "num_experts": first.num_experts,
            "rows": dict(zip(first.modalities, first.rows[0].tolist(), strict=True)),
            "routing": {state: figures(found, modality) for state, found in routing.items()},
            "redundancy": {
                name: {"rows": found.rows, "mean": nullable(found.mean())}
                for name, found in redundancy.items()
            },
            "seconds": self.stages.seconds,
            "settings": dataclasses.asdict(self.settings),
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
        }
        if "after" in routing:
            texts = [found.counts[:, 0] for found in routing.values()]
            report["text_routing_unchanged"] = torch.equal(*texts)
        return report

    def write(
        self,
        report: dict[str, Any],
        routing: dict[str, RoutingStatistics],
        redundancy: dict[str, ExpertRedundancy],
    ) -> None:
        out, modality = self.out, self.settings.modality
        for kind, found in (("routing", routing), ("redundancy", redundancy)):
            for name, values in found.items():
                write_text(out / f"{kind}_{name}.json", json.dumps(values.to_dict()) + "\n")
        plot_redundancy(redundancy["text"], path=out / "redundancy_text.png")
        for state, statistics in routing.items():
            title = "Expert load by layer" + (f", {state}" if modality else "")
            names = ("text", modality) if modality else ("text",)
            plot_expert_load(statistics, out / f"load_{state}.png", modalities=names, title=title)
            if modality:
                plot_specialisation(
                    statistics, out / f"specialisation_{state}.png", modalities=names,
                    title=f"Specialisation of the experts, {state}",
                )  # fmt: skip
        if modality:
            plot_divergence(routing, out / "divergence.png", modalities=("text", modality))
            both = (redundancy[f"{modality}_{state}"] for state in routing)
            plot_redundancy(*both, out / f"redundancy_{modality}.png")
        # Last: where it is, the rest is.
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")


# --- the report


def figures(statistics: RoutingStatistics, modality: str | None) -> dict[str, Any]:
    """By layer."""
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
    """JSON has no NaN."""
    return [value if value == value else None for value in values.tolist()]


def summarize(report: dict[str, Any], modality: str | None) -> None:
    """The table on the terminal: means over layers, experts in all layers."""
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
        console.print("[red]the adapters changed how text is routed, which must not be[/]")


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


# --- the command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="local folder or hub id of a Mixture of Experts")
    add("--tokenizer", help="folder or hub id, if it is not beside the model")
    add("--adapter", metavar="FOLDER", help="what PatchedModel.save_adapter wrote")
    add("--modality", help="of the adapter's (default: its first)")
    add(
        "--sequences", metavar="FILE",
        help=f"held-out sequences of the modality (default: {HELD_OUT} in or beside the adapter)",
    )  # fmt: skip
    add("--text", metavar="FILE", help="held-out text (default: topics of Python's documentation)")
    add("--text-tokens", type=int, default=16_384, help="at most; default: %(default)s")
    add("--block", type=int, default=256, help="tokens a row of text; default: %(default)s")
    add("--max-sequences", type=int, default=256, help="default: %(default)s")
    add("--batch", type=int, default=8, help="rows a forward; default: %(default)s")
    add("--max-tokens", type=int, default=512, help="to compare experts on; default: %(default)s")
    add("--metric", choices=("cka", "cosine"), default="cka", help="of redundancy; default: cka")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="default: as it was saved")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--backend", choices=moe_kernels.backends.NAMES, help="default: the best one here")
    add("--seed", type=int, default=0, help="of the sample of --max-tokens; default: 0")
    add("--out", type=Path, default=Path("out/routing"), help="default: %(default)s")
    return parser


def parse(arguments: list[str] | None) -> tuple[Settings, Path]:
    parser = make_parser()
    given = parser.parse_args(arguments)
    for name, least in (
        ("text_tokens", 1), ("block", 2), ("max_sequences", 1), ("batch", 1), ("max_tokens", 4)
    ):  # fmt: skip
        if getattr(given, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    given.tokenizer = given.tokenizer or given.model
    wanted = given.backend
    settle_device(parser, given)
    given.backend = wanted  # None stays None: a model that is not patched has none
    try:
        check_adapter(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name in ("sequences", "text"):
        if getattr(given, name) and not Path(getattr(given, name)).is_file():
            parser.error(f"--{name}: {getattr(given, name)} is not a file")
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: getattr(given, name) for name in names}), given.out


def check_adapter(given: argparse.Namespace) -> None:
    """Fills in what follows from the adapter."""
    if given.adapter is None:
        for name in ("modality", "sequences", "backend"):
            if getattr(given, name):
                raise ValueError(f"--{name} says something only with --adapter")
        return
    names = ModalityLoraConfig.from_adapter(given.adapter).modalities
    given.modality = given.modality or names[0]
    if given.modality not in names:
        raise ValueError(f"--modality: the adapter has {', '.join(names)}, not {given.modality}")
    if given.sequences is None:
        folder = Path(given.adapter).resolve()
        beside = [place / HELD_OUT for place in (folder, folder.parent)]
        found = [str(path) for path in beside if path.is_file()]
        if not found:
            raise ValueError(f"no {HELD_OUT} in or beside {given.adapter}: give --sequences")
        given.sequences = found[0]


def main(arguments: list[str] | None = None) -> int:
    settings, out = parse(arguments)
    return exit_code(lambda: Program(settings, out).run())


if __name__ == "__main__":
    sys.exit(main())

"""Measure which experts of a Mixture of Experts serve which modality, and how alike they are.

    moe-kernels analyze-routing MODEL
    moe-kernels analyze-routing MODEL --adapter out/run/adapter

MODEL is a local folder or a hub id (OLMoE, Mixtral, Qwen-MoE, ...). Alone it is measured on
held-out text. With an adapter that moe_kernels has saved, text and sequences of the adapter's
modality are measured twice: before (low-rank updates off) and after (on).

Sequences are a safetensors file with `input_ids` (N, S) int64 and, if there is padding,
`attention_mask` (N, S) int64, such as held_out.safetensors of moe-kernels train-text-to-image.

Under --out: report.json, the routing counts and similarities as JSON, and pictures. Every stage is
kept there, keyed by its settings: a second run, or one that was interrupted, continues where the
first stopped. docs/routing.md explains the figures, and what a full-size model needs.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.analysis import (
    ExpertRedundancy,
    RoutingRecorder,
    RoutingStatistics,
    expert_redundancy,
    modality_by_token_id,
)
from moe_kernels.programs.shared.cli import Options, console, exit_code, option, parse
from moe_kernels.programs.shared.files import write_json
from moe_kernels.programs.shared.models import DTYPES, load_causal_lm, load_tokenizer
from moe_kernels.programs.shared.options import BackendOptions, out_folder, text_file
from moe_kernels.programs.shared.outputs import check_outputs
from moe_kernels.programs.shared.reports.analyze_routing import describe, draw_figures, summarize
from moe_kernels.programs.shared.stages import Stages, digest, model_identity
from moe_kernels.programs.shared.texts import held_out_text, spread, text_blocks
from moe_kernels.progress import bar

HELD_OUT = "held_out.safetensors"
FILES = (
    "report.json", "routing_*.json", "redundancy_*.json", "redundancy_*.png", "load_*.png",
    "specialisation_*.png", "divergence.png",
)  # fmt: skip


# --- options


@dataclass(kw_only=True)
class AdapterOptions(Options):
    """Adapter."""

    adapter: str | None = option(None, "adapter that save_adapter wrote", metavar="FOLDER")
    modality: str | None = option(None, "modality of the adapter; default: its first")
    sequences: str | None = option(
        None, f"held-out sequences of the modality; default: {HELD_OUT} in or beside the adapter",
        metavar="FILE", is_file=True,
    )  # fmt: skip


@dataclass(kw_only=True)
class MeasuringOptions(Options):
    """Measurements."""

    text: str | None = text_file("held-out")
    text_tokens: int = option(16_384, "tokens of text, at most", at_least=1)
    block: int = option(256, "tokens in a row of text", at_least=2)
    max_sequences: int = option(256, "sequences, at most", at_least=1)
    batch: int = option(8, "rows in a batch", at_least=1)
    max_tokens: int = option(512, "tokens to compare experts on, at most", at_least=4)
    metric: str = option("cka", "similarity of experts", choices=("cka", "cosine"))


@dataclass(kw_only=True)
class RoutingOptions(AdapterOptions, MeasuringOptions, BackendOptions):
    """Model."""

    model: str = option(MISSING, "local folder or hub id of a Mixture of Experts", positional=True)
    tokenizer: str | None = option(None, "folder or hub id; default: the model's")
    dtype: str = option("auto", "dtype of the model; auto is as saved", choices=("auto", *DTYPES))
    out: Path = out_folder("routing")

    def __post_init__(self) -> None:
        requested = self.backend
        super().__post_init__()
        self.backend = requested  # a model that is not patched uses none
        self.tokenizer = self.tokenizer or self.model
        if self.adapter is None:
            for name in ("modality", "sequences", "backend"):
                if getattr(self, name):
                    raise ValueError(f"--{name} has a meaning only with --adapter")
        else:
            self.modality = find_modality(self.adapter, self.modality)
            self.sequences = self.sequences or find_sequences(self.adapter)

    @property
    def states(self) -> tuple[str, ...]:
        return ("before",) if self.adapter is None else ("before", "after")


def find_modality(adapter: str, requested: str | None) -> str:
    names = ModalityLoraConfig.from_adapter(adapter).modalities
    if requested not in (None, *names):
        raise ValueError(f"--modality: the adapter has {', '.join(names)}, not {requested}")
    return requested or names[0]


def find_sequences(adapter: str) -> str:
    folder = Path(adapter).resolve()
    for path in (folder / HELD_OUT, folder.parent / HELD_OUT):
        if path.is_file():
            return str(path)
    raise ValueError(f"no {HELD_OUT} in or beside {adapter}: give --sequences")


# --- data


def text_rows(options: RoutingOptions) -> Tensor:
    """Return (N, block) token ids, spread evenly over the text."""
    tokenizer = load_tokenizer(options.tokenizer)
    text = held_out_text(options.text)
    blocks = text_blocks(tokenizer, text, options.block, options.block)
    return spread(blocks, max(1, options.text_tokens // options.block))


def sequence_rows(options: RoutingOptions) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, (N, S) int64; nothing without --sequences.

    Raises:
        ValueError: the file is damaged, or its tensors are missing or have other shapes or dtypes.
    """
    if options.sequences is None:
        return {}
    path = Path(options.sequences)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if "input_ids" not in tensors:
        raise ValueError(f"{path} has no tensor input_ids, it has {', '.join(sorted(tensors))}")
    input_ids = tensors["input_ids"]
    mask = tensors.get("attention_mask", torch.ones_like(input_ids))
    both = {"input_ids": input_ids, "attention_mask": mask}
    for name, tensor in both.items():
        if tensor.dtype != torch.int64 or tensor.shape != input_ids.shape or tensor.ndim != 2:
            raise ValueError(
                f"{path}: {name} must be (N, S) int64, is {tuple(tensor.shape)} {tensor.dtype}"
            )
    return {name: spread(tensor, options.max_sequences) for name, tensor in both.items()}


# --- the model


class Subject:
    """The model, patched if there is an adapter, and its batches."""

    def __init__(self, options: RoutingOptions, text: Tensor, sequences: dict[str, Tensor]):
        self.options = options
        self.model = load_causal_lm(options.model, options.dtype, options.device)
        self.patched = None
        if options.adapter:
            config = ModalityLoraConfig.from_adapter(options.adapter, options.backend)
            self.patched = patch_model(self.model, config)
            self.patched.load_adapter(options.adapter)
        RoutingRecorder(self.model)  # raises if there is no router
        self._check_ids(text, sequences)
        self.text = self._batches({"input_ids": text})
        self.sequences = self._batches(sequences)

    def _check_ids(self, text: Tensor, sequences: dict[str, Tensor]) -> None:
        known = self.model.config.vocab_size
        for name, ids in (("text", text), ("sequences", sequences.get("input_ids"))):
            if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
                raise ValueError(
                    f"the {name} has token ids {int(ids.min())}..{int(ids.max())}, the model knows "
                    f"0..{known - 1}: another tokenizer, or sequences made for another adapter?"
                )
        if sequences:
            served = self.modality_of(sequences["input_ids"]) == self._modality_id
            if not (served & (sequences["attention_mask"] == 1)).any():
                raise ValueError(f"no sequence has a token of modality {self.options.modality!r}")

    @property
    def _modality_id(self) -> int:
        return self.patched.config.modalities.index(self.options.modality) + 1

    def modality_of(self, input_ids: Tensor) -> Tensor:
        names = self.patched.config.modalities
        ranges = {name: self.patched.modality_token_ids(name) for name in names}
        return modality_by_token_id(ranges)(input_ids)

    def _batches(self, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        parts = [
            tensor.to(self.model.device).split(self.options.batch) for tensor in tensors.values()
        ]
        # Only routing is measured: no logits, no cache.
        common = {"logits_to_keep": 1, "use_cache": False}
        return [dict(zip(tensors, rows, strict=True)) | common for rows in zip(*parts, strict=True)]

    def in_state(self, state: str) -> contextlib.AbstractContextManager:
        off = self.patched is not None and state == "before"
        return self.patched.adapters_disabled() if off else contextlib.nullcontext()

    @torch.no_grad()
    def routing(self, state: str) -> RoutingStatistics:
        """Count the routing of text and of the modality, without captions of the sequences."""
        with self.in_state(state), RoutingRecorder(self.model) as recorder:
            for batch in bar(self.text, desc="text", unit="batches"):
                self.model(**batch)
            for batch in bar(self.sequences, desc="sequences", unit="batches"):
                modality = self.modality_of(batch["input_ids"])
                recorder.observe(modality.masked_fill(modality == 0, -1))
                self.model(**batch)
        return recorder.statistics()

    def redundancy(self, state: str, modality: str, adapted: bool) -> ExpertRedundancy:
        batches = self.text if modality == "text" else self.sequences
        with self.in_state(state):
            return expert_redundancy(
                self.model, batches, modality=modality, adapted=adapted,
                metric=self.options.metric, max_tokens=self.options.max_tokens,
                seed=self.options.seed, progress=True,
            )  # fmt: skip


# --- stages


class Setup:
    """Options and inputs, and the model, loaded when the first stage needs it."""

    def __init__(self, options: RoutingOptions):
        self.options = options
        self.text, self.sequences = text_rows(options), sequence_rows(options)

    @functools.cached_property
    def subject(self) -> Subject:
        return Subject(self.options, self.text, self.sequences)

    @property
    def inputs(self) -> dict[str, Any]:
        """Inputs of every stage."""
        tensors, adapter = {"text": self.text, **self.sequences}, self.options.adapter
        return {
            "model": model_identity(self.options.model),
            "adapter": model_identity(adapter) if adapter else None,
            "shapes": {name: tensor.shape for name, tensor in tensors.items()},
            "contents": digest(*tensors.values()),
            **self.options.pick("modality", "dtype", "device", "backend", "batch"),
        }


def measure_routing(setup: Setup, stages: Stages, state: str) -> RoutingStatistics:
    stage = stages.run(
        f"routing-{state}", setup.inputs, lambda _: setup.subject.routing(state).to_dict()
    )
    return RoutingStatistics.from_dict(stage.result)


def measure_redundancy(
    setup: Setup, stages: Stages, name: str, state: str, modality: str, adapted: bool
) -> ExpertRedundancy:
    inputs = setup.inputs | setup.options.pick("metric", "max_tokens", "seed")
    stage = stages.run(
        f"redundancy-{name}", inputs,
        lambda _: setup.subject.redundancy(state, modality, adapted).to_dict(),
    )  # fmt: skip
    return ExpertRedundancy.from_dict(stage.result)


def measure_redundancies(setup: Setup, stages: Stages) -> dict[str, ExpertRedundancy]:
    """Compare experts on text, on which adapters do not act, and on the modality by state."""
    compared = {"text": ("before", "text", True)}
    if modality := setup.options.modality:
        compared |= {
            f"{modality}_before": ("before", modality, True),
            f"{modality}_after": ("after", modality, True),
            f"{modality}_after_base_experts": ("after", modality, False),
        }
    return {name: measure_redundancy(setup, stages, name, *each) for name, each in compared.items()}


def run(options: RoutingOptions) -> None:
    check_outputs(options.out, FILES)
    setup, stages = Setup(options), Stages(options.out / "stages")
    routing = {state: measure_routing(setup, stages, state) for state in options.states}
    redundancy = measure_redundancies(setup, stages)
    for kind, found in (("routing", routing), ("redundancy", redundancy)):
        for name, values in found.items():
            write_json(options.out / f"{kind}_{name}.json", values.to_dict(), indent=None)
    draw_figures(routing, redundancy, options.modality, options.out)
    report = describe(routing, redundancy, options.modality) | stages.describe(options)
    write_json(options.out / "report.json", report)  # last: where it exists, the rest does
    summarize(report, options.modality)
    console.print(f"written: {options.out}", markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(RoutingOptions, arguments, __doc__, prog="moe-kernels analyze-routing")
    return exit_code(lambda: run(options))

"""Runs of the MoExtend study: what each trains, on what, and how it is measured."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.imaging import IGNORE_INDEX
from moe_kernels.moextend import ExpertExtender, LayerScores
from moe_kernels.programs.shared import questions
from moe_kernels.programs.shared.encoder import (
    EncodedPictures,
    EncoderSettings,
    load_encoded,
    train_encoder,
)
from moe_kernels.programs.shared.pictures import DIGITS
from moe_kernels.programs.shared.questions import QuestionSet, Viewer, WordQuestion
from moe_kernels.programs.shared.stages import Stages, Workspace
from moe_kernels.programs.shared.text_model import TextModelSettings, load_text_model, pretrain
from moe_kernels.programs.shared.text_to_image import compare_text, text_logits, text_nll
from moe_kernels.programs.shared.texts import documentation, source_code, text_blocks
from moe_kernels.programs.shared.training import mean_nll, train
from studies.sweep import record_training, training_arguments

KINDS = ("digit", "sum")
# Tokens that may choose added experts: those of pictures, all of a sequence, or every token. Source
# code has the task's id at every token, so the first two are the same.
GATES = {"pictures": ("modality", "sequence", "none"), "code": ("modality", "none")}
TEXT_BATCH = 32
# Seed of the order in which random halves of the layers are drawn, the same for all runs.
HALVES_SEED, DRAWS = 2408, ("random-a", "random-b", "random-c")
# Low-rank updates of these ranks have about as many parameters as one expert in half of the layers.
LORA_RANKS = {"experts": 1, "attention": 5}


@dataclass(frozen=True)
class Run:
    """Settings of one training, which starts from an aligned model.

    task: "pictures" (questions about digits) or "code" (source code as a task of text)
    method: "extension" (added experts, their router columns, calibration), "projector" (it goes on
        alone), "full" (the whole language model), "lora" (low-rank updates on the task's tokens),
        "all_tokens" (the same on every token)
    gate: tokens that may choose added experts, or get low-rank updates: "modality" (those of
        pictures), "sequence" (all of a sequence of the task), "none" (every token, as published)
    layers: those of ``ExpertExtender.extend``, or one of DRAWS
    lr: None: the tuned one
    """

    task: str = "pictures"
    method: str = "extension"
    gate: str = "modality"
    layers: str = "top-half"
    experts: int = 1
    init: str = "most_selected"
    calibration: str | None = "additive"
    lr: float | None = None

    @property
    def whole_sequences(self) -> bool:
        """True if all tokens of a sequence have the modality, which without a gate is a name."""
        return self.task == "code" or self.gate != "modality"

    @property
    def changes_text(self) -> bool:
        """True if training reaches text without ids."""
        if self.method == "extension":
            return self.gate == "none"
        return self.method in ("full", "all_tokens")

    @property
    def decides(self) -> Run:
        """Run on which the learning rate is tuned.

        It is a run that computes the same on the task, if there is one: a gate by sequence and no
        gate do. Else it is the run itself, on layers that no score chose, so that no choice of
        layers has a rate of its own.
        """
        run = dataclasses.replace(self, lr=None)
        if run.method == "lora" and run.whole_sequences:
            return Run(run.task, "all_tokens")
        if run.method != "extension":
            return run
        if run.gate == "none" and run.init == "most_selected_tuned":
            return run
        if run.gate == "none":
            run = dataclasses.replace(run, gate=GATES[run.task][-2])
        layers = "all" if run.layers == "all" else "interval"
        return dataclasses.replace(run, layers=layers)

    @property
    def trains(self) -> str:
        """Name of the learning rate that runs share."""
        run = self.decides
        gates = {"modality": "gated", "sequence": "gated by sequence", "none": "as published"}
        what = run.method.replace("_", " ")
        if run.method == "extension":
            default = Run()
            variant = [
                f"{name} {getattr(run, name)}".lower()
                for name in ("experts", "init", "calibration")
                if getattr(run, name) != getattr(default, name) and run.gate != "none"
            ] + ["all layers"] * (run.layers == "all")
            what = ", ".join(["added experts", gates[run.gate], *variant])
        return f"{run.task}: {what}"


@dataclass(frozen=True)
class Budget:
    """Sizes and lengths that all runs of a sweep share."""

    text: TextModelSettings = TextModelSettings(layers=6, text_steps=800)
    word_questions: int = 30_000
    encoder: EncoderSettings = EncoderSettings()
    align_steps: int = 150
    align_learning_rate: float = 3e-3
    score_steps: int = 40
    steps: int = 150
    batch: int = 16
    code_block: int = 64
    code_batch: int = 12
    held_out_questions: int = 500
    held_out_blocks: int = 128


class Setup:
    """Text model, encoder, aligned projector and layer scores that all runs of a seed share."""

    def __init__(self, budget: Budget, seed: int, stages: Stages):
        self.budget, self.seed, self.stages = budget, seed, stages
        self.text_settings = dataclasses.replace(budget.text, seed=seed)

    @property
    def _inputs(self) -> dict[str, Any]:
        return dataclasses.asdict(self.budget) | {"seed": self.seed}

    # --- text

    @cached_property
    def folder(self) -> Path:
        """Folder of the base, which learnt documentation and questions in words."""
        settings, count = self.text_settings, self.budget.word_questions
        words = questions.as_text(self.learnt_words)
        return self.stages.run(
            f"base-{self.seed}", dataclasses.asdict(settings) | {"word_questions": count},
            lambda workspace: pretrain(settings, workspace, words),
        ).folder  # fmt: skip

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_text_model(self.folder, "cpu")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.load()[1]

    @cached_property
    def blocks(self) -> torch.Tensor:
        return text_blocks(self.tokenizer, documentation()["test"], 128, 128)[:64]

    @cached_property
    def learnt_words(self) -> list[WordQuestion]:
        """Questions in words that the base learns; two thirds are sums, which are harder."""
        return questions.ask_words(DIGITS, (*KINDS, "sum"), self.budget.word_questions, self.seed)

    @cached_property
    def words(self) -> list[WordQuestion]:
        return questions.ask_words(DIGITS, KINDS, 400, self.seed + 1)

    @cached_property
    def code(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        """Blocks of source code by part, with the task's id at every token."""
        block, count = self.budget.code_block, self.budget.held_out_blocks
        items = {}
        for part, text in source_code().items():
            blocks = text_blocks(self.tokenizer, text, block, block)
            generator = torch.Generator().manual_seed(self.seed)
            blocks = blocks[torch.randperm(len(blocks), generator=generator)]
            blocks = blocks if part == "train" else blocks[:count]
            items[part] = [
                {"input_ids": ids, "labels": ids, "modality_ids": torch.ones_like(ids)}
                for ids in blocks
            ]
        return items

    def code_batches(self, part: str) -> list[dict[str, torch.Tensor]]:
        return stacked(self.code[part], TEXT_BATCH)

    @property
    def plain(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        """Batches of text without ids, by kind, which a gate must leave bit-identical."""
        words = [questions.encode(self.tokenizer, each.prompt, each.answer) for each in self.words]
        return {
            "code": [without_ids(batch) for batch in self.code_batches("test")],
            "words": [
                questions.collate_text(self.tokenizer, words[start : start + 100])
                for start in range(0, len(words), 100)
            ],
        }

    # --- pictures

    @cached_property
    def pictures(self) -> dict[str, EncodedPictures]:
        settings = dataclasses.replace(self.budget.encoder, seed=self.seed)
        return load_encoded(self.stages.run(
            f"encoder-{self.seed}", dataclasses.asdict(settings),
            lambda workspace: train_encoder(settings, workspace),
        ).folder)  # fmt: skip

    def questions(self, part: str, count: int | None, seed: int = 0) -> QuestionSet:
        """Ask ``count`` questions of each kind about a part's pictures, in turn; None: one each."""
        pictures = self.pictures[part]
        asked = [
            questions.ask(pictures, kind, count, self.seed + seed + i)
            for i, kind in enumerate(KINDS)
        ]
        mixed = [question for group in zip(*asked, strict=True) for question in group]
        return QuestionSet(pictures, mixed, self.tokenizer)

    @cached_property
    def held_out(self) -> dict[str, QuestionSet]:
        count = self.budget.held_out_questions
        return {part: self.questions(part, count) for part in ("choice", "test")}

    @property
    def progress_batches(self) -> list[dict[str, torch.Tensor]]:
        """A few questions of both kinds, for the held-out loss during training."""
        return self.questions("choice", min(50, self.budget.held_out_questions), 20).batches(100)

    @cached_property
    def projector(self) -> dict[str, torch.Tensor]:
        """Weights of the aligned projector."""

        def build(workspace: Workspace) -> dict[str, Any]:
            model, tokenizer = self.load()
            budget = self.budget
            viewer = Viewer(ExpertExtender(model, ("image",)))
            history = questions.align(
                viewer, self.questions("train", None), self.progress_batches, workspace,
                **training_arguments(
                    budget.align_steps, budget.batch, budget.align_learning_rate,
                    warmup_steps=budget.steps // 15, seed=self.seed,
                ),
            )  # fmt: skip
            return {
                "history": history,
                "words": questions.grade_words(model, tokenizer, self.words),
                "test": viewer.grade(self.held_out["test"]),
                "most_common_answer": self.held_out["test"].most_common_answer(),
            }

        folder = self.stages.run(f"align-{self.seed}", self._inputs, build).folder
        model, _ = self.load()
        extender = ExpertExtender(model, ("image",))
        extender.patched.load_adapter(folder / "adapter")
        return extender.projector().state_dict()

    def score_batches(self, viewer: Viewer | None, half: int) -> list[dict[str, torch.Tensor]]:
        """Return one half (0 or 1) of the data held out for choices, to score layers by."""
        is_code, size = viewer is None, self.budget.batch
        items = self.code["choice"] if is_code else self.held_out["choice"].questions
        count = len(items) // 2
        scored = items[half * count : (half + 1) * count]
        if is_code:
            return stacked(scored, size)
        asked = dataclasses.replace(self.held_out["choice"], questions=scored)
        return questions.joined_batches(viewer, asked, size)

    def scores(self, task: str, gate: str, half: int = 0) -> LayerScores:
        """Score the layers by the tokens that may choose added experts behind this gate."""

        def build(workspace: Workspace) -> dict[str, Any]:
            extender, viewer = start(self, Run(task, gate=gate), self.load()[0])
            return extender.score_layers(
                self.score_batches(viewer, half), self.budget.score_steps,
                count="all" if gate == "none" else "modality", progress=False,
            ).to_dict()  # fmt: skip

        name = f"scores-{task}-{gate}-{half}-{self.seed}"
        inputs = self._inputs | {"task": task, "gate": gate, "half": half}
        return LayerScores.from_dict(self.stages.run(name, inputs, build).result)

    def to_dict(self) -> dict[str, Any]:
        """Figures that hold for all runs of the seed."""
        found = {
            name: {
                f"{task}-{gate}": record_scores(self.scores(task, gate, half))
                for task, gates in GATES.items()
                for gate in gates
                if gate != "none"
            }
            for half, name in enumerate(("scores", "scores_again"))
        }
        _ = self.pictures, self.projector  # their stages
        encoder = self.stages.results[f"encoder-{self.seed}"]
        aligned = self.stages.results[f"align-{self.seed}"]
        model, tokenizer = self.load()
        learnt = {each.prompt for each in self.learnt_words}
        return found | {
            "encoder_accuracy": encoder["accuracy"],
            "words": questions.grade_words(model, tokenizer, self.words),
            "words_learnt": sum(each.prompt in learnt for each in self.words) / len(self.words),
            "prompts_learnt": {
                kind: len({each.prompt for each in self.learnt_words if each.kind == kind})
                for kind in KINDS
            },
            "code_nll": mean_nll(model, [without_ids(b) for b in self.code_batches("test")]),
            **{name: aligned[name] for name in ("test", "most_common_answer")},
        }


def record_scores(scores: LayerScores) -> dict[str, Any]:
    """Keep the counts, from which the scores follow."""
    return {key: value for key, value in scores.to_dict().items() if key not in ("d", "order")}


def stacked(items: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """Return the items in batches of ``size``."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return [
        {name: torch.stack([item[name] for item in part]) for name in part[0]} for part in parts
    ]


def without_ids(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch for a model that was not patched."""
    return {name: tensor for name, tensor in batch.items() if name != "modality_ids"}


# --- one run


def start(setup: Setup, run: Run, model: PreTrainedModel) -> tuple[ExpertExtender, Viewer | None]:
    """Patch the model, with the aligned projector and nothing added yet."""
    name = "image" if run.task == "pictures" else "task"
    whole = (name,) if run.whole_sequences else ()
    if run.method in ("lora", "all_tokens"):
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), LORA_RANKS["attention"])
        config = ModalityLoraConfig(
            r=LORA_RANKS["experts"], lora_alpha=2 * LORA_RANKS["experts"], modalities=(name,),
            rank_pattern=attention, alpha_pattern={key: 2 * r for key, r in attention.items()},
            sequence_modalities=whole,
        )  # fmt: skip
        torch.manual_seed(setup.seed)
        patch_model(model, config)
        extender = ExpertExtender(model)
    else:
        extender = ExpertExtender(model, (name,), sequence_modalities=whole)
    if run.method == "full":
        train_base_experts(model)
    if run.task == "code":
        return extender, None
    weights = setup.projector
    projector = extender.add_projector(setup.pictures["train"].features.shape[-1])
    projector.load_state_dict(weights)
    projector.requires_grad_(run.method == "projector")
    return extender, Viewer(extender, whole_sequences=run.whole_sequences)


def train_base_experts(model: PreTrainedModel) -> None:
    """Give a patched model transformers' experts: ours compute no gradient of the base's."""
    model.set_experts_implementation("grouped_mm")


def add(setup: Setup, run: Run, extender: ExpertExtender) -> dict[str, tuple[int, ...]]:
    """Add what trains; return the layers that got experts and the experts that were copied."""
    if run.method == "all_tokens":
        extender.patched.modality_of = torch.ones_like  # text too is the modality
    if run.method == "full":
        extender.model.requires_grad_(True)
        if run.task == "pictures":
            extender.projector().requires_grad_(False)
    if run.method != "extension":
        return {"layers": (), "sources": ()}
    config = extender.extend(
        chosen_layers(run.layers, extender.layers, setup.seed), run.experts, init=run.init,
        modality_gate=run.gate != "none", calibration=run.calibration,
        scores=setup.scores(run.task, run.gate), seed=setup.seed, freeze_earlier=True,
    )  # fmt: skip
    return {
        "layers": tuple(config.experts),
        "sources": tuple((config.sources or {}).values()),
    }


def chosen_layers(layers: str, present: tuple[int, ...], seed: int) -> str | list[int]:
    """Return the ``layers`` of ``extend``; random halves repeat only after all have come."""
    if layers not in DRAWS:
        return layers
    halves = list(itertools.combinations(present, len(present) // 2))
    order = np.random.default_rng(HALVES_SEED).permutation(len(halves))
    position = len(DRAWS) * seed + DRAWS.index(layers)
    return list(halves[order[position % len(halves)]])


@torch.no_grad()
def read(model: PreTrainedModel, texts: dict[str, list[dict[str, torch.Tensor]]]) -> dict[str, Any]:
    """Return, by text, the logits (tokens, V) of real tokens, and the nats a labelled token."""
    found = {}
    for name, batches in texts.items():
        logits, nll, count = [], 0.0, 0
        for batch in batches:
            scores = model(**{key: batch[key] for key in batch if key != "labels"}).logits
            labels = batch["labels"][:, 1:]
            nll += float(
                F.cross_entropy(
                    scores[:, :-1].mT, labels, ignore_index=IGNORE_INDEX, reduction="sum"
                )
            )
            count += int((labels != IGNORE_INDEX).sum())
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            logits.append(scores[real == 1])
        found[name] = (torch.cat(logits), nll / count)
    return found


def compare_plain(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare two results of :func:`read`."""
    return {
        name: {
            "tokens": len(logits),
            "logits_changed": int((after[name][0] != logits).sum()),
            "nll_before": nll,
            "nll_after": after[name][1],
        }
        for name, (logits, nll) in before.items()
    }


def measure_run(setup: Setup, run: Run, lr: float, workspace: Workspace) -> dict[str, Any]:
    model, tokenizer = setup.load()
    blocks, plain = setup.blocks, setup.plain
    logits = partial(text_logits, model, blocks, model.config.vocab_size, TEXT_BATCH)
    unpatched = logits()
    extender, viewer = start(setup, run, model)
    before, plain_before = logits(), read(model, plain)
    result: dict[str, Any] = add(setup, run, extender)
    result["text_nll_at_step_0"] = text_nll(logits(), blocks)
    if run.method == "extension":
        result["disturbance"] = disturbance(setup, extender, viewer)
    history = learn(setup, run, extender, viewer, lr, workspace)
    model.eval()
    test = grade(setup, extender, viewer, "test")
    result |= record_training(model, history) | {
        "test": test,
        "choice_nll": grade(setup, extender, viewer, "choice")["nll"],
        "test_nll": test["nll"],
        "text": compare_text(unpatched, before, logits(), blocks),
        "max_abs_logit_difference_by_patching": float((before - unpatched).abs().max()),
        "plain": compare_plain(plain_before, read(model, plain)),
        "words": questions.grade_words(model, tokenizer, setup.words),
    }
    return result


def learn(
    setup: Setup, run: Run, extender: ExpertExtender, viewer: Viewer | None, lr: float,
    workspace: Workspace,
) -> dict[str, Any]:  # fmt: skip
    budget = setup.budget
    batch = budget.batch if run.task == "pictures" else budget.code_batch
    warmup = budget.steps // 15
    options = training_arguments(budget.steps, batch, lr, warmup_steps=warmup, seed=setup.seed)
    is_full = run.method == "full"
    if viewer is not None:
        # The projector was aligned by other questions about the same pictures.
        asked = setup.questions("train", None, seed=10)
        checkpoints = "model" if is_full else "adapter"
        return viewer.learn(
            asked, setup.progress_batches, workspace, checkpoints=checkpoints, **options
        )
    held_out = setup.code_batches("choice")[:1]
    return train(
        extender.model if is_full else extender.patched, setup.code["train"],
        lambda model: mean_nll(model, held_out), workspace, **options,
    )  # fmt: skip


def grade(
    setup: Setup, extender: ExpertExtender, viewer: Viewer | None, part: str
) -> dict[str, Any]:
    if viewer is not None:
        return viewer.grade(setup.held_out[part])
    return {"nll": mean_nll(extender.model, setup.code_batches(part))}


def disturbance(
    setup: Setup, extender: ExpertExtender, viewer: Viewer | None
) -> dict[str, dict[str, Any]]:
    """Measure what copies change before they learn, on text alone and on tokens of the task."""
    text = [{"input_ids": ids} for ids in setup.blocks.split(TEXT_BATCH)]
    if viewer is None:
        task = setup.code_batches("choice")
    else:
        task = questions.joined_batches(viewer, setup.questions("choice", 50), 100)
    name = extender.patched.config.modalities[0]
    return {
        "text": extender.disturbance(text)["text"].to_dict(),
        "task": extender.disturbance(task)[name].to_dict(),
    }

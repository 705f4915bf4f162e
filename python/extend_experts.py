"""Adds experts to a text-only Mixture of Experts, which then answers questions about pictures.

    python python/extend_experts.py                                # a small model, digits
    python python/extend_experts.py MODEL --data digits --tasks digit sum
    python python/extend_experts.py MODEL --data emoji:package

MODEL is a local folder or a hub id of a Mixtral, OLMoE or Qwen-MoE model; without it a small OLMoE
learns Python's own documentation first (and, in words, the questions), in float32. --data: "digits"
(5,000 of MNIST) or "emoji:" and the folder of the npm package emoji-datasource-twitter.

The stages of MoExtend (arXiv 2408.03511):
1. encoder: learns the pictures' names beforehand, and is frozen from then on.
2. align: a projector from its features into the model learns alone.
3. score: how far the choices of each layer's router move when the routers alone learn.
4. extend: some layers get experts, copies at first; what that alone disturbs is measured.
5. tune: the added experts, their router rows and calibrations learn; all else is frozen.
6. measure: held-out pictures and text, with the adapter loaded from its file.

Under --out: adapter/ and encoder/, answers.png, scores.png, training.png, report.md, report.json.
Every stage is kept, keyed by its settings: a second run, or one that was interrupted, goes on where
the first stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from shared.cli import add_run_options, exit_code, settle_device
from shared.files import copy_whole, replacing, write_text
from shared.models import count_experts, load_causal_lm, require_experts
from shared.pictures import CaptionedPictures
from shared.questions import (
    QUESTIONS,
    EncoderSettings,
    QuestionSet,
    Viewer,
    align,
    as_text,
    ask,
    ask_words,
    fine_tune,
    joined_batches,
    load_encoded,
    read_pictures,
    split_pictures,
    train_encoder,
)
from shared.reports.extend_experts import write_pages
from shared.stages import Stages, Workspace, digest, model_identity
from shared.text_model import TextModelSettings, pretrain, start_text_model, train_text_tokenizer
from shared.text_to_image import compare_text, text_logits
from shared.texts import documentation, text_blocks
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe_kernels
from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.imaging import IGNORE_INDEX, caption_ids
from moe_kernels.moextend import ExpertExtender, LayerScores

MODALITY = "image"
TASKS = {"digits": ("digit", "sum"), "emoji": ("category",)}
GATES = ("pictures", "questions", "none")
LAYERS = ("top-half", "all", "interval", "first-half", "second-half")
INITS = ("most_selected", "most_selected_tuned", "mean", "random")
CALIBRATIONS = ("additive", "multiplicative", "none")
_WORD_QUESTIONS = 20_000
_TEXT_BATCH = 4


@dataclass(frozen=True)
class Settings:
    """What was asked for; each stage is keyed by the part that it depends on."""

    model: str | None
    dtype: str
    device: str
    backend: str | None
    seed: int
    data: str
    emoji_folder: str | None
    tasks: tuple[str, ...]
    held_out: int
    encoder_steps: int
    align_steps: int
    align_lr: float
    score_steps: int
    score_lr: float
    layers: str | tuple[int, ...]
    experts_per_layer: int
    init: str | int
    calibration: str | None
    gate: str
    steps: int
    batch: int
    lr: float
    text: str | None
    text_tokens: int
    text_block: int
    test_questions: int
    shown: int
    text_model: TextModelSettings = field(default_factory=TextModelSettings)

    def pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    @property
    def encoder(self) -> EncoderSettings:
        return EncoderSettings(
            emoji=self.emoji_folder, held_out=self.held_out, steps=self.encoder_steps,
            seed=self.seed, device=self.device,
        )  # fmt: skip

    @property
    def extension(self) -> dict[str, Any]:
        """Arguments of ``ExpertExtender.extend``."""
        names = ("layers", "experts_per_layer", "init", "calibration", "seed")
        return self.pick(*names) | {"modality_gate": self.gate != "none"}

    @property
    def counting(self) -> str:
        """Whose selections ``score_layers`` counts: the rows' that may choose added experts."""
        return "all" if self.gate == "none" else "modality"

    @property
    def patching(self) -> dict[str, Any]:
        """Arguments of ``ExpertExtender``."""
        whole = (MODALITY,) if self.gate == "questions" else ()
        return {"modalities": (MODALITY,), "sequence_modalities": whole, "backend": self.backend}


class Program:
    """The stages; what several of them need is loaded once."""

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out = settings, out
        self.stages = Stages(out / "stages")
        pictures = read_pictures(settings.encoder)
        self.pictures: dict[str, CaptionedPictures] = split_pictures(
            pictures, settings.held_out, settings.seed
        )

    # --- what stages share

    @cached_property
    def base(self) -> str:
        """The pretrained model's folder or hub id."""
        settings = self.settings
        if settings.model is not None:
            return settings.model
        names = self.pictures["train"].names
        words = as_text(ask_words(names, settings.tasks, _WORD_QUESTIONS, settings.seed))
        inputs = dataclasses.asdict(settings.text_model) | {"names": names} | settings.pick("tasks")
        folder = self.stages.run(
            "pretrain", inputs, lambda workspace: pretrain(settings.text_model, workspace, words)
        ).folder
        return str(folder / "model")

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def blocks(self) -> torch.Tensor:
        """(blocks, block) token ids of held-out text."""
        settings = self.settings
        text = Path(settings.text).read_text() if settings.text else documentation()["test"]
        blocks = text_blocks(self.tokenizer, text, settings.text_block, settings.text_block)
        return blocks[: max(1, settings.text_tokens // settings.text_block)]

    @property
    def text_batches(self) -> list[dict[str, torch.Tensor]]:
        batches = self.blocks.to(self.settings.device).split(_TEXT_BATCH)
        return [{"input_ids": ids} for ids in batches]

    def questions(self, part: str, count: int | None, seed: int = 0) -> QuestionSet:
        """``count`` of each task; None: as many as pictures."""
        seen, seed = self.encoded[part], self.settings.seed + seed
        asked = [ask(seen, task, count, seed + n) for n, task in enumerate(self.settings.tasks)]
        return QuestionSet(seen, sum(asked, []), self.tokenizer)

    @cached_property
    def test(self) -> QuestionSet:
        return self.questions("test", self.settings.test_questions)

    @cached_property
    def shown(self) -> QuestionSet:
        """Of the test's questions, some of each task."""
        each = -(-self.settings.shown // len(self.settings.tasks))
        size = self.settings.test_questions
        chosen = [
            question
            for start in range(0, len(self.test), size)
            for question in self.test.questions[start : start + min(each, size)]
        ]
        return dataclasses.replace(self.test, questions=chosen)

    def load(self, adapter: Path | None = None) -> Viewer:
        """The base, patched; or as an adapter's own files say."""
        settings = self.settings
        model = load_causal_lm(self.base, settings.dtype, settings.device)
        if adapter is None:
            return self.viewer(ExpertExtender(model, **settings.patching))
        config = ModalityLoraConfig.from_adapter(adapter, settings.backend)
        patch_model(model, config).load_adapter(adapter)
        return self.viewer(ExpertExtender(model))

    def viewer(self, extender: ExpertExtender) -> Viewer:
        ids = caption_ids(self.tokenizer, "a")
        begins = ids[0] == self.tokenizer.bos_token_id
        return Viewer(
            extender, MODALITY, whole_sequences=self.settings.gate == "questions",
            begin=int(begins),
        )  # fmt: skip

    def training(self, steps: int, lr: float) -> dict[str, Any]:
        settings = self.settings
        return {
            "max_steps": steps, "per_device_train_batch_size": settings.batch, "learning_rate": lr,
            "weight_decay": 0.01, "warmup_steps": steps // 15, "seed": settings.seed,
            "use_cpu": settings.device == "cpu",
        }  # fmt: skip

    # --- what they depend on

    @cached_property
    def aligned_inputs(self) -> dict[str, Any]:
        names = ("dtype", "device", "backend", "seed", "tasks", "batch", "align_steps", "align_lr")
        inputs = self.settings.pick(*names) | {"encoder": self.encoder_folder.name}
        # An adapter says which rows have the pictures' modality.
        return inputs | {"base": model_identity(self.base), "gate": self.settings.gate}

    @cached_property
    def score_inputs(self) -> dict[str, Any]:
        inputs = self.aligned_inputs | self.settings.pick("score_steps", "score_lr")
        return inputs | {"count": self.settings.counting}

    @cached_property
    def test_inputs(self) -> dict[str, Any]:
        return self.settings.pick("test_questions", "shown")

    @cached_property
    def extended_inputs(self) -> dict[str, Any]:
        names = ("layers", "experts_per_layer", "init", "calibration")
        return self.score_inputs | self.settings.pick(*names)

    @cached_property
    def tuned_inputs(self) -> dict[str, Any]:
        return self.extended_inputs | self.settings.pick("steps", "lr")

    @cached_property
    def text_inputs(self) -> dict[str, Any]:
        return {"text": digest(self.blocks)}

    # --- stages

    def encode(self) -> None:
        settings = self.settings.encoder
        inputs = dataclasses.asdict(settings)
        if settings.emoji is not None:
            inputs["emoji"] = model_identity(settings.emoji)
        self.encoder_folder = self.stages.run(
            "encoder", inputs, lambda workspace: train_encoder(settings, workspace)
        ).folder
        self.encoded = load_encoded(self.encoder_folder)

    def align(self) -> None:
        """Before it, what a projector that has not learnt is worth."""
        settings = self.settings

        def start(workspace: Workspace) -> dict[str, Any]:
            viewer = self.load()
            torch.manual_seed(settings.seed)
            viewer.extender.add_projector(self.test.pictures.features.shape[-1], modality=MODALITY)
            return self.graded(viewer)

        def build(workspace: Workspace) -> dict[str, Any]:
            arguments = self.training(settings.align_steps, settings.align_lr)
            history = align(
                self.load(),
                self.questions("train", None),
                self.curve_batches,
                workspace,
                **arguments,
            )
            return {"history": history}

        self.stages.run("start", self.aligned_inputs | self.test_inputs, start)
        folder = self.stages.run("align", self.aligned_inputs, build).folder
        self.aligned_adapter = folder / "adapter"
        self.stages.run(
            "aligned", self.aligned_inputs | self.test_inputs,
            lambda workspace: self.graded(self.load(self.aligned_adapter)),
        )  # fmt: skip

    @property
    def curve_batches(self) -> list[dict[str, torch.Tensor]]:
        """Few, for the curve of the held-out loss."""
        return self.questions("choice", min(64, len(self.encoded["choice"])), 20).batches(64)

    def graded(self, viewer: Viewer) -> dict[str, Any]:
        answers = viewer.answer(self.shown, max_new_tokens=self.longest_answer)
        return viewer.grade(self.test) | {"answers": answers}

    @cached_property
    def longest_answer(self) -> int:
        """Tokens, with the end of the line."""
        labels = [self.shown[index]["labels"] for index in range(len(self.shown))]
        return max(len(each) - each.count(IGNORE_INDEX) for each in labels)

    def score(self) -> None:
        settings = self.settings

        def build(workspace: Workspace) -> dict[str, Any]:
            viewer = self.load(self.aligned_adapter)
            count = min(settings.score_steps * settings.batch, len(self.encoded["choice"]))
            questions = self.questions("choice", count, 40)
            order = torch.randperm(
                len(questions), generator=torch.Generator().manual_seed(settings.seed)
            )
            mixed = [questions.questions[index] for index in order.tolist()]
            batches = joined_batches(
                viewer, dataclasses.replace(questions, questions=mixed), settings.batch
            )
            return viewer.extender.score_layers(
                batches, settings.score_steps, modality=MODALITY, lr=settings.score_lr,
                count=settings.counting,
            ).to_dict()  # fmt: skip

        self.stages.run("score", self.score_inputs, build)
        self.scores = LayerScores.from_dict(self.stages.results["score"])

    def extended(self) -> Viewer:
        """Aligned, with added experts that have not learnt."""
        viewer = self.load(self.aligned_adapter)
        viewer.extender.extend(**self.settings.extension, scores=self.scores)
        return viewer

    def extend(self) -> None:
        def build(workspace: Workspace) -> dict[str, Any]:
            viewer = self.extended()
            (config,) = viewer.extender.patched.extensions
            return {
                "extension": config.to_dict(),
                "parameters": count_parameters(viewer.extender),
                "disturbance": self.disturbance(viewer),
                **self.graded(viewer),
            }

        inputs = self.extended_inputs | self.test_inputs | self.text_inputs
        self.stages.run("extend", inputs, build)

    def disturbance(self, viewer: Viewer) -> dict[str, Any]:
        """Of text alone, and of the pictures' rows, against the model without the experts."""
        pictures = joined_batches(viewer, self.test, 50)
        return {
            "text": viewer.extender.disturbance(self.text_batches)["text"].to_dict(),
            "pictures": viewer.extender.disturbance(pictures)[MODALITY].to_dict(),
        }

    def tune(self) -> None:
        settings = self.settings

        def build(workspace: Workspace) -> dict[str, Any]:
            arguments = self.training(settings.steps, settings.lr)
            history = fine_tune(
                self.extended(), self.questions("train", None, 60), self.curve_batches, workspace,
                **arguments,
            )  # fmt: skip
            return {"history": history}

        self.tuned_adapter = self.stages.run("tune", self.tuned_inputs, build).folder / "adapter"

    def measure(self) -> None:
        """What the files say: the plain base, patched, and with the adapter."""

        def build(workspace: Workspace) -> dict[str, Any]:
            settings = self.settings
            model = load_causal_lm(self.base, settings.dtype, settings.device)

            def logits() -> torch.Tensor:
                return text_logits(model, self.blocks, model.config.vocab_size, _TEXT_BATCH)

            unpatched = logits()
            config = ModalityLoraConfig.from_adapter(self.tuned_adapter, settings.backend)
            patched = patch_model(model, config)
            before = logits()
            patched.load_adapter(self.tuned_adapter)
            viewer = self.viewer(ExpertExtender(model))
            with viewer.extender.disabled():
                off = viewer.grade(self.test)
            return {
                "text": compare_text(unpatched, before, logits(), self.blocks),
                "disturbance": self.disturbance(viewer),
                "experts_off": off,
                **self.graded(viewer),
            }

        inputs = self.tuned_inputs | self.test_inputs | self.text_inputs
        self.stages.run("measure", inputs, build)

    # --- what is left under --out

    def write_results(self) -> dict[str, Any]:
        results, out = self.stages.results, self.out
        copy_whole(self.tuned_adapter, out / "adapter")
        for name in ("encoder.json", "encoder.safetensors"):
            with replacing(out / "encoder" / name) as temporary:
                shutil.copyfile(self.encoder_folder / name, temporary)
        report = {
            "parameters": results["extend"]["parameters"],
            "text": results["measure"]["text"],
            "encoder": results["encoder"],
            "answers": self.answers(),
            "disturbance": {
                "step_0": results["extend"]["disturbance"],
                "tuned": results["measure"]["disturbance"],
            },
            "extension": results["extend"]["extension"],
            "scores": dict(zip(self.scores.layers, self.scores.d.tolist(), strict=True)),
            "training": {name: results[name]["history"] for name in ("align", "tune")},
            "shown": self.describe_shown(),
            "base": self.base,
            "seconds": self.stages.seconds,
            "settings": dataclasses.asdict(self.settings),
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
        }
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
        write_pages(report, self.scores, self.pictures["test"].images, out)
        return report

    def answers(self) -> dict[str, Any]:
        """Nats a token of the answers and the share right, by task, after each stage."""
        results = self.stages.results
        states = {
            "projector at random": results["start"], "projector aligned": results["aligned"],
            "experts added, step 0": results["extend"], "experts tuned": results["measure"],
            "tuned, experts shut": results["measure"]["experts_off"],
        }  # fmt: skip
        return {
            "count": self.settings.test_questions,
            "commonest_answer": self.test.most_common_answer(),
            "states": {
                state: {name: each[name] for name in ("nll", "accuracy")}
                for state, each in states.items()
            },
        }

    def describe_shown(self) -> list[dict[str, Any]]:
        aligned, tuned = (self.stages.results[name]["answers"] for name in ("aligned", "measure"))
        return [
            {
                "pictures": list(question.pictures),
                "question": QUESTIONS[question.kind][0].strip(),
                "answer": question.answer,
                "aligned": first,
                "tuned": last,
            }
            for question, first, last in zip(self.shown.questions, aligned, tuned, strict=True)
        ]

    def run(self) -> dict[str, Any]:
        check_extension(self.settings)
        _ = self.blocks  # a text that is too short is refused before anything long
        self.encode()
        self.align()
        self.score()
        self.extend()
        self.tune()
        self.measure()
        return self.write_results()


def count_parameters(extender: ExpertExtender) -> dict[str, Any]:
    """Of the base, of the projector, and of what was added and trains."""
    added = sum(parameter.numel() for parameter in extender.patched.trainable_parameters())
    projector = sum(parameter.numel() for parameter in extender.projector().parameters())
    total = sum(parameter.numel() for parameter in extender.model.parameters())
    base = total - added - projector
    return {"base": base, "projector": projector, "added": added, "share": added / base}


# --- what is refused before any work


def skeleton(settings: Settings) -> PreTrainedModel:
    """The base without its weights."""
    with torch.device("meta"):
        if settings.model is None:
            tokenizer = train_text_tokenizer("", settings.text_model.vocab_size)
            return start_text_model(settings.text_model, tokenizer, None)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.model))


def check_extension(settings: Settings) -> None:
    """Whether the base can be patched, and extended as was asked."""
    if settings.model is not None:
        require_experts(settings.model)
    model = skeleton(settings)
    extender = ExpertExtender(model, **settings.patching | {"backend": None})
    number = count_experts(model.config)
    counts = torch.ones(len(extender.layers), number, dtype=torch.int64)
    scores = LayerScores(extender.layers, counts, counts, (number,) * len(counts))
    extender.extend(**settings.extension, scores=scores)


# --- the program


QUICK = {
    "encoder_steps": 60, "align_steps": 20, "score_steps": 4, "steps": 20, "test_questions": 40,
    "text_tokens": 512, "held_out": 200, "text_steps": 20,
}  # fmt: skip
QUICK_TEXT_MODEL = {
    "vocab_size": 320, "hidden_size": 64, "layers": 2, "experts": 8, "experts_per_token": 2,
    "intermediate_size": 32, "text_block": 64,
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="local folder or hub id; default: a small one")
    parser.add_argument(
        "--text-steps", type=int, default=600, help="of the small one; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="little of everything, for a trial")
    group = parser.add_argument_group("pictures and questions").add_argument
    group("--data", default="digits", help='"digits" or "emoji:FOLDER"; default: %(default)s')
    group(
        "--tasks", nargs="+", choices=QUESTIONS, metavar="TASK",
        help="digits: digit, sum; emoji: category; default: all of them",
    )  # fmt: skip
    group("--held-out", type=int, default=1000, help="pictures; default: %(default)s")
    group("--encoder-steps", type=int, default=400, help="default: %(default)s")
    group = parser.add_argument_group("alignment and scores").add_argument
    group("--align-steps", type=int, default=300, help="default: %(default)s")
    group("--align-lr", type=float, default=3e-3, help="default: %(default)s")
    group("--score-steps", type=int, default=40, help="default: %(default)s")
    group("--score-lr", type=float, default=1e-3, help="default: %(default)s")
    group = parser.add_argument_group("extension").add_argument
    group(
        "--layers", nargs="+", default=["top-half"], metavar="LAYER",
        help=f"{', '.join(LAYERS)}, or indices; default: top-half, by the scores",
    )  # fmt: skip
    group("--experts-per-layer", type=int, default=1, metavar="N", help="default: %(default)s")
    group(
        "--init", default="most_selected",
        help=f"{', '.join(INITS)}, or an expert's id; default: %(default)s",
    )  # fmt: skip
    group("--calibration", choices=CALIBRATIONS, default="additive", help="default: %(default)s")
    group(
        "--gate", choices=GATES, default="questions",
        help="who may choose added experts: the pictures' rows, the text of questions about them "
        "too, or all text (as is published); default: %(default)s",
    )  # fmt: skip
    group = parser.add_argument_group("fine-tuning").add_argument
    group("--steps", type=int, default=300, help="default: %(default)s")
    group("--batch", type=int, default=16, help="default: %(default)s")
    group("--lr", type=float, default=3e-3, help="default: %(default)s")
    group = parser.add_argument_group("what is measured").add_argument
    group("--text", metavar="FILE", help="held-out text; default: Python's documentation")
    group("--text-tokens", type=int, default=2048, help="default: %(default)s")
    group("--text-block", type=int, default=128, help="default: %(default)s")
    group("--test-questions", type=int, default=200, help="of each task; default: %(default)s")
    group("--shown", type=int, default=12, help="questions with pictures; default: %(default)s")
    add_run_options(parser, out=Path("out/extend_experts"))
    return parser


def check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    counts = (
        "held_out", "encoder_steps", "align_steps", "score_steps", "experts_per_layer", "steps",
        "batch", "text_tokens", "test_questions", "shown", "text_steps",
    )  # fmt: skip
    for name in counts:
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("align_lr", "score_lr", "lr"):
        if not 0 < getattr(given, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if given.held_out < 4:
        parser.error("--held-out must be at least 4: one half decides, the other is reported")
    if given.text_block < 2:
        parser.error("--text-block must be at least 2")
    if given.text and not Path(given.text).is_file():
        parser.error(f"--text: {given.text} is not a file")


def settle_data(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Splits --data, and fills in --tasks."""
    given.data, colon, folder = given.data.partition(":")
    if (
        given.data not in TASKS
        or bool(folder) != (given.data == "emoji")
        or bool(colon) != bool(folder)
    ):
        parser.error('--data must be "digits" or "emoji:FOLDER"')
    given.emoji_folder = folder or None
    given.tasks = given.tasks or TASKS[given.data]
    if unknown := [task for task in given.tasks if task not in TASKS[given.data]]:
        parser.error(f"--tasks: nobody can be asked for {unknown[0]!r} of {given.data}")


def settle_extension(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """--layers, --init and --calibration as ``ExpertExtender.extend`` takes them."""
    if len(given.layers) == 1 and given.layers[0] in LAYERS:
        given.layers = given.layers[0]
    else:
        given.layers = _whole_numbers(parser, "--layers", given.layers, LAYERS)
    if given.init not in INITS:
        (given.init,) = _whole_numbers(parser, "--init", [given.init], INITS)
    given.calibration = None if given.calibration == "none" else given.calibration


def _whole_numbers(
    parser: argparse.ArgumentParser, option: str, values: list[str], names: tuple[str, ...]
) -> tuple[int, ...]:
    if not all(value.isdecimal() for value in values):
        parser.error(f"{option} must be one of {', '.join(names)}, or indices; got {values}")
    return tuple(map(int, values))


def parse(arguments: list[str] | None) -> tuple[Settings, Path]:
    parser = make_parser()
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    given = parser.parse_args(arguments)
    check(parser, given)
    settle_data(parser, given)
    settle_extension(parser, given)
    settle_device(parser, given)
    if given.model is None:
        given.dtype = "float32"
    own = QUICK_TEXT_MODEL if given.quick else {}
    own |= {"text_steps": given.text_steps, "seed": given.seed, "device": given.device}
    given.text_model = TextModelSettings(**own)
    values = {each.name: getattr(given, each.name) for each in dataclasses.fields(Settings)}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Settings(**values | lists), given.out


def main(arguments: list[str] | None = None) -> int:
    settings, out = parse(arguments)
    return exit_code(lambda: Program(settings, out).run())


if __name__ == "__main__":
    sys.exit(main())

"""Add experts to a text-only Mixture of Experts, which then answers questions about pictures.

    moe-kernels extend                                # a small model, digits
    moe-kernels extend MODEL --data digits --tasks digit sum
    moe-kernels extend MODEL --data emoji:package

MODEL is a local folder or a hub id of a Mixtral, OLMoE or Qwen-MoE model. Without it, a small OLMoE
in float32 first learns Python's own documentation, and the questions with words in place of
pictures. --data is "digits" (5,000 digits of MNIST), or "emoji:" and the folder of the unpacked npm
package emoji-datasource-twitter.

The stages of MoExtend (arXiv 2408.03511):
1. encoder: learns the pictures' names beforehand, and is frozen from then on.
2. align: a projector from the encoder's features into the model learns alone.
3. score: how far the choices of each layer's router move when the routers alone learn.
4. extend: some layers get experts, copies at first; the disturbance by copies alone is measured.
5. tune: the added experts, their router rows and calibrations learn; everything else is frozen.
6. measure: held-out pictures and text, with the adapter loaded from its file.

Under --out: adapter/ and encoder/, answers.png, scores.png, training.png, report.md, report.json.
Every stage is kept, keyed by its settings: a second run, or one that was interrupted, continues
where the first stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.imaging import IGNORE_INDEX, caption_ids
from moe_kernels.moextend import ExpertExtender, LayerScores
from moe_kernels.programs.shared import questions
from moe_kernels.programs.shared.cli import Options, exit_code, option, parse
from moe_kernels.programs.shared.encoder import (
    EncodedPictures,
    EncoderSettings,
    load_encoded,
    read_pictures,
    split_pictures,
    train_encoder,
)
from moe_kernels.programs.shared.files import copy_whole, replacing, write_json
from moe_kernels.programs.shared.models import (
    count_experts,
    load_causal_lm,
    load_config,
    load_tokenizer,
    require_experts,
)
from moe_kernels.programs.shared.options import ModelOptions, TextOptions, out_folder
from moe_kernels.programs.shared.outputs import ADAPTER, check_outputs
from moe_kernels.programs.shared.pictures import CaptionedPictures
from moe_kernels.programs.shared.reports.extend_experts import write_pages
from moe_kernels.programs.shared.stages import Stages, StageSetup, Workspace, digest, model_identity
from moe_kernels.programs.shared.text_model import (
    QUICK_TEXT_MODEL,
    TextModelSettings,
    pretrain,
    start_text_model,
    train_text_tokenizer,
)
from moe_kernels.programs.shared.text_to_image import compare_text, text_logits

MODALITY = "image"
TASKS = {"digits": ("digit", "sum"), "emoji": ("category",)}
GATES = ("pictures", "questions", "none")
LAYERS = ("top-half", "all", "interval", "first-half", "second-half")
INITS = ("most_selected", "most_selected_tuned", "mean", "random")
CALIBRATIONS = ("additive", "multiplicative", "none")
FILES = (
    *ADAPTER, "encoder/encoder.json", "encoder/encoder.safetensors", "answers.png", "scores.png",
    "training.png", "report.md", "report.json",
)  # fmt: skip
_WORD_QUESTIONS = 20_000
_TEXT_BATCH = 4


# --- options


@dataclass(kw_only=True)
class QuestionOptions(Options):
    """Pictures and questions."""

    data: str = option("digits", '"digits" or "emoji:FOLDER"')
    tasks: list[str] | None = option(
        None, "digits: digit, sum; emoji: category; default: all of them",
        choices=tuple(questions.QUESTIONS), metavar="TASK",
    )  # fmt: skip
    held_out: int = option(
        1000, "pictures to hold out: one half decides, the other is reported", at_least=4
    )
    encoder_steps: int = option(400, "training steps of the encoder", at_least=1)


@dataclass(kw_only=True)
class ExtensionOptions(Options):
    """Added experts."""

    layers: list[str] = option(
        ["top-half"], f"layers to extend: {', '.join(LAYERS)} (by the scores), or indices",
        metavar="LAYER",
    )  # fmt: skip
    experts_per_layer: int = option(
        1, "experts to add to each", at_least=1, at_most=1024, metavar="N"
    )
    init: str = option("most_selected", f"start: {', '.join(INITS)}, or an expert's id")
    calibration: str = option("additive", "correction of router scores", choices=CALIBRATIONS)
    gate: str = option(
        "questions",
        "rows that may choose added experts: the pictures', the text of questions about them too, "
        "or all text (none, as published)",
        choices=GATES,
    )


@dataclass(kw_only=True)
class TrainingOptions(Options):
    """Training."""

    align_steps: int = option(300, "training steps of the projector", at_least=1)
    align_lr: float = option(3e-3, "learning rate of the projector", above=0)
    score_steps: int = option(40, "training steps of the routers, for the scores", at_least=1)
    score_lr: float = option(1e-3, "learning rate of the routers", above=0)
    steps: int = option(300, "training steps of the added experts", at_least=1)
    batch: int = option(16, "questions in a batch of every training", at_least=1)
    lr: float = option(3e-3, "learning rate of the added experts", above=0)


@dataclass(kw_only=True)
class TestOptions(Options):
    """Held-out questions."""

    test_questions: int = option(200, "questions of each task", at_least=1, at_most=100_000)
    shown: int = option(12, "questions shown with their pictures", at_least=1, at_most=100)


@dataclass(kw_only=True)
class ExtendOptions(
    QuestionOptions, ExtensionOptions, TrainingOptions, TextOptions, TestOptions, ModelOptions
):  # fmt: skip
    """Model."""

    model: str | None = option(
        None, "local folder or hub id; default: a small model, trained first", positional=True
    )
    text_steps: int = option(600, "training steps of the small model", at_least=1)
    quick: bool = option(False, "little of everything, for a trial")
    out: Path = out_folder("extend_experts")
    text_model: TextModelSettings = field(default_factory=TextModelSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            self.dtype = "float32"
        self.text_model = dataclasses.replace(
            self.text_model, text_steps=self.text_steps, seed=self.seed, device=self.device
        )
        kind, _, _ = self.data.partition(":")
        if kind not in TASKS or (self.data != kind) != (kind == "emoji") or self.data == "emoji:":
            raise ValueError('--data must be "digits" or "emoji:FOLDER"')
        self.tasks = self.tasks or list(TASKS[kind])
        if unknown := [task for task in self.tasks if task not in TASKS[kind]]:
            raise ValueError(f"--tasks: there is no task {unknown[0]!r} of {kind}")
        _ = self.extension  # refuse what it cannot read

    @property
    def encoder(self) -> EncoderSettings:
        return EncoderSettings(
            emoji=self.data.partition(":")[2] or None, held_out=self.held_out,
            steps=self.encoder_steps, seed=self.seed, device=self.device,
        )  # fmt: skip

    @property
    def extension(self) -> dict[str, Any]:
        """Arguments of ``ExpertExtender.extend``."""
        layers, init, named = self.layers, self.init, len(self.layers) == 1
        return {
            "layers": layers[0] if named and layers[0] in LAYERS
            else _whole_numbers("--layers", layers, LAYERS),
            "init": init if init in INITS else _whole_numbers("--init", [init], INITS)[0],
            "calibration": None if self.calibration == "none" else self.calibration,
            "modality_gate": self.gate != "none",
            **self.pick("experts_per_layer", "seed"),
        }  # fmt: skip

    @property
    def count(self) -> str:
        """Rows whose selections ``score_layers`` counts: the rows that may choose added experts."""
        return "all" if self.gate == "none" else "modality"

    @property
    def patching(self) -> dict[str, Any]:
        """Arguments of ``ExpertExtender``."""
        whole = (MODALITY,) if self.gate == "questions" else ()
        return {"modalities": (MODALITY,), "sequence_modalities": whole, "backend": self.backend}

    def schedule(self, steps: int, lr: float) -> dict[str, Any]:
        """Arguments of a training."""
        return dict(
            max_steps=steps, per_device_train_batch_size=self.batch, learning_rate=lr,
            warmup_steps=steps // 15, seed=self.seed, use_cpu=self.device == "cpu",
        )  # fmt: skip


def _whole_numbers(option: str, values: list[str], names: tuple[str, ...]) -> tuple[int, ...]:
    if not all(value.isdecimal() for value in values):
        raise ValueError(f"{option} must be one of {', '.join(names)}, or indices; got {values}")
    return tuple(map(int, values))


QUICK = {
    "encoder_steps": 60, "align_steps": 20, "score_steps": 4, "steps": 20, "test_questions": 40,
    "text_tokens": 512, "held_out": 200, "text_steps": 20,
    "text_model": TextModelSettings(**QUICK_TEXT_MODEL),
}  # fmt: skip


# --- before the stages


def check_extension(options: ExtendOptions) -> None:
    """Raise before any work unless the base can be patched and extended as requested."""
    if options.model is not None:
        require_experts(options.model)
    model = load_skeleton(options)
    extender = ExpertExtender(model, **options.patching | {"backend": None})
    number = count_experts(model.config)
    counts = torch.ones(len(extender.layers), number, dtype=torch.int64)
    scores = LayerScores(extender.layers, counts, counts, (number,) * len(counts))
    extender.extend(**options.extension, scores=scores, freeze_earlier=True)


def load_skeleton(options: ExtendOptions) -> PreTrainedModel:
    """Return the base without its weights."""
    with torch.device("meta"):
        if options.model is None:
            tokenizer = train_text_tokenizer("", options.text_model.vocab_size)
            return start_text_model(options.text_model, tokenizer)
        return AutoModelForCausalLM.from_config(load_config(options.model))


def find_base(options: ExtendOptions, stages: Stages, names: tuple[str, ...]) -> str:
    """Return the folder or hub id of the base; without --model, train a small one."""
    if options.model is not None:
        return options.model
    words = questions.as_text(
        questions.ask_words(names, options.tasks, _WORD_QUESTIONS, options.seed)
    )
    inputs = dataclasses.asdict(options.text_model) | {"names": names} | options.pick("tasks")
    stage = stages.run(
        "pretrain", inputs, lambda workspace: pretrain(options.text_model, workspace, words)
    )
    return str(stage.folder / "model")


# --- what the stages use


@dataclass(frozen=True)
class Setup(StageSetup):
    """Options, base model, held-out text, and the stages that are finished.

    blocks: (blocks, block) token ids of held-out text
    """

    options: ExtendOptions
    stages: Stages
    base: str
    tokenizer: PreTrainedTokenizerBase
    blocks: torch.Tensor

    @cached_property
    def encoded(self) -> dict[str, EncodedPictures]:
        return load_encoded(self.folder("encoder"))

    def ask(self, part: str, count: int | None, seed: int = 0) -> questions.QuestionSet:
        """Return ``count`` questions of each task; None: as many as pictures."""
        seen, seed = self.encoded[part], self.options.seed + seed
        asked: list[questions.Question] = []
        for n, task in enumerate(self.options.tasks):
            asked += questions.ask(seen, task, count, seed + n)
        return questions.QuestionSet(seen, asked, self.tokenizer)

    @cached_property
    def test(self) -> questions.QuestionSet:
        return self.ask("test", self.options.test_questions)

    @cached_property
    def shown(self) -> questions.QuestionSet:
        """The first test questions of each task."""
        size = self.options.test_questions
        each = min(-(-self.options.shown // len(self.options.tasks)), size)
        starts = range(0, len(self.test), size)
        chosen = [q for start in starts for q in self.test.questions[start : start + each]]
        return dataclasses.replace(self.test, questions=chosen)

    @cached_property
    def longest_answer(self) -> int:
        """Tokens of the longest shown answer, with the end of the line."""
        labels = [item["labels"] for item in self.shown]
        return max(len(each) - each.count(IGNORE_INDEX) for each in labels)

    @property
    def curve_batches(self) -> list[dict[str, torch.Tensor]]:
        """A few batches, for the curve of the held-out loss."""
        return self.ask("choice", min(64, len(self.encoded["choice"])), 20).batches(64)

    def load_base(self) -> PreTrainedModel:
        return load_causal_lm(self.base, self.options.dtype, self.options.device)

    def load_viewer(self, stage: str | None = None) -> questions.Viewer:
        """Load the base, patched by the options; or by the files of a stage's adapter."""
        model = self.load_base()
        if stage is None:
            return self.viewer(ExpertExtender(model, **self.options.patching))
        adapter = self.folder(stage) / "adapter"
        config = ModalityLoraConfig.from_adapter(adapter, self.options.backend)
        patch_model(model, config).load_adapter(adapter)
        return self.viewer(ExpertExtender(model))

    def viewer(self, extender: ExpertExtender) -> questions.Viewer:
        begins = caption_ids(self.tokenizer, "a")[0] == self.tokenizer.bos_token_id
        whole = self.options.gate == "questions"
        return questions.Viewer(extender, MODALITY, whole_sequences=whole, begin=int(begins))

    def grade(self, viewer: questions.Viewer) -> dict[str, Any]:
        """Return loss and accuracy on the test questions, and the answers to those shown."""
        answers = viewer.answer(self.shown, max_new_tokens=self.longest_answer)
        return viewer.grade(self.test) | {"answers": answers}

    def disturbance(self, viewer: questions.Viewer) -> dict[str, Any]:
        """Compare text alone, and the pictures' rows, with the model without added experts."""
        batches = self.blocks.to(self.options.device).split(_TEXT_BATCH)
        text = viewer.extender.disturbance([{"input_ids": ids} for ids in batches])
        pictures = viewer.extender.disturbance(questions.joined_batches(viewer, self.test, 50))
        return {"text": text["text"].to_dict(), "pictures": pictures[MODALITY].to_dict()}


# --- stages: each returns its result, as JSON


def train_picture_encoder(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    return train_encoder(setup.options.encoder, workspace)


def measure_start(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Grade the model with a projector that has not learnt."""
    viewer = setup.load_viewer()
    torch.manual_seed(setup.options.seed)
    viewer.extender.add_projector(setup.test.pictures.features.shape[-1], modality=MODALITY)
    return setup.grade(viewer)


def align_projector(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    options = setup.options
    history = questions.align(
        setup.load_viewer(), setup.ask("train", None), setup.curve_batches, workspace,
        **options.schedule(options.align_steps, options.align_lr),
    )  # fmt: skip
    return {"history": history}


def measure_aligned(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    return setup.grade(setup.load_viewer("align"))


def score(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Score the layers on questions that the projector did not learn from."""
    options, viewer = setup.options, setup.load_viewer("align")
    count = min(options.score_steps * options.batch, len(setup.encoded["choice"]))
    asked = setup.ask("choice", count, 40)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(asked), generator=generator).tolist()
    mixed = dataclasses.replace(asked, questions=[asked.questions[index] for index in order])
    return viewer.extender.score_layers(
        questions.joined_batches(viewer, mixed, options.batch), options.score_steps,
        modality=MODALITY, lr=options.score_lr, count=options.count,
    ).to_dict()  # fmt: skip


def add_experts(setup: Setup) -> questions.Viewer:
    """Return the aligned model with added experts that have not learnt."""
    viewer = setup.load_viewer("align")
    scores = LayerScores.from_dict(setup.results["score"])
    viewer.extender.extend(**setup.options.extension, scores=scores, freeze_earlier=True)
    return viewer


def extend(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Measure what the added experts change before they learn."""
    viewer = add_experts(setup)
    (config,) = viewer.extender.patched.extensions
    return {
        "extension": config.to_dict(),
        "parameters": count_parameters(viewer.extender),
        "disturbance": setup.disturbance(viewer),
        **setup.grade(viewer),
    }


def count_parameters(extender: ExpertExtender) -> dict[str, Any]:
    """Count the parameters of the base, of the projector, and of the added experts."""
    added = sum(parameter.numel() for parameter in extender.patched.trainable_parameters())
    projector = sum(parameter.numel() for parameter in extender.projector().parameters())
    total = sum(parameter.numel() for parameter in extender.model.parameters())
    base = total - added - projector
    return {"base": base, "projector": projector, "added": added, "share": added / base}


def tune(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    options = setup.options
    history = questions.fine_tune(
        add_experts(setup), setup.ask("train", None, 60), setup.curve_batches, workspace,
        **options.schedule(options.steps, options.lr),
    )  # fmt: skip
    return {"history": history}


def measure(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Measure the plain base, patched, and with the adapter loaded from its file."""
    model, adapter = setup.load_base(), setup.folder("tune") / "adapter"

    def logits() -> torch.Tensor:
        return text_logits(model, setup.blocks, model.config.vocab_size, _TEXT_BATCH)

    unpatched = logits()
    patched = patch_model(model, ModalityLoraConfig.from_adapter(adapter, setup.options.backend))
    before = logits()
    patched.load_adapter(adapter)
    viewer = setup.viewer(ExpertExtender(model))
    with viewer.extender.disabled():
        off = viewer.grade(setup.test)
    return {
        "text": compare_text(unpatched, before, logits(), setup.blocks),
        "disturbance": setup.disturbance(viewer),
        "experts_off": off,
        **setup.grade(viewer),
    }


def run_stages(setup: Setup) -> None:
    """Run every stage, keyed by what its result depends on."""
    options = setup.options
    pictures = dataclasses.asdict(options.encoder)
    if options.encoder.emoji is not None:
        pictures["emoji"] = model_identity(options.encoder.emoji)
    base = options.pick("dtype", "device", "backend", "seed", "tasks", "batch")
    # The gate decides which rows have the pictures' modality, and adapters' files say so.
    base |= {"base": model_identity(setup.base), "gate": options.gate}
    aligning = options.pick("align_steps", "align_lr")
    scoring = options.pick("score_steps", "score_lr") | {"count": options.count}
    added, test = options.of(ExtensionOptions), options.of(TestOptions)
    text = {"text": digest(setup.blocks)}
    setup.run("encoder", train_picture_encoder, pictures)
    setup.run("start", measure_start, base | test, after="encoder")
    setup.run("align", align_projector, base | aligning, after="encoder")
    setup.run("aligned", measure_aligned, test, after="align")
    setup.run("score", score, scoring, after="align")
    setup.run("extend", extend, added | test | text, after="score")
    setup.run("tune", tune, added | options.pick("steps", "lr"), after="score")
    setup.run("measure", measure, test | text, after="tune")


# --- results


def answers(setup: Setup, results: dict[str, Any]) -> dict[str, Any]:
    """Return loss and accuracy by task after each stage, in nats a token of the answers."""
    states = {
        "projector at random": results["start"], "projector aligned": results["aligned"],
        "experts added, step 0": results["extend"], "experts tuned": results["measure"],
        "tuned, experts off": results["measure"]["experts_off"],
    }  # fmt: skip
    return {
        "count": setup.options.test_questions,
        "commonest_answer": setup.test.most_common_answer(),
        "states": {
            state: {name: each[name] for name in ("nll", "accuracy")}
            for state, each in states.items()
        },
    }


def shown_answers(setup: Setup, results: dict[str, Any]) -> list[dict[str, Any]]:
    aligned, tuned = (results[name]["answers"] for name in ("aligned", "measure"))
    return [
        {
            "pictures": list(question.pictures),
            "question": questions.QUESTIONS[question.kind][0].strip(),
            "answer": question.answer,
            "aligned": first,
            "tuned": last,
        }
        for question, first, last in zip(setup.shown.questions, aligned, tuned, strict=True)
    ]


def describe(setup: Setup) -> dict[str, Any]:
    """Return the content of report.json."""
    results = setup.results
    scores = LayerScores.from_dict(results["score"])
    return {
        "parameters": results["extend"]["parameters"],
        "text": results["measure"]["text"],
        "encoder": results["encoder"],
        "answers": answers(setup, results),
        "disturbance": {
            "step_0": results["extend"]["disturbance"],
            "tuned": results["measure"]["disturbance"],
        },
        "extension": results["extend"]["extension"],
        "scores": dict(zip(scores.layers, scores.d.tolist(), strict=True)),
        "training": {name: results[name]["history"] for name in ("align", "tune")},
        "shown": shown_answers(setup, results),
        "base": setup.base,
        **setup.stages.describe(setup.options),
    }


def write_results(setup: Setup, pictures: CaptionedPictures) -> None:
    """Write everything under --out; pictures: those of the test questions."""
    out = setup.options.out
    copy_whole(setup.folder("tune") / "adapter", out / "adapter")
    for name in ("encoder.json", "encoder.safetensors"):
        with replacing(out / "encoder" / name) as temporary:
            shutil.copyfile(setup.folder("encoder") / name, temporary)
    report = describe(setup) | {"set_aside": pictures.reasons}
    write_json(out / "report.json", report)
    scores = LayerScores.from_dict(setup.results["score"])
    write_pages(report, scores, pictures.images, out)


def run(options: ExtendOptions) -> None:
    check_outputs(options.out, FILES)
    pictures = split_pictures(read_pictures(options.encoder), options.held_out, options.seed)
    pictures["test"].print_set_aside()
    check_extension(options)
    stages = Stages(options.out / "stages")
    base = find_base(options, stages, pictures["train"].names)
    tokenizer = load_tokenizer(base)
    blocks = options.text_blocks(tokenizer)  # refuse a text that is too short before any stage
    setup = Setup(options, stages, base, tokenizer, blocks)
    run_stages(setup)
    write_results(setup, pictures["test"])


def main(arguments: list[str] | None = None) -> int:
    options = parse(ExtendOptions, arguments, __doc__, prog="moe-kernels extend", quick=QUICK)
    return exit_code(lambda: run(options))

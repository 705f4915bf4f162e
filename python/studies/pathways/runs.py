"""Runs of the study of pathways: what each trains, on what, and how it is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.conversion import dense_to_moe
from moe_kernels.programs.shared.coloured_digits import coloured_digits
from moe_kernels.programs.shared.models import (
    count_experts,
    load_causal_lm,
    load_config,
    load_tokenizer,
    require_experts,
)
from moe_kernels.programs.shared.pictures import CaptionedPictures, spread
from moe_kernels.programs.shared.stages import Stages, Workspace, model_identity
from moe_kernels.programs.shared.text_to_image import (
    Painter,
    compare_text,
    text_logits,
    text_nll,
)
from moe_kernels.programs.shared.texts import documentation, text_blocks
from moe_kernels.programs.shared.training import mean_nll, train
from studies.adapters import (
    describe_model,
    draw_codes,
    look,
    restart_rows,
    row_start,
    start_adapters,
)
from studies.pictures import PictureSplits
from studies.sweep import record_training, training_arguments

TEXT_BATCH, IMAGE_BATCH = 8, 32
EQUAL = 0.05  # largest share by which adapters may miss the number of parameters that all have
_WARMUP = 0.05  # of the steps
_CALIBRATION_BLOCKS = 32  # of text that tells which neurons of the dense parent are most active


@dataclass(frozen=True)
class Run:
    """Settings of one training.

    base: "moe", or "dense": its parent, in experts of the same shape that every token uses
    adapts: what gets low-rank updates, each the same share of the parameters; () is added rows
        alone
    epochs: number of times that each picture is seen
    all_tokens: update text tokens too, a control
    init, solver, feature_metric, row_metric: start of the added rows
    lora_init: start of the adapters
    rows_lr: learning rate of added rows beside adapters
    lr: of the adapters, or of added rows alone; None: the tuned one
    look: look at routing and redundancy, before and after
    tunes: a shorter run that chooses a learning rate
    """

    base: str = "moe"
    adapts: tuple[str, ...] = ("experts", "attention")
    epochs: int = 3
    all_tokens: bool = False
    init: str = "normal"
    solver: str = "semirelaxed"
    feature_metric: str = "euclidean"
    row_metric: str = "cosine"
    lora_init: str = "zero"
    rows_lr: float = 1e-2
    lr: float | None = None
    look: bool = False
    tunes: bool = False

    @property
    def trains(self) -> str:
        """Name of the learning rate that runs share."""
        what = " and ".join(self.adapts) or "added rows alone"
        return what if self.base == "moe" else f"{what}, dense parent"

    @property
    def draws(self) -> bool:
        """Return whether its drawings are read: starts, of one epoch, are compared by loss."""
        return self.epochs > 1


@dataclass(frozen=True)
class Budget:
    """Sizes and lengths that all runs of a sweep share.

    A picture is 16 tokens: a digit's box is 2x2 patches at each of its places. A reader that learnt
    from such pictures takes one colour in six for another after 256 codes, and few after 512.

    rank: of the experts' adapters, where they alone are adapted; sets the parameters of all runs
    images: pictures to learn from
    held_out: pictures to report
    choice: held-out pictures to choose learning rates by, and for the curve of a training
    steps: of one epoch
    points: of that curve, evenly spaced on a logarithmic scale
    captions: numbers of captions of training that are drawn, as many as are held out
    """

    image_size: int = 24
    patch_size: int = 6
    codes: int = 512
    images: int = 4000
    held_out: int = 400
    choice: int = 96
    steps: int = 500
    batch: int = 8
    tuning_steps: int = 120
    rank: int = 8
    points: int = 12
    caption_dropout: float = 0.1
    text_blocks: int = 8
    looked_at: int = 100
    captions: int = 40
    samples_per_caption: int = 3
    guidance: float = 2.0
    dtype: str = "bfloat16"


def warmup_steps(steps: int) -> int:
    return round(_WARMUP * steps)


def evaluation_steps(steps: int, points: int) -> list[int]:
    """Return steps from 0 to the last, about evenly spaced by their logarithm.

    Two of them are where measures of the curve begin: the end of the warm-up, from where
    :func:`mean_over_log_steps` measures, and of the fourth fifth, for :func:`fall_at_end`.
    """
    spaced = (round(steps ** (i / (points - 1))) for i in range(points))
    return sorted({0, *spaced, warmup_steps(steps), round(0.8 * steps), steps})


def ranks_for(target: int, per_rank: Mapping[str, int]) -> dict[str, int]:
    """Return ranks at which the adapters have about ``target`` parameters, in equal shares.

    Args:
        per_rank: parameters of each kind of adapter at rank 1

    Raises:
        ValueError: no whole ranks come near enough.
    """
    ranks = {kind: max(1, round(target / len(per_rank) / each)) for kind, each in per_rank.items()}
    found = sum(ranks[kind] * per_rank[kind] for kind in ranks)
    if abs(found / target - 1) > EQUAL:
        raise ValueError(
            f"adapters of {' and '.join(ranks)} would have {found:,} parameters at the nearest "
            f"ranks {ranks}, and others have {target:,}: raise Budget.rank"
        )
    return ranks


class Pictures(PictureSplits):
    """Coloured digits."""

    def __init__(self, budget: Budget, seed: int):
        self.budget, self.seed = budget, seed
        self.num_codes, self.patch_size = budget.codes, budget.patch_size

    def split(self) -> tuple[CaptionedPictures, CaptionedPictures, CaptionedPictures]:
        budget = self.budget
        count = budget.held_out + budget.choice
        learnt, rest = coloured_digits(budget.image_size, budget.images, count, self.seed)
        choice, test = rest.split(budget.held_out, self.seed)
        return learnt, choice, test

    @property
    def asked(self) -> torch.Tensor:
        """(N,) numbers of the captions of all drawings: some of training, and all held-out ones."""
        known = spread(self.train.pictures.present.tolist(), self.budget.captions)
        labels = torch.tensor([*known, *self.train.pictures.unseen])
        return labels.repeat_interleave(self.budget.samples_per_caption)


class Setup:
    """Bases and pictures that all runs of a seed share.

    base, dense: folders of the Mixture of Experts and of its dense parent
    """

    def __init__(self, budget: Budget, seed: int, stages: Stages, base: Path, dense: Path):
        self.budget, self.seed, self.stages = budget, seed, stages
        check_kinship(base, dense)
        self.base, self.dense = base, dense
        self.data = Pictures(budget, seed)

    def load(self, base: str) -> PreTrainedModel:
        """Load "moe" or "dense", with the attention that is fast for short sequences on a CPU."""
        model = load_causal_lm(self.base if base == "moe" else self.dense, self.budget.dtype, "cpu")
        if base == "dense":
            model = self._shape_like_base(model)
        model.set_attn_implementation("eager")
        return model

    def _shape_like_base(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Part the dense model into a shared expert and experts of the base's sizes, all chosen.

        It computes what the dense model does, up to rounding, and the same adapters fit it.
        """
        config = load_config(self.base)
        experts = count_experts(config)
        return dense_to_moe(
            dense, experts, experts, shared_expert=config.shared_expert_intermediate_size,
            calibration=[self.text("train", _CALIBRATION_BLOCKS)],
            calibration_tokens=128 * _CALIBRATION_BLOCKS,
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.base)

    @cached_property
    def blocks(self) -> torch.Tensor:
        """(blocks, 128) token ids of held-out text."""
        return self.text("test", self.budget.text_blocks)

    def text(self, part: str, blocks: int) -> torch.Tensor:
        """Return (blocks, 128) token ids of a part of Python's documentation."""
        return text_blocks(self.tokenizer, documentation()[part], 128, 128)[:blocks]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Sizes and text losses of the bases before any training, for all seeds."""
        identities = {
            name: model_identity(str(folder))
            for name, folder in (("base", self.base), ("dense", self.dense))
        }
        inputs = identities | {"dtype": self.budget.dtype, "blocks": self.budget.text_blocks}
        return self.stages.run("bases", inputs, lambda _: self._examine()).result

    def _examine(self) -> dict[str, Any]:
        config = load_config(self.base)
        found: dict[str, Any] = {
            "base": describe_model(self.base, self.base.name)
            | {"intermediate_size": config.moe_intermediate_size}
            | {"shared_expert": config.shared_expert_intermediate_size},
            "text_nll": {},
        }
        embeddings = []
        for name in ("moe", "dense"):
            model = self.load(name)
            logits = text_logits(model, self.blocks, model.config.vocab_size, TEXT_BATCH)
            found["text_nll"][name] = text_nll(logits, self.blocks)
            embeddings.append(model.get_input_embeddings().weight)
        if not torch.equal(*embeddings):  # splitting and healing leave them alone
            raise ValueError(
                f"--dense {self.dense} is not the parent of --base {self.base}: their embeddings "
                "differ"
            )
        kinds = ("experts", "attention")
        return found | {"per_rank": {kind: parameters_per_rank(model, kind) for kind in kinds}}

    def config_of(self, run: Run) -> ModalityLoraConfig:
        """Return the run's adapters: as many parameters a layer as those of any other run."""
        if not run.adapts:
            return ModalityLoraConfig(target_modules=())
        facts = self.facts
        per_rank = {kind: facts["per_rank"][kind] for kind in run.adapts}
        ranks = ranks_for(self.budget.rank * facts["per_rank"]["experts"], per_rank)
        first, *others = run.adapts
        names = {"attention": "[qkvo]_proj", "experts": "(gate_up|down)_proj"}
        return ModalityLoraConfig(
            r=ranks[first], lora_alpha=2 * ranks[first], target_modules=run.adapts,
            rank_pattern={names[kind]: ranks[kind] for kind in others},
            alpha_pattern={names[kind]: 2 * ranks[kind] for kind in others},
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the facts of the seed, for JSON: those of the bases, and what a reader reads."""
        reader = self.data.judge.describe_reader()["tokenized"]
        return self.facts | {"reader": shares(reader)}


def check_kinship(base: Path, dense: Path) -> None:
    """Check by their configurations that one may be made of the other, before any work.

    :meth:`Setup.facts` looks at the weights.

    Raises:
        ValueError: they cannot, or the first has no shared expert.
    """
    require_experts(str(base))
    ours, theirs = load_config(base), load_config(dense)
    if not getattr(ours, "shared_expert_intermediate_size", 0):
        raise ValueError(
            f"--base {base} has no shared expert: make one by moe-kernels convert --shared-expert"
        )
    if count_experts(theirs) is not None:
        raise ValueError(f"--dense {dense} has experts: give the model that the base was made of")
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if (here := getattr(ours, name)) != (there := getattr(theirs, name)):
            raise ValueError(
                f"--dense {dense} is not the parent of --base {base}: {name} is {there} and {here}"
            )


def parameters_per_rank(model: PreTrainedModel, kind: str) -> int:
    """Return the number of parameters of the adapters of "experts" or "attention" at rank 1."""
    patched = patch_model(model, ModalityLoraConfig(r=1, target_modules=(kind,)))
    trained, _ = patched.count_parameters()
    patched.unpatch()
    return trained


def shares(read: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Keep the shares that are read right, by group of captions and attribute."""
    return {
        group: {kind: each["share"] for kind, each in kinds.items()}
        for group, kinds in read.items()
    }


# --- one run


def prepare(setup: Setup, run: Run, model: PreTrainedModel) -> Painter:
    """Add image tokens to the model, and make trainable what the run trains."""
    data = setup.data
    painter = Painter.create(
        model, setup.tokenizer, setup.config_of(run), data.budget.codes, data.train.pictures.names,
        seed=setup.seed, **row_start(run, data.tokenizer, data.train),
    )  # fmt: skip
    if run.init == "normal":
        # What adapters drew must not decide how rows start: runs are compared in pairs.
        restart_rows(model, "embedding", setup.seed)
    painter.patched.fused_loss = True
    if run.all_tokens:
        painter.patched.modality_of = torch.ones_like  # text too is the modality
    if run.lora_init != "zero":
        start_adapters(painter, setup.blocks, data.train, run.lora_init, setup.seed)
    return painter


def measure_run(setup: Setup, run: Run, lr: float, workspace: Workspace) -> dict[str, Any]:
    """Train a run and measure it; one that tunes has the loss to choose by alone."""
    data, blocks, model = setup.data, setup.blocks, setup.load(run.base)
    logits = partial(text_logits, model, blocks, model.config.vocab_size, TEXT_BATCH)
    unpatched = logits()
    painter = prepare(setup, run, model)
    choice = painter.batches(data.choice, IMAGE_BATCH)
    if run.tunes:
        teach(setup, run, painter, choice, lr, workspace)
        return {"choice_nll": mean_nll(model, choice)}
    before = logits()
    look_now = partial(
        look, painter, blocks, data.test.head(setup.budget.looked_at), text_batch=TEXT_BATCH,
        image_batch=IMAGE_BATCH, seed=setup.seed,
    )  # fmt: skip
    result = {"look_before": look_now()} if run.look else {}
    history = teach(setup, run, painter, choice, lr, workspace)
    model.eval()
    result |= record_training(model, history) | {
        "adapter_parameters": adapter_parameters(painter),
        "curve": history["held_out"],
        "largest_gradient_norm": max(norm for _, norm in history["grad_norm"]),
        "choice_nll": mean_nll(model, choice),
        "test_nll": mean_nll(model, painter.batches(data.test, IMAGE_BATCH)),
        "test_nll_by_captions": {
            group: mean_nll(model, painter.batches(some, IMAGE_BATCH))
            for group, some in data.test.by_captions(data.train.pictures.present).items()
        },
        "text": compare_text(unpatched, before, logits(), blocks),
    }
    if run.draws:
        result["read"] = read_drawings(data, painter)
    return result | ({"look_after": look_now()} if run.look else {})


def teach(
    setup: Setup, run: Run, painter: Painter, choice: list[dict[str, torch.Tensor]], lr: float,
    workspace: Workspace,
) -> dict[str, Any]:  # fmt: skip
    budget = setup.budget
    steps = budget.tuning_steps if run.tunes else run.epochs * budget.steps
    return train(
        painter.patched, painter.dataset(setup.data.train, budget.caption_dropout, setup.seed),
        lambda model: mean_nll(model, choice), workspace, collator=painter.collator,
        # Alone, added rows have the rate that is tuned.
        rows_lr=run.rows_lr if run.adapts else lr,
        held_out_at=evaluation_steps(steps, budget.points),
        **training_arguments(
            steps, budget.batch, lr, warmup_steps=warmup_steps(steps), seed=setup.seed
        ),
    )  # fmt: skip


def adapter_parameters(painter: Painter) -> int:
    """Return the number of trained parameters that are no added rows."""
    named = painter.patched.named_trainable_parameters()
    return sum(parameter.numel() for name, parameter in named if "modality_lora" in name)


def read_drawings(data: Pictures, painter: Painter) -> dict[str, dict[str, float]]:
    """Draw captions of training and held-out ones; return the shares that are read right."""
    asked, budget = data.asked, data.budget
    codes = draw_codes(
        painter, asked.tolist(), data.tokenizer.tokens_per_image, budget.guidance,
        batch=IMAGE_BATCH, seed=data.seed,
    )  # fmt: skip
    return shares(data.judge.measure(codes, asked)["read_right"])


# --- curves of the held-out loss: [step, loss] pairs


def fall_at_end(curve: Sequence[Sequence[float]]) -> float:
    """Return by what share the loss fell in the last fifth of the steps."""
    losses = dict(map(tuple, curve))
    last = max(losses)
    return 1 - losses[last] / losses[round(0.8 * last)]


def mean_over_log_steps(curve: Sequence[Sequence[float]]) -> float:
    """Return the mean loss over the logarithm of the steps after the warm-up: lower is faster."""
    first = warmup_steps(max(step for step, _ in curve))
    points = [(math.log(step), loss) for step, loss in curve if step and step >= first]
    pairs = list(zip(points, points[1:], strict=False))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)
    return area / (points[-1][0] - points[0][0])

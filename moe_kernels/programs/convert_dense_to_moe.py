"""Split a dense model's feed-forward layers into experts, heal the result, and measure it.

    moe-kernels convert MODEL --sizes 8x6 --split random clustered

MODEL is a local folder or a hub id of a Llama, Mistral, Qwen2 or Qwen3 model; --gguf-file names a
GGUF file in it. For every size ExK (E experts, K of them for each token) and split:

1. convert: `dense_to_moe`, then `refit` of down_proj; perplexity before healing.
2. heal: the dense model's predictions are distilled, once for each --lr; the perplexity on the
   choice text decides between the learning rates.
3. report: perplexity on the test text, which decided nothing, in report.json and table.md; with
   --answer-tokens, greedy answers of all models to twenty plain questions in answers.md.

Healing, choice and test text are different topics of Python's own documentation, without the
paragraphs that they share; or files of yours. Every stage is kept under --out, keyed by its
settings: a second run, or one that was interrupted, continues where the first stopped.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels.conversion import dense_to_moe, heal, perplexity, refit
from moe_kernels.programs.shared.answers import answers_table, greedy_answers
from moe_kernels.programs.shared.cli import Options, console, exit_code, option, parse
from moe_kernels.programs.shared.files import read_text, replacing, write_json, write_text
from moe_kernels.programs.shared.models import (
    count_experts,
    load_causal_lm,
    load_config,
    load_tokenizer,
    load_weights,
)
from moe_kernels.programs.shared.options import RunOptions, out_folder, text_file
from moe_kernels.programs.shared.outputs import check_outputs
from moe_kernels.programs.shared.stages import Stage, Stages, Workspace, digest, model_identity
from moe_kernels.programs.shared.tables import markdown_table
from moe_kernels.programs.shared.texts import (
    documentation,
    spread,
    text_blocks,
    without_shared_paragraphs,
)
from moe_kernels.programs.shared.training import stop_after_step

PARTS = ("heal", "choice", "test")
FILES = ("model", "report.json", "table.md", "answers.md")
AUTOCAST = {"none": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conversion:
    """The size of a Mixture of Experts, and how the neurons are split."""

    num_experts: int
    top_k: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.num_experts}x{self.top_k}-{self.split}"


# --- options


@dataclass(kw_only=True)
class HealingOptions(Options):
    """Healing."""

    heal_steps: int = option(400, "steps of distillation; 0 for none", at_least=0)
    train: str = option("router+experts", "parts that learn", choices=("router", "router+experts"))
    lr: list[float] = option([3e-4], "learning rates; the choice text picks one", above=0)
    temperature: float = option(1.0, "divides the logits of both models in the loss", above=0)
    autocast: str = option(
        "none", "dtype of matrix products; bfloat16 needs a device that multiplies it",
        choices=tuple(AUTOCAST),
    )  # fmt: skip
    batch: int = option(4, "blocks in a batch", at_least=1)


@dataclass(kw_only=True)
class SourceTextOptions(Options):
    """Texts."""

    heal_text: str | None = text_file("healing")
    choice_text: str | None = text_file("choice")
    test_text: str | None = text_file("test")
    block: int = option(128, "tokens in a block", at_least=2)
    calibration_tokens: int = option(
        2048, "tokens to calibrate the split and the routers with", at_least=1
    )
    refit_tokens: int = option(
        16_384, "tokens to fit down_proj to the dense model with; 0: no fit", at_least=0
    )
    test_tokens: int = option(16_384, "tokens of choice and of test text, at most", at_least=1)
    more_texts: list[str] = option(
        [], "more texts to measure all models on", metavar="FILE", is_file=True
    )
    answer_tokens: int = option(
        0, "tokens of a greedy answer to each of twenty plain questions; 0: none", at_least=0
    )

    @property
    def texts(self) -> dict[str, Path]:
        files = {part: getattr(self, f"{part}_text") for part in PARTS}
        return {part: Path(file).resolve() for part, file in files.items() if file}


@dataclass(kw_only=True)
class ConvertOptions(HealingOptions, SourceTextOptions, RunOptions):
    """Model and conversions."""

    model: str = option(MISSING, "local folder or hub id of a dense model", positional=True)
    gguf_file: str | None = option(None, "name of a GGUF file in it (needs the gguf package)")
    sizes: list[str] = option(["8x6"], "E experts, K of them for each token", metavar="ExK")
    split: list[str] = option(
        ["random", "clustered"], "ways to split the neurons", choices=("random", "clustered")
    )
    shared_expert: int = option(0, "neurons of a shared expert; 0 for none", metavar="N")
    out: Path = out_folder("convert")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.texts) not in (0, len(PARTS)):
            raise ValueError("give all of --heal-text, --choice-text and --test-text, or none")
        if len(set(self.texts.values())) != len(self.texts):
            raise ValueError("--heal-text, --choice-text and --test-text must be different files")
        if twice := repeated(Path(file).stem for file in self.more_texts):
            raise ValueError(
                f"--more-texts: two files are named {twice}, and figures are kept by this name: "
                "rename or leave out one of them"
            )
        _ = self.conversions  # refuse sizes that cannot be read

    @property
    def conversions(self) -> list[Conversion]:
        sizes = map(parse_size, self.sizes)
        return [Conversion(*size, split) for size in sizes for split in self.split]


def repeated(names: Iterable[str]) -> str | None:
    """Return a name that comes twice, if there is one."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def parse_size(text: str) -> tuple[int, int]:
    experts, _, top_k = text.partition("x")
    if not (experts.isdigit() and top_k.isdigit()):
        raise ValueError(f"--sizes: {text!r} is not ExK, such as 8x6")
    if not 1 <= int(top_k) <= int(experts) or int(experts) < 2:
        raise ValueError(f"--sizes {text}: E must be at least 2, K in 1..E")
    return int(experts), int(top_k)


def check_sizes(options: ConvertOptions) -> None:
    """Raise before the first conversion unless all of them can be made."""
    config = load_config(options.model, gguf_file=options.gguf_file)
    if count_experts(config):
        raise ValueError(f"{options.model} is a Mixture of Experts already")
    routed = config.intermediate_size - options.shared_expert
    for conversion in options.conversions:
        if routed % conversion.num_experts:
            raise ValueError(
                f"{conversion.num_experts} experts do not divide the {routed} neurons of a layer"
            )


# --- texts and models


def token_blocks(options: ConvertOptions) -> dict[str, torch.Tensor]:
    """Return for each part (blocks, block) token ids, those for healing in random order."""
    tokenizer, documented = load_text_tokenizer(options), documentation()
    defaults = {"heal": documented.pop("train"), **documented}
    given = {part: read_text(file) for part, file in options.texts.items()}
    blocks = {}
    for part, text in (without_shared_paragraphs(given) or defaults).items():
        try:
            blocks[part] = text_blocks(tokenizer, text, options.block, options.block)
        except ValueError as error:
            raise ValueError(
                f"{part} text, without paragraphs of the later parts: {error}"
            ) from error
    generator = torch.Generator().manual_seed(options.seed)
    blocks["heal"] = blocks["heal"][torch.randperm(len(blocks["heal"]), generator=generator)]
    for part in ("choice", "test"):
        blocks[part] = spread(blocks[part], max(1, options.test_tokens // options.block))
    return blocks


def load_text_tokenizer(options: ConvertOptions) -> PreTrainedTokenizerBase:
    return load_tokenizer(options.model, gguf_file=options.gguf_file)


def load_dense(options: ConvertOptions) -> PreTrainedModel:
    model = load_weights(options.model, gguf_file=options.gguf_file, dtype=torch.float32)
    return model.to(options.device).eval()


# --- stages


@dataclass(frozen=True)
class Setup:
    """Options and token ids of the texts, by part."""

    options: ConvertOptions
    blocks: dict[str, torch.Tensor]

    def batches(self, part: str) -> Sequence[torch.Tensor]:
        return self.blocks[part].split(self.options.batch)

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the perplexity on choice and test text."""
        return {part: perplexity(model, self.batches(part)) for part in ("choice", "test")}

    def keep(self, moe: PreTrainedModel, workspace: Workspace) -> dict[str, Any]:
        """Measure and save a model, with its tokenizer."""
        measured = self.measure(moe)
        moe.save_pretrained(workspace.folder / "model")
        load_text_tokenizer(self.options).save_pretrained(workspace.folder / "model")
        return {"perplexity": measured}

    @property
    def more_blocks(self) -> dict[str, torch.Tensor]:
        """Token ids of --more-texts by file name, (blocks, block)."""
        options, tokenizer = self.options, load_text_tokenizer(self.options)
        most, blocks = max(1, options.test_tokens // options.block), {}
        for file in map(Path, options.more_texts):
            text = text_blocks(tokenizer, read_text(file), options.block, options.block)
            blocks[file.stem] = spread(text, most)
        return blocks

    @property
    def inputs(self) -> dict[str, Any]:
        names = "gguf_file", "device", "seed", "block", "batch", "test_tokens"
        texts = {part: digest(blocks) for part, blocks in self.blocks.items()}
        model = model_identity(self.options.model)
        return {"model": model, "texts": texts, **self.options.pick(*names)}


def measure_dense(setup: Setup, stages: Stages) -> Stage:
    def build(workspace: Workspace) -> dict[str, Any]:
        model = load_dense(setup.options)
        return {
            "perplexity": setup.measure(model),
            "class": type(model).__name__,
            "intermediate_size": model.config.intermediate_size,
        }

    return stages.run("dense", setup.inputs, build)


def convert(setup: Setup, stages: Stages, conversion: Conversion) -> Stage:
    options = setup.options

    def build(workspace: Workspace) -> dict[str, Any]:
        dense = load_dense(options)
        moe = dense_to_moe(
            dense, conversion.num_experts, conversion.top_k, conversion.split,
            shared_expert=options.shared_expert, calibration=setup.batches("heal"),
            calibration_tokens=options.calibration_tokens, seed=options.seed,
        )  # fmt: skip
        kept = {"class": type(moe).__name__}
        count = -(-options.refit_tokens // options.block)  # blocks, the last one whole
        if count:
            batches = setup.blocks["heal"][:count].split(options.batch)
            kept["error_left"] = refit(moe, dense, batches)
        return setup.keep(moe, workspace) | kept

    inputs = setup.inputs | dataclasses.asdict(conversion)
    inputs |= options.pick("calibration_tokens", "refit_tokens", "shared_expert")
    return stages.run(f"convert-{conversion.name}", inputs, build)


def heal_conversion(
    setup: Setup, stages: Stages, conversion: Conversion, converted: Stage, lr: float
) -> Stage:
    options = setup.options

    def build(workspace: Workspace) -> dict[str, Any]:
        moe = load_causal_lm(converted.folder / "model", torch.float32, options.device)
        with stop_after_step() as stop:
            report = heal(
                moe, load_dense(options), setup.batches("heal"),
                steps=options.heal_steps, train=options.train, lr=lr, seed=options.seed,
                temperature=options.temperature, autocast=AUTOCAST[options.autocast],
                checkpoint=workspace.checkpoints, save_every=50, stop=stop.is_set,
            )  # fmt: skip
        return setup.keep(moe, workspace) | {"lr": lr, **dataclasses.asdict(report)}

    inputs = options.pick("heal_steps", "train", "temperature", "autocast") | {"lr": lr}
    return stages.run(f"heal-{conversion.name}-{lr:g}", inputs, build, after=[converted])


def measure_more(setup: Setup, stages: Stages, name: str, of: Stage | None) -> dict[str, Any]:
    """Return a stage's perplexity on --more-texts, by file name, and its greedy answers.

    Args:
        of: the stage whose model is measured; None: the dense model
    """
    options = setup.options
    found: dict[str, Any] = {}
    if options.more_texts:
        texts = setup.more_blocks
        found["perplexity"] = stages.run(
            f"texts-{name}",
            {"texts": {name: digest(blocks) for name, blocks in texts.items()}}
            | options.pick("block", "batch")
            | of_model(options),
            lambda _: perplexities(load_stage(options, of), texts, options.batch),
            [of] if of else [],
        ).result
    if options.answer_tokens:
        found |= stages.run(
            f"answers-{name}",
            options.pick("answer_tokens") | of_model(options),
            lambda _: {"answers": answers(options, load_stage(options, of))},
            [of] if of else [],
        ).result
    return found


def perplexities(
    model: PreTrainedModel, texts: dict[str, torch.Tensor], batch: int
) -> dict[str, float]:
    return {name: perplexity(model, blocks.split(batch)) for name, blocks in texts.items()}


def answers(options: ConvertOptions, model: PreTrainedModel) -> list[str]:
    return greedy_answers(model, load_text_tokenizer(options), options.answer_tokens)


def load_stage(options: ConvertOptions, of: Stage | None) -> PreTrainedModel:
    """Load a stage's model, or the dense one."""
    if of is None:
        return load_dense(options)
    return load_causal_lm(of.folder / "model", torch.float32, options.device)


def of_model(options: ConvertOptions) -> dict[str, Any]:
    return options.pick("gguf_file", "device") | {"model": model_identity(options.model)}


# --- results


def row(setup: Setup, stages: Stages, conversion: Conversion) -> dict[str, Any]:
    """Convert, heal at each learning rate, and return the figures of one conversion."""
    converted = convert(setup, stages, conversion)
    found = dataclasses.asdict(conversion) | {
        "class": converted.result["class"],
        "before": converted.result["perplexity"],
        "model": str(converted.folder / "model"),
    }
    found["more_before"] = measure_more(setup, stages, f"{conversion.name}-split", converted)
    if not setup.options.heal_steps:
        return found
    healed = [heal_conversion(setup, stages, conversion, converted, lr) for lr in setup.options.lr]
    best = min(healed, key=lambda stage: stage.result["perplexity"]["choice"])
    results = [stage.result for stage in healed]
    return found | {
        "more_after": measure_more(setup, stages, f"{conversion.name}-healed", best),
        "after": best.result["perplexity"],
        "model": str(best.folder / "model"),
        "healing": {name: best.result[name] for name in ("lr", "losses", "seconds", "tokens")},
        "choice_by_lr": {f"{each['lr']:g}": each["perplexity"]["choice"] for each in results},
    }


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table of perplexities on the test text."""
    shared, d_ff = report["settings"]["shared_expert"], report["dense"]["intermediate_size"]
    head = ("E", "k", "split", "neurons a token", "before healing", "after healing")
    rows = [("dense", "", "", "100 %", f"{report['dense']['perplexity']['test']:.2f}", "")]
    for row in report["conversions"]:
        experts, top_k = row["num_experts"], row["top_k"]
        share = (shared + (d_ff - shared) * top_k / experts) / d_ff
        before, after = (
            f"{row[state]['test']:.2f}" if state in row else "" for state in ("before", "after")
        )
        rows.append((str(experts), str(top_k), row["split"], f"{100 * share:.0f} %", before, after))
    return markdown_table(head, rows) + "\n"


def answers_page(report: dict[str, Any]) -> str:
    """Return a table of the answers of the dense model and of the best conversion."""
    best = next(r for r in report["conversions"] if r["model"] == report["best_by_choice_text"])
    columns = {"dense": report["dense"]["more"], "split": best["more_before"]}
    if "more_after" in best:
        columns["healed"] = best["more_after"]
    return answers_table({name: more["answers"] for name, more in columns.items()})


def write_results(setup: Setup, stages: Stages, rows: list[dict[str, Any]], dense: Stage) -> None:
    out, last = setup.options.out, "after" if setup.options.heal_steps else "before"
    best = min(rows, key=lambda row: row[last]["choice"])["model"]
    report = {
        "dense": dense.result,
        "conversions": rows,
        "tokens": {part: blocks.numel() for part, blocks in setup.blocks.items()},
        **stages.describe(setup.options),
        "best_by_choice_text": best,
    }
    with replacing(out / "model") as link:
        link.symlink_to(Path(best).resolve().relative_to(out.resolve()))
    report["dense"] = report["dense"] | {"more": measure_more(setup, stages, "dense", None)}
    write_text(out / "table.md", table(report))
    if setup.options.answer_tokens:
        write_text(out / "answers.md", answers_page(report))
    write_json(out / "report.json", report)
    console.print(table(report), markup=False)
    console.print(f"best on the choice text: {best}", markup=False, soft_wrap=True)


def run(options: ConvertOptions) -> None:
    check_outputs(options.out, FILES)
    check_sizes(options)
    setup, stages = Setup(options, token_blocks(options)), Stages(options.out / "stages")
    # Conversions first: a model that cannot be converted is refused before anything is measured.
    rows = [row(setup, stages, conversion) for conversion in options.conversions]
    write_results(setup, stages, rows, measure_dense(setup, stages))


def main(arguments: list[str] | None = None) -> int:
    options = parse(ConvertOptions, arguments, __doc__, prog="moe-kernels convert")
    return exit_code(lambda: run(options))

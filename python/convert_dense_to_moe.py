"""Splits a dense model's feed-forward layers into experts, heals the result, and measures it.

    python python/convert_dense_to_moe.py MODEL --sizes 8x6 --split random clustered

MODEL is a local folder or a hub id of a Llama, Mistral, Qwen2 or Qwen3 model; --gguf-file names a
GGUF file in it. For every size ExK (E experts, K of them for each token) and split:

1. convert: `dense_to_moe`; perplexity before healing.
2. heal: the dense model's predictions are distilled, once for each --lr; the perplexity on the
   choice text decides between them.
3. report: perplexity on the test text, which decided nothing, in report.json and table.md.

Healing, choice and test text are different topics of Python's own documentation, without the
paragraphs that they share; or files of yours. Every stage is kept under --out, keyed by its
settings: a second run, or one that was interrupted, goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from shared.cli import console, exit_code, settle_device
from shared.files import replacing, write_text
from shared.models import count_experts, load_causal_lm
from shared.stages import Stages, Workspace, model_identity
from shared.texts import documentation, text_blocks, without_shared_paragraphs
from shared.training import stop_after_step
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe_kernels
from moe_kernels.conversion import dense_to_moe, heal, perplexity

PARTS = ("heal", "choice", "test")


@dataclass(frozen=True)
class Settings:
    """What all conversions of one run share."""

    model: str
    gguf_file: str | None
    device: str
    seed: int
    block: int
    batch: int
    test_tokens: int
    calibration_tokens: int
    shared_expert: int
    heal_steps: int
    train: str
    texts: dict[str, str]


@dataclass(frozen=True)
class Conversion:
    num_experts: int
    top_k: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.num_experts}x{self.top_k}-{self.split}"


# --- the texts


def token_blocks(settings: Settings) -> dict[str, torch.Tensor]:
    """For each part (blocks, block) token ids, healing's in random order."""
    tokenizer = load_tokenizer(settings)
    documented = documentation()
    defaults = {"heal": documented["train"]} | {part: documented[part] for part in PARTS[1:]}
    given = {part: Path(file).read_text() for part, file in settings.texts.items()}
    texts = without_shared_paragraphs(given) or defaults
    blocks = {}
    for part, text in texts.items():
        try:
            blocks[part] = text_blocks(tokenizer, text, settings.block, settings.block)
        except ValueError as error:
            raise ValueError(f"{part} text, without what later ones have: {error}") from error
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(blocks["heal"]), generator=generator)
    blocks["heal"] = blocks["heal"][order]
    for part in ("choice", "test"):
        wanted = max(1, settings.test_tokens // settings.block)
        step = max(1, len(blocks[part]) // wanted)
        blocks[part] = blocks[part][::step][:wanted]
    return blocks


# --- models


def load_tokenizer(settings: Settings):
    return AutoTokenizer.from_pretrained(settings.model, gguf_file=settings.gguf_file)


def load_dense(settings: Settings) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, gguf_file=settings.gguf_file, dtype=torch.float32
    )
    return model.to(settings.device).eval()


def load_moe(folder: Path, settings: Settings) -> PreTrainedModel:
    return load_causal_lm(folder / "model", torch.float32, settings.device)


def measure(model: PreTrainedModel, blocks: dict[str, torch.Tensor], batch: int) -> dict[str, Any]:
    return {part: perplexity(model, blocks[part].split(batch)) for part in ("choice", "test")}


# --- stages


class Program:
    def __init__(self, settings: Settings, out: Path):
        self.settings, self.stages = settings, Stages(out / "stages")
        self.blocks = token_blocks(settings)
        self.source = {
            "model": model_identity(settings.model),
            **{name: getattr(settings, name) for name in ("gguf_file", "device", "seed", "block")},
            **{name: getattr(settings, name) for name in ("batch", "test_tokens")},
            "texts": {
                part: hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:12]
                for part, blocks in self.blocks.items()
            },
        }

    def dense(self) -> dict[str, Any]:
        def build(workspace: Workspace) -> dict[str, Any]:
            model = load_dense(self.settings)
            return {
                "perplexity": measure(model, self.blocks, self.settings.batch),
                "class": type(model).__name__,
                "intermediate_size": model.config.intermediate_size,
            }

        return self.stages.run("dense", self.source, build).result

    def convert(self, conversion: Conversion) -> tuple[Path, dict[str, Any]]:
        settings = self.settings
        inputs = self.source | dataclasses.asdict(conversion)
        inputs |= {
            name: getattr(settings, name) for name in ("calibration_tokens", "shared_expert")
        }

        def build(workspace: Workspace) -> dict[str, Any]:
            moe = dense_to_moe(
                load_dense(settings), conversion.num_experts, conversion.top_k, conversion.split,
                shared_expert=settings.shared_expert,
                calibration=self.blocks["heal"].split(settings.batch),
                calibration_tokens=settings.calibration_tokens, seed=settings.seed,
            )  # fmt: skip
            measured = measure(moe, self.blocks, settings.batch)
            moe.save_pretrained(workspace.folder / "model")
            load_tokenizer(settings).save_pretrained(workspace.folder / "model")
            return {"perplexity": measured, "class": type(moe).__name__, "inputs": inputs}

        name = f"convert-{conversion.name}"
        stage = self.stages.run(name, inputs, build)
        return stage.folder, stage.result

    def heal(
        self, conversion: Conversion, converted: Path, inputs: dict[str, Any], lr: float
    ) -> tuple[Path, dict[str, Any]]:
        settings = self.settings
        inputs = inputs | {"heal_steps": settings.heal_steps, "train": settings.train, "lr": lr}

        def build(workspace: Workspace) -> dict[str, Any]:
            moe = load_moe(converted, settings)
            with stop_after_step() as stop:
                report = heal(
                    moe, load_dense(settings), self.blocks["heal"].split(settings.batch),
                    steps=settings.heal_steps, train=settings.train, lr=lr, seed=settings.seed,
                    checkpoint=workspace.folder / "checkpoint", save_every=50, stop=stop.is_set,
                )  # fmt: skip
            measured = measure(moe, self.blocks, settings.batch)
            moe.save_pretrained(workspace.folder / "model")
            load_tokenizer(settings).save_pretrained(workspace.folder / "model")
            shutil.rmtree(workspace.folder / "checkpoint")
            return {"perplexity": measured, "lr": lr, **dataclasses.asdict(report)}

        name = f"heal-{conversion.name}-{lr:g}"
        stage = self.stages.run(name, inputs, build)
        return stage.folder, stage.result

    def row(self, conversion: Conversion, learning_rates: list[float]) -> dict[str, Any]:
        """Everything about one conversion."""
        folder, converted = self.convert(conversion)
        row = dataclasses.asdict(conversion) | {
            "class": converted["class"],
            "before": converted["perplexity"],
            "model": str(folder / "model"),
        }
        if self.settings.heal_steps:
            runs = [self.heal(conversion, folder, converted["inputs"], lr) for lr in learning_rates]
            healed_folder, best = min(runs, key=lambda run: run[1]["perplexity"]["choice"])
            row |= {
                "after": best["perplexity"],
                "model": str(healed_folder / "model"),
                "healing": {k: best[k] for k in ("lr", "losses", "seconds", "tokens")},
                "choice_by_lr": {f"{r['lr']:g}": r["perplexity"]["choice"] for _, r in runs},
            }
        return row


def check_sizes(settings: Settings, conversions: list[Conversion]) -> None:
    """Before the first conversion, whether the last one can work."""
    config = AutoConfig.from_pretrained(settings.model, gguf_file=settings.gguf_file)
    if count_experts(config):
        raise ValueError(f"{settings.model} is a Mixture of Experts already")
    routed = config.intermediate_size - settings.shared_expert
    for conversion in conversions:
        if routed % conversion.num_experts:
            raise ValueError(
                f"{conversion.num_experts} experts do not divide the {routed} neurons of a layer"
            )


# --- the report


def table(report: dict[str, Any]) -> str:
    """Markdown; perplexities on the test text."""
    shared, d_ff = report["settings"]["shared_expert"], report["dense"]["intermediate_size"]
    lines = [
        "| E | k | split | neurons a token | before healing | after healing |",
        "|---|---|---|---|---|---|",
        f"| dense | | | 100 % | {report['dense']['perplexity']['test']:.2f} | |",
    ]
    for row in report["conversions"]:
        share = (shared + (d_ff - shared) * row["top_k"] / row["num_experts"]) / d_ff
        after = f"{row['after']['test']:.2f}" if "after" in row else ""
        lines.append(
            f"| {row['num_experts']} | {row['top_k']} | {row['split']} | {share:.0%} "
            f"| {row['before']['test']:.2f} | {after} |".replace("%", " %")
        )
    return "\n".join(lines) + "\n"


def run(
    settings: Settings, conversions: list[Conversion], learning_rates: list[float], out: Path
) -> dict[str, Any]:
    check_sizes(settings, conversions)
    program = Program(settings, out)
    # Conversions first: a model that cannot be converted is refused before anything is measured.
    rows = [program.row(conversion, learning_rates) for conversion in conversions]
    report = {
        "dense": program.dense(),
        "conversions": rows,
        "tokens": {part: blocks.numel() for part, blocks in program.blocks.items()},
        "seconds": program.stages.seconds,
        "settings": dataclasses.asdict(settings),
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
    }
    last = "after" if settings.heal_steps else "before"
    best = min(report["conversions"], key=lambda row: row[last]["choice"])
    report["best_by_choice_text"] = best["model"]
    with replacing(out / "model") as link:
        link.symlink_to(Path(best["model"]).resolve().relative_to(out.resolve()))
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "table.md", table(report))
    console.print(table(report), markup=False)
    console.print(f"best on the choice text: {best['model']}", markup=False, soft_wrap=True)
    return report


def size(text: str) -> tuple[int, int]:
    experts, _, top_k = text.partition("x")
    if not (experts.isdigit() and top_k.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not ExK, such as 8x6")
    return int(experts), int(top_k)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="local folder or hub id")
    add("--gguf-file", help="name of a GGUF file in it (needs the gguf package)")
    add("--sizes", type=size, nargs="+", default=[(8, 6)], metavar="ExK", help="default: 8x6")
    add("--split", nargs="+", choices=("random", "clustered"), default=["random", "clustered"])
    add("--shared-expert", type=int, default=0, metavar="N", help="neurons; default: none")
    add("--heal-steps", type=int, default=400, help="0: none; default: %(default)s")
    add("--train", choices=("router", "router+experts"), default="router+experts")
    add("--lr", type=float, nargs="+", default=[3e-4], help="the choice text picks; default: 3e-4")
    add("--batch", type=int, default=4, help="blocks a step; default: %(default)s")
    add("--block", type=int, default=128, help="tokens a block; default: %(default)s")
    add("--calibration-tokens", type=int, default=2048, help="default: %(default)s")
    add("--test-tokens", type=int, default=16_384, help="at most; default: %(default)s")
    for part in PARTS:
        add(f"--{part}-text", metavar="FILE", help="default: Python's documentation")
    add("--seed", type=int, default=0)
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--out", type=Path, default=Path("out/convert"), help="default: %(default)s")
    return parser


def parse(arguments: list[str] | None) -> tuple[Settings, list[Conversion], list[float], Path]:
    parser = make_parser()
    given = parser.parse_args(arguments)
    texts = {part: getattr(given, f"{part}_text") for part in PARTS}
    if any(texts.values()) and not all(texts.values()):
        parser.error("give all of --heal-text, --choice-text and --test-text, or none")
    for part, file in texts.items():
        if file and not Path(file).is_file():
            parser.error(f"--{part}-text: {file} is not a file")
    if len({Path(file).resolve() for file in texts.values() if file}) not in (0, len(PARTS)):
        parser.error("--heal-text, --choice-text and --test-text must be different files")
    for name in ("batch", "calibration_tokens", "test_tokens"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if given.block < 2 or given.heal_steps < 0 or min(given.lr) <= 0:
        parser.error("--block must be at least 2, --heal-steps at least 0, --lr above 0")
    for num_experts, top_k in given.sizes:
        if not 1 <= top_k <= num_experts or num_experts < 2:
            parser.error(f"--sizes {num_experts}x{top_k}: E must be at least 2, K in 1..E")
    settle_device(parser, given)
    settings = Settings(
        device=given.device,
        texts={part: str(Path(file).resolve()) for part, file in texts.items() if file},
        **{
            field.name: getattr(given, field.name)
            for field in dataclasses.fields(Settings)
            if field.name not in ("device", "texts")
        },
    )
    pairs = [(sizes, split) for sizes in given.sizes for split in given.split]
    conversions = [Conversion(*sizes, split) for sizes, split in pairs]
    return settings, conversions, given.lr, given.out


def main(arguments: list[str] | None = None) -> int:
    settings, conversions, learning_rates, out = parse(arguments)
    return exit_code(lambda: run(settings, conversions, learning_rates, out))


if __name__ == "__main__":
    sys.exit(main())

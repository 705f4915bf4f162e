"""Teach a text-only Mixture-of-Experts model to draw digits, and show that its text is unchanged.

    moe-kernels demo     # a few minutes on two CPU cores; --quick for a trial in seconds

1. A small OLMoE learns text (Python's own documentation).
2. 5,000 real handwritten digits become tokens of a learnt patch codebook.
3. The model is patched in place and learns "a handwritten seven" -> image tokens with a Trainer.
4. It draws 20 digits for each caption; samples.png, training.png, routing.png and report.json
   show how well.

Every stage is kept under --out, keyed by its settings: a second run, or one that was interrupted,
continues where the first stopped.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import tokenizers
from transformers import PreTrainedTokenizerBase

from moe_kernels.analysis import RoutingStatistics
from moe_kernels.programs.shared.cli import exit_code, option, parse
from moe_kernels.programs.shared.drawing import Setup, TextToImageOptions, run_stages
from moe_kernels.programs.shared.files import write_json
from moe_kernels.programs.shared.options import BackendOptions, out_folder
from moe_kernels.programs.shared.outputs import check_outputs
from moe_kernels.programs.shared.reports.demo import RESULTS, draw_figures, summarize
from moe_kernels.programs.shared.stages import Stage, Stages, Workspace
from moe_kernels.programs.shared.text_model import QUICK_TEXT_MODEL, TextModelSettings, pretrain
from moe_kernels.programs.shared.text_to_image import record_routing
from moe_kernels.programs.shared.texts import documentation

DRAWING = {
    "held_out": 500, "num_codes": 64, "lora_alpha": 32.0, "lr": 4e-3, "caption_dropout": 0.0,
    "samples_per_caption": 20, "guidance": [1.0], "text_tokens": 10**9, "dtype": "float32",
    "text_batch": 32, "image_batch": 100, "drawing_batch": 200, "curve_pictures": 200,
}  # fmt: skip
QUICK_DRAWING = {
    "images": 500, "held_out": 100, "num_codes": 32, "r": 4, "lora_alpha": 8.0, "batch": 8,
    "samples_per_caption": 4,
}  # fmt: skip


@dataclass(kw_only=True)
class DemoOptions(BackendOptions):
    """Demo."""

    steps: int = option(1400, "training steps of text to image", at_least=1)
    rows_lr: float | None = option(
        None, "learning rate of the added rows; default: that of the adapters", above=0
    )
    quick: bool = option(False, "tiny settings: shows that the demo runs, no more")
    out: Path = out_folder("demo")

    @property
    def text_model(self) -> TextModelSettings:
        sizes = QUICK_TEXT_MODEL if self.quick else {}
        return TextModelSettings(**sizes, **self.pick("seed", "device"))

    def drawing(self, model: Path) -> TextToImageOptions:
        """Return the options of moe-kernels train-text-to-image that the demo uses."""
        return TextToImageOptions(
            model=str(model), text_block=self.text_model.text_block,
            **DRAWING | (QUICK_DRAWING if self.quick else {}),
            **self.pick("steps", "rows_lr", "seed", "device", "backend", "out"),
        )  # fmt: skip


def learn_text(options: DemoOptions, stages: Stages) -> Stage:
    settings = options.text_model
    return stages.run(
        "pretrain", dataclasses.asdict(settings), lambda workspace: pretrain(settings, workspace)
    )


def measure_routing(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Count the experts that text and pictures go to."""
    batches = setup.options.pick("text_batch", "image_batch")
    held_out = setup.tokens.held_out
    return record_routing(setup.painter, setup.blocks, held_out, **batches).to_dict()


def run_all_stages(setup: Setup) -> None:
    run_stages(setup)
    batches = setup.options.pick("text_batch", "image_batch")
    setup.run("routing", measure_routing, batches, after="teach")


def bits_per_byte(nll: float, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Convert nats a token into a figure that does not depend on the tokenizer."""
    tokens = len(tokenizer(text, verbose=False).input_ids)
    return nll * tokens / len(text.encode()) / math.log(2)


def describe(setup: Setup, routing: RoutingStatistics) -> dict[str, Any]:
    """Return the content of report.json: every figure that was measured."""
    stages, results = setup.stages, setup.results
    described = stages.describe(setup.options)
    text = results["measure"]["text"]
    bits = bits_per_byte(text["nll_after_training"], setup.tokenizer, documentation()["test"])
    more = {module.__name__: module.__version__ for module in (tokenizers, np, sklearn)}
    kinds = dataclasses.asdict(routing.expert_kinds("text", "image"))
    return described | {
        **results["measure"],
        "text": text | {"bits_per_byte": bits},
        "samples": results["judge"]["samples"]["1"],
        "tokenizer": results["tokenize"],
        "routing": {
            "layers": routing.layers,
            "jensen_shannon_divergence_bits": routing.divergence("text", "image").tolist(),
            "entropy_nats": routing.entropy().tolist(),
            "experts": {name: counts.tolist() for name, counts in kinds.items()},
        },
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "tokens_per_second": {
            name: results[name]["tokens_per_second"] for name in ("pretrain", "teach", "draw")
        },
        **setup.options.pick("seed", "backend", "device"),
        "versions": {"python": platform.python_version(), **described["versions"], **more},
    }


def run(options: DemoOptions) -> None:
    check_outputs(options.out, RESULTS)
    stages = Stages(options.out / "stages")
    text = learn_text(options, stages)
    setup = Setup.load(options.drawing(text.folder / "model"), stages)
    run_all_stages(setup)
    routing = RoutingStatistics.from_dict(setup.results["routing"])
    report = describe(setup, routing)
    draw_figures(report, setup, routing, options.out, quick=options.quick)
    write_json(options.out / "report.json", report)
    summarize(report, options.out)


def main(arguments: list[str] | None = None) -> int:
    options = parse(DemoOptions, arguments, __doc__, prog="moe-kernels demo", quick={"steps": 20})
    return exit_code(lambda: run(options))

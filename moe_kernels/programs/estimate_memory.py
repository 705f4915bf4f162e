"""Estimate the memory that fine-tuning a full-size model takes: weights, adapters, optimiser.

    moe-kernels estimate-memory                  # OLMoE, Mixtral, Qwen-MoE
    moe-kernels estimate-memory --model FOLDER   # another model's config
    moe-kernels estimate-memory --fits           # which switches fit which card, term by term
    moe-kernels estimate-memory --measure FILE   # train a small model and compare, on the CPU

Models are built from their published sizes on the "meta" device, so nothing is downloaded and no
memory is used. In the first table activations come on top: they depend on batch, length and
checkpointing. models/memory.py has the formulas of --fits. --measure trains in processes of their
own, and needs Linux, and bitsandbytes for experts in NF4.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from moe_kernels import ModalityLoraConfig, info
from moe_kernels.files import replacing
from moe_kernels.models.memory import amount, sizes_of, terms
from moe_kernels.programs.shared import memory_run
from moe_kernels.programs.shared.cli import Options, exit_code, option, parse
from moe_kernels.programs.shared.full_size import MODELS, patched_on_meta
from moe_kernels.programs.shared.memory_tables import fits, measured
from moe_kernels.programs.shared.models import load_config
from moe_kernels.programs.shared.tables import markdown_table
from moe_kernels.progress import bar

_NUMBERS = ("", " k", " M", " B")
_BYTES = (" bytes", " KiB", " MiB", " GiB")


@dataclass(kw_only=True)
class EstimateOptions(Options):
    """Model and adapters."""

    r: int = option(16, "rank of the updates", at_least=1)
    num_tokens: int = option(8194, "added image tokens", at_least=1)
    model: str | None = option(None, "folder or hub id of another model's config")
    fits: bool = option(False, "print the memory of a training step by term, and what fits a card")
    tokens: int = option(4096, "tokens of a card's batch, for --fits", at_least=1)
    measure: str | None = option(None, "file (JSON) for measurements of a small model on the CPU")


def estimate(config, lora: ModalityLoraConfig, num_tokens: int) -> dict[str, float]:
    """Return the numbers of base and trained weights, and bytes with bf16 weights and AdamW."""
    patched = patched_on_meta(config, lora, num_tokens)
    trained = sum(p.numel() for p in patched.trainable_parameters())
    base = sum(p.numel() for p in patched.model.parameters()) - trained
    # A trained parameter takes 16 bytes: weight, gradient and two moments of AdamW in fp32.
    return {"base": base, "trained": trained, "bytes": 2 * base + 16 * trained}


def trials() -> Iterator[dict]:
    """Yield what is measured: each way to keep activations, and the way that ``--fits`` assumes."""
    packed = (False, True) if importlib.util.find_spec("bitsandbytes") else (False,)
    both = ["experts", "attention"]
    for nf4 in packed:
        for checkpointed, tokens in itertools.product((False, True), (256, 1024)):
            yield {
                "nf4": nf4, "checkpointed": checkpointed, "tokens": tokens, "fused_loss": False,
                "targets": both,
            }  # fmt: skip
        for targets in (both, ["attention"]):
            yield {
                "nf4": nf4, "checkpointed": True, "tokens": 1024, "fused_loss": True,
                "targets": targets,
            }  # fmt: skip


def measurements() -> Iterator[dict]:
    """Yield what processes of their own measured, and the formula's terms; NF4 if it is here."""
    for trial in bar(list(trials()), desc="measuring", unit="trials"):
        trial |= {"hidden": 1024, "layers": 4, "threads": 2}
        # As large tensors do, the small ones of this model go back to the system when freed.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        command = [sys.executable, "-m", memory_run.__name__, json.dumps(trial)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        yield trial | json.loads(done.stdout.splitlines()[-1]) | {"terms": terms_of(trial)}


def terms_of(trial: dict) -> dict[str, float]:
    """Return the formula's terms of a trial."""
    config = memory_run.config_of(trial["hidden"], trial["layers"])
    patched = patched_on_meta(config, memory_run.lora(trial), memory_run.NUM_TOKENS)
    switches = {name: trial[name] for name in ("nf4", "checkpointed", "fused_loss")}
    return terms(sizes_of(patched), trial["tokens"], **switches)


def measure(path: Path) -> None:
    """Write measurements with the versions that made them, and print their table."""
    environment = info.collect()
    if importlib.util.find_spec("bitsandbytes"):
        environment["bitsandbytes"] = version("bitsandbytes")
    results = {"environment": environment, "records": list(measurements())}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    print(measured(results))


def run(options: EstimateOptions) -> None:
    if options.measure is not None:
        return measure(Path(options.measure))
    name = options.model
    models = {name: load_config(name)} if name else None
    if options.fits:
        return print(fits(options.tokens, options.r, options.num_tokens, models))
    head = ("model", "base weights", "trained (experts + attention)", "trained (attention)")
    rows = []
    for name, config in (models or MODELS).items():
        cells = []
        for targets in (("experts", "attention"), ("attention",)):
            lora = ModalityLoraConfig(r=options.r, target_modules=targets)
            result = estimate(config, lora, options.num_tokens)
            size = amount(result["bytes"], _BYTES, 1024)
            cells.append(f"{amount(result['trained'], _NUMBERS)}, {size}")
        rows.append((name, amount(result["base"], _NUMBERS), *cells))
    print(markdown_table(head, rows))


def main(arguments: list[str] | None = None) -> int:
    options = parse(EstimateOptions, arguments, __doc__, prog="moe-kernels estimate-memory")
    return exit_code(lambda: run(options))

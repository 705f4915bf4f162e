"""Cost of a training step, each method in a process of its own for the sake of its peak memory.

    PYTHONPATH=python python -m studies.step_cost plora MODEL_FOLDER    # prints one line of JSON

redundancy.py runs this module for each method in turn, in several rounds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from shared.text_model import load_text_model
from transformers import PreTrainedModel

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model

METHODS = ("plora", "peft", "full")
ROUNDS, WARM_UP, STEPS = 3, 3, 15
BATCH, CAPTION, CODES = 16, 8, 49
_ADDED = 66
_PROGRAMS = Path(__file__).parents[1]


def measure_cost(
    folder: Path, program: str = "studies.step_cost", methods: Sequence[str] = METHODS
) -> dict[str, list[dict[str, float]]]:
    """Run a program (a module's name) for each method in every round; return what it prints.

    Rounds interleave the methods.
    """
    path = os.pathsep.join(filter(None, [str(_PROGRAMS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    results: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(ROUNDS):
        for method in methods:
            command = [sys.executable, "-m", program, method, str(folder)]
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            results[method].append(json.loads(output.splitlines()[-1]))
    return results


def cost_of(method: str, folder: Path) -> dict[str, Any]:
    """Measure tokens a second, peak memory above the loaded model's, and trained parameters."""
    model, _ = load_text_model(folder, "cpu")
    loaded = reset_peak()
    model, first_id = _PREPARE[method](model)
    ids = torch.randint(1, first_id, (BATCH, CAPTION + CODES))
    ids[:, CAPTION:] = torch.randint(first_id, first_id + _ADDED, (BATCH, CODES))
    return cost_of_steps(model, {"input_ids": ids, "labels": ids}, loaded)


def cost_of_steps(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], loaded: int
) -> dict[str, Any]:
    """Time steps; loaded: bytes of the process when it held the model and nothing else"""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    # Fused is the Trainer's default; unfused costs full fine-tuning most.
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            started = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "tokens_per_second": batch["labels"].numel() * STEPS / (time.perf_counter() - started),
        "peak_bytes": peak_bytes() - loaded,
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
    }


def reset_peak() -> int:
    """Return the resident bytes, and make :func:`peak_bytes` start from them (Linux).

    ``getrusage`` does not serve: a process inherits the peak of the one that started it.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the most resident bytes since :func:`reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def prepare_plora(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    patch_model(model, ModalityLoraConfig(r=16, lora_alpha=32))
    return model, add_modality_tokens(model, "image", _ADDED).start


def prepare_peft(model: PreTrainedModel) -> tuple[torch.nn.Module, int]:
    from peft import LoraConfig, get_peft_model

    first = model.config.vocab_size
    model.resize_token_embeddings(first + _ADDED)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    return get_peft_model(model, config), first


def prepare_full(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    first = model.config.vocab_size
    model.resize_token_embeddings(first + _ADDED)
    return model.requires_grad_(True), first


_PREPARE: dict[str, Callable[[PreTrainedModel], tuple[torch.nn.Module, int]]] = {
    "plora": prepare_plora,
    "peft": prepare_peft,
    "full": prepare_full,
}

if __name__ == "__main__":
    print(json.dumps(cost_of(sys.argv[1], Path(sys.argv[2]))))

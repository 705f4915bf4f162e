"""Cost of a training step, each method in a process of its own for the sake of its peak memory.

    PYTHONPATH=python python -m studies.step_cost redundancy plora MODEL_FOLDER

It prints one line of JSON. The studies run it for each of their methods in turn, in several rounds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.modalities import join_features_and_text
from moe_kernels.moextend import ExpertExtender
from moe_kernels.programs.shared.text_model import load_text_model
from studies.moextend.runs import train_base_experts

ROUNDS, WARM_UP, STEPS = 3, 3, 15
BATCH, CAPTION, CODES = 16, 8, 49
FEATURES, TEXT = 32, 16
_ADDED = 66
_PROGRAMS = Path(__file__).parents[1]


def measure_cost(study: str, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Measure each method of a study in every round; rounds interleave the methods."""
    methods = METHODS[study]
    path = os.pathsep.join(filter(None, [str(_PROGRAMS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    results: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(ROUNDS):
        for method in methods:
            command = [sys.executable, "-m", "studies.step_cost", study, method, str(folder)]
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            results[method].append(json.loads(output.splitlines()[-1]))
    return results


def cost_of(study: str, method: str, folder: Path) -> dict[str, Any]:
    """Measure tokens a second, peak memory above the loaded model's, and trained parameters."""
    model, _ = load_text_model(folder, "cpu")
    loaded = reset_peak()
    return cost_of_steps(*METHODS[study][method](model), loaded)


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


# --- methods: functions of a base model that return what trains, and a batch


Batch = dict[str, torch.Tensor]


def captioned_pictures(first_id: int) -> Batch:
    """Return captions that are followed by the codes of pictures."""
    ids = torch.randint(1, first_id, (BATCH, CAPTION + CODES))
    ids[:, CAPTION:] = torch.randint(first_id, first_id + _ADDED, (BATCH, CODES))
    return {"input_ids": ids, "labels": ids}


def plora(model: PreTrainedModel) -> tuple[PreTrainedModel, Batch]:
    patch_model(model, ModalityLoraConfig(r=16, lora_alpha=32))
    first = add_modality_tokens(model, "image", _ADDED).start
    return model, captioned_pictures(first)


def peft(model: PreTrainedModel) -> tuple[torch.nn.Module, Batch]:
    from peft import LoraConfig, get_peft_model

    first = model.config.vocab_size
    model.resize_token_embeddings(first + _ADDED)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    return get_peft_model(model, config), captioned_pictures(first)


def full(model: PreTrainedModel) -> tuple[PreTrainedModel, Batch]:
    first = model.config.vocab_size
    model.resize_token_embeddings(first + _ADDED)
    return model.requires_grad_(True), captioned_pictures(first)


def extension(model: PreTrainedModel, trains: str) -> tuple[PreTrainedModel, Batch]:
    """Train experts added "gated" or as "published", the base's "experts", or the "full" model."""
    extender = ExpertExtender(model)
    if trains in ("gated", "published"):
        extender.extend("interval", init=0, modality_gate=trains == "gated")
    else:
        train_base_experts(model)
    if trains == "experts":
        # All experts and routers of the layers that would get new experts.
        for layer in model.model.layers[::2]:
            layer.mlp.requires_grad_(True)
    elif trains == "full":
        model.requires_grad_(True)
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    # Features come projected, as the projector is frozen by then.
    features, text = torch.randn(BATCH, FEATURES, hidden), torch.randint(1, vocab, (BATCH, TEXT))
    with torch.no_grad():
        return model, join_features_and_text(model, features, text)


# By study. The others are compared with the first one.
METHODS: dict[str, dict[str, Callable[[PreTrainedModel], tuple[torch.nn.Module, Batch]]]] = {
    "redundancy": {"plora": plora, "peft": peft, "full": full},
    "moextend": {
        trains: partial(extension, trains=trains)
        for trains in ("gated", "published", "experts", "full")
    },
}

if __name__ == "__main__":
    print(json.dumps(cost_of(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))

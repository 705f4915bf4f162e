"""Cost of a training step with added experts, each method in a process of its own.

    PYTHONPATH=python python -m studies.moextend.step_cost gated MODEL_FOLDER

It prints one line of JSON. moextend.py runs it for each method in turn, in several rounds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from shared.text_model import load_text_model

from moe_kernels.moextend import ExpertExtender, join_features_and_text
from studies.moextend.runs import train_base_experts
from studies.step_cost import BATCH, cost_of_steps, reset_peak

# The others are compared with the first one.
METHODS = ("gated", "published", "experts", "full")
FEATURES, TEXT = 32, 16


def cost_of(method: str, folder: Path) -> dict[str, Any]:
    """Measure tokens a second, peak memory above the loaded model's, and trained parameters."""
    model, _ = load_text_model(folder, "cpu")
    loaded = reset_peak()
    extender = ExpertExtender(model)
    if method in ("gated", "published"):
        extender.extend("interval", init=0, modality_gate=method == "gated")
    else:
        train_base_experts(model)
    if method == "experts":
        # All experts and routers of the layers that would get new experts.
        for layer in model.model.layers[::2]:
            layer.mlp.requires_grad_(True)
    elif method == "full":
        model.requires_grad_(True)
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    with torch.no_grad():
        # Features come projected, as the projector is frozen by then.
        batch = join_features_and_text(
            model, torch.randn(BATCH, FEATURES, hidden), torch.randint(1, vocab, (BATCH, TEXT))
        )
    return cost_of_steps(model, batch, loaded)


if __name__ == "__main__":
    print(json.dumps(cost_of(sys.argv[1], Path(sys.argv[2]))))

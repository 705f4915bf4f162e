"""Process that trains two steps of a model and measures its own memory, for ``estimate_memory``.

Arguments and result are JSON: what one of its ``TRIALS`` says, and bytes above those before the
model was made.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from moe_kernels import ModalityLoraConfig, PatchedModel, add_modality_tokens, patch_model

NUM_TOKENS, RANK = 1026, 16
_PERIOD = 0.001  # seconds between two readings


def config_of(hidden: int, layers: int) -> MixtralConfig:
    """Return a Mixtral of other sizes in the same proportions."""
    return MixtralConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, vocab_size=8000,
    )  # fmt: skip


def lora(trial: Mapping) -> ModalityLoraConfig:
    """Return the adapters of a trial."""
    return ModalityLoraConfig(r=RANK, target_modules=tuple(trial["targets"]))


def held() -> int:
    """Return the bytes of anonymous memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class _Watch(threading.Thread):
    """Reads the memory of this process until it is stopped, and keeps the most."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.running = held(), True

    def run(self) -> None:
        while self.running:
            self.most = max(self.most, held())
            time.sleep(_PERIOD)


def make(trial: dict) -> PatchedModel:
    """Make a trial's model, packed if it says so, and patched."""
    torch.manual_seed(0)
    config = config_of(trial["hidden"], trial["layers"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if trial["nf4"]:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(
                    layer.mlp.experts, name, compress_statistics=True, quant_type="nf4"
                )
    patched = patch_model(model, lora(trial))
    add_modality_tokens(model, "image", NUM_TOKENS)
    if trial["checkpointed"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
    patched.fused_loss = trial["fused_loss"]
    return patched


def train(patched: PatchedModel, tokens: int) -> None:
    """Train two steps: from the second on the optimiser has its state."""
    optimizer = torch.optim.AdamW(patched.trainable_parameters(), foreach=False)
    ids = torch.randint(1, 8000 + NUM_TOKENS, (1, tokens))
    for _ in range(2):
        patched.model.train()(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    trial = json.loads(sys.argv[1])
    torch.set_num_threads(trial["threads"])
    before = held()
    patched = make(trial)
    gc.collect()
    watch = _Watch()
    watch.start()
    train(patched, trial["tokens"])
    watch.running = False
    watch.join()
    print(json.dumps({"measured": watch.most - before, "loaded": held() - before}))


if __name__ == "__main__":
    main()

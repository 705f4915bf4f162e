"""Times training steps of a model with experts in NF4, and measures their memory, on the CPU.

    python benchmarks/packed_step.py                 # into results/cpu-packed-step.json

It needs bitsandbytes. "the op" unpacks experts tile by tile; "reading" unpacks a whole layer by
bitsandbytes, in the forward pass and again in the backward pass, as for codes that the op does not
know. Rounds are interleaved. A peak is that of torch's allocator above what it held before a step.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from lib import memory, result_files, timing
from lib.cli import output_file
from lib.pages import cpu
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from moe_kernels import PatchedModel, patch_model

_STACKS = ("gate_up_proj", "down_proj")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    default = result_files.RESULTS / cpu.PACKED_STEP
    parser.add_argument("--output", type=output_file, default=default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    packed = _pack(_make(args.hidden))
    models = {"the op": packed, "reading": _read(copy.deepcopy(packed))}
    steps = {name: _step(patch_model(model), args.tokens) for name, model in models.items()}
    for step in steps.values():
        step()
    found = timing.measure(steps, min_rounds=args.rounds, max_rounds=args.rounds)
    layer = 2 * 3 * 8 * args.hidden * (args.hidden * 7 // 2)
    record = {
        "hidden": args.hidden, "tokens": args.tokens, "layer_bytes": layer,
        "seconds": {name: samples["step"] for name, samples in found.items()},
        "peak_bytes": {name: memory.peak_bytes(step) for name, step in steps.items()},
    }  # fmt: skip
    data = {"environment": result_files.environment("cpu"), "record": record}
    result_files.write(args.output, data)
    print(f"{cpu.packed_step(data)}\n\nwrote {args.output}")
    return 0


def _make(hidden: int) -> PreTrainedModel:
    """Make two layers of Mixtral's proportions, in bf16."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=2,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, vocab_size=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _pack(model: PreTrainedModel) -> PreTrainedModel:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for layer in model.model.layers:
        for name in _STACKS:
            replace_parameter_4bit(
                layer.mlp.experts, name, compress_statistics=True, quant_type="nf4"
            )
    return model


def _read(model: PreTrainedModel) -> PreTrainedModel:
    """Let the model's parametrisations be of a class that the op does not know."""
    for layer in model.model.layers:
        for name in _STACKS:
            unpack = layer.mlp.experts.parametrizations[name][0]
            unpack.__class__ = type("Other", (type(unpack),), {})
    return model


def _step(patched: PatchedModel, tokens: int) -> Callable[[], dict[str, float]]:
    """Return a training step, half of whose tokens are of the modality."""
    ids = torch.randint(1, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    given = {"labels": ids, "modality_ids": torch.arange(tokens)[None] % 2, "use_cache": False}
    trained = list(patched.trainable_parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
    model = patched.model.train()

    def step() -> dict[str, float]:
        start = time.perf_counter()
        model(ids, **given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"step": time.perf_counter() - start}

    return step


if __name__ == "__main__":
    raise SystemExit(main())

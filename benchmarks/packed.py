"""Times the op on a packed base, against unpacking the base first, on the CPU in one run.

    python benchmarks/packed.py                    # into results/cpu-packed.json
    python benchmarks/packed.py --shape small      # another shape, into out/bench/

"plain" is the op on a base that was never packed. "unpacked first" makes the whole base in the
compute dtype, with torch, before each call, and keeps it for the backward pass. Rounds are
interleaved.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from lib import result_files, timing
from lib.cli import output_file
from lib.pages import cpu

from moe_kernels.ops import moe_mlp, quantise_fp8, quantise_nf4
from moe_kernels.testing import SHAPES, MoeInputs, make_moe_inputs

PACKS = {"nf4": quantise_nf4, "fp8": quantise_fp8}
_STACKS = ("gate_up_proj", "down_proj")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="one_layer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=output_file, help="default: results/cpu-packed.json")
    args = parser.parse_args(arguments)
    whole = args.shape == parser.get_default("shape")
    default = result_files.RESULTS / cpu.PACKED if whole else Path("out/bench/cpu-packed.json")
    args.output = args.output or default
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    inputs = make_moe_inputs(SHAPES[args.shape]).to(torch.bfloat16, lora_dtype=torch.float32)
    few = inputs._replace(
        hidden_states=inputs.hidden_states[:1], topk_ids=inputs.topk_ids[:1],
        topk_weights=inputs.topk_weights[:1], modality_ids=inputs.modality_ids[:1].clamp(min=0),
    )  # fmt: skip
    stacks = {
        name: {stack: pack(getattr(inputs, stack)) for stack in _STACKS}
        for name, pack in PACKS.items()
    }
    records = []
    for mode, rows in (("training", inputs), ("forward", inputs), ("forward", few)):
        timed = _time(mode, rows, stacks, args.rounds)
        record = {"mode": mode, "tokens": len(rows.hidden_states), "shape": args.shape}
        records.append(record | {"seconds": timed})
    data = {"environment": result_files.environment("cpu"), "records": records}
    result_files.write(args.output, data)
    print(f"{cpu.packed(data)}\n\nwrote {args.output}")
    return 0


def _time(
    mode: str, inputs: MoeInputs, stacks: Mapping[str, Mapping], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each way, a value for each round."""
    ways: dict[str, Callable[[], Mapping]] = {"plain": dict}
    for name, packed in stacks.items():
        ways[name] = partial(dict, packed)
        ways[f"{name}, unpacked first"] = partial(_unpacked, packed)
    steps = {name: partial(_run, mode, inputs, base) for name, base in ways.items()}
    for step in steps.values():
        step()
    found = timing.measure(steps, min_rounds=rounds, max_rounds=rounds)
    return {name: samples[mode] for name, samples in found.items()}


def _unpacked(packed: Mapping) -> dict[str, torch.Tensor]:
    return {name: stack.dequantise() for name, stack in packed.items()}


def _run(mode: str, inputs: MoeInputs, base: Callable[[], Mapping]) -> dict[str, float]:
    """Run once, forward alone or with the gradients of the input and the adapters."""
    inputs = inputs._replace(hidden_states=inputs.hidden_states.detach())
    trained = [inputs.hidden_states, *inputs.gate_up_lora[:2], *inputs.down_lora[:2]]
    for tensor in trained:
        tensor.requires_grad_(mode == "training")
    start = time.perf_counter()
    call = inputs._replace(**base())
    out = moe_mlp(*call[:5], **call.keywords(), backend="cpu")
    if mode == "training":
        torch.autograd.grad(out, trained, torch.ones_like(out))
    return {mode: time.perf_counter() - start}


if __name__ == "__main__":
    raise SystemExit(main())

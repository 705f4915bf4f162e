"""Times forwards of batches that mix adapters by name against batches of one, on the CPU.

    python benchmarks/mixed_adapters.py              # into results/cpu-mixed-adapters.json

All batches have the same tokens, half of them of the modality, and eight sequences. "mixed" batches
have 2, 4 or 8 adapters, and so 2, 4 or 8 times the parameters; "one at a time" answers the eight
sequences of the mixed batch by eight forwards. Rounds are interleaved.
"""

import argparse
import time
from collections.abc import Callable

import torch
from lib import result_files, timing
from lib.cli import output_file
from lib.pages import cpu
from transformers import AutoModelForCausalLM, OlmoeConfig

from moe_kernels import ModalityLoraConfig, PatchedModel, patch_model
from moe_kernels.models.named_adapters import parameters_of

SEQUENCES = 8


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=20)
    default = result_files.RESULTS / cpu.MIXED_ADAPTERS
    parser.add_argument("--output", type=output_file, default=default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    patched = _make(args.hidden)
    records = []
    for length in args.lengths:
        calls = _calls(patched, length)
        for call in calls.values():
            call()
        found = timing.measure(calls, min_rounds=args.rounds, max_rounds=args.rounds)
        seconds = {name: samples["forward"] for name, samples in found.items()}
        records.append({"length": length, "seconds": seconds})
    data = {
        "environment": result_files.environment("cpu"), "hidden": args.hidden, "records": records
    }  # fmt: skip
    result_files.write(args.output, data)
    print(f"{cpu.mixed_adapters(data)}\n\nwrote {args.output}")
    return 0


def _make(hidden: int) -> PatchedModel:
    """Make two layers of OLMoE's proportions in bf16, with eight adapters of rank 16."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=hidden, intermediate_size=hidden // 2, num_hidden_layers=2, num_experts=64,
        num_experts_per_tok=8, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=512,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    patched = patch_model(model, ModalityLoraConfig(r=16))
    for number in range(1, SEQUENCES):
        patched.add_adapter(f"adapter_{number}")
    for name in patched.adapter_names:
        for parameter in parameters_of(patched, name):
            torch.nn.init.normal_(parameter.data, std=0.02)
    return patched


def _calls(patched: PatchedModel, length: int) -> dict[str, Callable[[], dict[str, float]]]:
    ids = torch.randint(1, 512, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    modality_ids = (torch.arange(SEQUENCES * length) % 2).view(SEQUENCES, length)
    names = patched.adapter_names

    def forward(rows: slice, adapter: str | list[str]) -> None:
        with torch.inference_mode():
            given = {"modality_ids": modality_ids[rows], "adapter": adapter, "use_cache": False}
            patched.model(ids[rows], **given)

    def timed(*calls: tuple[slice, str | list[str]]) -> Callable[[], dict[str, float]]:
        def call() -> dict[str, float]:
            start = time.perf_counter()
            for each in calls:
                forward(*each)
            return {"forward": time.perf_counter() - start}

        return call

    whole = slice(None)
    mixed = {
        f"{number} mixed": timed((whole, [names[i % number] for i in range(SEQUENCES)]))
        for number in (2, 4, 8)
    }
    apart = timed(*((slice(i, i + 1), names[i]) for i in range(SEQUENCES)))
    return {"one": timed((whole, names[0])), **mixed, "8, one at a time": apart}


if __name__ == "__main__":
    raise SystemExit(main())

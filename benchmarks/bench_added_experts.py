"""Times fine-tuning steps of whole models: added experts alone against all experts.

    python benchmarks/bench_added_experts.py --model demo olmoe

A step is forward, backward and AdamW on the same batch of the same weights. "ours" is the patched
model as MoExtend trains it: half of the layers, chosen by their scores, have one more expert, a
copy of the one that is selected most, which image rows alone may choose; these experts, their
router rows and calibrations train (in float32, also on a base in bfloat16). "full" is transformers'
own model, where all experts and routers train, on each of its implementations; attention,
embeddings and head are frozen there too, and weights and moments have the base's dtype.
moe_kernels itself keeps the base's experts frozen, so that there is no "full" of ours. Both step
with torch's fused AdamW, which is several times as fast as its default on large weights.
"""

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict

import torch
from bench_training_step import LIMITS, MODELS, Settings, make_batch, make_model, time_step
from lib.cli import finish, make_parser, options_of, progress
from lib.memory import peak_bytes
from lib.providers import HF_TRAINING
from lib.runs import Options
from tables import added_steps_table
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.analysis import RoutingRecorder
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms

NAME = "added_experts"
FULL = tuple(name.replace("hf:", "full:") for name in HF_TRAINING)
# The backward of "eager" makes a gradient of a layer's whole stack for every expert.
_MAX_EAGER_BYTES = 1 << 30


def run(
    settings: Settings, options: Options, device: str = "cpu", seed: int = 0,
    backend: str | None = None,
) -> dict:  # fmt: skip
    """A record as of :func:`lib.runs.run_training`, with the mode "step".

    Its "extended" are the layers with an added expert; its providers have how many parameters are
    "trained" and the "peak" bytes of a step above the weights, gradients and moments before it.
    """
    torch.manual_seed(seed)
    theirs = make_model(settings, device)
    ids, mask = make_batch(settings, device)
    backend = backend if device == "cuda" else None
    extender = ExpertExtender(copy.deepcopy(theirs), ("image",), backend=backend)
    error = _extend_checked(extender, theirs, ids, mask, LIMITS[settings.dtype])
    missing = _too_slow(settings)
    trained = {"ours": list(extender.patched.trainable_parameters())}
    trained |= dict.fromkeys((n for n in FULL if n not in missing), _train_all_experts(theirs))
    steps = {
        "ours": time_step(
            extender.model, trained["ours"], device, fused=True, input_ids=ids, labels=ids,
            modality_ids=mask,
        ),
        **_full_steps(theirs, [name for name in trained if name != "ours"], device, ids),
    }  # fmt: skip
    for step in steps.values():
        step()  # the optimizer makes its state
    peak = {name: peak_bytes(step, device) for name, step in steps.items()}
    samples = options.measure(steps)
    return {
        "case": asdict(settings) | {"tokens": settings.tokens, "device": device, "seed": seed},
        "extended": sorted(extender.patched.extensions[0].experts),
        "providers": {
            name: {
                "error": error if name == "ours" else None,
                "seconds": samples[name],
                "trained": sum(parameter.numel() for parameter in trained[name]),
                "peak": peak[name],
            }
            for name in steps
        }
        | missing,
    }


def _extend_checked(
    extender: ExpertExtender, theirs: PreTrainedModel, ids: Tensor, mask: Tensor, limit: float
) -> str | None:
    """Extends the model; what is wrong with it, before or after, on a part of the batch: the logits
    are large.
    """
    some, of_some = ids[:4, :256], mask[:4, :256]
    before = _text_logits(extender.model, some)
    error = _error_before(before, theirs, some, limit)
    _extend(extender, ids, mask)
    return error or _error_after(extender, before, some, of_some)


def _extend(extender: ExpertExtender, ids: Tensor, mask: Tensor) -> None:
    batch = {"input_ids": ids, "modality_ids": mask}
    extender.score_layers([batch], steps=1, progress=False)
    extender.extend("top-half")


@torch.no_grad()
def _text_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, modality_ids=torch.zeros_like(ids)).logits


@torch.no_grad()
def _error_before(text: Tensor, theirs: PreTrainedModel, ids: Tensor, limit: float) -> str | None:
    """The patched model is transformers'; else what differs."""
    error = relative_rms(text, theirs(input_ids=ids).logits)
    return None if error <= limit else f"logits: relative RMS {error:.1e} is above {limit:.1e}"


@torch.no_grad()
def _error_after(extender: ExpertExtender, before: Tensor, ids: Tensor, mask: Tensor) -> str | None:
    """Text keeps its bits, and image rows choose added experts in every extended layer; or not."""
    if not torch.equal(_text_logits(extender.model, ids), before):
        return "text logits changed as experts were added"
    with RoutingRecorder(extender.model) as recorder:
        extender.model(input_ids=ids, modality_ids=mask)
    seen = recorder.statistics()
    num_base = extender.model.config.num_experts
    chosen = seen.counts[:, seen.modalities.index("image"), num_base:].sum(1)
    unused = [layer for layer in extender.patched.extensions[0].experts if not chosen[layer]]
    return f"no image row chooses an added expert in layers {unused}" if unused else None


def _train_all_experts(model: PreTrainedModel) -> list[nn.Parameter]:
    """Those of experts and routers, which alone take gradients from now on."""
    model.requires_grad_(False)
    trained = [p for layer in model.model.layers for p in layer.mlp.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def _too_slow(settings: Settings) -> dict[str, dict[str, str]]:
    """Records of the implementations that are left out."""
    case = settings.experts_case
    passes = case.shape.E * case.shape.E * case.expert_bytes
    if passes <= _MAX_EAGER_BYTES:
        return {}
    reason = f"it writes gradients of {passes / 2**30:.0f} GiB in the backward of a layer"
    return {"full:eager": {"missing": reason}}


def _full_steps(
    model: PreTrainedModel, names: list[str], device: str, ids: Tensor
) -> dict[str, Callable[[], dict[str, float]]]:
    """One for each of transformers' implementations, on the same weights and moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = time_step(model, trained, device, fused=True, input_ids=ids, labels=ids)

    def with_experts(implementation: str) -> dict[str, float]:
        model.set_experts_implementation(implementation)
        return step()

    return {name: lambda name=name: with_experts(name.partition(":")[2]) for name in names}


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__, NAME, dtypes=False)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["demo", "olmoe"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    records = []
    with progress(given.model) as (models, on_round):
        for name in models:
            options = options_of(given, on_round=on_round)
            records.append(run(MODELS[name], options, given.device, given.seed))
    print(added_steps_table(records))
    finish(NAME, given, {"added_steps": records})


if __name__ == "__main__":
    main()

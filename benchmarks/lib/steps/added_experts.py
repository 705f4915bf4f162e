"""Training steps of whole models: ours with added experts, transformers' with all experts.

"ours" is the patched model as MoExtend trains it. Half of the layers, chosen by their scores, have
one more expert: a copy of the one that is selected most, which image rows alone may choose. These
experts, their router rows and calibrations train, in float32 even on a base in bfloat16.

"full" is transformers' own model on each of its implementations, where all experts and routers
train. Attention, embeddings and head are frozen there too; weights and moments have the base's
dtype. There is no "full" of ours, since moe_kernels keeps the base's experts frozen.

Both use torch's fused AdamW, which is several times as fast as the default on large weights.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.providers import HF_TRAINING
from lib.runs import Options
from lib.steps import Settings, logits_error, make_batch, make_model, measure_steps, time_step
from moe_kernels.analysis import RoutingRecorder
from moe_kernels.moextend import ExpertExtender

FULL = tuple(name.replace("hf:", "full:") for name in HF_TRAINING)
# The backward of "eager" makes a gradient of a layer's whole stack for every expert.
_MAX_EAGER_BYTES = 1 << 30


def run(
    settings: Settings, options: Options, device: str = "cpu", seed: int = 0,
    backend: str | None = None,
) -> dict:  # fmt: skip
    """Return a record as :func:`lib.runs.run_training` does, with the mode "step".

    "extended" lists the layers with an added expert. Each provider has the number of "trained"
    parameters, and the "peak" bytes of a step above the weights, gradients and moments before it.
    """
    torch.manual_seed(seed)
    full = make_model(settings, device)
    ids, mask = make_batch(settings, device)
    backend = backend if device == "cuda" else None
    extender = ExpertExtender(copy.deepcopy(full), ("image",), backend=backend)
    errors = {"ours": _extend_checked(extender, full, ids, mask, settings.dtype)}
    missing = _too_slow(settings)
    trained = {"ours": list(extender.patched.trainable_parameters())}
    trained |= dict.fromkeys((n for n in FULL if n not in missing), _train_all_experts(full))
    steps = {
        "ours": time_step(
            extender.model, trained["ours"], device, fused=True, input_ids=ids, labels=ids,
            modality_ids=mask,
        ),
        **_full_steps(full, [name for name in trained if name != "ours"], device, ids),
    }  # fmt: skip
    record = measure_steps(settings, steps, options, device, seed, errors=errors, peak=True)
    for name, entry in record["providers"].items():
        entry["trained"] = sum(parameter.numel() for parameter in trained[name])
    record["providers"] |= missing
    return record | {"extended": sorted(extender.patched.extensions[0].experts)}


def _extend_checked(
    extender: ExpertExtender, full: PreTrainedModel, ids: Tensor, mask: Tensor, dtype: str
) -> str | None:
    """Extend the model, and describe what is wrong with it before or after, or return None.

    It looks at a part of the batch, since the logits are large.
    """
    part, part_mask = ids[:4, :256], mask[:4, :256]
    before = _text_logits(extender.model, part)
    with torch.no_grad():
        error = logits_error(before, full(input_ids=part).logits, dtype)
    _extend(extender, ids, mask)
    return error or _error_after(extender, before, part, part_mask)


def _extend(extender: ExpertExtender, ids: Tensor, mask: Tensor) -> None:
    batch = {"input_ids": ids, "modality_ids": mask}
    extender.score_layers([batch], steps=1, progress=False)
    extender.extend("top-half")


@torch.no_grad()
def _text_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, modality_ids=torch.zeros_like(ids)).logits


@torch.no_grad()
def _error_after(extender: ExpertExtender, before: Tensor, ids: Tensor, mask: Tensor) -> str | None:
    """Describe what the added experts broke, or return None.

    Text logits must keep their bits, and image rows must choose an added expert in every extended
    layer.
    """
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
    """Make experts and routers the only trainable parameters, and return them."""
    model.requires_grad_(False)
    trained = [p for layer in model.model.layers for p in layer.mlp.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def _too_slow(settings: Settings) -> dict[str, dict[str, str]]:
    """Return records of the implementations that are left out, with the reason."""
    case = settings.experts_case
    passes = case.shape.E * case.shape.E * case.expert_bytes
    if passes <= _MAX_EAGER_BYTES:
        return {}
    reason = f"it writes gradients of {passes / 2**30:.0f} GiB in the backward of a layer"
    return {"full:eager": {"missing": reason}}


def _full_steps(
    model: PreTrainedModel, names: list[str], device: str, ids: Tensor
) -> dict[str, Callable[[], dict[str, float]]]:
    """Return a step for each of transformers' implementations, on the same weights and moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = time_step(model, trained, device, fused=True, input_ids=ids, labels=ids)

    def with_experts(implementation: str) -> dict[str, float]:
        model.set_experts_implementation(implementation)
        return step()

    return {name: lambda name=name: with_experts(name.partition(":")[2]) for name in names}

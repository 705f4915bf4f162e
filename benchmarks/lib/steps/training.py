"""Training steps of whole models: ours, transformers with PEFT, and two bounds.

A step is forward, backward and AdamW on the same batch. Our model and PEFT's have the same weights,
and adapters of the same values on the experts and on q, k, v and o. PEFT cannot mask, so it adapts
all tokens; it runs on transformers' "grouped_mm". Two more steps bound the time: "rest" is the
model without experts and adapters, and "bound" adds the GEMMs of the frozen experts, by torch.mm
with balanced routing.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.cases import make_problem
from lib.providers import PEFT
from lib.providers.bounds import ExpertGemms
from lib.runs import Options
from lib.steps import Settings, logits_error, make_batch, make_model, measure_steps, time_step
from moe_kernels import ModalityLoraConfig, PatchedModel, patch_model
from moe_kernels.models.peft_format import load_peft_adapter

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def run(
    settings: Settings, options: Options, device: str = "cpu", seed: int = 0,
    backend: str | None = None,
) -> dict:  # fmt: skip
    """Return a record as :func:`lib.runs.run_training` does, with the mode "step"."""
    torch.manual_seed(seed)
    model = make_model(settings, device)
    ids, mask = make_batch(settings, device)
    peft = _with_peft(copy.deepcopy(model), settings)
    ours = _patched(model, peft, settings, backend if device == "cuda" else None)
    error = _error(ours, peft, ids, settings)
    steps = {
        "ours": time_step(
            model, ours.trainable_parameters(), device, input_ids=ids, labels=ids, modality_ids=mask
        ),
        PEFT: time_step(
            peft, [p for p in peft.parameters() if p.requires_grad], device,
            input_ids=ids, labels=ids,
        ),
    }  # fmt: skip
    if device == "cpu":  # on a GPU they would not fit beside the other two
        steps |= _bounds(settings, device, ids)
    # On a CPU the peak is found by the profiler, which takes minutes over thousands of allocations.
    peak = device == "cuda"
    return measure_steps(settings, steps, options, device, seed, error=error, peak=peak)


def _with_peft(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Add PEFT's adapters with default options, but with a B that is not zero."""
    config = LoraConfig(
        r=settings.r, lora_alpha=2 * settings.r, target_modules=_ATTENTION,
        target_parameters=_EXPERTS,
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted


def _patched(
    model: PreTrainedModel, peft: PeftModel, settings: Settings, backend: str | None
) -> PatchedModel:
    """Patch the model and load PEFT's adapters from a file that PEFT saves."""
    config = ModalityLoraConfig(r=settings.r, lora_alpha=2 * settings.r, backend=backend)
    patched = patch_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        peft.save_pretrained(folder)
        load_peft_adapter(patched, "image", folder)
    return patched


@torch.no_grad()
def _error(ours: PatchedModel, peft: PeftModel, ids: Tensor, settings: Settings) -> str | None:
    """Describe a difference between the two models when every token has the modality, or None.

    It compares a part of the batch, since the logits are large.
    """
    ids = ids[:4, :256]
    actual = ours.model(input_ids=ids, modality_ids=torch.ones_like(ids)).logits
    return logits_error(actual, peft(input_ids=ids).logits, settings.dtype)


class _BareGemms(torch.autograd.Function):
    """The identity, which runs the GEMMs of a layer's experts, if any, forward and backward.

    The routing weights take a gradient of zeros, so that the router's backward runs.
    """

    @staticmethod
    def forward(
        ctx, hidden_states: Tensor, routing_weights: Tensor, gemms: ExpertGemms | None
    ) -> Tensor:
        ctx.gemms, ctx.shape = gemms, routing_weights.shape
        if gemms:
            gemms.forward()
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.gemms:
            ctx.gemms.backward()
        return grad, grad.new_zeros(ctx.shape), None


class _NoExperts(nn.Module):
    """A replacement of the experts that runs their bare GEMMs, or nothing."""

    def __init__(self, gemms: ExpertGemms | None):
        super().__init__()
        self.gemms = gemms

    def forward(self, hidden_states: Tensor, routes: Tensor, weights: Tensor) -> Tensor:
        return _BareGemms.apply(hidden_states, weights, self.gemms)


def _bounds(
    settings: Settings, device: str, ids: Tensor
) -> dict[str, Callable[[], dict[str, float]]]:
    """Return steps without experts ("rest") and with the experts' bare GEMMs ("bound")."""
    case = replace(settings.experts_case, device=device)
    gemms = [ExpertGemms(make_problem(case, layer)) for layer in range(settings.layers)]
    return {
        "rest": _step_without_experts(settings, [None] * settings.layers, device, ids),
        "bound": _step_without_experts(settings, gemms, device, ids),
    }


def _step_without_experts(
    settings: Settings, gemms: list[ExpertGemms | None], device: str, ids: Tensor
) -> Callable[[], dict[str, float]]:
    """Return a step of a frozen model whose layers run ``gemms`` in place of experts.

    The norms of the first layer's q and k train, so that backward goes as far as that of adapters
    on attention.
    """
    model = make_model(replace(settings, intermediate_size=1), device).requires_grad_(False)
    for layer, bare in zip(model.model.layers, gemms, strict=True):
        layer.mlp.experts = _NoExperts(bare)
    attention = model.model.layers[0].self_attn
    norms = [attention.q_norm.weight.requires_grad_(), attention.k_norm.weight.requires_grad_()]
    return time_step(model, norms, device, input_ids=ids, labels=ids)

"""Training steps of whole models: ours, transformers with PEFT, PEFT accelerated, and two bounds.

A step is forward, backward and AdamW on the same batch. Our model and PEFT's have the same weights,
and adapters of the same values on the experts and on q, k, v and o. PEFT cannot mask, so it adapts
all tokens; it runs on transformers' "grouped_mm". "peft_accelerated" is PEFT's model, with the same
optimizer, while our kernels compute its experts. Two more steps bound the time: "rest" is the model
without experts and adapters, and "bound" adds the GEMMs of the frozen experts, by torch.mm with
balanced routing.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.cases import make_problem
from lib.providers import ACCELERATED, PEFT
from lib.providers.bounds import ExpertGemms
from lib.runs import Options
from lib.steps import Settings, logits_error, make_batch, make_model, measure_steps, time_step
from moe_kernels import ModalityLoraConfig, PatchedModel, accelerate_peft, patch_model
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
    backend = backend if device == "cuda" else None
    ours = _patched(model, peft, settings, backend)
    errors = _errors(ours, peft, ids, settings, backend)
    peft_step = time_step(
        peft, [p for p in peft.parameters() if p.requires_grad], device, input_ids=ids, labels=ids
    )
    steps = {
        "ours": time_step(
            model, ours.trainable_parameters(), device, input_ids=ids, labels=ids, modality_ids=mask
        ),
        PEFT: peft_step,
        ACCELERATED: _accelerated(peft, backend)(peft_step),
    }  # fmt: skip
    if device == "cpu":  # on a GPU they would not fit beside the other two
        steps |= _bounds(settings, device, ids)
    # On a CPU the peak is found by the profiler, which takes minutes over thousands of allocations.
    peak = device == "cuda"
    return measure_steps(settings, steps, options, device, seed, errors=errors, peak=peak)


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


@contextlib.contextmanager
def _accelerated(peft: PeftModel, backend: str | None) -> Iterator[None]:
    """Compute the experts of PEFT's model by our kernels meanwhile."""
    handle = accelerate_peft(peft, backend=backend)
    try:
        yield
    finally:
        handle.undo()


@torch.no_grad()
def _errors(
    ours: PatchedModel, peft: PeftModel, ids: Tensor, settings: Settings, backend: str | None
) -> dict[str, str | None]:
    """Describe differences from PEFT when every token has the modality, or None, by provider.

    It compares a part of the batch, since the logits are large.
    """
    ids = ids[:4, :256]
    expected = peft(input_ids=ids).logits
    actual = {"ours": ours.model(input_ids=ids, modality_ids=torch.ones_like(ids)).logits}
    with _accelerated(peft, backend):
        actual[ACCELERATED] = peft(input_ids=ids).logits
    return {name: logits_error(each, expected, settings.dtype) for name, each in actual.items()}


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

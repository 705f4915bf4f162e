"""Forwards of a patched model: its own, and that of a fused loss head that was bound over it.

The model's own ``forward`` resolves the modality ids and hands them down. A fused head replaces it:
it calls the inner model and multiplies with the head's weight by itself. A hook of the inner model
therefore resolves the ids where the own forward did not run, and lets nothing pass that is not
known to see what was added.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from moe_kernels.layers.modality_lora import ONLY
from moe_kernels.models import named_adapters
from moe_kernels.models.context import MISSING, Chosen, ModelCall, resolve_modality_ids
from moe_kernels.models.fused_loss import FusedLoss, check_loss
from moe_kernels.models.handle import PatchState, get_patched
from moe_kernels.models.intact import (
    check_engine,
    check_experts,
    check_links,
    check_new_hooks,
    check_peft,
)
from moe_kernels.models.loss import LossOverColumns
from moe_kernels.models.padding import cache_of
from moe_kernels.models.parts import find_decoder
from moe_kernels.models.shared_batch import check_batch
from moe_kernels.models.tokens import beside_rows
from moe_kernels.models.training import check_training

_OURS = "_of_patched_model"
_OF_LAYERS = ("modality_ids", "added_experts", "adapters")  # keywords that the decoder layers take
# Modules with forwards that call the inner model and ask get_output_embeddings() for the head.
_FUSED_HEADS = ("trl.trainer.utils",)


@functools.cache
def forward_of(model_class: type[PreTrainedModel]) -> Callable:
    """Return the class's ``forward`` with ``modality_ids``, which Trainer and generate() see."""
    inner = model_class.forward
    signature = inspect.signature(inner)
    names = list(signature.parameters)[1:]

    @functools.wraps(inner)
    def forward(self, *args, modality_ids=None, adapter=None, adapter_ids=None, **kwargs):
        if args:
            signature.bind(self, *args, **kwargs)  # refuses one too many, or one given twice
            kwargs.update(zip(names, args, strict=False))
        patched = get_patched(self)
        if not patched.added_tokens_enabled and kwargs.get("labels") is not None:
            _check_loss(self)
        chosen = named_adapters.choose(patched, kwargs, adapter, adapter_ids)
        _prepare(patched, kwargs, modality_ids, chosen)
        call = ModelCall(_fused_loss(patched, kwargs), chosen=chosen)
        outer = patched.forwards.begin()
        if patched.decoder is not self.base_model:
            call.for_decoder = {n: kwargs.pop(n) for n in _OF_LAYERS if n in kwargs}
        try:
            with patched.switches.in_forward(call):
                output = inner(self, **kwargs)
            patched.forwards.check_ended(outer)
        finally:
            patched.forwards.end(outer)
        if not call.head_ran and (patched.added_tokens or call.fused_loss is not None):
            raise RuntimeError(_HEAD_LEFT_OUT.format(_place(type(self).forward)))
        return output if call.fused_loss is None else _without_logits(output)

    # accelerate removes autocast by unwrapping down to the innermost function.
    del forward.__wrapped__
    parameters = list(signature.parameters.values())
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("modality_ids", "adapter", "adapter_ids")
    ]
    position = next(
        (i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD),
        len(parameters),
    )
    forward.__signature__ = signature.replace(
        parameters=[*parameters[:position], *ours, *parameters[position:]]
    )
    setattr(forward, _OURS, True)
    return forward


def _prepare(
    patched: PatchState, kwargs: dict[str, Any], modality_ids: Tensor | None, chosen: Chosen
) -> None:
    """Check the model, and set the inputs of its layers among a forward's keyword arguments."""
    model = patched.model
    check_links(patched.links)
    check_peft(model, patched.links)
    _check_hooks(patched)
    check_experts(patched.parts)
    _check_engine(patched)
    patched.switches.check_recompute(model.training or torch.is_grad_enabled())
    check_training(
        patched,
        ids_given=modality_ids is not None,
        embeds_train=getattr(kwargs.get("inputs_embeds"), "requires_grad", False),
    )
    if kwargs.get("inputs_embeds") is not None:
        embeds = require_grad_for_checkpointing(model, kwargs["inputs_embeds"])
        kwargs["inputs_embeds"] = beside_rows(embeds, model.get_input_embeddings())
    modality_ids = resolve_modality_ids(
        patched.modality_of,
        modality_ids,
        num_modalities=len(patched.config.modalities),
        input_ids=kwargs.get("input_ids"),
        inputs_embeds=kwargs.get("inputs_embeds"),
        attention_mask=kwargs.get("attention_mask"),
        cache=cache_of(kwargs),
    )
    if not (patched.switches.uses_adapters() and chosen.updates):
        # The ids carry this, since checkpointing hands them to its recompute; a switch would
        # be read anew.
        modality_ids = modality_ids.clamp(max=0)
    if chosen.of_sequence is not None:
        modality_ids = named_adapters.slots(patched, modality_ids, chosen.of_sequence)
    check_batch(patched, kwargs, modality_ids)  # ranks may name other adapters
    if chosen.names != ONLY:
        kwargs["adapters"] = chosen.names
    if not patched.switches.uses_added_experts():
        kwargs["added_experts"] = False  # a keyword of the layers, for the same reason
    kwargs["modality_ids"] = modality_ids


# A compiled forward makes these checks when it is compiled.
@torch.compiler.assume_constant_result
def _check_hooks(patched: PatchState) -> None:
    check_new_hooks(patched.model, patched.links)


@torch.compiler.assume_constant_result
def _check_engine(patched: PatchState) -> None:
    check_engine(patched.model, patched.links)


def _fused_loss(patched: PatchState, kwargs: dict[str, Any]) -> FusedLoss | None:
    """Return the loss that the head of this forward computes in place of logits, if any."""
    if not patched.fused_loss or not patched.model.training or kwargs.get("labels") is None:
        return None
    _check_loss(patched.model)
    check_loss(patched.model.loss_function.loss)
    return FusedLoss(kwargs["labels"], kwargs)


def _without_logits(output: ModelOutput) -> ModelOutput:
    """Return an output without what stands there for logits, the loss."""
    if not isinstance(output, ModelOutput):
        raise RuntimeError(
            "fused_loss gives no logits, which a tuple cannot show: return_dict=True"
        )
    return type(output)(**{name: each for name, each in output.items() if name != "logits"})


# --- forwards over ours

_HEAD_LEFT_OUT = (
    "{} did not call the model's head, and so has seen none of the rows that add_modality_tokens "
    "added: fused losses (Liger's) read lm_head.weight alone. Switch it off before patch_model; "
    "patched.fused_loss = True computes the loss without logits"
)
_FOREIGN = (
    "{} replaced model.forward after patch_model, as fused loss heads do (Liger's), and may leave "
    "out what was added: switch it off (Trainer: use_liger_kernel=False) and patch the model "
    "anew; patched.fused_loss = True computes the loss without logits"
)
_HEAD_NOT_ASKED = (
    "{} did not take the head from get_output_embeddings(), and so has seen "
    "none of the rows that add_modality_tokens added: use a version of it that does, or "
    "patched.fused_loss = True in transformers' Trainer"
)

_ADAPTER_ELSEWHERE = (
    "adapter= is for the patched model's own forward, and this is the inner model's or a fused "
    "head's: enter patched.adapter(name) around it"
)
_COPIED = (
    "{} calls the model that this one is a deepcopy of: copy the model before a trainer of TRL "
    "takes it"
)


class ForeignForward:
    """Hooks around forwards that call the inner model without the patched model's own.

    An object, not closures: a deepcopy of the model must check the copy.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def register(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Register the hooks and return their handles."""
        inner, decoder = self.model.base_model, find_decoder(self.model)
        return [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            inner.register_forward_pre_hook(self.before_inner, with_kwargs=True),
            decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            self.model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raise if a fused head would leave the forward to another model, by a bound method."""
        forward = self.model.__dict__.get("forward")
        if forward is None or kwargs.get("fused_lm_head"):
            return
        if any(method.__self__ is not self.model for method in _bound_below(forward)):
            raise RuntimeError(_COPIED.format(_place(forward)))

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Raise if a fused head left something out; without an output it has failed."""
        patched = get_patched(self.model)
        if output is not None and not patched.forwards.running:
            patched.forwards.check_ended()
        switches = patched.switches
        if switches.awaits_head:
            switches.awaits_head = False
            if output is not None:
                raise RuntimeError(_HEAD_NOT_ASKED.format(_place(self.model.forward)))

    def before_inner(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Resolve the modality ids of a fused head's forward; refuse one that is not known."""
        patched = get_patched(self.model)
        if patched.switches.call is not None:  # our forward has done all this
            return None
        fused = self._check_forward(patched, kwargs)
        patched.forwards.clear()
        kwargs |= zip(inspect.signature(module.forward).parameters, args, strict=False)
        if any(kwargs.pop(name, None) is not None for name in ("adapter", "adapter_ids")):
            raise ValueError(_ADAPTER_ELSEWHERE)
        chosen = named_adapters.choose(patched, kwargs, None, None)
        _prepare(patched, kwargs, kwargs.pop("modality_ids", None), chosen)
        patched.switches.awaits_head = fused and bool(patched.added_tokens)
        return (), kwargs

    def before_decoder(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Hand the modality ids of a multimodal model's own forward to its text model."""
        call = get_patched(self.model).switches.call
        if call is None or not call.for_decoder:
            return None
        return args, kwargs | call.for_decoder

    def _check_forward(self, patched: PatchState, kwargs: dict) -> bool:
        """Return whether a fused head calls, which needs the head; raise if it is unknown."""
        forward = self.model.forward
        if any(getattr(function, _OURS, False) for function in _unwrap(forward)):
            if kwargs.get("modality_ids") is None:
                raise RuntimeError(MISSING)
            return False
        if not any(_is_fused_head(function) for function in _unwrap(forward)):
            raise RuntimeError(_FOREIGN.format(_place(forward)))
        if patched.added_tokens and not patched.added_tokens_enabled:
            raise RuntimeError(
                f"{_place(forward)} cannot run within text_only(), as it does not say so if a "
                "label has no logit there: call the model without its fused head"
            )
        return True


def _is_fused_head(function: Callable) -> bool:
    """Return whether a function is the forward of a known fused head, over ours or another."""
    if getattr(function, "__globals__", {}).get("__name__") not in _FUSED_HEADS:
        return False
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    kept = (inner for each in cells for inner in _unwrap(each))
    return any(getattr(inner, _OURS, False) or _is_fused_head(inner) for inner in kept)


def _bound_below(forward: Callable) -> Iterator[MethodType]:
    """Yield the methods that fused heads have kept, one around the other."""
    function = getattr(forward, "__func__", forward)
    if _is_fused_head(function):
        for cell in function.__closure__ or ():
            if isinstance(method := cell.cell_contents, MethodType):
                yield method
                yield from _bound_below(method)


def _unwrap(forward: object) -> Iterator[object]:
    """Yield a function and those that it says to wrap."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _place(forward: Callable) -> str:
    """Return the name of a function, by the file that defines it, which wrapping keeps."""
    function = next(_unwrap(forward))
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    code = getattr(function, "__code__", None)
    return f"{module}.{getattr(code, 'co_name', type(function).__name__)}"


# --- parts of a forward


class RequireGrad:
    """Hook of the embedding that applies :func:`require_grad_for_checkpointing` to its output."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return require_grad_for_checkpointing(self.model, output)


def require_grad_for_checkpointing(
    model: PreTrainedModel, embeddings: torch.Tensor
) -> torch.Tensor:
    """Let embeddings require grad under checkpointing.

    Reentrant checkpointing gives no gradients unless an input of the layers requires grad.
    """
    if embeddings.requires_grad or not _recomputes(model):
        return embeddings
    return embeddings.detach().requires_grad_()


def _recomputes(model: PreTrainedModel) -> bool:
    """Return whether the backward pass of a forward now would compute layers again."""
    if not model.training or not torch.is_grad_enabled():
        return False
    return any(
        getattr(module, "gradient_checkpointing", False)
        or "_checkpoint_wrapped_module" in module._modules  # the wrapper of torch.distributed
        for module in model.modules()
    )


def _check_loss(model: PreTrainedModel) -> None:
    """Raise unless the model's loss counts the logits' columns."""
    if not isinstance(loss := model.loss_function, LossOverColumns):
        raise RuntimeError(
            f"the model's loss was set to {getattr(loss, '__name__', loss)} after patch_model, and "
            "takes the vocabulary with added tokens: within text_only(), and for fused_loss, set "
            "it before patch_model"
        )

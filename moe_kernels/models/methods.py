"""The methods that a patched model instance gets in place of its class's."""

import functools
import inspect
import types
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.models.context import resolve_modality_ids

if TYPE_CHECKING:
    from moe_kernels.models.patch import PatchedModel

HANDLE = "_modality_patch"


def attach(model: PreTrainedModel, patched: "PatchedModel") -> None:
    """Give this one instance its methods and its handle."""
    for name, function in _methods_of(type(model)).items():
        setattr(model, name, types.MethodType(function, model))
    model.__dict__[HANDLE] = patched


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`, also where it was not done."""
    for name in (*_methods_of(type(model)), HANDLE):
        model.__dict__.pop(name, None)


def get_patched(model: nn.Module) -> "PatchedModel":
    """The handle of a model that :func:`patch_model` has patched, also of a deepcopy of one.

    Raises:
        ValueError: the model is not patched.
    """
    handle = model.__dict__.get(HANDLE)
    if handle is None:
        raise ValueError(
            f"this {type(model).__name__} is not patched: call patch_model(model) first"
        )
    return handle


@functools.cache
def _methods_of(model_class: type[PreTrainedModel]) -> dict:
    return {
        "forward": _forward_of(model_class),
        "prepare_inputs_for_generation": _prepare_inputs_of(model_class),
        "resize_token_embeddings": _refuse_resize,
        "_replicate_for_data_parallel": _refuse_data_parallel,
    }


def _refuse_resize(self: PreTrainedModel, *args, **kwargs) -> NoReturn:
    raise RuntimeError(
        "a patched model's table cannot be resized, as added rows are not part of it: "
        "add_modality_tokens(..., tokenizer=tokenizer) keeps the two in step; or unpatch() first"
    )


def _refuse_data_parallel(self: PreTrainedModel) -> NoReturn:
    raise RuntimeError(
        "nn.DataParallel is not supported: its replicas would share one mask; use "
        "DistributedDataParallel (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one"
    )


class RequireGrad:
    """Hook of the embedding: see :func:`require_grad_for_checkpointing`."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return require_grad_for_checkpointing(self.model, output)


def require_grad_for_checkpointing(
    model: PreTrainedModel, embeddings: torch.Tensor
) -> torch.Tensor:
    """Reentrant checkpointing gives no gradients unless an input of the layers requires grad."""
    if not model.training or embeddings.requires_grad or not torch.is_grad_enabled():
        return embeddings
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return embeddings
    return embeddings.detach().requires_grad_()


@functools.cache
def _forward_of(model_class: type[PreTrainedModel]):
    """The class's ``forward`` with an explicit ``modality_ids``, for Trainer and generate()."""
    inner = model_class.forward
    signature = inspect.signature(inner)
    names = list(signature.parameters)[1:]

    @functools.wraps(inner)
    def forward(self, *args, modality_ids=None, **kwargs):
        if args:
            signature.bind(self, *args, **kwargs)  # one too many, or one given twice
            kwargs.update(zip(names, args, strict=False))
        if kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = require_grad_for_checkpointing(self, kwargs["inputs_embeds"])
        patched = get_patched(self)
        modality_ids = resolve_modality_ids(
            self.token_modality,
            modality_ids,
            num_modalities=len(patched.config.modalities),
            input_ids=kwargs.get("input_ids"),
            inputs_embeds=kwargs.get("inputs_embeds"),
            attention_mask=kwargs.get("attention_mask"),
        )
        if not patched.adapters_enabled:
            # In the ids, which checkpointing carries to its recompute, and not in a switch.
            modality_ids = modality_ids.clamp(max=0)
        return inner(self, modality_ids=modality_ids, **kwargs)

    # accelerate unwraps down to the innermost function when it takes autocast away.
    del forward.__wrapped__
    parameters = list(signature.parameters.values())
    keyword = inspect.Parameter("modality_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = next(
        (i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD),
        len(parameters),
    )
    forward.__signature__ = signature.replace(
        parameters=[*parameters[:at], keyword, *parameters[at:]]
    )
    return forward


@functools.cache
def _prepare_inputs_of(model_class: type[PreTrainedModel]):
    """``prepare_inputs_for_generation`` that keeps given modality_ids in step with input_ids."""
    inner = model_class.prepare_inputs_for_generation

    @functools.wraps(inner)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = inner(self, *args, **kwargs)
        if inputs.get("modality_ids") is not None and inputs.get("input_ids") is not None:
            cache = inputs.get("cache", inputs.get("past_key_values"))  # renamed in 5.24
            start = 0 if cache is None else int(cache.get_seq_length())
            config = get_patched(self).config
            whole = [config.modalities.index(name) + 1 for name in config.sequence_modalities]
            inputs["modality_ids"] = _columns_from(
                start, inputs["modality_ids"], inputs["input_ids"], self.token_modality, whole
            )
        return inputs

    return prepare_inputs_for_generation


def _columns_from(
    start: int, modality_ids: Tensor, input_ids: Tensor, table: Tensor, whole: list[int]
) -> Tensor:
    """(B, S) modality of ``input_ids`` (B, S), which stand at the columns from ``start`` on.

    generate() hands over the prompt's (B, P) ids at every step; the modality of tokens beyond them
    follows from the id, or for text from the prompt's last column, where that is one of ``whole``.
    """
    given = modality_ids[:, start : start + input_ids.shape[1]]
    rest = table[input_ids[:, given.shape[1] :]]
    last = modality_ids[:, -1:].to(rest)
    for modality_id in whole:
        rest = torch.where((rest == 0) & (last == modality_id), last, rest)
    return torch.cat([given.to(rest), rest], dim=1)

"""Methods that a patched model instance gets in place of its class's."""

import contextlib
import copy
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_kernels import arguments
from moe_kernels.layers import ModalityLora
from moe_kernels.layers.modality_lora import BASE
from moe_kernels.models import checkpoint_names, named_adapters, offload, packed, sharding
from moe_kernels.models.experts import IMPLEMENTATION
from moe_kernels.models.forwards import forward_of
from moe_kernels.models.handle import HANDLE, PatchState, get_patched
from moe_kernels.models.instance_forward import reset_forward, set_forward
from moe_kernels.models.intact import needs_ours
from moe_kernels.models.loss import LossOverColumns
from moe_kernels.models.padding import cache_of
from moe_kernels.models.parameters import check_values, named_adapter_parameters
from moe_kernels.models.tokens import JoinedHead, set_config_vocab_size

NO_DATA_PARALLEL = (
    "use DistributedDataParallel (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one"
)
_LOSS = "_loss_function"  # where transformers looks for a model's own loss


def attach(patched: PatchState) -> None:
    """Give the model, this one instance, its methods and its handle."""
    model = patched.model
    for name, function in _methods_of(type(model)).items():
        setattr(model, name, types.MethodType(function, model))
    set_forward(model, forward_of(type(model)))
    model.__dict__[_LOSS] = LossOverColumns(
        patched.switches, model.loss_function, model.__dict__.get(_LOSS)
    )
    model.__dict__[HANDLE] = patched


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`, if it was called."""
    for name in (*_methods_of(type(model)), HANDLE):
        model.__dict__.pop(name, None)
    reset_forward(model)
    loss = model.__dict__.get(_LOSS)
    if isinstance(loss, LossOverColumns):
        del model.__dict__[_LOSS]
        if loss.before is not None:
            model.__dict__[_LOSS] = loss.before


@functools.cache
def _methods_of(model_class: type[PreTrainedModel]) -> dict:
    batching = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    return {
        **{n: _refuse_continuous_batching for n in batching if hasattr(model_class, n)},
        "get_output_embeddings": _get_output_embeddings_of(model_class),
        "generate": _generate_of(model_class),
        "prepare_inputs_for_generation": _prepare_inputs_of(model_class),
        "resize_token_embeddings": _refuse_resize,
        "save_pretrained": _save_pretrained_of(model_class),
        "set_experts_implementation": _set_experts_implementation,
        "to_empty": _to_empty,
        "_replicate_for_data_parallel": _refuse_data_parallel,
    }


def _refuse_resize(self: PreTrainedModel, *args, **kwargs) -> NoReturn:
    raise RuntimeError(
        "a patched model's table cannot be resized, because added rows are not part of it: "
        "add_modality_tokens(..., tokenizer=tokenizer) keeps model and tokenizer in step; or "
        "unpatch() first"
    )


@functools.cache
def _save_pretrained_of(model_class: type[PreTrainedModel]):
    """Return a ``save_pretrained`` whose checkpoint ``from_pretrained`` reads as the base model."""
    inner = model_class.save_pretrained

    @functools.wraps(inner)
    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        patched = get_patched(self)
        patched.check_in_place()
        if state_dict is None:
            check_values(patched)
            _check_saving(self)
        if not patched.warned_of_saving:  # a Trainer saves at each checkpoint
            patched.warned_of_saving = True
            warnings.warn(
                "save_pretrained of a patched model writes the base model, with all that was added "
                "as further tensors: Trainer resumes from them, but from_pretrained leaves them "
                "out; save_adapter(folder) writes what load_adapter reads",
                stacklevel=2,
            )
        if packed.parametrised(self):  # transformers' conversions would split what is packed
            kwargs.setdefault("save_original_format", False)
        return inner(_as_base(self), save_directory, *args, state_dict=state_dict, **kwargs)

    return save_pretrained


def _check_saving(model: PreTrainedModel) -> None:
    """Raise RuntimeError if transformers would not find the weights that accelerate offloaded."""
    if offload.offloaded(model) and not hasattr(model, "hf_device_map"):
        raise RuntimeError(
            "save_pretrained finds no weights that cpu_offload or disk_offload of accelerate has "
            "taken: offload by a device map (dispatch_model, from_pretrained), or call "
            "remove_hook_from_submodules of accelerate.hooks first; save_adapter(folder) works"
        )


def _as_base(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the same modules, but the base's methods and settings."""
    base = object.__new__(type(model))
    base.__dict__.update(model.__dict__)
    for name in (*_methods_of(type(model)), HANDLE, "forward"):
        base.__dict__.pop(name, None)  # the user may have removed one
    base.config = copy.deepcopy(model.config)
    size = get_patched(model).base_vocabulary
    set_config_vocab_size(base.config, size)
    settings = base.generation_config = copy.deepcopy(model.generation_config)
    settings.suppress_tokens = [i for i in settings.suppress_tokens or () if i < size] or None
    checkpoint_names.keep_added(base)
    return base


def _set_experts_implementation(self: PreTrainedModel, experts_implementation) -> None:
    """Refuse an implementation that would leave out what was added to experts."""
    requested = experts_implementation
    if isinstance(requested, dict):  # by the name of a sub-configuration; "" is the whole
        requested = requested.get("", IMPLEMENTATION)
    if requested != IMPLEMENTATION and any(map(needs_ours, get_patched(self).parts)):
        raise RuntimeError(
            f"the experts of a patched model cannot be set to {experts_implementation!r}, which "
            "would leave out their adapters: unpatch() first, set it, and patch again"
        )
    type(self).set_experts_implementation(self, experts_implementation)


@torch.no_grad()
def _to_empty(self: PreTrainedModel, *args, **kwargs) -> PreTrainedModel:
    """Leave what was added not with any values, but with NaN, or low-rank pairs as they start.

    Memory that was not written is often zero: pairs of zeros would never get a gradient.
    """
    type(self).to_empty(self, *args, **kwargs)
    for _, parameter in named_adapter_parameters(self):
        parameter.fill_(torch.nan)
    for module in self.modules():
        if isinstance(module, ModalityLora) and not sharding.is_sharded(module.lora_A):
            for adapter in get_patched(self).adapter_names:
                module.reset_parameters(adapter)
    return self


@functools.cache
def _get_output_embeddings_of(model_class: type[PreTrainedModel]):
    """Return a ``get_output_embeddings`` that shows added rows to a fused head, and only to it."""
    inner = model_class.get_output_embeddings

    @functools.wraps(inner)
    def get_output_embeddings(self):
        switches = get_patched(self).switches
        if not switches.awaits_head:
            return inner(self)
        switches.awaits_head = False
        return JoinedHead(inner(self))

    return get_output_embeddings


def _refuse_data_parallel(self: PreTrainedModel) -> NoReturn:
    raise RuntimeError(
        f"nn.DataParallel is not supported: its replicas would share one mask; {NO_DATA_PARALLEL}"
    )


@functools.cache
def _generate_of(model_class: type[PreTrainedModel]):
    """Return a ``generate`` that masks added tokens while none of them may be generated.

    Beams take log_softmax before transformers suppresses tokens, so that trained rows would move
    the normaliser of text.
    """
    inner = model_class.generate
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def generate(self, *args, adapter=None, **kwargs):
        patched = get_patched(self)
        given = signature.bind_partial(self, *args, **kwargs).arguments
        with contextlib.ExitStack() as within:
            if adapter is not None:
                within.enter_context(_of_prompts(patched, adapter, given, kwargs))
            elif not patched.switches.holds_adapters():
                # All of its tokens: another thread may call set_adapter before the last one.
                within.enter_context(patched.adapter(patched.active_adapter))
            if not patched.added_tokens_enabled or _masks_added(self, given):
                within.enter_context(patched.switches.with_masked_tokens())
            return inner(self, *args, **kwargs)

    return generate


def _of_prompts(
    patched: PatchState, adapter: str | Sequence[str], given: dict, kwargs: dict
) -> contextlib.AbstractContextManager[None]:
    """Return the context of a ``generate`` with these adapters; ``kwargs`` gets their places."""
    inputs = given.get("inputs")
    prompts = given.get("kwargs", {}) | ({} if inputs is None else {"input_ids": inputs})
    chosen = named_adapters.choose(patched, prompts, adapter, None)
    if chosen.of_sequence is None:
        return patched.adapter(chosen.names[0] if chosen.updates else BASE)
    kwargs["adapter_ids"] = chosen.of_sequence
    return patched.switches.with_adapters_of_batch(chosen)


def _masks_added(model: PreTrainedModel, given: dict) -> bool:
    """Return whether ``generate`` with these arguments is to produce text alone.

    Added tokens may come if ``suppress_tokens`` is empty, as None is if it is a keyword, or names
    some of them. A list of other tokens, or a configuration without a list, says nothing of them.
    """
    keywords = given.get("kwargs", {})
    if "suppress_tokens" in keywords:
        suppressed = () if keywords["suppress_tokens"] is None else keywords["suppress_tokens"]
    else:
        suppressed = getattr(given.get("generation_config"), "suppress_tokens", None)
        if suppressed is None:  # transformers takes the model's own then
            suppressed = model.generation_config.suppress_tokens
    if suppressed is None:
        return True
    suppressed = {int(token_id) for token_id in suppressed}
    patched = get_patched(model)
    first, stop = patched.base_vocabulary, patched.vocabulary
    named = suppressed.intersection(range(first, stop))
    return bool(suppressed) and len(named) in (0, stop - first)


def _refuse_continuous_batching(self: PreTrainedModel, *args, **kwargs) -> NoReturn:
    raise RuntimeError(
        "continuous batching is not supported on a patched model: its paged cache says nothing of "
        "padding, and its requests share one thread; call generate() on batches"
    )


@functools.cache
def _prepare_inputs_of(model_class: type[PreTrainedModel]):
    """Return a ``prepare_inputs_for_generation`` that cuts modality_ids to match input_ids."""
    inner = model_class.prepare_inputs_for_generation

    @functools.wraps(inner)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = inner(self, *args, **kwargs)
        if inputs.get("modality_ids") is not None and inputs.get("input_ids") is not None:
            arguments.tensors("(B, S) of integers", modality_ids=inputs["modality_ids"])
            cache = cache_of(inputs)
            start = 0 if cache is None else int(cache.get_seq_length())
            patched = get_patched(self)
            inputs["modality_ids"] = _columns_from(
                start,
                inputs["modality_ids"],
                inputs["input_ids"],
                patched.modality_of,
                [patched.modality_id(name) for name in patched.config.sequence_modalities],
            )
        return inputs

    return prepare_inputs_for_generation


def _columns_from(
    start: int,
    modality_ids: Tensor,
    input_ids: Tensor,
    modality_of: Callable[[Tensor], Tensor],
    sequence_modality_ids: list[int],
) -> Tensor:
    """Return the modality (B, S) of ``input_ids`` (B, S), which fill the columns from ``start`` on.

    generate() passes the prompt's modality ids (B, P) at every step. The modality of a later token
    follows from its id. A text token takes that of the prompt's last column, if it is one of
    ``sequence_modality_ids``.
    """
    of_prompt = modality_ids[:, start : start + input_ids.shape[1]]
    later = modality_of(input_ids[:, of_prompt.shape[1] :])
    last = modality_ids[:, -1:].to(later)
    for modality_id in sequence_modality_ids:
        later = torch.where((later == 0) & (last == modality_id), last, later)
    return torch.cat([of_prompt.to(later), later], dim=1)

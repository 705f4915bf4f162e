"""``patch_model``: teach a Mixture-of-Experts model of Hugging Face the masked low-rank updates."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_kernels import backends
from moe_kernels.init.rows import GromovWassersteinDiagnostics
from moe_kernels.layers import ModalityLora
from moe_kernels.models import (
    adapters,
    experts,
    extensions,
    linear,
    methods,
    projectors,
    quantisation,
    routers,
    tokens,
)
from moe_kernels.models.config import (
    ATTENTION_PROJECTIONS,
    EXPERT_PROJECTIONS,
    ROUTER,
    ModalityLoraConfig,
)
from moe_kernels.models.context import ModalityContext, TakeModalityIds
from moe_kernels.models.projections import (
    Projection,
    adapted_layers,
    check_patterns,
    decoder_layers,
    find_projections,
)


class PatchedModel:
    """Handle of a patched model; made by :func:`patch_model`.

    Attributes:
        model: the model that was patched, in place.
        config: what it was patched with.
        adapters_enabled: False: forwards add no low-rank update; see :meth:`adapters_disabled`.
        init_diagnostics: what Gromov-Wasserstein inits reported, by modality, then by "embedding"
            and "head".
        extensions: the experts that were added, in order; see :mod:`moe_kernels.moextend`.
    """

    def __init__(self, model: PreTrainedModel, config: ModalityLoraConfig):
        self.model = model
        self.config = config
        self.adapters_enabled = True
        self.init_diagnostics: dict[str, dict[str, GromovWassersteinDiagnostics]] = {}
        self.extensions: list[extensions.ExtensionConfig] = []
        self._extensions_disabled = 0  # how many times over; see extensions.disabled
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._original_config = model.config
        self._original_generation_config = copy.deepcopy(model.generation_config)
        self._original_vocab_sizes = tokens.vocab_sizes(model)
        self._quantisation: dict = {}
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Of adapters, added token rows, added experts and projectors, all that may train."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in the model."""
        for name, parameter in adapters.named_adapter_parameters(self.model):
            if parameter.requires_grad:
                yield name, parameter

    def modality_token_ids(self, modality: str) -> range:
        """The ids of the tokens added for a modality; empty if there are none."""
        return tokens.modality_token_ids(self.model, modality)

    @contextlib.contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Forwards within it add no low-rank update, and modality gates are shut.

        Added token rows stay, and so do experts that were added without a gate.
        """
        before, self.adapters_enabled = self.adapters_enabled, False
        try:
            yield
        finally:
            self.adapters_enabled = before

    def save_adapter(self, folder: str | Path) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into ``folder``.

        Files of an earlier adapter there stay whole until the new ones are complete.
        """
        self._check_in_place()
        adapters.save(self.model, self.config, Path(folder))

    def load_adapter(self, folder: str | Path) -> None:
        """Load what :meth:`save_adapter` wrote.

        Tokens, experts and projectors that it has and the model lacks are added. What was frozen
        when it was saved is frozen then, and all else of it trains.

        Raises:
            FileNotFoundError: the folder has no adapter.
            ValueError: the adapter is of another shape, model or layout, or a file is damaged;
                nothing of the model has changed then.
        """
        self._check_in_place()
        adapters.load(self.model, self.config, Path(folder))

    def unpatch(self) -> PreTrainedModel:
        """Take everything away again; the model is as it was, bit for bit. Returns the model.

        Raises:
            ValueError: this handle has been unpatched before.
        """
        self._check_in_place()
        self._undo()
        return self.model

    def _check_in_place(self) -> None:
        if self.model.__dict__.get(methods.HANDLE) is not self:
            raise ValueError(
                "this handle was unpatched: use the one that patch_model returned last"
            )

    def _undo(self) -> None:
        """Take away whatever is there, also after a patch that stopped half-way."""
        model = self.model
        for hook in self._hooks:
            hook.remove()
        tokens.remove(model)
        projectors.detach(model)
        for layer in decoder_layers(model):
            _detach_layer(layer)
        methods.detach(model)
        if model.__dict__.pop("_original_forward", None) is not None:
            # accelerate's autocast went with our forward: it may wrap the model again.
            model.__dict__.pop("_is_accelerate_prepared", None)
        if "token_modality" in model._buffers:
            del model.token_modality
        _set_config(model, model.config, self._original_config)
        quantisation.restore(model, self._quantisation)
        model.generation_config = self._original_generation_config
        for module, size in self._original_vocab_sizes.items():
            module.vocab_size = size
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])


def patch_model(model: PreTrainedModel, config: ModalityLoraConfig | None = None) -> PatchedModel:
    """Add masked low-rank updates to a Mixture-of-Experts model, in place, and freeze the rest.

    Afterwards ``model(input_ids)`` derives each token's modality from its id (see
    :func:`moe_kernels.add_modality_tokens`), and ``model(..., modality_ids=)`` takes it: (B, S)
    integers, 0 the base modality, m the m-th of ``config.modalities``, -1 padding. The class and
    other instances are not touched.

    Args:
        model: a causal language model with experts as in Mixtral, OLMoE or Qwen-MoE.
        config: what to add; default: rank 16 on experts and attention for modality "image".

    Returns:
        The handle to train, save, load and undo with.

    Raises:
        TypeError: not a transformers model, or one that is wrapped by PEFT.
        ValueError: the model is patched already, quantised (its weights packed; a GGUF file that
            was unpacked is not), or of a layout that the kernels do not support; the message names
            what is missing. Or a pattern of ``config`` that names nothing, or a layer that the
            model has not. Nothing is patched then.
    """
    config = config or ModalityLoraConfig()
    projections = _check_model(model, config)
    if config.backend is not None:
        backends.select(config.backend, next(model.parameters()).device)
    patched = PatchedModel(model, config)
    try:
        model.requires_grad_(False)
        for layer in decoder_layers(model):
            _attach_layer(layer, [p for p in projections if p.layer is layer], patched)
        _attach_model(model, patched)
    except BaseException:  # out of memory, an interrupt: nothing stays half-patched
        patched._undo()
        raise
    return patched


def _check_model(model: nn.Module, config: ModalityLoraConfig) -> list[Projection]:
    """What will be adapted, after every check that patching could fail on."""
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise TypeError(
            f"{name} carries PEFT adapters: merge or unload them first "
            "(model = model.merge_and_unload()), then patch the plain model"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"patch_model needs a transformers model, got {name}")
    if methods.HANDLE in model.__dict__:
        raise ValueError(f"this {name} is already patched: unpatch() it first")
    if reason := quantisation.unsupported(model):
        raise ValueError(f"{name} {reason}")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(f"{name} is not supported: it has no language-model head")
    if reasons := _table_problems(model):
        raise ValueError(f"{name} is not supported: {'; '.join(reasons)}")
    layers, adapted = decoder_layers(model), adapted_layers(model, config)
    if not any(experts.find_experts(layer) for layer in layers):
        raise ValueError(f"{name} is not supported: no layer has stacked experts (gate_up_proj)")
    for index, layer in enumerate(layers):
        targets = config.target_modules if layer in adapted else ()
        if reasons := _layer_problems(layer, targets):
            raise ValueError(f"{name} is not supported: layer {index}: {'; '.join(reasons)}")
    projections = find_projections(model, config)
    if config.target_modules and not projections:
        raise ValueError(
            f"layers_to_transform {config.layers_to_transform} of {name} have none of "
            f"{config.target_modules}"
        )
    check_patterns(config, projections)
    return projections


def _table_problems(model: PreTrainedModel) -> list[str]:
    """Why added tokens could not work."""
    reasons = []
    if "forward" in model.__dict__:
        reasons.append("its forward was replaced (by a device map, or accelerate's autocast?)")
    for module, wanted in (
        (model.get_input_embeddings(), nn.Embedding),
        (model.get_output_embeddings(), nn.Linear),
    ):
        if type(module) is not wanted:
            reasons.append(f"a {type(module).__name__} where nn.{wanted.__name__} is needed")
        elif "forward" in module.__dict__:
            reasons.append(f"its {wanted.__name__} has a forward of its own (a device map?)")
    return reasons


def _layer_problems(layer: nn.Module, targets: tuple[str, ...]) -> list[str]:
    if not isinstance(getattr(layer, "self_attn", None), nn.Module):
        return ["no self_attn"]
    reasons = []
    experts_module = experts.find_experts(layer)
    if experts_module is not None:
        reasons += experts.unsupported(experts_module)
        if "router" in targets:
            reasons += routers.unsupported(layer)
    if "attention" in targets:
        for name in ATTENTION_PROJECTIONS:
            linear = getattr(layer.self_attn, name, None)
            if linear is None:
                reasons.append(f'no self_attn.{name} (leave "attention" out of target_modules)')
            elif type(linear) is not nn.Linear:
                reasons.append(f"self_attn.{name} is {type(linear).__name__}, not nn.Linear")
            elif "forward" in linear.__dict__:
                reasons.append(f"self_attn.{name} has a forward of its own (a device map?)")
    return reasons


def _attach_layer(layer: nn.Module, projections: list[Projection], patched: PatchedModel) -> None:
    """Give a layer its hook and the adapters of its projections, which may be none.

    Adapters live on the decoder layer, without a level named "experts". Under ``mlp.experts``, or
    any ``experts.gate_up_proj``, transformers takes them for base weights when it saves: it would
    split and rename them, and resuming would lose them without a word.
    """
    context = ModalityContext(patched.config.backend)
    hook = layer.self_attn.register_forward_pre_hook(TakeModalityIds(context), with_kwargs=True)
    patched._hooks.append(hook)
    loras = layer.modality_lora = nn.ModuleDict()
    for projection in projections:
        loras[projection.key] = lora = _make_lora(projection, patched.config)
        if projection.key == ROUTER:
            routers.attach(projection.module, context, lora)
        elif projection.key not in EXPERT_PROJECTIONS:
            linear.attach(projection.module, context, lora)
    experts_module = experts.find_experts(layer)
    if experts_module is not None:
        pair = {key: loras[key] for key in EXPERT_PROJECTIONS if key in loras}
        experts.attach(experts_module, context, pair)


def _attach_model(model: PreTrainedModel, patched: PatchedModel) -> None:
    _set_config(model, model.config, copy.deepcopy(model.config))
    quantisation.clear(model.config)
    patched._quantisation = quantisation.take_flags(model)
    # Not set_experts_implementation: it refuses a subclass that a script defines by itself.
    model.config._experts_implementation = experts.IMPLEMENTATION
    table = model.get_input_embeddings()
    zeros = torch.zeros(table.weight.shape[0], dtype=torch.int64, device=table.weight.device)
    model.register_buffer("token_modality", zeros, persistent=False)
    patched._hooks.append(table.register_forward_hook(methods.RequireGrad(model)))
    methods.attach(model, patched)


def _detach_layer(layer: nn.Module) -> None:
    experts_module = experts.find_experts(layer)
    if experts_module is not None:
        experts.detach(experts_module)
        if (router := routers.find_router(layer)) is not None:
            routers.detach(router)
    extensions.detach(layer)
    layer._modules.pop("modality_lora", None)
    for name in ATTENTION_PROJECTIONS:
        if isinstance(module := getattr(layer.self_attn, name, None), nn.Linear):
            linear.detach(module)


def _make_lora(projection: Projection, config: ModalityLoraConfig) -> ModalityLora:
    weight = projection.weight
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return ModalityLora(
        len(config.modalities),
        weight.shape[-1],
        weight.shape[-2],
        config.rank(projection.name),
        config.alpha(projection.name),
        num_experts=weight.shape[0] if weight.ndim == 3 else None,
        shared_A=config.shared_A,
        device=weight.device,
        dtype=torch.float32 if half else weight.dtype,
    )


def _set_config(model: nn.Module, old, new) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new

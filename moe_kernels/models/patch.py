"""``patch_model``: add masked low-rank updates to a Mixture-of-Experts model of Hugging Face."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import backends
from moe_kernels.layers import ModalityLora
from moe_kernels.layers.modality_lora import DEFAULT
from moe_kernels.models import (
    adapters,
    added_experts,
    description,
    experts,
    linear,
    methods,
    named_adapters,
    offload,
    parameter_groups,
    parameters,
    patchable,
    projectors,
    prompts,
    quantisation,
    routers,
    sharding,
    text_check,
    tokens,
)
from moe_kernels.models.config import (
    EXPERT_PROJECTIONS,
    ROUTER,
    ModalityLoraConfig,
)
from moe_kernels.models.context import (
    EndForward,
    ModalityContext,
    TakeModalityIds,
    TakeModalityIdsOfLayer,
)
from moe_kernels.models.forwards import ForeignForward, RequireGrad
from moe_kernels.models.handle import PatchState, get_patched
from moe_kernels.models.intact import find_links, patched_modules
from moe_kernels.models.parts import (
    LayerParts,
    trainable_dtype,
)
from moe_kernels.models.projections import (
    Projection,
)
from moe_kernels.models.routers import RoutingFinder
from moe_kernels.models.text_check import TextCheck
from moe_kernels.models.undo import all_or_nothing


class PatchedModel(PatchState):
    """Handle of a patched model; made by :func:`patch_model`.

    Attributes:
        model: the model that was patched, in place.
        config: the configuration that it was patched with.
        adapters_enabled: False: forwards add no low-rank update, in any thread; see
            :meth:`adapters_disabled` for one thread.
        added_tokens_enabled: False: forwards give logits of the base vocabulary alone, in any
            thread; see :meth:`text_only` for one thread.
        fused_loss: True: forwards with labels in training mode compute the loss in chunks, without
            logits of all tokens at once; ``logits`` of their output is None.
        init_diagnostics: reports of Gromov-Wasserstein inits, by modality, then by "embedding" and
            "head".
        extensions: the experts that were added, in order; see :mod:`moe_kernels.moextend`.

    Example:
        Those of the methods go on from here.

        >>> import os, torch
        >>> from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
        >>> from moe_kernels.testing import tiny_model
        >>> model = tiny_model()
        >>> patched = patch_model(model, ModalityLoraConfig(r=4))
        >>> image_ids = add_modality_tokens(model, "image", 10)
        >>> patched
        PatchedModel(MixtralForCausalLM
          modalities: image
          targets: experts, attention
          ranks: 4
          layers: 2 of 2 adapted, 2 with experts
          backend: ...
          added tokens: image 10 (64..73)
          adapters: default (active)
          extensions: none
        )
        >>> text = torch.tensor([[5, 6, 7, 8, 9, 10]])
        >>> text_and_image = torch.tensor([[5, 6, *image_ids]])
        >>> optimizer = torch.optim.AdamW(patched.trainable_parameters(), lr=1e-2)
        >>> model(text_and_image, labels=text_and_image).loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ModalityLoraConfig,
        parts: Sequence[LayerParts],
        projections: Sequence[Projection],
    ):
        super().__init__(model, config, parts, projections)
        self._original_configs: dict[nn.Module, PretrainedConfig] = {}
        self._original_generation_config = copy.deepcopy(model.generation_config)
        self._original_vocab_sizes = tokens.vocab_sizes(model)
        self._quantisation: dict = {}
        self._requires_grad = {
            parameters.original_name(name): p.requires_grad for name, p in model.named_parameters()
        }

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of adapters, added rows, experts and projectors that train."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the same parameters with their names in the model."""
        for name, parameter in parameters.named_adapter_parameters(self.model):
            if parameter.requires_grad:
                yield name, parameter

    def parameter_groups(self, lr: float, *, rows_lr: float | None = None) -> list[dict[str, Any]]:
        """Return what trains in groups for an optimizer of torch: adapters, then added rows.

        Rows learn faster at a larger rate than adapters (docs/training.md), and get no weight
        decay, which would pull them away from the lengths of text rows. Adapters, experts and
        projectors get the optimizer's own. A group that would be empty is left out. Call it after
        ``add_modality_tokens``, and before an engine makes the optimizer.

        Args:
            lr: learning rate of all but the rows.
            rows_lr: learning rate of added rows; default: ``lr``.

        Raises:
            ValueError: nothing trains, a rate is negative or not finite, or ``rows_lr`` is given
                and no added row trains.

        Example:
            >>> optimizer = torch.optim.AdamW(patched.parameter_groups(lr=3e-3, rows_lr=2e-2))
            >>> [group["lr"] for group in optimizer.param_groups]
            [0.003, 0.02]
        """
        self.check_in_place()
        return parameter_groups.adapters_and_rows(self, lr, rows_lr)

    def count_parameters(self) -> tuple[int, int]:
        """Return the numbers of values that train and of all values of the model.

        Parts of a sharded parameter on other ranks count, and a packed weight counts as what it is
        unpacked to.

        Example:
            >>> trained, total = patched.count_parameters()
            >>> trained, total - trained
            (4672, 13520)
        """
        self.check_in_place()
        return description.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the number of values that train, that of all, and the share, as PEFT's does.

        Example:
            >>> patched.print_trainable_parameters()
            trainable params: 4,672 || all params: 18,192 || trainable%: 25.6816
        """
        print(description.trainable_line(*self.count_parameters()))

    def __repr__(self) -> str:
        return description.describe(self)

    def check_text(
        self,
        batches: Iterable[Mapping[str, Tensor] | Tensor] | Mapping[str, Tensor] | Tensor,
        *,
        since: TextCheck | None = None,
    ) -> TextCheck:
        """Compare logits of text, bit by bit, in up to four states of the model.

        The model runs as it is now and with its adapters off, and so does a second model without
        anything that was added, which has the same weights and takes no memory for them. With
        ``since``, tokens that changed since an earlier check are counted too, whatever changed
        them. Two kinds of figures are promised to be 0: tokens changed by the adapters, and tokens
        changed since the reference. Patching itself rounds once, as any other kernel does, so the
        unpatched model agrees to rounding.

        All forwards are without gradients, in eval mode and within :meth:`text_only`. Afterwards
        the model is as it was, each module in its mode, also if something was raised.

        Args:
            batches: of text alone: dicts with ``input_ids`` (B, S) and what else the model takes,
                such as ``attention_mask``, or tensors of ids. ``labels`` are left out, and tokens
                of padding are not compared.
            since: the result of an earlier call with the same batches, such as before training.

        Raises:
            ValueError: a batch has no ``input_ids``, or tokens of an added modality; there is no
                batch; ``since`` is of other batches; or the model is sharded, offloaded, adapted
                by PEFT too, under accelerate's autocast, or has its adapters off.

        Example:
            >>> before = patched.check_text([text])
            >>> loss = model(text_and_image, labels=text_and_image).loss.backward()
            >>> optimizer.step()
            >>> print(patched.check_text([text], since=before))
            text of 6 tokens, 64 logits each
            tokens changed by the adapters      0 of 6
            tokens changed since the reference  0 of 6
            ...
        """
        self.check_computed()
        text_check.check_possible(self)
        return text_check.check(self, self._unpatched_twin(), batches, since)

    def _unpatched_twin(self) -> PreTrainedModel:
        """Return a second model of the same tensors, without what was added."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        twin = get_patched(copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors}))
        twin._requires_grad = {}  # unpatching would set the flags of the shared parameters
        return twin.unpatch()

    def save_adapter(
        self, folder: str | Path, *, adapter: str | None = None, timeout: float = 300.0
    ) -> None:
        """Write ``modality_adapter.safetensors`` and ``modality_adapter_config.json``.

        Model and tokenizers may be in the same folder. Files of an earlier adapter there stay whole
        until the new ones are complete; those that an older version wrote under PEFT's names are
        removed then. Of a model that FSDP2 or DeepSpeed ZeRO-3 has sharded,
        call it on all ranks: the first of them writes, and all return when it has, or raise the
        error that it got.

        Args:
            folder: of the adapter.
            adapter: name of the adapter to write, which the files do not hold; default: the active
                one.
            timeout: seconds to wait for the other ranks of a sharded model.

        Raises:
            ValueError: the model has no adapter of this name, or nothing could load it again:
                values are not finite or not here, or the model is not as it was patched.
            FileExistsError: the folder has a file of one of the two names that no ``save_adapter``
                wrote.
            RuntimeError: other ranks of a sharded model did not call it in time, or one failed. If
                the first rank writes for longer than ``timeout``, the new files may be there.

        Example:
            >>> patched.save_adapter("my-adapter")
            >>> sorted(os.listdir("my-adapter"))
            ['modality_adapter.safetensors', 'modality_adapter_config.json']
        """
        adapter = self.active_adapter if adapter is None else adapter
        self.check_adapter(adapter)
        adapters.save(self, Path(folder), adapter, timeout)

    def load_adapter(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        adapter: str | None = None,
        timeout: float = 300.0,
    ) -> None:
        """Load the files of :meth:`save_adapter`, on all ranks if the model is sharded.

        Tokens, experts and projectors that the adapter has and the model lacks are added.
        Parameters that were frozen when the adapter was saved are frozen, and its others train.

        Args:
            folder: of the adapter; every rank reads it.
            tokenizer: gets the names ``<modality_i>`` of the added tokens, as from
                :func:`moe_kernels.add_modality_tokens`, where it lacks them: without names, their
                ids decode to nothing.
            adapter: name of the adapter to load into, which is made if the model lacks it; default:
                the active one. Another than this does not train.
            timeout: seconds to wait for the other ranks of a sharded model.

        Raises:
            FileNotFoundError: the folder has no adapter.
            ValueError: the adapter is of another shape, model or layout, or a file is damaged, or
                the tokenizer's ids cannot match the model's. Model and tokenizer have not changed
                then. The message names the base that the adapter was trained on, if it is another.
            RuntimeError: other ranks of a sharded model did not call it in time, one failed, or
                they found different files.

        Example:
            >>> patched.save_adapter("my-adapter")
            >>> model = tiny_model()  # the plain model
            >>> patched = patch_model(model, ModalityLoraConfig.from_adapter("my-adapter"))
            >>> patched.load_adapter("my-adapter")
            >>> patched.modality_token_ids("image")
            range(64, 74)
        """
        adapter = self.active_adapter if adapter is None else adapter
        adapters.load(self, Path(folder), tokenizer, adapter, timeout)

    def add_adapter(self, name: str, like: str | None = None) -> None:
        """Add an adapter of the same shapes beside the model's others, and leave it inactive.

        Its low-rank pairs start without an effect, and its added rows with the values of the active
        adapter's. ``set_adapter(name)`` trains it and lets all forwards use it; ``adapter(name)``
        and ``model(..., adapter=name)`` let some use it.

        Args:
            name: an identifier; "base" is none, since it stands for no adapter.
            like: name of an adapter whose values it starts with, pairs too, such as that of a
                frozen reference of the adapter that trains.

        Raises:
            ValueError: the model has an adapter of this name, or can have no other: it has added
                experts or a projector, or is sharded. The message names the obstacle.

        Example:
            >>> patched.add_adapter("sketches")
            >>> logits = model(input_ids, adapter=["sketches", "default", "base"]).logits
        """
        self.check_computed()
        named_adapters.check_new(self, name)
        if like is not None:
            self.check_adapter(like)
        with all_or_nothing(self.model, self):
            named_adapters.add(self, name, like)
            return

    def reference_model(self) -> PreTrainedModel:
        """Return a second model that stays as this one is now, for DPO and GRPO.

        It shares the frozen base, and has copies of what was added, in eval mode and frozen. Make
        it before a trainer takes this model. ``moe_kernels.training.use_reference`` gives it to
        TRL's ``GRPOTrainer``; its ``DPOTrainer`` takes it as ``ref_model``.

        Raises:
            ValueError: the model is sharded or offloaded, or a parameter of the base trains, which
                would move the reference too.

        Example:
            >>> trainer = DPOTrainer(patched.model, patched.reference_model(), args, ...)
        """
        self.check_computed()
        return named_adapters.reference_model(self)

    def merge_and_unload(self) -> NoReturn:
        """Raise: what acts on a modality alone cannot become part of weights that all rows share.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "an adapter of moe_kernels cannot be merged into the base: its update acts on rows of "
            "a modality alone, and merged weights would change text too. save_adapter(folder) "
            "writes it, moe_kernels.load(base, folder) loads both, and "
            "moe_kernels.combine_adapters makes one adapter of several"
        )

    def set_adapter(self, name: str) -> None:
        """Let forwards of all threads use an adapter, and let it alone train.

        What was frozen of an adapter by hand is frozen again when it is active again. Call it after
        ``backward()``, and before the optimizer and DDP are made: what it freezes between a forward
        and its backward gets no gradient.

        Raises:
            ValueError: the model has no adapter of this name.
            RuntimeError: within ``adapter(...)`` or ``generate``, which are for one thread.
        """
        self.check_in_place()
        self.check_adapter(name)
        if self.switches.holds_adapters():
            raise RuntimeError(
                "set_adapter is for all threads: call it outside adapter(...) and generate"
            )
        if name != self.active_adapter:
            with all_or_nothing(self.model, self, self.switches):
                named_adapters.activate(self, name)
                return

    def delete_adapter(self, name: str) -> None:
        """Take an adapter out of the model, and leave the others as they are.

        Raises:
            ValueError: the model has no adapter of this name, it is active, or it is "default",
                which ``unpatch()`` takes out.
            RuntimeError: within ``adapter(name)``, whose forwards need it.
        """
        self.check_in_place()
        self.check_adapter(name)
        if name in (self.active_adapter, DEFAULT):
            which = "the first one: unpatch() takes it out" if name == DEFAULT else "active"
            raise ValueError(f"adapter {name!r} cannot be deleted, as it is {which}")
        if self.switches.holds_adapters(name):
            raise RuntimeError(f"adapter({name!r}) is open here: delete_adapter outside of it")
        with all_or_nothing(self.model, self):
            named_adapters.delete(self, name)
            return

    def unpatch(self) -> PreTrainedModel:
        """Remove everything that was added and return the model as it was before, bit for bit.

        An interrupt leaves the model patched; it can be unpatched again.

        Raises:
            ValueError: this handle has been unpatched before.

        Example:
            >>> plain, weights = patched.unpatch(), tiny_model().state_dict()
            >>> all(torch.equal(weights[name], p) for name, p in plain.state_dict().items())
            True
        """
        self.check_in_place()
        with all_or_nothing(self.model):
            self._remove_all()
            return self.model

    def _remove_all(self) -> None:
        model = self.model
        for hook in self.hooks:
            hook.remove()
        tokens.remove(model)
        projectors.detach(model)
        for parts in self.parts:
            _detach_layer(parts)
        methods.detach(model)
        if model.__dict__.pop("_original_forward", None) is not None:
            # accelerate's autocast went with our forward: it may wrap the model again.
            model.__dict__.pop("_is_accelerate_prepared", None)
        for module, config in self._original_configs.items():
            module.config = config
        quantisation.restore(model, self._quantisation)
        model.generation_config = self._original_generation_config
        for module, size in self._original_vocab_sizes.items():
            module.vocab_size = size
        for name, parameter in model.named_parameters():
            # A parameter that the user has registered since keeps its own.
            before = self._requires_grad.get(parameters.original_name(name))
            parameter.requires_grad_(parameter.requires_grad if before is None else before)


def patch_model(model: PreTrainedModel, config: ModalityLoraConfig | None = None) -> PatchedModel:
    """Add masked low-rank updates to a Mixture-of-Experts model, in place, and freeze the rest.

    Afterwards ``model(input_ids)`` derives each token's modality from its id (see
    :func:`moe_kernels.add_modality_tokens`), and ``model(..., modality_ids=)`` takes it: (B, S)
    integers, 0 the base modality, m the m-th of ``config.modalities``, -1 padding. The class and
    other instances are not touched.

    A model may be sharded already, by FSDP2 or by DeepSpeed ZeRO-3 before ``deepspeed.initialize``.
    All ranks call this then, and add_modality_tokens after it. Its weights may be offloaded to the
    CPU or a disk by accelerate; what is added stays on the device that computes.

    Args:
        model: a language model with stacked experts; docs/families.md lists classes.
        config: what to add; default: rank 16 on experts and attention for modality "image".

    Returns:
        The handle to train, save, load and undo with.

    Raises:
        TypeError: not a transformers model, or one that is wrapped by PEFT.
        ValueError: the model is patched already, or of a layout that the kernels do not support;
            or its table, its head or a weight that gets an adapter is quantised (experts may be
            packed by a parametrisation); or a pattern of ``config`` names no projection, or
            ``layers_to_transform`` a layer that does not exist. The message names the obstacle, and
            nothing is patched.

    Example:
        >>> import torch
        >>> from moe_kernels import ModalityLoraConfig, patch_model
        >>> from moe_kernels.testing import tiny_model
        >>> model = tiny_model()  # or AutoModelForCausalLM.from_pretrained(...)
        >>> patched = patch_model(model, ModalityLoraConfig(r=4, modalities=("image",)))
        >>> input_ids = torch.tensor([[5, 6, 7, 8]])
        >>> modality_ids = torch.tensor([[0, 0, 1, 1]])  # two tokens of text, two of an image
        >>> model(input_ids, modality_ids=modality_ids, labels=input_ids).loss.backward()
        >>> patched.unpatch() is model
        True
    """
    config = ModalityLoraConfig() if config is None else config
    if not isinstance(config, ModalityLoraConfig):
        raise TypeError(
            f"config must be a ModalityLoraConfig; got {type(config).__name__}: make one of a dict "
            "by ModalityLoraConfig(**config)"
        )
    if config.backend is not None and isinstance(model, nn.Module):
        backends.select(config.backend, offload.device_of_model(model))
    find = RoutingFinder()
    parts, projections = patchable.check(model, config, find)
    patched = PatchedModel(model, config, parts, projections)
    with all_or_nothing(model):
        model.requires_grad_(False)
        for each in parts:
            _attach_layer(each, patched, find)
        _attach_model(patched)
        return patched


def _attach_layer(parts: LayerParts, patched: PatchedModel, find: RoutingFinder) -> None:
    """Give a layer its hooks and the adapters of its projections, if any.

    Adapters live on the decoder layer, and no part of their names is "experts". Under
    ``mlp.experts``, or any ``experts.gate_up_proj``, transformers would take them for base weights
    when it saves: it would split and rename them, and resuming would silently lose them.
    """
    context = ModalityContext(patched.config.backend, patched.switches, patched.forwards)
    patched.forwards.contexts.append(context)
    first, last = parts.self_attn, parts.experts
    take = TakeModalityIds if first is not None else TakeModalityIdsOfLayer
    if first is None:
        first = last = parts.layer
    last = first if last is None else last
    patched.hooks += [
        first.register_forward_pre_hook(take(context), with_kwargs=True),
        last.register_forward_hook(EndForward(context), always_call=True),
    ]
    loras = parts.layer.modality_lora = nn.ModuleDict()
    for projection in patched.projections:
        if projection.layer is not parts.layer:
            continue
        loras[projection.key] = lora = _make_lora(projection, patched)
        if projection.key == ROUTER:
            routers.attach(parts.router, context, lora, find(parts.router))
        elif projection.key not in EXPERT_PROJECTIONS:
            linear.attach(projection.module, context, lora, projection.key)
    if parts.experts is not None:
        pairs = {key: loras[key] for key in EXPERT_PROJECTIONS if key in loras}
        experts.attach(parts.experts, context, pairs)


def _attach_model(patched: PatchedModel) -> None:
    model = patched.model
    patched._original_configs = _copy_configs(model)
    quantisation.clear(model, model.config)
    patched._quantisation = quantisation.take_flags(model)
    for parts in patched.moe_layers.values():
        # Not set_experts_implementation: it refuses a subclass that a script defines by itself.
        parts.experts.config._experts_implementation = experts.IMPLEMENTATION
    table = model.get_input_embeddings()
    patched.hooks.append(table.register_forward_hook(RequireGrad(model)))
    tokens.attach_head(model, patched.switches)
    patched.hooks += ForeignForward(model).register()
    methods.attach(patched)
    prompts.watch()
    patched.links = find_links(model, patched_modules(model, patched.parts))


def _detach_layer(parts: LayerParts) -> None:
    if parts.experts is not None:
        experts.detach(parts.experts)
    if parts.router is not None:
        routers.detach(parts.router)
    added_experts.detach(parts.layer)
    parts.layer._modules.pop("modality_lora", None)
    TakeModalityIdsOfLayer.detach(parts.layer)
    for module in parts.attention.values():
        linear.detach(module)


def _make_lora(projection: Projection, patched: PatchedModel) -> ModalityLora:
    config, weight = patched.config, projection.outline
    config.check_rank(projection.name)
    *stack, out_features, in_features = projection.shape
    lora = ModalityLora(
        len(config.modalities),
        in_features,
        out_features,
        config.rank(projection.name),
        config.alpha(projection.name),
        num_experts=stack[0] if stack else None,
        shared_A=config.shared_A,
        device=offload.device_of(projection.module, weight),
        dtype=trainable_dtype(weight),
    )
    if sharding.spread(projection.module) is not None:
        weight = patched.model.get_input_embeddings().weight  # of other ranks than the experts
    sharding.shard_beside(lora, weight)
    return lora


def _copy_configs(model: PreTrainedModel) -> dict[nn.Module, PretrainedConfig]:
    """Give a model a copy of its configuration, and its modules the parts of the copy.

    The parts of a multimodal model have parts of its configuration, where their experts look for
    their implementation. Returns the configurations that modules had before.
    """
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    before = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            before[module] = config
            # deepcopy notes each copy, and keeps those of configurations that hang elsewhere too.
            module.config = copy.deepcopy(config, copies)
    return before

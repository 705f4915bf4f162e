"""Added experts of a patched model: checked, built and attached.

They live on the decoder layer, as adapters do and for the same reason (see ``patch``): one
:class:`moe_kernels.layers.AddedExperts` for each extension that the layer took part in.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from transformers.utils import ModelOutput

from moe_kernels.layers import AddedExperts, Calibration
from moe_kernels.models import experts, forms, offload, routers, sharding
from moe_kernels.models.config import ExtensionConfig
from moe_kernels.models.handle import PatchState
from moe_kernels.models.intact import modalities_of_peft
from moe_kernels.models.parts import LayerParts, trainable_dtype, up_stack
from moe_kernels.models.routers import RoutingFinder

EXTENSIONS = "modality_extension"


def added_experts(layer: nn.Module) -> list[AddedExperts]:
    """Return the added experts of a decoder layer in the order of their ids."""
    return list(getattr(layer, EXTENSIONS, {}).values())


def count_experts(parts: LayerParts) -> int:
    """Return the number of a layer's experts, added ones included."""
    return parts.num_experts + sum(each.num_added for each in added_experts(parts.layer))


def routing(
    patched: PatchState, find: RoutingFinder, layers: Iterable[str] | None = None
) -> dict[str, dict]:
    """Describe the routers of some layers for JSON: ``top_k`` and ``normalise`` by layer.

    Args:
        patched: the model.
        find: shared by the steps of one operation.
        layers: indices, as strings; None: the layers with added experts.
    """
    if layers is None:
        layers = [str(i) for i, parts in patched.moe_layers.items() if added_experts(parts.layer)]
    described = {}
    for index in layers:
        found = find(patched.moe_layers[int(index)].router)
        described[index] = {"top_k": found.top_k, "normalise": found.normalise}
    return described


def check_beside(patched: PatchState) -> None:
    """Raise ValueError if adapters of PEFT, or several of ours, would know no added experts."""
    if modalities_of_peft(patched.links):
        raise ValueError(
            "experts cannot be added beside adapters of PEFT, which accelerate_peft computes: "
            "adapt experts by patch_model instead (moe_kernels.models.peft_format reads PEFT's "
            "files), or take the adapters away first: undo() of accelerate_peft, unload() of PEFT"
        )
    patched.check_one_adapter("an extension by new experts")


def check(
    patched: PatchState,
    config: ExtensionConfig,
    earlier: Sequence[ExtensionConfig],
    find: RoutingFinder,
) -> None:
    """Raise unless :func:`build` and :func:`attach` can do what ``config`` says.

    Args:
        patched: the model.
        config: configuration of the extension that is to be built.
        earlier: the extensions that the model has before this one.
        find: shared by the steps of one operation.

    Raises:
        ValueError: layers that do not exist or have no experts, an unknown modality, a router that
            is not supported, or an extension with a gate beside one without.
    """
    layers = patched.moe_layers
    if outside := [layer for layer in config.experts if layer not in layers]:
        raise ValueError(
            f"layers {outside} cannot be extended: the model has experts in {_ranges(list(layers))}"
        )
    if config.modality is not None:
        patched.modality_id(config.modality)
    if any((each.modality is None) != (config.modality is None) for each in earlier):
        raise ValueError(
            "an extension without a modality gate, which changes text rows, cannot stand beside "
            "one with a gate, which promises that it does not"
        )
    for index in config.experts:
        problem = routers.problem(layers[index], find)
        if problem is None and sharding.spread(layers[index].experts) is not None:
            problem = "its experts are spread over ranks (expert parallelism)"
        if problem is not None:
            raise ValueError(f"layer {index} cannot be extended: {problem}")


def build(
    patched: PatchState,
    config: ExtensionConfig,
    earlier: Sequence[ExtensionConfig],
    device: str | None = None,
) -> dict[int, AddedExperts]:
    """Make the modules of an extension by layer, without values and not attached yet.

    They are float32 on a base in 16 bits, else of the base's dtype, as adapters are. :func:`check`
    has passed. ``device``: None: that of the layer's experts.
    """
    modality_id = None if config.modality is None else patched.modality_id(config.modality)
    competing = [each.experts for each in earlier if each.modality == config.modality]
    return {
        index: _build_layer(
            patched.moe_layers[index],
            number,
            sum(each.get(index, 0) for each in competing),
            modality_id,
            config,
            device,
        )
        for index, number in config.experts.items()
    }


def _build_layer(
    parts: LayerParts,
    number: int,
    num_competing: int,
    modality_id: int | None,
    config: ExtensionConfig,
    device: str | None,
) -> AddedExperts:
    """Make one layer's module; its rows may choose ``num_competing`` earlier experts too."""
    weight, form = up_stack(parts.experts), forms.form_of(parts.experts)
    _, *sizes = sharding.whole_shape(weight)
    rows, hidden = reversed(sizes) if form.transposed else sizes
    device = device or offload.device_of(parts.experts, weight)
    options = {"device": device, "dtype": trainable_dtype(weight)}
    calibration = None
    if config.calibration is not None:
        visible = parts.num_experts + num_competing + number
        calibration = Calibration(config.calibration, visible, config.calibration_hidden, **options)
    return AddedExperts(
        number,
        hidden,
        rows // 2 if form.act.gated else rows,
        gated=form.act.gated,
        biased=form.biased,
        router_biased=getattr(parts.router, "bias", None) is not None,
        modality_id=modality_id,
        calibration=calibration,
        **options,
    )


def attach(
    patched: PatchState,
    config: ExtensionConfig,
    modules: dict[int, AddedExperts],
    find: RoutingFinder,
) -> None:
    """Make the layers use the modules of :func:`build`; all checks have passed."""
    layers, number = patched.moe_layers, str(len(patched.extensions))
    for index, module in modules.items():
        parts = layers[index]
        if not routers.is_attached(parts.router):
            context = experts.context_of(parts.experts)
            routers.attach(parts.router, context, None, find(parts.router))
        if not hasattr(parts.layer, EXTENSIONS):
            setattr(parts.layer, EXTENSIONS, nn.ModuleDict())
        getattr(parts.layer, EXTENSIONS)[number] = module
        sharding.shard_beside(module, up_stack(parts.experts))
        experts.set_added_experts(parts.experts, added_experts(parts.layer))
        routers.set_added_experts(parts.router, added_experts(parts.layer))
    if not patched.extensions:
        first = next(iter(layers.values()))
        cut = _CutRouterLogits(first.num_experts)
        patched.hooks.append(patched.decoder.register_forward_hook(cut))
    patched.extensions.append(config)


def disabled(patched: PatchState) -> contextlib.AbstractContextManager[None]:
    """Let no router choose an added expert in this thread's forwards, with or without a gate.

    The experts' op keeps its shape, and so do the bits of every row that chose no added expert. A
    checkpointed layer is recomputed as its forward was, after the context too. It may be nested.
    """
    return patched.switches.without_added_experts()


def can_be_chosen(patched: PatchState) -> bool:
    """Return whether any row may choose added experts now.

    :func:`disabled` forbids all of them, ``adapters_disabled`` those with a gate.
    """
    gates = any(config.modality is not None for config in patched.extensions)
    return patched.switches.uses_added_experts() and (patched.adapters_enabled or not gates)


def detach(layer: nn.Module) -> None:
    """Remove a layer's added experts; its router and its experts module have their own detach."""
    layer._modules.pop(EXTENSIONS, None)


def named_parameters(
    patched: PatchState, number: int, modules: dict[int, AddedExperts]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of an extension under their names in the model once it is attached."""
    paths = patched.paths
    for index, module in modules.items():
        prefix = f"{paths[patched.parts[index].layer]}.{EXTENSIONS}.{number}"
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


class _CutRouterLogits:
    """Hook of the inner model that cuts the returned ``router_logits`` to the base's E columns.

    transformers' balance loss expects ``config``'s number of experts in every layer. The columns
    of added experts, whose number differs between layers, would break it.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(self, module: nn.Module, args: tuple, output: ModelOutput) -> None:
        logits: tuple[Tensor, ...] | None = getattr(output, "router_logits", None)
        if logits is not None:
            output.router_logits = tuple(each[..., : self.num_experts] for each in logits)


def _ranges(layers: list[int]) -> str:
    contiguous = layers == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}..{layers[-1]}" if contiguous else f"layers {layers}"

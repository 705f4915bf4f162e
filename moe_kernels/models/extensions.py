"""Added experts of a patched model: what was asked for, where they live, how they are attached.

They live on the decoder layer, as adapters do and for the same reason (see ``patch``), one
:class:`moe_kernels.layers.AddedExperts` for each extension that the layer took part in.
"""

import contextlib
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from moe_kernels.layers import CALIBRATIONS, AddedExperts, Calibration
from moe_kernels.models import experts, routers
from moe_kernels.models.projections import decoder_layers

if TYPE_CHECKING:
    from moe_kernels.models.patch import PatchedModel

EXTENSIONS = "modality_extension"


def whole(value: Any) -> int | None:
    """An integer of any library as Python's; None for what is none, and for a bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def layer_index(value: Any) -> int:
    """An index of a layer as Python's integer.

    Raises:
        ValueError: it is none.
    """
    index = whole(value)
    if index is None or index < 0:
        raise ValueError(f"a layer must be an index of at least 0, got {value!r}")
    return index


def _count(value: Any, complaint: str) -> int:
    number = whole(value)
    if number is None or number < 1:
        raise ValueError(f"{complaint} {value!r}")
    return number


@dataclass(frozen=True)
class ExtensionConfig:
    """One extension of a model by new experts.

    Attributes:
        experts: decoder layer -> how many experts it got.
        modality: whose rows may choose them; None: all rows may (no gate).
        calibration: "additive", "multiplicative" or None.
        calibration_hidden: hidden size of the calibration.
        init: how they started; "file": from an adapter.
        sources: decoder layer -> the experts that were copied, where any were.

    Raises:
        ValueError: a field that cannot be.
    """

    experts: dict[int, int]
    modality: str | None = None
    calibration: str | None = None
    calibration_hidden: int = 16
    init: str = "file"
    sources: dict[int, tuple[int, ...]] | None = None

    def __post_init__(self):
        if not self.experts:
            raise ValueError("an extension needs at least one layer")
        numbers = {
            layer_index(layer): _count(
                number, f"a layer must get at least one expert, an integer; layer {layer}:"
            )
            for layer, number in self.experts.items()
        }
        if self.calibration is not None and self.calibration not in CALIBRATIONS:
            raise ValueError(
                f"unknown calibration {self.calibration!r}; there are {', '.join(CALIBRATIONS)}, "
                "or None"
            )
        hidden = _count(self.calibration_hidden, "calibration_hidden must be at least 1, got")
        object.__setattr__(self, "experts", numbers)  # it is frozen
        object.__setattr__(self, "calibration_hidden", hidden)

    def structure(self) -> dict:
        """What decides names, shapes and meaning of the parameters."""
        return {"experts": self.experts, "modality": self.modality} | {
            "calibration": self.calibration,
            "calibration_hidden": self.calibration_hidden,
        }

    def to_dict(self) -> dict:
        """For JSON, whose keys are strings."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> "ExtensionConfig":
        """From what :meth:`to_dict` gave.

        Raises:
            ValueError: a setting that this version does not know, or a value that cannot be.
        """
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"this version does not know the setting {', '.join(unknown)}")
        values = dict(values)
        values["experts"] = {int(layer): n for layer, n in values["experts"].items()}
        if (sources := values.get("sources")) is not None:
            values["sources"] = {int(layer): tuple(ids) for layer, ids in sources.items()}
        return cls(**values)


def moe_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layers with stacked experts, by index."""
    layers = enumerate(decoder_layers(model))
    return {index: layer for index, layer in layers if experts.find_experts(layer) is not None}


def added_experts(layer: nn.Module) -> list[AddedExperts]:
    """A layer's, in the order of their ids."""
    return list(getattr(layer, EXTENSIONS, {}).values())


def routing(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, dict]:
    """What the routers of some layers do, for JSON: by index ``top_k`` and ``normalise``.

    Args:
        model: patched.
        layers: indices, as JSON has them; None: of the layers with added experts.
    """
    there = {str(index): layer for index, layer in moe_layers(model).items()}
    if layers is None:
        layers = [index for index, layer in there.items() if added_experts(layer)]
    found = {}
    for index in layers:
        router = routers.find_router(there[index])
        attached = routers.is_attached(router)
        facts = routers.routing_of(router) if attached else routers.find_routing(router)
        found[index] = {"top_k": facts.top_k, "normalise": facts.normalise}
    return found


def check(
    patched: "PatchedModel", config: ExtensionConfig, earlier: Sequence[ExtensionConfig]
) -> None:
    """Everything that :func:`build` and :func:`attach` could fail on.

    Args:
        patched: the model.
        config: what it gets.
        earlier: what it has by then.

    Raises:
        ValueError: layers without experts or not there, an unknown modality, a router that is not
            supported, or an extension with a gate beside one without.
    """
    there = moe_layers(patched.model)
    if outside := [layer for layer in config.experts if layer not in there]:
        raise ValueError(
            f"layers {outside} cannot be extended: the model has experts in {_ranges(list(there))}"
        )
    modalities = patched.config.modalities
    if config.modality is not None and config.modality not in modalities:
        raise ValueError(f"the model is patched for {modalities}, not for {config.modality!r}")
    if any((each.modality is None) != (config.modality is None) for each in earlier):
        raise ValueError(
            "an extension without a modality gate, which text rows take part in, cannot stand "
            "beside one with a gate, which promises that they do not"
        )
    for index in config.experts:
        if problem := router_problem(there[index]):
            raise ValueError(f"layer {index} cannot be extended: {problem}")


def router_problem(layer: nn.Module) -> str | None:
    """Why the router of a patched model's layer with experts cannot be worked with; None: it can.

    A router that is attached has been understood before.
    """
    router = routers.find_router(layer)
    if router is not None and routers.is_attached(router):
        return None
    reasons = routers.unsupported(layer)
    return reasons[0].split(" (leave")[0] if reasons else None


def build(
    patched: "PatchedModel", config: ExtensionConfig, earlier: Sequence[ExtensionConfig]
) -> dict[int, AddedExperts]:
    """The modules of an extension by layer, not attached yet; experts and columns without values.

    float32 on a base in 16 bits, else the base's dtype, as adapters. Arguments and errors are those
    of :func:`check`.
    """
    check(patched, config, earlier)
    modality_id = None
    if config.modality is not None:
        modality_id = patched.config.modalities.index(config.modality) + 1
    before = [each.experts for each in earlier if each.modality == config.modality]
    layers = decoder_layers(patched.model)
    return {
        index: _build_layer(
            experts.find_experts(layers[index]).gate_up_proj,
            number,
            sum(each.get(index, 0) for each in before),
            modality_id,
            config,
        )
        for index, number in config.experts.items()
    }


def _build_layer(
    gate_up_proj: Tensor, number: int, before: int, modality_id: int | None, config: ExtensionConfig
) -> AddedExperts:
    """``before``: experts that the same rows may choose already, beside the base's."""
    half = gate_up_proj.dtype in (torch.bfloat16, torch.float16)
    options = {"device": gate_up_proj.device}
    options["dtype"] = torch.float32 if half else gate_up_proj.dtype
    calibration = None
    if config.calibration is not None:
        visible = gate_up_proj.shape[0] + before + number
        calibration = Calibration(config.calibration, visible, config.calibration_hidden, **options)
    return AddedExperts(
        number,
        gate_up_proj.shape[2],
        gate_up_proj.shape[1] // 2,
        modality_id=modality_id,
        calibration=calibration,
        **options,
    )


def attach(
    patched: "PatchedModel", config: ExtensionConfig, modules: dict[int, AddedExperts]
) -> None:
    """Make the layers use what :func:`build` made. It and what fills it have done all checks."""
    model, layers = patched.model, decoder_layers(patched.model)
    contexts = {index: experts.context_of(experts.find_experts(layers[index])) for index in modules}
    for index in modules:
        router = routers.find_router(layers[index])
        if not routers.is_attached(router):
            routers.attach(router, contexts[index], None)
    key = str(len(patched.extensions))
    for index, module in modules.items():
        layer = layers[index]
        if not hasattr(layer, EXTENSIONS):
            setattr(layer, EXTENSIONS, nn.ModuleDict())
        getattr(layer, EXTENSIONS)[key] = module
        experts.add_experts(experts.find_experts(layer), added_experts(layer))
    _tell_routers(patched)
    if not patched.extensions:
        first = experts.find_experts(next(iter(moe_layers(model).values())))
        cut = _CutRouterLogits(first.gate_up_proj.shape[0])
        base = getattr(model, model.base_model_prefix, model)
        patched._hooks.append(base.register_forward_hook(cut))
    patched.extensions.append(config)


@contextlib.contextmanager
def disabled(patched: "PatchedModel") -> Iterator[None]:
    """Within it no router chooses an added expert, with or without a gate.

    For forwards without gradients: activation checkpointing would recompute them otherwise later.
    The experts' op keeps its shape, and so the bits of every row that chose none of them. One
    within another changes nothing.
    """
    patched._extensions_disabled += 1
    try:
        _tell_routers(patched)
        yield
    finally:
        patched._extensions_disabled -= 1
        _tell_routers(patched)


def _tell_routers(patched: "PatchedModel") -> None:
    """Which added experts they may choose now, of those that their layers have now."""
    for layer in decoder_layers(patched.model):
        if added := added_experts(layer):
            available = [] if patched._extensions_disabled else added
            routers.add_experts(routers.find_router(layer), available)


def can_be_chosen(patched: "PatchedModel") -> bool:
    """Whether any row may choose added experts now; see :func:`disabled`, and for those with a
    gate :meth:`PatchedModel.adapters_disabled`.
    """
    gates = any(config.modality is not None for config in patched.extensions)
    return not patched._extensions_disabled and (patched.adapters_enabled or not gates)


def detach(layer: nn.Module) -> None:
    """Take a layer's added experts away; its router and experts are detached by themselves."""
    layer._modules.pop(EXTENSIONS, None)


def named_parameters(
    model: nn.Module, number: int, modules: dict[int, AddedExperts]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the extension of this number, under the names that they have attached."""
    names = {module: name for name, module in model.named_modules()}
    layers = decoder_layers(model)
    for index, module in modules.items():
        prefix = f"{names[layers[index]]}.{EXTENSIONS}.{number}"
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


class _CutRouterLogits:
    """Hook of the inner model: the ``router_logits`` that it returns are the base's E columns.

    transformers' balance loss counts ``config``'s number of experts in every layer, which added
    columns, uneven between layers, would break.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(self, module: nn.Module, args: tuple, output: ModelOutput) -> None:
        logits: tuple[Tensor, ...] | None = getattr(output, "router_logits", None)
        if logits is not None:
            output.router_logits = tuple(each[..., : self.num_experts] for each in logits)


def _ranges(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}..{layers[-1]}" if whole else f"layers {layers}"

"""PEFT's layout of low-rank pairs: an adapter for one modality, to and from a PEFT folder.

PEFT (``LoraConfig(target_parameters=...)``) keeps the pairs of E stacked experts as the weights of
two linear layers: A is (E*r, in), expert slowest, while B is (out, r*E), expert *fastest*. With
both projections adapted, it wraps the experts module twice: the update of ``gate_up_proj`` is at
``experts.base_layer``, that of ``down_proj`` at ``experts``. A router is one more parameter,
``gate.weight``; its pair is laid out like that of a linear layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_kernels import schema, tensor_files
from moe_kernels.layers import ModalityLora
from moe_kernels.models import adapter_files, schemas
from moe_kernels.models.adapter_files import PEFT_NAMES
from moe_kernels.models.config import (
    EXPERT_PROJECTIONS,
    ROUTER,
    ModalityLoraConfig,
)
from moe_kernels.models.handle import PatchState
from moe_kernels.models.parameters import whole_parameters
from moe_kernels.models.patterns import check_pattern, look_up
from moe_kernels.models.projections import Projection
from moe_kernels.models.undo import all_or_nothing
from moe_kernels.tensor_files import TensorFile

# Options of PEFT that change the meaning of a file -> the only supported value.
_PLAIN = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none"}
# Options that are read, or that do not change what the tensors of a file mean.
READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", *_PLAIN,
}  # fmt: skip
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config",  # init_lora_weights decides
}  # fmt: skip
# Options that must be off: they change the base model, the formula, or what is saved.
OFF = {
    "modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias", "use_qalora",
    "use_bdlora", "megatron_config", "velora_config", "monteclora_config", "arrow_config",
    "kasa_config", "alora_invocation_tokens",
}  # fmt: skip
# Values of init_lora_weights that leave the base weights as they are; others subtract from them.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def experts_A_to_peft(lora_A: Tensor) -> Tensor:
    """Reshape (E, r, in) to (E*r, in)."""
    return lora_A.reshape(-1, lora_A.shape[-1])


def experts_B_to_peft(lora_B: Tensor) -> Tensor:
    """Reshape (E, out, r) to (out, r*E)."""
    return lora_B.permute(1, 2, 0).reshape(lora_B.shape[1], -1)


def experts_A_from_peft(weight: Tensor, num_experts: int) -> Tensor:
    """Reshape (E*r, in) to (E, r, in)."""
    return weight.reshape(num_experts, -1, weight.shape[-1])


def experts_B_from_peft(weight: Tensor, num_experts: int) -> Tensor:
    """Reshape (out, r*E) to (E, out, r)."""
    return weight.reshape(weight.shape[0], -1, num_experts).permute(2, 0, 1)


def save_peft_adapter(patched: PatchState, modality: str, folder: str | Path) -> None:
    """Write the pairs of one modality as a folder that ``PeftModel.from_pretrained`` loads.

    Of several adapters it is the active one.
    PEFT knows no mask: its model computes the same as ours with every token in the modality.

    Raises:
        ValueError: an unknown modality, or a model with added tokens or experts, which PEFT's
            files do not hold; or a parameter that is not whole or not finite; or the folder has
            files of ``save_adapter`` under the names of an earlier version, which are PEFT's.
    """
    index = patched.modality_id(modality) - 1
    if added := patched.added_tokens:
        raise ValueError(f"PEFT's files do not hold added tokens, the model has {added}")
    if patched.extensions:
        raise ValueError("PEFT's files do not hold added experts, the model has some")
    adapter_files.check_not_earlier(Path(folder))
    whole_parameters(patched)
    tensors = {}
    for slot in _slots(patched):
        pair = slot.lora.pair(patched.active_adapter)
        lora_A, lora_B = (each[index].detach() for each in pair)
        if slot.num_experts is not None:
            lora_A = experts_A_to_peft(lora_A.expand(slot.num_experts, -1, -1))
            lora_B = experts_B_to_peft(lora_B)
        tensors[f"{slot.name}.lora_A.weight"] = lora_A
        tensors[f"{slot.name}.lora_B.weight"] = lora_B
    tensor_files.write(Path(folder), PEFT_NAMES, tensors, _peft_config(patched))


def load_peft_adapter(patched: PatchState, modality: str, folder: str | Path) -> None:
    """Copy the files of ``PeftModel.save_pretrained`` into the pairs of one modality.

    Of several adapters it is the active one.

    Raises:
        FileNotFoundError: the folder has no adapter.
        ValueError: an unknown modality, an unsupported option, another rank, scaling or set of
            projections, or a damaged file. The model has not changed then.
    """
    index = patched.modality_id(modality) - 1
    if patched.config.shared_A:
        raise ValueError("shared_A: PEFT's experts have one lora_A each")
    slots = _slots(patched)
    whole_parameters(patched)
    with tensor_files.opened(Path(folder), PEFT_NAMES, "adapter of PEFT") as file:
        saved = _read_config(file)
        _check_config(patched.config, slots, saved, file.beside)
        _check_tensors(file, slots)
        tensors = file.read()
    pairs = [p for slot in slots for p in _convert(tensors, slot, patched.active_adapter)]
    tensor_files.check_finite({name: tensor for name, _, tensor in pairs}, file.path)
    kept = [parameter for _, parameter, _ in pairs]
    with all_or_nothing(patched.model, values=kept), torch.no_grad():
        for _, parameter, tensor in pairs:
            parameter[index].copy_(tensor)
        return  # inside, as all_or_nothing asks


@dataclass(frozen=True)
class _Slot:
    """Place of one projection's pair, in PEFT's model and in ours.

    Attributes:
        name: the module in PEFT's model that has the pair.
        matched: the name that PEFT's patterns are matched against.
        projection: the projection in our model.
        num_experts: E of stacked experts, else None.
    """

    name: str
    matched: str
    projection: Projection
    num_experts: int | None

    @property
    def lora(self) -> ModalityLora:
        return self.projection.lora


def _slots(patched: PatchState) -> list[_Slot]:
    return [_slot(projection) for projection in patched.projections]


def _slot(projection: Projection) -> _Slot:
    name = f"base_model.model.{projection.name}"
    if projection.key == ROUTER:
        return _Slot(name, f"{projection.name}.weight", projection, None)
    if projection.key not in EXPERT_PROJECTIONS:
        return _Slot(name, projection.name, projection, None)
    if projection.transposed:
        raise ValueError(
            f"{projection.name} is stored transposed, which PEFT's files lay out otherwise"
        )
    wrapper = "" if projection.key == "down_proj" else ".base_layer"
    name = name.removesuffix(f".{projection.key}") + wrapper
    return _Slot(name, projection.name, projection, projection.shape[0])


def _read_config(file: TensorFile) -> dict:
    """Return PEFT's configuration beside an open file; it must be that of the file."""
    path = file.beside
    if not path.is_file():
        raise FileNotFoundError(f"no adapter of PEFT in {path.parent}: {path.name} is missing")
    saved = tensor_files.parse_json(path.read_bytes(), path)
    text = file.metadata.get(file.names.key)  # None in files that PEFT itself wrote
    if text is not None and tensor_files.parse_json(text, file.path) != saved:
        raise ValueError(
            f"{path} is not the configuration of {file.path.name} beside it: it was edited, or is "
            "that of another save"
        )
    return saved


def _check_tensors(file: TensorFile, slots: list[_Slot]) -> None:
    """Raise ValueError unless the file has the pairs of these projections and nothing else."""
    expected = dict(shape for slot in slots for shape in _peft_shapes(slot))
    for name, shape in expected.items():
        if name not in file.shapes:
            raise ValueError(f"{file.path}: the adapter lacks {name}")
        if file.shapes[name] != shape:
            raise ValueError(
                f"{file.path}: {name} is {file.shapes[name]}, which does not fit {shape}"
            )
    if unknown := set(file.shapes) - set(expected):
        raise ValueError(
            f"{file.path}: the adapter has {len(unknown)} tensors that fit no projection, such as "
            f"{min(unknown)}"
        )


def _peft_shapes(slot: _Slot) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a projection's pair in PEFT's file."""
    *stack_A, r, in_features = slot.lora.lora_A.shape[1:]
    *stack_B, out_features, _ = slot.lora.lora_B.shape[1:]
    yield f"{slot.name}.lora_A.weight", (math.prod(stack_A) * r, in_features)
    yield f"{slot.name}.lora_B.weight", (out_features, math.prod(stack_B) * r)


def _convert(
    tensors: dict[str, Tensor], slot: _Slot, adapter: str
) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield the names, our parameters and the values, in our layout and dtype, of a pair."""
    converters = (("lora_A", experts_A_from_peft), ("lora_B", experts_B_from_peft))
    for (field, convert), ours in zip(converters, slot.lora.pair(adapter), strict=True):
        name = f"{slot.name}.{field}.weight"
        weight = tensors[name]
        if slot.num_experts is not None:
            weight = convert(weight, slot.num_experts)
        yield name, ours, weight.to(ours.dtype)


def _peft_config(patched: PatchState) -> dict:
    config, slots = patched.config, _slots(patched)
    linears, parameters = _targets(patched, slots)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": patched.model.config.name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": _peft_pattern(config.rank_pattern, config.r, slots),
        "alpha_pattern": _peft_pattern(config.alpha_pattern, config.lora_alpha, slots),
        "target_modules": linears,
        "target_parameters": parameters or None,
        "lora_dropout": 0.0,
        "inference_mode": True,
        **_PLAIN,
    }


def _targets(patched: PatchState, slots: list[_Slot]) -> tuple[list[str], list[str]]:
    """Return PEFT's names of linear layers and of parameters, sorted.

    If only some layers are adapted, names are written in full: PEFT's ``layers_to_transform`` does
    not apply to parameters.
    """
    names = {module: name for name, module in patched.model.named_modules()}
    linears, parameters = set(), set()
    for slot in slots:
        is_linear = slot.num_experts is None and slot.projection.key != ROUTER
        if patched.config.layers_to_transform is not None:
            name = slot.matched
        elif is_linear:
            name = slot.projection.key
        else:
            name = slot.matched.removeprefix(f"{names[slot.projection.layer]}.")
        (linears if is_linear else parameters).add(name)
    return sorted(linears), sorted(parameters)


def _peft_pattern(pattern: dict, default: float, slots: list[_Slot]) -> dict:
    """Return a pattern with the same meaning in PEFT.

    PEFT sorts the keys of a pattern when it saves, and names a router by its weight. If either
    would change a value, the keys are full names instead, of which no two fit one projection.
    """
    ours = {slot.matched: look_up(pattern, slot.projection.name, default) for slot in slots}
    for theirs in (pattern, dict(sorted(pattern.items()))):
        if any(look_up(theirs, name, default) != value for name, value in ours.items()):
            return {name: value for name, value in ours.items() if value != default}
    return pattern


def _check_config(config: ModalityLoraConfig, slots: list[_Slot], saved: dict, path: Path) -> None:
    """Raise ValueError unless PEFT's configuration, which stands in ``path``, is that of ours."""
    if saved.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: not a LoRA adapter of PEFT: peft_type is {saved.get('peft_type')!r}"
        )
    for option, supported in _PLAIN.items():
        if saved.get(option, supported) != supported:
            raise ValueError(f"{path}: an adapter with {option}={saved[option]!r} is not supported")
    start = saved.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        raise ValueError(
            f"{path}: an adapter with init_lora_weights={start!r} is not supported: such a start "
            "may have changed the base weights. PEFT converts PiSSA, OLoRA, CorDA and LoRA-GA to a "
            "plain adapter of twice the rank: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    for option in sorted(set(saved) - READ - HARMLESS):
        if saved[option]:
            if option in OFF:
                raise ValueError(
                    f"{path}: an adapter with {option}={saved[option]!r} is not supported"
                )
            raise ValueError(
                f"{path}: an adapter with {option}={saved[option]!r} is unknown to this version of "
                f"moe_kernels (the file is by PEFT {saved.get('peft_version')}): take the option "
                "out of adapter_config.json if it does not change the formula"
            )
    schema.check(saved, schemas.PEFT, path)
    ranks, alphas = saved.get("rank_pattern") or {}, saved.get("alpha_pattern") or {}
    check_pattern(f"{path}: rank_pattern", ranks)
    check_pattern(f"{path}: alpha_pattern", alphas)
    for slot in slots:
        name = slot.projection.name
        theirs = (
            look_up(ranks, slot.matched, saved["r"]),
            look_up(alphas, slot.matched, saved["lora_alpha"]),
        )
        ours = (config.rank(name), config.alpha(name))
        if theirs != ours:
            raise ValueError(
                f"{path}: {name}: the adapter has (r, lora_alpha) = {theirs}, the model {ours}"
            )

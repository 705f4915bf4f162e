"""Low-rank pairs in PEFT's layout, and back: an adapter for one modality as a PEFT folder.

PEFT (``LoraConfig(target_parameters=...)``) keeps the pairs of E stacked experts as the weights of
two linear layers: A is (E*r, in), expert slowest, while B is (out, r*E), expert *fastest*. With
both projections adapted, it wraps the experts module twice: the update of ``gate_up_proj`` is at
``experts.base_layer``, that of ``down_proj`` at ``experts``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_kernels.layers import ModalityLora
from moe_kernels.models import adapters, experts, tokens
from moe_kernels.models.config import EXPERT_PROJECTIONS, TARGETS, ModalityLoraConfig
from moe_kernels.models.patch import PatchedModel

# Options of PEFT that change what a file means -> the one value that is understood.
_PLAIN = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none"}


def experts_A_to_peft(lora_A: Tensor) -> Tensor:
    """(E, r, in) -> (E*r, in)."""
    return lora_A.reshape(-1, lora_A.shape[-1])


def experts_B_to_peft(lora_B: Tensor) -> Tensor:
    """(E, out, r) -> (out, r*E)."""
    return lora_B.permute(1, 2, 0).reshape(lora_B.shape[1], -1)


def experts_A_from_peft(weight: Tensor, num_experts: int) -> Tensor:
    """(E*r, in) -> (E, r, in)."""
    return weight.reshape(num_experts, -1, weight.shape[-1])


def experts_B_from_peft(weight: Tensor, num_experts: int) -> Tensor:
    """(out, r*E) -> (E, out, r)."""
    return weight.reshape(weight.shape[0], -1, num_experts).permute(2, 0, 1)


def save_peft_adapter(patched: PatchedModel, modality: str, folder: str | Path) -> None:
    """Write the pairs of one modality as a folder that ``PeftModel.from_pretrained`` loads.

    PEFT knows no mask: its model is ours with every token in the modality.

    Raises:
        ValueError: an unknown modality, or a model with added tokens, whose rows PEFT's files do
            not hold.
    """
    index = _modality_index(patched, modality)
    if added := tokens.token_counts(patched.model):
        raise ValueError(f"PEFT's files do not hold added tokens, the model has {added}")
    tensors = {}
    for slot in _slots(patched.model):
        lora_A, lora_B = (getattr(slot.lora, name)[index].detach() for name in ("lora_A", "lora_B"))
        if slot.num_experts is not None:
            lora_A = experts_A_to_peft(lora_A.expand(slot.num_experts, -1, -1))
            lora_B = experts_B_to_peft(lora_B)
        tensors[f"{slot.name}.lora_A.weight"] = lora_A
        tensors[f"{slot.name}.lora_B.weight"] = lora_B
    text = json.dumps(_peft_config(patched), indent=2) + "\n"
    adapters.write(Path(folder), tensors, text, {"format": "pt"})


def load_peft_adapter(patched: PatchedModel, modality: str, folder: str | Path) -> None:
    """Copy what ``PeftModel.save_pretrained`` wrote into the pairs of one modality.

    Raises:
        ValueError: an unknown modality, options that we do not have, or another rank, scaling or
            set of projections; nothing of the model has changed then.
    """
    index = _modality_index(patched, modality)
    if patched.config.shared_A:
        raise ValueError("shared_A: PEFT's experts have one lora_A each")
    _check_config(patched.config, json.loads((Path(folder) / adapters.CONFIG_NAME).read_text()))
    with adapters.opened(Path(folder) / adapters.WEIGHTS_NAME) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    pairs = [(slot.lora, *_take(tensors, slot)) for slot in _slots(patched.model)]
    if tensors:
        raise ValueError(f"{len(tensors)} tensors fit no projection, such as {min(tensors)}")
    with torch.no_grad():
        for lora, lora_A, lora_B in pairs:
            lora.lora_A[index].copy_(lora_A)
            lora.lora_B[index].copy_(lora_B)


@dataclass(frozen=True)
class _Slot:
    """One projection: where PEFT keeps its pair, and where we do."""

    name: str
    lora: ModalityLora
    num_experts: int | None


def _slots(model: nn.Module) -> Iterator[_Slot]:
    names = {module: f"base_model.model.{name}" for name, module in model.named_modules()}
    layers = (module for module in model.modules() if hasattr(module, "modality_lora"))
    for layer in layers:
        module = experts.find_experts(layer)
        for projection, lora in layer.modality_lora.items():
            if projection in EXPERT_PROJECTIONS:
                suffix = ".base_layer" if projection == "gate_up_proj" else ""
                yield _Slot(names[module] + suffix, lora, getattr(module, projection).shape[0])
            else:
                yield _Slot(names[getattr(layer.self_attn, projection)], lora, None)


def _take(tensors: dict[str, Tensor], slot: _Slot) -> tuple[Tensor, Tensor]:
    """Remove a projection's pair from ``tensors`` and bring it into our layout."""
    pair = []
    for field, convert in (("lora_A", experts_A_from_peft), ("lora_B", experts_B_from_peft)):
        name = f"{slot.name}.{field}.weight"
        if name not in tensors:
            raise ValueError(f"the adapter lacks {name}")
        ours, weight = getattr(slot.lora, field), tensors.pop(name)
        flat = tuple(weight.shape)
        if slot.num_experts is not None and weight.numel() == ours[0].numel():
            weight = convert(weight, slot.num_experts)
        if weight.shape != ours.shape[1:]:
            raise ValueError(f"{name} is {flat}, which does not fit {tuple(ours.shape[1:])}")
        pair.append(weight)
    return tuple(pair)


def _modality_index(patched: PatchedModel, modality: str) -> int:
    modalities = patched.config.modalities
    if modality not in modalities:
        raise ValueError(f"the model is patched for {modalities}, not for {modality!r}")
    return modalities.index(modality)


def _peft_config(patched: PatchedModel) -> dict:
    config, model = patched.config, patched.model
    parameters = set()
    for layer in model.modules():
        if "gate_up_proj" in getattr(layer, "modality_lora", ()):
            module = experts.find_experts(layer)
            path = next(name for name, child in layer.named_modules() if child is module)
            parameters |= {f"{path}.{projection}" for projection in EXPERT_PROJECTIONS}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "target_modules": list(TARGETS["attention"])
        if "attention" in config.target_modules
        else [],
        "target_parameters": sorted(parameters) or None,
        "lora_dropout": 0.0,
        "inference_mode": True,
        **_PLAIN,
    }


def _check_config(config: ModalityLoraConfig, saved: dict) -> None:
    if saved.get("peft_type") != "LORA":
        raise ValueError(f"not a LoRA adapter of PEFT: peft_type is {saved.get('peft_type')!r}")
    for option, wanted in _PLAIN.items():
        if saved.get(option, wanted) != wanted:
            raise ValueError(f"an adapter with {option}={saved[option]!r} is not supported")
    if saved.get("modules_to_save"):
        raise ValueError(
            f"an adapter with modules_to_save={saved['modules_to_save']} is not supported"
        )
    ranks, alphas = saved.get("rank_pattern") or {}, saved.get("alpha_pattern") or {}
    known = {projection for target in config.target_modules for projection in TARGETS[target]}
    if unknown := (set(ranks) | set(alphas)) - known:
        raise ValueError(
            f"patterns other than {sorted(known)} are not supported: {sorted(unknown)}"
        )
    for projection in sorted(known):
        theirs = (ranks.get(projection, saved["r"]), alphas.get(projection, saved["lora_alpha"]))
        ours = (config.rank(projection), config.alpha(projection))
        if theirs != ours:
            raise ValueError(
                f"{projection}: the adapter has (r, lora_alpha) = {theirs}, the model {ours}"
            )

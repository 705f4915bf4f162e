"""Support of a model in a folder, found by its configuration alone: what is refused, and why."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from moe_kernels.files import why_no_folder
from moe_kernels.models import added_experts, memory
from moe_kernels.models.config import TARGETS, ExtensionConfig, ModalityLoraConfig
from moe_kernels.models.parts import find_parts, up_stack
from moe_kernels.models.patch import patch_model
from moe_kernels.models.routers import RoutingFinder

_YES = "supported"


def of_folder(folder: str | Path) -> dict[str, str | dict[str, str]]:
    """Return what :func:`moe_kernels.patch_model` gives the model in a folder, and what it takes.

    The model is built from ``config.json`` on the device meta, without weights.

    Args:
        folder: with a ``config.json`` of transformers.

    Returns:
        The class, family and layout of the model; "supported" or a reason for each target and for
        added experts; and the memory to train it on one card and on eight, by formula.

    Raises:
        ValueError: there is no such folder, or it has no configuration of a class of transformers.

    Example:
        >>> of_folder("gpt-oss-20b")["experts"]
        'supported'
    """
    if reason := why_no_folder(folder):
        raise ValueError(f"no model: {reason}")
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder} has no config.json of transformers: name a folder with one")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder} has no config.json of transformers: {error}") from error
    names = getattr(config, "architectures", None) or ["none"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(
            f"{folder}: config.json names the class {names[0]}, which transformers "
            f"{transformers.__version__} does not have"
        )
    with torch.device("meta"):
        model = model_class(config)
    return {"class": names[0]} | of_model(model)


def of_model(model: PreTrainedModel) -> dict[str, str | dict[str, str]]:
    """Return a model's layout, what is supported or why not, and the memory to train it.

    The model is as it was afterwards.
    """
    targets = _of_parts(model)
    supported = tuple(name for name in ("experts", "attention") if targets[name] == _YES)
    return {
        "family": model.config.model_type,
        "layout": _layout(model),
        **targets,
        "memory to train": _memory(model, supported),
    }


def _layout(model: PreTrainedModel) -> str:
    """Return in words which layers have which experts and attention."""
    try:
        parts = find_parts(model)
    except ValueError as error:
        return str(error)
    sparse = [each for each in parts if each.experts is not None]
    if not sparse:
        return f"{len(parts)} layers, none with stacked experts"
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    stacks = {
        f"{each.num_experts} {type(each.experts).__name__} {tuple(up_stack(each.experts).shape)}"
        for each in sparse
    }
    attention = {", ".join(each.attention) or type(each.self_attn).__name__ for each in parts}
    of_token = f", {chosen} a token" if isinstance(chosen, int) else ""
    return (
        f"{len(parts)} layers, {len(sparse)} with experts: {' or '.join(sorted(stacks))}{of_token};"
        f" attention {' or '.join(sorted(attention))}"
    )


def _memory(model: PreTrainedModel, targets: tuple[str, ...]) -> str | dict[str, str]:
    """Return the memory to train adapters on these targets, or why it is not estimated."""
    if not targets:
        return "not estimated: neither experts nor attention can be adapted"
    if problem := memory.why_no_estimate(model, find_parts(model)):
        return f"not estimated: {problem}"
    return memory.in_short(model, targets)


def _of_parts(model: PreTrainedModel) -> dict[str, str]:
    """Return "supported" or a reason for each target and for added experts."""
    found = {target: _of_targets(model, (target,)) for target in TARGETS}
    if (reason := _of_targets(model, ())) != _YES:
        return found | {"added experts": reason}
    patched = patch_model(model, ModalityLoraConfig(target_modules=()))
    extension = ExtensionConfig(dict.fromkeys(patched.moe_layers, 1), modality="image")
    try:
        added_experts.check(patched, extension, (), RoutingFinder())
        found["added experts"] = _YES
    except ValueError as error:
        found["added experts"] = str(error)
    patched.unpatch()
    return found


def _of_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> str:
    try:
        patch_model(model, ModalityLoraConfig(target_modules=targets)).unpatch()
    except (TypeError, ValueError) as error:
        return str(error)
    return _YES

"""Checks of what a model must have to be patched, all made before anything is changed."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_kernels.models import (
    dense,
    experts,
    forms,
    mixing,
    offload,
    prompts,
    quantisation,
    routers,
    sharding,
    tokens,
)
from moe_kernels.models.config import ModalityLoraConfig
from moe_kernels.models.handle import is_patched
from moe_kernels.models.instance_forward import has_own_forward
from moe_kernels.models.parts import (
    LayerParts,
    all_experts,
    find_decoder,
    find_experts,
    find_parts,
)
from moe_kernels.models.projections import (
    Projection,
    adapted_parts,
    check_patterns,
    find_projections,
)
from moe_kernels.models.routers import RoutingFinder


def check(
    model: nn.Module, config: ModalityLoraConfig, find: RoutingFinder
) -> tuple[Sequence[LayerParts], list[Projection]]:
    """Return the model's parts and the projections to adapt, after every check.

    Raises:
        TypeError, ValueError: those of :func:`moe_kernels.patch_model`.
    """
    name = type(model).__name__
    _check_kind(model, name)
    if not dense.has_experts(model):
        raise ValueError(f"{name} is not supported: {dense.problem(name)}")
    sharding.reshard(model)
    parts = find_parts(model)
    adapted = [each.layer for each in adapted_parts(config, parts)]
    if all(each.experts is None for each in parts):
        raise ValueError(f"{name} is not supported: {_why_not_stacked(parts)}")
    for index, each in enumerate(parts):
        targets = config.target_modules if each.layer in adapted else ()
        if reasons := _layer_problems(each, targets, find):
            raise ValueError(
                f"{name} is not supported: layer {index}: {'; '.join(reasons)}. docs/patching.md "
                "says which layouts are"
            )
    _check_backend(name, parts, config.backend)
    _check_spread(name, parts, config)
    size = model.get_input_embeddings().num_embeddings
    if outside := [each for ids in config.token_ids.values() for each in ids if each >= size]:
        raise ValueError(f"token_ids has {outside}: {name} has tokens 0..{size - 1}")
    _check_linear_layers(name, model)
    projections = find_projections(model, config, parts)
    if config.target_modules and not projections:
        raise ValueError(
            f"layers_to_transform {config.layers_to_transform} of {name} have none of "
            f"{config.target_modules}"
        )
    check_patterns(config, projections)
    return parts, projections


def _check_linear_layers(name: str, model: nn.Module) -> None:
    """Raise ValueError if text might change with pictures in a layer that gets no adapter."""
    dtype = model.get_input_embeddings().weight.dtype
    if problem := mixing.linear_problem(find_decoder(model), dtype):
        raise ValueError(f"{name} is not supported: {problem}")


def _check_backend(name: str, parts: Sequence[LayerParts], backend: str | None) -> None:
    """Raise ValueError unless the backend computes the forms of the experts, each tried once."""
    found = {forms.form_of(each.experts): each.experts for each in parts if each.experts}
    for each in found.values():
        if problem := experts.backend_problem(each, backend):
            raise ValueError(f"{name} is not supported: {type(each).__name__}: {problem}")


def _check_spread(name: str, parts: Sequence[LayerParts], config: ModalityLoraConfig) -> None:
    """Raise ValueError if experts are spread over ranks, and rows cannot carry their modality."""
    spread = any(each.experts and sharding.spread(each.experts) for each in parts)
    if spread and (problem := sharding.modalities_problem(len(config.modalities))):
        raise ValueError(f"{name}: {problem}")


def _check_kind(model: nn.Module, name: str) -> None:
    """Raise unless this is a plain language model of transformers; ``name`` is its class."""
    if isinstance(model, nn.Module) and (wrapper := prompts.prompt_around(model)):
        raise TypeError(
            f"{name} is or is within a {wrapper} of PEFT, whose prompt (prefix, prompt, p-tuning) "
            "has no modality: take its base (base = model.get_base_model()), let go of PEFT's "
            "model wherever it is held (del model, and a Trainer that has it), and patch the base; "
            "or load the base again"
        )
    if hasattr(model, "peft_config"):
        raise TypeError(
            f"{name} carries PEFT adapters: merge or unload them first "
            "(model = model.merge_and_unload()), then patch the plain model; or keep them, and let "
            "moe_kernels.accelerate_peft(model) compute those of experts"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"patch_model needs a transformers model, got {name}")
    if is_patched(model):
        raise ValueError(f"this {name} is already patched: unpatch() it first")
    if not model.can_generate() or model.get_output_embeddings() is None:
        heads = [f"model.{each}" for each in _children_with_heads(model)]
        advice = f": patch {' or '.join(heads)}" if heads else ""
        raise ValueError(f"{name} is not supported: it has no language-model head{advice}")
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(f"{name} is not supported: it does not generate token by token")
    if reasons := _table_problems(model):
        raise ValueError(f"{name} is not supported: {'; '.join(reasons)}")


def _children_with_heads(model: PreTrainedModel) -> list[str]:
    """Return the names of parts that are language models with experts, as Qwen3-Omni's thinker."""
    return [
        name
        for name, child in model.named_children()
        if isinstance(child, PreTrainedModel)
        and child.can_generate()
        and child.get_output_embeddings() is not None
        and find_experts(child) is not None
    ]


def _why_not_stacked(parts: Sequence[LayerParts]) -> str:
    """Return why no layer has experts that can be patched, though the model has some."""
    for index, each in enumerate(parts):
        for path, module in each.layer.named_modules():
            if path.rpartition(".")[2] == "experts":
                kind = type(module).__name__
                return (
                    f"layer {index}: {path} is {kind}, without a stacked gate_up_proj (E, 2I, H); "
                    "current classes of transformers stack experts, remote code may not"
                )
    return "no layer of its decoder has experts"


def _table_problems(model: PreTrainedModel) -> list[str]:
    """List why added tokens could not work."""
    if problem := sharding.problem(model):
        return [problem]  # the other reasons follow from it
    if problem := offload.problem(model):
        return [problem]
    reasons = []
    weight = getattr(model.get_input_embeddings(), "weight", torch.ones(1))
    if not sharding.whole_shape(weight).numel():
        reasons.append(
            "its embedding table is empty: its engine keeps it elsewhere; use FSDP2 (fully_shard)"
        )
    if has_own_forward(model):
        reasons.append("its forward was replaced (by accelerate's autocast?)")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, required in ((table, nn.Embedding), (head, nn.Linear)):
        found = sharding.plain_class(module)
        if found is not required and not (module is table and _reads_weight(table)):
            reasons.append(f"a {type(module).__name__} where nn.{required.__name__} is needed")
        elif problem := quantisation.weight_problem(module):
            reasons.append(f"its {'table' if module is table else 'head'} has {problem}")
        elif has_own_forward(module):
            reasons.append(f"its {required.__name__} has a forward of its own")
    return reasons


@torch.no_grad()
def _reads_weight(table: nn.Module) -> bool:
    """Return whether an embedding that scales or normalises rows does so with other rows too."""
    weight = offload.value(table, "weight") if isinstance(table, nn.Embedding) else None
    if weight is None or not weight.is_floating_point() or sharding.is_sharded(weight):
        return False
    if weight.is_meta:  # no values to try it with
        return True
    ids = torch.arange(min(4, table.num_embeddings), device=weight.device)
    other = torch.ones_like(weight[: len(ids)])
    try:
        expected, found = table(ids), tokens.embed(ids, table, weight)
        return torch.equal(expected, found) and not torch.equal(
            found, tokens.embed(ids, table, other)
        )
    except RuntimeError:
        return False


def _layer_problems(parts: LayerParts, targets: tuple[str, ...], find: RoutingFinder) -> list[str]:
    """List why a layer cannot take the mask, or adapters on these targets."""
    reasons = []
    if parts.experts is not None:
        reasons += experts.expert_problems(parts.experts)
        if len(several := all_experts(parts.layer)) > 1:
            reasons.append(
                f"several modules of experts ({', '.join(several)}), each for some of the tokens: "
                "only layers with one can be patched"
            )
        if "router" in targets and (problem := routers.problem(parts, find)):
            reasons.append(f'{problem} (leave "router" out of target_modules)')
    if "attention" in targets and parts.self_attn is not None:
        reasons += _attention_problems(parts)
    return reasons


def _attention_problems(parts: LayerParts) -> list[str]:
    """List why the projections of a layer's attention cannot be adapted."""
    if not parts.attention:
        linear = [n for n, m in parts.self_attn.named_children() if isinstance(m, nn.Linear)]
        return [
            f"self_attn is {type(parts.self_attn).__name__} with {', '.join(linear) or 'none'}, "
            "without q_proj, k_proj, v_proj and o_proj or those of latent attention (leave "
            '"attention" out of target_modules)'
        ]
    reasons = []
    for name, module in parts.attention.items():
        if problem := quantisation.class_problem(module, nn.Linear):
            reasons.append(f"self_attn.{name} is {problem}")
        elif problem := quantisation.weight_problem(module):
            reasons.append(f"self_attn.{name} has {problem}")
        elif has_own_forward(module):
            reasons.append(f"self_attn.{name} has a forward of its own")
    return reasons

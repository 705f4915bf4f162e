"""PEFT's LoRA on experts, computed by :func:`moe_kernels.ops.moe_mlp` from PEFT's own parameters.

``LoraConfig(target_parameters=[...])`` wraps an experts module, once for each adapted parameter, in
``peft.tuners.lora.layer.ParamWrapper``. In each forward that adds B A to all weights of all
experts, and in backward computes a gradient of all of them. The forward of the outermost wrapper
is replaced here: routed rows pass through A and B, and no weight is made or gets a gradient.
Everything else stays PEFT's.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from moe_kernels import extras, ops
from moe_kernels.models import sharding
from moe_kernels.models.context import MISSING, EndForward, ModalityContext
from moe_kernels.models.experts import expert_problems
from moe_kernels.models.forms import not_plain
from moe_kernels.models.instance_forward import has_own_forward
from moe_kernels.models.intact import is_wrapper
from moe_kernels.models.methods import NO_DATA_PARALLEL
from moe_kernels.models.peft_names import by_sequence, number_of_hooks
from moe_kernels.models.peft_pairs import read_pairs
from moe_kernels.ops import LoraWeights

_NOT_OURS = ("_forward_pre_hooks", "_backward_pre_hooks", "_backward_hooks")

_PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Stack:
    """Wrappers of PEFT around one experts module.

    Attributes:
        wrappers: all of them, the one that the model calls first.
        experts: the module within.
    """

    wrappers: tuple[nn.Module, ...]
    experts: nn.Module

    @property
    def outermost(self) -> nn.Module:
        """The wrapper that the model calls."""
        return self.wrappers[0]

    def attach(self, forward: "KernelForward") -> None:
        """Let ``forward`` compute them; adapters that are bound to a modality cannot be merged."""
        self.outermost.forward = forward
        self.outermost._replicate_for_data_parallel = _refuse_data_parallel
        if forward.modality_id is not None:
            for wrapper in self.wrappers:
                wrapper.merge = _refuse_merge

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        for wrapper in self.wrappers:
            wrapper.__dict__.pop("merge", None)
        for name in ("forward", "_replicate_for_data_parallel"):
            self.outermost.__dict__.pop(name, None)

    def problems(self) -> list[str]:
        """List why the kernels cannot compute these experts as PEFT does."""
        if is_wrapper(self.experts):
            return [f"within a {type(self.experts).__name__} of their own: put it around the layer"]
        found = expert_problems(self.experts) or not_plain(self.experts)
        names = [wrapper.parameter_name for wrapper in self.wrappers]
        if _has_own_forward(self.outermost):
            found.append("its forward was replaced (a device map?)")
        found += self.unseen()
        if unknown := sorted(set(names) - set(_PROJECTIONS)):
            found.append(f"adapters on {', '.join(unknown)}")
        if len(set(names)) < len(names):
            found.append("several wrappers of one parameter")
        weights = {name: getattr(self.experts, name, None) for name in _PROJECTIONS}
        computed = nn.utils.parametrize.is_parametrized
        found += [
            f"{n} is computed by a parametrization" for n in weights if computed(self.experts, n)
        ]
        found += [
            f"{name} trains beside its adapter"
            for name, weight in weights.items()
            if isinstance(weight, Tensor) and weight.requires_grad
        ]
        if any(wrapper.num_experts == 1 for wrapper in self.wrappers):
            found.append("a single expert, whose adapter PEFT lays out as that of a linear layer")
        own = self.experts.__dict__
        if own.get("_modality_lora") or own.get("_added_experts"):
            found.append(
                "adapters or added experts of patch_model beside those of PEFT: patch the base "
                "with ModalityLoraConfig(target_modules=()) before get_peft_model"
            )
        return found

    def unseen(self, by_sequence: bool = False) -> list[str]:
        """List what was put on modules within the outermost wrapper, which are not called.

        Args:
            by_sequence: PEFT has hooks on all wrappers, which hand down ``adapter_names``.
        """
        inner = [self.experts] if by_sequence else [*self.wrappers[1:], self.experts]
        return [f"hooks or a forward of its own on {type(m).__name__}" for m in inner if _calls(m)]

    def replaced(self) -> list[str]:
        """List the modules within the outermost wrapper that others have taken the places of."""
        places = itertools.pairwise((*self.wrappers, self.experts))
        return [
            f"{type(module).__name__} by {type(outer.base_layer).__name__}"
            for outer, module in places
            if outer.base_layer is not module
        ]

    def as_peft(self) -> bool:
        """Return whether PEFT computes them itself: adapters are merged, disabled or not active."""
        if any(each.disable_adapters or each.merged for each in self.wrappers):
            return True
        return not self.has_active()

    def has_active(self) -> bool:
        """Return whether any wrapper adds an adapter now."""
        return any(name in each.lora_A for each in self.wrappers for name in _active(each))

    def loras(self, groups: Sequence[Sequence[str]] | None) -> dict[str, LoraWeights]:
        """Return the arguments of ``moe_mlp`` for adapters that are summed in each group.

        None: one group, of those that are active in each wrapper.
        """
        dtype, arguments = self.experts.down_proj.dtype, {}
        if groups is None and not self.has_active():
            return {}
        for wrapper in self.wrappers:
            name = wrapper.parameter_name.replace("_proj", "_lora")
            arguments[name] = read_pairs(wrapper, groups or [_active(wrapper)], dtype)
        return arguments


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the modules with a wrapped stack of weights by the names of their outermost wrappers.

    Wrappers of matrices, such as a router's, are left to PEFT.
    """
    wrapper_class = extras.load("peft.tuners.lora.layer", "accelerate_peft").ParamWrapper
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate_peft needs a model of PEFT, got {type(model).__name__}")
    found, inner = {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, wrapper_class) or module in inner:
            continue
        wrappers, experts = [], module
        while isinstance(experts, wrapper_class):
            wrappers.append(experts)
            experts = experts.base_layer
        inner.update(wrappers)
        if any(len(sharding.whole_shape(wrapper.get_param())) == 3 for wrapper in wrappers):
            found[name] = Stack(tuple(wrappers), experts)
    return found


def _active(wrapper: nn.Module) -> Sequence[str]:
    """Return the names of the adapters that a wrapper adds now."""
    return () if wrapper.disable_adapters else wrapper.active_adapters


def _refuse_merge(*args, **kwargs) -> NoReturn:
    raise RuntimeError(
        "adapters that accelerate_peft has bound to a modality cannot be merged into weights that "
        "text uses too: text would change, and merging is not undone bit for bit"
    )


def _refuse_data_parallel() -> NoReturn:
    raise RuntimeError(
        "nn.DataParallel is not supported: its replicas would compute experts by the weights of "
        f"the model that was accelerated; {NO_DATA_PARALLEL}"
    )


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is not its class's alone."""
    return "_hf_hook" in module.__dict__ or has_own_forward(module)


def _calls(module: nn.Module) -> bool:
    """Return whether something of others runs when a module is called, beside its class's forward.

    The end of a forward of ``patch_model`` is ours: :class:`KernelForward` calls it.
    """
    if _has_own_forward(module) or any(number_of_hooks(module, kind) for kind in _NOT_OURS):
        return True
    if not number_of_hooks(module, "_forward_hooks"):
        return False
    return not all(isinstance(hook, EndForward) for hook in module._forward_hooks.values())


def is_accelerated(module: nn.Module) -> bool:
    """Return whether :func:`accelerate_peft` computes a wrapper of PEFT."""
    return isinstance(module.__dict__.get("forward"), KernelForward)


# --- forward


@dataclass(frozen=True, eq=False)
class KernelForward:
    """The forward of PEFT's outermost wrapper of an experts module.

    Attributes:
        stack: the wrappers and the module.
        modality_id: the modality that the adapters are bound to, or None.
        backend: of the kernels.
    """

    stack: Stack
    modality_id: int | None
    backend: str | None

    def __call__(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapter_names: Sequence[str] | None = None,
    ) -> Tensor:
        """Map (T, H), (T, K), (T, K) to (T, H)."""
        outermost, experts = self.stack.outermost, self.stack.experts
        # PEFT knows no mask: with one, nothing is left to it, and text has the same bits always.
        unmasked = self.modality_id is None
        disabled = outermost.disable_adapters
        if unmasked and (disabled or (adapter_names is None and self.stack.as_peft())):
            return type(outermost).forward(outermost, hidden_states, top_k_index, top_k_weights)
        self._check(adapter_names is not None)
        if adapter_names is None:
            groups, ids = None, torch.ones_like(top_k_index[:, 0], dtype=torch.int64)
        else:
            groups, ids = by_sequence(self.stack.wrappers, adapter_names, hidden_states)
        output = None
        try:
            output = ops.moe_mlp(
                hidden_states,
                top_k_index.to(torch.int64),
                top_k_weights,
                experts.gate_up_proj,
                experts.down_proj,
                modality_ids=self._within_modality(ids),
                backend=self.backend,
                **self.stack.loras(groups),
            )
        finally:
            for end in tuple(experts._forward_hooks.values()):
                end(experts, (), output)
        return output

    def _check(self, by_sequence: bool) -> None:
        """Raise RuntimeError if the experts were changed, or what is on them would be left out."""
        if replaced := self.stack.replaced():
            raise RuntimeError(
                f"within what accelerate_peft computes, {'; '.join(replaced)} was replaced, and "
                "the kernels would compute the old one: put it back, or undo()"
            )
        if problems := not_plain(self.stack.experts):
            raise RuntimeError(
                f"{type(self.stack.experts).__name__} was changed after accelerate_peft, and the "
                f"kernels do not compute it now: {'; '.join(problems)}; put it back, or undo()"
            )
        if unseen := self.stack.unseen(by_sequence):
            raise RuntimeError(
                f"{'; '.join(unseen)}, within what accelerate_peft computes, would be left out: "
                "remove it, put it on the wrapper or the layer (fully_shard too), or undo()"
            )

    def _within_modality(self, ids: Tensor) -> Tensor:
        """Return ids, -1 on padding and 0 on rows that are not of the modality."""
        if self.modality_id is None:
            return ids
        context: ModalityContext | None = self.stack.experts.__dict__.get("_modality_context")
        if context is None:
            raise RuntimeError(
                "the model was unpatched, and the adapters of PEFT that were bound to a modality "
                "would act on all tokens: undo() of accelerate_peft first"
            )
        if context.modality_ids is None:
            raise RuntimeError(MISSING)
        of_rows = context.modality_ids.reshape(-1)
        ids = torch.where(of_rows == self.modality_id, ids, 0)
        return torch.where(of_rows < 0, of_rows, ids)

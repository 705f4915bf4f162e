"""Groups of tensors that every implementation of ``moe_mlp`` takes or returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops.moe_mlp.packed import is_packed, unpack, unpacked_shape

# Fields of ExpertWeights that may take a gradient, in the order of the backward op's needs[2:].
TRAINABLE = (
    "extra_gate_up_proj",
    "extra_down_proj",
    "gate_up_A",
    "gate_up_B",
    "down_A",
    "down_B",
)


def check_scales(weights: "ExpertWeights") -> None:
    """Raise ValueError unless packed stacks, and no others, have scales."""
    for name in ("gate_up", "down"):
        stack, scales = getattr(weights, f"{name}_proj"), getattr(weights, f"{name}_scales")
        if is_packed(stack) != (scales is not None):
            needs = "needs" if scales is None else "takes no"
            raise ValueError(f"{name}_proj of {stack.dtype} {needs} {name}_scales")


def check_frozen_extra(frozen_extra: int, num_extra: int) -> None:
    """Raise ValueError unless ``frozen_extra`` is an integer from 0 to ``num_extra``."""
    if type(frozen_extra) is not int or not 0 <= frozen_extra <= num_extra:
        raise ValueError(f"frozen_extra must be an integer in 0..{num_extra}, got {frozen_extra!r}")


def is_transposed(stack: Tensor) -> bool:
    """Return whether a stack (E, n, k) is a view of one that is stored (E, k, n)."""
    return not stack.is_contiguous() and stack.transpose(1, 2).is_contiguous()


def _in_layout(tensor: Tensor, *, transposed: bool) -> Tensor:
    """Return ``tensor`` contiguous, or a transposed view of a contiguous one."""
    return (
        tensor.transpose(1, 2).contiguous().transpose(1, 2) if transposed else tensor.contiguous()
    )


class ExpertWeights(NamedTuple):
    """Weights of ``moe_mlp``: the frozen stack, added experts, low-rank pairs and a bias, or None.

    Shapes as in :func:`moe_kernels.ops.moe_mlp`; ``*_A``, ``*_B`` and ``*_scaling`` are the fields
    of ``LoraWeights``. The bias of the down projection is no matter of a backend. A frozen stack
    that is packed has ``*_scales``, see :class:`~moe_kernels.ops.moe_mlp.packed.PackedWeights`.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    extra_gate_up_proj: Tensor | None
    extra_down_proj: Tensor | None
    gate_up_A: Tensor | None
    gate_up_B: Tensor | None
    gate_up_scaling: Tensor | None
    down_A: Tensor | None
    down_B: Tensor | None
    down_scaling: Tensor | None
    gate_up_bias: Tensor | None
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Hidden and intermediate size, H and I."""
        return unpacked_shape(self.down_proj)[1:]

    @property
    def is_packed(self) -> bool:
        """True if a frozen stack is packed."""
        return self.gate_up_scales is not None or self.down_scales is not None

    @property
    def num_extra(self) -> int:
        """Number of added experts."""
        return 0 if self.extra_gate_up_proj is None else self.extra_gate_up_proj.shape[0]

    @property
    def num_experts(self) -> int:
        """Number of experts, added ones included."""
        return self.gate_up_proj.shape[0] + self.num_extra

    @property
    def num_modalities(self) -> int:
        """Number of added modalities that have a low-rank pair."""
        lora_a = self.gate_up_A if self.gate_up_A is not None else self.down_A
        return 0 if lora_a is None else lora_a.shape[0]

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of the gate_up and the down update; 0 where there is none."""
        return tuple(0 if a is None else a.shape[2] for a in (self.gate_up_A, self.down_A))

    def trainable(self) -> tuple[Tensor | None, ...]:
        """Return the fields named in :data:`TRAINABLE`, in its order."""
        return tuple(getattr(self, name) for name in TRAINABLE)

    def unpacked(self, dtype: torch.dtype) -> "ExpertWeights":
        """Return the same weights, a packed stack as a plain one of ``dtype``."""
        fields = {
            f"{name}_proj": unpack(getattr(self, f"{name}_proj"), scales, dtype)
            for name, scales in (("gate_up", self.gate_up_scales), ("down", self.down_scales))
            if scales is not None
        }
        return self._replace(**fields, gate_up_scales=None, down_scales=None)

    def in_compute_dtype(self, dtype: torch.dtype, *, adapters: bool = True) -> "ExpertWeights":
        """Contiguous, with added experts and adapters cast to ``dtype``, scaling to fp32.

        A frozen stack that is stored transposed or packed stays so. Added experts are never packed,
        and are stored transposed where the stack is.

        Args:
            dtype: of the computation. A frozen stack that is not packed must have it.
            adapters: False leaves ``*_A`` and ``*_B`` in their own dtype.
        """

        def convert(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if name.endswith("proj"):
                base = getattr(self, name.removeprefix("extra_"))
                if is_packed(base):
                    return (tensor if tensor is base else tensor.to(dtype)).contiguous()
                return _in_layout(tensor.to(base.dtype), transposed=is_transposed(base))
            if name.endswith(("scaling", "scales")):
                return tensor.float().contiguous()
            if name.endswith(("_A", "_B")) and not adapters:
                return tensor.contiguous()
            return tensor.to(dtype).contiguous()

        return ExpertWeights(*map(convert, self._fields, self))


class Saved(NamedTuple):
    """Tensors that a forward pass of ``moe_mlp`` keeps for the backward pass.

    The op returns them without rows where nothing is saved (:func:`nothing_saved`). Rows of the
    first three that nothing is computed for are zeros, so that every output of the op is a function
    of its inputs.

    Attributes:
        pre_act: (T*K, 2I or I), before the activation, in sorted order; columns in the order of the
            rows of gate_up_proj.
        u1: (T*K, r1), x A1^T, unscaled.
        u2: (T*K, r2), a A2^T, unscaled.
        perm: (T*K,), see :class:`moe_kernels.ops.Dispatch`.
        inv_perm: (T*K,).
        segment_offsets: (E*(M+1)+1,).
    """

    pre_act: Tensor
    u1: Tensor
    u2: Tensor
    perm: Tensor
    inv_perm: Tensor
    segment_offsets: Tensor


def nothing_saved(hidden_states: Tensor, topk_ids: Tensor, weights: ExpertWeights) -> Saved:
    """Return the fields of a forward pass that keeps nothing: tensors without rows."""
    widths = (weights.gate_up_proj.shape[1], *weights.ranks)
    rows = (hidden_states.new_empty(0, width) for width in widths)
    return Saved(*rows, *(topk_ids.new_empty(0) for _ in range(3)))

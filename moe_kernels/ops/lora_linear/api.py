"""Public functions ``linear_dispatch`` and ``lora_linear``: checks of the input, then the op."""

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks
from moe_kernels.ops.gradients import must_save
from moe_kernels.ops.lora_linear import autograd
from moe_kernels.ops.lora_linear.rows import LinearDispatch
from moe_kernels.ops.lora_weights import LoraWeights, check_linear_lora

_FROZEN = "the base layer is frozen and gets no gradient"


def linear_dispatch(
    modality_ids: Tensor, num_modalities: int, *, backend: str | None = None
) -> LinearDispatch:
    """Sort the rows of a linear layer by modality; layers on the same tokens can share them.

    Args:
        modality_ids: (T,) int, -1..M. On the CPU another value raises; on CUDA such a row gets no
            update, unless ``MOE_KERNELS_CHECK=1`` asks for the check.
        num_modalities: M, the number of added modalities.
        backend: that of the calls of ``lora_linear`` which take the result; see
            :func:`moe_kernels.backends.select`. None: the choice for float32 weights.

    Raises:
        TypeError: ids or a number of modalities of a wrong type.
        ValueError: a wrong rank, an id out of range, a negative number of modalities.
        RuntimeError: the named backend is not available.
    """
    checks.tensors(modality_ids=modality_ids)
    checks.integer("modality_ids", modality_ids)
    checks.ndim("modality_ids", modality_ids, 1)
    if not isinstance(num_modalities, (int, torch.SymInt)):
        raise TypeError(f"num_modalities must be int, got {type(num_modalities).__name__}")
    if num_modalities < 0:
        raise ValueError(f"num_modalities must be at least 0, got {num_modalities}")
    backend = backends.select(backend, modality_ids.device)
    return autograd.sort_rows(modality_ids.long(), num_modalities, backend)


def lora_linear(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoraWeights,
    *,
    modality_ids: Tensor | None = None,
    dispatched: LinearDispatch | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``x W^T + b``, plus ``s[m] (x A[m]^T) B[m]^T`` on the rows of modality m >= 1.

    Partial LoRA (arXiv 2401.16420) on a frozen linear layer. Rows of the base modality and of
    padding are the base layer's output, whatever the adapters are.

    Args:
        hidden_states: (..., in), any float; computed in the dtype of ``weight``.
        weight: (out, in), frozen.
        bias: (out,) or None, frozen.
        lora: ``lora_A`` (M, r, in), ``lora_B`` (M, out, r), in the base's dtype or float32.
        modality_ids: int, of the leading shape of ``hidden_states``, -1..M. None: the base path.
        dispatched: the result of :func:`moe_kernels.ops.linear_dispatch` for the modality ids and
            the backend, passed instead of ``modality_ids``; several layers can share it. Its
            values are checked where ``linear_dispatch`` checks those of ids.
        backend: see :func:`moe_kernels.backends.select`.

    Returns:
        (..., out) in the dtype of ``hidden_states``. There is no double backward
        and no forward mode.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong rank, shape, device or value; a base weight that requires grad.
        RuntimeError: the named backend is not available.
        NotImplementedError: a derivative in forward mode, or a second one, is asked for.
    """
    checks.tensors(hidden_states=hidden_states, weight=weight)
    checks.optional_tensors(bias=bias, modality_ids=modality_ids)
    checks.floating("hidden_states", hidden_states)
    checks.ndim("weight", weight, 2)
    checks.floating("weight", weight)
    if hidden_states.ndim == 0 or hidden_states.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states must be (..., {weight.shape[1]}), got {tuple(hidden_states.shape)}"
        )
    checks.device("weight", weight, hidden_states.device)
    checks.frozen("weight", weight, _FROZEN)
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],))
        checks.dtype("bias", bias, (weight.dtype,))
        checks.device("bias", bias, hidden_states.device)
        checks.frozen("bias", bias, _FROZEN)
    check_linear_lora("lora", lora, weight)

    leading = hidden_states.shape[:-1]
    if dispatched is not None:
        _check_dispatched(dispatched, modality_ids, hidden_states.device)
    elif modality_ids is not None:
        checks.integer("modality_ids", modality_ids)
        checks.shape("modality_ids", modality_ids, tuple(leading))
        checks.device("modality_ids", modality_ids, hidden_states.device)
    backend = backends.select(backend, hidden_states.device, weight.dtype)

    x = hidden_states.reshape(-1, weight.shape[1]).to(weight.dtype)
    if dispatched is None:
        ids = x.new_zeros(x.shape[0], dtype=torch.int64) if modality_ids is None else modality_ids
        num_modalities = lora.lora_A.shape[0]
        dispatched = autograd.sort_rows(ids.reshape(-1).long(), num_modalities, backend)
    save = must_save(x, *lora[:2])
    out = autograd.run(x, weight, bias, *dispatched, *lora, save, backend)
    return out.view(*leading, weight.shape[0]).to(hidden_states.dtype)


def _check_dispatched(
    dispatched: LinearDispatch, modality_ids: Tensor | None, device: torch.device
) -> None:
    """Raise unless ``dispatched`` has contiguous int64 tensors on ``device``.

    The op checks shapes and values.
    """
    if not isinstance(dispatched, LinearDispatch):
        raise TypeError(f"dispatched must be a LinearDispatch, got {type(dispatched).__name__}")
    if modality_ids is not None:
        raise ValueError("give modality_ids or dispatched, not both")
    for field, tensor in dispatched._asdict().items():
        name = f"dispatched.{field}"
        checks.tensors(**{name: tensor})
        checks.dtype(name, tensor, (torch.int64,))
        checks.device(name, tensor, device)
        checks.contiguous(name, tensor)

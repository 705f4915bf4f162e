"""Public function ``moe_mlp``: checks of shape and dtype, then the op."""

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks
from moe_kernels.ops.dispatch.api import check_modality_ids
from moe_kernels.ops.dtypes import acc_dtype, without_autocast
from moe_kernels.ops.gradients import in_dtype_of, must_save
from moe_kernels.ops.lora_weights import LoraWeights, check_expert_lora
from moe_kernels.ops.moe_mlp import autograd
from moe_kernels.ops.moe_mlp.activation import Activation, ExpertForm, expert_form
from moe_kernels.ops.moe_mlp.packed import PackedWeights
from moe_kernels.ops.moe_mlp.weights import check_frozen_extra

_FROZEN = "the experts of the base are frozen and get no gradient"


def moe_mlp(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor | PackedWeights,
    down_proj: Tensor | PackedWeights,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    modality_ids: Tensor | None = None,
    gate_up_lora: LoraWeights | None = None,
    down_lora: LoraWeights | None = None,
    extra_gate_up_proj: Tensor | None = None,
    extra_down_proj: Tensor | None = None,
    frozen_extra: int = 0,
    act: str | Activation = "silu",
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts, with masked low-rank updates.

    For a token x of modality m, routed to expert e with weight w, the term is w * y with::

        gate, up = x W_gate_up[e]^T + b_gate_up[e] + s1[m] (x A1[m, e]^T) B1[m, e]^T      (m >= 1)
        y        = a W_down[e]^T    + b_down[e]    + s2[m] (a A2[m, e]^T) B2[m, e]^T

    with a = silu(gate) * up or another activation, and without the last terms for m = 0 (Partial
    LoRA, arXiv 2401.16420). The output of a row of modality 0 is bitwise independent of every
    adapter and of the other rows. A padding row (modality -1) is not computed; its output is zeros.

    N below is 2I, the rows of gate and up, or I where ``act`` has no gate.

    Args:
        hidden_states: (T, H) in float32, bfloat16, float16 or float64; computed in the dtype of the
            weights.
        topk_ids: (T, K) int64, experts of each token, of 0..E+X-1.
        topk_weights: (T, K) float, their weights.
        gate_up_proj: (E, N, H), frozen: rows [gate; up], or see ``interleaved``. A transposed view
            of a stack that is stored (E, H, N) is read where it is, without a copy. Or packed:
            :class:`Nf4Weights` or :class:`Fp8Weights`, which are unpacked tile by tile in each
            pass. The results are those for the stack that ``dequantise()`` gives, on the CPU
            backends to the bit.
        down_proj: (E, H, I), frozen, of the same dtype. It may be a view of (E, I, H), or packed,
            too.
        gate_up_bias: (E+X, N), frozen, of the same dtype, those of added experts last. None: none.
        down_bias: (E+X, H), likewise. An Inf or NaN in it makes a row that chooses the expert NaN.
        modality_ids: (T,) int, -1..M. None: the base path and nothing else.
        gate_up_lora: update of ``gate_up_proj``, in the base's dtype or float32; see
            :class:`LoraWeights`. None: no update.
        down_lora: update of ``down_proj``, whose rank may differ.
        extra_gate_up_proj: (X, N, H), added trainable experts with ids E..E+X-1. No low-rank
            update applies to them. They are copied at each call unless they are laid out as the
            base is.
        extra_down_proj: (X, H, I), given together with ``extra_gate_up_proj``.
        frozen_extra: the first so many added experts are frozen. Their gradient is not computed; it
            is zeros in the tensor that holds the others'.
        act: the activation. A name is that of :class:`Activation` with a gate.
        interleaved: whether the rows of ``gate_up_proj`` are gate, up, gate, up, ... Then all that
            has N elements (bias, lora_B, added experts and gradients) is in this order.
        backend: see :func:`moe_kernels.backends.select`.

    Returns:
        (T, H) in the dtype of ``hidden_states``. Gradients exist for ``hidden_states``,
        ``topk_weights``, the low-rank weights and the added experts. There is no double
        backward and no forward mode.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong rank, shape, device or value; a base weight or a bias that requires
            grad.
        RuntimeError: the named backend is not available.
        NotImplementedError: a derivative in forward mode, or a second one, is asked for.

    Example:
        >>> import torch
        >>> from moe_kernels.ops import LoraWeights, moe_mlp
        >>> T, K, E, H, I, r = 6, 2, 4, 16, 24, 3
        >>> hidden_states, router_logits = torch.randn(T, H), torch.randn(T, E)
        >>> topk_weights, topk_ids = router_logits.softmax(-1).topk(K)
        >>> gate_up_proj, down_proj = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
        >>> lora = LoraWeights(torch.randn(1, E, r, H), torch.randn(1, E, 2 * I, r), torch.ones(1))
        >>> routed = hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj
        >>> modality_ids = torch.tensor([0, 0, 0, 1, 1, -1])  # text, an image, padding
        >>> out = moe_mlp(*routed, modality_ids=modality_ids, gate_up_lora=lora)
        >>> (out == moe_mlp(*routed, modality_ids=modality_ids)).all(-1)  # text keeps its bits
        tensor([ True,  True,  True, False, False,  True])

    The experts of gpt-oss, which are stored transposed::

        act = Activation("clamped_swiglu", alpha=1.702, limit=7.0, shift=1.0)
        out = moe_mlp(
            hidden_states, topk_ids, topk_weights,
            gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2),
            gate_up_bias=gate_up_proj_bias, down_bias=down_proj_bias,
            act=act, interleaved=True,
        )

    A base that stays in 4 bits::

        gate_up_proj, down_proj = quantise_nf4(gate_up_proj), quantise_nf4(down_proj)
        out = moe_mlp(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj)
    """
    form = expert_form(act, interleaved)
    plain = checks.once(
        _check, form, hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias,
        down_bias, modality_ids, extra_gate_up_proj, extra_down_proj, gate_up_lora, down_lora,
    )  # fmt: skip
    num_extra = 0 if extra_gate_up_proj is None else extra_gate_up_proj.shape[0]
    check_frozen_extra(frozen_extra, num_extra)
    if num_extra and frozen_extra == num_extra:
        extra_gate_up_proj, extra_down_proj = extra_gate_up_proj.detach(), extra_down_proj.detach()
    if modality_ids is not None:
        modality_ids = modality_ids.long()
        if gate_up_lora is None and down_lora is None:  # only padding matters
            modality_ids = modality_ids.clamp(max=0)
    backend = backends.select(backend, hidden_states.device, gate_up_proj.dtype)

    if modality_ids is None and not _trains(gate_up_lora, down_lora):
        gate_up_lora = down_lora = None  # no row has an adapter: the base path and nothing else
    gate_up_lora = gate_up_lora or (None, None, None)
    down_lora = down_lora or (None, None, None)
    inputs = (
        in_dtype_of(hidden_states, gate_up_proj),
        topk_weights,
        extra_gate_up_proj,
        extra_down_proj,
        *gate_up_lora,
        *down_lora,
    )
    save = must_save(*inputs)
    (gate_up, gate_up_scales), (down, down_scales) = map(_stored, (gate_up_proj, down_proj))
    out = autograd.run(
        inputs[0], topk_ids, topk_weights, gate_up, down, modality_ids, *inputs[2:], gate_up_bias,
        gate_up_scales, down_scales,
        frozen_extra=frozen_extra, form=form, save_for_backward=save, backend=backend, plain=plain,
    )  # fmt: skip
    if down_bias is not None:
        biases = down_bias[: gate_up_proj.shape[0]], down_bias[gate_up_proj.shape[0] :]
        out = _add_down_bias(out, topk_ids, topk_weights, modality_ids, biases)
    return in_dtype_of(out, hidden_states)


def _stored(weights: Tensor | PackedWeights) -> tuple[Tensor, Tensor | None]:
    """Return a frozen stack and its scales, as the registered op takes them."""
    if isinstance(weights, PackedWeights):
        return weights.stack, weights.scales
    return weights, None


def _add_down_bias(
    out: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    modality_ids: Tensor | None,
    biases: tuple[Tensor, Tensor],
) -> Tensor:
    """Add the sum of each token's weighted biases, in float32, or float64 for float64.

    The biases of frozen experts and of added ones are a product of T rows each: a row's bits depend
    neither on the routing of others nor on experts that it does not choose. A product would carry a
    NaN or infinity to every row, so that zeros take its place: only a row that chooses the expert
    becomes NaN. Experts out of range match none.
    """
    acc, number = acc_dtype(out.dtype), sum(map(len, biases))
    valid = (topk_ids >= 0) & (topk_ids < number)
    if modality_ids is not None:
        valid = valid & (modality_ids >= 0)[:, None]
    ids = torch.where(valid, topk_ids, number)
    with without_autocast(out.device):
        shares = _shares(ids, topk_weights.to(acc), number)
        total, sound = out.to(acc), []
        for bias, share in zip(biases, shares.split([*map(len, biases), 1], 1)[:2], strict=True):
            finite = bias.isfinite()
            total = total + share @ torch.where(finite, bias, 0).to(acc)
            sound.append(finite.all(1))
    sound = torch.cat([*sound, sound[0].new_ones(1)])[ids].all(1)
    return torch.where(sound[:, None], total, torch.nan).to(out.dtype)


def _shares(ids: Tensor, weights: Tensor, number: int) -> Tensor:
    """Return the weight (T, number + 1) of each expert in each row, for ids 0..number (T, K).

    A row writes one element at a time, since sums of several would need atomics on a GPU, where a
    token may choose an expert twice.
    """
    total = weights.new_zeros(ids.shape[0], number + 1)
    for k in range(ids.shape[1]):
        column = slice(k, k + 1)
        total = total + torch.zeros_like(total).scatter(1, ids[:, column], weights[:, column])
    return total


def _trains(*loras: LoraWeights | None) -> bool:
    """Return whether an adapter needs a gradient, which is zeros where no row uses the adapter."""
    return must_save(*(tensor for lora in loras if lora is not None for tensor in lora[:2]))


def _check(
    form: ExpertForm,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor | PackedWeights,
    down_proj: Tensor | PackedWeights,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    modality_ids: Tensor | None,
    extra_gate_up_proj: Tensor | None,
    extra_down_proj: Tensor | None,
    gate_up_lora: LoraWeights | None,
    down_lora: LoraWeights | None,
) -> None:
    checks.tensors(hidden_states=hidden_states, topk_ids=topk_ids, topk_weights=topk_weights)
    for name, stack in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not isinstance(stack, PackedWeights):
            checks.tensors(**{name: stack})
    checks.optional_tensors(
        gate_up_bias=gate_up_bias, down_bias=down_bias, modality_ids=modality_ids,
        extra_gate_up_proj=extra_gate_up_proj, extra_down_proj=extra_down_proj,
    )  # fmt: skip
    _check_base(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, form)
    _check_extra(extra_gate_up_proj, extra_down_proj, gate_up_proj, down_proj)
    num_extra = 0 if extra_gate_up_proj is None else extra_gate_up_proj.shape[0]
    _check_bias("gate_up_bias", gate_up_bias, gate_up_proj, num_extra)
    _check_bias("down_bias", down_bias, down_proj, num_extra)
    _check_loras(gate_up_lora, down_lora, gate_up_proj, down_proj)
    if modality_ids is not None:
        check_modality_ids(modality_ids, hidden_states.shape[0], hidden_states.device)


def _check_base(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor | PackedWeights,
    down_proj: Tensor | PackedWeights,
    form: ExpertForm,
) -> None:
    checks.ndim("hidden_states", hidden_states, 2)
    checks.floating("hidden_states", hidden_states)
    if isinstance(gate_up_proj, Tensor):
        checks.ndim("gate_up_proj", gate_up_proj, 3)
    checks.floating("gate_up_proj", gate_up_proj)
    num_experts, rows, hidden = gate_up_proj.shape
    if hidden_states.shape[1] != hidden or rows % form.factor or num_experts == 0:
        raise ValueError(
            f"gate_up_proj must be (E, {'2I' if form.gated else 'I'}, {hidden_states.shape[1]}) "
            f"for hidden_states {tuple(hidden_states.shape)}, got {tuple(gate_up_proj.shape)}"
        )
    checks.shape("down_proj", down_proj, (num_experts, hidden, rows // form.factor))
    checks.dtype("down_proj", down_proj, (gate_up_proj.dtype,))
    checks.ndim("topk_ids", topk_ids, 2)
    checks.dtype("topk_ids", topk_ids, (torch.int64,))
    checks.shape("topk_ids", topk_ids, (hidden_states.shape[0], topk_ids.shape[1]))
    if topk_ids.shape[1] == 0:
        raise ValueError("topk_ids must have at least one expert a token, got top-k 0")
    checks.shape("topk_weights", topk_weights, tuple(topk_ids.shape))
    checks.floating("topk_weights", topk_weights)
    for name, stack in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if isinstance(stack, PackedWeights):
            stack.check_frozen(f"{name}.")
        else:
            checks.frozen(name, stack, _FROZEN)
    for name, tensor in (
        ("topk_ids", topk_ids),
        ("topk_weights", topk_weights),
        ("gate_up_proj", gate_up_proj),
        ("down_proj", down_proj),
    ):
        checks.device(name, tensor, hidden_states.device)


def _check_extra(
    extra_gate_up_proj: Tensor | None,
    extra_down_proj: Tensor | None,
    gate_up_proj: Tensor | PackedWeights,
    down_proj: Tensor | PackedWeights,
) -> None:
    if (extra_gate_up_proj is None) != (extra_down_proj is None):
        raise ValueError("extra_gate_up_proj and extra_down_proj must be given together")
    if extra_gate_up_proj is None:
        return
    checks.ndim("extra_gate_up_proj", extra_gate_up_proj, 3)
    num_extra = extra_gate_up_proj.shape[0]
    for name, extra, base in (
        ("extra_gate_up_proj", extra_gate_up_proj, gate_up_proj),
        ("extra_down_proj", extra_down_proj, down_proj),
    ):
        checks.shape(name, extra, (num_extra, *base.shape[1:]))
        allowed = (base.dtype,) if base.dtype == torch.float64 else (base.dtype, torch.float32)
        checks.dtype(name, extra, allowed)
        checks.device(name, extra, base.device)


def _check_bias(
    name: str, bias: Tensor | None, stack: Tensor | PackedWeights, num_extra: int
) -> None:
    if bias is None:
        return
    checks.shape(name, bias, (stack.shape[0] + num_extra, stack.shape[1]))
    checks.dtype(name, bias, (stack.dtype,))
    checks.device(name, bias, stack.device)
    checks.frozen(name, bias, _FROZEN)


def _check_loras(
    gate_up_lora: LoraWeights | None,
    down_lora: LoraWeights | None,
    gate_up_proj: Tensor | PackedWeights,
    down_proj: Tensor | PackedWeights,
) -> None:
    counts = []
    for name, lora, weight in (
        ("gate_up_lora", gate_up_lora, gate_up_proj),
        ("down_lora", down_lora, down_proj),
    ):
        if lora is not None:
            check_expert_lora(name, lora, weight)
            counts.append(lora.lora_A.shape[0])
    if counts and counts[0] != counts[-1]:
        raise ValueError(
            f"gate_up_lora and down_lora must have the same number of modalities, got {counts}"
        )

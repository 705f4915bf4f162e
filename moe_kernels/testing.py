"""Parts that tests and benchmarks share: tolerances, makers of routing and inputs, named shapes.

And a tiny model with its tokenizer, with which the examples in docstrings run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops.lora_weights import LoraWeights

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

# Relative RMS errors that rounding alone can cause: about 4 times the errors of correct kernels.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}


def working_backends(device: str = "cpu") -> list[str]:
    """List the backends that work for tensors on this device, on this machine."""
    working = []
    for name in backends.NAMES:
        try:
            working.append(backends.select(name, torch.device(device)))
        except RuntimeError:
            continue
    return working


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected|| in float64; inf where it is not finite.

    Where ``expected`` is zeros, the result is 0.0 for exact zeros and inf otherwise.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    error, size = (actual - expected).norm().item(), expected.norm().item()
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    ratio = error / size
    return ratio if ratio == ratio else float("inf")


def assert_close(
    actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None, name: str = "tensor"
) -> None:
    """Fail unless shapes are equal and the relative RMS error is within ``TOLERANCES``.

    Args:
        actual: the tensor to check.
        expected: the reference, usually float64.
        dtype: the dtype that ``actual`` was computed in; default: its own.
        name: the tensor's name in the message.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}")
    error, limit = relative_rms(actual, expected), TOLERANCES[dtype or actual.dtype]
    if not error <= limit:
        raise AssertionError(f"{name}: relative RMS error {error:.2e} is above {limit:.1e}")


@dataclass(frozen=True)
class Shape:
    """Sizes of a MoE layer: T tokens, top-k K, E experts, H hidden, I intermediate."""

    T: int
    K: int
    E: int
    H: int
    I: int  # noqa: E741
    r: int = 16


SHAPES = {
    "tiny": Shape(T=13, K=2, E=4, H=8, I=6, r=3),
    "odd": Shape(T=37, K=3, E=5, H=41, I=19, r=5),
    "small": Shape(T=200, K=4, E=16, H=128, I=64, r=8),
    "bits": Shape(T=200, K=2, E=8, H=512, I=256, r=16),
    "one_layer": Shape(T=2048, K=4, E=32, H=1024, I=512),
    "olmoe": Shape(T=1024, K=8, E=64, H=2048, I=1024),
    "qwen3": Shape(T=1024, K=8, E=128, H=2048, I=768),
    "deepseek": Shape(T=1024, K=6, E=64, H=2048, I=1408),  # V2-Lite
    "mixtral": Shape(T=1024, K=2, E=8, H=4096, I=14336),
}


def make_routing(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    kind: str = "balanced",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Make ``topk_ids`` (T, K) int64 and ``topk_weights`` (T, K) float32 that sum to 1.

    Args:
        num_tokens: T.
        top_k: K.
        num_experts: E.
        kind: "balanced" (uniform, distinct experts), "zipf" (skewed, distinct), "one_expert" (all
            rows on the last expert), "repeated" (one expert in all slots of a token) or
            "half_empty" (only the first half of the experts).
        generator: source of randomness.
    """
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if kind == "zipf":
        scores = scores.log() * torch.arange(1, num_experts + 1)
    if kind == "half_empty":
        scores[:, max(top_k, num_experts // 2) :] = -1
    if kind == "one_expert":
        ids = torch.full((num_tokens, top_k), num_experts - 1)
    elif kind == "repeated":
        ids = scores.argmax(-1, keepdim=True).expand(-1, top_k).contiguous()
    else:
        ids = scores.topk(top_k, dim=-1).indices
    weights = torch.rand(num_tokens, top_k, generator=generator).add_(0.1)
    return ids, weights / weights.sum(-1, keepdim=True)


def make_modality_ids(
    num_tokens: int,
    num_modalities: int = 1,
    *,
    kind: str = "mixed",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Make (T,) int64 ids.

    ``kind`` is "mixed" (with padding), "no_padding", "text", "image" or "padding".
    """
    if kind in ("text", "image", "padding"):
        return torch.full((num_tokens,), {"text": 0, "image": 1, "padding": -1}[kind])
    low = -1 if kind == "mixed" else 0
    return torch.randint(low, num_modalities + 1, (num_tokens,), generator=generator)


class MoeInputs(NamedTuple):
    """Arguments of ``moe_mlp``: positional ones first, then its keywords."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    modality_ids: Tensor | None
    gate_up_lora: LoraWeights | None
    down_lora: LoraWeights | None
    extra_gate_up_proj: Tensor | None
    extra_down_proj: Tensor | None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def keywords(self) -> dict:
        """Return the keyword arguments."""
        return {name: getattr(self, name) for name in self._fields[5:]}

    def differentiable(self) -> dict[str, Tensor]:
        """Return every tensor that can take a gradient, by name."""
        loras = [
            (f"{name}.{field}", getattr(lora, field))
            for name in ("gate_up_lora", "down_lora")
            if (lora := getattr(self, name)) is not None
            for field in ("lora_A", "lora_B")
        ]
        names = ("hidden_states", "topk_weights", "extra_gate_up_proj", "extra_down_proj")
        tensors = [(name, getattr(self, name)) for name in names]
        return {name: tensor for name, tensor in tensors + loras if tensor is not None}

    def to(self, dtype: torch.dtype, *, lora_dtype: torch.dtype | None = None) -> MoeInputs:
        """Return a detached copy with floats cast to ``dtype`` (adapters to ``lora_dtype``)."""

        def cast(tensor, to):
            return tensor.detach().clone().to(to) if tensor.is_floating_point() else tensor

        def convert(value):
            if isinstance(value, LoraWeights):
                pair = (cast(t, lora_dtype or dtype) for t in value[:2])
                return LoraWeights(*pair, value.scaling)
            return None if value is None else cast(value, dtype)

        return MoeInputs(*(convert(value) for value in self))

    def requires_grad_(self) -> MoeInputs:
        """Make every differentiable tensor require grad, in place."""
        for tensor in self.differentiable().values():
            tensor.requires_grad_()
        return self


def make_moe_inputs(
    shape: Shape,
    *,
    seed: int = 0,
    routing: str = "balanced",
    modality: str | None = "mixed",
    num_modalities: int = 1,
    num_extra: int = 0,
    shared_a: bool = False,
    ranks: tuple[int, int] | None = None,
    gated: bool = True,
    bias: bool = False,
    transposed: bool = False,
) -> MoeInputs:
    """Make random float64 inputs of ``moe_mlp`` whose outputs have unit size.

    Args:
        shape: sizes.
        seed: seed of all randomness.
        routing: see :func:`make_routing`.
        modality: see :func:`make_modality_ids`; None: no modality ids.
        num_modalities: M.
        num_extra: X, added experts.
        shared_a: one A for all experts.
        ranks: of gate_up and down; 0: no update; default: the shape's rank for both.
        gated: whether there are rows of gate beside those of up.
        bias: whether both projections have one.
        transposed: whether the frozen stacks are views of (E, in, out).
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) / fan_in**0.5

    def lora(rank: int, out: int, inner: int) -> LoraWeights | None:
        if rank == 0:
            return None
        a = randn(num_modalities, 1 if shared_a else shape.E, rank, inner, fan_in=inner)
        b = randn(num_modalities, shape.E, out, rank, fan_in=rank)
        return LoraWeights(a, b, torch.rand(num_modalities, generator=generator) + 0.5)

    ids, weights = make_routing(
        shape.T, shape.K, shape.E + num_extra, kind=routing, generator=generator
    )
    modality_ids = None
    if modality is not None:
        modality_ids = make_modality_ids(
            shape.T, num_modalities, kind=modality, generator=generator
        )
    rank1, rank2 = ranks if ranks is not None else (shape.r, shape.r)
    hidden, inter = shape.H, shape.I
    rows = 2 * inter if gated else inter

    def stack(number: int, out: int, inner: int) -> Tensor:
        weight = randn(number, out, inner, fan_in=inner)
        return weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight

    return MoeInputs(
        hidden_states=randn(shape.T, hidden),
        topk_ids=ids,
        topk_weights=weights.double(),
        gate_up_proj=stack(shape.E, rows, hidden),
        down_proj=stack(shape.E, hidden, inter),
        modality_ids=modality_ids,
        gate_up_lora=lora(rank1, rows, hidden),
        down_lora=lora(rank2, hidden, inter),
        extra_gate_up_proj=randn(num_extra, rows, hidden, fan_in=hidden) if num_extra else None,
        extra_down_proj=randn(num_extra, hidden, inter, fan_in=inter) if num_extra else None,
        gate_up_bias=randn(shape.E + num_extra, rows) if bias else None,
        down_bias=randn(shape.E + num_extra, hidden) if bias else None,
    )


def tiny_model(seed: int = 0) -> MixtralForCausalLM:
    """Make a Mixtral of 2 layers, 4 experts and 64 tokens, with random weights, on the CPU.

    Args:
        seed: of the weights; the global generators are left as they were.

    Example:
        >>> from moe_kernels.testing import tiny_model
        >>> sum(parameter.numel() for parameter in tiny_model().parameters())
        13520
    """
    import transformers  # which takes seconds to import: programs on the ops alone do without it

    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return transformers.MixtralForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer for :func:`tiny_model`, which knows the words of a few captions.

    Example:
        >>> from moe_kernels.testing import tiny_tokenizer
        >>> tiny_tokenizer()("a red apple").input_ids
        [2, 3, 5]
    """
    import tokenizers
    import transformers

    words = ("<pad>", "<unknown>", "a", "red", "green", "apple", "leaf")
    known = {word: index for index, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unknown>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")

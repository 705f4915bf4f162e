"""Whole models whose training steps are timed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from lib.cases import DTYPES, Case
from lib.memory import peak_bytes
from lib.runs import Options
from lib.timing import now
from moe_kernels.testing import Shape, relative_rms

# Relative RMS between the logits of two models. In bfloat16 a router at a tie may choose another
# expert.
_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Settings:
    """A model and its batch; the image follows the text in every sequence."""

    name: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    experts: int
    experts_per_token: int
    batch: int
    length: int
    image_share: float
    r: int = 16
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def experts_case(self) -> Case:
        """One layer's experts."""
        shape = Shape(
            self.tokens, self.experts_per_token, self.experts, self.hidden_size,
            self.intermediate_size, self.r,
        )  # fmt: skip
        return Case(self.name, shape, self.dtype)


MODELS = {
    # The model and batches of `moe-kernels demo`: a caption, then 49 codes and two delimiters.
    "demo": Settings("demo", "float32", 1090, 128, 64, 4, 4, 16, 4, 16, 56, 51 / 56),
    # Two of OLMoE's 16 layers, and an eighth of its vocabulary, so that the head keeps its share.
    "olmoe": Settings("olmoe", "bfloat16", 50304 // 8, 2048, 1024, 2, 16, 64, 8, 1, 256, 0.5),
    # All of OLMoE, for a GPU: the model takes 14 GB, and so does PEFT's copy.
    "olmoe-1b-7b": Settings(
        "olmoe-1b-7b", "bfloat16", 50304, 2048, 1024, 16, 16, 64, 8, 4, 2048, 0.5,
        checkpointing=True,
    ),
    "tiny": Settings("tiny", "float32", 64, 32, 16, 2, 4, 4, 2, 2, 16, 0.5, 4),  # for tests
}  # fmt: skip


def make_batch(settings: Settings, device: str) -> tuple[Tensor, Tensor]:
    """Return token ids and modality ids, each (batch, length)."""
    ids = torch.randint(0, settings.vocab_size, (settings.batch, settings.length), device=device)
    mask = torch.zeros_like(ids)
    mask[:, settings.length - round(settings.length * settings.image_share) :] = 1
    return ids, mask


def make_model(settings: Settings, device: str) -> PreTrainedModel:
    """Return a model with random weights, on transformers' grouped_mm, in training mode."""
    config = OlmoeConfig(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        num_experts=settings.experts, num_experts_per_tok=settings.experts_per_token,
        norm_topk_prob=True, max_position_embeddings=max(512, settings.length), use_cache=False,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[settings.dtype])
    try:
        with torch.device(device):
            model = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.set_experts_implementation("grouped_mm")
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def time_step(
    model: nn.Module, parameters: list[Tensor], device: str, *, fused: bool = False, **batch: Tensor
) -> Callable[[], dict[str, float]]:
    """Return a function that runs forward, backward and AdamW and returns the seconds it took."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused)

    def step() -> dict[str, float]:
        started = now(device)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"step": now(device) - started}

    return step


def logits_error(actual: Tensor, expected: Tensor, dtype: str) -> str | None:
    """Describe a difference between the logits of two models of a dtype, or return None."""
    error, limit = relative_rms(actual, expected), _LIMITS[dtype]
    return None if error <= limit else f"logits: relative RMS {error:.1e} is above {limit:.1e}"


def measure_steps(
    settings: Settings, steps: Mapping[str, Callable[[], dict[str, float]]], options: Options,
    device: str, seed: int, *, errors: Mapping[str, str | None], peak: bool,
) -> dict:  # fmt: skip
    """Return a record as :func:`lib.runs.run_training` does, with the mode "step".

    Args:
        errors: what is wrong with our providers, or None.
        peak: whether to measure the "peak" bytes of a step above those before it.
    """
    for step in steps.values():
        step()  # the optimizer makes its state
    peaks = {name: peak_bytes(step, device) if peak else None for name, step in steps.items()}
    samples = options.measure(steps)
    return {
        "case": asdict(settings) | {"tokens": settings.tokens, "device": device, "seed": seed},
        "providers": {
            name: {
                "error": errors.get(name),
                "seconds": samples[name],
                "peak": peaks[name],
            }
            for name in steps
        },
    }

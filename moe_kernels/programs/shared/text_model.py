"""A small language model trained on Python's own documentation.

Programs start from it when no pretrained model is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from moe_kernels.programs.shared.stages import Workspace
from moe_kernels.programs.shared.texts import documentation, text_blocks
from moe_kernels.programs.shared.training import mean_nll, train


@dataclass(frozen=True)
class TextModelSettings:
    """Settings of an OLMoE; with ``experts`` 0, of a dense Llama."""

    seed: int = 0
    device: str = "cpu"
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    experts_per_token: int = 4
    intermediate_size: int = 64
    text_steps: int = 600
    text_batch: int = 8
    text_block: int = 128
    text_learning_rate: float = 2e-3


# Sizes for trials.
QUICK_TEXT_MODEL = {
    "vocab_size": 320, "hidden_size": 64, "layers": 2, "experts": 8, "experts_per_token": 2,
    "intermediate_size": 32, "text_steps": 20, "text_block": 64,
}  # fmt: skip


def train_text_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text], vocab_size, min_frequency=0, special_tokens=["<pad>"], show_progress=False
    )
    bpe = tokenizers.Tokenizer.from_str(bpe.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>")


def labelled(rows: Iterable[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def text_config(
    settings: TextModelSettings, tokenizer: PreTrainedTokenizerFast
) -> PretrainedConfig:
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    if not settings.experts:
        return LlamaConfig(**sizes)
    return OlmoeConfig(
        num_experts=settings.experts, num_experts_per_tok=settings.experts_per_token,
        norm_topk_prob=True, **sizes,
    )  # fmt: skip


def start_text_model(
    settings: TextModelSettings, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(text_config(settings, tokenizer))
    if settings.experts:
        model.set_experts_implementation("grouped_mm")
        # This adds the balance loss, so that no expert stays idle.
        model.config.output_router_logits = True
    return model


def pretrain(settings: TextModelSettings, workspace: Workspace, more: str = "") -> dict[str, Any]:
    """Train a model and its tokenizer, saved in the folder ``model``; more: another text."""
    texts = documentation()
    tokenizer = train_text_tokenizer(texts["train"] + more, settings.vocab_size)
    block = settings.text_block
    blocks = text_blocks(tokenizer, texts["train"], block, block // 4)
    if more:
        blocks = torch.cat([blocks, text_blocks(tokenizer, more, block, block)])
    held_out = labelled(text_blocks(tokenizer, texts["test"], block, block).split(32))
    model = start_text_model(settings, tokenizer)
    history = train(
        model, labelled(blocks), lambda model: mean_nll(model, held_out), workspace,
        max_steps=settings.text_steps, per_device_train_batch_size=settings.text_batch,
        learning_rate=settings.text_learning_rate, warmup_steps=settings.text_steps // 10,
        weight_decay=0.1, seed=settings.seed, use_cpu=settings.device == "cpu",
    )  # fmt: skip
    if settings.experts:
        model.config.output_router_logits = False
    model.save_pretrained(workspace.folder / "model")
    tokenizer.save_pretrained(workspace.folder / "model")
    return {"history": history, "tokens_per_second": history["samples_per_second"] * block}


def load_text_model(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").to(device).eval()
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("grouped_mm")
    return model, PreTrainedTokenizerFast.from_pretrained(folder / "model")

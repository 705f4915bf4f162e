"""Parts of a run that teaches a text model to draw: starts, drawings, routing and redundancy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from moe_kernels import imaging
from moe_kernels.analysis import ExpertRedundancy, expert_redundancy
from moe_kernels.init.rows import initial_rows
from moe_kernels.models import initialise_lora
from moe_kernels.models.tokens import ROWS
from moe_kernels.programs.shared.models import count_experts
from moe_kernels.programs.shared.pictures import TokenizedPictures
from moe_kernels.programs.shared.text_to_image import Painter, record_routing


def describe_model(folder: Path, name: str) -> dict[str, Any]:
    """Return a model's name and sizes, for the JSON."""
    config = AutoConfig.from_pretrained(folder)
    return {
        "name": name, "layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "experts": count_experts(config), "top_k": config.num_experts_per_tok,
    }  # fmt: skip


# --- starts


def row_start(
    run: Any, tokenizer: imaging.ImageTokenizer, pictures: TokenizedPictures
) -> dict[str, Any]:
    """Return the keywords of ``add_modality_tokens`` that say how a run's added rows start."""
    if run.init not in ("gromov_wasserstein", "permuted"):
        return {"init": run.init}
    return {
        "init": run.init, "features": tokenizer.codebook, "num_delimiters": 2,
        "frequencies": tokenizer.codebook_usage(pictures.codes), "solver": run.solver,
        "feature_metric": run.feature_metric, "row_metric": run.row_metric,
    }  # fmt: skip


def restart_rows(model: PreTrainedModel, where: str, seed: int) -> None:
    """Restart the added rows of "embedding" or "head" as "normal" does."""
    is_head = where == "head"
    module = model.get_output_embeddings() if is_head else model.get_input_embeddings()
    rows = getattr(module, ROWS)["image"]
    torch.manual_seed(seed)
    start, _ = initial_rows(module.weight.detach(), num_tokens=len(rows), init="normal")
    rows.data.copy_(start)


def start_adapters(
    painter: Painter, blocks: torch.Tensor, pictures: TokenizedPictures, lora_init: str, seed: int
) -> None:
    """Start the adapters by some text and some pictures, see :func:`initialise_lora`."""
    text = [{"input_ids": ids} for ids in blocks[:8].split(4)]
    rows = text + without_labels(painter.batches(pictures.head(16), 4))
    initialise_lora(painter.model, rows, lora_init=lora_init, seed=seed)


def without_labels(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


# --- after training


def draw_codes(
    painter: Painter, labels: list[int], tokens_per_image: int, guidance: float, *, batch: int,
    seed: int,
) -> torch.Tensor:  # fmt: skip
    """Draw a picture of each caption's number, as codes (N, tokens)."""
    return imaging.generate_image_codes(
        painter.model, [painter.caption_ids[label] for label in labels], painter.vocabulary,
        tokens_per_image, guidance_scale=guidance, pad_token_id=painter.collator.pad_token_id,
        empty_caption=painter.empty_caption, batch_size=batch, seed=seed,
    )  # fmt: skip


def look(
    painter: Painter, blocks: torch.Tensor, pictures: TokenizedPictures, *, text_batch: int,
    image_batch: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Record routing, and the similarity of experts on text and on pictures."""
    rows = {
        "text": [{"input_ids": ids} for ids in blocks[:16].split(8)],
        "image": without_labels(painter.batches(pictures, image_batch // 2)),
    }
    return {
        "routing": record_routing(painter, blocks, pictures, text_batch, image_batch).to_dict(),
        "redundancy": {
            modality: expert_redundancy(
                painter.model, batches, modality=modality, seed=seed
            ).to_dict()
            for modality, batches in rows.items()
        },
    }


def record_look(look: dict[str, Any], is_first: bool) -> dict[str, Any]:
    """Keep routing, the mean similarity of two experts by layer, and that of pairs on image rows,
    to four digits, of the first seed alone.
    """
    means = {
        modality: ExpertRedundancy.from_dict(found).mean().tolist()
        for modality, found in look["redundancy"].items()
    }
    kept = {"routing": look["routing"], "similarity": means}
    if is_first:
        pairs = look["redundancy"]["image"]
        matrices = [
            [[None if value is None else round(value, 4) for value in row] for row in matrix]
            for matrix in pairs["similarity"]
        ]
        kept["pairs"] = pairs | {"similarity": matrices}
    return kept

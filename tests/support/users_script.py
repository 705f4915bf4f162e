"""A user's script, which mypy checks and nobody runs: see tests/test_types.py.

It uses what the README does. Each ``assert_type`` fails if a result is Any, or of another type.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, assert_type

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import TrainOutput

import moe_kernels
from moe_kernels import (
    LoraInitDiagnostics,
    ModalityLoraConfig,
    PatchedModel,
    SaveAdapter,
    TextCheck,
    add_modality_tokens,
    backends,
    conversion,
    init,
    layers,
    patch_model,
)
from moe_kernels.analysis import RoutingRecorder, RoutingStatistics
from moe_kernels.imaging import (
    CaptionedImages,
    CodebookTokenizer,
    ImageCollator,
    ImageVocabulary,
    VQTokenizer,
    caption_ids,
    generate_images,
    load_image_tokenizer,
    padding_id,
)
from moe_kernels.modalities import (
    ModalityCollator,
    add_placeholders,
    join_placeholders,
    joining_placeholders,
)
from moe_kernels.moextend import ExpertExtender, LayerScores
from moe_kernels.ops import LoraWeights, moe_mlp
from moe_kernels.training import AdapterTrainer, MatrixMuon


def prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, images: Tensor, captions: list[str]
) -> CaptionedImages:
    image_tokenizer = VQTokenizer.fit(images, num_codes=512)
    assert_type(image_tokenizer, VQTokenizer)
    assert_type(load_image_tokenizer("folder"), CodebookTokenizer)
    assert_type(VQTokenizer.load("folder"), VQTokenizer)
    assert_type(image_tokenizer.measure(images).perplexity, float)
    ids = add_modality_tokens(model, "image", ImageVocabulary.size(512), tokenizer)
    assert_type(ids, range)
    vocabulary = ImageVocabulary.from_token_ids(ids)
    assert_type(vocabulary.begin_id, int)
    codes = image_tokenizer.encode(images)
    assert_type(codes, Tensor)
    assert_type(image_tokenizer.decode(codes), Tensor)
    data = CaptionedImages([caption_ids(tokenizer, each) for each in captions], codes, vocabulary)
    assert_type(data[0], dict[str, Tensor])
    assert_type(ImageCollator(padding_id(tokenizer))([data[0]]), dict[str, Tensor])
    return data


def train(model: PreTrainedModel, data: CaptionedImages, batches: list[dict[str, Tensor]]) -> None:
    config = ModalityLoraConfig(r=16, lora_alpha=32, modalities=("image",))
    patched = patch_model(model, config)
    assert_type(patched, PatchedModel)
    assert_type(patched.config.rank_pattern, dict[str, int])
    assert_type(patched.trainable_parameters(), Iterator[nn.Parameter])
    assert_type(patched.parameter_groups(lr=1e-3, rows_lr=7e-3), list[dict[str, Any]])
    assert_type(patched.count_parameters(), tuple[int, int])
    assert_type(patched.modality_token_ids("image"), range)
    assert_type(patched.adapters_enabled, bool)
    patched.fused_loss = True
    before = patched.check_text(batches)
    assert_type(before, TextCheck)
    with patched.text_only(), patched.adapters_disabled():
        model(**batches[0])
    assert_type(patched.text_only(), AbstractContextManager[None])
    trainer = AdapterTrainer(patched, TrainingArguments("out"), rows_lr=2e-2, train_dataset=data)
    assert_type(trainer.train(), TrainOutput)
    assert_type(trainer.patched, PatchedModel)
    assert_type(SaveAdapter(patched).patched, PatchedModel)
    MatrixMuon(patched.trainable_parameters(), lr=2e-3)
    found = moe_kernels.initialise_lora(model, batches)
    assert_type(found, dict[str, LoraInitDiagnostics])
    patched.save_adapter("adapter")
    patched.load_adapter("adapter")
    assert_type(ModalityLoraConfig.from_adapter("adapter"), ModalityLoraConfig)
    assert_type(moe_kernels.load("base", "adapter", dtype="bfloat16"), PatchedModel)
    assert_type(patched.unpatch(), PreTrainedModel)


def use(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_tokenizer: VQTokenizer,
    batches: list[dict[str, Tensor]],
    codes: Tensor,
) -> list[Image]:
    with RoutingRecorder(model) as recorder:
        assert_type(recorder, RoutingRecorder)
        pictures = generate_images(
            model, ["an apple"], tokenizer=tokenizer, image_tokenizer=image_tokenizer, seed=0
        )
    assert_type(pictures, list[Image])
    assert_type(recorder.statistics(), RoutingStatistics)
    assert_type(recorder.statistics().summary(), dict[str, float])
    extender = ExpertExtender(model)
    assert_type(extender.patched, PatchedModel)
    assert_type(extender.score_layers(batches, steps=10), LayerScores)
    assert_type(conversion.perplexity(model, [codes]), float)
    return pictures


def understand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, features: list[Tensor]
) -> None:
    placeholders = add_placeholders(model, tokenizer, ("image",))
    assert_type(placeholders, dict[str, int])
    joined = join_placeholders(model, ids, {"image": features}, placeholders)
    assert_type(joined, dict[str, Tensor])
    batch = ModalityCollator(placeholders, 0)([{"input_ids": ids[0]}])
    assert_type(batch, dict[str, Any])
    with joining_placeholders(model, placeholders):
        model(**batch)


def compute(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    lora = LoraWeights(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 12, 2), torch.ones(1))
    out = moe_mlp(x, ids, weights, gate_up, down, gate_up_lora=lora)
    assert_type(out, Tensor)
    assert_type(lora.lora_A, Tensor)
    assert_type(moe_kernels.ops.lora_linear(x, down[0], None, lora), Tensor)
    assert_type(backends.available(), dict[str, str | None])
    rows, report = init.gromov_wasserstein_rows(x, gate_up[0])
    assert_type(rows, Tensor)
    assert_type(report, init.GromovWassersteinDiagnostics)
    assert_type(layers.ModalityProjector.__name__, str)
    moe_kernels.nothing  # type: ignore[attr-defined]  # noqa: B018, a name that is not there
    return out

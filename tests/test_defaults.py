"""Default dtypes and devices of torch change no result: the methods name their own."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from support.dense_zoo import make_dense
from support.model_zoo import VOCAB, make_model, randomise

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.analysis import RoutingRecorder, RoutingStatistics, expert_redundancy
from moe_kernels.conversion import dense_to_moe, heal, perplexity
from moe_kernels.imaging import (
    ImageCollator,
    ImageVocabulary,
    PatchTokenizer,
    VQTokenizer,
    generate_image_codes,
    image_sequence,
    split_images,
)
from moe_kernels.init import gromov_wasserstein_lora
from moe_kernels.init.rows import initial_rows
from moe_kernels.moextend import ExpertExtender

VOCABULARY = ImageVocabulary(VOCAB, 4)
_random = np.random.default_rng(0)
PICTURES = torch.from_numpy(_random.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
IDS = torch.from_numpy(_random.integers(0, VOCAB, (4, 16)))
ROWS = torch.from_numpy(_random.normal(size=(40, 32)).astype(np.float32))
FEATURES = torch.from_numpy(_random.normal(size=(6, 5)).astype(np.float32))
CODES = torch.from_numpy(_random.integers(0, 4, (12, 4)))


@pytest.fixture(scope="module")
def models():
    painter = make_model("olmoe")
    patched = patch_model(painter, ModalityLoraConfig(r=2, modalities=("image",)))
    add_modality_tokens(painter, "image", ImageVocabulary.size(4))
    randomise(patched, scale=0.3)
    return {"dense": make_dense("llama"), "moe": make_model("olmoe"), "painter": painter}


def patch_tokenizer(models):
    fitted = PatchTokenizer.fit(PICTURES, num_codes=4, patch_size=4)
    codes = fitted.encode(PICTURES)
    return fitted.codebook, codes, fitted.decode(codes), fitted.codebook_usage(codes)


def vq_tokenizer(models):
    settings = {"num_codes": 4, "downsample": 4, "width": 16, "steps": 2, "progress": False}
    fitted = VQTokenizer.fit(PICTURES, **settings)
    return fitted.codebook, fitted.decode(fitted.encode(PICTURES))


def sequences(models):
    samples = [image_sequence(text, codes, VOCABULARY) for text, codes in zip(
        ([1, 2], [3]), CODES[:2], strict=True)]  # fmt: skip
    batch = ImageCollator(0)(samples)
    return *batch.values(), split_images(samples[0]["input_ids"], VOCABULARY)[1]


def pictures(models):
    prompts, options = [[1, 2], [3]], {"pad_token_id": 0, "seed": 0, "guidance_scale": 2.0}
    return generate_image_codes(models["painter"], prompts, VOCABULARY, 3, **options)


def conversion(models):
    made = [
        dense_to_moe(models["dense"], 4, 2, "random"),
        dense_to_moe(models["dense"], 4, 2, "clustered", shared_expert=4, calibration=[IDS]),
    ]
    heal(made[0], models["dense"], [IDS], steps=1, progress=False)
    score = torch.tensor(perplexity(made[1], [IDS]), dtype=torch.float64, device="cpu")
    return score, *(tensor for moe in made for tensor in moe.state_dict().values())


def rows(models):
    torch.manual_seed(0)
    return tuple(initial_rows(ROWS, num_tokens=5, init=i)[0] for i in ("normal", "gaussian"))


def coupled_rows(models):
    pytest.importorskip("ot")
    options = {"num_tokens": 6, "features": FEATURES, "frequencies": [3, 1, 2, 1, 1, 0]}
    found = [initial_rows(ROWS, init=i, **options)[0] for i in ("gromov_wasserstein", "permuted")]
    return *found, *gromov_wasserstein_lora(ROWS[:10], ROWS[10:], ROWS[:8], 4)


def routing(models):
    with torch.no_grad(), RoutingRecorder(models["moe"]) as recorder:
        models["moe"](input_ids=IDS)
    seen = RoutingStatistics.from_dict(recorder.statistics().to_dict())
    return seen.counts, seen.entropy(), seen.load()


def redundancy(models):
    batches = [{"input_ids": IDS}]
    return tuple(
        matrix
        for metric in ("cka", "cosine")
        for matrix in expert_redundancy(models["moe"], batches, metric=metric).similarity
    )


def added_experts(models):
    extender = ExpertExtender(copy.deepcopy(models["moe"]), modalities=("image",))
    batch = {"input_ids": IDS, "modality_ids": torch.ones_like(IDS)}
    scores = extender.score_layers([batch], 1, modality="image", progress=False)
    extender.extend(layers="all", init="random", calibration="additive", scores=scores)
    return scores.after, *(p.detach() for p in extender.patched.trainable_parameters())


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}
CASES = (
    patch_tokenizer, vq_tokenizer, sequences, pictures, conversion, rows, coupled_rows, routing,
    redundancy, added_experts,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_defaults_change_nothing(models, case):
    expected = case(models)
    for name, default in DEFAULTS.items():
        with default():
            actual = case(models)
        for number, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert (got.dtype, got.device) == (wanted.dtype, wanted.device), (name, number)
            assert torch.equal(got, wanted), (name, number)

"""Refusals: each says what was found, where, and what to do; and a test has its words."""

import ast
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.added_experts import extended
from support.dense_zoo import make_dense
from support.model_zoo import VOCAB, make_model, token_ids
from support.patched_models import patched_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moe_kernels import (
    ModalityLoraConfig,
    add_modality_tokens,
    env,
    initialise_lora,
    ops,
    patch_model,
    tune,
)
from moe_kernels.analysis import ExpertRedundancy, RoutingRecorder, RoutingStatistics
from moe_kernels.conversion import dense_to_moe
from moe_kernels.imaging import (
    ImageCollator,
    ImageVocabulary,
    PatchTokenizer,
    VQTokenizer,
    generate_images,
    load_image_tokenizer,
    mixed_sequence,
)
from moe_kernels.init import gromov_wasserstein_rows
from moe_kernels.modalities import join_features_and_text
from moe_kernels.models import support
from moe_kernels.models.peft_format import load_peft_adapter
from moe_kernels.moextend import ExpertExtender, LayerScores

ROOT = Path(__file__).parents[1]
IDS = token_ids(1, 6)


def model_with(change):
    """Return a situation: a model is changed, then patched."""

    def situation():
        model = make_model("mixtral")
        change(model)
        patch_model(model)

    return situation


def patched_with(use, **options):
    """Return a situation: a model is patched, then used."""
    return lambda: use(*patched_model("olmoe", **options))


def no_experts(model):
    for layer in model.model.layers:
        layer.mlp = nn.Identity()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=8, n_layer=1, n_head=1))


def experts_in_a_list(model):
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(2, 2)])


def emptied(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def normed(model):
    model.model.layers[1].mlp.experts.has_post_expert_norm = True


def packed(model):
    weight = torch.zeros(VOCAB, 34, dtype=torch.uint8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)


def replaced_projection(model, patched):
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 32)
    patched.unpatch()


def other_experts(model, patched):
    model.config._experts_implementation = "grouped_mm"
    model(IDS)


def fused_head(model, patched):
    model.forward = lambda input_ids: model.lm_head(model.model(input_ids)[0])
    model(IDS)


def own_loss(model, patched):
    model.loss_function = nn.functional.cross_entropy
    with patched.text_only():
        model(IDS, labels=IDS)


def labels_of_pictures(model, patched):
    with patched.text_only():
        model(IDS, labels=IDS + VOCAB)


def unpatched_twice(model, patched):
    patched.unpatch()
    patched.unpatch()


def moe_inputs():
    hidden, ids = torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.int64)
    return hidden, ids, torch.ones(3, 1), torch.randn(2, 6, 4), torch.randn(2, 4, 3)


def trained_view():
    hidden, ids, weights, gate_up, down = moe_inputs()
    joined = torch.nn.Parameter(gate_up)
    ops.moe_mlp(hidden, ids, weights, joined.view(2, 6, 4), down)


def trained_base():
    hidden, ids, weights, gate_up, down = moe_inputs()
    ops.moe_mlp(hidden, ids, weights, gate_up.requires_grad_(), down)


def fitted_tokenizer():
    images = (torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3) % 251).to(torch.uint8)
    return VQTokenizer.fit(images, num_codes=2, steps=1)


def pair(in_features, out_features):
    return ops.LoraWeights(
        torch.zeros(1, 2, in_features), torch.zeros(1, out_features, 2), torch.ones(1)
    )


def router_of_another_kind():
    model = make_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(32, 4)
    with RoutingRecorder(model):
        model.model.layers[0].mlp.gate(torch.zeros(6, 32))


def scores_of_another_layer():
    model = make_model("mixtral")
    extender = ExpertExtender(model)
    counts = torch.tensor([[3, 1, 0, 0]])
    scores = LayerScores((0,), counts, counts, (4,))
    extender.extend([1], init="most_selected", scores=scores)


def without_pot():
    with mock.patch.dict("sys.modules", {"ot": None}):
        gromov_wasserstein_rows(torch.randn(9, 4), torch.randn(9, 4))


def check_of_another_value():
    with mock.patch.dict("os.environ", {"MOE_KERNELS_CHECK": "perhaps"}):
        env.check_values()


def eighths(model, patched):
    parameter = next(patched.trainable_parameters())
    parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with tempfile.TemporaryDirectory() as folder:
        patched.save_adapter(folder)


def batches_of_text():
    model = make_model("olmoe")
    patch_model(model)
    add_modality_tokens(model, "image", 4)
    initialise_lora(model, [{"input_ids": IDS}])


def tune_in_vain():
    sizes = ["--experts", "2", "--hidden", "32", "--intermediate", "32", "--top-k", "1"]
    available = mock.patch.object(tune.backends, "available", return_value={"triton": None})
    with available, mock.patch.object(tune, "tune", return_value=None):
        tune.main([*sizes, "--tokens", "16"])


# situation -> (function, error, what was found, where, what to do)
REFUSALS = {
    "a dense model": (
        model_with(no_experts), ValueError,
        "no layer has experts", "MixtralForCausalLM", "take one of these",
    ),
    "a dense model that can be converted": (
        lambda: patch_model(make_dense("llama")), ValueError,
        "no layer has experts", "LlamaForCausalLM",
        "dense_to_moe, or the command `moe-kernels convert`, makes a Mixture of Experts of it",
    ),
    "a dense model that cannot be converted": (
        lambda: patch_model(gpt2()), ValueError,
        "no layer has experts", "GPT2LMHeadModel", "LlamaForCausalLM, MistralForCausalLM",
    ),
    "experts in a list": (
        model_with(experts_in_a_list), ValueError,
        "is ModuleList", "layer 0: mlp.experts", "current classes of transformers stack experts",
    ),
    "weights kept elsewhere": (
        model_with(emptied), ValueError,
        "table is empty", "embedding", "use FSDP2 (fully_shard)",
    ),
    "another layout": (
        model_with(normed), ValueError,
        "has_post_expert_norm, and no post_expert_norm", "layer 1",
        "docs/patching.md says which layouts are",
    ),
    "a quantised model": (
        model_with(packed), ValueError,
        "a packed weight (torch.uint8)", "its head", "leave it out of the quantisation",
    ),
    "a patched model": (
        patched_with(lambda model, _: patch_model(model)), ValueError,
        "is already patched", "OlmoeForCausalLM", "unpatch() it first",
    ),
    "a table that grows": (
        patched_with(lambda model, _: model.resize_token_embeddings(99)), RuntimeError,
        "cannot be resized", "table", "add_modality_tokens(..., tokenizer=tokenizer)",
    ),
    "another implementation": (
        patched_with(lambda model, _: model.set_experts_implementation("eager")), RuntimeError,
        "cannot be set to 'eager'", "experts", "unpatch() first, set it, and patch again",
    ),
    "another implementation in the config": (
        patched_with(other_experts), RuntimeError,
        "set to 'grouped_mm'", "layer 0", "set them back to 'moe_kernels'",
    ),
    "data parallel": (
        patched_with(lambda model, _: model._replicate_for_data_parallel()), RuntimeError,
        "share one mask", "nn.DataParallel", "use DistributedDataParallel",
    ),
    "continuous batching": (
        patched_with(lambda model, _: model.generate_batch([[1, 2]])), RuntimeError,
        "is not supported", "continuous batching", "call generate() on batches",
    ),
    "a replaced module": (
        patched_with(replaced_projection), RuntimeError,
        "was replaced by torch.nn.modules.linear.Linear", "model.layers.1.self_attn.q_proj",
        "put the module back",
    ),
    "a fused loss head": (
        patched_with(fused_head), RuntimeError,
        "replaced model.forward after patch_model", "tests.test_refusals.", "switch it off",
    ),
    "the inner model": (
        patched_with(lambda model, _: model.model(IDS)), RuntimeError,
        "got no modality_ids", "this layer", "call that, not the inner model",
    ),
    "embeddings alone": (
        patched_with(lambda model, _: model(inputs_embeds=torch.zeros(1, 6, 32))), ValueError,
        "say nothing of the tokens' modality", "inputs_embeds", "give modality_ids too",
    ),
    "a loss that was set later": (
        patched_with(own_loss, num_tokens=4), RuntimeError,
        "after patch_model", "the model's loss", "set it before patch_model",
    ),
    "labels of pictures in a text model": (
        patched_with(labels_of_pictures, num_tokens=VOCAB), ValueError,
        "of an added token", "labels has id", "leave it for this batch",
    ),
    "unpatched twice": (
        patched_with(unpatched_twice), ValueError,
        "was unpatched", "this handle", "use the one that patch_model returned last",
    ),
    "tokens of a modality twice": (
        patched_with(lambda model, _: add_modality_tokens(model, "image", 3), num_tokens=4),
        ValueError, "has tokens of modality 'image' already", "the model", "in one call",
    ),
    "an unpatched model": (
        lambda: add_modality_tokens(make_model("olmoe"), "image", 4), ValueError,
        "is not patched", "OlmoeForCausalLM", "call patch_model(model) first",
    ),
    "an unknown modality": (
        patched_with(lambda model, _: add_modality_tokens(model, "sound", 4)), ValueError,
        "not for 'sound'", "the model is patched for", "('image',)",
    ),
    "a pattern that names nothing": (
        lambda: patch_model(make_model("olmoe"), ModalityLoraConfig(rank_pattern={"up": 2})),
        ValueError, "'up' names no projection", "rank_pattern", "the names in one layer are",
    ),
    "a layer that does not exist": (
        lambda: patch_model(make_model("olmoe"), ModalityLoraConfig(layers_to_transform=(7,))),
        ValueError, "has [7]", "layers_to_transform", "the model has 2 layers",
    ),
    "experts beside another configuration": (
        patched_with(lambda model, _: ExpertExtender(model, modalities=("sound",))), ValueError,
        "patched with another configuration", "modalities", "unpatch() it first",
    ),
    "the disturbance of nothing": (
        patched_with(lambda model, _: ExpertExtender(model).disturbance([])), ValueError,
        "no experts were added", "extend", "call extend first",
    ),
    "layers by scores that are missing": (
        patched_with(lambda model, _: ExpertExtender(model).extend("top-half")), ValueError,
        "needs scores", 'layers="top-half"', "call score_layers first",
    ),
    "features of another width": (
        patched_with(lambda model, _: join_features_and_text(model, torch.zeros(1, 2, 5), IDS)),
        ValueError, "got (1, 2, 5)", "features must be (B, N, 32)", "input_ids (B, S)",
    ),
    "a base that trains": (
        trained_base, ValueError, "requires grad", "gate_up_proj", "requires_grad_(False)",
    ),
    "a base that is a view of what trains": (
        trained_view, ValueError, "computed from a tensor that requires grad", "gate_up_proj",
        "so detach it",
    ),
    "an unknown backend": (
        lambda: ops.moe_mlp(*moe_inputs(), backend="tpu"), ValueError,
        "unknown backend 'tpu'", "the backends are", "reference, cpu, triton, cuda",
    ),
    "a picture among text": (
        lambda: mixed_sequence([[1, 2], "a cat"], ImageVocabulary(VOCAB, 4)), TypeError,
        "<class 'str'>", "a piece", "a list of token ids or a tensor of codes",
    ),
    "one caption for many": (
        patched_with(lambda model, _: generate_images(
            model, "a cat", tokenizer=None, image_tokenizer=None
        ), num_tokens=8),
        TypeError, "got one string", "captions", "a list of strings",
    ),
    "a router of another kind": (
        router_of_another_kind, TypeError,
        "does not return", "model.layers.0.mlp (Linear)", "(logits, scores, indices)",
    ),
    "the disturbance by no batch": (
        lambda: extended().disturbance([]), ValueError,
        "got none", "the disturbance", "needs at least one batch",
    ),
    "scores of another layer": (
        scores_of_another_layer, ValueError,
        "the scores are of layers (0,)", "not of layer 1", "score that layer too",
    ),
    "a start without POT": (
        without_pot, ImportError, "needs POT", "Gromov-Wasserstein", "pip install",
    ),
    "a variable of another value": (
        check_of_another_value, ValueError, "is 'perhaps'", "MOE_KERNELS_CHECK",
        "must be 1, 0, true or false",
    ),
    "an adapter in 8 bits": (
        patched_with(eighths), ValueError,
        "is torch.float8_e4m3fn", "modality_adapter.safetensors", "tensors must be one of F64",
    ),
    "a folder without PEFT's files": (
        patched_with(lambda model, patched: load_peft_adapter(patched, "image", "/nowhere")),
        FileNotFoundError, "no adapter of PEFT", "there is no folder", "/nowhere",
    ),
    "a folder without an adapter": (
        lambda: ModalityLoraConfig.from_adapter("/"), FileNotFoundError,
        "no adapter in", "/", "modality_adapter.safetensors is missing",
    ),
    "the name of a folder misspelt": (
        lambda: ModalityLoraConfig.from_adapter("my-adaptr"), FileNotFoundError,
        "no adapter", "there is no folder my-adaptr", f" in {Path.cwd()}",
    ),
    "an adapter to load, misspelt": (
        patched_with(lambda model, patched: patched.load_adapter("my-adaptr")), FileNotFoundError,
        "no adapter", "there is no folder my-adaptr", f" in {Path.cwd()}",
    ),
    "a file for a folder": (
        lambda: load_image_tokenizer(__file__), FileNotFoundError,
        "no image tokenizer", "test_refusals.py", "is a file, not a folder",
    ),
    "a model's folder misspelt": (
        lambda: support.of_folder("my-modl"), ValueError,
        "no model", "there is no folder my-modl", f" in {Path.cwd()}",
    ),
    "a folder without an image tokenizer": (
        lambda: load_image_tokenizer("/nowhere"), FileNotFoundError,
        "no image tokenizer", "there is no folder", "/nowhere",
    ),
    "no codes": (
        lambda: PatchTokenizer.fit(torch.rand(2, 8, 8, 3), num_codes=0), ValueError,
        "got 0", "num_codes", "must be at least 1",
    ),
    "a flat codebook": (
        lambda: PatchTokenizer(torch.zeros(4), 4, (8, 8, 3)), ValueError,
        "got (4,)", "codebook", "must have shape (num_codes, ",
    ),
    "codes of another number": (
        lambda: fitted_tokenizer().decode(torch.zeros(2, 5, dtype=torch.int64)), ValueError,
        "got (2, 5)", "codes", "must be integers of shape (N, 4)",
    ),
    "an image of one dimension": (
        lambda: PatchTokenizer(torch.zeros(4, 48), 4, (8,)), ValueError,
        "one image here has (8,)", "images", "must have shape (N, H, W) or (N, H, W, C)",
    ),
    "a rank of nothing": (
        lambda: ops.lora_linear(
            torch.zeros(3, 4), torch.zeros(5, 4), None,
            ops.LoraWeights(torch.zeros(1, 0, 4), torch.zeros(1, 5, 0), torch.ones(1)),
            modality_ids=torch.zeros(3, dtype=torch.int64),
        ),
        ValueError, "needs a rank", "lora", "of at least 1",
    ),
    "no expert a token": (
        lambda: ops.moe_mlp(
            torch.zeros(3, 4), torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0),
            torch.zeros(2, 6, 4), torch.zeros(2, 4, 3),
        ),
        ValueError, "got top-k 0", "topk_ids", "at least one expert a token",
    ),
    "statistics of another type": (
        lambda: RoutingStatistics.from_dict(
            {"modalities": ["text"], "layers": ["0"], "counts": [[0.5]]}
        ),
        ValueError, "got 0.5", "routing statistics: the field counts[0][0]", "must be a list",
    ),
    "a redundancy without a metric": (
        lambda: ExpertRedundancy.from_dict({}), ValueError,
        "is missing", "a redundancy of experts", "the field metric",
    ),
    "scores of another type": (
        lambda: LayerScores.from_dict({"layers": "all"}), ValueError,
        "got 'all'", "layer scores: the field layers", "must be a list",
    ),
    "labels on some samples alone": (
        lambda: ImageCollator(0)([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}]),
        ValueError, "have labels, and others have none", "some samples of this batch",
        "give them to all or to none",
    ),
    "image tokens without codes": (
        lambda: ImageVocabulary(VOCAB, 0), ValueError,
        "got 48 and 0", "num_codes", "need first_id >= 0 and num_codes >= 1",
    ),
    "images of another size": (
        lambda: fitted_tokenizer().encode(torch.zeros(2, 16, 8, 3)), ValueError,
        "got (16, 8, 3)", "this tokenizer", "encodes images of shape (8, 8, 3)",
    ),
    "one point": (
        lambda: gromov_wasserstein_rows(torch.zeros(1, 4), torch.zeros(9, 4)), ValueError,
        "got (1, 4)", "features", "(points, size) with at least 2 points",
    ),
    "batches without pictures": (
        batches_of_text, ValueError,
        "have 0 tokens of the modality", "the batches", "at least 2 are needed",
    ),
    "a pair of an empty layer": (
        lambda: ops.lora_linear(
            torch.zeros(3, 4), torch.zeros(0, 4), None, pair(4, 0),
            modality_ids=torch.zeros(3, dtype=torch.int64),
        ),
        ValueError, "got (0, 4)", "lora", "needs a weight with elements",
    ),
    "no tiles for the device": (
        tune_in_vain, SystemExit, "no tiles could run", "on c", "try fewer --tokens",
    ),
    "images of another range": (
        lambda: VQTokenizer.fit(torch.full((2, 8, 8, 3), 255.0).numpy(), num_codes=2), ValueError,
        "255.0..255.0", "float images", "must lie in [0, 1]",
    ),
    "a model with experts to convert": (
        lambda: dense_to_moe(make_model("mixtral"), num_experts=2, top_k=1), ValueError,
        "is a Mixture of Experts already", "MixtralForCausalLM", "nothing is left to convert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", sorted(REFUSALS))
def test_a_refusal_says_what_was_found_where_and_what_to_do(situation):
    function, error, *parts = REFUSALS[situation]
    with pytest.raises(error, match=".") as refusal:
        function()
    for part in parts:
        assert part in str(refusal.value)


# --- every refusal of the library

WINDOW = 12  # characters that a test must have in common with a message


def raised_texts():
    """Yield (file:line, fixed pieces of text) of each refusal in the library with a text.

    The library has the programs too, whose refusals have their tests in tests/programs. An
    AssertionError is a fault of our own, which no caller can bring about.
    """
    for path in sorted((ROOT / "moe_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc and not is_own_fault(node.exc):
                texts = strings_in(node.exc)
                pieces = [text for text in texts if len(text) >= WINDOW and " " in text]
                if pieces:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", pieces


def is_own_fault(raised):
    return isinstance(raised, ast.Call) and getattr(raised.func, "id", "") == "AssertionError"


def strings_in(tree):
    """Return all strings in a tree but docstrings."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = {id(statement.value) for statement in statements}
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [n.value for n in nodes if isinstance(n.value, str) and id(n) not in docstrings]


def test_every_refusal_has_a_test_with_its_words():
    files = (ROOT / "tests").rglob("*.py")
    tested = "\n".join(text for file in files for text in strings_in(ast.parse(file.read_text())))
    tested = tested.replace("\\", "")

    def has_a_test(pieces):
        windows = (
            piece[start : start + WINDOW]
            for piece in pieces
            for start in range(len(piece) - WINDOW + 1)
        )
        return any(window in tested for window in windows)

    untested = [f"{place}: {text}" for place, text in raised_texts() if not has_a_test(text)]
    assert not untested, "\n".join(untested)

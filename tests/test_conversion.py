"""Dense models as Mixtures of Experts: exact where they must be, healed, resumed, refused."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import make_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moe_kernels import patch_model
from moe_kernels.conversion import balanced_kmeans, dense_to_moe, heal, perplexity, random_labels
from moe_kernels.conversion import healing as healing_module
from moe_kernels.testing import relative_rms

# Eight experts of D_FF: too narrow for grouped_mm, which one test is about.
pytestmark = pytest.mark.filterwarnings("ignore:experts of 6 neurons")
VOCAB, D_FF = 48, 48
PROGRAMS = Path(__file__).parents[1] / "python"
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": D_FF,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# name -> (class, configuration, settings of its own, class without and with a shared expert)
DENSE = {
    "llama": (
        LlamaForCausalLM, LlamaConfig,
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
        "MixtralForCausalLM", "Qwen2MoeForCausalLM",
    ),
    "mistral": (
        MistralForCausalLM, MistralConfig, {"head_dim": 12, "sliding_window": 4},
        "MixtralForCausalLM", "Qwen2MoeForCausalLM",
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, "Qwen2MoeForCausalLM", "Qwen2MoeForCausalLM"),
    "qwen2 sliding": (
        Qwen2ForCausalLM, Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "Qwen2MoeForCausalLM", "Qwen2MoeForCausalLM",
    ),
    "qwen3": (
        Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12, "attention_bias": True},
        "Qwen3MoeForCausalLM", None,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("family", DENSE)
CASES = [(family, shared) for family in DENSE for shared in (0, 16) if (family, shared) != ("qwen3", 16)]  # noqa: E501  # fmt: skip
EVERY_CASE = pytest.mark.parametrize(("family", "shared"), CASES)


def make_dense(family="llama", *, dtype=torch.float64, seed=0, **overrides):
    model_class, config_class, own, *_ = DENSE[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_COMMON, **own, **overrides}))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms that are not the identity
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.to(dtype).eval()


def token_ids(batch=3, length=20, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


CALIBRATION = [token_ids(4, 32, seed=1), token_ids(4, 32, seed=2)]


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=token_ids() if ids is None else ids).logits


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def neurons_of(moe, layer):
    """(E + shared, I) rows of up_proj of every expert, flattened: (neurons, H)"""
    mlp = moe.model.layers[layer].mlp
    rows = mlp.experts.gate_up_proj.detach().chunk(2, dim=1)[1].flatten(0, 1)
    shared = getattr(mlp, "shared_expert", None)
    return rows if shared is None else torch.cat([rows, shared.up_proj.weight.detach()])


# --- exact


@EVERY_CASE
@pytest.mark.parametrize("split", ["random", "clustered"])
def test_all_experts_together_are_the_dense_model(family, shared, split):
    dense = make_dense(family)
    moe = dense_to_moe(dense, 4, 4, split, shared_expert=shared, calibration=CALIBRATION)
    assert type(moe).__name__ == DENSE[family][4 if shared else 3]
    assert moe.dtype == torch.float64 and not moe.training
    assert relative_rms(logits(moe), logits(dense)) < 1e-12
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for sparse, plain in zip(moe.model.layers, dense.model.layers, strict=True):
        with torch.no_grad():
            assert relative_rms(sparse.mlp(x), plain.mlp(x)) < 1e-14


@pytest.mark.parametrize(("experts", "dtype"), [(6, torch.float64), (4, torch.float32)])
def test_exact_to_the_rounding_of_float32_gates(experts, dtype):
    dense = make_dense("mistral", dtype=dtype)
    assert relative_rms(logits(dense_to_moe(dense, experts, experts)), logits(dense)) < 2e-6


@EVERY_CASE
def test_fewer_experts_are_a_sum_of_the_chosen(family, shared):
    """Summed by hand from the dense weights, found again by their rows."""
    dense = make_dense(family)
    moe = dense_to_moe(dense, 4, 2, shared_expert=shared, calibration=CALIBRATION)
    x = torch.randn(7, 32, dtype=torch.float64)
    size = (D_FF - shared) // 4
    for layer in range(2):
        mlp, plain = moe.model.layers[layer].mlp, dense.model.layers[layer].mlp
        found = (neurons_of(moe, layer)[:, None] == plain.up_proj.weight[None]).all(-1)
        origin = found.double().argmax(1)
        with torch.no_grad():
            acts = plain.act_fn(plain.gate_proj(x)) * plain.up_proj(x)
            gates = (x @ mlp.gate.weight.T).float().softmax(-1)
            weights, chosen = gates.topk(2)
            weights = weights / weights.sum(-1, keepdim=True)
            wanted = torch.zeros_like(x)
            for row in range(7):
                for weight, expert in zip(weights[row], chosen[row], strict=True):
                    own = origin[expert * size : (expert + 1) * size]
                    out = acts[row, own] @ plain.down_proj.weight[:, own].T
                    wanted[row] += 4 * weight.double() * out
            own = origin[4 * size :]
            wanted += acts[:, own] @ plain.down_proj.weight[:, own].T
            assert relative_rms(mlp(x[None])[0], wanted) < 1e-12
        assert relative_rms(plain(x), wanted) > 0.05  # it does leave something out


@EVERY_CASE
@pytest.mark.parametrize("split", ["random", "clustered"])
def test_every_neuron_once_and_equal_sizes(family, shared, split):
    dense = make_dense(family)
    moe = dense_to_moe(dense, 8, 3, split, shared_expert=shared, calibration=CALIBRATION)
    for layer in range(2):
        experts = moe.model.layers[layer].mlp.experts
        assert experts.down_proj.shape == (8, 32, (D_FF - shared) // 8)
        wanted = dense.model.layers[layer].mlp.up_proj.weight
        rows = neurons_of(moe, layer)
        assert rows.shape == wanted.shape
        assert (rows[:, None] == wanted[None]).all(-1).sum(0).eq(1).all()


def test_the_source_and_the_random_state_stay():
    dense = make_dense()
    before, config = copy.deepcopy(dense), dense.config.to_dict()
    state = torch.get_rng_state()
    moe = dense_to_moe(dense.train(), 4, 2, "clustered", shared_expert=16, calibration=CALIBRATION)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_state(dense, before) and dense.config.to_dict() == config
    assert dense.training and moe.training
    assert not any(module._forward_pre_hooks for module in dense.modules())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.fill_(7)
    assert same_state(dense, before), "the models share memory"


@EVERY
def test_settings_are_carried_over(family):
    dense = make_dense(family, rms_norm_eps=1e-3, attention_dropout=0.1)
    dense.generation_config.temperature, dense.generation_config.do_sample = 0.7, True
    moe = dense_to_moe(dense, 4, 2)
    for name in (
        "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
        "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "vocab_size",
    ):  # fmt: skip
        assert getattr(moe.config, name) == getattr(dense.config, name), name
    assert moe.generation_config.to_dict() == dense.generation_config.to_dict()
    tied = moe.get_input_embeddings().weight is moe.get_output_embeddings().weight
    assert tied == dense.config.tie_word_embeddings


# --- splits


@pytest.mark.parametrize("split", ["random", "clustered"])
def test_splits_follow_the_seed(split):
    dense = make_dense()
    one, again, other = (
        dense_to_moe(dense, 4, 2, split, calibration=CALIBRATION, seed=seed) for seed in (3, 3, 4)
    )
    assert same_state(one, again)
    assert not torch.equal(neurons_of(one, 0), neurons_of(other, 0))
    assert not torch.equal(  # layers are dealt differently
        random_labels(48, 4, torch.Generator().manual_seed(0)),
        random_labels(48, 4, torch.Generator().manual_seed(1)),
    )


def test_clustering_finds_neurons_that_work_together():
    centres = torch.eye(4)
    labels = torch.arange(4).repeat(12)
    features = centres[labels] + 0.05 * torch.randn(48, 4)
    for seed in range(5):
        found = balanced_kmeans(features, 4, torch.Generator().manual_seed(seed))
        assert found.bincount().tolist() == [12] * 4
        together = found[:, None] == found[None]
        agreement = (together == (labels[:, None] == labels[None])).double().mean()
        # k-means can end with two true groups shared by two clusters; never with chance (0.63).
        assert agreement > 0.85
    skewed = torch.cat([torch.zeros(40, 2), torch.ones(8, 2)])
    assert balanced_kmeans(skewed, 4, torch.Generator()).bincount().tolist() == [12] * 4


def test_the_shared_expert_has_the_most_active_neurons():
    dense = make_dense()
    loud = torch.tensor([1, 5, 8, 30])
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.down_proj.weight[:, loud] *= 100
    moe = dense_to_moe(dense, 4, 2, shared_expert=4, calibration=CALIBRATION)
    for sparse, plain in zip(moe.model.layers, dense.model.layers, strict=True):
        shared = sparse.mlp.shared_expert
        assert torch.equal(shared.up_proj.weight, plain.mlp.up_proj.weight[loud])
        assert torch.equal(shared.down_proj.weight, plain.mlp.down_proj.weight[:, loud] * 2)


def test_calibration_makes_a_router_that_leaves_out_less():
    dense = make_dense(dtype=torch.float32)
    ids = token_ids(8, 32, seed=9)
    errors = {}
    for name, calibration in (("none", None), ("fitted", CALIBRATION)):
        moe = dense_to_moe(dense, 4, 2, calibration=calibration)
        errors[name] = float(healing_module.kl_divergence(logits(moe, ids), logits(dense, ids)))
        moe_inputs = torch.randn(64, 32)
        scores = moe_inputs @ moe.model.layers[0].mlp.gate.weight.T
        assert 0.01 < scores.std() < 0.5
    assert errors["fitted"] < errors["none"]


# --- like any other model


@EVERY_CASE
def test_saves_loads_generates_and_is_patched(family, shared, tmp_path):
    dense = make_dense(family, dtype=torch.float32)
    moe = dense_to_moe(dense, 4, 2, shared_expert=shared, calibration=CALIBRATION)
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(moe) and loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(moe))
    options = {"max_new_tokens": 6, "do_sample": False}
    generated = moe.generate(input_ids=token_ids(2, 5), **options)
    assert torch.equal(generated, loaded.generate(input_ids=token_ids(2, 5), **options))
    exact = dense_to_moe(dense, 4, 4, shared_expert=shared, calibration=CALIBRATION)
    assert torch.equal(
        exact.generate(input_ids=token_ids(2, 5), **options),
        dense.generate(input_ids=token_ids(2, 5), **options),
    )
    plain = logits(moe)
    patched = patch_model(moe)
    assert relative_rms(logits(moe), plain) < 1e-5
    patched.unpatch()
    assert torch.equal(logits(moe), plain)


def test_half_precision_stays_half():
    dense = make_dense("qwen3", dtype=torch.bfloat16)
    moe = dense_to_moe(dense, 2, 2, "clustered", calibration=CALIBRATION)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert relative_rms(logits(moe).float(), logits(dense).float()) < 0.05


def test_experts_that_grouped_mm_cannot_take_run_anyway():
    dense = make_dense(dtype=torch.float32)
    with pytest.warns(UserWarning, match="experts of 6 neurons .* multiples of 4: .*'eager'"):
        moe = dense_to_moe(dense, 8, 8)
    assert relative_rms(logits(moe), logits(dense)) < 2e-6


# --- healing


def batches(count=6):
    return [token_ids(4, 16, seed=100 + index) for index in range(count)]


def quick(moe, dense, **settings):
    settings = {"steps": 12, "train": "router+experts", "lr": 1e-3, "progress": False} | settings
    return heal(moe, dense, batches(), **settings)


@pytest.fixture(scope="module")
def source():
    return make_dense("llama", dtype=torch.float32)


def convert(source, **settings):
    return dense_to_moe(source, 4, 2, calibration=CALIBRATION, **settings)


@pytest.mark.parametrize(("train", "lr"), [("router", 2e-4), ("router+experts", 1e-3)])
def test_healing_lowers_the_divergence_and_trains_nothing_else(source, train, lr):
    moe, dense = convert(source).train(), copy.deepcopy(source)
    before = copy.deepcopy(moe)
    report = quick(moe, dense, steps=60, train=train, lr=lr)
    assert len(report.losses) == 60 and report.tokens == 60 * 64 and report.seconds > 0
    assert sum(report.losses[-6:]) < sum(report.losses[:6]) * (0.999 if train == "router" else 0.9)
    assert moe.training and same_state(dense, source)
    for name, parameter in moe.named_parameters():
        trained = ".gate." in name or (train == "router+experts" and ".experts." in name)
        assert torch.equal(parameter, before.get_parameter(name)) != trained, name
        assert parameter.requires_grad and parameter.grad is None


def test_healing_trains_a_shared_expert_and_its_gate(source):
    moe = convert(source, shared_expert=16)
    before = copy.deepcopy(moe)
    quick(moe, source, steps=3)
    changed = {n for n, p in moe.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {n for n, _ in moe.named_parameters() if ".mlp." in n}


@pytest.mark.parametrize("when", [4, 5])
def test_a_stopped_healing_ends_with_the_same_bits(source, tmp_path, when):
    whole = convert(source)
    expected = quick(whole, source)
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == when

    moe = convert(source)
    with pytest.raises(KeyboardInterrupt):
        quick(moe, source, checkpoint=tmp_path, save_every=3, stop=stop)
    again = convert(source)  # as a new process would
    report = quick(again, source, checkpoint=tmp_path, save_every=3)
    assert same_state(again, whole)
    assert report.losses == expected.losses and report.tokens == expected.tokens
    assert [file.name for file in tmp_path.iterdir()] == [healing_module.CHECKPOINT]
    # All steps are done: a third run only loads.
    finished = convert(source)
    assert quick(finished, source, checkpoint=tmp_path).losses == expected.losses
    assert same_state(finished, whole)


def test_killed_while_saving_the_last_checkpoint_stays_whole(source, tmp_path, monkeypatch):
    original, calls = torch.save, []

    def save(state, file):
        calls.append(None)
        if len(calls) == 2:
            Path(file).write_bytes(b"half")
            raise OSError("disk full")
        original(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        quick(convert(source), source, checkpoint=tmp_path, save_every=3)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == [healing_module.CHECKPOINT]
    whole, resumed = convert(source), convert(source)
    quick(whole, source)
    quick(resumed, source, checkpoint=tmp_path)
    assert same_state(resumed, whole)


@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_stops_where_the_loss_is_not_finite(source, tmp_path, monkeypatch, cause):
    original, calls = healing_module.kl_divergence, []

    class _BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    def diverging(*args):
        calls.append(None)
        loss = original(*args)
        if len(calls) == 8:  # step 7
            return loss * math.nan if cause == "loss" else _BadGradient.apply(loss)
        return loss

    monkeypatch.setattr(healing_module, "kl_divergence", diverging)
    moe = convert(source)
    with pytest.raises(FloatingPointError, match=f"the {cause} .* step 7 of 12; .* step 6"):
        quick(moe, source, checkpoint=tmp_path, save_every=3)
    monkeypatch.undo()
    saved = torch.load(tmp_path / healing_module.CHECKPOINT, weights_only=True)
    assert saved["step"] == 6
    for name, tensor in saved["parameters"].items():
        assert torch.isfinite(tensor).all() and torch.equal(moe.get_parameter(name), tensor)
    calls.clear()
    monkeypatch.setattr(healing_module, "kl_divergence", diverging)
    with pytest.raises(FloatingPointError, match="no checkpoint was kept"):
        quick(convert(source), source)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"steps": 20}, "steps was 12"), ({"lr": 1e-2}, "lr was"), ({"seed": 5}, "seed was 0")],
)
def test_refuses_the_checkpoint_of_another_run(source, tmp_path, change, match):
    quick(convert(source), source, checkpoint=tmp_path)
    moe = convert(source)
    before = copy.deepcopy(moe)
    with pytest.raises(ValueError, match=match):
        quick(moe, source, checkpoint=tmp_path, **change)
    assert same_state(moe, before)


def test_refuses_a_checkpoint_of_other_weights_or_text(source, tmp_path):
    quick(convert(source), source, checkpoint=tmp_path, train="router")
    with pytest.raises(ValueError, match="frozen weights was"):
        quick(convert(source, seed=1), source, checkpoint=tmp_path, train="router")
    with pytest.raises(ValueError, match="batches was"):
        heal(convert(source), source, batches(5), steps=12, train="router", lr=1e-3,
             checkpoint=tmp_path, progress=False)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"train": "everything"}, "train must be one of"),
        ({"steps": 0}, "at least 1"),
        ({"save_every": 0}, "at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
    ],
)
def test_healing_refuses(source, settings, match):
    with pytest.raises(ValueError, match=match):
        quick(convert(source), source, **settings)


def test_healing_refuses_models_that_do_not_fit(source):
    with pytest.raises(ValueError, match="too coarse"):
        quick(convert(source).bfloat16(), source)
    with pytest.raises(ValueError, match="no routers"):
        quick(copy.deepcopy(source), source)
    with pytest.raises(ValueError, match="other vocabularies"):
        quick(convert(source), make_dense(vocab_size=50, dtype=torch.float32))
    with pytest.raises(ValueError, match="no batches"):
        heal(convert(source), source, [], steps=1, progress=False)


# --- perplexity


def test_perplexity_is_of_all_predicted_tokens(source):
    ids = token_ids(3, 20)
    logs = logits(source, ids)[:, :-1].log_softmax(-1)
    wanted = math.exp(-logs.gather(-1, ids[:, 1:, None]).double().mean())
    assert perplexity(source.train(), [ids[:2], ids[2:]]) == pytest.approx(wanted, rel=1e-5)
    assert source.training
    source.eval()
    with torch.no_grad():
        uniform = copy.deepcopy(source)
        uniform.get_output_embeddings().weight.zero_()
    assert perplexity(uniform, [ids]) == pytest.approx(VOCAB, rel=1e-5)
    for nothing in ([], [ids[:, :1]]):
        with pytest.raises(ValueError, match="no token to predict"):
            perplexity(source, nothing)


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_experts": 5}, r"5 experts do not divide the 48 neurons .* these do: \[2, 3, 4"),
        ({"num_experts": 4, "shared_expert": 10}, "do not divide the 38 neurons"),
        ({"num_experts": 1, "top_k": 1}, "num_experts must be at least 2"),
        ({"top_k": 0}, r"top_k must be in 1\.\.4"),
        ({"top_k": 5}, r"top_k must be in 1\.\.4"),
        ({"split": "sorted"}, "split must be one of"),
        ({"split": "clustered"}, "split='clustered' needs calibration"),
        ({"shared_expert": 16}, "a shared expert needs calibration"),
        ({"shared_expert": 48}, r"shared_expert must be in 0\.\.47"),
        ({"shared_expert": -4}, r"shared_expert must be in 0\.\.47"),
        ({"split": "clustered", "calibration": []}, "holds no tokens"),
        ({"calibration": [token_ids()[0]]}, r"must be \(B, S\) token ids"),
        ({"calibration": [torch.rand(2, 4)]}, r"must be \(B, S\) token ids"),
    ],
)
def test_refuses_before_any_work(source, arguments, match, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(source, "forward", fail)
    with pytest.raises(ValueError, match=match):
        dense_to_moe(source, **{"num_experts": 4, "top_k": 2} | arguments)


def test_refuses_models_without_a_counterpart():
    with pytest.raises(TypeError, match="needs a transformers model"):
        dense_to_moe(nn.Linear(2, 2), 4, 2)
    with pytest.raises(ValueError, match="is a Mixture of Experts already"):
        dense_to_moe(make_model("mixtral"), 4, 2)
    with pytest.raises(ValueError, match="is a Mixture of Experts already"):
        dense_to_moe(dense_to_moe(make_dense("qwen3"), 4, 2), 4, 2)
    tiny = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=8)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported; supported are Llama"):
        dense_to_moe(GPT2LMHeadModel(tiny), 4, 2)
    for bias in ("mlp_bias", "attention_bias"):
        with pytest.raises(ValueError, match=f"{bias}=True is not supported"):
            dense_to_moe(make_dense("llama", **{bias: True}), 4, 2)
    with pytest.raises(ValueError, match="shared expert is not supported for Qwen3"):
        dense_to_moe(make_dense("qwen3"), 4, 2, shared_expert=16, calibration=CALIBRATION)
    mixed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(ValueError, match="both sliding and full attention"):
        dense_to_moe(make_dense("qwen3", **mixed), 4, 2)


def test_refuses_weights_that_are_not_as_the_config_says():
    untied = make_dense()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match="not tied .* config.tie_word_embeddings is True"):
        dense_to_moe(untied, 4, 2)
    quantised = make_dense()
    quantised.model.layers[1].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(D_FF, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="is quantised"):
        dense_to_moe(quantised, 4, 2)
    carrying = make_dense()
    carrying.peft_config = {}
    with pytest.raises(TypeError, match="PEFT"):
        dense_to_moe(carrying, 4, 2)


# --- the program


@pytest.fixture(scope="module")
def program():
    """The program as a module; its folder is on the path only here, as when it is run."""
    for needed in ("rich", "accelerate", "tokenizers"):
        pytest.importorskip(needed)
    sys.path.insert(0, str(PROGRAMS))
    try:
        import convert_dense_to_moe

        yield convert_dense_to_moe
    finally:
        sys.path.remove(str(PROGRAMS))
        for name in ("convert_dense_to_moe", "_runs"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of bytes, as it would lie on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(folder)
    overrides = {"vocab_size": 256, "initializer_range": 0.05}
    make_dense("mistral", dtype=torch.float32, **overrides).save_pretrained(folder)
    return folder


OPTIONS = [
    "--sizes", "4x2", "8x8", "--split", "random", "clustered", "--heal-steps", "4", "--batch", "2",
    "--block", "32", "--test-tokens", "128", "--calibration-tokens", "256", "--lr", "1e-4", "1e-3",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(program, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert program.main([str(folder), *OPTIONS, "--out", str(out)]) == 0
    return out


def test_the_program_reports_every_conversion(program, finished):
    report = json.loads((finished / "report.json").read_text())
    rows = report["conversions"]
    assert [(row["num_experts"], row["top_k"], row["split"]) for row in rows] == [
        (4, 2, "random"), (4, 2, "clustered"), (8, 8, "random"), (8, 8, "clustered"),
    ]  # fmt: skip
    for row in rows:
        assert row["class"] == "MixtralForCausalLM"
        assert len(row["healing"]["losses"]) == 4
        assert row["after"]["choice"] == min(row["choice_by_lr"].values())
        assert len(row["choice_by_lr"]) == 2
    for row in rows[2:]:  # all experts: the dense model
        for part in ("choice", "test"):
            wanted = report["dense"]["perplexity"][part]
            assert row["before"][part] == pytest.approx(wanted, rel=1e-5)
            assert row["healing"]["losses"][0] < 1e-6
    best = min(rows, key=lambda row: row["after"]["choice"])
    assert report["best_by_choice_text"] == best["model"]
    model = AutoModelForCausalLM.from_pretrained(best["model"])
    model.set_experts_implementation("eager")
    blocks = program.token_blocks(program.parse([str(report["settings"]["model"]), *OPTIONS])[0])
    assert perplexity(model, blocks["test"].split(2)) == pytest.approx(best["after"]["test"])
    table = (finished / "table.md").read_text()
    assert table.count("\n") == 2 + 1 + 4
    assert f"| 4 | 2 | random | 50 % | {rows[0]['before']['test']:.2f} |" in table


def test_the_texts_share_no_paragraph(program):
    parts = {
        part: {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
        for part, text in program.documentation().items()
    }
    assert parts.keys() == {"heal", "choice", "test"}
    assert not parts["heal"] & parts["test"] and not parts["heal"] & parts["choice"]
    assert not parts["choice"] & parts["test"]
    assert min(map(len, parts.values())) > 100


def test_a_second_run_of_the_program_computes_nothing(program, folder, finished, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a finished stage was built again")

    before = (finished / "report.json").read_text()
    for name in ("load_dense", "load_moe", "measure"):
        monkeypatch.setattr(program, name, fail)
    assert program.main([str(folder), *OPTIONS, "--out", str(finished)]) == 0
    assert (finished / "report.json").read_text() == before


def test_the_program_stopped_while_healing_goes_on(
    program, folder, finished, tmp_path, monkeypatch
):
    """Ctrl-C in the third step of the first healing."""
    import contextlib
    import threading

    original, steps = healing_module.kl_divergence, []
    event = threading.Event()

    def counted(*args):
        steps.append(None)
        if len(steps) == 3:
            event.set()
        return original(*args)

    command = [str(folder), *OPTIONS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(program, "stop_after_step", lambda: contextlib.nullcontext(event))
        patch.setattr(healing_module, "kl_divergence", counted)
        assert program.main(command) == 130
    assert list(tmp_path.glob("stages/heal-*.partial/checkpoint/healing.pt"))
    assert not (tmp_path / "report.json").exists()
    assert program.main(command) == 0
    results = [json.loads((out / "report.json").read_text()) for out in (tmp_path, finished)]
    for one, other in zip(*(result["conversions"] for result in results), strict=True):
        for row in (one, other):
            row.pop("model")
            row["healing"].pop("seconds")
        assert one == other
    assert not list(tmp_path.glob("stages/*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "8"], "'8' is not ExK"),
        (["--heal-text", "a.txt"], "give all of"),
        (["--block", "1"], "--block must be at least 2"),
        (["--sizes", "4x5"], "K in 1..E"),
        (["--lr", "0"], "--lr above 0"),
        (["--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_the_program_refuses_before_any_work(program, folder, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        program.main([str(folder), *options, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_program_says_what_is_wrong_with_the_model(program, folder, tmp_path, capsys):
    command = [str(folder), *OPTIONS, "--sizes", "4x2", "5x2", "--out", str(tmp_path / "out")]
    assert program.main(command) == 1
    assert "5 experts do not divide the 48 neurons" in capsys.readouterr().out
    sparse = dense_to_moe(AutoModelForCausalLM.from_pretrained(folder), 4, 2)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sparse.save_pretrained(tmp_path)
    command = [str(tmp_path), *OPTIONS, "--sizes", "4x2", "--out", str(tmp_path / "out")]
    assert program.main(command) == 1
    assert "MixtralForCausalLM is a Mixture of Experts already" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/stages/dense*"))

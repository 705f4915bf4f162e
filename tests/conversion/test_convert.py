"""Dense models converted to Mixtures of Experts: exact cases, splits, saving, refusals."""

import copy

import pytest
import torch
from support.dense_zoo import (
    CALIBRATION,
    D_FF,
    DENSE,
    EVERY,
    EVERY_CASE,
    logits,
    make_dense,
    same_state,
    token_ids,
)
from support.model_zoo import make_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from moe_kernels import patch_model
from moe_kernels.conversion import balanced_kmeans, dense_to_moe, random_labels
from moe_kernels.conversion import healing as healing_module
from moe_kernels.testing import relative_rms

# Eight experts share D_FF neurons: too narrow for grouped_mm. One test checks this warning.
pytestmark = pytest.mark.filterwarnings("ignore:experts of 6 neurons")


def neurons_of(moe, layer):
    """Return the rows of up_proj of all experts, the shared one last, (neurons, H)."""
    mlp = moe.model.layers[layer].mlp
    rows = mlp.experts.gate_up_proj.detach().chunk(2, dim=1)[1].flatten(0, 1)
    shared = getattr(mlp, "shared_expert", None)
    return rows if shared is None else torch.cat([rows, shared.up_proj.weight.detach()])


# --- exact cases


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
    """The sum is recomputed from the dense weights, whose rows identify each expert's neurons."""
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
            expected = torch.zeros_like(x)
            for row in range(7):
                for weight, expert in zip(weights[row], chosen[row], strict=True):
                    neurons = origin[expert * size : (expert + 1) * size]
                    out = acts[row, neurons] @ plain.down_proj.weight[:, neurons].T
                    expected[row] += 4 * weight.double() * out
            neurons = origin[4 * size :]
            expected += acts[:, neurons] @ plain.down_proj.weight[:, neurons].T
            assert relative_rms(mlp(x[None])[0], expected) < 1e-12
        assert relative_rms(plain(x), expected) > 0.05  # the sum does leave something out


@EVERY_CASE
@pytest.mark.parametrize("split", ["random", "clustered"])
def test_every_neuron_once_and_equal_sizes(family, shared, split):
    dense = make_dense(family)
    moe = dense_to_moe(dense, 8, 3, split, shared_expert=shared, calibration=CALIBRATION)
    for layer in range(2):
        experts = moe.model.layers[layer].mlp.experts
        assert experts.down_proj.shape == (8, 32, (D_FF - shared) // 8)
        expected = dense.model.layers[layer].mlp.up_proj.weight
        rows = neurons_of(moe, layer)
        assert rows.shape == expected.shape
        assert (rows[:, None] == expected[None]).all(-1).sum(0).eq(1).all()


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
    assert not torch.equal(  # layers are split differently
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
        # k-means may mix two true groups in two clusters, but stays far above chance (0.63).
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


# --- save, load, train and generate


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


# --- refusals


@pytest.fixture(scope="module")
def source():
    return make_dense("llama", dtype=torch.float32)


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
        ({"split": "clustered", "calibration": []}, "needs at least one token"),
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
    with pytest.raises(ValueError, match="on the device meta .offloaded by accelerate"):
        dense_to_moe(make_dense().to("meta"), 4, 2)
    carrying = make_dense()
    carrying.peft_config = {}
    with pytest.raises(TypeError, match="PEFT"):
        dense_to_moe(carrying, 4, 2)

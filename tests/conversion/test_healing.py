"""Healing by distillation: trained parameters, resuming bit for bit, refusals; perplexity."""

import copy
import math
from pathlib import Path

import pytest
import torch
from support.dense_zoo import CALIBRATION, logits, make_dense, same_state, token_ids
from support.model_zoo import VOCAB

from moe_kernels.conversion import checkpoints, dense_to_moe, heal, perplexity
from moe_kernels.conversion import healing as healing_module

pytestmark = pytest.mark.filterwarnings("ignore:experts of 6 neurons")


def batches(count=6):
    return [token_ids(4, 16, seed=100 + index) for index in range(count)]


def quick(moe, dense, **settings):
    settings = {"steps": 12, "train": "router+experts", "lr": 1e-3, "progress": False} | settings
    return heal(moe, dense, batches(), **settings)


@pytest.fixture(scope="module")
def source():
    return make_dense("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """Return the checkpoint of a healing that is done."""
    folder = tmp_path_factory.mktemp("healing")
    quick(convert(source), source, checkpoint=folder)
    return folder / healing_module.CHECKPOINT


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


def test_the_divergence_at_a_temperature():
    """Two tokens of a vocabulary of two, by hand: T^2 sum p log(p / q), p and q at T = 2.

    Logits (2 log 3, 0) and (0, 0) give p = (3/4, 1/4) and q = (1/2, 1/2); equal ones give 0.
    """
    teacher = torch.tensor([[[2 * math.log(3), 0.0], [1.0, 5.0]]], dtype=torch.float64)
    student = torch.tensor([[[0.0, 0.0], [1.0, 5.0]]], dtype=torch.float64)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    found = healing_module.kl_divergence(student, teacher, 2.0)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_healing_reads_its_temperature(source):
    """The first loss, before any update, against the sum written out."""
    moe = convert(source)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    ids = batches()[int(order[0])]
    log_q, log_p = ((logits(m, ids).double() / 3).log_softmax(-1) for m in (moe, source))
    expected = 9 * float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    report = quick(moe, source, steps=1, temperature=3.0)
    assert report.losses == [pytest.approx(expected, rel=1e-4)]


def test_autocast_is_near_and_keeps_the_weights_in_float32(source):
    exact, near = convert(source), convert(source)
    expected = quick(exact, source, steps=3)
    found = quick(near, source, steps=3, autocast=torch.bfloat16)
    assert found.losses != expected.losses
    assert found.losses == pytest.approx(expected.losses, rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in near.parameters())
    assert not same_state(near, exact) and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_products_of_experts_under_autocast(source, top_k, implementation):
    """Fewer than half of the experts stay in float32 by grouped_mm, as the docstring says."""
    dense = make_dense("llama", dtype=torch.float32, intermediate_size=64)
    moe = dense_to_moe(dense, 4, top_k)
    moe.set_experts_implementation(implementation)
    dtypes = set()
    activation = moe.model.layers[0].mlp.experts.act_fn
    activation.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    quick(moe, dense, steps=1, autocast=torch.bfloat16)
    kept = top_k == 1 and implementation == "grouped_mm"
    assert dtypes == {torch.float32 if kept else torch.bfloat16}


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
    again = convert(source)  # from the beginning, like a new process
    report = quick(again, source, checkpoint=tmp_path, save_every=3)
    assert same_state(again, whole)
    assert report.losses == expected.losses and report.tokens == expected.tokens
    assert [file.name for file in tmp_path.iterdir()] == [healing_module.CHECKPOINT]
    # All steps are done, so a third run only loads the checkpoint.
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
    with pytest.raises(FloatingPointError, match="there is no checkpoint to return to"):
        quick(convert(source), source)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 20}, "steps was 12"),
        ({"lr": 1e-2}, "lr was"),
        ({"seed": 5}, "seed was 0"),
        ({"temperature": 2.0}, "temperature was 1.0 there and is 2.0 now"),
        ({"autocast": torch.bfloat16}, "autocast was 'None' there and is 'bfloat16' now"),
    ],
)
def test_refuses_the_checkpoint_of_another_run(source, tmp_path, change, match):
    quick(convert(source), source, checkpoint=tmp_path)
    moe = convert(source)
    before = copy.deepcopy(moe)
    with pytest.raises(ValueError, match=match):
        quick(moe, source, checkpoint=tmp_path, **change)
    assert same_state(moe, before)


def test_refuses_a_checkpoint_of_other_weights_or_text(source, tmp_path):
    quick(convert(source), source, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="batches was"):
        heal(convert(source), source, batches(5), steps=12, train="router+experts", lr=1e-3,
             checkpoint=tmp_path, progress=False)  # fmt: skip
    with pytest.raises(ValueError, match="initial weights was"):
        quick(convert(source, seed=1), source, checkpoint=tmp_path)
    top_3 = convert(source)
    top_3.config.num_experts_per_tok = 3
    with pytest.raises(ValueError, match=r"moe\.num_experts_per_tok was 2 there and is 3 now"):
        quick(top_3, source, checkpoint=tmp_path)
    other, teacher = convert(source), copy.deepcopy(source)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
        teacher.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="frozen weights was"):
        quick(other, source, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="dense model was"):
        quick(convert(source), teacher, checkpoint=tmp_path)


def test_a_model_with_the_weights_of_its_checkpoint_goes_on(source, tmp_path):
    """Ctrl-C leaves the model so in a notebook."""
    moe, whole = convert(source), convert(source)
    with pytest.raises(KeyboardInterrupt):
        quick(moe, source, checkpoint=tmp_path, stop=iter([False] * 5 + [True]).__next__)
    quick(moe, source, checkpoint=tmp_path)
    quick(whole, source)
    assert same_state(moe, whole)


def test_an_interrupt_returns_the_model_to_its_checkpoint(source, tmp_path, monkeypatch):
    moe, update = convert(source), healing_module._Run.update

    def interrupted(run, loss):
        update(run, loss)
        if run.step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(healing_module._Run, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(moe, source, checkpoint=tmp_path, save_every=3)
    saved = torch.load(tmp_path / healing_module.CHECKPOINT, weights_only=True)
    assert saved["step"] == 6
    for name, tensor in saved["parameters"].items():
        assert torch.equal(moe.get_parameter(name), tensor), name
    assert all(p.requires_grad and p.grad is None for p in moe.parameters())


NAME = "model.layers.0.mlp.gate.weight"


def put(*place):
    """Return a function that puts a value at a place of a state: its keys, then the value."""
    *keys, last, value = place

    def change(state):
        for key in keys:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("format", None), "of another version of moe_kernels"),
        # Written before the settings of a run had temperature and autocast.
        (put("format", 2), "of another version of moe_kernels, .*: delete it"),
        (put("step", -1), "step -1 is not one of 0..12"),
        (put("step", 10**9), "step 1000000000 is not one of"),
        (put("step", True), "step True is not one of"),
        (put("step", 11), "report is not one of 11 steps"),
        (put("parameters", NAME, lambda t: t[:1]), r"gate.weight is torch.float32 \(1, 32\), not"),
        (put("parameters", NAME, lambda t: t.double()), "gate.weight is torch.float64"),
        (put("parameters", NAME, lambda t: t * math.nan), "gate.weight is not finite"),
        (put("parameters", NAME, 1.0), "is damaged"),
        (put("parameters", "x", torch.ones(1)), "other parameters than those that are trained"),
        (put("parameters", lambda p: dict(list(p.items())[1:])), "other parameters than those"),
        (put("optimizer", "state", lambda s: {}), "the state of other parameters"),
        (put("optimizer", "state", 0, "exp_avg", lambda t: t[:1]), "exp_avg 0 is torch.float32"),
        (put("optimizer", "state", 0, "exp_avg_sq", lambda t: -t), "exp_avg_sq 0 is negative"),
        (put("optimizer", "state", 0, "step", torch.tensor(3.0)), "state 0 is not that of step 12"),
        (put("optimizer", "param_groups", 0, "betas", (0.0, 0.0)), "optimizer has other settings"),
        (put("optimizer", None), "is damaged"),
        (put("report", "tokens", math.nan), "not finite numbers"),
        (put("report", None), "is damaged"),
        (put("described", {}), "steps was None there"),
    ],
)
def test_refuses_a_checkpoint_that_no_run_writes(source, finished, tmp_path, change, match):
    state = torch.load(finished, weights_only=True)
    change(state)
    torch.save(state, tmp_path / healing_module.CHECKPOINT)
    moe = convert(source)
    before = copy.deepcopy(moe)
    with pytest.raises(ValueError, match=match):
        quick(moe, source, checkpoint=tmp_path)
    assert same_state(moe, before)


def test_refuses_a_file_that_is_no_checkpoint(source, tmp_path):
    file = tmp_path / healing_module.CHECKPOINT
    for content in (b"", b"nothing"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged .*: delete it, or pass another folder"):
            quick(convert(source), source, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"train": "everything"}, "train must be one of"),
        ({"steps": 0}, "at least 1"),
        ({"save_every": 0}, "at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"autocast": torch.float16}, "autocast must be torch.bfloat16 or None"),
        ({"autocast": "bfloat16"}, "autocast must be torch.bfloat16 or None"),
    ],
)
def test_healing_refuses(source, settings, match):
    with pytest.raises(ValueError, match=match):
        quick(convert(source), source, **settings)


def test_healing_refuses_models_that_do_not_fit(source):
    with pytest.raises(ValueError, match=", too coarse for small updates"):
        quick(convert(source).bfloat16(), source)
    with pytest.raises(ValueError, match="no routers"):
        quick(copy.deepcopy(source), source)
    with pytest.raises(ValueError, match="different vocabularies"):
        quick(convert(source), make_dense(vocab_size=50, dtype=torch.float32))
    with pytest.raises(ValueError, match="batches is empty"):
        heal(convert(source), source, [], steps=1, progress=False)


# --- perplexity


def test_perplexity_is_of_all_predicted_tokens(source):
    ids = token_ids(3, 20)
    logs = logits(source, ids)[:, :-1].log_softmax(-1)
    expected = math.exp(-logs.gather(-1, ids[:, 1:, None]).double().mean())
    assert perplexity(source.train(), [ids[:2], ids[2:]]) == pytest.approx(expected, rel=1e-5)
    assert source.training
    source.eval()
    with torch.no_grad():
        uniform = copy.deepcopy(source)
        uniform.get_output_embeddings().weight.zero_()
    assert perplexity(uniform, [ids]) == pytest.approx(VOCAB, rel=1e-5)
    for nothing in ([], [ids[:, :1]]):
        with pytest.raises(ValueError, match="no token to predict"):
            perplexity(source, nothing)


def test_a_digest_of_a_single_number():
    digests = {
        checkpoints.digest([("scale", torch.tensor(value, dtype=dtype))])
        for value in (1.0, 2.0) for dtype in (torch.float32, torch.float64)
    }  # fmt: skip
    assert len(digests) == 4
    assert checkpoints.digest([("scale", torch.ones(1))]) not in digests

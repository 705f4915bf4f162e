"""Forms of experts, found by running their activation: those that are found, refused and kept."""

import copy
import json
import re
import types
from types import SimpleNamespace

import pytest
import torch
from support.families import make_family
from support.model_zoo import make_model, refused, token_ids
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_kernels import ModalityLoraConfig, accelerate_peft, info, patch_model
from moe_kernels.models import forms, support
from moe_kernels.models.experts import IMPLEMENTATION, experts_forward
from moe_kernels.models.forms import Form, form_of, problems
from moe_kernels.models.parts import find_experts
from moe_kernels.ops import Activation
from moe_kernels.testing import relative_rms

KNOWN = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "relu2": "relu_squared",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


def experts(act="silu", **settings):
    made = find_experts(make_model("mixtral"))
    made.act_fn = ACT2FN[act] if isinstance(act, str) else act
    vars(made).update(settings)
    return made


def clamped(alpha, limit, shift, *, interleaved=False):
    """Return a gating function as those of gpt-oss and its followers."""

    def apply_gate(self, joined):
        gate, up = (joined[..., ::2], joined[..., 1::2]) if interleaved else joined.chunk(2, -1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + shift) * gate * torch.sigmoid(alpha * gate)

    return apply_gate


def with_gate(function, **settings):
    made = experts(**settings)
    made._apply_gate = types.MethodType(function, made)
    return made


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_activations_by_any_name(name, gated):
    assert form_of(experts(name, has_gate=gated)) == Form(Activation(KNOWN[name], gated))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["quick_gelu", "relu", "mish", "gelu_10", "laplace", "tanh"])
def test_activations_that_no_kernel_computes(name, gated):
    (reason,) = problems(experts(name, has_gate=gated))
    assert reason.startswith("activation ") and "only silu, gelu" in reason and "\n" not in reason


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize(
    ("alpha", "limit", "names"),
    [(1.702, 7.0, ("alpha", "limit")), (1.0, 20000.0, ("swiglu_alpha", "swiglu_limit"))],
)
def test_clamped_swiglu(alpha, limit, names, shift, interleaved):
    """The values are the module's, and the trial confirms them."""
    values = dict(zip(names, (alpha, limit), strict=True)) | {"is_concatenated": not interleaved}
    function = clamped(alpha, limit, shift, interleaved=interleaved)
    found = form_of(with_gate(function, **values))
    assert found == Form(Activation("clamped_swiglu", True, alpha, limit, shift), interleaved)
    for wrong in (
        clamped(alpha, limit, shift, interleaved=not interleaved),
        clamped(alpha * 1.001, limit, shift, interleaved=interleaved),
        clamped(alpha, limit * 1.5, shift, interleaved=interleaved),
        clamped(alpha, limit, 0.5, interleaved=interleaved),
    ):
        assert problems(with_gate(wrong, **values))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.silu(x.chunk(2, -1)[0]).clamp(max=7.0) * x.chunk(2, -1)[1],
        lambda self, x: F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0],
        lambda self, x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] + 1e-4,
        lambda self, x: F.silu(x.chunk(2, -1)[0]),
        lambda self, x: x / 0,
    ],
    ids=["clamped", "up before gate", "shifted", "without up", "infinite"],
)
def test_gating_functions_that_no_kernel_computes(function):
    assert problems(with_gate(function, limit=7.0))


@pytest.mark.parametrize(
    "bend",
    [
        lambda x: torch.where(x > 8, torch.where(x < 40, 8.0, x), x),
        lambda x: x.clamp(max=2e4),
        lambda x: torch.where(x < -13, -13.0, x),
        lambda x: (4 * x).round() / 4,
    ],
    ids=["flat", "clamped far away", "flat below zero", "steps"],
)
def test_activations_that_are_almost_silu(bend):
    """They agree with it at round numbers, or wherever a trial with gaps would look."""

    def apply_gate(self, joined):
        gate, up = joined.chunk(2, -1)
        return F.silu(bend(gate)) * up

    assert problems(with_gate(apply_gate))


class Swish(nn.Module):
    """SiLU whose slope may be a number, a tensor, a parameter or a buffer."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (Swish(nn.Parameter(torch.ones(()))), "activation Swish has the tensor beta: what it"),
        (Swish(nn.Buffer(torch.ones(()))), "activation Swish has the tensor beta"),
        (Swish(torch.ones(())), "activation Swish has the tensor beta"),
        (nn.Sequential(nn.SiLU(), nn.Dropout(0.1)), "Sequential has Dropout in 1: what it"),
    ],
    ids=["parameter", "buffer", "tensor", "dropout"],
)
def test_activations_that_may_change(act, match):
    """No forward could notice: training changes a parameter in place, a mode changes dropout."""
    (reason,) = problems(experts(act.eval()))
    assert re.search(match, reason)


def test_an_activation_that_changed_in_place():
    made = experts(nn.Sequential(nn.GELU()))
    assert form_of(made).act.name == "gelu"
    made.act_fn[0].approximate = "tanh"
    assert form_of(made).act.name == "gelu_tanh"
    made.act_fn[0] = Swish(1.0)
    assert form_of(made) == forms.PLAIN
    made.act_fn[0].beta = 1.702
    with pytest.raises(ValueError, match="activation Sequential .only silu"):
        form_of(made)


def test_a_gating_function_that_is_replaced_on_the_class(monkeypatch):
    made = experts()
    assert form_of(made) == forms.PLAIN
    monkeypatch.setattr(type(made), "_apply_gate", lambda self, x: x.chunk(2, -1)[0])
    with pytest.raises(ValueError, match="MixtralExperts is not supported: activation"):
        form_of(made)


def test_a_gating_function_that_fails():
    (reason,) = problems(with_gate(lambda self, x: x @ self.missing))
    assert "does not run by itself (AttributeError: " in reason


def test_a_meta_device_and_other_modes():
    gelu, mish, plain = (experts(name) for name in ("gelu", "mish", "silu"))
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
        assert form_of(gelu).act.name == "gelu"
    with torch._subclasses.FakeTensorMode():
        assert problems(mish) and form_of(plain) == forms.PLAIN


def test_the_trial_is_made_once(monkeypatch):
    tried, find = [], forms._find

    def spy(module):
        tried.append(module)
        return find(module)

    monkeypatch.setattr(forms, "_find", spy)
    model, ids = make_model("mixtral").requires_grad_(False), token_ids(2, 5)
    model.set_experts_implementation(IMPLEMENTATION)
    for _ in range(3):
        model(ids)
    assert len(tried) == 2 and not any("form" in name for name in vars(tried[0]))
    tried[0].act_fn = nn.Mish()
    for _ in range(2):
        with pytest.raises(ValueError, match="experts_implementation='moe_kernels'.*Mish"):
            model(ids)
    tried[0].act_fn = nn.SiLU()
    model(ids)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)


def test_an_activation_that_is_replaced_in_a_patched_model():
    model, ids = make_model("mixtral"), token_ids(2, 5)
    patch_model(model, ModalityLoraConfig(backend="reference"))
    before = model(ids).logits
    module = find_experts(model.model.layers[0])
    module.act_fn = nn.GELU()
    other = make_model("mixtral")
    find_experts(other.model.layers[0]).act_fn = nn.GELU()
    found = model(ids).logits
    assert relative_rms(found, other(ids).logits) < 1e-5 and not torch.equal(found, before)
    module.act_fn = nn.Mish()
    with pytest.raises(ValueError, match="activation Mish"):
        model(ids)


@pytest.mark.parametrize("family", ["gpt_oss", "aria", "nemotron_h"])
def test_projections_of_other_layouts(family):
    """Adapters have the shapes of (E, out, in), however a stack is stored; added experts too."""
    model = make_family(family)
    config = ModalityLoraConfig(r=2, target_modules=("experts",), backend="reference")
    patched = patch_model(model, config)
    first, second = patched.projections[:2]
    assert (first.key, second.key) == (
        "up_proj" if family == "nemotron_h" else "gate_up_proj",
        "down_proj",
    )
    hidden = model.config.hidden_size
    assert first.shape[2] == second.shape[1] == hidden
    assert first.lora.lora_A.shape == (1, 4, 2, hidden) and second.lora.lora_B.shape[2] == hidden


def test_a_backend_that_does_not_compute_a_form(monkeypatch):
    def refuse(*arguments, act, **settings):
        if act.name != "silu":
            raise NotImplementedError("backend 'other' computes only silu")
        return computed(*arguments, act=act, **settings)

    computed = forms.ops.moe_mlp
    model = make_model("mixtral")
    for layer in model.model.layers:
        find_experts(layer).act_fn = nn.GELU()
    find = SimpleNamespace(**vars(forms.ops) | {"moe_mlp": refuse})
    monkeypatch.setattr("moe_kernels.models.experts.ops", find)
    refused(model, ValueError, "MixtralExperts: backend 'other' computes only silu")


def test_adapters_of_peft_on_another_activation():
    peft = pytest.importorskip("peft")
    model = make_model("mixtral")
    for layer in model.model.layers:
        find_experts(layer).act_fn = nn.GELU()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_parameters=names, r=2))
    with pytest.raises(ValueError, match="activation gelu .only SiLU"):
        accelerate_peft(wrapped)


@pytest.mark.parametrize("family", ["gpt_oss", "inkling2", "qwen3_vl_moe", "gemma4"])
def test_what_a_folder_gets(family, tmp_path, capsys):
    """The answers on the device meta are those of the model itself."""
    model = make_family(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    info.main(["--model", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.pop("class") == type(model).__name__
    assert found == support.of_model(model)
    assert (found["experts"] == "supported") == (family != "inkling2")
    said = {name: each for name, each in found.items() if name != "memory to train"}
    assert "\n" not in "".join(said.values()) and said["family"] == model.config.model_type


def test_a_folder_without_a_model(tmp_path, capsys):
    for text, match in (("{}", "has no config.json|Unrecognized"), (None, "has no config.json")):
        folder = tmp_path / ("empty" if text is None else "half")
        folder.mkdir()
        if text is not None:
            (folder / "config.json").write_text(text)
        with pytest.raises(SystemExit):
            info.main(["--model", str(folder)])
        assert re.search(match, capsys.readouterr().err)
    with pytest.raises(ValueError, match="empty has no config.json .*: name a folder"):
        support.of_folder(tmp_path / "empty")
    settings = {"model_type": "mixtral", "architectures": ["OwnForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        info.main(["--model", str(tmp_path)])
    assert "names the class OwnForCausalLM, which transformers" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt_oss", "glm5_next"])
def test_text_keeps_its_bits_on_the_reference(family):
    """A count of routed rows that no vector divides changed the last elements' bits."""
    model = make_family(family)
    patch_model(model, ModalityLoraConfig(target_modules=("experts",), backend="reference"))
    for seed in range(8):
        ids, others = (token_ids(2, 12, vocab=60, seed=each) for each in (seed, seed + 100))
        others[0], others[1, :5] = ids[0], ids[1, :5]
        with torch.no_grad():
            before, after = model(ids).logits, model(others).logits
        assert torch.equal(before[0], after[0]) and torch.equal(before[1, :5], after[1, :5])


@torch.no_grad()
def test_a_norm_after_each_expert():
    """transformers' own code is right; a norm with a bias must leave padding at zero."""
    torch.manual_seed(0)
    made = experts(has_post_expert_norm=True).double()
    made.post_expert_norm = nn.LayerNorm(made.hidden_dim).double()
    made.post_expert_norm.bias.normal_()
    x = torch.randn(7, made.hidden_dim, dtype=torch.float64)
    ids = torch.stack([torch.randperm(made.num_experts)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, dtype=torch.float64)
    expected = ALL_EXPERTS_FUNCTIONS["batched_mm"](made, x, ids, weights)
    assert relative_rms(experts_forward(made, x, ids, weights), expected) < 1e-12
    padded = torch.tensor([0, -1, 0, 0, 0, 0, -1])
    made._modality_context = SimpleNamespace(
        row_ids=lambda: padded, backend=None, module_ran=lambda name: None
    )
    made._modality_lora = {}
    out = experts_forward(made, x, ids, weights)
    assert out[padded < 0].eq(0).all()
    assert relative_rms(out[padded == 0], expected[padded == 0]) < 1e-12


def test_a_norm_after_each_expert_is_not_computed_for_peft():
    made = experts(has_post_expert_norm=True)
    made.post_expert_norm = nn.LayerNorm(made.hidden_dim)
    assert forms.not_plain(made) == ["a norm after each expert"]

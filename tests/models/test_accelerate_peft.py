"""Experts that PEFT adapted, computed by the kernels: equal to PEFT, whose model it stays."""

import copy
import io
import tempfile

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from support.model_zoo import FAMILY, make_model, token_ids, unchanged
from support.peft_models import (
    ATTENTION,
    EXPERTS,
    IDS,
    assert_same_gradients,
    assert_same_model,
    assert_same_results,
    experts_of,
    fill_adapters,
    lora_config,
    make_pair,
    make_peft,
    run_experts,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import accelerate_peft, get_accelerated
from moe_kernels.models.peft_stacks import is_accelerated
from moe_kernels.testing import relative_rms, working_backends

# dtype -> the largest relative error
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
OTHER = {"second": {"r": 5, "lora_alpha": 2}}
SETTINGS = {
    "both": {},
    "gate_up alone": {"target_parameters": [EXPERTS[0]]},
    "down alone": {"target_parameters": [EXPERTS[1]]},
    "patterns": {
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 7},
    },
    "rslora": {"use_rslora": True},
    "attention": {"target_modules": list(ATTENTION)},
    "router": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]},
}
BY_SETTINGS = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
BY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


# --- equal to PEFT


@FAMILY
@BY_DTYPE
def test_a_model_equals_pefts(family, dtype):
    theirs, ours = make_pair(family, dtype=dtype, target_modules=list(ATTENTION))
    assert_same_model(ours, theirs, TOLERANCES[dtype])


@FAMILY
@BY_DTYPE
def test_the_experts_equal_pefts(family, dtype):
    """Norms of transformers round a float64 model to float32, so the module is compared too."""
    theirs, ours = make_pair(family, dtype=dtype)
    expected = run_experts(theirs, dtype=dtype)
    assert len(expected) == 3 + 4
    assert_same_results(run_experts(ours, dtype=dtype), expected, TOLERANCES[dtype])


@BY_SETTINGS
def test_settings_of_peft(settings):
    theirs, ours = make_pair(**settings)
    if "rank_pattern" in settings:
        assert [each.r["default"] for each in wrappers(ours)[:2]] == [2, 3]
        assert [each.scaling["default"] for each in wrappers(ours)[:2]] == [4.5 / 2, 7 / 3]
    assert_same_results(run_experts(ours), run_experts(theirs), 1e-9)
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("backend", working_backends())
@BY_DTYPE
def test_backends(backend, dtype):
    theirs = make_peft(dtype=dtype, **OTHER)
    theirs.base_model.set_adapter(["default", "other"])
    ours = copy.deepcopy(theirs)
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64")
    accelerate_peft(ours, backend=backend)
    expected = run_experts(theirs, dtype=dtype)
    assert_same_results(run_experts(ours, dtype=dtype), expected, TOLERANCES[dtype])


def error_of(model, truth):
    """Return the largest error of output and gradients of the experts in bfloat16."""
    actual = run_experts(model, dtype=torch.bfloat16)
    return max(relative_rms(actual[name], truth[name]) for name in truth)


def test_bfloat16_is_at_least_as_exact_as_peft():
    theirs, ours = make_pair(dtype=torch.bfloat16)
    assert experts_of(ours).lora_A["default"].weight.dtype == torch.float32
    truth = run_experts(copy.deepcopy(theirs).double())
    assert error_of(ours, truth) <= error_of(theirs, truth) < 0.03


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base):
    """Under autocast the kernels compute in the base's dtype, as everywhere in this package."""
    theirs, ours = make_pair(dtype=base)
    truth = copy.deepcopy(theirs).double()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(IDS, labels=IDS) for model in (theirs, ours)]
    expected = truth(IDS).logits
    errors = [relative_rms(output.logits, expected) for output in outputs]
    assert errors[1] < 1.2 * errors[0] < 0.1  # attention and head round alike
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(ours, theirs, 0.1)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_activation_checkpointing(reentrant):
    theirs, ours = make_pair(target_modules=["q_proj"])
    plain = copy.deepcopy(ours)
    for model in (theirs, ours):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_same_model(ours, theirs)
    assert_same_model(ours, plain)


def test_gradients_accumulate():
    theirs, ours = make_pair()
    for model in (theirs, ours):
        first, second = token_ids(2, 7, seed=1), token_ids(2, 7, seed=2)
        losses = [model(ids, labels=ids).loss for ids in (first, second)]
        for loss in reversed(losses):  # both forwards before the first backward
            loss.backward()
        model(IDS, labels=IDS).loss.backward()
    assert_same_gradients(ours, theirs, 1e-9)


def test_a_batch_of_nothing():
    _, ours = make_pair()
    empty = torch.zeros(0, 32, dtype=torch.float64, requires_grad=True)
    index = torch.zeros(0, 2, dtype=torch.int64)
    out = experts_of(ours)(empty, index, torch.zeros(0, 2, dtype=torch.float64))
    assert out.shape == (0, 32)
    out.sum().backward()
    assert experts_of(ours).lora_A["default"].weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    theirs, ours = make_pair()
    with mode():
        assert relative_rms(ours.eval()(IDS).logits, theirs.eval()(IDS).logits) < 1e-9


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_whatever_computed_the_experts_before(experts):
    """float32, since grouped_mm takes no float64 on a CPU."""
    theirs = make_peft(dtype=torch.float32, model={"experts": experts})
    ours = copy.deepcopy(theirs)
    accelerate_peft(ours)
    assert_same_model(ours, theirs, 1e-5)


# --- adapters by name


def both_active(model):
    model.base_model.set_adapter(["default", "other"])


def frozen_beside(model):
    both_active(model)
    model.set_requires_grad("other", False)


def wrappers(model):
    return [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]


def merge_one_wrapper(model):
    experts_of(model).merge()


def hotswap(model):
    with tempfile.TemporaryDirectory() as folder:
        fill_adapters(make_peft(lora_alpha=9), seed=7).save_pretrained(folder)
        hotswap_adapter(model, folder, "default")


CHANGES = {
    "second": lambda model: model.set_adapter("other"),
    "both at once": both_active,
    "one of both frozen": frozen_beside,
    "another in one wrapper": lambda model: experts_of(model).set_adapter("other"),
    "disabled in one wrapper": lambda model: experts_of(model).enable_adapters(False),
    "scaled": lambda model: [each.scale_layer(2.5) for each in wrappers(model)],
    "scaling set": lambda model: [each.set_scale("default", 0.7) for each in wrappers(model)],
    "merged": lambda model: model.merge_adapter(),
    "another merged": lambda model: model.merge_adapter(["other"]),
    "merged in one wrapper": merge_one_wrapper,
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "deleted": lambda model: model.delete_adapter("other"),
    "active deleted": lambda model: (model.set_adapter("other"), model.delete_adapter("other")),
    "added": lambda model: (
        fill_adapters(model.add_adapter("new", lora_config(r=2, use_rslora=True)) or model),
        model.set_adapter("new"),
    ),
    "hot-swapped": hotswap,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_peft_changes_afterwards(change):
    theirs, ours = make_pair(**OTHER)
    for model in (theirs, ours):
        change(model)
    assert_same_model(ours, theirs)


def test_disabled_adapters_are_the_base():
    theirs, ours = make_pair()
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert_same_model(ours, theirs)


def test_no_adapter_is_left():
    theirs, ours = make_pair()
    for model in (theirs, ours):
        model.base_model.delete_adapter("default")
    base = make_model("mixtral", dtype=torch.float64)
    for model in (theirs, ours):
        assert torch.equal(model.base_model.model(IDS).logits, base(IDS).logits)
    accelerate_peft(theirs)


@pytest.mark.parametrize("merge", [True, False], ids=["merge_and_unload", "unload"])
def test_unloaded(merge):
    theirs, ours = (model.merge_and_unload() if merge else model.unload() for model in make_pair())
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert "forward" not in ours.model.layers[0].mlp.experts.__dict__
    accelerate_peft(get_peft_model(ours, lora_config()))


def test_saved_files_are_the_same_bytes(tmp_path):
    theirs = make_peft(target_modules=["q_proj"], **OTHER)
    theirs.save_pretrained(tmp_path / "theirs")
    # A copy would write the configuration's sets in another order.
    handle = accelerate_peft(theirs)
    theirs.save_pretrained(tmp_path / "ours")
    handle.undo()
    for path in (tmp_path / "theirs").rglob("*"):
        if path.suffix in (".safetensors", ".json"):
            other = tmp_path / "ours" / path.relative_to(tmp_path / "theirs")
            assert other.read_bytes() == path.read_bytes(), path
    loaded = PeftModel.from_pretrained(
        make_model("mixtral", dtype=torch.float64), tmp_path / "ours", is_trainable=True
    )
    accelerate_peft(loaded)
    assert_same_model(loaded, theirs)
    loaded.load_adapter(tmp_path / "ours" / "other", "other", is_trainable=True)
    for model in (loaded, theirs):
        model.set_adapter("other")
    assert_same_model(loaded, theirs)


# --- the model as an object


def assert_undone(copied, original):
    """Undo a copy of an accelerated model, which leaves the original, and accelerate it anew."""
    plain = make_peft()
    handle = get_accelerated(nn.Sequential(copied))
    assert handle.model is copied
    handle.undo()
    for module, other in zip(copied.modules(), plain.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        assert len(module._forward_hooks) == len(other._forward_hooks)
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks)
    assert get_accelerated(original).modules[0] is experts_of(original)
    assert is_accelerated(experts_of(original))
    accelerate_peft(copied)


def test_a_deepcopy_has_adapters_of_its_own():
    theirs, ours = make_pair()
    copied = copy.deepcopy(ours)
    fill_adapters(ours, seed=8)
    assert is_accelerated(experts_of(copied))
    assert_same_model(copied, theirs)
    assert_undone(copied, ours)


def test_a_pickle_is_accelerated():
    theirs, ours = make_pair()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_accelerated(experts_of(loaded))
    assert_same_model(loaded, theirs)
    assert_undone(loaded, ours)


def test_undo_is_exact():
    theirs = make_peft()
    ours = copy.deepcopy(theirs)
    with unchanged(ours.get_base_model()):
        handle = accelerate_peft(ours)
        assert handle.names == tuple(
            f"base_model.model.model.layers.{i}.mlp.experts" for i in range(2)
        )
        assert_same_model(ours, theirs)
        ours.zero_grad()
        handle.undo()
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    handle.undo()
    accelerate_peft(ours)
    handle.undo()  # that of an earlier call does nothing
    assert_same_model(ours, theirs)
    assert is_accelerated(experts_of(ours))


def test_an_injected_model():
    theirs = make_model("mixtral", dtype=torch.float64)
    inject_adapter_in_model(lora_config(), theirs)
    ours = copy.deepcopy(fill_adapters(theirs))
    accelerate_peft(ours)
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("layer", [0, 1])
def test_adapters_of_one_layer(layer):
    theirs, ours = make_pair(target_parameters=[f"{layer}.{name}" for name in EXPERTS])
    assert_same_model(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["one", "two"])
def test_compiles_into_one_graph(adapters):
    """PEFT itself breaks the graph, where it parametrises the weights."""
    theirs, ours = make_pair(**OTHER)
    if adapters == "two":
        both_active(theirs)
        both_active(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    expected, actual = theirs(IDS, labels=IDS), compiled(IDS, labels=IDS)
    assert relative_rms(actual.logits, expected.logits) < 1e-6
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(ours, theirs, 1e-6)


def test_hooks_on_the_wrapper_run():
    _, ours = make_pair()
    seen = []
    experts_of(ours).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    ours(IDS)
    assert seen == [(27, 32)]


class NewStacks(TorchDispatchMode):
    """Count the tensors that are made with the shape of a stack of weights."""

    def __init__(self, weights):
        super().__init__()
        self.shapes = {weight.shape for weight in weights}
        self.own = {weight.data_ptr() for weight in weights}
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor) and each.shape in self.shapes:
                self.number += each.data_ptr() not in self.own
        return out


def test_no_delta_is_made():
    """Neither forward nor backward makes a tensor as large as the weights; PEFT does."""
    numbers = []
    for model in make_pair():
        experts = experts_of(model).get_base_layer()
        with NewStacks([experts.gate_up_proj, experts.down_proj]) as new:
            run_experts(model)
        numbers.append(new.number)
    assert numbers[0] > 0
    assert numbers[1] == 0


def test_only_lora_is_accelerated():
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has no experts with adapters of PEFT: give LoraConfig"):
        accelerate_peft(get_peft_model(make_model("mixtral"), config))

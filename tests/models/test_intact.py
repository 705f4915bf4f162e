"""Changes to a patched model that would leave out its adapters: detected, whoever makes them."""

import copy
import functools
import itertools

import accelerate
import pytest
import torch
from support.model_zoo import make_model, token_ids
from support.patched_models import patched_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn import functional as F

from moe_kernels import ModalityLoraConfig, PatchedModel, patch_model
from moe_kernels.models.intact import check_experts
from moe_kernels.moextend import ExpertExtender
from moe_kernels.training import AdapterTrainer

TARGETS = ("experts", "attention", "router")
IDS = token_ids(2, 7)
CALL = {"input_ids": IDS, "modality_ids": torch.ones_like(IDS), "use_cache": False}


def make():
    return patched_model("mixtral", ModalityLoraConfig(r=2, target_modules=TARGETS))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate"])
@pytest.mark.parametrize("removed", [True, False], ids=["removed", "replaced"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not"])
def test_a_forward_that_leaves_out_the_update_is_detected(name, removed, checkpointing):
    model, patched = make()
    if checkpointing is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    module = model.model.layers[0].get_submodule(name)
    if removed:
        del module.forward
    elif name == "mlp.gate":
        module.forward = lambda x: type(module).forward(module, x)
    else:
        module.forward = lambda x: F.linear(x, module.weight)
    with pytest.raises(
        RuntimeError, match=f"added to {name.split('.')[1]} of a layer has not been computed"
    ):
        model(**CALL)
    patched.unpatch()
    assert "forward" not in module.__dict__
    assert torch.equal(model.eval()(IDS).logits, make_model("mixtral")(IDS).logits)


def test_a_module_that_runs_twice_hides_no_other():
    model, _ = make()
    attention = model.model.layers[0].self_attn
    inner = attention.q_proj.forward
    attention.q_proj.forward = lambda x: (inner(x), inner(x))[0]
    attention.k_proj.forward = lambda x: F.linear(x, attention.k_proj.weight)
    with pytest.raises(RuntimeError, match="what was added to k_proj of a layer has not"):
        model(**CALL)


def replace_forward(experts):
    """Compute experts by their weights alone, as kernels do that are bound on an instance."""
    base = copy.copy(experts)
    base.__dict__ = {k: v for k, v in experts.__dict__.items() if not k.startswith("_modality")}
    base.config = copy.deepcopy(experts.config)
    base.config._experts_implementation = "eager"
    return functools.partial(type(experts).forward, base)


def replaced_forwards():
    """Yield arguments of the next test; compiling takes half a minute, so these are slow."""
    for case in itertools.product([False, True], ["experts", "block", "router"], [False, True]):
        compiled, place, added = case
        slow = [pytest.mark.slow] if compiled else []
        name = f"{compiled}-{place}-{'added experts' if added else 'adapters'}"
        yield pytest.param(*case, marks=slow, id=name)


@pytest.mark.parametrize(("compiled", "place", "added"), replaced_forwards())
def test_experts_computed_by_another_forward_are_detected(compiled, place, added):
    targets = () if added else ("experts", "router")
    missing = "gate" if place == "router" else "experts"
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2, target_modules=targets))
    if added:
        ExpertExtender(model).extend([1], 1, init=0)
    block = model.model.layers[1].mlp
    if place == "experts":
        block.experts.forward = replace_forward(block.experts)
    elif place == "router":
        del block.gate.forward
    else:
        replaced = replace_forward(block.experts)
        block.forward = lambda x: replaced(
            x.flatten(0, 1), torch.zeros(x.shape[:2].numel(), 2).long(), x.new_ones(14, 2)
        ).view_as(x)
    forward = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(RuntimeError, match=f"added to .*{missing}.* has not been computed"):
        forward(**CALL)


def test_a_forward_that_wraps_ours_is_kept():
    model, _ = make()
    expected = model(**CALL).logits
    layer = model.model.layers[0]
    for module in (layer.self_attn.q_proj, layer.mlp.gate, layer.mlp.experts, layer.mlp):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    assert torch.equal(model(**CALL).logits, expected)


@pytest.mark.parametrize("switch", ["adapters_disabled", "text_only"])
def test_a_handle_that_was_unpatched_has_no_switches(switch):
    _, patched = make()
    patched.unpatch()
    with pytest.raises(ValueError, match="this handle was unpatched"):
        getattr(patched, switch)()


@pytest.mark.parametrize("use", [AdapterTrainer, PatchedModel.print_trainable_parameters])
def test_a_handle_that_was_unpatched_trains_nothing(use):
    """All of the model trains again, which is not what was asked for."""
    _, patched = make()
    patched.unpatch()
    with pytest.raises(ValueError, match="this handle was unpatched"):
        use(patched)


@pytest.mark.parametrize("switch", ["adapters_enabled", "added_tokens_enabled"])
def test_a_handle_that_was_unpatched_cannot_be_set(switch):
    _, patched = make()
    patched.unpatch()
    with pytest.raises(ValueError, match="this handle was unpatched"):
        setattr(patched, switch, False)


def test_a_forward_reads_the_configuration_of_the_experts_once(monkeypatch):
    model, patched = make()
    experts, read = model.model.layers[0].mlp.experts, []

    class Counting(type(experts.config)):
        def __getattribute__(self, name):
            read.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(experts.config, "__class__", Counting)
    check_experts(patched.parts)
    assert read.count("_experts_implementation") == 1


def test_a_model_whose_method_was_removed_is_saved(tmp_path):
    model, _ = make()
    del model.generate
    with pytest.warns(UserWarning, match="writes the base model"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_the_loss_keeps_its_name():
    expected = make_model("mixtral").loss_function.__name__
    assert make()[0].loss_function.__name__ == expected


def test_a_shallow_copy_of_the_handle_is_refused_in_these_words():
    _, patched = make()
    with pytest.raises(TypeError, match=r"nor copied in part by copy.copy: copy.deepcopy\(model\)"):
        copy.copy(patched)


def test_wrapped_layers_require_grad_again_after_unpatch():
    model, patched = make()
    layers = set(model.model.layers)
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    patched.unpatch()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_parameter_of_the_users_stays_after_unpatch():
    model = make_model("mixtral")
    patched = patch_model(model)
    model.own = torch.nn.Parameter(torch.ones(1))
    patched.unpatch()
    assert model.own.requires_grad

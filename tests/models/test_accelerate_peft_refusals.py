"""Refusals of accelerate_peft: what it does not compute is named, before any work."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from support.families import make_family
from support.model_zoo import make_model, unchanged
from support.peft_models import EXPERTS, IDS, experts_of, lora_config, make_pair, make_peft
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from moe_kernels import ModalityLoraConfig, accelerate_peft, get_accelerated, patch_model
from moe_kernels.models import sharding
from moe_kernels.models.parts import find_experts, up_name


def refused(model, match, error=ValueError, **settings):
    """Check that a model is refused in these words and stays as it was."""
    with unchanged(model.base_model.model), pytest.raises(error, match=match):
        accelerate_peft(model, **settings)


def inner(model):
    """Return the experts module within PEFT's wrappers."""
    return experts_of(model).get_base_layer()


# --- PEFT's own refusals, which docs/peft.md names


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.1},
        {"fan_in_fan_out": True},
        {"alora_invocation_tokens": [1]},
        {"modules_to_save": ["experts"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_peft_refuses_these_on_parameters(settings):
    with pytest.raises(
        (ValueError, TypeError), match="does not work|unsupported|cannot be applied"
    ):
        make_peft(**settings)


# --- ours


@pytest.mark.parametrize("config", [LoHaConfig, IA3Config, LoraConfig])
def test_adapters_of_other_modules_or_kinds(config):
    extra = {"feedforward_modules": []} if config is IA3Config else {}
    model = get_peft_model(make_model("mixtral"), config(target_modules=["q_proj"], **extra))
    refused(model, "PeftModel has no experts with adapters of PEFT: give LoraConfig target_param")


def test_a_model_without_peft():
    with pytest.raises(ValueError, match="MixtralForCausalLM has no experts with adapters of PEFT"):
        accelerate_peft(make_model("mixtral"))
    with pytest.raises(TypeError, match="needs a model of PEFT, got NoneType"):
        accelerate_peft(None)


BY_LAYOUT = pytest.mark.parametrize(
    ("attribute", "value", "match"),
    [
        ("is_transposed", True, "transposed expert weights"),
        ("has_bias", True, "no gate_up_proj_bias"),
        ("is_concatenated", False, "activation .* of interleaved gate and up rows"),
        ("has_gate", False, "experts without a gate"),
        ("act_fn", nn.GELU(), "activation gelu"),
        ("_is_expert_parallel", True, "expert parallelism"),
    ],
)


@pytest.mark.parametrize(
    ("family", "match"),
    [
        (
            "gpt_oss",
            "interleaved gate and up rows; .*transposed expert weights; .*expert biases; "
            r".*activation clamped_swiglu \(only SiLU\)",
        ),
        ("nemotron_h", r"experts without a gate; .*activation relu_squared \(only SiLU\)"),
    ],
)
def test_layouts_that_only_patch_model_takes(family, match):
    experts = find_experts(model := make_family(family))
    names = [f"experts.{up_name(experts)}", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=names)
    refused(get_peft_model(model, config), f"cannot be computed: .*experts: .*{match}")


@BY_LAYOUT
def test_layouts(attribute, value, match):
    model = make_peft()
    setattr(inner(model), attribute, value)
    refused(model, rf"cannot be computed: .*layers.0.mlp.experts: {match}")


def test_experts_that_are_spread_over_ranks():
    model = make_peft()
    inner(model).__dict__[sharding.SPREAD] = object()
    refused(model, r"cannot be computed: .*layers.0.mlp.experts: experts that are spread over r")


@BY_LAYOUT
def test_layouts_that_change_afterwards(attribute, value, match):
    theirs, ours = make_pair()
    setattr(inner(ours), attribute, value)
    with pytest.raises(RuntimeError, match=f"changed after accelerate_peft, .* now: {match}"):
        ours(IDS)
    if attribute == "act_fn":  # PEFT computes any
        inner(theirs).act_fn = value
        with theirs.disable_adapter(), ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_that_train(name):
    model = make_peft()
    getattr(inner(model), name).requires_grad_(True)
    refused(model, f"{name} trains beside its adapter")
    trained = make_pair()[1]
    getattr(inner(trained), name).requires_grad_(True)
    with pytest.raises(ValueError, match=f"{name}.*the experts of the base are frozen"):
        trained(IDS)


def test_a_block_that_is_saved_whole():
    model = make_peft(modules_to_save=["mlp"])
    refused(model, "mlp.modules_to_save.default.experts: gate_up_proj trains beside its adapter")


def test_a_single_expert():
    one = {"num_local_experts": 1, "num_experts_per_tok": 1}
    refused(
        make_peft(model=one), "a single expert, whose adapter PEFT lays out as that of a linear"
    )


def test_quantised_weights():
    model = make_peft()
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(inner(model), name).data.to(torch.int8)
        setattr(inner(model), name, nn.Parameter(weight, requires_grad=False))
    refused(model, r"quantised expert weights \(torch.int8\)")
    inner(model).down_proj.data = inner(model).down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="quantised expert weights .*torch.float8_e4m3fn"):
        accelerate_peft(model)


def test_weights_of_two_dtypes():
    model = make_peft()
    inner(model).down_proj.data = inner(model).down_proj.data.float()
    refused(model, r"expert weights of two dtypes \(torch.float64, torch.float32\)")


def test_experts_in_a_wrapper_of_torch():
    model = make_peft()
    apply_activation_checkpointing(model, check_fn=lambda each: each is inner(model))
    refused(model, "layers.0.mlp.experts: within a CheckpointWrapper of their own: put it around")


@pytest.mark.parametrize("of", ["wrapper", "experts"])
def test_modules_within_that_are_replaced(of):
    """PEFT would compute the new ones."""
    theirs, ours = make_pair()
    for model in (theirs, ours):
        outer = experts_of(model) if of == "wrapper" else experts_of(model).base_layer
        old, outer.base_layer = outer.base_layer, copy.deepcopy(outer.base_layer)
    name = type(old).__name__
    with pytest.raises(RuntimeError, match=f"computes, {name} by {name} was replaced, and t"):
        ours(IDS)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    outer.base_layer = old
    assert ours(IDS).logits.isfinite().all()


def test_data_parallel():
    """Its replicas share the instance's attributes, the forward with its weights too."""
    model = make_peft()
    handle = accelerate_peft(model)
    with pytest.raises(RuntimeError, match="nn.DataParallel is not supported: its replicas would"):
        [module._replicate_for_data_parallel() for module in model.modules()]
    handle.undo()
    assert [module._replicate_for_data_parallel() for module in model.modules()]


def test_weights_that_were_freed():
    model = make_peft(target_parameters=[EXPERTS[0]])
    inner(model).down_proj = None
    refused(model, "no stacked down_proj")


def test_another_parameter_of_the_experts():
    model = make_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.scale = nn.Parameter(torch.ones(4, 2, 2), requires_grad=False)
    peft = get_peft_model(model, lora_config(target_parameters=[*EXPERTS, "mlp.experts.scale"]))
    refused(peft, "adapters on scale")


def test_two_wrappers_of_one_parameter():
    model = make_peft(target_parameters=[EXPERTS[0]])
    block = model.get_base_model().model.layers[0].mlp
    config = lora_config(target_parameters=[EXPERTS[0]])
    block.experts = ParamWrapper(block.experts, "default", "gate_up_proj", config, r=2)
    refused(model, "several wrappers of one parameter")


def test_a_model_that_was_accelerated():
    model = make_pair()[1]
    refused(model, r"accelerated already, or is a copy of one.*get_accelerated\(model\) returns")


def test_a_handle_that_is_not_there():
    with pytest.raises(ValueError, match=r"this PeftModel is not accelerated: call accelerate_pef"):
        get_accelerated(make_peft())
    part = copy.deepcopy(make_pair()[1].get_base_model())
    with pytest.raises(ValueError, match="MixtralForCausalLM is a part of an accelerated model"):
        get_accelerated(part)


@pytest.mark.parametrize("module", [experts_of, inner], ids=["wrapper", "experts"])
def test_a_forward_that_was_replaced(module):
    model = make_peft()
    add_hook_to_module(module(model), AlignDevicesHook("cpu"))
    refused(model, "forward was replaced .a device map|hooks or a forward of its own on MixtralExp")


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
@pytest.mark.parametrize("module", [lambda m: experts_of(m).base_layer, inner])
def test_hooks_within_the_wrappers(module, register):
    """They would not run; those on the outermost wrapper do."""
    model = make_peft()
    hook = getattr(module(model), register)(lambda *args: None)
    refused(model, "hooks or a forward of its own on (ParamWrapper|MixtralExperts)")
    hook.remove()
    accelerate_peft(model)
    getattr(module(model), register)(lambda *args: None)
    with pytest.raises(RuntimeError, match="within what accelerate_peft computes, would be left"):
        model(IDS)


def test_hooks_that_come_after_compiling():
    torch._dynamo.reset()
    model = make_pair()[1]
    compiled = torch.compile(experts_of(model), backend="eager")
    inputs = torch.randn(3, 32).double(), torch.zeros(3, 2).long(), torch.ones(3, 2).double()
    expected = compiled(*inputs)
    for module in (experts_of(model).base_layer, inner(model)):
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
            hook = getattr(module, f"register_{kind}_hook")(lambda *args: None)
            with pytest.raises(RuntimeError, match="within what accelerate_peft computes, would"):
                compiled(*inputs)
            hook.remove()
            assert torch.equal(compiled(*inputs), expected)


def test_an_offload_and_its_end():
    theirs, ours = make_pair()
    cpu_offload(ours, "cpu")
    with pytest.raises(RuntimeError, match="own on MixtralExperts, within what accelerate_peft"):
        ours(IDS)
    remove_hook_from_submodules(ours)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    cpu_offload(theirs, "cpu")
    with pytest.raises(ValueError, match="hooks or a forward of its own on MixtralExperts"):
        accelerate_peft(theirs)
    remove_hook_from_submodules(theirs)
    accelerate_peft(theirs)


def test_undo_after_another_forward():
    theirs, ours = make_peft(), make_peft()
    handle = accelerate_peft(ours)
    expected = ours(IDS).logits
    add_hook_to_module(experts_of(ours, 1), AlignDevicesHook("cpu"))
    assert torch.equal(ours(IDS).logits, expected)
    with pytest.raises(RuntimeError, match="layers.1.mlp.experts was replaced after accelerate_pe"):
        handle.undo()
    assert torch.equal(ours(IDS).logits, expected)
    remove_hook_from_submodules(ours)
    handle.undo()
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_backend_that_is_not_here():
    refused(make_peft(), "backend", error=(RuntimeError, ValueError), backend="cuda")
    refused(make_peft(), "backend", error=(RuntimeError, ValueError), backend="none")


def test_adapters_on_another_device():
    ours = make_pair()[1]
    experts_of(ours).lora_A.to("meta")
    with pytest.raises(ValueError, match=r"lora_A must be on|meta"):
        ours(IDS)


def test_a_modality_without_a_patch():
    refused(make_peft(), "'image' needs a model that knows each token's modality", modality="image")


def test_patching_afterwards():
    ours = make_pair()[1]
    with pytest.raises(TypeError, match=r"let moe_kernels.accelerate_peft\(model\) compute those"):
        patch_model(ours.get_base_model())


def test_adapters_of_a_patch_beside_those_of_peft():
    model = make_model("mixtral")
    patch_model(model, ModalityLoraConfig(target_modules=("experts",)))
    peft = get_peft_model(model, lora_config())
    remedy = r"patch the base with ModalityLoraConfig\(target_modules=\(\)\) before get_peft_model"
    refused(peft, f"of patch_model beside those of PEFT: {remedy}", modality="image")
    remedy = (
        r"let accelerate_peft\(model, modality=...\) bind .* ModalityLoraConfig\(target_modules="
        r"\(\)\), or put the module back \(PEFT: unload"
    )
    with pytest.raises(RuntimeError, match=f"ParamWrapper after patch_model, .* to it: {remedy}"):
        peft(IDS)

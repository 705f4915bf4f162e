"""Batches of several PEFT adapters, which PEFT alone refuses on experts; threads; PEFT's cases."""

import functools
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from support.model_zoo import FAMILY, make_model, token_ids
from support.peft_models import (
    EXPERTS,
    IDS,
    assert_same_model,
    experts_of,
    lora_config,
    make_pair,
    make_peft,
)
from torch import nn

from moe_kernels import accelerate_peft
from moe_kernels.testing import relative_rms

BASE = "__base__"
OTHER = {"r": 5, "lora_alpha": 2}
NAMES = ["other", "default", BASE]


def make(family="mixtral", *, model=None, **settings):
    """Return an accelerated model with two adapters of different ranks."""
    return make_pair(family, second=OTHER | settings, model=model, **settings)[1].eval()


def alone(model, name, ids, run):
    """Return the result of an adapter by itself."""
    if name == BASE:
        with model.disable_adapter():
            return run(ids)
    model.set_adapter(name)
    return run(ids)


# --- several adapters in one batch


@FAMILY
@pytest.mark.parametrize("names", [NAMES, [BASE] * 3, ["other"] * 3], ids=["mixed", BASE, "one"])
def test_each_sequence_is_as_if_it_were_alone(family, names):
    model = make(family, target_modules=["q_proj"])
    with torch.no_grad():
        logits = model(IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            own = IDS[row : row + 1]
            expected = alone(model, name, own, lambda ids: model(ids).logits[0])
            assert relative_rms(logits[row], expected) < 1e-6


def test_padding_and_generation():
    model = make(target_modules=["q_proj"])
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 5, "do_sample": False}
    mixed = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=NAMES, **settings)
    for row, name in enumerate(NAMES):
        inputs = {"input_ids": IDS[row : row + 1], "attention_mask": mask[row : row + 1]}
        own = alone(model, name, inputs, lambda each: model.generate(**each, **settings))
        assert torch.equal(mixed[row], own[0])


def test_beams_get_the_adapter_of_their_sequence():
    model = make()
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **settings)
    for row, name in enumerate(NAMES):
        own = alone(
            model, name, IDS[row : row + 1], lambda ids: model.generate(input_ids=ids, **settings)
        )
        assert torch.equal(mixed[2 * row : 2 * row + 2], own)


def test_samples_of_a_sequence_have_a_name_each():
    model = make()
    settings = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with pytest.raises(ValueError, match="one name for each sequence, got 3 for 6 sequences"):
        model.generate(input_ids=IDS, adapter_names=NAMES, **settings)
    names = [name for name in NAMES for _ in range(2)]
    mixed = model.generate(input_ids=IDS, adapter_names=names, **settings)
    for row, name in enumerate(NAMES):
        own = alone(
            model, name, IDS[row : row + 1], lambda ids: model.generate(input_ids=ids, **settings)
        )
        assert torch.equal(mixed[2 * row : 2 * row + 2], own)


def test_peft_alone_refuses_them():
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        make_peft(second=OTHER).eval()(IDS, adapter_names=NAMES)


@pytest.mark.parametrize(
    ("change", "names", "match"),
    [
        (None, ["unknown"] * 3, "non-existing adapter.*unknown"),
        (None, NAMES * 3, "one name for each sequence, got 9 for 3 sequences"),
        (None, NAMES[:1], "one name for each sequence, got 1 for 3 sequences"),
        (lambda model: model.train(), NAMES, "when the model is in training mode"),
        (lambda model: model.merge_adapter(), NAMES, "while adapters are merged"),
        (
            lambda model: experts_of(model).base_layer.enable_adapters(False),
            NAMES,
            "or disabled for one of the projections",
        ),
    ],
    ids=["unknown", "too many", "too few", "training", "merged", "disabled"],
)
def test_names_that_do_not_fit(change, names, match):
    model = make()
    if change:
        change(model)
    for run in (model, lambda ids, **names: model.generate(input_ids=ids, **names)):
        with pytest.raises(ValueError, match=match):
            run(IDS, adapter_names=names)
    model.unmerge_adapter()
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    with torch.no_grad():
        expected = make_pair("mixtral", second=OTHER)[0](IDS).logits
        assert relative_rms(model.eval()(IDS).logits, expected) < 1e-6  # without any names


@pytest.mark.parametrize("failing", ["self_attn.q_proj", "mlp.gate", "mlp.experts"])
def test_a_forward_that_fails_leaves_no_names(failing):
    """PEFT alone leaves its hooks, and the next forward would use the names of the last one."""
    model = make(target_modules=["q_proj"])
    expected = model(IDS).logits

    def fail(module, args, output):
        raise MemoryError

    module = model.get_base_model().model.layers[1].get_submodule(failing)
    for run in (model, lambda ids, **names: model.generate(input_ids=ids, **names)):
        hook = module.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            run(IDS, adapter_names=NAMES)
        hook.remove()
        assert torch.equal(model(IDS).logits, expected)


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"typo": 1}, ValueError),
        ({"logits_processor": [interrupt]}, KeyboardInterrupt),
        ({"num_beams": 2, "logits_processor": [interrupt]}, KeyboardInterrupt),
    ],
    ids=["before the first forward", "between forwards", "beams"],
)
def test_generation_that_fails_leaves_no_names(settings, error):
    """Also outside of a forward, and by Ctrl-C."""
    model = make(target_modules=["q_proj"])
    expected = model(IDS).logits
    with pytest.raises(error):
        model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=3, **settings)
    assert torch.equal(model(IDS).logits, expected)


def test_an_interrupt_leaves_no_names():
    """A hook of the user's stays, whatever its keywords, and so do the names of a call around."""
    model = make(target_modules=["q_proj"])
    expected = model(IDS).logits, model(IDS, adapter_names=NAMES).logits
    layers = model.get_base_model().model.layers
    ours = functools.partial(lambda *args, adapter_names: None, adapter_names=NAMES)
    layers[1].register_forward_pre_hook(ours)
    within = layers[1].mlp.gate.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS, adapter_names=NAMES)
    within.remove()
    assert torch.equal(model(IDS).logits, expected[0])
    assert ours in layers[1]._forward_pre_hooks.values()

    def run_within(*args):
        around.remove()
        with pytest.raises(ValueError, match="non-existing adapter"):
            model(IDS, adapter_names=["unknown"] * 3)

    around = layers[0].register_forward_hook(run_within)
    assert torch.equal(model(IDS, adapter_names=NAMES).logits, expected[1])


def test_names_that_peft_has_left_before():
    gate_up = {"target_parameters": [EXPERTS[0]]}
    model = make_peft(second=OTHER | gate_up, **gate_up).eval()
    expected = model(IDS).logits
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(IDS, adapter_names=NAMES)
    accelerate_peft(model)
    assert relative_rms(model(IDS).logits, expected) < 1e-9


def test_disabled_adapters_stay_disabled():
    model = make()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS, adapter_names=NAMES).logits, model(IDS).logits)


def test_another_thread_while_names_are_given():
    """It would use these names, which PEFT's hooks hand to all threads."""
    model, errors = make(target_modules=["q_proj"]), []
    expected = [model(IDS, adapter_names=NAMES).logits, model(IDS).logits]

    def run():
        with pytest.raises(RuntimeError, match="another thread runs this model with adapter_names"):
            model(IDS)
        errors.append(True)

    def run_another(module, args, output):
        hook.remove()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    hook = model.get_base_model().model.embed_tokens.register_forward_hook(run_another)
    assert torch.equal(model(IDS, adapter_names=NAMES).logits, expected[0])
    assert errors
    assert torch.equal(model(IDS).logits, expected[1])


def test_threads_run_one_model():
    model = make()
    expected = {seed: model(token_ids(2, 9, seed=seed)).logits for seed in range(4)}
    found, errors = {}, []

    def run(seed):
        try:
            for _ in range(5):
                found[seed] = model(token_ids(2, 9, seed=seed)).logits
        except Exception as error:  # reported below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(found[seed], logits) for seed, logits in expected.items())


# --- the cases of PEFT's own tests of target_parameters


def test_a_rank_pattern_divides_the_rank_by_the_experts(tmp_path):
    theirs, ours = make_pair(
        r=8, target_modules=["q_proj"], rank_pattern={"experts.gate_up_proj": 2}
    )
    wrapper = experts_of(ours).base_layer
    assert wrapper.r["default"] == 2
    assert wrapper.lora_A["default"].weight.shape == (2 * 4, 32)
    assert wrapper.scaling["default"] == 4.5 / 2
    assert_same_model(ours, theirs)
    ours.save_pretrained(tmp_path)
    base = make_model("mixtral", dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    accelerate_peft(loaded)
    assert_same_model(loaded, theirs)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_matrix_as_a_parameter_equals_its_module(accelerated):
    """A router's weight stays PEFT's, beside experts that are accelerated."""
    model = make_peft(target_parameters=[*EXPERTS, "mlp.gate.weight"])
    expected = model(IDS).logits
    if accelerated:
        handle = accelerate_peft(model)
        assert all(name.endswith("experts") for name in handle.names)
    assert relative_rms(model(IDS).logits, expected) < 1e-9
    gate = model.get_base_model().model.layers[0].mlp.gate
    assert isinstance(gate, ParamWrapper)
    assert "forward" not in gate.__dict__


def test_all_parameters_of_a_module_are_used_and_trained():
    _, model = make_pair()
    expected = model(IDS).logits
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(named) == 2 * 2 * 2
    for parameter in named.values():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
            assert relative_rms(model(IDS).logits, expected) > 1e-3
            parameter.copy_(before)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimiser = torch.optim.SGD(named.values(), lr=0.1)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert all(not torch.equal(before[name], parameter) for name, parameter in named.items())


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_parametrisation_that_was_there_before(name):
    """PEFT adds to what it gives; the kernels would not know what it depends on."""

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    base = make_model("mixtral", dtype=torch.float64).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(base.model.layers[0].mlp.experts, name, Twice())
    names = [f"model.layers.0.{each}" for each in EXPERTS]
    model = get_peft_model(base, lora_config(target_parameters=names))
    with pytest.raises(ValueError, match=f"no stacked {name}|{name} is computed"):
        accelerate_peft(model)


def test_adapters_on_other_parameters_are_refused():
    _, model = make_pair()
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        model.add_adapter("third", lora_config(target_parameters=["mlp.gate.weight"]))
    assert "third" not in model.peft_config


def test_a_second_adapter_has_the_same_wrappers():
    _, model = make_pair()
    before = [each for each in model.modules() if isinstance(each, ParamWrapper)]
    model.add_adapter("other", lora_config())
    assert [each for each in model.modules() if isinstance(each, ParamWrapper)] == before
    assert all(set(each.lora_A) == {"default", "other"} for each in before)


def test_adapters_load_in_any_order(tmp_path):
    model = make()
    with torch.no_grad():
        expected = {name: alone(model, name, IDS, model).logits for name in NAMES[:2]}
    model.save_pretrained(tmp_path)
    base = make_model("mixtral", dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, tmp_path / "other", adapter_name="other")
    accelerate_peft(loaded)
    result = loaded.load_adapter(tmp_path, adapter_name="default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    with torch.no_grad():
        for name, logits in expected.items():
            assert torch.equal(alone(loaded, name, IDS, loaded.eval()).logits, logits)


def test_adapters_that_cannot_be_combined():
    model = make()
    with pytest.raises(ValueError, match="add_weighted_adapter does not support targeting"):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum")


def test_merged_weights_that_are_not_finite():
    model = make_pair()[1]
    experts_of(model).lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


def test_embeddings_as_inputs():
    theirs, ours = make_pair()
    embeds = theirs.get_input_embeddings()(IDS).detach()
    expected = theirs(inputs_embeds=embeds).logits
    assert relative_rms(ours(inputs_embeds=embeds).logits, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_generates(dtype):
    ours = make_pair(dtype=dtype)[1].eval()
    assert ours.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).shape == (3, 12)


def test_a_parameter_of_the_model_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

    with pytest.raises(ValueError, match="on the top-level module is not supported"):
        get_peft_model(Model(), LoraConfig(target_parameters=["down_proj"]))


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param("model", marks=pytest.mark.slow), "layers"])
def test_a_compiled_model_takes_other_names(how):
    """Layers that are handed names are left uncompiled: a graph would keep its first names."""
    torch._dynamo.reset()
    settings = {"target_modules": ["q_proj"], "target_parameters": [EXPERTS[0]]}
    settings["model"] = {"num_hidden_layers": 1}
    model, compiled = make(**settings), make(**settings)
    if how == "model":
        compiled = torch.compile(compiled, backend="eager")
    else:
        for layer in compiled.get_base_model().model.layers:
            layer.compile(backend="eager")
    with torch.no_grad():
        for names in (None, NAMES, [BASE, *NAMES[:2]], None, NAMES[::-1]):
            given = {} if names is None else {"adapter_names": names}
            expected = model(IDS, **given).logits
            assert relative_rms(compiled(IDS, **given).logits, expected) < 1e-5
        run = compiled if how == "model" else compiled.generate
        with pytest.raises(ValueError, match="one name for each sequence, got 2 for 4 sequences"):
            run(input_ids=token_ids(4, 9), adapter_names=NAMES[:2])


def test_a_block_that_is_called_by_keyword():
    """The number of sequences is that of the model's inputs, which every block is given."""
    model = make()
    for layer in model.get_base_model().model.layers:
        layer.mlp._call_impl = functools.partial(_by_keyword, layer.mlp._call_impl)
    with pytest.raises(ValueError, match="one name for each sequence, got 2 for 4 sequences"):
        model(token_ids(4, 9), adapter_names=NAMES[:2])


def _by_keyword(call, hidden_states):
    return call(hidden_states=hidden_states)

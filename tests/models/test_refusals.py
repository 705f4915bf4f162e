"""Refusals of patching and of a patched model: they name the reason and change nothing."""

import copy
import functools
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from support.families import make_family
from support.model_zoo import (
    VOCAB,
    fill,
    make_model,
    randomise,
    refused,
    snapshot,
    token_ids,
    unchanged,
)
from support.patched_models import patched_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.models import mixing, quantisation, sharding
from moe_kernels.models.handle import get_patched
from moe_kernels.models.parts import find_experts, find_parts
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms

DENSE = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def test_not_a_transformers_model():
    refused(nn.Linear(2, 2), TypeError, "transformers model, got Linear")


def test_a_dense_model():
    model = LlamaForCausalLM(LlamaConfig(**DENSE))
    refused(model, ValueError, "LlamaForCausalLM.*no layer has experts: .*dense_to_moe")


def test_experts_in_a_list():
    model = make_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    match = r"layer 0: mlp.experts is ModuleList, without a stacked gate_up_proj \(E, 2I, H\)"
    refused(model, ValueError, match)


def test_weights_that_an_engine_keeps_elsewhere():
    """Such weights have shape (0,), experts too, which therefore look like none."""
    model = make_model("mixtral")
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    refused(
        model, ValueError, "its embedding table is empty: its engine keeps it elsewhere; use FSDP2"
    )


def test_two_lists_of_layers():
    model = make_model("mixtral")
    model.model.blocks = model.model.layers
    model.model.others = copy.deepcopy(model.model.layers)
    del model.model.layers
    match = "MixtralModel has no list of decoder layers, `layers` or one that holds experts; it has"
    refused(model, ValueError, f"{match} embed_tokens, norm")


def test_two_modules_of_experts_in_a_layer():
    model = make_model("mixtral")
    model.model.layers[1].mlp.others = copy.deepcopy(model.model.layers[1].mlp.experts)
    refused(model, ValueError, r"layer 1: several modules of experts \(mlp.experts, mlp.others\)")


def test_experts_without_the_interface_of_transformers():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 24}
    config = Llama4TextConfig(**sizes, **layers, **experts, pad_token_id=0)
    match = (
        "layer 0: Llama4TextExperts is not built on transformers' interface of experts (no "
        "has_gate, is_concatenated, is_transposed, has_bias), through which the kernels are "
        "called: docs/families.md lists classes that are"
    )
    refused(Llama4ForCausalLM(config), ValueError, re.escape(match))


def test_a_model_with_a_language_model_in_it():
    """Qwen3-Omni has no head, and its thinker has one."""

    class Whole(PreTrainedModel):
        _supports_sdpa = True

        def __init__(self, thinker):
            super().__init__(thinker.config)
            self.thinker = thinker

    whole = Whole(make_model("mixtral"))
    refused(
        whole, ValueError, "Whole is not supported: .* language-model head: patch model.thinker"
    )
    patch_model(whole.thinker).unpatch()


def test_attention_of_which_some_layers_are_another():
    """One layer refuses the target for all; the other layers can be named."""
    model = make_family("minimax")
    refused(model, ValueError, r"layer \d: self_attn is MiniMaxLightningAttention with qkv_proj")
    ours = [i for i, each in enumerate(find_parts(model)) if each.attention]
    patch_model(model, ModalityLoraConfig(layers_to_transform=tuple(ours))).unpatch()


def test_a_model_without_a_head():
    for model in (BertModel(BertConfig(**DENSE)), MixtralModel(make_model("mixtral").config)):
        match = f"{type(model).__name__}.*no language-model head"
        with pytest.raises(ValueError, match=match):
            patch_model(model)


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda experts: setattr(experts, "act_fn", nn.Mish()), r"activation Mish \(only silu, ge"),
        (lambda experts: setattr(experts, "has_post_expert_norm", True), "no post_expert_norm"),
        (lambda experts: delattr(experts, "has_gate"), r"built on .* \(no has_gate\)"),
        (lambda experts: delattr(experts, "down_proj"), "no stacked down_proj"),
    ],
)
def test_an_experts_layout_that_does_not_fit(break_it, match):
    model = make_model("mixtral")
    break_it(find_experts(model.model.layers[1]))
    refused(model, ValueError, f"layer 1: .*{match}")


def test_experts_that_are_spread_over_ranks_without_a_mask():
    model = make_model("mixtral")
    find_experts(model.model.layers[1])._is_expert_parallel = True
    match = r"model.layers.1.mlp.experts: expert parallelism .*ep_implementation=\"moe_kernels\"\)"
    refused(model, ValueError, match)


def test_quantised_weights():
    model = make_model("mixtral")
    experts = find_experts(model.model.layers[0])
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)
    refused(model, ValueError, r"quantised expert weights \(torch.int8\)")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        experts.gate_up_proj.data = torch.zeros(4, 48, 32).to(dtype)
        with pytest.raises(
            ValueError, match=rf"weights \({dtype}\); load them in bfloat16, FP8 ch"
        ):
            patch_model(model)


def flag_as(model, method):
    """Set the flags that transformers leaves on a model loaded by this quantiser."""
    model.is_quantized = True
    model.quantization_method = QuantizationMethod(method)
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda: False)
    model.config.quantization_config = QuantizationConfigMixin(model.quantization_method)
    model.config._is_quantized = True
    return model


METHODS = [method.value for method in QuantizationMethod]


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_a_loader_has_unpacked(method):
    """Flags alone are no obstacle: they are away until the model is unpatched."""
    model = flag_as(make_model("mixtral"), method)
    with unchanged(model):
        patched = patch_model(model)
        assert not vars(model).keys() & {"is_quantized", "quantization_method", "hf_quantizer"}
        assert not hasattr(model.config, "quantization_config")
        patched.unpatch()
    assert model.is_quantized and model.config.quantization_config


def test_a_model_with_unpacked_weights_is_cast_saved_and_trained(tmp_path):
    model = flag_as(make_model("mixtral"), METHODS[0])
    before, ids = snapshot(model), token_ids(2, 8)
    patched = patch_model(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    Trainer(model=model, args=arguments)
    model.half().float()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    model(ids, labels=ids).loss.backward()
    patched.unpatch()
    after = snapshot(model)
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        assert name in after["attributes"][""]
    assert model.config.quantization_config and model.config._is_quantized
    before.pop("state"), after.pop("state")  # half() rounded it
    assert after == before


class Linear8(nn.Module):
    """A linear layer of weights in 8 bits, with the scale of a row or of all rows it gets."""

    def __init__(self, linear, *, by_row=True):
        super().__init__()
        self.in_features, self.by_row = linear.in_features, by_row
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        size = x.abs().amax(-1, keepdim=True) if self.by_row else x.abs().max()
        rounded = (x / size * 127).round() * (size / 127)
        return rounded @ (self.weight.float() * self.scale).T


def quantise_attention(model, **options):
    """Replace q, k, v and o, and leave the flags of a model that keeps them packed."""
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Linear8(getattr(layer.self_attn, name), **options))
    return flag_as(model, METHODS[0])


EXPERTS = ModalityLoraConfig(target_modules=("experts",))


def test_linear_layers_that_are_quantised_and_not_adapted(tmp_path):
    model = quantise_attention(make_model("mixtral"))
    refused(model, ValueError, "layer 0: self_attn.q_proj is Linear8, not nn.Linear: leave it out")
    ids = token_ids(2, 12)
    pictures = torch.tensor([[0], [1]]).expand_as(ids)
    with unchanged(model), torch.no_grad():
        patched = patch_model(model, EXPERTS)
        assert "is_quantized" not in vars(model)  # Trainer refuses it
        assert model.hf_quantizer and model.config.quantization_config  # what saves it asks these
        before = model(ids).logits
        randomise(patched)
        after = model(ids, modality_ids=pictures).logits
        assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
        patched.save_adapter(tmp_path)
        patched.load_adapter(tmp_path)
        patched.unpatch()
    with pytest.raises(ValueError, match="trained on other base weights"):
        patch_model(make_model("mixtral"), EXPERTS).load_adapter(tmp_path)
    patch_model(model, ModalityLoraConfig(target_modules=("experts", "router"))).unpatch()


class OneScale(nn.Linear):
    """A linear layer that rounds what it gets by one scale for all rows; its weight is plain."""

    def forward(self, x):
        size = x.abs().max()
        return super().forward((x / size * 127).round() * (size / 127))


class OneScaleOfCodes(nn.Module):
    """The same, with codes in a buffer, without a size, and for rows of sequences alone."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().mul(64).to(torch.int8))

    def forward(self, x):
        assert x.ndim == 3
        return x / x.abs().max() @ self.codes.float().T


class OneScaleOfRows(nn.Module):
    """The same of a plain matrix, which says of itself neither a size nor that it is linear."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach())

    def forward(self, x):
        return x / x.abs().max() @ self.weight.T


def replace_output(make, **attributes):
    """Return a model whose last layer has another module in its output projection's place."""
    model = make_model("mixtral")
    attention = model.model.layers[1].self_attn
    attention.o_proj = make(attention.o_proj)
    vars(attention.o_proj).update(attributes)
    return model


def with_one_scale(linear):
    other = OneScale(linear.in_features, linear.out_features, bias=False)
    other.weight = linear.weight
    return other


def with_a_forward_of_its_own(linear):
    """Replace a layer's forward, as compressed-tensors does."""
    linear.forward = functools.partial(OneScale.forward, with_one_scale(linear))
    return linear


def limited(linear, threshold=1e4):
    """Return a layer that treats columns in which any row is large in another way, as LLM.int8."""
    other = with_one_scale(linear)

    def forward(x):
        large = x.abs().reshape(-1, x.shape[-1]).amax(0) > threshold
        return nn.functional.linear(torch.where(large, x, x.bfloat16().to(x.dtype)), linear.weight)

    other.forward = forward
    return other


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Linear8, by_row=False),
        with_one_scale,
        OneScaleOfCodes,
        OneScaleOfRows,
        with_a_forward_of_its_own,
        limited,
    ],
    ids=["codes", "plain", "unsized_codes", "unsized_plain", "replaced_forward", "threshold"],
)
def test_a_layer_whose_rows_depend_on_each_other(make):
    """Text would change with the pictures beside it."""
    model = replace_output(make)
    codes = quantisation.has_packed_weights(model)
    match = (
        r"a row of layers.1.self_attn.o_proj \(\w+\) depend on other rows, .* with pictures: "
        + ("load it unquantised, .*threshold=0" if codes else "let it compute each row by itself")
    )
    refused(model, ValueError, match, EXPERTS)


def test_a_layer_that_cannot_be_tried():
    def fails(x):
        raise KeyError("no kernel")

    model = replace_output(Linear8, forward=fails)
    match = r"tried in layers.1.self_attn.o_proj \(Linear8\), .* \(KeyError: 'no kernel'\): load it"
    refused(model, ValueError, match, EXPERTS)


def test_layers_that_are_linear_by_another_name():
    """A subclass without a forward, a wrapper, and a module with a matrix that takes no rows."""

    class Plain(nn.Linear):
        pass

    class Wrapped(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.base_layer = linear.in_features, linear
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return self.base_layer(x) + self.dropout(x)

    class Table(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.inner, self.weight = linear, nn.Parameter(torch.ones(2, 3))

        def forward(self, x):
            return self.inner(x) + self.weight.mean()

    class Generated(nn.Linear):
        """It has dropout of a generator of its own."""

        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features)
            self.generator = torch.Generator()

        def forward(self, x):
            y = super().forward(x)
            kept = torch.rand(y.shape, generator=self.generator) > 0.1
            return y * kept if self.training else y

    class Finite(nn.Linear):
        def forward(self, x):
            y = super().forward(x) * super().forward(x)
            if not y.isfinite().all():
                raise FloatingPointError("overflow")
            return y

    class Own(nn.Linear):
        pass

    Own.forward = lambda self, x: nn.functional.linear(x, self.weight)

    def broken(linear):
        other = Own(linear.in_features, linear.out_features)
        other.weight.data[0, 0] = torch.nan  # is not equal to itself
        return other

    patch_model(replace_output(lambda linear: Plain(linear.in_features, 32)), EXPERTS)
    patch_model(replace_output(Wrapped), EXPERTS)
    patch_model(replace_output(Table), EXPERTS)
    patch_model(replace_output(Generated), EXPERTS)
    patch_model(replace_output(lambda linear: Finite(linear.in_features, 32)), EXPERTS)
    patch_model(replace_output(broken), EXPERTS)
    model = replace_output(broken).to(torch.bfloat16)
    model.model.layers[1].self_attn.o_proj.float()
    patch_model(model, EXPERTS)
    patch_model(replace_output(broken).to("meta"), EXPERTS)


class Largest(nn.Linear):
    """A linear layer that notes the largest number that it got in training."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.largest.copy_(torch.maximum(self.largest, x.abs().max()))
        return nn.functional.linear(x, self.weight)


def without_copies(model):
    output = model.model.layers[1].self_attn.o_proj
    output.lock, output.scale = threading.Lock(), output.weight.sum() * 1


def offloaded(model):
    pytest.importorskip("accelerate").cpu_offload(model, "cpu")


@pytest.mark.parametrize("change", [lambda model: None, without_copies, offloaded])
def test_a_trial_leaves_the_layer_alone(change, monkeypatch):
    """Its buffers, hooks, its replaced forward and the generators of all devices."""
    model = replace_output(Largest).train()
    output, seen = model.model.layers[1].self_attn.o_proj, []
    change(model)
    output.register_forward_hook(lambda *call: seen.append(call))
    query = model.model.layers[1].self_attn.q_proj
    query.forward = (lambda inner: lambda x: (seen.append(x), inner(x))[1])(query.forward)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seen.append)
    state = torch.random.get_rng_state()
    assert mixing.linear_problem(model.model, torch.float32) is None
    assert not seen and output.largest == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_layer_of_each_kind_is_tried(monkeypatch):
    tried = []
    trial = mixing._mixes
    monkeypatch.setattr(mixing, "_mixes", lambda *call: tried.append(call) or trial(*call))
    layers = nn.ModuleList(Largest(nn.Linear(8, 8 + 8 * (n > 5))) for n in range(9))
    assert mixing.linear_problem(layers, torch.float32) is None
    assert len(tried) == 2  # by shape
    layers[3].register_buffer("switch", torch.ones((), dtype=torch.int64))
    layers[4].register_buffer("switch", torch.zeros((), dtype=torch.int64))
    layers[7].state = SimpleNamespace(threshold=6.0)
    assert mixing.linear_problem(layers, torch.float32) is None
    assert len(tried) == 2 + 5


@pytest.mark.parametrize("place", ["lm_head", "model.embed_tokens"])
def test_packed_weights_of_the_vocabulary(place):
    model = make_model("mixtral")
    weight = torch.zeros(VOCAB, 34, dtype=torch.uint8)
    model.get_submodule(place).weight = nn.Parameter(weight, requires_grad=False)
    refused(model, ValueError, r"has a packed weight \(torch.uint8\): .*GgufConfig")


@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp.gate"])
def test_packed_weights_that_would_be_adapted(place):
    """Some quantisers keep the class of a layer, and replace that of its weight."""

    class Packed(torch.Tensor):
        pass

    model = make_model("mixtral")
    module = model.model.layers[1].get_submodule(place)
    module.weight = nn.Parameter(module.weight.data.as_subclass(Packed), requires_grad=False)
    everything = ModalityLoraConfig(target_modules=("experts", "attention", "router"))
    refused(model, ValueError, r"layer 1: .* a?.*packed weight \(Packed\): leave", everything)
    if place == "mlp.gate":
        extender = ExpertExtender(patch_model(model, EXPERTS).model)
        with pytest.raises(ValueError, match=r"a router with a packed weight \(Packed\)"):
            extender.extend("all", init=0)


def test_weights_of_a_tensor_subclass():
    class Packed(torch.Tensor):
        pass

    model = make_model("mixtral")
    experts = find_experts(model.model.layers[0])
    experts.down_proj = nn.Parameter(experts.down_proj.data.as_subclass(Packed))
    refused(model, ValueError, "expert weights of class Packed")


def test_an_attention_projection_that_is_not_linear():
    class Linear4bit(nn.Linear):
        pass

    model = make_model("mixtral")
    model.model.layers[1].self_attn.k_proj = Linear4bit(32, 16)
    refused(model, ValueError, "layer 1: self_attn.k_proj is Linear4bit, not nn.Linear")
    patch_model(model, ModalityLoraConfig(target_modules=("experts",))).unpatch()
    patch_model(model, ModalityLoraConfig(layers_to_transform=(0,))).unpatch()


def test_forwards_that_somebody_else_replaced():
    """accelerate replaces the model's forward for mixed precision; ours would bypass it."""
    model = make_model("mixtral")
    for module, match in (
        (model, "its forward was replaced"),
        (model.lm_head, "Linear has a forward of its own"),
        (model.model.layers[0].self_attn.q_proj, "q_proj has a forward of its own"),
    ):
        module.forward = functools.partial(type(module).forward, module)
        refused(model, ValueError, match)
        if "q_proj" in match:  # then the module is not ours to change
            patch_model(model, ModalityLoraConfig(target_modules=("experts",))).unpatch()
        del module.forward


def test_a_token_table_of_another_class():
    class Own(nn.Embedding):
        def forward(self, ids):
            return self.own[ids]

    table = Own(VOCAB, 32)
    table.own = torch.randn(VOCAB, 32)
    model = make_model("mixtral")
    model.set_input_embeddings(table)
    refused(model, ValueError, "a Own where nn.Embedding is needed")


def test_patching_twice():
    model = make_model("mixtral")
    patch_model(model)
    refused(model, ValueError, "MixtralForCausalLM is already patched: unpatch")


def test_a_backend_that_is_not_there():
    model = make_model("mixtral")
    config = ModalityLoraConfig(backend="triton")
    refused(model, RuntimeError, "backend 'triton' is not available: .*riton", config)
    refused(model, ValueError, "unknown backend 'tpu'", ModalityLoraConfig(backend="tpu"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ("mlp",)}, "target_modules must be among"),
        ({"target_modules": (), "rank_pattern": {"q_proj": 8}}, "nothing is adapted"),
        ({"sequence_modalities": ("task",)}, "which modalities .* does not have"),
        ({"target_modules": "experts"}, "tuple of names"),
        ({"modalities": "image"}, "tuple of names"),
        ({"modalities": ()}, "at least one"),
        ({"modalities": ("image", "image")}, "distinct"),
        ({"modalities": ("an image",)}, "identifiers"),
        ({"r": 0}, "rank"),
        ({"r": 2.5}, "rank"),
        ({"rank_pattern": {"q_proj": 0}}, "rank"),
        ({"rank_pattern": {r"layers\.0\..*": 1.0}}, "a rank must be an integer"),
        ({"rank_pattern": {"q_proj)": 4}}, r"rank_pattern: 'q_proj\)' is not a regular expression"),
        ({"alpha_pattern": {"*": 4}}, "alpha_pattern: '[*]' is not a regular expression"),
        ({"alpha_pattern": {1: 4}}, "alpha_pattern: a key must be a string, got 1"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a dict"),
        *(
            (
                {"layers_to_transform": layers},
                "layers_to_transform must be None or a non-empty tuple of indices",
            )
            for layers in ((), 1, (0, -1), (True,))
        ),
        ({"modalities": ("values",)}, "ParameterDict"),
        ({"modalities": ("text", "image")}, "'text', which is modality 0, .* gets no adapter"),
        ({"modalities": (1,)}, "distinct identifiers"),
        ({"lora_alpha": "x"}, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": "a"}}, "lora_alpha must be a finite number"),
        ({"r": True}, "a rank must be an integer"),
    ],
)
def test_a_configuration_that_cannot_be(settings, match):
    with pytest.raises(ValueError, match=match):
        ModalityLoraConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank_pattern": {"up_proj": 4}}, "rank_pattern: 'up_proj' names no projection"),
        (
            {"target_modules": ("experts",), "alpha_pattern": {"q_proj": 4}},
            "alpha_pattern: .q_proj. names no .* are model.layers.0.mlp.experts.gate_up_proj, ",
        ),
        ({"rank_pattern": {r"layers\.2\..*": 4}}, "names no projection"),
        ({"rank_pattern": {"proj": 4}}, "names no projection"),
        (
            {"rank_pattern": {r"layers\.1\..*": 4}, "layers_to_transform": (0,)},
            "names no projection",
        ),
        ({"rank_pattern": {"gate": 4}}, "rank_pattern: 'gate' names no projection"),
        ({"layers_to_transform": (0, 2, 5)}, r"has \[2, 5\]: the model has 2 layers"),
    ],
)
def test_a_configuration_that_does_not_fit_the_model(settings, match):
    refused(make_model("mixtral"), ValueError, match, ModalityLoraConfig(**settings))


def test_layers_without_any_of_the_targets():
    """A layer without experts cannot get adapters on experts."""
    config = ModalityLoraConfig(target_modules=("experts", "router"), layers_to_transform=(1,))
    refused(make_model("qwen2_moe"), ValueError, r"\(1,\) of .* have none of .*experts", config)


IDS = torch.ones(2, 6, dtype=torch.long)
BAD_CALLS = {
    "embeddings without ids": (
        {"inputs_embeds": torch.zeros(2, 6, 32)}, ValueError, "give modality_ids"
    ),
    "nothing": ({}, ValueError, "give input_ids or inputs_embeds"),
} | {
    name: ({"input_ids": IDS, "modality_ids": modality_ids}, error, match)
    for name, modality_ids, error, match in (
        ("wrong shape", IDS[:, :5], ValueError, r"\(B, S\) = \(2, 6\), got \(2, 5\)"),
        ("flat", IDS.flatten(), ValueError, r"\(B, S\)"),
        ("floats", IDS * 1.0, TypeError, "integers"),
        ("bools", IDS > 0, TypeError, "integers"),
        ("above M", IDS + 1, ValueError, r"-1\.\.1 .*2\.\.2"),
        ("below -1", IDS - 3, ValueError, r"-1\.\.1"),
    )
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call(case):
    kwargs, error, match = BAD_CALLS[case]
    model = make_model("olmoe")
    patch_model(model, ModalityLoraConfig(target_modules=("attention",)))
    with pytest.raises(error, match=match):
        model(**kwargs)


def test_calling_the_inner_model():
    model = make_model("qwen3_moe")
    patched = patch_model(model)
    fill(patched, 1.0)
    with pytest.raises(RuntimeError, match="got no modality_ids.*call that, not the inner model"):
        model.model(input_ids=token_ids(2, 6))
    model(token_ids(2, 6))
    with pytest.raises(RuntimeError, match="got no modality_ids.*call that, not the inner model"):
        model.model(input_ids=token_ids(2, 6))


def test_a_forward_that_was_replaced_after_patching():
    """Fused loss heads replace it by a function that calls the inner model."""
    model, _ = patched_model("olmoe")
    model.forward = lambda input_ids: model.lm_head(model.model(input_ids)[0])
    with pytest.raises(RuntimeError, match="replaced model.forward after patch_model, as fused"):
        model(token_ids(1, 4))


def test_get_patched_of_a_plain_model():
    with pytest.raises(ValueError, match="MixtralForCausalLM is not patched: call patch_model"):
        get_patched(make_model("mixtral"))


def test_a_patched_table_cannot_be_resized():
    model = make_model("olmoe")
    patched = patch_model(model)
    with unchanged(model), pytest.raises(RuntimeError, match="cannot be resized"):
        model.resize_token_embeddings(VOCAB + 8)
    patched.unpatch().resize_token_embeddings(VOCAB + 8)
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 8


def test_data_parallel_is_refused():
    model = make_model("olmoe")
    patch_model(model)
    with pytest.raises(RuntimeError, match="nn.DataParallel is not supported"):
        model._replicate_for_data_parallel()


# --- modules that are replaced after patching


def replace_layer(model):
    model.model.layers[1] = make_model("olmoe").model.layers[1]


def replace_experts(model):
    model.model.layers[0].mlp.experts = make_model("olmoe").model.layers[0].mlp.experts


def replace_block(model):
    model.model.layers[0].mlp = make_model("olmoe").model.layers[0].mlp


def replace_projection(model):
    old = model.model.layers[1].self_attn.q_proj
    model.model.layers[1].self_attn.q_proj = nn.Sequential(old)


def replace_embeddings(model):
    model.set_input_embeddings(nn.Embedding(VOCAB, model.config.hidden_size))


def replace_head(model):
    model.lm_head = nn.Linear(model.config.hidden_size, VOCAB, bias=False)


REPLACED = {
    replace_layer: "model.layers.1",
    replace_experts: "model.layers.0.mlp.experts",
    replace_block: "model.layers.0.mlp",
    replace_projection: "model.layers.1.self_attn.q_proj",
    replace_embeddings: "model.embed_tokens",
    replace_head: "lm_head",
}


@pytest.mark.parametrize("replace", REPLACED)
def test_a_replaced_module_is_found(replace, tmp_path):
    """At the next forward, and before a file is written or anything is undone."""
    model, patched = patched_model("olmoe")
    path = REPLACED[replace]
    above, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    replace(model)
    message = f"{path} was replaced by .* after patch_model"
    for use in (
        lambda: model(token_ids(1, 4)),
        lambda: patched.save_adapter(tmp_path),
        patched.unpatch,
    ):
        with pytest.raises(RuntimeError, match=message):
            use()
    assert not any(tmp_path.iterdir())
    setattr(model.get_submodule(above), name, old)
    model(token_ids(1, 4))
    patched.unpatch()


@pytest.mark.slow  # it compiles
def test_a_compiled_model_finds_a_replaced_module():
    model, _ = patched_model("olmoe")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(token_ids(1, 4))
    replace_projection(model)
    with pytest.raises(
        Exception,
        match="q_proj was replaced by torch.nn.modules.container.Sequential after patch_model",
    ):
        compiled(token_ids(1, 4))


def test_peft_beside_our_patch_is_found():
    peft = pytest.importorskip("peft")
    model, patched = patched_model("qwen2_moe")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*self_attn\.q_proj"))
    with pytest.raises(
        RuntimeError, match=r"q_proj was replaced by peft\.tuners\.lora\.layer\.Linear .*unload\(\)"
    ):
        wrapped(input_ids=token_ids(1, 4))
    wrapped.unload()
    model(token_ids(1, 4))
    patched.unpatch()


SHARED = {"target_modules": ["shared_expert.gate_proj"]}
NOT_OURS = {
    "LoraConfig": SHARED,
    "IA3Config": SHARED | {"feedforward_modules": SHARED["target_modules"]},
    "AdaLoraConfig": SHARED | {"total_step": 10},
    "OFTConfig": SHARED | {"oft_block_size": 4},
    "VeraConfig": SHARED,
    "LoHaConfig": SHARED,
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
}


@pytest.mark.parametrize("method", NOT_OURS)
def test_peft_on_what_is_not_ours_is_found(method, tmp_path):
    """Its adapters on shared experts replace no module of ours, but ours were frozen by it."""
    peft = pytest.importorskip("peft")
    model, patched = patched_model("qwen2_moe", num_tokens=3)
    trained = list(patched.trainable_parameters())
    patched.save_adapter(tmp_path / "before")
    wrapped = peft.get_peft_model(model, getattr(peft, method)(**NOT_OURS[method]))
    assert not list(patched.trainable_parameters())
    for attempt in (
        lambda: wrapped(input_ids=token_ids(1, 4)),
        lambda: patched.save_adapter(tmp_path / "other"),
        lambda: patched.load_adapter(tmp_path / "before"),
    ):
        with pytest.raises(RuntimeError, match="PEFT has taken .*it froze .*accelerate_.*requires"):
            attempt()
    assert not (tmp_path / "other").exists()
    wrapped.unload()
    patched.save_adapter(tmp_path / "other")
    for parameter in trained:
        parameter.requires_grad_(True)
    ids = token_ids(1, 4)
    model.train()(input_ids=ids, labels=ids, modality_ids=torch.ones_like(ids)).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)


PROMPTS = {
    "PrefixTuningConfig": {},
    "PromptTuningConfig": {},
    "PromptEncoderConfig": {"encoder_hidden_size": 16},
    "CartridgeConfig": {},
}


@pytest.mark.parametrize("method", PROMPTS)
def test_prompts_of_peft_are_refused(method):
    """They leave no mark on their base, which they freeze. Both orders."""
    peft = pytest.importorskip("peft")
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4} | PROMPTS[method]
    config = getattr(peft, method)(**settings)
    model, patched = patched_model("mixtral", num_tokens=3)
    trained = list(patched.trainable_parameters())
    for each in (model, torch.compile(model, backend="eager")):
        with pytest.raises(RuntimeError, match="PeftModelForCausalLM .*would freeze .*unpatch"):
            peft.get_peft_model(each, config)
    assert all(parameter.requires_grad for parameter in trained)
    wrapped = peft.get_peft_model(patched.unpatch(), config)
    model.lm_head.weight.requires_grad_(True)  # hides no prompt
    for each in (wrapped, model):
        with pytest.raises(TypeError, match="within a PeftModelForCausalLM .*get_base_.*a Trainer"):
            patch_model(each)
    del wrapped, each
    patch_model(model)


def test_another_module_that_is_named_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace())
    patch_model(make_model("mixtral").requires_grad_(False))


def test_peft_that_stopped_halfway_at_our_adapters_is_found():
    """PEFT takes adapters below modality_lora for modules that it shall adapt."""
    peft = pytest.importorskip("peft")
    model, patched = patched_model("mixtral")
    expected = model(token_ids(1, 4)).logits
    with pytest.raises(ValueError, match="Target module ModalityLora"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match=r"q_proj was replaced by peft.*halfway, the wrapper"):
        model(token_ids(1, 4))
    attention = model.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.base_layer
    assert torch.equal(model(token_ids(1, 4)).logits, expected)
    assert len(list(patched.trainable_parameters())) == 2 * 6 * 2  # none was frozen


def test_packed_experts_are_not_spread():
    model = make_model("mixtral")
    experts = find_experts(model.model.layers[0])
    experts.__dict__[sharding.SPREAD] = SimpleNamespace(shares_batch=True)
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    refused(model, ValueError, "layers.0.mlp.experts: its weights are packed, and expert paralleli")


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.1.mlp"])
def test_wrappers_of_torch_are_no_replacement(path):
    model, _ = patched_model("olmoe")
    expected = model(token_ids(1, 4)).logits
    above, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    setattr(model.get_submodule(above), name, torch.compile(module, backend="eager"))
    assert torch.equal(model(token_ids(1, 4)).logits, expected)


def test_an_adapter_is_not_saved_where_its_experts_are_left_out(tmp_path):
    """A forward says so too; unpatch, which the message asks for, is not refused."""
    model, patched = patched_model("mixtral")
    patched.save_adapter(tmp_path / "adapter")
    model.config._experts_implementation = "eager"
    for attempt in (
        lambda: patched.save_adapter(tmp_path / "other"),
        lambda: patched.load_adapter(tmp_path / "adapter"),
    ):
        with pytest.raises(RuntimeError, match="layer 0 were set to 'eager' after .*unpatch"):
            attempt()
    assert not (tmp_path / "other").exists()
    assert patched.unpatch().config._experts_implementation != "moe_kernels"


def test_another_experts_implementation_is_refused():
    model, patched = patched_model("olmoe")
    expected = model(token_ids(1, 4)).logits
    model.set_experts_implementation("moe_kernels")  # what it has
    model.set_experts_implementation(model.get_experts_implementation())
    with pytest.raises(RuntimeError, match="cannot be set to 'eager'.*unpatch"):
        model.set_experts_implementation("eager")
    assert torch.equal(model(token_ids(1, 4)).logits, expected)
    model.config._experts_implementation = "grouped_mm"  # the way around the method
    with pytest.raises(RuntimeError, match="layer 0 were set to 'grouped_mm' after patch_model"):
        model(token_ids(1, 4))
    patched.unpatch()
    model.set_experts_implementation("eager")


def test_experts_without_adapters_may_be_computed_by_others():
    model, patched = patched_model("olmoe", ModalityLoraConfig(target_modules=("attention",)))
    expected = model(token_ids(1, 4)).logits
    model.set_experts_implementation("eager")
    assert relative_rms(model(token_ids(1, 4)).logits, expected) < 1e-5
    ExpertExtender(model).extend("all", init="mean")
    with pytest.raises(RuntimeError, match="layer 0 were set to 'eager'"):
        model(token_ids(1, 4))


def test_experts_that_nobody_patched_are_checked_too():
    """The registered name can be chosen in a config, without patch_model."""
    plain, refused_model = make_model("mixtral"), make_model("mixtral", hidden_act="mish")
    expected = plain(token_ids(1, 4)).logits
    for model in (plain, refused_model):
        model.requires_grad_(False).set_experts_implementation("moe_kernels")
    assert relative_rms(plain(token_ids(1, 4)).logits, expected) < 1e-5
    with pytest.raises(ValueError, match="MixtralExperts is not supported: activation Mish"):
        refused_model(token_ids(1, 4))

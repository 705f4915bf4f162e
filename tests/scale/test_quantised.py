"""Models that bitsandbytes and torchao have quantised: experts in NF4, and linear layers beside."""

import copy

import pytest
import torch
from support.model_zoo import make_model, randomise, token_ids
from support.packed_experts import dequantised
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from moe_kernels import ModalityLoraConfig, SaveAdapter, add_modality_tokens, patch_model
from moe_kernels.models.parts import all_experts

pytestmark = pytest.mark.scale
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "dtype": torch.bfloat16}
EXPERTS = ModalityLoraConfig(r=4, target_modules=("experts",))
TEXT_AND_IMAGE = torch.tensor([[0], [1]])


def in_nf4(model):
    """Pack experts as Axolotl does."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    for experts in all_experts(model).values():
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(
                experts, name, compress_statistics=True, quant_type="nf4"
            )
    return model


def patch(model, config=None):
    patched = patch_model(model, config)
    add_modality_tokens(model, "image", 16)
    randomise(patched)
    return patched


def step(patched):
    ids = token_ids(2, 12)
    output = patched.model.train()(ids, labels=ids, modality_ids=TEXT_AND_IMAGE.expand_as(ids))
    output.loss.backward()
    return [output.logits, output.loss, *(p.grad for p in patched.trainable_parameters())]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_nf4_compute_as_the_unpacked_model(family, checkpointed, tmp_path):
    sizes = SIZES | ({"moe_intermediate_size": 64} if family == "qwen3_moe" else {})
    plain = make_model(family, **sizes)
    packed = in_nf4(copy.deepcopy(plain))
    handles = [patch(model) for model in (packed, dequantised(packed, plain))]
    if checkpointed:
        for patched in handles:
            patched.model.gradient_checkpointing_enable({"use_reentrant": False})
    ours, same = map(step, handles)
    assert all(map(torch.equal, ours, same))
    handles[0].save_adapter(tmp_path)
    handles[1].load_adapter(tmp_path)
    handles[0].unpatch()
    assert type(packed.model.layers[0].mlp.experts).__name__.startswith("Parametrized")


def test_a_trainer_on_experts_in_nf4(tmp_path):
    patched = patch(in_nf4(make_model("mixtral", **SIZES)))
    ids = token_ids(4, 12)
    rows = [{"input_ids": row, "labels": row, "modality_ids": row % 2} for row in ids]
    before = [p.detach().clone() for p in patched.trainable_parameters()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=2, save_strategy="no"
    )
    callbacks = [SaveAdapter(patched)]
    Trainer(model=patched.model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    assert not all(map(torch.equal, before, patched.trainable_parameters()))


QUANTISERS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "torchao": lambda: TorchAoConfig(of_torchao("Int8WeightOnlyConfig")()),
    "fp8": lambda: FineGrainedFP8Config(dequantize=True),
}


def of_torchao(name):
    return getattr(pytest.importorskip("torchao.quantization"), name)


def load(folder, config):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("mixtral", **SIZES).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", QUANTISERS)
def test_quantised_linear_layers(folder, tmp_path, name):
    """They are called; text keeps its bits, and what is saved gives the same model."""
    model = load(folder, QUANTISERS[name]())
    ids = token_ids(2, 12)
    patched = patch(model, EXPERTS)
    step(patched)
    model.eval()
    modality_ids = TEXT_AND_IMAGE.expand_as(ids)
    with torch.no_grad():
        before = model(ids, modality_ids=modality_ids).logits
        randomise(patched, seed=7, scale=3.0)
        after = model(ids, modality_ids=modality_ids).logits
    assert torch.equal(after[0, :, :48], before[0, :, :48])
    assert not torch.equal(after[1], before[1])
    patched.save_adapter(tmp_path / "adapter")
    patched.load_adapter(tmp_path / "adapter")
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    Trainer(model=model, args=arguments)
    with pytest.warns(UserWarning, match="writes the base model"):
        model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    patched.unpatch()
    assert model.is_quantized and model.hf_quantizer
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao"])
def test_an_adapted_layer_that_is_quantised_is_refused_when_patching(folder, name):
    match = "layer 0: self_attn.q_proj (is Linear|has a packed weight).*leave it out of the quant"
    with pytest.raises(ValueError, match=match):
        patch_model(load(folder, QUANTISERS[name]()))


def test_llm_int8_with_a_threshold_is_refused(folder):
    model = load(folder, BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match=r"q_proj \(Linear8bitLt\) depend on .*threshold=0"):
        patch_model(model, EXPERTS)


def test_experts_that_torchao_has_quantised_are_refused():
    model = make_model("mixtral", **SIZES)
    quantise, config = of_torchao("quantize_"), of_torchao("FqnToConfig")
    each = of_torchao("Int8WeightOnlyConfig")()
    quantise(model, config({r"re:.*experts\.(gate_up|down)_proj": each}), filter_fn=None)
    assert type(model.model.layers[0].mlp.experts.down_proj.data) is not torch.Tensor
    with pytest.raises(ValueError, match="expert weights of class Int8Tensor"):
        patch_model(model)


def test_a_head_that_torchao_has_quantised_is_refused():
    model = make_model("mixtral", **SIZES)
    of_torchao("quantize_")(model, of_torchao("Int8WeightOnlyConfig")())
    assert isinstance(model.lm_head, nn.Linear)
    with pytest.raises(ValueError, match=r"its head has a packed weight \(Int8Tensor\)"):
        patch_model(model, EXPERTS)

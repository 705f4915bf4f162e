"""Models that bitsandbytes and torchao have quantised: experts in NF4, and linear layers beside."""

import contextlib
import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
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
from moe_kernels.ops import Nf4Weights

pytestmark = pytest.mark.scale
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "dtype": torch.bfloat16}
EXPERTS = ModalityLoraConfig(r=4, target_modules=("experts",))
TEXT_AND_IMAGE = torch.tensor([[0], [1]])


def in_nf4(model, **settings):
    """Pack experts as Axolotl does."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    settings = {"compress_statistics": True, "quant_type": "nf4"} | settings
    for experts in all_experts(model).values():
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(experts, name, **settings)
    return model


def states(model):
    """Yield the parametrisation of each stack, and what it unpacks."""
    for experts in all_experts(model).values():
        for stored in experts.parametrizations.values():
            yield stored[0], stored.original


def unpacked_by_reading(model):
    """Let the parametrisations of a model be ones that the op does not know."""
    for unpack, _ in states(model):
        unpack.__class__ = type("Other", (type(unpack),), {})
    return model


@contextlib.contextmanager
def reads():
    """Give a list of the shapes that bitsandbytes unpacks within."""
    functional, found = pytest.importorskip("bitsandbytes.functional"), []
    own = functional.dequantize_4bit

    def counted(packed, state):
        found.append(tuple(state.shape))
        return own(packed, state)

    with mock.patch.object(functional, "dequantize_4bit", counted):
        yield found


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    shapes = (2, 6, 16), (3, 50, 22), (4, 192, 96), (1, 3, 34)
    blocks = 32, 64, 128, 256, 512, 1024, 2048, 4096
    for shape, block, nested in itertools.product(shapes, blocks, (False, True)):
        settings = {"blocksize": block, "compress_statistics": nested, "quant_type": "nf4"}
        packed, state = functional.quantize_4bit(torch.randn(shape).to(dtype), **settings)
        found = Nf4Weights.from_quant_state(packed, state).dequantise()
        assert torch.equal(found, functional.dequantize_4bit(packed, state)), (shape, block)


def test_codes_of_fp4_are_refused():
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(2, 6, 16), quant_type="fp4")
    with pytest.raises(ValueError, match="the codes are fp4, not nf4"):
        Nf4Weights.from_quant_state(packed, state)


SETTINGS = {
    "nested": ({}, 0),
    "plain_scales": ({"compress_statistics": False, "blocksize": 128}, 0),
    "fp4": ({"quant_type": "fp4"}, 2),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_bits_are_those_of_unpacking_by_reading(case):
    """The op unpacks NF4 alone; other codes are read in each pass, once a stack."""
    settings, times = SETTINGS[case]
    packed = in_nf4(make_model("mixtral", **SIZES), **settings)
    handles = [patch(m) for m in (packed, unpacked_by_reading(copy.deepcopy(packed)))]
    found = []
    for patched, passes in zip(handles, (times, 2), strict=True):
        with reads() as unpacked:
            found.append(step(patched))
        assert len(unpacked) == passes * 2 * len(patched.model.model.layers)
        with torch.no_grad():
            found[-1].append(patched.model.eval()(token_ids(1, 1)).logits)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("after", [False, True])
def test_experts_in_nf4_that_accelerate_offloads_are_refused(after):
    """accelerate does not find what is packed: unpatched the model does not run either."""
    model = in_nf4(make_model("mixtral", **SIZES))
    if after:
        patched = patch(model)
    cpu_offload(model, "cpu")
    kind = RuntimeError if after else ValueError
    with pytest.raises(kind, match="has offloaded model.layers.0.mlp.*bitsandbytes has packed"):
        model(token_ids(1, 3)) if after else patch_model(model, EXPERTS)
    if not after:
        with pytest.raises(KeyError, match=r"gate_up_proj\.original"):
            model(token_ids(1, 3))
        return
    with pytest.raises(RuntimeError, match="bitsandbytes has packed"):
        patched.unpatch()


def test_experts_in_nf4_generate_and_run_in_threads():
    packed = in_nf4(make_model("mixtral", **SIZES))
    ours, other = (patch(m) for m in (packed, unpacked_by_reading(copy.deepcopy(packed))))
    ids = token_ids(2, 6)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = other.model.eval().generate(ids, **settings)
    model = ours.model.eval()
    assert torch.equal(model.generate(ids, **settings), expected)
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        alone = [model(token_ids(1, n)).logits for n in (5, 9)]
        together = list(pool.map(logits_of(model), [5, 9] * 6))
    assert all(map(torch.equal, together, alone * 6))


def logits_of(model):
    """Return a function from a number of tokens to their logits."""

    @torch.no_grad()
    def call(number):
        return model(token_ids(1, number)).logits

    return call


def test_autograd_keeps_no_expanded_scales():
    """They are expanded again in the backward pass."""
    patched = patch(in_nf4(make_model("mixtral", **SIZES)))
    sizes = {-(-packed.numel() * 2 // 64) for _, packed in states(patched.model)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        step(patched)
    assert len(kept) > 100
    assert not sizes & {t.numel() for t in kept if t.dtype == torch.float32 and t.ndim == 1}


def test_experts_in_nf4_compile_whole():
    """With the bits of the model that is not compiled."""
    packed = in_nf4(make_model("mixtral", **SIZES))
    expected = step(patch(copy.deepcopy(packed)))
    patched = patch(packed)
    ids = token_ids(2, 12)
    compiled = torch.compile(packed.train(), backend="eager", fullgraph=True)
    output = compiled(ids, labels=ids, modality_ids=TEXT_AND_IMAGE.expand_as(ids))
    output.loss.backward()
    found = [output.logits, output.loss, *(p.grad for p in patched.trainable_parameters())]
    assert all(map(torch.equal, found, expected))


def test_copies_of_experts_in_nf4():
    """By deepcopy, before patching and after; pickle is refused."""
    packed = in_nf4(make_model("mixtral", **SIZES))
    expected = step(patch(copy.deepcopy(packed)))
    patched = patch(packed)
    with reads() as unpacked:
        copied = copy.deepcopy(patched.model).train()
        ids = token_ids(2, 12)
        output = copied(ids, labels=ids, modality_ids=TEXT_AND_IMAGE.expand_as(ids))
        output.loss.backward()
    assert len(unpacked) == 2 * len(copied.model.layers)  # to learn of each
    found = [output.logits, output.loss, *(p.grad for p in copied.parameters() if p.requires_grad)]
    assert all(map(torch.equal, found, expected))
    with pytest.raises(TypeError, match="a patched model cannot be pickled"):
        pickle.dumps(patched.model)


def trained(folder, resume=None):
    """Train experts in NF4 for four steps by a Trainer; return the parameters before and after."""
    patched = patch(in_nf4(make_model("mixtral", **SIZES)))
    ids = token_ids(8, 12)
    rows = [{"input_ids": row, "labels": row, "modality_ids": row % 2} for row in ids]
    before = [p.detach().clone() for p in patched.trainable_parameters()]
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, max_steps=4, save_steps=2,
        per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [SaveAdapter(patched)]
    trainer = Trainer(model=patched.model, args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return before, list(patched.trainable_parameters())


def test_a_trainer_on_experts_in_nf4(tmp_path):
    """A run that is resumed has the bits of one that went through."""
    before, after = trained(tmp_path)
    assert not all(map(torch.equal, before, after))
    _, resumed = trained(tmp_path, str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, resumed, after))


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


@pytest.mark.parametrize("threshold", [6.0, 450.0, 1e4])
def test_llm_int8_with_a_threshold_is_refused(folder, threshold):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    with pytest.raises(ValueError, match=r"q_proj \(Linear8bitLt\) depend on .*threshold=0"):
        patch_model(load(folder, config), EXPERTS)


def test_float8_training_with_one_scale_is_refused():
    """Its weights are plain floats."""
    float8 = pytest.importorskip("torchao.float8")
    model = make_model("mixtral", **SIZES)
    float8.convert_to_float8_training(
        model,
        config=float8.Float8LinearConfig(emulate=True),
        module_filter_fn=lambda module, name: "self_attn" in name,
    )
    with pytest.raises(ValueError, match=r"self_attn.q_proj \(Float8Linear\) depend on other rows"):
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

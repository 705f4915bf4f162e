"""``moe_mlp`` on a frozen base that stays packed: against the same op on the unpacked weights."""

from types import SimpleNamespace

import pytest
import torch
from support.moe_mlp import LAYOUTS, SILU, call, run
from torch.profiler import ProfilerActivity, profile

from moe_kernels import backends, testing
from moe_kernels.ops import (
    Activation,
    Fp8Weights,
    Nf4Weights,
    moe_mlp,
    quantise_fp8,
    quantise_nf4,
)
from moe_kernels.ops.moe_mlp import packed as formats
from moe_kernels.testing import Shape, make_moe_inputs

WORKING = testing.working_backends()
PACK = {
    "nf4": quantise_nf4,
    "nf4_in_large_blocks": lambda weight: quantise_nf4(weight, block=256),
    "fp8": quantise_fp8,
}
# Few rows of an expert, whose weights are not packed into panels; many; and more than one block of
# FP8, with sizes that no block and no panel divides.
FEW = Shape(T=13, K=2, E=4, H=8, I=6, r=3)
MANY = Shape(T=200, K=4, E=4, H=136, I=70, r=8)
WIDE = Shape(T=40, K=1, E=2, H=600, I=150, r=3)


def packed(inputs, pack):
    """Return inputs with a packed base, and the same with what the base unpacks to."""
    stacks = {name: pack(getattr(inputs, name)) for name in ("gate_up_proj", "down_proj")}
    plain = {name: stack.dequantise() for name, stack in stacks.items()}
    return inputs._replace(**stacks), inputs._replace(**plain)


def check_same_bits(inputs, pack, backend, **options):
    """Check output, gradients and inference."""
    of_packed, plain = packed(inputs, pack)
    grad_out = torch.randn_like(inputs.hidden_states)
    expected = run(plain, backend, grad_out, **options)
    found = run(of_packed, backend, grad_out, **options)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        assert torch.equal(call(of_packed, backend, **options), expected["out"])


@pytest.mark.parametrize("shape", [FEW, MANY, WIDE], ids=["few", "many", "wide"])
@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("backend", WORKING)
def test_bits_are_those_of_the_unpacked_base(backend, pack, dtype, shape, filled_memory):
    inputs = make_moe_inputs(shape, seed=1, num_extra=1, num_modalities=2).to(dtype)
    check_same_bits(inputs, PACK[pack], backend)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "transposed"])
@pytest.mark.parametrize("backend", WORKING)
def test_every_activation_and_order(backend, layout):
    made, options = LAYOUTS[layout]
    inputs = make_moe_inputs(MANY, **{**made, "transposed": False}).to(torch.float32)
    check_same_bits(inputs, quantise_nf4, backend, **options)


@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("backend", WORKING)
def test_one_projection_may_be_packed(backend, which):
    """The other one may be stored transposed, with added experts in its layout."""
    inputs = make_moe_inputs(MANY, num_extra=1, transposed=True).to(torch.float32)
    stack = quantise_fp8(getattr(inputs, which).contiguous())
    grad_out = torch.randn_like(inputs.hidden_states)
    expected = run(inputs._replace(**{which: stack.dequantise()}), backend, grad_out)
    found = run(inputs._replace(**{which: stack}), backend, grad_out)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("backend", WORKING)
def test_gradcheck(backend, pack):
    shape = Shape(T=6, K=2, E=3, H=4, I=2, r=2)
    inputs, _ = packed(make_moe_inputs(shape, seed=3, num_extra=1), PACK[pack])
    inputs = inputs.requires_grad_()

    def function(hidden_states, topk_weights):
        changed = inputs._replace(hidden_states=hidden_states, topk_weights=topk_weights)
        return call(changed, backend)

    assert torch.autograd.gradcheck(function, (inputs.hidden_states, inputs.topk_weights))


@pytest.mark.parametrize("shape", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("backend", WORKING)
def test_text_keeps_its_bits(backend, pack, shape):
    """Whatever the adapters hold and the other rows are."""
    inputs, _ = packed(make_moe_inputs(shape).to(torch.bfloat16), PACK[pack])
    text = inputs.modality_ids == 0
    before = call(inputs, backend)
    hidden = torch.where(text[:, None], inputs.hidden_states, torch.randn(()).bfloat16())
    lora = inputs.down_lora._replace(lora_B=torch.full_like(inputs.down_lora.lora_B, torch.nan))
    after = call(inputs._replace(hidden_states=hidden, down_lora=lora), backend)
    assert torch.equal(after[text], before[text])
    assert not before[inputs.modality_ids < 0].any()


def decoded(stack, backend):
    """Return the weights (n, k) of one packed expert, as columns that the op computes."""
    _, rows, columns = stack.shape
    one_hot = torch.eye(columns)  # the square of its ReLU is itself
    ids, weights = torch.zeros(columns, 1, dtype=torch.long), torch.ones(columns, 1)
    act = Activation("relu_squared", gated=False)
    up = torch.zeros(1, columns, rows)
    up[0, :, :columns] = one_hot
    hidden = torch.zeros(columns, rows)
    hidden[:, :columns] = one_hot
    return moe_mlp(hidden, ids, weights, up, stack, act=act, backend=backend).T


@pytest.mark.parametrize("backend", WORKING)
def test_all_codes_of_nf4(backend):
    """Two a byte, the first in the high half; each block has its own scale."""
    stored, absmax = torch.arange(256, dtype=torch.uint8), torch.rand(8)
    pairs = [(byte >> 4, byte & 15) for byte in range(256)]
    codes = torch.tensor(formats.NF4)[torch.tensor(pairs).flatten()]
    expected = (codes.view(8, 64) * absmax[:, None]).view(32, 16)
    stack = Nf4Weights(stored, absmax, (1, 32, 16), torch.float32)
    assert torch.equal(stack.dequantise()[0], expected)
    assert torch.equal(decoded(stack, backend), expected)


@pytest.mark.parametrize("backend", WORKING)
def test_all_values_of_fp8(backend):
    """Subnormal ones included; NaN is NaN."""
    stored = torch.arange(256, dtype=torch.uint8).repeat(144, 1)[None].contiguous()
    missing = (stored & 127) == 127
    scale = torch.rand(1, 2, 2)
    expected = stored.view(torch.float8_e4m3fn)[0].float()
    expected = expected * scale[0].repeat_interleave(128, 0)[:144].repeat_interleave(128, 1)
    whole = Fp8Weights(stored.view(torch.float8_e4m3fn), scale, torch.float32)
    assert torch.equal(whole.dequantise()[0].nan_to_num(9), expected.nan_to_num(9))
    stored = stored.masked_fill(missing, 0)[:, :, :128].repeat(1, 2, 1)[:, :144].contiguous()
    finite = Fp8Weights(stored.view(torch.float8_e4m3fn), scale[..., :1].clone(), torch.float32)
    assert torch.equal(decoded(finite, backend), finite.dequantise()[0])
    stored[0, 3, 5] = 255
    assert decoded(finite, backend)[3].isnan().all()


@pytest.mark.skipif("cpu" not in WORKING, reason=f"{backends.available()['cpu']}")
@pytest.mark.parametrize("pack", PACK)
def test_no_layer_is_unpacked_as_a_whole(pack):
    """Nothing of the size of a few experts is allocated, forward or backward."""
    shape = Shape(T=8, K=2, E=64, H=128, I=128, r=2)
    inputs, plain = packed(make_moe_inputs(shape).to(torch.float32), PACK[pack])
    grad_out = torch.randn_like(inputs.hidden_states)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run(inputs, "cpu", grad_out)
    largest = max(event.cpu_memory_usage for event in found.events())
    adapters = sum(tensor.nbytes for tensor in inputs.differentiable().values())
    assert 0 < largest < 4 * adapters < plain.down_proj.nbytes


def stack_of(**changes):
    """Return how NF4 weights are made with some arguments changed."""
    arguments = {
        "packed": torch.zeros(96, dtype=torch.uint8), "absmax": torch.ones(3), "shape": (2, 6, 16),
        "dtype": torch.float32,
    }  # fmt: skip
    return lambda: Nf4Weights(**(arguments | changes))


def of_state(**changes):
    """Return how NF4 weights are made of a quantisation state with some attributes changed."""
    state = {
        "quant_type": "nf4", "nested": False, "absmax": torch.ones(3), "shape": (2, 6, 16),
        "dtype": torch.float32, "blocksize": 64,
    }  # fmt: skip
    codes = torch.zeros(96, dtype=torch.uint8)
    return lambda: Nf4Weights.from_quant_state(codes, SimpleNamespace(**(state | changes)))


def fp8_of(**changes):
    arguments = {
        "weight": torch.zeros(2, 6, 200).to(torch.float8_e4m3fn), "scale_inv": torch.ones(2, 1, 2),
        "dtype": torch.float32,
    }  # fmt: skip
    return lambda: Fp8Weights(**(arguments | changes))


BAD = {
    "type": (stack_of(packed=[1]), TypeError, "packed must be a tensor, got list"),
    "codes": (stack_of(packed=torch.zeros(96)), TypeError, "packed must be uint8"),
    "nested": (
        stack_of(absmax=torch.ones(3).byte()), TypeError,
        "absmax must be float32, got uint8: .*expanded by Nf4Weights.from_quant_state",
    ),
    "few": (stack_of(absmax=torch.ones(2)), ValueError, "absmax must have 3 elements"),
    "many": (
        stack_of(packed=torch.zeros(97).byte()), ValueError,
        r"packed must have 96 elements for weights \(2, 6, 16\) in blocks of 64, got 97",
    ),
    "odd": (stack_of(shape=(2, 6, 15)), ValueError, "must be whole bytes"),
    "block": (stack_of(block=96), ValueError, "block must be a power of two"),
    "flat": (stack_of(shape=(12, 16)), ValueError, "must be a stack"),
    "floats": (stack_of(shape=(2.0, 6.0, 16.0)), ValueError, "of integers, got .2.0, 6.0, 16.0"),
    "no_shape": (stack_of(shape=None), ValueError, "of integers, got None"),
    "codes_of_another_kind": (
        of_state(quant_type="fp4"), ValueError,
        "the codes are fp4, not nf4: pack with quant_type='nf4', or unpack them",
    ),
    "no_state": (
        lambda: Nf4Weights.from_quant_state(torch.zeros(96).byte(), None), TypeError,
        "must be a QuantState of bitsandbytes, got NoneType without quant_type",
    ),
    "pack_a_list": (lambda: quantise_nf4([1]), TypeError, "weight must be a tensor, got list"),
    "pack_odd_rows": (lambda: quantise_nf4(torch.ones(1, 3, 7)), ValueError, "must be whole bytes"),
    "pack_no_block": (
        lambda: quantise_nf4(torch.ones(1, 2, 8), block=0), ValueError, "block must be a power",
    ),
    "pack_nothing": (lambda: quantise_nf4(torch.ones(0, 2, 8)), ValueError, "must have experts"),
    "pack_integers": (
        lambda: quantise_fp8(torch.ones(1, 2, 8).int()), TypeError, "weight must be float32",
    ),
    "pack_a_matrix": (lambda: quantise_fp8(torch.ones(2, 8)), ValueError, "weight must have 3 dim"),
    "dtype": (stack_of(dtype=torch.int8), TypeError, "dtype must be float32"),
    "grad": (
        stack_of(absmax=torch.ones(3, requires_grad=True)), ValueError, "absmax requires grad",
    ),
    "strides": (stack_of(packed=torch.zeros(192).byte()[::2]), ValueError, "must be contiguous"),
    "values": (fp8_of(weight=torch.zeros(2, 6, 200)), TypeError, "weight must be float8_e4m3fn"),
    "blocks": (fp8_of(scale_inv=torch.ones(2, 1, 1)), ValueError, "scale_inv must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_packed_weights_are_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("pack", ["nf4", "fp8"])
@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
def test_scales_that_require_grad_later_are_refused(pack, which):
    inputs, _ = packed(make_moe_inputs(FEW).to(torch.float32), PACK[pack])
    stack = getattr(inputs, which)
    name = stack.fields[1]
    getattr(stack, name).requires_grad_()
    match = rf"{which}.{name} requires grad, but .* call {which}.{name}.requires_grad_\(False\)"
    with pytest.raises(ValueError, match=match):
        call(inputs, "reference")


@pytest.mark.parametrize("backend", WORKING)
def test_packed_weights_that_do_not_fit_are_refused(backend):
    inputs, _ = packed(make_moe_inputs(FEW), quantise_nf4)
    other = quantise_nf4(torch.randn(4, 8, 8))
    for stack, error, words in (
        (other, ValueError, "down_proj must have shape"),
        (quantise_nf4(torch.randn(4, 8, 6)), TypeError, "down_proj must be float64"),
        (inputs.down_proj.packed, ValueError, "down_proj must have shape"),
        (inputs.down_proj.stack, ValueError, "down_proj must have shape"),
    ):
        with pytest.raises(error, match=words):
            call(inputs._replace(down_proj=stack), backend)


@pytest.mark.parametrize("pack", ["nf4", "fp8"])
@pytest.mark.parametrize("backend", WORKING)
def test_opcheck(backend, pack):
    inputs, _ = packed(make_moe_inputs(FEW, num_extra=1).to(torch.float32), PACK[pack])
    inputs.requires_grad_()
    stacks = inputs.gate_up_proj, inputs.down_proj
    loras = (*inputs.gate_up_lora, *inputs.down_lora)
    arguments = (
        *inputs[:3], *(stack.stack for stack in stacks), inputs.modality_ids, *inputs[8:10], *loras,
        None, *(stack.scales for stack in stacks), 0, *SILU, True, backend,
    )  # fmt: skip
    tests = ["test_autograd_registration", "test_faketensor"]
    if pack == "nf4":  # torch cannot compare tensors of float8, as this test does
        tests.append("test_schema")
    torch.library.opcheck(torch.ops.moe_kernels.moe_mlp.default, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", WORKING)
def test_the_op_refuses_a_stack_without_its_scales(backend):
    inputs, _ = packed(make_moe_inputs(FEW).to(torch.float32), quantise_fp8)
    stacks = inputs.gate_up_proj.stack, inputs.down_proj.stack
    arguments = (*inputs[:3], *stacks, None, *[None] * 9)
    with pytest.raises(ValueError, match="gate_up_proj of torch.float8_e4m3fn needs gate_up_sca"):
        torch.ops.moe_kernels.moe_mlp(*arguments, None, None, 0, *SILU, False, backend)
    scales = inputs.gate_up_proj.scales, inputs.down_proj.scales
    arguments = (*inputs[:3], inputs.gate_up_proj.dequantise(), stacks[1], None, *[None] * 9)
    with pytest.raises(ValueError, match="gate_up_proj of torch.float32 takes no gate_up_scales"):
        torch.ops.moe_kernels.moe_mlp(*arguments, *scales, 0, *SILU, False, backend)


def test_the_nearest_codes_are_chosen():
    weight = torch.randn(2, 6, 70)
    error = (quantise_nf4(weight).dequantise() - weight).abs().flatten()
    absmax = quantise_nf4(weight).absmax.repeat_interleave(64)[: error.numel()]
    values = torch.tensor(formats.NF4)
    assert (error <= absmax * values.diff().max() / 2 * 1.001).all()
    exact = values[torch.randint(16, (2, 6, 64))]
    exact[..., 0] = 1
    assert torch.equal(quantise_nf4(exact).dequantise(), exact)
    assert not quantise_nf4(torch.zeros(1, 2, 4)).dequantise().any()
    assert testing.relative_rms(quantise_fp8(weight).dequantise(), weight) < 0.04

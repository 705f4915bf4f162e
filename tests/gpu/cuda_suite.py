"""The cases of ``triton_suite.py`` on the backend "cuda"; ``test_cuda.py`` runs them.

Without a GPU, plain torch computes the CUDA ops on the CPU and Triton is interpreted, so the tests
check that the layers call the ops with the right arguments. If CUDA_KERNELS_ON_HOST names a library
of the kernels compiled for the CPU, these compute the ops.
"""

import ctypes
import os
from dataclasses import replace

import pytest
import torch
from gpu.triton_suite import BACKWARD as TRITON_BACKWARD
from gpu.triton_suite import (  # noqa: F401  (collected here)
    DEVICE,
    LAUNCHED,
    check,
    check_saved_zeros,
    compute_all_gradients,
    launches_of,
    on_device,
    test_a_captured_graph_gives_the_same_bits,
    test_lora_linear,
    test_matches_the_reference,
    test_no_tokens,
    test_odd_sizes,
    test_only_the_gradients_asked_for,
    test_refuses_what_it_does_not_compute,
    test_shapes,
    test_text_rows_do_not_see_adapters,
    test_the_first_added_experts_may_be_frozen,
    test_the_same_bits_twice,
)
from support import cuda_stand_ins
from support.devices import NEEDS_CUDA, ON_GPU
from support.launches import COUNTS, ENGINE_COUNTS, Launches
from support.moe_mlp import LAYOUTS, VARIANTS, call
from support.registered_ops import make, results, same
from torch.utils._pytree import tree_map_only

if ON_GPU:  # without a GPU they would repeat the tests of the Triton backend, slowly
    from gpu.triton_suite import (  # noqa: F401
        test_a_graph_is_walked_twice,
        test_a_route_may_flip_at_recompute,
        test_autocast_changes_nothing,
        test_dispatch,
        test_inductor_takes_the_op,
        test_inputs_of_any_layout,
        test_padding_is_never_read_and_unwritten_memory_shows,
        test_random_shapes,
        test_stacks_of_more_than_2_to_the_31_elements,
        test_tensors_may_be_on_another_device_than_the_current,
        test_text_bits_at_a_size_that_shows,
    )

from moe_kernels import _native, backends
from moe_kernels.ops import LoraWeights, checks, lora_linear
from moe_kernels.ops.lora_linear import triton_impl as lora_linear_impl
from moe_kernels.ops.moe_mlp import cuda_impl, gpu
from moe_kernels.ops.moe_mlp.activation import SILU, ExpertForm
from moe_kernels.ops.moe_mlp.weights import ExpertWeights
from moe_kernels.testing import SHAPES, Shape, assert_close, make_moe_inputs

SHARED = {"dispatch_with_maps", "tile_maps", "shrink", "wgrad", "combine"}
PRODUCTS = {"gate_up", "grouped_gemm", "act_backward"}
ALL = SHARED | PRODUCTS
VECTORS = Shape(T=37, K=3, E=5, H=48, I=24, r=5)  # all rows in whole vectors of 16 bytes
FOLDS = replace(VECTORS, T=60)  # tiles of 128 rows
OPS = _native.ops()
ON_HOST = os.environ.get("CUDA_KERNELS_ON_HOST")
if ON_HOST is not None:
    torch.ops.load_library(ON_HOST)
else:
    LIBRARY = cuda_stand_ins.register()


@pytest.fixture(autouse=True)
def cuda_for_triton(monkeypatch):
    """Run "cuda" where a case names "triton", which works without a GPU too.

    The extension multiplies, as on an sm_90 whose user asks for it.
    """
    monkeypatch.setenv("MOE_KERNELS_ENGINE", "1")
    if not ON_GPU:
        monkeypatch.setattr(_native, "has_engine", lambda: True)
    implementation = backends.implementation
    monkeypatch.setattr(
        backends,
        "implementation",
        lambda op, name: implementation(op, "cuda" if name == "triton" else name),
    )


@pytest.fixture
def python_course(monkeypatch):
    """Call a native op for each launch, in place of one for each half."""
    monkeypatch.setattr(cuda_impl, "in_one_call", lambda *layer: False)


@pytest.fixture
def all_gradients(cuda_for_triton):
    """Compute them on the backend "cuda"."""
    return compute_all_gradients()


if ON_HOST is None:
    pytestmark = pytest.mark.usefixtures("python_course")  # only the extension has the other one


@pytest.fixture
def calls(monkeypatch, python_course):
    """Record (name, arguments) of every call of a native op."""
    made = []

    class Recorded:
        def __getattr__(self, name):
            return lambda *arguments: (
                made.append((name, arguments)) or getattr(OPS, name)(*arguments)
            )

    monkeypatch.setattr(_native, "ops", Recorded)
    return made


def layer(shape, dtype=torch.float32, **variant):
    """Return the output and the gradients of a layer."""
    inputs = on_device(make_moe_inputs(shape, **variant).to(dtype)).requires_grad_()
    out = call(inputs, "triton")
    return out, *torch.autograd.grad(out.sum(), list(inputs.differentiable().values()))


OTHERS = [
    (Shape(T=60, K=2, E=4, H=136, I=72, r=16), {}),
    (Shape(T=150, K=2, E=2, H=136, I=264, r=16), {"num_modalities": 3, "num_extra": 1}),
    (Shape(T=50, K=3, E=3, H=72, I=40, r=40), {"num_modalities": 2, "shared_a": True}),
    (Shape(T=300, K=1, E=1, H=40, I=24, r=3), {"modality": "image"}),
    (Shape(T=600, K=1, E=2, H=24, I=16, r=8), {"modality": "image", "routing": "one_expert"}),
    (Shape(T=30, K=2, E=4, H=64, I=48, r=8), {"routing": "repeated", "ranks": (0, 20)}),
    (Shape(T=40, K=2, E=4, H=64, I=48, r=8), {"num_extra": 2, "ranks": (4, 0)}),
    (Shape(T=1, K=2, E=4, H=64, I=48, r=8), {"modality": "no_padding"}),
    (Shape(T=0, K=2, E=4, H=64, I=48, r=8), {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "options"), OTHERS, ids=str)
def test_half_precision_of_other_shapes(monkeypatch, dtype, shape, options):
    """Cover blocks of every size, and a group of several partial sums."""
    monkeypatch.setattr(gpu, "check_dtype", lambda dtype: None)
    check(dtype, shape, seed=7, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_matches_the_reference(monkeypatch, dtype, variant):
    """Triton, whose interpreter is wrong in bfloat16, computes no product here."""
    monkeypatch.setattr(gpu, "check_dtype", lambda dtype: None)
    check(dtype, VECTORS, seed=len(variant), **VARIANTS[variant])


def lora_linear_inputs(tokens, rank, dtype):
    """Return rows, A, B, W and a gradient; and modality ids."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = (tokens, 48), (2, rank, 48), (2, 136, rank), (136, 48), (tokens, 136)
    tensors = [torch.randn(size, generator=generator).to(dtype).to(DEVICE) for size in sizes]
    return tensors, torch.randint(-1, 3, (tokens,), generator=generator).to(DEVICE)


def lora_linear_results(dtype, backend, tensors, ids):
    """Return the output and the gradients."""
    *leaves, weight, grad_out = (tensor.to(dtype) for tensor in tensors)
    x, a, b = (leaf.detach().requires_grad_() for leaf in leaves)
    lora = LoraWeights(a, b, torch.tensor([2.0, 0.5], device=DEVICE))
    out = lora_linear(x, weight, None, lora, modality_ids=ids, backend=backend)
    return out, *torch.autograd.grad(out, (x, a, b), grad_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [(70, 5), (70, 24), (70, 40), (1, 8), (0, 4)])
def test_lora_linear_in_half_precision(monkeypatch, calls, dtype, tokens, rank):
    monkeypatch.setattr(lora_linear_impl, "check_dtype", lambda dtype: None)
    inputs = lora_linear_inputs(tokens, rank, dtype)
    actual = lora_linear_results(dtype, "triton", *inputs)
    names = [name for name, _ in calls]
    assert names.count("add_low_rank") == 2 and names.count("shrink") == (2 if rank > 32 else 1)
    expected = lora_linear_results(torch.float64, "reference", *inputs)
    for tensor, reference in zip(actual, expected, strict=True):
        assert_close(tensor, reference, dtype=dtype)


def test_du_comes_with_dB_unless_its_parts_are_large(calls):
    """A pass of its own then computes du1; one always computes du2."""
    gives_du = _native.gives_du
    assert gives_du(32, 256, 2**21) and not gives_du(32, 257, 2**21) and not gives_du(33, 1, 1)
    for rank, shrinks in ((12, 2), (40, 4)):  # u2 comes with gate_up, or in its own pass too
        calls.clear()
        layer(replace(VECTORS, r=rank), torch.float16)
        names = [name for name, _ in calls]
        assert (names.count("shrink"), names.count("wgrad")) == (shrinks, 2)


def test_gradients_of_adapters_come_with_dA_unless_they_take_much_memory(calls):
    folds = _native.folds_gradients
    assert folds(2**13, 8, 1, 64, 16, 16) and not folds(2**13, 8, 1, 64, 17, 16)
    assert not folds(2**13, 8, 1, 64, 16, 0) and not folds(31, 1, 1, 64, 16, 16)
    assert folds(2**16, 128, 1, 768, 16, 16)  # less than 256 MiB
    assert not folds(2**15, 512, 2, 2048, 16, 16)  # more slots than tiles
    assert folds(2**18, 128, 1, 768, 16, 16)  # less than the activation
    layer(FOLDS, torch.float16)
    names = [name for name, _ in calls]
    assert (names.count("shrink"), names.count("wgrad")) == (2, 1)


def test_u2_comes_with_gate_up_unless_its_parts_are_large():
    """In tiles of 128 rows there are half as many parts as in tiles of 16, or a quarter."""
    rows, gives = 2**21, _native.gives_u2
    assert gives(rows, 8, 128, 4, 32) and not gives(rows, 8, 129, 4, 32)
    assert gives(rows, rows, 32, 4, 16) and not gives(rows, rows, 72, 4, 16)
    assert not gives(1, 1, 8, 4, 33) and not gives(1, 1, 8, 0, 4) and not gives(1, 1, 8, 4, 0)


@NEEDS_CUDA
@pytest.mark.parametrize(("tokens", "block"), [(40, 16), (400, 128), (5000, 256)])
@pytest.mark.parametrize("rank", [16, 24])  # gradients of adapters come with dA', or not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_tile_matches_the_reference(dtype, rank, tokens, block):
    assert _native.grouped_gemm_block(2 * tokens, 8) == block
    check(dtype, Shape(T=tokens, K=2, E=8, H=264, I=136, r=rank), num_modalities=2, num_extra=1)


@pytest.mark.parametrize(("variant", "wgrads"), [({}, 2), ({"num_extra": 1}, 3)])
def test_a_layer_calls_the_native_ops(calls, variant, wgrads):
    layer(VECTORS, torch.float16, **variant)
    names = [name for name, _ in calls]
    forward = ["dispatch_with_maps", "shrink", "gate_up", "grouped_gemm", "combine"]
    assert names[:5] == forward
    backward = ["act_backward", "combine", "grouped_gemm", "shrink", "tile_maps"]
    assert sorted(names[5:]) == [*backward, *["wgrad"] * wgrads]  # du1 with dB1


@pytest.mark.parametrize("rank", [3, 20])
def test_saved_rows_without_an_adapter_are_zeros_in_half_precision(rank, filled_memory):
    check_saved_zeros(cuda_impl, rank, torch.float16)


def halves(inputs, *, save=True, needs=None, frozen_extra=0):
    """Return the output, what is saved if it is, and the gradients that are needed."""
    loras = [*(inputs.gate_up_lora or (None,) * 3), *(inputs.down_lora or (None,) * 3)]
    extras = inputs.extra_gate_up_proj, inputs.extra_down_proj
    weights = ExpertWeights(*inputs[3:5], *extras, *loras, None)
    x, ids, topk_weights, form = *inputs[:3], ExpertForm(*SILU)
    out, saved = cuda_impl.forward(x, ids, topk_weights, inputs.modality_ids, weights, form, save)
    if not save:
        return [out]
    if needs is None:
        needs = [tensor is not None for tensor in (x, topk_weights, *weights.trainable())]
    grad_out = x.flip(0).contiguous()
    grads = cuda_impl.backward(grad_out, x, topk_weights, weights, form, saved, needs, frozen_extra)
    return [out, *saved, *grads]


def check_bits(inputs, **options):
    """Check that one op for each half gives the bits of the course of ``gpu``."""
    inputs = on_device(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "check_dtype", lambda dtype: None)
        in_one_call = halves(inputs, **options)
        patch.setattr(cuda_impl, "in_one_call", lambda *layer: False)
        in_turn = halves(inputs, **options)
    assert [(t.shape, t.dtype) for t in in_one_call] == [(t.shape, t.dtype) for t in in_turn]
    for index, (a, b) in enumerate(zip(in_one_call, in_turn, strict=True)):
        assert torch.equal(a, b), index


NEEDS_HALVES = pytest.mark.skipif(
    ON_HOST is None and not ON_GPU, reason="needs the launches of the extension"
)


@NEEDS_HALVES
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_half_in_one_call_gives_the_bits_of_the_course(variant, filled_memory):
    dtype = (torch.float16, torch.bfloat16)[len(variant) % 2]
    made = make_moe_inputs(VECTORS, seed=len(variant), **VARIANTS[variant])
    check_bits(made.to(dtype, lora_dtype=torch.float32))
    low = made.to(dtype)
    check_bits(low)
    check_bits(low._replace(topk_weights=made.topk_weights.float()), save=False)


@NEEDS_HALVES
@pytest.mark.parametrize(("shape", "options"), OTHERS, ids=str)
def test_a_half_of_other_shapes_in_one_call_gives_the_bits_of_the_course(shape, options):
    check_bits(make_moe_inputs(shape, seed=7, **options).to(torch.bfloat16))


# hidden_states, topk_weights, both weights of added experts, A and B of gate_up, those of down.
SUBSETS = [
    "10000000", "01000000", "00100000", "00010000", "00001000", "00000100", "00000010",
    "00000001", "11000000", "10001000", "10000100", "00001100", "00000110", "01100001",
    "00001001", "11110000", "11001111", "00000000",
]  # fmt: skip


@NEEDS_HALVES
@pytest.mark.parametrize(
    "shape", [replace(VECTORS, T=20), replace(VECTORS, T=20, r=40), FOLDS], ids=str
)  # du1 in the pass of dB1, in its own, or with dA'
def test_any_gradients_of_a_half_in_one_call_are_those_of_the_course(shape):
    variant = {"num_extra": 3, "num_modalities": 2, "shared_a": True}
    inputs = make_moe_inputs(shape, **variant).to(torch.float16)
    for subset in SUBSETS:
        needs = [flag == "1" for flag in subset]
        for frozen_extra in (0, 2) if needs[2] or needs[3] else (0,):
            check_bits(inputs, needs=needs, frozen_extra=frozen_extra)


DISPATCH = ["dispatch_with_maps"] * 2  # count, and sort with the maps
FORWARD = [*DISPATCH, "shrink", "gate_up", "grouped_gemm", "combine"]
BACKWARD = [
    "tile_maps", "shrink", "act_backward", "wgrad", "wgrad", "grouped_gemm", "combine", "wgrad",
    "wgrad",
]  # fmt: skip
FOLDED = [
    "tile_maps", "shrink", "act_backward", "grouped_gemm", "combine", "wgrad", "wgrad",
]  # fmt: skip


@pytest.mark.skipif(ON_HOST is None, reason="counts the launches of kernels on the host")
@pytest.mark.parametrize(
    ("shape", "variant", "forward", "backward"),
    [
        (FOLDS, {}, FORWARD, FOLDED),
        (VECTORS, {}, FORWARD, BACKWARD),
        (
            VECTORS,
            {"num_extra": 1},
            FORWARD,
            [*BACKWARD, "aten::ones", "wgrad", "wgrad", *["aten::_to_copy"] * 2],
        ),
        (
            FOLDS,
            {"modality": None, "ranks": (0, 0)},
            [name for name in FORWARD if name != "shrink"],
            ["tile_maps", "act_backward", "wgrad", "grouped_gemm", "combine"],
        ),
    ],
)
def test_the_number_of_launches(shape, variant, forward, backward, monkeypatch):
    """6 in inference and 13 in training, or 15 with few rows; without adapters 5 and 10.

    One op for each half launches as many as the ops in turn.
    """
    inputs = make_moe_inputs(shape, **variant)
    inputs = inputs.to(torch.float16, lora_dtype=torch.float32)
    of_ops = ctypes.CDLL(ON_HOST).launches
    assert (len(FORWARD), len(FOLDED)) == (ENGINE_COUNTS["forward"], ENGINE_COUNTS["backward"])
    in_one_call = launches_of(inputs, monkeypatch, of_ops=of_ops)
    monkeypatch.setattr(cuda_impl, "in_one_call", lambda *layer: False)
    in_turn = launches_of(inputs, monkeypatch, of_ops=of_ops)
    assert [*in_turn] == [forward, forward, backward]
    launched = [name for name in backward if "aten" not in name]
    of_torch = [name for name in backward if "aten" in name]
    native = ["moe_mlp_backward"] * len(launched)
    native += ["aten::fill_" if name == "aten::ones" else name for name in of_torch]
    assert [*in_one_call] == [["moe_mlp_forward"] * len(forward)] * 2 + [native]


@pytest.mark.skipif(ON_HOST is None, reason="counts the launches of kernels on the host")
def test_the_number_of_launches_where_triton_multiplies(monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_ENGINE")
    inputs = make_moe_inputs(replace(LAUNCHED, T=17))  # decoding takes fewer
    inputs = inputs.to(torch.float16, lora_dtype=torch.float32)
    of_ops = ctypes.CDLL(ON_HOST).launches
    inference, forward, backward = launches_of(inputs, monkeypatch, of_ops=of_ops)
    triton = ["shrink", "gate_up", "shrink", "grouped_gemm"]
    expected = [*DISPATCH, *(f"{name}_kernel" for name in triton), "combine"]
    assert inference == forward == expected
    assert [name for name in backward if "kernel" not in name] == ["tile_maps", "combine"]
    assert [name.removesuffix("_kernel") for name in backward] == TRITON_BACKWARD


def test_an_engine_that_was_not_built_is_refused_before_any_launch(monkeypatch, calls):
    """Built for 9.0, and not for 9.0a, its kernels are empty."""
    monkeypatch.setattr(_native, "has_engine", lambda: False)
    with pytest.raises(RuntimeError, match='built without: build it again with "9.0a" in TORCH'):
        layer(VECTORS, torch.float16)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_where_triton_multiplies(calls, monkeypatch, dtype):
    monkeypatch.delenv("MOE_KERNELS_ENGINE")
    check(dtype, replace(VECTORS, r=24), num_modalities=2, num_extra=1)
    assert {name for name, _ in calls} == {"dispatch_with_maps", "tile_maps", "combine"}


@pytest.mark.parametrize(
    ("odd", "missing"),
    [
        ("float32", PRODUCTS), ("rows", PRODUCTS | {"combine"}), ("stack", PRODUCTS),
        ("segments", {"dispatch_with_maps"}), ("nothing", set()),
    ],
)  # fmt: skip
def test_what_an_op_does_not_take_goes_to_triton(calls, monkeypatch, odd, missing):
    inputs = make_moe_inputs(SHAPES["odd"] if odd == "rows" else VECTORS)
    inputs = on_device(inputs.to(torch.float32 if odd == "float32" else torch.float16))
    if odd == "stack":  # does not begin at a multiple of 16 bytes
        memory = inputs.down_proj.new_zeros(inputs.down_proj.numel() + 1)
        inputs = inputs._replace(down_proj=memory[1:].view(inputs.down_proj.shape))
    if odd == "segments":  # more than a block counts
        monkeypatch.setattr(_native, "max_dispatch_keys", lambda: VECTORS.E)
    call(inputs, "triton")
    backward = {"tile_maps", "wgrad", "act_backward"}
    assert {name for name, _ in calls} == ALL - missing - backward


@pytest.mark.parametrize("layout", ["transposed", "interleaved", "bias", "gelu", "nemotron_h"])
def test_other_layouts_go_to_triton(calls, layout):
    """The extension computes SwiGLU of rows [gate; up] without a bias, from stacks as they are."""
    made, options = LAYOUTS[layout]
    shape = replace(VECTORS, T=3, E=3)
    inputs = on_device(make_moe_inputs(shape, **made).to(torch.float16))
    call(inputs, "triton", **options)
    assert {name for name, _ in calls} == {"dispatch_with_maps", "shrink", "combine"}


def test_triton_multiplies_between_the_low_rank_passes_of_the_extension():
    made, options = LAYOUTS["nemotron_h"]
    shape = replace(VECTORS, T=9, E=3)
    check(torch.float16, shape, seed=1, options=options, num_modalities=2, **made)


DECODED = Shape(T=5, K=3, E=6, H=48, I=24, r=5)
FEW = [
    "two_modalities", "added_experts", "shared_a", "own_ranks", "gate_up_only", "down_only",
    "no_mask", "all_padding", "repeated",
]  # fmt: skip


@pytest.fixture
def decode(monkeypatch):
    """Switch on the two kernels of decoding."""
    monkeypatch.setenv("MOE_KERNELS_DECODE", "1")


def decoded(inputs):
    """Return the output where nothing trains, as the op and as a call around the dispatcher."""
    with torch.no_grad():
        alone = cuda_impl.inference(*_positional(inputs), form=SILU)
        assert torch.equal(call(inputs, "triton"), alone)
    return alone


def _positional(inputs):
    """Return the tensors in the order of the native op."""
    loras = [*(inputs.gate_up_lora or (None,) * 3), *(inputs.down_lora or (None,) * 3)]
    extras = inputs.extra_gate_up_proj, inputs.extra_down_proj
    return *inputs[:5], inputs.modality_ids, *extras, *loras, inputs.gate_up_bias, None, None


@pytest.mark.parametrize("variant", FEW)
@pytest.mark.usefixtures("decode")
def test_decoding_matches_the_reference(calls, variant):
    dtype = (torch.float16, torch.bfloat16)[len(variant) % 2]
    inputs = make_moe_inputs(DECODED, seed=3, **VARIANTS[variant])
    inputs = inputs.to(dtype, lora_dtype=torch.float32)
    actual = decoded(on_device(inputs))
    assert {name for name, _ in calls} == {"moe_mlp_inference"}
    assert_close(actual.cpu(), call(inputs.to(torch.float64), "reference"), dtype=dtype)


def moved(tensor):
    """Return a copy that does not begin at a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.skipif(ON_HOST is None, reason="counts launches on the host")
@pytest.mark.usefixtures("decode")
@pytest.mark.parametrize("variant", [{"modality": "image"}, {"num_extra": 2}, {"ranks": (0, 0)}])
def test_decoding_a_token_is_two_launches(monkeypatch, variant):
    """No tensor is copied of those that patched models hand over: what trains is float32."""
    inputs = make_moe_inputs(Shape(T=1, K=8, E=64, H=64, I=32, r=16), **variant)
    inputs = inputs.to(torch.bfloat16, lora_dtype=torch.float32)
    inputs = inputs._replace(modality_ids=moved(inputs.modality_ids))  # as a slice of more
    if inputs.extra_gate_up_proj is not None:
        extras = (inputs.extra_gate_up_proj.float(), inputs.extra_down_proj.float())
        inputs = inputs._replace(extra_gate_up_proj=extras[0], extra_down_proj=extras[1])
    monkeypatch.setattr(checks, "reads_values", lambda device: False)  # as on a GPU
    seen = Launches(monkeypatch, of_ops=ctypes.CDLL(ON_HOST).launches)
    with torch.no_grad(), seen:
        cuda_impl.inference(*_positional(inputs), form=SILU)
    assert seen.names == ["moe_mlp_inference"] * COUNTS["decoding"]


@NEEDS_CUDA
@pytest.mark.usefixtures("decode")
def test_a_captured_graph_of_a_few_tokens_gives_the_same_bits(calls):
    inputs = make_moe_inputs(DECODED, num_extra=1)
    inputs = on_device(inputs.to(torch.bfloat16, lora_dtype=torch.float32))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = call(inputs, "triton")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            found = call(inputs, "triton")
    assert [name for name, _ in calls] == ["moe_mlp_inference"] * 2
    found.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "odd",
    [
        "nothing", "tokens", "rows", "rank", "size", "float32", "stack", "bias", "transposed",
        "hidden_states", "strided", "lora_A", "scaling", "extra", "topk_weights",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("decode")
def test_what_is_decoded_follows_from_shapes_and_layout(odd):
    sizes = {
        "tokens": {"T": 17}, "rows": {"K": 26, "E": 26}, "rank": {"r": 65}, "size": {"I": 20}
    }.get(odd, {})  # fmt: skip
    variant = {"bias": {"bias": True}, "transposed": {"transposed": True}}.get(odd, {})
    inputs = make_moe_inputs(replace(DECODED, **sizes), num_extra=1, **variant)
    inputs = inputs.to(torch.float32 if odd == "float32" else torch.float16)
    lora, x = inputs.gate_up_lora, inputs.hidden_states
    others = {
        "stack": {"down_proj": moved(inputs.down_proj)},
        "hidden_states": {"hidden_states": moved(x)},
        "strided": {"hidden_states": x.T.contiguous().T},
        "lora_A": {"gate_up_lora": lora._replace(lora_A=moved(lora.lora_A))},
        "scaling": {"gate_up_lora": lora._replace(scaling=lora.scaling.double())},
        "extra": {"extra_down_proj": inputs.extra_down_proj.float()},
        "topk_weights": {"topk_weights": inputs.topk_weights.double()},
    }
    inputs = inputs._replace(**others.get(odd, {}))
    tensors = _positional(inputs)
    weights = ExpertWeights(*tensors[3:5], *tensors[6:])
    assert cuda_impl.decodes(*tensors[:3], tensors[5], weights, SILU) == (odd == "nothing")


def test_nothing_is_decoded_unless_switched_on(calls, monkeypatch):
    """By default a forward that saves nothing has the bits of one that saves."""
    monkeypatch.delenv("MOE_KERNELS_DECODE", raising=False)
    inputs = on_device(make_moe_inputs(DECODED, num_extra=1).to(torch.float16))
    assert cuda_impl.inference(*_positional(inputs), form=SILU) is None
    with torch.no_grad():
        alone = call(inputs, "triton")
    assert torch.equal(call(inputs.requires_grad_(), "triton"), alone)
    assert "moe_mlp_inference" not in {name for name, _ in calls}


@pytest.mark.parametrize("odd", ["modality_ids", "lora", "topk_weights", "extra"])
@pytest.mark.usefixtures("decode")
def test_what_is_decoded_as_it_is(odd):
    """Tensors that are read one by one begin anywhere; others may be wider than the base."""
    inputs = make_moe_inputs(DECODED, num_extra=1).to(torch.float16, lora_dtype=torch.float32)
    inputs = inputs._replace(topk_weights=inputs.topk_weights.half().float())
    inputs = on_device(inputs)
    expected = decoded(inputs)

    if odd == "modality_ids":
        other = inputs._replace(modality_ids=moved(inputs.modality_ids))
    elif odd == "lora":
        lora = type(inputs.down_lora)(*map(moved, inputs.down_lora))
        other = inputs._replace(down_lora=lora)
    elif odd == "topk_weights":
        other = inputs._replace(topk_weights=inputs.topk_weights.half())
    else:
        other = inputs._replace(
            extra_gate_up_proj=inputs.extra_gate_up_proj.float(),
            extra_down_proj=inputs.extra_down_proj.float(),
        )
    assert torch.equal(decoded(other), expected)


@pytest.mark.parametrize("odd", ["hidden_states", "topk_weights"])
def test_inputs_are_made_to_fit(odd):
    """Unaligned tokens and weights of another dtype give the same bits."""
    inputs = make_moe_inputs(VECTORS).to(torch.float16)
    inputs = inputs._replace(topk_weights=inputs.topk_weights.bfloat16().float())
    inputs = on_device(inputs)
    expected = call(inputs, "triton")
    if odd == "topk_weights":
        for dtype in (torch.bfloat16, torch.float64):
            other = inputs._replace(topk_weights=inputs.topk_weights.to(dtype))
            assert torch.equal(call(other, "triton"), expected)
        return
    memory = inputs.hidden_states.new_empty(inputs.hidden_states.numel() + 1)
    moved = memory[1:].view(inputs.hidden_states.shape).copy_(inputs.hidden_states)
    assert torch.equal(call(inputs._replace(hidden_states=moved), "triton"), expected)


@pytest.mark.skipif(ON_GPU, reason="its tensors are on the CPU: run on a machine without a GPU")
def test_it_compiles_into_one_graph_with_the_same_bits():
    function, x, adapters = make("moe_mlp", "triton")
    expected = results(function, x, adapters)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert same(results(compiled, x, adapters), expected)


@pytest.mark.usefixtures("decode")
def test_opcheck(calls, monkeypatch):
    """Check schema, shapes and refusals on fake tensors, for every call of both layers."""
    layer(VECTORS, torch.float16, num_extra=1)
    layer(replace(VECTORS, r=40), torch.float16)  # a pass of its own computes du
    lora_linear_results(torch.float16, "triton", *lora_linear_inputs(70, 5, torch.float16))
    decoded(make_moe_inputs(DECODED, num_extra=1).to(torch.float16))
    assert {name for name, _ in calls} == ALL | {"add_low_rank", "moe_mlp_inference"}
    monkeypatch.setattr(cuda_impl, "in_one_call", lambda *layer: ON_HOST is not None or ON_GPU)
    layer(VECTORS, torch.float16, num_extra=1)
    for name, arguments in calls:
        detached = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        torch.library.opcheck(
            getattr(OPS, name).default, detached, test_utils=("test_schema", "test_faketensor")
        )


def outcome(name, arguments):
    """Return the tensors that an op returns or fills, without the rows that it does not write."""
    if name == "shrink":
        arguments[0].zero_()
    returned = getattr(OPS, name)(*arguments)
    if name == "shrink":
        return [arguments[0]]
    if isinstance(returned, torch.Tensor):
        returned = [returned]
    if name == "dispatch_with_maps":
        return [*returned[:-1], *returned[-1]]
    if name == "wgrad":
        sums, du, sum_of_dots = returned
        written = torch.zeros(len(du), dtype=torch.bool, device=du.device)
        for first, end in arguments[3][0][:2].T.tolist() if len(du) else []:
            written[first:end] = True
        return [*sums, du[written], sum_of_dots]
    if name in ("grouped_gemm", "act_backward"):
        dispatched = int(arguments[5][-1])
        returned = [returned[0][:dispatched], *returned[1:]]
    if name == "act_backward":
        d_pre, act, dots, folded = returned
        du1, *sums = folded
        adapted, kept = adapted_rows(arguments), rows_with_act(arguments) if len(act) else []
        kept = kept if arguments[12] else [row for row in kept if row not in adapted]
        returned = [d_pre, act[kept], dots]
        returned += [du1[:, adapted] if len(du1) else du1]
        returned += [slots[written_slots(arguments)] if len(slots) else slots for slots in sums]
    if name == "gate_up":
        pre_act, act, parts = returned
        returned = pre_act, act, parts[:, adapted_rows(arguments)].sum(0)  # of as many as there are
    return returned


def adapted_rows(arguments):
    """Return the rows of frozen experts that have an adapter."""
    end = int(arguments[5][len(arguments[1]) * (1 + len(arguments[8]))])
    return [row for row in rows_with_act(arguments) if row < end]


def written_slots(arguments):
    """Return the slots in which act_backward leaves sums over the rows of tiles."""
    stack, segments, modalities = arguments[1], arguments[5], len(arguments[8])
    slots = []
    for modality in range(modalities):
        for expert in range(len(stack)):
            of_pair = cuda_stand_ins.slots_of(segments, modalities, modality, expert)
            slots += range(of_pair.start, of_pair.stop)
    return slots


def rows_with_act(arguments):
    """Return the rows whose activation act_backward may write: adapted or of an added expert."""
    stack, segments, scaling = arguments[1], arguments[5].tolist(), arguments[8]
    period = 1 + len(scaling)
    of_base = range(0, len(stack) * period, period)
    without = {row for s in of_base for row in range(segments[s], segments[s + 1])}
    return [row for row in range(segments[-1]) if row not in without]


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_call_gives_on_the_gpu_what_it_gives_on_the_cpu(calls, dtype):
    layer(SHAPES["small"], dtype, num_extra=1, num_modalities=2)
    assert {name for name, _ in calls} == ALL
    for name, arguments in calls:
        on_cpu = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), arguments)
        for a, b in zip(outcome(name, arguments), outcome(name, on_cpu), strict=True):
            if a.is_floating_point():
                assert_close(a.cpu(), b, dtype=dtype, name=name)
            else:
                assert torch.equal(a.cpu(), b), name

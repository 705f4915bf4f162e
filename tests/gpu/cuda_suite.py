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
from support.launches import COUNTS, Launches
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
from moe_kernels.ops import LoraWeights, checks, cuda_launches, lora_linear, triton_launches
from moe_kernels.ops.lora_linear import triton_impl as lora_linear_impl
from moe_kernels.ops.moe_mlp import cuda_impl, gpu
from moe_kernels.ops.moe_mlp.activation import SILU
from moe_kernels.ops.moe_mlp.weights import ExpertWeights
from moe_kernels.testing import SHAPES, Shape, assert_close, make_moe_inputs

SHARED = {"dispatch_with_maps", "tile_maps", "shrink", "wgrad", "combine"}
PRODUCTS = {"gate_up", "grouped_gemm", "act_backward"}
ALL = SHARED | PRODUCTS
VECTORS = Shape(T=37, K=3, E=5, H=48, I=24, r=5)  # all rows in whole vectors of 16 bytes
OPS = _native.ops()
ON_HOST = os.environ.get("CUDA_KERNELS_ON_HOST")
if ON_HOST is not None:
    torch.ops.load_library(ON_HOST)
else:
    LIBRARY = cuda_stand_ins.register()


@pytest.fixture(autouse=True)
def cuda_for_triton(monkeypatch):
    """Run "cuda" where a case names "triton", which works without a GPU too.

    The extension multiplies on every device, whatever the number of rows.
    """
    monkeypatch.setattr(cuda_launches, "TRITON_FROM", 1000)
    implementation = backends.implementation
    monkeypatch.setattr(
        backends,
        "implementation",
        lambda op, name: implementation(op, "cuda" if name == "triton" else name),
    )


@pytest.fixture
def calls(monkeypatch):
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


@pytest.mark.parametrize("most", [2**28, 0])
def test_half_precision_where_the_parts_of_du_are_large(monkeypatch, calls, most):
    """A pass of its own then computes du1; one always computes du2."""
    monkeypatch.setattr(gpu, "check_dtype", lambda dtype: None)
    monkeypatch.setattr(triton_launches, "MAX_BYTES_OF_PARTS", most)
    shape = Shape(T=50, K=3, E=3, H=72, I=40, r=12)
    check(torch.bfloat16, shape, seed=3, num_modalities=2)
    names = [name for name, _ in calls]
    assert (names.count("shrink"), names.count("wgrad")) == (3 if most else 4, 2)


@NEEDS_CUDA
@pytest.mark.parametrize("tokens", [40, 400, 4000])  # tiles of 16, 64 and 128 rows
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_tile_matches_the_reference(dtype, tokens):
    check(dtype, Shape(T=tokens, K=2, E=8, H=264, I=136, r=24), num_modalities=2, num_extra=1)


@pytest.mark.parametrize(("variant", "wgrads"), [({}, 2), ({"num_extra": 1}, 3)])
def test_a_layer_calls_the_native_ops(calls, variant, wgrads):
    layer(VECTORS, torch.float16, **variant)
    names = [name for name, _ in calls]
    forward = ["dispatch_with_maps", "shrink", "gate_up", "shrink", "grouped_gemm", "combine"]
    assert names[:6] == forward
    backward = ["act_backward", "combine", "grouped_gemm", "shrink", "tile_maps"]
    assert sorted(names[6:]) == [*backward, *["wgrad"] * wgrads]  # du1 with dB1


@pytest.mark.parametrize("rank", [3, 20])
def test_saved_rows_without_an_adapter_are_zeros_in_half_precision(rank, filled_memory):
    check_saved_zeros(cuda_impl, rank, torch.float16)


DISPATCH = ["dispatch_with_maps"] * 2  # count, and sort with the maps
FORWARD = [*DISPATCH, "shrink", "gate_up", "shrink", "grouped_gemm", "combine"]
BACKWARD = [
    "tile_maps", "shrink", "act_backward", "wgrad", "wgrad", "grouped_gemm", "combine", "wgrad",
    "wgrad",
]  # fmt: skip


@pytest.mark.skipif(ON_HOST is None, reason="counts the launches of kernels on the host")
@pytest.mark.parametrize(
    ("variant", "forward", "backward"),
    [
        ({}, FORWARD, BACKWARD),
        (
            {"num_extra": 1},
            FORWARD,
            [*BACKWARD, "aten::ones", "wgrad", "wgrad", *["aten::_to_copy"] * 2],
        ),
        (
            {"modality": None, "ranks": (0, 0)},
            [name for name in FORWARD if name != "shrink"],
            ["tile_maps", "act_backward", "wgrad", "grouped_gemm", "combine"],
        ),
    ],
)
def test_the_number_of_launches(variant, forward, backward, monkeypatch):
    """At most 7 in inference and 16 in training; without adapters 5 and 10."""
    inputs = make_moe_inputs(VECTORS, **variant)
    inputs = inputs.to(torch.float16, lora_dtype=torch.float32)
    of_ops = ctypes.CDLL(ON_HOST).launches
    assert (len(FORWARD), len(BACKWARD)) == (COUNTS["forward"], COUNTS["backward"])
    assert [*launches_of(inputs, monkeypatch, of_ops=of_ops)] == [forward, forward, backward]


@pytest.mark.skipif(ON_HOST is None, reason="counts the launches of kernels on the host")
def test_the_number_of_launches_where_triton_multiplies(monkeypatch):
    monkeypatch.setattr(cuda_launches, "TRITON_FROM", 0)
    inputs = make_moe_inputs(replace(LAUNCHED, T=17))  # decoding takes fewer
    inputs = inputs.to(torch.float16, lora_dtype=torch.float32)
    of_ops = ctypes.CDLL(ON_HOST).launches
    inference, forward, backward = launches_of(inputs, monkeypatch, of_ops=of_ops)
    triton = ["shrink", "gate_up", "shrink", "grouped_gemm"]
    expected = [*DISPATCH, *(f"{name}_kernel" for name in triton), "combine"]
    assert inference == forward == expected
    assert [name for name in backward if "kernel" not in name] == ["tile_maps", "combine"]
    assert [name.removesuffix("_kernel") for name in backward] == TRITON_BACKWARD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_where_triton_multiplies(calls, monkeypatch, dtype):
    monkeypatch.setattr(cuda_launches, "TRITON_FROM", 0)
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
def test_opcheck(calls):
    """Check schema, shapes and refusals on fake tensors, for every call of both layers."""
    layer(VECTORS, torch.float16, num_extra=1)
    layer(replace(VECTORS, r=40), torch.float16)  # a pass of its own computes du
    lora_linear_results(torch.float16, "triton", *lora_linear_inputs(70, 5, torch.float16))
    decoded(make_moe_inputs(DECODED, num_extra=1).to(torch.float16))
    assert {name for name, _ in calls} == ALL | {"add_low_rank", "moe_mlp_inference"}
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
        returned[1] = returned[1][rows_with_act(arguments)]
    return returned


def rows_with_act(arguments):
    """Return the rows whose activation act_backward writes: adapted or of an added expert."""
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

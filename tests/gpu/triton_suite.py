"""The Triton kernels against the float64 reference; where there is no GPU, in the interpreter.

``test_triton.py`` runs these in processes of their own: Triton decides when it is first imported
whether kernels are interpreted.
"""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import moe_mlp as moe_mlp_inputs
from support.devices import NEEDS_CUDA, ON_GPU
from support.host_kernels import tile_map
from support.launches import COUNTS, Launches
from support.moe_mlp import LAYOUTS, SILU, VARIANTS, call, check_frozen_extra, run, strided
from support.patched_models import check_compiles
from support.registered_ops import make, results, same
from support.segments import Segments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels import tune
from moe_kernels.ops import (
    LoraWeights,
    checks,
    linear_dispatch,
    lora_linear,
    moe_mlp,
    quantise_fp8,
    quantise_nf4,
    triton_launches,
)
from moe_kernels.ops import triton_tile_maps as maps
from moe_kernels.ops.dispatch import reference, triton_sort
from moe_kernels.ops.dispatch import triton_impl as triton_dispatch
from moe_kernels.ops.moe_mlp import autograd, gpu, triton_tiles
from moe_kernels.ops.moe_mlp import triton_impl as triton_moe_mlp
from moe_kernels.ops.moe_mlp.activation import ExpertForm
from moe_kernels.ops.moe_mlp.tiles import Tiles, force
from moe_kernels.ops.moe_mlp.weights import ExpertWeights
from moe_kernels.testing import (
    SHAPES,
    Shape,
    assert_close,
    make_modality_ids,
    make_moe_inputs,
    make_routing,
)

DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter would take hours.
LONG = [
    Shape(T=100_000, K=2, E=4, H=64, I=32, r=4),
    Shape(T=2000, K=16, E=512, H=128, I=64, r=16),
] * ON_GPU
BIG_TILES = Tiles(128, 64, 64, 64, 8, 8, 3, 128)  # dA' in four pieces, its registers capped
# The interpreter's products of bfloat16 are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def on_device(inputs, device=DEVICE):
    return moe_mlp_inputs.on_device(inputs, device)


def check(dtype, shape, seed=0, options=None, **variant):
    options = options or {}
    low = make_moe_inputs(shape, seed=seed, **variant)
    low = low.to(dtype, lora_dtype=torch.float32)
    grad_out = torch.randn(low.hidden_states.shape, dtype=torch.float64).to(dtype).double()
    expected = run(low.to(torch.float64), "reference", grad_out, **options)
    actual = run(on_device(low), "triton", grad_out.to(DEVICE), **options)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value.cpu(), expected[name], dtype=dtype, name=name)


# The interpreter takes seconds for each. The others of these differ in their routing or mask, which
# test_dispatch and test_tile_maps vary too, or have less than one of these.
SOON = {
    "shared_a", "own_ranks", "gate_up_only", "down_only", "no_adapter", "no_mask", "all_padding",
    "half_empty",
}  # fmt: skip


def soon(names, chosen):
    """Return parameters, of which those that are not chosen are slow."""
    assert {*chosen} <= {*names}
    return [pytest.param(n, marks=[] if n in chosen else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("variant", soon(VARIANTS, SOON))
def test_matches_the_reference(variant):
    check(torch.float32, SHAPES["tiny"], seed=len(variant), **VARIANTS[variant])


# Each order of gate and up, storage and activation.
@pytest.mark.parametrize(
    "layout",
    soon(
        ["transposed", "bias", "gelu_tanh", "interleaved", "gelu_alone", "gpt_oss", "all_else"],
        ["interleaved", "gpt_oss"],
    ),
)
def test_other_layouts_match_the_reference(layout, filled_memory):
    made, options = LAYOUTS[layout]
    shape = Shape(T=9, K=2, E=2, H=21, I=19, r=3)
    variant = {"num_modalities": 2, "num_extra": 1} | made
    check(torch.float32, shape, seed=len(layout), options=options, **variant)


@pytest.mark.parametrize(
    ("pack", "dtype", "num_extra"),
    [(quantise_nf4, torch.float16, 1), (quantise_fp8, torch.float32, 0)],
)
def test_bits_of_a_packed_base_are_those_of_the_unpacked_one(pack, dtype, num_extra, filled_memory):
    """In both directions, in sizes that no block divides. By themselves the tiles differ."""
    shape = Shape(T=5, K=2, E=2, H=150, I=18, r=3)
    inputs = on_device(make_moe_inputs(shape, num_modalities=2, num_extra=num_extra).to(dtype))
    packed = {name: pack(getattr(inputs, name)) for name in ("gate_up_proj", "down_proj")}
    plain = {name: stack.dequantise() for name, stack in packed.items()}
    grad_out = torch.randn_like(inputs.hidden_states)
    with force(triton_tiles.built_in(torch.float16, 0, packed=True)[-1][1]):
        found = run(inputs._replace(**packed), "triton", grad_out)
        expected = run(inputs._replace(**plain), "triton", grad_out)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", ["interleaved", "nemotron_h"])
def test_bits_of_a_packed_base_in_another_layout(layout):
    made, options = LAYOUTS[layout]
    shape = Shape(T=9, K=2, E=2, H=22, I=18, r=3)
    inputs = on_device(make_moe_inputs(shape, **made).to(torch.float32))
    packed = inputs._replace(gate_up_proj=quantise_nf4(inputs.gate_up_proj))
    plain = inputs._replace(gate_up_proj=packed.gate_up_proj.dequantise())
    found = call(packed, "triton", **options)
    with force(triton_tiles.built_in(torch.float32, 0, packed=True)[-1][1]):
        assert torch.equal(found, call(plain, "triton", **options))


def test_forced_tiles_are_those_of_a_call_and_its_backward(monkeypatch):
    """Autograd runs backward in a thread of its own on a GPU, and may run it later."""
    inputs = on_device(make_moe_inputs(SHAPES["tiny"]).to(torch.float32)).requires_grad_()
    tiles, used = Tiles(32, 32, 16, 16, 8, 4, 2), []

    def choose(*arguments):
        used.append(triton_tiles.choose_tiles(*arguments))
        return used[-1]

    def in_another_thread(function):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    monkeypatch.setattr(gpu, "choose_tiles", choose)
    with force(tiles):
        out = call(inputs, "triton")
        usual = in_another_thread(lambda: call(inputs, "triton"))
    in_another_thread(out.sum().backward)
    assert used[0] == used[2] == tiles != used[1]
    with force(tiles):
        in_another_thread(usual.sum().backward)
    assert used[3] == used[1]


def test_text_rows_do_not_see_adapters_in_another_layout():
    made, options = LAYOUTS["gpt_oss"]
    shape = Shape(T=9, K=2, E=2, H=21, I=19, r=3)
    inputs = on_device(make_moe_inputs(shape, **made).to(torch.float32))
    text = inputs.modality_ids == 0
    before = call(inputs, "triton", **options)[text]
    for lora in (inputs.gate_up_lora, inputs.down_lora):
        lora.lora_A.fill_(float("nan"))
        lora.lora_B.fill_(float("inf"))
    assert torch.equal(call(inputs, "triton", **options)[text], before)


@pytest.mark.parametrize(
    "dtype",
    [DTYPES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize(
    "variant", soon(["two_modalities", "added_experts", "shared_a", "own_ranks"], ["added_experts"])
)
def test_odd_sizes(dtype, variant):
    check(dtype, SHAPES["odd"], **VARIANTS[variant])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(T=1, K=1, E=2, H=16, I=16, r=4),
        Shape(T=3, K=5, E=6, H=40, I=24, r=70),
        Shape(T=300, K=2, E=2, H=32, I=16, r=4),  # tiles with many rows
        # sums of several chunks of rows
        pytest.param(Shape(T=1800, K=1, E=1, H=16, I=16, r=4), marks=pytest.mark.slow),
        pytest.param(Shape(T=9, K=16, E=130, H=16, I=16, r=4), marks=pytest.mark.slow),
        pytest.param(Shape(T=9, K=2, E=2, H=24, I=16, r=256), marks=pytest.mark.slow),
        *LONG,
    ],
    ids=str,
)
def test_shapes(shape):
    check(torch.float32, shape, num_modalities=2)


@pytest.mark.slow
def test_where_the_parts_of_du_are_large(monkeypatch):
    """A pass of its own then computes du1."""
    shape = Shape(T=50, K=3, E=3, H=72, I=40, r=12)
    monkeypatch.setattr(triton_launches, "MAX_BYTES_OF_PARTS", 0)
    check(torch.float32, shape, seed=3, num_modalities=2)


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3, 4, 5))]
)
def test_random_shapes(seed):
    """Draw sizes, rank, routing, mask and dtype at random."""
    draw = random.Random(seed)
    experts = draw.randint(1, 9)
    shape = Shape(
        T=draw.randint(1, 60), K=draw.randint(1, experts), E=experts, H=draw.randint(1, 90),
        I=draw.randint(1, 70), r=draw.randint(1, 40),
    )  # fmt: skip
    check(
        draw.choice(DTYPES), shape, seed=seed, num_modalities=draw.randint(1, 3),
        routing=draw.choice(["balanced", "zipf", "one_expert", "repeated", "half_empty"]),
        modality=draw.choice(["mixed", "no_padding", "image"]), num_extra=draw.randint(0, 2),
        shared_a=draw.random() < 0.5,
    )  # fmt: skip


@pytest.mark.slow
def test_stacks_of_more_than_2_to_the_31_elements():
    """Rows of the last expert are right; only the memory of the chosen experts is touched."""
    experts, hidden, inter, top_k = 32, 65_600, 512, 1
    assert experts * hidden * inter * 2 > 2**31
    dtype = torch.float16
    ids = torch.tensor([[experts - 1], [3], [experts - 1]], device=DEVICE)
    used = ids.unique()
    stacks = [
        torch.empty(experts, *size, dtype=dtype, device=DEVICE)
        for size in ((2 * inter, hidden), (hidden, inter))
    ]
    for stack in stacks:
        stack[used] = torch.randn_like(stack[used]) / stack.shape[2] ** 0.5
    x = torch.randn(3, hidden, dtype=dtype, device=DEVICE)
    weights = torch.rand(3, top_k, device=DEVICE)
    grad_out = torch.randn_like(x)

    def results(dtype, ids, stacks, backend):
        leaves = x.to(dtype).requires_grad_(), weights.clone().requires_grad_()
        stacks = [stack.to(dtype) for stack in stacks]
        out = moe_mlp(leaves[0], ids, leaves[1], *stacks, backend=backend)
        return out, *torch.autograd.grad(out, leaves, grad_out.to(dtype))

    local = torch.searchsorted(used, ids)
    expected = results(torch.float64, local, [stack[used] for stack in stacks], "reference")
    # The interpreter is slow for every step, whatever the step's size, so take large ones.
    with force(None if ON_GPU else Tiles(16, 2048, 512, 512, 8, 4, 2)):
        actual = results(dtype, ids, stacks, "triton")
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found, wanted, dtype=dtype)


@pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90: run on a Hopper"
)
@pytest.mark.parametrize(
    ("tokens", "hidden", "inter", "launches", "layout"),
    [
        pytest.param(300, 64, 64, 4, None, marks=pytest.mark.slow),
        pytest.param(300, 72, 40, 2, None, marks=pytest.mark.slow),
        pytest.param(9, 128, 128, 4, "transposed", marks=pytest.mark.slow),
        pytest.param(9, 128, 128, 4, "gpt_oss", marks=pytest.mark.slow),
        pytest.param(9, 128, 128, 4, "nemotron_h", marks=pytest.mark.slow),
    ],
)
def test_the_copy_engine_changes_no_bit(monkeypatch, tokens, hidden, inter, launches, layout):
    made, options = LAYOUTS.get(layout, ({}, {}))
    shape = Shape(T=tokens, K=2, E=2, H=hidden, I=inter, r=4)
    inputs = on_device(make_moe_inputs(shape, **made).to(torch.float16))
    grad_out = torch.randn_like(inputs.hidden_states)
    used = []
    from_tensor = TensorDescriptor.from_tensor
    monkeypatch.setattr(
        TensorDescriptor, "from_tensor", lambda *args: used.append(args) or from_tensor(*args)
    )
    with_engine = run(inputs, "triton", grad_out, **options)
    assert len(used) == launches
    monkeypatch.setattr(triton_launches, "has_tma", lambda device: False)
    without = run(inputs, "triton", grad_out, **options)
    assert len(used) == launches
    assert all(torch.equal(with_engine[name], without[name]) for name in without)


@pytest.mark.parametrize("routing", ["zipf", "one_expert", "repeated", "half_empty"])
@pytest.mark.parametrize(("tokens", "top_k", "modalities"), [(1, 8, 0), (50, 3, 1), (171, 3, 4)])
def test_dispatch(routing, tokens, top_k, modalities):
    experts = 8
    ids, _ = make_routing(tokens, top_k, experts, kind=routing)
    ids.view(-1)[::7] += torch.tensor([100, -100])[torch.arange(ids.view(-1)[::7].numel()) % 2]
    modality = make_modality_ids(tokens, modalities) if modalities else None
    expected = reference.dispatch(ids, experts, modality, modalities)
    arguments = ids.to(DEVICE), experts, None if modality is None else modality.to(DEVICE)
    actual = triton_dispatch.dispatch(*arguments, modalities)
    for field, expected_field in zip(actual, expected, strict=True):
        assert torch.equal(field.cpu(), expected_field)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "modalities", "kind"),
    [
        (1, 1, 1, 0, "ragged"),
        (90, 3, 512, 3, "ragged"),  # 2,049 keys
        (40, 8, 64, 1, "balanced"),
        (300, 1, 1, 2, "one expert"),  # as for lora_linear
        (129, 2, 5, 1, "one expert"),
        (256, 1, 300, 0, "nowhere"),
        pytest.param(1500, 8, 64, 1, "ragged", marks=pytest.mark.slow),
        pytest.param(600, 1, 1, 4093, "balanced", marks=pytest.mark.slow),
        *[(131_000, 8, 512, 3, "ragged"), (1_000_000, 8, 64, 1, "one expert")] * ON_GPU,
    ],
)
def test_dispatch_of_long_batches(tokens, top_k, experts, modalities, kind, monkeypatch):
    """In blocks of 256 rows: one, several, and one that is not full."""
    monkeypatch.setattr(triton_dispatch, "MAX_COUNTED", 0)
    monkeypatch.setattr(reference, "dispatch", None)  # torch does not sort
    ids = torch.randint(0, experts, (tokens, top_k))
    if kind == "ragged":
        ids = ids * ids // experts
    if kind == "one expert":
        ids[:] = experts - 1
    if kind != "balanced":
        ids[torch.rand(ids.shape) < 0.1] = -1
        ids[torch.rand(ids.shape) < (1 if kind == "nowhere" else 0.1)] = experts
    modality = torch.randint(-1, modalities + 2, (tokens,)) if modalities else None
    arguments = ids.to(DEVICE), experts, None if modality is None else modality.to(DEVICE)
    actual = triton_dispatch.dispatch(*arguments, modalities)
    monkeypatch.undo()
    expected = reference.dispatch(ids, experts, modality, modalities)
    for field, expected_field in zip(actual, expected, strict=True):
        assert torch.equal(field.cpu(), expected_field)


def test_torch_sorts_what_has_too_many_segments(monkeypatch):
    monkeypatch.setattr(triton_dispatch, "MAX_COUNTED", 0)
    sorted_by = []
    monkeypatch.setattr(triton_sort, "sort", lambda *sizes: sorted_by.append("triton"))
    monkeypatch.setattr(reference, "dispatch", lambda *sizes: sorted_by.append("torch"))
    ids = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    for experts in (4094, 4095):
        triton_dispatch.dispatch(ids, experts, None, 0)
    assert sorted_by == ["triton", "torch"]


@pytest.mark.parametrize("block", [1, 16, 300])
@pytest.mark.parametrize("seed", range(3))
def test_tile_maps(block, seed):
    segments = Segments(seed)
    base, extra, modalities = segments.base, segments.extra, segments.modalities
    for groups, bounds in (
        (maps.by_expert(base + extra, modalities), segments.experts),
        (maps.by_adapter(base, modalities), segments.pairs),
        (maps.by_added_expert(base, extra, modalities), segments.added),
    ):
        [found] = maps.tile_maps(segments.offsets.to(DEVICE), segments.rows, [(groups, block)])
        tiles, rows_of_groups = tile_map(bounds, segments.rows, block)
        num = int((tiles[1] < tiles[2]).sum())
        assert num <= found.num_tiles
        filled, empty = found.tiles.T.split([num, found.num_tiles - num])
        assert filled.tolist() == tiles.T[:num].tolist()
        assert (empty[:, 1] >= empty[:, 2]).all()
        assert found.groups.tolist() == rows_of_groups.tolist()
        counts = [-(-(end - first) // block) for first, end in bounds]
        assert sum(count for count in counts if count > 1) <= found.num_partials


@pytest.mark.slow
def test_the_first_added_experts_may_be_frozen(filled_memory):
    inputs = make_moe_inputs(SHAPES["tiny"], num_extra=2, ranks=(0, 0))
    check_frozen_extra(on_device(inputs.to(torch.float32)), "triton")


def test_no_tokens():
    inputs = on_device(make_moe_inputs(Shape(T=0, K=2, E=3, H=16, I=8, r=2)).to(torch.float32))
    results = run(inputs, "triton", torch.zeros(0, 16, device=DEVICE))
    assert results["out"].shape == (0, 16)
    assert all((grad == 0).all() for name, grad in results.items() if "lora" in name)


def test_padding_is_never_read_and_unwritten_memory_shows(filled_memory):
    inputs = make_moe_inputs(SHAPES["odd"], num_modalities=2, num_extra=1).to(torch.float32)
    padding = inputs.modality_ids == -1
    assert padding.any()
    inputs.hidden_states[padding] = float("nan")
    inputs.topk_weights[padding] = float("nan")
    results = run(on_device(inputs), "triton", torch.ones_like(inputs.hidden_states).to(DEVICE))
    for name in ("out", "hidden_states", "topk_weights"):
        assert (results[name].cpu()[padding] == 0).all()
    assert all(tensor.isfinite().all() for tensor in results.values())


def test_inputs_of_any_layout():
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.float32))
    odd = strided(inputs)
    assert not odd.gate_up_proj.is_contiguous() and not odd.down_lora.lora_A.is_contiguous()
    assert torch.equal(call(odd, "triton"), call(inputs, "triton"))


@pytest.mark.slow
def test_autocast_changes_nothing():
    inputs = on_device(make_moe_inputs(SHAPES["tiny"]).to(torch.float16, lora_dtype=torch.float32))
    grad_out = torch.randn_like(inputs.hidden_states)
    plain = run(inputs, "triton", grad_out)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = run(inputs, "triton", grad_out)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_a_graph_is_walked_twice():
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.float32)).requires_grad_()
    leaves = list(inputs.differentiable().values())
    loss = call(inputs, "triton").sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert same(first, second)


@pytest.mark.slow
def test_a_route_may_flip_at_recompute():
    """The shapes of tensors saved for backward do not depend on the routing."""
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.float32)).requires_grad_()
    routes = [inputs.topk_ids, torch.zeros_like(inputs.topk_ids)]

    def layer(x):
        return call(inputs._replace(hidden_states=x, topk_ids=routes.pop(0)), "triton")

    checkpoint(layer, inputs.hidden_states, use_reentrant=False).sum().backward()
    assert routes == []  # the recompute took the second route
    assert inputs.hidden_states.grad.isfinite().all() and inputs.hidden_states.grad.any()


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        *(pytest.param(value, marks=pytest.mark.slow) for value in (float("inf"), 3.0)),
    ],
)
def test_text_rows_do_not_see_adapters(value):
    """Rows of one modality do not see another's adapters either, while these are finite."""
    inputs = make_moe_inputs(SHAPES["tiny"], num_modalities=2).to(torch.float32)
    inputs = on_device(inputs)
    grad_out = torch.randn_like(inputs.hidden_states)
    before = run(inputs, "triton", grad_out)
    for modality in (1, 2):
        changed = inputs._replace(
            **{
                name: getattr(inputs, name)._replace(
                    lora_A=_filled(getattr(inputs, name).lora_A, modality, value),
                    lora_B=_filled(getattr(inputs, name).lora_B, modality, value),
                )
                for name in ("gate_up_lora", "down_lora")
            }
        )
        after = run(changed, "triton", grad_out)
        others = inputs.modality_ids != modality if value == 3.0 else inputs.modality_ids < 1
        assert others.any() and not others.all()
        for name in ("out", "hidden_states", "topk_weights"):
            assert torch.equal(after[name][others], before[name][others])
            assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(
    "tiles",
    [
        pytest.param(None, id="few rows", marks=pytest.mark.slow),
        pytest.param(BIG_TILES, id="many rows", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES[2:]], ids=str)
@pytest.mark.parametrize("seed", range(3 if ON_GPU else 1))
def test_text_bits_at_a_size_that_shows(dtype, seed, tiles):
    """Values, modality and routing of the other rows change, and so does every count."""
    inputs = make_moe_inputs(replace(SHAPES["bits"], T=200 if ON_GPU else 64), seed=seed).to(dtype)
    text = inputs.modality_ids == 0
    flipped = inputs.topk_ids.flip(1).roll(1, 0)
    changed = inputs._replace(
        hidden_states=torch.where(text[:, None], inputs.hidden_states, -3 * inputs.hidden_states),
        topk_ids=torch.where(text[:, None], inputs.topk_ids, flipped),
        modality_ids=torch.where(text, 0, 1),
    )
    with torch.no_grad(), force(tiles):
        before, after = (call(on_device(i), "triton").cpu() for i in (inputs, changed))
    assert torch.equal(after[text], before[text])
    assert not torch.equal(after, before)


def _filled(tensor, modality, value):
    tensor = tensor.detach().clone()
    tensor[modality - 1] = value
    return tensor


@pytest.mark.slow  # the interpreter runs programs in one order
def test_the_same_bits_twice():
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.float32))
    grad_out = torch.randn_like(inputs.hidden_states)
    first, second = (run(inputs, "triton", grad_out) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def compute_all_gradients():
    """Compute a small layer; return its inputs, the gradient of its output and all results."""
    inputs = on_device(make_moe_inputs(SHAPES["tiny"]).to(torch.float32))
    grad_out = torch.randn_like(inputs.hidden_states)
    return inputs, grad_out, run(inputs, "triton", grad_out)


all_gradients = pytest.fixture(compute_all_gradients, scope="module")


@pytest.mark.parametrize(
    "trained",
    [
        "hidden_states", "gate_up_lora",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("topk_weights", "down_lora")),
    ],
)  # fmt: skip
def test_only_the_gradients_asked_for(trained, all_gradients):
    inputs, grad_out, everything = all_gradients
    tensors = {
        name: tensor.detach().requires_grad_(name.startswith(trained))
        for name, tensor in inputs.differentiable().items()
    }
    loras = {
        name: LoraWeights(
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], getattr(inputs, name).scaling
        )
        for name in ("gate_up_lora", "down_lora")
    }
    alone = inputs._replace(
        hidden_states=tensors["hidden_states"], topk_weights=tensors["topk_weights"], **loras
    )
    call(alone, "triton").backward(grad_out)
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == name.startswith(trained)
        assert tensor.grad is None or torch.equal(tensor.grad, everything[name])


@pytest.mark.parametrize(
    ("dtype", "tokens", "modalities", "rank"),
    [
        *[(torch.float32, 37, 2, 5), (torch.float32, 37, 1, 20), (torch.float16, 37, 2, 5)],
        *[
            pytest.param(dtype, *sizes, marks=pytest.mark.slow)
            for dtype, *sizes in [
                (torch.float32, 37, 1, 5),
                (torch.float32, 1300, 1, 5),
                (torch.float16, 37, 1, 5),
                (torch.float16, 37, 1, 20),
                (torch.float16, 1300, 1, 5),
                *[(dtype, 37, 2, 20) for dtype in DTYPES[2:]],
            ]
        ],
    ],
)
def test_lora_linear(dtype, tokens, modalities, rank):
    generator = torch.Generator().manual_seed(modalities)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, bias, grad_out = normal(tokens, 50), normal(29, 50), normal(29), normal(tokens, 29)
    lora = normal(modalities, rank, 50), normal(modalities, 29, rank)
    scaling = torch.tensor([2.0, 0.5][:modalities])
    ids = torch.randint(-1, modalities + 1, (tokens,), generator=generator)

    def results(dtype, backend, device):
        def leaf(tensor):
            return tensor.to(device, dtype).requires_grad_()

        leaves = leaf(x), *map(leaf, lora)
        out = lora_linear(
            leaves[0], weight.to(device, dtype), bias.to(device, dtype),
            LoraWeights(*leaves[1:], scaling.to(device)), modality_ids=ids.to(device),
            backend=backend,
        )  # fmt: skip
        return out, *torch.autograd.grad(out, leaves, grad_out.to(device, dtype))

    expected = results(torch.float64, "reference", "cpu")
    for actual, wanted in zip(results(dtype, "triton", DEVICE), expected, strict=True):
        assert_close(actual.cpu(), wanted, dtype=dtype)


@pytest.mark.skipif(ON_GPU, reason="its tensors are on the CPU: run on a machine without a GPU")
@pytest.mark.slow
@pytest.mark.parametrize("op", ["moe_mlp", "lora_linear"])
def test_compiles_into_one_graph(op):
    function, x, adapters = make(op, "triton")
    expected = results(function, x, adapters)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert same(results(compiled, x, adapters), expected)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="its tensors are on the CPU: run on a machine without a GPU")
def test_a_patched_model_compiles_into_one_graph():
    check_compiles("olmoe", "triton")


class NoSync(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "bincount")

    def __enter__(self):
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *error):
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.WAITS, name
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_values(monkeypatch):
    """Refuse our code, but not the interpreter, a look at a tensor's values."""

    def refuse(method):
        def refused(self, *args, **kwargs):
            assert "moe_kernels" not in sys._getframe(1).f_code.co_filename
            return method(self, *args, **kwargs)

        return refused

    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse(getattr(torch.Tensor, name)))


@pytest.mark.parametrize(  # sorted in one launch, and in three
    "tokens", [13, pytest.param(700, marks=pytest.mark.slow)]
)
def test_the_host_never_waits(tokens, no_values):
    shape = replace(SHAPES["tiny"], T=tokens, K=8, E=9)
    inputs = on_device(make_moe_inputs(shape, num_extra=1, num_modalities=2).to(torch.float32))
    with NoSync():
        forward_of(inputs, triton_moe_mlp)([True] * 8)


def forward_of(inputs, implementation, save=True):
    """Compute a layer by a backend's functions; return its backward, which takes ``needs``."""
    none = (None, None, None)
    loras = [*(inputs.gate_up_lora or none), *(inputs.down_lora or none)]
    weights = ExpertWeights(*inputs[3:5], *inputs[8:10], *loras, None)
    x, ids, topk_weights, form = *inputs[:3], ExpertForm(*SILU)
    _, saved = implementation.forward(
        x, ids, topk_weights, inputs.modality_ids, weights, form, save
    )
    return partial(implementation.backward, x, x, topk_weights, weights, form, saved)


def launches_of(inputs, monkeypatch, **of_ops):
    """Return the launches of ``moe_mlp`` in inference, and in training, forward and backward."""
    monkeypatch.setattr(checks, "reads_values", lambda device: False)  # as on a GPU
    monkeypatch.setattr(autograd, "is_plain", lambda *tensors: True)  # though a mode is active
    inputs.requires_grad_()
    leaves, grad_out = list(inputs.differentiable().values()), inputs.hidden_states.detach()
    seen = Launches(monkeypatch, **of_ops)
    with seen:
        with torch.no_grad():
            call(inputs, "triton")
        inference, seen.names = seen.names, []
        out = call(inputs, "triton")
        forward, seen.names = seen.names, []
        torch.autograd.grad(out, leaves, grad_out)
    return inference, forward, seen.names


@pytest.mark.parametrize("rank", [3, 20])
def test_saved_rows_without_an_adapter_are_zeros(rank, filled_memory):
    check_saved_zeros(triton_moe_mlp, rank, torch.float32)


def check_saved_zeros(implementation, rank, dtype):
    """They are rows of text, of padding and of added experts; a memset no longer makes them."""
    shape = Shape(T=40, K=2, E=3, H=24, I=16, r=rank)
    inputs = make_moe_inputs(shape, num_modalities=2, num_extra=1).to(dtype)
    saved = forward_of(on_device(inputs), implementation).args[-1]
    slots = saved.perm.cpu()
    adapted = (inputs.modality_ids > 0).repeat_interleave(2) & (inputs.topk_ids.view(-1) < 3)
    for u in (saved.u1.cpu(), saved.u2.cpu()):
        assert not u[~adapted[slots]].any() and u[adapted[slots]].any(1).all()


LAUNCHED = Shape(T=5, K=2, E=2, H=24, I=16, r=4)
FORWARD = ["dispatch", "tile_maps", "shrink", "gate_up", "shrink", "grouped_gemm", "combine"]
BACKWARD = [
    "tile_maps", "shrink", "act_backward", "wgrad", "finish_wgrad", "grouped_gemm", "combine",
    "wgrad", "finish_wgrad",
]  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="counts in the interpreter: run on a machine without a GPU")
@pytest.mark.parametrize(
    ("variant", "forward", "backward"),
    [
        ({}, FORWARD, BACKWARD),
        ({"modality": "text"}, FORWARD, BACKWARD),
        (
            {"num_extra": 1},
            FORWARD,
            [*BACKWARD, "aten::ones", "wgrad", "finish_wgrad", *["aten::_to_copy"] * 2],
        ),
        (
            {"modality": None, "ranks": (0, 0)},
            [name for name in FORWARD if name != "shrink"],
            ["tile_maps", "act_backward", "finish_wgrad", "grouped_gemm", "combine"],
        ),
    ],
)
def test_launches(variant, forward, backward, monkeypatch):
    """At most 7 in inference and 16 in training; of text alone, M = 0, 5 and 10."""
    inputs = make_moe_inputs(LAUNCHED, **variant)
    inputs = inputs.to(torch.float16, lora_dtype=torch.float32)
    found = launches_of(inputs, monkeypatch)
    names = [[name.removesuffix("_kernel") for name in names] for names in found]
    assert names == [forward, forward, backward]
    assert (len(FORWARD), len(BACKWARD)) == (COUNTS["forward"], COUNTS["backward"])


@pytest.mark.skipif(ON_GPU, reason="counts in the interpreter: run on a machine without a GPU")
@pytest.mark.parametrize("most_counted", [20, 19])
def test_launches_of_dispatch(most_counted, monkeypatch):
    """A counting sort takes three; the rows of a linear layer are sorted by the same launches."""
    monkeypatch.setattr(triton_dispatch, "MAX_COUNTED", most_counted)
    sort = ["dispatch"] if most_counted == 20 else ["count", "scan", "place"]
    with Launches(monkeypatch) as seen:
        triton_dispatch.dispatch(torch.zeros(10, 2, dtype=torch.int64), 3, None, 1)
        linear_dispatch(torch.zeros(20, dtype=torch.int64), 1, backend="triton")
    names = [name.removesuffix("_kernel") for name in seen.names]
    assert [n for n in names if "aten" not in n] == [*sort, *sort, "tile_maps"]


@pytest.mark.skipif(ON_GPU, reason="counts in the interpreter: run on a machine without a GPU")
@pytest.mark.parametrize(("rank", "backward"), [(4, 9), (17, 10)])
def test_launches_of_many_rows(rank, backward, monkeypatch):
    """The sort takes two launches more, and du1 at a rank that gives none with dB1 one more."""
    monkeypatch.setattr(triton_dispatch, "MAX_COUNTED", LAUNCHED.T * LAUNCHED.K - 1)
    inputs = make_moe_inputs(replace(LAUNCHED, r=rank)).to(torch.float32)
    found = launches_of(inputs, monkeypatch)
    assert found[0][:3] == ["count_kernel", "scan_kernel", "place_kernel"]
    assert [len(names) for names in found] == [9, 9, backward]
    assert found[2].count("shrink_kernel") == backward - 8


@NEEDS_CUDA
def test_a_captured_graph_gives_the_same_bits():
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.bfloat16))
    grad_out = torch.randn_like(inputs.hidden_states)
    # A graph that is kept would keep the leaves' part in backward on this stream.
    expected = {name: value.detach() for name, value in run(inputs, "triton", grad_out).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs, "triton", grad_out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = run(inputs, "triton", grad_out)
    for tensor in found.values():
        tensor.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@NEEDS_CUDA
def test_inductor_takes_the_op():
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.bfloat16))

    def function(x):
        return call(inputs._replace(hidden_states=x), "triton") * 2

    x = inputs.hidden_states.requires_grad_()
    found = torch.compile(function, fullgraph=True)(x)
    assert torch.equal(found, function(x))
    (grad,) = torch.autograd.grad(found.float().square().sum(), x)
    assert grad.isfinite().all() and grad.any()


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: run on a machine with two"
)
def test_tensors_may_be_on_another_device_than_the_current():
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.bfloat16))
    elsewhere = on_device(inputs, "cuda:1")
    with torch.cuda.device(0):
        assert torch.equal(call(elsewhere, "triton").cpu(), call(inputs, "triton").cpu())


@pytest.mark.slow  # it times many tiles
def test_tuned_tiles_are_stored_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_TILES", str(tmp_path / "new" / "tiles.json"))
    shape, dtype = SHAPES["tiny"], torch.float32
    weight = torch.empty(shape.E, 2 * shape.I, shape.H, device=DEVICE)
    weights = ExpertWeights(weight, *[None] * 10)
    triton_tiles.forget_stored()
    before = triton_tiles.choose_tiles(shape.T * shape.K, weights, dtype)
    best, seconds = tune.tune(shape, dtype, DEVICE, trials=1, limit=1)
    assert best == tune.candidates(shape.T * shape.K // shape.E, dtype)[0] != before
    assert seconds > 0
    tune.store(triton_tiles.key_of(weight), [(0, before), (100, best)])
    assert triton_tiles.choose_tiles(0, weights, dtype) == before
    assert triton_tiles.choose_tiles(100 * shape.E, weights, dtype) == best
    tune.store("another", [(0, best)])
    assert triton_tiles.choose_tiles(0, weights, dtype) == before  # kept beside the new entry
    triton_tiles.forget_stored()


@pytest.mark.parametrize(
    "content",
    [
        b"[", b"[]", b"\xff", b"[" * 100_000, b'{"x": 3}', b'{"x": [[0]]}', b'{"x": [[0, {}]]}',
        b'{"x": [[0, {"m": "16", "n": 16, "n_gated": 16, "k": 16, "group": 8, "warps": 4, "stages": 2}]]}',  # noqa: E501
        b'{"x": [[0, {"m": 24, "n": 16, "n_gated": 16, "k": 16, "group": 8, "warps": 4, "stages": 2}]]}',  # noqa: E501
    ],
)  # fmt: skip
def test_a_damaged_file_of_tuned_tiles(content, tmp_path):
    (tmp_path / "tiles.json").write_bytes(content)
    with pytest.raises(ValueError, match="tiles.json is not a file of tuned tiles.*delete it"):
        triton_tiles.read(tmp_path / "tiles.json")


def test_a_height_that_is_no_power_of_two(tmp_path):
    sizes = {"m": 24, "n": 16, "n_gated": 16, "k": 16, "group": 8, "warps": 4, "stages": 2}
    (tmp_path / "tiles.json").write_text(json.dumps({"x": [[0, sizes]]}))
    with pytest.raises(ValueError, match="'m': 24, .* are no tiles"):
        triton_tiles.read(tmp_path / "tiles.json")


def test_refuses_what_it_does_not_compute():
    inputs = on_device(make_moe_inputs(SHAPES["tiny"]).to(torch.float64))
    with pytest.raises(TypeError, match="compute in float32, bfloat16 or float16, not float64"):
        call(inputs, "triton")


@pytest.mark.skipif(ON_GPU, reason="of the interpreter: run on a machine without a GPU")
def test_the_interpreter_refuses_bfloat16():
    inputs = make_moe_inputs(SHAPES["tiny"]).to(torch.bfloat16)
    with pytest.raises(TypeError, match="interpreter multiplies bfloat16 wrongly"):
        call(inputs, "triton")

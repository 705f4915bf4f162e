"""Backend "cuda": what it needs, its ops on tensors without memory, and ``cuda_suite.py``."""

from pathlib import Path

import pytest
import torch
from support import host_kernels
from support.devices import NEEDS_TRITON
from support.moe_mlp import SILU
from support.processes import run_pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_kernels import _native, _nvrtc, backends, info
from moe_kernels.ops import triton_tile_maps

NEEDS_EXTENSION = pytest.mark.skipif(not _native.is_available(), reason=f"{_native.why_not()}")
CASES = str(Path(__file__).with_name("cuda_suite.py"))


@pytest.mark.slow  # the kernels on the host, below, take most cases in half precision
@NEEDS_EXTENSION
@NEEDS_TRITON
@pytest.mark.parametrize(
    "selected", ["test_matches or odd or shapes", "not test_matches and not odd and not shapes"]
)
def test_layers(selected):
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    # Tests of one kind of device are skipped on the other.
    run_pytest(CASES, "-k", selected, may_skip=True, **environment)


@NEEDS_EXTENSION
@NEEDS_TRITON
@pytest.mark.skipif(host_kernels.missing() is not None, reason=str(host_kernels.missing()))
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="imitates a GPU: run on a machine without one"
)
@pytest.mark.slow
def test_layers_by_the_kernels_on_the_host(tmp_path):
    """Run layers, launchers and kernels unchanged; only the device is imitated."""
    library = str(host_kernels.build_ops(tmp_path))
    selected = (
        "half_precision or lora_linear or native_ops or opcheck or made_to_fit or decod or "
        "launches or in_one_call or any_gradients"
    )
    run_pytest(CASES, "-k", selected, TRITON_INTERPRET="1", CUDA_KERNELS_ON_HOST=library)


@pytest.fixture
def works(monkeypatch):
    """Imitate a machine that has everything."""
    monkeypatch.setattr(_native, "why_not", lambda: None)
    monkeypatch.setattr(_native, "has_cuda_kernel", lambda op: True)
    monkeypatch.setattr(_native, "compiles_cuda_kernels", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_arch_list": "8.0;9.0a;10.0+PTX"})
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    for cached in (_native.runs_on, backends._why_not_on):
        cached.cache_clear()
    yield monkeypatch
    for cached in (_native.runs_on, backends._why_not_on):
        cached.cache_clear()


def test_it_works_where_everything_is_there(works):
    assert backends.available()["cuda"] is None
    assert backends.select("cuda", torch.device("cuda")) == "cuda"
    assert backends.select(None, torch.device("cuda")) == "cuda"
    assert backends.select(None, torch.device("cuda"), torch.float64) == "reference"
    works.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="'cuda' needs tensors on a CUDA device, got cpu"):
        backends.select("cuda", torch.device("cpu"))


def test_a_device_is_asked_once(works):
    """Every call of an op chooses its backend; the environment may change between calls."""
    asked = []
    works.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, 0))
    for index in (0, 0, 1, 0):
        for name in ("cuda", "triton", None):
            assert backends.select(name, torch.device("cuda", index)) == (name or "cuda")
    assert asked == [0, 0, 1, 1]  # by each of the two backends
    works.setenv("MOE_KERNELS_BACKEND", "triton")
    assert backends.select(None, torch.device("cuda", 0)) == "triton"
    works.setenv("TRITON_INTERPRET", "1")
    assert backends.select("triton", torch.device("cpu", 0)) == "triton"
    works.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="'triton' needs tensors on a CUDA device, got cpu"):
        backends.select("triton", torch.device("cpu", 0))
    assert len(asked) == 4


def test_it_says_what_is_missing(works):
    works.setattr(backends, "_HAS_TRITON", False)
    assert backends.available()["cuda"].startswith("triton is not installed")
    works.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.available()["cuda"] == "no CUDA device"
    works.setattr(_native, "has_cuda_kernel", lambda op: False)
    works.setattr(_native, "_note", lambda: {"no_cuda": "nvcc was not found"})
    reason = "the extension was built without CUDA kernels (nvcc was not found)"
    assert backends.available()["cuda"] == reason
    works.setattr(_native, "_note", dict)
    assert "the build left no note of why" in backends.available()["cuda"]
    works.setattr(_native, "why_not", lambda: "not built: ...")
    assert backends.available()["cuda"] == "the extension is missing: not built: ..."
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: the extension is"):
        backends.select("cuda", torch.device("cuda"))


@pytest.mark.parametrize(
    ("arch_list", "runs"),
    [
        ("8.0;9.0a;10.0+PTX", {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}),
        ("9.0a", {(9, 0)}),
        ("8.6 9.0", {(8, 6), (8, 9), (9, 0)}),
        ("8.0+PTX", {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}),
    ],
)
def test_it_needs_a_build_for_the_device(works, arch_list, runs):
    devices = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}
    works.setattr(_native, "build_info", lambda: {"cuda_arch_list": arch_list})
    _native.runs_on.cache_clear()
    for device in devices:
        works.setattr(torch.cuda, "get_device_capability", lambda _, device=device: device)
        reason = backends.available()["cuda"]
        assert (reason is None) == (device in runs), device
        assert reason is None or f"not built for this device, {device[0]}.{device[1]}" in reason


def test_kernels_compiled_at_first_use_need_no_build_for_the_device(works):
    works.setattr(_native, "compiles_cuda_kernels", lambda: True)
    works.setattr(_native, "build_info", lambda: {"cuda_arch_list": ""})
    works.setattr(_nvrtc, "why_not", lambda: None)
    for device, runs in (((8, 0), True), ((12, 1), True), ((7, 5), False)):
        works.setattr(torch.cuda, "get_device_capability", lambda _, device=device: device)
        assert (backends.available()["cuda"] is None) == runs
    assert "need compute capability 8.0 or later" in backends.available()["cuda"]
    assert "compiled by NVRTC at their first use" in info.collect()["build"]["cuda kernels"]
    works.setattr(_nvrtc, "why_not", lambda: "NVRTC was not found")
    assert backends.available()["cuda"] == "NVRTC was not found"
    with pytest.raises(RuntimeError, match="'cuda' is not available: NVRTC was not found"):
        backends.select("cuda", torch.device("cuda"))


def test_the_info_page_says_whose_kernels_run(works, capsys):
    works.setattr(_native, "has_cuda_kernel", lambda op: op in ("dispatch", "combine"))
    found = info.collect()["backend cuda"]
    assert found["dispatch"].startswith("CUDA up to 2,399 pairs")
    assert found["combine"] == "CUDA for rows of whole 16 bytes, else Triton"
    assert found["tile maps"] == "Triton"
    works.setattr(_native, "has_cuda_kernel", lambda op: True)
    few = info.collect()["backend cuda"]["a layer of up to 16 tokens, where nothing trains"]
    assert few.endswith("with MOE_KERNELS_DECODE=1: off until run on a GPU")
    info.main([])
    assert "backend cuda:\n  dispatch: CUDA" in capsys.readouterr().out
    works.setattr(_native, "has_cuda_kernel", lambda op: False)
    info.main([])
    assert "backend cuda: none" in capsys.readouterr().out


def test_the_info_page_has_the_hash_of_tuned_tiles(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("MOE_KERNELS_TILES", str(path))
    assert info.collect()["triton tiles"] == "built in"
    path.write_text("{}")
    assert info.collect()["triton tiles"] == f"{path}, sha256 44136fa355b3"
    path.write_text("{ }")
    assert not info.collect()["triton tiles"].endswith("44136fa355b3")


def test_a_build_with_cuda_has_every_op():
    """A build without CUDA has no CUDA kernel of any op."""
    built = bool(_native.build_info().get("cuda_arch_list"))
    expected = built or _native.compiles_cuda_kernels()
    names = {name for name, _ in info._CUDA_OPS.values()}
    names |= {"dispatch_with_maps", "moe_mlp_backward"}
    assert names == {*CALLS}
    for name in names:
        assert _native.has_cuda_kernel(name) == expected
        key = f"moe_kernels_native::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(key, "Meta")


def empty(*size, dtype=torch.float32, device="meta"):
    return torch.empty(size, dtype=dtype, device=device)


def integers(*size):
    return empty(*size, dtype=torch.int64)


def halves(*size):
    return empty(*size, dtype=torch.float16)


def products(left, stack, extra, u, v, block=16):
    """Return the arguments with which the products of the experts begin."""
    return (
        left, stack, extra, integers(20), integers(3, 6), integers(9), u, v, empty(1), block
    )  # fmt: skip


def of_layer(*, inference):
    """Return a layer's weights and form, with the modality ids in inference and in forward."""
    return (
        halves(3, 48, 16), halves(3, 16, 24), *([None] if inference else []),
        halves(1, 48, 16), halves(1, 16, 24), empty(1, 3, 5, 16), empty(1, 3, 48, 5), empty(1),
        halves(1, 1, 4, 24), halves(1, 3, 16, 4), empty(1), None, None, None, *SILU,
    )  # fmt: skip


# Ten tokens that choose two of four experts each; one expert and one modality are added.
CALLS = {
    "gate_up": (
        (*products(halves(10, 16), halves(3, 48, 16), halves(1, 48, 16), halves(20, 5),
                   empty(1, 3, 48, 5)), True, empty(1, 1, 4, 24)), [(20, 48), (20, 24), (2, 20, 4)]
    ),
    "grouped_gemm": (
        (*products(halves(20, 48), halves(3, 48, 16), halves(1, 48, 16), empty(3, 20, 5),
                   halves(1, 1, 5, 16)), False, True), [(20, 16), (20, 5)]
    ),
    "act_backward": (
        (*products(halves(10, 16), halves(4, 16, 136), None, empty(20, 5), empty(1, 4, 5, 136),
                   block=128),
         empty(10, 2), halves(20, 272), False, False, halves(20, 3), empty(1, 4, 272, 3), empty(1),
         [True, False, True]),
        [(20, 272), (0, 136), (2, 10, 2), (2, 20, 3), (0, 272, 3), (8, 5, 136)],
    ),
    "moe_mlp_inference": (
        (halves(10, 16), integers(10, 2), empty(10, 2), *of_layer(inference=True)), [(10, 16)]
    ),
    "moe_mlp_forward": (
        (halves(10, 16), integers(10, 2), empty(10, 2), *of_layer(inference=True), True),
        [(10, 16), (20, 48), (20, 5), (20, 4), (20,), (20,), (9,)],
    ),
    "moe_mlp_backward": (
        (halves(10, 16), halves(10, 16), empty(10, 2), integers(20), integers(20), integers(9),
         *of_layer(inference=False), halves(20, 48), halves(20, 5), halves(20, 4), 1, [True] * 8,
         0),
        [(10, 16), (10, 2), (1, 48, 16), (1, 16, 24), (1, 3, 5, 16), (1, 3, 48, 5), (1, 1, 4, 24),
         (1, 3, 16, 4)],
    ),
    "dispatch": ((integers(10, 2), 4, None, 1), [(20,), (20,), (4,), (5,), (9,)]),
    "dispatch_with_maps": (
        (integers(10, 2), 4, None, 1, [16, 8], [5, 5, 2, 0, 2, 4, 4, 2, 1, 1]),
        [(20,), (20,), (4,), (5,), (9,), (3, 6), (3, 5), (3, 6), (3, 4)],
    ),
    "tile_maps": (
        (integers(9), 20, [16, 8], [5, 5, 2, 0, 2, 4, 4, 2, 1, 1]), [(3, 6), (3, 5), (3, 6), (3, 4)]
    ),
    "combine": (
        (empty(20, 8), integers(20), integers(1), empty(10, 2, dtype=torch.bfloat16), 10), [(10, 8)]
    ),
    "add_low_rank": (
        (halves(10, 16), empty(10, 3), halves(2, 3, 16), empty(2), integers(10), integers(3, 6),
         False), []
    ),
    "wgrad": (
        ([halves(20, 3), empty(20, 40)], [halves(10, 6), halves(20, 8)], [integers(3, 6)] * 2,
         [integers(3, 4)] * 2, [empty(1), empty(2)], [None, empty(10, 2)], empty(4, 6, 3),
         [16, 16], [True, False], [False, False], [True, False], integers(20), empty(5, 10, 2),
         torch.bfloat16, 2, [empty(8, 272, 5)], integers(9), 4, 1),
        [(4, 6, 3), (4, 40, 8), (4, 272, 5), (20, 3), (10, 2)]
    ),
    "shrink": (
        (empty(20, 3), empty(10, 8), empty(1, 4, 3, 8), integers(20), integers(3, 6), integers(9),
         4, 4, 4, 2, True, True), []
    ),
}  # fmt: skip


def on_cuda(value):
    """Return a tensor, or a list with tensors, as on a GPU; in a mode of fake tensors."""
    if isinstance(value, list):
        return [on_cuda(part) for part in value]
    if not isinstance(value, torch.Tensor):
        return value
    return empty(*value.shape, dtype=value.dtype, device="cuda")


@NEEDS_EXTENSION
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_without_memory(op, fake):
    arguments, shapes = CALLS[op]
    mode = FakeTensorMode()
    if fake:
        with mode:
            arguments = [on_cuda(argument) for argument in arguments]
    found = getattr(_native.ops(), op)(*arguments)
    found = [found] if isinstance(found, torch.Tensor) else found or []
    found = [t for part in found for t in (part if isinstance(part, list) else [part])]
    assert [tuple(tensor.shape) for tensor in found] == shapes
    assert {tensor.device.type for tensor in found} <= {"cuda" if fake else "meta"}


REFUSALS = [
    ("dispatch", 0, integers(10), "topk_ids must have shape"),
    ("dispatch", 0, integers(10, 0), "at least one expert of each token"),
    ("dispatch", 1, 0, "num_experts must be at least 1"),
    ("dispatch", 2, integers(3), "modality_ids must have shape"),
    ("dispatch", 2, torch.zeros(10, dtype=torch.int64), "modality_ids must be on meta, is on cpu"),
    ("dispatch_with_maps", 2, integers(3), "modality_ids must have shape"),
    ("dispatch_with_maps", 3, 599, "fewer than 2400 pairs .*, there are 2400"),
    ("dispatch_with_maps", 4, [16], "five numbers in groups for each"),
    ("tile_maps", 1, 2**31, "fewer than 2.31 rows"),
    ("tile_maps", 2, [16], "five numbers in groups for each"),
    ("tile_maps", 2, [16, 0], "blocks must be at least 1"),
    ("tile_maps", 3, [5, 5, 2, 0, 2, 4, 4, 2, 9, 1], "groups of map 1 .* segments of 0..8"),
    ("tile_maps", 3, [5, 0, 2, 0, 2, 4, 4, 2, 1, 1], "groups of map 0"),
    ("combine", 0, empty(20, 8, dtype=torch.float64), "rows must be float32, bfloat16 or float16"),
    ("combine", 0, empty(20, 6), "a multiple of 16 bytes"),
    ("combine", 0, empty(8, 20).T, "rows must be contiguous"),
    ("combine", 1, empty(20), "inv_perm must be Long"),
    ("combine", 4, 9, "as many for each of 9 tokens"),
    ("wgrad", 0, [empty(20, 3, dtype=torch.bfloat16), empty(20, 40)], "left must be Half"),
    ("wgrad", 0, [empty(20, 3)] * 2, "with a matrix wgrad takes left and right of bfloat16 or"),
    ("wgrad", 0, [halves(20, 33), empty(20, 40)], "at most 32 columns of left"),
    ("wgrad", 0, [halves(20, 3)], "an entry for each of 1 problems, one has 2"),
    ("wgrad", 1, [halves(20, 6), halves(20, 8)], "right must have shape"),
    ("wgrad", 1, [halves(10, 6), empty(20, 8)], "right must have one dtype in all problems"),
    ("wgrad", 4, [empty(3), empty(2)], "factors must be one for each of as many neighbouring"),
    ("wgrad", 5, [None, empty(10, 3)], "weights must have shape"),
    ("wgrad", 6, empty(4, 3, 6), "matrix must have shape"),
    ("wgrad", 7, [16, 0], "at least a row in a chunk"),
    ("wgrad", 11, None, "and as many folded sums, with perm, or dots alone"),
    ("wgrad", 12, empty(5, 20, 1), "dots must have shape"),
    ("wgrad", 13, torch.float64, "the sum of dots must be float32, bfloat16 or float16"),
    ("wgrad", 14, 3, "perm must have top_k = 3 entries for each token"),
    ("wgrad", 15, [empty(7, 272, 5)], "folded must have shape"),
    ("wgrad", 16, None, "folded sums take segment_offsets"),
    ("wgrad", 16, integers(8), "segment_offsets must have more than 8 entries"),
    ("add_low_rank", 0, empty(10, 16), "out must be bfloat16 or float16"),
    ("add_low_rank", 0, halves(10, 12), "a multiple of 16 bytes"),
    ("add_low_rank", 1, halves(10, 3), "u must be Float"),
    ("add_low_rank", 2, halves(2, 16, 3), "v must have shape"),
    ("add_low_rank", 3, empty(1), "v must have shape"),
    ("add_low_rank", 4, integers(9), "perm must have shape"),
    ("gate_up", 0, empty(10, 16), "bfloat16 or float16"),
    ("gate_up", 0, halves(10, 12), "a multiple of 16 bytes"),
    ("gate_up", 0, halves(3, 16), "perm must have as many entries for each row of left"),
    ("gate_up", 1, halves(3, 47, 16), "stack must be .experts, 2 . inter, hidden."),
    ("gate_up", 1, halves(3, 48, 24), "stack must have shape"),
    ("gate_up", 2, halves(1, 40, 16), "extra must have shape"),
    ("gate_up", 5, integers(8), "as many segments for each of 4 experts"),
    ("gate_up", 6, None, "given together or not at all"),
    ("gate_up", 6, empty(20, 5), "u must be Half"),
    ("gate_up", 7, empty(2, 3, 48, 5), "v must have shape"),
    ("gate_up", 7, empty(1, 2, 48, 5), "v must be of 3 experts, or of 1 that all share, is of 2"),
    ("gate_up", 6, halves(2, 20, 5), "u must have shape"),
    ("gate_up", 9, 32, "block_m must be 16, 128 or 256, is 32"),
    ("gate_up", 11, halves(1, 3, 4, 16), "down_lora_A must have shape"),
    ("gate_up", 11, halves(1, 2, 4, 24), "of 3 experts, or of 1 that all share, is of 2"),
    ("moe_mlp_inference", 0, empty(10, 16), "hidden_states must be bfloat16 or float16"),
    ("moe_mlp_inference", 0, halves(16, 10).T, "hidden_states must be contiguous"),
    ("moe_mlp_inference", 1, integers(9, 2), "topk_ids must have shape"),
    ("moe_mlp_inference", 2, empty(9, 2), "topk_weights must have shape"),
    ("moe_mlp_inference", 3, halves(3, 47, 16), "gate_up_proj must be .experts, 2 . inter"),
    ("moe_mlp_inference", 3, halves(3, 32, 16), "down_proj must have shape"),
    ("moe_mlp_inference", 4, empty(3, 16, 24), "down_proj must be Half"),
    ("moe_mlp_inference", 5, integers(9), "modality_ids must have shape"),
    ("moe_mlp_inference", 6, None, "extra_down_proj must be given together"),
    ("moe_mlp_inference", 6, empty(1, 48, 16), "extra_down_proj must be Float, is Half"),
    ("moe_mlp_inference", 7, halves(2, 16, 24), "same number of added experts"),
    ("moe_mlp_inference", 8, empty(1, 3, 65, 16), "at most 16 tokens .* ranks of at most 64"),
    ("moe_mlp_inference", 8, empty(1, 2, 5, 16), "of 3 experts, or of 1 that all share, is of 2"),
    ("moe_mlp_inference", 8, empty(1, 3, 5, 8), "gate_up_lora_A must have shape"),
    ("moe_mlp_inference", 9, None, "gate_up_lora_A, _lora_B and _scaling must be given together"),
    ("moe_mlp_inference", 9, empty(1, 3, 48, 4), "gate_up_lora_B must have shape"),
    ("moe_mlp_inference", 14, halves(4, 48), "without a bias"),
    ("moe_mlp_inference", 17, "gelu", "computes SwiGLU of rows"),
    ("moe_mlp_forward", 0, empty(10, 16), "hidden_states must be bfloat16 or float16"),
    ("moe_mlp_forward", 1, integers(9, 2), "topk_ids must have shape"),
    ("moe_mlp_forward", 3, halves(3, 40, 16), "extra_gate_up_proj must have shape"),
    ("moe_mlp_forward", 4, halves(3, 24, 16).mT, "down_proj must be contiguous"),
    ("moe_mlp_forward", 8, empty(2, 3, 5, 16), "gate_up_lora_B must have shape"),
    ("moe_mlp_forward", 11, halves(2, 1, 4, 24), "down_lora_B must have shape"),
    ("moe_mlp_forward", 14, halves(4, 48), "without a bias"),
    ("moe_mlp_backward", 0, halves(9, 16), "grad_out must have shape"),
    ("moe_mlp_backward", 4, integers(19), "inv_perm must have shape"),
    ("moe_mlp_backward", 5, integers(8), "segment_offsets must have shape"),
    ("moe_mlp_backward", 19, "gelu", "compute SwiGLU of rows"),
    ("moe_mlp_backward", 25, halves(0, 48), "pre_act must have shape"),
    ("moe_mlp_backward", 28, 2, "num_modalities must be that of the adapters, 1, is 2"),
    ("moe_mlp_backward", 29, [True] * 7, "an entry for each of 8 tensors"),
    ("moe_mlp_backward", 30, 2, "frozen_extra must be in 0..1, is 2"),
    ("grouped_gemm", 6, halves(3, 20, 5), "u must be Float"),
    ("grouped_gemm", 6, empty(3, 19, 5), "u must have shape"),
    ("grouped_gemm", 6, empty(0, 20, 5), "at least one part"),
    ("grouped_gemm", 6, empty(20, 5), "save takes parts of u"),
    ("grouped_gemm", 0, halves(10, 48), "left must have shape"),
    ("grouped_gemm", 10, True, "stack must have shape"),
    ("act_backward", 10, empty(10, 3), "weights must have an entry for each of 20 rows"),
    ("act_backward", 11, halves(20, 136), "pre_act must have shape"),
    ("act_backward", 9, 16, "u1 is taken with u, both of rank 1 to 16, in tiles of 128 rows"),
    ("act_backward", 12, True, "the activation of adapted rows is not written then"),
    ("act_backward", 14, halves(20, 17), "u1 is taken with u, both of rank 1 to 16"),
    ("act_backward", 14, empty(20, 3), "u1 must be Half"),
    ("act_backward", 15, empty(1, 4, 136, 3), "gate_up_lora_B must have shape"),
    ("act_backward", 16, None, "gate_up_scaling must be given together or not at all"),
    ("shrink", 0, empty(20, 3, dtype=torch.float16), "out must be Float"),
    ("shrink", 1, empty(20, 8), "left must have shape"),
    ("shrink", 2, empty(1, 4, 8, 3), "matrix must end with 3 x 8"),
    ("shrink", 2, empty(1, 3, 3, 8), "matrix must have 4 for each modality, has 3"),
    ("shrink", 2, empty(1, 4, 3, 8, dtype=torch.float16), "float32 or Float, is"),
    ("shrink", 5, integers(8), "must have 2 segments for each of 4 experts"),
    ("shrink", 6, 8, "pairs of 1 modalities and 4 experts, are of 8"),
    ("shrink", 8, 2, "experts must be 1 or num_base = 4"),
]


@NEEDS_EXTENSION
def test_dispatch_takes_as_many_pairs_as_a_block_counts():
    """The limit holds on CUDA only; the CPU op of the same name accepts more pairs."""
    ops, ids = _native.ops(), integers(10, 2)
    assert ops.dispatch_with_maps(ids, 1, None, 2398, [], [])[4].numel() == 2400
    assert ops.dispatch(ids, 4, None, 599)[4].numel() == 2401


@NEEDS_EXTENSION
def test_backward_takes_as_many_pairs_as_forward():
    """Forward has no limit near 2^16 pairs; so a backward pass has none."""
    pairs = 2**16 + 2
    arguments = list(CALLS["wgrad"][0])
    arguments[3] = [integers(3, pairs), integers(3, 4)]
    arguments[6] = None
    sums, _, _ = _native.ops().wgrad(*arguments)
    assert sums[0].shape == (pairs, 6, 3)


def test_more_pairs_than_a_tile_map_holds_are_refused():
    assert triton_tile_maps.by_adapter(2**10, 2**10).num == 2**20
    with pytest.raises(ValueError, match=r"holds 1,048,576 pairs .* there are 1,049,600 \(1,024 e"):
        triton_tile_maps.by_adapter(2**10, 2**10 + 1)


@NEEDS_EXTENSION
@pytest.mark.parametrize(("op", "position", "value", "message"), REFUSALS)
def test_refusals(op, position, value, message):
    arguments = list(CALLS[op][0])
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(_native.ops(), op)(*arguments)

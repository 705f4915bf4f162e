"""The native ops by themselves: bits, long sums, unwritten memory and refusals.

The tests of the public ops compare all other values with the reference.
"""

import importlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.moe_mlp import SILU
from support.processes import run_pytest
from support.registered_ops import same

from moe_kernels import _native

pytestmark = pytest.mark.skipif(not _native.is_available(), reason=f"{_native.why_not()}")

extension = importlib.import_module("moe_kernels._C") if _native.is_available() else None

DTYPES = [torch.float32, torch.bfloat16]
ALL_NEEDS = [True, True, False, False, True, True, True, True]


@dataclass(frozen=True)
class Problem:
    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    modality_ids: torch.Tensor
    experts: tuple[torch.Tensor, torch.Tensor]
    gate_up_lora: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    down_lora: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def arguments(self, extra=(None, None)):
        """Return the arguments that forward and inference share."""
        routed = (self.hidden_states, self.topk_ids, self.topk_weights)
        loras = (*self.gate_up_lora, *self.down_lora)
        return [*routed, *self.experts, self.modality_ids, *extra, *loras, *[None] * 3, *SILU]

    def forward(self, save=True, arguments=None):
        arguments = self.arguments() if arguments is None else arguments
        return _native.ops().moe_mlp_forward(*arguments, save)

    def inference(self, extra=(None, None)):
        return _native.ops().moe_mlp_inference(*self.arguments(extra))

    def backward(self, grad_out, needs=ALL_NEEDS, frozen_extra=0, num_modalities=1, **dispatch):
        """Return gradients; ``dispatch`` replaces perm, inv_perm or segment_offsets."""
        _, *saved, perm, inv_perm, segment_offsets = self.forward()
        of_rows = {"perm": perm, "inv_perm": inv_perm, "segment_offsets": segment_offsets}
        return _native.ops().moe_mlp_backward(
            grad_out, self.hidden_states, self.topk_weights, *(of_rows | dispatch).values(),
            *self.experts, *self.arguments()[6:], *saved, num_modalities, needs, frozen_extra,
        )  # fmt: skip

    def with_adapters(self, value):
        def fill(lora):
            return (*(torch.full_like(weight, value) for weight in lora[:2]), lora[2])

        return replace(self, gate_up_lora=fill(self.gate_up_lora), down_lora=fill(self.down_lora))

    def with_token_in(self, t, other):
        """Return this problem with its token t kept and all other tokens taken from ``other``."""
        kept = {}
        for name in ("hidden_states", "topk_ids", "topk_weights", "modality_ids"):
            kept[name] = getattr(other, name).clone()
            kept[name][t] = getattr(self, name)[t]
        return replace(self, **kept)


def make_problem(dtype, *, tokens=200, hidden=512, inter=128, experts=4, top_k=2, rank=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    return Problem(
        hidden_states=torch.randn(tokens, hidden, generator=generator).to(dtype),
        topk_ids=torch.rand(tokens, experts, generator=generator).topk(top_k).indices,
        topk_weights=torch.rand(tokens, top_k, generator=generator),
        modality_ids=torch.randint(0, 2, (tokens,), generator=generator),
        experts=(normal(experts, 2 * inter, hidden), normal(experts, hidden, inter)),
        gate_up_lora=(
            normal(1, experts, rank, hidden),
            normal(1, experts, 2 * inter, rank),
            torch.tensor([2.0]),
        ),
        down_lora=(
            normal(1, experts, rank, inter),
            normal(1, experts, hidden, rank),
            torch.tensor([0.5]),
        ),
    )


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request, thread_count):
    thread_count(request.param)


@pytest.fixture
def tiny():
    return make_problem(torch.float32, tokens=8, hidden=32, inter=16, rank=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
def test_text_rows_do_not_see_adapters(dtype, value, threads):
    problem = make_problem(dtype)
    text = problem.modality_ids == 0
    changed = problem.with_adapters(value)
    assert torch.equal(problem.forward()[0][text], changed.forward()[0][text])
    assert not torch.equal(problem.forward()[0][~text], changed.forward()[0][~text])

    grad_out = torch.randn(problem.hidden_states.shape).to(dtype)
    pairs = zip(problem.backward(grad_out)[:2], changed.backward(grad_out)[:2], strict=True)
    for before, after in pairs:
        assert torch.equal(before[text], after[text])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [16, 64, 200])  # with 16, kernels read unpacked weights
def test_a_text_row_does_not_see_other_rows(dtype, tokens, threads):
    problem = make_problem(dtype, tokens=tokens)
    out = problem.forward()[0]
    for t in (problem.modality_ids == 0).nonzero().flatten()[:4].tolist():
        changed = problem.with_token_in(t, make_problem(dtype, tokens=tokens, seed=t + 1))
        assert torch.equal(changed.forward()[0][t], out[t])
        alone = replace(changed, modality_ids=torch.full_like(changed.modality_ids, -1))
        alone.modality_ids[t] = 0
        assert torch.equal(alone.forward()[0][t], out[t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [8, 200, 1100], ids=["unpacked", "packed", "cut into ranges"])
def test_thread_count_changes_no_bit(dtype, tokens, thread_count):
    problem = make_problem(dtype, tokens=tokens)
    grad_out = torch.randn(problem.hidden_states.shape).to(dtype)
    results = []
    for count in (1, 2, 3, 64):
        thread_count(count)
        results.append([problem.forward()[0], *problem.backward(grad_out)])
    assert all(same(results[0], other) for other in results[1:])


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_long_sums_over_k_are_accurate():
    problem = make_problem(
        torch.float32, tokens=8, hidden=8192, inter=16, experts=1, top_k=1, rank=4
    )
    problem.modality_ids.fill_(1)
    _, pre_act, u1, *_ = problem.forward()
    x, gate_up = problem.hidden_states.double(), problem.experts[0][0].double()
    lora_A, lora_B = (weight[0, 0].double() for weight in problem.gate_up_lora[:2])
    u = x @ lora_A.T
    assert relative_error(u1, u) < 1e-6
    assert relative_error(pre_act, x @ gate_up.T + 2.0 * u @ lora_B.T) < 1e-6


def test_long_sums_over_rows_are_accurate():
    generator = torch.Generator().manual_seed(0)
    tokens, width, rank = 16384, 32, 4
    x, grad_out = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    lora_A = torch.randn(1, rank, width, generator=generator) / width**0.5
    lora_B = torch.randn(1, width, rank, generator=generator)
    ids = torch.zeros(tokens, 1, dtype=torch.long)
    perm, _, _, _, segment_offsets = _native.ops().dispatch(ids, 1, torch.ones_like(ids[:, 0]), 1)
    fixed = (perm, segment_offsets, lora_A, lora_B, torch.ones(1))
    u = _native.ops().lora_linear_forward(torch.zeros(tokens, width), x, *fixed, True)
    grad_A, grad_B = _native.ops().lora_linear_backward(grad_out, x, u, *fixed, None, [True, True])
    du = grad_out.double() @ lora_B[0].double()
    assert relative_error(grad_A[0], du.T @ x.double()) < 1e-6
    assert relative_error(grad_B[0], grad_out.double().T @ u.double()) < 1e-6


OPS_TESTS = Path(__file__).parents[1] / "ops"
SELECTED = "text_rows or a_text_row or thread_count or long_sums or counts_is_written or level"


def test_the_level_is_the_one_asked_for():
    """The environment variables that the tests below set select the instruction set."""
    level = _native.build_info()["gemm_level"]
    capability = os.environ.get("ATEN_CPU_CAPABILITY", "")
    assert level == {"default": "baseline", "avx2": "avx2"}.get(capability, level)
    if os.environ.get("MOE_KERNELS_BRGEMM") == "1":
        assert level in ("amx_bf16", "avx512_bf16 through brgemm")
    with pytest.raises(RuntimeError, match="chosen already"):
        extension.prefer_brgemm(True)


@pytest.mark.slow  # it runs this file again
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_on_a_smaller_instruction_set(capability):
    """The same tests pass with the wider kernels switched off."""
    files, selected = (
        (__file__, OPS_TESTS / "test_moe_mlp.py"),
        f"({SELECTED}) or bits_are_the_same",
    )
    fast = "-m", "not slow"
    run_pytest(*map(str, files), "-k", selected, *fast, ATEN_CPU_CAPABILITY=capability)


@pytest.mark.skipif(
    "avx512_bf16" not in _native.build_info().get("cpu_features", ()),
    reason="needs a CPU with AVX-512 bf16, where brgemm supports bf16",
)
def test_through_brgemm():
    """The brgemm path, which CPUs with AMX use, passes the same tests on CPUs without AMX."""
    run_pytest(__file__, "-k", SELECTED, MOE_KERNELS_BRGEMM="1")
    others = (str(OPS_TESTS / name) for name in ("test_moe_mlp.py", "test_lora_linear.py"))
    chosen = "(float64_reference or the_definition) and bfloat16 and cpu"
    run_pytest(*others, "-k", chosen, MOE_KERNELS_BRGEMM="1")


@pytest.fixture
def poison(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_POISON", "1")
    yield
    monkeypatch.undo()
    _native.ops()  # passes the flag on to the extension


def test_poison_fills_new_memory(poison):
    _native.ops()
    assert math.isnan(extension.fresh_value())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16])
def test_everything_that_counts_is_written(poison, dtype):
    problem = make_problem(dtype, tokens=50, hidden=70, inter=37, rank=5)
    problem.modality_ids[::7] = -1
    problem.topk_ids[3, 1] = 99
    out, *saved = problem.forward()
    assert all(tensor.isfinite().all() for tensor in (out, *saved))
    assert (out[::7] == 0).all()
    gradients = problem.backward(torch.randn(out.shape).to(dtype))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][::7] == 0).all() and (gradients[1][::7] == 0).all()
    assert gradients[1][3, 1] == 0


def test_saved_tensors_have_fixed_shapes():
    problem = make_problem(torch.float32)
    slots = problem.topk_ids.numel()
    shapes = [(slots, 256), (slots, 16), (slots, 16), (slots,), (slots,), (9,)]
    assert [saved.shape for saved in problem.forward()[1:]] == shapes
    out, *saved = problem.forward(save=False)
    assert torch.equal(out, problem.forward()[0])
    assert torch.equal(out, problem.inference())
    assert [tensor.shape[0] for tensor in saved] == [0] * 6


def test_only_the_gradients_asked_for():
    problem = make_problem(torch.float32, tokens=64, hidden=64, inter=32)
    grad_out = torch.randn(64, 64)
    everything = problem.backward(grad_out)
    assert [g.dtype for g in everything] == [torch.float32] * 6
    requested = [i for i, need in enumerate(ALL_NEEDS) if need]
    for position, index in enumerate(requested):
        (alone,) = problem.backward(grad_out, [i == index for i in range(8)])
        assert torch.equal(alone, everything[position])
    assert problem.backward(grad_out, [False] * 8) == []


@pytest.mark.parametrize("modalities", [None, 0, 3])
def test_dispatch_is_a_stable_sort(modalities):
    generator = torch.Generator().manual_seed(0)
    topk_ids = torch.randint(-1, 7, (101, 3), generator=generator)  # some ids outside 6 experts
    num_experts, num_modalities = 6, modalities or 0
    modality_ids = None
    key = topk_ids * (num_modalities + 1)
    dropped = (topk_ids < 0) | (topk_ids >= num_experts)
    if modalities is not None:
        modality_ids = torch.randint(-1, modalities + 1, (101,), generator=generator)
        key = key + modality_ids[:, None]
        dropped |= modality_ids[:, None] < 0
    num_segments = num_experts * (num_modalities + 1)
    key = torch.where(dropped, num_segments, key).flatten()

    perm, inv_perm, per_expert, expert_offsets, segment_offsets = _native.ops().dispatch(
        topk_ids, num_experts, modality_ids, num_modalities
    )
    assert torch.equal(perm, torch.argsort(key, stable=True))
    assert torch.equal(inv_perm[perm], torch.arange(perm.numel()))
    counts = torch.bincount(key, minlength=num_segments + 1)[:num_segments]
    assert torch.equal(segment_offsets[1:], counts.cumsum(0)) and segment_offsets[0] == 0
    assert torch.equal(expert_offsets, segment_offsets[:: num_modalities + 1])
    assert torch.equal(per_expert, expert_offsets.diff())


REFUSED = {
    "dtype": (dict(topk_weights=torch.ones(8, 2, dtype=torch.int32)), "topk_weights must be float"),
    "slots": (dict(topk_weights=torch.ones(8, 3)), r"topk_weights must have shape \[8, 2\]"),
    "hidden": (
        dict(hidden_states=torch.ones(8, 33)),
        r"gate_up_proj must have shape \[4, 32, 33\]",
    ),
    "mixed": (dict(hidden_states=torch.ones(8, 32).bfloat16()), "gate_up_proj must be BFloat16"),
    "strides": (dict(hidden_states=torch.ones(32, 8).t()), "hidden_states must be contiguous"),
    "half": (dict(down_lora=(None, torch.ones(1, 4, 32, 4), None)), "given together or not at all"),
    "rank": (
        dict(down_lora=(torch.ones(1, 4, 5, 16), torch.ones(1, 4, 32, 4), torch.ones(1))),
        r"down_lora_B must have shape \[1, 4, 32, 5\]",
    ),
    "shared": (
        dict(down_lora=(torch.ones(1, 2, 4, 16), torch.ones(1, 4, 32, 4), torch.ones(1))),
        "of 1 that all share",
    ),
    "scaling": (
        dict(down_lora=(torch.ones(1, 4, 4, 16), torch.ones(1, 4, 32, 4), torch.ones(1).double())),
        "down_scaling must be Float",
    ),
}


CODES = torch.zeros(4, 32, 16, dtype=torch.uint8)
STORED = torch.zeros(4, 32, 32, dtype=torch.float8_e4m3fn)
REFUSED_PACKED = {
    "without": (CODES, None, "gate_up_proj_scales must be given for a packed stack"),
    "plain": (torch.zeros(4, 32, 32), torch.ones(64), "given for a packed stack and for no other"),
    "codes": (CODES[..., :8].contiguous(), torch.ones(64), r"must have shape \[4, 32, 16\]"),
    "none": (CODES, torch.ones(0), "must not be empty"),
    "scales": (CODES, torch.ones(63), "must have a scale for each block"),
    "double": (CODES, torch.ones(64).double(), "gate_up_proj_scales must be Float"),
    "blocks": (STORED, torch.ones(4, 2, 1), r"must have shape \[4, 1, 1\]"),
    "strides": (STORED.transpose(1, 2), torch.ones(4, 1, 1), "gate_up_proj must be contiguous"),
}


@pytest.mark.parametrize("case", REFUSED_PACKED)
def test_refuses_packed(tiny, case):
    stack, scales, message = REFUSED_PACKED[case]
    arguments = tiny.arguments()
    arguments[3] = stack
    arguments[-len(SILU) - 2] = scales
    with pytest.raises(RuntimeError, match=message):
        tiny.forward(arguments=arguments)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tiny, case):
    changes, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        replace(tiny, **changes).forward()


@pytest.mark.parametrize("ids", [-1, 4])
def test_inference_refuses_experts_that_are_not_there(tiny, ids):
    tiny.topk_ids[3, 1] = ids
    with pytest.raises(ValueError, match=r"topk_ids must be in 0\.\.3, got"):
        tiny.inference()


def test_inference_refuses_weights_of_another_rank(tiny):
    with pytest.raises(RuntimeError, match="gate_up_proj must have shape"):
        replace(tiny, experts=(torch.ones(32), torch.ones(32))).inference()
    extra = (torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="extra_gate_up_proj must have shape"):
        tiny.inference(extra)


def test_refuses_rows_out_of_order(tiny):
    """The combine step finds a token's rows by their order within a segment, so it must ascend."""
    *_, perm, _, segment_offsets = tiny.forward()
    first = int((segment_offsets.diff() > 1).nonzero()[0])
    start = int(segment_offsets[first])
    perm[[start, start + 1]] = perm[[start + 1, start]]
    with pytest.raises(RuntimeError, match="perm must ascend within each segment"):
        tiny.backward(torch.ones(8, 32), perm=perm)


@pytest.mark.parametrize("num_modalities", [-1, 2**62 - 1, 2**63 - 1])
def test_refuses_a_number_of_modalities_that_overflows(tiny, num_modalities):
    with pytest.raises(RuntimeError, match="num_modalities must be between 0"):
        tiny.backward(torch.ones(8, 32), num_modalities=num_modalities)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("relu", True, 1.0, 1.0, 0.0, False), ValueError, "act must be silu, .*, is relu"),
        (("clamped_swiglu", False, 1.0, 1.0, 0.0, False), ValueError, "without a gate"),
        (("silu", False, 1.0, 1.0, 0.0, True), ValueError, "without a gate"),
        (("silu", False, 1.0, 1.0, 0.0, False), RuntimeError, r"down_proj must have shape"),
    ],
)
def test_refuses_other_forms(tiny, change, error, message):
    with pytest.raises(error, match=message):
        tiny.forward(arguments=[*tiny.arguments()[:-6], *change])


def test_refuses_a_bias_of_another_shape_and_extras_of_another_layout(tiny):
    arguments = tiny.arguments()
    arguments[14] = torch.zeros(4, 31)
    with pytest.raises(RuntimeError, match=r"gate_up_bias must have shape \[4, 32\]"):
        tiny.forward(arguments=arguments)
    transposed = replace(tiny, experts=tuple(t.mT.contiguous().mT for t in tiny.experts))
    arguments = transposed.arguments()
    arguments[6:8] = [torch.ones(1, *t.shape[1:]) for t in tiny.experts]
    with pytest.raises(RuntimeError, match="extra_gate_up_proj must be a transposed view"):
        transposed.forward(arguments=arguments)
    mixed = replace(tiny, experts=(tiny.experts[0][:, ::2], tiny.experts[1][..., :8]))
    with pytest.raises(RuntimeError, match="gate_up_proj must be contiguous"):
        mixed.forward()


def test_refuses_a_slot_twice(tiny):
    *_, perm, _, _ = tiny.forward()
    perm[0] = perm[-1]
    with pytest.raises(RuntimeError, match="perm must be a permutation"):
        tiny.backward(torch.ones(8, 32), perm=perm)


def test_lora_linear_refuses_a_weight_without_columns():
    perm, offsets = torch.arange(4), torch.tensor([0, 2, 4])
    with pytest.raises(RuntimeError, match="a width of at least 1"):
        _native.ops().lora_linear_forward(
            torch.zeros(4, 8), torch.zeros(4, 0), perm, offsets, torch.zeros(1, 2, 0),
            torch.zeros(1, 8, 2), torch.ones(1), False,
        )  # fmt: skip


# With 3 experts there would be 3 * (n + 1) = 2**64 + 2 segments, which wraps around to 2.
OVERFLOWING = 6148914691236517205


def test_dispatch_refuses_a_number_of_segments_that_overflows():
    ids = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="num_modalities must be at least 0 and leave no more"):
        _native.ops().dispatch(ids, 3, None, OVERFLOWING)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(topk_ids=torch.zeros(4, 4, dtype=torch.long)), r"topk_ids must have shape \[8, -1\]"),
        (dict(hidden_states=torch.ones(8, 32, dtype=torch.long)), "hidden_states must be float32"),
        (
            dict(gate_up_lora=(torch.empty(OVERFLOWING, 0, 0, 0), torch.empty(0), torch.ones(1))),
            "num_modalities must be at least 0 and leave no more",
        ),
    ],
    ids=["ids", "dtype", "modalities"],
)
def test_inference_refuses(tiny, changes, message):
    with pytest.raises(RuntimeError, match=message):
        replace(tiny, **changes).inference()


def test_dispatch_refuses_an_unknown_modality():
    with pytest.raises(ValueError, match=r"modality_ids must be in -1\.\.2 .*, got 0\.\.3"):
        _native.ops().dispatch(torch.zeros(2, 1, dtype=torch.long), 1, torch.tensor([0, 3]), 2)


def test_refuses_gradients_of_what_is_not_there(tiny):
    with pytest.raises(RuntimeError, match="extra experts, but there are none"):
        tiny.backward(torch.ones(8, 32), [i == 2 for i in range(8)])
    with pytest.raises(RuntimeError, match=r"frozen_extra must be in 0\.\.0, is 1"):
        tiny.backward(torch.ones(8, 32), frozen_extra=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_linear_leaves_text_alone(dtype, threads):
    generator = torch.Generator().manual_seed(0)
    tokens, width_in, width_out, rank = 200, 512, 384, 16
    hidden_states = torch.randn(tokens, width_in, generator=generator).to(dtype)
    base = torch.randn(tokens, width_out, generator=generator).to(dtype)
    modality_ids = torch.randint(-1, 2, (tokens,), generator=generator)
    ids = torch.zeros(tokens, 1, dtype=torch.long)
    perm, _, _, _, segment_offsets = _native.ops().dispatch(ids, 1, modality_ids, 1)
    lora_A = torch.full((1, rank, width_in), float("nan"), dtype=dtype)
    lora_B = torch.ones(1, width_out, rank, dtype=dtype)
    out = base.clone()
    _native.ops().lora_linear_forward(
        out, hidden_states, perm, segment_offsets, lora_A, lora_B, torch.ones(1), True
    )
    assert torch.equal(out[modality_ids <= 0], base[modality_ids <= 0])
    assert out[modality_ids == 1].isnan().all()


def test_build_info():
    info = _native.build_info()
    assert info["torch_version"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert isinstance(info["cpu_features"], list)

"""The two kernels of decoding, compiled for the CPU, against float64."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from support import host_kernels as cuda
from torch import Tensor

from moe_kernels.testing import assert_close, make_routing

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
NAN = float("nan")
HALVES = [torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Sizes of a layer, and what differs from the usual."""

    tokens: int
    top_k: int
    experts: int
    hidden: int = 40
    inter: int = 24
    ranks: tuple[int, int] = (5, 3)
    modalities: int = 1
    extra: int = 0
    routing: str = "balanced"
    ids: tuple[int, ...] | None = ()  # of modalities; (): random ones, None: no tensor
    shared: bool = False
    lora_dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype = torch.float32
    wide_extra: bool = False  # added experts in float32
    sentinel: bool = False  # an expert out of range


CASES = [
    Case(1, 8, 9, hidden=264, inter=72, ranks=(16, 16), ids=(1,)),
    Case(1, 8, 16, ids=(0,)), Case(1, 1, 1, ids=(-1,)), Case(0, 2, 4), Case(2, 2, 4, ids=None),
    Case(16, 8, 12, modalities=3, sentinel=True), Case(9, 2, 4, routing="one_expert", extra=2),
    Case(16, 3, 3, routing="repeated", modalities=2, lora_dtype=torch.float16),
    Case(3, 4, 8, hidden=8, inter=264, ranks=(64, 1), modalities=2, shared=True),
    Case(5, 2, 6, hidden=264, inter=8, ranks=(0, 17), weights_dtype=torch.float16),
    Case(3, 1, 5, inter=1048, ranks=(20, 0)), Case(7, 5, 9, ranks=(0, 0), sentinel=True),
    Case(8, 16, 4, modalities=2, extra=1, routing="repeated", ids=(1, 2, 0, -1, 1, 3, -2, 2)),
    Case(2, 2, 2, hidden=520, inter=264, extra=2, wide_extra=True, ids=(1, 0)),
]  # fmt: skip


def ragged_cases() -> list[Case]:
    """Sizes beside multiples of 512, and each number of tokens and of experts for a token."""
    sizes = [(520, 1048), (1048, 520), (8, 8), (16, 24), (136, 40), (264, 520)]
    cases = []
    for number, (tokens, top_k) in enumerate(itertools.product(range(1, 17), (1, 2, 4, 8))):
        hidden, inter = sizes[number % len(sizes)]
        extra = number % 3
        cases.append(
            Case(
                tokens, top_k, top_k + number % 5, hidden, inter,
                ranks=((16, 16), (0, 0), (5, 20))[number % 3], modalities=2, extra=extra,
                wide_extra=extra == 2, ids=None if number % 7 == 0 else (),
                routing=("balanced", "zipf")[number // 2 % 2],
            )
        )  # fmt: skip
    return cases


class Problem:
    """Random operands of a layer in a dtype."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int = 0):
        self.case, self.dtype = case, dtype
        self.generator = torch.Generator().manual_seed(seed)
        experts, hidden, inter = case.experts, case.hidden, case.inter
        self.ids, weights = make_routing(
            case.tokens, case.top_k, experts + case.extra, kind=case.routing,
            generator=self.generator,
        )  # fmt: skip
        if case.sentinel:
            self.ids[::2, 0], self.ids[1::2, -1] = experts + case.extra, -1
        self.weights = weights.to(dtype if case.weights_dtype != torch.float32 else torch.float32)
        self.modality_ids = self._modality_ids()
        self.x = self.randn(case.tokens, hidden)
        self.stacks = [
            self.randn(experts + case.extra, *size, fan_in=size[1])
            for size in ((2 * inter, hidden), (hidden, inter))
        ]
        shared = 1 if case.shared else experts
        lora_dtype = case.lora_dtype if case.lora_dtype == torch.float32 else dtype
        self.pairs = [
            [
                self.randn(case.modalities, shared, rank, width, fan_in=width).to(lora_dtype),
                self.randn(case.modalities, experts, height, rank, fan_in=rank + 1).to(lora_dtype),
                torch.rand(case.modalities, generator=self.generator) + 0.5,
            ]
            for rank, width, height in (
                (case.ranks[0], hidden, 2 * inter), (case.ranks[1], inter, hidden),
            )
        ]  # fmt: skip

    def _modality_ids(self) -> Tensor | None:
        if self.case.ids is None:
            return None
        if self.case.ids:
            return torch.tensor(self.case.ids)
        high = self.case.modalities + 1
        return torch.randint(-1, high, (self.case.tokens,), generator=self.generator)

    def randn(self, *size: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(*size, generator=self.generator) / fan_in**0.5).to(self.dtype)

    def extra(self, stack: Tensor) -> Tensor:
        added = stack[self.case.experts :].clone()
        return added.float() if self.case.wide_extra else added

    def run(self, library) -> Tensor:
        case, experts = self.case, self.case.experts
        out = torch.full_like(self.x, NAN)
        rows = case.tokens * case.top_k
        (a1, b1, scaling1), (a2, b2, scaling2) = self.pairs
        up, down = self.stacks
        given = cuda.structure(
            cuda.Decode, topk_ids=self.ids, modality_ids=self.modality_ids,
            topk_weights=self.weights, hidden_states=self.x,
            gate_up=up[:experts].clone(), down=down[:experts].clone(),
            extra_gate_up=self.extra(up), extra_down=self.extra(down),
            a1=a1, b1=b1, scaling1=scaling1, a2=a2, b2=b2, scaling2=scaling2,
            act=torch.full((rows, case.inter), NAN, dtype=self.dtype),
            parts=torch.full((rows, library.parts_of_decode(case.inter), case.ranks[1]), NAN),
            out=out, tokens=case.tokens, top_k=case.top_k, num_base=experts,
            num_experts=experts + case.extra, num_modalities=case.modalities, hidden=case.hidden,
            inter=case.inter, rank1=case.ranks[0], rank2=case.ranks[1],
            experts_of_a1=a1.shape[1], experts_of_a2=a2.shape[1],
            weights_are_float=self.weights.dtype == torch.float32, extra_is_float=case.wide_extra,
            is_float1=a1.dtype == torch.float32, is_float2=a2.dtype == torch.float32,
        )  # fmt: skip
        launches = library.launches()
        cuda.call(library.decode, given, self.dtype)
        assert library.launches() == launches + (2 if case.tokens else 0)
        return out

    def low_rank(self, projection: int, row: Tensor, modality: int, expert: int) -> Tensor:
        """Return s (row A^T) B^T, with the roundings of the kernels."""
        a, b, scaling = self.pairs[projection]
        if modality == 0 or expert >= self.case.experts or a.shape[2] == 0:
            return torch.zeros(b.shape[2], dtype=torch.float64)
        a = a[modality - 1, min(expert, a.shape[1] - 1)].to(self.dtype).double()
        u = (row @ a.T).to(self.dtype).float()
        u = (scaling[modality - 1] * u).to(self.dtype).double()
        return u @ b[modality - 1, expert].to(self.dtype).double().T

    def expected(self) -> Tensor:
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        number, modalities = len(self.stacks[0]), self.case.modalities
        for token, ids in enumerate(self.ids.tolist()):
            modality = 0 if self.modality_ids is None else int(self.modality_ids[token])
            for k, expert in enumerate(ids):
                if not (0 <= modality <= modalities and 0 <= expert < number):
                    continue
                up, down = (stack[expert].double() for stack in self.stacks)
                row = self.x[token].double()
                pre = row @ up.T + self.low_rank(0, row, modality, expert)
                gate, up = pre.to(self.dtype).double().chunk(2)
                act = (torch.nn.functional.silu(gate) * up).to(self.dtype).double()
                row = act @ down.T + self.low_rank(1, act, modality, expert)
                out[token] += self.weights[token, k].double() * row
        return out


# Each case in one dtype, and in the other one where slow tests run.
DTYPES_OF_CASES = [
    pytest.param(case, dtype, id=f"{index}-{dtype}", marks=[pytest.mark.slow] * (index % 2 != half))
    for index, case in enumerate(CASES)
    for half, dtype in enumerate(HALVES)
]


@pytest.mark.parametrize(("case", "dtype"), DTYPES_OF_CASES)
def test_a_layer_is_that_of_float64(library, dtype, case):
    problem = Problem(case, dtype, seed=case.tokens)
    out = problem.run(library)
    assert_close(out, problem.expected(), dtype=dtype)
    assert torch.equal(problem.run(library), out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ragged_cases(), ids=str)
def test_ragged_sizes(library, dtype, case):
    for seed in (0,) if case.hidden * case.inter > 2**17 else range(3):
        problem = Problem(case, dtype, seed=seed)
        assert_close(problem.run(library), problem.expected(), dtype=dtype)


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_the_second_kernel_waits_for_the_first(library, case):
    """It begins before the first here. What it reads too early is NaN."""
    problem = Problem(case, torch.bfloat16)
    expected = problem.run(library)
    library.set_late_launches(True)
    try:
        assert torch.equal(problem.run(library), expected)
    finally:
        library.set_late_launches(False)


def of_text(problem: Problem) -> Tensor:
    return problem.modality_ids == 0


@pytest.mark.parametrize("bad", [NAN, pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [Case(16, 2, 4, 136, 72), Case(3, 8, 9, 136, 72)], ids=str)
def test_text_keeps_its_bits_whatever_the_adapters_hold(library, case, bad):
    ids = tuple(token % 3 for token in range(case.tokens))
    problem = Problem(replace(case, ids=ids, modalities=2), torch.bfloat16)
    before = problem.run(library)
    for pair in problem.pairs:
        for tensor in pair:
            tensor.fill_(bad)
    after, text = problem.run(library), of_text(problem)
    assert torch.equal(before[text], after[text])
    assert not torch.equal(before[~text], after[~text])


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
def test_a_row_of_text_keeps_its_bits_beside_any_others(library, dtype):
    """Other rows change in values, modality and routing; the first one also is the only text."""
    case = Case(9, 2, 4, 264, 136, modalities=2, ids=(0,) * 9)
    problem = Problem(case, dtype)
    kept = problem.x[4].clone(), problem.ids[4].clone(), problem.weights[4].clone()
    expected = problem.run(library)[4]
    for seed, others in enumerate((0, 1, 2, -1)):
        other = Problem(replace(case, ids=(others,) * 4 + (0,) + (others,) * 4), dtype, seed + 1)
        other.stacks, other.pairs = problem.stacks, problem.pairs
        other.x[4], other.ids[4], other.weights[4] = kept
        if seed == 1:
            other.ids[:] = kept[1]  # all rows in the tiles of its experts
            other.x[:4] = NAN
        assert torch.equal(other.run(library)[4], expected)

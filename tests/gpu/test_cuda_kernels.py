"""The CUDA kernels, compiled for the CPU, against float64."""

import ctypes

import pytest
import torch
from support import host_kernels as cuda

from moe_kernels.ops.dispatch import reference
from moe_kernels.testing import assert_close, make_modality_ids, make_routing

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
NAN = float("nan")


class Routed:
    """Rows sorted by expert and modality; the last ``num_extra`` experts are added ones."""

    def __init__(self, tokens, top_k, num_experts, num_modalities, seed, kind=0, num_extra=0):
        self.generator = torch.Generator().manual_seed(seed)
        routing, modality = ROUTINGS[kind]
        self.ids, self.weights = make_routing(
            tokens, top_k, num_experts, kind=routing, generator=self.generator
        )
        self.top_k, self.num_experts, self.num_modalities = top_k, num_experts, num_modalities
        self.num_base = num_experts - num_extra
        self.tokens, self.rows = tokens, tokens * top_k
        self.set_modalities(
            make_modality_ids(tokens, num_modalities, kind=modality, generator=self.generator)
        )

    def set_modalities(self, modality_ids):
        self.modality_ids = modality_ids
        self.perm, self.inv_perm, _, self.offsets, self.segments = reference.dispatch(
            self.ids, self.num_experts, modality_ids, self.num_modalities
        )

    def experts(self):
        """Return (first row, end) of each expert, and of the rows that are not dispatched."""
        offsets = [*self.offsets.tolist(), self.rows]
        return list(zip(offsets, offsets[1:], strict=False))

    def pairs(self):
        """Return (first row, end) of each pair (modality, expert) with an adapter."""
        segments, groups = self.segments.tolist(), self.num_modalities + 1
        return [
            (segments[e * groups + m], segments[e * groups + m + 1])
            for m in range(1, groups)
            for e in range(self.num_base)
        ]

    def randn(self, *size, dtype=torch.float32, fan_in=1):
        return (torch.randn(*size, generator=self.generator) / fan_in**0.5).to(dtype)

    def adapted(self):
        """Return a mask (rows,) of the sorted rows that have an adapter."""
        mask = torch.zeros(self.rows, dtype=torch.bool)
        for first, end in self.pairs():
            mask[first:end] = True
        return mask


ROUTINGS = [
    ("balanced", "mixed"), ("half_empty", "mixed"), ("one_expert", "image"),
    ("repeated", "no_padding"), ("balanced", "text"), ("balanced", "padding"), ("zipf", "mixed"),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(actual, expected, dtype):
    """Check the relative RMS error, and that no single element is far off."""
    assert_close(actual, expected, dtype=dtype)
    if expected.numel():
        limit = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
        size = expected.square().mean().sqrt()
        assert (actual.double() - expected).abs().max() <= limit * size


# --- dispatch and combine


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 4, 1), (1, 1, 1, 2), (13, 2, 4, 1), (700, 3, 16, 2), (1500, 8, 64, 1),
        (8197, 8, 64, 1), (5001, 8, 512, 3),  # several steps of a warp, and of a scan
    ],
    ids=str,
)  # fmt: skip
def test_dispatch_sorts_and_cuts_into_tiles(library, shape):
    routed = Routed(*shape, 6)
    routed.ids[torch.rand(routed.ids.shape, generator=routed.generator) < 0.02] = shape[2]
    routed.set_modalities(routed.modality_ids)
    check_dispatch(library, routed, 64)


@pytest.mark.parametrize("kind", range(len(ROUTINGS)))
@pytest.mark.parametrize("tokens", [0, 1, 150])
@pytest.mark.parametrize("modalities", [1, 3])
def test_dispatch_on_any_routing(library, kind, tokens, modalities):
    check_dispatch(library, Routed(tokens, 2, 5, modalities, tokens, kind), 16)


@pytest.mark.parametrize("tokens", [0, 1, 150])
@pytest.mark.parametrize("modalities", [0, 2])
def test_dispatch_without_modality_ids(library, tokens, modalities):
    """All tokens are text."""
    routed = Routed(tokens, 3, 4, modalities, tokens, 6)
    routed.set_modalities(None)
    check_dispatch(library, routed, 16)


def unwritten(kind, expected):
    """Return unwritten tensors of the expected shapes, and a structure that points to them."""
    out = [torch.full(part.shape, -(2**40)) for part in expected]
    names = [name for name, _ in kind._fields_]
    return out, cuda.structure(kind, **dict(zip(names, out, strict=True)))


def check_dispatch(library, routed, block):
    """Check a dispatch with tile maps, which it makes itself or which follow in another launch."""
    experts, modalities = routed.num_experts, routed.num_modalities
    fields = reference.dispatch(routed.ids, experts, routed.modality_ids, modalities)
    maps = [
        part
        for bounds in (routed.experts(), routed.pairs())
        for part in cuda.tile_map(bounds, routed.rows, block)
    ]
    sizes = routed.rows, routed.top_k, experts, modalities, block
    for with_maps in (True, False):
        out, given = unwritten(cuda.DispatchOut, fields)
        made, structure = unwritten(cuda.Maps, maps)
        own_maps, launches = structure if with_maps else None, library.launches()
        cuda.call(library.dispatch, given, own_maps, routed.ids, routed.modality_ids, *sizes)
        assert library.launches() == launches + 2
        if not with_maps:
            cuda.call(library.tile_maps, structure, out[-1], *sizes[:1], *sizes[2:])
        for actual, expected in zip((*out, *made), (*fields, *maps), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_combine_adds_the_rows_of_each_token(library, dtype, weighted):
    routed = Routed(37, 3, 5, 1, 0)
    rows = routed.randn(routed.rows, 24, dtype=dtype)
    rows[routed.segments[-1] :] = NAN
    out = torch.full((routed.tokens, 24), NAN, dtype=dtype)
    given = cuda.structure(
        cuda.Combine, rows=rows, inv_perm=routed.inv_perm, num_rows=routed.segments[-1:],
        weights=routed.weights if weighted else None, out=out, num_tokens=routed.tokens, width=24,
        top_k=routed.top_k,
    )  # fmt: skip
    cuda.call(library.combine, given, dtype, torch.float32)
    weights = routed.weights if weighted else torch.ones_like(routed.weights)
    terms = rows.double().nan_to_num()[routed.inv_perm].view(routed.tokens, routed.top_k, 24)
    assert_close(out, (terms * weights.double()[..., None]).sum(1))


# --- shrink


def shrink(library, routed, left, matrix, out, rank_first, by_token, block, fill=False):
    tiles, _ = cuda.tile_map(routed.pairs(), routed.rows, block)
    rank = out.shape[1]
    given = cuda.structure(
        cuda.Shrink, left=left, matrix=matrix, perm=routed.perm, tiles=tiles,
        segments=routed.segments if fill else None, out=out, num_tiles=tiles.shape[1],
        num_rows=routed.rows, num_base=routed.num_base, num_modalities=routed.num_modalities,
        experts_of_m=matrix.shape[1], size_k=left.shape[1], rank=rank, top_k=routed.top_k,
        by_token=by_token, rank_first=rank_first,
    )  # fmt: skip
    launches = library.launches()
    cuda.call(library.shrink, given, left.dtype, matrix.dtype, out.dtype)
    assert library.launches() <= launches + 1
    return out


def check_shrink(library, shape, size_k, rank, dtype, *, matrix_dtype, rank_first, by_token,
                  shared, kind, block, num_extra=0):  # fmt: skip
    routed = Routed(*shape, size_k + rank, kind, num_extra)
    experts = 1 if shared else routed.num_base
    size = (rank, size_k) if rank_first else (size_k, rank)
    matrix = routed.randn(routed.num_modalities, experts, *size, dtype=matrix_dtype)
    left = routed.randn(routed.tokens if by_token else routed.rows, size_k, dtype=dtype)
    adapted = routed.adapted()
    if not by_token:
        left[~adapted] = NAN
    out_dtype = dtype if rank_first else torch.float32
    out = torch.full((routed.rows, rank), NAN, dtype=out_dtype)
    shrink(library, routed, left, matrix, out, rank_first, by_token, block)
    expected = torch.full((routed.rows, rank), NAN, dtype=torch.float64)
    rows = left[routed.perm // routed.top_k] if by_token else left
    for pair, (first, end) in enumerate(routed.pairs()):
        expert = 0 if shared else pair % routed.num_base
        m = matrix[pair // routed.num_base, expert].to(dtype).double()
        expected[first:end] = rows[first:end].double() @ (m.T if rank_first else m)
    assert torch.equal(out.isnan().any(1), ~adapted) and torch.equal(out.isnan().all(1), ~adapted)
    check(out[adapted], expected[adapted], out.dtype)
    again = torch.full_like(out, NAN)
    shrink(library, routed, left, matrix, again, rank_first, by_token, block, fill=True)
    assert torch.equal(out[adapted], again[adapted]) and not again[~adapted].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank_first", [True, False])
@pytest.mark.parametrize(
    ("size_k", "rank"),
    [(64, 16), (200, 3), (41, 5), (520, 8), (136, 20), (72, 72), (19, 70), (1, 1)],
)
def test_shrink_is_the_product_of_adapted_rows(library, dtype, rank_first, size_k, rank):
    check_shrink(
        library, (37, 3, 5, 2), size_k, rank, dtype, by_token=rank % 2 == 0, kind=0,
        matrix_dtype=torch.float32 if size_k % 3 else dtype, rank_first=rank_first,
        shared=rank == 8, block=[16, 128][rank % 2], num_extra=rank % 3,
    )  # fmt: skip


@pytest.mark.parametrize("kind", range(len(ROUTINGS)))
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_shrink_on_any_routing(library, kind, tokens):
    check_shrink(
        library, (tokens, 2, 4, 1), 48, 16, torch.bfloat16, by_token=False, kind=kind,
        matrix_dtype=torch.float32, rank_first=True, shared=False, block=32,
    )  # fmt: skip


def test_shrink_writes_the_zeros_of_many_rows(library):
    """Several blocks write them, and text rows lie beside adapted ones in each."""
    check_shrink(
        library, (700, 2, 4, 2), 8, 5, torch.bfloat16, by_token=True, kind=6, num_extra=1,
        matrix_dtype=torch.bfloat16, rank_first=True, shared=False, block=32,
    )  # fmt: skip


# --- wgrad


class Sums:
    """Random operands of the sums of (factor * weight * left)^T right over each pair's rows."""

    def __init__(self, routed, height, width, dtype, *, left_dtype, weights_dtype, transposed,
                 left_by_token, right_by_token, matrix_dtype=None):  # fmt: skip
        self.routed, self.transposed = routed, transposed
        self.by_token = {"left_by_token": left_by_token, "right_by_token": right_by_token}
        self.left = self._rows(height, left_dtype, left_by_token)
        self.right = self._rows(width, dtype, right_by_token)
        self.factors = torch.rand(routed.num_modalities, generator=routed.generator) + 0.5
        self.weights = None if weights_dtype is None else routed.weights.to(weights_dtype)
        self.matrix = None
        if matrix_dtype is not None:
            size = len(routed.pairs()), width, height
            self.matrix = routed.randn(*size, dtype=matrix_dtype, fan_in=width)

    def _rows(self, width, dtype, by_token):
        routed = self.routed
        rows = routed.randn(routed.tokens if by_token else routed.rows, width, dtype=dtype)
        if not by_token:
            rows[~routed.adapted()] = NAN
        return rows

    def unwritten(self, number):
        height, width = self.left.shape[1], self.right.shape[1]
        size = (width, height) if self.transposed else (height, width)
        return torch.full((number, *size), NAN)

    def problem(self, tiles, groups, chunk, out, partial):
        num_groups = groups.shape[1]
        dtypes = [
            torch.float32 if tensor is None else tensor.dtype
            for tensor in (self.left, self.weights, self.matrix)
        ]
        return cuda.structure(
            cuda.WgradProblem, left=self.left, right=self.right, tiles=tiles, groups=groups,
            factors=self.factors, weights=self.weights, matrix=self.matrix, out=out,
            partial=partial, chunk=chunk, left_dtype=dtypes[0], weights_dtype=dtypes[1],
            matrix_dtype=dtypes[2], num_tiles=tiles.shape[1], num_groups=num_groups,
            groups_of_factor=num_groups // self.factors.numel(), height=self.left.shape[1],
            width=self.right.shape[1], transposed=self.transposed, **self.by_token,
        )  # fmt: skip

    def expected(self):
        """Return the sums, and right @ matrix of the pairs' rows or None, in float64."""
        routed, dtype = self.routed, self.right.dtype
        slots = routed.perm
        tokens = slots // routed.top_k
        scaled = (self.left[tokens] if self.by_token["left_by_token"] else self.left).float()
        if self.weights is not None:
            scaled = scaled * self.weights.flatten()[slots].float()[:, None]
        rows = (self.right[tokens] if self.by_token["right_by_token"] else self.right).double()
        sums, du = [], []
        for pair, (first, end) in enumerate(routed.pairs()):
            factor = self.factors[pair // routed.num_experts]
            left = (factor * scaled[first:end]).to(dtype).double()
            sums.append(left.T @ rows[first:end])
            if self.matrix is not None:
                du.append(rows[first:end] @ self.matrix[pair].to(dtype).double())
        sums = torch.stack(sums)
        return sums.mT if self.transposed else sums, torch.cat(du) if du else None


def wgrad(library, routed, sums, chunk, dots=None, dots_dtype=torch.float32, folded=()):
    """Return the sums, du of the first, which is NaN in other rows, and the sum of the dots.

    ``folded`` are slots; their sums come behind those of the problems.
    """
    tiles, groups = cuda.tile_map(routed.pairs(), routed.rows, chunk)
    partials = 2 * (routed.rows // chunk) if routed.rows > chunk else 0
    outs = [its.unwritten(groups.shape[1]) for its in sums]
    problems = [
        its.problem(tiles, groups, chunk, out, its.unwritten(partials))
        for its, out in zip(sums, outs, strict=True)
    ]
    while len(problems) < 2:
        problems.append(cuda.empty(cuda.WgradProblem))
    height, width, rows = 0, 0, 0
    if sums and sums[0].matrix is not None:
        height, width, rows = sums[0].left.shape[1], sums[0].right.shape[1], routed.rows
    du = torch.full((rows, height), NAN)
    of_slots = [torch.full((len(routed.pairs()), *slots.shape[1:]), NAN) for slots in folded]
    parts = [
        cuda.structure(cuda.FoldedSums, slots=slots, out=out, size=slots[0].numel())
        for slots, out in zip(folded, of_slots, strict=True)
    ]
    parts += [cuda.empty(cuda.FoldedSums)] * (2 - len(parts))
    its_folded = cuda.structure(
        cuda.Folded, sums=parts, segments=routed.segments, num_sums=len(folded),
        num_base=routed.num_base, num_modalities=routed.num_modalities,
    )  # fmt: skip
    sum_of_dots = torch.full((routed.rows,), NAN, dtype=dots_dtype)
    given = cuda.structure(
        cuda.Wgrad, problems=problems, folded=its_folded, perm=routed.perm, du=du,
        parts=torch.full((library.parts_of_wgrad(width), rows, height), NAN), dots=dots,
        sum_of_dots=sum_of_dots, num_rows=routed.rows, dots_dtype=dots_dtype,
        num_problems=len(sums), num_dots=0 if dots is None else len(dots), top_k=routed.top_k,
    )  # fmt: skip
    launches = library.launches()
    cuda.call(library.wgrad, given, sums[0].right.dtype if sums else torch.float32)
    assert library.launches() <= launches + 2
    return outs + of_slots, du, sum_of_dots


def check_wgrad(library, shape, height, width, dtype, *, kind, chunk, **options):
    routed = Routed(*shape, height + width, kind)
    sums = Sums(routed, height, width, dtype, **options)
    (out,), du, _ = wgrad(library, routed, [sums], chunk)
    expected, product = sums.expected()
    for pair, (first, end) in enumerate(routed.pairs()):
        assert first < end or not out[pair].any()
    if product is not None:
        adapted = routed.adapted()
        assert torch.equal(du.isnan().any(1), ~adapted)
        assert torch.equal(du.isnan().all(1), ~adapted)
        order = [row for first, end in routed.pairs() for row in range(first, end)]
        check(du[order], product, torch.float32)
    # float16 and bfloat16: factor * weight * left may be rounded to a neighbour.
    check(out, expected, dtype)
    (again,), same, _ = wgrad(library, routed, [sums], chunk)
    assert torch.equal(out, again) and torch.equal(du.nan_to_num(), same.nan_to_num())


OF_B = {"transposed": True, "left_by_token": False}
OF_A = {"transposed": False, "left_by_token": False, "left_dtype": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heights", "with_du", "kind"), [((16, 5), True, 0), ((20, 40), True, 3), ((3, 33), False, 6),
                                     ((8, 8), True, 4)]
)  # fmt: skip
def test_two_problems_and_the_dots_in_one_launch(library, dtype, heights, with_du, kind):
    """Each has the bits of its own launch, and the dots are added in order."""
    with_du = with_du and dtype != torch.float32
    routed = Routed(80, 2, 3, 2, sum(heights), kind)
    of_B = OF_B | {"left_dtype": dtype, "weights_dtype": None if with_du else torch.float32}
    sums = [
        Sums(routed, heights[0], 300, dtype, right_by_token=not with_du,
             matrix_dtype=torch.float32 if with_du else None, **of_B),
        Sums(routed, heights[1], 136, dtype, right_by_token=heights[1] == 33, weights_dtype=dtype,
             **OF_A),
    ]  # fmt: skip
    dots = routed.randn(3, routed.rows)
    outs, du, sum_of_dots = wgrad(library, routed, sums, 24, dots)
    assert torch.equal(sum_of_dots, dots[0] + dots[1] + dots[2])
    for number, its in enumerate(sums):
        check(outs[number], its.expected()[0], dtype)
        (alone,), its_du, none = wgrad(library, routed, [its], 24)
        assert torch.equal(outs[number], alone) and none.isnan().all()
        if number == 0:
            assert torch.equal(du.nan_to_num(), its_du.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dots_alone(library, dtype):
    routed = Routed(700, 2, 3, 1, 1)
    dots = routed.randn(2, routed.rows)
    found = wgrad(library, routed, [], 32, dots, dtype)[2]
    assert torch.equal(found, (dots[0] + dots[1]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("height", "width"), [(16, 128), (3, 200), (5, 41), (8, 136), (72, 64), (130, 19), (1, 1)]
)
def test_wgrad_sums_over_the_rows_of_each_group(library, dtype, transposed, height, width):
    check_wgrad(
        library, (61, 3, 3, 2), height, width, dtype, transposed=transposed, kind=0, chunk=48,
        left_dtype=dtype if transposed else torch.float32,
        weights_dtype=[None, torch.float32, dtype][height % 3], left_by_token=False,
        right_by_token=height % 2 == 0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", range(len(ROUTINGS)))
@pytest.mark.parametrize(("tokens", "chunk"), [(0, 96), (1, 96), (150, 96), (150, 1000)])
def test_wgrad_on_any_routing(library, kind, tokens, chunk):
    check_wgrad(
        library, (tokens, 2, 4, 1), 16, 40, torch.bfloat16, left_dtype=torch.bfloat16,
        weights_dtype=torch.float32, transposed=True, left_by_token=tokens == 1,
        right_by_token=False, kind=kind, chunk=chunk,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("rank", "width", "chunk"),
    [(16, 256, 48), (3, 264, 96), (5, 41, 1000), (20, 520, 96), (32, 72, 40), (1, 1, 16)],
)
def test_wgrad_gives_du_with_dB(library, dtype, rank, width, chunk):
    by_token = rank % 2 == 0
    check_wgrad(
        library, (61, 3, 3, 2), rank, width, dtype, transposed=True, kind=0, chunk=chunk,
        left_dtype=dtype, weights_dtype=torch.float32 if by_token else None, left_by_token=False,
        right_by_token=by_token, matrix_dtype=torch.float32 if rank % 3 else dtype,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "width", "chunk", "with_du"),
    [
        (32, 300, 1000, True), (16, 520, 150, True), (21, 264, 150, True),
        (72, 300, 150, False), (16, 300, 1000, False),
    ],
)  # fmt: skip
def test_wgrad_in_many_steps_and_several_blocks_of_columns(library, rank, width, chunk, with_du):
    """A tile has more steps than stages, and du more slices than its two halves hold."""
    check_wgrad(
        library, (400, 1, 1, 1), rank, width, torch.bfloat16, left_dtype=torch.bfloat16,
        weights_dtype=torch.float32, transposed=True, left_by_token=False, right_by_token=False,
        kind=2, chunk=chunk, matrix_dtype=torch.float32 if with_du else None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", range(len(ROUTINGS)))
@pytest.mark.parametrize(("tokens", "chunk"), [(0, 96), (1, 96), (150, 96)])
def test_du_with_dB_on_any_routing(library, kind, tokens, chunk):
    check_wgrad(
        library, (tokens, 2, 4, 1), 16, 40, torch.bfloat16, left_dtype=torch.bfloat16,
        weights_dtype=torch.bfloat16, transposed=True, left_by_token=False,
        right_by_token=tokens == 1, kind=kind, chunk=chunk, matrix_dtype=torch.float32,
    )  # fmt: skip


# --- low-rank terms of a linear layer


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("rank_last", [True, False])
@pytest.mark.parametrize(
    "case", [(70, 136, 16, 32), (200, 40, 5, 64), (9, 8, 72, 16), (0, 8, 4, 16)]
)
def test_add_low_rank_touches_adapted_rows_alone(library, dtype, rank_last, case):
    tokens, width, rank, block = case
    routed = Routed(tokens, 1, 1, 2, rank)
    u = routed.randn(tokens, rank, dtype=dtype if rank_last else torch.float32)
    u[~routed.adapted()] = NAN
    size = (width, rank) if rank_last else (rank, width)
    v = routed.randn(2, *size, dtype=torch.float32 if rank == 5 else dtype, fan_in=rank)
    scaling, out = torch.tensor([0.5, 2.0]), routed.randn(tokens, width, dtype=dtype)
    expected, text = out.double(), out.clone()
    tiles, _ = cuda.tile_map(routed.pairs(), tokens, block)
    given = cuda.structure(
        cuda.AddLowRank, u=u, v=v, scaling=scaling, perm=routed.perm, tiles=tiles, out=out,
        num_tiles=tiles.shape[1], rank=rank, width=width, rank_last=rank_last,
    )  # fmt: skip
    cuda.call(library.add_low_rank, given, dtype, v.dtype)
    for modality, (first, end) in enumerate(routed.pairs()):
        rows = (scaling[modality] * u[first:end].float()).to(dtype).double()
        matrix = v[modality].to(dtype).double()
        expected[routed.perm[first:end]] += rows @ (matrix.mT if rank_last else matrix)
    check(out, expected, dtype)
    others = routed.modality_ids <= 0
    assert torch.equal(out[others], text[others])


# --- products of the experts


class Product:
    """Random operands of a kernel that computes left W + s u V, transposed in a forward pass."""

    def __init__(self, routed, size_k, size_n, rank, dtype, v_dtype, *, transposed, gated=False,
                 by_token=False, shared=False):  # fmt: skip
        width = 2 * size_n if gated else size_n
        self.routed, self.dtype, self.transposed, self.by_token = (
            routed, dtype, transposed, by_token
        )  # fmt: skip
        self.size_k, self.size_n, self.rank = size_k, size_n, rank
        size = (width, size_k) if transposed else (size_k, width)
        num_extra = routed.num_experts - routed.num_base
        self.left = routed.randn(routed.tokens if by_token else routed.rows, size_k, dtype=dtype)
        self.stack = routed.randn(routed.num_base, *size, dtype=dtype, fan_in=size_k)
        self.extra = routed.randn(num_extra, *size, dtype=dtype, fan_in=size_k)
        experts = 1 if shared else routed.num_base
        size = (width, rank) if transposed else (rank, width)
        self.u = routed.randn(routed.rows, rank, dtype=dtype if transposed else torch.float32)
        self.v = routed.randn(
            routed.num_modalities, experts, *size, dtype=v_dtype, fan_in=max(rank, 1)
        )
        self.scaling = torch.rand(routed.num_modalities, generator=routed.generator) + 0.5
        self.u[~routed.adapted()] = NAN

    def parts_of_u(self, number):
        """Return random parts (number, rows, rank) of u, which becomes their sum."""
        parts = self.routed.randn(number, *self.u.shape)
        parts[:, ~self.routed.adapted()] = NAN
        added = torch.zeros(self.u.shape)
        for part in parts:
            added = added + part
        self.u = added.to(self.u.dtype)
        return parts

    def run(self, function, block_m, *outputs, parts=None, sum_of_parts=None):
        tiles, _ = cuda.tile_map(self.routed.experts(), self.routed.rows, block_m)
        given = cuda.structure(
            cuda.GroupedGemm, left=self.left, stack=self.stack, extra=self.extra,
            perm=self.routed.perm, tiles=tiles, segments=self.routed.segments,
            u=self.u if parts is None else parts, v=self.v, scaling=self.scaling, sum=sum_of_parts,
            num_rows=self.routed.rows, num_parts=0 if parts is None else len(parts),
            num_tiles=tiles.shape[1], num_base=self.routed.num_base,
            num_experts=self.routed.num_experts, num_modalities=self.routed.num_modalities,
            experts_of_v=self.v.shape[1], rank=self.rank, size_k=self.size_k, size_n=self.size_n,
            top_k=self.routed.top_k,
        )  # fmt: skip
        cuda.call(function, given, *outputs, self.dtype, self.v.dtype, block_m)

    def rows_with_low_rank(self):
        """Return a mask (rows,) of the sorted rows with a low-rank term."""
        return self.routed.adapted() & (self.rank > 0)

    def rows_of_added_experts(self):
        """Return a mask (rows,) of the sorted rows of added experts."""
        rows = torch.zeros(self.routed.rows, dtype=torch.bool)
        for first, end in self.routed.experts()[self.routed.num_base : -1]:
            rows[first:end] = True
        return rows

    def times_a(self, rows, a):
        """Return u = rows A^T in float64 for every row with an adapter, NaN elsewhere."""
        out = torch.full((self.routed.rows, a.shape[2]), NAN, dtype=torch.float64)
        for pair, (first, end) in enumerate(self.routed.pairs()):
            modality, expert = divmod(pair, self.routed.num_base)
            matrix = a[modality, min(expert, a.shape[1] - 1)].to(self.dtype).double()
            out[first:end] = rows[first:end].double() @ matrix.T
        return out

    def expected(self):
        """Return (rows, width) in float64, with NaN for rows that were not dispatched."""
        routed, transposed = self.routed, self.transposed
        rows = self.left[routed.perm // routed.top_k] if self.by_token else self.left
        stack = torch.cat([self.stack, self.extra]).double()
        stack = stack.mT if transposed else stack
        out = torch.full((routed.rows, stack.shape[2]), NAN, dtype=torch.float64)
        for expert, (first, end) in enumerate(routed.experts()[:-1]):
            out[first:end] = rows[first:end].double() @ stack[expert]
        for pair, (first, end) in enumerate(routed.pairs() if self.rank else []):
            modality, expert = divmod(pair, routed.num_base)
            v = self.v[modality, min(expert, self.v.shape[1] - 1)].to(self.dtype).double()
            u = (self.u[first:end].float() * self.scaling[modality]).to(self.dtype).double()
            out[first:end] += u @ (v.mT if transposed else v)
        return out


def swiglu(pre):
    gate, up = pre.double().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def run_gate_up(library, product, block_m, save=True, a=None):
    """Return pre and act, and with ``a`` (modalities, experts, rank, inter) the parts of u2."""
    routed, inter = product.routed, product.size_n
    act = torch.full((routed.rows, inter), NAN, dtype=product.dtype)
    pre = torch.full((routed.rows, 2 * inter), NAN, dtype=product.dtype)
    experts, rank = (1, 0) if a is None else a.shape[1:3]
    parts = torch.full((library.parts_of_u(inter, block_m), routed.rows, rank), NAN)
    u2 = cuda.structure(
        cuda.PartsOfU, a=a, parts=parts, experts=experts, rank=rank,
        is_float=a is not None and a.dtype == torch.float32,
    )  # fmt: skip
    product.run(library.gate_up, block_m, pre if save else None, act, u2)
    return (pre, act) if a is None else (pre, act, parts)


def run_rows(library, product, block_m, **parts):
    out = torch.full((product.routed.rows, product.size_n), NAN, dtype=product.dtype)
    product.run(library.down if product.transposed else library.d_rows, block_m, out, **parts)
    return out


def run_act_backward(library, product, block_m, pre, weights, adapted=True, added=True, fold=None):
    routed, inter = product.routed, product.size_n
    adapters = fold.structure() if fold else cuda.empty(cuda.AdapterGradients)
    d_pre = torch.full((routed.rows, 2 * inter), NAN, dtype=product.dtype)
    act = torch.full((routed.rows, inter), NAN, dtype=product.dtype)
    dots = torch.full((library.parts(inter, block_m), routed.rows), NAN)
    given = cuda.structure(
        cuda.ActBackward, weights=weights, pre=pre, d_pre=d_pre, act=act, dots=dots,
        num_rows=routed.rows, weights_are_float=weights.dtype == torch.float32,
        act_of_adapted=adapted, act_of_added=added, adapters=adapters,
    )  # fmt: skip
    product.run(library.act_backward, block_m, given)
    return d_pre, act, dots


# tokens, top-k, experts, modalities; hidden, inter, rank; kind of routing; block; added experts
GEMM_CASES = [
    (60, 2, 4, 2, 136, 72, 16, 0, 16, 0), (60, 2, 4, 2, 136, 72, 5, 0, 128, 1),
    (90, 2, 3, 1, 64, 64, 72, 0, 128, 0), (170, 1, 4, 1, 200, 8, 3, 2, 256, 2),
    (50, 3, 5, 3, 8, 200, 8, 3, 128, 0), (9, 2, 8, 1, 72, 40, 16, 1, 16, 3),
    (40, 2, 4, 1, 72, 136, 16, 4, 128, 0), (20, 2, 4, 1, 72, 40, 4, 5, 16, 0),
    (1, 2, 4, 1, 72, 40, 16, 2, 16, 0), (0, 2, 4, 1, 72, 40, 16, 0, 128, 0),
    (60, 2, 4, 2, 136, 72, 0, 0, 128, 1), (20, 2, 2, 1, 472, 40, 8, 0, 128, 0),
    (20, 2, 2, 1, 472, 40, 8, 0, 16, 0), (70, 2, 4, 1, 8, 264, 4, 5, 256, 0),
    (20, 3, 3, 1, 8, 40, 8, 3, 256, 1),
]  # fmt: skip


def single(block):
    """Return the rows of tiles for single blocks, which have the bits of clusters."""
    return min(block, 128)


def case_of(case, dtype, seed):
    tokens, top_k, experts, modalities, hidden, inter, rank, kind, block, num_extra = case
    routed = Routed(tokens, top_k, experts + num_extra, modalities, seed, kind, num_extra)
    v_dtype = torch.float32 if rank % 3 == 1 else dtype
    return routed, hidden, inter, rank, dtype, v_dtype, block


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_gate_up_and_its_activation(library, dtype, case):
    *operands, block = case_of(case, dtype, 1)
    product = Product(*operands, transposed=True, gated=True, by_token=True)
    pre, act = run_gate_up(library, product, block)
    dispatched = slice(0, product.routed.offsets[-1])
    check(pre[dispatched], product.expected()[dispatched], dtype)
    check(act[dispatched], swiglu(pre[dispatched]), dtype)
    assert not pre[dispatched.stop :].any() and not act[dispatched.stop :].any()
    unsaved, again = run_gate_up(library, product, single(block), save=False)
    assert unsaved.isnan().all() and torch.equal(act, again)
    if product.rank:
        check_parts_of_u2(library, product, block, pre, act)


def check_parts_of_u2(library, product, block, pre, act):
    """Check the parts of u2 for some ranks, and that pre and act keep their bits beside them."""
    routed, dtype, inter = product.routed, product.dtype, product.size_n
    for rank in (1, 7, 16) if product.rank % 2 else (24, 64):
        experts = 1 if rank == 7 else routed.num_base
        a = routed.randn(routed.num_modalities, experts, rank, inter, fan_in=inter)
        a = a if rank % 3 else a.to(dtype)
        *same, parts = run_gate_up(library, product, block, a=a)
        assert torch.equal(same[0], pre) and torch.equal(same[1], act)
        adapted = routed.adapted()
        assert parts[:, ~adapted].isnan().all()
        check(parts[:, adapted].sum(0), product.times_a(act, a)[adapted], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_rows_times_their_experts_weights(library, dtype, transposed, case):
    *operands, block = case_of(case, dtype, 2)
    shared = not transposed and case[1] == 3
    product = Product(*operands, transposed=transposed, shared=shared)
    out, last = run_rows(library, product, block), product.routed.offsets[-1]
    check(out[:last], product.expected()[:last], dtype)
    assert out[last:].isnan().all()
    again = run_rows(library, product, single(block))
    assert torch.equal(out[:last], again[:last])
    for number in (1, 6) if product.rank else ():
        parts, saved = product.parts_of_u(number), torch.full_like(product.u, NAN)
        found = run_rows(library, product, block, parts=parts, sum_of_parts=saved)
        assert torch.equal(found[:last], run_rows(library, product, block)[:last])
        assert torch.equal(saved, product.u.nan_to_num())  # zeros without a low-rank term
        unsaved = run_rows(library, product, block, parts=parts)
        assert torch.equal(found[:last], unsaved[:last])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_gradient_of_the_activation(library, dtype, case):
    *operands, block = case_of(case, dtype, 3)
    product = Product(*operands, transposed=False, by_token=True, shared=case[1] == 3)
    routed, inter = product.routed, product.size_n
    weights = routed.weights.to(dtype if case[6] % 2 else torch.float32)
    pre = routed.randn(routed.rows, 2 * inter, dtype=dtype)
    last = routed.offsets[-1]
    pre[last:] = NAN
    d_pre, act, dots = run_act_backward(library, product, block, pre, weights)

    d_act = product.expected()[:last]
    of_pre = pre[:last].double().requires_grad_()
    expected = swiglu(of_pre)
    slots = routed.perm[:last]
    weighted = d_act * weights.flatten()[slots].double()[:, None]
    (gradient,) = torch.autograd.grad(expected, of_pre, weighted)
    adapted, added = product.rows_with_low_rank(), product.rows_of_added_experts()
    saved = adapted | added
    check(act[saved], expected.detach()[saved[:last]], dtype)
    check(d_pre[:last], gradient, dtype)
    assert act[~saved].isnan().all() and d_pre[last:].isnan().all()
    of_slots = torch.zeros(routed.rows, dtype=torch.float64)
    of_slots[slots] = (d_act * expected.detach().to(dtype).double()).sum(1)
    assert_close(dots.sum(0), of_slots, dtype=dtype)
    for kept, rows in (({"adapted": False}, added), ({"added": False}, adapted)):
        again, part, others = run_act_backward(
            library, product, single(block), pre, weights, **kept
        )
        assert torch.equal(part[rows], act[rows]) and part[~rows].isnan().all()
        assert torch.equal(d_pre[:last], again[:last]) and torch.equal(dots, others)


class Fold:
    """Outputs of dA' for the gradients of adapters, of random operands."""

    def __init__(self, library, product, rank, b_dtype, du1=True, d_b1=True, d_a2=True):
        self.product, self.routed, self.rank = product, product.routed, rank
        routed, inter = product.routed, product.size_n
        self.u1 = routed.randn(routed.rows, rank, dtype=product.dtype)
        self.u1[~routed.adapted()] = NAN
        size = routed.num_modalities, routed.num_base, 2 * inter, rank
        self.b1 = routed.randn(*size, dtype=b_dtype)
        self.scaling = torch.rand(routed.num_modalities, generator=routed.generator) + 0.5
        slots = routed.rows // 128 + 2 * len(routed.pairs())
        sizes = {
            "du1": (du1, (library.parts(inter, 128), routed.rows, rank)),
            "d_b1": (d_b1, (slots, 2 * inter, rank)),
            "d_a2": (d_a2, (slots, product.rank, inter)),
        }
        self.outputs = {
            name: torch.full(size, NAN) if needed else None
            for name, (needed, size) in sizes.items()
        }

    def structure(self):
        return cuda.structure(
            cuda.AdapterGradients, u1=self.u1, b1=self.b1, scaling=self.scaling, rank=self.rank,
            b_is_float=self.b1.dtype == torch.float32, **self.outputs,
        )  # fmt: skip

    def clear(self):
        for output in self.outputs.values():
            output.fill_(NAN)

    def slots_of(self, pair):
        """Return the slots that the rows of a pair (modality, expert) fill."""
        modality, expert = divmod(pair, self.routed.num_base)
        low, high = self.routed.pairs()[pair]
        start = self.routed.experts()[expert][0]
        first = low // 128 + 2 * (expert * self.routed.num_modalities + modality)
        tiles = (high - 1 - start) // 128 - (low - start) // 128 + 1 if high > low else 0
        return slice(first, first + tiles)

    def expected(self, d_pre, act, weights):
        """Return du1 (rows, r1) of adapted rows, dB1 and dA2 of each pair, in float64."""
        routed, dtype = self.routed, self.product.dtype
        du1, sums = torch.full((routed.rows, self.rank), NAN, dtype=torch.float64), []
        d_pre, act = d_pre.double(), act.to(dtype).double()
        for pair, (first, end) in enumerate(routed.pairs()):
            modality, expert = divmod(pair, routed.num_base)
            rows = slice(first, end)
            du1[rows] = d_pre[rows] @ self.b1[modality, expert].to(dtype).double()
            u1 = (self.scaling[modality] * self.u1[rows].float()).to(dtype).double()
            factor = self.product.scaling[modality] * weights.flatten()[routed.perm[rows]].float()
            du2 = (factor[:, None] * self.product.u[rows]).to(dtype).double()
            sums.append((d_pre[rows].T @ u1, du2.T @ act[rows]))
        d_b1, d_a2 = zip(*sums, strict=True)
        return du1, torch.stack(d_b1), torch.stack(d_a2)


# tokens, top-k, experts, modalities; hidden, inter, ranks of u1 and du2; kind of routing; added
FOLD_CASES = [
    (60, 2, 4, 2, 136, 72, 16, 16, 0, 1), (200, 2, 1, 3, 72, 136, 16, 8, 3, 0),
    (150, 2, 2, 1, 200, 264, 3, 16, 2, 0), (90, 2, 3, 2, 64, 64, 8, 5, 3, 2),
    (40, 2, 4, 1, 72, 136, 16, 16, 4, 0), (0, 2, 4, 1, 72, 40, 16, 4, 0, 0),
    (1, 1, 2, 1, 64, 40, 4, 4, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("case", FOLD_CASES, ids=str)
def test_the_gradients_of_adapters_come_with_dA(library, dtype, case):
    """The gradient of text may even be NaN."""
    tokens, top_k, experts, modalities, hidden, inter, rank1, rank2, kind, num_extra = case
    routed = Routed(tokens, top_k, experts + num_extra, modalities, 6, kind, num_extra)
    v_dtype = dtype if rank2 % 5 == 0 else torch.float32
    product = Product(routed, hidden, inter, rank2, dtype, v_dtype, transposed=False, by_token=True)
    weights = routed.weights.to(dtype if rank1 == 8 else torch.float32)
    pre = routed.randn(routed.rows, 2 * inter, dtype=dtype)
    d_pre, act, dots = run_act_backward(library, product, 128, pre, weights)
    adapted = product.rows_with_low_rank()
    fold = Fold(library, product, rank1, dtype if rank1 == 3 else torch.float32)
    again, kept, its_dots = run_act_backward(
        library, product, 128, pre, weights, adapted=False, fold=fold
    )
    assert torch.equal(again.nan_to_num(), d_pre.nan_to_num())
    added = product.rows_of_added_experts()
    assert torch.equal(~kept.isnan().any(1), added) and torch.equal(kept[added], act[added])
    check(its_dots, dots.double(), torch.float32)
    found = fold.outputs["du1"].sum(0)
    du1, d_b1, d_a2 = fold.expected(d_pre, act, weights)
    assert torch.equal(found.isnan().all(1), ~adapted)
    check(found[adapted], du1[adapted], dtype)
    written = []
    for pair in range(len(routed.pairs())):
        slots = fold.slots_of(pair)
        written += range(slots.start, slots.stop)
    slots = fold.outputs["d_b1"], fold.outputs["d_a2"]
    sums, _, again = wgrad(library, routed, [], 1, its_dots, folded=slots)
    check(sums[0], d_b1, dtype)
    check(sums[1], d_a2, dtype)
    check(again, dots.double().sum(0), torch.float32)
    assert len(set(written)) == len(written)
    others = torch.ones(len(fold.outputs["d_b1"]), dtype=torch.bool)
    others[written] = False
    assert fold.outputs["d_b1"][others].isnan().all()
    assert fold.outputs["d_a2"][others].isnan().all()
    check_folds_alone(library, product, pre, weights, fold)


def check_folds_alone(library, product, pre, weights, fold):
    """Check that each output has the same bits without the others, in tiles of clusters too.

    Gradients that are NaN, in rows of text or of another modality, reach none of them.
    """
    routed, outputs = product.routed, {name: t.nan_to_num() for name, t in fold.outputs.items()}
    product.left[routed.modality_ids == 0] = NAN
    for name, block in (("du1", 128), ("d_b1", 256), ("d_a2", 256)):
        alone = Fold(library, product, fold.rank, fold.b1.dtype, **{n: n == name for n in outputs})
        alone.u1, alone.b1, alone.scaling = fold.u1, fold.b1, fold.scaling
        run_act_backward(library, product, block, pre, weights, adapted=False, fold=alone)
        assert torch.equal(alone.outputs[name].nan_to_num(), outputs[name])
    if routed.num_modalities == 1:
        return
    product.left[routed.modality_ids == 1] = NAN
    fold.clear()
    run_act_backward(library, product, 256, pre, weights, adapted=False, fold=fold)
    for pair, (first, end) in list(enumerate(routed.pairs()))[routed.num_base :]:
        slots = fold.slots_of(pair)
        for name, rows in (("d_b1", slots), ("d_a2", slots), ("du1", slice(first, end))):
            of_pair = (..., rows, slice(None)) if name == "du1" else (rows,)
            assert torch.equal(fold.outputs[name][of_pair], outputs[name][of_pair]), name


def text_rows(routed):
    """Return the positions of the text rows in sorted order, and their slots."""
    places = torch.arange(routed.rows)[: routed.offsets[-1]]
    places = places[routed.modality_ids[routed.perm[places] // routed.top_k] == 0]
    return places, routed.perm[places]


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_text_rows_keep_their_bits_whatever_the_adapters_hold(library, block, bad):
    routed = Routed(80, 2, 3, 2, 4)
    text, _ = text_rows(routed)
    gate_up = Product(routed, 136, 72, 16, torch.bfloat16, torch.float32, transposed=True,
                      gated=True, by_token=True)  # fmt: skip
    down = Product(routed, 72, 136, 8, torch.bfloat16, torch.float32, transposed=True)
    d_rows = Product(routed, 72, 136, 8, torch.bfloat16, torch.float32, transposed=False)
    d_act = Product(routed, 72, 136, 8, torch.bfloat16, torch.float32, transposed=False,
                    by_token=True)  # fmt: skip
    pre = routed.randn(routed.rows, 2 * 136, dtype=torch.bfloat16)

    def outputs():
        return (
            *run_gate_up(library, gate_up, block), run_rows(library, down, block),
            run_rows(library, d_rows, block),
            run_act_backward(library, d_act, block, pre, routed.weights)[0],
        )  # fmt: skip

    before = outputs()
    for product in (gate_up, down, d_rows, d_act):
        product.v.fill_(bad)
        product.u.fill_(bad)
        product.scaling.fill_(bad)
    for first, second in zip(before, outputs(), strict=True):
        assert torch.equal(first[text], second[text])
    assert not torch.equal(before[0], outputs()[0])


@pytest.mark.parametrize("block", [16, 128])
def test_values_of_other_rows_and_modalities_do_not_reach_u2(library, block):
    """A tile has rows of text and of two modalities."""
    routed = Routed(80, 2, 2, 2, 6)
    product = Product(routed, 72, 136, 16, torch.float16, torch.float32, transposed=True,
                      gated=True, by_token=True)  # fmt: skip
    a = routed.randn(2, 2, 20, 136)
    of_second = torch.zeros(routed.rows, dtype=torch.bool)
    for first, end in routed.pairs()[2:]:
        of_second[first:end] = True
    parts = run_gate_up(library, product, block, a=a)[2]
    product.left[routed.modality_ids != 2] = NAN
    a[0] = float("inf")
    again = run_gate_up(library, product, block, a=a)[2]
    assert of_second.any() and torch.equal(parts[:, of_second], again[:, of_second])
    assert again[:, ~of_second].sum(0).isnan().all()  # a part may have no columns


@pytest.mark.parametrize("block", [16, 128])
def test_text_rows_keep_their_bits_beside_other_rows(library, block):
    routed = Routed(80, 2, 3, 2, 5)
    product = Product(routed, 136, 72, 16, torch.float16, torch.float32, transposed=True,
                      gated=True, by_token=True)  # fmt: skip
    ids = routed.modality_ids
    by_slot = []
    for others in (ids, torch.where(ids == 0, 0, 1), torch.where(ids == 0, 0, -1)):
        routed.set_modalities(others)
        product.u = routed.randn(routed.rows, 16, dtype=torch.float16)
        product.left[others != 0] = routed.randn(1, 136, dtype=torch.float16)
        _, act = run_gate_up(library, product, block)
        places, slots = text_rows(routed)
        found = torch.full((routed.rows, 72), NAN, dtype=torch.float16)
        found[slots] = act[places]
        by_slot.append(found[routed.modality_ids.repeat_interleave(2) == 0])
    assert by_slot[0].isfinite().all() and by_slot[0].numel()
    assert torch.equal(by_slot[0], by_slot[1]) and torch.equal(by_slot[0], by_slot[2])


def test_grouped_gemm_says_what_it_takes(compiled):
    compiled.supports.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    compiled.supports.restype = ctypes.c_bool
    half, single = cuda.SCALARS[torch.float16], cuda.SCALARS[torch.float32]
    assert compiled.supports(half, 2048, 1408)
    assert not compiled.supports(single, 2048, 1408)
    assert not compiled.supports(half, 2047, 1408) and not compiled.supports(half, 2048, 1404)


def test_tiles_follow_shapes(compiled):
    assert [compiled.block_m(rows, 8) for rows in (0, 255, 256, 8191, 8192)] == [
        16, 16, 128, 128, 256,
    ]  # fmt: skip

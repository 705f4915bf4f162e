"""Bytes and operations of every kernel of a GPU backend, by formula, and the floor.

A kernel's cost counts each tensor that it reads or writes once: rows that several programs share,
and weights that several row tiles share, are in the L2 cache. The floor counts only the op's
arguments and what it returns or saves.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lib.cases import Case
from lib.markdown import markdown

# By backend: the highest rank for which du1 and dB1 are one pass over d_pre, and its columns in a
# part of du1. Under "cuda", whose low-rank passes are the extension's here, float32 takes two
# passes at every rank.
PARTS_OF_DU = {"triton": (16, 256), "cuda": (32, 256)}

# The highest rank for which u2 comes in parts with gate_up on the engine of sm_90 (csrc/cuda/plan.h
# has it and a limit on bytes), and the columns of the activation in a part, in tiles of 128 rows.
PARTS_OF_U2 = (32, 128)

# The highest rank at which the engine's dA' folds the gradients of adapters, and the rows and
# columns of its tiles.
FOLDED = (16, 128, 128)

# Tokens, and tokens times top-k, up to which "cuda" decodes (csrc/cuda/decode_shapes.h) with
# MOE_KERNELS_DECODE=1, and the columns of the activation for which it sums a part of u2.
MOST_DECODED, COLUMNS_OF_PART = (16, 128), 32


class Cost(NamedTuple):
    """Operations and bytes of a launch, or of two that follow each other."""

    kernel: str
    flops: float
    read: float  # bytes
    written: float
    avoidable: float = 0.0  # bytes read again, and partial sums that are written and read
    launches: int = 1

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def plus(self, **more: float) -> "Cost":
        """Return this launch with more of some fields."""
        return self._replace(**{name: getattr(self, name) + more[name] for name in more})

    @property
    def useful_bytes(self) -> float:
        """Operands and results once, by which a kernel's speed is judged."""
        return self.bytes - self.avoidable


class Sizes(NamedTuple):
    """Bytes of the tensors of a layer; ``a_`` marks the part of the adapted rows."""

    x: float  # hidden_states, also out and their gradients
    a_x: float
    rows: float  # (rows, H)
    pre: float  # (rows, 2I)
    a_pre: float
    act: float  # (rows, I)
    a_act: float
    u: float  # (adapted rows, r)
    gate_up: float
    down: float
    lora_gate_up: float
    lora_down: float


def sizes_of(case: Case) -> Sizes:
    """Return the sizes when every expert is chosen; adapters are read in the compute dtype."""
    shape, itemsize = case.shape, case.torch_dtype.itemsize
    adapted = case.num_image
    hidden, inter = shape.H * itemsize, shape.I * itemsize
    return Sizes(
        x=shape.T * hidden, a_x=adapted * hidden, rows=case.rows * hidden,
        pre=case.rows * 2 * inter, a_pre=adapted * shape.K * 2 * inter, act=case.rows * inter,
        a_act=adapted * shape.K * inter, u=adapted * shape.K * shape.r * itemsize,
        gate_up=shape.E * 2 * shape.I * hidden, down=shape.E * shape.I * hidden,
        lora_gate_up=shape.E * shape.r * (hidden + 2 * inter) if adapted else 0,
        lora_down=shape.E * shape.r * (hidden + inter) if adapted else 0,
    )  # fmt: skip


def forward(case: Case, *, engine: bool = False) -> Iterator[Cost]:
    """Yield the launches of a forward pass that saves the pre-activation, in order.

    Args:
        engine: the products are those of the engine of sm_90.
    """
    s = sizes_of(case)
    yield from _forward(case, s, s.pre, engine)


def inference(case: Case) -> Iterator[Cost]:
    """Yield the launches of a few tokens where nothing trains, by the course of training.

    It is the default. It saves nothing, and reads the experts that :func:`decoding` reads.
    """
    s = sizes_of(case)
    chosen, adapted = (_share_chosen(case, tokens) for tokens in (case.shape.T, case.num_image))
    s = s._replace(
        gate_up=chosen * s.gate_up, down=chosen * s.down,
        lora_gate_up=adapted * s.lora_gate_up, lora_down=adapted * s.lora_down,
    )  # fmt: skip
    yield from _forward(case, s, 0)


def _forward(case: Case, s: Sizes, saved: float, engine: bool = False) -> Iterator[Cost]:
    shape = case.shape
    wide, skinny = _flops(case)
    highest, columns = PARTS_OF_U2
    in_parts = engine and shape.r <= highest
    of_u2 = skinny * shape.I
    yield _dispatch(case)
    yield Cost("shrink x", skinny * shape.H, s.a_x + s.lora_gate_up, s.u)
    up = Cost(
        "gate_up", (wide * shape.H + skinny) * 2 * shape.I,
        s.x + s.gate_up + s.u + s.lora_gate_up, saved + s.act,
    )  # fmt: skip
    down = Cost(
        "down", (wide * shape.I + skinny) * shape.H, s.act + s.down + s.u + s.lora_down, s.rows
    )
    if in_parts:
        parts = 4 / case.torch_dtype.itemsize * s.u * -(-shape.I // columns)
        yield up.plus(flops=of_u2, read=s.lora_down, written=parts, avoidable=parts)
        yield down.plus(read=parts - s.u, written=s.u, avoidable=parts)
    else:
        yield up
        yield Cost("shrink act", of_u2, s.a_act + s.lora_down, s.u)
        yield down
    yield Cost("combine", wide * shape.H, s.rows, s.x)


def backward(case: Case, backend: str = "triton", *, engine: bool = False) -> Iterator[Cost]:
    """Yield the launches of a backward pass, in order.

    It computes gradients of hidden_states, topk_weights and the adapters, the latter in float32. At
    a low rank, du1 and dB1 are one pass over d_pre, which writes parts of du1 by its columns; at a
    higher rank du1 is a launch more (see :data:`PARTS_OF_DU`). On the engine of sm_90 du1, dB1 and
    dA2 come with dA' at a low rank.

    Args:
        backend: whose low-rank passes they are.
        engine: the products are those of the engine of sm_90.
    """
    if engine and case.shape.r <= FOLDED[0]:
        yield from _folded_backward(case)
        return
    shape, s = case.shape, sizes_of(case)
    wide, skinny = _flops(case)
    highest, columns = PARTS_OF_DU[backend]
    together = shape.r <= highest and (backend != "cuda" or case.torch_dtype.itemsize == 2)
    du = 4 / case.torch_dtype.itemsize * s.u
    parts = du * -(-2 * shape.I // columns) if together else 0
    # Gradients of adapters that no row uses are written too: they are zeros.
    by_hidden, by_inter = (4 * shape.E * shape.r * width for width in (shape.H, shape.I))
    yield Cost("tile maps", 0, 0, 0)
    yield Cost("du2", skinny * shape.H, s.a_x + s.lora_down, du)
    yield Cost(
        "dA' and SwiGLU", (wide * shape.H + skinny) * shape.I, s.x + s.down + s.pre + du,
        s.pre + s.a_act,
    )  # fmt: skip
    flops = (5 if together else 3) * skinny * shape.I
    read, written = s.a_pre + s.lora_gate_up + s.a_act + du, 3 * by_inter
    yield Cost("dB1, du1 and dA2", flops, read, written + parts, parts)
    yield Cost("finish dB1, du1 and dA2", 0, parts, du if together else 0, parts)
    if not together:
        yield Cost("du1", 2 * skinny * shape.I, s.a_pre, du, s.a_pre)
    yield Cost(
        "dX rows", (2 * wide * shape.I + skinny) * shape.H, s.pre + s.gate_up + du, s.rows
    )  # fmt: skip
    yield Cost("combine dX", wide * shape.H, s.rows, s.x)
    # grad_out was read for du2 already.
    yield Cost(
        "dB2 and dA1", 2 * skinny * shape.H, 2 * s.a_x + du, 2 * by_hidden, s.a_x
    )  # fmt: skip
    yield Cost("finish dB2 and dA1", 0, 0, 0)


def _folded_backward(case: Case) -> Iterator[Cost]:
    """Yield the launches where dA' leaves parts of du1, and sums over its tiles for dB1 and dA2."""
    shape, s = case.shape, sizes_of(case)
    wide, skinny = _flops(case)
    _, rows, columns = FOLDED
    du = 4 / case.torch_dtype.itemsize * s.u
    parts = du * -(-shape.I // columns)
    by_hidden, by_inter = (4 * shape.E * shape.r * width for width in (shape.H, shape.I))
    tiles = case.num_image * shape.K / rows + (shape.E if case.num_image else 0)
    sums = 4 * tiles * 3 * shape.I * shape.r
    yield Cost("tile maps", 0, 0, 0)
    yield Cost("du2", skinny * shape.H, s.a_x + s.lora_down, du)
    yield Cost(
        "dA', SwiGLU, dB1, du1 and dA2", (wide * shape.H + 6 * skinny) * shape.I,
        s.x + s.down + s.pre + du + s.u + s.lora_gate_up, s.pre + parts + sums, parts + sums,
    )  # fmt: skip
    yield Cost(
        "dX rows", (2 * wide * shape.I + skinny) * shape.H, s.pre + s.gate_up + parts,
        s.rows + du, parts,
    )  # fmt: skip
    yield Cost("combine dX", wide * shape.H, s.rows, s.x)
    yield Cost("dB2 and dA1", 2 * skinny * shape.H, 2 * s.a_x + du, 2 * by_hidden, s.a_x)
    yield Cost("finish dB1, dA2, dB2 and dA1", 0, sums, 3 * by_inter, sums)


def _dispatch(case: Case) -> Cost:
    """The sort and the tile maps: ids are read, perm and inv_perm written, in 64 bits.

    Triton sorts more than 4,096 rows in two launches more.
    """
    return Cost("dispatch, tile maps", 0, 8 * case.rows, 16 * case.rows, launches=2)


def is_decoded(case: Case) -> bool:
    """Return whether two kernels of "cuda" take the case where nothing trains, if switched on."""
    return MOST_DECODED[0] >= case.shape.T and case.rows <= MOST_DECODED[1]


def decoding(case: Case) -> Iterator[Cost]:
    """Yield the two launches of a few tokens where nothing trains.

    They read the experts that the tokens choose: as many as expected if each chooses at random.
    Adapters are read in float32. Each block of gate_up reads A1 of its expert again, from the L2.
    """
    shape, s = case.shape, sizes_of(case)
    wide, skinny = _flops(case)
    chosen, adapted = (_share_chosen(case, tokens) for tokens in (shape.T, case.num_image))
    to_fp32 = 4 / case.torch_dtype.itemsize
    lora = (4 * shape.E * shape.r * size for size in (shape.H + 3 * shape.I, shape.H))
    lora_up, lora_down = (adapted * size for size in lora)
    parts = to_fp32 * s.u * -(-shape.I // COLUMNS_OF_PART)
    up = (wide * shape.H + skinny) * 2 * shape.I + skinny * (shape.H + shape.I)
    yield Cost("gate_up, u1, parts of u2", up, s.x + chosen * s.gate_up + lora_up, s.act + parts)
    yield Cost(
        "down, u2, sum", (wide * shape.I + skinny) * shape.H,
        s.act + chosen * s.down + lora_down + parts, s.x,
    )  # fmt: skip


class Tiles(NamedTuple):
    """Tiles of a product on the engine of sm_90 (csrc/cuda/engine_mainloop.h), rows by experts."""

    kernel: str
    columns: int  # of the output in a tile
    cluster: int  # blocks that share what they load of W
    number: int
    flops: float  # of one tile
    left: float  # bytes of one tile
    weights: float

    def from_l2(self, cluster: int) -> float:
        """Return the bytes that leave the L2 for all tiles, in clusters of so many blocks."""
        return self.number * (self.left + self.weights / cluster)

    def turns(self, multiprocessors: int) -> int:
        """Return the most tiles that one multiprocessor takes."""
        return -(-self.number // (multiprocessors // self.cluster * self.cluster))

    def milliseconds(self, tflops: float, multiprocessors: int, edges: float) -> float:
        """Predict the time: a multiprocessor takes its tiles one after the other.

        Args:
            tflops: rate of all multiprocessors within the main loop.
            multiprocessors: their number.
            edges: microseconds of the first loads and of the last stores, which overlap nothing.
        """
        turns = self.turns(multiprocessors)
        return turns * self.flops * multiprocessors / tflops / 1e9 + edges / 1e3


def engine(case: Case) -> Iterator[Tiles]:
    """Yield the products of a layer, forward and backward, with balanced experts."""
    shape, block, size = case.shape, 128, case.torch_dtype.itemsize
    cluster = 2 if case.rows // shape.E >= 1024 else 1  # csrc/cuda/grouped_gemm_shapes.h
    of_rows = cluster * shape.E * -(-case.rows // (shape.E * block * cluster))
    products = (
        ("gate_up", 128, shape.I, 256, shape.H), ("down", 256, shape.H, 256, shape.I),
        ("dA' and SwiGLU", 128, shape.I, 128, shape.H),
        ("dX rows", 256, shape.H, 256, 2 * shape.I),
    )  # fmt: skip
    for kernel, columns, size_n, width, size_k in products:
        number = of_rows * -(-size_n // columns)
        yield Tiles(
            kernel, columns, cluster, number, flops=2 * block * width * size_k,
            left=size * block * size_k, weights=size * width * size_k,
        )  # fmt: skip


def engine_table(case: Case, tflops: float, multiprocessors: int, edges: float) -> str:
    """Tabulate what the engine's tiles predict. TFLOP/s count the layer's operations alone.

    What leaves the L2 is operands of the main loop; "alone" is without clusters.
    """
    useful = {
        cost.kernel: cost.flops
        for cost in (*forward(case, engine=True), *backward(case, "cuda"))
    }  # fmt: skip
    rows = []
    for tiles in engine(case):
        turns = tiles.turns(multiprocessors)
        ms = tiles.milliseconds(tflops, multiprocessors, edges)
        rows.append(
            (
                tiles.kernel, f"128 x {tiles.columns}", str(tiles.number), str(turns), f"{ms:.3f}",
                f"{useful[tiles.kernel] / ms / 1e9:.0f}", str(tiles.cluster),
                f"{tiles.from_l2(tiles.cluster) / 1e9:.1f}", f"{tiles.from_l2(1) / 1e9:.1f}",
            )
        )  # fmt: skip
    header = (
        "product", "tile", "tiles", "a multiprocessor", "ms", "TFLOP/s", "cluster", "GB from L2",
        "alone",
    )  # fmt: skip
    return markdown(header, rows)


def _share_chosen(case: Case, tokens: int) -> float:
    """Share of the experts that some of the tokens are expected to choose."""
    return 1 - (1 - case.shape.K / case.shape.E) ** tokens


def floor(case: Case, mode: str) -> Cost:
    """The least that any implementation which saves the pre-activation must move.

    With "decoding", that is for an implementation that saves nothing.
    """
    s = sizes_of(case)
    passes = {"forward": forward, "backward": backward, "decoding": decoding}
    flops = sum(cost.flops for cost in passes[mode](case))
    weights = s.gate_up + s.down + s.lora_gate_up + s.lora_down
    grads = 4 / case.torch_dtype.itemsize * (s.lora_gate_up + s.lora_down)
    if mode == "decoding":
        chosen, adapted = (_share_chosen(case, tokens) for tokens in (case.shape.T, case.num_image))
        low_rank = adapted * 4 * case.shape.E * case.shape.r * (2 * case.shape.H + 3 * case.shape.I)
        return Cost("floor", flops, s.x + chosen * (s.gate_up + s.down) + low_rank, s.x)
    if mode == "forward":
        return Cost("floor", flops, s.x + weights, s.x + s.pre)
    return Cost("floor", flops, 2 * s.x + weights + s.pre, s.x + grads)


def _flops(case: Case) -> tuple[float, float]:
    """Operations per column of a product's other side: all rows, and adapted rows at rank r."""
    return 2 * case.rows, 2 * case.num_image * case.shape.K * case.shape.r


def table(case: Case, bandwidth: float, tflops: float, backend: str = "triton") -> str:
    """Tabulate both passes, and both courses of a few tokens under "cuda".

    Under "cuda" both passes are those of the engine of sm_90, but for float32.

    ``bandwidth`` is in TB/s.
    """
    rows = []
    engine = backend == "cuda" and case.torch_dtype.itemsize == 2
    modes = [
        ("forward", "forward", forward(case, engine=engine)),
        ("backward", "backward", backward(case, backend, engine=engine)),
    ]
    if backend == "cuda" and is_decoded(case):
        modes += [
            ("inference, the default course", "decoding", inference(case)),
            ("inference in two kernels, MOE_KERNELS_DECODE=1", "decoding", decoding(case)),
        ]
    for name, mode, launches in modes:
        costs = [*launches]
        sums = (sum(c[i] for c in costs) for i in (1, 2, 3))
        total = Cost(f"all of {name}", *sums, launches=sum(c.launches for c in costs))
        for cost in (*costs, total, floor(case, mode)._replace(launches=0)):
            memory, compute = cost.bytes / bandwidth / 1e9, cost.flops / tflops / 1e9
            rows.append(
                (
                    cost.kernel, str(cost.launches or ""), f"{cost.flops / 1e9:.1f}",
                    f"{cost.read / 1e6:.0f}", f"{cost.written / 1e6:.0f}",
                    f"{max(memory, compute):.3f}", "memory" if memory > compute else "arithmetic",
                )
            )  # fmt: skip
    return markdown(
        ("kernel", "launches", "GFLOP", "MB read", "MB written", "ms", "bound by"), rows
    )

"""Bytes and operations of every kernel of a GPU backend, by formula, and the floor.

A kernel's cost counts each tensor that it reads or writes once: rows that several programs share,
and weights that several row tiles share, are in the L2 cache. The floor counts only the op's
arguments and what it returns or saves.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lib.cases import Case
from lib.markdown import markdown

# By backend: the highest rank for which du and dB are one pass over dY, and the columns of dY in a
# part of du. Under "cuda", whose grouped GEMMs are the extension's here, as they are before sm_90,
# float32 takes two passes at every rank.
PARTS_OF_DU = {"triton": (16, 256), "cuda": (32, 256)}


class Cost(NamedTuple):
    """Operations and bytes of one launch."""

    kernel: str
    flops: float
    read: float  # bytes
    written: float
    avoidable: float = 0.0  # bytes read again, and partial sums that are written and read

    @property
    def bytes(self) -> float:
        return self.read + self.written

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


def forward(case: Case) -> Iterator[Cost]:
    """Yield the launches of a forward pass that saves the pre-activation, in order."""
    shape, s = case.shape, sizes_of(case)
    wide, skinny = _flops(case)
    yield Cost("shrink x", skinny * shape.H, s.a_x + s.lora_gate_up, s.u)
    yield Cost(
        "gate_up", (wide * shape.H + skinny) * 2 * shape.I,
        s.x + s.gate_up + s.u + s.lora_gate_up, s.pre + s.act,
    )  # fmt: skip
    yield Cost("shrink act", skinny * shape.I, s.a_act + s.lora_down, s.u)
    yield Cost(
        "down", (wide * shape.I + skinny) * shape.H, s.act + s.down + s.u + s.lora_down, s.rows
    )
    yield Cost("combine", wide * shape.H, s.rows, s.x)


def backward(case: Case, backend: str = "triton") -> Iterator[Cost]:
    """Yield the launches of a backward pass, in order.

    It computes gradients of hidden_states, topk_weights and the adapters, the latter in float32. At
    a low rank, du and dB are one pass over dY, which writes partial sums of du by its columns; at a
    higher rank they are two (see :data:`PARTS_OF_DU`).
    """
    shape, s = case.shape, sizes_of(case)
    wide, skinny = _flops(case)
    to_fp32 = 4 / case.torch_dtype.itemsize
    highest, columns = PARTS_OF_DU[backend]
    together = shape.r <= highest and (backend != "cuda" or case.torch_dtype.itemsize == 2)

    def du_and_dB(name: str, flops: float, dy: float, width: int, lora: float, grad: float) -> Cost:
        parts = to_fp32 * s.u * -(-width // columns) if together else 0
        read = (dy if together else 2 * dy) + lora + parts
        written = parts + to_fp32 * s.u + grad
        return Cost(name, flops, read, written, 2 * parts if together else dy)

    # Gradients of adapters that no row uses are written too: they are zeros.
    grad_A, grad_B = (4 * shape.E * shape.r * width for width in (shape.H, shape.I))
    yield du_and_dB(
        "du2, dB2", 2 * skinny * shape.H, s.a_x, shape.H, s.lora_down, grad_A
    )  # fmt: skip
    yield Cost(
        "dA' and SwiGLU", (wide * shape.H + skinny) * shape.I,
        s.x + s.down + s.pre + to_fp32 * s.u, s.pre + s.a_act,
    )  # fmt: skip
    yield du_and_dB(
        "du1, dB1", 4 * skinny * shape.I, s.a_pre, 2 * shape.I, s.lora_gate_up, 2 * grad_B
    )  # fmt: skip
    yield Cost(
        "dX rows",
        (2 * wide * shape.I + skinny) * shape.H,
        s.pre + s.gate_up + to_fp32 * s.u,
        s.rows,
    )
    yield Cost("combine dX", wide * shape.H, s.rows, s.x)
    yield Cost("dA1", skinny * shape.H, s.a_x + to_fp32 * s.u, grad_A)
    yield Cost("dA2", skinny * shape.I, s.a_act + to_fp32 * s.u, grad_B)


def floor(case: Case, mode: str) -> Cost:
    """The least that any implementation which saves the pre-activation must move."""
    s = sizes_of(case)
    flops = sum(cost.flops for cost in {"forward": forward, "backward": backward}[mode](case))
    weights = s.gate_up + s.down + s.lora_gate_up + s.lora_down
    grads = 4 / case.torch_dtype.itemsize * (s.lora_gate_up + s.lora_down)
    if mode == "forward":
        return Cost("floor", flops, s.x + weights, s.x + s.pre)
    return Cost("floor", flops, 2 * s.x + weights + s.pre, s.x + grads)


def _flops(case: Case) -> tuple[float, float]:
    """Operations per column of a product's other side: all rows, and adapted rows at rank r."""
    return 2 * case.rows, 2 * case.num_image * case.shape.K * case.shape.r


def table(case: Case, bandwidth: float, tflops: float, backend: str = "triton") -> str:
    """Tabulate both passes; ``bandwidth`` is in TB/s."""
    rows = []
    for mode, costs in (("forward", [*forward(case)]), ("backward", [*backward(case, backend)])):
        total = Cost(f"all of {mode}", *(sum(c[i] for c in costs) for i in (1, 2, 3)))
        for cost in (*costs, total, floor(case, mode)):
            memory, compute = cost.bytes / bandwidth / 1e9, cost.flops / tflops / 1e9
            rows.append(
                (
                    cost.kernel, f"{cost.flops / 1e9:.1f}", f"{cost.read / 1e6:.0f}",
                    f"{cost.written / 1e6:.0f}", f"{max(memory, compute):.3f}",
                    "memory" if memory > compute else "arithmetic",
                )
            )  # fmt: skip
    return markdown(("kernel", "GFLOP", "MB read", "MB written", "ms", "bound by"), rows)

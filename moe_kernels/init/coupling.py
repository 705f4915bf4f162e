"""Gromov-Wasserstein couplings between two point clouds, solved by POT.

The mathematics is in docs/methods_specification.md, A3.
"""

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import extras

METRICS = ("euclidean", "cosine")
SOLVERS = ("semirelaxed", "exact", "entropic")

_GIB = 2**30
_MARGINAL_TOLERANCE = 1e-3  # relative to the total mass of 1; converged Sinkhorn reaches about 1e-9
_CHUNK = 512  # points per block where a matrix of all distances would be too large


@dataclass(frozen=True)
class Coupling:
    """Transport plan from points of X (sources) to points of Y (targets).

    Attributes:
        plan: (a, b) float64, mass from source ``sources[j]`` to target ``targets[l]``; sums to 1.
        value: sum over i, j, k, l of (C_X[i,j] - C_Y[k,l])^2 plan[i,k] plan[j,l].
        sources: (a,) int64, the points of X in the solved problem.
        targets: (b,) int64, the points of Y in the solved problem.
        nearest: (n,) int64, for each source the target that receives most of its mass; for every
            other point of X the cheapest point of Y given the plan (see :func:`couple`).
    """

    plan: Tensor
    value: float
    sources: Tensor
    targets: Tensor
    nearest: Tensor

    def project(self, y: Tensor) -> Tensor:
        """Return the barycentric projection of Y's points onto X, (V, H) -> (n, H).

        Row i is (1/p_i) sum_k T[i,k] y_k. For points of X outside the solved problem it is the row
        of their nearest point of Y.
        """
        rows = y[self.nearest]
        share = self.plan / self.plan.sum(1, keepdim=True)
        rows[self.sources] = share.to(y.dtype) @ y[self.targets]
        return rows

    def entropy(self) -> float:
        """Return the mean entropy in nats of a source's shares of the targets.

        0: every source goes to one target; log(b): every source is spread evenly over all targets.
        """
        share = self.plan / self.plan.sum(1, keepdim=True)
        return (self.plan.sum(1) @ torch.special.entr(share).sum(1)).item()


def couple(
    x: Tensor,
    y: Tensor,
    *,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    x_metric: str = "euclidean",
    y_metric: str = "cosine",
    solver: str = "semirelaxed",
    epsilon: float = 5e-3,
    max_x: int = 512,
    max_y: int = 2048,
    max_memory: float = 8 * _GIB,
    seed: int = 0,
    names: tuple[str, str] = ("features", "rows"),
) -> Coupling:
    """Match two point clouds by the distances within each (docs/methods_specification.md, A3).

    The distances within each cloud are divided by their mean. POT solves the problem for at most
    ``max_x`` points of X and ``max_y`` points of Y: the heaviest points if weights are passed,
    random ones otherwise. Every other point i of X is then assigned the point k of Y, among all
    points with positive mass, that costs least given the plan T: argmin over k of sum_jl
    (C_X[i,j] - C_Y[k,l])^2 T[j,l]. This is the step that conditional gradient on the semi-relaxed
    problem would make for a new point.

    Args:
        x: (n, d) float32, at least two different points.
        y: (V, H) float32, the same.
        x_weights: (n,) mass of X's points; a point of mass 0 is left out of POT's problem and
            assigned afterwards. Default: equal masses.
        y_weights: (V,) mass of Y's points. "exact" and "entropic" keep it as a marginal;
            "semirelaxed" only selects points by it. A point of mass 0 is never used. Default:
            equal masses.
        x_metric: "euclidean", or "cosine" of centred points.
        y_metric: the same for Y.
        solver: "semirelaxed", "exact" or "entropic" (proximal point algorithm).
        epsilon: step size of "entropic".
        max_x: a, the maximal number of points of X in POT's problem.
        max_y: b, the maximal number of points of Y in POT's problem.
        max_memory: bytes; a larger problem is refused before anything is allocated.
        seed: seed for the random selection of points.
        names: names of X and Y in error messages.

    Raises:
        ImportError: POT is not installed.
        ValueError: a name is unknown, a shape is wrong, values are not finite, or the problem does
            not fit into ``max_memory``.
        RuntimeError: POT's plan is not finite, or its marginals are not the requested ones.
    """
    check_names(solver, x_metric, y_metric)
    _check_shapes(x, y, max_x, max_y, names)
    p, q = _mass(x_weights, x, names[0]), _mass(y_weights, y, names[1])
    a, b = min(max_x, int((p > 0).sum())), min(max_y, int((q > 0).sum()))
    _check_memory(x.shape, y.shape, a, b, max_memory)
    _check_finite(x, names[0])
    _check_finite(y, names[1])
    ot = import_pot()

    generator = torch.Generator().manual_seed(seed)
    sources = _choose(p, a, x_weights is not None, generator)
    targets = _choose(q, b, y_weights is not None, generator)
    x, y = prepare(x, x_metric), prepare(y, y_metric)
    c_x = distances(x[sources].double(), x[sources].double(), x_metric)
    c_y = distances(y[targets].double(), y[targets].double(), y_metric)
    x_scale, y_scale = _mean_distance(c_x, names[0]), _mean_distance(c_y, names[1])
    allowed, p, q = q > 0, p[sources] / p[sources].sum(), q[targets] / q[targets].sum()
    plan, value = _solve(ot, c_x / x_scale, c_y / y_scale, p, q, solver, epsilon)
    _check_plan(plan, p, None if solver == "semirelaxed" else q, solver)

    nearest = x.new_empty(x.shape[0], dtype=torch.int64)
    nearest[sources] = targets[plan.argmax(1)]
    rest = x.new_ones(x.shape[0], dtype=torch.bool)
    rest[sources] = False
    if rest.any():
        used = plan.sum(0) > 0  # few columns for "semirelaxed"; unused ones would only add zeros
        c_rest = distances(x[rest], x[sources], x_metric) / x_scale
        c_all = distances(y, y[targets[used]], y_metric) / y_scale
        nearest[rest] = _place(c_rest, c_all, plan[:, used].float(), allowed)
    return Coupling(plan, value, sources, targets, nearest)


def _place(c_x: Tensor, c_y: Tensor, plan: Tensor, allowed: Tensor) -> Tensor:
    """Return the cheapest point of Y for each point of X outside the solved problem, (n',).

    c_x: (n', a); c_y: (V, b); plan: (a, b); allowed: (V,). The term in C_X^2 is the same for all
    candidates, so it is left out.
    """
    square = (c_y**2 @ plan.sum(0)).masked_fill_(~allowed, math.inf)
    blocks = (c_x @ plan).split(_CHUNK)
    return torch.cat([torch.addmm(square, rows, c_y.T, alpha=-2).argmin(1) for rows in blocks])


def prepare(points: Tensor, metric: str) -> Tensor:
    """Return the points that :func:`distances` expects: centred and of length 1 for "cosine"."""
    return points if metric == "euclidean" else F.normalize(points - points.mean(0), dim=1)


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Return the distances of prepared points, (n, d), (m, d) -> (n, m).

    The diagonal of ``distances(x, x)`` is exactly zero.
    """
    cosine = metric == "cosine"
    distance = (x @ y.T).neg_().add_(1).clamp_(min=0) if cosine else torch.cdist(x, y)
    if x.shape == y.shape and torch.equal(x, y):
        distance = ((distance + distance.T) / 2).fill_diagonal_(0)
    return distance


def _mean_distance(distance: Tensor, name: str) -> Tensor:
    mean = distance.mean()
    if not mean > 0:
        raise ValueError(f"all {name} are equal: there are no distances to match")
    return mean


def _choose(mass: Tensor, count: int, heaviest: bool, generator: torch.Generator) -> Tensor:
    """Return the indices of ``count`` points in ascending order: the heaviest, or random ones."""
    if heaviest:
        order = mass.argsort(descending=True, stable=True)
    else:
        order = torch.randperm(mass.numel(), generator=generator, device="cpu")
    return order[:count].sort().values


def _solve(
    ot: ModuleType, c_x: Tensor, c_y: Tensor, p: Tensor, q: Tensor, solver: str, epsilon: float
) -> tuple[Tensor, float]:
    """Return the plan (a, b) and its value, computed by POT in float64."""
    c_x, c_y, p, q = (tensor.numpy() for tensor in (c_x, c_y, p, q))
    common = {"loss_fun": "square_loss", "symmetric": True, "log": True}
    if solver == "semirelaxed":
        plan, log = ot.gromov.semirelaxed_gromov_wasserstein(c_x, c_y, p, **common)
        value = log["srgw_dist"]
    elif solver == "exact":
        plan, log = ot.gromov.gromov_wasserstein(c_x, c_y, p, q, **common)
        value = log["gw_dist"]
    else:
        plan, log = ot.gromov.entropic_gromov_wasserstein(
            c_x, c_y, p, q, solver="PPA", epsilon=epsilon, **common
        )
        value = log["gw_dist"]
    return torch.from_numpy(plan), float(value)


def _check_plan(plan: Tensor, p: Tensor, q: Tensor | None, solver: str) -> None:
    """Raise RuntimeError for a plan that is not finite or misses its marginals.

    POT returns such plans, from a Sinkhorn iteration that did not converge, with at most a warning.
    """
    advice = {
        "entropic": 'raise epsilon, pass more even frequencies, or use solver="semirelaxed"',
        "exact": 'pass more even frequencies, or use solver="semirelaxed"',
        "semirelaxed": "pass more even frequencies",
    }[solver]
    if not plan.isfinite().all():
        raise RuntimeError(f"POT's {solver!r} solver returned a coupling with NaN or Inf: {advice}")
    if not (plan.sum(1) > 0).all():
        raise RuntimeError(
            f"POT's {solver!r} solver returned a coupling in which some points have no partner, as "
            f"happens with tiny frequencies: {advice}"
        )
    errors = {"the source's": (plan.sum(1) - p).abs().sum().item()}
    if q is not None:
        errors["the target's"] = (plan.sum(0) - q).abs().sum().item()
    for name, error in errors.items():
        if error > _MARGINAL_TOLERANCE:
            raise RuntimeError(
                f"POT's {solver!r} solver returned a coupling that misses {name} marginal by "
                f"{error:.2g} of the mass: {advice}"
            )


def import_pot() -> ModuleType:
    """Import POT, or raise an ImportError that says what to install."""
    return extras.load("ot", "Gromov-Wasserstein initialisation")


def check_names(solver: str, *metrics: str) -> None:
    """Raise ValueError for an unknown solver or metric."""
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; the metrics are {', '.join(METRICS)}")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; the solvers are {', '.join(SOLVERS)}")


def _check_shapes(x: Tensor, y: Tensor, max_x: int, max_y: int, names: tuple[str, str]) -> None:
    for points, most, name in ((x, max_x, names[0]), (y, max_y, names[1])):
        if points.ndim != 2 or points.shape[0] < 2:
            raise ValueError(
                f"{name} must be (points, size) with at least 2 points, got {tuple(points.shape)}"
            )
        if most < 2:
            raise ValueError(f"the limit on {name} must be at least 2, got {most}")


def _check_finite(points: Tensor, name: str) -> None:
    if not points.isfinite().all():
        raise ValueError(f"{name} have values that are not finite")


def _mass(weights: Tensor | None, points: Tensor, name: str) -> Tensor:
    """Return the points' masses, (n,) float64 that sums to 1."""
    if weights is None:
        number = points.shape[0]
        return torch.full((number,), 1 / number, dtype=torch.float64, device="cpu")
    if isinstance(weights, Tensor):
        weights = weights.detach()
    weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if weights.shape != points.shape[:1]:
        raise ValueError(
            f"frequencies of {name} must be ({points.shape[0]},), got {tuple(weights.shape)}"
        )
    if not weights.isfinite().all() or (weights < 0).any() or (weights > 0).sum() < 2:
        raise ValueError(
            f"frequencies of {name} must be finite and not negative, and at least two positive"
        )
    return weights / weights.sum()


def memory_needed(x_shape: tuple[int, int], y_shape: tuple[int, int], a: int, b: int) -> int:
    """Return an upper bound on the bytes that :func:`couple` allocates.

    POT works in float64 (each cloud's distances, their transforms and products), the rest in
    float32.
    """
    (n, d), (v, h) = x_shape, y_shape
    solver = 8 * (5 * a * a + 6 * b * b + 12 * a * b)
    outside = 4 * (2 * n * d + 2 * v * h + n * (a + b) + v * b + _CHUNK * v)
    return solver + outside


def _check_memory(x_shape, y_shape, a: int, b: int, limit: float) -> None:
    """Raise ValueError, with smaller sizes that would fit, if the problem exceeds the limit."""
    need = memory_needed(x_shape, y_shape, a, b)
    if need <= limit:
        return
    while memory_needed(x_shape, y_shape, a, b) > limit and max(a, b) > 2:
        a, b = (a, b // 2) if b >= a else (a // 2, b)
    fits = memory_needed(x_shape, y_shape, a, b) <= limit
    advice = f"pass max_codes={a} and max_rows={b}" if fits else "pass fewer rows"
    raise ValueError(
        f"matching {x_shape[0]} features with {y_shape[0]} rows of {y_shape[1]} needs "
        f"{need / _GIB:.2f} GiB, the limit is {limit / _GIB:.2f}: {advice}, or raise max_memory"
    )

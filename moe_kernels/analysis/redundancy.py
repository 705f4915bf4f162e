"""Redundancy of the experts of a layer: similarity of their outputs on the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import schema
from moe_kernels.analysis.rows import RowModality, watch_routers
from moe_kernels.init.sampling import smallest_keys
from moe_kernels.models.parts import MoeBlock, find_moe_blocks
from moe_kernels.modes import evaluating
from moe_kernels.progress import bar
from moe_kernels.schema import Nullable

METRICS = ("cka", "cosine")
_FEWEST_ROWS = {"cka": 4, "cosine": 1}
# Elements of the float64 outputs that the cosine metric holds at once for all experts: 64 MiB.
_CHUNK_ELEMENTS = 2**23
_SCHEMA = {
    "metric": str,
    "modality": str,
    "rows": int,
    "layers": [str],
    "similarity": [[[Nullable(float)]]],
}


@dataclass(frozen=True)
class ExpertRedundancy:
    """Pairwise similarity of the routed experts of every layer.

    Attributes:
        metric: "cka" (debiased) or "cosine".
        modality: the modality whose rows the experts were compared on.
        rows: number of these rows.
        layers: names of the L layers.
        similarity: one symmetric (E, E) float64 matrix per layer, E the layer's number of experts.
            With "cka", the row and column of an expert that gives the same output for every row
            are NaN, since CKA is undefined there.
    """

    metric: str
    modality: str
    rows: int
    layers: tuple[str, ...]
    similarity: tuple[Tensor, ...]

    def mean(self) -> Tensor:
        """Return the mean similarity of two different experts, (L,) float64; NaN is left out."""
        return torch.stack([pairs.mean() for pairs in self._pairs()])

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the least and greatest similarity of two different experts, each (L,) float64."""
        pairs = list(self._pairs())
        return torch.stack([p.min() for p in pairs]), torch.stack([p.max() for p in pairs])

    def _pairs(self) -> Iterator[Tensor]:
        """Yield each layer's similarities of two different experts, without NaN."""
        for matrix in self.similarity:
            above = matrix[torch.ones_like(matrix, dtype=torch.bool).triu(1)]
            known = above[~above.isnan()]
            yield known if len(known) else above.new_full((1,), torch.nan)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain lists, for JSON; NaN becomes None."""
        return {
            "metric": self.metric,
            "modality": self.modality,
            "rows": self.rows,
            "layers": list(self.layers),
            "similarity": [
                [[value if value == value else None for value in row] for row in matrix.tolist()]
                for matrix in self.similarity
            ],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExpertRedundancy:
        """Make a redundancy from the result of :meth:`to_dict`.

        Raises:
            ValueError: a field is missing, or of another type.
        """
        schema.check(values, _SCHEMA, "a redundancy of experts")
        matrices = (
            [[float("nan") if value is None else value for value in row] for row in matrix]
            for matrix in values["similarity"]
        )
        return cls(
            values["metric"],
            values["modality"],
            values["rows"],
            tuple(values["layers"]),
            tuple(torch.tensor(matrix, dtype=torch.float64, device="cpu") for matrix in matrices),
        )


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Return the linear centred kernel alignment of two representations of the same n rows.

    ||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F), where c means centred columns (Kornblith et
    al., arXiv 1905.00414). It is computed from the (n, n) Gram matrices, which give the same
    number. It does not change under orthogonal maps and isotropic scaling of either side.

    Few rows bias it upwards: for independent noise of d columns it is about d / (d + n), not 0. The
    three norms are biased estimates of HSIC. ``debiased`` replaces them by the unbiased estimator
    of Song et al. (2012), as Nguyen et al. (arXiv 2010.15327) do; the result is then about 0 for
    noise, and can be slightly negative.

    Args:
        x: (n, d1), float; summed in float64.
        y: (n, d2), the same.
        debiased: use the unbiased estimator, which needs n >= 4 (otherwise n >= 2).

    Raises:
        TypeError: x or y is not floating.
        ValueError: the shapes differ, there are too few rows, values are not finite, or all rows of
            one side are the same.
    """
    for name, features in (("x", x), ("y", y)):
        if not features.is_floating_point():
            raise TypeError(f"{name} must be floating, got {features.dtype}")
        if features.ndim != 2:
            raise ValueError(f"{name} must be (rows, features), got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    fewest = 4 if debiased else 2
    if x.shape[0] != y.shape[0] or x.shape[0] < fewest:
        raise ValueError(
            f"x and y must have the same number of rows, at least {fewest}, got {x.shape[0]} and "
            f"{y.shape[0]}"
        )
    grams = [_unit_gram(features, debiased) for features in (x, y)]
    for name, gram in zip(("x", "y"), grams, strict=True):
        if gram is None:
            raise ValueError(f"all rows of {name} are the same: it has no variance to compare")
    return float(torch.dot(*grams))


def _unit_gram(features: Tensor, debiased: bool) -> Tensor | None:
    """Return the centred Gram matrix scaled to norm 1, (n * n,), or None if it is zero.

    The dot product of two of them is their CKA.
    """
    features = features.double()
    centred = features - features.mean(0)
    # Identical rows leave only the rounding error of their mean.
    if not centred.norm() > 1e-12 * features.norm():
        return None
    gram = centred @ centred.T
    if debiased:
        # U-centring: the dot product of two is n (n - 3) times the unbiased estimate of HSIC.
        n = len(gram)
        gram.fill_diagonal_(0)
        sums = gram.sum(0)
        gram += sums.sum() / ((n - 1) * (n - 2)) - (sums[:, None] + sums) / (n - 2)
        gram.fill_diagonal_(0)
    norm = gram.norm()
    return (gram / norm).flatten() if norm > 0 else None


def expert_redundancy(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    modality: str = "text",
    metric: str = "cka",
    max_tokens: int = 512,
    adapted: bool = True,
    modality_of: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ExpertRedundancy:
    """Measure the similarity of the routed experts of every layer on rows of one modality.

    First it forwards the batches and keeps a uniform sample of every layer's inputs at tokens of
    the modality: the same tokens in every layer, in memory that does not grow with the batches.
    Then every expert of a layer computes its output on the layer's whole sample, whatever the
    router would choose. Experts that all tokens use (Qwen2-MoE's shared expert) are not compared.

    In a patched model, the forwards and the experts use the adapters if the model currently does:
    within ``patched.adapters_disabled()`` neither uses them. The same batches and seed sample the
    same tokens, so the two results can be compared; note that adapters change both a layer's inputs
    and its experts.

    Experts added by :mod:`moe_kernels.moextend` come last, with or without a modality gate. They
    are compared on all rows of the sample, even rows that cannot choose them. Within
    ``ExpertExtender.disabled()`` only the base's experts are compared.

    Args:
        model: any Mixture of Experts of transformers, patched or not.
        batches: keyword arguments of the model's forward, on its device.
        modality: "text", a modality that the model is patched for, or "image" with ``modality_of``.
        metric: "cka" for debiased :func:`linear_cka`, or "cosine" for the mean over rows of the
            cosine of two experts' outputs. CKA is debiased because, with ``max_tokens`` not far
            above the hidden size, plain CKA is 0.8 for experts that have nothing in common.
        max_tokens: maximal number of sampled rows.
        adapted: use the adapters inside the experts; False: leave them out, on the same inputs.
        modality_of: see :class:`RoutingRecorder`.
        seed: seed of the sample.
        progress: show progress bars.

    Returns:
        Similarities by layer. Peak memory is (E, n * n) float64 for "cka", 64 MiB of outputs for
        "cosine".

    Raises:
        ValueError: the model has no routed experts, or their weights are not stacked; the metric or
            modality is unknown; the batches have fewer rows of it than the metric needs (cka: 4).
    """
    blocks = _check_request(model, metric, max_tokens)
    row_modality = RowModality(model, modality_of)
    sample = _Sample(row_modality, row_modality.number(modality), max_tokens, seed)
    with evaluating(model), torch.no_grad(), watch_routers(blocks, row_modality, sample.add):
        for batch in bar(batches, desc="inputs of the experts", unit="batches", shown=progress):
            model(**batch)
    if sample.size < _FEWEST_ROWS[metric]:
        raise ValueError(
            f"the batches have {sample.size} rows of modality {modality!r}, "
            f"{metric} needs at least {_FEWEST_ROWS[metric]}"
        )
    compare = {"cka": _debiased_cka, "cosine": _mean_cosine}[metric]
    use_adapters = adapted and row_modality.adapters_enabled
    modality_id = row_modality.number(modality) if use_adapters else 0
    similarity = []
    with evaluating(model), torch.no_grad():
        layers = bar(sample.inputs.items(), desc="experts compared", unit="layers", shown=progress)
        for name, inputs in layers:
            experts = _Experts(blocks[name].experts, inputs, modality_id)
            similarity.append(compare(experts, sample.num_experts[name]))
    return ExpertRedundancy(metric, modality, sample.size, tuple(sample.inputs), tuple(similarity))


def _check_request(model: nn.Module, metric: str, max_tokens: int) -> dict[str, MoeBlock]:
    """Return the model's MoE blocks by name, or raise ValueError if they cannot be compared."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; the metrics are {', '.join(METRICS)}")
    if max_tokens < _FEWEST_ROWS[metric]:
        raise ValueError(
            f"{metric} needs max_tokens of at least {_FEWEST_ROWS[metric]}, got {max_tokens}"
        )
    blocks = find_moe_blocks(model)
    for name, block in blocks.items():
        if isinstance(block.experts, nn.ModuleList):
            raise ValueError(
                f"{name}.experts is a list of modules; experts with stacked weights are needed"
            )
    return blocks


class _Sample:
    """Uniform sample of each layer's inputs at tokens of one modality, filled by watch_routers.

    Every token draws one key for all layers, and the tokens with the smallest keys stay.
    """

    def __init__(self, row_modality: RowModality, modality_id: int, max_tokens: int, seed: int):
        self.row_modality, self.modality_id = row_modality, modality_id
        self.max_tokens = max_tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = self._draw_keys(0)
        self.inputs: dict[str, Tensor] = {}
        self.num_experts: dict[str, int] = {}
        self._drawn_for: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.keys)

    def add(self, layer: str, inputs: Tensor, logits: Tensor, indices: Tensor) -> None:
        """Add a layer's sampled rows of this forward. inputs: (T, H); logits: (T, E)."""
        if self.row_modality.current is not self._drawn_for:
            self._draw()
        new = inputs[self._new.to(inputs.device)]
        if layer in self.inputs:
            new = torch.cat([self.inputs[layer][self._kept.to(inputs.device)], new])
        self.inputs[layer], self.num_experts[layer] = new, logits.shape[-1]

    def _draw_keys(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float32, device="cpu")

    def _draw(self) -> None:
        """Choose the held rows that stay and the rows of this forward that join them."""
        self._drawn_for = self.row_modality.current
        candidates = (self._drawn_for == self.modality_id).nonzero().flatten().cpu()
        held = self.size
        keys = torch.cat([self.keys, self._draw_keys(len(candidates))])
        chosen = smallest_keys(keys, self.max_tokens)
        self.keys = keys[chosen]
        self._kept, self._new = chosen[chosen < held], candidates[chosen[chosen >= held] - held]


class _Experts:
    """The experts of a layer, applied to its sampled inputs (n, H) as rows of one modality."""

    def __init__(self, module: nn.Module, inputs: Tensor, modality_id: int):
        self.module, self.inputs, self.modality_id = module, inputs, modality_id

    def output(self, expert: int, rows: slice = slice(None)) -> Tensor:
        """Return E_e(x) of one expert without its router weight, (n, H) float64."""
        inputs = self.inputs[rows]
        ids = torch.full((len(inputs), 1), expert, device=inputs.device)
        context = self.module.__dict__.get("_modality_context")
        modality_ids = torch.full_like(ids, self.modality_id)
        with contextlib.nullcontext() if context is None else context.running(modality_ids):
            # Call the module, not the op: the module has the adapters, and an unpatched model does
            # not use the op.
            return self.module(inputs, ids, torch.ones_like(ids, dtype=inputs.dtype)).double()


def _debiased_cka(experts: _Experts, num_experts: int) -> Tensor:
    """Return the debiased CKA of every pair of experts, (E, E)."""
    n = len(experts.inputs)
    grams = torch.empty(num_experts, n * n, dtype=torch.float64, device=experts.inputs.device)
    for expert in range(num_experts):
        gram = _unit_gram(experts.output(expert), debiased=True)
        grams[expert] = torch.nan if gram is None else gram
    return (grams @ grams.T).cpu()


def _mean_cosine(experts: _Experts, num_experts: int) -> Tensor:
    """Return the mean cosine of every pair of experts, (E, E); a zero output has cosine 0."""
    n, hidden = experts.inputs.shape
    chunk = max(1, _CHUNK_ELEMENTS // (num_experts * hidden))
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64, device="cpu")
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        outputs = (experts.output(expert, rows) for expert in range(num_experts))
        unit = torch.stack([nn.functional.normalize(y, dim=-1).flatten() for y in outputs])
        total += (unit @ unit.T).cpu()
    return total / n

"""How alike the experts of a layer are: similarity of their outputs on the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_kernels.analysis.rows import RowModality, find_moe_blocks, watch_routers

METRICS = ("cka", "cosine")
_FEWEST_ROWS = {"cka": 4, "cosine": 1}
# Of the float64 outputs of all experts that are held at once for cosines: 64 MiB.
_CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class ExpertRedundancy:
    """Pairwise similarity of the routed experts of every layer. E experts, by layer.

    Attributes:
        metric: "cka" (debiased) or "cosine".
        modality: whose rows the experts were compared on.
        rows: how many.
        layers: names of the L layers.
        similarity: for each layer (E, E) float64, symmetric. NaN beside an expert that gives the
            same output for every row, where "cka" says nothing.
    """

    metric: str
    modality: str
    rows: int
    layers: tuple[str, ...]
    similarity: tuple[Tensor, ...]

    def mean(self) -> Tensor:
        """The mean similarity of two different experts, (L,) float64; NaN entries left out."""
        return torch.stack([pairs.mean() for pairs in self._pairs()])

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest similarity of two different experts, each (L,) float64."""
        pairs = list(self._pairs())
        return torch.stack([p.min() for p in pairs]), torch.stack([p.max() for p in pairs])

    def _pairs(self) -> Iterator[Tensor]:
        """For each layer the similarities of two different experts that are known."""
        for matrix in self.similarity:
            above = matrix[torch.ones_like(matrix, dtype=torch.bool).triu(1)]
            known = above[~above.isnan()]
            yield known if len(known) else above.new_full((1,), torch.nan)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON; None for NaN."""
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
        matrices = (
            [[float("nan") if value is None else value for value in row] for row in matrix]
            for matrix in values["similarity"]
        )
        return cls(
            values["metric"],
            values["modality"],
            values["rows"],
            tuple(values["layers"]),
            tuple(torch.tensor(matrix, dtype=torch.float64) for matrix in matrices),
        )


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Linear centred kernel alignment of two representations of the same n rows.

    ||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F), c: columns centred (Kornblith et al., arXiv
    1905.00414), computed from the (n, n) Gram matrices, which give the same number. It does not
    change under orthogonal maps and isotropic scaling of either side.

    Few rows raise it: for independent noise of d columns it is about d / (d + n), not 0.
    ``debiased`` puts the unbiased estimator of HSIC (Song et al. 2012; used so by Nguyen et al.,
    arXiv 2010.15327) into its three places: about 0 there, so it can be a little negative.

    Args:
        x: (n, d1), float; summed in float64.
        y: (n, d2).
        debiased: needs n >= 4, else n >= 2.

    Raises:
        TypeError: not floating.
        ValueError: other shapes, too few rows, values that are not finite, or a side whose rows are
            all the same.
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
            f"x and y must have the same rows, at least {fewest}, got {x.shape[0]} and {y.shape[0]}"
        )
    grams = [_unit_gram(features, debiased) for features in (x, y)]
    for name, gram in zip(("x", "y"), grams, strict=True):
        if gram is None:
            raise ValueError(f"all rows of {name} are the same: it has no variance to compare")
    return float(torch.dot(*grams))


def _unit_gram(features: Tensor, debiased: bool) -> Tensor | None:
    """(n * n,) centred Gram matrix of norm 1: CKA is the dot product of two. None: it is zero."""
    features = features.double()
    centred = features - features.mean(0)
    # What is left of rows that are all the same is the rounding of their mean.
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
    """How alike the routed experts of every layer are on rows of one modality.

    Forwards the batches, keeps a uniform sample of the layers' inputs at tokens of the modality
    (the same tokens in every layer, in memory that does not grow with the batches), then gives all
    of a sample to every expert of its layer, whatever its router says. Experts beside the router's
    choice (Qwen2-MoE's shared expert) are not compared.

    In a patched model the forwards and the experts have their adapters, as the model itself has
    them: within ``patched.adapters_disabled()`` neither has. Same batches and seed, same tokens; so
    the two can be compared, with adapters that change both a layer's inputs and its experts.

    Experts that were added by :mod:`moe_kernels.moextend` come last, with any gate: they are
    compared on rows that may not choose them too. Within ``ExpertExtender.disabled()`` the base's
    are compared alone.

    Args:
        model: any Mixture of Experts of transformers, patched or not.
        batches: keyword arguments of its forward, on its device.
        modality: "text", or one that the model is patched for, or "image" with ``modality_of``.
        metric: "cka", debiased :func:`linear_cka` (with ``max_tokens`` not far above the hidden
            size, the plain one says 0.8 of experts that have nothing in common); or "cosine", the
            mean over rows of the cosine of two experts' outputs.
        max_tokens: rows of the sample.
        adapted: False: experts without adapters, on the same inputs.
        modality_of: see :class:`RoutingRecorder`.
        seed: of the sample.
        progress: show bars.

    Returns:
        Similarities by layer. For "cka" float64 (E, n * n) of a layer are held at once, for
        "cosine" 64 MiB of outputs.

    Raises:
        ValueError: no routed experts, or ones without stacked weights; an unknown metric or
            modality; fewer rows of it in the batches than the metric needs (cka: 4).
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    if max_tokens < _FEWEST_ROWS[metric]:
        raise ValueError(f"{metric} needs max_tokens of at least {_FEWEST_ROWS[metric]}")
    blocks = find_moe_blocks(model)
    for name, block in blocks.items():
        if isinstance(block.experts, nn.ModuleList):
            raise ValueError(f"{name}.experts is a list of modules, not one with stacked weights")
    rows_of = RowModality(model, modality_of)
    sample = _Sample(rows_of, rows_of.number(modality), max_tokens, seed)
    with _evaluating(model), watch_routers(blocks, rows_of, sample.add):
        for batch in tqdm(batches, desc="inputs of the experts", disable=not progress):
            model(**batch)
        if sample.size < _FEWEST_ROWS[metric]:
            raise ValueError(
                f"the batches have {sample.size} rows of modality {modality!r}, "
                f"{metric} needs at least {_FEWEST_ROWS[metric]}"
            )
    compare = {"cka": _debiased_cka, "cosine": _mean_cosine}[metric]
    modality_id = rows_of.number(modality) if adapted and rows_of.adapters_enabled else 0
    similarity = []
    with _evaluating(model):
        layers = tqdm(sample.inputs.items(), desc="experts compared", disable=not progress)
        for name, inputs in layers:
            experts = _Experts(blocks[name].experts, inputs, modality_id)
            similarity.append(compare(experts, sample.num_experts[name]))
    return ExpertRedundancy(metric, modality, sample.size, tuple(sample.inputs), tuple(similarity))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class _Sample:
    """A uniform sample of each layer's inputs at tokens of one modality; for watch_routers.

    Every token draws a key, once for all layers, and those with the smallest keys stay.
    """

    def __init__(self, rows_of: RowModality, modality_id: int, max_tokens: int, seed: int):
        self.rows_of, self.modality_id, self.max_tokens = rows_of, modality_id, max_tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0)
        self.inputs: dict[str, Tensor] = {}
        self.num_experts: dict[str, int] = {}
        self._drawn_for: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.keys)

    def add(self, layer: str, inputs: Tensor, logits: Tensor, indices: Tensor) -> None:
        """inputs: (T, H); logits: (T, E)"""
        if self.rows_of.current is not self._drawn_for:
            self._draw()
        new = inputs[self._new.to(inputs.device)]
        if layer in self.inputs:
            new = torch.cat([self.inputs[layer][self._kept.to(inputs.device)], new])
        self.inputs[layer], self.num_experts[layer] = new, logits.shape[-1]

    def _draw(self) -> None:
        """Which of the rows held stay, and which of this forward's join them."""
        self._drawn_for = self.rows_of.current
        candidates = (self._drawn_for == self.modality_id).nonzero().flatten().cpu()
        held = self.size
        keys = torch.cat([self.keys, torch.rand(len(candidates), generator=self.generator)])
        chosen = keys.argsort()[: self.max_tokens].sort().values
        self.keys = keys[chosen]
        self._kept, self._new = chosen[chosen < held], candidates[chosen[chosen >= held] - held]


class _Experts:
    """The experts of a layer, each on all of the layer's sampled inputs (n, H), as one modality."""

    def __init__(self, module: nn.Module, inputs: Tensor, modality_id: int):
        self.module, self.inputs, self.modality_id = module, inputs, modality_id

    def output(self, expert: int, rows: slice = slice(None)) -> Tensor:
        """(n, H) float64: E_e(x), not weighted."""
        inputs = self.inputs[rows]
        ids = torch.full((len(inputs), 1), expert, device=inputs.device)
        with self._in_modality(ids):
            # Through the module, not the op: it knows its adapters, and the model may be plain.
            return self.module(inputs, ids, torch.ones_like(ids, dtype=inputs.dtype)).double()

    @contextlib.contextmanager
    def _in_modality(self, ids: Tensor) -> Iterator[None]:
        context = self.module.__dict__.get("_modality_context")
        if context is None:
            yield
            return
        before, context.modality_ids = context.modality_ids, torch.full_like(ids, self.modality_id)
        try:
            yield
        finally:
            context.modality_ids = before


def _debiased_cka(experts: _Experts, num_experts: int) -> Tensor:
    """(E, E)"""
    n = len(experts.inputs)
    grams = torch.empty(num_experts, n * n, dtype=torch.float64, device=experts.inputs.device)
    for expert in range(num_experts):
        gram = _unit_gram(experts.output(expert), debiased=True)
        grams[expert] = torch.nan if gram is None else gram
    return (grams @ grams.T).cpu()


def _mean_cosine(experts: _Experts, num_experts: int) -> Tensor:
    """(E, E); an output of zeros has cosine 0 with every other."""
    n, hidden = experts.inputs.shape
    chunk = max(1, _CHUNK_ELEMENTS // (num_experts * hidden))
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        outputs = (experts.output(expert, rows) for expert in range(num_experts))
        unit = torch.stack([nn.functional.normalize(y, dim=-1).flatten() for y in outputs])
        total += (unit @ unit.T).cpu()
    return total / n

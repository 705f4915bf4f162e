"""Initial rows of added tokens: Gromov-Wasserstein, and the controls to compare it with.

An init is a function of the text rows (V, H), the number n of new rows, and options. It returns
the new rows (n, H) and its diagnostics or None.
"""

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels import arguments
from moe_kernels.init.coupling import couple, distances, prepare

_COLLAPSED = 0.1  # a coupling with fewer distinct rows per code, or less spread, has collapsed
_RANKED = 512  # new rows whose pairwise distances are ranked
_CHUNK = 4096  # text rows per block of random weights
_COLUMNS = 256  # of the text rows that are float32 at one time


@dataclass(frozen=True)
class GromovWassersteinDiagnostics:
    """Measures of the quality of a coupling; docs/initialisation.md explains how to read them.

    Attributes:
        gw_value: the Gromov-Wasserstein objective for distances of mean 1; 0: isometric.
        coupling_entropy: mean entropy in nats of a code's shares of the text rows; 0: every code
            goes to one row.
        rank_correlation: Spearman's correlation between the distances of the features and of the
            new rows, over the pairs of at most 512 codes; 0 if the new rows are all equal.
        norm_ratio: spread of the new rows before rescaling (root mean square distance from their
            mean), divided by that of the text rows. Averaging rows shrinks it.
        distinct_rows: number of different text rows among the codes' nearest rows
            (:attr:`Coupling.nearest <moe_kernels.init.coupling.Coupling>`).
        num_codes: n.
        solved_codes: number of codes in POT's problem; the others were assigned afterwards.
        solved_rows: number of text rows in POT's problem.
        solver: name of the solver.
        seconds: duration of the whole initialisation.
    """

    gw_value: float
    coupling_entropy: float
    rank_correlation: float
    norm_ratio: float
    distinct_rows: int
    num_codes: int
    solved_codes: int
    solved_rows: int
    solver: str
    seconds: float

    @property
    def collapsed(self) -> bool:
        """True if distinct rows are below a tenth of the codes, or ``norm_ratio`` is below 0.1."""
        return min(self.distinct_rows / self.num_codes, self.norm_ratio) < _COLLAPSED


def gromov_wasserstein_rows(
    features: Tensor,
    rows: Tensor,
    *,
    frequencies: Tensor | None = None,
    row_frequencies: Tensor | None = None,
    solver: str = "semirelaxed",
    epsilon: float = 5e-3,
    feature_metric: str = "euclidean",
    row_metric: str = "cosine",
    max_codes: int = 512,
    max_rows: int = 2048,
    max_memory: float = 8 * 2**30,
    seed: int = 0,
) -> tuple[Tensor, GromovWassersteinDiagnostics]:
    """Return rows for new tokens whose distances resemble those of the tokens' features.

    docs/methods_specification.md, A3. With a Gromov-Wasserstein coupling T between features and
    text rows e_k, row i is (1/p_i) sum_k T[i,k] e_k. Each column is then rescaled to the text rows'
    mean and standard deviation. It is a hypothesis that this helps: compare it with the controls,
    the other inits of :func:`moe_kernels.add_modality_tokens`.

    Args:
        features: (n, d) floats, such as a tokenizer's codebook.
        rows: (V, H) floats, the text rows of an embedding table or head.
        frequencies: (n,) frequency of each code (counts are accepted). POT's problem includes the
            ``max_codes`` most frequent codes; a code of frequency 0 is assigned afterwards.
            Default: equal.
        row_frequencies: (V,) the same for text tokens. A row of frequency 0 is never used; "exact"
            and "entropic" use every row in proportion to its frequency. Default: equal.
        solver: POT's "semirelaxed" (may leave text rows unused), "exact" or "entropic".
        epsilon: step size of "entropic".
        feature_metric: "euclidean", or "cosine" of centred vectors.
        row_metric: the same for rows.
        max_codes: maximal number of codes in POT's problem. Every other code is assigned the row
            that costs least given the plan.
        max_rows: maximal number of text rows in POT's problem. The other codes may be assigned any
            row.
        max_memory: bytes; a larger problem is refused with an error that says what to pass.
        seed: seed of the random selection of codes and rows where no frequencies are passed.

    Returns:
        (n, H) float32 on the device of ``rows``, and diagnostics.

    Raises:
        ImportError: POT is not installed.
        TypeError: features or rows are no tensor.
        ValueError: a name, shape or value is wrong, or the problem exceeds ``max_memory``.
        RuntimeError: POT's coupling is not finite, or misses its marginals.

    Warns:
        UserWarning: the coupling has collapsed.
    """
    start = time.perf_counter()
    arguments.tensors("(n, d)", features=features)
    arguments.tensors("(V, H)", rows=rows)
    device = rows.device
    features, rows = (t.detach().to("cpu", torch.float32) for t in (features, rows))
    coupling = couple(
        features,
        rows,
        x_weights=frequencies,
        y_weights=row_frequencies,
        x_metric=feature_metric,
        y_metric=row_metric,
        solver=solver,
        epsilon=epsilon,
        max_x=max_codes,
        max_y=max_rows,
        max_memory=max_memory,
        seed=seed,
    )
    projected = coupling.project(rows)
    new = _rescale(projected, rows)
    diagnostics = GromovWassersteinDiagnostics(
        gw_value=coupling.value,
        coupling_entropy=coupling.entropy(),
        rank_correlation=_rank_correlation(features, new, feature_metric, row_metric, seed),
        norm_ratio=(_spread(projected) / _spread(rows)).item(),
        distinct_rows=coupling.nearest.unique().numel(),
        num_codes=features.shape[0],
        solved_codes=coupling.sources.numel(),
        solved_rows=coupling.targets.numel(),
        solver=solver,
        seconds=time.perf_counter() - start,
    )
    _warn_if_collapsed(diagnostics)
    return new.to(device), diagnostics


def _rescale(new: Tensor, rows: Tensor) -> Tensor:
    """Shift and scale each column of ``new`` to the mean and standard deviation of ``rows``."""
    centred = new - new.mean(0)
    std = centred.std(0, correction=0)
    target_std = rows.std(0, correction=0)
    # A column in which all new rows agree stays constant: scaling would amplify rounding errors.
    factor = torch.where(std > 1e-5 * target_std, target_std / std, 0)
    return centred * factor + rows.mean(0)


def _spread(rows: Tensor) -> Tensor:
    return rows.var(0, correction=0).sum().sqrt()


def _rank_correlation(
    features: Tensor, new: Tensor, feature_metric: str, row_metric: str, seed: int
) -> float:
    from scipy.stats import rankdata  # POT needs scipy

    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(features.shape[0], generator=generator, device="cpu")[:_RANKED]
    upper = torch.ones(some.numel(), some.numel(), dtype=torch.bool, device="cpu").triu(1)
    ranks = []
    for points, metric in ((features, feature_metric), (new, row_metric)):
        points = prepare(points.double(), metric)[some]
        distance = distances(points, points, metric)[upper]
        # Pairs that are equally far apart must get equal ranks in spite of rounding errors.
        distance = (distance / distance.mean().clamp(min=1e-30)).round(decimals=6)
        ranks.append(torch.from_numpy(rankdata(distance.numpy())))
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    return correlation if correlation == correlation else 0.0


def _warn_if_collapsed(diagnostics: GromovWassersteinDiagnostics) -> None:
    if diagnostics.collapsed:
        warnings.warn(
            f"the Gromov-Wasserstein coupling has collapsed: {diagnostics.num_codes} codes share "
            f"{diagnostics.distinct_rows} text rows, with {diagnostics.norm_ratio:.2f} of the text "
            "rows' spread; try another solver, a smaller epsilon, or more even frequencies",
            stacklevel=3,
        )


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column, float32, without a copy of all rows."""
    if rows.dtype == torch.float32:
        return rows.mean(0), rows.std(0, correction=0)
    blocks = (block.float() for block in rows.split(_COLUMNS, dim=1))
    means, stds = zip(*((each.mean(0), each.std(0, correction=0)) for each in blocks), strict=True)
    return torch.cat(means), torch.cat(stds)


def _noise(rows: Tensor, count: int) -> Tensor:
    return rows.new_empty(count, rows.shape[1], dtype=torch.float32).normal_()


def _normal_rows(rows: Tensor, count: int) -> tuple[Tensor, None]:
    mean, std = _moments(rows)
    return mean + std * _noise(rows, count), None


def _mean_rows(rows: Tensor, count: int) -> tuple[Tensor, None]:
    noise = _noise(rows, count)
    mean, std = _moments(rows)
    return mean + 0.1 * std * noise, None


def _gaussian_rows(rows: Tensor, count: int) -> tuple[Tensor, None]:
    """Draw rows from the normal distribution with the mean and covariance of the text rows.

    Random mixtures of the centred text rows have exactly that covariance, whatever its rank.
    """
    rows = rows.float()
    mean = rows.mean(0)
    new = rows.new_zeros(count, rows.shape[1])
    for block in rows.split(_CHUNK):
        weights = rows.new_empty(count, block.shape[0]).normal_()
        new.addmm_(weights, block - mean, alpha=rows.shape[0] ** -0.5)
    return new + mean, None


def _permuted_rows(
    rows: Tensor, count: int, *, features: Tensor, seed: int = 0, **options
) -> tuple[Tensor, GromovWassersteinDiagnostics]:
    new, diagnostics = gromov_wasserstein_rows(features, rows, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu")
    return new[order.to(new.device)], diagnostics


def _gromov_wasserstein_rows(
    rows: Tensor, count: int, *, features: Tensor, **options
) -> tuple[Tensor, GromovWassersteinDiagnostics]:
    return gromov_wasserstein_rows(features, rows, **options)


ROW_INITS: dict[str, Callable[..., tuple[Tensor, GromovWassersteinDiagnostics | None]]] = {
    "normal": _normal_rows,
    "mean": _mean_rows,
    "gaussian": _gaussian_rows,
    "permuted": _permuted_rows,
    "gromov_wasserstein": _gromov_wasserstein_rows,
}
_WITH_FEATURES = ("permuted", "gromov_wasserstein")


def check_row_init(
    init: str, num_tokens: int, num_delimiters: int, features: Tensor | None, options: dict
) -> None:
    """Raise for arguments that :func:`initial_rows` cannot handle.

    Raises:
        ValueError: the init is unknown, or features are missing or do not match ``num_tokens``.
        TypeError: the init does not have one of the options.
    """
    if init not in ROW_INITS:
        raise ValueError(f"unknown init {init!r}; the inits are {', '.join(ROW_INITS)}")
    if not 0 <= num_delimiters < num_tokens:
        raise ValueError(f"num_delimiters must be 0 to {num_tokens - 1}, got {num_delimiters}")
    arguments.tensors("(n, d)", features=features)
    if features is None and init in _WITH_FEATURES:
        raise ValueError(f"init={init!r} needs features: pass one row for each code")
    if features is not None and (
        features.ndim != 2 or features.shape[0] != num_tokens - num_delimiters
    ):
        raise ValueError(
            f"features {tuple(features.shape)} do not match num_tokens={num_tokens} and "
            f"num_delimiters={num_delimiters}: expected ({num_tokens - num_delimiters}, d), since "
            "the first num_delimiters tokens have no features"
        )
    known = set()
    if init in _WITH_FEATURES:
        known = set(inspect.signature(gromov_wasserstein_rows).parameters) - {"features", "rows"}
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"init={init!r} has no option {', '.join(unknown)}; its options are "
            f"{', '.join(sorted(known)) or 'none'}"
        )


def initial_rows(
    rows: Tensor,
    *,
    num_tokens: int,
    init: str,
    num_delimiters: int = 0,
    features: Tensor | None = None,
    **options,
) -> tuple[Tensor, GromovWassersteinDiagnostics | None]:
    """Return new rows (num_tokens, H), float32, and the init's diagnostics or None.

    Args:
        rows: (V, H), the text rows, of any float dtype.
        num_tokens: number of new rows.
        init: a name of :data:`ROW_INITS`.
        num_delimiters: number of tokens, at the beginning, that have no row in ``features``. An
            init that uses features initialises them as "normal" does.
        features: (num_tokens - num_delimiters, d), for the inits that use features.
        **options: keyword arguments of :func:`gromov_wasserstein_rows`, for the same inits.

    Raises:
        ValueError, TypeError: see :func:`check_row_init` and the init itself.
    """
    check_row_init(init, num_tokens, num_delimiters, features, options)
    if init not in _WITH_FEATURES:
        return ROW_INITS[init](rows, num_tokens)
    count = num_tokens - num_delimiters
    new, diagnostics = ROW_INITS[init](rows.float(), count, features=features, **options)
    delimiters, _ = _normal_rows(rows, num_delimiters)
    return torch.cat([delimiters, new]), diagnostics

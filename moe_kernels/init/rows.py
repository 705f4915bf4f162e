"""How the rows of added tokens start: by Gromov-Wasserstein, and the controls to run beside it.

An init is a function of the text rows (V, H), the number n of new rows and options, and returns
(n, H) and what it has to report or None.
"""

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.init.coupling import couple, distances, prepare

_COLLAPSED = 0.1  # distinct rows a new row, and spread, below which a coupling says nothing
_RANKED = 512  # new rows whose pairwise distances are ranked
_CHUNK = 4096  # text rows a block of random weights


@dataclass(frozen=True)
class GromovWassersteinDiagnostics:
    """What a coupling is worth; see docs/initialisation.md for how to read it.

    Attributes:
        gw_value: the Gromov-Wasserstein objective, of distances that have mean 1; 0: isometric.
        coupling_entropy: mean entropy in nats of the text rows that a code goes to; 0: one row.
        rank_correlation: Spearman's, between distances of features and of the new rows, over the
            pairs of at most 512 codes; 0 where the new rows are all equal.
        norm_ratio: spread of the new rows before rescaling (root mean square distance from their
            mean) over that of the text rows. Averages shrink it.
        distinct_rows: text rows that are the main one of some code.
        num_codes: n.
        solved_codes: codes that POT solved for; the others were placed from these.
        solved_rows: text rows that POT solved for.
        solver: its name.
        seconds: of the whole initialisation.
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
        """Whether fewer than a tenth of the codes have a row of their own, or all are averages."""
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
    """Rows for new tokens whose distances resemble those of the tokens' features.

    docs/methods.md, A3: a Gromov-Wasserstein coupling T between features and text rows, row i =
    (1/p_i) sum_k T[i,k] e_k, then each column rescaled to the text rows' mean and standard
    deviation. Whether it helps is a hypothesis: run the controls of :data:`ROW_INITS` beside it.

    Args:
        features: (n, d) floats, such as a tokenizer's codebook.
        rows: (V, H) floats, the text rows of an embedding table or head.
        frequencies: (n,) how often each code occurs (counts will do); the commonest ``max_codes``
            are solved for. A code of frequency 0 is placed from the others. Default: equal.
        row_frequencies: (V,) the same for text tokens; a row of frequency 0 is never used, and
            "exact" and "entropic" give each row its share. Default: equal.
        solver: POT's "semirelaxed" (text rows need not all be used), "exact" or "entropic".
        epsilon: step of "entropic".
        feature_metric: "euclidean", or "cosine" of centred vectors.
        row_metric: the same for rows.
        max_codes: codes to solve for. The others take the row that costs least given the plan.
        max_rows: text rows to solve for; the other codes may take any row.
        max_memory: bytes that may be taken; a larger problem is refused, with what to pass.
        seed: of the choice of codes and rows where there are no frequencies.

    Returns:
        (n, H) float32 on the device of ``rows``, and diagnostics.

    Raises:
        ImportError: POT is not installed.
        ValueError: wrong names, shapes, values, or a problem above ``max_memory``.
        RuntimeError: POT's coupling is not finite, or misses its marginals.

    Warns:
        UserWarning: the coupling has collapsed.
    """
    start = time.perf_counter()
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
    """Each column of ``new`` shifted and scaled to the mean and standard deviation of ``rows``."""
    centred = new - new.mean(0)
    std = centred.std(0, correction=0)
    # A column in which all new rows agree stays constant: rounding is not to be blown up.
    wanted = rows.std(0, correction=0)
    factor = torch.where(std > 1e-5 * wanted, wanted / std, 0)
    return centred * factor + rows.mean(0)


def _spread(rows: Tensor) -> Tensor:
    return rows.var(0, correction=0).sum().sqrt()


def _rank_correlation(
    features: Tensor, new: Tensor, feature_metric: str, row_metric: str, seed: int
) -> float:
    from scipy.stats import rankdata  # POT needs scipy

    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(features.shape[0], generator=generator)[:_RANKED]
    upper = torch.ones(some.numel(), some.numel(), dtype=torch.bool).triu(1)
    ranks = []
    for points, metric in ((features, feature_metric), (new, row_metric)):
        points = prepare(points.double(), metric)[some]
        distance = distances(points, points, metric)[upper]
        # Rounding must not order pairs that are equally far apart.
        distance = (distance / distance.mean().clamp(min=1e-30)).round(decimals=6)
        ranks.append(torch.from_numpy(rankdata(distance.numpy())))
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    return correlation if correlation == correlation else 0.0


def _warn_if_collapsed(diagnostics: GromovWassersteinDiagnostics) -> None:
    if diagnostics.collapsed:
        warnings.warn(
            f"the Gromov-Wasserstein coupling has collapsed: {diagnostics.num_codes} codes share "
            f"{diagnostics.distinct_rows} text rows, with {diagnostics.norm_ratio:.2f} of their "
            "spread; another solver, a smaller epsilon, or even frequencies may help",
            stacklevel=3,
        )


def _normal_rows(rows: Tensor, count: int) -> tuple[Tensor, None]:
    mean, std = rows.mean(0), rows.std(0, correction=0)
    return mean + std * torch.randn(count, rows.shape[1], device=rows.device), None


def _mean_rows(rows: Tensor, count: int) -> tuple[Tensor, None]:
    noise = torch.randn(count, rows.shape[1], device=rows.device)
    return rows.mean(0) + 0.1 * rows.std(0, correction=0) * noise, None


def _gaussian_rows(rows: Tensor, count: int) -> tuple[Tensor, None]:
    """Random mixtures of centred text rows have exactly their covariance, of any rank."""
    mean = rows.mean(0)
    new = torch.zeros(count, rows.shape[1], device=rows.device)
    for block in rows.split(_CHUNK):
        weights = torch.randn(count, block.shape[0], device=rows.device)
        new.addmm_(weights, block - mean, alpha=rows.shape[0] ** -0.5)
    return new + mean, None


def _permuted_rows(
    rows: Tensor, count: int, *, features: Tensor, seed: int = 0, **options
) -> tuple[Tensor, GromovWassersteinDiagnostics]:
    new, diagnostics = gromov_wasserstein_rows(features, rows, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
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
    """Refuse what :func:`initial_rows` cannot do.

    Raises:
        ValueError: an unknown init, or features that are missing or do not match ``num_tokens``.
        TypeError: an option that the init does not have.
    """
    if init not in ROW_INITS:
        raise ValueError(f"unknown init {init!r}; the inits are {', '.join(ROW_INITS)}")
    if not 0 <= num_delimiters < num_tokens:
        raise ValueError(f"num_delimiters must be 0 to {num_tokens - 1}, got {num_delimiters}")
    if features is None and init in _WITH_FEATURES:
        raise ValueError(f"init={init!r} needs features, one row for each code")
    if features is not None and (
        features.ndim != 2 or features.shape[0] != num_tokens - num_delimiters
    ):
        raise ValueError(
            f"features {tuple(features.shape)} do not match num_tokens={num_tokens} of which "
            f"num_delimiters={num_delimiters} have none: expected "
            f"({num_tokens - num_delimiters}, d); delimiters come first"
        )
    known = set()
    if init in _WITH_FEATURES:
        known = set(inspect.signature(gromov_wasserstein_rows).parameters) - {"features", "rows"}
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"init={init!r} takes no option {', '.join(unknown)}; it takes "
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
    """(V, H) text rows -> (num_tokens, H) float32 new rows, and diagnostics where there are any.

    Args:
        rows: float32.
        num_tokens: how many.
        init: a name of :data:`ROW_INITS`.
        num_delimiters: how many of them, the first, stand for nothing in ``features``. With an init
            that uses features they start as by "normal".
        features: (num_tokens - num_delimiters, d) for the inits that use them.
        **options: keywords of :func:`gromov_wasserstein_rows`, for those inits.

    Raises:
        ValueError, TypeError: as :func:`check_row_init` and the init itself.
    """
    check_row_init(init, num_tokens, num_delimiters, features, options)
    if init not in _WITH_FEATURES:
        return ROW_INITS[init](rows, num_tokens)
    count = num_tokens - num_delimiters
    new, diagnostics = ROW_INITS[init](rows, count, features=features, **options)
    delimiters, _ = _normal_rows(rows, num_delimiters)
    return torch.cat([delimiters, new]), diagnostics

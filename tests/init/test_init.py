"""Gromov-Wasserstein initialisation: rows, low-rank pairs, and refusals."""

import itertools
import math
import re

import pytest
import torch
from support.model_zoo import VOCAB, make_model, unchanged
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_kernels import add_modality_tokens, patch_model
from moe_kernels.init import coupling as couplings
from moe_kernels.init import gromov_wasserstein_lora, gromov_wasserstein_rows
from moe_kernels.init.coupling import SOLVERS, couple
from moe_kernels.init.lora import truncated_map
from moe_kernels.init.rows import ROW_INITS, initial_rows

ot = pytest.importorskip("ot", reason="POT is not installed (the extra 'ot')")

SOLVER = pytest.mark.parametrize("solver", SOLVERS)
# POT's warnings about Sinkhorn steps that stopped early; the package checks the marginals itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sinkhorn did not converge"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]


def rotated(n=40, d=5, seed=0):
    """Return points, and a rotated, reordered copy: copy[i] is the image of points[order[i]]."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=generator)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    order = torch.randperm(n, generator=generator)
    return points, (points @ rotation)[order], order


def clouds(n=60, v=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randn(v, 16, generator=generator)


# --- couplings


@SOLVER
def test_an_isometry_is_found(solver):
    points, copy, order = rotated()
    coupling = couple(copy, points, y_metric="euclidean", solver=solver)
    expected = F.one_hot(order, 40).double() / 40
    torch.testing.assert_close(coupling.plan, expected, atol=1e-6, rtol=0)
    assert torch.equal(coupling.nearest, order)
    assert coupling.value == pytest.approx(0, abs=1e-9)
    rows, diagnostics = gromov_wasserstein_rows(copy, points, row_metric="euclidean", solver=solver)
    torch.testing.assert_close(rows, points[order])
    assert diagnostics.rank_correlation == pytest.approx(1, abs=1e-5)
    assert diagnostics.coupling_entropy == pytest.approx(0, abs=1e-6)
    assert (diagnostics.distinct_rows, diagnostics.solver) == (40, solver)


def test_an_isometry_by_cosines():
    points, copy, order = rotated()
    coupling = couple(
        3 * copy + 1, points - 2, x_metric="cosine", y_metric="cosine", solver="exact"
    )
    assert torch.equal(coupling.nearest, order)


@SOLVER
def test_marginals(solver):
    x, y = clouds(20, 30)
    p, q = torch.rand(20) + 0.5, torch.rand(30) + 0.5
    coupling = couple(x, y, x_weights=p, y_weights=q, solver=solver, epsilon=0.05)
    torch.testing.assert_close(coupling.plan.sum(1), (p / p.sum()).double(), atol=1e-5, rtol=0)
    if solver != "semirelaxed":
        torch.testing.assert_close(coupling.plan.sum(0), (q / q.sum()).double(), atol=5e-5, rtol=0)


@SOLVER
def test_the_value_is_the_objective(solver):
    x, y = clouds(7, 9)
    coupling = couple(x, y, solver=solver, epsilon=0.05)
    c_x = torch.cdist(x.double(), x.double())
    unit = F.normalize((y - y.mean(0)).double(), dim=1)
    c_y = 1 - unit @ unit.T
    gap = (c_x / c_x.mean())[:, :, None, None] - (c_y / c_y.mean())[None, None]
    expected = torch.einsum("ijkl,ik,jl->", gap**2, coupling.plan, coupling.plan)
    assert coupling.value == pytest.approx(expected.item(), rel=1e-5)


def test_points_beyond_those_solved_for_take_the_cheapest_row():
    """The assigned row minimises the documented sum, computed here in loops."""
    x, y = clouds(12, 15)
    coupling = couple(x, y, max_x=7, max_y=9)
    assert (coupling.sources.numel(), coupling.targets.numel()) == (7, 9)
    c_x, unit = torch.cdist(x, x).double(), F.normalize(y - y.mean(0), dim=1).double()
    c_y = 1 - unit @ unit.T
    c_x /= c_x[coupling.sources][:, coupling.sources].mean()
    c_y /= c_y[coupling.targets][:, coupling.targets].mean()
    for i in set(range(12)) - set(coupling.sources.tolist()):
        cost = torch.zeros(15, dtype=torch.float64)
        for (j, source), (k, target) in itertools.product(
            enumerate(coupling.sources), enumerate(coupling.targets)
        ):
            cost += (c_x[i, source] - c_y[:, target]) ** 2 * coupling.plan[j, k]
        assert coupling.nearest[i] == cost.argmin()


def test_an_isometry_is_found_from_a_part():
    """Codes outside POT's problem are still assigned their own row."""
    points, copy, order = rotated(60)
    coupling = couple(copy, points, y_metric="euclidean", solver="exact")
    assert torch.equal(coupling.nearest, order)
    # POT's problem has the same 30 points on both sides; the other 30 are assigned afterwards.
    weights = torch.ones(60)
    weights[30:] = 0.1
    by_code = weights[order]
    part = couple(
        copy, points, x_weights=by_code, y_weights=weights, y_metric="euclidean", solver="exact",
        max_x=30, max_y=30,
    )  # fmt: skip
    assert part.sources.numel() == 30
    assert torch.equal(part.nearest, order)


def test_the_choice_of_points():
    x, y = clouds(50, 60)
    same = [couple(x, y, max_x=10, max_y=12, seed=3) for _ in range(2)]
    other = couple(x, y, max_x=10, max_y=12, seed=4)
    assert torch.equal(same[0].plan, same[1].plan) and torch.equal(same[0].nearest, same[1].nearest)
    assert not torch.equal(same[0].sources, other.sources)
    p, q = torch.arange(50.0), torch.arange(60.0).flip(0)
    heavy = couple(x, y, x_weights=p, y_weights=q, max_x=10, max_y=12, seed=3)
    assert heavy.sources.tolist() == list(range(40, 50))
    assert heavy.targets.tolist() == list(range(12))


def test_rows_of_frequency_0_are_never_used():
    x, y = clouds(50, 60)
    options = {"max_x": 10, "max_y": 12}
    anywhere = couple(x, y, y_weights=torch.arange(60, 0, -1.0), **options).nearest
    q = torch.arange(60, 0, -1.0)
    q[12:] = 0
    within = couple(x, y, y_weights=q, **options).nearest
    assert anywhere.max() >= 12 > within.max()


def test_codes_that_never_occur_get_a_row():
    x, y = clouds(20, 30)
    p = torch.ones(20)
    p[[3, 11]] = 0
    rows, _ = gromov_wasserstein_rows(x, y, frequencies=p)
    assert rows.isfinite().all() and rows.shape == (20, 16)


# --- rows and diagnostics


@SOLVER
def test_rows_have_the_mean_and_standard_deviation_of_the_text_rows(solver):
    x, y = clouds(20, 30)
    rows, _ = gromov_wasserstein_rows(x, 5 * y + 2, solver=solver, epsilon=0.1)
    torch.testing.assert_close(rows.mean(0), (5 * y + 2).mean(0))
    torch.testing.assert_close(rows.std(0, correction=0), (5 * y).std(0, correction=0))


def test_diagnostics_by_hand():
    """Entropy, projection, distinct rows and spread of a plan over 3 codes and 4 rows."""
    plan = torch.tensor([[0.5, 0, 0, 0], [0, 0.125, 0.125, 0], [0, 0.125, 0, 0.125]]).double()
    y = torch.tensor([[0.0, 0], [2, 0], [0, 4], [6, 2]])
    arange = torch.arange(3)
    coupling = couplings.Coupling(plan, 0.0, arange, torch.arange(4), arange)
    assert coupling.entropy() == pytest.approx(0.5 * math.log(2))
    assert coupling.project(y).tolist() == [[0, 0], [1, 2], [4, 1]]


def test_rank_correlation_and_norm_ratio(monkeypatch):
    """Four points on a line are coupled to rows whose distances are ranked differently."""
    coupling = couplings.Coupling(
        torch.eye(4).double() / 4, 0.5, torch.arange(4), torch.arange(4), torch.arange(4)
    )
    monkeypatch.setattr("moe_kernels.init.rows.couple", lambda *_, **__: coupling)
    x = torch.tensor([[0.0], [1], [3], [7]])  # distances 1 3 7 2 6 4
    y = torch.tensor([[0.0], [1], [3], [2.5], [5], [-4]])  # distances 1 3 2.5 2 1.5 0.5
    _, diagnostics = gromov_wasserstein_rows(x, y, row_metric="euclidean")
    # Ranks 1 3 6 2 5 4 and 2 6 5 4 3 1: the sum of squared differences is 28.
    assert diagnostics.rank_correlation == pytest.approx(1 - 6 * 28 / (6 * 35))
    expected = y[:4].std(correction=0) / y.std(correction=0)
    assert diagnostics.norm_ratio == pytest.approx(expected.item())
    assert (diagnostics.gw_value, diagnostics.distinct_rows) == (0.5, 4)
    assert not diagnostics.collapsed


@pytest.mark.parametrize("to", ["one row", "an average"])
def test_a_collapsed_coupling_warns(monkeypatch, to):
    x, y = clouds(40, 40)
    plan = torch.full((40, 40), 1 / 1600).double()
    if to == "one row":
        plan = torch.zeros(40, 40).double()
        plan[:, 5] = 1 / 40
    monkeypatch.setattr(couplings, "_solve", lambda *_: (plan, 1.0))
    with pytest.warns(UserWarning, match=r"collapsed: 40 codes share 1 text rows, with 0\.00"):
        rows, diagnostics = gromov_wasserstein_rows(x, y)
    assert diagnostics.collapsed and diagnostics.rank_correlation == 0.0
    torch.testing.assert_close(rows, y.mean(0).expand(40, -1), atol=1e-5, rtol=1e-5)


# --- unusable results of POT


@SOLVER
@pytest.mark.parametrize("bad", ["nan", "marginal", "empty"])
def test_a_coupling_that_cannot_be_used_is_refused(monkeypatch, solver, bad):
    x, y = clouds(20, 30)
    plan = torch.full((20, 30), 1 / 600).double()
    plan[0] *= {"nan": math.nan, "marginal": 1.5, "empty": 0}[bad]
    monkeypatch.setattr(couplings, "_solve", lambda *_: (plan, 1.0))
    match = {
        "nan": "NaN or Inf",
        "marginal": "misses the source's marginal by 0.025",
        "empty": "some points have no partner",
    }[bad]
    with pytest.raises(RuntimeError, match=f"{solver!r} solver returned a coupling .*{match}"):
        gromov_wasserstein_rows(x, y, solver=solver)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_the_entropic_solver_of_pot_is_watched():
    """With a far too small epsilon POT warns at most, but the plan is refused."""
    x, y = clouds(20, 30)
    with pytest.raises(RuntimeError, match="'entropic' solver .* raise epsilon"):
        gromov_wasserstein_rows(x, y, frequencies=torch.rand(20) ** 8, solver="entropic",
                                epsilon=1e-7)  # fmt: skip


# --- bad input


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"solver": "sinkhorn"}, "unknown solver 'sinkhorn'; the solvers are semirelaxed, exact"),
        ({"feature_metric": "l1"}, "unknown metric 'l1'"),
        ({"features": torch.zeros(20)}, "features must be"),
        ({"features": torch.ones(20, 3)}, "all features are equal"),
        ({"features": torch.full((20, 3), math.nan)}, "features have values that are not finite"),
        ({"rows": torch.full((20, 3), math.inf)}, "rows have values that are not finite"),
        ({"max_codes": 1}, "the limit on features must be at least 2, got 1"),
        ({"max_rows": 0}, "the limit on rows must be at least 2, got 0"),
        ({"frequencies": torch.ones(19)}, r"frequencies of features must be \(20,\), got \(19,\)"),
        ({"frequencies": -torch.ones(20)}, "of features must be finite and not neg"),
        ({"row_frequencies": torch.zeros(30)}, "of rows must be .* at least two positive"),
    ],
)
def test_bad_arguments(changes, match):
    x, y = clouds(20, 30)
    arguments = {"features": x, "rows": y} | changes
    with pytest.raises(ValueError, match=match):
        gromov_wasserstein_rows(**arguments)


def test_a_problem_that_does_not_fit_is_refused_with_what_to_pass(monkeypatch):
    monkeypatch.setattr(couplings, "import_pot", lambda: pytest.fail("work was begun"))
    x, y = torch.randn(8192, 4), torch.randn(32000, 8)
    match = r"needs 7\d\.\d+ GiB, the limit is 8.00: pass max_codes=(\d+) and max_rows=(\d+)"
    with pytest.raises(ValueError, match=match) as caught:
        gromov_wasserstein_rows(x, y, max_codes=8192, max_rows=32000)
    a, b = map(int, re.search(match, str(caught.value)).groups())
    assert couplings.memory_needed(x.shape, y.shape, a, b) < 8 * 2**30
    with pytest.raises(ValueError, match="pass fewer rows, or raise max_memory"):
        gromov_wasserstein_rows(x, y, max_memory=1000)


# --- add_modality_tokens


TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@TIED
@pytest.mark.parametrize("init", ["gromov_wasserstein", "permuted"])
def test_added_rows(init, tied):
    """Rows of codes follow the delimiters, made from the rows of the same table or head."""
    model = make_model("olmoe", tie_word_embeddings=tied)
    patched = patch_model(model)
    codebook, _ = clouds(12)
    ids = add_modality_tokens(
        model, "image", 14, init=init, features=codebook, num_delimiters=2, max_rows=40, seed=7
    )
    assert ids == range(VOCAB, VOCAB + 14)
    tables = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    if tied:
        assert tables["head"].added_rows["image"] is tables["embedding"].added_rows["image"]
        del tables["head"]
    assert patched.init_diagnostics["image"].keys() == tables.keys()
    for name, module in tables.items():
        expected, report = gromov_wasserstein_rows(
            codebook, module.weight.detach(), max_rows=40, seed=7
        )
        added = module.added_rows["image"].detach()[2:]
        assert patched.init_diagnostics["image"][name].gw_value == report.gw_value
        if init == "gromov_wasserstein":
            assert torch.equal(added, expected)
        else:
            assert not torch.equal(added, expected)
            assert torch.equal(added.sort(0).values, expected.sort(0).values)
    before = {name: module.weight.clone() for name, module in tables.items()}
    assert all(torch.equal(tables[name].weight, before[name]) for name in tables)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"features": torch.randn(14, 3)}, ValueError, r"features \(14, 3\) do not match num_tok"),
        ({"num_delimiters": 0}, ValueError, r"features \(12, 6\) do not match num_tokens=14"),
        ({"num_delimiters": 14}, ValueError, "num_delimiters must be 0 to 13, got 14"),
        ({"features": None}, ValueError, "needs features"),
        ({"sover": "exact"}, TypeError, "no option sover; its options are epsilon, feature_metric"),
        (
            {"init": "normal", "solver": "exact"},
            TypeError,
            "no option solver; its options are none",
        ),
        ({"solver": "none"}, ValueError, "unknown solver"),
        ({"max_memory": 10}, ValueError, "the limit is 0.00"),
    ],
)
def test_bad_arguments_change_nothing(changes, error, match):
    model = make_model("olmoe")
    patch_model(model)
    arguments = {"init": "gromov_wasserstein", "features": clouds(12)[0], "num_delimiters": 2}
    with unchanged(model), pytest.raises(error, match=match):
        add_modality_tokens(model, "image", 14, **(arguments | changes))


def test_gaussian_rows_have_the_covariance_of_the_text_rows():
    text = torch.randn(300, 8) @ torch.randn(8, 8) + 3
    rows, report = initial_rows(text, num_tokens=20000, init="gaussian")
    assert report is None and set(ROW_INITS) >= {"gaussian", "permuted", "mean"}
    expected = torch.cov(text.T, correction=0)
    assert (torch.cov(rows.T) - expected).norm() / expected.norm() < 0.05
    assert (rows.mean(0) - text.mean(0)).norm() / text.std(0).norm() < 0.05
    normal, _ = initial_rows(text, num_tokens=20000, init="normal")
    assert (torch.cov(normal.T) - expected).norm() / expected.norm() > 0.2


class Largest(TorchDispatchMode):
    """Keep the bytes of the largest tensor that an op makes."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        if not function.is_view:
            self.nbytes = max([self.nbytes, *(each.nbytes for each in made)])
        return out


@pytest.mark.parametrize("init", ["normal", "mean"])
def test_no_copy_of_a_half_precision_table_is_made(init):
    """A table of a full-size model takes a gigabyte in float32, on every rank of a machine."""
    text = (torch.randn(4000, 520) * torch.rand(520) + 1).bfloat16()
    torch.manual_seed(0)
    with Largest() as largest:
        rows, _ = initial_rows(text, num_tokens=5, init=init)
    assert rows.dtype == torch.float32 and largest.nbytes < text.nbytes
    torch.manual_seed(0)
    expected, _ = initial_rows(text.float(), num_tokens=5, init=init)
    assert (rows - expected).norm() < 1e-5 * expected.norm()


# --- low-rank pairs


def reflected(n=60, size=12, rank=2, seed=0):
    """Return image inputs, the same reflected and reordered as text inputs, and the reflection M.

    M - I has the given rank. Reflections keep all distances, so the coupling must recover the order
    and the regression must recover M.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, size, generator=generator) * torch.linspace(0.5, 2, size)
    normals = torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q
    reflection = torch.eye(size) - 2 * normals @ normals.T
    order = torch.randperm(n, generator=generator)
    return image, (image @ reflection)[order], reflection


@pytest.mark.parametrize("experts", [(), (3,)], ids=["linear", "experts"])
def test_image_inputs_enter_the_weight_as_text(experts):
    image, text, reflection = reflected()
    weight = torch.randn(*experts, 7, 12)
    lora_a, lora_b = gromov_wasserstein_lora(
        image, text, weight, 2, scaling=0.5, ridge=1e-7, solver="exact"
    )
    assert lora_a.shape == (2, 12) and lora_b.shape == (*experts, 7, 2)
    out = image @ weight.mT + 0.5 * (image @ lora_a.T @ lora_b.mT)
    torch.testing.assert_close(out, image @ reflection @ weight.mT, atol=1e-3, rtol=1e-3)
    # An update of rank 1 instead of 2 fails the check, so the check is sharp.
    lora_a, lora_b = gromov_wasserstein_lora(image, text, weight, 1, ridge=1e-7, solver="exact")
    error = image @ weight.mT + image @ lora_a.T @ lora_b.mT - image @ reflection @ weight.mT
    assert error.norm() > 0.1 * out.norm()


@pytest.mark.parametrize("count", [9, 60], ids=["fewer inputs than features", "more"])
def test_the_map_is_the_truncated_ridge_regression(count):
    """The float64 definition: minimise ||Z D^T - R||^2 + lambda ||D||^2, then truncate the SVD."""
    inputs, outputs = torch.randn(count, 12), torch.randn(count, 12)
    down, up = truncated_map(inputs, outputs, 4, ridge=0.3)
    z, residual = inputs.double(), (outputs - inputs).double()
    strength = 0.3 * z.square().mean() * count
    full = torch.linalg.solve(z.T @ z + strength * torch.eye(12), z.T @ residual).T
    u, s, vh = torch.linalg.svd(full)
    expected = u[:, :4] * s[:4] @ vh[:4]
    torch.testing.assert_close((up @ down).double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((down @ down.T).diag().double(), s[:4], atol=1e-5, rtol=1e-4)


def test_ranks_beyond_the_map_can_still_learn():
    image, text, _ = reflected(rank=1)
    weight = torch.randn(7, 12)
    pairs = [
        gromov_wasserstein_lora(image, text, weight, 5, ridge=1e-9, solver="exact", seed=3)
        for _ in range(2)
    ]
    (lora_a, lora_b), again = pairs
    assert torch.equal(lora_a, again[0]) and torch.equal(lora_b, again[1])
    assert (lora_b[:, 1:] == 0).all() and (lora_b[:, 0] != 0).all()
    assert (lora_a != 0).all() and lora_a[1:].abs().max() <= 12**-0.5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight": torch.zeros(12)}, "weight must be"),
        ({"weight": torch.zeros(7, 11)}, r"image_inputs must be \(N, 11\) to fit the weight"),
        ({"text_inputs": torch.randn(9, 11)}, "text_inputs must be .*12"),
        ({"image_inputs": torch.full((9, 12), math.nan)}, "not finite"),
        ({"r": 0}, "must be above 0, got 0"),
        ({"scaling": 0.0}, "must be above 0"),
        ({"ridge": 0.0}, "must be above 0"),
        ({"solver": "none"}, "unknown solver"),
        ({"max_memory": 10}, "the limit is 0.00"),
    ],
)
def test_bad_arguments_of_the_pairs(changes, match):
    image, text, _ = reflected(9)
    arguments = {"image_inputs": image, "text_inputs": text, "weight": torch.zeros(7, 12), "r": 2}
    with pytest.raises(ValueError, match=match):
        gromov_wasserstein_lora(**(arguments | changes))

"""A product of parameters in ``make test-all``, of which ``make test`` runs a part."""

import itertools

import pytest


def each_pair(**axes):
    """Parametrise a test by the product of its axes, of which a part runs in ``make test``.

    Each two values of two axes meet in a case of that part. The other cases are marked slow: most
    faults show in one value or in two that meet.
    """
    cases = list(itertools.product(*axes.values()))
    fast = {cases.index(case) for case in covering(cases)}
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(
                *case, id="-".join(map(str, case)), marks=[] if at in fast else pytest.mark.slow
            )
            for at, case in enumerate(cases)
        ],
    )


def covering(cases):
    """Choose cases in which each pair of values that some case has occurs; few, not the fewest."""
    left = set().union(*map(pairs_of, cases))
    chosen = []
    for least in range(len(pairs_of(cases[0])), 0, -1):
        for case in cases:
            new = pairs_of(case) & left
            if len(new) >= least:
                chosen.append(case)
                left -= new
    return chosen


def pairs_of(case):
    """Return the pairs of a case's values, each value with the number of its axis."""
    return set(itertools.combinations(enumerate(map(str, case)), 2))

"""The part of a product of parameters that ``make test`` runs."""

import itertools

from support.covers import each_pair

AXES = {"a": [1, 2, 3], "b": ["x", None], "c": [False, True], "d": [(0, 1), (2, 3)]}


def test_each_pair_of_values_is_in_a_fast_case():
    mark = each_pair(**AXES)
    names, cases = mark.args
    assert names == tuple(AXES)
    assert [case.values for case in cases] == list(itertools.product(*AXES.values()))
    assert cases[0].id == "1-x-False-(0, 1)"
    fast = [case.values for case in cases if not case.marks]
    assert len(fast) < len(cases) / 2
    assert {mark.name for case in cases for mark in case.marks} == {"slow"}
    for (i, first), (j, second) in itertools.combinations(enumerate(AXES.values()), 2):
        for pair in itertools.product(first, second):
            assert any((case[i], case[j]) == pair for case in fast), pair

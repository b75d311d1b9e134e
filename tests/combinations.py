"""Which combinations of cases ordinary tests take, and which `make torture` takes too."""

import itertools

import pytest


def covering(combinations):
    """Parameters for `parametrize`; those beyond a set that has every pair of values are marked torture."""
    combinations = list(combinations)
    pairs = {
        combination: set(itertools.combinations(enumerate(map(repr, combination)), 2))
        for combination in combinations
    }
    left, chosen = set().union(*pairs.values()), set()
    while left:
        best = max(combinations, key=lambda combination: len(pairs[combination] & left))
        chosen.add(best)
        left -= pairs[best]
    return [
        pytest.param(*combination, marks=() if combination in chosen else pytest.mark.torture)
        for combination in combinations
    ]

"""Parameters along several axes: every pair of values in ``make test``, every combination in ``make test-all``."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def every_pair(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """``parametrize`` over all combinations of the axes' values, those marked ``slow`` that hold no new pair of values.

    Most faults need at most two settings at once to show. The choice is greedy, so it depends on nothing but the axes.
    """
    combinations = list(itertools.product(*(range(len(values)) for values in axes.values())))
    pairs = {one: set(itertools.combinations(enumerate(one), 2)) for one in combinations}
    left = set().union(*pairs.values())
    chosen = set()
    while left:
        best = max(combinations, key=lambda one: len(pairs[one] & left))
        chosen.add(best)
        left -= pairs[best]
    parameters = [
        pytest.param(
            *(values[place] for values, place in zip(axes.values(), one, strict=True)),
            marks=() if one in chosen else pytest.mark.slow,
            id="-".join(_named(name, values[place]) for (name, values), place in zip(axes.items(), one, strict=True)),
        )
        for one in combinations
    ]
    return pytest.mark.parametrize(tuple(axes), parameters)


def _named(axis: str, value: Any) -> str:
    if isinstance(value, bool):
        return axis if value else f"no_{axis}"
    return str(getattr(value, "__name__", value)).removeprefix("torch.")

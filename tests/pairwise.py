"""Few cases instead of all combinations: faults come from one option or from two that meet, seldom from three."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*columns: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value from each column, in which every two values of two columns meet at least once."""
    values = [list(column) for column in columns]
    rows = list(product(*(range(len(column)) for column in values)))

    def pairs(row: tuple[int, ...]) -> set[Any]:
        return set(combinations(enumerate(row), 2))

    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(column[i] for column, i in zip(values, row, strict=True)) for row in chosen]


def every_combination(*columns: Iterable[Any]) -> list[Any]:
    """All rows, for `pytest.mark.parametrize`; those beyond a pairwise choice are marked `long`."""
    values = [list(column) for column in columns]
    few = set(pairwise(*(range(len(column)) for column in values)))
    return [
        pytest.param(
            *(column[i] for column, i in zip(values, row, strict=True)), marks=() if row in few else pytest.mark.long
        )
        for row in product(*(range(len(column)) for column in values))
    ]

"""The numbers of parameters in the noise, so that no two draw the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_first_ordinal", "noise_ordinals"]


def noise_ordinals(param_groups: Sequence[Mapping[str, Any]]) -> list[range]:
    """The numbers of each param_group's parameters, which key their noise.

    Parameters are counted over all param_groups. A group with ``first_ordinal`` counts its own from there: for a caller
    that spreads a model's parameters over several optimizers, which would each count from 0 and draw the same noise.

    Example:
        >>> noise_ordinals([{"params": ["a", "b"]}, {"params": ["c"]}, {"params": ["d"], "first_ordinal": 7}])
        [range(0, 2), range(2, 3), range(7, 8)]
    """
    ranges = []
    counted = 0
    for group in param_groups:
        first = group.get("first_ordinal", counted)
        ranges.append(range(first, first + len(group["params"])))
        counted += len(group["params"])
    return ranges


def check_first_ordinal(group: Mapping[str, Any]) -> None:
    """Raise a ValueError if a param_group has a ``first_ordinal`` that is no number of a parameter."""
    first = group.get("first_ordinal", 0)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"Invalid first_ordinal: {first!r}, expected an integer >= 0; leave it out to count from 0")

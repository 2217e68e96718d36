"""Checks of options that several commands have."""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path

from signstep.lab.errors import BadInput


def check_minutes(value: float | None) -> None:
    """Raise BadInput for a --max-minutes that is not above 0; None means no limit."""
    if value is not None and not value > 0:
        raise BadInput(f"--max-minutes {value}: expected a number above 0")


def check_folder(folder: Path | None) -> None:
    """Raise BadInput for a --data that is no folder; None means that the option was left out."""
    if folder is not None and not folder.is_dir():
        raise BadInput(f"--data {folder}: there is no such folder; make it, or leave the option out")


def check_place(place: Path | None, datasets: Collection[str]) -> None:
    """Raise BadInput for a --data that these data sets cannot use: a file for "text" alone, a folder for the others."""
    if "text" not in datasets:
        check_folder(place)
    elif len(datasets) > 1:
        raise BadInput("--dataset text: give it alone, for --data names its file, and the folder of others")
    elif place is None or not place.is_file():
        raise BadInput("--dataset text: " + (f"--data {place} is no file" if place else "name its file with --data"))


_THOUSANDS = {"": 0, "k": 1, "m": 2, "b": 3, "g": 3, "t": 4}


def parse_count(text: str, *, least: int = 1) -> int:
    """A number of things as people write it: 4000000, 4e6, 250K, 11M, 1.5B.

    Args:
        text: a whole number, with an exponent or with K, M, B (or G) or T after it.
        least: the smallest that is allowed; the largest is 1e15.

    Raises:
        ValueError: another text, or out of range.

    >>> parse_count("11M"), parse_count("1.5B"), parse_count("4e6")
    (11000000, 1500000000, 4000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\+?\d{1,2})?)([kmbgt]?)", text.strip().lower().replace("_", ""))
    value = Decimal(found[1]) * 1000 ** _THOUSANDS[found[2]] if found else Decimal(0)
    if not (least <= value <= 10**15 and value == int(value)):
        raise ValueError(f"{text}: expected a whole number from {least} to 1e15, such as 4e6, 250K or 11M")
    return int(value)


def parse_shard(text: str) -> tuple[int, int]:
    """The i and n of --shard i/n.

    Raises:
        BadInput: not two whole numbers with i from 0 to n - 1.

    >>> parse_shard("0/2")
    (0, 2)
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise BadInput(f"--shard {text}: expected i/n with i from 0 to n - 1, as in 0/2")
    return int(index), int(count)

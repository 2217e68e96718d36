"""Checks of options that several commands have."""

from __future__ import annotations

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

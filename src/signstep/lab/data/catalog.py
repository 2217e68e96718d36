"""Which data sets there are, where each is looked for, and what is done where it is not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from signstep.lab.data import cifar, digits, idx
from signstep.lab.data.images import DataError, Images

_FORMATS = {"cifar10": cifar, "cifar100": cifar, "fashion-mnist": idx, "mnist": idx, "digits": digits}


@dataclass(frozen=True)
class Listed:
    """One line of `signstep data`."""

    name: str
    found: str | None
    how: str


def load(name: str, folder: Path | None = None, *, download: bool = True) -> Images:
    if name not in _FORMATS:
        raise DataError(f"data set {name!r}: expected one of {', '.join(_FORMATS)}")
    module = _FORMATS[name]
    if name == "digits":
        return module.read(name, Path())
    for place in search_path(folder):
        found = module.find(name, place)
        if found is not None:
            return module.read(name, found)
    raise DataError(f"{name} not found")


def search_path(folder: Path | None) -> list[Path]:
    named = [Path(p) for p in os.environ.get("SIGNSTEP_DATA", "").split(os.pathsep) if p]
    return [*([] if folder is None else [folder]), *named, Path("data"), cache_folder(), Path("/usr/share/datasets")]


def cache_folder() -> Path:
    return platformdirs.user_cache_path("signstep") / "data"


def listing() -> list[Listed]:
    return []


def demo_dataset() -> tuple[str, str]:
    return "digits", "stub"

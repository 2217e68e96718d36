"""Which data sets there are, where each is looked for, and what happens where it is not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import platformdirs

from signstep.lab.data import cifar, digits, folders, idx, text
from signstep.lab.data.images import DataError, Images
from signstep.lab.data.text import Text

_DEBIAN = Path("/usr/share/datasets")


T = TypeVar("T", Images, Text)


@dataclass(frozen=True)
class _OnDisk(Generic[T]):
    """A data set that lies in files; the functions are those of its format's module."""

    find: Callable[[str, Path], Path | None]
    fetch: Callable[[str, Path], Path]
    read: Callable[[str, Path], T]
    files: str
    origin: str
    installed: tuple[Path, ...] = ()
    """Where its package puts it, looked in after all others."""


_IMAGES: dict[str, _OnDisk[Images]] = {
    "cifar10": _OnDisk(
        cifar.find,
        cifar.fetch,
        cifar.read,
        files="cifar-10-batches-bin/ or cifar-10-batches-py/, or cifar-10-binary.tar.gz or cifar-10-python.tar.gz",
        origin="its mirrors (170 MB)",
    ),
    "cifar100": _OnDisk(
        cifar.find,
        cifar.fetch,
        cifar.read,
        files="cifar-100-binary/ or cifar-100-python/, or either as .tar.gz",
        origin="its mirrors (169 MB)",
    ),
    "fashion-mnist": _OnDisk(
        idx.find,
        idx.fetch,
        idx.read,
        files="fashion-mnist/ with its four idx files (.gz or not)",
        origin="Debian's package dataset-fashion-mnist or its mirrors (31 MB)",
    ),
    "mnist": _OnDisk(
        idx.find,
        idx.fetch,
        idx.read,
        files="mnist/ with its four idx files (.gz or not)",
        origin="its mirrors (12 MB)",
    ),
}
_TEXTS: dict[str, _OnDisk[Text]] = {
    "bible": _OnDisk(
        text.find,
        text.fetch,
        text.read,
        files="bible.data",
        origin="Debian's package bible-kjv-text (2 MB)",
        installed=(Path("/usr/lib"),),
    ),
    "shakespeare": _OnDisk(
        text.find,
        text.fetch,
        text.read,
        files="shakespeare/input.txt",
        origin="Karpathy's char-rnn on GitHub (1 MB)",
    ),
}
_ON_DISK: Mapping[str, _OnDisk[Images] | _OnDisk[Text]] = {**_IMAGES, **_TEXTS}


@dataclass(frozen=True)
class Listed:
    """One line of `signstep data`: where a data set was found (None: nowhere) and how to get it."""

    name: str
    found: str | None
    how: str


def load(name: str, folder: Path | None = None, *, download: bool = True, image_size: int | None = None) -> Images:
    """Return a data set, from the first place in `search_path(folder)` that has it.

    Args:
        name: "cifar10", "cifar100", "fashion-mnist", "mnist" or "digits"; or what `signstep.lab.data.folders.read`
            calls a folder of images.
        folder: looked in before all others; a download goes there, or to the user's cache where it is None. Of a folder
            of images that folder.
        image_size: of a folder of images, as of `folders.read`.
        download: fetch what was not found.

    Raises:
        DataError: the set was found nowhere and could not be fetched, or a file of it is damaged.

    >>> load("digits").test_x.shape
    torch.Size([360, 1, 8, 8])
    """
    if name.startswith(folders.PREFIX):
        if folder is None:
            raise DataError(f"{name}: say where the folder is, with --data {folders.PREFIX}PATH")
        found = folders.read(folder, image_size)
        if found.name != name:
            raise DataError(f"{folder} is {found.name}, and this run's images are {name}: the files differ")
        return found
    if name == "digits":
        return digits.read()
    if name not in _IMAGES:
        raise DataError(f"there is no data set {name!r}, expected {', '.join(_IMAGES)} or digits")
    return _IMAGES[name].read(name, _locate(name, folder, download))


def load_text(name: str, place: Path | None = None, *, download: bool = True) -> Text:
    """Return a text, from the first place in `search_path(place)` that has it.

    Args:
        name: "bible", "shakespeare", or "text", a file of the user's.
        place: of "text" the file, of the others a folder that is looked in before all others.
        download: fetch what was not found.

    Raises:
        DataError: the text was found nowhere and could not be fetched, or its file is damaged or too short.
    """
    if name == "text":
        if place is None:
            raise DataError("text: there is no file to read; name one with --data FILE")
        return text.read(name, place)
    if name not in _TEXTS:
        raise DataError(f"there is no text {name!r}, expected {', '.join(_TEXTS)} or text")
    return _TEXTS[name].read(name, _locate(name, place, download))


def listing(folder: Path | None = None) -> list[Listed]:
    """Say of every data set where `load` would find it and how to get it; nothing is fetched or read."""
    lines = []
    for name, data_set in _ON_DISK.items():
        how = f"fetched on first use from {data_set.origin}; or name a folder that has {data_set.files}"
        try:
            found = str(_locate(name, folder, download=False))
        except DataError:
            found = None
        lines.append(Listed(name, found, how))
    own = Listed("text", None, "any file: name it with --data FILE")
    return [*lines, own, Listed("digits", "scikit-learn", "comes with scikit-learn")]


def demo_dataset(folder: Path | None = None) -> tuple[str, str]:
    """Return the data set for a first run and why: "fashion-mnist" where it can be had, else "digits"."""
    try:
        return "fashion-mnist", f"found in {_locate('fashion-mnist', folder, download=True)}"
    except DataError as error:
        return "digits", f"the digits bundled with scikit-learn, because {error}"


def search_path(folder: Path | None = None) -> list[Path]:
    """Return where data is looked for, in order.

    `folder`, the folders in the environment variable SIGNSTEP_DATA (separated as in PATH), ./data, the user's cache,
    and where Debian puts data.
    """
    named = [Path(place) for place in os.environ.get("SIGNSTEP_DATA", "").split(os.pathsep) if place]
    first = [] if folder is None else [folder]
    return [*first, *named, Path("data"), _cache(), _DEBIAN]


def _cache() -> Path:
    return platformdirs.user_cache_path("signstep") / "data"


def _locate(name: str, folder: Path | None, download: bool) -> Path:
    data_set = _ON_DISK[name]
    target = _cache() if folder is None else folder
    looked = []
    for place in (*search_path(folder), *data_set.installed):
        looked.append(str(place) if place.is_dir() else f"{place} (no such folder)")
        try:
            found = data_set.find(name, place)
        except DataError:
            if download and place == target:
                continue  # a download of several files was cut between two of them and is continued below
            raise
        if found is not None:
            return found
    missing = f"{name} was not found in {', '.join(looked)}"
    advice = f"put {data_set.files} there or name their folder with --data or $SIGNSTEP_DATA"
    if not download:
        raise DataError(f"{missing}; {advice}")
    try:
        return data_set.fetch(name, target)
    except DataError as error:
        raise DataError(f"{missing}, and {error}; {advice}") from error

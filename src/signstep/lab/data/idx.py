"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., 2017): four idx files, gzipped or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from signstep.lab.data.debian import unpack_package
from signstep.lab.data.fetch import Archive, download
from signstep.lab.data.images import DataError, Images

SHAPES: dict[str, tuple[int, ...]] = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}

FOLDERS: dict[str, tuple[str, ...]] = {
    "mnist": ("mnist", "MNIST", "MNIST/raw"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
}

MIRRORS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": ("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",),
}
"""All over https; the authors' own servers, which answer over http alone, are left out."""

CHECKSUMS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion-mnist": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}
"""SHA-256 of the official .gz files, in the order of SHAPES. The authors publish MD5, if any; these are what several
libraries of data sets have computed from the same files.
"""

CLASSES: dict[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


def find(name: str, folder: Path) -> Path | None:
    """Return the folder with the idx files of `name` under `folder`, None where there is none.

    The two sets' files bear the same names, so only a folder's name tells them apart: `folder` itself is taken where
    it bears one of the names in FOLDERS. Raises DataError where there is only a folder that lacks some of the files.
    """
    places = [folder / known for known in FOLDERS[name]]
    places += [folder for known in FOLDERS[name] if folder.resolve().as_posix().endswith(f"/{known}")]
    incomplete = None
    for place in places:
        missing = [file for file in SHAPES if _variant(place, file) is None]
        if not missing:
            return place
        if len(missing) < len(SHAPES):
            incomplete = DataError(
                f"{name}: {place} lacks {', '.join(missing)} (.gz or not); put them there or remove the others"
            )
    if incomplete is not None:
        raise incomplete
    return None


def fetch(name: str, folder: Path) -> Path:
    """Put the idx files of `name` into a folder of its name in `folder` and return that.

    Fashion-MNIST is first asked of Debian, MNIST comes from its mirrors alone. Raises DataError where neither has it.
    """
    place = folder / name
    failure = ""
    if name == "fashion-mnist":
        try:
            unpack_package("dataset-fashion-mnist", f"usr/share/datasets/{name}", place)
        except DataError as error:
            failure = f"{error}; "
    try:
        for file, digest in zip(SHAPES, CHECKSUMS[name], strict=True):
            if _variant(place, file) is None:
                gz = f"{file}.gz"
                download(Archive(gz, digest, tuple(mirror + gz for mirror in MIRRORS[name])), place)
    except DataError as error:
        raise DataError(f"{failure}{error}") from error
    return place


def read(name: str, path: Path) -> Images:
    """Read what `find` found; raises DataError naming the file where one is damaged, cut or of another shape."""
    arrays: dict[str, npt.NDArray[np.uint8]] = {}
    for file, shape in SHAPES.items():
        variant = _variant(path, file)
        if variant is None:
            raise DataError(f"{name}: {path} lacks {file}")
        arrays[file] = _read_idx(variant, shape, name)
        if "labels" in file and arrays[file].max() >= len(CLASSES[name]):
            raise DataError(
                f"{name}: {variant} has labels up to {arrays[file].max()}, expected 0..{len(CLASSES[name]) - 1}: "
                "it is damaged or of another data set"
            )
    train_x, train_y, test_x, test_y = (torch.from_numpy(array) for array in arrays.values())
    return Images(
        name=name,
        train_x=train_x.unsqueeze(1),
        train_y=train_y.long(),
        test_x=test_x.unsqueeze(1),
        test_y=test_y.long(),
        classes=CLASSES[name],
        source=str(path),
    )


def _variant(place: Path, file: str) -> Path | None:
    return next((place / v for v in (file, f"{file}.gz") if (place / v).is_file()), None)


def _read_idx(path: Path, shape: tuple[int, ...], name: str) -> npt.NDArray[np.uint8]:
    # An idx file of bytes: two zero bytes, type 8, the number of dimensions, each dimension as big-endian uint32, data.
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    size = len(header) + math.prod(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(size + 1)
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{name}: {path} cannot be read whole ({error}); remove it and fetch it again") from error
    found = raw[: len(header)]
    if found[:4] != header[:4]:
        raise DataError(
            f"{name}: {path} starts with {found[:4].hex() or 'nothing'}, expected the idx header {header[:4].hex()} "
            f"({len(shape)} dimensions of bytes)"
        )
    if found != header:
        sizes = struct.unpack(f">{len(found[4:]) // 4}I", found[4 : 4 + len(found[4:]) // 4 * 4])
        raise DataError(f"{name}: {path} says it holds {sizes} values, expected {shape}")
    if len(raw) != size:
        less = f"{len(raw)}" if len(raw) < size else "more"
        raise DataError(f"{name}: {path} holds {less} bytes, expected {size}")
    # bytearray: torch wants memory it may write to.
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=len(header)).reshape(shape)

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
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": (
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
}

# MD5 of the official .gz files, in the order of SHAPES.
CHECKSUMS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}

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
        for file, md5 in zip(SHAPES, CHECKSUMS[name], strict=True):
            if _variant(place, file) is None:
                gz = f"{file}.gz"
                download(Archive(gz, md5, tuple(mirror + gz for mirror in MIRRORS[name])), place)
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

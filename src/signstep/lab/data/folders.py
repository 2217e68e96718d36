"""A folder of images, one folder in it for each class: read by Pillow, decoded once, and kept in the user's cache.

pets/cat/1.jpg  pets/dog/2.png                       a fifth of each class, always the same, is the test part
pets/train/cat/1.jpg  pets/val/cat/2.jpg  ...        the parts are those of the folder: train, and val or test
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from signstep.lab.data.images import DataError, Images
from signstep.lab.output.files import locked, make_folder, replacing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""How the names of the files end that are read, in small or capital letters; others are left alone."""
PREFIX = "folder:"
"""What the name of such a data set begins with."""
_SPLIT_SEED = 20261129
_TEST = 5
"""One image of so many is for the test part, where the folder has none."""


def read(folder: Path, image_size: int | None = None) -> Images:
    """The images of a folder, as RGB; from the cache where no file has changed since they were decoded.

    Args:
        folder: its folders are the classes, in the order of their names, or ``train`` and ``val`` (else ``test``), each
            with a folder for each class. Images may lie deeper in a class.
        image_size: cut the largest square out of the middle of each image and resize it to so many pixels a side; None:
            the images are as they are, and of one size.

    Returns:
        Images whose name is ``folder:NAME@DIGEST``: the folder's name, and 12 hex digits that change with the name, the
        class or the content of any file.

    Raises:
        DataError: no such folder, no classes, a class without images, a file that is no image, or images of different
            sizes; the message names the first that is so.
    """
    if not folder.is_dir():
        raise DataError(f"{PREFIX}{folder}: there is no such folder; name one that has a folder of images per class")
    place = folder.resolve()
    parts = _parts(place)
    files = [file for classes in parts.values() for images in classes.values() for file in images]
    listed = [(file.relative_to(place).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(listed).encode()).hexdigest()
    home = platformdirs.user_cache_path("signstep") / "folders"
    make_folder(home)
    cached = home / f"{hashlib.sha256(repr((str(place), image_size)).encode()).hexdigest()[:16]}.pt"
    # Under a lock, so that of several workers one decodes and the others wait for it.
    with locked(cached.with_suffix(".lock")):
        found = _cached(cached, key)
        if found is None:
            found = {"key": key, **_decoded(place, parts, image_size)}
            with replacing(cached) as file:
                torch.save(found, file)
    return Images(
        name=f"{PREFIX}{place.name}@{found['digest']}",
        train_x=found["train_x"],
        train_y=found["train_y"],
        test_x=found["test_x"],
        test_y=found["test_y"],
        classes=tuple(found["classes"]),
        source=str(folder),
    )


def _cached(path: Path, key: str) -> dict[str, Any] | None:
    """What was decoded before, if it is of these files; a damaged file is as none."""
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found if found["key"] == key else None
    except FileNotFoundError:
        return None
    except Exception:  # what torch.load raises of damaged bytes is not documented; they are decoded anew
        return None


def _folders(place: Path) -> list[Path]:
    return sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith("."))


def _parts(place: Path) -> dict[str, dict[str, list[Path]]]:
    """The files by part ("train" and "test", or "" alone) and class."""
    inside = {each.name: each for each in _folders(place)}
    test = next((inside[name] for name in ("val", "test") if name in inside), None)
    if "train" not in inside:
        return {"": _classes(place)}
    if test is None:
        raise DataError(f"{place} has train, but neither val nor test: add one of them, or put the classes in {place}")
    parts = {"train": _classes(inside["train"]), "test": _classes(test)}
    for name in parts["test"]:
        if name not in parts["train"]:
            raise DataError(f"{test / name}: there is no class {name} in {inside['train']}")
    return parts


def _classes(place: Path) -> dict[str, list[Path]]:
    classes = {}
    for folder in _folders(place):
        files = (each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
        classes[folder.name] = sorted(files)
        if not classes[folder.name]:
            raise DataError(f"{folder}: this class has no images ({', '.join(SUFFIXES)}); add some, or remove it")
    if len(classes) < 2:
        raise DataError(f"{place} has {len(classes)} folders with images: expected a folder for each of two classes")
    return classes


def _decoded(place: Path, parts: dict[str, dict[str, list[Path]]], image_size: int | None) -> dict[str, Any]:
    """Tensors, classes and digest of the files."""
    classes = sorted(next(iter(parts.values())))
    digest = hashlib.sha256()
    decoded: dict[str, tuple[Tensor, Tensor]] = {}
    first = None
    for part, by_class in parts.items():
        named = [(classes.index(name), file) for name in sorted(by_class) for file in by_class[name]]
        x: Tensor | None = None
        for row, (_, file) in enumerate(named):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(place).as_posix()}\0{hashlib.sha256(content).hexdigest()}\n".encode())
            pixels = _pixels(content, file, image_size)
            first = first or (file, pixels.shape)
            if pixels.shape != first[1]:
                (h0, w0), (h1, w1) = first[1][1:], pixels.shape[1:]
                raise DataError(
                    f"{first[0]} is {w0} x {h0} pixels and {file} is {w1} x {h1}: images of one size are needed; "
                    "--image-size 64 cuts and resizes every one of them to 64 x 64"
                )
            if x is None:
                x = torch.empty((len(named), *pixels.shape), dtype=torch.uint8)
            x[row] = pixels
        assert x is not None  # a class without images has been refused
        decoded[part] = x, torch.tensor([label for label, _ in named], dtype=torch.int64)
    if "" in decoded:
        x, y = decoded[""]
        train, test = _split(y, classes, place)
        decoded = {"train": (x[train], y[train]), "test": (x[test], y[test])}
    (train_x, train_y), (test_x, test_y) = decoded["train"], decoded["test"]
    tensors = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    return {**tensors, "classes": classes, "digest": digest.hexdigest()[:12]}


def _pixels(content: bytes, file: Path, image_size: int | None) -> Tensor:
    """uint8 [3, H, W]."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
            if image_size is not None:
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "Pillow knows no such format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{file} cannot be read as an image ({reason}); replace or remove it") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _split(labels: Tensor, classes: Sequence[str], place: Path) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to test on, of each class one in `_TEST` and at least one of either."""

    def of_each_class() -> Iterator[tuple[Tensor, Tensor]]:
        draw = np.random.RandomState(_SPLIT_SEED)
        for label, name in enumerate(classes):
            rows = (labels == label).nonzero().flatten()
            if len(rows) < 2:
                raise DataError(f"{place / name} has one image: a class needs one to train on and one to test on")
            rows = rows[torch.from_numpy(draw.permutation(len(rows)))]
            held = max(1, len(rows) // _TEST)
            yield rows[held:].sort().values, rows[:held].sort().values

    train, test = zip(*of_each_class(), strict=True)
    return torch.cat(train), torch.cat(test)

"""`signstep data`: which data sets there are, and where."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from signstep.lab.arguments import check_place
from signstep.lab.errors import BadInput
from signstep.lab.training.config import Dataset
from signstep.lab.training.tasks import FOLDER, TEXTS, is_name


@dataclass(frozen=True)
class Data:
    """List the data sets and where each was found, or get one."""

    action: Annotated[Literal["list", "get"], tyro.conf.Positional] = "list"
    """What to do."""
    names: Annotated[tuple[Dataset, ...], tyro.conf.Positional] = ()
    """The sets to get."""
    data: Path | None = None
    """Folder to look in first."""

    def run(self) -> int:
        from signstep.lab.data import listing, load, load_text

        check_place(self.data, self.names)
        if self.action == "get":
            if not self.names:
                raise BadInput("data get: name the sets to get, as in: signstep data get cifar10")
            for name in self.names:
                if name in TEXTS:
                    text = load_text(name, self.data)
                    size = len(text.train) + len(text.validation)
                    print(f"{name}: {size} training and {len(text.test)} test bytes from {text.source}")
                    continue
                images = load(name, self.data)
                print(
                    f"{name}: {len(images.train_x)} training and {len(images.test_x)} test images from {images.source}"
                )
            return 0
        # A line each, for the terminal to fold: a path can be read and copied whole.
        for each in listing(self.data):
            print(f"{each.name}: {each.found or (each.how if each.name == 'text' else f'not here; {each.how}')}")
        return 0


def place_of(data: str | None) -> Path | None:
    """The folder or file that a --data names, if it names one; "folder:" may stand before it.

    >>> place_of("folder:pets").name, place_of("package.module:function")
    ('pets', None)
    """
    return None if data is None or _is_function(data) else Path(data.removeprefix(FOLDER))


def named_by(data: str | None, image_size: int | None) -> str | None:
    """The name of the data set of the user's own that a --data names, if it does.

    A folder is read for it: its name has a digest of the files.
    """
    if data is None or not (data.startswith(FOLDER) or _is_function(data)):
        return None
    if _is_function(data):
        return data
    from signstep.lab.data import folders

    return folders.read(Path(data.removeprefix(FOLDER)), image_size).name


def _is_function(data: str) -> bool:
    return is_name(data) and not data.startswith(FOLDER) and not Path(data).exists()


def say_where(names: Collection[str], folder: Path | None) -> None:
    """Print which of these data sets are not in the folder of --data, and where they are instead."""
    if folder is None or "text" in names:
        return
    from signstep.lab.data import listing

    for each in listing(folder):
        if each.name in names and each.found is not None and not Path(each.found).is_relative_to(folder):
            print(f"{each.name} is not in {folder}: found in {each.found}")

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
from signstep.lab.training.tasks import TEXTS


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


def say_where(names: Collection[str], folder: Path | None) -> None:
    """Print which of these data sets are not in the folder of --data, and where they are instead."""
    if folder is None or "text" in names:
        return
    from signstep.lab.data import listing

    for each in listing(folder):
        if each.name in names and each.found is not None and not Path(each.found).is_relative_to(folder):
            print(f"{each.name} is not in {folder}: found in {each.found}")

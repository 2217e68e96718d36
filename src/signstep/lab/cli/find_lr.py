"""`signstep find-lr`: a range test for the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from signstep.lab.arguments import check_place
from signstep.lab.cli.commands import parse, run
from signstep.lab.cli.data import place_of
from signstep.lab.cli.train import default_config
from signstep.lab.paper.experiments import dataset_title
from signstep.lab.training.config import RunConfig


@dataclass(frozen=True)
class FindLr:
    """Suggest a learning rate: train for some steps while it rises, and see where the loss falls.

    Options of the run are those of signstep train; nothing of it is kept but the picture.
    """

    low: float = 1e-6
    """The first learning rate."""
    high: float = 10.0
    """The last one; the test ends before it where the loss has grown far."""
    steps: int = 100
    """Steps from the one to the other."""
    data: str | None = None
    """As of signstep train."""
    out: Path = Path("find-lr")
    """Folder of the picture, find-lr.png."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    def run(self) -> int:
        from signstep.lab.output import figures
        from signstep.lab.output.files import write_bytes
        from signstep.lab.training import lr_range

        data = place_of(self.data)
        check_place(data, [self.config.dataset])
        found = lr_range.measure(self.config, data, self.device, low=self.low, high=self.high, steps=self.steps)
        picture = self.out / "find-lr.png"
        title = f"{self.config.optimizer} on {dataset_title(self.config.dataset)}"
        write_bytes(picture, figures.png(lr_range.draw(found, title)))
        print(f"picture: {picture}")
        if found.suggestion is None:
            print("no suggestion: the loss did not fall between these rates; look at the picture, and try others")
        else:
            print(f"suggested for a start: --lr {found.suggestion:.2g}; tune around it, over whole runs")
        return 0


def main(arguments: Sequence[str]) -> int:
    default = FindLr(config=default_config(arguments))
    return run(parse(FindLr, arguments, prog="signstep find-lr", default=default))

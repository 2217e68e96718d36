"""`signstep compare`: optimizers on a model and data of the user's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from signstep.lab.arguments import check_minutes, parse_shard
from signstep.lab.cli.data import named_by, place_of
from signstep.lab.errors import BadInput
from signstep.lab.output.command import command_line


@dataclass(frozen=True)
class Compare:
    """Compare optimizers on your own model and data: tuned alike, with seeds, intervals and a report.

    The same command goes on with what was stopped, and trains nothing twice.
    """

    model: str
    """package.module:factory, timm:NAME, torchvision:NAME, or one of the lab's, as resnet8."""
    data: str
    """folder:PATH, with a folder of images for each class, or package.module:function, which returns (train_set,
    val_set), or with a third set to tune on."""
    methods: tuple[str, ...] = ("adamw", "sgd", "signsgd", "dither", "lion", "hybrid")
    """What to compare: these, hybrid-paper, or rows of the lab's presets."""
    image_size: int | None = None
    """Side of the square that each image of a folder is cut and resized to; None: they are of one size."""
    loss: str | None = None
    """package.module:function of outputs and targets; None: the cross-entropy."""
    metric: str | None = None
    """package.module:function of outputs and targets; None: accuracy."""
    better: Literal["higher", "lower"] = "higher"
    """Which values of the metric are."""
    epochs: int = 10
    """Of every run, those that tune the learning rates too."""
    batch_size: int = 128
    """Of every run."""
    subset: int | None = None
    """Train on this many examples only; None: all."""
    trials: int = 4
    """Points of every method's grid of learning rates."""
    seeds: int = 3
    """Final runs of every method, with seeds 0, 1, ..."""
    version: str = ""
    """Of model, data and functions: after a change of their code give another one, or another --out."""
    out: Path = Path("comparison")
    """Folder of records and report."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    max_minutes: float | None = None
    """Stop after this many minutes; the same command goes on."""
    shard: str = "0/1"
    """i/n: do the i-th of n shares of the work, i from 0."""

    def run(self) -> int:
        from signstep.lab.paper.comparison import Comparison

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput("torchrun's workers train one run together: use --shard here, for several runs at a time")
        check_minutes(self.max_minutes)
        shard = parse_shard(self.shard)
        name = named_by(self.data, self.image_size)
        if name is None:
            raise BadInput(f"--data {self.data}: expected folder:PATH, or package.module:function")
        fields = ("model", "image_size", "loss", "metric", "better", "epochs", "batch_size", "subset", "version")
        options: dict[str, Any] = {field: value for field in fields if (value := getattr(self, field)) is not None}
        results = Comparison(name, options, self.methods, data=place_of(self.data)).run(
            self.out,
            trials=self.trials,
            seeds=self.seeds,
            commands=[command_line(["compare"], self)],
            device=self.device,
            max_minutes=self.max_minutes,
            shard=shard,
        )
        for row in results.experiment.rows:
            print(f"{results.cells[row.key, name].text}  {row.label}")
        return 0

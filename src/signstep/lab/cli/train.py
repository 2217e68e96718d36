"""`signstep train`: one run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, cast

import tyro

from signstep.lab.arguments import check_minutes, check_place
from signstep.lab.cli.commands import parse
from signstep.lab.cli.data import named_by, place_of, say_where
from signstep.lab.paper import experiments
from signstep.lab.paper.experiments import Name, Recipe, Scale
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.optimizers import OPTIMIZERS, known_optimizer

_INTERRUPTED = 130
_DIVERGED = 1


@dataclass(frozen=True)
class Train:
    """Train one run; the same command again goes on with it.

    Options of the run override those of --preset. Without --lr each optimizer has a learning rate of its own: RATES. An
    option that is None has the optimizer's own default.
    """

    vote: bool = False
    """Short for --reduce vote: workers that torchrun has started vote with one bit per weight."""
    preset: str | None = None
    """Start from a row of an experiment, as in table1/pre-0.1."""
    scale: Scale = "cpu"
    """The preset's scale."""
    recipe: Recipe = "strong"
    """The preset's recipe."""
    out: Path = Path("runs")
    """Folder of the run's files, which are named by the hash of its configuration."""
    data: str | None = None
    """Folder to look for the images in first, or the file of --dataset text. Your own in place of --dataset:
    folder:PATH, with a folder of images for each class, or package.module:function, which returns (train_set, val_set).
    """
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    max_minutes: float | None = None
    """Stop, with a checkpoint, after this many minutes."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    tensorboard: bool = False
    """Write the numbers for TensorBoard as well."""
    watch: int | None = None
    """Put a monitor on the run that measures every so many steps; its records go to <out>/monitor/<hash>.jsonl."""
    watch_micro_batches: int = 16
    """Parts of the batch that the monitor compares."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    def run(self) -> int:
        """Train, and say how it ended; the exit code."""
        from signstep.lab.training.loop import train
        from signstep.lab.training.records import is_done, read_run
        from signstep.lab.training.watch import Watching
        from signstep.optim import step_length

        check_minutes(self.max_minutes)
        data = place_of(self.data)
        check_place(data, [self.config.dataset])
        config = replace(self.config, reduce="vote") if self.vote else self.config
        first = os.environ.get("RANK", "0") == "0"
        path = self.out / f"{config.hash}.jsonl"
        ended = first and is_done(path)
        if first and not ended:
            say_where([config.dataset], data)
            if known_optimizer(config.optimizer).signs and (said := step_length.advice(config.lr)):
                print(f"{config.optimizer}: {said}", file=sys.stderr)
        status = train(
            config,
            self.out,
            data=data,
            device=self.device,
            max_minutes=self.max_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
            tensorboard=self.tensorboard,
            watching=None if self.watch is None else Watching(self.watch, self.watch_micro_batches),
        )
        if not first:
            return 0
        if status in ("stopped", "interrupted"):
            print(f"stopped; the same command goes on with {path}")
            return 0 if status == "stopped" else _INTERRUPTED
        run = read_run(path)
        if ended:
            print("nothing was trained: this run has ended before")
        if run.diverged:
            assert run.end is not None
            print(f"diverged: {run.end.get('reason', 'a loss was not finite')}; see {path}")
        else:
            what = run.metric.text(run.result) + (" accuracy" if run.metric.unit == "%" else "")
            print(f"done: {what} after the last epoch; see {path}")
        if ended:
            saved = path.with_suffix(".pt")
            files = f"{path} and {saved}" if saved.exists() else path
            print(f"to train it anew, delete {files}; or choose another --seed or --out")
        return _DIVERGED if run.diverged else 0


_RATES = ", ".join(f"{name} {known.lr:g}" for name, known in OPTIMIZERS.items())
Train.__doc__ = str(Train.__doc__).replace("RATES", _RATES)


@dataclass(frozen=True)
class _Chosen:
    """The options that the defaults of the others depend on. Whether their values are allowed, `Train` says."""

    vote: bool = False
    preset: str | None = None
    scale: str = "cpu"
    recipe: str = "strong"
    dataset: str = "cifar10"
    optimizer: str = ""
    reduce: str = "mean"
    data: str | None = None
    image_size: int | None = None


def default_config(arguments: Sequence[str]) -> RunConfig:
    """The run that `signstep train` starts from.

    It is that of --preset if there is one, with the learning rate of --optimizer, for a vote or another reduction
    with torchrun's number of workers, and on the data that --data names if they are the user's own.

    Args:
        arguments: the words after `signstep train`; most are not looked at here.

    Example:
        >>> default_config(["--optimizer", "signsgd", "--epochs", "3"]).lr
        0.00316
    """
    chosen, _ = tyro.cli(_Chosen, args=arguments, prog="signstep train", add_help=False, return_unknown_args=True)
    config = RunConfig()
    if chosen.preset is not None:
        name, _, key = chosen.preset.partition("/")
        scale, recipe, dataset = cast(Scale, chosen.scale), cast(Recipe, chosen.recipe), cast(Dataset, chosen.dataset)
        experiment = experiments.load(cast(Name, name), scale=scale, recipe=recipe, datasets=[dataset])
        config = experiment.row(key).config(dataset)
    if chosen.optimizer in OPTIMIZERS and chosen.optimizer != config.optimizer:
        config = replace(config, lr=OPTIMIZERS[chosen.optimizer].lr)
    if (own := named_by(chosen.data, chosen.image_size)) is not None:
        config = replace(config, dataset=own, image_size=chosen.image_size)
    if (chosen.vote or chosen.reduce != "mean") and "WORLD_SIZE" in os.environ:
        config = replace(config, workers=int(os.environ["WORLD_SIZE"]))
    return config


def main(arguments: Sequence[str]) -> int:
    default = Train(config=default_config(arguments))
    return parse(Train, arguments, prog="signstep train", default=default).run()

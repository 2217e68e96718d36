"""The command `signstep`: data, train, sweep, reproduce, report, demo.

    signstep data get cifar10
    signstep train --dataset cifar10 --optimizer signsgd --lr 1e-3
    signstep sweep table1 --scale cpu
    signstep reproduce all --scale cpu --seeds 3 --max-minutes 60

Exit code 0: done, or stopped by --max-minutes (the last line says what is left); 1: `train` diverged; 2: bad input, one
sentence on stderr; 130: stopped by Ctrl-C or SIGTERM. torch, data and training are imported by the command that needs
them.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro
from rich.console import Console

from signstep.lab import experiments
from signstep.lab.config import Dataset, RunConfig
from signstep.lab.experiments import Experiment, Name, Recipe, Scale

# Comments that group a dataclass's fields are not their help.
_TYRO = (tyro.conf.HelptextFromCommentsOff,)
_BAD_INPUT = 2
_INTERRUPTED = 130
_DIVERGED = 1


def _say(line: str) -> None:
    print(line, flush=True)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {text}: expected i/n with i from 0 to n - 1, as in 0/2")
    return int(index), int(count)


def _check_minutes(value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"--max-minutes {value}: expected a number above 0")


@dataclass(frozen=True)
class _Trainer:
    """`signstep.lab.train.train` with a command's options, as sweep and reproduce call it."""

    data: Path | None
    device: str

    def __call__(self, config: RunConfig, out: Path, minutes: float | None) -> str:
        from signstep.lab.train import RunBusy, train

        started = time.monotonic()
        try:
            status = train(config, out, data=self.data, device=self.device, max_minutes=minutes)
        except RunBusy:
            return "busy"
        # The loop stops at its time limit or at a signal, and says "stopped" for both.
        if status == "stopped" and (minutes is None or time.monotonic() - started < 60 * minutes):
            raise KeyboardInterrupt
        return status


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
        from rich.table import Table

        from signstep.lab.data import listing, load

        if self.action == "get":
            if not self.names:
                raise ValueError("data get: name the sets to get, as in: signstep data get cifar10")
            for name in self.names:
                images = load(name, self.data)
                _say(
                    f"{name}: {len(images.train_x)} training and {len(images.test_x)} test images from {images.source}"
                )
            return 0
        table = Table("data set", "found", "how to get it")
        for each in listing():
            table.add_row(each.name, each.found or "no", each.how)
        Console().print(table)
        return 0


@dataclass(frozen=True)
class Train:
    """Train one run; the same command again goes on with it. Options of the run override those of --preset."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    preset: str | None = None
    """Start from a row of an experiment, as in table1/pre-0.1."""
    scale: Scale = "cpu"
    """Of the preset."""
    recipe: Recipe = "strong"
    """Of the preset."""
    out: Path = Path("runs")
    """Folder of the run's files, which are named by the hash of its configuration."""
    data: Path | None = None
    """Folder to look for the images in first."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    max_minutes: float | None = None
    """Stop, with a checkpoint, after this many minutes."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    tensorboard: bool = False
    """Write the numbers for TensorBoard as well."""

    def run(self) -> int:
        from signstep.lab.runs import read_run
        from signstep.lab.train import train

        _check_minutes(self.max_minutes)
        started = time.monotonic()
        status = train(
            self.config,
            self.out,
            data=self.data,
            device=self.device,
            max_minutes=self.max_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
            tensorboard=self.tensorboard,
        )
        if int(os.environ.get("RANK", "0")) != 0:
            return 0
        path = self.out / f"{self.config.hash}.jsonl"
        if status == "stopped":
            _say(f"stopped; the same command goes on with {path}")
            limit = self.max_minutes is not None and time.monotonic() - started >= 60 * self.max_minutes
            return 0 if limit else _INTERRUPTED
        run = read_run(path)
        if run.diverged:
            assert run.end is not None
            _say(f"diverged: {run.end.get('reason', 'a loss was not finite')}; see {path}")
            return _DIVERGED
        _say(f"done: {run.final_accuracy:.2f} % accuracy after the last epoch; see {path}")
        return 0


@dataclass(frozen=True)
class _Experiments:
    experiment: Annotated[Name | Literal["all"], tyro.conf.Positional] = "all"
    """Which of the paper's results."""
    scale: Scale = "cpu"
    """smoke: seconds; demo: minutes; cpu: hours on two cores; full: one GPU."""
    recipe: Recipe = "strong"
    """paper: what the paper's text says; strong: what a reviewer would accept."""
    dataset: tuple[Dataset, ...] = ()
    """Data sets instead of the paper's."""
    out: Path = Path("results")
    """Results go to <out>/<scale>-<recipe>."""

    @property
    def folder(self) -> Path:
        return self.out / f"{self.scale}-{self.recipe}"

    def load(self) -> tuple[Experiment, ...]:
        return experiments.load_all(
            self.experiment, scale=self.scale, recipe=self.recipe, datasets=self.dataset or None
        )

    def write_reports(self, chosen: Sequence[Experiment], seeds: int) -> None:
        """Write what the runs in `folder` show, and name the reports."""
        from signstep.lab.reproduce import write_reports
        from signstep.lab.sweep import read_tuned

        tuned = read_tuned(self.folder)
        which = [self.experiment, "--scale", self.scale, "--recipe", self.recipe]
        which += ["--dataset", *self.dataset] if self.dataset else []
        keys = {(dataset, row.key) for e in chosen for dataset in e.datasets for row in e.rows}
        choices = [choice for d, rows in tuned.items() for key, choice in rows.items() if (d, key) in keys]
        grids = sorted({len(choice["trials"]) - choice["extensions"] for choice in choices})
        commands = [["sweep", *which, "--trials", str(trials)] for trials in grids]
        commands.append(["reproduce", *which, "--seeds", str(seeds)])
        lines = [shlex.join(["signstep", *command]) for command in commands]
        for page in write_reports(chosen, self.folder, seeds=seeds, tuned=tuned, commands=lines):
            _say(f"table: {page.with_suffix('.md')}")
            _say(f"report: {page}")


@dataclass(frozen=True)
class _Trained(_Experiments):
    data: Path | None = None
    """Folder to look for the images in first."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    max_minutes: float | None = None
    """Stop after this many minutes; the same command goes on."""
    shard: str = "0/1"
    """i/n: do the i-th of n shares of the work, i from 0."""

    def check(self) -> tuple[int, int]:
        """The shard's i and n; ValueError for options that fit nothing."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "torchrun's workers train one run together: use it with signstep train, "
                "and --shard here to train several runs at the same time"
            )
        _check_minutes(self.max_minutes)
        return _shard(self.shard)


@dataclass(frozen=True)
class Sweep(_Trained):
    """Tune every method's learning rate with the same number of trials on held-out training images."""

    trials: int = 5
    """Points of every method's learning rate grid."""

    def run(self) -> int:
        from signstep.lab.runs import read_runs
        from signstep.lab.sweep import sweep

        shard = self.check()
        over = sweep(
            self.load(),
            self.folder,
            train=_Trainer(self.data, self.device),
            read=read_runs,
            trials=self.trials,
            max_minutes=self.max_minutes,
            shard=shard,
            say=_say,
        )
        if over:
            _say(f"every method is tuned: {self.folder / 'tuned.json'}")
        return 0


@dataclass(frozen=True)
class Reproduce(_Trained):
    """Train what the table or figures still lack, then write them with a report."""

    seeds: int = 3
    """Runs of every row, with seeds 0, 1, ..."""

    def run(self) -> int:
        from signstep.lab.reproduce import reproduce, run_is_done
        from signstep.lab.sweep import read_tuned

        shard = self.check()
        chosen = self.load()
        reproduce(
            chosen,
            self.folder,
            seeds=self.seeds,
            tuned=read_tuned(self.folder),
            train=_Trainer(self.data, self.device),
            done=run_is_done,
            max_minutes=self.max_minutes,
            shard=shard,
            say=_say,
        )
        self.write_reports(chosen, self.seeds)
        return 0


@dataclass(frozen=True)
class Report(_Experiments):
    """Write tables, figures and report from the runs there are; train nothing."""

    seeds: int = 3
    """Seeds 0 to this less one are counted."""

    def run(self) -> int:
        self.write_reports(self.load(), self.seeds)
        return 0


@dataclass(frozen=True)
class Demo:
    """Train Table I's rows on Fashion-MNIST in a few minutes and write the report."""

    out: Path = Path("results")
    """The results go to <out>/demo-strong."""
    data: Path | None = None
    """Folder to look for the images in first."""
    max_minutes: float | None = 9.0
    """Stop after this many minutes; the same command goes on."""
    seeds: int = 2
    """Runs of every row."""

    def run(self) -> int:
        from signstep.lab.data import demo_dataset

        name, reason = demo_dataset(self.data)
        _say(f"data set {name}: {reason}")
        return Reproduce(
            experiment="table1",
            scale="demo",
            dataset=(cast(Dataset, name),),
            out=self.out,
            data=self.data,
            max_minutes=self.max_minutes,
            seeds=self.seeds,
        ).run()


_Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def _preset(arguments: Sequence[str]) -> RunConfig:
    """The defaults of `signstep train`: those of its --preset, if it has one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--preset", "--scale", "--recipe", "--dataset"):
        parser.add_argument(option)
    known = parser.parse_known_args(list(arguments))[0]
    if known.preset is None:
        return RunConfig()
    name, _, key = known.preset.partition("/")
    dataset = known.dataset or "cifar10"
    experiment = experiments.load(name, scale=known.scale or "cpu", recipe=known.recipe or "strong", datasets=[dataset])
    return experiment.row(key).config(dataset)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # labels have Greek letters and arrows
    try:
        if arguments[:1] == ["train"]:
            default = Train(config=_preset(arguments[1:]))
            command: Data | Train | Sweep | Reproduce | Report | Demo = tyro.cli(
                Train, args=arguments[1:], default=default, prog="signstep train", config=_TYRO
            )
        else:
            command = tyro.cli(_Command, args=arguments, prog="signstep", description=__doc__, config=_TYRO)
        code = command.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        code = _INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        # A RuntimeError that is not of our own making is a bug, and keeps its traceback.
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("signstep."):
            raise
        print(f"signstep: {error}", file=sys.stderr)
        code = _BAD_INPUT
    sys.exit(code)

"""The command `signstep`: data, train, sweep, reproduce, report, demo, bench, plan, study, verify, inspect.

    signstep data get cifar10
    signstep train --dataset cifar10 --optimizer signsgd --lr 1e-3
    signstep sweep table1 --scale cpu
    signstep reproduce all --scale cpu --seeds 3 --max-minutes 60

Exit code 0: done, or stopped by --max-minutes (the last line says what is left); 1: `train` diverged, or `verify` came
to another verdict than the recorded one; 2: bad input, one sentence on stderr; 130: stopped by Ctrl-C or SIGTERM.
torch, data and training are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import tyro
from rich.console import Console

from signstep.lab.bench.monitor import BenchMonitor
from signstep.lab.bench.step import WORKLOADS, DType, Workload
from signstep.lab.errors import BadInput, UserError
from signstep.lab.paper import experiments
from signstep.lab.paper.experiments import Experiment, Name, Recipe, Scale
from signstep.lab.training.config import Dataset, Optimizer, RunConfig

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
        raise BadInput(f"--shard {text}: expected i/n with i from 0 to n - 1, as in 0/2")
    return int(index), int(count)


def _check_minutes(value: float | None) -> None:
    if value is not None and not value > 0:
        raise BadInput(f"--max-minutes {value}: expected a number above 0")


def _check_folder(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise BadInput(f"--data {folder}: there is no such folder; make it, or leave the option out")


def _say_where(names: Collection[str], folder: Path | None) -> None:
    """Say which data sets are not in the folder of --data, and where they are instead."""
    if folder is None:
        return
    from signstep.lab.data import listing

    for each in listing(folder):
        if each.name in names and each.found is not None and not Path(each.found).is_relative_to(folder):
            _say(f"{each.name} is not in {folder}: found in {each.found}")


@dataclass(frozen=True)
class _Trainer:
    """`signstep.lab.training.loop.train` with a command's options, as sweep and reproduce call it."""

    data: Path | None
    device: str

    def __call__(self, config: RunConfig, out: Path, minutes: float | None) -> str:
        from signstep.lab.training.loop import RunBusy, train

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
        from signstep.lab.data import listing, load

        _check_folder(self.data)
        if self.action == "get":
            if not self.names:
                raise BadInput("data get: name the sets to get, as in: signstep data get cifar10")
            for name in self.names:
                images = load(name, self.data)
                _say(
                    f"{name}: {len(images.train_x)} training and {len(images.test_x)} test images from {images.source}"
                )
            return 0
        # A line each, for the terminal to fold: a path can be read and copied whole.
        for each in listing(self.data):
            _say(f"{each.name}: {each.found or f'not here; {each.how}'}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train one run; the same command again goes on with it.

    Options of the run override those of --preset. Without --lr each optimizer has the learning rate of its first method
    in the presets: sgd 0.1, adam and adamw 0.001, signsgd and hybrid 0.00316. An option that is None has the
    optimizer's own default.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    vote: bool = False
    """Short for --reduce vote: workers that torchrun has started vote with one bit per weight."""
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
    watch: int | None = None
    """Put a monitor on the run that measures every so many steps; its records go to <out>/monitor/<hash>.jsonl."""
    watch_micro_batches: int = 16
    """Parts of the batch that the monitor compares."""

    def run(self) -> int:
        from signstep.lab.training.loop import train
        from signstep.lab.training.records import read_run
        from signstep.lab.training.watch import Watching

        _check_minutes(self.max_minutes)
        _check_folder(self.data)
        config = replace(self.config, reduce="vote") if self.vote else self.config
        first = os.environ.get("RANK", "0") == "0"
        if first:
            _say_where([config.dataset], self.data)
        started = time.monotonic()
        status = train(
            config,
            self.out,
            data=self.data,
            device=self.device,
            max_minutes=self.max_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
            tensorboard=self.tensorboard,
            watching=None if self.watch is None else Watching(self.watch, self.watch_micro_batches),
        )
        if not first:
            return 0
        path = self.out / f"{config.hash}.jsonl"
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

    @property
    def which(self) -> list[str]:
        """The arguments that choose these experiments, for any command."""
        words = [self.experiment, "--scale", self.scale, "--recipe", self.recipe]
        return words + (["--dataset", *self.dataset] if self.dataset else [])

    def write_reports(self, chosen: Sequence[Experiment], seeds: int) -> None:
        """Write what the runs in `folder` show, and name the reports."""
        from signstep.lab.paper.reproduce import write_reports
        from signstep.lab.paper.sweep import read_tuned

        tuned = read_tuned(self.folder)
        keys = {(dataset, row.key) for e in chosen for dataset in e.datasets for row in e.rows}
        choices = [choice for d, rows in tuned.items() for key, choice in rows.items() if (d, key) in keys]
        grids = sorted({len(choice["trials"]) - choice["extensions"] for choice in choices})
        commands = [["sweep", *self.which, "--trials", str(trials)] for trials in grids]
        commands.append(["reproduce", *self.which, "--seeds", str(seeds)])
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
        """The shard's i and n; BadInput for options that fit nothing."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput(
                "torchrun's workers train one run together: use it with signstep train, "
                "and --shard here to train several runs at the same time"
            )
        _check_minutes(self.max_minutes)
        _check_folder(self.data)
        return _shard(self.shard)


@dataclass(frozen=True)
class Sweep(_Trained):
    """Tune every method's learning rate with the same number of trials on held-out training images."""

    trials: int = 5
    """Points of every method's learning rate grid."""

    def run(self) -> int:
        from signstep.lab.paper.sweep import sweep
        from signstep.lab.training.records import read_runs

        shard = self.check()
        chosen = self.load()
        _say_where({dataset for e in chosen for dataset in e.datasets}, self.data)
        over = sweep(
            chosen,
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
        from signstep.lab.paper.reproduce import reproduce
        from signstep.lab.paper.sweep import read_tuned
        from signstep.lab.training.records import is_done

        shard = self.check()
        chosen = self.load()
        _say_where({dataset for e in chosen for dataset in e.datasets}, self.data)
        reproduce(
            chosen,
            self.folder,
            seeds=self.seeds,
            tuned=read_tuned(self.folder),
            train=_Trainer(self.data, self.device),
            done=is_done,
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
        from signstep.lab.paper.reproduce import planned
        from signstep.lab.paper.sweep import read_tuned

        chosen = self.load()
        wanted = planned(chosen, self.seeds, read_tuned(self.folder))
        if not any((self.folder / "runs" / f"{key}.jsonl").exists() for key in wanted):
            out = [] if self.out == Report().out else ["--out", str(self.out)]
            first = shlex.join(["signstep", "reproduce", *self.which, *out])
            raise BadInput(f"{self.folder / 'runs'} has none of the runs to report: train them first, with {first}")
        self.write_reports(chosen, self.seeds)
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

        _check_folder(self.data)
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


@dataclass(frozen=True)
class BenchStep:
    """Time a step beside other optimizers and the speed of memory, in one process, and compare with the targets."""

    workload: tuple[Workload, ...] = WORKLOADS
    """Whose parameters."""
    dtype: DType = "float32"
    """Of parameters and gradients."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    rounds: int = 9
    """Times that every optimizer is timed, in turn."""
    millions: float = 50.0
    """Parameters of the workload 50m, in millions."""
    out: Path | None = None
    """Folder to write bench-step.json, .md, .png and .svg to."""

    def run(self) -> int:
        from signstep.lab.bench import step as bench
        from signstep.lab.bench import step_report as bench_report
        from signstep.lab.training.workers import Workers

        if not self.workload:
            raise BadInput("--workload: expected at least one of " + ", ".join(WORKLOADS))
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        device = Workers.join(self.device).device
        messages, console = Console(stderr=True), Console()
        results = []
        for workload in dict.fromkeys(self.workload):
            with messages.status("") as status:
                result = bench.run(
                    workload,
                    dtype=self.dtype,
                    device=device,
                    rounds=self.rounds,
                    millions=self.millions,
                    say=status.update if messages.is_terminal else messages.print,
                )
            bench_report.show(console, result, self.dtype)
            results.append(result)
        for note in bench_report.NOTES:
            console.print(note, highlight=False)
        if self.out is not None:
            for path in bench_report.write(
                results, self.out, dtype=self.dtype, device=device, command=self._command(device.type)
            ):
                _say(f"written: {path}")
        return 0

    def _command(self, device: str) -> str:
        options = ["--workload", *dict.fromkeys(self.workload), "--dtype", self.dtype, "--device", device]
        options += ["--rounds", str(self.rounds), "--millions", f"{self.millions:g}", "--out", str(self.out)]
        return shlex.join(["signstep", "bench", "step", *options])


@dataclass(frozen=True)
class BenchComm:
    """Time a step over the network with every way to reduce gradients, and count the bytes that are sent.

    As root on Linux every rank gets a network namespace and a link of the given rate; else all share the loopback
    interface.
    """

    rates: tuple[str, ...] = ()
    """Of the links: 10mbit, 1gbit, ...; none: not shaped; loopback: without namespaces. Default: 10mbit 100mbit 1gbit
    none as root on Linux, else loopback."""
    ranks: tuple[int, ...] = (2, 4, 8)
    """Numbers of processes."""
    methods: tuple[str, ...] = ()
    """Which ones; default: all. Ratios need ddp-fp32."""
    params: tuple[str, ...] = ("4e6", "resnet18")
    """Whose gradients: resnet18, or so many parameters in six tensors."""
    rounds: int = 9
    """Times that every method is timed, in turn, at most; slow cells have fewer, at least 3."""
    seconds: float = 20.0
    """After which no further round of a cell begins."""
    max_minutes: float = 40.0
    """Give up after this many minutes."""
    out: Path | None = None
    """Folder to write bench-comm.json, .md and figures to, after every cell."""

    def run(self) -> int:
        from signstep.lab.bench import comm as bench_comm
        from signstep.lab.bench import comm_report as bench_comm_report
        from signstep.lab.bench.comm_methods import METHODS

        _check_minutes(self.max_minutes)
        plan = bench_comm.Plan(
            rates=tuple(dict.fromkeys(self.rates)) or bench_comm.default_rates(),
            ranks=tuple(dict.fromkeys(self.ranks)),
            methods=tuple(dict.fromkeys(self.methods)) or tuple(METHODS),
            workloads=tuple(bench_comm.Workload.of(each) for each in dict.fromkeys(self.params)),
            rounds=self.rounds,
            seconds=self.seconds,
        )
        options = ["--rates", *plan.rates, "--ranks", *map(str, plan.ranks), "--methods", *plan.methods]
        options += ["--params", *(each.key for each in plan.workloads), "--rounds", str(self.rounds)]
        options += ["--seconds", f"{self.seconds:g}", "--max-minutes", f"{self.max_minutes:g}", "--out", str(self.out)]
        command = shlex.join(["signstep", "bench", "comm", *options])
        messages, console = Console(stderr=True), Console()

        def done(result: bench_comm.Result) -> None:
            bench_comm_report.show(console, result)
            if self.out is not None:
                bench_comm_report.write(result, self.out, command)

        # As Ctrl-C does, so that what has been set up is taken down.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with messages.status("") as status:
            say = status.update if messages.is_terminal else messages.print
            result = bench_comm.run(plan, minutes=self.max_minutes, done=done, say=say)
        for line in result.left_out:
            console.print(f"not measured: {line}", highlight=False)
        for note in bench_comm_report.notes(result):
            console.print(note, highlight=False)
        if self.out is not None:
            _say(f"written: {self.out}")
        return 0


@dataclass(frozen=True)
class BenchTrain:
    """Train ResNet-8 on CIFAR-10 over a slow network with ways to reduce gradients; needs root."""

    methods: tuple[str, ...] = ()
    """Which ones; default: all."""
    rate: str = "100mbit"
    """Of the links."""
    ranks: int = 4
    """Processes that train a run together."""
    seeds: int = 3
    """Runs of each method."""
    epochs: int = 6
    """Of each run."""
    subset: int = 10_000
    """Training images."""
    target: float = 45.0
    """Accuracy in percent; the table has the seconds until it was reached."""
    data: Path | None = None
    """Folder to look for the images in first."""
    out: Path = Path("results/bench-train")
    """Folder of the runs, and of bench-train.json and .md; the same command again goes on."""

    def run(self) -> int:
        from signstep.lab.bench import train as bench_train

        _check_folder(self.data)
        methods = tuple(dict.fromkeys(self.methods)) or tuple(bench_train.METHODS)
        # As Ctrl-C does, so that what has been set up is taken down.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        samples = bench_train.run(
            methods,
            rate=self.rate,
            ranks=self.ranks,
            seeds=self.seeds,
            epochs=self.epochs,
            subset=self.subset,
            target=self.target,
            out=self.out,
            data=self.data,
            say=_say,
        )
        bench_train.show(Console(), samples)
        options = ["--methods", *methods, "--rate", self.rate, "--ranks", str(self.ranks), "--seeds", str(self.seeds)]
        options += ["--epochs", str(self.epochs), "--subset", str(self.subset), "--target", f"{self.target:g}"]
        command = shlex.join(["signstep", "bench", "train", *options, "--out", str(self.out)])
        for path in bench_train.write(
            samples, self.out, command=command, target=self.target, rate=self.rate, ranks=self.ranks
        ):
            _say(f"written: {path}")
        return 0


_Bench = (
    Annotated[BenchStep, tyro.conf.subcommand("step")]
    | Annotated[BenchComm, tyro.conf.subcommand("comm")]
    | Annotated[BenchTrain, tyro.conf.subcommand("train")]
    | Annotated[BenchMonitor, tyro.conf.subcommand("monitor")]
)


@dataclass(frozen=True)
class Bench:
    """Measure what a step costs in computation (step) or communication (comm), a training over links (train), and what
    a Monitor costs (monitor).
    """

    what: Annotated[_Bench, tyro.conf.arg(name="")] = field(default_factory=BenchStep)

    def run(self) -> int:
        return self.what.run()


@dataclass(frozen=True)
class Plan:
    """Predict bytes and time of a step over the network with every method, and what a vote is worth."""

    params: float = 11e6
    """Parameters of the model."""
    workers: int = 16
    """Workers that train it together."""
    bandwidth: str = "100mbit"
    """Of each worker's link, each way."""
    step_ms: float = 80.0
    """Milliseconds of a step without communication."""
    latency_ms: float = 0.0
    """Of one collective, in milliseconds."""
    check: Path | None = None
    """Instead, compare the model with this bench-comm.json of signstep bench comm."""

    def run(self) -> int:
        from signstep.distributed.plan import Cost, Gradients, bits_per_second
        from signstep.lab.bench import plan_report

        console = Console()
        if self.check is not None:
            plan_report.show_check(console, plan_report.check(self.check))
            return 0
        for option, good in (
            ("params", 1 <= self.params <= 1e15),
            ("workers", 1 <= self.workers <= 1000),
            ("step-ms", 0 <= self.step_ms < float("inf")),
            ("latency-ms", 0 <= self.latency_ms < float("inf")),
        ):
            if not good:
                value = getattr(self, option.replace("-", "_"))
                raise BadInput(f"--{option} {value:g}: out of range; see signstep plan --help")
        try:
            bandwidth = bits_per_second(self.bandwidth)
        except ValueError as error:
            raise BadInput(f"--bandwidth {error}") from error
        cost = Cost(self.workers, bandwidth, self.step_ms / 1e3, self.latency_ms / 1e3)
        plan_report.show_costs(console, Gradients.square(int(self.params)), cost)
        plan_report.show_votes(console, self.workers)
        for note in plan_report.NOTES:
            console.print(note, highlight=False)
        return 0


@dataclass(frozen=True)
class Study:
    """Measure what a vote is worth, against Byzantine workers (byzantine) and by dither (vote-curve), and how far
    signs can be trusted in the paper's trainings (monitor).
    """


def _study(arguments: Sequence[str]) -> int:
    """`signstep study`: each study has its options beside its code, which takes its time to import."""
    from signstep.lab.studies import byzantine, monitored, vote_curve

    options: byzantine.Options | monitored.Options | vote_curve.Options = tyro.cli(
        Annotated[byzantine.Options, tyro.conf.subcommand("byzantine")]
        | Annotated[monitored.Options, tyro.conf.subcommand("monitor")]
        | Annotated[vote_curve.Options, tyro.conf.subcommand("vote-curve")],
        args=arguments,
        prog="signstep study",
        config=_TYRO,
    )
    if isinstance(options, byzantine.Options):
        _check_minutes(options.max_minutes)
        _check_folder(options.data)
        byzantine.run(options, command=byzantine.command_of(options), say=_say)
    elif isinstance(options, monitored.Options):
        _check_folder(options.data)
        monitored.run(options, shard=_shard(options.shard), command=monitored.command_of(options), say=_say)
    else:
        vote_curve.run(options, command=shlex.join(["signstep", "study", *arguments]), say=_say)
    _say(f"written: {options.out}")
    return 0


@dataclass(frozen=True)
class Verify:
    """Check what the paper and the docs state, each statement by a measurement."""


@dataclass(frozen=True)
class Inspect:
    """Say what a monitor's records show of a run, or measure it at a checkpoint."""


def _inspect(arguments: Sequence[str]) -> int:
    """`signstep inspect`: as with `signstep study`, its options are beside its code."""
    from signstep.lab.studies import inspect_run

    options = tyro.cli(inspect_run.Options, args=arguments, prog="signstep inspect", config=_TYRO)
    _check_folder(options.data)
    inspect_run.run(options, command=shlex.join(["signstep", "inspect", *arguments]), say=_say)
    return 0


def _verify(arguments: Sequence[str]) -> int:
    """`signstep verify`: as with `signstep study`, its options are beside its code."""
    from signstep.lab.verify import command

    options = tyro.cli(command.Options, args=arguments, prog="signstep verify", config=_TYRO)
    return command.run(options, command=shlex.join(["signstep", "verify", *arguments]))


_Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def _preset(arguments: Sequence[str]) -> RunConfig:
    """The defaults of `signstep train`: those of its --preset, if it has one, the learning rate of --optimizer, and for
    a vote or the like torchrun's number of workers.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--preset", "--scale", "--recipe", "--dataset", "--optimizer"):
        parser.add_argument(option)
    parser.add_argument("--vote", action="store_true")
    parser.add_argument("--reduce", default="mean")
    known = parser.parse_known_args(list(arguments))[0]
    config = RunConfig()
    if known.preset is not None:
        name, _, key = known.preset.partition("/")
        dataset = known.dataset or "cifar10"
        experiment = experiments.load(
            name, scale=known.scale or "cpu", recipe=known.recipe or "strong", datasets=[dataset]
        )
        config = experiment.row(key).config(dataset)
    if known.optimizer in get_args(Optimizer) and known.optimizer != config.optimizer:
        config = replace(config, lr=experiments.default_lr(known.optimizer))
    if (known.vote or known.reduce != "mean") and "WORLD_SIZE" in os.environ:
        config = replace(config, workers=int(os.environ["WORLD_SIZE"]))
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # labels have Greek letters and arrows
    try:
        if arguments[:1] == ["train"]:
            default = Train(config=_preset(arguments[1:]))
            code = tyro.cli(Train, args=arguments[1:], default=default, prog="signstep train", config=_TYRO).run()
        elif arguments[:1] == ["study"]:
            code = _study(arguments[1:])
        elif arguments[:1] == ["inspect"]:
            code = _inspect(arguments[1:])
        elif arguments[:1] == ["verify"]:
            code = _verify(arguments[1:])
        else:
            command = tyro.cli(_Command, args=arguments, prog="signstep", description=__doc__, config=_TYRO)
            assert not isinstance(command, Study | Verify | Inspect)  # see above
            code = command.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        code = _INTERRUPTED
    except (UserError, OSError) as error:
        print(f"signstep: {error}", file=sys.stderr)
        code = _BAD_INPUT
    sys.exit(code)

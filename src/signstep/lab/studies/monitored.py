"""The study of what a monitor sees in trainings of the paper's methods, `signstep study monitor`.

Each method trains at the cpu scale with its tuned learning rate, on each data set. Every `every` steps the gradients of
`micro_batches` micro-batches are compared. The run itself is that of `signstep reproduce`, unchanged.
This file has the runs and the table; the figures are in monitor_figures.py, the page in monitor_page.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from signstep.lab.arguments import check_folder, parse_shard
from signstep.lab.errors import BadInput
from signstep.lab.output import figures
from signstep.lab.output.command import command_line
from signstep.lab.output.files import write_text
from signstep.lab.output.tables import markdown_table
from signstep.lab.paper import experiments
from signstep.lab.paper.experiments import Name
from signstep.lab.paper.tuned import learning_rate, read_tuned
from signstep.lab.studies import monitor_figures, monitor_page
from signstep.lab.studies.monitor_numbers import at
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.records import is_done, read_run
from signstep.lab.training.watch import Watching
from signstep.monitor.sinks import read

WATCHED_METHODS: dict[str, tuple[Name, str]] = {
    "sgd": ("table1", "SGD"),
    "signsgd": ("table1", "SignSGD-M"),
    "pre-0.5": ("table1", "dither, α = 0.5"),
    "pre-0.1": ("table1", "dither, α = 0.1"),
    "pre-0.01": ("fig1", "dither, α = 0.01"),
    "pre-relative": ("beyond", "dither, σ = rms(m)"),
    "hybrid": ("table1", "hybrid"),
}
"""The experiment that has each method's row, and a short name."""


@dataclass(frozen=True)
class WatchedRun:
    """A run and where its records are."""

    dataset: str
    method: str
    label: str
    config: RunConfig
    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of the run's monitor."""
        return read(self._monitor_path)

    @property
    def done(self) -> bool:
        """Whether the run has ended and its monitor's records are there."""
        return is_done(self._path) and self._monitor_path.exists()

    @property
    def accuracy(self) -> float:
        """Test accuracy of a run that has ended, in percent."""
        return read_run(self._path).result

    @property
    def environment(self) -> dict[str, Any]:
        """What it ran on."""
        environment: dict[str, Any] = read_run(self._path).start["environment"]
        return environment

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.config.hash}.jsonl"

    @property
    def _monitor_path(self) -> Path:
        return self.folder / "monitor" / f"{self.config.hash}.jsonl"


@dataclass(frozen=True)
class MonitorStudy:
    """Train the paper's methods at the cpu scale under the monitor, and draw what it saw."""

    datasets: tuple[Dataset, ...] = ("cifar10", "cifar100")
    """The data sets to train on."""
    methods: tuple[str, ...] = tuple(WATCHED_METHODS)
    """Rows of the experiments."""
    micro_batches: int = 64
    """Compared at each of the monitor's steps."""
    micro_batch_size: int = 32
    """Images in each."""
    every: int = 39
    """Steps between the monitor's: half an epoch of 10,000 images."""
    tuned: Path = Path("results/cpu-strong")
    """Folder whose tuned.json has the learning rates; a method that it lacks takes its preset's."""
    out: Path = Path("results/monitor")
    """Folder of the runs, records, figures and pages; the same command again does what is missing."""
    data: Path | None = None
    """Folder to look for the images in first."""
    shard: str = "0/1"
    """i/n: train the i-th of n shares of the runs, i from 0; figures are drawn by the share that finds all runs."""

    @property
    def command(self) -> str:
        return command_line(["study", "monitor"], self, omit=("data", "shard"))

    def run(self) -> int:
        """Train what is missing of this shard; once all runs are there, draw the figures and write the pages.

        Raises:
            BadInput: a method that there is not, or records in `out` that other options have made.
        """
        check_folder(self.data)
        index, count = parse_shard(self.shard)
        planned = list(self.planned())
        if all(each.done for each in planned):
            print(f"nothing to train: all {len(planned)} runs have ended before")
        for each in planned[index::count]:
            if each.done:
                self._check(each)
                continue
            print(f"{each.dataset}, {each.label}: {each.config.hash}", flush=True)
            watching = Watching(self.every, self.micro_batches, self.micro_batches * self.micro_batch_size)
            if train(each.config, each.folder, data=self.data, watching=watching) == "interrupted":
                raise KeyboardInterrupt
        missing = [each for each in planned if not each.done]
        if missing:
            print(f"{len(missing)} of {len(planned)} runs are still missing: no figures yet")
        else:
            for dataset in self.datasets:
                _write([each for each in planned if each.dataset == dataset], self.out, self.command)
        print(f"written: {self.out}")
        return 0

    def planned(self) -> Iterator[WatchedRun]:
        """The runs of the study.

        Raises:
            BadInput: a method that there is not.
        """
        tuned = read_tuned(self.tuned)
        for dataset in self.datasets:
            for method in self.methods:
                if method not in WATCHED_METHODS:
                    raise BadInput(f"method {method!r}: expected one of {', '.join(WATCHED_METHODS)}")
                experiment, label = WATCHED_METHODS[method]
                row = experiments.load(experiment, scale="cpu", datasets=[dataset]).row(method)
                # The monitor's batch size is another one than the run's: compiling for both takes longer than the run.
                config = replace(row.config(dataset, lr=learning_rate(row, dataset, tuned)), compile=False)
                yield WatchedRun(dataset, method, label, config, self.out / "runs")

    def _check(self, watched: WatchedRun) -> None:
        """Refuse records that other options have made."""
        records = watched.records
        steps = [r["step"] for r in records]
        fits = steps == [k * self.every for k in range(len(steps))]
        if not fits or records[0]["micro_batches"] != self.micro_batches:
            raise BadInput(
                f"{watched.folder}: {watched.config.hash} was watched at steps {steps[:3]}, ... with "
                f"{records[0]['micro_batches']} micro-batches; delete it, or take another --out"
            )


def _write(chosen: Sequence[WatchedRun], out: Path, command: str) -> None:
    """Write the figures of one data set's runs, a page on the clean sign run, and a table."""
    dataset = chosen[0].dataset
    runs = {each.method: each for each in chosen}
    named = [(each.label, each.records) for each in chosen]
    drawn: dict[str, Callable[[], Figure]] = {
        "snr": partial(monitor_figures.snr_distribution, named),
        "violations": partial(monitor_figures.violations, named),
        "dither": partial(monitor_figures.dither_meters, named),
    }
    for method in ("sgd", "signsgd", "hybrid"):
        if method in runs:
            records = runs[method].records
            signs = [r for r in records if r["calibration"]["groups"][0].get("phase", "sign") == "sign"]
            drawn[f"noise-{method}"] = partial(monitor_figures.noise_histograms, records[0], records[-1])
            drawn[f"rates-{method}"] = partial(monitor_figures.calibration_rules, signs)
    for name, draw in drawn.items():
        stem = f"{dataset}-{name}"
        try:
            figure = draw()
        except monitor_figures.NothingToDraw:
            continue
        write_text(out / f"{stem}.svg", figures.svg(figure, name=stem, description=f"{dataset}: {name}", alone=True))
    if "signsgd" in runs:
        clean = runs["signsgd"]
        title = f"{experiments.dataset_title(dataset)}, {clean.label}"
        monitor_page.write(clean.records, out / f"{dataset}-signsgd", title=title, command=command)
    write_text(out / f"{dataset}.md", _markdown(chosen, command))


_COLUMNS: dict[str, tuple[str | int, ...]] = {
    "alignment / (Φ/3)": ("reliability", "ratio"),
    "rms 1 - 2p": ("reliability", "reliability", 0),
    "S": ("reliability", "snr", 0),
    "S < 2/√3": ("reliability", "below_critical"),
    "in their mean": ("reliability", "below_critical_step"),
    "zeros": ("reliability", "zeros"),
    "asymmetric": ("symmetry", "rejected_share"),
    "rms(m)": ("dither", "rms"),
    "rms(m) / σ": ("dither", "ratio"),
}
"""Titles of columns, and where a record has the number."""


def _markdown(chosen: Sequence[WatchedRun], command: str) -> str:
    """Of each run its first and last record, and the rules' learning rates at the last one with a sign phase."""
    made, first = chosen[0].environment, chosen[0].records[0]
    rows = []
    for each in chosen:
        for record in (each.records[0], each.records[-1]):
            head = [each.label, f"{each.config.lr:g}", f"{each.accuracy:.2f}"] if record["step"] == 0 else ["", "", ""]
            rows.append([*head, str(record["step"]), *(_number(at(record, *path)) for path in _COLUMNS.values())])
    rules = ("paper", "ratio", "applied", "lagged", "swats")
    rates = []
    for each in chosen:
        signs = [r for r in each.records if at(r, "calibration", "now", "ratio") is not None]
        if signs:
            paths: list[tuple[str | int, ...]] = [("average", rule) for rule in rules]
            paths += [("cosine",), ("negative", 0)]
            values = [_number(at(signs[-1], "calibration", *path)) for path in paths]
            rates.append([each.label, str(signs[-1]["step"]), *values])
    text = [
        f"# The monitor on {experiments.dataset_title(chosen[0].dataset)}",
        "",
        f"`{command}`; {made['cpu']}, torch {made['torch']}, signstep {made['signstep']}.",
        "",
        f"Of each run the first and the last record; {first['micro_batches']} micro-batches, seed 0. "
        "S < 2/√3: share of coordinates, in one micro-batch and in the mean of all.",
        "",
        *markdown_table(["method", "lr", "test %", "step", *_COLUMNS], rows),
        "",
        "Learning rate for SGD by each rule, averaged over own steps, at the last one of the sign phase:",
        "",
        *markdown_table(["method", "step", *rules, "cosine", "own steps with <s, g> < 0"], rates),
    ]
    return "\n".join(text) + "\n"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"

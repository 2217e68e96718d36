"""`signstep study monitor`: the monitor through trainings of the paper's methods, and what its records show.

Each method trains at the cpu scale with its tuned learning rate, on each data set. Every `every` steps the gradients
of `micro_batches` micro-batches are compared; this changes nothing of the run, which is that of
`signstep reproduce`.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure

from signstep.lab.errors import BadInput
from signstep.lab.output import figures
from signstep.lab.paper import experiments
from signstep.lab.paper.experiments import Name
from signstep.lab.paper.sweep import read_tuned
from signstep.lab.studies.monitor_numbers import at
from signstep.lab.training.checkpoint import write_atomically
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.records import is_done, read_run
from signstep.lab.training.watch import Watching
from signstep.monitor.sinks import read

METHODS: dict[str, tuple[Name, str]] = {
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
class Options:
    """Train the paper's methods at the cpu scale under the monitor, and draw what it saw."""

    datasets: tuple[Dataset, ...] = ("cifar10", "cifar100")
    """On which images."""
    methods: tuple[str, ...] = tuple(METHODS)
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


@dataclass(frozen=True)
class Watched:
    """A run and where its records are."""

    dataset: str
    method: str
    label: str
    config: RunConfig
    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of the run's monitor."""
        return read(self._path)

    @property
    def done(self) -> bool:
        """The run and its records are there."""
        return is_done(self.folder / f"{self.config.hash}.jsonl") and self._path.exists()

    @property
    def _path(self) -> Path:
        return self.folder / "monitor" / f"{self.config.hash}.jsonl"


def command_of(options: Options) -> str:
    """The command that makes the same figures."""
    plain = Options()
    words = ["signstep", "study", "monitor"]
    for name in ("datasets", "methods", "micro_batches", "micro_batch_size", "every", "tuned", "out"):
        value = getattr(options, name)
        if value != getattr(plain, name):
            words += ["--" + name.replace("_", "-"), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def planned(options: Options) -> Iterator[Watched]:
    """The runs of a study.

    Raises:
        BadInput: a method that there is not.
    """
    tuned = read_tuned(options.tuned)
    for dataset in options.datasets:
        for method in options.methods:
            if method not in METHODS:
                raise BadInput(f"method {method!r}: expected one of {', '.join(METHODS)}")
            experiment, label = METHODS[method]
            row = experiments.load(experiment, scale="cpu", datasets=[dataset]).row(method)
            lr = tuned.get(dataset, {}).get(row.tuned_key, {}).get("lr")
            # Its one batch size and another would be compiled for longer than they run.
            config = replace(row.config(dataset, lr=lr), compile=False)
            yield Watched(dataset, method, label, config, options.out / "runs")


def run(options: Options, *, shard: tuple[int, int], command: str, say: Callable[[str], None] = print) -> None:
    """Train what is missing of this shard; with all runs there, draw the figures and write the pages.

    Args:
        options: the study.
        shard: (i, n).
        command: printed on the pages.
        say: told what is going on.
    """
    chosen = list(planned(options))
    index, count = shard
    for each in chosen[index::count]:
        if each.done:
            _check(each, options)
            continue
        say(f"{each.dataset}, {each.label}: {each.config.hash}")
        images = options.micro_batches * options.micro_batch_size
        watching = Watching(options.every, options.micro_batches, images)
        status = train(each.config, each.folder, data=options.data, watching=watching)
        if status == "stopped":
            raise KeyboardInterrupt
    missing = [each for each in chosen if not each.done]
    if missing:
        say(f"{len(missing)} of {len(chosen)} runs are still missing: no figures yet")
        return
    for dataset in options.datasets:
        _write([each for each in chosen if each.dataset == dataset], options.out, command)


def _check(watched: Watched, options: Options) -> None:
    """Refuse records that another command has made."""
    records = watched.records
    steps = [r["step"] for r in records]
    fits = steps == [k * options.every for k in range(len(steps))]
    if not fits or records[0]["micro_batches"] != options.micro_batches:
        raise BadInput(
            f"{watched.folder}: {watched.config.hash} was watched at steps {steps[:3]}, ... with "
            f"{records[0]['micro_batches']} micro-batches; delete it, or take another --out"
        )


def _write(chosen: Sequence[Watched], out: Path, command: str) -> None:
    """Figures of one data set's runs, a page of its clean sign run, and a table."""
    from signstep.lab.studies import monitor_figures
    from signstep.lab.studies import monitor_page as monitor_report

    dataset = chosen[0].dataset
    runs = {each.method: each for each in chosen}
    named = [(each.label, each.records) for each in chosen]
    drawn: dict[str, Callable[[], Figure]] = {
        "snr": lambda: monitor_figures.snr_distribution(named),
        "violations": lambda: monitor_figures.violations(named),
        "dither": lambda: monitor_figures.dither_meters(named),
    }
    for method in ("sgd", "signsgd", "hybrid"):
        if method in runs:
            records = runs[method].records
            signs = [r for r in records if r["calibration"]["groups"][0].get("phase", "sign") == "sign"]
            drawn[f"noise-{method}"] = functools.partial(monitor_figures.noise_histograms, records[0], records[-1])
            drawn[f"rates-{method}"] = functools.partial(monitor_figures.calibration_rules, signs)
    for name, draw in drawn.items():
        stem = f"{dataset}-{name}"
        try:
            figure = draw()
        except monitor_figures.NothingToDraw:
            continue
        svg = figures.svg(figure, name=stem, description=f"{dataset}: {name}", alone=True).encode()
        write_atomically(out / f"{stem}.svg", functools.partial(_write_bytes, svg))
    if "signsgd" in runs:
        clean = runs["signsgd"]
        title = f"{experiments.dataset_title(dataset)}, {clean.label}"
        monitor_report.write(clean.records, out / f"{dataset}-signsgd", title=title, command=command)
    text = _table(chosen, command)
    write_atomically(out / f"{dataset}.md", functools.partial(_write_bytes, text.encode()))


def _write_bytes(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


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
"""Heading, and where a record has the number."""


def _table(chosen: Sequence[Watched], command: str) -> str:
    """Markdown: of each run its first and last record, and the rules' learning rates at the last with a sign phase."""
    made = read_run(chosen[0].folder / f"{chosen[0].config.hash}.jsonl").start["environment"]
    first = chosen[0].records[0]
    lines = [
        f"# The monitor on {experiments.dataset_title(chosen[0].dataset)}",
        "",
        f"`{command}`; {made['cpu']}, torch {made['torch']}, signstep {made['signstep']}.",
        "",
        f"Of each run the first and the last record; {first['micro_batches']} micro-batches, seed 0. "
        "S < 2/√3: share of coordinates, in one micro-batch and in the mean of all.",
        "",
    ]
    rows = [["method", "lr", "test %", "step", *_COLUMNS], ["---", *["---:"] * (3 + len(_COLUMNS))]]
    for each in chosen:
        accuracy = read_run(each.folder / f"{each.config.hash}.jsonl").final_accuracy
        for record in (each.records[0], each.records[-1]):
            head = [each.label, f"{each.config.lr:g}", f"{accuracy:.2f}"] if record["step"] == 0 else ["", "", ""]
            rows.append([*head, str(record["step"]), *(_number(at(record, *path)) for path in _COLUMNS.values())])
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    rules = ("paper", "ratio", "applied", "lagged", "swats")
    rows = [["method", "step", *rules, "cosine", "own steps with <s, g> < 0"], ["---", *["---:"] * (3 + len(rules))]]
    for each in chosen:
        signs = [r for r in each.records if at(r, "calibration", "now", "ratio") is not None]
        if signs:
            values = [_number(at(signs[-1], "calibration", "average", rule)) for rule in rules]
            negative = _number(at(signs[-1], "calibration", "negative", 0))
            cosine = _number(at(signs[-1], "calibration", "cosine"))
            rows.append([each.label, str(signs[-1]["step"]), *values, cosine, negative])
    lines += ["", "Learning rate for SGD by each rule, averaged over own steps, at the last one of the sign phase:", ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"

"""The study of dither over its scale: where, if anywhere, noise before the sign beats the tuned step without noise.

    signstep study dither                     an hour or two on one core; --shard i/n, resumable
    signstep study dither --dataset cifar100

The paper reports 76 % with dither of α = 0.1 where SignSGD-M has 65 %, and does not say whether the loss was summed or
averaged over the batch, nor how decay was applied. So a map is made for each of these conditions: accuracy on held-out
training images over α, from 1e-8 to 1, and the learning rate, beside noise relative to the momentum. The best cells of
a map are then trained anew with several seeds, and evaluated on the test images.

Under decoupled decay, a loss that is summed over B images is one that is averaged and has α / B²: momentum and noise
are then multiplied by the same number, and no sign changes. So that case needs no runs, and a test holds it to that.

dither_training.py trains a run; dither_report.py has the tables and the figure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from signstep.lab.arguments import check_folder, check_minutes, parse_shard
from signstep.lab.output.command import command_line
from signstep.lab.output.files import locked, make_folder, read_json, write_json
from signstep.lab.output.machine import environment
from signstep.lab.studies.dither_report import DitherMap, write_report
from signstep.lab.studies.dither_training import DitherRun, train_dithered
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.workers import Workers

ALPHAS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Variances of the paper's dither at the first step; it falls as (1 + step)^-0.55."""
SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of relative dither: the noise's standard deviation over the rms of the momentum, the same at every step."""
LRS = (3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
MAP_SEED = 1000
"""Of the runs of a map; no run on test images has it."""


@dataclass(frozen=True)
class Condition:
    """What the paper leaves open, or changes from one experiment to the next."""

    key: str
    title: str
    loss: Literal["mean", "sum"] = "mean"
    decay: Literal["decoupled", "coupled"] = "decoupled"
    epochs: int = 2


CONDITIONS = (
    Condition("decoupled", "decoupled decay 0.1"),
    Condition("coupled", "decay 5e-4 in the gradient, loss averaged", decay="coupled"),
    Condition("coupled-sum", "decay 5e-4 in the gradient, loss summed", loss="sum", decay="coupled"),
    Condition("long", "decoupled decay 0.1, four times as many steps", epochs=8),
)


def noise_options(kind: str, size: float) -> dict[str, Any]:
    """The options of a run's dither.

    >>> noise_options("absolute", 0.1)
    {'dither': 0.1, 'dither_decay': 0.55}
    """
    if kind == "clean":
        return {}
    if kind == "absolute":
        return {"dither": size, "dither_decay": 0.55}
    return {"dither": size**2, "dither_decay": 0.0, "dither_scale": "relative"}


NOISES = (("clean", 0.0), *(("absolute", a) for a in ALPHAS), *(("relative", s) for s in SIGMAS))


@dataclass(frozen=True)
class DitherStudy:
    """Map accuracy over the noise's size and the learning rate, under what the paper leaves open."""

    out: Path = Path("results/dither")
    """Folder of the results."""
    data: Path | None = None
    """Folder to look for the images in first."""
    dataset: Dataset = "cifar10"
    """The images."""
    subset: int = 20_000
    """Train on this many of them."""
    width: float = 0.5
    """Width of ResNet-8."""
    conditions: tuple[Literal["decoupled", "coupled", "coupled-sum", "long"], ...] = (
        "decoupled",
        "coupled",
        "coupled-sum",
        "long",
    )
    """Which maps to make, in this order."""
    seeds: int = 3
    """Runs on the test images of the best step without noise, with absolute and with relative noise."""
    shard: str = "0/1"
    """i/n: do the i-th of n shares of the work, i from 0."""
    max_minutes: float | None = None
    """Stop after this many minutes; the same command goes on."""

    @property
    def command(self) -> str:
        return command_line(["study", "dither"], self, omit=("out", "data", "shard", "max_minutes"))

    def run(self) -> int:
        """Do the runs that are missing, and write dither.json, .md, .png and .svg into `out`.

        Raises:
            BadInput: a `data` that is no folder, or a share that is none.
        """
        check_minutes(self.max_minutes)
        check_folder(self.data)
        share, shares = parse_shard(self.shard)
        end = None if self.max_minutes is None else time.monotonic() + 60 * self.max_minutes
        make_folder(self.out / "runs")
        chosen = [each for each in CONDITIONS if each.key in self.conditions]
        late = False
        for plan in (self.map_runs, self.final_runs):
            planned = [run for condition in chosen for run in plan(condition)]
            for run in planned[share::shares]:
                late = late or (end is not None and time.monotonic() >= end)
                if not late and not self._record(run).exists():
                    self._train(run)
        with locked(self.out / "report.lock"):
            for path in write_report(self.out, self.command, [self.measured(each) for each in chosen]):
                print(f"written: {path}")
        return 0

    def _record(self, run: DitherRun) -> Path:
        return self.out / "runs" / f"{run.key}.json"

    def _accuracy(self, run: DitherRun) -> float | None:
        """Of a finished run, in percent; None of another."""
        path = self._record(run)
        return float(read_json(path)["accuracy"]) if path.exists() else None

    def _train(self, run: DitherRun) -> None:
        started = time.process_time()
        result = train_dithered(run, self.data)
        record = {
            "case": run.to_dict(),
            **result,
            "cpu_seconds": round(time.process_time() - started, 1),
            "environment": environment(Workers.join("cpu").device, 1),
            "command": self.command,
        }
        write_json(self._record(run), record, allow_nan=False)
        config = run.config
        noise = f"{config.dither_scale or 'absolute'} dither {config.dither:g}" if config.dither else "no dither"
        print(
            f"{noise}, lr {config.lr:g}, loss {run.loss}, {config.split}, seed {config.seed}: "
            f"{result['accuracy']:.2f} %, {record['cpu_seconds']} s",
            flush=True,
        )

    def cell(self, condition: Condition, kind: str, size: float, lr: float, *, seed: int, split: str) -> DitherRun:
        """The run of a cell of a map, with a seed, on held-out (split "tune") or on test images ("final")."""
        coupled = condition.decay == "coupled"
        config = RunConfig(
            dataset=self.dataset,
            split=split,  # type: ignore[arg-type]
            subset=self.subset,
            model="resnet8",
            width=self.width,
            stem="imagenet",
            optimizer="signsgd",
            lr=lr,
            momentum=0.9,
            weight_decay=0.0 if coupled else 0.1,
            warmup=0.05,
            epochs=condition.epochs,
            eval_every=condition.epochs,
            seed=seed,
            **noise_options(kind, size),
        )
        return DitherRun(config, condition.loss, 5e-4 if coupled else 0.0)

    def map_runs(self, condition: Condition) -> Iterator[DitherRun]:
        """The runs of a map: every noise at every learning rate."""
        for kind, size in NOISES:
            for lr in LRS:
                yield self.cell(condition, kind, size, lr, seed=MAP_SEED, split="tune")

    def accuracies(self, condition: Condition) -> Mapping[tuple[str, float, float], float]:
        """Of the map's finished runs the accuracy in percent, by kind and size of the noise and learning rate."""
        found = {}
        for kind, size in NOISES:
            for lr in LRS:
                accuracy = self._accuracy(self.cell(condition, kind, size, lr, seed=MAP_SEED, split="tune"))
                if accuracy is not None:
                    found[kind, size, lr] = accuracy
        return found

    def best_cells(self, condition: Condition) -> Mapping[str, tuple[float, float]]:
        """Of a map that is whole the best noise and learning rate of each kind; of one that is not, nothing."""
        found = self.accuracies(condition)
        if len(found) < len(NOISES) * len(LRS):
            return {}
        best = {}
        for kind in ("clean", "absolute", "relative"):
            size, lr = max((cell[1:] for cell in found if cell[0] == kind), key=lambda c: found[kind, c[0], c[1]])
            best[kind] = (size, lr)
        return best

    def final_runs(self, condition: Condition) -> Iterator[DitherRun]:
        """The runs on the test images; none before the map is whole."""
        best = self.best_cells(condition)
        for seed in range(self.seeds):
            for kind, (size, lr) in best.items():
                yield self.cell(condition, kind, size, lr, seed=seed, split="final")

    def measured(self, condition: Condition) -> DitherMap:
        """What the finished runs of a condition say."""
        best = self.best_cells(condition)
        finals: dict[str, dict[int, float]] = {kind: {} for kind in best}
        for kind, (size, lr) in best.items():
            for seed in range(self.seeds):
                accuracy = self._accuracy(self.cell(condition, kind, size, lr, seed=seed, split="final"))
                if accuracy is not None:
                    finals[kind][seed] = accuracy
        return DitherMap(condition.title, self.accuracies(condition), best, finals)

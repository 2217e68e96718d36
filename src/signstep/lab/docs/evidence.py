"""The numbers in results/, as an expression on a page can ask for them.

An expression is Jinja's, as in the templates of the reports:

    gap("remedies", "cifar10", "hybrid", "sgd").mean | signed(1)

The names that it knows are in `_NAMES`, methods of `Evidence`; a filter binds more closely than arithmetic does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import jinja2

from signstep.lab.errors import BadInput
from signstep.lab.output import stats
from signstep.lab.studies import frontier_report
from signstep.lab.studies.monitored import WATCHED_METHODS, MonitorStudy, WatchedRun
from signstep.lab.training.records import read_runs

Record = Mapping[str, Any]

_NAMES = (
    "file",
    "result",
    "gap",
    "late_gain_gap",
    "epochs_ahead",
    "compared",
    "checked_sgd",
    "over_checked_sgd",
    "trials",
    "watched",
    "accuracy_under_monitor",
    "violated",
    "cosine",
    "byzantine",
    "byzantine_gap",
    "frontier",
    "frontier_gap",
    "frontier_fewer",
    "network",
    "step_ratio",
    "step",
    "trained",
    "monitor_loop",
    "right",
    "dither_map",
    "dithered",
    "one",
)
"""Of the methods below, those that an expression may call."""
NETWORK = "bench-comm-amd-epyc/bench-comm.json"
"""What a step over the network costs, as the pages have it."""
LATENCY = "bench-comm-latency/bench-comm.json"
"""The same over links with latency."""
PAPERS_DITHER = ("pre-0.5", "pre-0.1", "pre-0.01")


def crossing(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a curve first reaches a level, by straight lines between its points; None if it begins above or never does.

    >>> crossing([(1, 40), (2, 60), (3, 70)], 65)
    2.5
    """
    for (x, y), (next_x, next_y) in pairwise(curve):
        if y > level:
            return None
        if next_y >= level:
            return x + (next_x - x) * (level - y) / (next_y - y) if next_y > y else x
    return None


class Evidence:
    """The numbers in a folder of results.

    Args:
        folder: `results` of the repository, or another that the same commands have written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = cache(self._file)
        self.watched = cache(self._watched)
        self.runs = cache(read_runs)
        self.environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        self.environment.globals |= {name: getattr(self, name) for name in _NAMES}
        self.environment.globals |= {"methods": tuple(WATCHED_METHODS)}
        self.environment.filters |= {
            "number": stats.number,
            "signed": stats.signed,
            "interval": stats.with_interval,
            "probability": stats.probability,
            "rounded": lambda value, places: f"{round(value, places):,.0f}",
        }

    def value(self, expression: str) -> Any:
        """What an expression comes to.

        Raises:
            BadInput: it is no expression, or asks for what there is not.
        """
        try:
            return self.environment.compile_expression(expression, undefined_to_none=False)()
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, OSError) as error:
            raise BadInput(f"{expression}: {error!r}") from error

    def _file(self, name: str) -> Any:
        """What a JSON file of the folder holds, by its path in it."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def _report(self, experiment: str, scale: str) -> Any:
        return self.file(f"{scale}-strong/{experiment}.json")

    def _by_seed(self, experiment: str, dataset: str, row: str, scale: str) -> dict[int, float]:
        cell = self.one(self._report(experiment, scale)["rows"], key=row)["cells"][dataset]
        values = next(value for key, value in cell.items() if key.endswith("_by_seed"))
        return {int(seed): float(value) for seed, value in values.items()}

    def result(self, experiment: str, dataset: str, row: str, scale: str = "cpu") -> stats.MeanEstimate:
        """A row's mean over seeds, with its interval."""
        return stats.estimate(list(self._by_seed(experiment, dataset, row, scale).values()))

    def gap(self, experiment: str, dataset: str, row: str, base: str, scale: str = "cpu") -> stats.MeanEstimate:
        """A row less another, seed by seed. It has `mean`, `half_width`, `low`, `high`, `n` and `p_value()`."""
        found = stats.paired_difference(*(self._by_seed(experiment, dataset, key, scale) for key in (row, base)))
        if found is None:
            raise LookupError(f"{row} and {base} of {experiment} have no seed in common")
        return found

    def _curves(self, experiment: str, dataset: str, row: str, scale: str) -> dict[int, dict[int, float]]:
        """By seed what the evaluations of a row's whole runs gave, by epoch."""
        cell = self.one(self._report(experiment, scale)["rows"], key=row)["cells"].get(dataset, {"runs": ()})
        runs = self.runs(self.folder / f"{scale}-strong/runs")
        return {
            run.config.seed: {e["epoch"]: value for e in run.epochs if (value := run.result_of(e)) is not None}
            for run in (runs[name] for name in cell["runs"])
            if run.done and not run.diverged
        }

    def late_gain_gap(
        self, experiment: str, dataset: str, row: str, base: str, since: int, scale: str = "cpu"
    ) -> stats.MeanEstimate | None:
        """What a row gains from an evaluated epoch to the end, less what another gains, seed by seed.

        None: there is no seed of which both have that epoch; a run that diverged is left out.
        """

        def gains(key: str) -> dict[int, float]:
            curves = self._curves(experiment, dataset, key, scale)
            return {s: curve[max(curve)] - curve[since] for s, curve in curves.items() if since in curve}

        return stats.paired_difference(gains(row), gains(base))

    def epochs_ahead(
        self, experiment: str, dataset: str, row: str, base: str, level: float, scale: str = "cpu"
    ) -> stats.MeanEstimate | None:
        """How many epochs before another a row reaches an accuracy, seed by seed; between evaluations by a line.

        None: there is no seed of which both reach it; a run that diverged is left out.
        """

        def reached(key: str) -> dict[int, float]:
            curves = self._curves(experiment, dataset, key, scale)
            return {s: at for s, curve in curves.items() if (at := crossing(list(curve.items()), level)) is not None}

        return stats.paired_difference(reached(base), reached(row))

    def compared(self, experiment: str, dataset: str, row: str, base: str, scale: str = "cpu") -> Any:
        """The report's own comparison of a row with a baseline, with `p_holm`."""
        return self.one(self._report(experiment, scale)["differences"], dataset=dataset, row=row, baseline=base)

    def _checks(self) -> dict[int, float]:
        """SGD's results by seed at the learning rate that was looked at after the sweep."""
        return {run.config.seed: run.result for run in self.runs(self.folder / "cpu-strong/checks").values()}

    def checked_sgd(self) -> stats.MeanEstimate:
        """SGD on CIFAR-10 at the best learning rate that runs of full length have found."""
        return stats.estimate(list(self._checks().values()))

    def over_checked_sgd(self, row: str) -> stats.MeanEstimate | None:
        """A row of the remedies less that, seed by seed."""
        return stats.paired_difference(self._by_seed("remedies", "cifar10", row, "cpu"), self._checks())

    def trials(self, dataset: str, row: str, scale: str = "cpu") -> int:
        """How many trials tuned a row's learning rate."""
        return len(self.file(f"{scale}-strong/tuned.json")["choices"][dataset][row]["trials"])

    @staticmethod
    def one(items: Iterable[Record], **wanted: Any) -> Record:
        """The one of some records that has these values."""
        found = [each for each in items if all(each[key] == value for key, value in wanted.items())]
        if len(found) != 1:
            raise LookupError(f"{len(found)} records have {wanted}: expected one")
        return found[0]

    def _run(self, dataset: str, method: str) -> WatchedRun:
        study = MonitorStudy(tuned=self.folder / "cpu-strong", out=self.folder / "monitor")
        return next(each for each in study.planned() if (each.dataset, each.method) == (dataset, method))

    def _watched(self, dataset: str, *methods: str) -> list[dict[str, Any]]:
        """The records of the study of the monitor, of these methods one after another."""
        return [record for method in methods for record in self._run(dataset, method).records]

    def accuracy_under_monitor(self, dataset: str, method: str) -> float:
        """Test accuracy in percent of a run of that study."""
        return self._run(dataset, method).accuracy

    @staticmethod
    def violated(records: Iterable[Record], layer: str) -> int:
        """In how many records Σ|g|(1 − 2p) of a layer is below Φ/3 with its whole 95 % interval."""
        return sum(record["reliability"]["layers"][layer]["margin"][2] < 0 for record in records)

    def cosine(self, dataset: str, method: str, key: str = "cosine") -> float:
        """Mean cosine of the sign step and the gradient over a watched run; "lagged_cosine": of the step before."""
        found = [record["calibration"].get(key) for record in self.watched(dataset, method)]
        return stats.estimate([each for each in found if each is not None]).mean

    def _accuracies(self, method: str, attack: str, attackers: int, real: bool) -> dict[int, float]:
        final = self.file("byzantine/byzantine.json")["final"]
        found = self.one(final, method=method, attack=attack, attackers=attackers, real=real)
        return dict(zip(found["seeds"], found["accuracies"], strict=True))

    def byzantine(self, method: str, attack: str = "", attackers: int = 0, real: bool = False) -> stats.MeanEstimate:
        """Accuracy of a vote or a mean under an attack, of the study of Byzantine workers."""
        return stats.estimate(list(self._accuracies(method, attack, attackers, real).values()))

    def byzantine_gap(self, attack: str, attackers: int, real: bool = False) -> stats.MeanEstimate | None:
        """The vote's accuracy less the mean's under an attack, seed by seed."""
        vote, mean = (self._accuracies(method, attack, attackers, real) for method in ("vote", "mean"))
        return stats.paired_difference(vote, mean)

    def frontier(self, way: str) -> frontier_report.Point:
        """A way of the study of the frontier."""
        points = frontier_report.read_points(self.file("frontier/frontier.json"))
        return next(point for point in points if point.key == way)

    def frontier_gap(self, way: str) -> stats.MeanEstimate | None:
        """Its loss less that of DDP in fp32, seed by seed."""
        return stats.paired_difference(self.frontier(way).results, self.frontier("ddp").results)

    def frontier_fewer(self, way: str) -> float:
        """How many times fewer bytes than DDP in fp32 it sends."""
        return self.frontier("ddp").megabytes / self.frontier(way).megabytes

    def dithered(self) -> list[float]:
        """rms(m) / σ at every step of the monitor, of the runs with the paper's α."""
        records = (self.watched(d, *PAPERS_DITHER) for d in ("cifar10", "cifar100"))
        return [record["dither"]["ratio"] for each in records for record in each]

    def dither_map(self, condition: int, noise: str, size: float, lr: float) -> float:
        """Held-out accuracy in percent of a cell of a map of the dither study."""
        cells = self.file("dither/dither.json")["maps"][condition]["cells"]
        return float(self.one(cells, noise=noise, size=size, lr=lr)["accuracy"])

    @staticmethod
    def right(ratio: float) -> float:
        """The chance that a sign under Gaussian dither is right, at m / σ."""
        return NormalDist().cdf(ratio)

    def trained(self, method: str) -> Any:
        """The training over links with a way to reduce gradients: `accuracy`, `megabytes`, `seconds`."""
        return self.one(self.file("bench-train/bench-train.json")["samples"], method=method)

    def monitor_loop(self, loop: str, network: int = 0) -> Any:
        """What a loop with a monitor cost, on the first network or another."""
        return self.file("bench-monitor/bench-monitor.json")["networks"][network]["loops"][loop]

    def step(self, machine: str, workload: str, key: str) -> float:
        """Time of a step over fused SGD's on a kind of machine, the median over rounds."""
        found = self.file(f"bench-cpu/bench-step-{machine}.json")["workloads"][workload]["contestants"][key]
        return float(found["over_peer"]["median"])

    def step_ratio(self, key: str, base: str) -> dict[str, float]:
        """Time of a step over another's, by the medians of every kind of machine and workload: least, median, most."""
        ratios = [
            workload["contestants"][key]["median_seconds"] / workload["contestants"][base]["median_seconds"]
            for path in sorted((self.folder / "bench-cpu").glob("bench-step-*.json"))
            for workload in self.file(f"bench-cpu/{path.name}")["workloads"].values()
        ]
        return {"low": min(ratios), "median": median(ratios), "high": max(ratios)}

    def network(self, ranks: int, rate: str, method: str) -> Any:
        """What a method of reducing gradients took over links of a rate: `seconds`, `times_faster`, `bytes_sent`."""
        cells = self.file(NETWORK)["cells"]
        return self.one(cells, ranks=ranks, rate=rate)["methods"][method]

"""The study of loss over bytes and over time, for ways to train over slow links: what is run, and when.

    torchrun --nproc-per-node 4 -m signstep study frontier      trains what is missing
    signstep study frontier --links 10mbit/50ms 100mbit/20ms    times steps over links, as root, and writes the report

Every worker is a process. Learning rates are tuned on held-out text, with as many trials for every family of ways, by
runs as long as the final ones; a way that only sends fewer bytes of the same mean has the rates of its family. Finished
runs are kept, and the same command does what is missing. frontier_ways.py has the ways, frontier_links.py the timing,
frontier_report.py the tables and the figure.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from signstep.lab.arguments import check_minutes, check_place
from signstep.lab.errors import BadInput
from signstep.lab.output.command import command_line
from signstep.lab.output.files import make_folder
from signstep.lab.studies import frontier_links, frontier_report
from signstep.lab.studies.frontier_report import best_trial
from signstep.lab.studies.frontier_ways import FAMILIES, WAYS, Workload
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.records import is_done, read_run
from signstep.lab.training.workers import Workers


@dataclass(frozen=True)
class FrontierStudy:
    """Compare ways to train over slow links: final loss, bytes sent, and time over links of a rate and latency."""

    out: Path = Path("results/frontier")
    """Folder of the results."""
    data: Path | None = None
    """Folder to look for the text in first, or the file of --dataset text."""
    dataset: Dataset = "bible"
    """The text."""
    ways: tuple[str, ...] = ()
    """Which ones; default: all."""
    links: tuple[str, ...] = ()
    """Time steps over these, such as 10mbit/50ms; needs root, and is done without torchrun."""
    workers: int = 4
    """Processes that train a run."""
    subset: int = 500_000
    """Bytes that a run trains on, once."""
    seeds: int = 3
    """Runs of every way."""
    max_minutes: float | None = None
    """Start no run after this many minutes; the same command goes on."""

    @property
    def workload(self) -> Workload:
        """What the ways train."""
        return Workload(self.dataset, self.subset, self.workers)

    def run(self) -> int:
        """Under torchrun train what is missing; otherwise time steps over the links, and write the report.

        Raises:
            BadInput: an unknown way or link, another number of processes, or trials that are not finished.
        """
        check_minutes(self.max_minutes)
        check_place(self.data, [self.dataset])
        ways = tuple(dict.fromkeys(self.ways)) or tuple(WAYS)
        if unknown := [key for key in ways if key not in WAYS]:
            raise BadInput(f"--ways {unknown[0]}: expected some of {', '.join(WAYS)}")
        make_folder(self.out / "runs")
        workers = Workers.join("cpu")
        if workers.size > 1:
            if workers.size != self.workers:
                raise BadInput(f"--workers {self.workers}, and torchrun has started {workers.size}: give both the same")
            self._train(ways, workers)
            return 0
        for link in dict.fromkeys(self.links):
            frontier_links.time_ways(link, self.workload, ways, self.out, self.data)
        timed = replace(self, links=frontier_links.timed(self.out))
        command = command_line(["study", "frontier"], timed, omit=("out", "data", "max_minutes"))
        for path in frontier_report.write(self.out, self.workload, ways, self.seeds, command):
            print(f"written: {path}")
        return 0

    def _train(self, ways: tuple[str, ...], workers: Workers) -> None:
        end = math.inf if self.max_minutes is None else time.monotonic() + 60 * self.max_minutes
        folder, workload = self.out / "runs", self.workload

        def finish(config: RunConfig, what: str) -> bool:
            """Train a run to its end, and whether it has ended; all ranks are told the same."""
            path = folder / f"{config.hash}.jsonl"
            if workers.from_first(lambda: is_done(path)):
                return True
            if workers.any(time.monotonic() > end)[0]:
                return False
            ended = train(config, folder, data=self.data, device="cpu", progress=False) in ("done", "diverged")
            if ended and workers.rank == 0:
                path.with_suffix(".pt").unlink(missing_ok=True)
                run = read_run(path)
                print(f"{what}: {'diverged' if run.diverged else run.metric.text(run.result)}", flush=True)
            return ended

        chosen = {}
        for family in dict.fromkeys(WAYS[key].family for key in ways):
            for trial in FAMILIES[family].trials:
                if not finish(workload.trial(family, trial), f"{family} {trial}, held-out text"):
                    return
            chosen[family] = workers.from_first(functools.partial(best_trial, folder, workload, family))
        for seed, key in itertools.product(range(self.seeds), ways):
            config = workload.final(key, chosen[WAYS[key].family], seed)
            if not finish(config, f"{WAYS[key].label}, seed {seed}"):
                return

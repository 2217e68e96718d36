"""The study of workers' momenta under a vote: how far they come apart, and whether averaging them now and then pays.

Lion Cub (2411.16462) finds that a vote loses convergence while every worker keeps a momentum of its own, and averages
momenta every so many steps, in few bits. Here M simulated workers vote on a small GPT; every `period` votes their
momenta become their mean, each sent with 8 bits per coordinate there and back. The cosine of two workers' momenta is
taken just before.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signstep.distributed.reductions import REDUCTIONS, Gradients
from signstep.distributed.simulation import SimulatedVote, per_worker_gradients
from signstep.distributed.worker import Worker
from signstep.lab.arguments import check_minutes, check_place
from signstep.lab.errors import BadInput
from signstep.lab.output import stats
from signstep.lab.output.command import command_line
from signstep.lab.output.files import make_folder, read_json, write_all, write_json
from signstep.lab.output.machine import environment, now
from signstep.lab.output.tables import markdown_table
from signstep.lab.studies.frontier_ways import Workload
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.optimizers import OptimizerName
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.workers import Workers

NAME = "momenta"
_BLOCK = 1024
_RATES: dict[OptimizerName, float] = {"signsgd": 3.16e-4, "lion": 3.16e-4}
"""SignSGD's is the best of `signstep study frontier`; of Lion's four rates there, this is the second best."""


@dataclass(frozen=True)
class MomentaStudy:
    """Measure how far workers' momenta come apart under a vote, and what averaging them brings."""

    out: Path = Path("results/momenta")
    """Folder of the results."""
    data: Path | None = None
    """Folder to look for the text in first, or the file of --dataset text."""
    dataset: Dataset = "bible"
    """The text."""
    workers: int = 4
    """Simulated workers."""
    periods: tuple[int, ...] = (0, 10, 50)
    """Votes between two averages; 0: the momenta stay apart."""
    subset: int = 500_000
    """Bytes that a run trains on, once."""
    seeds: int = 3
    """Runs of every case."""
    max_minutes: float | None = None
    """Start no run after this many minutes; the same command goes on."""

    def run(self) -> int:
        """Do the runs that are missing, and write momenta.json and .md into `out`; the exit code, 0."""
        check_minutes(self.max_minutes)
        check_place(self.data, [self.dataset])
        end = math.inf if self.max_minutes is None else time.monotonic() + 60 * self.max_minutes
        make_folder(self.out / "runs")
        command = command_line(["study", "momenta"], self, omit=("out", "data", "max_minutes"))
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for seed, (optimizer, lr), period in itertools.product(range(self.seeds), _RATES.items(), self.periods):
            config = Workload(self.dataset, self.subset, 1).config(
                optimizer, "mean", {"lr": lr, "weight_decay": 0.1, "seed": seed}
            )
            path = self.out / "runs" / f"{config.hash}-{self.workers}-{period}.json"
            if not path.exists() and time.monotonic() > end:
                break
            if not path.exists():
                record = _train(config, self.workers, period, self.data)
                write_json(path, record | {"environment": environment(torch.device("cpu"), 1)})
                print(f"{optimizer}, period {period}, seed {seed}: {record['result']:.3f}", flush=True)
            found.setdefault((optimizer, period), []).append(read_json(path))
        if not found:
            raise BadInput(f"no run has ended in {self.out}: give it more minutes")
        for written in write_all(self.out, self._report(found, command)):
            print(f"written: {written}")
        return 0

    def _report(self, found: dict[tuple[str, int], list[dict[str, Any]]], command: str) -> dict[str, Any]:
        rows, cells = [], []
        for (optimizer, period), records in found.items():
            apart = {r["seed"]: r["result"] for r in found.get((optimizer, 0), [])}
            results = {r["seed"]: r["result"] for r in records}
            e = stats.estimate(list(results.values()))
            d = stats.paired_difference(results, apart) if period and apart else None
            bytes_per_parameter, cosine = (
                records[0]["bytes_per_parameter"],
                stats.estimate([r["cosine"] for r in records]),
            )
            rows.append(
                (
                    optimizer,
                    f"every {period}" if period else "never",
                    stats.with_interval(e, digits=3),
                    "" if d is None else stats.with_interval(d, sign=True, digits=3),
                    "" if d is None or (p := d.p_value()) is None else stats.probability(p),
                    f"{bytes_per_parameter:.3f}",
                    f"{cosine.mean:.3f}",
                )
            )
            cells.append(
                {
                    "optimizer": optimizer,
                    "period": period,
                    "results": results,
                    "bytes_per_parameter": bytes_per_parameter,
                    "cosine": cosine.mean,
                    "difference": None if d is None else asdict(d),
                }
            )
        made = next(iter(found.values()))[0]["environment"]
        record = {"command": command, "date": now(), "environment": made, "cells": cells}
        head = ("optimizer", "momenta averaged", "bits per byte", "less never", "p", "bytes per parameter and vote",
                "cosine of two momenta")  # fmt: skip
        page = [
            "# Workers' momenta under a vote",
            "",
            f"    {command}",
            "",
            f"{record['date']}, {made['cpu']}, one thread, torch {made['torch']}. {self.workers} simulated workers "
            f"vote on a GPT over {self.subset:,} bytes of {self.dataset}; {self.seeds} seeds, mean ± half the "
            "95 % interval, paired differences without a correction. The cosine is that of two workers' momenta, mean "
            "over pairs and votes just before an average, or over every 50th vote where there is none.",
            "",
            *markdown_table(head, rows, left=(0, 1)),
            "",
        ]
        return {f"{NAME}.json": record, f"{NAME}.md": "\n".join(page)}


def _train(config: RunConfig, workers: int, period: int, data: Path | None) -> dict[str, Any]:
    """The end of a run, the bytes of a vote, and the momenta's mean cosine."""
    torch.set_num_threads(1)
    run = TrainingRun(config, Workers(0, 1, torch.device("cpu")), data)
    vote = SimulatedVote(run.model, run.optimizer, workers)
    cosines = []
    for step in range(run.total_steps):
        x, y = run.batches.training(0, step)
        vote.vote(per_worker_gradients(run.model, run.objective.loss, x, y, workers, vectorize=False))
        run.optimizer.step()
        run.scheduler.step()
        if (step + 1) % (period or 50) == 0:
            cosines.append(_mean_cosine(vote.workers))
            if period:
                _average(vote.workers)
    cosines = cosines or [_mean_cosine(vote.workers)]  # a run that is shorter than a period
    loss, score = run.evaluate()
    gradients = Gradients(tuple(tuple(p.shape) for p in run.model.parameters()))
    sent = REDUCTIONS["vote"].payload(gradients, workers) / gradients.parameters
    if period:
        sent += 2 * (workers - 1) / workers * (1 + 4 / _BLOCK) / period
    return {
        "seed": config.seed,
        "config": config.to_dict(),
        "result": config.task.metric.of(loss, score),
        "cosine": sum(cosines) / len(cosines),
        "bytes_per_parameter": sent,
    }


def _mean_cosine(workers: Sequence[Worker]) -> float:
    flat = [torch.cat([state["exp_avg"] for state in worker.state.values()]) for worker in workers]
    pairs = [float(F.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(flat, 2)]
    return sum(pairs) / len(pairs)


def _average(workers: Sequence[Worker]) -> None:
    """Give every worker the mean of all momenta, rounded to 8 bits on the way there and on the way back."""
    for name in workers[0].state:
        mean = torch.stack([_rounded(worker.state[name]["exp_avg"]) for worker in workers]).mean(dim=0)
        for worker in workers:
            worker.state[name]["exp_avg"].copy_(_rounded(mean))


def _rounded(x: Tensor) -> Tensor:
    """To the nearest of 255 levels of the largest magnitude in each block."""
    blocks = F.pad(x, (0, -len(x) % _BLOCK)).view(-1, _BLOCK)
    unit = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38) / 127
    return ((blocks / unit).round() * unit).view(-1)[: len(x)]

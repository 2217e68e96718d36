"""The study of accuracy against the share of Byzantine workers where workers train by themselves between rounds.

Attackers corrupt the way that they have gone, and what they say of its length, as byzantine.py has it for gradients. A
local vote is compared with the mean of the ways (DiLoCo with an outer rate of 1 and no outer momentum). Every worker is
simulated with a model and images of its own: a small network on the digits, so that all runs take some minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from signstep.distributed import SimulatedLocalVote
from signstep.distributed.attacks import Attack
from signstep.distributed.rounds import Rounds
from signstep.lab.data import load, normalise
from signstep.lab.output import figures, stats
from signstep.lab.output.command import command_line
from signstep.lab.output.files import make_folder, write_all
from signstep.lab.output.lines import Line, lines
from signstep.lab.output.machine import environment, now
from signstep.lab.output.stats import MeanEstimate
from signstep.lab.output.tables import markdown_table
from signstep.lab.studies.byzantine_training import ATTACK_TITLES, ATTACKS

NAME = "byzantine-local"
_TITLE = "Accuracy against the share of Byzantine workers, with local steps"
_SHADES = {"flip": "blue", "flip-10": "orange", "collude": "vermillion", "random": "green"}
_METHODS = ("local vote", "mean of the ways")


@dataclass(frozen=True)
class Cell:
    """Accuracy in percent with one attack by one share of the workers, over seeds."""

    method: str
    attack: str
    attackers: int
    accuracies: tuple[float, ...]

    @property
    def estimate(self) -> MeanEstimate:
        """Over seeds."""
        return stats.estimate(self.accuracies)


@dataclass(frozen=True)
class LocalByzantineStudy:
    """Measure accuracy against the share of Byzantine workers, for a local vote and for the mean of the ways."""

    out: Path = Path("results/byzantine-local")
    """Folder of the results."""
    workers: int = 25
    """Simulated workers."""
    shares: tuple[int, ...] = (10, 25, 40, 49)
    """Attackers among them, in percent, rounded down."""
    every: int = 8
    """Steps of a round."""
    rounds: int = 40
    """Of a run."""
    batch: int = 16
    """Images of each worker and step."""
    lr: float = 3e-3
    """Of each worker's AdamW."""
    outer_lr: float = 0.5
    """Of the local vote, which has no outer momentum here."""
    seeds: int = 3
    """Runs of every case."""

    def run(self) -> int:
        """Measure, write byzantine-local.json, .md, .png and .svg into `out`, and return the exit code, 0."""
        make_folder(self.out)
        torch.set_num_threads(1)
        cells = []
        for method in _METHODS:
            for attack, share in [("", 0), *((a, s) for a in ATTACKS for s in self.shares)]:
                attackers = self.workers * share // 100
                accuracies = tuple(self._train(method, attack, attackers, seed) for seed in range(self.seeds))
                cells.append(Cell(method, attack, attackers, accuracies))
                who = f"{attackers} of {self.workers} {ATTACK_TITLES.get(attack, 'attackers')}"
                print(f"{method}, {who}: {stats.with_interval(cells[-1].estimate)} %", flush=True)
        record = {
            "command": command_line(["study", "byzantine-local"], self, omit=["out"]),
            "date": now(),
            "environment": environment(torch.device("cpu"), 1),
            "workers": self.workers,
            "cells": [asdict(cell) for cell in cells],
        }
        figure = _draw(cells, self.workers)
        contents: dict[str, Any] = {f"{NAME}.json": record, f"{NAME}.md": self._markdown(cells, record)}
        contents[f"{NAME}.png"] = figures.png(figure)
        contents[f"{NAME}.svg"] = figures.svg(figure, name=NAME, description=_TITLE, alone=True)
        for path in write_all(self.out, contents):
            print(f"written: {path}")
        return 0

    def _train(self, method: str, attack: str, attackers: int, seed: int) -> float:
        """The test accuracy of a run, in percent."""
        images = load("digits")
        x, test_x = (normalise(part, images.mean, images.std) for part in (images.train_x, images.test_x))
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, images.num_classes))
        models = [first, *(copy.deepcopy(first) for _ in range(self.workers - 1))]
        optimizers = [torch.optim.AdamW(model.parameters(), lr=self.lr, fused=True) for model in models]
        attacks: dict[int, Attack] = {rank: ATTACKS[attack](rank) for rank in range(attackers)}
        if method == _METHODS[0]:
            voted = SimulatedLocalVote(
                models, attacks=attacks, outer_lr=self.outer_lr, outer_momentum=0.0, seed=seed, nonfinite="abstain"
            )
            end_round = voted.vote
        else:
            end_round = _MeanOfWays(models, attacks).average
        draw = torch.Generator().manual_seed(seed)
        for _ in range(self.rounds):
            for model, optimizer in zip(models, optimizers, strict=True):
                for _ in range(self.every):
                    chosen = torch.randint(len(x), (self.batch,), generator=draw)
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[chosen]), images.train_y[chosen]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            end_round()
        with torch.no_grad():
            right = models[-1](test_x).argmax(1) == images.test_y
        return 100 * float(right.double().mean())

    def _markdown(self, cells: Sequence[Cell], record: dict[str, Any]) -> str:
        made = record["environment"]
        rows = [
            (c.method, ATTACK_TITLES.get(c.attack, "none"), f"{c.attackers} of {self.workers}",
             stats.with_interval(c.estimate))
            for c in cells
        ]  # fmt: skip
        return "\n".join(
            [
                f"# {_TITLE}",
                "",
                f"    {record['command']}",
                "",
                f"{record['date']}, {made['cpu']}, one thread, torch {made['torch']}. {self.workers} simulated workers "
                f"train a network of 64 hidden units on the digits with AdamW, {self.rounds} rounds of {self.every} "
                f"steps of {self.batch} images each; {self.seeds} seeds, mean ± half the 95 % interval. Attackers "
                "corrupt the way that they have gone in a round, and so the length that they tell; colluders send the "
                "negated mean of the honest ways. An accuracy of 10 % is that of a guess.",
                "",
                *markdown_table(("method", "attack", "attackers", "test accuracy, %"), rows, left=(0, 1)),
                "",
            ]
        )


class _MeanOfWays:
    """All models go to where they have gone on average, the attackers' ways corrupted."""

    def __init__(self, models: Sequence[nn.Module], attacks: dict[int, Attack]) -> None:
        self._rounds = Rounds(models)
        self._rounds.attacks = attacks

    @torch.no_grad()
    def average(self) -> None:
        columns = zip(*(each.entries for each in self._rounds.depart_together(0, train_on=False)), strict=True)
        for column in columns:
            self._rounds.start[column[0].name] -= torch.stack([e.flat for e in column]).mean(dim=0)
        self._rounds.return_to_start()


def _draw(cells: Sequence[Cell], workers: int) -> Figure:
    """Accuracy over the share of attackers: a line for each method and attack; the mean's are dashed."""
    drawn = []
    for method in _METHODS:
        for attack, title in ATTACK_TITLES.items():
            own = [c for c in cells if c.method == method and c.attack in ("", attack)]
            shares = tuple(100 * c.attackers / workers for c in own)
            ends = tuple(c.estimate for c in own)
            drawn.append(Line(f"{method}, {title}", _SHADES[attack], shares, ends, dashed=method != _METHODS[0]))
    return lines(
        drawn,
        across="attackers, %",
        up="test accuracy, %",
        heading=(_TITLE, f"{workers} simulated workers, digits; 95 % intervals"),
        ticks=sorted({100 * c.attackers / workers for c in cells}),
        limits=(0, None),
    )

"""The study of the expected vote against m / sigma: measured through the kernels, beside the formula.

The measurement is `signstep.lab.training.single_votes`; this file has the options, the figure and the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from signstep.lab.output import figures
from signstep.lab.output.command import command_line
from signstep.lab.output.files import write_all
from signstep.lab.output.lines import Line, lines
from signstep.lab.output.machine import environment, now
from signstep.lab.output.stats import MeanEstimate
from signstep.lab.output.tables import markdown_table
from signstep.lab.training.single_votes import RATIOS, MeasuredVote, formula_vote, measure_vote

WORKERS = (1, 3, 4, 7, 15, 31, 101)
_TITLE = "Expected vote against m / σ"
_SHADES = dict(zip(WORKERS, ("black", "orange", "pink", "olive", "green", "blue", "violet"), strict=True))


@dataclass(frozen=True)
class VoteCurveStudy:
    """Measure the expected vote against m / sigma through the kernels, beside the formula."""

    out: Path = Path("results/vote-curve")
    """Folder of the results."""
    elements: int = 10_000
    """Coordinates at each m / sigma and step."""
    steps: int = 10
    """Votes."""

    def run(self) -> int:
        """Measure, write vote-curve.json, .md, .png and .svg into `out`, and return the exit code, 0."""
        measured: list[MeasuredVote] = []
        for dither_workers in ("independent", "scaled"):
            for workers in WORKERS:
                votes = measure_vote(
                    workers, dither_workers, elements=self.elements, steps=self.steps, seed=len(measured)
                )
                measured.append(votes)
                print(f"{dither_workers}, M={workers}: at most {votes.worst:.1f} standard errors from the formula")
        record = {
            "command": command_line(["study", "vote-curve"], self),
            "date": now(),
            "environment": environment(torch.device("cpu"), 1),
            "votes_per_ratio": self.elements * self.steps,
            "ratios": RATIOS,
            "curves": [asdict(m) | {"worst": m.worst} for m in measured],
        }
        figure = draw_curves(measured)
        contents = {
            "vote-curve.json": record,
            "vote-curve.md": _markdown(measured, record),
            "vote-curve.png": figures.png(figure),
            "vote-curve.svg": figures.svg(figure, name="vote-curve", description=_TITLE, alone=True),
        }
        for path in write_all(self.out, contents):
            print(f"written: {path}")
        return 0


def draw_curves(measured: Sequence[MeasuredVote]) -> Figure:
    """Measured votes as dots on the formula's lines; those of scaled noise are dashed."""
    drawn = []
    for m in measured:
        scaled = m.dither_workers == "scaled"
        if scaled and m.workers not in (15, 101):
            continue
        label = f"M = {m.workers}, σ√M" if scaled else f"M = {m.workers}"
        fine = tuple(RATIOS[-1] * k / 100 for k in range(101))
        formula = tuple(MeanEstimate(1, formula_vote(ratio, m.workers, scaled=scaled), None) for ratio in fine)
        votes = tuple(MeanEstimate(1, vote, None) for vote in m.votes)
        drawn.append(Line("", _SHADES[m.workers], fine, formula, dashed=scaled, marks=False))
        drawn.append(Line(label, _SHADES[m.workers], RATIOS, votes, joined=False))
    heading = (_TITLE, 'dots: measured through the kernels; lines: the formula; dashed: dither_workers="scaled"')
    return lines(drawn, across="m / σ", up="expected vote", heading=heading, limits=(-0.02, 1.02))


def _markdown(measured: Sequence[MeasuredVote], record: Mapping[str, Any]) -> str:
    made = record["environment"]
    shown = [RATIOS.index(ratio) for ratio in (0.1, 0.3, 0.5, 1.0, 2.0)]
    text = [
        f"# {_TITLE}",
        "",
        f"`{record['command']}`, {record['date']}; {made['cpu']}, torch {made['torch']}, signstep {made['signstep']}",
        "",
        f"Means over {record['votes_per_ratio']} votes, standard error at most "
        f"{1 / math.sqrt(record['votes_per_ratio']):.4f}; in brackets the formula. The last column is the largest "
        "distance from it, over all m / σ, in standard errors.",
    ]
    head = ["M", *(f"m/σ = {RATIOS[i]:g}" for i in shown), "distance"]
    for dither_workers in ("independent", "scaled"):
        rows = [
            [str(m.workers), *(f"{m.votes[i]:.3f} ({m.formula[i]:.3f})" for i in shown), f"{m.worst:.1f}"]
            for m in measured
            if m.dither_workers == dither_workers
        ]
        text += ["", f'## dither_workers="{dither_workers}"', "", *markdown_table(head, rows, left=())]
    return "\n".join(text) + "\n"

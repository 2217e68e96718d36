"""The expected vote against m / sigma, measured through the kernels that votes are made of, beside the formula.

All workers have the same momentum m and noise of their own, so what is left is what dither and counting do. With
q = Phi(m / sigma), the formula is E v = P(B > M/2) - P(B < M/2), B binomial with M trials of chance q.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from matplotlib.figure import Figure
from torch import nn

from signstep.distributed.simulation import SimulatedVote
from signstep.lab.output import figures
from signstep.lab.output.lines import Line, lines
from signstep.lab.output.machine import environment
from signstep.lab.output.stats import Estimate
from signstep.lab.training.checkpoint import write_atomically
from signstep.optim import SignSGD
from signstep.theory.vote import expected_vote

NAME = "vote-curve"
WORKERS = (1, 3, 4, 7, 15, 31, 101)
RATIOS = tuple(k / 10 for k in range(11)) + tuple(k / 4 for k in range(5, 9))
"""m / sigma."""
_TITLE = "Expected vote against m / σ"
_SHADES = dict(zip(WORKERS, ("black", "orange", "pink", "olive", "green", "blue", "violet"), strict=True))


@dataclass(frozen=True)
class Options:
    """Measure the expected vote against m / sigma through the kernels, beside the formula."""

    out: Path = Path("results/vote-curve")
    """Folder of the results."""
    elements: int = 10_000
    """Coordinates at each m / sigma and step."""
    steps: int = 10
    """Votes."""


@dataclass(frozen=True)
class Measured:
    """Votes of one number of workers."""

    workers: int
    dither_workers: str
    votes: tuple[float, ...]
    """Mean vote at each of `RATIOS`."""
    errors: tuple[float, ...]
    """Its standard error, by the formula: sqrt((1 - (E v)^2) / n)."""
    formula: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The largest distance of a mean vote from the formula, in standard errors."""
        triples = zip(self.votes, self.errors, self.formula, strict=True)
        return max(abs(v - f) / max(e, 1e-6) for v, e, f in triples)


def measure(workers: int, dither_workers: str, *, elements: int, steps: int, seed: int = 0) -> Measured:
    """Vote on momenta of RATIOS times sigma.

    Args:
        workers: M.
        dither_workers: "independent" or "scaled", as in `MajorityVote`; sigma is that before scaling.
        elements: coordinates at each ratio and step.
        steps: votes, each with new noise.
        seed: of noise and coins.

    Example:
        >>> round(measure(3, "independent", elements=2000, steps=1).formula[5], 3)
        0.546
    """
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(torch.zeros(len(RATIOS), elements)))
    optimizer = SignSGD(model.parameters(), momentum=0.0, dither=1.0, dither_decay=0.0, seed=seed)
    sim = SimulatedVote(model, optimizer, workers, dither_workers=dither_workers)
    momentum = torch.tensor(RATIOS)[:, None].expand(-1, elements).contiguous()
    total = torch.zeros(len(RATIOS), dtype=torch.float64)
    for _ in range(steps):
        sim.vote([{"x": momentum}] * workers)
        votes = model.get_parameter("x").grad
        assert votes is not None
        total += votes.sum(dim=1, dtype=torch.float64)
        optimizer.step()
    n = elements * steps
    formula = tuple(expected(ratio, workers, dither_workers == "scaled") for ratio in RATIOS)
    errors = tuple(math.sqrt(max(0.0, 1 - f * f) / n) for f in formula)
    return Measured(workers, dither_workers, tuple((total / n).tolist()), errors, formula)


def expected(ratio: float, workers: int, scaled: bool) -> float:
    """The formula, at m / sigma with sigma before scaling."""
    return expected_vote(ratio / math.sqrt(workers) if scaled else ratio, workers)


def run(options: Options, *, command: str, say: Callable[[str], None] = print) -> None:
    """Measure, and write vote-curve.json, .md, .png and .svg into `options.out`.

    Args:
        options: of the measurement.
        command: how it was called, for the header.
        say: gets a line per curve.
    """
    chosen: list[Measured] = []
    for dither_workers in ("independent", "scaled"):
        for workers in WORKERS:
            size = {"elements": options.elements, "steps": options.steps}
            chosen.append(measure(workers, dither_workers, seed=len(chosen), **size))
            say(f"{dither_workers}, M={workers}: at most {chosen[-1].worst:.1f} standard errors from the formula")
    record = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(torch.device("cpu"), 1),
        "votes_per_ratio": options.elements * options.steps,
        "ratios": RATIOS,
        "curves": [asdict(m) | {"worst": m.worst} for m in chosen],
    }
    drawn = figure_of(chosen)
    contents = {
        "json": (json.dumps(record, indent=1) + "\n").encode(),
        "md": _markdown(chosen, record).encode(),
        "png": figures.png(drawn),
        "svg": figures.svg(drawn, name=NAME, description=_TITLE, alone=True).encode(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        path = options.out / f"{NAME}.{suffix}"
        write_atomically(path, functools.partial(_put, content))
        say(f"written: {path}")


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def figure_of(chosen: Sequence[Measured]) -> Figure:
    """Measured votes as dots on the formula's lines, scaled noise dashed."""
    drawn = []
    for m in chosen:
        scaled = m.dither_workers == "scaled"
        if scaled and m.workers not in (15, 101):
            continue
        label = f"M = {m.workers}, σ√M" if scaled else f"M = {m.workers}"
        fine = tuple(RATIOS[-1] * k / 100 for k in range(101))
        formula = tuple(Estimate(1, expected(ratio, m.workers, scaled), None) for ratio in fine)
        votes = tuple(Estimate(1, vote, None) for vote in m.votes)
        drawn.append(Line("", _SHADES[m.workers], fine, formula, dashed=scaled, marks=False))
        drawn.append(Line(label, _SHADES[m.workers], RATIOS, votes, joined=False))
    heading = (_TITLE, 'dots: measured through the kernels; lines: the formula; dashed: dither_workers="scaled"')
    return lines(drawn, across="m / σ", up="expected vote", heading=heading, limits=(-0.02, 1.02))


def _markdown(chosen: Sequence[Measured], record: Mapping[str, Any]) -> str:
    made = record["environment"]
    shown = [RATIOS.index(ratio) for ratio in (0.1, 0.3, 0.5, 1.0, 2.0)]
    lines_ = [
        f"# {_TITLE}",
        "",
        f"`{record['command']}`, {record['date']}; {made['cpu']}, torch {made['torch']}, signstep {made['signstep']}",
        "",
        f"Means over {record['votes_per_ratio']} votes, standard error at most "
        f"{1 / math.sqrt(record['votes_per_ratio']):.4f}; in brackets the formula. The last column is the largest "
        "distance from it, over all m / σ, in standard errors.",
    ]
    for dither_workers in ("independent", "scaled"):
        lines_ += ["", f'## dither_workers="{dither_workers}"', ""]
        head = ["M", *(f"m/σ = {RATIOS[i]:g}" for i in shown), "distance"]
        rows = [head, ["---:"] * len(head)]
        for m in (m for m in chosen if m.dither_workers == dither_workers):
            cells = [f"{m.votes[i]:.3f} ({m.formula[i]:.3f})" for i in shown]
            rows.append([str(m.workers), *cells, f"{m.worst:.1f}"])
        lines_ += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines_) + "\n"

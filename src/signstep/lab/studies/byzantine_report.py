"""What the Byzantine study writes: byzantine.json, a page of tables, and the figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from signstep.lab.output import figures
from signstep.lab.output.files import read_json, write_all
from signstep.lab.output.lines import Line, lines
from signstep.lab.output.machine import now
from signstep.lab.output.stats import MeanEstimate, estimate, with_interval
from signstep.lab.output.tables import markdown_table
from signstep.lab.studies.byzantine_training import ATTACK_TITLES, REDUCTION_OF

_TITLE = "Accuracy against the share of Byzantine workers"
_SHADES = {"flip": "blue", "collude": "vermillion", "random": "green", "flip-10": "pink"}
"""Palette colours, by attack."""


@dataclass(frozen=True)
class Point:
    """Accuracy of one reduction under one attack by one share of the workers, over seeds."""

    method: str
    """vote or mean."""
    lr: float
    real: bool
    attack: str
    attackers: int
    workers: int
    seeds: tuple[int, ...]
    """Rising."""
    accuracies: tuple[float, ...]
    """Test accuracy of each seed, in percent."""
    diverged: int
    """Number of seeds whose weights became non-finite."""

    @property
    def estimate(self) -> MeanEstimate:
        """In percent."""
        return estimate(self.accuracies)


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of all finished runs in a folder, by `ByzantineRun.key`."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def points(measured: Mapping[str, dict[str, Any]], split: str) -> list[Point]:
    """The accuracies of the runs on a split, with all seeds of a case together."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in sorted(measured.values(), key=lambda each: int(each["case"]["config"]["seed"])):
        case = record["case"]
        if case["config"]["split"] == split:
            method = REDUCTION_OF[case["config"]["optimizer"]]
            where = (case["real"], method, case["config"]["lr"], case["attack"], case["attackers"], case["workers"])
            grouped.setdefault(where, []).append(record)
    return [
        Point(
            method,
            lr,
            real,
            attack,
            attackers,
            workers,
            tuple(r["case"]["config"]["seed"] for r in records),
            tuple(r["accuracy"] for r in records),
            sum(r["status"] == "diverged" for r in records),
        )
        for (real, method, lr, attack, attackers, workers), records in sorted(grouped.items())
    ]


def write_report(out: Path, command: str) -> list[Path]:
    """Write the report of all finished runs in `out`, and return the paths of its files."""
    measured = read_runs(out / "runs")
    final, tuned = points(measured, "final"), points(measured, "tune")
    record = {
        "commands": sorted({record["command"] for record in measured.values()} | {command}),
        "date": now(),
        "environment": next(iter(measured.values()))["environment"],
        "final": [dataclasses.asdict(p) for p in final],
        "learning_rates": [dataclasses.asdict(p) for p in tuned],
    }
    contents: dict[str, Any] = {"byzantine.json": record, "byzantine.md": _markdown(final, tuned, record, measured)}
    simulated = [p for p in final if not p.real]
    if any(p.attackers for p in simulated):
        figure = draw_accuracy(simulated)
        contents["byzantine.png"] = figures.png(figure)
        contents["byzantine.svg"] = figures.svg(figure, name="byzantine", description=_TITLE, alone=True)
    return write_all(out, contents)


def draw_accuracy(simulated: Sequence[Point]) -> Figure:
    """Accuracy over the share of attackers: a line for each reduction and attack; the mean's are dashed."""
    drawn = []
    for method in REDUCTION_OF.values():
        for attack, title in ATTACK_TITLES.items():
            own = [p for p in simulated if p.method == method and (p.attack == attack or p.attackers == 0)]
            own.sort(key=lambda p: p.attackers)
            if any(p.attackers for p in own):
                shares = tuple(100 * p.attackers / p.workers for p in own)
                accuracies = tuple(p.estimate for p in own)
                drawn.append(Line(f"{method}, {title}", _SHADES[attack], shares, accuracies, dashed=method == "mean"))
    workers = simulated[0].workers
    subtitle = f"{workers} simulated workers, ResNet-8; 95 % intervals where there are several seeds"
    return lines(
        drawn,
        across="attackers, %",
        up="test accuracy, %",
        heading=(_TITLE, subtitle),
        ticks=sorted({100 * p.attackers / p.workers for p in simulated}),
        limits=(0, None),
    )


def _row(p: Point) -> tuple[str, ...]:
    attack = ATTACK_TITLES.get(p.attack, "none")
    diverged = f"{p.diverged} of {len(p.accuracies)} diverged" if p.diverged else ""
    share = f"{p.attackers} of {p.workers}"
    return (p.method, f"{p.lr:g}", attack, share, with_interval(p.estimate), str(len(p.accuracies)), diverged)


def _markdown(
    final: Sequence[Point], tuned: Sequence[Point], record: dict[str, Any], measured: Mapping[str, dict[str, Any]]
) -> str:
    made = record["environment"]
    out = [f"# {_TITLE}", ""]
    out += [f"- `{each}`" for each in record["commands"]]
    out += ["", f"{record['date']}, {made['cpu']}, {made['threads']} thread(s), torch {made['torch']}", ""]
    head = ("reduction", "lr", "attack", "attackers", "test accuracy, %", "seeds", "")
    for real in (False, True):
        chosen = [p for p in final if p.real == real]
        if not chosen:
            continue
        title, setting = _setting([r for r in measured.values() if r["case"]["real"] == real])
        table = markdown_table(head, [_row(p) for p in chosen], left=(0, 2, 6))
        grid = ", ".join(f"{p.method} {p.lr:g}: {p.accuracies[0]:.2f} %" for p in tuned if p.real == real)
        out += [f"## {title}", "", setting, "", *table, ""]
        out += [f"Learning rates, without attackers, on held-out training images: {grid}.", ""]
    return "\n".join(out)


def _setting(records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Title and description of the runs that are real, or of those that are simulated."""
    case = records[0]["case"]
    config = case["config"]
    if case["real"]:
        title, batch = "Real processes", f"{config['batch_size'] // case['workers']} images per worker and step"
        note = "Colluding: the attacker pushes in one random direction, as it cannot know the others' gradients."
    else:
        title = f"{case['workers']} simulated workers"
        images = config["batch_size"] // case["blocks"] * case["worker_blocks"]
        batch = f"{images} images per worker and step, out of a pool of {config['batch_size']} that the workers share"
        overlap = 100 * case["worker_blocks"] / case["blocks"]
        note = (
            f"Two workers have {overlap:.0f} % of their images in common on average, so honest workers agree more "
            "than with batches of their own. Colluding: attackers send the negated mean of the honest gradients."
        )
    network = f"{config['dataset']}, ResNet-8, width {config['width']:g}, imagenet stem"
    length = f"{config['epochs']} epochs ({max(r['step'] for r in records)} steps)"
    how = "momentum 0.9, cosine schedule; vote: SignSGD, mean: SGD"
    return title, f"{network}; {length}; {batch}; {how}. {note}"

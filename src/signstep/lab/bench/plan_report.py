"""What `signstep plan` shows: bytes and times of every method, what a vote is worth, and how far off the model is."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from signstep.distributed.plan import Cost, Link, Prediction, outside, predict
from signstep.distributed.reductions import REDUCTIONS, Gradients
from signstep.lab.bench.report import print_table
from signstep.lab.errors import BadInput
from signstep.theory.vote import accuracy, colluders_survived, expected_vote, linear_slope

_SNRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, math.inf)
_WIDTH = 110


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f}"


def show_costs(console: Console, gradients: Gradients, cost: Cost) -> None:
    """Print bytes and predicted times of every method."""
    count = gradients.parameters
    found = {key: predict(method, gradients, cost) for key, method in REDUCTIONS.items()}
    peer = next(iter(found.values()))
    rows = [
        (
            REDUCTIONS[key].label,
            f"{each.payload:,.0f}",
            f"{each.payload / count:.3f}",
            _ms(each.communication),
            _ms(each.best),
            _ms(each.worst),
            f"{peer.best / each.best:.1f}–{peer.worst / each.worst:.1f}",
        )
        for key, each in found.items()
    ]
    title = f"{count:,} parameters, {cost.workers} workers, {cost.link.rate / 1e6:g} Mbit/s each way"
    head = ("method", "bytes per step", "per parameter", "communication ms", "best ms", "worst ms", "times faster")
    print_table(console, title, head, rows, width=_WIDTH)


NOTES = (
    "bytes: sent by each worker in a step, without padding; PowerSGD's as if all were in square matrices",
    "best: communication overlaps with the step as far as it can, max(step, communication); worst: not at all, their "
    "sum; the work of compressing is in neither, signstep bench comm measures it",
    "q: the chance that one worker's sign is right, Phi(m / sigma); one worker, vote: the expected sign, from -1 to 1, "
    "where a tie is a coin; scaled: with dither_workers='scaled', sigma sqrt(M)",
    "flipping: workers that cast the opposite of their own sign; any share below half, (1 - a) q + a (1 - q) > 1/2",
    "colluding: workers that all cast the wrong sign; the share is that of many workers, (1 - a) q > 1/2",
)


def show_votes(console: Console, workers: int) -> None:
    """Print what a vote is worth, and how many attackers it survives."""
    scale = math.sqrt(workers)
    rows = []
    for snr in _SNRS:
        share, colluders = colluders_survived(snr, workers)
        rows.append(
            (
                "no noise" if snr == math.inf else f"{snr:g}",
                f"{accuracy(snr):.3f}",
                f"{expected_vote(snr, 1):.3f}",
                f"{expected_vote(snr, workers):.3f}",
                f"{expected_vote(snr / scale, workers):.3f}",
                f"{(workers - 1) // 2} of {workers}",
                f"{colluders} of {workers} ({100 * share:.0f} %)",
            )
        )
    head = ("m / sigma", "q", "one worker", "vote", "vote, scaled", "flipping survived", "colluding survived")
    title = f"Expected vote of {workers} workers; slope at 0: {linear_slope(workers):.2f}"
    print_table(console, title, head, rows, width=_WIDTH)


@dataclass(frozen=True)
class Checked:
    """A measurement beside its prediction."""

    workload: str
    ranks: int
    rate: str
    label: str
    predicted: Prediction
    measured: float
    """Seconds per step."""
    sent: float
    """Bytes per rank and step."""

    @property
    def time_error(self) -> float:
        """How far outside of [best, worst] the time is; 0 inside."""
        return outside(self.measured, self.predicted.best, self.predicted.worst)

    @property
    def bytes_error(self) -> float:
        """What was sent beyond the payload, per payload."""
        return self.sent / self.predicted.payload - 1


def check(path: Path) -> list[Checked]:
    """Predictions for every shaped cell of a benchmark, from the same method's time where links are not shaped.

    Raises:
        BadInput: not the record of `signstep bench comm`, or one without cells to compare.
    """
    try:
        record = json.loads(path.read_text())
        found = list(_checked(record))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"--check {path}: not what signstep bench comm writes ({error!r})") from error
    if not found:
        raise BadInput(
            f"--check {path}: a prediction needs the same workload and ranks at a rate and at the rate none; measure "
            "with signstep bench comm --rates 100mbit none"
        )
    return found


def _checked(record: dict[str, Any]) -> Iterator[Checked]:
    cells = record["cells"]
    free = {(cell["workload"], cell["ranks"]): cell for cell in cells if cell["rate"] == "none"}
    for cell in cells:
        place = (cell["workload"], cell["ranks"])
        if cell["bits_per_second"] is None or place not in free:
            continue
        # Records from before 29 November 2026 have no latency.
        link = Link(cell["bits_per_second"], cell.get("latency_seconds", 0.0))
        workload = record["workloads"][cell["workload"]]
        gradients = Gradients(tuple(map(tuple, workload["shapes"])))
        for key, measured in cell["methods"].items():
            step = free[place]["methods"][key]["seconds"]["median"]
            predicted = predict(REDUCTIONS[key], gradients, Cost(cell["ranks"], link, step))
            yield Checked(
                cell["workload"],
                cell["ranks"],
                cell["rate"],
                REDUCTIONS[key].label,
                predicted,
                measured["seconds"]["median"],
                measured["bytes_sent"],
            )


def show_check(console: Console, checked: Sequence[Checked]) -> None:
    """Print every prediction beside its measurement, then the errors in short."""
    rows = [
        (
            each.workload,
            f"{each.ranks}",
            each.rate,
            each.label,
            f"{_ms(each.predicted.best)}–{_ms(each.predicted.worst)}",
            _ms(each.measured),
            f"{100 * each.time_error:+.0f} %",
            f"{100 * each.bytes_error:+.1f} %",
        )
        for each in checked
    ]
    head = ("params", "ranks", "rate", "method", "predicted ms", "measured ms", "error", "bytes")
    title = (
        "Predicted: best and worst from the time of the method where links are not shaped\n"
        "error: distance of the measured time from the nearer of them; bytes: sent beyond the payload"
    )
    print_table(console, title, head, rows, width=_WIDTH)
    inside = sum(each.time_error == 0 for each in checked)
    worst = max(checked, key=lambda each: abs(each.time_error))
    typical = statistics.median(abs(each.time_error) for each in checked)
    more = [100 * each.bytes_error for each in checked]
    console.print(
        f"time: {inside} of {len(checked)} predictions hold; error median {100 * typical:.1f} %, largest "
        f"{100 * worst.time_error:+.0f} % ({worst.workload}, {worst.ranks} ranks, {worst.rate}, {worst.label})\n"
        f"bytes: median {statistics.median(more):+.1f} %, from {min(more):+.1f} to {max(more):+.1f} %",
        highlight=False,
        soft_wrap=True,
    )

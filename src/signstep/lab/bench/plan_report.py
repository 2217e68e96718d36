"""What `signstep plan` shows: bytes and times of every method, what a vote is worth, and how far off the model is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from signstep.distributed.local_methods import LOCAL_METHODS, LocalMethod
from signstep.distributed.plan import Cost, Link, Prediction, outside, predict, steps_under_way
from signstep.distributed.reductions import REDUCTIONS, Gradients, Reduction
from signstep.lab.bench.comm_cells import LOOPBACK
from signstep.lab.bench.report import print_table
from signstep.lab.bench.work import measured_work, read_record, workload_gradients
from signstep.lab.errors import BadInput
from signstep.theory.vote import accuracy, colluders_survived, expected_vote, linear_slope

_SNRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, math.inf)
_WIDTH = 130


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f}"


def _digits(number: float) -> str:
    """Three digits that count.

    >>> [_digits(each) for each in (0.01234, 2.0, 45.678, 12_345)]
    ['0.0123', '2.00', '45.7', '12,300']
    """
    if number == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(float(f"{number:.2e}"))))
    return f"{round(number, places):,.{max(0, places)}f}"


def _time(seconds: float) -> str:
    """With the unit that suits it.

    >>> [_time(each) for each in (0.0123, 3.14159, 1000, 1e7)]
    ['12.3 ms', '3.14 s', '16.7 min', '2,780 h']
    """
    for limit, unit, name in ((0.9995, 1e-3, "ms"), (100.0, 1.0, "s"), (5999.0, 60.0, "min")):
        if seconds < limit:
            return f"{_digits(seconds / unit)} {name}"
    return f"{_digits(seconds / 3600)} h"


def _size(count: float) -> str:
    """Bytes, with the unit that suits them.

    >>> [_size(each) for each in (12.3, 45_678, 82_133_333, 7e9)]
    ['12.3 B', '45.7 kB', '82.1 MB', '7.00 GB']
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{_digits(count / unit)} {name}"
    return f"{_digits(count)} B"


@dataclass(frozen=True)
class Row:
    """One method of the table of costs."""

    label: str
    every: int
    """Steps per reduction or round."""
    votes: bool
    """Whether a majority decides; else the mean of what workers send."""
    found: Prediction
    worked: bool
    """Whether the processor's work is in it."""


def cost_rows(gradients: Gradients, cost: Cost, every: Sequence[int], work: Mapping[str, float]) -> list[Row]:
    """Every method, then every method of rounds with so many steps in each.

    Args:
        gradients: the model's.
        cost: what a step is done with.
        every: H, for each of `LOCAL_METHODS`.
        work: processor seconds per parameter by method, where they are known.
    """

    def row(label: str, method: Reduction | LocalMethod, like: str, steps: int) -> Row:
        seconds = work.get(like, 0.0) * gradients.parameters
        found = predict(method, gradients, cost, work=seconds, every=steps)
        # The sign of a sum of signs is a vote too.
        return Row(label, steps, like.startswith("vote") or like == "int8-sum", found, like in work)

    rows = [row(each.label, each, key, 1) for key, each in REDUCTIONS.items()]
    rows += [row(f"{each.label}, H = {h}", each, each.like, h) for each in LOCAL_METHODS.values() for h in every]
    return rows


def show_costs(console: Console, gradients: Gradients, cost: Cost, rows: Sequence[Row], snr: float) -> None:
    """Print bytes and predicted times of every method, what its vote is worth and how many attackers it survives."""
    peer = rows[0].found
    lines = []
    for row in rows:
        found, at_once = row.found, snr * math.sqrt(row.every)
        under_way = steps_under_way(found, cost, row.every)
        lines.append(
            (
                row.label,
                _size(found.payload),
                _time(found.wire),
                _time(found.waiting),
                _time(found.work) if row.worked else "?",
                f"{_time(found.best)} – {_time(found.worst)}",
                # One worker whose steps take no time waits for nothing.
                f"{_digits(peer.best / found.best)}–{_digits(peer.worst / found.worst)}" if found.best else "",
                f"{row.every}" + (f" + {under_way}" if under_way else ""),
                f"{expected_vote(at_once, cost.workers):.2f}" if row.votes else "mean",
                f"{100 * colluders_survived(at_once, cost.workers)[1] / cost.workers:.0f} %" if row.votes else "0 %",
            )
        )
    link = cost.link
    title = (
        f"{gradients.parameters:,} parameters, {cost.workers} workers, {link.rate / 1e6:g} Mbit/s each way, "
        f"round trip {1e3 * link.latency:g} ms, step {1e3 * cost.step:g} ms"
    )
    head = ("method", "bytes", "wire", "latency", "work", "a step takes", "times faster", "stale", "vote", "attackers")
    print_table(console, title, head, lines, width=_WIDTH)


NOTES = (
    "all columns are per step, and of one worker; where workers talk once in H steps, a step's share",
    "bytes: sent, without padding; PowerSGD's as if all were in square matrices",
    "wire: of the bytes and their headers; latency: of the links, as often as the collectives wait for it, one "
    "bucket after the other, or part of a round's vote two by two; TCP's slow start and lost packets are not in it",
    "work: of one processor core for packing, sending and unpacking, measured by signstep bench comm; ?: not measured; "
    "a round's is taken to be that of a step of the vote, of DDP in fp32 and of QSGD, which do about as much",
    "a step takes: from communication that overlaps with steps as far as it can, max(step + work, wire + one "
    "message's latency), to none that does, the sum of all",
    "stale: after how many steps the other workers have what a step has found; + so many while a round travels, if "
    "training goes on meanwhile",
    "vote: the expected sign of a vote, from -1 to 1, where m / sigma of a worker's step is --snr, and sqrt(H) times "
    "that of H steps that go the same way; attackers: the largest share of workers that may all cast the wrong sign; "
    "a mean survives none, since one worker can move it anywhere",
)
VOTE_NOTES = (
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


def check(path: Path, measured: Path | None = None) -> list[Checked]:
    """Predictions for every cell of a benchmark in network namespaces, from the work that its methods do.

    Args:
        path: bench-comm.json.
        measured: another, which says how much work that is; None: the same, where links are not shaped.

    Raises:
        BadInput: not the record of `signstep bench comm`, or one without cells to compare.
    """
    record = read_record("--check", path)
    source = record if measured is None else read_record("--measured", measured)
    try:
        found = list(_checked(record, source))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--check {path}: not what signstep bench comm writes ({error!r})") from error
    if not found:
        raise BadInput(
            f"--check {path}: a prediction needs the same methods at a rate and at the rate none; measure with "
            "signstep bench comm --rates 100mbit none, or name a file with the rate none as --measured"
        )
    return found


def _checked(record: dict[str, Any], source: dict[str, Any]) -> Iterator[Checked]:
    for cell in record["cells"]:
        if cell["rate"] == LOOPBACK:
            continue
        # Records from before 29 November 2026 have no latency.
        rate, latency = cell["bits_per_second"], cell.get("latency_seconds", 0.0)
        cost = Cost(cell["ranks"], Link(math.inf if rate is None else rate, latency), step=0.0)
        gradients = workload_gradients(record["workloads"][cell["workload"]])
        work = measured_work(source, cell["ranks"])
        # Ranks take turns on the cores that there are.
        turns = max(1.0, cell["ranks"] / record["machine"]["cores"])
        for key, measured in cell["methods"].items():
            if key not in work:
                continue
            seconds = turns * work[key] * gradients.parameters
            yield Checked(
                cell["workload"],
                cell["ranks"],
                cell["rate"],
                REDUCTIONS[key].label,
                predict(REDUCTIONS[key], gradients, cost, work=seconds),
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
        "Predicted: best and worst from bytes, latency, and the work that the method does where links are not shaped\n"
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

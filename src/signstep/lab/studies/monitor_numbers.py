"""The numbers of a monitor's record as text, for a terminal, Markdown or a page. Any of them may be missing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from signstep.monitor.calibration_panel import RATE_RULES
from signstep.theory.bounds import PAPER_CONSTANT

Record = Mapping[str, Any]

NONE = "—"
RULE_LABELS = {
    "paper": "paper, eq. (12)",
    "ratio": "ratio",
    "applied": "applied",
    "lagged": "lagged",
    "swats": "swats",
}
_RULE_NOTES = {
    "paper": "mean of the absolute projections",
    "ratio": "projection of averages, signed",
    "applied": "ratio, of the step that dither takes on average",
    "lagged": "ratio, without what this gradient adds to the momentum",
    "swats": "the gradient on the step: ratio / cos²",
}


def at(record: Any, *path: str | int) -> float | None:
    """The finite number at a path into a record; None where there is none.

    >>> at({"snr": [0.1, None, 2]}, "snr", 2), at({"snr": [0.1, None]}, "snr", 1), at({}, "dither", "rms")
    (2.0, None, None)
    """
    for key in path:
        if isinstance(record, Mapping):
            record = record.get(key)
        elif isinstance(key, int) and isinstance(record, Sequence) and not isinstance(record, str):
            record = record[key] if key < len(record) else None
        else:
            return None
    good = isinstance(record, int | float) and not isinstance(record, bool) and math.isfinite(record)
    return float(record) if good else None


def by_step(records: Sequence[Record]) -> list[Record]:
    """The records by rising step. A run that goes on from a checkpoint measures steps again: the last record counts."""
    known = {step: record for record in records if (step := at(record, "step")) is not None}
    return [known[step] for step in sorted(known)]


def number(x: float | None) -> str:
    """Three digits.

    >>> number(0.00001234), number(-12345.0), number(None)
    ('1.23e−5', '−12300', '—')
    """
    if x is None:
        return NONE
    text = f"{float(f'{x:.3g}'):g}"
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].replace("+", ""), text).replace("-", "−")


def count(x: float | None) -> str:
    """A whole number, every digit of it."""
    return NONE if x is None else f"{x:.0f}"


def share(x: float | None) -> str:
    """In percent.

    >>> share(0.1234), share(None)
    ('12.3 %', '—')
    """
    return NONE if x is None else f"{number(round(100 * x, 9))} %"


def ratio(part: Any) -> tuple[float, float | None, float | None] | None:
    """Alignment over Phi / 3 of a record's "reliability" or one of its layers, and the interval that margin gives it.

    Returns:
        (value, low, high); None where neither Phi can be told from 0 nor the ratio from 1. Below 1, inequality (7)
        does not hold.
    """
    phi, least, value = at(part, "phi", 0), at(part, "phi", 1), at(part, "ratio")
    if phi is None or phi <= 0 or value is None:
        return None
    low, high = (None if x is None else 1 + PAPER_CONSTANT * x / phi for x in (at(part, "margin", i) for i in (1, 2)))
    told = least is None or least > 0 or (low is not None and low > 1) or (high is not None and high < 1)
    return (value, low, high) if told else None


def below_one(record: Record) -> tuple[dict[str, bool], int]:
    """Layers whose `ratio` is below 1, and whether the whole interval is; and the number of layers.

    As for the monitor's alarm, the interval is so wide that of all layers together 2.5 % are below by chance.
    """
    found = _mapping(_mapping(record, "reliability"), "layers")
    normal = NormalDist()
    wider = normal.inv_cdf(1 - 0.025 / max(1, len(found))) / normal.inv_cdf(1 - 0.025)
    below = {}
    for name, layer in found.items():
        seven = ratio(layer)
        if seven is not None and seven[0] < 1:
            value, _, high = seven
            below[name] = high is not None and value + wider * (high - value) < 1
    return below, len(found)


def headline(record: Record) -> str:
    """What the record says, in a sentence."""
    when = f"step {count(at(record, 'step'))}"
    alarms = len(sentences(record, "alarms"))
    if alarms:
        return f"{alarms} {'alarm' if alarms == 1 else 'alarms'} at {when}."
    value, low = at(record, "reliability", "reliability", 0), at(record, "reliability", "reliability", 1)
    if value is None:
        return f"At {when} nothing is known of the signs."
    if low is None or low <= 0:
        return f"No alarm at {when}, but the signs of its micro-batches cannot be told from coins."
    return f"No alarm at {when}: in a micro-batch a typical sign is right with probability {(1 + value) / 2:.3f}."


def sentences(record: Record, key: str) -> list[str]:
    """The alarms or the advice of a record."""
    found = record.get(key)
    return (
        [each for each in found if isinstance(each, str)]
        if isinstance(found, Sequence) and not isinstance(found, str)
        else []
    )


@dataclass(frozen=True)
class NumberRow:
    """A number with its name and what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Instrument:
    """What one instrument of the monitor has measured."""

    title: str
    rows: tuple[NumberRow, ...]
    reason: str = ""
    """Why there are no rows."""


def parts(record: Record) -> list[Instrument]:
    """The numbers of a record over all coordinates; those that are missing are left out."""
    return [_signs(record), _noise(record), _dither(record), _calibration(record)]


def _part(title: str, rows: Sequence[tuple[str, str, str]], reason: object) -> Instrument:
    known = tuple(NumberRow(*row) for row in rows if not row[1].startswith(NONE))
    return Instrument(title, known, "" if known else reason if isinstance(reason, str) else "not measured")


def _interval(part: Any, *path: str) -> str:
    value, low, high = (at(part, *path, i) for i in (0, 1, 2))
    return _with_interval(value, low, high)


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    return number(value) + ("" if low is None or high is None else f" [{number(low)}, {number(high)}]")


def _signs(record: Record) -> Instrument:
    found = _mapping(record, "reliability")
    seven = ratio(found)
    rows = [
        (
            "1 − 2p, root mean square",
            _interval(found, "reliability"),
            "0: a coin; 1: a sign that is always right; below 0: nothing is seen",
        ),
        (
            "S",
            _interval(found, "snr"),
            "signal over noise in a micro-batch, of all coordinates together; below 0: nothing is seen",
        ),
        ("Σ |g| (1 − 2p)", _interval(found, "alignment"), "loss that a micro-batch's sign step takes off, per lr"),
        ("Φ", _interval(found, "phi"), "eq. (1)"),
        ("Σ |g| (1 − 2p) over Φ / 3", NONE if seven is None else _with_interval(*seven), "eq. (7) says at least 1"),
        ("S below 2/√3, micro-batch", share(at(found, "below_critical")), "of the coordinates"),
        ("S below 2/√3, step", share(at(found, "below_critical_step")), "of the coordinates, in a step's gradient"),
        ("exactly 0", share(at(found, "zeros")), "of the gradients' entries"),
    ]
    return _part("Signs", rows, found.get("reason"))


def _noise(record: Record) -> Instrument:
    found = _mapping(record, "symmetry")
    low, middle, high = (at(found, "skewness", q) for q in ("q05", "q50", "q95"))
    scatter = number(at(found, "skewness_std"))
    rows = [
        (
            "symmetry rejected",
            share(at(found, "rejected_share")),
            f"of {count(at(found, 'tested'))} coordinates, at a false discovery rate of 5 %",
        ),
        (
            "skewness",
            _with_interval(middle, low, high),
            f"median, 5 and 95 % quantile over coordinates; Gaussian samples scatter by {scatter}",
        ),
        (
            "S that the skew spoils",
            number(at(found, "skew_threshold")),
            "below it the sign of a mean of all micro-batches is wrong more often than right, in the median",
        ),
        ("below their own S", share(at(found, "against_share")), "of the coordinates, with g of the skewness's sign"),
        ("exactly 0", share(at(found, "zero_share")), "of the entries of tested micro-batches"),
        ("unimodality rejected", share(at(found, "dip_rejected_share")), "dip test, false discovery rate 5 %"),
    ]
    return _part("Noise", rows, found.get("advice"))


def _dither(record: Record) -> Instrument:
    found = _mapping(record, "dither")
    rows = [
        ("rms(m)", number(at(found, "rms")), "of the momentum"),
        ("σ", number(at(found, "sigma")) if at(found, "sigma") else NONE, "of the dither"),
        ("rms(m) / σ", number(at(found, "ratio")), "near 1: they match; below 0.1 a step is random"),
        ("|m| below σ/2", share(at(found, "linear_share")), "of the coordinates: these move as under SGD"),
        ("lr of that SGD", number(at(found, "equivalent_lr")), "momentum as an average of gradients"),
        (
            "random walk",
            number(at(found, "random_walk")),
            f"lr √k, what k random steps come to; the weights' rms is {number(at(found, 'weight_rms'))}",
        ),
        ("matching α", number(at(found, "matching_alpha")), "the dither that would make rms(m) / σ 1 at this step"),
    ]
    return _part("Dither", rows, found.get("advice"))


def _calibration(record: Record) -> Instrument:
    found = _mapping(record, "calibration")
    steps = at(found, "own_steps")
    rows = []
    for rule in RATE_RULES:
        now, average = at(found, "now", rule), at(found, "average", rule)
        value = number(average) + ("" if now is None or steps == 1 else f" (this step {number(now)})")
        rows.append((f"SGD's lr by {RULE_LABELS[rule]}", value, _RULE_NOTES[rule]))
    listed = found.get("groups")
    groups = listed if isinstance(listed, Sequence) else ()
    for i, group in enumerate(groups):
        name = "calibrated_lr" if len(groups) == 1 else f"calibrated_lr of group {i}"
        rows.append((name, number(at(group, "calibrated_lr")), "that the optimizer itself would switch with"))
    over = "" if steps is None else f" over {count(steps)} own steps"
    rows += [
        ("cosine", number(at(found, "cosine")), "of the sign step and the gradient"),
        ("cosine, lagged", number(at(found, "lagged_cosine")), "of the sign of m before the step and the gradient"),
    ]
    if steps != 1:
        rows += [
            ("steps uphill", _interval_share(found, "negative"), f"share of negative <s, g>{over}"),
            ("steps uphill, lagged", _interval_share(found, "lagged_negative"), "with the sign of m before the step"),
        ]
    return _part("Calibration", rows, found.get("advice"))


def _interval_share(found: Any, key: str) -> str:
    value, low, high = (at(found, key, i) for i in (0, 1, 2))
    return share(value) + ("" if low is None or high is None else f" [{share(low)}, {share(high)}]")


def _mapping(record: Any, key: str) -> Mapping[str, Any]:
    found = record.get(key) if isinstance(record, Mapping) else None
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Layers:
    """A table of a record's layers, without the columns that have no number in any."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """Name and cells."""
    violated: frozenset[str]
    """Layers in which inequality (7) surely does not hold."""


def layers(record: Record) -> Layers:
    """The layers of a record's instruments side by side."""
    signs, dither, steps = (
        _mapping(_mapping(record, key), "layers") for key in ("reliability", "dither", "calibration")
    )
    dithered = any(at(layer, "ratio") is not None for layer in dither.values())
    names = dict.fromkeys([*signs, *dither, *steps])
    columns: dict[str, dict[str, str]] = {
        "1 − 2p": {n: _interval(signs.get(n), "reliability") for n in names},
        "S": {n: number(at(signs.get(n), "snr", 0)) for n in names},
        "eq. (7)": {n: NONE if (r := ratio(signs.get(n))) is None else number(r[0]) for n in names},
        "S < 2/√3": {n: share(at(signs.get(n), "below_critical")) for n in names},
        "zeros": {n: share(at(signs.get(n), "zeros")) for n in names},
        "rms(m)": {n: number(at(dither.get(n), "rms")) for n in names},
        "σ": {n: number(at(dither.get(n), "sigma") or None) for n in names},
        "rms(m)/σ": {n: number(at(dither.get(n), "ratio")) for n in names},
        "linear": {n: share(at(dither.get(n), "linear_share")) for n in names},
        # Says the same as the ratio where there is one.
        "matching α": {n: NONE if dithered else number(at(dither.get(n), "matching_alpha")) for n in names},
        "cosine": {n: number(at(steps.get(n), "cosine")) for n in names},
        "SGD's lr": {n: number(at(steps.get(n), "ratio")) for n in names},
    }
    known = {head: cells for head, cells in columns.items() if any(cell != NONE for cell in cells.values())}
    rows = tuple((name, tuple(cells[name] for cells in known.values())) for name in names)
    violated = frozenset(name for name, sure in below_one(record)[0].items() if sure)
    return Layers(tuple(known), rows, violated)


LAYER_NOTE = (
    "1 − 2p: root mean square with its interval; S of the layer; eq. (7): Σ |g| (1 − 2p) over Φ / 3, at least 1 under "
    "symmetric, unimodal noise, where it can be told; S < 2/√3 and zeros: shares of coordinates and entries; linear: "
    "share of |m| below σ/2; SGD's lr: by the rule ratio at this step, negative where the step points uphill."
)
"""What the columns are."""

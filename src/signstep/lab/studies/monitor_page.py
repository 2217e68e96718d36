"""The page on a monitor's records: alarms and advice first, then figures, then every number of the last record.

It is one HTML page that needs no other file, the same text as Markdown, and the figures as files. Any number of a
record may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from signstep.lab.output import figures, pages
from signstep.lab.output.files import make_folder, write_text
from signstep.lab.studies import monitor_figures, monitor_numbers
from signstep.lab.studies.monitor_figures import LabelledRun, NothingToDraw, colour
from signstep.lab.studies.monitor_numbers import Instrument, Layers, Record, at, by_step, count, number, sentences

PAGE_FILE = "monitor.html"

_NOTES = {
    "noise": (
        "The noise of the gradient",
        "Each plot is one coordinate of one parameter: its gradients in the micro-batches, less their mean, over their "
        "standard deviation. Theorem 1 takes the noise to be symmetric with one peak; the grey normal law is of that "
        "kind. The outermost bars hold what lies further out.",
    ),
    "snr": (
        "Signal over noise",
        "S of a coordinate is its |g| over the standard deviation of its noise in a micro-batch. By eq. (6) a sign is "
        "wrong with a chance of at most 2/(9 S²) right of 2/√3, and of 1/2 − S/(2√3) left of it. The mean of k "
        "micro-batches has a √k times larger S. Estimates scatter: grey is what as many micro-batches show of "
        "coordinates without any signal, under Gaussian noise.",
    ),
    "seven": (
        "Inequality (7)",
        "What a micro-batch's sign step takes off the loss, Σ |g| (1 − 2p), over Φ / 3. Under symmetric noise with one "
        "peak it is at least 1 (dashed), under Gaussian noise 2.05 to 3 (grey); the band is the 95 % interval. There "
        "is a gap where Φ cannot be told from 0; a triangle is a value beyond the edge. Below: the share of layers "
        "under 1, solid by their whole interval, corrected for their number, dotted by their estimate, which chance "
        "alone takes there too.",
    ),
    "calibration": (
        "The learning rate for SGD",
        "What SGD would go on with after a switch, by each rule, averaged over the measured steps (decay 0.9). A "
        "triangle is a 0: on average the step then points uphill.",
    ),
    "dither": (
        "Dither beside the momentum",
        "The root mean square of the momentum over σ of the dither, of all dithered coordinates. Near 1 most "
        "coordinates move in proportion to their momentum; below the grey band a step is random, above it dither "
        "changes next to no sign.",
    ),
}


@dataclass(frozen=True)
class Key:
    """An entry of the key beside a figure."""

    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Drawn:
    """A figure of the page."""

    kind: str
    title: str
    note: str
    parts: tuple[Markup, ...]
    """Drawings, side by side where there is room."""
    file: str
    description: str
    key: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Told:
    """What the page says of one run."""

    label: str
    last: Record
    scope: str
    alarms: tuple[str, ...]
    advice: tuple[str, ...]
    earlier: str
    """Which other records have alarms."""
    parts: tuple[Instrument, ...]
    layers: Layers


def write(records: Sequence[Record], out: Path, *, title: str, command: str) -> Path:
    """Write what the records of a run show into `out`: `monitor.html`, `monitor.md` and figures `monitor-<kind>.svg`.

    Args:
        records: as `signstep.monitor.sinks.read` gives them.
        out: a folder, made where there is none.
        title: what was monitored.
        command: the command that made the page, printed as it is; empty: none is printed.

    Returns:
        The path of the page, which needs no other file and no network.

    Raises:
        ValueError: there is no record with a step.
        CannotWrite: `out` cannot be written. Each file is there whole or as it was.
    """
    return write_runs([("", records)], out, title=title, command=command)


def write_runs(
    runs: Sequence[LabelledRun],
    out: Path,
    *,
    title: str,
    command: str,
    name: str = "monitor",
    about: Sequence[str] = (),
) -> Path:
    """As `write`, for several runs beside each other; `name` begins the names of the Markdown file and the figures.

    The page is always monitor.html. A single run has an empty label. `about` has a sentence for each run on what was
    monitored; where it is empty, that is the sentence of `scope`.
    """
    ordered = [(label, by_step(records)) for label, records in runs]
    if not ordered or not all(records for _, records in ordered):
        raise ValueError("there is no record: the monitor has written none yet")
    make_folder(out)
    drawn = list(_drawn(ordered, name, out))
    sentences_about = about or [scope(records) for _, records in ordered]
    told = [_told(*run, said) for run, said in zip(ordered, sentences_about, strict=True)]
    context = {
        "title": title,
        "command": command,
        "headline": _headline(told),
        "runs": told,
        "drawn": drawn,
        "firsts": {next(each.file for each in drawn if each.kind == kind) for kind in {each.kind for each in drawn}},
        "layer_note": monitor_numbers.LAYER_NOTE,
    }
    filters = {"count": lambda x: count(at(x)), "series": colour}
    write_text(out / f"{name}.md", pages.render("monitor.md", context, filters))
    page = out / PAGE_FILE
    write_text(page, pages.render("monitor.html", context, filters))
    return page


def _headline(told: Sequence[Told]) -> str:
    if len(told) == 1:
        return monitor_numbers.headline(told[0].last)
    alarmed = [run.label for run in told if run.alarms]
    if not alarmed:
        return f"{len(told)} runs, no alarm in their last records."
    return f"{len(told)} runs, alarms in the last record of {len(alarmed)}: {', '.join(alarmed)}."


def scope(records: Sequence[Record]) -> str:
    """What was monitored, in a sentence."""
    last = records[-1]
    rates = last.get("lr")
    known = [x for i in range(len(rates)) if (x := at(rates, i)) is not None] if isinstance(rates, Sequence) else []
    optimizer = last.get("optimizer")
    facts = [optimizer if isinstance(optimizer, str) else "optimizer unknown"]
    if known:
        shown = " and ".join(dict.fromkeys(number(x) for x in known))
        facts.append(f"lr {shown}" + (" at the last record" if len(records) > 1 else ""))
    first, end = (count(at(record, "step")) for record in (records[0], last))
    facts.append(f"step {end}" if len(records) == 1 else f"{len(records)} records, steps {first} to {end}")
    facts.append(f"{count(at(last, 'micro_batches'))} micro-batches compared")
    return "; ".join(facts) + "."


def _told(label: str, records: Sequence[Record], about: str) -> Told:
    last = records[-1]
    alarmed = [count(at(record, "step")) for record in records if sentences(record, "alarms")]
    shown = ", ".join(alarmed[:8]) + (", …" if len(alarmed) > 8 else "")
    several = len(records) > 1 and bool(alarmed)
    return Told(
        label,
        last,
        about,
        tuple(sentences(last, "alarms")),
        tuple(sentences(last, "advice")),
        f"{len(alarmed)} of {len(records)} records have alarms, at steps {shown}." if several else "",
        tuple(monitor_numbers.parts(last)),
        monitor_numbers.layers(last),
    )


def _drawn(runs: Sequence[LabelledRun], name: str, out: Path) -> Iterator[Drawn]:
    """Draw every figure that the records have numbers for, and write its file."""
    several = len({at(record, "step") for _, records in runs for record in records}) > 1
    keys = tuple(Key(label, colour(i)) for i, (label, _) in enumerate(runs) if label)
    shades = (Key("first record", colour(0), True), Key("last record", colour(0)))
    if several:
        yield from _try("seven", partial(monitor_figures.violations, runs), name, out, key=keys)
    distribution = partial(monitor_figures.snr_distribution, runs)
    yield from _try("snr", distribution, name, out, key=keys or (shades if several else ()))
    if several:
        dithered = {label for label, records in runs if any(at(r, "dither", "ratio") is not None for r in records)}
        key = tuple(each for each in keys if each.label in dithered)
        yield from _try("dither", partial(monitor_figures.dither_meters, runs), name, out, key=key)
    for index, (label, records) in enumerate(runs):
        ends = _ends(records)
        if ends:
            halves = [partial(monitor_figures.noise_histograms, *half, page=True) for half in _halves(ends)]
            alone = partial(monitor_figures.noise_histograms, *ends)
            yield _draw("noise", alone, halves, name, out, label=label, index=index)
    for index, (label, records) in enumerate(runs):
        if len(records) < 2:
            continue
        rules = tuple(
            Key(monitor_numbers.RULE_LABELS.get(rule, rule), shade, rule == "calibrated_lr")
            for rule, shade in monitor_figures.RULE_COLOURS.items()
            if any(monitor_figures.rate(record, rule) is not None for record in records)
        )
        curve = partial(monitor_figures.calibration_rules, records)
        yield from _try("calibration", curve, name, out, key=rules, label=label, index=index)


def _try(kind: str, draw: Callable[..., Figure], name: str, out: Path, **more: Any) -> Iterator[Drawn]:
    try:
        yield _draw(kind, draw, [partial(draw, page=True)], name, out, **more)
    except NothingToDraw:
        return


def _draw(
    kind: str,
    draw: Callable[[], Figure],
    pieces: Sequence[Callable[[], Figure]],
    name: str,
    out: Path,
    *,
    key: tuple[Key, ...] = (),
    label: str = "",
    index: int = 0,
) -> Drawn:
    title, note = _NOTES[kind]
    title += f": {label}" if label else ""
    file = f"{name}-{kind}" + (f"-{index + 1}" if label else "")
    write_text(out / f"{file}.svg", figures.svg(draw(), name=file, description=title, alone=True))
    parts = [
        Markup(figures.svg(piece(), name=f"{file}-part{i}", description=title, alone=False))
        for i, piece in enumerate(pieces)
    ]
    return Drawn(kind, title, note, tuple(parts), file, title, key)


def _ends(records: Sequence[Record]) -> list[Record]:
    """The first and the last record that have samples."""
    known = [record for record in records if monitor_figures.samples(record)]
    return known[:1] + known[1:][-1:]


def _halves(records: Sequence[Record]) -> list[list[dict[str, Any]]]:
    """The same records twice, each with half of the samples; once where there are few."""
    names = list(dict.fromkeys(key for record in records for key in monitor_figures.samples(record)))
    middle = (len(names) + 1) // 2 if len(names) > 3 else len(names)
    halves = []
    for chosen in filter(None, (names[:middle], names[middle:])):
        half = []
        for record in records:
            known = monitor_figures.samples(record)
            kept = [{"name": n, "index": i, "values": known[n, i]} for n, i in chosen if (n, i) in known]
            half.append({**record, "samples": kept})
        halves.append(half)
    return halves

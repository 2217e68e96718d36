"""What the frontier study writes: frontier.json, a page of tables, and pictures of loss over bytes and over time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from signstep.lab.errors import BadInput
from signstep.lab.output import figures, stats
from signstep.lab.output.command import by_torchrun
from signstep.lab.output.files import read_json, write_all
from signstep.lab.output.machine import now
from signstep.lab.output.stats import MeanEstimate
from signstep.lab.output.tables import markdown_table
from signstep.lab.studies.frontier_ways import FAMILIES, PEER, WAYS, Workload
from signstep.lab.training.records import Run, is_done, read_run

NAME = "frontier"
_COLOURS = ("blue", "brown", "violet", "vermillion", "orange", "green", "pink", "olive", "black")


@dataclass(frozen=True)
class Point:
    """What has been measured of a way."""

    key: str
    results: Mapping[int, float]
    """The metric at the end, by seed."""
    bytes_per_step: float
    """That a worker sends."""
    steps: int
    seconds: Mapping[str, float]
    """Of a step, by link."""

    @property
    def label(self) -> str:
        """Its name in tables."""
        return WAYS[self.key].label

    @property
    def megabytes(self) -> float:
        """That a worker sends in a run."""
        return self.bytes_per_step * self.steps / 1e6

    @property
    def estimate(self) -> MeanEstimate:
        """Over seeds."""
        return stats.estimate(list(self.results.values()))


def trials(folder: Path, workload: Workload, family: str) -> list[tuple[Mapping[str, float], Run]]:
    """The finished trials of a family."""
    configs = [(trial, workload.trial(family, trial)) for trial in FAMILIES[family].trials]
    paths = [(trial, folder / f"{config.hash}.jsonl") for trial, config in configs]
    return [(trial, read_run(path)) for trial, path in paths if is_done(path)]


def best_trial(folder: Path, workload: Workload, family: str) -> Mapping[str, float]:
    """The options with the lowest loss on held-out text; of equals the first.

    Raises:
        BadInput: not all trials have ended, or all have diverged.
    """
    found = trials(folder, workload, family)
    ended = [(trial, run) for trial, run in found if not run.diverged]
    if len(found) < len(FAMILIES[family].trials) or not ended:
        raise BadInput(f"{family}: {len(found)} of {len(FAMILIES[family].trials)} trials have ended in {folder}")
    return min(ended, key=lambda pair: pair[1].result)[0]


def points(out: Path, workload: Workload, ways: Sequence[str], seeds: int) -> list[Point]:
    """All ways of which a run has ended."""
    folder = out / "runs"
    timed = [read_json(path) for path in sorted((out / "links").glob("*.json"))]
    found = []
    for key in ways:
        way = WAYS[key]
        if len(trials(folder, workload, way.family)) < len(FAMILIES[way.family].trials):
            continue
        chosen = best_trial(folder, workload, way.family)
        paths = {seed: folder / f"{workload.final(key, chosen, seed).hash}.jsonl" for seed in range(seeds)}
        runs = {seed: read_run(path) for seed, path in paths.items() if is_done(path)}
        if not runs:
            continue
        found.append(
            Point(
                key,
                {seed: run.result for seed, run in runs.items()},
                way.payload(workload.gradients, workload.workers),
                max(run.epochs[-1]["step"] for run in runs.values()),
                {each["link"]: each["ways"][key]["seconds_per_step"] for each in timed if key in each["ways"]},
            )
        )
    return found


def _differences(found: Sequence[Point]) -> dict[str, MeanEstimate | None]:
    """Of each way to the peer, seed by seed."""
    peer = next((p for p in found if p.key == PEER), None)
    return {p.key: stats.paired_difference(p.results, peer.results) if peer and p is not peer else None for p in found}


def write(out: Path, workload: Workload, ways: Sequence[str], seeds: int, command: str) -> list[Path]:
    """Write the report of all finished runs, and return the paths of its files."""
    found = points(out, workload, ways, seeds)
    if not found:
        raise BadInput(f"no run has ended in {out / 'runs'}: train with torchrun --nproc-per-node first")
    first = read_run(next(path for path in sorted((out / "runs").glob("*.jsonl")) if is_done(path)))
    record = {
        "command": command,
        "date": now(),
        "environment": first.start["environment"],
        "workload": dataclasses.asdict(workload) | {"parameters": workload.gradients.parameters},
        "trials": {
            family: [{**trial, "result": run.result, "diverged": run.diverged} for trial, run in kept]
            for family in FAMILIES
            if (kept := trials(out / "runs", workload, family))
        },
        "points": [dataclasses.asdict(p) | {"label": p.label, "megabytes": p.megabytes} for p in found],
    }
    contents: dict[str, Any] = {f"{NAME}.json": record, f"{NAME}.md": _markdown(found, record, first)}
    unit = first.metric.name
    drawn = {"bytes": [(p, p.megabytes) for p in found]}
    for link in sorted({link for p in found for link in p.seconds}):
        drawn[link.replace("/", "-")] = [(p, p.seconds[link] * p.steps) for p in found if link in p.seconds]
    for name, pairs in drawn.items():
        across = "MB sent per worker" if name == "bytes" else f"seconds over links of {name.replace('-', ', ')}"
        figure = _draw(pairs, across, unit, workload)
        title = f"{unit} over {across}"
        contents[f"{NAME}-{name}.png"] = figures.png(figure)
        contents[f"{NAME}-{name}.svg"] = figures.svg(figure, name=NAME, description=title, alone=True)
    return write_all(out, contents)


def _draw(pairs: Sequence[tuple[Point, float]], across: str, unit: str, workload: Workload) -> Figure:
    """Every way as a mark with the interval of its result, those that differ in H joined, on a logarithmic axis."""
    figure, axes = figures.single_plot(680.0, 400.0, left=48, right=150, top=70, bottom=44)
    axes.set_xscale("log")
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    methods: dict[str, list[tuple[Point, float]]] = {}
    for p, x in pairs:
        methods.setdefault(p.label.partition(", H = ")[0], []).append((p, x))
    for i, (method, own) in enumerate(methods.items()):
        colour = figures.shade(_COLOURS[i % len(_COLOURS)])
        joined = sorted((x, p.estimate.mean) for p, x in own if WAYS[p.key].epochs == 1)
        axes.plot([x for x, _ in joined], [y for _, y in joined], "-", linewidth=1.0, alpha=0.6, color=colour)
        for p, x in own:
            e = p.estimate
            axes.plot([x], [e.mean], "o", markersize=5, color=colour, clip_on=False)
            if e.low is not None and e.high is not None:
                axes.plot([x, x], [e.low, e.high], "-", linewidth=1.2, color=colour)
            which = p.label.removeprefix(f"{method}, ") if WAYS[p.key].every is not None else ""
            figures.annotate(axes, which, (x, e.mean), "data", (6, 3), color=colour, fontsize=7.5)
        figures.annotate(axes, f"● {method}", (1.03, 0.98 - 0.075 * i), "axes fraction", color=colour, fontsize=9)
    axes.set_xlabel(across, color=figures.MUTED)
    figures.annotate(axes, f"test {unit}, fewer are better", (0, 1.03), "axes fraction")
    title = f"What ways to train over slow links reach: {across}"
    subtitle = f"GPT of {workload.gradients.parameters:,} parameters, {workload.workers} workers, 95 % intervals"
    figures.add_heading(figure, (title, subtitle), 12)
    return figure


def table(found: Sequence[Point], unit: str) -> list[str]:
    """All ways, as Markdown."""
    differences = _differences(found)
    p_values = [None if d is None else d.p_value() for d in differences.values()]
    corrected = dict(zip(differences, stats.holm(p_values), strict=True))
    peer = next((p for p in found if p.key == PEER), None)
    links = sorted({link for p in found for link in p.seconds})
    head = ["way", unit, "seeds", "less DDP, fp32", "p, Holm", "MB in all", "times fewer"]
    head += [f"{what}, {link}" for link in links for what in ("ms per step", "seconds in all")]
    rows = []
    for p in found:
        d, fewer = differences[p.key], "" if peer is None else f"{peer.megabytes / p.megabytes:,.0f}"
        row = [p.label, stats.with_interval(p.estimate, digits=3), str(len(p.results))]
        row += ["" if d is None else stats.with_interval(d, sign=True, digits=3)]
        row += ["" if (q := corrected[p.key]) is None else stats.probability(q), f"{p.megabytes:,.2f}", fewer]
        for link in links:
            known = link in p.seconds
            row += [f"{1e3 * p.seconds[link]:.0f}", f"{p.seconds[link] * p.steps:,.0f}"] if known else ["", ""]
        rows.append(tuple(row))
    return list(markdown_table(tuple(head), rows))


def read_points(record: Mapping[str, Any]) -> list[Point]:
    """The points of a frontier.json."""
    fields = [f.name for f in dataclasses.fields(Point)]
    return [
        Point(**{name: p[name] for name in fields} | {"results": {int(s): r for s, r in p["results"].items()}})
        for p in record["points"]
    ]


def _markdown(found: Sequence[Point], record: Mapping[str, Any], first: Run) -> str:
    made, unit = record["environment"], first.metric.name
    load = record["workload"]
    text = [
        "# What ways to train over slow links reach",
        "",
        f"    {by_torchrun(record['command'], load['workers'])}",
        f"    {record['command']}",
        "",
        f"{record['date']}, {made['cpu']}, one thread for each of {load['workers']} processes, torch {made['torch']}.",
        "",
        f"A GPT of {load['parameters']:,} parameters reads {load['subset']:,} bytes of {load['dataset']} once, in "
        f"{found[0].steps} steps (or two and four times, where a row says so); {unit} of the test part, lower is "
        "better, mean over seeds ± half the 95 % interval. "
        "Bytes are what each worker sends, by the formulas that `signstep bench comm` checks. Milliseconds are those "
        "of a few steps or two rounds of a real training over links of that rate and latency, all processes on the "
        "cores of one machine; seconds in all are as many times as there are steps.",
        "",
        *table(found, unit),
        "",
        "Options were chosen on held-out text, by runs as long as these:",
        "",
    ]
    for family, kept in record["trials"].items():
        said = ", ".join(
            " ".join(f"{k} {v:g}" for k, v in trial.items() if k not in ("result", "diverged"))
            + f": {'diverged' if trial['diverged'] else format(trial['result'], '.3f')}"
            for trial in kept
        )
        text.append(f"- {family}: {said}")
    return "\n".join([*text, ""])

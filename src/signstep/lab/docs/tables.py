"""The tables of README and docs that are made from results/, each a function that gives its lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from signstep.lab.bench.step_table import read_records, step_table
from signstep.lab.docs.evidence import LATENCY, NETWORK, Evidence
from signstep.lab.output import stats
from signstep.lab.output.tables import markdown_table
from signstep.lab.paper.experiments import dataset_title
from signstep.lab.studies import frontier_report
from signstep.lab.training.tasks import task

Lines = Sequence[str]

_NETWORK_ROWS = {
    "ddp-fp32": "DDP, fp32",
    "bf16": "DDP, bf16",
    "powersgd": "PowerSGD, rank 2",
    "int8-sum": "int8 sum of signs",
    "vote": "majority vote",
    "vote-dithered": "majority vote, relative dither",
    "ef-sign-two-sided": "EF-SignSGD, two-sided",
    "top-k": "Top-K, 1 %",
}
_RATES = {"10mbit": "10 Mbit", "100mbit": "100 Mbit", "1gbit": "1 Gbit", "none": "not shaped"}
_LATE_RATES = {"100mbit/20ms": "100 Mbit, 20 ms", "10mbit/50ms": "10 Mbit, 50 ms"}
_PLAIN = {"sgd": "SGD", "signsgd": "SignSGD-M"}


def tables(evidence: Evidence) -> Mapping[str, Callable[[], Lines]]:
    """The tables by the name that stands in a page's marker."""
    return {
        "table1": lambda: _accuracies(evidence, "table1"),
        "remedies": lambda: _gains(evidence, "remedies", "cifar10", _PLAIN),
        "verdict-cifar10": lambda: _gains(evidence, "verdict", "cifar10", _PLAIN, "cpu2"),
        "verdict-cifar100": lambda: _gains(evidence, "verdict", "cifar100", _PLAIN, "cpu2"),
        "handoff": lambda: _gains(evidence, "handoff", "cifar10", {"signsgd": "SignSGD-M"}),
        "language": lambda: _gains(evidence, "language", "bible", {"sgd": "SGD", "adam": "AdamW"}),
        "step": lambda: step_table(read_records(evidence.folder / "bench-cpu")),
        "network": lambda: _network(evidence, NETWORK, _RATES),
        "latency": lambda: _network(evidence, LATENCY, _LATE_RATES),
        "dither": lambda: _dither(evidence),
        "frontier": lambda: frontier_report.table(
            frontier_report.read_points(evidence.file("frontier/frontier.json")), "bits per byte"
        ),
    }


def _accuracies(evidence: Evidence, experiment: str) -> Lines:
    """Every row of a report on its data sets, beside the paper's number."""
    rows = evidence.file(f"cpu-strong/{experiment}.json")["rows"]
    datasets = list(rows[0]["cells"])
    head = ["method", *(title for d in datasets for title in (dataset_title(d), "paper", "trials"))]
    lines = []
    for row in rows:
        line = [row["label"]]
        for d in datasets:
            paper = row["cells"][d]["paper"]
            line += [
                stats.with_interval(evidence.result(experiment, d, row["key"])),
                "" if paper is None else stats.paper_number(paper),
                str(evidence.trials(d, row["key"])),
            ]
        lines.append(line)
    return markdown_table(head, lines)


def _gains(evidence: Evidence, experiment: str, dataset: str, bases: Mapping[str, str], scale: str = "cpu") -> Lines:
    """Every row of a report beside two others, seed by seed, with p after Holm's correction for the report."""
    lines, metric = [], task(dataset).metric
    for row in evidence.file(f"{scale}-strong/{experiment}.json")["rows"]:
        if not row["cells"][dataset]["n"]:
            continue
        found = evidence.result(experiment, dataset, row["key"], scale)
        line = [row["label"], stats.with_interval(found, digits=metric.digits)]
        for base in bases:
            if row["key"] in ("sgd", base):
                line += ["", ""]
                continue
            gap = evidence.gap(experiment, dataset, row["key"], base, scale)
            p = evidence.compared(experiment, dataset, row["key"], base, scale)["p_holm"]
            line += [stats.with_interval(gap, sign=True, digits=metric.digits), stats.probability(p)]
        lines.append(line)
    head = [word for name in bases.values() for word in (f"less {name}", "p")]
    return markdown_table(["method", dataset_title(dataset), *head], lines)


def _network(evidence: Evidence, name: str, rates: Mapping[str, str]) -> Lines:
    """Bytes, and times faster than DDP's fp32 mean, of four ranks."""
    cells = {c["rate"]: c["methods"] for c in evidence.file(name)["cells"] if c["ranks"] == 4}
    parameters = evidence.file(name)["workloads"]["4e6"]["parameters"]
    counted = next(rate for rate in rates if rate.startswith("100mbit"))
    lines = []
    for key, label in _NETWORK_ROWS.items():
        faster = [cells[rate][key]["times_faster"]["median"] for rate in rates]
        sent = cells[counted][key]["bytes_sent"] / parameters
        lines.append([label, stats.number(sent, 3), *("1" if key == "ddp-fp32" else f"{x:.1f}" for x in faster)])
    return markdown_table(["4 M parameters", "bytes", *rates.values()], lines)


def _dither(evidence: Evidence) -> Lines:
    """Range of rms(m) / σ over a run, and its test accuracy."""
    lines = []
    for method, label in {
        "pre-0.5": "α = 0.5",
        "pre-0.1": "α = 0.1",
        "pre-0.01": "α = 0.01",
        "pre-relative": "σ = rms(m) of the tensor",
        "signsgd": "no dither",
    }.items():
        line = [label]
        for dataset in ("cifar10", "cifar100"):
            ratios = [r["dither"]["ratio"] for r in evidence.watched(dataset, method) if r["dither"]["ratio"]]
            line += [
                f"{min(ratios):.2g} to {max(ratios):.2g}" if ratios else "",
                stats.number(evidence.accuracy_under_monitor(dataset, method), 1),
            ]
        lines.append(line)
    return markdown_table(["rms(m) / σ", "CIFAR-10", "%", "CIFAR-100", "%"], lines)

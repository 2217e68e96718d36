"""Records of runs that no one has trained, and how a report's table is read back."""

from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from signstep.lab.paper.experiments import Experiment, Row
from signstep.lab.training.records import Run

COMMANDS = ["signstep sweep table1 --scale cpu", 'signstep report table1 --scale cpu # <&">']
RECORDED = {"signstep": "0.1.0", "torch": "2.13.0", "python": "3.12.3", "cpu": "A <fast> CPU", "device": "cpu"}


def run(row: Row, dataset: str, seed: int, accuracy: float | None, *, lr: float | None = None, upto: int = 0) -> Run:
    """A finished run that ends at `accuracy` percent; None: it diverged in epoch 1; with `upto` it has only so many."""
    config = row.config(dataset, seed, lr)
    epochs = []
    for epoch in range(1, (upto or config.epochs) + 1):
        line: dict[str, Any] = {"event": "epoch", "epoch": epoch, "timing": {"seconds": 2.0}}
        if accuracy is not None and (epoch % config.eval_every == 0 or epoch == config.epochs):
            line["eval_accuracy"] = accuracy / 100 * (1 - 0.5 * (1 - epoch / config.epochs))
        epochs.append(line)
    end: dict[str, Any] | None = {"event": "end", "status": "done", "epoch": config.epochs}
    if accuracy is None:
        epochs, end = epochs[:1], {"event": "end", "status": "diverged", "epoch": 1}
    if upto:
        end = None
    start = {"event": "start", "config": config.to_dict(), "train_images": 5000, "environment": RECORDED}
    return Run(config, start, epochs, end)


def by_hash(*runs: Run) -> dict[str, Run]:
    return {each.config.hash: each for each in runs}


def accuracies(experiment: Experiment, seeds: int) -> dict[tuple[str, str, int], float]:
    draw = np.random.default_rng(0)
    return {
        (row.key, dataset, seed): float(round(60 + 3 * i + draw.normal(), 2))
        for i, row in enumerate(experiment.rows)
        for dataset in experiment.datasets
        for seed in range(seeds)
    }


def full(experiment: Experiment, values: Mapping[tuple[str, str, int], float]) -> dict[str, Run]:
    return by_hash(*(run(experiment.row(key), dataset, seed, v) for (key, dataset, seed), v in values.items()))


class _Table(HTMLParser):
    """Texts of the result table: {row key: [[data-head, text], ...]}, hidden text left out."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.row: str | None = None
        self.inside = self.hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "tr":
            self.row = values.get("data-row")
        if tag == "td" and self.row is not None:
            self.inside = True
            self.rows.setdefault(self.row, []).append([values["data-head"] or "", ""])
        if tag == "span" and values.get("class") == "hidden":
            self.hidden = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"
        self.hidden = self.hidden and tag != "span"

    def handle_data(self, data: str) -> None:
        if self.inside and self.row is not None and not self.hidden:
            self.rows[self.row][-1][1] += data


def table(page: Path) -> dict[str, list[list[str]]]:
    parser = _Table()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.rows


def plain(text: str) -> str:
    return text.replace("−", "-").strip()

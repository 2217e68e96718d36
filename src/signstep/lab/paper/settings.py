"""How an experiment's runs were made: the fields of their configurations, and the machines."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from signstep.lab.paper.experiments import Row
from signstep.lab.paper.results import Results
from signstep.lab.paper.sentences import plural
from signstep.lab.training.config import OF_IMAGES, RunConfig
from signstep.lab.training.display import duration


def shared_settings(results: Results) -> dict[str, str]:
    """Fields of `RunConfig` that all runs have in common."""
    configs = [_settings(config) for config in results.configs]
    return {
        name: plain(value)
        for name, value in configs[0].items()
        if name != "lr" and all(name in c and c[name] == value for c in configs)
    }


def own_settings(results: Results, row: Row) -> dict[str, str]:
    """The fields in which a row's runs differ from other rows', by data set where they differ there."""
    configs = {d: _settings(row.config(d, 0, results.cells[row.key, d].lr)) for d in results.experiment.datasets}
    settings, shared = {}, shared_settings(results)
    for name in dict.fromkeys(name for config in configs.values() for name in config):
        if name not in shared:
            values = {results.titles[d]: plain(c[name]) for d, c in configs.items() if name in c}
            if len(values) == len(configs) and len(set(values.values())) == 1:
                settings[name] = next(iter(values.values()))
            else:
                settings[name] = ", ".join(f"{value} ({title})" for title, value in values.items())
    return settings


def environment(results: Results) -> dict[str, str]:
    """What the runs ran on; a value that not all of them have is followed by the number that do."""
    runs = {run.config.hash: run for run in (*results.finished, *results.unfinished)}.values()
    values: dict[str, Counter[str]] = {}
    for run in runs:
        for name, value in run.start.get("environment", {}).items():
            if value is not None:
                values.setdefault(name, Counter())[str(value)] += 1
    table = {
        name: next(iter(counts))
        if set(counts.values()) == {len(runs)}
        else ", ".join(f"{v} ({n} {plural(n, 'run')})" for v, n in counts.items())
        for name, counts in values.items()
    }
    seconds = math.fsum(epoch.get("timing", {}).get("seconds", 0.0) for run in runs for epoch in run.epochs)
    table["runs"] = str(len(runs))
    table["training time in total"] = duration(seconds)
    return table


def _settings(config: RunConfig) -> dict[str, Any]:
    """The fields that say how a run trained, less those that it does not use."""
    unused = {"seed", "dataset"} | (set() if config.schedule == "step" else {"milestones", "gamma"})
    if config.task.row != "images":
        unused |= {*OF_IMAGES, "channels_last"}
    return {name: value for name, value in config.to_dict().items() if value is not None and name not in unused}


def plain(value: object) -> str:
    """A setting's value as printed.

    >>> plain(True), plain([0.3, 0.6]), plain(1e-3)
    ('yes', '0.3, 0.6', '0.001')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

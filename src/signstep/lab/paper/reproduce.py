"""Train what an experiment still lacks, then write its table, figures and report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from signstep.lab.errors import BadInput
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.sweep import Train, learning_rate
from signstep.lab.training.config import RunConfig


def planned(
    experiments: Sequence[Experiment], seeds: int, tuned: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, RunConfig]]:
    """The runs that the experiments need, by hash, with a label; seed 0 of every row comes before seed 1 of any."""
    if seeds < 1:
        raise BadInput(f"seeds={seeds}: expected at least 1")
    runs: dict[str, tuple[str, RunConfig]] = {}
    for seed in range(seeds):
        for experiment in experiments:
            for dataset in experiment.datasets:
                for row in experiment.rows:
                    config = row.config(dataset, seed, learning_rate(experiment, row.key, dataset, tuned))
                    runs.setdefault(config.hash, (f"{dataset}, {row.label}, seed {seed}, lr {config.lr:g}", config))
    return runs


def reproduce(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    seeds: int,
    tuned: Mapping[str, Mapping[str, Any]],
    train: Train,
    done: Callable[[Path], bool],
    max_minutes: float | None = None,
    shard: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> bool:
    """Train the missing runs of `experiments` into `<folder>/runs`.

    Args:
        experiments: of one scale and recipe; a run that several of them need is trained once.
        folder: where the results go.
        seeds: seeds 0 to seeds - 1 for every row.
        tuned: learning rates, as `signstep.lab.paper.sweep.read_tuned` gives them.
        train: trains one run.
        done: whether the record at a path is that of a finished run.
        max_minutes: start no run, and stop the one that runs, after so many minutes; None: no limit.
        shard: (i, n): train every n-th run, beginning with the i-th.
        say: takes a line of what is going on.

    Returns:
        Whether every run, of all shards, is finished.
    """
    started = time.monotonic()
    out = folder / "runs"
    runs = planned(experiments, seeds, tuned)
    cells = dict.fromkeys((d, row.tuned_key) for e in experiments for d in e.datasets for row in e.rows)
    untuned = [f"{d}/{key}" for d, key in cells if key not in tuned.get(d, {})]
    if untuned:
        names = "every method" if len(untuned) == len(cells) else ", ".join(untuned)
        say(f"not tuned, so with the preset's learning rate: {names}")
    mine = list(runs.values())[shard[0] :: shard[1]]
    for position, (label, config) in enumerate(mine):
        if done(out / f"{config.hash}.jsonl"):
            continue
        left = None if max_minutes is None else max_minutes - (time.monotonic() - started) / 60
        if left is not None and left <= 0:
            break
        say(f"run {position + 1} of {len(mine)}: {label}")
        status = train(config, out, left)
        if status == "busy":
            say("another process is training this run: going on with the next")
        if status == "stopped":
            break
    missing = [label for label, config in runs.values() if not done(out / f"{config.hash}.jsonl")]
    if missing:
        say(
            f"{len(missing)} of {len(runs)} runs are left, the next one: {missing[0]}. "
            "The same command goes on with them."
        )
    return not missing


def write_reports(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    seeds: int,
    tuned: Mapping[str, Mapping[str, Any]],
    commands: Sequence[str],
) -> list[Path]:
    """Write each experiment's table, figures and report into `folder` from its finished runs; returns the reports.

    Args:
        experiments: what to report.
        folder: holds `runs/`.
        seeds: runs of seeds 0 to seeds - 1 are counted.
        tuned: the choices of the sweep.
        commands: the shell commands that make these results.
    """
    from signstep.lab.paper import report
    from signstep.lab.training.records import read_runs

    folder.mkdir(parents=True, exist_ok=True)
    # Under a lock: several shards may end at the same time.
    with filelock.FileLock(folder / "results.lock"):
        recorded = read_runs(folder / "runs")
        written = []
        for experiment in experiments:
            hashes = planned([experiment], seeds, tuned)
            runs = {key: recorded[key] for key in hashes if key in recorded}
            written.append(report.write(experiment, runs, folder, tuned=tuned, commands=commands, seeds=seeds))
        return written

"""Train what an experiment still lacks, then write its table, figures and report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from signstep.lab.output.files import locked, make_folder
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.plan import cells, first_seeds, plan
from signstep.lab.paper.tuned import Choices
from signstep.lab.training.records import is_done, read_runs
from signstep.lab.training.series import train_run


def reproduce(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    seeds: int,
    tuned: Choices,
    data: Path | None = None,
    device: str = "auto",
    max_minutes: float | None = None,
    shard: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> bool:
    """Train the missing runs of `experiments` into `<folder>/runs`.

    Args:
        experiments: of one scale and recipe; a run that several of them need is trained once.
        folder: where the results go.
        seeds: seeds 0 to seeds - 1 for every row.
        tuned: learning rates, as `signstep.lab.paper.tuned.read_tuned` gives them.
        data: folder to look for the images in first; None: the usual places.
        device: as of `signstep.lab.training.loop.train`.
        max_minutes: start no run, and stop the one that runs, after so many minutes; None: no limit.
        shard: (i, n): train every n-th run, beginning with the i-th.
        say: takes a line of what is going on.

    Returns:
        Whether every run, of all shards, is finished.
    """
    started = time.monotonic()
    out = folder / "runs"
    runs = plan(experiments, first_seeds(seeds), tuned)
    rates = dict.fromkeys((dataset, row.tuned_key) for dataset, row in cells(experiments))
    untuned = [f"{dataset}/{key}" for dataset, key in rates if key not in tuned.get(dataset, {})]
    if untuned:
        names = "every method" if len(untuned) == len(rates) else ", ".join(untuned)
        say(f"not tuned, so with the preset's learning rate: {names}")
    mine = runs[shard[0] :: shard[1]]
    trained = False
    for position, each in enumerate(mine):
        if is_done(out / f"{each.config.hash}.jsonl"):
            continue
        left = None if max_minutes is None else max_minutes - (time.monotonic() - started) / 60
        if left is not None and left <= 0:
            break
        say(f"run {position + 1} of {len(mine)}: {each.label}")
        trained = True
        status = train_run(each.config, out, data=data, device=device, max_minutes=left)
        if status == "busy":
            say("another process is training this run: going on with the next")
        if status == "stopped":
            break
    missing = [each.label for each in runs if not is_done(out / f"{each.config.hash}.jsonl")]
    if missing:
        say(
            f"{len(missing)} of {len(runs)} runs are left, the next one: {missing[0]}. "
            "The same command goes on with them."
        )
    elif not trained:
        say(f"nothing to train: all {len(runs)} runs have ended before")
    return not missing


def write_reports(
    experiments: Sequence[Experiment], folder: Path, *, seeds: int, tuned: Choices, commands: Sequence[str]
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

    make_folder(folder)
    # Under a lock: several shards may end at the same time.
    with locked(folder / "results.lock"):
        runs = read_runs(folder / "runs")
        counted = first_seeds(seeds)
        return [report.write(each, runs, folder, tuned=tuned, commands=commands, seeds=counted) for each in experiments]

"""Train what an experiment still lacks, then write its table, figures and report."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from signstep.lab.errors import UserError
from signstep.lab.output.files import locked, make_folder
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.plan import PlannedRun, cells, first_seeds, plan
from signstep.lab.paper.time_left import TimeLeft
from signstep.lab.paper.tuned import Choices
from signstep.lab.training.records import is_done, read_run, read_runs
from signstep.lab.training.series import train_run
from signstep.lab.training.workers import StopRequest


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
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> bool:
    """Train the missing runs of `experiments` into `<folder>/runs`.

    Args:
        experiments: of one scale and recipe; a run that several of them need is trained once.
        folder: where the results go.
        seeds: seeds 0 to seeds - 1 for every row.
        tuned: learning rates, as `signstep.lab.paper.tuned.read_tuned` gives them.
        data: folder to look for the images in first, or the file of data set "text"; None: the usual places.
        device: as of `signstep.lab.training.loop.train`.
        max_minutes: start no run, and stop the one that runs, after so many minutes; None: no limit.
        shard: (i, n): train every n-th run, beginning with the i-th.
        processes: more than one: train so many runs at a time, each on one thread, and say a line of each.
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
    mine = [run for run in list(enumerate(runs, 1))[shard[0] :: shard[1]] if not is_done(out / _record(run[1]))]
    deadline = None if max_minutes is None else started + 60 * max_minutes
    shares = [_Share(mine[i::processes], len(runs), out, data, device, deadline) for i in range(processes)]
    if processes == 1:
        _train(shares[0], say)
    else:
        _train_together([share for share in shares if share.runs])
    missing = [each.label for each in runs if not is_done(out / _record(each))]
    if missing:
        say(
            f"{len(missing)} of {len(runs)} runs are left, the next one: {missing[0]}. "
            "The same command goes on with them."
        )
    elif not mine:
        say(f"nothing to train: all {len(runs)} runs have ended before")
    return not missing


@dataclass(frozen=True)
class _Share:
    """What one process trains."""

    runs: Sequence[tuple[int, PlannedRun]]
    """Each with its number among all."""
    total: int
    out: Path
    data: Path | None
    device: str
    deadline: float | None
    """Of time.monotonic(), which the processes of a machine have in common."""


def _record(run: PlannedRun) -> str:
    return f"{run.config.hash}.jsonl"


def _train(share: _Share, say: Callable[[str], None], *, progress: bool = True) -> None:
    time_left = TimeLeft(share.device)
    tuning = read_runs(share.out.with_name("tune")) if progress else {}
    for index, (number, each) in enumerate(share.runs):
        left = None if share.deadline is None else (share.deadline - time.monotonic()) / 60
        if left is not None and left <= 0:
            break
        title = f"run {number} of {share.total}: {each.label}"
        if progress:
            records = read_runs(share.out)
            ended = {key for key, run in records.items() if run.done}
            waiting = [run.config for _, run in share.runs[index:] if run.config.hash not in ended]
            say(f"{title} ({time_left.text(waiting, [*records.values(), *tuning.values()])})")
        status = train_run(
            each.config, share.out, data=share.data, device=share.device, max_minutes=left, progress=progress
        )
        if status == "busy":
            say("another process is training this run: going on with the next")
        if status == "stopped":
            break
        if not progress and status != "busy":
            run = read_run(share.out / _record(each))
            reached = run.metric.text(run.result) if status == "done" else status
            say(f"{title}: {reached}")


def _train_together(shares: Sequence[_Share]) -> None:
    """Train each share in a process of its own.

    Raises:
        UserError: a process failed; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_train_alone, args=(share,), daemon=True) for share in shares]
    for process in processes:
        process.start()
    told = False
    with StopRequest() as stop:
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(0.1)
                if stop.received is not None and not told:
                    process.terminate()
            told = stop.received is not None
    if any(process.exitcode for process in processes):
        raise UserError("a process that trains has failed: what it said is above; the same command goes on")


def _train_alone(share: _Share) -> None:
    """The whole life of a process that trains a share on one thread."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches the first process alone, which passes it on once: a second signal would kill
    torch.set_num_threads(1)
    try:
        _train(share, partial(print, flush=True), progress=False)
    except KeyboardInterrupt:
        sys.exit()
    except (UserError, OSError) as error:
        sys.exit(f"signstep: {error}")


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

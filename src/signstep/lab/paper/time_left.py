"""How long a series of runs will take, by the epochs that this machine has trained of the same networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from signstep.lab.output.machine import environment
from signstep.lab.training.config import RunConfig
from signstep.lab.training.display import duration
from signstep.lab.training.records import Run
from signstep.lab.training.workers import Workers

_WORK = ("dataset", "subset", "model", "width", "context", "batch_size", "precision", "compile")
"""Fields of `RunConfig` on which the time of an epoch depends."""
_MACHINE = ("cpu_model", "device", "threads", "world_size")
"""Fields of a record's environment on which it depends."""


def this_machine(device: str) -> Mapping[str, Any]:
    """The environment of one process that trains on `device`, as of `signstep.lab.training.loop.train`."""
    return environment(Workers.join(device).device, 1)


def seconds_left(waiting: Sequence[RunConfig], records: Iterable[Run], machine: Mapping[str, Any]) -> float | None:
    """The time that runs will take, one after the other.

    Args:
        waiting: the runs.
        records: of runs on any machine, finished or not. A tuning run's epoch, nine tenths of a final one's, counts as
            that.
        machine: the environment that they will run in.

    Returns:
        Seconds: of each run its number of epochs times the median epoch; None if one has no epoch to go by.
    """
    epochs: dict[tuple[Any, ...], list[float]] = {}
    for run in records:
        if all(run.start["environment"].get(name) == machine[name] for name in _MACHINE):
            epochs.setdefault(_work(run.config), []).extend(each["timing"]["seconds"] for each in run.epochs)
    if not all(epochs.get(_work(each)) for each in waiting):
        return None
    return sum(each.epochs * median(epochs[_work(each)]) for each in waiting)


def _work(config: RunConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in _WORK)


def text(waiting: Sequence[RunConfig], records: Iterable[Run], machine: Mapping[str, Any]) -> str:
    """The same in words, for a line of progress: "3 runs left, about 2 h 10 min"."""
    seconds = seconds_left(waiting, records, machine)
    runs = f"{len(waiting)} run{'s' * (len(waiting) != 1)} left"
    return (
        f"{runs}, about {duration(seconds)}" if seconds is not None else f"{runs}, for how long the next run will say"
    )

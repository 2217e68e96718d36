"""How long a series of runs will take, by the epochs that this machine has trained of the same networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from statistics import median
from typing import Any

from signstep.lab.output.machine import environment
from signstep.lab.training.config import RunConfig
from signstep.lab.training.display import duration
from signstep.lab.training.records import Run
from signstep.lab.training.workers import Workers

_WORK = (
    *("dataset", "subset", "image_size", "context", "batch_size"),
    *("model", "width", "stem", "version", "precision", "channels_last", "compile"),
)
"""Fields of `RunConfig` on which the time of an epoch depends."""
_MACHINE = ("cpu", "cpu_model", "device", "threads", "world_size")
"""Fields of a record's environment on which it depends."""


class TimeLeft:
    """The time that runs will take which are trained one after the other.

    Args:
        device: that trains them, as of `signstep.lab.training.loop.train`.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    @cached_property
    def _machine(self) -> Mapping[str, Any]:
        return environment(Workers.join(self._device).device, 1)

    def seconds(self, waiting: Iterable[RunConfig], records: Iterable[Run]) -> tuple[float, int]:
        """Seconds, and how many runs they leave out because no epoch of their network has been trained here.

        Args:
            waiting: runs. Each takes the median epoch of its network, times the epochs that its record lacks.
            records: of any runs on any machine. An epoch of a tuning run, nine tenths of a final one, counts as that.
        """
        epochs: dict[tuple[Any, ...], list[float]] = {}
        trained: dict[str, int] = {}
        for run in records:
            trained[run.config.hash] = len(run.epochs)
            there = run.start.get("environment", {})
            if all(there.get(name) == self._machine[name] for name in _MACHINE):
                epochs.setdefault(_work(run.config), []).extend(each["timing"]["seconds"] for each in run.epochs)
        total, unknown = 0.0, 0
        for each in waiting:
            if own := epochs.get(_work(each)):
                total += (each.epochs - trained.get(each.hash, 0)) * median(own)
            else:
                unknown += 1
        return total, unknown

    def text(self, waiting: Sequence[RunConfig], records: Iterable[Run]) -> str:
        """The same in words, for a line of progress: "3 runs left, about 2 h 10 min"."""
        seconds, unknown = self.seconds(waiting, records)
        runs = f"{len(waiting)} run{'s' * (len(waiting) != 1)} left"
        if unknown == len(waiting):
            return f"{runs}, no estimate yet"
        return f"{runs}, about {duration(seconds)}" + (f" for {len(waiting) - unknown} of them" if unknown else "")


def _work(config: RunConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in _WORK)

"""The record of one run, `<hash>.jsonl`: a "start" line, one "epoch" line per epoch, an "end" line.

Two executions of the same `RunConfig` write the same lines, but for the fields `timing` and `environment`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from signstep.lab.data import Text
from signstep.lab.errors import BadInput
from signstep.lab.output.files import write_text
from signstep.lab.output.machine import environment
from signstep.lab.training.config import RunConfig
from signstep.lab.training.tasks import Metric


@dataclass(frozen=True)
class Run:
    """What a run's file says. `epochs` and `start` are the parsed lines; `end` is None while the run is unfinished."""

    config: RunConfig
    start: dict[str, Any]
    epochs: list[dict[str, Any]]
    end: dict[str, Any] | None

    @property
    def done(self) -> bool:
        """The run reached its end, be it that of its epochs or a non-finite loss."""
        return self.end is not None

    @property
    def diverged(self) -> bool:
        """The run was stopped by a non-finite loss."""
        return self.end is not None and self.end["status"] == "diverged"

    @property
    def metric(self) -> Metric:
        """What the run is judged by."""
        return self.config.task.metric

    def result_of(self, epoch: Mapping[str, Any]) -> float | None:
        """The metric's value in a line of the record, None where that has no evaluation."""
        score = f"eval_{self.metric.score}"
        if score not in epoch:
            return None
        return self.metric.of(float(epoch.get("eval_loss", math.nan)), float(epoch[score]))

    @property
    def result(self) -> float:
        """The metric's value at the last evaluated epoch; of a diverged run, that of chance.

        Raises:
            ValueError: the run has not been evaluated yet.
        """
        if self.diverged:
            return float(self.start.get("chance", self.metric.chance))
        for epoch in reversed(self.epochs):
            if (value := self.result_of(epoch)) is not None:
                return value
        raise ValueError(f"run {self.config.hash} has not been evaluated yet: let it train for an epoch first")


def read_run(path: Path) -> Run:
    """The run recorded in `path`. A last line cut short by a kill is left out.

    Raises:
        FileNotFoundError: no such file.
        BadInput: a line is not what `train` writes; the message names file and line.
    """
    lines = path.read_bytes().split(b"\n")
    unfinished = lines.pop()
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            expected = ("start",) if number == 1 else ("epoch", "end")
            if event["event"] not in expected:
                raise ValueError(f"expected a line of kind {' or '.join(expected)}, found {event['event']!r}")
            if events and events[-1]["event"] == "end":
                raise ValueError("a line after the run's end")
            if number == 1:
                config = RunConfig.from_dict(event["config"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{path}, line {number}: not a line of a run's record ({error}); delete the file to train the run again"
            ) from error
        events.append(event)
    if not events:
        what = "its first line is cut short" if unfinished else "it is empty"
        raise BadInput(f"{path}, line 1: not a run's record, {what}; delete the file to train the run again")
    end = events.pop() if events[-1]["event"] == "end" else None
    return Run(config, events[0], events[1:], end)


def is_done(path: Path) -> bool:
    """Whether `path` is the record of a finished run."""
    return path.exists() and read_run(path).done


def read_runs(folder: Path) -> dict[str, Run]:
    """Every run recorded in `folder` (not below it), by its configuration's hash; none where there is no folder.

    Raises:
        BadInput: as `read_run`.
    """
    runs = (read_run(path) for path in sorted(folder.glob("*.jsonl")))
    return {run.config.hash: run for run in runs}


def write_events(path: Path, events: list[dict[str, Any]]) -> None:
    """Write a run's lines, atomically. ValueError for a number that JSON does not have (infinity, NaN)."""
    write_text(path, "".join(json.dumps(event, allow_nan=False) + "\n" for event in events))


_OWN = {"model_digest": "model", "train_examples": "training set", "eval_examples": "set to evaluate on",
        "example_shape": "shape of examples"}  # fmt: skip
"""Fields of a record's first line by which a change of what is the user's own is noticed, and what has changed."""


def require_same(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise BadInput where the first lines of two records of one run say that they are of different texts, or of
    different models or data of the user's under the same name.
    """
    for field, what in _OWN.items():
        if field in earlier and field in now and earlier[field] != now[field]:
            raise BadInput(
                f"run {now['hash']} has begun with another {what} ({field} {earlier[field]}, this one {now[field]}): "
                "give this one another --version, or choose another --out"
            )
    if earlier.get("sha256") != now.get("sha256"):
        raise BadInput(
            f"run {now['hash']} has begun with another text (SHA-256 {earlier['sha256'][:12]}..., this one "
            f"{now['sha256'][:12]}...): name that file with --data, or choose another --out"
        )


def require_text_of(folder: Path, text: Text) -> None:
    """Raise BadInput where a record in `folder` is of a run on another file of data set "text"."""
    for name, run in read_runs(folder).items():
        if run.config.dataset == text.name:
            require_same(run.start, {"hash": name, "sha256": text.sha256})


def start_event(
    config: RunConfig, parameters: int, about: Mapping[str, Any], device: torch.device, world_size: int
) -> dict[str, Any]:
    """A record's first line; `about` is what the run's batches say of their data."""
    return {
        "event": "start",
        "hash": config.hash,
        "config": config.to_dict(),
        "parameters": parameters,
        **about,
        "environment": environment(device, world_size),
    }

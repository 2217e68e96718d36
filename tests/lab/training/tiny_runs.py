"""Runs of seconds, for the tests of training."""

from pathlib import Path
from typing import Any

from signstep.lab.training import records as runs
from signstep.lab.training.config import RunConfig

TINY: dict[str, Any] = {
    "dataset": "digits",
    "subset": 96,
    "crop": 1,
    "flip": False,
    "model": "resnet8",
    "width": 0.25,
    "epochs": 2,
    "batch_size": 32,
    "lr": 0.01,
}


def tiny(**changes: Any) -> RunConfig:
    return RunConfig(**(TINY | changes))


def record(config: RunConfig, out: Path) -> runs.Run:
    return runs.read_run(out / f"{config.hash}.jsonl")

"""One run out of many, as a sweep or a table trains them one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from signstep.lab.training.checkpoint import RunBusy
from signstep.lab.training.config import RunConfig
from signstep.lab.training.loop import train


def train_run(
    config: RunConfig,
    out: Path,
    *,
    data: Path | None = None,
    device: str = "auto",
    max_minutes: float | None = None,
    progress: bool = True,
) -> Literal["done", "diverged", "stopped", "busy"]:
    """Train one run, or go on with it; arguments as of `signstep.lab.training.loop.train`.

    Returns:
        "done", "diverged", "stopped" by the time limit, or "busy": another process is training this run.

    Raises:
        KeyboardInterrupt: a signal has stopped the run, which has its checkpoint; the series is to stop as well.
    """
    try:
        status = train(config, out, data=data, device=device, max_minutes=max_minutes, progress=progress)
    except RunBusy:
        return "busy"
    if status == "interrupted":
        raise KeyboardInterrupt
    return status

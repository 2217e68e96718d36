"""What the callbacks of Lightning and of the Hugging Face Trainer share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from signstep.monitor.monitor import Monitor
from signstep.monitor.sinks import JSONLines


def begin(
    model: nn.Module, optimizer: Optimizer, scaler: Any, state: Mapping[str, Any], options: Mapping[str, Any]
) -> Monitor:
    """A monitor for a training that begins, or that goes on from a checkpoint.

    Args:
        model: as Monitor takes it.
        optimizer: may be wrapped, as by accelerate.
        scaler: the GradScaler, or None.
        state: what `Monitor.state_dict` gave, or {"step": steps taken}.
        options: other keywords of Monitor. Files of lines are cut off where the training goes on.
    """
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    monitor = Monitor(model, optimizer, scaler=scaler, **options)
    monitor.load_state_dict(dict(state))
    for sink in monitor.sinks:
        if isinstance(sink, JSONLines) and monitor.step > 0:
            sink.cut(monitor.step)
    return monitor

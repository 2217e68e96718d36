"""What the callbacks for Lightning and the Hugging Face Trainer share: a monitor that begins and ends with a training.

Where a trainer calls them, and from where a checkpoint's state comes, is in `lightning` and `huggingface`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from signstep.monitor.monitor import Monitor
from signstep.monitor.sinks import JSONLines


def base_class(name: str, *modules: str) -> Any:
    """The class of that name in the first module that can be imported, or object where there is none.

    Modules that are imported already come first.
    """
    for module in sorted(modules, key=lambda module: module not in sys.modules):
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            continue
    return object


def begin(
    model: nn.Module, optimizer: Optimizer, scaled_by: Any, state: Mapping[str, Any], options: Mapping[str, Any]
) -> Monitor:
    """A monitor for a training that begins, or that goes on from a checkpoint.

    Args:
        model: as Monitor takes it.
        optimizer: as Monitor takes it, so in any wrappers.
        scaled_by: the trainer's object that has the GradScaler as its attribute `scaler`, if there is one.
        state: what `Monitor.state_dict` gave, or {"step": steps taken}.
        options: other keywords of Monitor. A file of `JSONLines` is cut off where the training goes on.
    """
    monitor = Monitor(model, optimizer, scaler=getattr(scaled_by, "scaler", None), **options)
    monitor.load_state_dict(dict(state))
    for sink in monitor.sinks:
        if isinstance(sink, JSONLines) and monitor.step > 0:
            sink.cut(monitor.step)
    return monitor


class MonitorHolder:
    """A callback's monitor: None but while it trains."""

    monitor: Monitor | None = None
    last_state: dict[str, Any] | None = None
    """The state of the last monitor when it ended, or what a checkpoint gave."""

    def end(self) -> None:
        """Take the hooks off and close the sinks, if there is a monitor."""
        if self.monitor is not None:
            self.last_state = self.monitor.state_dict()
            self.monitor.close()
            self.monitor = None

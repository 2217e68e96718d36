"""The monitor as a callback of the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from signstep.monitor.callbacks import MonitorHolder, base_class, begin

__all__ = ["MonitorCallback"]

_SAVED = "signstep.monitor"
_TrainerCallback: Any = base_class("TrainerCallback", "transformers")


class MonitorCallback(MonitorHolder, _TrainerCallback):  # type: ignore[misc]
    """Monitors a Trainer's training: `Trainer(..., callbacks=[MonitorCallback(every=50, sinks=[...])])`.

    Each backward pass is a micro-batch, so it needs ``gradient_accumulation_steps`` of 4 or more; intervals are close
    to 95 % from 16 on. With several ranks, rank 0 compares its own micro-batches and writes. The step count and the
    averages are saved in the checkpoints' trainer_state.json, and go on with ``resume_from_checkpoint``.

    Args:
        **options: `every`, `sinks` and other keywords of `signstep.monitor.Monitor`, except scaler.

    Attributes:
        monitor: while it trains, on rank 0, the `Monitor`; else None.

    Raises:
        ImportError: transformers is not installed.

    Example:
        .. code-block:: python

            args = TrainingArguments("out", gradient_accumulation_steps=16)
            Trainer(model, args, train_dataset=data, callbacks=[MonitorCallback(sinks=[JSONLines("monitor.jsonl")])])
    """

    def __init__(self, **options: Any) -> None:
        if _TrainerCallback is object:
            raise ImportError("MonitorCallback: transformers is not installed: pip install transformers accelerate")
        self.options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the monitor: the optimizer is built, wrapped and restored by now."""
        self.end()
        if state.is_world_process_zero:
            optimizer = kwargs["optimizer"]
            saved = state.stateful_callbacks.get(_SAVED, {"step": state.global_step})
            self.monitor = begin(kwargs["model"], optimizer, optimizer, saved, self.options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the monitor's state where the Trainer saves it from.

        The callback is no ExportableState, because the Trainer would make it anew from its arguments, without sinks.
        """
        if self.monitor is not None:
            state.stateful_callbacks[_SAVED] = self.monitor.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off and close the sinks."""
        self.end()

"""The monitor as a callback of Lightning, for the packages pytorch_lightning and lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from signstep.monitor.callbacks import MonitorHolder, base_class, begin

__all__ = ["MonitorCallback"]

_LightningCallback: Any = base_class("Callback", "lightning.pytorch", "pytorch_lightning")


class MonitorCallback(MonitorHolder, _LightningCallback):  # type: ignore[misc]
    """Monitors a Trainer's training: `Trainer(callbacks=[MonitorCallback(every=50, sinks=[...])])`.

    With ``accumulate_grad_batches`` of 4 or more, or several ranks under DDP, nothing else is needed: each backward
    pass of each rank is a micro-batch. Otherwise give `loss`, and the batches of the monitor's own steps go through the
    model once more, in `parts`. The step count and the averages are saved with every checkpoint, and go on with it.

    Args:
        loss: takes the LightningModule and a part of the batch to its mean loss, without side effects such as self.log.
            None: micro-batches come from accumulation and ranks alone.
        parts: number of parts of a batch, at least 4. (default: 8)
        optimizer: index in what `configure_optimizers` returns. (default: 0)
        **options: `every`, `sinks` and other keywords of `signstep.monitor.Monitor`, except scaler.

    Attributes:
        monitor: while it trains, the `Monitor`; else None.

    Raises:
        ImportError: neither package is installed.

    Example:
        .. code-block:: python

            def loss(module, batch):
                x, y = batch
                return F.cross_entropy(module(x), y)

            Trainer(callbacks=[MonitorCallback(every=100, sinks=[JSONLines("monitor.jsonl")], loss=loss)])
    """

    def __init__(
        self, *, loss: Callable[[Any, Any], Tensor] | None = None, parts: int = 8, optimizer: int = 0, **options: Any
    ) -> None:
        if _LightningCallback is object:
            raise ImportError("MonitorCallback: Lightning is not installed: pip install pytorch-lightning")
        super().__init__()
        self.loss, self.parts, self.optimizer, self.options = loss, parts, optimizer, options

    @property
    def state_key(self) -> str:
        """The key of the callback in a checkpoint, so that each optimizer may have a callback."""
        return f"{type(self).__qualname__}{{'optimizer': {self.optimizer}}}"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the monitor: optimizers are built, wrapped and restored by now."""
        self.end()
        # A Trainer without steps is a new one, whatever an earlier one has left here.
        state = (self.last_state if trainer.global_step > 0 else None) or {"step": trainer.global_step}
        optimizer = trainer.optimizers[self.optimizer]
        self.monitor = begin(trainer.strategy.model, optimizer, trainer.precision_plugin, state, self.options)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure a batch, if it was asked for, at the first micro-batch of an own step."""
        if self.loss is None or self.monitor is None or batch_idx % trainer.accumulate_grad_batches:
            return
        loss, (leaves, spec) = self.loss, tree_flatten(batch)

        def part(*pieces: Any) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return loss(pl_module, tree_unflatten(list(pieces), spec))

        self.monitor.measure(part, *leaves, parts=self.parts)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off and close the sinks."""
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off and close the sinks."""
        self.end()

    def state_dict(self) -> dict[str, Any]:
        """The state of the monitor, for Lightning's checkpoint."""
        return self.monitor.state_dict() if self.monitor is not None else dict(self.last_state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint, from which the next training goes on."""
        self.last_state = dict(state_dict) or None

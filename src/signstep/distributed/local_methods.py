"""Every way in which workers that train by themselves agree now and then: the table from which training, plan and
studies take theirs. What reduces gradients in every step is in reductions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from signstep.distributed.local import LocalVote
from signstep.distributed.reductions import Gradients, Payload
from signstep.distributed.rounds import LocalSteps

__all__ = ["LOCAL_METHODS", "LocalMethod"]


@dataclass(frozen=True)
class LocalMethod:
    """A way to agree."""

    label: str
    """Its name in tables."""
    payload: Payload
    """Bytes that each of M workers sends in a round, without padding and headers, by the parameters' shapes and M."""
    make: Callable[..., LocalSteps]
    """From (model, optimizer, every=H), and what the method's own options are."""
    origin: str = "signstep"
    """Whose it is: signstep, or after a paper of others."""

    def start(
        self, model: nn.Module, optimizer: Optimizer, every: int, outer_lr: float | None, outer_momentum: float | None
    ) -> LocalSteps:
        """Make it; an option that is None has the method's own default."""
        options = {"outer_lr": outer_lr, "outer_momentum": outer_momentum}
        given = {name: value for name, value in options.items() if value is not None}
        return self.make(model, optimizer, every=every, **given)


def _out_and_back(bits: float) -> Payload:
    """All coordinates there and back but for one's own M-th part, `bits` each, and 4 bytes of each parameter to all."""

    def payload(gradients: Gradients, workers: int) -> float:
        return (workers - 1) * (2 * gradients.parameters * bits / 8 / workers + 4 * (1 + len(gradients.shapes)))

    return payload


LOCAL_METHODS: dict[str, LocalMethod] = {
    "local-vote": LocalMethod("local vote", _out_and_back(1), LocalVote),
}
"""By key."""

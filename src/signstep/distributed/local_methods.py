"""Every way in which workers that train by themselves agree now and then: the table from which training, plan and
studies take theirs. What reduces gradients in every step is in reductions.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from signstep.distributed.compressors import QSGD, Compressor, Exact
from signstep.distributed.diloco import DiLoCo
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
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int,
        outer_lr: float | None,
        outer_momentum: float | None,
        seed: int,
    ) -> LocalSteps:
        """Make it; an option that is None has the method's own default."""
        options = {"outer_lr": outer_lr, "outer_momentum": outer_momentum}
        given = {name: value for name, value in options.items() if value is not None}
        return self.make(model, optimizer, every=every, seed=seed, **given)


def _said(gradients: Gradients, workers: int) -> float:
    """4 bytes to all for each parameter, for the steps taken, and for whether a worker takes part."""
    return 4 * (workers - 1) * (2 + len(gradients.shapes))


def _vote(gradients: Gradients, workers: int) -> float:
    """A bit of each coordinate there and back but for one's own M-th part."""
    return gradients.parameters * (workers - 1) / (4 * workers) + _said(gradients, workers)


def _mean(label: str, compressor: Compressor) -> LocalMethod:
    return LocalMethod(
        label,
        lambda gradients, workers: compressor.payload(gradients.shapes, workers) + _said(gradients, workers),
        functools.partial(DiLoCo, compressor=compressor),
        origin="Douillard et al. 2023",
    )


LOCAL_METHODS: dict[str, LocalMethod] = {
    "local-vote": LocalMethod("local vote", _vote, LocalVote),
    "diloco": _mean("DiLoCo, fp32", Exact()),
    "diloco-int8": _mean("DiLoCo, int8", QSGD(levels=127)),
}
"""By key."""

"""Every way in which workers that train by themselves agree now and then: the table from which training, plan and
studies take theirs. What reduces gradients in every step is in reductions.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from signstep.distributed.compressors import QSGD, Compressor, Exact
from signstep.distributed.diloco import DiLoCo
from signstep.distributed.hooks import Entry
from signstep.distributed.local import LocalVote
from signstep.distributed.reductions import Gradients, Payload, RoundTrips
from signstep.distributed.rounds import LocalSteps
from signstep.distributed.vote import in_parts

__all__ = ["LOCAL_METHODS", "LocalMethod"]

_LEAST_TRIPS = 3  # what is said, then an all-to-all and an all-gather


@dataclass(frozen=True)
class LocalMethod:
    """A way to agree."""

    label: str
    """Its name in tables."""
    payload: Payload
    """Bytes that each of M workers sends in a round, without padding and headers, by the parameters' shapes and M."""
    round_trips: RoundTrips
    """How many times a round of one fragment waits for the links' latency, as `Reduction.round_trips` counts it."""
    like: str
    """The key in `REDUCTIONS` of what gives a processor about as much to do in a step as this in a round."""
    make: Callable[..., LocalSteps]
    """From (model, optimizer, every=H), and what the method's own options are."""
    origin: str = "signstep"
    """Whose it is: signstep, or after a paper of others."""

    def least_trips(self, gradients: Gradients, workers: int) -> float:
        """How many round trips a round waits for where all parts of its message wait at the same time."""
        return _LEAST_TRIPS

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


def _vote_trips(gradients: Gradients, _: int) -> int:
    """One for what is said, then two for every two parts, of which gloo has two under way at a time."""
    params = [torch.empty(math.prod(shape), dtype=torch.float32, device="meta") for shape in gradients.shapes]
    return 1 + 2 * math.ceil(len(in_parts([Entry("", p, p, True) for p in params])) / 2)


def _mean(label: str, compressor: Compressor, like: str) -> LocalMethod:
    return LocalMethod(
        label,
        lambda gradients, workers: compressor.payload(gradients.shapes, workers) + _said(gradients, workers),
        lambda gradients, workers: _LEAST_TRIPS,  # all in one message
        like,
        functools.partial(DiLoCo, compressor=compressor),
        origin="Douillard et al. 2023",
    )


LOCAL_METHODS: dict[str, LocalMethod] = {
    "local-vote": LocalMethod("local vote", _vote, _vote_trips, "vote", LocalVote),
    "diloco": _mean("DiLoCo, fp32", Exact(), "ddp-fp32"),
    "diloco-int8": _mean("DiLoCo, int8", QSGD(levels=127), "qsgd"),
}
"""By key."""

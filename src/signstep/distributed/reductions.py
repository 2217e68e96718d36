"""Every way to make one gradient of the workers': the table from which training, plan, benchmark and pages take theirs.

A new way is a line of `REDUCTIONS`; a new compressor is a file in compressors/ and its name there.
"""

# Without postponed annotations: DDP compares those of a hook with the types themselves.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signstep.distributed import power_sgd
from signstep.distributed.compressors import COMPRESSORS, CompressedGradients, Offer
from signstep.distributed.ddp import MajorityVote
from signstep.distributed.vote import LEAST_PART

__all__ = ["REDUCTIONS", "TRAINED", "Gradients", "Reduction", "Stateful", "attach"]

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes, of DistributedDataParallel
_SIDE = 1000


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step, float32, by their shapes.

    >>> Gradients(((512, 4608), (512,))).parameters
    2359808
    """

    shapes: Sequence[tuple[int, ...]]

    @classmethod
    def square(cls, parameters: int) -> "Gradients":
        """So many parameters in square matrices, if no more than their number is known: of 1000 x 1000 at most, but
        above 10^9 parameters so large that they are about a thousand.

        >>> Gradients.square(2_500_000).shapes
        ((1000, 1000), (1000, 1000), (500, 1000))
        """
        side = min(max(_SIDE, math.isqrt(parameters // _SIDE)), math.isqrt(parameters))
        rows, rest = divmod(parameters, side)
        full, more = divmod(rows, side)
        shapes: list[tuple[int, ...]] = [(side, side)] * full
        shapes += [(more, side)] if more else []
        return cls((*shapes, (rest,)) if rest else tuple(shapes))

    @property
    def parameters(self) -> int:
        """How many numbers they are."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def buckets(self) -> int:
        """Into how many parts DistributedDataParallel divides them with its default sizes, about."""
        return 1 + math.ceil(max(0, 4 * self.parameters - _FIRST_BUCKET) / _BUCKET)


class Stateful(Protocol):
    """A hook that keeps something from step to step, each rank its own part of it."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` gave."""
        ...


Attach = Callable[[DistributedDataParallel, Optimizer], Stateful | None]
Payload = Callable[[Gradients, int], float]
RoundTrips = Callable[[Gradients, int], int]


@dataclass(frozen=True)
class Reduction:
    """A way to make one gradient of the workers'."""

    label: str
    """Its name in tables."""
    payload: Payload
    """Bytes that each of M workers sends in a step, without padding and headers, by `Gradients` and M."""
    round_trips: RoundTrips
    """How many times a step waits for the links' latency, there and back, by `Gradients` and M. Of gloo, where whoever
    receives has to say that it is ready: an all-reduce is a ring of 2 (M - 1) round trips, an all-to-all 1, and so is
    an all-gather of `signstep.distributed.collectives`; buckets go one after the other."""
    attach: Attach | None
    """Makes a model reduce its gradients so, and returns what a checkpoint has to save, if anything; None for a way
    that is an optimizer of its own."""
    origin: str = "signstep"
    """Whose it is: torch, plain (a few lines of torch) or signstep."""
    trained: bool = True
    """Whether `signstep train --reduce` offers it."""

    def least_trips(self, gradients: Gradients, workers: int) -> float:
        """How many round trips a step waits for where all buckets wait at the same time."""
        return self.round_trips(gradients, workers) / gradients.buckets


def attach(name: str, model: DistributedDataParallel, optimizer: Optimizer) -> Stateful | None:
    """Make a model reduce its gradients in one of the ways that are `TRAINED`.

    Returns:
        What a checkpoint has to save, if anything.
    """
    if name == "mean":
        return None
    chosen = REDUCTIONS[name].attach
    assert chosen is not None
    return chosen(model, optimizer)


def _by_hook(hook: Callable[[dist.ProcessGroup, GradBucket], Future[Tensor]]) -> Attach:
    return lambda model, _: model.register_comm_hook(model.process_group, hook)


def _bf16_mean(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """The mean of gradients, sent as bfloat16; torch refuses its own `bf16_compress_hook` on CPUs."""
    buffer = bucket.buffer()
    half = buffer.to(torch.bfloat16).div_(group.size())
    work = dist.all_reduce(half, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda reduced: buffer.copy_(reduced.value()[0]))  # type: ignore[no-any-return]


def _int8_sum(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """The sign of the sum of the gradients' signs, sent as int8: without momentum, so less work than a vote does."""
    buffer = bucket.buffer()
    signs = buffer.sign().to(torch.int8)
    work = dist.all_reduce(signs, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda summed: buffer.copy_(summed.value()[0].sign_()))  # type: ignore[no-any-return]


def _power_sgd(model: DistributedDataParallel, _: Optimizer) -> None:
    power_sgd.PowerSGDHook(model)


def _vote(**options: Any) -> Attach:
    def attach_vote(model: DistributedDataParallel, optimizer: Optimizer) -> Stateful:
        return MajorityVote(model, optimizer, **options)

    return attach_vote


def _all_reduce(bits: float) -> Payload:
    """A ring all-reduce, or all-to-all and all-gather: (M - 1) / M of all coordinates out and back, `bits` each way."""
    return lambda gradients, workers: 2 * gradients.parameters * bits / 8 * (workers - 1) / workers


def _rings(count: int) -> RoundTrips:
    """So many all-reduces of each bucket, one after the other."""
    return lambda gradients, workers: 2 * count * (workers - 1) * gradients.buckets


def _out_and_back(gradients: Gradients, _: int) -> int:
    """An all-to-all there and another for the result, in parts, of which gloo has two under way at a time."""
    return 2 * max(gradients.buckets, math.ceil(gradients.parameters / (2 * LEAST_PART)))


def _power_sgd_payload(gradients: Gradients, workers: int) -> float:
    # As torch's PowerSGDState decides by default: what would not shrink by half is sent as it is.
    sent = 0
    for shape in gradients.shapes:
        rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
        factors = (rows + columns) * min(rows, columns, power_sgd.RANK)
        sent += factors if 2 * factors < rows * columns else rows * columns
    return 8 * sent * (workers - 1) / workers


def _compressed(offer: Offer) -> Reduction:
    compressor = offer.make()

    def attach_compressor(model: DistributedDataParallel, _: Optimizer) -> Stateful:
        return CompressedGradients(model, offer.make())

    return Reduction(
        offer.label,
        lambda gradients, workers: compressor.payload(gradients.shapes, workers),
        # All-to-all and all-gather, or an all-gather alone.
        lambda gradients, _: gradients.buckets * (2 if compressor.two_sided else 1),
        attach_compressor,
    )


_TWO_SIDED = _compressed(COMPRESSORS["ef-sign-two-sided"])

REDUCTIONS: dict[str, Reduction] = {
    "ddp-fp32": Reduction("DDP, fp32", _all_reduce(32), _rings(1), lambda *_: None, origin="torch", trained=False),
    "bf16": Reduction("DDP, bf16", _all_reduce(16), _rings(1), _by_hook(_bf16_mean), origin="torch"),
    "powersgd": Reduction(
        f"PowerSGD, rank {power_sgd.RANK}", _power_sgd_payload, _rings(3), _power_sgd, origin="torch"
    ),
    "int8-sum": Reduction(
        "int8 sum of signs", _all_reduce(8), _rings(1), _by_hook(_int8_sum), origin="plain", trained=False
    ),
    "vote": Reduction("vote", _all_reduce(1), _out_and_back, _vote()),
    "vote-dithered": Reduction("vote, dithered", _all_reduce(1), _out_and_back, _vote(), trained=False),
    "vote-abstain": Reduction(
        "vote, ties abstain", _all_reduce(1.5), _out_and_back, _vote(ties="abstain"), trained=False
    ),
    "vote-ef": Reduction(
        "vote, error feedback", _all_reduce(1), _out_and_back, _vote(error_feedback=True), trained=False
    ),
    **{key: _compressed(offer) for key, offer in COMPRESSORS.items()},
    "one-bit-adam": Reduction("1-bit Adam", _TWO_SIDED.payload, _TWO_SIDED.round_trips, None, trained=False),
}
"""By key."""

TRAINED = ("mean", *(key for key, reduction in REDUCTIONS.items() if reduction.trained))
"""What `signstep train --reduce` offers; "mean" is DDP's own, "ddp-fp32" in the benchmarks."""

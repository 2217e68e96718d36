"""Who takes part in `signstep bench comm`: torch's ways to reduce gradients, plain ones, and signstep's."""

# Without postponed annotations: DDP compares those of a hook with the types themselves.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from signstep import SignSGD
from signstep.distributed import Bucket, GradientHook, MajorityVote
from signstep.distributed.compressors import METHODS as COMPRESSORS
from signstep.distributed.compressors import CompressedGradients, Compressor, OneBitAdam
from signstep.distributed.plan import METHODS as PLANNED
from signstep.distributed.power_sgd import PowerSGD

PEER = "ddp-fp32"
"""The method that ratios are over."""
_LR = 1e-3


class Stepper(Protocol):
    """An optimizer."""

    @property
    def step(self) -> Callable[[], object]:
        """Take one step."""
        ...


@dataclass(frozen=True)
class Method:
    """One line of the benchmark's tables."""

    kind: str
    """torch, plain or signstep: what the figure colours by."""
    make: Callable[[DistributedDataParallel], Stepper]
    """Registers a communication hook and returns the optimizer that steps the model."""


def _sgd(model: DistributedDataParallel, momentum: float = 0.9) -> Stepper:
    return torch.optim.SGD(model.parameters(), lr=_LR, momentum=momentum, fused=True)


def bf16_mean(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """The mean of gradients, sent as bfloat16: a communication hook whose state is the process group.

    torch refuses its own `bf16_compress_hook` on CPUs.
    """
    buffer = bucket.buffer()
    half = buffer.to(torch.bfloat16).div_(group.size())
    work = dist.all_reduce(half, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda reduced: buffer.copy_(reduced.value()[0]))  # type: ignore[no-any-return]


def _bf16(model: DistributedDataParallel) -> Stepper:
    model.register_comm_hook(model.process_group, bf16_mean)
    return _sgd(model)


def _int8_sum(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    # Signs of gradients, without momentum: less work than the vote does.
    buffer = bucket.buffer()
    signs = buffer.sign().to(torch.int8)
    work = dist.all_reduce(signs, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda summed: buffer.copy_(summed.value()[0].sign_()))  # type: ignore[no-any-return]


def _int8(model: DistributedDataParallel) -> Stepper:
    model.register_comm_hook(model.process_group, _int8_sum)
    return _sgd(model, momentum=0.0)


class PowerSGDHook(GradientHook):
    """Averages by `signstep.distributed.power_sgd`."""

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self._power = PowerSGD(self.group)
        self.attach(model)

    def reduce(self, bucket: Bucket) -> None:
        """The mean of low-rank approximations."""
        self._power.average(bucket)


def _power_sgd(model: DistributedDataParallel) -> Stepper:
    PowerSGDHook(model)
    return _sgd(model)


def _vote(options: dict[str, Any] | None = None, **vote: Any) -> Callable[[DistributedDataParallel], Stepper]:
    def make(model: DistributedDataParallel) -> Stepper:
        optimizer = SignSGD(model.parameters(), lr=_LR, **(options or {}))
        MajorityVote(model, optimizer, **vote)
        return optimizer

    return make


def _compressed(compressor: Callable[[], Compressor]) -> Callable[[DistributedDataParallel], Stepper]:
    def make(model: DistributedDataParallel) -> Stepper:
        CompressedGradients(model, compressor())
        return _sgd(model)

    return make


def _one_bit_adam(model: DistributedDataParallel) -> Stepper:
    return OneBitAdam(model, lr=_LR, warmup_steps=2)


METHODS = {
    PEER: Method("torch", _sgd),
    "bf16": Method("torch", _bf16),
    "powersgd": Method("torch", _power_sgd),
    "int8-sum": Method("plain", _int8),
    "vote": Method("signstep", _vote()),
    "vote-dithered": Method("signstep", _vote({"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"})),
    "vote-abstain": Method("signstep", _vote(ties="abstain")),
    "vote-ef": Method("signstep", _vote(error_feedback=True)),
    **{key: Method("signstep", _compressed(make)) for key, make in COMPRESSORS.items()},
    "one-bit-adam": Method("signstep", _one_bit_adam),
}
"""By key; `signstep.distributed.plan.METHODS` has the same, with labels and bytes."""
assert METHODS.keys() <= PLANNED.keys()

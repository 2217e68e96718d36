"""How the workers' gradients become one: a name, and the communication hook that does it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed import CompressedGradients, MajorityVote
from signstep.distributed.compressors import METHODS as COMPRESSORS
from signstep.lab.bench.comm_methods import PowerSGDHook, bf16_mean
from signstep.optim import SignSGD


class Stateful(Protocol):
    """What a hook keeps from step to step, this rank's part of it."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` gave."""
        ...


def attach(name: str, model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> Stateful | None:
    """Reduce gradients as `RunConfig.reduce` says; returns what has to be saved with a checkpoint, if anything."""
    if name == "vote":
        assert isinstance(optimizer, SignSGD)
        return MajorityVote(model, optimizer)
    if name == "bf16":
        model.register_comm_hook(model.process_group, bf16_mean)
    elif name == "powersgd":
        PowerSGDHook(model)
    elif name in COMPRESSORS:
        return CompressedGradients(model, COMPRESSORS[name]())
    return None

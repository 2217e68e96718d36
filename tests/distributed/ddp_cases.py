"""What the tests of votes under DDP share: small models, their batches, and comparisons of ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signstep import SignSGD
from signstep.distributed import MajorityVote


def share(mine: list[Tensor | None]) -> list[list[Tensor | None]]:
    """Every rank's gradients, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def small_net(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "conv":
        net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.Flatten(), nn.Linear(80, 4))
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return nn.Sequential(nn.Linear(11, 37), nn.ReLU(), nn.Linear(37, 23), nn.ReLU(), nn.Linear(23, 4))


def batch_of(kind: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    shape = (6, 3, 8, 8) if kind == "conv" else (6, 11)
    x = torch.randn(shape, generator=generator)
    return x.to(memory_format=torch.channels_last) if kind == "conv" else x, torch.randint(
        0, 4, (6,), generator=generator
    )


def equal_everywhere(net: nn.Module) -> bool:
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    return all(torch.equal(flat, other) for [other] in share([flat]) if other is not None)


SMALL_BUCKETS = {"bucket_cap_mb": 0.001}


class Branches(nn.Module):
    """Which branch is used is up to the caller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(4, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.branches[which](x).sum()


def small_vote() -> tuple[DistributedDataParallel, SignSGD, MajorityVote]:
    model = DistributedDataParallel(small_net("linear"))
    optimizer = SignSGD(model.parameters())
    return model, optimizer, MajorityVote(model, optimizer)

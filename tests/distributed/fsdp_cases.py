"""What the tests of FSDP2 share: a model whose rows no number of ranks divides, and comparisons of its shards."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

needs_custom_reduce_scatter = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="this torch has no custom reduce-scatter"
)

Options = dict[str, Any]


class Net(nn.Module):
    """Rows that no number of ranks divides, and fewer rows than ranks."""

    def __init__(self, *, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(11, 37), nn.Tanh())
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(37, 37), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(37, 3)
        self.gain = nn.Parameter(torch.randn(5))
        if tied:
            self.again = nn.Linear(11, 37, bias=False)
            self.again.weight = self.first[0].weight
        self.tied = tied
        if frozen:
            self.blocks[0][0].weight.requires_grad_(False)
            self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.tied:
            h = h + self.again(x)
        for block in self.blocks:
            h = block(h)
        return self.last(h) * self.gain.square().mean()


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(6, 11, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def loss_of(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    x, y = batch_of(step, dist.get_rank() if rank is None else rank)
    return F.cross_entropy(model(x).float(), y)


def train_step(step: int, *runs: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    for model, optimizer in runs:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def shard(net: Any, parts: bool = True, **options: Any) -> Any:
    if parts and not net.tied:  # torch wants what is tied in one module
        fully_shard(net.first, **options)
    for block in net.blocks if parts else ():
        fully_shard(block, **options)
    fully_shard(net, **options)
    return net


def own_rows(whole: Tensor, shard: DTensor) -> Tensor:
    rows = -(-whole.shape[0] // shard.device_mesh.size())
    rank = shard.device_mesh.get_local_rank()
    return whole[rank * rows : (rank + 1) * rows]


def assert_equal(sharded: nn.Module, net: nn.Module, note: object) -> None:
    for (name, ours), theirs in zip(sharded.named_parameters(), net.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        assert torch.equal(ours.to_local(), own_rows(theirs, ours)), (note, name)


def assert_same_everywhere(net: nn.Module) -> None:
    flat = torch.cat([p.detach().full_tensor().flatten() for p in net.parameters()])  # type: ignore[operator]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, flat)
    assert all(torch.equal(flat, other) for other in everyone)


RELATIVE = {"dither": 1.0, "dither_scale": "relative", "dither_decay": 0.0}


class Branches(nn.Module):
    """Which branch is used is up to the caller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.branches[which](x).sum()

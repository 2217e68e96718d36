"""Which images a step sees, alone and shared out over workers."""

from typing import Any

import pytest
import torch
from tiny_runs import tiny

from signstep.lab.data import load, normalise, split
from signstep.lab.training.batches import Batches
from signstep.lab.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))


class _Worker(Workers):
    """One of several workers, without the others."""

    def in_turn(self, compute: Any) -> Any:
        return compute()


def test_an_epoch_shows_every_image_once_and_the_next_one_in_another_order() -> None:
    config = tiny(crop=0)
    batches = Batches(config, ALONE, None)
    images = load("digits")
    train_x, train_y, _, _ = split(images, "final", 96)
    wanted = normalise(train_x, images.mean, images.std)
    orders = []
    for epoch in range(2):
        parts = [batches.training(epoch, index) for index in range(3)]
        x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        distance = torch.cdist(x.flatten(1), wanted.flatten(1))
        order = distance.argmin(1)
        torch.testing.assert_close(x, wanted[order])
        assert torch.equal(y, train_y[order])
        assert len(order.unique()) == 96
        orders.append(order)
    assert not torch.equal(orders[0], orders[1])


def test_workers_share_out_the_same_batch() -> None:
    config = tiny(crop=0)
    alone, *shared = (
        Batches(config, _Worker(rank, size, torch.device("cpu")), None) for rank, size in [(0, 1), (0, 2), (1, 2)]
    )
    for epoch, index in [(0, 0), (0, 2), (1, 1)]:
        x, y = alone.training(epoch, index)
        parts = [batches.training(epoch, index) for batches in shared]
        assert torch.equal(torch.cat([p[0] for p in parts]), x)
        assert torch.equal(torch.cat([p[1] for p in parts]), y)
    seen = sorted(int(y.numel()) for batches in shared for _, y in batches.evaluation())
    assert sum(seen) == sum(len(y) for _, y in alone.evaluation()) == 360


def test_a_batch_follows_from_seed_epoch_step_and_rank_alone() -> None:
    def draw(seed: int, epoch: int, index: int, rank: int, size: int = 2) -> torch.Tensor:
        worker = _Worker(rank, size, torch.device("cpu"))
        return Batches(tiny(seed=seed), worker, None).training(epoch, index)[0]

    first = draw(0, 1, 1, 0)
    fresh = Batches(tiny(), _Worker(0, 2, torch.device("cpu")), None)
    for index in (0, 2, 1):
        later, _ = fresh.training(1, index)
    assert torch.equal(later, first)
    for other in [(1, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 1)]:
        assert not torch.equal(draw(*other), first)


def test_an_uneven_batch() -> None:
    with pytest.raises(ValueError, match="batch_size=32: expected a multiple of the 3 workers"):
        Batches(tiny(), _Worker(0, 3, torch.device("cpu")), None)

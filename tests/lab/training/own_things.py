"""What a user brings along, for the tests: models, data sets, losses, metrics."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from signstep.lab.data import load, normalise
from signstep.lab.training import models


def resnet(num_classes: int, in_channels: int) -> nn.Module:
    """The lab's own ResNet-8, as a model of the user's."""
    return models.build("resnet8", num_classes=num_classes, in_channels=in_channels, width=0.25)


def ten(in_channels: int = 1) -> nn.Module:
    return resnet(10, in_channels)


class Lazy(nn.Module):
    """Takes the shape of its inputs from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1)


def needs_depth(num_classes: int, depth: int) -> nn.Module:
    raise AssertionError("never called")


def a_number() -> int:
    return 3


A_STRING = "text"


class Items(Dataset):
    """The items of a data set one by one, the input shifted by noise of all three global generators."""

    def __init__(self, whole: TensorDataset, noise: float = 0.0) -> None:
        self.whole, self.noise = whole, noise
        self.classes = range(10)

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.whole[index]
        if self.noise:
            drawn = torch.rand(()) + np.random.rand() + random.random()
            x = x + self.noise * drawn
        return x, y


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The built-in digits as tensors that are normalised already."""
    images = load("digits")

    def part(x: Tensor, y: Tensor) -> TensorDataset:
        return TensorDataset(normalise(x, images.mean, images.std), y)

    return part(images.train_x, images.train_y), part(images.test_x, images.test_y)


def items() -> tuple[Dataset, Dataset]:
    train, test = digits()
    return Items(train), Items(test)


def noisy_items() -> tuple[Dataset, Dataset]:
    train, test = digits()
    return Items(train, 0.1), Items(test)


def loaders() -> tuple[object, object, object]:
    train, test = noisy_items()

    def batches(seed: int) -> DataLoader:
        order = torch.Generator().manual_seed(seed)
        return DataLoader(train, batch_size=32, shuffle=True, drop_last=True, generator=order)

    return batches, (lambda seed: DataLoader(test, batch_size=50)), test


def loaders_without_third() -> tuple[object, object]:
    return loaders()[:2]


def line() -> tuple[TensorDataset, TensorDataset]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(160, 3, generator=draw)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
    return TensorDataset(x[:128], y[:128]), TensorDataset(x[128:], y[128:])


def far_line() -> tuple[TensorDataset, TensorDataset]:
    train, test = line()
    return TensorDataset(train.tensors[0] * 1e30, train.tensors[1]), test


def ragged() -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    return [(torch.zeros(3 + i % 2), 0) for i in range(128)], [(torch.zeros(3), 0)]


def triples() -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    return [(1, 2, 3)] * 128, [(1, 2, 3)] * 128


def empty() -> tuple[list[object], list[object]]:
    return [], []


def with_an_argument(folder: str) -> None:
    raise AssertionError("never called")


def iterators() -> tuple[object, object]:
    return iter([]), iter([])


def far_labels() -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    part = [(torch.zeros(1, 8, 8), 12)] * 128
    return part, part


def mean_square(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean()


def mean_distance(outputs: Tensor, y: Tensor) -> float:
    return float((outputs - y).abs().mean())


def undefined_in_training(outputs: Tensor, y: Tensor) -> Tensor:
    """The mean square where the network is evaluated, NaN where it trains."""
    return mean_square(outputs, y) * (torch.nan if outputs.requires_grad else 1)


class Undefined:
    """Finite at first, and then not."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.tensor(1.0 if self.calls == 1 else torch.nan)


def of_each(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square()


def fails(outputs: Tensor, y: Tensor) -> Tensor:
    raise ValueError("it is Tuesday")

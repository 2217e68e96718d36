"""What several files of statements measure with: means and their errors, laws of noise, and a training on digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from signstep.lab.data import digits
from signstep.lab.training.models import build
from signstep.theory import noise

ROUNDING = 1e-9
"""How far apart two float64 numbers may be that are the same."""
LINEAR_GAIN = math.sqrt(2 / math.pi)
"""Slope of 2 Phi(z) - 1 at z = 0; also E|z| of a standard normal z."""


def mean_error(values: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The mean of independent values along a dimension, and its standard error."""
    return values.mean(dim), values.std(dim) / values.shape[dim] ** 0.5


def scalar_mean_error(values: Tensor) -> tuple[float, float]:
    """The mean of independent values [n], and its standard error."""
    mean, error = mean_error(values)
    return float(mean), float(error)


def sign_score(signs: Tensor, expected: float) -> tuple[float, float]:
    """The mean of independent signs, and its distance from the expected one in standard errors."""
    mean = float(signs.double().mean())
    return mean, (mean - expected) / math.sqrt((1 - expected**2) / signs.numel())


def step_on(optimizer: torch.optim.Optimizer, x: nn.Parameter, gradient: Tensor) -> Tensor:
    """What a step on this gradient takes off x: x_k - x_(k+1)."""
    before = x.detach().clone()
    x.grad = gradient
    optimizer.step()
    return before - x.detach()


def symmetric_unimodal() -> list[noise.Law]:
    """The symmetric unimodal laws of `signstep.theory.noise`."""
    return [law for law in noise.LAWS.values() if law.symmetric and law.unimodal]


def digits_data() -> tuple[Tensor, Tensor]:
    """The training images of digits [N, 1, 8, 8] around 0, and their labels."""
    images = digits.read()
    return images.train_x.float() / 255 - 0.3, images.train_y


OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


def train_resnet8(
    make: Callable[[Iterable[nn.Parameter]], OptimizerT], *, seed: int, reduction: str = "mean"
) -> Iterator[tuple[nn.Module, OptimizerT, float]]:
    """Train ResNet-8 on digits in batches of 128.

    Args:
        make: gives the optimizer of the parameters.
        seed: of the weights and of the batches.
        reduction: of the loss over a batch, "mean" or "sum".

    Yields:
        The model, its optimizer, and the loss before the step, after each of 60 steps.
    """
    x, y = digits_data()
    rng = Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build("resnet8", num_classes=10, in_channels=1)
    optimizer = make(model.parameters())
    for _ in range(60):
        chosen = torch.randint(len(x), (128,), generator=rng)
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), y[chosen], reduction=reduction)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield model, optimizer, float(loss.detach())

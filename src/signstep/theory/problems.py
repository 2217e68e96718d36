r"""Problems whose gradient, noise, smoothness and minimum are known, and the SignSGD of Theorem 1 on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from signstep.theory.bounds import dithered_std
from signstep.theory.bounds import phi as stationarity_measure
from signstep.theory.noise import LAWS, Law

__all__ = ["Problem", "Trajectory", "coupled_quadratic", "logistic_regression", "run", "separable_quadratic"]

_NEWTON_STEPS = 50
_NEWTON_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Problem:
    r"""A function with a stochastic gradient. All tensors are float64, and x may be a batch of points, shape [..., d].

    Args:
        name: what tables call it.
        dim: d.
        smoothness: :math:`L_i`, shape [d], such that for all x and y (Bernstein et al. 2018, Assumption 2)
            :math:`f(y) \le f(x) + \langle g, y - x \rangle + \frac 1 2 \sum_i L_i (y_i - x_i)^2`.
        minimum: :math:`f^\star`.
        start: :math:`x_0`, shape [d].
        value: f, from [..., d] to [...].
        gradient: its gradient, from [..., d] to the same shape.
        sample_gradient: takes (x, n, generator) to the mean of n independent stochastic gradients, in the shape of x.
        noise_std: takes x to :math:`\sigma_i` of a single stochastic gradient, in the shape of x.
    """

    name: str
    dim: int
    smoothness: Tensor
    minimum: float
    start: Tensor
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    sample_gradient: Callable[[Tensor, int, Generator], Tensor]
    noise_std: Callable[[Tensor], Tensor]

    @property
    def gap(self) -> float:
        r""":math:`f_0 - f^\star`, the mean over the starting points if there are several."""
        return float(self.value(self.start).mean()) - self.minimum


@dataclass(frozen=True)
class Trajectory:
    """The points x_0, ..., x_(K-1) of a run, as numbers of shape [K, ...], where ... is the batch of the start."""

    values: Tensor
    """f."""
    phi: Tensor
    """Phi of eq. (1), where s includes the dither."""
    l1: Tensor
    """Sum of absolute values of the gradient."""


def _quadratic(name: str, hessian: Tensor, noise_std: float, law: Law) -> Problem:
    if not (noise_std >= 0 and math.isfinite(noise_std)):
        raise ValueError(f"noise_std={noise_std}: expected a finite number of at least 0")
    dim = len(hessian)

    def apply(x: Tensor) -> Tensor:
        # A diagonal Hessian is given as its diagonal.
        return hessian * x if hessian.ndim == 1 else x @ hessian

    def sample_gradient(x: Tensor, n: int, generator: Generator) -> Tensor:
        return apply(x) + noise_std * law.sample((n, *x.shape), generator).mean(0)

    return Problem(
        name=name,
        dim=dim,
        smoothness=hessian.abs() if hessian.ndim == 1 else hessian.abs().sum(-1),
        minimum=0.0,
        start=torch.ones(dim, dtype=torch.float64, device="cpu"),
        value=lambda x: (x * apply(x)).sum(-1) / 2,
        gradient=apply,
        sample_gradient=sample_gradient,
        noise_std=lambda x: torch.full_like(x, noise_std),
    )


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim={dim}: expected at least 1")


def separable_quadratic(
    dim: int = 100, *, condition: float = 10.0, noise_std: float = 1.0, law: Law = LAWS["gaussian"]
) -> Problem:
    r""":math:`f(x) = \frac 1 2 \sum_i L_i x_i^2` from :math:`x_0 = (1, \ldots, 1)`, with independent noise.

    Args:
        dim: d >= 1.
        condition: :math:`L_i` are spaced evenly in their logarithm from 1 / condition to 1; at least 1.
        noise_std: standard deviation of a single stochastic gradient, the same for all coordinates, >= 0.
        law: law of the noise.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> problem = separable_quadratic(3, condition=4.0)
        >>> problem.smoothness, problem.gap
        (tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64), 0.875)
    """
    _check_dim(dim)
    if not (condition >= 1 and math.isfinite(condition)):
        raise ValueError(f"condition={condition}: expected a finite number of at least 1")
    curvature = torch.logspace(-math.log10(condition), 0, dim, dtype=torch.float64, device="cpu")
    return _quadratic("separable quadratic", curvature, noise_std, law)


def coupled_quadratic(
    dim: int = 100, *, coupling: float = 0.1, noise_std: float = 1.0, law: Law = LAWS["gaussian"]
) -> Problem:
    r""":math:`f(x) = \frac 1 2 x^\top H x`, :math:`H = (1 - c) I + c\, 1 1^\top`, from :math:`x_0 = (1, \ldots, 1)`.

    :math:`L_i = \sum_j |H_{ij}| = 1 + c (d - 1)`, where every second derivative along an axis is 1.

    Args:
        dim: d >= 1.
        coupling: c in [0, 1]; at 1 H is all ones.
        noise_std: standard deviation of a single stochastic gradient, the same for all coordinates, >= 0.
        law: law of the noise.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> float(coupled_quadratic(100, coupling=1.0).smoothness.sum())
        10000.0
    """
    _check_dim(dim)
    if not 0 <= coupling <= 1:
        raise ValueError(f"coupling={coupling}: expected a number from 0 to 1")
    hessian = torch.full((dim, dim), coupling, dtype=torch.float64, device="cpu").fill_diagonal_(1.0)
    return _quadratic("coupled quadratic", hessian, noise_std, law)


def logistic_regression(*, l2: float = 1e-2) -> Problem:
    r"""Logistic regression of odd against even digits on scikit-learn's 1,797 images of 8 x 8 pixels: real noise.

    .. math::
        f(x) = \frac 1 N \sum_j \log(1 + e^{-y_j \langle a_j, x \rangle}) + \frac{\mu}{2} \|x\|^2, \qquad
        L_i = \frac{1}{4 N} \sum_l |A^\top A|_{il} + \mu

    A stochastic gradient is that of one image, drawn with replacement. There are 64 pixels, scaled to [0, 1], and a
    constant 65th coordinate. A few pixels are always 0, so that their noise is exactly 0. The noise is neither
    symmetric nor unimodal. The minimum is found by Newton's method, to a gradient of norm 1e-12.

    Args:
        l2: mu > 0.

    Raises:
        ValueError: an l2 that is not a finite number above 0.
        ModuleNotFoundError: scikit-learn is missing; it comes with `signstep[lab]`.
    """
    from sklearn.datasets import load_digits

    if not (l2 > 0 and math.isfinite(l2)):
        raise ValueError(f"l2={l2}: expected a finite number above 0")
    pixels, digit = load_digits(return_X_y=True)
    pixels = torch.from_numpy(pixels).to(torch.float64) / 16
    images = torch.cat([pixels, torch.ones(len(pixels), 1, dtype=torch.float64, device="cpu")], dim=1)
    labels = torch.where(torch.from_numpy(digit) % 2 == 1, 1.0, -1.0).to(torch.float64)
    rows = labels.unsqueeze(1) * images
    count, dim = rows.shape

    def value(x: Tensor) -> Tensor:
        # Not softplus, which drops what is below 2e-9.
        return l2 / 2 * x.square().sum(-1) - torch.nn.functional.logsigmoid(x @ rows.T).mean(-1)

    def gradient(x: Tensor) -> Tensor:
        return -torch.sigmoid(-x @ rows.T) @ rows / count + l2 * x

    def sample_gradient(x: Tensor, n: int, generator: Generator) -> Tensor:
        drawn = rows[torch.randint(count, (*x.shape[:-1], n), generator=generator, device="cpu")]
        weight = torch.sigmoid(-(drawn @ x.unsqueeze(-1)))
        return -(weight * drawn).mean(-2) + l2 * x

    def noise_std(x: Tensor) -> Tensor:
        weight = torch.sigmoid(-x @ rows.T)
        mean = weight @ rows / count
        # Rounding must not leave a pixel that is always 0 with noise, nor a variance below 0.
        return (weight.square() @ rows.square() / count - mean.square()).clamp(min=0).sqrt()

    best = torch.zeros(dim, dtype=torch.float64, device="cpu")
    for _ in range(_NEWTON_STEPS):
        slope = gradient(best)
        if float(slope.norm()) <= _NEWTON_TOLERANCE:
            break
        chance = torch.sigmoid(best @ rows.T)
        curvature = (rows.T * (chance * (1 - chance))) @ rows / count
        best = best - torch.linalg.solve(curvature + l2 * torch.eye(dim, dtype=torch.float64, device="cpu"), slope)
    return Problem(
        name="logistic regression",
        dim=dim,
        smoothness=(rows.T @ rows).abs().sum(-1) / (4 * count) + l2,
        minimum=float(value(best)),
        start=torch.zeros(dim, dtype=torch.float64, device="cpu"),
        value=value,
        gradient=gradient,
        sample_gradient=sample_gradient,
        noise_std=noise_std,
    )


def run(
    problem: Problem, *, steps: int, batch_size: int, lr: float, dither_std: float = 0.0, generator: Generator
) -> Trajectory:
    r"""The SignSGD of Theorem 1: :math:`x_{k+1} = x_k - \delta\, \mathrm{sign}(\tilde g_k + \xi_k)`, no momentum.

    Args:
        problem: its start may be a batch, [..., d], for independent runs at once.
        steps: K >= 1.
        batch_size: n >= 1 stochastic gradients per step.
        lr: delta > 0.
        dither_std: standard deviation of the Gaussian :math:`\xi_k`, the same at all steps, >= 0.
        generator: what the noise is drawn from.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> problem = separable_quadratic(10)
        >>> path = run(problem, steps=100, batch_size=4, lr=0.02, generator=torch.Generator().manual_seed(0))
        >>> path.phi.shape, bool(path.values[-1] < path.values[0])
        (torch.Size([100]), True)
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps}, batch_size={batch_size}: expected at least 1 of each")
    if not (lr > 0 and dither_std >= 0):
        raise ValueError(f"lr={lr}, dither_std={dither_std}: expected lr above 0 and dither_std at least 0")
    x = problem.start
    values, phis, l1s = [], [], []
    for _ in range(steps):
        gradient = problem.gradient(x)
        noise_std = problem.noise_std(x) / math.sqrt(batch_size)
        values.append(problem.value(x))
        phis.append(stationarity_measure(gradient, dithered_std(noise_std, dither_std)))
        l1s.append(gradient.abs().sum(-1))

        noisy = problem.sample_gradient(x, batch_size, generator)
        if dither_std > 0:
            noisy = noisy + dither_std * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = x - lr * noisy.sign()
    return Trajectory(torch.stack(values), torch.stack(phis), torch.stack(l1s))

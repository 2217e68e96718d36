r"""Theorem 1 and what it rests on: how often a sign is wrong, and how small the gradient becomes.

With :math:`g` the gradient, :math:`s` the standard deviation of its estimate, both per coordinate, :math:`S = |g| / s`
and :math:`p` the chance that the estimate's sign is not that of :math:`g`:

.. math::
    p \le \begin{cases} 2 / (9 S^2) & S > 2 / \sqrt 3 \\ 1/2 - S / (2 \sqrt 3) & \text{otherwise} \end{cases}
    \qquad\text{so}\qquad 1 - 2 p \ge \tfrac{1}{\sqrt 3} \min(1, S)

for noise that is symmetric and unimodal (Gauss 1823; Pukelsheim 1994; Bernstein et al. 2018, 2019). Each function's
derivation is in docs/theory.md, and `signstep verify` checks it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "CRITICAL_SNR",
    "PAPER_CONSTANT",
    "PAPER_SPLIT",
    "SHARP_CONSTANT",
    "dithered_std",
    "l1_bound",
    "l1_bound_with_floor",
    "optimal_lr",
    "phi",
    "sign_failure_bound",
    "skew_threshold",
    "stationarity_bound",
]

CRITICAL_SNR = 2 / math.sqrt(3)
"""The S where the two branches of Gauss's inequality meet, with the same slope."""
PAPER_SPLIT = math.sqrt(2 / 3)
"""The split point of the paper's eq. (6)."""
PAPER_CONSTANT = 3.0
"""1 / c of 1 - 2 p >= c min(1, S), as in eq. (7)."""
SHARP_CONSTANT = math.sqrt(3.0)
"""The smallest 1 / c that holds for every symmetric unimodal law: the uniform law attains it for all S <= 1."""


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: expected a finite number above 0")


def _at_least_0(**values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: expected a finite number of at least 0")


def sign_failure_bound(snr: Tensor, *, split: float = CRITICAL_SNR) -> Tensor:
    r"""The largest chance of a wrong sign, eq. (6), for symmetric unimodal noise.

    Args:
        snr: S = :math:`|g| / s` >= 0, any shape, a float dtype; infinity where there is no noise.
        split: above it the bound is :math:`2 / (9 S^2)`, up to it :math:`1/2 - S / (2 \sqrt 3)`. The default gives the
            sharp bound and is the largest split allowed: beyond it the second branch is false. `PAPER_SPLIT` gives the
            paper's bound, which is true too, and jumps up from 0.264 to 0.333.

    Returns:
        A tensor of snr's shape and dtype.

    Raises:
        ValueError: a negative snr, or a split outside (0, 2 / sqrt 3].

    Example:
        >>> sign_failure_bound(torch.tensor([0.0, 0.5, 2.0]))
        tensor([0.5000, 0.3557, 0.0556])
    """
    if not 0 < split <= CRITICAL_SNR:
        raise ValueError(f"split={split}: expected a number above 0 and at most 2 / sqrt 3 = {CRITICAL_SNR:.4f}")
    if bool((snr < 0).any()):
        raise ValueError(f"snr={float(snr.min()):g}: expected |g| / s, at least 0")
    return torch.where(snr > split, 2 / (9 * snr.square()), 0.5 - snr / (2 * math.sqrt(3)))


def phi(gradient: Tensor, noise_std: Tensor) -> Tensor:
    r"""The stationarity measure of eq. (1): :math:`\Phi = \sum_i |g_i| \min(1, |g_i| / s_i)`.

    Args:
        gradient: g, shape [..., d].
        noise_std: s >= 0, the standard deviation of the mini-batch's mean, in the units of g; broadcasts against it.
            Where it is 0 the coordinate counts as :math:`|g_i|`.

    Returns:
        A tensor of shape [...], in the units of g.

    Raises:
        ValueError: a negative standard deviation.

    Example:
        >>> phi(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([1.0, 2.0, 0.0]))
        tensor(5.5000)
    """
    if bool((noise_std < 0).any()):
        raise ValueError(f"noise_std={float(noise_std.min()):g}: expected a standard deviation, at least 0")
    size = gradient.abs()
    return (size * torch.where(noise_std > 0, size / noise_std, 1.0).clamp(max=1)).sum(-1)


def stationarity_bound(
    gap: float, smoothness: float, steps: int, *, lr: float | None = None, constant: float = SHARP_CONSTANT
) -> float:
    r"""Theorem 1, eq. (2): an upper bound on :math:`E\,\frac 1 K \sum_k \Phi_k` after K steps of size lr.

    .. math::
        \frac 1 c \left( \frac{f_0 - f^\star}{\delta K} + \frac{\delta \tilde L_1}{2} \right)

    Args:
        gap: :math:`f_0 - f^\star` >= 0.
        smoothness: :math:`\tilde L_1 = \sum_i L_i` > 0 of Bernstein et al.'s Assumption 2,
            :math:`f(y) \le f(x) + \langle g, y - x \rangle + \frac 1 2 \sum_i L_i (y_i - x_i)^2`.
        steps: K >= 1.
        lr: :math:`\delta` > 0. None is the paper's :math:`1 / \sqrt{\tilde L_1 K}`, for which the 1/2 of eq. (2) must
            have the units of f; `optimal_lr` does not depend on units.
        constant: 1 / c; `PAPER_CONSTANT` for the paper's bound.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> round(stationarity_bound(50.0, 100.0, 32_000, constant=PAPER_CONSTANT), 3)
        8.469
        >>> round(stationarity_bound(50.0, 100.0, 32_000, lr=optimal_lr(50.0, 100.0, 32_000)), 3)
        0.968
    """
    _at_least_0(gap=gap)
    _positive(smoothness=smoothness, constant=constant)
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    if lr is None:
        lr = 1 / math.sqrt(smoothness * steps)
    _positive(lr=lr)
    return constant * (gap / (lr * steps) + lr * smoothness / 2)


def optimal_lr(gap: float, smoothness: float, steps: int) -> float:
    r"""The learning rate that makes `stationarity_bound` smallest: :math:`\sqrt{2 (f_0 - f^\star) / (\tilde L_1 K)}`.

    The bound is then :math:`\frac 1 c \sqrt{2 \tilde L_1 (f_0 - f^\star) / K}`.

    Raises:
        ValueError: a number that is not above 0.

    >>> optimal_lr(50.0, 100.0, 10_000)
    0.01
    """
    _positive(gap=gap, smoothness=smoothness, steps=steps)
    return math.sqrt(2 * gap / (smoothness * steps))


def l1_bound(phi_bound: float, noise: float) -> float:
    r"""A bound on the averaged :math:`\|g\|_1` without a floor: :math:`B + \sqrt{B \tilde\sigma_1 / \sqrt n}`.

    It falls to 0 with B, where eq. (3) stops at the noise.

    Args:
        phi_bound: B >= 0, a bound on the averaged Phi such as `stationarity_bound`.
        noise: :math:`\tilde\sigma_1 / \sqrt n = \sum_i s_i` >= 0, with :math:`s_i` a bound over all steps.

    Raises:
        ValueError: a number below 0.

    >>> l1_bound(4.0, 100.0), l1_bound_with_floor(4.0, 100.0)
    (24.0, 104.0)
    """
    _at_least_0(phi_bound=phi_bound, noise=noise)
    return phi_bound + math.sqrt(phi_bound * noise)


def l1_bound_with_floor(phi_bound: float, noise: float, *, floor: float = 1.0) -> float:
    r"""Eq. (3): :math:`B + \tilde\sigma_1 / \sqrt n`.

    Args:
        phi_bound: B >= 0.
        noise: :math:`\tilde\sigma_1 / \sqrt n` >= 0.
        floor: the factor of the noise. The paper has 1; 1/4 is the smallest for which :math:`|a| \le \min(|a|, a^2 / s)
            + \mathrm{floor}\, s` holds for every a.

    Raises:
        ValueError: a number below 0, or a floor below 1/4.

    >>> l1_bound_with_floor(4.0, 100.0, floor=0.25)
    29.0
    """
    _at_least_0(phi_bound=phi_bound, noise=noise)
    if not floor >= 0.25:
        raise ValueError(f"floor={floor}: expected at least 0.25, below which the inequality is false")
    return phi_bound + floor * noise


def dithered_std(noise_std: Tensor, sigma: Tensor | float) -> Tensor:
    r"""Standard deviation of the gradient's noise and Gaussian dither together: :math:`\sqrt{s^2 + \sigma^2}`.

    The sum is symmetric and unimodal if the noise is, so every bound holds with this value for s.

    Args:
        noise_std: s, any shape.
        sigma: standard deviation of the dither, in the units of s; broadcasts against it.

    >>> dithered_std(torch.tensor([0.0, 3.0]), 4.0)
    tensor([4., 5.])
    """
    return torch.hypot(noise_std, torch.as_tensor(sigma, dtype=noise_std.dtype, device=noise_std.device))


def skew_threshold(skewness: float, n: int) -> float:
    r"""The S below which skewed noise makes a sign wrong more often than right: :math:`|\gamma| / (6 \sqrt n)`.

    The median of a mean of n draws is off its mean by :math:`-\gamma s / (6 \sqrt n)`, to first order in
    :math:`1 / \sqrt n` with s the standard deviation of that mean, so the coordinates at risk are those whose g has
    the sign of :math:`\gamma`.

    Args:
        skewness: gamma of a single draw, :math:`E (X - E X)^3 / s_1^3`.
        n: draws per mean, at least 1.

    Raises:
        ValueError: n below 1.

    >>> round(skew_threshold(2.0, 128), 4)
    0.0295
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1")
    return abs(skewness) / (6 * math.sqrt(n))

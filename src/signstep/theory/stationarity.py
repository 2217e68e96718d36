r"""How far the sign of a stochastic gradient can be trusted, estimated from micro-batch gradients, with intervals.

Rows h_1 ... h_N are gradients of N independent micro-batches: g is their expectation, s_i the standard deviation of
coordinate i in one of them, S_i = |g_i| / s_i, and p_i the chance that sign(h_i) is not sign(g_i).

An entry that is exactly 0 has sign 0, neither right nor wrong. So 1 - 2p stands for E sign(h_i) sign(g_i) here. The
theorem's p counts zeros as wrong, and with it 1 - 2p would be smaller by the chance of a 0.

g is unknown, so two different micro-batches are compared with each other. The mean of a symmetric kernel k(h_j, h_l)
over all pairs j != l is a U-statistic. It is unbiased whatever the law of the rows and however the coordinates depend
on each other, also where g = 0:

.. math::
    \sum_i |g_i| (1 - 2 p_i) &= \mathbb E\, \langle \mathrm{sign}\, h_j, h_l \rangle \\
    \frac1d \sum_i (1 - 2 p_i)^2 &= \mathbb E\, \langle \mathrm{sign}\, h_j, \mathrm{sign}\, h_l \rangle / d \\
    \sum_i g_i^2 &= \mathbb E\, \langle h_j, h_l \rangle

To compare each micro-batch with a mean that contains it, as is often done, would report 0.33 for 1 - 2p at g = 0 and
N = 4. The variance of a U-statistic is Hoeffding's (1948), with zeta_1 = Cov(k_12, k_13) and zeta_2 = Var k_12,

.. math::
    \mathrm{Var}\, U = \frac{4 (N - 2)}{N (N - 1)} \zeta_1 + \frac{2}{N (N - 1)} \zeta_2

both estimated without bias from the N x N matrix of k. The rows are the only source of randomness, so the interval of a
sum over coordinates that all move together is as wide as it must be. Intervals are those of Student's t, with N - 1
degrees of freedom where zeta_1 dominates, and one per pair where zeta_2 does, as at g = 0.

All functions take rows of shape [..., N, d], any float dtype, N >= 4, compute in float64 on the rows' device and return
an `Estimate` of tensors of shape [...]. The units are those of the gradient. Where the columns are a
sample of the coordinates, `weights` of shape [d] say how many coordinates each stands for; sums and means are then over
all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from signstep.theory.bounds import PAPER_CONSTANT

__all__ = ["MIN_ROWS", "Estimate", "Pairs", "alignment", "margin", "phi", "reliability", "snr", "snr_squared"]

MIN_ROWS = 4
"""Micro-batches that an interval needs."""
_Z = 1.959963984540054  # of a normal law, 97.5 %


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95 % interval."""

    value: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Pairs:
    """Sums over coordinates for each two rows; those of disjoint blocks of coordinates add up.

    `of` computes them from rows. Each is [..., N, N], except Phi's value and the number of coordinates.

    Example:
        >>> rows = torch.arange(24.0).reshape(6, 4)
        >>> both = Pairs.of(rows[:, :1]) + Pairs.of(rows[:, 1:])
        >>> bool(both.alignment().value == alignment(rows).value)
        True
    """

    coordinates: float
    aligned: Tensor
    agreed: Tensor
    products: Tensor
    phi_value: Tensor
    phi_kernel: Tensor

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor | None = None) -> Pairs:
        """The sums for rows of shape [..., N, d], N at least 4.

        Raises:
            ValueError: there are fewer rows, or no coordinates.
        """
        rows = _checked(rows)
        ones = weights is None
        w = torch.ones(rows.shape[-1], dtype=rows.dtype, device=rows.device) if weights is None else weights.to(rows)
        signs = torch.sign(rows)
        weighted = rows if ones else rows * w
        one_way = signs @ weighted.transpose(-1, -2)
        value, kernel = _phi_parts(weighted)
        return cls(
            float(w.sum()),
            (one_way + one_way.transpose(-1, -2)) / 2,
            (signs if ones else signs * w) @ signs.transpose(-1, -2),
            weighted @ rows.transpose(-1, -2),
            value,
            kernel,
        )

    def __add__(self, other: Pairs) -> Pairs:
        mine, its = vars(self).values(), vars(other).values()
        return Pairs(*(a + b for a, b in zip(mine, its, strict=True)))

    def alignment(self) -> Estimate:
        """See the function `alignment`."""
        return _estimate(_mean_of_pairs(self.aligned), self.aligned)

    def phi(self) -> Estimate:
        """See the function `phi`."""
        return _estimate(self.phi_value, self.phi_kernel)

    def margin(self, constant: float = PAPER_CONSTANT) -> Estimate:
        """See the function `margin`."""
        value = _mean_of_pairs(self.aligned) - self.phi_value / constant
        return _estimate(value, self.aligned - self.phi_kernel / constant)

    def reliability(self) -> Estimate:
        """See the function `reliability`."""
        kernel = self.agreed / self.coordinates
        return _root(_estimate(_mean_of_pairs(kernel), kernel))

    def snr(self) -> Estimate:
        """See the function `snr`."""
        squares = torch.diagonal(self.products, dim1=-2, dim2=-1)
        # For two rows, half their squared distance estimates the variance.
        noise = (squares[..., :, None] + squares[..., None, :]) / 2 - self.products
        total = _mean_of_pairs(noise)
        ratio = _mean_of_pairs(self.products) / total
        kernel = (self.products - ratio[..., None, None] * noise) / total[..., None, None]
        return _root(_estimate(ratio, kernel))


def alignment(rows: Tensor, *, weights: Tensor | None = None) -> Estimate:
    r"""The left side of eq. (7), :math:`\langle g, \mathbb E\,\mathrm{sign}\,h \rangle = \sum_i |g_i| (1 - 2 p_i)`.

    Its product with the learning rate is the first-order decrease of the loss by a sign step of one micro-batch.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> found = alignment(1.0 + torch.randn(16, 1000))  # S = 1: 1000 erf(1 / sqrt 2) = 683
        >>> bool(found.low < 683 < found.high)
        True
    """
    return Pairs.of(rows, weights).alignment()


def phi(rows: Tensor, *, weights: Tensor | None = None) -> Estimate:
    r"""Eq. (1), :math:`\Phi = \sum_i \min(|g_i|, g_i^2 / s_i)`.

    With the coordinate's mean m and variance v over the rows, the estimate is :math:`a m^2/\sqrt v - b \sqrt v / N`
    where the estimated S is below 1, with the a and b that make it unbiased for :math:`g^2/s` under normal noise, and
    :math:`|m|` elsewhere. The choice between the two makes the estimate too small where S is near 1: at S = 1 by 0.20 s
    for N = 8, 0.13 s for N = 16 and 0.06 s for N = 64. Under heavy tails v is mostly too small and the estimate too
    large (Student's t with 3 degrees of freedom: at S = 0.6 by 0.04 s for N = 8 to 64).
    """
    return Pairs.of(rows, weights).phi()


def margin(rows: Tensor, *, constant: float = PAPER_CONSTANT, weights: Tensor | None = None) -> Estimate:
    r"""Eq. (7)'s left side less its right side, :math:`\sum_i |g_i| (1 - 2 p_i) - \Phi / c`.

    With the paper's c = 3 or the sharp :math:`\sqrt 3`, it is >= 0 under unimodal symmetric noise. An interval below 0
    refutes that assumption of the theorem for these rows.
    """
    return Pairs.of(rows, weights).margin(constant)


def reliability(rows: Tensor, *, weights: Tensor | None = None) -> Estimate:
    r"""Root mean square of 1 - 2p, :math:`\sqrt{\frac1d \sum_i (1 - 2 p_i)^2}`, in [-1, 1].

    0 is a coin, and 1 a sign that is always right, or always wrong: under skewed noise signs agree with each other and
    not with the gradient, see `alignment`. The root keeps the sign of the estimated mean square, which is as often
    negative as positive where the signs are coins. An entry that is exactly 0 has sign 0.
    """
    return Pairs.of(rows, weights).reliability()


def snr(rows: Tensor, *, weights: Tensor | None = None) -> Estimate:
    r"""S over all coordinates, :math:`\sqrt{\sum_i g_i^2 / \sum_i s_i^2}`, with the sign of its estimated square.

    Its inverse square is the simple noise scale of McCandlish et al. (2018, arXiv:1812.06162) in micro-batches.
    """
    return Pairs.of(rows, weights).snr()


def snr_squared(rows: Tensor) -> Tensor:
    r"""S_i^2 of each coordinate, shape [..., d], unbiased under normal noise: :math:`\frac{N-3}{N-1} m^2/v - 1/N`.

    As often negative as positive where g is 0; infinite or NaN where all rows agree.
    """
    rows = _checked(rows)
    n = rows.shape[-2]
    return (n - 3) / (n - 1) * rows.mean(-2).square() / rows.var(-2) - 1 / n


def _checked(rows: Tensor) -> Tensor:
    if rows.dim() < 2 or rows.shape[-2] < MIN_ROWS or rows.shape[-1] < 1:
        raise ValueError(
            f"rows of shape {tuple(rows.shape)}: expected [..., N, d] with at least {MIN_ROWS} micro-batches and one "
            "coordinate"
        )
    return rows.double()


def _phi_parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Phi, and the kernel that it is linear in up to smaller terms (the delta method)."""
    n = rows.shape[-2]
    a, b = _corrections(n)
    mean, var = rows.mean(-2), rows.var(-2)
    std = var.sqrt()
    weak = mean.abs() * a < std
    weight = torch.where(weak, a / std.clamp(min=torch.finfo(std.dtype).tiny), 0.0)
    square = weight * mean.square() - torch.where(weak, b * std / n, 0.0)
    sign = torch.where(weak, 0.0, torch.sign(mean))
    value = (square + sign * mean).sum(-1)
    scaled = rows * weight.sqrt()[..., None, :]
    # The influence of each row through |m|, and through the v by which g^2 is divided.
    spread = (rows - mean[..., None, :]).square() / torch.where(weak, var, 1.0)[..., None, :]
    linear = (sign[..., None, :] * rows - torch.where(weak, square, 0.0)[..., None, :] * (spread - 1) / 2).sum(-1)
    linear = linear - linear.mean(-1, keepdim=True)
    kernel = scaled @ scaled.transpose(-1, -2) + (linear[..., :, None] + linear[..., None, :]) / 2
    return value, kernel


def _corrections(n: int) -> tuple[float, float]:
    """A and b with E[a m^2 / sqrt v - b sqrt v / n] = g^2 / s for n normal rows: 1 / (s E v^-1/2), s / E v^1/2."""
    nu = n - 1
    half = math.sqrt(nu / 2)
    a = math.exp(math.lgamma(nu / 2) - math.lgamma((nu - 1) / 2)) / half
    b = half * math.exp(math.lgamma(nu / 2) - math.lgamma((nu + 1) / 2))
    return a, b


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    n = kernel.shape[-1]
    return (kernel.sum((-2, -1)) - torch.diagonal(kernel, dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


def _estimate(value: Tensor, kernel: Tensor) -> Estimate:
    """The value with an interval from the U-statistic's variance."""
    n = kernel.shape[-1]
    pairs = kernel - torch.diag_embed(torch.diagonal(kernel, dim1=-2, dim2=-1))
    total, by_row = pairs.sum((-2, -1)), pairs.sum(-1)
    rows, squares = by_row.square().sum(-1), pairs.square().sum((-2, -1))
    # Mean products of two pairs that are the same, share one row, or share none: zeta_2, zeta_1 and 0, plus E[k]^2.
    same = squares / (n * (n - 1))
    one = (rows - squares) / (n * (n - 1) * (n - 2))
    none = (total.square() - 4 * rows + 2 * squares) / (n * (n - 1) * (n - 2) * (n - 3))
    zeta_1, zeta_2 = (one - none).clamp(min=0), (same - none).clamp(min=0)
    zeta_2 = torch.maximum(zeta_2, 2 * zeta_1)
    linear, paired = 4 * (n - 2) / (n * (n - 1)) * zeta_1, 2 / (n * (n - 1)) * zeta_2
    var = linear + paired
    # The share of the variance that comes from the rows: zeta_2 contains 2 zeta_1.
    share = torch.where(var > 0, (linear + 4 / (n * (n - 1)) * zeta_1) / var, 1.0)
    freedom = 1 / (share / (n - 1) + (1 - share) / (n * (n - 1) / 2 - 1))
    half = _student(freedom) * var.sqrt()
    return Estimate(value, value - half, value + half)


def _student(freedom: Tensor) -> Tensor:
    """97.5 % quantile of Student's t: Abramowitz and Stegun 26.7.5, within 1 % from 3 degrees of freedom."""
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return torch.stack([term / freedom ** (k + 1) for k, term in enumerate(terms)]).sum(0) + z


def _root(squared: Estimate) -> Estimate:
    return Estimate(*(torch.sign(x) * x.abs().sqrt() for x in (squared.value, squared.low, squared.high)))

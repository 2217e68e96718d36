r"""Laws of noise with mean 0 and variance 1, and the exact probability that each turns a sign.

Theorem 1 holds for symmetric unimodal noise. `LAWS` has eight such laws and two that break an assumption each;
`gauss_extremal` attains Gauss's inequality; `skewed` is the mean of n draws of an exponential law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["LAWS", "Law", "gauss_extremal", "skewed"]

_SCALE_5 = 3.4  # variance of 0.9 N(0, 1) + 0.1 N(0, 25)
_BIMODAL = 0.95
_NODES, _REACH = 4001, 6.5  # of the trapezoid rule over the dither


@dataclass(frozen=True)
class Law:
    """A law with mean 0 and variance 1.

    Args:
        name: as in `LAWS`.
        symmetric: whether it is symmetric about 0.
        unimodal: whether its only mode is 0; False where that is not known.
        skewness: E X^3; 0 for a symmetric law, also where the third moment does not exist.
        sample: takes (shape, generator) to independent float64 draws, on the device of the generator.
        cdf: P(X <= x) for each x of a float64 tensor; continuous except for an atom at 0.

    Example:
        >>> LAWS["uniform"].failure(torch.tensor([0.5, 3.0])).round(decimals=4)
        tensor([0.3557, 0.0000], dtype=torch.float64)
    """

    name: str
    symmetric: bool
    unimodal: bool
    skewness: float
    sample: Callable[[Sequence[int], Generator], Tensor]
    cdf: Callable[[Tensor], Tensor]

    def failure(self, snr: Tensor) -> Tensor:
        r"""P(sign(g + s X) is not sign g); a zero counts as a failure.

        Args:
            snr: g / s, any shape and float dtype. Its sign is that of g, which matters for a skewed law only. At 0 the
                result is the limit from above, P(X <= 0).

        Returns:
            A float64 tensor of that shape.
        """
        snr = snr.to(torch.float64)
        if self.symmetric:
            return self.cdf(-snr.abs())
        return torch.where(snr < 0, 1 - self.cdf(-snr), self.cdf(-snr))

    def dithered(self, ratio: float) -> Law:
        r"""The law of :math:`(X + r Z) / \sqrt{1 + r^2}` with Z a standard Gaussian and r = sigma / s.

        Its cdf is an integral, computed to 1e-5 for ratios up to 20, or to 0.001 times the weight of an atom at 0.

        Args:
            ratio: r > 0.

        Raises:
            ValueError: a ratio that is not a finite number above 0.

        Example:
            >>> float(LAWS["skewed"].dithered(1.0).failure(torch.tensor(0.2 / 2**0.5))) < 0.5
            True
        """
        if not (ratio > 0 and math.isfinite(ratio)):
            raise ValueError(f"ratio={ratio}: expected a finite number above 0")
        norm = math.hypot(1, ratio)

        def sample(shape: Sequence[int], generator: Generator) -> Tensor:
            return (self.sample(shape, generator) + ratio * _gaussian(shape, generator)) / norm

        def cdf(x: Tensor) -> Tensor:
            # P(X + r Z <= y) = E F(y - r Z)
            z = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64, device=x.device)
            weight = torch.exp(-z.square() / 2)
            return (self.cdf(norm * x.unsqueeze(-1) - ratio * z) * (weight / weight.sum())).sum(-1).clamp(max=1)

        skewness = self.skewness / norm**3
        return Law(f"{self.name}, dithered at {ratio:g}", self.symmetric, self.unimodal, skewness, sample, cdf)


def _gaussian(shape: Sequence[int], generator: Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)


def _uniform(shape: Sequence[int], generator: Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)


def _exponential(shape: Sequence[int], generator: Generator) -> Tensor:
    empty = torch.empty(tuple(shape), dtype=torch.float64, device=generator.device)
    return empty.exponential_(generator=generator)


def _coin(shape: Sequence[int], generator: Generator, chance: float, first: float, second: float) -> Tensor:
    uniform = _uniform(shape, generator)
    return torch.full_like(uniform, second).masked_fill_(uniform < chance, first)


def _gaussian_cdf(x: Tensor) -> Tensor:
    chance: Tensor = torch.special.ndtr(x)
    return chance


def _laplace_cdf(x: Tensor) -> Tensor:
    tail = torch.exp(-math.sqrt(2) * x.abs()) / 2
    return torch.where(x < 0, tail, 1 - tail)


def _uniform_cdf(x: Tensor) -> Tensor:
    return (0.5 + x / math.sqrt(12)).clamp(0, 1)


def _triangular_cdf(x: Tensor) -> Tensor:
    tail = (1 - x.abs() / math.sqrt(6)).clamp(min=0).square() / 2
    return torch.where(x < 0, tail, 1 - tail)


def _student(degrees: int) -> Callable[[Sequence[int], Generator], Tensor]:
    def sample(shape: Sequence[int], generator: Generator) -> Tensor:
        squares = _gaussian((*shape, degrees), generator).square().sum(-1)
        return _gaussian(shape, generator) * ((degrees - 2) / squares).sqrt()

    return sample


def _student_3_cdf(x: Tensor) -> Tensor:
    # With t = sqrt(3) x the usual variable.
    return 0.5 + (x / (1 + x.square()) + torch.atan(x)) / math.pi


def _student_5_cdf(x: Tensor) -> Tensor:
    u = x / math.sqrt(3)  # t / sqrt(5)
    w = 1 / (1 + u.square())
    return 0.5 + (u * w * (1 + 2 * w / 3) + torch.atan(u)) / math.pi


def _logistic_sample(shape: Sequence[int], generator: Generator) -> Tensor:
    ratio = _exponential(shape, generator) / _exponential(shape, generator)
    return math.sqrt(3) / math.pi * ratio.log()


def _contaminated_sample(shape: Sequence[int], generator: Generator) -> Tensor:
    scale = _coin(shape, generator, 0.9, 1 / math.sqrt(_SCALE_5), 5 / math.sqrt(_SCALE_5))
    return _gaussian(shape, generator) * scale


def _contaminated_cdf(x: Tensor) -> Tensor:
    x = x * math.sqrt(_SCALE_5)
    return 0.9 * _gaussian_cdf(x) + 0.1 * _gaussian_cdf(x / 5)


def _bimodal_sample(shape: Sequence[int], generator: Generator) -> Tensor:
    width = math.sqrt(1 - _BIMODAL**2)
    return _coin(shape, generator, 0.5, _BIMODAL, -_BIMODAL) + width * _gaussian(shape, generator)


def _bimodal_cdf(x: Tensor) -> Tensor:
    width = math.sqrt(1 - _BIMODAL**2)
    return (_gaussian_cdf((x - _BIMODAL) / width) + _gaussian_cdf((x + _BIMODAL) / width)) / 2


def gauss_extremal(snr: float) -> Law:
    r"""The symmetric unimodal law that attains the bound of `sign_failure_bound` at one S above 2 / sqrt 3.

    Uniform on :math:`[-3S/2, 3S/2]` with weight :math:`4 / (3 S^2)`, else 0. At :math:`S = 2 / \sqrt 3` it is the
    uniform law, which attains the other branch, :math:`1/2 - S / (2 \sqrt 3)`, at every S up to :math:`\sqrt 3`.

    Args:
        snr: S, at least 2 / sqrt 3.

    Raises:
        ValueError: a smaller S, or infinity.

    Example:
        >>> float(gauss_extremal(2.0).failure(torch.tensor(2.0))), 2 / (9 * 2.0**2)
        (0.0555..., 0.0555...)
    """
    # Without the tolerance S = 2 / sqrt(3) itself would depend on how it was rounded.
    if not (snr >= 2 / math.sqrt(3) - 1e-12 and math.isfinite(snr)):
        raise ValueError(f"snr={snr}: expected a finite number of at least 2 / sqrt 3 = {2 / math.sqrt(3):.4f}")
    weight, reach = min(1.0, 4 / (3 * snr**2)), 1.5 * snr

    def sample(shape: Sequence[int], generator: Generator) -> Tensor:
        return _coin(shape, generator, weight, reach, 0.0) * (2 * _uniform(shape, generator) - 1)

    def cdf(x: Tensor) -> Tensor:
        tail = weight * (0.5 - x.abs() / (2 * reach)).clamp(min=0)
        return torch.where(x < 0, tail, 1 - tail)

    return Law(f"Gauss extremal at {snr:g}", True, True, 0.0, sample, cdf)


def skewed(n: int = 1) -> Law:
    r"""The mean of n draws of Exp(1) - 1, times :math:`\sqrt n`: skewness :math:`2 / \sqrt n`.

    Args:
        n: at least 1.

    Raises:
        ValueError: n below 1.

    Example:
        >>> float(skewed().failure(torch.tensor(0.2))) > 0.5  # the step goes up more often than down
        True
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1")

    def sample(shape: Sequence[int], generator: Generator) -> Tensor:
        return (_exponential((*shape, n), generator).sum(-1) - n) / math.sqrt(n)

    def cdf(x: Tensor) -> Tensor:
        chance: Tensor = torch.special.gammainc(torch.full_like(x, n), (n + math.sqrt(n) * x).clamp(min=0))
        return chance

    return Law("skewed" if n == 1 else f"skewed, mean of {n}", False, False, 2 / math.sqrt(n), sample, cdf)


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("gaussian", True, True, 0.0, _gaussian, _gaussian_cdf),
        Law(
            "laplace",
            True,
            True,
            0.0,
            lambda shape, g: (_exponential(shape, g) - _exponential(shape, g)) / math.sqrt(2),
            _laplace_cdf,
        ),
        Law("uniform", True, True, 0.0, lambda shape, g: math.sqrt(12) * (_uniform(shape, g) - 0.5), _uniform_cdf),
        Law(
            "triangular",
            True,
            True,
            0.0,
            lambda shape, g: math.sqrt(6) * (_uniform(shape, g) - _uniform(shape, g)),
            _triangular_cdf,
        ),
        Law("logistic", True, True, 0.0, _logistic_sample, lambda x: torch.sigmoid(math.pi / math.sqrt(3) * x)),
        Law("student-t3", True, True, 0.0, _student(3), _student_3_cdf),
        Law("student-t5", True, True, 0.0, _student(5), _student_5_cdf),
        Law("contaminated", True, True, 0.0, _contaminated_sample, _contaminated_cdf),
        Law("bimodal", True, False, 0.0, _bimodal_sample, _bimodal_cdf),
        skewed(),
    )
}
"""By name. "contaminated" is 0.9 of a Gaussian and 0.1 of one 5 times as wide; "bimodal" is +-0.95 plus a narrow
Gaussian; "skewed" is Exp(1) - 1, whose mode is at -1."""

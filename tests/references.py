"""The paper's algorithms in float64 numpy, line by line: slow, and the truth that the optimizers are tested against."""

from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

Array = npt.NDArray[np.float64]
MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform(seed: int, step: int, parameter: int, element: int) -> int:
    """U of design.md: 8 bits from stream 0, 24 from stream 1."""
    key = (seed & MASK, seed >> 32)
    words = philox((element // 16, step, parameter, 0), key)
    top = (words[element % 16 // 4] >> (8 * (element % 4))) & 0xFF
    low = philox((element // 4, step, parameter, 1), key)[element % 4] & 0xFFFFFF
    return top << 24 | low


@cache
def noise(seed: int, step: int, parameter: int, shape: tuple[int, ...]) -> Array:
    """U for every element, as floats in (0, 1): (U + 1/2) / 2^32."""
    draws = [uniform(seed, step, parameter, e) for e in range(int(np.prod(shape)))]
    return ((np.array(draws, dtype=np.float64) + 0.5) / 2**32).reshape(shape)


class SignSGDReference:
    """Algorithm 1, eq. (9) and (10)."""

    def __init__(
        self,
        params: list[Array],
        lr: float,
        momentum: float = 0.9,
        *,
        dither: float = 0.0,
        dither_decay: float = 0.55,
        dither_position: str = "pre",
        dither_scale: str = "absolute",
        dither_law: str = "gaussian",
        seed: int = 0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
    ) -> None:
        self.x = [p.astype(np.float64).copy() for p in params]
        self.m = [np.zeros_like(p) for p in self.x]  # line 2: m_0 <- 0
        self.lr, self.beta = lr, momentum
        self.alpha, self.gamma, self.position, self.scale = dither, dither_decay, dither_position, dither_scale
        self.law = dither_law
        self.seed, self.decay, self.decoupled, self.maximize = seed, weight_decay, decoupled_weight_decay, maximize
        self.k = 0

    def gradients(self, gradients: list[Array]) -> list[Array]:
        signed = [-g if self.maximize else g for g in gradients]
        if self.decay and not self.decoupled:
            signed = [g + self.decay * x for g, x in zip(signed, self.x, strict=True)]
        return signed

    def sigma(self, m: Array) -> float:
        """Of the noise that is added to m_{k+1}, with the rms of m_k."""
        sigma = float(np.sqrt(self.alpha * (1 + self.k) ** -self.gamma))  # eq. (9)
        return sigma * float(np.sqrt(np.mean(m**2))) if self.scale == "relative" else sigma

    def direction(self, i: int) -> Array:
        m = self.m[i]
        if self.alpha == 0:
            return np.sign(m)
        if self.position == "expected":
            return self.expected_sign(i)
        u = noise(self.seed, self.k, i, m.shape)
        # xi = -sigma Phi^-1(u), so that sign(m + xi) = +1 exactly when u < Phi(m / sigma). Uniform noise of that
        # variance is within sqrt(3) sigma.
        xi = -self.sigmas[i] * (np.sqrt(3) * (2 * u - 1) if self.law == "uniform" else ndtri(u))  # line 6
        # "pre" is line 7; "post" is eq. (10), with the noise's other sign, which has the same law.
        step = np.sign(m + xi) if self.position == "pre" else np.sign(m) - xi
        return np.where(m == 0, 0.0, step)

    def expected_sign(self, i: int) -> Array:
        """E sign(m + xi), Sec. IV."""
        if self.sigmas[i] == 0:
            return np.sign(self.m[i])
        z = self.m[i] / self.sigmas[i]
        return np.clip(z / np.sqrt(3), -1, 1) if self.law == "uniform" else 2 * ndtr(z) - 1

    def step(self, gradients: list[Array]) -> None:
        gradients = self.gradients(gradients)
        self.sigmas = [self.sigma(m) for m in self.m]
        for i, g in enumerate(gradients):
            if self.decay and self.decoupled:
                self.x[i] *= 1 - self.lr * self.decay
            self.m[i] = self.beta * self.m[i] + (1 - self.beta) * g  # line 5
            self.x[i] -= self.lr * self.direction(i)  # line 7
        self.k += 1


class LionReference(SignSGDReference):
    """Algorithm 2 of Chen et al. 2023, with the dither of `SignSGDReference`, whose `m` holds c for it."""

    def __init__(
        self, params: list[Array], lr: float, betas: tuple[float, float] = (0.9, 0.99), **options: object
    ) -> None:
        super().__init__(params, lr, betas[0], **options)  # type: ignore[arg-type]
        self.beta_2 = betas[1]
        self.kept = [np.zeros_like(p) for p in self.x]

    def step(self, gradients: list[Array]) -> None:
        raw, x = self.gradients(gradients), self.x
        self.sigmas = [self.sigma(c) for c in self.m]
        self.m = [self.beta * m + (1 - self.beta) * g for m, g in zip(self.kept, raw, strict=True)]
        shrunk = 1 - self.lr * self.decay if self.decoupled else 1.0
        self.x = [shrunk * x[i] - self.lr * self.direction(i) for i in range(len(x))]
        self.kept = [self.beta_2 * m + (1 - self.beta_2) * g for m, g in zip(self.kept, raw, strict=True)]
        self.k += 1


class Rate:
    """lambda-bar of some tensors by one rule: eq. (11) and (12), and the rules of `signstep.optim.calibration`."""

    def __init__(self, rule: str, eta: float) -> None:
        self.rule, self.eta = rule, eta
        self.now = self.ratio = 0.0  # line 2
        self.ratios: list[float] = []
        self.lrs: list[float] = []
        self.inner: list[float] = []
        self.square: list[float] = []

    def mean(self, values: list[float]) -> float:
        """E_eta, corrected for its start at 0."""
        return float(np.average(values, weights=self.eta ** np.arange(len(values))[::-1]))

    def add(self, s: list[Array], g: list[Array], m: list[Array], lr: float) -> float:
        """Take in a step; what it alone would make of the rate over lr."""
        inner = sum(float(np.sum(x * y)) for x, y in zip(s, g, strict=True))
        square = sum(float(np.sum(y**2)) for y in g)
        d = sum(y.size for y in g)
        self.lrs.append(lr)
        if self.rule == "norm":
            square = sum(float(np.sum(x**2)) for x in m)
            self.square.append(square / d)
            self.ratio = self.mean(self.square) ** -0.5
            alone = (square / d) ** -0.5
        elif self.rule in ("paper", "swats"):
            alone = abs(inner) / (square + 1e-8) if self.rule == "paper" else d / inner  # line 7, eq. (12)
            self.ratios.append(lr * alone)
            # The paper has one lr; of several, the mean by the weights that the rates have in lambda-bar.
            self.now = max(0.0, self.mean(self.ratios))
            if self.rule == "paper":
                self.now *= 1 - self.eta ** len(self.lrs)  # line 8, whose average starts at 0
            self.ratio = self.now / self.mean(self.lrs)
            return alone
        else:
            self.inner.append(inner)
            self.square.append(square)
            alone = inner / (square + 1e-8)
            self.ratio = max(0.0, self.mean(self.inner) / (self.mean(self.square) + 1e-8))
        self.now = lr * self.ratio
        return alone


class HybridSignSGDReference(SignSGDReference):
    """Algorithm 2, eq. (11) and (12), and what the documentation of `HybridSignSGD` adds."""

    def __init__(
        self,
        params: list[Array],
        lr: float,
        momentum: float = 0.9,
        *,
        switch_step: int | str,
        switch_tolerance: float = 0.1,
        switch_patience: int = 50,
        ema_decay: float = 0.99,
        calibration: str = "paper",
        calibration_scope: str | None = None,
        sgd_momentum: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__(params, lr, momentum, **options)  # type: ignore[arg-type]
        self.switch_step, self.eta, self.rule, self.mu = switch_step, ema_decay, calibration, sgd_momentum
        self.tolerance, self.patience, self.steady = switch_tolerance, switch_patience, 0
        everything = list(range(len(self.x)))
        alone = (calibration_scope or ("tensor" if calibration == "norm" else "group")) == "tensor"
        self.members = [[i] for i in everything] if alone else [everything]
        self.rates = [Rate(calibration, ema_decay) for _ in self.members]
        self.per_tensor = alone
        self.switched = False

    @property
    def lambda_bar(self) -> float | list[float]:
        rates = [rate.now for rate in self.rates]
        return rates if self.per_tensor else rates[0]

    def step(self, gradients: list[Array]) -> None:
        if self.switched:
            self.sgd_step(gradients)
            self.k += 1
            return
        raw = self.gradients(gradients)
        super().step(gradients)  # lines 6 and 9
        signs = [np.sign(m) for m in self.m]
        if self.rule == "applied" and self.alpha > 0 and self.position in ("pre", "expected"):
            signs = [self.expected_sign(i) for i in range(len(self.m))]
        off = 0.0
        for rate, members in zip(self.rates, self.members, strict=True):
            alone = rate.add(*([xs[i] for i in members] for xs in (signs, raw, self.m)), self.lr)
            off += sum(self.x[i].size for i in members) * abs(alone / rate.ratio - 1) if rate.ratio > 0 else np.inf
        if self.switch_step == "auto":
            size = sum(x.size for x in self.x)
            self.steady = self.steady + 1 if off <= self.tolerance * size else 0
            self.switched = self.k >= round(1 / (1 - self.eta)) and self.steady >= self.patience
        else:
            self.switched = self.k >= int(self.switch_step)

    def sgd_step(self, gradients: list[Array]) -> None:
        gradients = self.gradients(gradients)
        for rate, members in zip(self.rates, self.members, strict=True):
            for i in members:
                if self.decay and self.decoupled:
                    self.x[i] *= 1 - self.lr * self.decay
                self.m[i] = self.mu * self.m[i] + (1 - self.mu) * gradients[i]
                self.x[i] -= rate.ratio * self.lr * self.m[i]  # line 11

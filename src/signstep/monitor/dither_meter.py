r"""Whether the dither is as large as the momentum, which Sec. IV needs, measured after a step.

The dithered sign of a coordinate is right with probability :math:`\Phi(|m| / \sigma_k)`, and the step it takes on
average is

.. math::
    \delta\,(2\Phi(m / \sigma_k) - 1) \approx \delta \sqrt{2 / \pi}\; m / \sigma_k
    \qquad (|m| < \sigma_k / 2:\ \text{4.2 % too large at most})

Where the approximation holds, the mean step is that of SGD with momentum (as an average of gradients) and learning rate
:math:`\delta \sqrt{2/\pi} / \sigma_k`. Where :math:`\sigma_k \gg |m|`, each step is nearly a fair coin's, and k steps
are a random walk of :math:`\delta \sqrt k` per weight. Under a `MajorityVote` of M workers
:math:`\sqrt{2/\pi}` becomes the slope of the expected vote, and the linear range shrinks as the slope grows.

:math:`\sigma_k` is that of the step just taken: :math:`\sqrt{\alpha (1+k)^{-\gamma}}`, times the rms of the momentum
before the step if dither is relative. The momentum is the one after the step, whose sign was taken. If it is kept in 8
or 16 bits, it has a rounding error of mean 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from signstep.distributed.worker import Worker
from signstep.kernels.momentum import read_momentum
from signstep.monitor.last_step import (
    BeforeStep,
    MovedParam,
    entered_gradient,
    interpolates,
    keeps_average,
    moved_params,
    phase,
    sign_momentum,
    takes_votes,
)
from signstep.monitor.totals import chunks, finite, flat, inner_product, span, to_floats
from signstep.optim.signsgd import SignSGD
from signstep.theory.vote import accuracy, linear_slope

__all__ = ["DitherMeter"]

RANDOM = 10.0
"""From this sigma / rms(m) on, a step is called random: the sign at rms(m) is right with probability 0.54."""
RELATIVE = "set dither_scale='relative', dither=1.0, dither_decay=0.0"


class DitherMeter:
    """Compares dither with momentum, layer by layer, and says what dither would match, for any optimizer.

    Call `before_step` right before ``optimizer.step()`` and `after_step` right after it, with the gradients still
    there, on the steps that are to be measured. Both may wait for the device; no state of the training changes.

    Args:
        names: the parameters' names; a parameter without one is called by its number in the optimizer.
        worker: `MajorityVote.worker`, which has the momentum when the optimizer takes votes. Relative dither is then
            compared by the rms of this step's momentum, because the vote has replaced that of the last step.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = SignSGD(model.parameters(), lr=1e-3, dither=0.1)
        >>> meter = DitherMeter({p: name for name, p in model.named_parameters()})
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> meter.before_step(optimizer)
        >>> optimizer.step()
        >>> record = meter.after_step(optimizer)
        >>> round(record["layers"]["weight"]["sigma"], 3), round(record["layers"]["weight"]["rms"], 3)
        (0.316, 0.2)
    """

    def __init__(self, names: Mapping[Any, str], *, worker: Worker | None = None) -> None:
        self.names, self.worker = names, worker
        self._before: BeforeStep | None = None

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep what the step is going to overwrite."""
        self._before = BeforeStep.of(
            optimizer, lambda group: not keeps_average(optimizer, group) or interpolates(optimizer, group)
        )

    def after_step(self, optimizer: Optimizer) -> dict[str, Any]:
        """Measure the step.

        Returns:
            Numbers, None where there is none:

            - layers: for each parameter that has moved: rms (of m), sigma (0: not dithered), ratio = rms / sigma,
              linear_share (of coordinates with \\|m\\| < sigma / 2, of uniform noise sqrt(3) sigma), equivalent_lr,
              random_walk (delta sqrt(k), k with this step), weight_rms, and matching_alpha, the ``dither`` that would
              have made the ratio 1 at this step with the group's ``dither_scale`` and ``dither_decay`` (decay 0 for
              other optimizers).
            - the same over all coordinates: root mean squares, means, and the ratio of the first two.
            - dithered: how many layers are. advice: what follows, in words.

            Noise after the sign (``dither_position="post"``) is in units of the step, so it has no ratio. The expected
            step has no noise, so it has no random_walk.

        Raises:
            RuntimeError: there was no `before_step`.
        """
        before, self._before = self._before, None
        if before is None:
            raise RuntimeError("DitherMeter.after_step without before_step, which keeps what the step overwrites")
        if takes_votes(optimizer) and self.worker is None:
            return _record([], {}, _VOTED)
        order = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        layers, values = [], []
        for moved in moved_params(optimizer, before):
            p, index, group = moved
            m = self._momentum(optimizer, moved, before)
            if m is None:
                continue
            sigma = torch.zeros((), dtype=torch.float32, device=m.device)
            name = self.names.get(p, f"parameter {order[p]}")
            layer = _Layer(name, m.numel(), group, rates[index], before.steps[index])
            if isinstance(optimizer, SignSGD) and before.phases[index] == "sign" and group["dither"] > 0:
                sigma = self._sigma(moved, before)
                layer.position, layer.law = group["dither_position"], group["dither_law"]
                if optimizer.takes_votes and self.worker is not None:
                    layer.workers = self.worker.world_size
            layer.phase = before.phases[index]
            edge = sigma.to(m.device) * layer.reach
            linear = sum((torch.count_nonzero(x.abs() < edge) for (x,) in chunks(m)), torch.zeros_like(edge))
            weight = flat(p)
            values += [inner_product(m, m), sigma, linear, inner_product(weight, weight)]
            layers.append(layer)
        measured = to_floats(values)
        for i, layer in enumerate(layers):
            layer.measure(*measured[4 * i : 4 * i + 4])
        problem = _NO_MOMENTUM if takes_votes(optimizer) and not layers else None
        return _record(layers, {layer.name: layer.record() for layer in layers}, problem)

    def _momentum(self, optimizer: Optimizer, moved: MovedParam, before: BeforeStep) -> Tensor | None:
        p, _, group = moved
        if takes_votes(optimizer) and phase(optimizer, group) == "sign":
            assert self.worker is not None
            if interpolates(optimizer, group):
                return None
            state = self.worker.state.get(self.worker.names.get(p, ""), {})
            m = state.get("exp_avg")
            return None if m is None else read_momentum(m, state.get("exp_avg_scale")).to(torch.float32)
        if keeps_average(optimizer, group):
            return sign_momentum(optimizer, moved, before)
        if before.phases[moved.group_index] == "sign" and phase(optimizer, group) == "sgd" and group["momentum"] > 0:
            return None  # freed at the switch, which this step has made
        return entered_gradient(optimizer, moved, before)

    def _sigma(self, moved: MovedParam, before: BeforeStep) -> Tensor:
        p, index, group = moved
        if self.worker is None:
            return before.sigma(moved)
        step = before.steps[index]
        assert step is not None
        sigma = self.worker.sigma(group, step)
        assert sigma is not None
        square = self.worker.state.get(self.worker.names.get(p, ""), {}).get("mean_square")
        return sigma if square is None else sigma.to(square.device) * square.sqrt()


_REACH = {"gaussian": 0.5, "uniform": math.sqrt(3)}
"""Up to how many sigma the expected sign of one worker is linear: within 4.2 %, and exactly."""
_VOTED = (
    "dither: the momentum is on the workers' side of a vote, which this meter has not been given: "
    "DitherMeter(names, worker=vote.worker)"
)
_NO_MOMENTUM = (
    "dither: workers vote without momentum, or by Lion's average of it and the gradient, and their own gradients are "
    "gone after backward"
)


@dataclass
class _Layer:
    name: str
    size: int
    group: dict[str, Any]
    lr: float
    step: int | None
    """k of the step, from 0; None where the optimizer does not count."""
    position: str | None = None
    """Of the dither; None: not dithered."""
    phase: str = ""
    law: str = "gaussian"
    workers: int = 1
    """Whose votes move it."""
    rms: float = 0.0
    sigma: float = 0.0
    linear: float = 0.0
    weight: float = 0.0

    def measure(self, square: float, sigma: float, linear: float, weight: float) -> None:
        size = max(1, self.size)
        self.rms, self.weight = math.sqrt(square / size), math.sqrt(weight / size)
        self.sigma, self.linear = sigma, linear / size

    @property
    def slope(self) -> float:
        """Of the expected step in m / sigma, at 0."""
        return linear_slope(self.workers, self.law)

    @property
    def reach(self) -> float:
        """Up to how many sigma the expected step is linear; votes narrow that as they sharpen the slope."""
        return _REACH[self.law] * linear_slope(1) / linear_slope(self.workers)

    @property
    def dithered(self) -> bool:
        """Whether noise of some size was added before the sign, or its expectation taken."""
        return self.position in ("pre", "expected") and self.sigma > 0

    @property
    def walk(self) -> float | None:
        if self.step is None or self.phase != "sign" or self.position == "expected":
            return None
        return self.lr * math.sqrt(self.step + 1) * (self.sigma if self.position == "post" else 1.0)

    @property
    def matching(self) -> float | None:
        if self.position == "post" or self.phase == "sgd":
            return None
        if self.dithered:
            return float(self.group["dither"]) * (self.rms / self.sigma) ** 2
        if self.group.get("dither_scale") == "relative":  # near 1 whatever the momentum is
            return None
        annealed = 1.0 if self.step is None else (1.0 + self.step) ** float(self.group["dither_decay"])
        return self.rms**2 * annealed

    def record(self) -> dict[str, float | None]:
        on = self.dithered
        values = {
            "rms": self.rms,
            "sigma": self.sigma,
            "ratio": self.rms / self.sigma if on else None,
            "linear_share": self.linear if on else None,
            "equivalent_lr": self.lr * self.slope / self.sigma if on else None,
            "random_walk": self.walk,
            "weight_rms": self.weight,
            "matching_alpha": self.matching,
        }
        return {name: finite(value) for name, value in values.items()}


def _record(layers: list[_Layer], by_name: dict[str, Any], problem: str | None) -> dict[str, Any]:
    on = [layer for layer in layers if layer.dithered]
    rms, sigma = _root_mean_square(layers, "rms"), _root_mean_square(on, "sigma")
    ratio = _root_mean_square(on, "rms") / sigma if on and sigma else None
    record: dict[str, Any] = {
        "rms": rms if layers else None,
        "sigma": sigma if layers else None,
        "ratio": ratio,
        "dithered": len(on),
    }
    record |= {name: _mean(layers, by_name, name) for name in ("linear_share", "equivalent_lr", "random_walk")}
    record["weight_rms"] = _root_mean_square(layers, "weight") if layers else None
    record["matching_alpha"] = _mean(layers, by_name, "matching_alpha")
    record = {name: finite(value) for name, value in record.items()}
    record["layers"] = by_name
    record["advice"] = problem or _advice(layers)
    return record


def _root_mean_square(layers: list[_Layer], name: str) -> float:
    size = sum(layer.size for layer in layers)
    return math.sqrt(sum(layer.size * getattr(layer, name) ** 2 for layer in layers) / max(1, size))


def _mean(layers: list[_Layer], by_name: dict[str, Any], name: str) -> float | None:
    """Over the coordinates of the layers that have a value."""
    found = [(layer.size, by_name[layer.name][name]) for layer in layers if by_name[layer.name][name] is not None]
    size = sum(s for s, _ in found)
    return sum(s * value for s, value in found) / size if size else None


def _advice(layers: list[_Layer]) -> str:
    alive = [layer for layer in layers if 0 < layer.rms < math.inf]
    if not layers:
        return "dither: no parameter has moved"
    if not alive:
        return "dither: the momentum is 0 or not finite in every layer"
    post = next((layer for layer in alive if layer.position == "post" and layer.sigma > 0), None)
    if post is not None:
        return (
            f"dither: noise after the sign has a standard deviation of {post.sigma:.3g} steps, whatever the momentum "
            "is; dither_position='pre' is the dither of Algorithm 1"
        )
    on = [layer for layer in alive if layer.dithered]
    if any(layer.position == "expected" for layer in on):
        return _advice_expected(on)
    if on:
        return _advice_dithered(on)
    if any(layer.position is not None for layer in alive):
        return "dither: the first step of relative dither has no momentum to be relative to, and is not dithered"
    if all(layer.phase == "sgd" for layer in alive):
        return "dither: off in the SGD phase"
    return _advice_undithered(alive)


def _advice_expected(on: list[_Layer]) -> str:
    size = sum(layer.size for layer in on)
    linear = sum(layer.size * layer.linear for layer in on) / size
    return (
        f"dither: the step is the expected sign, without noise: rms(m) / sigma is "
        f"{span([layer.rms / layer.sigma for layer in on], 2)}, and {linear:.0%} of the coordinates move as under SGD "
        f"with lr {span([layer.lr * layer.slope / layer.sigma for layer in on], 2)}"
    )


def _advice_dithered(on: list[_Layer]) -> str:
    noise = [layer.sigma / layer.rms for layer in on]  # in units of the momentum
    loud, quiet = [x for x in noise if x >= RANDOM], [x for x in noise if x <= 1 / RANDOM]
    absolute = any(layer.group["dither_scale"] == "absolute" for layer in on)
    change = RELATIVE if absolute else "set dither=1.0, dither_decay=0.0"
    of = f"in {{}} of {len(on)} layers"
    if 2 * len(loud) >= len(on):
        times = median(loud)
        layer = max(on, key=lambda one: one.size)
        said = (
            f"dither is {times:.3g} times the momentum {of.format(len(loud))}: a typical sign is right with "
            f"probability {accuracy(1 / times, layer.law):.3f}, so the step is random"
        )
        if layer.walk is not None:
            said += f", a walk of lr sqrt(k) = {layer.walk:.2g} per weight (rms {layer.weight:.2g} in {layer.name})"
        gamma = float(layer.group["dither_decay"])
        if layer.group["dither_scale"] == "absolute" and gamma > 0:
            # (1 + k') = (1 + k) (sigma / rms)^(2 / gamma); of logarithms, as it may be beyond any number.
            power = math.log10(1 + (layer.step or 0)) + 2 / gamma * math.log10(max(1.0, times))
            said += f"; at this decay sigma comes down to the momentum near step 1e{power:.0f}"
        return f"{said}; {change}"
    if 2 * len(quiet) >= len(on):
        share = median(quiet)
        return (
            f"dither is {share:.3g} of the momentum {of.format(len(quiet))}: it changes next to no sign; {change} to "
            "make small coordinates move in proportion to their momentum"
        )
    size = sum(layer.size for layer in on)
    linear = sum(layer.size * layer.linear for layer in on) / size
    rates = [layer.lr * layer.slope / layer.sigma for layer in on]
    ratios = [1 / x for x in noise if 1 / RANDOM < x < RANDOM]
    said = (
        f"dither and momentum match: rms(m) / sigma is {span(ratios, 2)}, and {linear:.0%} of the "
        f"coordinates move on average as under SGD with lr {span(rates, 2)}"
    )
    outside = len(loud) + len(quiet)
    if outside:
        said += f"; not so {of.format(outside)}, beyond a factor of {RANDOM:.0f}" + (f": {change}" if absolute else "")
    return said


def _advice_undithered(layers: list[_Layer]) -> str:
    rms = [layer.rms for layer in layers]
    alpha = median([layer.matching for layer in layers if layer.matching is not None])
    counted = layers[0].step is not None
    decay = f"{float(layers[0].group['dither_decay']):g}" if counted else "0.0"
    said = (
        f"no dither: rms(m) is {span(rms, 2)} over {len(layers)} layers; dither={alpha:.2g}, dither_decay={decay} would"
    )
    said += " have matched the median at this step"
    if max(rms) > RANDOM * min(rms):
        apart = f"{max(rms) / min(rms):.3g}"
        said += f", but not layers {apart} times apart: dither_scale='relative', dither=1.0, dither_decay=0.0 does"
    return said

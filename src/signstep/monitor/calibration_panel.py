r"""The learning rate that SGD would go on with, by every rule, and how far each can be trusted.

Let g be the gradient that entered the momentum, s = sign(m) after the step, delta the learning rate, and E the moving
average over the own steps, with decay 0.9 and corrected for its start:

.. math::
    \text{paper, eq. (12):}\ & \mathrm E\Big[\delta \frac{|\langle s, g\rangle|}{\|g\|^2 + \epsilon}\Big] &
    \text{ratio:}\ & \delta \frac{\max(0, \mathrm E \langle s, g\rangle)}{\mathrm E \|g\|^2 + \epsilon} \\
    \text{applied:}\ & \text{ratio, with } 2\Phi(m/\sigma) - 1 \text{ for s} &
    \text{lagged:}\ & \text{ratio, with the sign of m before the step} \\
    \text{swats:}\ & \delta \frac{\mathrm E \|s\|^2}{\mathrm E \langle s, g\rangle}

The first three are those of `signstep.optim.calibration`. "lagged" leaves out what g itself adds to m. Under Gaussian
noise without any signal, "ratio" is still :math:`\delta \sqrt{2/\pi} \sqrt{1 - \beta^2} / \mathrm{rms}(g)`, and
"lagged" is 0. "swats" projects the other way, the gradient on the step (Keskar and Socher 2017). It is ratio / cos^2,
and None where <s, g> is not above 0. For an optimizer that is not signstep's, s is the sign of its momentum: the rates
say what a sign step would be worth in the place of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from signstep.kernels.engine import Measured
from signstep.kernels.reference import wide_dtype
from signstep.monitor.last_step import (
    BeforeStep,
    MovedParam,
    entered_gradient,
    is_sharded,
    keeps_average,
    kept_momentum,
    moved_params,
    phase,
    sign_momentum,
    takes_votes,
)
from signstep.monitor.totals import chunks, finite, inner_product, span, to_floats
from signstep.optim.calibration import EPS, RULES
from signstep.optim.dither import expected_sign
from signstep.optim.hybrid import HybridSignSGD
from signstep.optim.signsgd import SignSGD

__all__ = ["CalibrationPanel", "wilson"]

DECAY = 0.9
RATE_RULES = ("paper", "ratio", "applied", "lagged", "swats")
_COMPARED_FROM = 5
"""Own steps before the averages are compared in words."""
_RISEN = 0.9
"""The share of its value below which an average that starts at 0 is called low."""


def wilson(count: int, of: int) -> tuple[float, float] | None:
    """Wilson's 95 % interval of the share `count` / `of`; None if `of` is 0.

    >>> [round(x, 3) for x in wilson(0, 10)]
    [0.0, 0.278]
    """
    if of == 0:
        return None
    z, share = 1.959963984540054, count / of
    centre, shrunk = share + z * z / (2 * of), 1 + z * z / of
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, (centre - half) / shrunk), min(1.0, (centre + half) / shrunk)


class CalibrationPanel:
    """Every rule's learning rate for SGD, at this step and on average over the steps that are measured.

    Call `before_step` right before ``optimizer.step()`` and `after_step` right after it, with the gradients still
    there. Sums run over all parameters of a param_group, as in `HybridSignSGD`. Both may wait for the device. Between
    them, a byte per coordinate is kept for the sign of the momentum, and a copy of what coupled weight decay adds.

    Args:
        names: the names of those parameters that are shown as layers.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = HybridSignSGD(model.parameters(), lr=1e-3, calibration="ratio", ema_decay=0.9)
        >>> panel = CalibrationPanel()
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     panel.before_step(optimizer)
        ...     optimizer.step()
        ...     record = panel.after_step(optimizer)
        >>> abs(record["average"]["ratio"] / optimizer.calibrated_lr - 1) < 1e-5
        True
    """

    def __init__(self, names: Mapping[Any, str] | None = None) -> None:
        self.names = dict(names or {})
        self._before: BeforeStep | None = None
        self._signs: dict[Tensor, Tensor] = {}
        self._averages: list[_Averages] = []
        self._paper = _Average()
        self._negative, self._lagged_negative = _Share(), _Share()

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep what the step is going to overwrite."""
        self._before = BeforeStep.of(optimizer, lambda group: phase(optimizer, group) != "sgd")
        self._signs = {}
        for group in optimizer.param_groups:
            for p in group["params"] if keeps_average(optimizer, group) else ():
                m = None if is_sharded(p) else kept_momentum(optimizer, group, p)
                if m is not None:
                    self._signs[p] = torch.sign(m).to(torch.int8)

    def after_step(self, optimizer: Optimizer) -> dict[str, Any]:
        """Measure the step.

        Returns:
            Numbers, None where there is none:

            - now, average: the learning rate by each of "paper", "ratio", "applied", "lagged" and "swats"; with several
              param_groups it is one for all, by the projection of the whole step.
            - cosine, lagged_cosine: of the gradient and the sign step, or the sign of the momentum before the step.
            - negative, lagged_negative: [share, low, high] of own steps with <s, g> < 0, Wilson's 95 % interval.
            - own_steps: how many steps have been measured.
            - groups: for each param_group lr, the averages, and of `HybridSignSGD` its phase and calibrated_lr.
            - layers: cosine, lagged_cosine, and "ratio" of this step, which may be negative.
            - advice: what a switch would do now, in words.

        Raises:
            RuntimeError: `before_step` was not called.
        """
        before, self._before = self._before, None
        if before is None:
            raise RuntimeError("CalibrationPanel.after_step without before_step, which keeps what the step overwrites")
        lrs = [float(g["lr"]) for g in optimizer.param_groups]
        self._averages += [_Averages() for _ in lrs[len(self._averages) :]]
        voted = takes_votes(optimizer)
        found, layers = (_voted(optimizer, before), {}) if voted else self._summed(optimizer, before, lrs)
        self._signs = {}
        whole = _total(sums.scaled(lrs[i]) for i, sums in found.items())
        if whole is not None and all(x is None or math.isfinite(x) for x in whole):
            self._negative.count(whole.inner < 0)
            if whole.lagged is not None:
                self._lagged_negative.count(whole.lagged < 0)
            self._paper.add(whole.paper())
            for i, sums in found.items():
                self._averages[i].add(sums, sums.scaled(lrs[i]).paper())
        else:
            whole = None
        average = _total(each.sums().scaled(lr) for each, lr in zip(self._averages, lrs, strict=False) if each.weight)
        record: dict[str, Any] = {
            "now": _rules(whole, None if whole is None else whole.paper()),
            "average": _rules(average, self._paper.value()),
            "cosine": None if whole is None else whole.cosine(whole.inner),
            "lagged_cosine": None if whole is None else whole.cosine(whole.lagged),
            "negative": self._negative.record(),
            "lagged_negative": self._lagged_negative.record(),
            "own_steps": self._negative.of,
            "groups": [self._group(optimizer, i, lr) for i, lr in enumerate(lrs)],
        }
        record["layers"] = layers
        record["advice"] = _advice(optimizer, record, average, bool(found))
        return record

    def state_dict(self) -> dict[str, Any]:
        """The running averages and counts: plain values."""
        return {
            "averages": [each.state() for each in self._averages],
            "paper": [self._paper.total, self._paper.weight],
            "negative": [self._negative.times, self._negative.of],
            "lagged_negative": [self._lagged_negative.times, self._lagged_negative.of],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._averages = [_Averages.load(saved) for saved in state["averages"]]
        self._paper = _Average(*state["paper"])
        self._negative, self._lagged_negative = _Share(*state["negative"]), _Share(*state["lagged_negative"])

    def _summed(
        self, optimizer: Optimizer, before: BeforeStep, lrs: list[float]
    ) -> tuple[dict[int, _Sums], dict[str, Any]]:
        """The sums of each param_group, and the layers of the record."""
        moved, values = [], []
        for one in moved_params(optimizer, before):
            terms = self._terms(optimizer, one, before) if before.phases[one.group_index] != "sgd" else None
            if terms is not None:
                moved.append(one)
                values += terms
        measured = to_floats(values)
        found: dict[int, _Sums] = {}
        layers = {}
        for k, (p, i, _) in enumerate(moved):
            inner, applied, lagged, square, length = measured[5 * k : 5 * k + 5]
            sums = _Sums(inner, applied, lagged if p in self._signs else None, square, length)
            found[i] = found[i].plus(sums) if i in found else sums
            if p in self.names:
                step = sums.scaled(lrs[i])
                layers[self.names[p]] = {
                    "cosine": step.cosine(step.inner),
                    "lagged_cosine": step.cosine(step.lagged),
                    "ratio": finite(step.inner / (step.square + EPS)),
                }
        return found, layers

    def _terms(self, optimizer: Optimizer, moved: MovedParam, before: BeforeStep) -> list[Tensor] | None:
        """The numbers of `_Sums` for one parameter; None where its momentum is gone, or is not an average."""
        p, _, group = moved
        g = entered_gradient(optimizer, moved, before)
        # Also of a step that has switched, which kept_momentum leaves out.
        momentum = any(optimizer.averages(group)) if isinstance(optimizer, SignSGD) else keeps_average(optimizer, group)
        m = sign_momentum(optimizer, moved, before) if momentum else g
        if m is None:
            return None
        sigma, law = None, group.get("dither_law", "gaussian")
        dithered = isinstance(optimizer, SignSGD) and group["dither"] > 0
        if dithered and group["dither_position"] in ("pre", "expected"):
            sigma = before.sigma(moved).to(m.device)
        sums = torch.zeros(5, dtype=wide_dtype(g.device), device=g.device)
        for x, y, last in chunks(g, m, self._signs.get(p, g)):
            s = torch.sign(y).to(x.dtype)
            expected = s if sigma is None else expected_sign(y, sigma, law).to(x.dtype)
            factors = ((s, x), (expected, x), (last.to(x.dtype), x), (x, x), (s, s))
            sums += torch.stack([inner_product(a, b) for a, b in factors])
        return list(sums.unbind())

    def _group(self, optimizer: Optimizer, index: int, lr: float) -> dict[str, Any]:
        each, group = self._averages[index], optimizer.param_groups[index]
        record = {"lr": finite(lr)} | _rules(each.sums().scaled(lr) if each.weight else None, each.paper.value())
        if isinstance(optimizer, HybridSignSGD):
            record |= {"phase": group["phase"], "calibrated_lr": finite(float(group["calibrated_lr"].median()))}
        return record


def _advice(optimizer: Optimizer, record: Mapping[str, Any], average: _Sums | None, measured: bool) -> str:
    groups = record["groups"]
    rates = [record["average"]["ratio"]]
    rule = "ratio"
    if isinstance(optimizer, HybridSignSGD):
        rates = [g["calibrated_lr"] for g in groups if g["phase"] == optimizer.phase]
        rule = optimizer.param_groups[0]["calibration"]
        if optimizer.phase == "sgd":
            present = [float(g["lr_ratio"].median()) * float(g["lr"]) for g in optimizer.param_groups]
            return f"calibration: in the SGD phase, at lr {span(present, 3)} (when it began: {span(rates, 3)})"
    elif average is None and takes_votes(optimizer):
        return "calibration: the workers' own gradients are gone after a vote; HybridSignSGD keeps their sums"
    if average is None:
        why = "not finite" if measured else "of no parameter that has moved"
        return f"calibration: nothing measured yet, the gradient and its momentum are {why}"
    if isinstance(optimizer, HybridSignSGD):
        said = f"calibration: switch() now would go on with SGD at lr {span(rates, 3)} (rule {rule!r})"
    else:
        steps = "its steps" if isinstance(optimizer, SignSGD) else "sign steps along its momentum"
        said = f"calibration: SGD at lr {span(rates, 3)} (rule 'ratio') is worth what {steps} are"
        said += f" at lr {span([g['lr'] for g in groups], 3)}"
    if len(rates) == 1 and rates[0] is not None:
        length = finite(_quotient(rates[0] * math.sqrt(average.square), math.sqrt(average.length)))
        said += "" if length is None else f", in steps {length:.2g} times as long"
    if isinstance(optimizer, HybridSignSGD) and rule == "paper":
        first = optimizer.param_groups[0]
        risen = 1 - first["ema_decay"] ** int(first["step"])
        if risen < _RISEN:
            said += f"; eq. (12)'s average starts at 0, and has come to {risen:.0%} of the rate"
    return said + (_cautions(record, rule) if record["own_steps"] >= _COMPARED_FROM else "")


def _voted(optimizer: Optimizer, before: BeforeStep) -> dict[int, _Sums]:
    """The sums under a vote, where `HybridSignSGD` has those of the votes and the workers' own gradients."""
    if not isinstance(optimizer, HybridSignSGD) or not optimizer.voted_sums:
        return {}
    found = {}
    for i, (group, steps) in enumerate(zip(optimizer.param_groups, before.steps, strict=False)):
        of_votes = RULES[group["calibration"]] is not Measured.MOMENTUM
        if before.phases[i] == "sign" and steps is not None and int(group["step"]) > steps and of_votes:
            votes = [torch.count_nonzero(p.grad) for p in group["params"] if p.grad is not None]
            inner, square, *cast = to_floats([*optimizer.voted_sums[i].sum(dim=0), *votes])
            found[i] = _Sums(inner, inner, None, square, sum(cast))
    return found


def _cautions(record: Mapping[str, Any], rule: str) -> str:
    """Reasons why the rate may not be what it seems."""
    ratio, paper, applied, lagged = (record["average"][name] for name in ("ratio", "paper", "applied", "lagged"))
    low = record["negative"][1]
    if not ratio or low > 0.25:
        return "; but steps point uphill so often that there is no rate to trust yet"
    said = ""
    if rule == "paper" and paper is not None and paper > 1.5 * ratio:
        said += (
            f"; the signed ratio of averages is {paper / ratio:.2g} times lower, {_number(ratio)}: calibration='ratio'"
        )
    if rule != "applied" and applied is not None and applied < 0.5 * ratio:
        said += f"; the dithered step is worth {_number(applied)} only: calibration='applied'"
    if lagged is not None and lagged < 0.25 * ratio:
        said += (
            f"; the momentum without this gradient gives {_number(lagged)}: most of the rate is the gradient's noise"
        )
    return said


class _Sums(NamedTuple):
    """Sums over coordinates, for a step s of unit size, or of its real size after `scaled`."""

    inner: float
    """<s, g>."""
    applied: float
    lagged: float | None
    square: float
    """||g||^2."""
    length: float
    """||s||^2."""

    def scaled(self, lr: float) -> _Sums:
        lagged = None if self.lagged is None else lr * self.lagged
        return _Sums(lr * self.inner, lr * self.applied, lagged, self.square, lr * lr * self.length)

    def plus(self, other: _Sums) -> _Sums:
        known = [x for x in (self.lagged, other.lagged) if x is not None]
        return _Sums(
            self.inner + other.inner,
            self.applied + other.applied,
            sum(known) if known else None,
            self.square + other.square,
            self.length + other.length,
        )

    def paper(self) -> float:
        return abs(self.inner) / (self.square + EPS)

    def cosine(self, inner: float | None) -> float | None:
        return None if inner is None else finite(_quotient(inner, math.sqrt(self.length) * math.sqrt(self.square)))


def _rules(sums: _Sums | None, paper: float | None) -> dict[str, float | None]:
    if sums is None:
        return dict.fromkeys(RATE_RULES)

    def project(inner: float | None) -> float | None:
        return None if inner is None else finite(max(0.0, inner) / (sums.square + EPS))

    swats = finite(_quotient(sums.length, sums.inner)) if sums.inner > 0 else None
    return {
        "paper": finite(paper),
        "ratio": project(sums.inner),
        "applied": project(sums.applied),
        "lagged": project(sums.lagged),
        "swats": swats,
    }


def _total(parts: Iterable[_Sums]) -> _Sums | None:
    whole: _Sums | None = None
    for part in parts:
        whole = part if whole is None else whole.plus(part)
    return whole


class _Average:
    """A moving average, corrected for its start at 0."""

    def __init__(self, total: float = 0.0, weight: float = 0.0) -> None:
        self.total, self.weight = total, weight

    def add(self, x: float) -> None:
        self.total, self.weight = DECAY * self.total + (1 - DECAY) * x, DECAY * self.weight + (1 - DECAY)

    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class _Averages:
    """The moving averages of one param_group: of `_Sums`, and of the paper's rate."""

    def __init__(self) -> None:
        self.paper = _Average()
        self._terms = [_Average() for _ in _Sums._fields]

    @property
    def weight(self) -> float:
        return self.paper.weight

    def add(self, sums: _Sums, paper: float) -> None:
        self.paper.add(paper)
        for average, x in zip(self._terms, sums, strict=True):
            if x is not None:
                average.add(x)

    def sums(self) -> _Sums:
        inner, applied, lagged, square, length = (average.value() for average in self._terms)
        return _Sums(inner or 0.0, applied or 0.0, lagged, square or 0.0, length or 0.0)

    def state(self) -> list[list[float]]:
        return [[each.total, each.weight] for each in (self.paper, *self._terms)]

    @classmethod
    def load(cls, state: Sequence[Sequence[float]]) -> _Averages:
        made = cls()
        made.paper, *made._terms = (_Average(*each) for each in state)
        return made


class _Share:
    """How often something was so."""

    def __init__(self, times: int = 0, of: int = 0) -> None:
        self.times, self.of = times, of

    def count(self, so: bool) -> None:
        self.times, self.of = self.times + int(so), self.of + 1

    def record(self) -> list[float | None]:
        found = wilson(self.times, self.of)
        return [None, None, None] if found is None else [self.times / self.of, *found]


def _quotient(a: float, b: float) -> float:
    return a / b if b != 0 else math.nan


def _number(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.3g}"

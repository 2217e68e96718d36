"""The two figures of `signstep verify`: laws of noise under the bounds, and Theorem 1 against the number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from signstep.lab.output.lines import Line, lines
from signstep.lab.output.stats import MeanEstimate
from signstep.theory import bounds, noise

_LAWS = {
    "gaussian": "blue",
    "laplace": "green",
    "uniform": "orange",
    "student-t3": "violet",
    "bimodal": "pink",
    "skewed": "vermillion",
}


def _estimates(values: Sequence[float]) -> tuple[MeanEstimate, ...]:
    return tuple(MeanEstimate(1, value, None) for value in values)


def laws() -> Figure:
    """The chance of a wrong sign against S, by law, beside both forms of the bound (6)."""
    snr = torch.linspace(0.0, 2.0, 401, dtype=torch.float64)
    x = tuple(snr.tolist())
    both = (
        (bounds.PAPER_SPLIT, "bound (6), split √(2/3)", "grey"),
        (bounds.CRITICAL_SNR, "bound, split 2/√3", "black"),
    )
    curves = []
    for split, label, colour in both:
        y = _estimates(bounds.sign_failure_bound(snr, split=split).tolist())
        curves.append(Line(label, colour, x, y, dashed=colour == "grey", marks=False))
    curves += [
        Line(name, colour, x, _estimates(noise.LAWS[name].failure(snr).tolist()), marks=False, dashed=not law.unimodal)
        for name, colour in _LAWS.items()
        if (law := noise.LAWS[name])
    ]
    heading = (
        "How often a sign is wrong",
        "exact, by law; dashed laws are not symmetric and unimodal, and may pass the bound",
    )
    return lines(curves, across="S = |g| / s", up="P(wrong sign)", heading=heading, limits=(0.0, 0.65))


def rates(values: Mapping[str, Any]) -> Figure:
    """Averaged Phi against K for several laws, with the bounds, and |g|_1 with its supposed floor.

    Args:
        values: those of the check theorem.slope.
    """
    order = sorted(range(len(values["steps"])), key=lambda i: values["steps"][i])

    def line(label: str, colour: str, found: Sequence[float], **style: Any) -> Line:
        x = tuple(math.log10(values["steps"][i]) for i in order)
        return Line(label, colour, x, _estimates([math.log10(found[i]) for i in order]), **style)

    curves = [
        line("Φ, bound (2)", "grey", values["paper"], dashed=True, marks=False),
        line("Φ, bound at √3", "black", values["sharp"], marks=False),
        line("‖g‖₁, floor of (3)", "switch", [values["floor"]] * len(order), dashed=True, marks=False),
        line("‖g‖₁ at the end, gaussian", "brown", values["l1"]["gaussian"]),
    ]
    curves += [line(f"Φ, {name}", _LAWS[name], found) for name, found in values["phi"].items()]
    heading = (
        "Theorem 1 against K",
        "separable quadratic, d = 100, n = 1, step 1/√(L₁K); slopes of Φ are those of the bounds",
    )
    drawn = lines(curves, across="K", up="average over the steps", heading=heading, limits=(-0.2, 2.3))
    axes = drawn.axes[0]
    axes.xaxis.set_major_locator(FixedLocator([math.log10(values["steps"][i]) for i in order]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(10**value):,}")
    axes.yaxis.set_major_locator(FixedLocator([0, 1, 2]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{10**value:g}")
    return drawn

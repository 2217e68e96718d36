"""The statements of `signstep verify`: each comes to its recorded verdict, and a law that is broken changes one."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import signstep.lab.verify.verification  # noqa: F401  (registers the statements)
from signstep.lab.verify import dithered_sign, estimators, projection_switch, registry
from signstep.lab.verify.chains import descend
from signstep.lab.verify.projection_rate import folded_averages
from signstep.lab.verify.registry import CHECKS, FAILS, HOLDS, CheckOutcome
from signstep.optim import calibration, hybrid, signsgd
from signstep.theory import bounds, noise, problems, stationarity, vote


def measure(name: str) -> CheckOutcome:
    (outcome,) = registry.run([CHECKS[name]])
    return outcome


LONG = {
    "theorem.rate", "theorem.slope", "theorem.l1", "theorem.floor", "theorem.floor-free", "theorem.optimal-step",
    "theorem.real-noise", "dither.short-run", "estimators.intervals", "estimators.heavy-tails",
    "estimators.real-gradients", "estimators.real-batches",
}  # fmt: skip
"""What takes ten seconds or more. theorem.sharp, .telescoped and .dithered hold the same bounds against shorter runs;
estimators.unbiased and .margin the same estimators on fewer draws."""
SLOW = {
    "theorem.reference", "dither.matched", "projection.length", "projection.absolute-value", "projection.start",
    "projection.rate", "projection.effective-dimension", "projection.mean-of-ratios", "vote.variance",
    "estimators.unbiased", "estimators.snr", "estimators.phi", "estimators.margin",
}  # fmt: skip


def marked(name: str) -> Any:
    marks = [pytest.mark.long] if name in LONG else [pytest.mark.slow] if name in SLOW else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(each.name) for each in registry.select(())])
def test_verdict_is_the_recorded_one(name: str) -> None:
    found = measure(name)
    assert found.result.verdict == found.check.expected, found.result
    assert found.result.measured
    assert found.result.error
    assert (found.result.verdict == FAILS) == bool(found.result.condition)
    json.dumps(found.result.values, allow_nan=False)
    assert "nan" not in f"{found.result.measured} {found.result.error} {found.result.detail}".split()


def test_seeds_do_not_depend_on_what_else_runs() -> None:
    alone = measure("gauss.laws").result
    _, again = registry.run([CHECKS["gauss.dither-repairs"], CHECKS["gauss.laws"]])
    assert again.result == alone


Patch = Callable[[pytest.MonkeyPatch], None]


def _scaled(module: Any, name: str, factor: float) -> Patch:
    original = getattr(module, name)
    return lambda monkeypatch: monkeypatch.setattr(module, name, lambda *a, **k: original(*a, **k) * factor)


def _law(name: str, **changes: Any) -> Patch:
    return lambda monkeypatch: monkeypatch.setitem(noise.LAWS, name, replace(noise.LAWS[name], **changes))


def _constant(module: Any, name: str, value: float) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(module, name, value)


def forget_averages() -> None:
    """What was measured with a law that is broken, or not, is measured anew."""
    for kept in (*vars(projection_switch).values(), folded_averages):
        if hasattr(kept, "cache_clear"):
            kept.cache_clear()


def _signed_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's rule without its absolute value."""
    original = calibration.update_rate

    def update(rule: str, *measured: Any, **options: Any) -> None:
        original("ratio" if rule == "paper" else rule, *measured, **options)

    monkeypatch.setattr(calibration, "update_rate", update)
    monkeypatch.setattr(hybrid, "update_rate", update)
    forget_averages()


def _own_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """L_i along its own axis."""
    original = problems.coupled_quadratic

    def coupled(*args: Any, **kwargs: Any) -> problems.Problem:
        problem = original(*args, **kwargs)
        return replace(problem, smoothness=torch.ones_like(problem.smoothness))

    monkeypatch.setattr(problems, "coupled_quadratic", coupled)


def _naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement with a mean that each row is part of."""

    def alignment(rows: torch.Tensor) -> stationarity.Estimate:
        value = (rows.mean(-2) * rows.sign().mean(-2)).sum(-1)
        return stationarity.Estimate(value, value, value)

    monkeypatch.setattr(stationarity, "alignment", alignment)


def _weak_symmetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "symmetry", lambda rows: {"rejected_share": 0.3})


BROKEN: dict[str, tuple[str, Patch, str]] = {
    "sharp constant too good": ("gauss.sharp", _constant(bounds, "SHARP_CONSTANT", 1.6), FAILS),
    "sharp constant not better": ("gauss.constant", _constant(bounds, "SHARP_CONSTANT", 1.6), HOLDS),
    "bound too small": ("gauss.bound", _scaled(bounds, "sign_failure_bound", 0.98), FAILS),
    "bound too large": ("gauss.tight", _scaled(bounds, "sign_failure_bound", 1.02), FAILS),
    "law of another variance": ("gauss.laws", _law("gaussian", cdf=lambda x: torch.special.ndtr(x / 1.02)), FAILS),
    "draws of another variance": (
        "gauss.laws",
        _law("gaussian", sample=lambda shape, g: 1.02 * torch.randn(tuple(shape), generator=g, dtype=torch.float64)),
        FAILS,
    ),
    "law with another density": ("gauss.minima", _law("gaussian", cdf=noise.LAWS["logistic"].cdf), FAILS),
    "threshold of skewed noise": ("gauss.skew-threshold", _scaled(bounds, "skew_threshold", 1.05), FAILS),
    "skewed law that is not": ("gauss.skewed", _law("skewed", cdf=noise.LAWS["gaussian"].cdf), HOLDS),
    "bimodal law that is not": ("gauss.bimodal", _law("bimodal", cdf=noise.LAWS["gaussian"].cdf), HOLDS),
    "L_i along the axes": ("theorem.assumption", _own_axis, FAILS),
    "bound of Theorem 1": ("theorem.sharp", _scaled(bounds, "stationarity_bound", 0.97), FAILS),
    "Phi": ("theorem.measure", _scaled(bounds, "phi", 1.001), FAILS),
    "Phi at a constant": ("theorem.sharp", _scaled(bounds, "phi", 1.03), FAILS),
    "best step": ("theorem.optimal-step", _scaled(bounds, "optimal_lr", 1.2), FAILS),
    "the optimizer's sigma": ("dither.schedule", _scaled(signsgd, "dither_std", 1.05), FAILS),
    "the law of Sec. IV": ("dither.law", _scaled(dithered_sign, "law", 0.97), FAILS),
    "the law of uniform dither": ("dither.uniform", _scaled(dithered_sign, "uniform_law", 0.99), FAILS),
    "the flips of uniform dither": ("dither.uniform-flips", _scaled(dithered_sign, "accuracy", 0.99), FAILS),
    "the slope of uniform dither": ("dither.uniform-slope", _scaled(dithered_sign, "linear_slope", 1.01), FAILS),
    "no absolute value": ("projection.absolute-value", _signed_product, HOLDS),
    "no mean of ratios": ("projection.mean-of-ratios", _signed_product, HOLDS),
    "no epsilon": ("projection.peak", _constant(calibration, "EPS", 1e-6), FAILS),
    "the vote's slope": ("vote.slope", _scaled(vote, "linear_slope", 1.01), FAILS),
    "the expected vote": ("vote.law", _scaled(vote, "expected_vote", 0.97), FAILS),
    "the expected vote under attack": ("vote.attackers", _scaled(vote, "expected_vote", 0.9), FAILS),
    "an estimator that counts itself": ("estimators.unbiased", _naive, FAILS),
    "an estimator of S^2": ("estimators.snr", _scaled(stationarity, "snr_squared", 1.1), FAILS),
    "a test of symmetry": ("estimators.symmetry", _weak_symmetry, FAILS),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long if BROKEN[case][0] in LONG else ()) for case in BROKEN]
)
def test_a_broken_law_changes_the_verdict(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, break_it, verdict = BROKEN[case]
    forget_averages()
    break_it(monkeypatch)
    try:
        found = measure(name)
    finally:
        forget_averages()
    assert found.result.verdict == verdict
    assert not found.as_expected


def test_chains_need_descending_steps() -> None:
    problem = problems.separable_quadratic(3)
    with pytest.raises(ValueError, match=r"steps=\[1, 2\]: expected descending numbers"):
        descend(
            problem, torch.zeros(1, 1, 2, 9), torch.ones(1), steps=[1, 2], lrs=torch.ones(2, 1), rng=torch.Generator()
        )


def test_chains_without_noise_are_gradient_signs() -> None:
    problem = problems.separable_quadratic(3, condition=1.0)
    lrs = torch.tensor([[0.25], [0.5]], dtype=torch.float64)
    found = descend(
        problem, torch.zeros(1, 1, 2, 9).double(), torch.zeros(1).double(), steps=[4, 2], lrs=lrs, rng=torch.Generator()
    )
    # From x = 1 down to 0 by quarters and halves: |g|_1 = 3 |x|.
    assert found.l1.flatten().tolist() == pytest.approx([3 * 2.5 / 4] * 2 + [3 * 1.5 / 2] * 2)
    assert found.phi.equal(found.l1)
    assert found.last_l1[0].flatten().tolist() == pytest.approx([0.75] * 2)
    assert found.final.abs().max() == 0

"""The optimizers follow the papers' algorithms, step by step, against the float64 references."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pairwise import every_combination
from references import HybridSignSGDReference, LionReference, SignSGDReference
from signstep import HybridSignSGD, Lion, SignSGD
from signstep.optim.calibration import RULES

SHAPES = [(3, 5), (17,), (), (2, 3, 4)]
lengths = pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.long)])


def _gradients(step: int, x: list[np.ndarray]) -> list[np.ndarray]:
    """Noisy gradients of an ill-conditioned quadratic: they depend on the trajectory, so an error would grow."""
    rng = np.random.default_rng(step)
    return [np.asarray(np.linspace(0.1, 3, p.size).reshape(p.shape) * (p - 0.3) + rng.normal(size=p.shape)) for p in x]


Schedule = Callable[[float], float]


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(0.8 * math.pi * done))


def _milestone(done: float) -> float:
    return 0.2 if done >= SWITCH else 1.0


SWITCH = 0.45
"""The share of the steps after which a hybrid switches."""


def _run(
    fast_class: type, slow_class: type, schedule: Schedule, foreach: bool, options: dict[str, Any], steps: int
) -> None:
    rng = np.random.default_rng(7)
    start = [rng.normal(size=shape) for shape in SHAPES]
    params = [torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in start]
    fast = fast_class(params, lr=3e-3, foreach=foreach, **options)
    slow = slow_class([np.asarray(p) for p in start], 3e-3, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(fast, lambda step: schedule(step / steps))
    # Decisions must agree exactly; post-sign noise and the expected sign are themselves float32 numbers.
    tolerance = 1e-6 if options.get("dither_position", "pre") != "pre" else 1e-9
    switched = False
    for step in range(steps):
        slow.lr = 3e-3 * schedule(step / steps)
        gradients = _gradients(step, slow.x)
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        fast.step()
        scheduler.step()
        slow.step(gradients)
        for p, x in zip(params, slow.x, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=tolerance, atol=tolerance, err_msg=f"step {step}")
        if isinstance(fast, HybridSignSGD):
            switched |= fast.phase == "sgd"
            assert fast.phase == ("sgd" if slow.switched else "sign")
            assert fast.calibrated_lr == pytest.approx(slow.lambda_bar, rel=1e-6, abs=1e-15)
    assert switched == issubclass(fast_class, HybridSignSGD)


DITHERS = {
    "clean": {},
    "pre": {"dither": 0.1, "seed": 3},
    "pre, wide seed": {"dither": 0.5, "dither_decay": 0.0, "seed": (1 << 63) + 5},
    "relative": {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative", "seed": 3},
    "post": {"dither": 0.1, "dither_position": "post", "seed": 3},
    "uniform": {"dither": 0.1, "dither_law": "uniform", "seed": 3},
    "uniform, relative": {"dither": 1.0, "dither_scale": "relative", "dither_law": "uniform", "seed": 3},
    "expected": {"dither": 0.1, "dither_position": "expected"},
    "expected, relative": {
        "dither": 2.0,
        "dither_decay": 0.0,
        "dither_position": "expected",
        "dither_scale": "relative",
        "dither_law": "uniform",
    },
    "uniform, post": {"dither": 0.1, "dither_position": "post", "dither_law": "uniform", "seed": 3},
}
DECAYS = {
    "none": {},
    "decoupled": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}


@lengths
@pytest.mark.parametrize(("dither", "decay", "foreach"), every_combination(DITHERS, DECAYS, [False, True]))
def test_signsgd_follows_algorithm_1(dither: str, decay: str, foreach: bool, steps: int) -> None:
    _run(SignSGD, SignSGDReference, _cosine, foreach, DITHERS[dither] | DECAYS[decay], steps)


@lengths
@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"maximize": True, "weight_decay": 0.1}])
def test_signsgd_options(options: dict[str, Any], steps: int) -> None:
    _run(SignSGD, SignSGDReference, _cosine, True, options, steps)


@lengths
@pytest.mark.parametrize(("dither", "decay", "foreach"), every_combination(DITHERS, DECAYS, [False, True]))
def test_lion_follows_its_algorithm(dither: str, decay: str, foreach: bool, steps: int) -> None:
    _run(Lion, LionReference, _cosine, foreach, DITHERS[dither] | DECAYS[decay], steps)


@lengths
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.0), (0.0, 0.0), (0.3, 0.4), (0.95, 0.9)])
def test_betas_of_lion(betas: tuple[float, float], steps: int) -> None:
    _run(Lion, LionReference, _milestone, True, {"betas": betas, "maximize": True} | DITHERS["relative"], steps)


@lengths
@pytest.mark.parametrize(
    ("calibration", "dither", "decay", "schedule"),
    every_combination(RULES, ["clean", "pre", "relative"], DECAYS, [_cosine, _milestone]),
)
def test_hybrid_follows_algorithm_2(calibration: str, dither: str, decay: str, schedule: Schedule, steps: int) -> None:
    # The milestone is at the switch: the schedule's drop must come through, and nothing else.
    options = {"calibration": calibration, "switch_step": int(SWITCH * steps), "ema_decay": 0.9}
    options |= DITHERS[dither] | DECAYS[decay]
    _run(HybridSignSGD, HybridSignSGDReference, schedule, calibration != "paper", options, steps)


@lengths
@pytest.mark.parametrize("dither", ["uniform", "uniform, relative", "expected", "expected, relative"])
@pytest.mark.parametrize("calibration", ["ratio", "applied"])
def test_hybrid_of_another_dither(calibration: str, dither: str, steps: int) -> None:
    options = {"calibration": calibration, "switch_step": int(SWITCH * steps), "ema_decay": 0.9} | DITHERS[dither]
    _run(HybridSignSGD, HybridSignSGDReference, _cosine, calibration == "ratio", options, steps)


@lengths
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize("calibration", RULES)
def test_a_rate_for_the_group_or_for_each_tensor(calibration: str, scope: str, foreach: bool, steps: int) -> None:
    options = {"calibration": calibration, "calibration_scope": scope, "switch_step": int(SWITCH * steps)}
    options |= {"ema_decay": 0.9, "sgd_momentum": 0.7, "weight_decay": 0.05} | DITHERS["relative"]
    _run(HybridSignSGD, HybridSignSGDReference, _milestone, foreach, options, steps)


@lengths
@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize("calibration", ["norm", "ratio"])
def test_a_switch_at_the_step_where_the_rate_has_settled(calibration: str, scope: str, steps: int) -> None:
    options = {"calibration": calibration, "calibration_scope": scope, "switch_step": "auto", "ema_decay": 0.9}
    options |= {"switch_tolerance": 0.5, "switch_patience": 3, "sgd_momentum": 0.9}
    _run(HybridSignSGD, HybridSignSGDReference, _cosine, True, options, steps)


@lengths
@pytest.mark.parametrize("foreach", [False, True])
def test_hybrid_with_momentum_after_the_switch(foreach: bool, steps: int) -> None:
    options = {"calibration": "paper", "switch_step": int(0.3 * steps), "sgd_momentum": 0.8}
    options |= {"maximize": True, "weight_decay": 0.05}
    _run(HybridSignSGD, HybridSignSGDReference, _cosine, foreach, options, steps)

"""What a configuration means: the learning rate at a step, the optimizer and its options."""

from typing import Any

import pytest
import torch
from tiny_runs import tiny

from signstep.lab.training import models
from signstep.lab.training.gradient_noise import NoisySGD
from signstep.lab.training.recipe import build_optimizer, likely_cause, lr_factor
from signstep.lab.training.swats import SWATS
from signstep.optim import HybridSignSGD, Lion, SignSGD


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, {0.0: 1.0, 0.7: 1.0, 1.0: 1.0}),
        ({"schedule": "cosine"}, {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 1.0: 0.0}),
        (
            {"schedule": "step", "milestones": (0.3, 0.6), "gamma": 0.2},
            {0.0: 1.0, 0.299999: 1.0, 60 / 200: 0.2, 0.5: 0.2, 120 / 200: 0.04, 1.0: 0.04},
        ),
        ({"schedule": "constant", "warmup": 0.1}, {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.5: 1.0}),
        ({"schedule": "cosine", "warmup": 0.5}, {0.25: 0.5 * 0.8535534, 0.5: 0.5}),
    ],
)
def test_lr_factor(changes: dict[str, Any], expected: dict[float, float]) -> None:
    for progress, factor in expected.items():
        assert lr_factor(tiny(**changes), round(3_000_000 * progress), 3_000_000) == pytest.approx(factor, abs=1e-6)


def test_milestones_fall_on_their_epoch() -> None:
    config = tiny(schedule="step", milestones=(0.3, 0.6, 0.8), gamma=0.2, epochs=200)
    steps_per_epoch = 391
    factors = [lr_factor(config, epoch * steps_per_epoch, 200 * steps_per_epoch) for epoch in range(200)]
    drops = [epoch for epoch in range(1, 200) if factors[epoch] < factors[epoch - 1]]
    assert drops == [60, 120, 160]


@pytest.mark.parametrize("total", [7, 10, 18, 468, 469, 470, 78_000])
def test_the_hybrid_switches_where_the_schedule_falls(total: int) -> None:
    """Else SGD would take a step at the rate before the fall."""
    config = tiny(optimizer="hybrid", switch=0.3, schedule="step", milestones=(0.3, 0.6, 0.8), gamma=0.2)
    optimizer = build_optimizer(config, torch.nn.Linear(1, 1), total)
    switch = optimizer.param_groups[0]["switch_step"]
    assert (lr_factor(config, switch - 1, total), lr_factor(config, switch, total)) == (1.0, 0.2)


@pytest.mark.parametrize(
    ("changes", "kind", "options"),
    [
        ({}, torch.optim.SGD, {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0}),
        (
            {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
            torch.optim.SGD,
            {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
        ),
        ({"momentum": 0.0}, torch.optim.SGD, {"momentum": 0.0}),
        ({"optimizer": "adam"}, torch.optim.Adam, {"betas": (0.9, 0.999), "weight_decay": 0.0}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"weight_decay": 0.0}),
        ({"optimizer": "swats"}, SWATS, {"betas": (0.9, 0.999), "eps": 1e-9, "switch_tolerance": 1e-9}),
        ({"optimizer": "swats", "switch_tolerance": 0.1, "weight_decay": 0.2}, SWATS, {"switch_tolerance": 0.1}),
        ({"optimizer": "noisy-sgd", "seed": 5}, NoisySGD, {"momentum": 0.9, "gradient_noise": 0.01, "seed": 5}),
        ({"optimizer": "noisy-sgd", "gradient_noise": 0.3, "momentum": 0.0}, NoisySGD, {"gradient_noise": 0.3}),
        ({"optimizer": "lion", "seed": 5}, Lion, {"betas": (0.9, 0.99), "seed": 5}),
        ({"optimizer": "lion", "betas": [0.95, 0.98], "dither": 0.1}, Lion, {"betas": (0.95, 0.98), "dither": 0.1}),
        ({"optimizer": "signsgd", "seed": 5}, SignSGD, {"momentum": 0.9, "dither": 0.0, "seed": 5}),
        (
            {
                "optimizer": "signsgd",
                "momentum": 0.0,
                "dither": 0.3,
                "dither_decay": 0.0,
                "dither_position": "post",
                "dither_scale": "relative",
                "weight_decay": 0.2,
            },
            SignSGD,
            {
                "momentum": 0.0,
                "dither": 0.3,
                "dither_decay": 0.0,
                "dither_position": "post",
                "dither_scale": "relative",
                "weight_decay": 0.2,
            },
        ),
        ({"optimizer": "signsgd"}, SignSGD, {"state_dtype": None}),
        ({"optimizer": "signsgd", "state_dtype": "float32"}, SignSGD, {"state_dtype": "float32"}),
        ({"optimizer": "signsgd", "state_dtype": "int8"}, SignSGD, {"state_dtype": "int8"}),
        (
            {"optimizer": "hybrid", "switch": 0.5, "state_dtype": "bfloat16"},
            HybridSignSGD,
            {"state_dtype": "bfloat16"},
        ),
        ({"optimizer": "hybrid", "switch": 0.25}, HybridSignSGD, {"switch_step": 25, "calibration": "norm"}),
        (
            {"optimizer": "hybrid", "switch_tolerance": 0.2, "calibration_scope": "group"},
            HybridSignSGD,
            {"switch_step": "auto", "switch_tolerance": 0.2, "calibration_scope": "group"},
        ),
        ({"optimizer": "hybrid", "switch": 1e-9}, HybridSignSGD, {"switch_step": 1}),
        ({"optimizer": "hybrid", "switch": 1.0}, HybridSignSGD, {"switch_step": 100}),
        (
            {"optimizer": "hybrid", "switch": 0.5, "calibration": "ratio", "ema_decay": 0.0, "sgd_momentum": 0.8},
            HybridSignSGD,
            {"switch_step": 50, "calibration": "ratio", "ema_decay": 0.0, "sgd_momentum": 0.8},
        ),
    ],
)
def test_optimizer_options(changes: dict[str, Any], kind: type, options: dict[str, Any]) -> None:
    model = models.build("resnet8", num_classes=10, width=0.25)
    optimizer = build_optimizer(tiny(**changes), model, total_steps=100)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert {name: group[name] for name in options} == options
    assert group["lr"] == 0.01


def test_the_likely_cause_fits_the_optimizer() -> None:
    hybrid = tiny(optimizer="hybrid", switch=0.5)
    assert "calibrated rate" in likely_cause(hybrid, "sgd")
    assert "set calibration" in likely_cause(hybrid, "sgd")
    assert "set calibration" not in likely_cause(tiny(optimizer="swats"), "sgd")
    assert "every weight moves" in likely_cause(hybrid, "sign")
    assert "adam" in likely_cause(tiny(optimizer="adam"), None)

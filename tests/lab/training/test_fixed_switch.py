"""The switch at a chosen rate, against sign steps and SGD written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from signstep.lab.errors import BadInput
from signstep.lab.training.config import RunConfig
from signstep.lab.training.fixed_switch import FixedRateSwitch
from signstep.lab.training.recipe import build_optimizer, likely_cause, lr_factor

CURVATURE = np.array([1.0, 0.1, 3.0])


def trained(optimizer: torch.optim.Optimizer, w: torch.nn.Parameter, factors: list[float], lr: float) -> list[float]:
    for factor in factors:
        optimizer.param_groups[0]["lr"] = lr * factor
        w.grad = torch.tensor(CURVATURE) * w.detach()
        optimizer.step()
    return w.tolist()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("sgd_lr", [None, 0.3])
def test_it_is_signsgd_and_then_torchs_sgd(sgd_lr: float | None, momentum: float) -> None:
    lr, decay, switch, total = 0.01, 0.1, 6, 15
    config = RunConfig(schedule="cosine", warmup=0.1)
    factors = [lr_factor(config, step, total) for step in range(1, total)]
    x, m, b = np.ones(3), np.zeros(3), None
    for step, factor in enumerate(factors):
        g = CURVATURE * x
        x = x - lr * factor * decay * x
        if step < switch:
            m = 0.9 * m + 0.1 * g
            x = x - lr * factor * np.sign(m)
            continue
        # torch's buffer is a sum, and SGD starts from the average of the sign steps.
        b = momentum * (m / (1 - momentum) if b is None else b) + g
        x = x - (lr if sgd_lr is None else sgd_lr) * factor * b
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = FixedRateSwitch(
        [w], lr=lr, sgd_lr=sgd_lr, switch_step=switch, sgd_momentum=momentum, weight_decay=decay
    )
    np.testing.assert_allclose(trained(optimizer, w, factors, lr), x, rtol=1e-12)
    assert optimizer.phase == "sgd"


def test_a_run_that_is_resumed_after_the_switch_keeps_its_rate() -> None:
    factors = [1.0] * 6
    weights = []
    for cut in (None, 2, 4):
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = FixedRateSwitch([w], lr=0.01, sgd_lr=0.2, switch_step=3)
        trained(optimizer, w, factors[:cut], 0.01)
        if cut is not None:
            state = optimizer.state_dict()
            optimizer = FixedRateSwitch([w], lr=0.01, sgd_lr=0.2, switch_step=3)
            optimizer.load_state_dict(state)
            trained(optimizer, w, factors[cut:], 0.01)
        weights.append(w.tolist())
    assert weights[0] == weights[1] == weights[2]


def test_a_run_names_it() -> None:
    config = RunConfig(optimizer="fixed-switch", lr=0.01, switch=0.5, sgd_lr=0.2)
    optimizer = build_optimizer(config, torch.nn.Linear(2, 1), 10)
    assert isinstance(optimizer, FixedRateSwitch)
    assert optimizer.param_groups[0]["switch_step"] == 5
    assert likely_cause(config, "sgd").endswith("the rate 0.2 is too high for SGD after the switch; lower sgd_lr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "hybrid", "switch": 0.5, "sgd_lr": 0.2}, r"sgd_lr=0\.2: optimizer hybrid has no such option"),
        ({"sgd_lr": -1.0, "switch": 0.5}, r"sgd_lr=-1\.0: expected a finite value >= 0"),
        ({"sgd_lr": float("inf"), "switch": 0.5}, "sgd_lr=inf: expected a finite value >= 0"),
        ({}, "switch=None: optimizer fixed-switch needs a share of the steps"),
        ({"switch_tolerance": 0.1, "switch": 0.5}, "optimizer fixed-switch has no such option"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        RunConfig(**{"optimizer": "fixed-switch", "lr": 0.01, **options})


@pytest.mark.parametrize(("lr", "sgd_lr"), [(0.0, 0.1), (0.1, -1.0)])
def test_rates_out_of_range(lr: float, sgd_lr: float) -> None:
    with pytest.raises(ValueError, match="expected a value"):
        FixedRateSwitch([torch.nn.Parameter(torch.ones(1))], lr=lr, sgd_lr=sgd_lr)

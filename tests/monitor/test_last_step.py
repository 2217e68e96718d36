"""What is read from optimizers of all kinds after a step, as the dither meter shows it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from measured import SHAPES, measured, measured_step, parameters, small_gradients
from signstep import Lion
from signstep.monitor.calibration_panel import CalibrationPanel
from signstep.monitor.dither_meter import DitherMeter


def meter_of(params: dict[str, nn.Parameter], **options: Any) -> DitherMeter:
    return DitherMeter({p: name for name, p in params.items()}, **options)


def test_sgd_momentum_as_an_average() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9, dampening=0.2)
    meter = meter_of(params)
    buffer: Tensor | None = None
    for k in range(4):
        g = small_gradients(k)["weight"].double()
        buffer = g if buffer is None else 0.9 * buffer + 0.8 * g
        record = measured_step(meter, optimizer, params, small_gradients(k))
    layer = record["layers"]["weight"]
    assert buffer is not None
    rms = float(buffer.square().mean().sqrt()) * 0.1 / 0.8
    assert layer["rms"] == pytest.approx(rms, rel=1e-5)
    assert layer["matching_alpha"] == pytest.approx(rms**2, rel=1e-5)
    assert layer["random_walk"] is layer["equivalent_lr"] is None
    assert "dither_decay=0.0 would have matched" in record["advice"]


@pytest.mark.parametrize(
    ("make", "beta"),
    [
        (lambda ps: torch.optim.Adam(ps, betas=(0.8, 0.9)), 0.8),
        (lambda ps: torch.optim.AdamW(ps, weight_decay=0.1), 0.9),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), 0.0),
        (lambda ps: torch.optim.Adagrad(ps), 0.0),
        (lambda ps: torch.optim.RMSprop(ps), 0.0),
    ],
    ids=["adam", "adamw", "sgd", "adagrad", "rmsprop"],
)
def test_other_optimizers(make: Any, beta: float) -> None:
    params = parameters()
    optimizer = make(params.values())
    meter = meter_of(params)
    m = torch.zeros(SHAPES["weight"])
    for k in range(3):
        m = beta * m + (1 - beta) * small_gradients(k)["weight"]
        record = measured_step(meter, optimizer, params, small_gradients(k))
    assert record["layers"]["weight"]["rms"] == pytest.approx(float(m.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.5, "decoupled_weight_decay": False}])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.6), (0.0, 0.9)])
def test_lions_average_that_is_not_kept(betas: tuple[float, float], decay: dict[str, Any]) -> None:
    params = parameters()
    optimizer = Lion(params.values(), betas=betas, **decay)
    meter, panel = meter_of(params), CalibrationPanel()
    m = torch.zeros(SHAPES["weight"])
    for k in range(3):
        g = small_gradients(k)["weight"] + decay.get("weight_decay", 0.0) * params["weight"].detach()
        c, m = (torch.lerp(m, g, 1 - beta) for beta in betas)
        panel.before_step(optimizer)
        record = measured_step(meter, optimizer, params, small_gradients(k))
        assert record["layers"]["weight"]["rms"] == pytest.approx(float(c.square().mean().sqrt()), rel=1e-4)
        assert panel.after_step(optimizer)["own_steps"] == k + 1
    optimizer.param_groups[0]["betas"] = (0.9, 0.0)
    assert measured_step(meter, optimizer, params, small_gradients(3))["layers"] == {}


def test_sgd_with_weight_decay_and_maximize_and_no_momentum() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params.values(), lr=0.1, weight_decay=0.5, maximize=True)
    weight = params["weight"].detach().clone()
    record = measured_step(meter_of(params), optimizer, params, small_gradients(0))
    rms = float((-small_gradients(0)["weight"] + 0.5 * weight).square().mean().sqrt())
    assert record["layers"]["weight"]["rms"] == pytest.approx(rms, rel=1e-5)


def test_momentum_that_is_no_average_is_left_out() -> None:
    params = parameters()
    for optimizer in (
        torch.optim.RMSprop(params.values(), momentum=0.9),
        torch.optim.SGD(params.values(), momentum=0.9, dampening=1.0),
    ):
        assert measured_step(meter_of(params), optimizer, params, small_gradients(0))["layers"] == {}


def test_sparse_gradients_are_left_out() -> None:
    table, other = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([table.weight, other], lr=0.1)
    meter = DitherMeter({table.weight: "table", other: "other"})
    (table(torch.tensor([1])).sum() + other.sum()).backward()
    assert list(measured(meter, optimizer)["layers"]) == ["other"]


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_fused_step_under_a_scaler(found: float) -> None:
    """Fused steps of torch divide the gradients by the scale themselves, or find an infinity and do nothing."""
    p = nn.Parameter(torch.ones(16))
    optimizer = torch.optim.SGD([p], lr=0.1, fused=True)
    meter = DitherMeter({p: "p"})
    p.grad = torch.full((16,), 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
    layers = measured(meter, optimizer)["layers"]
    assert layers == {} if found else layers["p"]["rms"] == 2.0


def test_works_on_anything_with_param_groups() -> None:
    """An optimizer of another library: its state says what it keeps."""
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer: Any = SimpleNamespace(
        param_groups=[{"params": [p], "lr": 0.1, "betas": (0.9, 0.99)}], state={p: {"exp_avg": torch.full((4,), 0.5)}}
    )
    meter = DitherMeter({p: "p"})
    meter.before_step(optimizer)
    assert meter.after_step(optimizer)["layers"]["p"]["rms"] == 0.5

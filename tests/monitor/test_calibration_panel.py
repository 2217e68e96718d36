"""The calibration panel against the rules in float64 numpy, against HybridSignSGD itself, and against laws."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtr
from torch import nn

import references
from measured import SHAPES, give, measured, measured_step, parameters, small_gradients
from signstep import HybridSignSGD, SignSGD
from signstep.distributed.simulation import SimulatedVote
from signstep.monitor.calibration_panel import DECAY, RATE_RULES, CalibrationPanel, wilson

Array = npt.NDArray[np.float64]


class CalibrationReference:
    """The docstring's five rules on the steps of `references.SignSGDReference`, with E the corrected average."""

    def __init__(self, steps: references.SignSGDReference) -> None:
        self.steps = steps
        self.history: list[dict[str, float]] = []

    def step(self, gradients: list[Array], lr: float) -> None:
        steps = self.steps
        g = np.concatenate([x.ravel() for x in steps.gradients(gradients)])
        lagged = np.concatenate([np.sign(m).ravel() for m in steps.m])
        steps.lr = lr
        steps.step(gradients)
        m = np.concatenate([x.ravel() for x in (steps.m if steps.beta else steps.gradients(gradients))])
        s = expected = np.sign(m)
        if steps.alpha > 0 and steps.position != "post":
            sigma = np.concatenate([np.full(x.size, v) for x, v in zip(steps.m, steps.sigmas, strict=True)])
            with np.errstate(divide="ignore", invalid="ignore"):
                z = m / sigma
                mean = np.clip(z / np.sqrt(3), -1, 1) if steps.law == "uniform" else 2 * ndtr(z) - 1
                expected = np.where(sigma > 0, mean, s)
        self.lr = lr
        self.history.append(
            {"inner": s @ g, "applied": expected @ g, "lagged": lagged @ g, "square": g @ g, "length": s @ s, "lr": lr}
        )

    def average(self, name: str, first: int = 0) -> float:
        terms = [entry[name] for entry in self.history[first:]]
        weights = [DECAY ** (len(terms) - 1 - i) for i in range(len(terms))]
        return float(np.dot(weights, terms) / np.sum(weights))

    def rules(self) -> dict[str, float | None]:
        inner, square = self.average("inner"), self.average("square") + 1e-8
        for entry in self.history:
            entry["paper"] = entry["lr"] * abs(entry["inner"]) / (entry["square"] + 1e-8)
        lagged = self.average("lagged", 1) if len(self.history) > 1 and self.steps.beta else None  # m_0 is no momentum
        return {
            "paper": self.average("paper"),
            "ratio": self.lr * max(0.0, inner) / square,
            "applied": self.lr * max(0.0, self.average("applied")) / square,
            "lagged": None if lagged is None else self.lr * max(0.0, lagged) / square,
            "swats": self.lr * self.average("length") / inner if inner > 0 else None,
        }


def _approx(values: dict[str, float | None], rel: float = 1e-4) -> dict[str, Any]:
    return {name: None if x is None else pytest.approx(x, rel=rel, abs=1e-12) for name, x in values.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "clean": {},
    "dithered": {"dither": 1e-4},
    "relative": {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"},
    "post": {"dither": 0.1, "dither_position": "post"},
    "uniform": {"dither": 1e-4, "dither_law": "uniform"},
    "expected": {"dither": 1e-4, "dither_position": "expected"},
    "no momentum": {"momentum": 0.0, "dither": 1e-4},
    "maximize": {"maximize": True},
    "coupled decay": {"weight_decay": 0.05, "decoupled_weight_decay": False},
    "decoupled decay": {"weight_decay": 0.05},
}


@pytest.mark.parametrize("drift", [0.3, 0.0, -0.2])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_rule_is_its_formula(case: str, drift: float) -> None:
    """On a trajectory with a learning rate that changes, at this step and on average."""
    options = {"lr": 2e-3, "momentum": 0.9, "seed": 3} | OPTIONS[case]
    params = parameters()
    optimizer = SignSGD(params.values(), **options)
    steps = references.SignSGDReference([p.detach().double().numpy() for p in params.values()], **options)
    reference = CalibrationReference(steps)
    panel = CalibrationPanel({p: n for n, p in params.items()})
    for k in range(12):
        lr = 2e-3 * (1 + 0.5 * math.sin(k))
        optimizer.param_groups[0]["lr"] = lr
        gradients = small_gradients(k, drift=drift)
        record = measured_step(panel, optimizer, params, gradients)
        reference.step([g.double().numpy() for g in gradients.values()], lr)
        assert record["average"] == _approx(reference.rules())
        assert record["groups"][0] == {"lr": lr} | record["average"]
        alone = CalibrationReference(steps)
        alone.history, alone.lr = [dict(reference.history[-1])], lr
        now, expected = record["now"], alone.rules()
        assert {n: now[n] for n in RATE_RULES if n != "lagged"} == _approx(
            {n: expected[n] for n in RATE_RULES if n != "lagged"}
        )
        last = reference.history[-1]
        cosine = last["inner"] / math.sqrt(last["length"] * last["square"])
        assert record["cosine"] == pytest.approx(cosine, rel=1e-4, abs=1e-7)
        if now["swats"] is not None:
            assert now["ratio"] / now["swats"] == pytest.approx(cosine**2, rel=1e-3)
    negatives = sum(entry["inner"] < 0 for entry in reference.history)
    assert record["negative"] == pytest.approx([negatives / 12, *wilson(negatives, 12)])


@pytest.mark.parametrize("rule", ["paper", "ratio", "applied"])
@pytest.mark.parametrize("options", [{}, {"dither": 1e-4}, {"weight_decay": 0.1, "decoupled_weight_decay": False}])
def test_the_average_over_every_step_is_the_optimizers(rule: str, options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = HybridSignSGD(params.values(), lr=1e-3, ema_decay=DECAY, calibration=rule, **options)
    panel = CalibrationPanel()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.3)
    for k in range(15):
        record = measured_step(panel, optimizer, params, small_gradients(k))
        # Eq. (12)'s average starts at 0 and is not corrected for it.
        start = 1 - DECAY ** (k + 1) if rule == "paper" else 1.0
        assert record["average"][rule] * start == pytest.approx(optimizer.calibrated_lr, rel=1e-4)
        assert record["groups"][0]["calibrated_lr"] == optimizer.calibrated_lr
        scheduler.step()


def test_several_groups_have_their_own_rates_and_one_for_all() -> None:
    params = parameters()
    groups = [{"params": [params["weight"]]}, {"params": [params["bias"], params["scale"]], "lr": 5e-2}]
    optimizer = HybridSignSGD(groups, lr=1e-3, ema_decay=DECAY, calibration="ratio")
    panel = CalibrationPanel({p: n for n, p in params.items()})
    for k in range(6):
        gradients = small_gradients(k) if k != 3 else {"weight": small_gradients(k)["weight"]}
        record = measured_step(panel, optimizer, params, gradients)
    rates = optimizer.calibrated_lr
    assert [g["ratio"] for g in record["groups"]] == pytest.approx(rates, rel=1e-4)
    assert min(rates) < record["average"]["ratio"] < max(rates)
    # This step's rate for all: the projection of the whole step, with each group's lr, on the whole gradient.
    step, g = [], []
    for name, p in params.items():
        step.append((5e-2 if name != "weight" else 1e-3) * optimizer.state[p]["exp_avg"].sign().flatten())
        g.append(gradients[name].flatten())
    s, flat = torch.cat(step).double(), torch.cat(g).double()
    assert record["now"]["ratio"] == pytest.approx(float(s @ flat / (flat @ flat + 1e-8)), rel=1e-4)
    assert record["now"]["swats"] == pytest.approx(float(s @ s / (s @ flat)), rel=1e-4)
    assert record["cosine"] == pytest.approx(float(s @ flat / s.norm() / flat.norm()), rel=1e-4)
    assert set(record["layers"]) == set(SHAPES)


def test_layers() -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), lr=1e-3)
    panel = CalibrationPanel({params["bias"]: "bias"})
    measured_step(panel, optimizer, params, small_gradients(0))
    before = optimizer.state[params["bias"]]["exp_avg"].clone().sign()
    record = measured_step(panel, optimizer, params, small_gradients(1))
    g, s = small_gradients(1)["bias"], optimizer.state[params["bias"]]["exp_avg"].sign()
    assert list(record["layers"]) == ["bias"]
    layer = record["layers"]["bias"]
    assert layer["cosine"] == pytest.approx(float(s @ g / s.norm() / g.norm()), rel=1e-5)
    assert layer["lagged_cosine"] == pytest.approx(float(before @ g / before.norm() / g.norm()), rel=1e-5)
    assert layer["ratio"] == pytest.approx(float(1e-3 * (s @ g) / (g @ g)), rel=1e-4)


def test_noise_without_signal_by_the_law_of_the_docstring() -> None:
    """Ratio: delta sqrt(2/pi) sqrt(1 - beta^2) / rms(g); lagged: 0. By 4 standard errors of d = 50 000 coordinates."""
    beta, rms, size = 0.9, 0.02, 50_000
    p = nn.Parameter(torch.zeros(size))
    optimizer = SignSGD([p], lr=1e-3, momentum=beta)
    panel = CalibrationPanel()
    generator = torch.Generator().manual_seed(0)
    cosines, lagged = [], []
    for _ in range(60):
        p.grad = rms * torch.randn(size, generator=generator)
        record = measured(panel, optimizer)
        cosines.append(record["cosine"])
        lagged.append(record["lagged_cosine"])
    law = math.sqrt(2 / math.pi) * math.sqrt(1 - beta**2)
    assert abs(np.mean(cosines[30:]) - law) < 4 / math.sqrt(30 * size)
    assert abs(np.mean(lagged[30:])) < 4 / math.sqrt(30 * size)
    assert record["now"]["ratio"] == pytest.approx(1e-3 * law / rms, rel=0.05)
    assert record["average"]["lagged"] < 0.02 * record["average"]["ratio"]
    assert "most of the rate is the gradient's noise" in record["advice"]


def test_advice_on_the_start_of_the_papers_average() -> None:
    params = parameters()
    optimizer = HybridSignSGD(params.values(), lr=1e-3, calibration="paper")
    panel = CalibrationPanel()
    for _ in range(8):
        record = measured_step(panel, optimizer, params, small_gradients(0))
    assert optimizer.calibrated_lr == pytest.approx((1 - 0.99**8) * record["average"]["paper"], rel=1e-4)
    assert "starts at 0, and has come to 8% of the rate" in record["advice"]


def test_a_steady_gradient_needs_no_caution() -> None:
    params = parameters()
    optimizer = HybridSignSGD(params.values(), lr=1e-3, calibration="ratio")
    panel = CalibrationPanel()
    for _ in range(8):
        record = measured_step(panel, optimizer, params, small_gradients(0))
    said = f"calibration: switch() now would go on with SGD at lr {optimizer.calibrated_lr:.3g} (rule 'ratio')"
    assert record["advice"].startswith(said)
    assert ";" not in record["advice"]
    assert record["average"]["lagged"] == pytest.approx(record["average"]["ratio"], rel=1e-5)


def test_advice_on_the_absolute_value_and_on_dither() -> None:
    """Every fifth gradient points the other way: 0.8 - 0.2 = 0.6 signed, 1 by absolute values."""
    p = nn.Parameter(torch.zeros(40))
    optimizer = HybridSignSGD([p], lr=1e-3, calibration="paper", momentum=0.99, dither=1.0, dither_decay=0.0)
    panel = CalibrationPanel()
    for k in range(100):
        p.grad = torch.full((40,), 1.0 if k % 5 != 2 else -1.0)
        record = measured(panel, optimizer)
    average = record["average"]
    assert average["paper"] == pytest.approx(1e-3, rel=1e-5)
    assert average["ratio"] == pytest.approx(0.6e-3, rel=0.2)
    assert f"times lower, {average['ratio']:.3g}: calibration='ratio'" in record["advice"]
    assert f"the dithered step is worth {average['applied']:.3g} only: calibration='applied'" in record["advice"]


def test_advice_where_steps_point_uphill() -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), momentum=0.99)
    panel = CalibrationPanel()
    for k in range(12):  # the gradient turns, and the momentum does not
        turned = {n: (1 if k == 0 else -0.01) * g for n, g in small_gradients(0).items()}
        record = measured_step(panel, optimizer, params, turned)
    assert record["negative"][0] > 0.9
    assert record["now"]["ratio"] == 0
    assert record["now"]["swats"] is None
    assert record["now"]["paper"] > 0
    assert "uphill" in record["advice"]


@given(st.integers(0, 60), st.integers(0, 60))
def test_wilsons_interval_is_scipys(times: int, more: int) -> None:
    of = times + more
    if of == 0:
        assert wilson(times, of) is None
        return
    expected = stats.binomtest(times, of).proportion_ci(0.95, method="wilson")
    assert wilson(times, of) == pytest.approx((expected.low, expected.high), abs=1e-9)


# Other ways to step


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_other_optimizers_by_the_sign_of_their_momentum(make: Any, decay: float) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if make is torch.optim.SGD else {}
    params = parameters()
    optimizer = make(params.values(), lr=0.01, weight_decay=decay, **options)
    panel = CalibrationPanel()
    m, lagged = None, None
    for k in range(4):
        g = torch.cat([x.flatten().double() for x in small_gradients(k).values()])
        if decay and make is not torch.optim.AdamW:
            g = g + decay * torch.cat([p.detach().flatten().double() for p in params.values()])
        lagged = m
        weight = 1.0 if make is torch.optim.SGD else 0.1
        m = weight * g if m is None else 0.9 * m + weight * g
        record = measured_step(panel, optimizer, params, small_gradients(k))
    assert lagged is not None
    assert record["now"]["ratio"] == pytest.approx(float(0.01 * m.sign() @ g / (g @ g)), rel=1e-3)
    cosine = float(lagged.sign() @ g / lagged.sign().norm() / g.norm())
    assert record["lagged_cosine"] == pytest.approx(cosine, abs=1e-4)
    assert "sign steps along its momentum are at lr 0.01" in record["advice"]


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8])
def test_momentum_in_fewer_bits(state_dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = HybridSignSGD([p], calibration="ratio", ema_decay=DECAY, state_dtype=state_dtype)
    panel = CalibrationPanel()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
        record = measured(panel, optimizer)
    assert record["average"]["ratio"] == pytest.approx(optimizer.calibrated_lr, rel=0.02)


def test_complex_parameters() -> None:
    z = nn.Parameter(torch.zeros(50, dtype=torch.complex64))
    optimizer = HybridSignSGD([z], calibration="ratio", ema_decay=DECAY)
    panel = CalibrationPanel()
    for k in range(5):
        z.grad = torch.randn(50, dtype=torch.complex64, generator=torch.Generator().manual_seed(k)).conj()
        record = measured(panel, optimizer)
    assert record["average"]["ratio"] == pytest.approx(optimizer.calibrated_lr, rel=1e-4)


@pytest.mark.parametrize("sgd_momentum", [0.0, 0.5])
def test_after_the_switch(sgd_momentum: float) -> None:
    params = parameters()
    optimizer = HybridSignSGD(params.values(), switch_step=4, calibration="paper", sgd_momentum=sgd_momentum)
    panel = CalibrationPanel()
    records = [measured_step(panel, optimizer, params, small_gradients(k)) for k in range(6)]
    # On the step that switches, the momentum is there only if SGD goes on with it.
    assert [r["own_steps"] for r in records] == [1, 2, 3, 3 + bool(sgd_momentum), *[3 + bool(sgd_momentum)] * 2]
    assert records[-1]["now"] == dict.fromkeys(RATE_RULES)
    assert records[-1]["groups"][0]["phase"] == "sgd"
    assert records[-1]["advice"].startswith("calibration: in the SGD phase, at lr ")
    rate = float(optimizer.param_groups[0]["lr_ratio"]) * 1e-3
    assert f"at lr {rate:.3g}" in records[-1]["advice"]


def test_a_closure_and_capturable() -> None:
    params = parameters()
    optimizer = HybridSignSGD(params.values(), calibration="ratio", ema_decay=DECAY, capturable=True)
    panel = CalibrationPanel()

    def closure() -> float:
        for name, g in small_gradients(int(optimizer.param_groups[0]["step"])).items():
            params[name].grad = g
        return 0.0

    for _ in range(3):
        for p in params.values():
            p.grad = None
        record = measured(panel, optimizer, closure)
    assert record["average"]["ratio"] == pytest.approx(optimizer.calibrated_lr, rel=1e-4)
    assert record["own_steps"] == 3


def test_steps_that_are_not_measured_are_not_averaged() -> None:
    params = parameters()
    optimizer = HybridSignSGD(params.values(), calibration="ratio", ema_decay=0.0)
    panel = CalibrationPanel()
    for k in range(9):
        if k % 4:
            give(params, small_gradients(k))
            optimizer.step()
        else:
            record = measured_step(panel, optimizer, params, small_gradients(k))
            assert record["now"]["ratio"] == pytest.approx(optimizer.calibrated_lr, rel=1e-4)
    assert record["own_steps"] == 3


def test_state_goes_through_json_and_on() -> None:
    runs = []
    for saved in (False, True):
        params = parameters()
        optimizer = SignSGD(params.values())
        panel = CalibrationPanel()
        for k in range(8):
            record = measured_step(panel, optimizer, params, small_gradients(k))
            if saved and k == 4:
                state = json.loads(json.dumps(panel.state_dict()))
                panel = CalibrationPanel()
                panel.load_state_dict(state)
        runs.append(record)
    assert runs[0] == runs[1]


def test_measuring_changes_nothing() -> None:
    ends = []
    for watched in (False, True):
        params = parameters()
        optimizer = HybridSignSGD(params.values(), dither=1.0, dither_scale="relative", weight_decay=0.1)
        panel = CalibrationPanel()
        for k in range(4):
            give(params, small_gradients(k))
            if watched:
                measured(panel, optimizer)
            else:
                optimizer.step()
        assert all(torch.equal(p.grad, small_gradients(3)[n]) for n, p in params.items())
        ends.append(([p.detach() for p in params.values()], optimizer.calibrated_lr))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert ends[0][1] == ends[1][1]


# Under a vote


def test_under_a_vote_the_hybrids_sums_are_taken() -> None:
    model = nn.Linear(5, 7)
    optimizer = HybridSignSGD(model.parameters(), calibration="ratio", ema_decay=DECAY)
    vote = SimulatedVote(model, optimizer, 3)
    panel = CalibrationPanel({p: n for n, p in model.named_parameters()})
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        vote.vote([{n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}] * 3)
        record = measured(panel, optimizer)
    assert record["average"]["ratio"] == pytest.approx(optimizer.calibrated_lr, rel=1e-4)
    assert record["average"]["applied"] == record["average"]["ratio"]
    assert record["average"]["lagged"] is None
    assert 0 < record["cosine"] <= 1
    assert record["layers"] == {}


def test_under_a_vote_of_plain_signsgd_there_is_nothing() -> None:
    model = nn.Linear(5, 7)
    optimizer = SignSGD(model.parameters())
    vote = SimulatedVote(model, optimizer, 1)
    panel = CalibrationPanel()
    vote.vote([{n: torch.ones_like(p) for n, p in model.named_parameters()}])
    record = measured(panel, optimizer)
    assert record["own_steps"] == 0
    assert "gone after a vote" in record["advice"]


# Never NaN


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e30, 1e-30])
@pytest.mark.parametrize("case", OPTIONS)
def test_no_nan_in_a_record_and_none_is_averaged(case: str, value: float) -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), **OPTIONS[case])
    panel = CalibrationPanel({p: n for n, p in params.items()})
    measured_step(panel, optimizer, params, small_gradients(0))
    bad = {n: torch.full(s, value) for n, s in SHAPES.items()}
    record = measured_step(panel, optimizer, params, bad)
    if not math.isfinite(value):
        assert record["own_steps"] == 1
        assert record["now"] == dict.fromkeys(RATE_RULES)
        assert record["average"]["ratio"] is not None
    fresh = CalibrationPanel()
    record = measured_step(fresh, optimizer, params, bad)
    assert record["advice"]
    if not math.isfinite(value):
        assert "not finite" in record["advice"]


def test_no_gradients_and_lr_0() -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), lr=0.0)
    panel = CalibrationPanel()
    assert "of no parameter that has moved" in measured_step(panel, optimizer, params, {})["advice"]
    for k in range(7):
        record = measured_step(panel, optimizer, params, small_gradients(k))
    assert record["average"]["ratio"] == 0
    assert record["cosine"] is None


def test_after_without_before() -> None:
    with pytest.raises(RuntimeError, match="without before_step"):
        CalibrationPanel().after_step(SignSGD([nn.Parameter(torch.zeros(1))]))

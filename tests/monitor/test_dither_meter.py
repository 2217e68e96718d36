"""The dither meter against the paper in float64 numpy, on real optimizers, and what it says of them."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr
from torch import nn

import references
from measured import SHAPES, give, measured, measured_step, parameters, small_gradients
from signstep import HybridSignSGD, SignSGD
from signstep.distributed.simulation import SimulatedVote
from signstep.monitor.dither_meter import DitherMeter
from signstep.theory.vote import linear_slope


def meter_of(params: dict[str, nn.Parameter], **options: Any) -> DitherMeter:
    return DitherMeter({p: name for name, p in params.items()}, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "absolute": {"dither": 1e-4},
    "no decay": {"dither": 1e-4, "dither_decay": 0.0},
    "relative": {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"},
    "relative, decaying": {"dither": 4.0, "dither_scale": "relative"},
    "clean": {},
    "post": {"dither": 0.1, "dither_position": "post"},
    "uniform": {"dither": 1e-4, "dither_law": "uniform"},
    "expected": {"dither": 1e-4, "dither_position": "expected"},
    "no momentum": {"dither": 1e-4, "momentum": 0.0},
    "no momentum, relative": {"dither": 1.0, "momentum": 0.0, "dither_scale": "relative"},
    "maximize": {"dither": 1e-4, "momentum": 0.0, "maximize": True},
    "coupled decay": {"dither": 1e-4, "momentum": 0.0, "weight_decay": 0.01, "decoupled_weight_decay": False},
    "coupled decay, momentum": {"dither": 1e-4, "weight_decay": 0.01, "decoupled_weight_decay": False},
    "decoupled decay": {"dither": 1e-4, "momentum": 0.0, "weight_decay": 0.01},
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_number_is_the_papers(case: str, fused: bool | None) -> None:
    options = {"lr": 2e-3, "momentum": 0.9, "seed": 3} | OPTIONS[case]
    params = parameters()
    optimizer = SignSGD(params.values(), fused=fused, **options)
    reference = references.SignSGDReference([p.detach().double().numpy() for p in params.values()], **options)
    meter = meter_of(params)
    for k in range(5):
        gradients = small_gradients(k)
        record = measured_step(meter, optimizer, params, gradients)
        reference.step([g.double().numpy() for g in gradients.values()])
        assert list(record["layers"]) == list(SHAPES)
        for name, m, sigma, x in zip(SHAPES, reference.m, reference.sigmas, reference.x, strict=True):
            layer = record["layers"][name]
            rms = float(np.sqrt(np.mean(m**2)))
            assert layer["rms"] == pytest.approx(rms, rel=1e-4)
            assert layer["weight_rms"] == pytest.approx(float(np.sqrt(np.mean(x**2))), rel=1e-4)
            if "dither" not in OPTIONS[case]:
                assert layer["sigma"] == 0
                assert layer["ratio"] is layer["linear_share"] is layer["equivalent_lr"] is None
                assert layer["matching_alpha"] == pytest.approx(rms**2 * (1 + k) ** 0.55, rel=1e-4)
                continue
            assert layer["sigma"] == pytest.approx(sigma, rel=1e-4)
            if case == "post":
                assert layer["ratio"] is layer["linear_share"] is layer["matching_alpha"] is None
                assert layer["random_walk"] == pytest.approx(2e-3 * math.sqrt(k + 1) * sigma, rel=1e-4)
                continue
            if case == "expected":
                assert layer["random_walk"] is None
            else:
                assert layer["random_walk"] == pytest.approx(2e-3 * math.sqrt(k + 1))
            if sigma == 0:  # the first step of relative dither
                assert layer["ratio"] is layer["matching_alpha"] is None
                continue
            assert layer["ratio"] == pytest.approx(rms / sigma, rel=1e-4)
            reach, slope = (math.sqrt(3), 1 / math.sqrt(3)) if case == "uniform" else (0.5, math.sqrt(2 / math.pi))
            assert layer["linear_share"] == pytest.approx(float(np.mean(np.abs(m) < sigma * reach)))
            assert layer["equivalent_lr"] == pytest.approx(2e-3 * slope / sigma, rel=1e-4)
        sizes = [m.size for m in reference.m]
        squares = np.concatenate([m.ravel() ** 2 for m in reference.m])
        assert record["rms"] == pytest.approx(float(np.sqrt(squares.mean())), rel=1e-4)
        if record["ratio"] is not None:
            variance = np.dot(sizes, np.square(reference.sigmas)) / sum(sizes)
            assert record["sigma"] == pytest.approx(float(np.sqrt(variance)), rel=1e-4)
            assert record["ratio"] == pytest.approx(record["rms"] / record["sigma"], rel=1e-6)


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_matching_alpha_matches(scale: str) -> None:
    """The dither that it names would have made rms(m) / sigma 1 at the very step."""
    params = parameters()
    optimizer = SignSGD(params.values(), dither=1.0, dither_scale=scale)
    for k in range(20):
        give(params, small_gradients(k))
        optimizer.step()
    again, saved = parameters(), copy.deepcopy(optimizer.state_dict())
    for p, q in zip(again.values(), params.values(), strict=True):
        p.data.copy_(q.data)
    found = measured_step(meter_of(params), optimizer, params, small_gradients(20))["layers"]["weight"]
    matched = SignSGD(again.values(), dither=1.0, dither_scale=scale)
    matched.load_state_dict(saved)
    matched.param_groups[0]["dither"] = found["matching_alpha"]
    record = measured_step(meter_of(again), matched, again, small_gradients(20))
    assert record["layers"]["weight"]["ratio"] == pytest.approx(1.0, rel=1e-4)


def test_matching_alpha_of_an_undithered_run_matches() -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), dither_decay=0.7)
    for k in range(20):
        give(params, small_gradients(k))
        optimizer.step()
    alpha = measured_step(meter_of(params), optimizer, params, small_gradients(20))["layers"]["weight"][
        "matching_alpha"
    ]
    rms = float(optimizer.state[params["weight"]]["exp_avg"].square().mean().sqrt())
    assert math.sqrt(alpha * 21**-0.7) == pytest.approx(rms, rel=1e-5)


@given(st.floats(0.05, 3), st.integers(0, 2**31))
def test_equivalent_lr_is_the_mean_of_real_steps_where_it_is_linear(ratio: float, seed: int) -> None:
    """E step = delta (2 Phi - 1), which equivalent_lr m overestimates by at most 4.2 % below sigma / 2."""
    size, sigma = 200_000, 0.2
    p = nn.Parameter(torch.zeros(size))
    optimizer = SignSGD([p], lr=1.0, momentum=0.0, dither=sigma**2, dither_decay=0.0, seed=seed)
    m = ratio * sigma / 2
    p.grad = torch.full((size,), m)
    meter = DitherMeter({})
    record = measured(meter, optimizer)["layers"]["parameter 0"]
    moved = -float(p.detach().mean())
    error = 4 / math.sqrt(size)
    assert abs(moved - (2 * ndtr(m / sigma) - 1)) < error
    assert record["linear_share"] == (1 if ratio < 1 else 0)
    if ratio < 1:
        assert moved - error < record["equivalent_lr"] * m < moved * 1.0425 + error


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_momentum_in_fewer_bits(state_dtype: torch.dtype, scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    records = []
    for dtype in (None, state_dtype):
        p = nn.Parameter(torch.zeros(64, 128))
        optimizer = SignSGD([p], dither=1e-4 if scale == "absolute" else 1.0, dither_scale=scale, state_dtype=dtype)
        generator.manual_seed(0)
        meter = DitherMeter({p: "p"})
        for _ in range(12):
            p.grad = 0.01 * torch.randn(p.shape, generator=generator)
            record = measured(meter, optimizer)
        records.append(record["layers"]["p"])
    plain, rounded = records
    for name in ("rms", "sigma", "ratio", "linear_share"):
        assert rounded[name] == pytest.approx(plain[name], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_parameters(dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    optimizer = SignSGD(params.values(), dither=1e-4)
    record = measured_step(meter_of(params), optimizer, params, small_gradients(0))
    expected = 0.1 * small_gradients(0)["weight"].double().square().mean().sqrt()
    assert record["layers"]["weight"]["rms"] == pytest.approx(float(expected), rel=0.01)


def test_small_gradients_are_not_lost_in_squares() -> None:
    params = parameters()
    optimizer = SignSGD(params.values())
    record = measured_step(meter_of(params), optimizer, params, small_gradients(0, scale=1e-15))
    assert record["layers"]["weight"]["rms"] > 1e-17


def test_complex_parameters_are_two_real_coordinates() -> None:
    z = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    z.grad = torch.tensor([3 + 4j, 0, 0, 0], dtype=torch.complex64).conj()
    optimizer = SignSGD([z], momentum=0.0, dither=64.0, dither_decay=0.0)
    meter = DitherMeter({z: "z"})
    layer = measured(meter, optimizer)["layers"]["z"]
    assert layer["rms"] == pytest.approx(math.sqrt(25 / 8))
    assert layer["linear_share"] == 7 / 8  # 4 is not below 8 / 2
    assert layer["sigma"] == pytest.approx(8.0)
    assert layer["weight_rms"] > 0


def test_several_groups_with_their_own_options_and_counts() -> None:
    params = parameters()
    groups = [
        {"params": [params["weight"]], "dither": 1e-4, "lr": 1e-2},
        {"params": [params["bias"]], "dither": 4.0, "dither_scale": "relative", "dither_decay": 0.0},
        {"params": [params["scale"]]},
    ]
    optimizer = SignSGD(groups, lr=1e-3)
    give(params, small_gradients(0))
    optimizer.step()
    give(params, {"bias": small_gradients(1)["bias"]})
    optimizer.step()
    before = float(optimizer.state[params["bias"]]["exp_avg"].square().mean().sqrt())
    layers = measured_step(meter_of(params), optimizer, params, small_gradients(2))["layers"]
    assert layers["weight"]["sigma"] == pytest.approx(math.sqrt(1e-4 * 2**-0.55))  # its second step
    assert layers["weight"]["random_walk"] == pytest.approx(1e-2 * math.sqrt(2))
    assert layers["bias"]["sigma"] == pytest.approx(2 * before)
    assert layers["bias"]["random_walk"] == pytest.approx(1e-3 * math.sqrt(3))
    assert layers["scale"]["sigma"] == 0


def test_only_what_has_moved_is_measured() -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), dither=1e-4)
    record = measured_step(meter_of(params), optimizer, params, {"bias": small_gradients(0)["bias"]})
    assert list(record["layers"]) == ["bias"]
    record = measured_step(meter_of(params), optimizer, params, {})
    assert record["layers"] == {}
    assert record["rms"] is None
    assert "no parameter has moved" in record["advice"]


def test_tied_and_unnamed_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

    model, other = Tied(), nn.Parameter(torch.zeros(2))
    optimizer = SignSGD([*model.parameters(), other], dither=1e-4)
    meter = DitherMeter({p: n for n, p in model.named_parameters()})
    model.two(model.one(torch.ones(2, 4))).sum().backward()
    other.grad = torch.ones(2)
    assert list(measured(meter, optimizer)["layers"]) == ["one.weight", "parameter 1"]


def test_capturable_and_tensor_lr() -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), lr=torch.tensor(2e-3), dither=1e-4, capturable=True)
    record = measured_step(meter_of(params), optimizer, params, small_gradients(0))
    assert record["layers"]["weight"]["equivalent_lr"] == pytest.approx(2e-3 * math.sqrt(2 / math.pi) / 0.01, rel=1e-5)


def test_a_closure_makes_the_gradients_inside_the_step() -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), dither=1e-4, momentum=0.0)
    meter = meter_of(params)

    def closure() -> float:
        for name, g in small_gradients(0).items():
            params[name].grad = g
        return 0.0

    record = measured(meter, optimizer, closure)
    whole = torch.cat([g.flatten() for g in small_gradients(0).values()])
    assert record["rms"] == pytest.approx(float(whole.square().mean().sqrt()))


def test_measuring_changes_nothing() -> None:
    runs = []
    for watched in (False, True):
        params = parameters()
        optimizer = SignSGD(params.values(), dither=1.0, dither_scale="relative", state_dtype=torch.int8)
        meter = meter_of(params)
        for k in range(4):
            give(params, small_gradients(k))
            if watched:
                measured(meter, optimizer)
            else:
                optimizer.step()
        runs.append((params, optimizer))
    (one, first), (two, second) = runs
    assert all(torch.equal(one[n], two[n]) for n in SHAPES)
    for name in SHAPES:
        for key, value in first.state[one[name]].items():
            assert torch.equal(value, second.state[two[name]][key])


# HybridSignSGD and votes


@pytest.mark.parametrize("sgd_momentum", [0.0, 0.5])
def test_the_switch(sgd_momentum: float) -> None:
    params = parameters()
    optimizer = HybridSignSGD(params.values(), switch_step=3, dither=1e-4, sgd_momentum=sgd_momentum)
    meter = meter_of(params)
    records = [measured_step(meter, optimizer, params, small_gradients(k)) for k in range(5)]
    assert records[1]["dithered"] == 3
    assert len(records[2]["layers"]) == (3 if sgd_momentum else 0)  # else freed at the switch
    assert records[3]["dithered"] == 0
    assert records[3]["layers"]["weight"]["random_walk"] is None
    assert records[3]["advice"] == "dither: off in the SGD phase"
    g = float(small_gradients(4)["weight"].square().mean().sqrt())
    if not sgd_momentum:
        assert records[4]["layers"]["weight"]["rms"] == pytest.approx(g, rel=1e-5)


@pytest.mark.parametrize("dither_workers", ["independent", "scaled"])
def test_under_a_vote_the_momentum_is_the_workers(dither_workers: str) -> None:
    model = nn.Linear(5, 7)
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1e-2, dither_decay=0.0)
    vote = SimulatedVote(model, optimizer, 3, dither_workers=dither_workers)
    names = {p: n for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    g = [{n: 0.1 * torch.randn(p.shape, generator=generator) for p, n in names.items()} for _ in range(3)]
    blind, meter = DitherMeter(names), DitherMeter(names, worker=vote.workers[1])
    vote.vote(g)
    for each in (blind, meter):
        each.before_step(optimizer)
    optimizer.step()
    record = meter.after_step(optimizer)
    json.dumps(record, allow_nan=False)
    layer, m = record["layers"]["weight"], 0.1 * g[1]["weight"]
    sigma = 0.1 * (math.sqrt(3) if dither_workers == "scaled" else 1)
    assert layer["rms"] == pytest.approx(float(m.square().mean().sqrt()), rel=1e-5)
    assert layer["sigma"] == pytest.approx(sigma, rel=1e-5)
    assert layer["equivalent_lr"] == pytest.approx(1e-3 * linear_slope(3) / sigma, rel=1e-5)
    narrower = sigma / 2 * linear_slope(1) / linear_slope(3)
    assert layer["linear_share"] == pytest.approx(float((m.abs() < narrower).double().mean()))
    without = blind.after_step(optimizer)
    assert without["layers"] == {}
    assert "on the workers' side of a vote" in without["advice"]


def test_a_vote_without_momentum() -> None:
    model = nn.Linear(5, 7)
    optimizer = SignSGD(model.parameters(), momentum=0.0)
    vote = SimulatedVote(model, optimizer, 1)
    meter = DitherMeter({}, worker=vote.workers[0])
    vote.vote([{n: torch.ones_like(p) for n, p in model.named_parameters()}])
    assert "vote without momentum" in measured(meter, optimizer)["advice"]


# Never NaN, and what it says


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e30, 1e-40])
@pytest.mark.parametrize("case", OPTIONS)
def test_no_nan_in_a_record(case: str, value: float) -> None:
    params = parameters()
    optimizer = SignSGD(params.values(), **OPTIONS[case])
    meter = meter_of(params)
    for k in range(3):
        gradients = small_gradients(k)
        gradients["weight"] = torch.full(SHAPES["weight"], value)
        measured_step(meter, optimizer, params, gradients)
    gradients = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    for p in params.values():
        optimizer.state.pop(p, None)
    assert measured_step(meter, optimizer, params, gradients)["advice"]


def test_empty_parameters_and_lr_0() -> None:
    p, q = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(3))
    optimizer = SignSGD([p, q], lr=0.0, dither=1e-4)
    meter = DitherMeter({p: "p", q: "q"})
    p.grad, q.grad = torch.zeros(0, 3), torch.ones(3)
    record = measured(meter, optimizer)
    assert record["layers"]["q"]["equivalent_lr"] == 0


def test_after_without_before() -> None:
    with pytest.raises(RuntimeError, match="without before_step"):
        DitherMeter({}).after_step(SignSGD([nn.Parameter(torch.zeros(1))]))


def _advice(sizes: list[float], count: int = 1, **options: Any) -> str:
    """Of a step, its momentum of rms `sizes[i]` in layer i."""
    layers = [nn.Parameter(torch.ones(1000)) for _ in sizes]
    optimizer = SignSGD(layers, lr=1e-3, **options)
    meter = DitherMeter({p: f"layer{i}" for i, p in enumerate(layers)})
    for _ in range(count):
        for i, (p, size) in enumerate(zip(layers, sizes, strict=True)):
            p.grad = size * (torch.rand(1000, generator=torch.Generator().manual_seed(i)) - 0.5).sign()
        record = measured(meter, optimizer)
    return str(record["advice"])


def test_advice_on_the_papers_alpha() -> None:
    said = _advice([0.001] * 20 + [1.0], momentum=0.0, dither=0.1)
    assert "dither is 31" in said
    assert "times the momentum in 20 of 21 layers" in said
    assert "probability 0.501" in said
    assert "sigma comes down to the momentum near step 1e9" in said
    assert said.endswith("set dither_scale='relative', dither=1.0, dither_decay=0.0")


def test_advice_on_weak_and_on_matching_dither() -> None:
    weak = _advice([1.0, 1.0], momentum=0.0, dither=1e-6)
    assert "dither is 0.001 of the momentum in 2 of 2 layers: it changes next to no sign" in weak
    good = _advice([1.0, 10.0], count=3, dither=1.0, dither_decay=0.0, dither_scale="relative")
    assert "dither and momentum match" in good
    assert "set " not in good
    mixed = _advice([1.0, 1.0, 1e-4], momentum=0.0, dither=1.0, dither_decay=0.0)
    assert "not so in 1 of 3 layers" in mixed
    assert "dither_scale='relative'" in mixed


def test_advice_on_the_expected_step() -> None:
    said = _advice([1.0, 10.0], count=3, dither=1.0, dither_decay=0.0, dither_scale="relative")
    expected = _advice(
        [1.0, 10.0], count=3, dither=1.0, dither_decay=0.0, dither_scale="relative", dither_position="expected"
    )
    assert expected.startswith("dither: the step is the expected sign, without noise: rms(m) / sigma is ")
    assert expected.rpartition("lr ")[2] == said.rpartition("lr ")[2]
    first = _advice([1.0], dither=1.0, dither_scale="relative", dither_position="expected")
    assert "first step of relative dither" in first


def test_advice_without_dither() -> None:
    said = _advice([1e-3, 1e-3, 1.0], momentum=0.0)
    assert said.startswith("no dither: rms(m) is 0.001 to 1 over 3 layers; dither=1e-06, dither_decay=0.55 would")
    assert "dither_scale='relative', dither=1.0, dither_decay=0.0 does" in said
    assert "layers" in said


def test_advice_on_the_first_relative_step_and_post() -> None:
    assert "first step of relative dither" in _advice([1.0], dither=1.0, dither_scale="relative")
    said = _advice([1.0], dither=0.01, dither_position="post")
    assert "standard deviation of 0.1 steps" in said
    assert "momentum is 0" in _advice([0.0], dither=0.01)

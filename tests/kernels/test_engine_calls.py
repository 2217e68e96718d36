"""One call of the native or the Triton engine: noise of shards, numbers at the edge, sums, and what is refused."""

import functools
import math
from typing import Any

import pytest
import torch
from engine_cases import (
    CPU,
    DITHERS,
    DTYPES,
    ENGINES,
    STATE_DTYPES,
    Dither,
    Engine,
    close,
    differing,
    directions,
    momenta,
    request,
)

from pairwise import every_combination
from signstep import SignSGD
from signstep.kernels import momentum
from signstep.kernels.engine import Direction, Measured, Tensors
from signstep.kernels.plain import multi_tensor_step

OFFSETS = [8, 13, 16 * (2**31 - 1) - 5, 16 * 2**31 - 16, 16 * 2**31 - 8, 4 * 2**31 - 3]
OFFSETS += [16 * (2**32 - 1), 16 * (2**32 - 1) + 9, 2**36 - 7, 2**40 + 3]


@pytest.mark.parametrize(
    ("engine", "offset", "position"), every_combination(ENGINES, OFFSETS, ["pre", "post"]), indirect=["engine"]
)
def test_a_shard_draws_what_the_whole_draws(engine: Engine, position: str, offset: int) -> None:
    """Also where the block's number leaves 31 and 32 bits, reached by its offset and not by allocation."""
    m, dither = momenta(4000), Dither(position, torch.tensor(0.7))
    draw = functools.partial(directions, engine_step=engine.module.step, device=engine.device, dither=dither)
    whole = draw(m, offset=offset)
    error = 0 if position == "pre" else 1e-6
    close(whole, directions(m, offset=offset, dither=dither), error, error)
    for cut in (1, 8, 250, 3999) if engine.name == "native" else (8, 250, 2048):
        parts = [draw(m[:cut], offset=offset), draw(m[cut:], offset=offset + cut)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("engine", "offset", "state_dtype", "dtype"),
    every_combination(ENGINES, [0, 3, 2**36 - 7], [torch.bfloat16, torch.int8], [torch.float32, torch.bfloat16]),
    indirect=["engine"],
)
def test_stochastic_rounding_of_a_shard_is_the_references(
    engine: Engine, offset: int, state_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Of the momentum, and of bfloat16 parameters."""
    results = []
    for step, device in ((engine.module.step, engine.device), (multi_tensor_step, CPU)):
        p, m = torch.full((3001,), 3.0, dtype=dtype, device=device), momenta(3001).to(device, dtype)
        state = momentum.new_momentum(p, state_dtype)
        scales = [state["exp_avg_scale"]] if state_dtype == torch.int8 else []
        for k in range(3):
            tensors = Tensors([p], [m], [state["exp_avg"]], scales, [], [4], [offset])
            step(tensors, request(dither=None, rate=1e-3, momentum=0.9, state_dtype=state_dtype, step=torch.tensor(k)))
        results.append([p.cpu(), *(x.cpu() for x in state.values())])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("engine", "dtype", "position", "sigma", "law"),
    every_combination(
        ENGINES, DTYPES, [None, "pre", "post", "expected"], [0.0, 0.5, math.inf, math.nan], ["gaussian", "uniform"]
    ),
    indirect=["engine"],
)
def test_numbers_that_are_not_finite_or_zero(
    engine: Engine, dtype: torch.dtype, position: str | None, sigma: float, law: str
) -> None:
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-7, -1e-7, 1.0, -1.0, 3e38, math.inf, -math.inf, math.nan]
    m = torch.tensor(values * 100, dtype=torch.float64).to(dtype)
    dither = None if position is None else Dither(position, torch.tensor(sigma), law)
    actual = directions(m, engine.module.step, device=engine.device, dither=dither)
    rtol = 1e-2 if m.dtype.itemsize == 2 else 1e-6
    close(actual, directions(m, dither=dither), rtol, 0 if position in (None, "pre") else 1e-6)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_momentum_that_is_not_finite(engine: Engine, state_dtype: torch.dtype | None) -> None:
    grad = momenta(1200)
    grad[300], grad[301], grad[900] = math.nan, math.inf, -math.inf
    results = []
    for step, device in ((engine.module.step, engine.device), (multi_tensor_step, CPU)):
        p = torch.zeros(1200, device=device)
        state = momentum.new_momentum(p, state_dtype)
        tensors = Tensors([p], [grad.to(device)], [state["exp_avg"]], list(state.values())[1:], [], [0], [0])
        for _ in range(2):
            step(tensors, request(dither=None, momentum=0.9, state_dtype=state_dtype))
        results.append([p, *state.values()])
    for actual, expected in zip(*results, strict=True):
        assert differing(actual, expected) == 0


@pytest.mark.parametrize(
    ("engine", "step", "seed"),
    every_combination(
        ENGINES,
        [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5],
        [0, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1],
    ),
    indirect=["engine"],
)
def test_wide_seeds_and_steps(engine: Engine, step: int, seed: int) -> None:
    m, options = momenta(100), {"step": torch.tensor(step), "seed": seed, "ordinal": 3}
    actual = directions(m, engine.module.step, device=engine.device, **options)
    assert torch.equal(actual, directions(m, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "dtype", "measured", "interpolation"),
    every_combination(ENGINES, DTYPES, Measured, [None, 0.8]),
    indirect=["engine"],
)
def test_sums_and_mean_squares(
    engine: Engine, dtype: torch.dtype, measured: Measured, interpolation: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several programs per tensor, and several rounds of the kernel that adds them up; twice the same bits."""
    if engine.name == "triton":
        monkeypatch.setattr(engine.module, "_REDUCE", 2)
    sizes = [11000, 3, 0, 2048, 5000]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for step, device in ((engine.module.step, engine.device),) * 2 + ((multi_tensor_step, CPU),):
        make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(8))
        ps, gs, ms = ([make(n).add(0.3).to(dtype).to(device) for n in sizes] for _ in range(3))
        # The native engine leaves the mean square of no elements as it is, and in training that is 0.
        kept = [i != 2 or engine.name == "triton" for i in range(len(sizes))]
        squares = [torch.tensor((0.5 + i) * k, device=device) for i, k in enumerate(kept)]
        total = torch.ones(len(sizes), 2, dtype=sums, device=device)
        tensors = Tensors(ps, gs, ms, [], squares, list(range(5)), [0] * 5)
        step(tensors, request(sums=total, measured=measured, momentum=0.5, interpolation=interpolation))
        results.append([total, *squares])
    for first, second, expected in zip(*results, strict=True):
        assert torch.equal(first, second)
        close(first, expected, 1e-5, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rate_for_each_tensor(engine: Engine, dtype: torch.dtype) -> None:
    """The same numbers as a call for each tensor with its own rate; tensors of several dtypes keep theirs."""
    dtypes = [dtype, torch.float32, dtype, torch.float64, dtype]
    rates = torch.tensor([0.5, 0.25, 0.0, 3.0, 1.0], device=engine.device)
    make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(8))
    once, apart, gs = ([make(700).to(kind).to(engine.device) for kind in dtypes] for _ in range(3))
    for p, same in zip(once, apart, strict=True):
        same.copy_(p)
    options = {"dither": None, "direction": Direction.MOMENTUM, "stochastic_params": False}
    engine.module.step(Tensors(once, gs, [], [], [], list(range(5)), [0] * 5), request(**options, rate=rates))
    for i, rate in enumerate(rates.tolist()):
        engine.module.step(Tensors([apart[i]], [gs[i]], [], [], [], [i], [0]), request(**options, rate=rate))
        assert torch.equal(once[i], apart[i])


def test_gradients_and_foreign_memory_are_not_touched(engine: Engine) -> None:
    """Views into one buffer at odd addresses, gaps of a known value between them; a gradient that is expanded."""
    buffer = torch.full((9000,), 7.0, device=engine.device)
    views = [buffer[3:4003], buffer[4100:4101], buffer[5001:8000]]
    grads = [torch.randn(n).to(engine.device) for n in (4000, 1)] + [torch.randn(()).to(engine.device).expand(2999)]
    kept = [g.clone() for g in grads]
    expected = [v.cpu().clone() for v in views]
    engine.module.step(Tensors(views, grads, [], [], [], [0, 1, 2], [0, 0, 0]), request())
    multi_tensor_step(Tensors(expected, [g.cpu() for g in kept], [], [], [], [0, 1, 2], [0, 0, 0]), request())
    assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True))
    assert all(torch.equal(v.cpu(), e) for v, e in zip(views, expected, strict=True))
    inside = torch.zeros(9000, dtype=torch.bool, device=engine.device)
    inside[3:4003] = inside[4100] = inside[5001:8000] = True
    assert (buffer[~inside] == 7).all()
    assert (buffer[inside] != 7).all()


def test_state_of_another_model_is_refused(engine: Engine) -> None:
    """Plain torch would raise a shape error; a kernel would read what is not its own."""
    p, g = torch.zeros(300, device=engine.device), torch.ones(300, device=engine.device)
    others = [(99, torch.float32, p.device), (300, torch.float64, p.device), (300, torch.float32, "meta")]
    for size, dtype, device in others:
        m = torch.zeros(size, dtype=dtype, device=device)
        with pytest.raises(RuntimeError, match=r"the momentum of a parameter of shape \(300,\) on .* expected"):
            engine.module.step(Tensors([p], [g], [m], [], [], [0], [0]), request(momentum=0.9))
    eight, options = torch.zeros(300, dtype=torch.int8, device=p.device), request(momentum=0.9, state_dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"8-bit momentum of 300 elements has 1 scales, .* expected 2"):
        engine.module.step(Tensors([p], [g], [eight], [torch.zeros(1, device=p.device)], [], [0], [0]), options)
    with pytest.raises(RuntimeError, match=r"expected torch\.int8"):
        engine.module.step(Tensors([p], [g], [eight], [], [], [0], [0]), options)
    assert not p.any()
    optimizer = SignSGD([torch.nn.Parameter(p)], fused=True)
    optimizer.param_groups[0]["params"][0].grad = g
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = torch.int8
    with pytest.raises(RuntimeError, match="set state_dtype, and the model's dtype, before"):
        optimizer.step()


def test_tensors_that_are_not_alike_are_refused(engine: Engine) -> None:
    """Each would be read past its end, or where it is not."""
    p = torch.zeros(100, device=engine.device)
    for g in (
        torch.ones(99, device=p.device),
        torch.ones(100, dtype=torch.float64, device=p.device),
        torch.ones(100, device="meta"),
    ):
        with pytest.raises(RuntimeError, match=r"the gradient of a parameter, .*: fused kernels need it alike"):
            engine.module.step(Tensors([p], [g], [], [], [], [0], [0]), request())
    g = torch.ones(100, device=p.device)
    for square in (torch.ones((), dtype=torch.float64), torch.ones((), device="meta"), torch.ones(2)):
        square = square if square.is_meta else square.to(p.device)
        with pytest.raises(RuntimeError, match=r"the mean square of the momentum of a parameter on .* is"):
            engine.module.step(Tensors([p], [g], [], [], [square], [0], [0]), request())
    assert not p.any()
    parameter = torch.nn.Parameter(torch.zeros(3, device=p.device))
    parameter.grad = torch.ones(3, device=p.device)
    parameter.data = torch.zeros(1000, device=p.device)
    with pytest.raises(RuntimeError):
        SignSGD([parameter], fused=True).step()


def test_negated_gradients(engine: Engine) -> None:
    m = momenta(50).to(engine.device)
    negated = torch.complex(m, m).conj().imag
    assert negated.is_neg()
    p = torch.zeros(50, device=engine.device)
    engine.module.step(Tensors([p], [negated], [], [], [], [0], [0]), request(dither=None))
    assert torch.equal(p, m.sign())


@pytest.mark.parametrize("options", [{}, DITHERS["pre"], {"state_dtype": torch.int8}])
def test_conjugated_gradients(engine: Engine, options: dict[str, Any]) -> None:
    results = []
    for fused, device in ((True, engine.device), (False, CPU)):
        make = functools.partial(torch.randn, 300, dtype=torch.complex64)
        p = torch.nn.Parameter(make(generator=torch.Generator().manual_seed(1)).to(device))
        optimizer = SignSGD([p], lr=0.1, fused=fused, **options)
        for step in range(3):
            p.grad = make(generator=torch.Generator().manual_seed(step)).to(device)
            if step == 1:
                p.grad = p.grad.conj()
            optimizer.step()
        results.append(p.detach().cpu())
    assert torch.equal(*results)


def test_nothing_to_do(engine: Engine) -> None:
    engine.module.step(Tensors([], [], [], [], [], [], []), request())

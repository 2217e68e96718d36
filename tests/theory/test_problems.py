"""Problems: their smoothness, gradients, noise and minimum, and SignSGD on them against Theorem 1."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signstep.theory.bounds import dithered_std, l1_bound, optimal_lr, phi, stationarity_bound
from signstep.theory.noise import LAWS
from signstep.theory.problems import Problem, coupled_quadratic, logistic_regression, run, separable_quadratic

NAMES = ("separable", "coupled", "ones", "logistic")


@functools.cache
def problem(name: str) -> Problem:
    if name == "logistic":
        pytest.importorskip("sklearn")
        return logistic_regression()
    if name == "separable":
        return separable_quadratic(30, noise_std=0.5, law=LAWS["laplace"])
    return coupled_quadratic(30, coupling=1.0 if name == "ones" else 0.1, law=LAWS["student-t5"])


def points(name: str, seed: int, scale: float, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(problem(name).dim, generator=generator, dtype=torch.float64) for _ in range(count)]


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10_000), st.floats(-3, 2), st.sampled_from([1.0, 0.0]))
def test_assumption_2(name: str, seed: int, size: float, signs: float) -> None:
    """Bernstein's majorization between random points, and along the steps of SignSGD (all coordinates as far)."""
    p = problem(name)
    x, step = points(name, seed, 10**size)
    step = step.sign() * 10**size if signs else step
    linear = (p.gradient(x) * step).sum()
    bound = p.value(x) + linear + (p.smoothness * step.square()).sum() / 2
    assert float(p.value(x + step)) <= float(bound) * (1 + 1e-12) + 1e-12 * abs(float(linear))


def test_constants_along_the_axes_are_not_enough() -> None:
    """H = ones(100): each partial derivative has Lipschitz constant 1 along its axis, and 10,000 is needed, not 100."""
    p = coupled_quadratic(100, coupling=1.0)
    step = torch.ones(100, dtype=torch.float64)
    needed = 2 * (p.value(p.start + step) - p.value(p.start) - (p.gradient(p.start) * step).sum())
    assert float(needed) == float(p.smoothness.sum()) == 10_000
    axis = torch.ones(100, dtype=torch.float64)
    assert float(axis.sum()) == 100  # H_ii
    assert float((axis * 10).sum()) == 1000  # Euclidean norms of H's rows


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10_000), st.floats(-2, 1))
def test_gradients_are_those_of_autograd(name: str, seed: int, size: float) -> None:
    p = problem(name)
    x = torch.stack(points(name, seed, 10**size, 3)).requires_grad_()
    (expected,) = torch.autograd.grad(p.value(x).sum(), x)
    assert torch.allclose(p.gradient(x), expected, rtol=1e-9, atol=1e-12)
    assert p.value(x).shape == (3,)
    assert torch.allclose(p.gradient(x)[1], p.gradient(x[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 5])
def test_stochastic_gradients(name: str, n: int) -> None:
    """Mean and variance over 8 000 draws: no z-score of all coordinates above 5."""
    p, draws = problem(name), 8_000
    x = points(name, 1, 0.3, 1)[0]
    drawn = p.sample_gradient(x.expand(draws, -1), n, torch.Generator().manual_seed(4))
    assert drawn.shape == (draws, p.dim)
    gradient, std = p.gradient(x), p.noise_std(x) / math.sqrt(n)
    still = std == 0
    assert torch.allclose(drawn[:, still], gradient[still].expand(draws, -1), rtol=0, atol=1e-12)
    error = drawn[:, ~still] - gradient[~still]
    assert (error.mean(0).abs() <= 5 * std[~still] / math.sqrt(draws)).all()
    squares = error.square()
    assert ((squares.mean(0) - std[~still].square()).abs() <= 5 * squares.std(0) / math.sqrt(draws)).all()


def test_real_noise_is_that_of_every_image() -> None:
    """By brute force: the gradients of all 1797 images, through autograd."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, digit = datasets.load_digits(return_X_y=True)
    p, x = problem("logistic"), points("logistic", 2, 0.5, 1)[0]
    images = torch.nn.functional.pad(torch.from_numpy(pixels) / 16, (0, 1), value=1.0)
    odd = torch.from_numpy(digit % 2)

    def loss(w: Tensor, image: Tensor, label: Tensor) -> Tensor:
        # Softplus of torch is x above 20.
        return torch.logaddexp(torch.zeros_like(label), (1 - 2 * label) * (image @ w)) + 0.005 * w.square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(x, images, odd.double())
    assert torch.allclose(p.gradient(x), rows.mean(0), atol=1e-9)
    assert torch.allclose(p.noise_std(x), rows.std(0, correction=0), atol=1e-9)


def test_real_minimum() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    p = problem("logistic")

    def both(w: object) -> tuple[float, object]:
        x = torch.as_tensor(w)
        return float(p.value(x)), p.gradient(x).numpy()

    found = optimize.minimize(both, p.start.numpy(), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    assert -1e-13 < found.fun - p.minimum < 1e-9
    assert p.gap == pytest.approx(math.log(2) - p.minimum)


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10_000), st.floats(-3, 2))
def test_nothing_is_below_the_minimum(name: str, seed: int, size: float) -> None:
    assert float(problem(name).value(points(name, seed, 10**size, 1)[0])) >= problem(name).minimum - 1e-12


def test_a_step_by_hand() -> None:
    p = separable_quadratic(4, condition=8.0)
    path = run(p, steps=2, batch_size=3, lr=0.1, dither_std=0.5, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    noisy = p.sample_gradient(p.start, 3, generator) + 0.5 * torch.randn(4, generator=generator, dtype=torch.float64)
    x = p.start - 0.1 * noisy.sign()
    assert float(path.values[1]) == pytest.approx(float(p.value(x)))
    assert float(path.l1[1]) == pytest.approx(float(p.gradient(x).abs().sum()))
    std = dithered_std(p.noise_std(x) / math.sqrt(3), 0.5)
    assert float(path.phi[1]) == pytest.approx(float(phi(p.gradient(x), std)))
    assert float(path.values[0]) == p.gap


def test_without_noise_a_run_goes_straight_down() -> None:
    p = separable_quadratic(5, noise_std=0.0)
    path = run(p, steps=10, batch_size=1, lr=0.0625, generator=torch.Generator())
    x = 1 - 0.0625 * torch.arange(10, dtype=torch.float64)
    assert torch.allclose(path.values, p.gap * x.square())
    assert torch.allclose(path.phi, path.l1)


def test_runs_repeat_and_batches_are_independent() -> None:
    p = separable_quadratic(10)
    many = replace(p, start=p.start.expand(6, -1))
    first, again = (
        run(many, steps=30, batch_size=2, lr=0.05, generator=torch.Generator().manual_seed(6)) for _ in range(2)
    )
    assert first.phi.shape == first.l1.shape == first.values.shape == (30, 6)
    assert torch.equal(first.values, again.values)
    assert first.values[-1].unique().numel() == 6
    assert many.gap == p.gap


@pytest.mark.parametrize("dither_std", [0.0, 0.7])
@pytest.mark.parametrize("name", ["separable", "coupled", "ones"])
def test_theorem_1_holds(name: str, dither_std: float) -> None:
    """Where its assumptions do: the mean of eight runs is below the bound by far more than its error."""
    p, steps, n = problem(name), 400, 4
    total = float(p.smoothness.sum())
    many = replace(p, start=p.start.expand(8, -1))
    for lr in (optimal_lr(p.gap, total, steps), 1 / math.sqrt(total * steps)):
        path = run(
            many, steps=steps, batch_size=n, lr=lr, dither_std=dither_std, generator=torch.Generator().manual_seed(7)
        )
        bound = stationarity_bound(p.gap, total, steps, lr=lr)
        means = path.phi.mean(0)
        assert float(means.mean() + 5 * means.std() / math.sqrt(8)) <= bound
        noise = float(dithered_std(p.noise_std(p.start) / math.sqrt(n), dither_std).sum())
        assert float(path.l1.mean()) <= l1_bound(bound, noise)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: separable_quadratic(0), "dim=0: expected at least 1"),
        (lambda: separable_quadratic(condition=0.5), "condition=0.5: expected a finite number of at least 1"),
        (lambda: separable_quadratic(noise_std=-1.0), "noise_std=-1.0: expected a finite number of at least 0"),
        (lambda: coupled_quadratic(coupling=1.5), "coupling=1.5: expected a number from 0 to 1"),
        (lambda: coupled_quadratic(coupling=math.nan), "coupling=nan"),
        (lambda: logistic_regression(l2=0.0), "l2=0.0: expected a finite number above 0"),
        (lambda: run(separable_quadratic(2), steps=0, batch_size=1, lr=1.0, generator=torch.Generator()), "steps=0"),
        (
            lambda: run(separable_quadratic(2), steps=1, batch_size=0, lr=1.0, generator=torch.Generator()),
            "batch_size=0",
        ),
        (lambda: run(separable_quadratic(2), steps=1, batch_size=1, lr=0.0, generator=torch.Generator()), "lr=0.0"),
        (
            lambda: run(
                separable_quadratic(2), steps=1, batch_size=1, lr=1.0, dither_std=-1.0, generator=torch.Generator()
            ),
            "dither_std=-1.0",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()

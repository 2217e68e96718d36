"""Lion against the package lion-pytorch, and where it meets SignSGD."""

import math
from typing import Any

import pytest
import torch
from lion_pytorch import Lion as PackagesLion
from torch import nn

from signstep import Lion, SignSGD

ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True, "fused": False},
    "one by one": {"foreach": False, "fused": False},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98)])
def test_200_steps_are_those_of_lion_pytorch(engine: str, weight_decay: float, betas: tuple[float, float]) -> None:
    """In float32, its averages rounded otherwise: to a few units in the last place, and to the same signs."""
    torch.manual_seed(0)
    shapes = [(64, 33), (257,), ()]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Lion(ours, 1e-3, betas, weight_decay, **ENGINES[engine])
    package = PackagesLion(theirs, 1e-3, betas, weight_decay)
    for _ in range(200):
        for p, q in zip(ours, theirs, strict=True):
            # Of a noisy quadratic: a sign that differed once would show for ever.
            p.grad = q.detach() + torch.randn(q.shape)
            p.grad[torch.rand(q.shape) < 0.05] = 0
            q.grad = p.grad.clone()
        optimizer.step()
        package.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5)
    for p, q in zip(ours, theirs, strict=True):
        average = package.state[q]["exp_avg"]
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], average, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-5)


def test_a_call_of_lion_pytorch_is_one_of_ours() -> None:
    p = nn.Parameter(torch.ones(2))
    group = Lion([p], 1e-4, (0.95, 0.98), 1e-2).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.95, 0.98), 1e-2)
    assert Lion([{"params": [p], "betas": [0.5, 0.6]}]).param_groups[0]["betas"] == [0.5, 0.6]
    with pytest.raises(TypeError, match="momentum"):
        Lion([p], momentum=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "betas", [(0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.9, 0.9), (0.9, "x"), (True, 0.9), (0.9, math.nan)]
)
def test_betas_out_of_range(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid betas: .*, expected two numbers in \[0, 1\)"):
        Lion([nn.Parameter(torch.ones(2))], betas=betas)
    with pytest.raises(TypeError, match="Invalid betas"):
        Lion([nn.Parameter(torch.ones(2))], betas=0.9)  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    """In the parameter, and in the momentum, although the direction is taken of another average."""
    for engine in ENGINES.values():
        p = nn.Parameter(torch.zeros(3))
        optimizer = Lion([p], lr=0.5, **engine)
        p.grad = torch.tensor([1.0, torch.inf, torch.nan])
        optimizer.step()
        assert p[0] == -0.5
        assert p[1:].isnan().all()
        assert not optimizer.state[p]["exp_avg"][1:].isfinite().any()


def test_relative_dither_goes_by_the_interpolation() -> None:
    """With the rms of c of the last step; the first step is not dithered."""
    p = nn.Parameter(torch.zeros(100))
    optimizer = Lion([p], betas=(0.5, 0.9), dither=1.0, dither_scale="relative", dither_decay=0.0)
    g = torch.randn(100, generator=torch.Generator().manual_seed(0))
    m = torch.zeros(100)
    for _ in range(2):
        p.grad = g.clone()
        optimizer.step()
        c = 0.5 * m + 0.5 * g
        m = 0.9 * m + 0.1 * g
        assert float(optimizer.state[p]["mean_square"]) == pytest.approx(float(c.square().mean()), rel=1e-6)


def test_without_momentum_all_are_signsgd() -> None:
    params = [nn.Parameter(torch.zeros(5)) for _ in range(2)]
    optimizers = [Lion(params[:1], 0.1, betas=(0.0, 0.0)), SignSGD(params[1:], 0.1, momentum=0.0)]
    for step in range(3):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            assert not optimizer.state[p]
    assert torch.equal(*params)

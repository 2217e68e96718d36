"""1-bit Adam: Adam in its warm-up, then the steps of the paper."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compressor_cases import SHAPES, SIMULATED, Given, Simulated, gradients_of, in_memory, means
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang, on_ranks
from signstep.distributed.compressors import OneBitAdam


def adam_parameters() -> tuple[list[Tensor], list[Tensor], bool, list[Tensor]]:
    """20 steps of torch's AdamW on DDP's mean, and of the warm-up; then another 5 after it."""
    rank = dist.get_rank()
    theirs, ours = (DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.004) for _ in range(2))
    settings_: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    adamw = torch.optim.AdamW(theirs.parameters(), foreach=False, **settings_)
    one_bit = OneBitAdam(ours, warmup_steps=20, **settings_)
    frozen = False
    for step in range(20):
        frozen = frozen or one_bit.frozen
        means(theirs, gradients_of(step, rank))
        means(ours, gradients_of(step, rank))
        adamw.step()
        one_bit.step()
    warm = [p.detach().clone() for p in ours.parameters()]
    assert one_bit.frozen
    for step in range(20, 25):
        means(ours, gradients_of(step, rank))
        one_bit.step()
    after = [p.detach().clone() for p in ours.parameters()]
    one_bit.hook.close()
    return [p.detach() for p in theirs.parameters()], warm, frozen, after


def test_one_bit_adam_is_adam_in_the_warm_up() -> None:
    ranks = gang(2).run(adam_parameters)
    theirs, warm, frozen, _ = ranks[0]
    assert all(torch.equal(a, b) for a, b in zip(theirs, warm, strict=True))
    assert not frozen
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][3], ranks[1][3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(warm, ranks[0][3], strict=True))


@on_ranks(2)
def test_one_bit_adam_takes_the_steps_of_the_paper() -> None:
    """Parameters after each step, by `OneBitAdam` and by the paper's algorithm in numpy, on all workers' gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    beta1, beta2, lr, eps, warm = 0.9, 0.99, 0.01, 1e-8, 3
    model = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.004)
    optimizer = OneBitAdam(model, lr=lr, betas=(beta1, beta2), eps=eps, warmup_steps=warm)
    simulated = Simulated(size, SIMULATED["ef-sign-two-sided"])
    x, m, v = ({name: np.zeros(math.prod(shape)) for name, shape in SHAPES.items()} for _ in range(3))
    for step in range(6):
        everyone = [gradients_of(step, r) for r in range(size)]
        means(model, everyone[rank])
        optimizer.step()
        if step < warm:
            for name in SHAPES:
                g = np.mean([in_memory(each[name]) for each in everyone], axis=0)
                m[name] = beta1 * m[name] + (1 - beta1) * g
                v[name] = beta2 * v[name] + (1 - beta2) * g**2
        else:
            local = [
                {name: torch.tensor(beta1 * m[name] + (1 - beta1) * in_memory(g[name])) for name in SHAPES}
                for g in everyone
            ]
            m = simulated.step(local)
        frozen = min(step + 1, warm)
        for name in SHAPES:
            direction = m[name] / (1 - beta1 ** (step + 1)) / (np.sqrt(v[name] / (1 - beta2**frozen)) + eps)
            x[name] = x[name] - lr * direction
            close = np.isclose(in_memory(model.module.get_parameter(name).detach()), x[name], rtol=1e-3, atol=1e-5)
            assert close.mean() > 0.999  # an element within rounding of 0 may take the other sign
    optimizer.hook.close()


class Quadratic(nn.Module):
    """Sum of a (x - b)^2 / 2 with curvatures from 0.01 to 1, and noise of the rank's own in the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2000))
        self.curvature, self.optimum = torch.logspace(-2, 0, 2000), torch.linspace(-1, 1, 2000)

    def forward(self, noise: Tensor) -> Tensor:
        off = self.x - self.optimum
        return (self.curvature * off.square()).sum() / 2 + (off * noise).sum()


def minimise(restarts: Sequence[int]) -> tuple[float, float, Tensor]:
    """The loss before and after, and where it is; at restarts, optimizer and hook are saved and made anew."""
    function = Quadratic()
    model = DistributedDataParallel(function)
    optimizer = OneBitAdam(model, lr=0.02, betas=(0.9, 0.99), warmup_steps=100)
    generator = torch.Generator().manual_seed(dist.get_rank())
    first = float(function(torch.zeros(1)))
    steps = 300
    for step in range(steps):
        if step in restarts:
            file = io.BytesIO()
            torch.save((function.state_dict(), optimizer.state_dict(), optimizer.hook.state_dict()), file)
            optimizer.hook.close()
            function = Quadratic()
            model = DistributedDataParallel(function)
            optimizer = OneBitAdam(model, lr=99.0, warmup_steps=1)
            parts = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            for part, saved in zip((function, optimizer, optimizer.hook), parts, strict=True):
                part.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        optimizer.zero_grad()
        model(torch.randn(2000, generator=generator) * 0.1).backward()
        optimizer.step()
    optimizer.hook.close()
    return first, float(function(torch.zeros(1))), function.x.detach()


@pytest.mark.slow
def test_one_bit_adam_comes_near_the_optimum_also_after_restarts() -> None:
    (first, last, x), (_, _, other) = gang(2).run(minimise, ())
    assert last < 0.01 * first
    assert torch.equal(x, other)
    assert torch.equal(gang(2).run(minimise, (60, 200))[0][2], x)


def adam_refusals() -> list[str]:
    out = []

    def attempt(make: Callable[[], object]) -> None:
        try:
            make()
        except (ValueError, TypeError, RuntimeError) as error:
            out.append(str(error))

    for options in ({"warmup_steps": 0}, {"warmup_steps": 5, "betas": (0.9, 1.0)}, {"warmup_steps": 5, "lr": -1.0}):
        attempt(lambda: OneBitAdam(DistributedDataParallel(Given(SHAPES)), **options))  # noqa: B023
    model = DistributedDataParallel(Given(SHAPES))
    attempt(lambda: OneBitAdam(model, warmup_steps=5, params=list(model.parameters())[1:]))
    attempt(lambda: OneBitAdam(Given(SHAPES), warmup_steps=5))  # type: ignore[arg-type]

    # "c" gets its first gradient too late; one element of "b" has none before, and stays where it is.
    model = DistributedDataParallel(Given(SHAPES), find_unused_parameters=True)
    optimizer = OneBitAdam(model, lr=0.1, warmup_steps=2)
    for step in range(4):
        g = gradients_of(step, dist.get_rank())
        del g["c"]
        if step < 2:
            g["b"][3, 4] = 0
        means(model, g)
        optimizer.step()
    assert model.module.b[3, 4] == 0
    assert model.module.b.abs().max() < 2
    before = model.module.a.detach().clone()
    means(model, gradients_of(4, dist.get_rank()))
    attempt(optimizer.step)
    assert torch.equal(model.module.a, before)
    attempt(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}))
    optimizer.hook.close()
    return out


def test_one_bit_adam_refuses_what_would_go_wrong() -> None:
    for messages in gang(2).run(adam_refusals):
        assert len(messages) == 7
        for message, start in zip(
            messages,
            (
                "Invalid warmup_steps: 0, expected",
                "Invalid betas: (0.9, 1.0), expected",
                "Invalid lr: -1.0, expected",
                "OneBitAdam: expected params to be all those of the model",
                "OneBitAdamHook: expected a model wrapped in DistributedDataParallel",
                "OneBitAdam: c has its first gradient after the warm-up",
                "OneBitAdam takes all parameters of its model at the start",
            ),
            strict=True,
        ):
            assert message.startswith(start)

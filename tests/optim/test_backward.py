"""The step inside backward is the step after it, and no full set of gradients is alive."""

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.optim.lr_scheduler import CosineAnnealingLR

from signstep import HybridSignSGD, Lion, SignSGD
from signstep.optim import attach_to_backward


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    shared = torch.nn.Linear(20, 20)  # used twice
    return torch.nn.Sequential(
        torch.nn.Linear(8, 20), torch.nn.Tanh(), shared, torch.nn.Tanh(), shared, torch.nn.Linear(20, 1)
    )


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


OPTIONS: dict[str, dict[str, Any]] = {
    "clean": {},
    "dither": {"dither": 1e-4, "seed": 3},
    "relative, 8 bits": {"dither": 1.0, "dither_scale": "relative", "state_dtype": torch.int8},
    "no momentum, plain torch": {"momentum": 0.0, "fused": False},
    "lion": {"betas": (0.9, 0.99), "dither": 1.0, "dither_scale": "relative"},
    "hybrid": {"switch_step": 4, "calibration": "paper", "ema_decay": 0.5},
    "hybrid, applied": {
        "switch_step": 4,
        "calibration": "applied",
        "dither": 1e-4,
        "sgd_momentum": 0.9,
        "weight_decay": 0.1,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_step_after_backward(options: dict[str, Any]) -> None:
    """With a scheduler, a parameter that gets no gradient, and a loop that calls step and zero_grad all the same."""
    cls = HybridSignSGD if "switch_step" in options else Lion if "betas" in options else SignSGD
    plain, attached = network(), network()
    for model in (plain, attached):
        model.extra = torch.nn.Parameter(torch.ones(3))
    after = cls(plain.parameters(), lr=0.01, **options)
    inside = attach_to_backward(attached, {"lr": 0.01, **options})
    assert type(inside) is cls
    schedulers = [CosineAnnealingLR(o, 10) for o in (after, inside)]
    for step in range(8):
        for model, optimizer, scheduler in zip((plain, attached), (after, inside), schedulers, strict=True):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            assert model is plain or all(p.grad is None for p in model.parameters())
            optimizer.step()
            scheduler.step()
        # In the SGD phase the sums of calibration, added up in another order, are in the rate.
        tolerance = {"rtol": 1e-5, "atol": 1e-7} if cls is HybridSignSGD else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(attached.state_dict(), plain.state_dict(), **tolerance)
        assert inside.param_groups[0]["step"] == after.param_groups[0]["step"] == step + 1
    assert getattr(inside, "phase", None) == getattr(after, "phase", None)
    assert inside.state_dict()["state"].keys() == after.state_dict()["state"].keys()


def test_state_goes_through_a_checkpoint() -> None:
    model = network()
    optimizer = attach_to_backward(model, {"lr": 0.01, "dither": 1e-4})
    for step in range(3):
        model(batch(step)).mean().backward()
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = attach_to_backward(resumed, {"lr": 0.01, "dither": 1e-4})
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for m in (model, resumed):
        m(batch(3)).mean().backward()
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_backward_that_fails_does_not_stop_the_next() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("on purpose")

    model = network()
    optimizer = attach_to_backward(model, {"lr": 0.01})
    with pytest.raises(ArithmeticError):
        model[3:](Failing.apply(model[:3](batch(0)))).mean().backward()
    assert optimizer.param_groups[0]["step"] == 0
    model(batch(1)).mean().backward()
    assert optimizer.param_groups[0]["step"] == 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid differentiable: True, a step inside backward"):
        attach_to_backward(network(), {"differentiable": True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'switch_step'"):
        attach_to_backward(network(), {"betas": (0.9, 0.99), "switch_step": 3})


def test_nested_backwards_are_refused() -> None:
    """Reentrant checkpointing has a backward in the backward; the other kind has not."""
    for reentrant in (True, False):
        layers = [torch.nn.Linear(5, 5) for _ in range(4)]
        optimizer = attach_to_backward(torch.nn.Sequential(*layers), {"lr": 0.01, "switch_step": 4})
        x = torch.ones(2, 5, requires_grad=True)
        for i, layer in enumerate(layers):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if i % 2 else layer(x)
        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                x.sum().backward()
        else:
            x.sum().backward()
            assert optimizer.param_groups[0]["step"] == 1


def test_later_parameters_are_refused_and_schedulers_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    model = network()
    optimizer = attach_to_backward(model, {"lr": 0.01})
    with pytest.raises(RuntimeError, match="add_param_group: this optimizer steps inside backward"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    scheduler = CosineAnnealingLR(optimizer, 10)
    model(batch(0)).mean().backward()
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


PEAK = """
import sys, torch
from signstep import SignSGD
from signstep.optim import attach_to_backward
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(48)])  # 200 MB
options = {"lr": 1e-4, "momentum": 0.0}
inside = sys.argv[1] == "inside"
optimizer = attach_to_backward(model, options) if inside else SignSGD(model.parameters(), **options)
for _ in range(3):
    model(torch.ones(2, 1024)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak in KiB, as Linux counts it")
def test_peak_memory_is_less_by_the_gradients() -> None:
    """Processes of their own; of 192 MiB of gradients at least three quarters must be gone."""
    peaks = {}
    for where in ("after", "inside"):
        ran = subprocess.run([sys.executable, "-c", PEAK, where], capture_output=True, text=True, check=True)
        peaks[where] = int(ran.stdout) / 1024
    assert peaks["after"] - peaks["inside"] > 0.75 * 192, peaks

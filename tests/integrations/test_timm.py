"""timm's factory makes our optimizers by name, with its own param_groups; in a process that has timm."""

import contextlib
import io
import multiprocessing
import runpy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from signstep import HybridSignSGD, Lion, SignSGD
from signstep.integrations.timm import register
from signstep.optim.wrappers import unwrap

TIMM = Path(sys.prefix) / "timm"
"""Where `make env` puts timm and torchvision, which the other tests must not find: Trainers import what they find."""

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_training.py"


def _take_timm() -> None:
    """Make timm importable.

    torchvision's wheels of the public index are for torch with CUDA. Beside a torch for CPUs their operators do not
    load, and `import torchvision` fails at the two that it refers to; timm calls neither.
    """
    sys.path.insert(0, str(TIMM))
    torch.set_num_threads(1)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="module")
def with_timm() -> Iterator[Callable[..., Any]]:
    """Runs a function of this file in the process that has timm, and returns what it returns or raises."""
    if not TIMM.is_dir():
        pytest.skip(f"there is no timm in {TIMM}: `make env` puts it there")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_take_timm) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def test_without_timm_the_error_says_what_to_install() -> None:
    assert "timm" not in sys.modules
    with pytest.raises(ImportError, match=r"No module named 'timm'.*pip install 'timm>=1\.0\.12', and the torchvision"):
        register()


class Net(nn.Module):
    """What timm asks of a model: a stem, blocks and a head, and a parameter that shall not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^token|stem", "blocks": r"^blocks\.(\d+)"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) + self.token
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _made(opt: str, **options: Any) -> tuple[Net, Any]:
    from timm.optim import create_optimizer_v2

    register()
    torch.manual_seed(0)
    net = Net()
    return net, create_optimizer_v2(net, opt=opt, **options)


def _same_steps(opt: str, theirs: dict[str, Any], kind: type[SignSGD], ours: dict[str, Any]) -> None:
    """Steps of timm's optimizer are those of ours over the same groups, made by hand, bit for bit."""
    net, optimizer = _made(opt, weight_decay=0.1, **theirs)
    assert type(unwrap(optimizer)) is kind
    torch.manual_seed(0)
    other = Net()
    no_decay = {"token", *(name for name, p in other.named_parameters() if p.ndim == 1)}
    groups = [
        {"params": [p for name, p in other.named_parameters() if name in no_decay], "weight_decay": 0.0},
        {"params": [p for name, p in other.named_parameters() if name not in no_decay], "weight_decay": 0.1},
    ]
    plain = kind(groups, **ours)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(6):
        for model, stepping in ((net, optimizer), (other, plain)):
            stepping.zero_grad()
            model(x).square().mean().backward()
            stepping.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


RELATIVE = {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opt", "theirs", "kind", "ours"),
    [
        ("signsgd", {"lr": 0.01}, SignSGD, {"lr": 0.01}),
        ("SignSGD", {}, SignSGD, {}),
        ("signsgd", {"momentum": 0.0, "eps": 1e-8, "betas": (0.9, 0.95)}, SignSGD, {"momentum": 0.0}),
        ("signsgd", {"lr": 0.01, "foreach": True, **RELATIVE}, SignSGD, {"lr": 0.01, **RELATIVE}),
        ("hybridsignsgd", {"lr": 0.01, "switch_step": 3}, HybridSignSGD, {"lr": 0.01, "switch_step": 3}),
        ("signsteplion", {"lr": 0.01, "betas": (0.8, 0.9)}, Lion, {"lr": 0.01, "betas": (0.8, 0.9)}),
        ("signsteplion", {"momentum": 0.5}, Lion, {}),
    ],
)  # fmt: skip
def test_steps_are_those_of_the_same_groups_by_hand(
    with_timm: Callable[..., Any], opt: str, theirs: dict[str, Any], kind: type[SignSGD], ours: dict[str, Any]
) -> None:
    with_timm(_same_steps, opt, theirs, kind, ours)


def _layer_decay() -> tuple[dict[str, float], list[float]]:
    """How far the weights of each layer moved in one step, and the scales that a state brings back."""
    from timm.scheduler import CosineLRScheduler

    options = {"lr": 0.01, "layer_decay": 0.5}
    net, optimizer = _made("signsgd", **options)
    CosineLRScheduler(optimizer, t_initial=10).step(0)  # in timm, schedulers apply the scale of a group
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.ones(8, 3)).sum().backward()
    optimizer.step()
    _, again = _made("signsgd", **options)
    again.load_state_dict(optimizer.state_dict())
    moved = {name: (p - before[name]).abs().max().item() for name, p in net.named_parameters()}
    return moved, [group["lr_scale"] for group in again.param_groups]


@pytest.mark.slow
def test_layers_move_by_their_own_rates(with_timm: Callable[..., Any]) -> None:
    moved, scales = with_timm(_layer_decay)
    expected = {"head": 0.01, "blocks.1": 0.005, "blocks.0": 0.0025, "stem": 0.00125, "token": 0.00125}
    for name, length in expected.items():
        of_layer = {length for each, length in moved.items() if each.startswith(name)}
        assert max(of_layer) == pytest.approx(length, rel=1e-3), name
    assert scales == [0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


def _registry() -> None:
    import timm.optim
    from timm.optim._optim_factory import default_registry

    register()
    before = dict(default_registry._optimizers)
    register()
    assert default_registry._optimizers == before
    assert {"signsgd", "hybridsignsgd", "signsteplion"} <= set(timm.optim.list_optimizers())
    assert timm.optim.get_optimizer_class("lion", bind_defaults=False) is timm.optim.Lion
    _, wrapped = _made("lookahead_signsgd", lr=0.01)
    assert isinstance(wrapped, timm.optim.Lookahead)
    assert type(unwrap(wrapped)) is SignSGD
    with pytest.raises(TypeError, match="nesterov"):
        _made("signsgd", lr=0.01, nesterov=True)
    del default_registry._optimizers["signsgd"]
    default_registry.register(timm.optim.OptimInfo("signsgd", torch.optim.SGD))
    try:
        with pytest.raises(ValueError, match="another optimizer of the name signsgd"):
            register()
        assert default_registry.get_optimizer_info("signsgd").opt_class is torch.optim.SGD
    finally:
        default_registry._optimizers["signsgd"] = before["signsgd"]


@pytest.mark.slow
def test_registering_adds_names_and_takes_none(with_timm: Callable[..., Any]) -> None:
    with_timm(_registry)


def _example() -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue()


@pytest.mark.slow
def test_the_example_learns(with_timm: Callable[..., Any]) -> None:
    groups, accuracy = with_timm(_example).splitlines()
    assert groups == "param_groups 8, learning rates from 0.001 to 0.002"
    assert float(accuracy.removeprefix("test accuracy ").removesuffix("%")) > 90

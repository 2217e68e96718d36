"""Optimizers are found in the wrappers of trainers, by whoever takes one."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from signstep import HybridSignSGD, SignSGD
from signstep.distributed import FSDPMajorityVote, MajorityVote, SimulatedVote
from signstep.monitor import Monitor
from signstep.optim.wrappers import unwrap


class OldLookahead(Optimizer):
    """The attributes of timm 0.9's: no hooks."""

    def __init__(self, base: Optimizer) -> None:
        self.base_optimizer = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, defaultdict(dict)

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


class NewLookahead(Optimizer):
    """The attributes of timm 1.0's: hooks that nothing calls."""

    def __init__(self, base: Optimizer) -> None:
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self._base_optimizer = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, base.state

    def step(self, closure: Any = None) -> Any:
        return self._base_optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base_optimizer.load_state_dict(state_dict)


class Delegating:
    """As DeepSpeed's, no Optimizer; what it does not have it takes from the inner one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def accelerated(optimizer: Optimizer) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def lightning(optimizer: Optimizer) -> Any:
    """An instance of a class that Lightning derives from the optimizer's, without its attributes."""
    wrapped = pytest.importorskip("pytorch_lightning").core.optimizer.LightningOptimizer(optimizer)
    wrapped._strategy = SimpleNamespace(optimizer_step=lambda inner, closure, **_: inner.step(closure))
    return wrapped


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda optimizer: optimizer,
    "accelerate": accelerated,
    "lightning": lightning,
    "old lookahead": OldLookahead,
    "new lookahead": NewLookahead,
    "delegating": Delegating,
    "nested": lambda optimizer: Delegating(accelerated(NewLookahead(optimizer))),
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        # Lightning takes seconds to import.
        pytest.param(wrap, id=name, marks=pytest.mark.slow if name == "lightning" else ())
        for name, wrap in WRAPPERS.items()
    ],
)
def test_an_optimizer_is_found_and_served_in_every_wrapper(wrap: Callable[[Optimizer], Any]) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = SignSGD(model.parameters(), momentum=0.0)
    wrapped = wrap(optimizer)
    assert unwrap(wrapped) is optimizer

    monitor = Monitor(model, wrapped, every=1)
    for _ in range(2):
        for _ in range(4):
            model(torch.randn(4, 3)).square().mean().backward()
        wrapped.step()
    assert monitor.step == 2
    assert monitor.last is not None
    assert (monitor.last["optimizer"], monitor.last["micro_batches"]) == ("SignSGD", 4)
    monitor.close()

    sim = SimulatedVote(model, wrapped, world_size=3)
    assert sim.optimizer is optimizer
    assert optimizer.takes_votes

    ddp = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    optimizer = SignSGD(ddp.parameters())
    vote = MajorityVote(ddp, wrap(optimizer))
    assert vote.optimizer is optimizer
    assert optimizer.takes_votes


def test_a_sharded_model_has_its_vote_in_a_wrapper() -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(3, 2))
    optimizer = SignSGD(model.parameters())
    assert FSDPMajorityVote(model, Delegating(optimizer)).optimizer is optimizer  # type: ignore[arg-type]
    assert optimizer.takes_votes


def test_what_is_no_optimizer_is_said() -> None:
    model = nn.Linear(3, 2)
    for given in (model, None, [1], SimpleNamespace(optimizer=3)):
        with pytest.raises(TypeError, match=f"{type(given).__name__} is no torch.optim.Optimizer and has none as its"):
            Monitor(model, given)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="pass the optimizer itself"):
            SimulatedVote(model, given, 3)  # type: ignore[arg-type]
    adam = accelerated(torch.optim.Adam(model.parameters()))
    with pytest.raises(TypeError, match="a vote needs SignSGD, HybridSignSGD or Lion, got Adam; for other optimizers"):
        SimulatedVote(model, adam, 3)


@pytest.mark.parametrize("cls", [SignSGD, HybridSignSGD])
def test_the_parts_of_a_sharded_optimizer_are_measured(cls: type[SignSGD]) -> None:
    model = nn.Linear(3, 2)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), cls, lr=1e-3, dither=0.1)
    monitor = Monitor(model, optimizer, every=1)
    for _ in range(4):
        model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert monitor.last is not None
    assert monitor.last["optimizer"] == cls.__name__
    assert monitor.last["dither"]["sigma"] == pytest.approx(0.1**0.5, rel=1e-5)
    assert set(monitor.last["calibration"]["layers"]) == {"weight", "bias"}

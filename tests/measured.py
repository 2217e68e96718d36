"""What the tests of the monitor share: small parameters and their gradients, measured steps, and a sink that keeps."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SHAPES = {"weight": (7, 5), "bias": (7,), "scale": ()}


class Instrument(Protocol):
    """The dither meter and the calibration panel."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None: ...

    def after_step(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]: ...


class KeepingSink:
    """A sink that keeps records, as JSON would."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = 0

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(json.loads(json.dumps(record, allow_nan=False)))

    def close(self) -> None:
        self.closed += 1


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def small_gradients(step: int, scale: float = 0.01, drift: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {n: scale * (drift + torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def give(params: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    for name, p in params.items():
        p.grad = grads[name].to(p.dtype) if name in grads else None


def measured(
    instrument: Instrument, optimizer: torch.optim.Optimizer, closure: Callable[[], float] | None = None
) -> dict[str, Any]:
    """The record of a step on the gradients that are there, which JSON can hold."""
    instrument.before_step(optimizer)
    optimizer.step(closure)
    record = instrument.after_step(optimizer)
    json.dumps(record, allow_nan=False)
    return record


def measured_step(
    instrument: Instrument, optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], grads: dict[str, Tensor]
) -> dict[str, Any]:
    give(params, grads)
    return measured(instrument, optimizer)


def micro_gradients(model: nn.Module, losses: Iterator[Tensor]) -> Tensor:
    """The slow way: one backward after the other, gradients copied whole."""
    rows = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return torch.stack(rows)

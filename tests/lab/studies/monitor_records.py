"""Records of a monitor for the tests of what is shown of them: of a small real training, and of skewed gradients."""

import json
from typing import Any

import torch
from torch import nn

from signstep import HybridSignSGD, Monitor, SignSGD

COMMAND = 'signstep inspect monitor.jsonl --out page # <&">'


class Kept:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Any) -> None:
        self.records.append(json.loads(json.dumps(record, allow_nan=False)))

    def close(self) -> None: ...


def monitored(steps: int = 9, micro: int = 24, **options: Any) -> list[dict[str, Any]]:
    """Records of a small real training, every second step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    chosen = {"lr": 1e-2, "dither": 1e-4} | options
    optimizer = HybridSignSGD(model.parameters(), **chosen) if "switch_step" in chosen else SignSGD(
        model.parameters(), **chosen
    )  # fmt: skip
    sink = Kept()
    teacher = torch.randn(12, 3)
    with Monitor(model, optimizer, every=2, sinks=[sink]):
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(micro):
                x = torch.randn(8, 12)
                (nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)) / micro).backward()
            optimizer.step()
    return sink.records


def skewed() -> list[dict[str, Any]]:
    """Gradients Exp(1) - 1 + 0.2: the theorem's assumption does not hold."""
    torch.manual_seed(0)
    model = nn.Linear(2000, 1, bias=False)
    monitor = Monitor(model, SignSGD(model.parameters(), lr=1e-3))
    for _ in range(32):
        (model.weight * (0.2 - torch.rand(1, 2000).log() - 1) / 32).sum().backward()
    monitor.optimizer.step()
    assert monitor.last is not None
    return [monitor.last]

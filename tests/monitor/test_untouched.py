"""What `Monitor.measure` puts back."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from signstep import Monitor, SignSGD


def test_measure_puts_everything_back() -> None:
    """A buffer that forward replaces, a head outside the model, Python's and NumPy's generators."""

    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("average", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
            return y * (1 + random.random() + np.random.random())

    model, head = Averaging(), nn.Linear(2, 1)
    optimizer = SignSGD([*model.parameters(), *head.parameters()], lr=1e-3)
    monitor = Monitor(model, optimizer)
    average = model.average
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].copy()
    x = {"images": torch.randn(16, 3)}
    monitor.measure(lambda batch: head(model(batch["images"])).square().mean(), x, parts=4)
    assert model.average is average
    assert float(average.abs().sum()) == 0
    assert head.weight.grad is None
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()

"""What docs/rare-rows.md says: how far one gradient takes an embedding's row, and that its example runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from signstep import SignSGD

RELATIVE: dict[str, Any] = {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"}


def distance(cls: type[Optimizer], **options: Any) -> float:
    """Of a row with a gradient in the first of 400 steps; others have one in each."""
    table = nn.Parameter(torch.zeros(3, 64))
    optimizer = cls([table], lr=1e-3, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        table.grad = torch.zeros(3, 64)
        table.grad[0] = 1.0 if step == 0 else 0.0
        table.grad[1] = torch.randn(64, generator=generator)
        optimizer.step()
    assert not table[2].any()
    return table.detach()[0].abs().mean().item()


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (SignSGD, {}, pytest.approx(0.4, rel=1e-4)),
        (SignSGD, {"fused": False}, pytest.approx(0.4, rel=1e-4)),
        (SignSGD, {"momentum": 0.0}, pytest.approx(0.001)),
        # A walk of 400 random steps, whose mean distance is lr sqrt(2 k / pi).
        (SignSGD, RELATIVE, pytest.approx(0.016, rel=0.3)),
        (AdamW, {"weight_decay": 0.0}, pytest.approx(0.006, rel=0.1)),
    ],
)
def test_how_far_one_gradient_takes_a_row(cls: type[Optimizer], options: dict[str, Any], expected: Any) -> None:
    assert distance(cls, **options) == expected


def test_the_example_of_the_page_trains_both_parts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rare-rows.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 3))
    x, y = torch.randint(0, 50, (16, 4)), torch.randint(0, 3, (16,))
    before = [p.detach().clone() for p in model.parameters()]
    names: dict[str, Any] = {"model": model, "loss_fn": nn.functional.cross_entropy, "loader": [(x, y)] * 3}
    exec(code, names)
    assert [type(each) for each in names["optimizers"]] == [AdamW, SignSGD]
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))

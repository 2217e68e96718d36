"""The models whose parameters the benchmarks step or send: titles and shapes, no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

StepWorkload = Literal["resnet18", "50m", "gpt2"]
STEP_WORKLOADS: tuple[StepWorkload, ...] = ("resnet18", "50m", "gpt2")


def gpt2_shapes(
    layers: int = 12, width: int = 768, vocab: int = 50257, context: int = 1024
) -> Iterator[tuple[int, ...]]:
    """The shapes of GPT-2's parameters, by default of its 124 M model; its head is its token embedding.

    >>> import math
    >>> shapes = list(gpt2_shapes())
    >>> len(shapes), sum(math.prod(shape) for shape in shapes)
    (148, 124439808)
    """
    yield (vocab, width)
    yield (context, width)
    for _ in range(layers):
        yield from [(width,), (width,)]
        yield from [(width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from [(width,), (width,)]
        yield from [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from [(width,), (width,)]


def shapes_of(workload: StepWorkload, millions: float = 50.0) -> tuple[str, list[tuple[int, ...]]]:
    """A workload's title and the shapes of its parameters; `millions` is the size of "50m"."""
    if workload == "resnet18":
        from signstep.lab.training.models import build

        return "ResNet-18", [tuple(p.shape) for p in build("resnet18", num_classes=10).parameters()]
    if workload == "gpt2":
        return "GPT-2 124M", list(gpt2_shapes())
    return f"{millions:g} M in equal tensors", [(int(millions * 1e6 / 5),)] * 5

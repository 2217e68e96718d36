"""What the tests of compressors share: references that read like the papers, and a model whose gradients are given.

The loss is linear in the parameters, so what a rank's backward leaves is what the test chose.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.compressors import CompressedGradients, Compressor
from signstep.distributed.compressors.blocks import BLOCK, Blocks

CPU = torch.device("cpu")

SHAPES = {"a": (7,), "b": (33, 50), "c": (1024,), "d": (1025,), "e": (3,), "conv": (8, 40, 3, 3), "f": (1,)}
"""Shorter than a block, exactly one, one and an element, and in an order that is not row-major."""


def ef_sign(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).sum() / len(x)
    return np.array([scale if v > 0 else -scale for v in x])


def one_bit_sgd(x: np.ndarray) -> np.ndarray:
    high = np.mean(x[x > 0]) if (x > 0).any() else 0.0
    low = np.mean(x[x <= 0]) if (x <= 0).any() else 0.0
    return np.array([high if v > 0 else low for v in x])


def qsgd(x: np.ndarray, u: np.ndarray, levels: int) -> np.ndarray:
    norm = np.abs(x).max()
    out = []
    for v, chance in zip(x, u, strict=True):
        y = levels * v / norm if norm > 0 else 0.0
        lower = math.floor(y)
        out.append(norm / levels * (lower + 1 if chance > 1 - (y - lower) else lower))
    return np.array(out)


def terngrad(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    return qsgd(x, u, 1)


def top_k(x: np.ndarray, ratio: float) -> np.ndarray:
    k = math.ceil(ratio * len(x))
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    out = np.zeros_like(x)
    out[kept] = x[kept]
    return out


def blockwise(x: np.ndarray, compress: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([compress(x[i : i + BLOCK]) for i in range(0, len(x), BLOCK)])


def decoded(compressor: Any, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """What one vector becomes, by blocks."""
    rows = -(-len(x) // BLOCK)
    padded = torch.zeros(rows, BLOCK)
    padded.view(-1)[: len(x)] = x
    sizes = torch.tensor([min(BLOCK, len(x) - i * BLOCK) for i in range(rows)])
    codes = compressor._encode(padded, Blocks(sizes, CPU), torch.empty(rows) if noise is None else noise)
    return compressor._decode(codes).view(-1)[: len(x)]


class Given(nn.Module):
    """Parameters x with the loss sum <x, g>; g None leaves a parameter out of backward."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            x = torch.zeros(shape)
            self.register_parameter(
                name, nn.Parameter(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
            )

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(self.get_parameter(name) * g).sum() for name, g in gradients.items()]).sum()


def in_memory(x: Tensor) -> np.ndarray:
    """As the Given model holds it, flat."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1).numpy()


def gradients_of(step: int, rank: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def hooked(compressor: Compressor, bucket_mb: float = 0.004, **options: Any) -> tuple[nn.Module, CompressedGradients]:
    model = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=bucket_mb, **options)
    return model, CompressedGradients(model, compressor, seed=5)


def means(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a backward leaves in p.grad."""
    model.zero_grad(set_to_none=True)
    model(gradients).backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


class Simulated:
    """M workers in numpy, parameter by parameter, as the papers have it."""

    def __init__(self, workers: int, compress: Callable[[np.ndarray], np.ndarray], two_sided: bool) -> None:
        self.residuals: list[dict[str, Any]] = [dict.fromkeys(SHAPES, 0.0) for _ in range(workers)]
        self.server: dict[str, Any] = dict.fromkeys(SHAPES, 0.0)
        self.compress, self.two_sided = compress, two_sided

    def step(self, gradients: Sequence[dict[str, Tensor]]) -> dict[str, np.ndarray]:
        out = {}
        for name in SHAPES:
            sent = []
            for e, g in zip(self.residuals, gradients, strict=True):
                p = in_memory(g[name]) + e[name]
                sent.append(self.compress(p))
                e[name] = p - sent[-1]
            mean = np.mean(sent, axis=0)
            if self.two_sided:
                p = mean + self.server[name]
                mean = self.compress(p)
                self.server[name] = p - mean
            out[name] = mean
        return out


SIMULATED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
    "ef-sign": (lambda x: blockwise(x, ef_sign), False),
    "ef-sign-two-sided": (lambda x: blockwise(x, ef_sign), True),
    "one-bit-sgd": (lambda x: blockwise(x, one_bit_sgd), True),
    "top-k": (lambda x: top_k(x, 0.01), False),
}

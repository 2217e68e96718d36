"""What the tests of compressors share: references that read like the papers, and a model whose gradients are given.

The loss is linear in the parameters, so what a rank's backward leaves is what the test chose.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


@functools.cache
def cosine_basis(n: int) -> np.ndarray:
    """The orthonormal DCT-II, as it is defined: [component, place]."""
    return np.array(
        [
            [math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * i + 1) * k / (2 * n)) for i in range(n)]
            for k in range(n)
        ]
    )


def demo_chunk(x: np.ndarray, k: int) -> np.ndarray:
    """What one chunk of a momentum becomes."""
    down, across = cosine_basis(x.shape[0]), cosine_basis(x.shape[1])
    components = (down @ x @ across.T).reshape(-1)
    kept = np.argsort(-np.abs(components), kind="stable")[:k]
    sent = np.zeros(x.size)
    sent[kept] = torch.tensor(components[kept]).bfloat16().double().numpy()
    return down.T @ sent.reshape(x.shape) @ across


def demo(x: np.ndarray, shape: tuple[int, ...], k: int = 32, chunk: int = 64) -> np.ndarray:
    """A matrix in chunks whose sides are the largest divisors of its sides up to `chunk`; x is in memory's order."""
    matrix = x.reshape(shape[0], -1) if len(shape) > 1 else x.reshape(1, -1)
    rows, columns = (max(n for n in range(1, chunk + 1) if side % n == 0) for side in matrix.shape)
    out = np.zeros_like(matrix)
    for i in range(0, matrix.shape[0], rows):
        for j in range(0, matrix.shape[1], columns):
            where = np.s_[i : i + rows, j : j + columns]
            out[where] = demo_chunk(matrix[where], k)
    return out.reshape(-1)


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


class Method(NamedTuple):
    """A compressor as its paper has it."""

    compress: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    """What a parameter becomes, in the order of its memory, with its shape."""
    two_sided: bool = False
    decay: float = 1.0
    """Of what was not sent."""


class Simulated:
    """M workers in numpy, parameter by parameter, as the papers have it."""

    def __init__(self, workers: int, method: Method) -> None:
        self.residuals: list[dict[str, Any]] = [dict.fromkeys(SHAPES, 0.0) for _ in range(workers)]
        self.server: dict[str, Any] = dict.fromkeys(SHAPES, 0.0)
        self.method = method

    def step(self, gradients: Sequence[dict[str, Tensor]]) -> dict[str, np.ndarray]:
        out = {}
        for name, shape in SHAPES.items():
            sent = []
            for e, g in zip(self.residuals, gradients, strict=True):
                p = in_memory(g[name]).astype(np.float64) + self.method.decay * e[name]
                sent.append(self.method.compress(p, shape))
                e[name] = p - sent[-1]
            mean = np.mean(sent, axis=0)
            if self.method.two_sided:
                p = mean + self.server[name]
                mean = self.method.compress(p, shape)
                self.server[name] = p - mean
            out[name] = mean
        return out


SIMULATED: dict[str, Method] = {
    "ef-sign": Method(lambda x, _: blockwise(x, ef_sign)),
    "ef-sign-two-sided": Method(lambda x, _: blockwise(x, ef_sign), two_sided=True),
    "one-bit-sgd": Method(lambda x, _: blockwise(x, one_bit_sgd), two_sided=True),
    "top-k": Method(lambda x, _: top_k(x, 0.01)),
    "demo": Method(demo, decay=0.999),
}

"""SignSGD of Theorem 1, for many laws of noise, batch sizes and numbers of steps at once.

`signstep.theory.problems.run` is the same algorithm in its readable form; the statement theorem.reference compares the
two. The noise of a step is cut from a pool of draws at a random place, so each coordinate's noise has the law of the
pool, given the past.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from signstep.theory import bounds
from signstep.theory.noise import LAWS, Law
from signstep.theory.problems import Problem

_POOL = 1 << 15


@dataclass(frozen=True)
class Descent:
    """Averages over the steps of each run, shape [runs, laws, batch sizes, chains]."""

    phi: Tensor
    l1: Tensor
    last_l1: Tensor
    """Over the last quarter of the steps."""
    weighted: Tensor
    """Sum of lr times Phi."""
    final: Tensor
    """F at the end."""


def pool(law: Law, n: int, chains: int, rng: Generator) -> Tensor:
    """Means of n draws of a symmetric law, symmetric about 0 and of variance 1 / n, both exactly; [chains, 2^15].

    Each chain has draws of its own, so the errors over chains include what a finite pool misses of the law.
    """
    half = torch.zeros(chains, _POOL // 2, dtype=torch.float64)
    for _ in range(n):
        half += law.sample(half.shape, rng)
    whole = torch.cat([half, -half], dim=1)
    return whole / whole.square().mean(dim=1, keepdim=True).sqrt() / math.sqrt(n)


def pools(laws: Sequence[str], batches: Sequence[int], chains: int, rng: Generator) -> Tensor:
    """The `pool` of each law of `LAWS` and batch size: [laws, batch sizes, chains, 2^15]."""
    return torch.stack([torch.stack([pool(LAWS[law], n, chains, rng) for n in batches]) for law in laws])


def descend(
    problem: Problem,
    noise: Tensor,
    noise_std: Tensor,
    *,
    steps: Sequence[int],
    lrs: Tensor,
    rng: Generator,
    start: Tensor | None = None,
) -> Descent:
    """Run SignSGD without momentum.

    Args:
        problem: its gradient is used.
        noise: `pools` in the units of the gradient, shape [laws, batch sizes, chains, draws].
        noise_std: its standard deviation, shape [laws, batch sizes] or one that broadcasts to it.
        steps: K of each run, descending.
        lrs: of each run and step, shape [runs, max K], or one for each run, [runs, 1].
        rng: draws the places in the pools.
        start: broadcasts to [runs, laws, batch sizes, chains, d]; None: the problem's.
    """
    if list(steps) != sorted(steps, reverse=True):
        raise ValueError(f"steps={list(steps)}: expected descending numbers")
    runs, size, d = len(steps), noise.shape[-1], problem.dim
    shape = (runs, *noise.shape[:-1], d)
    x = (problem.start if start is None else start).expand(shape).clone()
    s = noise_std.expand(noise.shape[:2])[..., None, None]
    wide = torch.cat([noise, noise[..., :d]], dim=-1)
    phi, l1, last_l1, weighted = (torch.zeros(shape[:-1], dtype=torch.float64) for _ in range(4))
    final = torch.zeros_like(phi)
    places = torch.randint(size, (steps[0],), generator=rng).tolist()
    active = runs
    lasts = [k - k // 4 for k in steps]
    for k, place in enumerate(places):
        g = problem.gradient(x)
        now, size_now = bounds.phi(g, s), g.abs().sum(-1)
        lr = lrs[:active, k if lrs.shape[1] > 1 else 0].view(-1, 1, 1, 1)
        phi[:active] += now
        weighted[:active] += lr * now
        l1[:active] += size_now
        ending = next((i for i in range(active) if k >= lasts[i]), active)
        last_l1[ending:active] += size_now[ending:]
        x = x - lr.unsqueeze(-1) * (g + wide[..., place : place + d]).sign_()
        while active and steps[active - 1] == k + 1:
            active -= 1
            final[active] = problem.value(x[active])
            x = x[:active]
    counts = torch.tensor(steps, dtype=torch.float64).view(-1, 1, 1, 1)
    quarters = torch.tensor([k // 4 for k in steps], dtype=torch.float64).view(-1, 1, 1, 1)
    return Descent(phi / counts, l1 / counts, last_l1 / quarters, weighted, final)

"""A step of small tensors, on free cores and beside a busy process on each core, as data loaders are.

    python benchmarks/small_tensors.py    # prints the table of results/bench-cpu/small-tensors.md, in a few minutes

Times are ratios over torch's SGD with momentum and fused=True, each of one round: the median, and the 10 to 90 % range.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from signstep import SignSGD

SIZES = (
    *((1000, 64), (1000, 1_000), (100, 1_000), (100, 10_000)),
    *((10, 10_000), (10, 100_000), (1, 100_000), (1, 1_000_000)),
)
"""Number of tensors, and elements of each."""
MAKE: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "fused SGD": lambda params: SGD(params, lr=1e-3, momentum=0.9, fused=True),
    "SignSGD": lambda params: SignSGD(params, lr=1e-3),
    "dithered": lambda params: SignSGD(params, lr=1e-3, dither=0.1),
}
ROUNDS, SECONDS, LIMIT = 41, 0.02, 15.0
"""A round gives each optimizer so many seconds of steps in turn.

A row ends after ROUNDS, or, with 5 or more, after LIMIT.
"""


def _spin(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process on each core that is never idle."""
    spinners = [multiprocessing.Process(target=_spin, args=(core,)) for core in os.sched_getaffinity(0)]
    for each in spinners:
        each.start()
    try:
        yield
    finally:
        for each in spinners:
            each.kill()


def ratios(count: int, size: int) -> dict[str, list[float]]:
    """Of each optimizer's time per step over the first one's, in every round."""
    optimizers = {}
    for name, make in MAKE.items():
        params = [Parameter(torch.randn(size)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn(size)
        optimizers[name] = make(params)
    found: dict[str, list[float]] = {name: [] for name in MAKE}
    begun = time.perf_counter()
    for done in range(ROUNDS):
        if done >= 5 and time.perf_counter() - begun > LIMIT:
            break
        seconds = {}
        for name, optimizer in optimizers.items():
            started, steps = time.perf_counter(), 0
            while steps == 0 or time.perf_counter() - started < SECONDS:
                optimizer.step()
                steps += 1
            seconds[name] = (time.perf_counter() - started) / steps
        for name, each in seconds.items():
            found[name].append(each / next(iter(seconds.values())))
    return found


def _row(cores: str, count: int, size: int) -> None:
    cells = []
    for values in list(ratios(count, size).values())[1:]:
        tenths = statistics.quantiles(values, n=10)
        cells.append(f"{statistics.median(values):.2f} ({tenths[0]:.2f}–{tenths[-1]:.2f})")
    print(f"| {count:,} of {size:,} | {cores} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    print(f"| tensors | cores | {' | '.join(list(MAKE)[1:])} |\n|---|---|{'---:|' * (len(MAKE) - 1)}")
    for count, size in SIZES:
        _row("free", count, size)
        with busy_cores():
            _row("busy", count, size)


if __name__ == "__main__":
    main()

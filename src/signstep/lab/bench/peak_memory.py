"""The peak memory of a step of training, with and without its activations.

On CUDA it is that of the caching allocator. On a CPU torch's profiler reports every allocation and release of torch's
allocator with address and size, also those inside of operators, and the running sum over them is exact; it does not
see the scratch memory that oneDNN and MKL take by themselves. Releases of older memory do not count.

A training step needs most memory when its activations are alive, which can hide a lower peak at another time. So there
is a second peak, over the tensors that last: all but those that are both made and released between the begin of a
`forward_pass` and the end of its backward pass, as activations and the temporaries of backward hooks are.
"""

from __future__ import annotations

import bisect
import gc
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_FORWARD, _BACKWARD = "signstep: forward pass", "autograd::engine::evaluate_function"


def forward_pass() -> AbstractContextManager[Any]:
    """A context that tells `peaks` where a forward pass is; the backward passes up to the next one are its own."""
    return record_function(_FORWARD)


def peaks(step: Callable[[], object], device: torch.device) -> tuple[int, int | None]:
    """The most bytes alive during a step, beyond those at its start: of all tensors, and of those that last.

    Args:
        step: what is measured; it should begin and end with the same tensors alive.
        device: whose memory; on CUDA the second number is None.

    Example:
        >>> def step() -> None:
        ...     x = torch.ones(1000, requires_grad=True)
        ...     with forward_pass():
        ...         loss = (x * x).exp().sum()
        ...     loss.backward()
        >>> whole, lasting = peaks(step, torch.device("cpu"))
        >>> whole > 12000, lasting // 1000  # x and x.grad
        (True, 8)
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before, None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    tree = profiled.profiler.kineto_results.experimental_event_tree()
    events = sorted(_walk(tree), key=lambda event: event.start_time_ns)
    passes: list[list[int]] = []  # begin and end
    blocks: list[list[int]] = []  # made and released, as places in events, and bytes
    alive: dict[int, list[int]] = {}
    for place, event in enumerate(events):
        if event.name == _FORWARD:
            passes.append([event.start_time_ns, event.end_time_ns])
        elif event.name.startswith(_BACKWARD) and passes:
            passes[-1][1] = max(passes[-1][1], event.end_time_ns)
        elif event.name == "[memory]":
            block = event.extra_fields
            if block.alloc_size > 0:
                alive[block.ptr] = [place, len(events), block.alloc_size]
                blocks.append(alive[block.ptr])
            elif block.ptr in alive:
                alive.pop(block.ptr)[1] = place

    def lasts(made: int, released: int) -> bool:
        at = bisect.bisect(passes, [events[made].start_time_ns, math.inf]) - 1
        return at < 0 or released == len(events) or events[released].start_time_ns > passes[at][1]

    return _peak(blocks), _peak(block for block in blocks if lasts(*block[:2]))


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def _peak(blocks: Iterable[list[int]]) -> int:
    changes = sorted(change for made, released, size in blocks for change in ((made, size), (released, -size)))
    return max(itertools.accumulate((size for _, size in changes), initial=0))

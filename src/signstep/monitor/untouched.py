"""A block of forward and backward passes that leaves a model, its optimizer and the generators as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def untouched(model: nn.Module, params: Iterable[Tensor], wrapped: DistributedDataParallel | None) -> Iterator[None]:
    """Inside, gradients may be overwritten; afterwards nothing has happened.

    Put back are the gradients of `params`, the model's buffers (those that a forward pass has replaced too), the random
    numbers of torch, Python and NumPy, and what DDP remembers of its last pass. Nothing is reduced over ranks.

    Args:
        model: whose buffers are kept, with one copy of each.
        params: that may get gradients.
        wrapped: the model's DistributedDataParallel, if it is in one.
    """
    grads = [(p, p.grad) for p in params]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    synced = None if wrapped is None else wrapped.require_forward_param_sync
    devices = {p.device.index for p, _ in grads if p.device.type == "cuda"}
    try:
        with ExitStack() as stack:
            if wrapped is not None:
                stack.enter_context(wrapped.no_sync())
            stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
            stack.enter_context(torch.enable_grad())
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)
        if wrapped is not None and synced is not None:
            wrapped.require_forward_param_sync = synced

"""Forward and backward passes that leave a model, its gradients and the random number generators as they were."""

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
    """Inside, gradients may be overwritten; afterwards everything is as it was.

    It restores the gradients of `params`, the model's buffers (also those that a forward pass has replaced), the random
    number generators of torch, Python and NumPy, and what DDP remembers of its last pass. Ranks exchange nothing.

    Args:
        model: its buffers are copied.
        params: the parameters that may get gradients.
        wrapped: the DistributedDataParallel that the model is in, if it is.
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

"""The step inside backward: each parameter moves as soon as its gradient is there, and the gradient is freed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from signstep.optim.hybrid import HybridSignSGD
from signstep.optim.lion import Lion
from signstep.optim.shards import is_sharded
from signstep.optim.signsgd import ENGINE_CHOICE, SignSGD, signsgd

__all__ = ["attach_to_backward"]


def attach_to_backward(model: torch.nn.Module, optimizer_options: Mapping[str, Any]) -> SignSGD:
    """Make ``loss.backward()`` step the model: no full set of gradients ever exists.

    A parameter moves when its gradient has been accumulated, as the optimizer's ``step()`` would move it, and its
    ``grad`` is set to None; the step count and, in the sign phase of `HybridSignSGD`, the calibrated rate are brought
    up to date when backward ends. Memory: the largest gradients that are alive at once instead of all.

    Args:
        model: its parameters that require a gradient are stepped.
        optimizer_options: keywords of `SignSGD`, or of `HybridSignSGD` if there are any of its own (``switch_step``,
            ``calibration``, ``ema_decay``, ``sgd_momentum``), or of `Lion` if there are ``betas``.

    Returns:
        The optimizer, for LR schedulers, ``state_dict`` and ``param_groups``. Its ``step()`` finds no gradients and
        does nothing, and ``zero_grad()`` may be left out, so a loop that calls them works as it is.

    Raises:
        TypeError, ValueError: as the optimizer's constructor.
        RuntimeError: the model is wrapped in DistributedDataParallel, whose gradients are averaged after the hooks that
            this uses, or sharded by fully_shard; or, in backward, checkpointing is reentrant, so that backwards are
            nested.

    What needs all gradients before the step cannot be had with it: gradient accumulation over several backwards,
    clipping by the global norm, a GradScaler, differentiable or capturable steps, data parallelism (do not wrap or
    shard the model later either), parameters on several devices, and parameters that are added or unfrozen later.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = attach_to_backward(model, {"lr": 1e-3})
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> [p.grad for p in model.parameters()]
        [None, None, None, None]
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError(
            "attach_to_backward: gradients of a DistributedDataParallel model are averaged only after the hooks that "
            "step it; use optimizer.step() with it"
        )
    for name in ("differentiable", "capturable"):
        if optimizer_options.get(name):
            raise ValueError(
                f"Invalid {name}: True, a step inside backward cannot be so; call optimizer.step() instead"
            )
    params = [p for p in model.parameters() if p.requires_grad]
    if any(map(is_sharded, params)):
        raise RuntimeError(
            "attach_to_backward: parameters are sharded (DTensor, as by fully_shard), and the ranks add up what a step "
            "measures of them when all gradients are there; use optimizer.step() with them"
        )
    if len(devices := {p.device for p in params}) > 1:
        raise ValueError(
            f"attach_to_backward: parameters on several devices, {', '.join(map(str, devices))}, cannot be stepped"
        )
    extensions = (Lion, HybridSignSGD)
    own = (each for each in extensions if optimizer_options.keys() & (each.OPTIONS.keys() - SignSGD.OPTIONS.keys()))
    optimizer = next(own, SignSGD)(params, **optimizer_options)
    optimizer.start_stepping_in_backward()
    stepper = _Stepper(optimizer)
    for ordinal, p in enumerate(optimizer.param_groups[0]["params"]):
        p.register_post_accumulate_grad_hook(functools.partial(stepper.step_parameter, ordinal))
    return optimizer


_NESTED = "a step inside backward cannot be taken in nested backwards: checkpoint with use_reentrant=False"


class _Stepper:
    """Steps the parameters of the optimizer's one group as their gradients come, and ends the step with backward."""

    def __init__(self, optimizer: SignSGD) -> None:
        self.optimizer = optimizer
        self.sums: Tensor | None = None
        self.backward = -1

    @torch.no_grad()
    def step_parameter(self, ordinal: int, p: Tensor) -> None:
        group = self.optimizer.param_groups[0]
        # By its number: a backward that fails has no end, and the next one starts a step all the same.
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:
            if backward < self.backward:  # numbers go up, so that one inside this one has ended
                raise RuntimeError(_NESTED)
            self.backward = backward
            self.sums = self.optimizer.new_sums(group)
            Variable._execution_engine.queue_callback(functools.partial(self.finish, backward))
        batch = self.optimizer.collect(group, [p], [ordinal])
        rows = slice(ordinal, ordinal + 1)
        options = self.optimizer.options(group, None if self.sums is None else self.sums[rows], rows)
        signsgd(batch, options, **{name: group[name] for name in ENGINE_CHOICE})
        p.grad = None

    @torch.no_grad()
    def finish(self, backward: int) -> None:
        if backward != self.backward:
            raise RuntimeError(_NESTED)
        self.optimizer.finish_step(self.optimizer.param_groups[0], self.sums)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or schedulers would warn that no step has been taken

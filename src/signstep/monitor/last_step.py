"""What the last step moved along, read from the optimizer: the gradient that entered the momentum, and the momentum.

`BeforeStep` keeps what a step overwrites. Everything else is read after the step, because a closure computes the
gradients inside it, and because a fused step under a GradScaler writes them back unscaled. What is made of these
tensors is in `dither_meter` and `calibration_panel`; the sums over them are in `totals`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from signstep.kernels.momentum import is_freed, mean_square, read_momentum
from signstep.monitor.totals import flat
from signstep.optim.dither import dither_std
from signstep.optim.signsgd import SignSGD

__all__ = [
    "BeforeStep",
    "MovedParam",
    "did_nothing",
    "entered_gradient",
    "interpolates",
    "is_sharded",
    "keeps_average",
    "kept_momentum",
    "moved_params",
    "phase",
    "sign_momentum",
    "takes_votes",
]


class MovedParam(NamedTuple):
    """A parameter that the step has moved, and its param_group."""

    param: Tensor
    group_index: int
    group: dict[str, Any]


@dataclass
class BeforeStep:
    """What is known of an optimizer before a step and gone after it."""

    steps: list[int | None]
    """The step count of each param_group; None where the optimizer does not count."""
    phases: list[str]
    """The `phase` of each param_group."""
    params: dict[Tensor, Tensor]
    """Copies of the parameters that coupled weight decay adds to the gradient."""
    mean_squares: dict[Tensor, Tensor]
    """The mean square of the momentum of each parameter whose dither is relative."""

    @classmethod
    def of(cls, optimizer: Optimizer, copies: Callable[[dict[str, Any]], bool]) -> BeforeStep:
        """Look at an optimizer now; `copies` says of which param_groups parameters may be copied."""
        groups = optimizer.param_groups
        coupled = [g for g in groups if _coupled_decay(optimizer, g) != 0 and copies(g)]
        return cls(
            steps=[int(g["step"]) if isinstance(optimizer, SignSGD) else None for g in groups],
            phases=[phase(optimizer, g) for g in groups],
            params={p: p.detach().clone() for g in coupled for p in g["params"] if p.requires_grad},
            mean_squares=_mean_squares(optimizer),
        )

    def sigma(self, moved: MovedParam) -> Tensor:
        """sigma_k of the dither in signstep's optimizer, 0-dim: eq. (9), times the momentum's rms if it is relative."""
        step = self.steps[moved.group_index]
        assert step is not None
        sigma = dither_std(
            torch.tensor(step, dtype=torch.int64, device="cpu"), moved.group["dither"], moved.group["dither_decay"]
        )
        mean_square = self.mean_squares.get(moved.param)
        return sigma if mean_square is None else sigma.to(mean_square.device) * mean_square.sqrt()


def takes_votes(optimizer: Optimizer) -> bool:
    """Whether the gradients are votes, and the momentum is on the workers' side."""
    return isinstance(optimizer, SignSGD) and optimizer.takes_votes


def phase(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """What the next step of a param_group is: "sign" or "sgd", or "" for an optimizer that is not signstep's."""
    if not isinstance(optimizer, SignSGD):
        return ""
    return "sign" if optimizer.in_sign_phase(group) else "sgd"


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which a rank has a part."""
    return hasattr(p, "to_local")


def did_nothing(optimizer: Optimizer) -> bool:
    """Whether a fused step has found an infinity under a GradScaler and done nothing.

    An attribute that the GradScaler sets is the only trace of that.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0


def moved_params(optimizer: Optimizer, before: BeforeStep) -> Iterator[MovedParam]:
    """The parameters that the step since `before` has moved, but for those whose gradient is sparse or sharded."""
    if did_nothing(optimizer):
        return
    # A group that was added since is not in `before`.
    for index, (group, steps) in enumerate(zip(optimizer.param_groups, before.steps, strict=False)):
        if steps is None or int(group["step"]) > steps:
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse and not is_sharded(p):
                    yield MovedParam(p, index, group)


def entered_gradient(optimizer: Optimizer, moved: MovedParam, before: BeforeStep) -> Tensor:
    """The gradient that entered the momentum: negated by maximize, and with coupled weight decay.

    Returns:
        1-D, at least float32, a complex number as two coordinates.
    """
    p, _, group = moved
    assert p.grad is not None
    g = flat(p.grad.resolve_conj())
    if group.get("maximize", False):
        g = -g
    return g + _coupled_decay(optimizer, group) * flat(before.params[p]) if p in before.params else g


def keeps_average(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the next step of a group is taken along a momentum that the optimizer keeps."""
    if isinstance(optimizer, SignSGD):
        if phase(optimizer, group) == "sgd":
            return bool(group["sgd_momentum"] > 0)
        return any(optimizer.averages(group)) and not optimizer.takes_votes
    if isinstance(optimizer, torch.optim.SGD):
        return bool(group["momentum"] != 0)
    return "betas" in group or bool(group.get("momentum", 0) != 0)


def kept_momentum(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor | None:
    """The momentum that an optimizer keeps of a parameter, as an average of gradients.

    That is ``exp_avg``, or ``momentum_buffer`` of torch.optim.SGD times (1 - momentum) / (1 - dampening).

    Returns:
        1-D, at least float32, a complex number as two coordinates; None where the optimizer keeps none, or one that is
        no average of gradients, or one that the next step is the first to use.
    """
    state = optimizer.state.get(p, {})
    if isinstance(state.get("exp_avg"), Tensor):
        if isinstance(optimizer, SignSGD) and (
            not optimizer.kept_state(group).get("exp_avg") or is_freed(state["exp_avg"])
        ):
            return None
        return flat(read_momentum(state["exp_avg"], state.get("exp_avg_scale")))
    buffer = state.get("momentum_buffer")
    if isinstance(optimizer, torch.optim.RMSprop) or not isinstance(buffer, Tensor):
        return None
    dampening = group.get("dampening")
    if dampening is None:  # an average by itself, as in torch.optim.Muon
        return flat(buffer)
    return None if dampening == 1 else flat(buffer) * ((1 - group["momentum"]) / (1 - dampening))


def interpolates(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a group's sign is that of an average of momentum and gradient which is not kept, as in Lion."""
    return isinstance(optimizer, SignSGD) and optimizer.averages(group)[1] is not None


def sign_momentum(optimizer: Optimizer, moved: MovedParam, before: BeforeStep) -> Tensor | None:
    """What a step with momentum has taken the sign of: the momentum, or Lion's average of it and the gradient.

    c = beta_1 m + (1 - beta_1) g has the m of before the step, which is (m' - (1 - beta_2) g) / beta_2.

    Returns:
        As `kept_momentum`; None also where beta_2 is 0, and m' says nothing of m.
    """
    m = kept_momentum(optimizer, moved.group, moved.param)
    if m is None or not interpolates(optimizer, moved.group):
        return m
    beta_1, beta_2 = moved.group["betas"]
    return None if beta_2 == 0 else torch.lerp(entered_gradient(optimizer, moved, before), m, beta_1 / beta_2)


def _mean_squares(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """The squares of what the next step's relative dither multiplies sigma by, by parameter."""
    squares: dict[Tensor, Tensor] = {}
    if not isinstance(optimizer, SignSGD) or optimizer.takes_votes:
        return squares
    for group in optimizer.param_groups:
        relative = group["dither"] > 0 and group["dither_scale"] == "relative"
        for p in group["params"] if relative and phase(optimizer, group) == "sign" else ():
            square = optimizer.state.get(p, {}).get("mean_square")
            if square is None:
                m = kept_momentum(optimizer, group, p)
                square = torch.zeros((), dtype=torch.float32, device=p.device) if m is None else mean_square(m)
            squares[p] = square.clone()
    return squares


def _coupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The factor by which the optimizer adds a parameter to its gradient; 0 where it does not."""
    if takes_votes(optimizer):
        return 0.0
    known = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)
    if group.get("decoupled_weight_decay", not known):
        return 0.0
    return float(group.get("weight_decay", 0.0))

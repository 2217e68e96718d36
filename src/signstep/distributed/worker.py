"""One worker of a vote: momentum, dither and sign of its own gradients, as bits, and its state between steps.

How ballots are exchanged and counted is in vote.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from signstep.kernels import bits
from signstep.kernels.engine import Direction, Measured, Options, Slot, Tensors, select
from signstep.kernels.momentum import MOMENTUM, STOCHASTIC, enter_momentum, is_freed, new_momentum
from signstep.kernels.reference import Segment
from signstep.optim.calibration import RULES
from signstep.optim.dither import dither_std
from signstep.optim.options import STATE_DTYPES, rate_and_decay
from signstep.optim.ordinals import noise_ordinals
from signstep.optim.signsgd import SignSGD
from signstep.optim.wrappers import unwrap

__all__ = ["Gradient", "Worker", "resplit", "worker_seed"]

_NOT_ONE_BIT = {
    "post": "noise after the sign does not fit in",
    "expected": "the expected sign is a number, which does not fit in",
}
_WHOLE = (0, 1)
_GOLDEN = 0x9E3779B97F4A7C15


def check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a ValueError if the value of an option is not among those that are allowed."""
    if value not in allowed:
        raise ValueError(f"Invalid {option}: {value!r}, expected one of {', '.join(map(repr, allowed))}")


def worker_seed(seed: int, rank: int) -> int:
    """The Philox key of one worker's dither, zero coins and rounding: rank 0's is the optimizer's own.

    Args:
        seed: of the param_group, in [0, 2^64).
        rank: of the worker.

    Example:
        >>> worker_seed(7, 0)
        7
    """
    return seed ^ (rank * _GOLDEN % (1 << 64))


@functools.lru_cache(maxsize=16)
def step_tensor(step: int) -> Tensor:
    """A number of steps as engines take it, 0-dim int64, only to be read: buckets of a step share it."""
    return torch.tensor(step, dtype=torch.int64, device="cpu")


class Gradient(NamedTuple):
    """Consecutive elements of one parameter's gradient, as a worker takes them."""

    name: str
    param: Tensor
    """The same elements of the parameter, 1-D; read by coupled weight decay only."""
    flat: Tensor
    """The elements of the gradient, 1-D."""
    start: int = 0
    """Index of the first element in the whole parameter."""


def measures_momentum(group: Mapping[str, Any]) -> bool:
    """Whether a param_group calibrates by the norm of the momentum, of which each worker has its own."""
    return RULES.get(group.get("calibration", "")) is Measured.MOMENTUM


def sign_optimizer(optimizer: Optimizer) -> SignSGD:
    """The optimizer of a vote, taken out of its wrappers; TypeError where it is not one of signstep's."""
    inner = unwrap(optimizer)
    if not isinstance(inner, SignSGD):
        raise TypeError(
            f"a vote needs SignSGD, HybridSignSGD or Lion, got {type(inner).__name__}; for other optimizers compress "
            "the gradients, with signstep.distributed.CompressedGradients"
        )
    return inner


class Worker:
    """Momentum, dither and sign of one worker, for every parameter of an optimizer.

    State is kept by parameter name, 1-D in the order of the parameter's memory: ``exp_avg`` (with ``exp_avg_scale`` in
    8 bits), ``mean_square`` under relative dither, ``residual`` under error feedback.

    Args:
        optimizer: its options are the worker's, and it leaves momentum and dither to the workers from now on.
        names: name of each parameter.
        rank: rank of this worker.
        world_size: number of workers.
        dither_workers: "independent": each worker's noise has the optimizer's sigma. "scaled": sigma sqrt(M), so that
            the expected vote is linear in the momentum over the same range as one worker's sign.
        error_feedback: add to the momentum what earlier signs left out, a = m + e, and keep e = a - mean|a| sign.
        part: (i, n): this process keeps the i-th of n parts of the worker's parameters, see `nodes.Node`.

    Raises:
        TypeError: the optimizer is not one of signstep's.
        ValueError: an option that a vote cannot have.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Tensor, str],
        rank: int,
        world_size: int,
        *,
        dither_workers: str = "independent",
        error_feedback: bool = False,
        part: tuple[int, int] = _WHOLE,
    ) -> None:
        optimizer = sign_optimizer(optimizer)
        check_choice("dither_workers", dither_workers, ("independent", "scaled"))
        self.optimizer, self.rank, self.world_size, self.part = optimizer, rank, world_size, part
        self.names = dict(names)
        self.error_feedback = error_feedback
        self._sigma_factor = math.sqrt(world_size) if dither_workers == "scaled" else 1.0
        self.state: dict[str, dict[str, Tensor]] = {}
        self.handed_over: set[str] = set()
        """Parameters whose momentum SGD has taken over since this worker was made or loaded."""
        self.groups: dict[str, int] = {}
        self.ordinals: dict[str, int] = {}
        if optimizer.steps_in_backward:
            raise ValueError("a vote comes after backward: build the optimizer itself instead of attach_to_backward")
        for group in optimizer.param_groups:
            self._check(group)
        ranges = noise_ordinals(optimizer.param_groups)
        for index, (group, ordinals) in enumerate(zip(optimizer.param_groups, ranges, strict=True)):
            for p, ordinal in zip(group["params"], ordinals, strict=True):
                if p in self.names:
                    name = self.names[p]
                    self.groups[name], self.ordinals[name] = index, ordinal
                    if optimizer.in_sign_phase(group):
                        self._take_over(name, p)
        self.steps = [int(group["step"]) for group in optimizer.param_groups]
        """How many votes each param_group has taken part in."""
        optimizer.start_taking_votes()

    def _check(self, group: dict[str, Any]) -> None:
        position = group["dither_position"]
        if group["dither"] > 0 and position in _NOT_ONE_BIT:
            raise ValueError(f"Invalid dither_position: {position!r}, {_NOT_ONE_BIT[position]} one bit; use 'pre'")
        for option in ("capturable", "differentiable"):
            if group[option]:
                raise ValueError(f"Invalid {option}: True, a vote cannot be so; leave it out")
        strangers = sum(p.requires_grad and p not in self.names for p in group["params"])
        if strangers:
            raise ValueError(
                f"the optimizer has {strangers} parameters that are not the model's, which would move by their sign "
                "alone: give them an optimizer of their own"
            )
        if any(p.is_complex() for p in group["params"]):
            raise ValueError("a vote takes real parameters: keep a complex one as torch.view_as_real of itself")
        if self.error_feedback and STATE_DTYPES[group["state_dtype"]] in STOCHASTIC:
            raise ValueError(f"Invalid state_dtype: {group['state_dtype']} with error_feedback=True, use torch.float32")

    def _take_over(self, name: str, p: Tensor) -> None:
        """What the optimizer has kept of a parameter becomes this worker's."""
        state = self.optimizer.state.get(p, {})
        taken = {key: state.pop(key) for key in (*MOMENTUM, "mean_square") if key in state}
        if p in self.optimizer.state and not state:  # else somebody else keeps something there too
            del self.optimizer.state[p]
        if "exp_avg" in taken and not is_freed(taken["exp_avg"]):
            own = taken["exp_avg"]
            own = own.view(-1) if own.dtype == torch.int8 else in_memory_order(own)
            self.state[name] = taken | {"exp_avg": own}

    def votes(self, name: str) -> bool:
        """Whether a parameter is moved by votes now: it is the optimizer's, and its group is in the sign phase."""
        if name not in self.groups:
            return False
        index = self.groups[name]
        # By the count of votes, because a rank that has joined does not step its optimizer.
        return self.optimizer.is_sign_step(self.optimizer.param_groups[index], self.steps[index])

    def cast(self, gradients: Sequence[Gradient], words: Tensor, slots: Sequence[Slot]) -> Tensor | None:
        """Take gradients into the momentum and write the signs into the words of their slots.

        Args:
            gradients: those of parameters that vote; several may be parts of the same parameter.
            words: int64 [W], written.
            slots: for each gradient, where its bits go.

        Returns:
            float64 [gradients, 2]: 0 and ||m||^2 of the momenta that are measured, 0 of others; None if none is.
        """
        sums = None
        by_group: dict[int, list[int]] = {}
        for i, gradient in enumerate(gradients):
            by_group.setdefault(self.groups[gradient.name], []).append(i)
        for index, members in by_group.items():
            group = self.optimizer.param_groups[index]
            chosen, own = [gradients[i] for i in members], [slots[i] for i in members]
            tensors, options = self._tensors(group, chosen), self._options(group, self.steps[index])
            if measures_momentum(group):
                options = options._replace(sums=words.new_zeros(len(members), 2, dtype=torch.float64))
            if self.error_feedback:
                self._cast_with_feedback(tensors, options, chosen, words, own)
            else:
                bits.cast(tensors, options, words, own)
            if options.sums is not None:
                sums = words.new_zeros(len(gradients), 2, dtype=torch.float64) if sums is None else sums
                sums[members] = options.sums
        return sums

    def _tensors(self, group: dict[str, Any], gradients: Sequence[Gradient]) -> Tensors:
        tensors = Tensors([], [], [], [], [], [], [])
        for name, param, flat, start in gradients:
            tensors.params.append(param)
            tensors.grads.append(flat)
            tensors.ordinals.append(self.ordinals[name])
            tensors.offsets.append(start)
            state = self.state.setdefault(state_key(name, start), {})
            if any(self.optimizer.averages(group)):
                if "exp_avg" not in state:
                    state.update(new_momentum(flat, STATE_DTYPES[group["state_dtype"]]))
                tensors.exp_avgs.append(state["exp_avg"])
                if "exp_avg_scale" in state:
                    tensors.scales.append(state["exp_avg_scale"])
            if group["dither"] > 0 and group["dither_scale"] == "relative":
                if "mean_square" not in state:
                    state["mean_square"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                tensors.mean_squares.append(state["mean_square"])
            if self.error_feedback and "residual" not in state:
                state["residual"] = torch.zeros_like(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
        return tensors

    def sigma(self, group: dict[str, Any], step: int) -> Tensor | None:
        """The standard deviation of the noise that this worker adds to a param_group's momentum; None: it adds none."""
        if group["dither"] == 0:
            return None
        return dither_std(step_tensor(step), group["dither"], group["dither_decay"]) * self._sigma_factor

    def _options(self, group: dict[str, Any], step: int) -> Options:
        sigma = self.sigma(group, step)
        momentum, interpolation = self.optimizer.averages(group)
        return Options(
            step=step_tensor(step),
            rate=0.0,
            decay=1.0,
            coupled_weight_decay=rate_and_decay(group)[2],
            momentum=momentum,
            interpolation=interpolation,
            state_dtype=STATE_DTYPES[group["state_dtype"]],
            direction=Direction.SIGN if sigma is None else Direction.PRE,
            sigma=sigma,
            seed=worker_seed(group["seed"], self.rank),
            maximize=group["maximize"],
            measured=Measured.MOMENTUM,
            law=group["dither_law"],
        )

    def _cast_with_feedback(
        self,
        tensors: Tensors,
        options: Options,
        gradients: Sequence[Gradient],
        words: Tensor,
        slots: Sequence[Slot],
    ) -> None:
        for i, (gradient, slot) in enumerate(zip(gradients, slots, strict=True)):
            one = select(tensors, [i])
            residual = self.state[state_key(gradient.name, gradient.start)]["residual"]
            m, _ = enter_momentum(one, 0, options)
            if options.sums is not None:
                options.sums[i, 1] += m.double().square().sum()
            corrected = m + residual
            plain = options._replace(
                momentum=0.0, interpolation=None, maximize=False, coupled_weight_decay=0.0, sums=None
            )
            bits.cast(one._replace(grads=[corrected], exp_avgs=[], scales=[]), plain, words, [slot])
            residual.copy_(corrected)
            bits.spread(words, None, [slot], [corrected])
            residual.sub_(corrected, alpha=float(residual.abs().mean()))

    def slots(self, gradients: Sequence[Gradient]) -> tuple[list[Slot], int]:
        """Where the bits of each gradient go, side by side from word 0, and the number of words."""
        out, first = [], 0
        for name, _, flat, start in gradients:
            out.append(Slot(first, Segment(self.ordinals[name], start, flat.numel())))
            first += bits.word_count(flat.numel())
        return out, first

    def state_dict(self) -> dict[str, Any]:
        """The worker's state: tensors by parameter name, and how many votes each param_group has taken part in."""
        part = {} if self.part == _WHOLE else {"part": list(self.part)}
        return {
            **part,
            "rank": self.rank,
            "world_size": self.world_size,
            "steps": list(self.steps),
            "state": {name: dict(state) for name, state in self.state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` of the same rank has returned, or a whole worker's where this process keeps a part.

        Raises:
            ValueError: it is another rank's, of another number of workers, another part, or of other parameters.
        """
        if state["world_size"] != self.world_size:
            raise ValueError(
                f"this vote was saved by {state['world_size']} workers and there are {self.world_size} now: gather the "
                "states of all ranks and pass them through signstep.distributed.resplit"
            )
        if state["rank"] != self.rank:
            raise ValueError(f"this is the vote's state of rank {state['rank']}, and this is rank {self.rank}")
        part = _part_of(state)
        if part not in (_WHOLE, self.part):
            raise ValueError(
                f"this is the vote's state of rank {part[0]} of the {part[1]} of a node, and this is rank "
                f"{self.part[0]} of {self.part[1]}: gather the states of all ranks and pass them through "
                "signstep.distributed.resplit"
            )
        if len(state["steps"]) != len(self.steps):
            raise ValueError(
                f"this vote was saved with {len(state['steps'])} param_groups, the optimizer has {len(self.steps)}"
            )
        sizes = {name: p.numel() for p, name in self.names.items()}
        unknown = sorted({name.partition("@")[0] for name in state["state"]} - sizes.keys())
        if unknown:
            raise ValueError(f"this vote was saved with parameters that the model has not: {', '.join(unknown)}")
        for name, tensors in state["state"].items():
            if "@" not in name and "exp_avg" in tensors and tensors["exp_avg"].numel() > sizes[name]:
                raise ValueError(
                    f"the momentum of {name} was saved with {tensors['exp_avg'].numel()} elements, the parameter has "
                    f"{sizes[name]}: load the state of this model"
                )
        devices = {name: p.device for p, name in self.names.items()}
        self.steps = list(state["steps"])
        self.handed_over.clear()
        self.state = {
            name: {key: x.to(devices[name.partition("@")[0]], copy=True) for key, x in tensors.items()}
            for name, tensors in state["state"].items()
        }


def _part_of(state: Mapping[str, Any]) -> tuple[int, int]:
    index, count = state.get("part", _WHOLE)
    return index, count


def state_key(name: str, start: int) -> str:
    """The key, in a worker's state, of a parameter's elements from `start` on."""
    return name if start == 0 else f"{name}@{start}"


def in_memory_order(x: Tensor) -> Tensor:
    """A dense tensor's elements as DDP lays out its gradient, 1-D: in the order of its memory."""
    if x.is_contiguous():
        return x.detach().view(-1)
    strides = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)
    dense = all(s == math.prod(n for _, n in strides[:i]) for i, (s, _) in enumerate(strides))
    return x.detach().as_strided((x.numel(),), (1,)) if dense else x.detach().reshape(-1)


def resplit(states: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The states of all old workers as those of another number of workers.

    Every new worker starts from the mean of the old workers' momenta and residuals, so their mean over workers, which
    is what the vote is about, is what it was. 8-bit momentum is left out, and starts from 0. What is the same on all
    workers, as the point that a round of `LocalVote` began at, stays.

    Args:
        states: `state_dict` of every old rank, in any order.
        world_size: number of workers from now on; where the ranks of a node are one worker, the number of nodes.

    Returns:
        For each new worker, what `load_state_dict` takes on its rank, or on all ranks of its node.

    Raises:
        ValueError: a rank's state is missing or there twice, or a delayed round was under way.

    Example:
        >>> old = [{"rank": r, "world_size": 2, "steps": [5], "state": {"w": {"exp_avg": torch.ones(3) * r}}}
        ...        for r in (0, 1)]
        >>> new = resplit(old, 3)
        >>> len(new), new[2]["state"]["w"]["exp_avg"].tolist()
        (3, [0.5, 0.5, 0.5])
    """
    if any("rank" not in state for state in states):
        raise ValueError("resplit takes states of votes and of LocalVote: go on with as many workers as were saved")
    ranks = sorted(state["rank"] for state in states)
    expected = states[0]["world_size"] if states else 0
    parts = _part_of(states[0])[1] if states else 1
    found = sorted((state["rank"], *_part_of(state)) for state in states)
    if not states or found != [(rank, part, parts) for rank in range(expected) for part in range(parts)]:
        each = "ranks" if parts == 1 else f"nodes' {parts} ranks"
        raise ValueError(f"resplit needs the state of each of the {expected} {each} once, got those of {ranks}")
    merged: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys(name for state in states for name in state["state"]):
        entries = [state["state"][name] for state in states if name in state["state"]]
        kept = [key for key in entries[0] if key != "exp_avg_scale" and entries[0][key].is_floating_point()]
        merged[name] = {}
        for key in kept:
            total = torch.stack([e[key].to(torch.float64) for e in entries]).sum(0) / expected
            merged[name][key] = total.to(entries[0][key].dtype)
    if any(state.get("away") for state in states):
        raise ValueError("a round of LocalVote was under way as these states were saved: call hold_round() before")
    common = {key: states[0][key] for key in ("method", "schedule", "away", "start") if key in states[0]}
    return [
        {
            **common,
            "rank": rank,
            "world_size": world_size,
            "steps": list(states[0]["steps"]),
            "state": {name: {key: x.clone() for key, x in tensors.items()} for name, tensors in merged.items()},
        }
        for rank in range(world_size)
    ]

"""What all methods of local steps share: workers train by themselves, and now and then agree on one point.

A round of `every` steps, H, ends at different steps for different fragments of the model, so that the wire has less to
carry at once; and what a fragment's workers have agreed on may arrive some steps later, while they train on (streaming
DiLoCo, Douillard et al. 2025, arXiv 2501.18512). With x the common point of a fragment, :math:`x_w` where worker w is
when it departs, A what is agreed on the ways :math:`d_w = x - x_w`, and :math:`y_w` where it is when that arrives,

.. math::
    x' = A(x, d_1, \\dots, d_M), \\qquad y_w \\leftarrow x' + (y_w - x_w)

so every step of every worker is in exactly one way. Without a delay :math:`y_w = x_w`, and all go on from x'.
"""

from __future__ import annotations

import functools
import math
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signstep.distributed.attacks import Attack, Collude
from signstep.distributed.collectives import CollectiveError, failure, own_group, release_at_exit, start_all_gather
from signstep.distributed.hooks import Entry
from signstep.distributed.worker import in_memory_order

__all__ = ["Departure", "LocalSteps", "Rounds", "Schedule"]

_Job = tuple[Callable[[], Tensor | None], Future[Tensor | None]]


def check_outer(outer_lr: float, outer_momentum: float) -> None:
    """Raise a ValueError for an outer rate or momentum that is out of its range."""
    if not 0 < outer_lr < math.inf:
        raise ValueError(f"Invalid outer_lr: {outer_lr}, expected a finite outer_lr > 0")
    if not 0 <= outer_momentum < 1:
        raise ValueError(f"Invalid outer_momentum: {outer_momentum}, expected 0 <= outer_momentum < 1")


class Schedule:
    """After which steps fragments depart, and arrive.

    Args:
        every: H, steps of a round.
        delay: steps from a departure to the arrival.
        fragments: the j-th of P departs j H / P steps after the first.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> schedule = Schedule(every=4, delay=1, fragments=2)
        >>> [schedule.step() for _ in range(5)]
        [([], []), ([], [0]), ([0], []), ([], [1]), ([1], [])]
    """

    def __init__(self, every: int, delay: int = 0, fragments: int = 1) -> None:
        for name, value, least, most in (
            ("every", every, 1, math.inf),
            ("delay", delay, 0, every - 1),
            ("fragments", fragments, 1, every),
        ):
            if not isinstance(value, int) or not least <= value <= most:
                limit = "" if most == math.inf else f" and <= {most}, as every is {every}"
                raise ValueError(f"Invalid {name}: {value}, expected an integer >= {least}{limit}")
        self.every, self.delay, self.fragments = every, delay, fragments
        self.total = 0
        """Steps in all."""
        self.taken = 0
        """Steps since the last time that all fragments arrived together."""
        self.since = [0] * fragments
        """Steps since each fragment departed."""
        self.away: list[int] = []
        """Fragments that have departed and not arrived, the first to arrive first."""

    def step(self) -> tuple[list[int], list[int]]:
        """Count a step: which of the fragments that are away arrive after it, and which depart then."""
        self.total += 1
        self.taken += 1
        self.since = [since + 1 for since in self.since]
        arriving = [f for f in self.away if self.since[f] == self.delay]
        departing = [f for f in range(self.fragments) if (self.taken - self._offset(f)) % self.every == 0]
        self.away = [f for f in self.away if f not in arriving] + (departing if self.delay > 0 else [])
        for fragment in departing:
            self.since[fragment] = 0
        return arriving, departing

    def end(self) -> tuple[list[int], list[int]]:
        """All that are away arrive, and then depart those that have taken steps since; the count begins anew."""
        away, rest = self.away, [f for f in range(self.fragments) if self.since[f] > 0]
        self.taken, self.since, self.away = 0, [0] * self.fragments, []
        return away, rest

    def _offset(self, fragment: int) -> int:
        return (fragment + 1) * self.every // self.fragments

    def state_dict(self) -> dict[str, Any]:
        """What has been counted, and the options that it belongs to."""
        options = {"every": self.every, "delay": self.delay, "fragments": self.fragments}
        return options | {
            "total": self.total, "taken": self.taken, "since": list(self.since), "away": list(self.away)
        }  # fmt: skip

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError if a state is that of a schedule with other options."""
        for name in ("every", "delay", "fragments"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"this state was saved with {name}={state[name]}, and here it is {getattr(self, name)}: go on with "
                    "the same; or call hold_round() before saving, and load the states of model and optimizer alone"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of a schedule with the same options gave."""
        self.check(state)
        self.total, self.taken = state["total"], state["taken"]
        self.since, self.away = list(state["since"]), list(state["away"])


@dataclass
class Departure:
    """A fragment of one worker on its way."""

    entries: Sequence[Entry]
    """The ways start - x_w in place of gradients: what is agreed on is written here. Absent if some are not finite."""
    said: Tensor
    """What a worker tells beside its ways, float32 or wider: 1 if it takes part, the steps that it has taken, the mean
    |d_w| of each parameter, and with the last fragment its buffers."""
    left: dict[str, Tensor] | None
    """x_w; None without a delay."""

    @property
    def lost(self) -> bool:
        """Whether this worker's weights were not finite, so that it takes over the others'."""
        return not self.entries[0].present


class Rounds:
    """The common point of the workers of this process, and the ways they have gone from it.

    Args:
        models: one for each worker, with equal parameters.
        fragments: into how many parts of about the same size parameters are divided, in their order.
        abstain: a worker whose weights are not finite takes no part; else its ways are taken as they are.
    """

    def __init__(self, models: Sequence[nn.Module], fragments: int = 1, *, abstain: bool = False) -> None:
        self.params = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
        self.buffers = [[b for b in model.buffers() if b.is_floating_point()] for model in models]
        if not self.params or not self.params[0]:
            raise ValueError("local steps need at least one model, with a parameter that requires a gradient")
        self._models = models
        self.abstain = abstain
        self.attacks: dict[int, Attack] = {}
        """For tests and studies: what workers do to their ways first, by index, see `signstep.distributed.attacks`."""
        self.fragments = _divide({name: p.numel() for name, p in self.params[0].items()}, fragments)
        """Names of the parameters of each."""
        self.start: dict[str, Tensor] = {}
        """The common point, by parameter: float32 or wider, 1-D, in the order of its memory."""
        self.set_out()

    def set_out(self) -> None:
        """Take the parameters of the first worker as they are for the common point."""
        for name, p in self.params[0].items():
            wide = torch.promote_types(p.dtype, torch.float32)
            self.start[name] = in_memory_order(p).to(wide, copy=True)

    def depart(self, index: int, fragment: int, *, train_on: bool, steps: int = 0) -> Departure:
        """How far a worker has gone in a fragment; `train_on`: it takes steps before the fragment arrives."""
        for name, p in self._models[index].named_parameters():
            if p.requires_grad and name not in self.params[index]:
                raise RuntimeError(
                    f"{name} has been unfrozen since its rounds began: unfreeze it before, or begin anew"
                )
        names, params, start = self.fragments[fragment], self.params[index], self.start
        entries: Sequence[Entry]
        entries = [Entry(n, params[n], start[n] - in_memory_order(params[n]), True) for n in names]
        if index in self.attacks:
            entries = self.attacks[index](entries)
        left = {n: in_memory_order(params[n]).to(start[n].dtype, copy=True) for n in names} if train_on else None
        if self.abstain and not all(e.flat.isfinite().all() for e in entries):
            entries = [e._replace(flat=torch.zeros_like(e.flat), present=False) for e in entries]
        buffers = self.buffers[index] if fragment == len(self.fragments) - 1 else []
        dtype = functools.reduce(torch.promote_types, (b.dtype for b in buffers), torch.float32)
        numbers = [float(entries[0].present), float(steps)]
        said = [torch.tensor(numbers, dtype=dtype, device=entries[0].flat.device)]
        said += [e.flat.abs().mean().to(dtype).view(1) if e.flat.numel() else said[0][:1] for e in entries]
        said += [b.reshape(-1).to(dtype) for b in buffers]
        return Departure(entries, torch.cat(said), left)

    def depart_together(self, fragment: int, *, train_on: bool) -> list[Departure]:
        """`depart` of all workers, which are those of a simulation: attackers who collude know the others' ways."""
        honest = [index for index in range(len(self.params)) if index not in self.attacks]
        found = {index: self.depart(index, fragment, train_on=train_on) for index in honest}
        for attack in self.attacks.values():
            if honest and isinstance(attack, Collude) and not attack.blind:
                columns = zip(*(found[index].entries for index in honest), strict=True)
                attack.honest = {c[0].name: torch.stack([e.flat for e in c]).mean(dim=0) for c in columns}
        found |= {index: self.depart(index, fragment, train_on=train_on) for index in self.attacks}
        return [each for _, each in sorted(found.items())]

    @staticmethod
    def median_of(messages: Tensor) -> Tensor | None:
        """The median of what the workers have said who take part, number by number; None if nobody does.

        Between the two in the middle it is their mean, and NaN is as if nothing was said. Fewer than half of the
        workers cannot move it out of the range of what the others say, whatever they say.

        Args:
            messages: [M, K], every worker's.

        Returns:
            float64 [K].
        """
        said = messages[messages[:, 0] > 0]
        if len(said) == 0:
            return None
        ordered = said.sort(dim=0).values  # NaN at the end
        count = said.isnan().logical_not_().sum(dim=0, keepdim=True).clamp_(min=1)
        low, high = (ordered.gather(0, index).double()[0] for index in ((count - 1) // 2, count // 2))
        return torch.where(low == high, low, (low + high) / 2)  # also where both are infinite

    def return_to_start(self) -> None:
        """Put all workers at the common point."""
        for params in self.params:
            for name, p in params.items():
                in_memory_order(p).copy_(self.start[name])

    def arrive(self, index: int, departure: Departure, median: Tensor | None) -> None:
        """Move a worker by as much as the common point has moved from where it left; without a delay, to that point.

        Args:
            index: of the worker.
            departure: what it left with.
            median: what `median_of` has returned; buffers follow it where it has them.
        """
        for e in departure.entries:
            here = in_memory_order(e.param)
            if departure.left is None or departure.lost:
                here.copy_(self.start[e.name])
            else:
                here.copy_(here + (self.start[e.name] - departure.left[e.name]))
        if departure.lost:  # what else is not finite would spoil these again
            for name, p in self.params[index].items():
                if not p.isfinite().all():
                    in_memory_order(p).copy_(self.start[name])
        begin = 2 + len(departure.entries)
        if median is None or len(median) == begin:
            return
        for b in self.buffers[index]:
            b.copy_(median[begin : begin + b.numel()].view_as(b))
            begin += b.numel()


def _divide(sizes: Mapping[str, int], fragments: int) -> list[list[str]]:
    """Names in consecutive parts, cut where they come nearest to equal numbers of elements; no part is empty."""
    if fragments > len(sizes):
        raise ValueError(f"Invalid fragments: {fragments}, the model has {len(sizes)} parameters to divide")
    total, before = sum(sizes.values()), 0
    parts: list[list[str]] = [[]]
    names = list(sizes)
    for i, name in enumerate(names):
        middle = (before + sizes[name] / 2) * fragments / max(1, total)
        left = len(names) - i
        if parts[-1] and (middle >= len(parts) or left <= fragments - len(parts)) and len(parts) < fragments:
            parts.append([])
        parts[-1].append(name)
        before += sizes[name]
    return parts


class LocalSteps(ABC):
    """The part of `LocalVote` and its like that is the same for all: when fragments depart and arrive, and the state.

    Args:
        model: not wrapped, or in a DistributedDataParallel of the ranks inside one machine.
        optimizer: of the model.
        schedule: when fragments depart and arrive.
        abstain: a worker whose weights are not finite takes no part in a round, see `LocalVote`.
        group: the workers; None: all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        abstain: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        module = model
        if isinstance(model, DistributedDataParallel):
            module = model.module
            inside = set(dist.get_process_group_ranks(model.process_group))
            voting = set(dist.get_process_group_ranks(group or dist.group.WORLD))
            if len(inside & voting) > 1:
                raise ValueError(
                    f"{type(self).__name__}: this DistributedDataParallel averages gradients between ranks that agree "
                    "in rounds, in every step: give the module itself, or with group= one rank of each machine"
                )
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.optimizer, self.schedule = optimizer, schedule
        self.group = own_group(group, device)
        release_at_exit(self)
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        first = dist.get_process_group_ranks(self.group)[0]
        with torch.no_grad():
            for x in (*module.parameters(), *module.buffers()):
                dist.broadcast(x.detach(), src=first, group=self.group)
        self.rounds = Rounds([module], schedule.fragments, abstain=abstain)
        own = weakref.ref(self)
        module.register_load_state_dict_post_hook(lambda *_: _begin_from_loaded(own()))  # type: ignore[no-untyped-call]
        self._away: dict[int, tuple[Departure, Future[Tensor | None]]] = {}
        self._courier = _Courier(device) if schedule.delay > 0 else None

    @abstractmethod
    def begin(self, fragment: int) -> None:
        """Called before a fragment departs."""

    @abstractmethod
    def agree(self, fragment: int, entries: Sequence[Entry]) -> None:
        """Replace the ways by what all agree on, with collectives of `group`; in a thread if there is a delay."""

    @abstractmethod
    def move(self, fragment: int, entries: Sequence[Entry], median: Tensor) -> None:
        """Move the common point by what has been agreed on.

        Args:
            fragment: which it is.
            entries: as `agree` has left them.
            median: what `Rounds.median_of` has returned.
        """

    @property
    def since(self) -> int:
        """Steps that not all workers have agreed on, at most; 0: all ranks have the same weights."""
        return max(*self.schedule.since, self.schedule.delay if self._away else 0)

    @torch.no_grad()
    def step(self) -> bool:
        """Count a step that the optimizer has taken, and end the rounds that are due; True if one has ended.

        Raises:
            CollectiveError: weights are not finite, under "raise"; with rank and parameter.
        """
        arriving, departing = self.schedule.step()
        for fragment in arriving:
            self._arrive(fragment)
        for fragment in departing:
            self._depart(fragment, train_on=self.schedule.delay > 0)
        return bool(departing if self.schedule.delay == 0 else arriving)

    @torch.no_grad()
    def hold_round(self) -> None:
        """End all rounds now, unless no step was taken since the last: all ranks have the same weights after it.

        Every rank calls it, at the end of a training, or before the weights are evaluated.

        Raises:
            CollectiveError: as of `step`.
        """
        away, departing = self.schedule.end()
        for fragment in away:
            self._arrive(fragment)
        for fragment in departing:
            self._depart(fragment, train_on=False)
        if away:  # one that has taken no step since it departed is at the common point but for rounding
            self.rounds.return_to_start()

    def _depart(self, fragment: int, *, train_on: bool) -> None:
        self.begin(fragment)
        departure = self.rounds.depart(0, fragment, train_on=train_on, steps=self.schedule.total)
        travel = functools.partial(self._travel, fragment, departure)
        if self._courier is not None and train_on:
            self._away[fragment] = departure, self._courier.send(travel)
        else:
            self._receive(fragment, departure, travel())

    def _travel(self, fragment: int, departure: Departure) -> Tensor | None:
        try:
            return self._agree_on(fragment, departure)
        except CollectiveError:
            raise
        except RuntimeError as error:
            raise failure(self.rank, self.world_size, f"a round of {type(self).__name__}", error) from error

    def _agree_on(self, fragment: int, departure: Departure) -> Tensor | None:
        messages = departure.said.new_empty(self.world_size * len(departure.said))
        start_all_gather(messages, departure.said, self.group).wait()
        said = messages.view(self.world_size, -1)
        steps = said[:, 1].long().tolist()
        if len(set(steps)) > 1:
            raise CollectiveError(
                f"the workers end a round after {', '.join(map(str, steps))} steps: let all ranks take as many steps, "
                "and call hold_round() on all of them"
            )
        self.agree(fragment, departure.entries)
        return self.rounds.median_of(said)

    def _arrive(self, fragment: int) -> None:
        departure, median = self._away.pop(fragment)
        self._receive(fragment, departure, median.result())

    def _receive(self, fragment: int, departure: Departure, median: Tensor | None) -> None:
        if median is not None:  # else there is nowhere to go but back
            self.move(fragment, departure.entries, median)
        self.rounds.arrive(0, departure, median)
        if departure.lost:
            self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state: save one per rank, with the model's and the optimizer's.

        Between rounds it holds the common point, and what is on its way, for which it waits. After a round the common
        point is the model itself, unless its weights are narrower than float32.
        """
        start, params = self.rounds.start, self.rounds.params[0]
        elsewhere = self.since > 0 or any(p.dtype != start[name].dtype for name, p in params.items())
        away = {
            fragment: {
                "median": median.result(),
                "agreed": {e.name: e.flat for e in departure.entries},
                "left": dict(departure.left or {}),
                "lost": departure.lost,
            }
            for fragment, (departure, median) in self._away.items()
        }
        return {
            "method": type(self).__name__,
            "schedule": self.schedule.state_dict(),
            "away": away,
            "start": dict(start) if elsewhere else {},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError for a state that `load_state_dict` cannot take over, before anything is changed."""
        if state.get("method") != type(self).__name__:
            raise ValueError(
                f"this is no state of {type(self).__name__}, but of {state.get('method', 'something else')}"
            )
        self.schedule.check(state["schedule"])
        sizes = {name: len(x) for name, x in self.rounds.start.items()}
        if state["start"] and {name: len(x) for name, x in state["start"].items()} != sizes:
            raise ValueError("this state was saved of a model with other parameters: load the state of this model")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of the same rank gave.

        Load the model's state between the making of this object, which gives all ranks the first one's weights, and
        this; between rounds that of the same rank.

        Raises:
            ValueError: it is another rank's, of another number of workers, or of another model.
        """
        self.check_state(state)
        rounds = self.rounds
        self.schedule.load_state_dict(state["schedule"])
        rounds.set_out()
        for name, x in state["start"].items():
            rounds.start[name].copy_(x)
        self._away = {fragment: self._unpack(kept) for fragment, kept in state["away"].items()}

    def close(self) -> None:
        """End the process group that the rounds use, once the model is not trained any more. A collective."""
        if self._courier is not None:
            self._courier.close()
        dist.destroy_process_group(self.group)

    def _unpack(self, kept: Mapping[str, Any]) -> tuple[Departure, Future[Tensor | None]]:
        params, like = self.rounds.params[0], self.rounds.start
        entries = [Entry(n, params[n], x.to(like[n], copy=True), not kept["lost"]) for n, x in kept["agreed"].items()]
        left = {name: x.to(like[name], copy=True) for name, x in kept["left"].items()}
        median: Future[Tensor | None] = Future()
        median.set_result(kept["median"])
        said = entries[0].flat.new_empty(0)  # what was said is in the median
        return Departure(entries, said, left), median


def _begin_from_loaded(local: LocalSteps | None) -> None:
    """Weights that are loaded before the first step are where all set out."""
    if local is not None and local.schedule.total == 0:
        local.rounds.set_out()


class _Courier:
    """Does one thing after another in a thread of its own; on CUDA on a stream of its own, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device) if device.type == "cuda" else None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _end, self._jobs, thread)

    def send(self, call: Callable[[], Tensor | None]) -> Future[Tensor | None]:
        """What the call returns or raises, once it is done."""
        future: Future[Tensor | None] = Future()
        self._jobs.put((self._on_stream(call), future))
        return future

    def _on_stream(self, call: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        stream = self._stream
        if stream is None:
            return call
        stream.wait_stream(torch.cuda.current_stream(self._device))

        def on_stream() -> Tensor | None:
            with stream:
                result = call()
            stream.synchronize()
            return result

        return on_stream


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        call, future = job
        try:
            with torch.no_grad():
                future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        del job, call, future


def _end(jobs: queue.SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    # As in hooks.py: before the interpreter's own end, and without waiting for a rank that is gone.
    if thread is not threading.current_thread():
        thread.join(timeout=1.0)

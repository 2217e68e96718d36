"""`LocalVote`: workers that train by themselves for some steps, then vote on where they went.

With n coordinates and M workers a worker sends n (M - 1) / (4 M) bytes in a round, n (M - 1) / (4 M H) per step where
a round is H steps. DiLoCo (Douillard et al. 2023, arXiv 2311.08105) averages in its rounds what is here voted on. The
rules of the vote are in vote.py.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signstep.distributed.collectives import all_gather, own_group
from signstep.distributed.hooks import Entry
from signstep.distributed.vote import Vote, cast_entries, in_parts, in_turns, nonfinite_rule
from signstep.distributed.worker import Worker, check_choice, in_memory_order
from signstep.optim.signsgd import SignSGD

__all__ = ["LocalRounds", "LocalVote", "OuterOptions"]


class OuterOptions(NamedTuple):
    """How workers vote on where they went, the same on all; see `LocalVote`."""

    outer_lr: float = 1.0
    outer_momentum: float = 0.9
    scale: str = "tensor"
    dither: float = 0.0
    ties: str = "random"
    error_feedback: bool = False
    nonfinite: str = "raise"
    seed: int = 0

    def check(self) -> None:
        """Raise a ValueError for an option that is out of its range and that nothing else looks at."""
        check_choice("scale", self.scale, ("tensor", "none"))
        check_choice("ties", self.ties, ("random", "abstain"))
        nonfinite_rule(self.nonfinite, scaled=False)
        if not self.outer_lr > 0:
            raise ValueError(f"Invalid outer_lr: {self.outer_lr}, expected outer_lr > 0")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"Invalid outer_momentum: {self.outer_momentum}, expected 0 <= outer_momentum < 1")
        if not 0 <= self.dither < math.inf:
            raise ValueError(f"Invalid dither: {self.dither}, expected a finite dither >= 0")


class LocalRounds:
    """The common point of the workers of this process, and a round of their votes.

    Args:
        owner: class that the user has made, for messages.
        models: one for each worker, with equal parameters.
        ranks: of each worker.
        world_size: M.
        options: see `LocalVote`.
    """

    def __init__(
        self, owner: str, models: Sequence[nn.Module], ranks: Sequence[int], world_size: int, options: OuterOptions
    ) -> None:
        options.check()
        self.options = options
        self.params = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
        self.buffers = [[b for b in model.buffers() if b.is_floating_point()] for model in models]
        # It takes no steps itself: the workers' momentum and noise have its options, and it counts the rounds.
        self.outer = SignSGD(
            self.params[0].values(),
            momentum=options.outer_momentum,
            dither=options.dither**2,
            dither_decay=0.0,
            dither_scale="relative",
            seed=options.seed,
        )
        names: dict[Tensor, str] = {p: name for name, p in self.params[0].items()}
        self.workers = [
            Worker(self.outer, names, rank, world_size, error_feedback=options.error_feedback) for rank in ranks
        ]
        self.vote = Vote(owner, self.workers, ties=options.ties, nonfinite=options.nonfinite)
        self.start: dict[str, Tensor] = {}
        """The point that all workers set out from, by parameter: float32 or wider, 1-D, in the order of its memory."""
        self.set_out()

    def set_out(self) -> None:
        """Take the parameters as they are for the point that a round begins at."""
        for name, p in self.params[0].items():
            wide = torch.promote_types(p.dtype, torch.float32)
            self.start[name] = in_memory_order(p).to(wide, copy=True)

    def entries(self, index: int) -> list[Entry]:
        """How far a worker has gone back, start - x, as the gradients of a vote; absent if any is not finite."""
        entries = [
            Entry(name, p, self.start[name] - in_memory_order(p), True) for name, p in self.params[index].items()
        ]
        if self.options.nonfinite == "abstain" and not all(e.flat.isfinite().all() for e in entries):
            return [e._replace(flat=torch.zeros_like(e.flat), present=False) for e in entries]
        return entries

    def message(self, index: int, entries: Sequence[Entry]) -> Tensor:
        """What a worker tells beside its bits: float32, 1 if it votes, mean |start - x| of each parameter, buffers."""
        takes_part = entries[0].present
        said = [torch.full((1,), float(takes_part), dtype=torch.float32, device=entries[0].flat.device)]
        said += [e.flat.abs().mean().float().view(1) if e.flat.numel() else said[0] for e in entries]
        said += [b.reshape(-1).float() for b in self.buffers[index]]
        return torch.cat(said)

    def move(self, votes: Sequence[Entry], messages: Tensor) -> None:
        """Move the common point by the votes, and every worker of this process to it.

        Args:
            votes: ±1, or 0 for no step, in the place of each parameter's gradient.
            messages: float32 [M, K], every worker's `message`.
        """
        taking_part = [said for said in messages if said[0] > 0]
        if not taking_part:  # then there is nowhere to go but back
            self._send_all_to_start()
            return
        # Added up in the order of ranks, so that a simulation ends with the same bits, and in float64, so that a buffer
        # that is the same on all remains as it is.
        mean = taking_part[0].double()
        for said in taking_part[1:]:
            mean += said
        mean /= len(taking_part)
        lengths = mean[1 : 1 + len(votes)].tolist()
        for entry, length in zip(votes, lengths, strict=True):
            rate = self.options.outer_lr * (length if self.options.scale == "tensor" else 1.0)
            self.start[entry.name].add_(entry.flat.to(self.start[entry.name].dtype), alpha=-rate)
        self._send_all_to_start()
        for buffers in self.buffers:
            begin = 1 + len(votes)
            for b in buffers:
                b.copy_(mean[begin : begin + b.numel()].view_as(b))
                begin += b.numel()

    def _send_all_to_start(self) -> None:
        for params in self.params:
            for name, p in params.items():
                in_memory_order(p).copy_(self.start[name])


class LocalVote:
    r"""Train on M workers that talk once in H steps, with one bit per coordinate.

    All workers set out from the same point x. Each takes H steps of its own optimizer, to :math:`x_w`. Then they vote
    on the way back, :math:`d_w = x - x_w`, as `MajorityVote` does on gradients, and go on from where the vote leads:

    .. math::
        m_w \leftarrow \beta m_w + (1 - \beta)\, d_w, \qquad
        v = \mathrm{sign}\Big(\sum_w \mathrm{sign}(m_w + \xi_w)\Big), \qquad x \leftarrow x - \eta\, s\, v

    with s of each parameter the mean over workers of :math:`\mathrm{mean}|d_w|`, 4 bytes, so that the step is as long
    as the workers' own ways; all workers are at the same x after a round, bit for bit. The optimizers' states are each
    worker's own and are not sent. Buffers of floats, such as batch norm's, become their mean over workers.

    A weight that no worker ever moves has a momentum of 0, for which each casts a coin: it wanders by :math:`\eta s` in
    every round, unless its whole parameter stands still. So do the rows of an embedding that no batch has.

    Args:
        model: not wrapped, or wrapped in a DistributedDataParallel of the ranks of one machine while `group` has one
            rank of each machine: then gradients are averaged inside a machine and machines vote with each other.
        optimizer: of the model, any one.
        every: H, steps of a round.
        outer_lr: :math:`\eta`. (default: 1)
        outer_momentum: :math:`\beta`, in [0, 1). (default: 0.9)
        scale: "tensor": s as above; "none": s = 1, and outer_lr is how far every weight moves. (default: "tensor")
        dither: standard deviation of each worker's noise :math:`\xi_w`, in units of the rms of its :math:`m_w` in the
            parameter. (default: 0)
        ties: what a tie does, as in `MajorityVote`.
        error_feedback: each worker adds what its earlier signs left out, as in `MajorityVote`.
        nonfinite: what weights that are not finite do. "raise": `step` raises on all ranks. "abstain": that worker has
            no vote, goes on from where the others go, and its optimizer's state is cleared. If no worker has a vote,
            all go back to where the round began.
        group: the workers; None: all ranks.
        seed: of dither and coins, the same on all ranks.

    Attributes:
        since: steps since the last round.
        rounds: `LocalRounds`.

    Raises:
        ValueError: an option out of its range.
        CollectiveError: from `step`, on all ranks: weights are not finite.

    Example:
        .. code-block:: python

            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            local = LocalVote(model, optimizer, every=32)
            for x, y in loader:
                optimizer.zero_grad()
                loss_function(model(x), y).backward()
                optimizer.step()
                local.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.9,
        scale: str = "tensor",
        dither: float = 0.0,
        ties: str = "random",
        error_feedback: bool = False,
        nonfinite: str = "raise",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"Invalid every: {every}, expected an integer >= 1")
        module = model.module if isinstance(model, DistributedDataParallel) else model
        options = OuterOptions(outer_lr, outer_momentum, scale, dither, ties, error_feedback, nonfinite, seed)
        options.check()
        device = next(module.parameters()).device
        self.every, self.optimizer, self.since = every, optimizer, 0
        self.group = own_group(group, device)
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        first = dist.get_process_group_ranks(self.group)[0]
        with torch.no_grad():
            for x in (*module.parameters(), *module.buffers()):
                dist.broadcast(x.detach(), src=first, group=self.group)
        self.rounds = LocalRounds("LocalVote", [module], [self.rank], self.world_size, options)

    def step(self) -> bool:
        """Count a step that the optimizer has taken, and vote after the last of a round; True if there was a vote."""
        self.since += 1
        if self.since < self.every:
            return False
        self.hold_round()
        return True

    @torch.no_grad()
    def hold_round(self) -> None:
        """Vote now, unless no step was taken since the last round: every rank calls it. For the end of a training.

        Raises:
            CollectiveError: weights are not finite, under "raise"; with rank and parameter.
        """
        if self.since == 0:
            return
        rounds, vote = self.rounds, self.rounds.vote
        vote.begin()
        entries = rounds.entries(0)
        said = rounds.message(0, entries)
        messages = said.new_empty(self.world_size * len(said))
        all_gather(messages, said, group=self.group)
        voted = set().union(*in_turns(self._elect(part) for part in in_parts(entries)))
        rounds.move(entries, messages.view(self.world_size, -1))
        vote.count_votes(voted, joined=True)
        if not entries[0].present:
            self.optimizer.state.clear()
        self.since = 0

    def _elect(self, entries: Sequence[Entry]) -> Generator[None, None, set[int]]:
        names, worker = [e.name for e in entries], self.rounds.workers[0]
        finite = all(bool(e.flat.dot(e.flat).isfinite()) for e in entries)
        ballot = cast_entries(worker, entries, finite=finite)
        election = yield from self.rounds.vote.hold(ballot, names, self.group)
        return self.rounds.vote.accept(worker, ballot, election, names, [e.flat for e in entries]).voted

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state: save one per rank, with the model's and the optimizer's.

        Between rounds it holds the point that the round began at. After a round that is the model itself, unless its
        weights are narrower than float32, and the state is one momentum per parameter.
        """
        rounds = self.rounds
        elsewhere = self.since > 0 or any(p.dtype != rounds.start[name].dtype for name, p in rounds.params[0].items())
        start = {"start": dict(rounds.start)} if elsewhere else {}
        return {**rounds.workers[0].state_dict(), "since": self.since, **start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of the same rank gave, or a part of `resplit`.

        Load the model's state between the making of this object, which gives all ranks the first one's weights, and
        this; between rounds that of the same rank.

        Raises:
            ValueError: it is another rank's, of another number of workers, or of another model.
        """
        start = state.get("start", {})
        sizes = {name: len(x) for name, x in self.rounds.start.items()}
        if start and {name: len(x) for name, x in start.items()} != sizes:
            raise ValueError("this state was saved of a model with other parameters: load the state of this model")
        worker = self.rounds.workers[0]
        worker.load_state_dict(state)
        for group, taken in zip(self.rounds.outer.param_groups, state["steps"], strict=True):
            group["step"].fill_(taken)
        self.since = state.get("since", 0)
        self.rounds.set_out()
        for name, x in start.items():
            self.rounds.start[name].copy_(x)

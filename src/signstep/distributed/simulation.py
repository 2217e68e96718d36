"""M workers in one process: the steps of `MajorityVote`, and of the plain mean, for more workers than cores.

    sim = SimulatedVote(model, optimizer, world_size=100)
    for x, y in batches:  # worker w has the w-th hundredth of each
        sim.vote(per_worker_gradients(model, cross_entropy, x, y, 100))
        optimizer.step()

Workers, ballots and counting are those of the real thing (see vote.py), so on the same gradients the parameters are the
same, bit by bit. With more than two workers a mean can differ in its last bit, because torch.distributed adds floats in
an order of its own; so can the SGD phase of HybridSignSGD, which takes means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer

from signstep.distributed.attacks import Attack, Collude
from signstep.distributed.hooks import Entry
from signstep.distributed.local import OuterOptions, OuterVote
from signstep.distributed.rounds import Departure, Rounds, Schedule
from signstep.distributed.vote import Outcome, Vote, cast_entries, nonfinite_rule, voters_of
from signstep.distributed.worker import Worker, check_choice, in_memory_order

__all__ = ["SimulatedLocalVote", "SimulatedMean", "SimulatedVote", "per_worker_gradients"]

Gradients = Mapping[str, Tensor | None]
"""One worker's, by parameter name, each in the parameter's shape; None, or no entry: backward has not reached it."""


def _checked(attacks: Mapping[int, Attack], world_size: int) -> Mapping[int, Attack]:
    outside = sorted(rank for rank in attacks if not 0 <= rank < world_size)
    if outside:
        raise ValueError(f"an attack on rank {outside[0]}: ranks are 0 to {world_size - 1}")
    if len({id(attack) for attack in attacks.values()}) < len(attacks):
        raise ValueError("two ranks share an attack, which may keep state: make an object for each")
    return attacks


class _Simulation:
    """Parameters, workers and attackers."""

    def __init__(self, model: nn.Module, world_size: int, *, attacks: Mapping[int, Attack] | None = None) -> None:
        self.model, self.world_size = model, world_size
        self.params: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if world_size < 1:
            raise ValueError(f"Invalid world_size: {world_size!r}, expected an integer >= 1")
        self.attacks = _checked(attacks or {}, world_size)

    def _entries(self, gradients: Sequence[Gradients | None]) -> list[list[Entry]]:
        """Copies of every worker's gradients as a hook gets them, after the attacks."""
        if len(gradients) != self.world_size:
            raise ValueError(f"gradients of {len(gradients)} workers, expected {self.world_size}")
        everyone = [self._own_entries(own or {}) for own in gradients]
        colluding = [attack for attack in self.attacks.values() if isinstance(attack, Collude) and not attack.blind]
        honest = [entries for rank, entries in enumerate(everyone) if rank not in self.attacks]
        if colluding and honest:
            columns = list(zip(*honest, strict=True))
            means = {column[0].name: torch.stack([e.flat for e in column]).mean(dim=0) for column in columns}
            for each in colluding:
                each.honest = means
        for rank, attack in self.attacks.items():
            everyone[rank] = list(attack(everyone[rank]))
        return everyone

    def _own_entries(self, gradients: Gradients) -> list[Entry]:
        unknown = sorted(gradients.keys() - self.params.keys())
        if unknown:
            raise ValueError(f"a gradient of {unknown[0]}, which the model does not train")
        entries = []
        for name, p in self.params.items():
            g = gradients.get(name)
            if g is not None and g.shape != p.shape:
                raise ValueError(f"the gradient of {name} is {tuple(g.shape)}, expected {tuple(p.shape)}")
            if g is None:
                flat = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
            elif g.stride() == p.stride():
                flat = in_memory_order(g).clone()
            else:
                flat = in_memory_order(torch.empty_like(p, requires_grad=False).copy_(g))
            entries.append(Entry(name, p, flat, g is not None))
        return entries

    def _average(self, everyone: Sequence[Sequence[Entry]], i: int) -> Tensor:
        return torch.stack([entries[i].flat for entries in everyone]).div_(self.world_size).sum(dim=0)

    def _give(self, p: Tensor, flat: Tensor) -> None:
        if p.grad is None:
            p.grad = torch.empty_like(p, requires_grad=False)
        in_memory_order(p.grad).copy_(flat)


class SimulatedMean(_Simulation):
    """The mean that DistributedDataParallel gives, of M workers in one process.

    Args:
        model: whose parameters get the mean as ``p.grad``.
        world_size: number of workers M.
        attacks: by rank, of workers that are not honest.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> sim = SimulatedMean(model, world_size=2)
        >>> sim.mean([{"weight": torch.tensor([[1.0, 2.0]])}, {"weight": torch.tensor([[3.0, 2.0]])}])
        >>> model.weight.grad
        tensor([[2., 2.]])
    """

    @torch.no_grad()
    def mean(self, gradients: Sequence[Gradients | None]) -> None:
        """Write the mean of the workers' gradients into ``p.grad``; who has none adds 0.

        Args:
            gradients: of every worker; None: of a worker that has joined.
        """
        everyone = self._entries(gradients)
        for i, p in enumerate(self.params.values()):
            if any(entries[i].present for entries in everyone):
                self._give(p, self._average(everyone, i))


def hold_among(vote: Vote, everyone: Sequence[Sequence[Entry]]) -> list[Outcome]:
    """Hold a vote among workers that are all in this process.

    The votes are written over the gradients of the first worker, of all if the optimizer calibrates on them.

    Args:
        vote: with its workers.
        everyone: the gradients of each.

    Returns:
        Of the first worker, or of all.
    """
    names = [e.name for e in everyone[0]]
    ballots = []
    for worker, entries in zip(vote.workers, everyone, strict=True):
        whole = torch.cat([e.flat for e in entries])
        ballots.append(cast_entries(worker, entries, finite=bool(whole.dot(whole).isfinite())))
    flags = [b.flags for b in ballots]
    voters = voters_of(flags)
    result = vote.tally(torch.stack([b.words for b in ballots]), voters, ballots[0].slots, names)
    election = vote.election(result, flags, voters)
    outcomes = []
    for worker, entries, ballot in zip(vote.workers, everyone, ballots, strict=True):
        outcomes.append(vote.accept(worker, ballot, election, names, [e.flat for e in entries]))
        if not vote.optimizer.calibrates:
            break
    return outcomes


class SimulatedVote(_Simulation):
    """`MajorityVote` of M workers in one process, on gradients that the caller computes.

    ``p.grad`` holds the votes after `vote`, and ``optimizer.step()`` is called as ever.

    Args:
        model: not wrapped; parameters that are not the optimizer's get the mean.
        optimizer: `SignSGD` or `HybridSignSGD`; momentum that it has already goes to every worker.
        world_size: number of workers M.
        ties, error_feedback, dither_workers: as in `MajorityVote`.
        nonfinite: "raise" or "abstain", as in `MajorityVote`.
        attacks: by rank, of workers that are not honest.

    Attributes:
        workers: each worker's momentum and counts, a `Worker` by rank; their state_dict is that of
            ``MajorityVote.state_dict`` on the same rank.

    Raises:
        TypeError, ValueError: an option that does not fit, one sentence.

    Example:
        >>> from signstep import SignSGD
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = SignSGD(model.parameters(), lr=1e-3, momentum=0.0)
        >>> sim = SimulatedVote(model, optimizer, world_size=3)
        >>> sim.vote([{"weight": torch.tensor([[g, -g]])} for g in (0.5, 0.1, -9.0)])
        >>> model.weight.grad
        tensor([[ 1., -1.]])
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        world_size: int,
        *,
        ties: str = "random",
        error_feedback: bool = False,
        nonfinite: str = "raise",
        dither_workers: str = "independent",
        attacks: Mapping[int, Attack] | None = None,
    ) -> None:
        super().__init__(model, world_size, attacks=attacks)
        check_choice("ties", ties, ("random", "abstain"))
        nonfinite = nonfinite_rule(nonfinite, scaled=False)
        names = {p: name for name, p in self.params.items()}
        self.workers = [
            Worker(optimizer, names, rank, world_size, dither_workers=dither_workers, error_feedback=error_feedback)
            for rank in range(world_size)
        ]
        # The first worker has taken over what momentum the optimizer had.
        for worker in self.workers[1:]:
            worker.state = {
                name: {key: x.clone() for key, x in tensors.items()} for name, tensors in self.workers[0].state.items()
            }
        self.optimizer, self.ties, self.nonfinite = self.workers[0].optimizer, ties, nonfinite
        self._vote = Vote("SimulatedVote", self.workers, ties=ties, nonfinite=nonfinite)

    @torch.no_grad()
    def vote(self, gradients: Sequence[Gradients | None]) -> None:
        """Write what M workers elect into ``p.grad``; parameters that no worker has a gradient of keep theirs.

        Args:
            gradients: of every worker; None: of a worker that has joined, and abstains.

        Raises:
            ValueError: not as many as workers, or of other parameters.
            CollectiveError: a gradient is not finite, under ``nonfinite="raise"``.
        """
        self._vote.number_votes()
        everyone = self._entries(gradients)
        present = [any(e.present for e in column) for column in zip(*everyone, strict=True)]
        voting = [self.workers[0].votes(name) for name in self.params]
        if any(voting):
            self._elect([[e for e, votes in zip(entries, voting, strict=True) if votes] for entries in everyone])
        for i, (name, p) in enumerate(self.params.items()):
            if not voting[i]:
                everyone[0][i].flat.copy_(self._average(everyone, i))
                if name in self.workers[0].groups:
                    self._vote.hand_over(p, self._mean_of_all)
            if present[i]:
                self._give(p, everyone[0][i].flat)

    def _elect(self, everyone: Sequence[list[Entry]]) -> None:
        """Write the votes over the gradients of the first worker (of all, if the optimizer calibrates on them)."""
        outcomes = hold_among(self._vote, everyone)
        self._vote.count_votes(outcomes[0].voted)
        if self.optimizer.calibrates:
            nothing = self._vote.no_sums(everyone[0][0].flat.device)
            sums = sum((o.sums for o in outcomes if o.sums is not None), nothing)
            self._vote.receive_means(sums / self.world_size)

    def _mean_of_all(self, momenta: list[Tensor]) -> Tensor:
        mean = momenta[0] / self.world_size
        for momentum in momenta[1:]:
            mean += momentum / self.world_size
        return mean


class SimulatedLocalVote:
    """`LocalVote` of M workers in one process, which has the model of each.

    The caller takes every worker's own steps, and calls `step` after each, or `vote` after each round. Under
    ``nonfinite="abstain"`` the state of the optimizer whose weights were not finite is the caller's to clear.

    Args:
        models: one for each worker; they are given the parameters and buffers of the first.
        every: H, steps of a round, for `step`.
        delay, fragments, outer_lr, outer_momentum, scale, dither, ties, error_feedback, nonfinite, seed: as in
            `LocalVote`.
        attacks: by rank, of workers that are not honest.

    Attributes:
        rounds: the common point, a `signstep.distributed.rounds.Rounds`.
        outer: the workers, a `signstep.distributed.local.OuterVote`.

    Example:
        >>> models = [torch.nn.Linear(2, 1, bias=False) for _ in range(3)]
        >>> _ = torch.nn.init.zeros_(models[0].weight)  # the others begin where the first does
        >>> sim = SimulatedLocalVote(models, outer_lr=0.5, outer_momentum=0.0)
        >>> with torch.no_grad():
        ...     for model, way in zip(models, (1.0, 3.0, -2.0)):
        ...         model.weight -= way  # three workers go 1, 3 and 2 far, the last the other way
        >>> sim.vote()
        >>> models[2].weight.tolist()  # half of the median way, where two of three went
        [[-1.0, -1.0]]
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        every: int = 1,
        delay: int = 0,
        fragments: int = 1,
        attacks: Mapping[int, Attack] | None = None,
        **options: Any,
    ) -> None:
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        self.schedule = Schedule(every, delay, fragments)
        chosen = OuterOptions(**options)
        chosen.check()
        self.rounds = Rounds(models, fragments, abstain=chosen.nonfinite == "abstain")
        self.rounds.attacks = dict(_checked(attacks or {}, len(models)))
        self.outer = OuterVote("SimulatedLocalVote", self.rounds, range(len(models)), len(models), chosen)
        self._away: dict[int, list[Departure]] = {}

    @torch.no_grad()
    def step(self) -> bool:
        """Count a step that every worker has taken, and end the rounds that are due; True if one has ended."""
        arriving, departing = self.schedule.step()
        for fragment in arriving:
            self._receive(fragment, self._away.pop(fragment))
        for fragment in departing:
            self._away[fragment] = self._depart(fragment, train_on=self.schedule.delay > 0)
            if self.schedule.delay == 0:
                self._receive(fragment, self._away.pop(fragment))
        return bool(departing if self.schedule.delay == 0 else arriving)

    @torch.no_grad()
    def hold_round(self) -> None:
        """End all rounds now, unless no step was counted since the last: every model is at the common point then."""
        self._end(*self.schedule.end())

    @torch.no_grad()
    def vote(self) -> None:
        """End a round now, of a caller who counts steps without `step`: every model is at the common point then."""
        self._end(self.schedule.end()[0], range(self.schedule.fragments))

    def _end(self, away: Sequence[int], departing: Sequence[int]) -> None:
        for fragment in away:
            self._receive(fragment, self._away.pop(fragment))
        for fragment in departing:
            self._receive(fragment, self._depart(fragment, train_on=False))
        if away:
            self.rounds.return_to_start()

    def _depart(self, fragment: int, *, train_on: bool) -> list[Departure]:
        self.outer.vote.number_votes()
        return self.rounds.depart_together(fragment, train_on=train_on)

    def _receive(self, fragment: int, departures: Sequence[Departure]) -> None:
        median = self.rounds.median_of(torch.stack([each.said for each in departures]))
        hold_among(self.outer.vote, [each.entries for each in departures])
        if median is not None:
            self.outer.move(fragment, departures[0].entries, median)
        for index, each in enumerate(departures):
            self.rounds.arrive(index, each, median)


def per_worker_gradients(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    world_size: int,
    *,
    vectorize: bool = True,
    chunk_size: int | None = 50,
) -> list[Gradients]:
    """The gradients that each of M workers computes on its own part of a batch.

    Every worker starts from the model's buffers as they are, batch norm in training mode takes the statistics of the
    worker's part alone, and the model keeps the buffers of the first worker, as under DistributedDataParallel.

    Args:
        model: in the mode that it trains in.
        loss: of the model's output and a part of y, a scalar.
        x: [M * B, ...]; worker w has rows w B to (w + 1) B.
        y: [M * B, ...].
        world_size: M.
        vectorize: compute many workers at once with torch.func.vmap, which rounds otherwise and gives a parameter that
            the loss does not use the gradient 0. False: one after another, with what a process of its own would get bit
            by bit, and None for a parameter without a use.
        chunk_size: workers at once; None: all.

    Returns:
        For each worker its gradients by parameter name.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 1)
        >>> gradients = per_worker_gradients(model, lambda out, y: (out - y).sum(), x, y, 2)
        >>> [g["weight"].tolist() for g in gradients]
        [[[1.0, 0.0]], [[0.0, 4.0]]]
    """
    if len(x) % world_size or len(x) != len(y):
        raise ValueError(f"x and y have {len(x)} and {len(y)} rows, expected as many in both for {world_size} workers")
    params: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())

    def own_loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, {**params, **buffers}, (x,)), y)

    parts = [each.view(world_size, -1, *each.shape[1:]) for each in (x, y)]
    if vectorize:
        copies = {name: b.expand(world_size, *b.shape).clone() for name, b in buffers.items()}
        detached = {name: p.detach() for name, p in params.items()}
        each = vmap(grad(own_loss), in_dims=(None, 0, 0, 0), randomness="different", chunk_size=chunk_size)
        stacked = each(detached, copies, *parts)
        first = {name: b[0] for name, b in copies.items()}
        out: list[Gradients] = [{name: g[w] for name, g in stacked.items()} for w in range(world_size)]
    else:
        out, first = [], {}
        for own_x, own_y in zip(*parts, strict=True):
            own_buffers = {name: b.clone() for name, b in buffers.items()}
            value = own_loss(params, own_buffers, own_x, own_y)
            gradients = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            out.append(dict(zip(params, gradients, strict=True)))
            first = first or own_buffers
    with torch.no_grad():
        for name, b in buffers.items():
            b.copy_(first[name])
    return out

"""The protocol of a majority vote, whoever carries the ballots (Bernstein et al. 2019, arXiv 1810.05291).

Each worker casts the signs of its momentum as bits, the majority is counted, and it becomes +1 and -1 in the place of
the gradients. `Vote` has every rule of it once: coins, flags, non-finite gradients, the check of step counts, the
calibration's sums, and what follows when HybridSignSGD switches to SGD. Three modules bring layout and transport:
ddp.py, fsdp.py and simulation.py. What one worker does with its own gradients is in worker.py.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from signstep.distributed.collectives import CollectiveError, start_all_gather, start_all_to_all
from signstep.distributed.hooks import Entry
from signstep.distributed.worker import (
    Gradient,
    Worker,
    check_choice,
    in_memory_order,
    measures_momentum,
    state_key,
    step_tensor,
)
from signstep.kernels import bits
from signstep.kernels.bits import WORD
from signstep.kernels.engine import Slot
from signstep.kernels.momentum import is_freed, new_momentum, read_momentum
from signstep.kernels.reference import Segment
from signstep.optim.options import STATE_DTYPES

__all__ = ["ABSENT", "NOT_FINITE", "PRESENT", "Ballot", "Election", "Outcome", "Vote", "nonfinite_rule"]

ABSENT, PRESENT, NOT_FINITE = 0, 1, 2
"""A worker's flag for a parameter, one byte: it abstains, it votes, or it has a gradient that is not finite."""


LEAST_PART = 1 << 20
"""Of a bucket, in elements: parts are voted on in turns, so that the wire and the processor work at the same time."""


class Ballot(NamedTuple):
    """What a worker has cast on some parameters."""

    words: Tensor
    """int64 [W], W a multiple of the number of workers; zeros where the worker abstains and after the last slot."""
    flags: bytes
    """`ABSENT`, `PRESENT` or `NOT_FINITE`, for each parameter."""
    slots: list[Slot]
    """Where the bits of each parameter are, without gaps from word 0."""
    sums: Tensor | None = None
    """float64 [parameters, 2], 0 and ||m||^2 of the worker's momentum, where the optimizer calibrates by its norm."""


class Election(NamedTuple):
    """The result of a vote."""

    words: Tensor
    """The majority, int64 [W]."""
    ties: Tensor | None
    """Coordinates without a majority, int64 [W]; None where a coin has decided them."""
    flags: Sequence[bytes]
    """Every worker's, for each parameter."""
    voters: Sequence[int]
    """How many have voted on each parameter."""


class Outcome(NamedTuple):
    """What has come of a vote for one worker."""

    voted: set[int]
    """The param_groups in which somebody has voted."""
    sums: Tensor | None
    """float64, a row for each of the optimizer's parameters: <v, g> and ||g||^2 of the votes v and this worker's
    gradients g, or what its ballot has, where it has voted; None unless the optimizer calibrates."""
    spoiled: bool
    """The gradients have become NaN, so that a GradScaler skips the step."""


class Vote:
    """The rules of a vote, for the workers of this process.

    Args:
        owner: class that the user has made, for messages.
        workers: those of this process, which share an optimizer and have the same parameters.
        ties: "random" or "abstain".
        nonfinite: "raise", "abstain" or "skip", see `nonfinite_rule`.
        what, advice: what is voted on, and what to do where it is not finite, for messages.
        counted: `count_votes` is called after every round, so that `Worker.steps` are numbers of votes; else they are
            the numbers of the steps that were last voted on.
    """

    def __init__(
        self,
        owner: str,
        workers: Sequence[Worker],
        *,
        ties: str,
        nonfinite: str,
        counted: bool = True,
        what: str = "gradient",
        advice: str = 'pass nonfinite="abstain" to leave such a worker out, or grad_scaler for float16',
    ) -> None:
        self.owner, self.workers, self.nonfinite, self.counted = owner, workers, nonfinite, counted
        self._what, self._advice = what, advice
        self.keep_ties = ties == "abstain"
        self.first, self.optimizer = workers[0], workers[0].optimizer
        self._owned = [len(group["params"]) for group in self.optimizer.param_groups]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._rows = {self.first.names[p]: row for row, p in enumerate(params) if p in self.first.names}

    def begin(self) -> None:
        """Number the votes by the optimizer's steps; a step may have been left out, as by a GradScaler.

        Raises:
            RuntimeError: the step counts of optimizer and workers have come apart, or a param_group is new.
        """
        groups = self.optimizer.param_groups
        if len(groups) != len(self.first.steps):
            raise RuntimeError(f"add_param_group after {self.owner} was made: the group has no vote; add it before")
        steps = [int(group["step"]) for group in groups]
        for index, (group, taken, known) in enumerate(zip(groups, steps, self.first.steps, strict=True)):
            least = -1 if self.counted else 0
            if not least <= taken - known <= 1 and self.optimizer.in_sign_phase(group):
                votes = f"{known} votes" if self.counted else f"the last vote was before step {known}"
                raise RuntimeError(
                    f"param_group {index} has taken {taken} steps and {votes}: load vote.state_dict() together with "
                    f"the optimizer's, after {self.owner} was made, and step once per backward"
                )
        self.number_votes()

    def number_votes(self) -> None:
        """Take the optimizer's step counts as those of the workers."""
        for worker in self.workers:
            worker.steps = [int(group["step"]) for group in self.optimizer.param_groups]

    def no_sums(self, device: torch.device) -> Tensor:
        """What `Outcome.sums` are added to, zeros."""
        return torch.zeros(sum(self._owned), 2, dtype=torch.float64, device=device)

    def tally(self, ballots: Tensor, voters: Sequence[int], slots: Sequence[Slot], names: Sequence[str]) -> Tensor:
        """Count the ballots on some parameters, which may differ in the seed and the step of the coins for ties.

        Args:
            ballots: int64 [M, W].
            voters: how many vote on each parameter.
            slots: for each parameter, where its bits are.
            names: of the parameters.

        Returns:
            int64 [1, W], the majority; where ties abstain [2, W], and the second row marks ties.
        """
        by_coin: dict[tuple[int, int], list[int]] = {}
        for i, name in enumerate(names):
            index = self.first.groups[name]
            coin = (self.optimizer.param_groups[index]["seed"], self.first.steps[index])
            by_coin.setdefault(coin, []).append(i)
        counted = []
        for (seed, step), members in by_coin.items():
            numbers, chosen = [voters[i] for i in members], [slots[i] for i in members]
            ties = torch.empty_like(ballots[0]) if self.keep_ties else None
            majority = bits.count(ballots, numbers, chosen, seed=seed, step=step_tensor(step), ties=ties)
            counted.append(majority[None] if ties is None else torch.stack([majority, ties]))
        if not counted:
            return ballots.new_zeros(2 if self.keep_ties else 1, ballots.shape[1])
        # None has a bit where another has one.
        return functools.reduce(torch.bitwise_or, counted)

    def election(self, result: Tensor, flags: Sequence[bytes], voters: Sequence[int]) -> Election:
        """What `tally` returns, with the flags."""
        return Election(result[0], result[1] if self.keep_ties else None, flags, voters)

    def hold(self, ballot: Ballot, names: Sequence[str], group: dist.ProcessGroup) -> Generator[None, None, Election]:
        """One vote over the wire, with the same result on every rank; every rank calls it with the same slots.

        It yields when a collective is on its way, and waits for it when it is asked to go on: see `in_turns`.

        Every worker sends the m-th part of its words to worker m (all-to-all), which counts the ballots for this part
        and sends the result to all (all-gather). Bytes per rank, with W words and P parameters: 8 W (M - 1) / M in the
        first phase, and as many in the second, twice that where ties abstain. Beside that P bytes to each other rank.

        Args:
            ballot: this worker's.
            names: of the parameters.
            group: the workers; gloo or NCCL.
        """
        size, rank, device = dist.get_world_size(group), dist.get_rank(group), ballot.words.device
        share = len(ballot.words) // size
        header = words_of(ballot.flags, device)
        outgoing = torch.empty(size, share + len(header), dtype=torch.int64, device=device)
        outgoing[:, :share] = ballot.words.view(size, share)
        outgoing[:, share:] = header
        incoming = outgoing
        if size > 1:
            incoming = torch.empty_like(outgoing)
            sending = start_all_to_all(incoming, outgoing, group)
            yield
            sending.wait()
        flags = flags_of(incoming[:, share:], len(names))
        voters = voters_of(flags)

        mine, cuts = _cuts(tuple(ballot.slots), rank * share, share)
        result = self.tally(incoming[:, :share], [voters[i] for i in mine], cuts, [names[i] for i in mine])
        gathered = result[None]
        if size > 1:
            flat = torch.empty(size * result.numel(), dtype=torch.int64, device=device)
            sending = start_all_gather(flat, result.view(-1), group)
            yield
            sending.wait()
            gathered = flat.view(size, *result.shape)
        return self.election(gathered.transpose(0, 1).reshape(len(result), -1), flags, voters)

    def accept(
        self, worker: Worker, ballot: Ballot, election: Election, names: Sequence[str], outs: Sequence[Tensor],
        *, spoiled: bool = False,
    ) -> Outcome:  # fmt: skip
        """Write the votes over a worker's gradients, and 0 where nobody has voted.

        Args:
            worker: whose gradients they are.
            ballot: what it has cast, with the slots of the result.
            election: the result.
            names: of the parameters.
            outs: 1-D, the gradient of each parameter; overwritten.
            spoiled: the step is going to be skipped: whatever has been elected, all becomes NaN.

        Raises:
            CollectiveError: a gradient of some worker is not finite, under "raise".
        """
        found = self._nonfinite_found(election.flags, names) if self.nonfinite != "abstain" else None
        if found is not None and self.nonfinite == "raise":
            raise CollectiveError(found)
        groups, device = self.optimizer.param_groups, outs[0].device
        calibrates = self.optimizer.calibrates
        sums = torch.empty(len(outs), 2, dtype=torch.float64, device=device) if calibrates else None
        bits.spread(election.words, election.ties, ballot.slots, outs, sums)
        indices = [worker.groups[name] for name in names]
        for voters, out in zip(election.voters, outs, strict=True):
            if voters == 0:
                out.zero_()
        voted = {index for index, voters in zip(indices, election.voters, strict=True) if voters > 0}
        by_parameter = None
        if sums is not None:
            totals = [[0.0, 0.0] for _ in range(sum(self._owned))]
            of_momenta = [] if ballot.sums is None else ballot.sums.tolist()
            for i, (name, index, flag, measured) in enumerate(
                zip(names, indices, ballot.flags, sums.tolist(), strict=True)
            ):
                if flag == PRESENT:
                    inner, square = of_momenta[i] if measures_momentum(groups[index]) else measured
                    # What is averaged is -g under maximize, as in one process.
                    totals[self._rows[name]][0] += -inner if groups[index]["maximize"] else inner
                    totals[self._rows[name]][1] += square
            by_parameter = torch.tensor(totals, dtype=torch.float64, device=device)
        spoiled = spoiled or found is not None
        if spoiled:
            for out in outs:
                out.fill_(torch.nan)
        return Outcome(voted, by_parameter, spoiled)

    def _nonfinite_found(self, flags: Sequence[bytes], names: Sequence[str]) -> str | None:
        """Whose part in the vote is not finite, as a sentence; None if all are."""
        count = sum(row.count(NOT_FINITE) for row in flags)
        if count == 0:
            return None
        rank = next(rank for rank, row in enumerate(flags) if NOT_FINITE in row)
        more = f" (and {count - 1} more)" if count > 1 else ""
        name = names[flags[rank].index(NOT_FINITE)]
        return (
            f"the {self._what} of {name} on rank {rank} is not finite{more}: lower the learning rate, or {self._advice}"
        )

    def receive_means(self, means: Tensor) -> None:
        """Give the optimizer what it calibrates on: the mean over all workers of their `Outcome.sums` in a step."""
        self.optimizer.receive_voted_sums(torch.split(means, self._owned))

    def count_votes(self, voted: Iterable[int], *, joined: bool = False) -> None:
        """Count a round in these param_groups.

        Args:
            voted: indices of param_groups.
            joined: this process has no more batches and does not step its optimizer, so its step is counted here.
        """
        for index in voted:
            for worker in self.workers:
                worker.steps[index] += 1
            if joined:
                self.optimizer.count_step(self.optimizer.param_groups[index])

    def hand_over(
        self, param: Tensor, mean: Callable[[list[Tensor]], Tensor], *, start: int = 0, size: int | None = None
    ) -> None:
        """After the switch: SGD's momentum starts from the mean of the workers', and theirs is freed.

        Args:
            param: a parameter of the optimizer whose group has switched.
            mean: of all workers' momenta, given those of this process's: float32 [size] each, in the order of memory;
                what it returns is as long as the parameter, of a sharded one as its shard.
            start, size: elements that this process's workers have; by default the whole parameter.
        """
        name = self.first.names[param]
        group = self.optimizer.param_groups[self.first.groups[name]]
        kept = [worker.state.pop(state_key(name, start), {}) for worker in self.workers]
        if group["sgd_momentum"] == 0 or name in self.first.handed_over:
            return
        self.first.handed_over.add(name)
        momenta = [
            torch.zeros(param.numel() if size is None else size, dtype=torch.float32, device=param.device) for _ in kept
        ]
        for momentum, own in zip(momenta, kept, strict=True):
            if "exp_avg" in own:
                momentum.copy_(read_momentum(own["exp_avg"], own.get("exp_avg_scale")))
        started = mean(momenta)
        state = self.optimizer.state[param]
        if "exp_avg" not in state or is_freed(state["exp_avg"]):
            state.update(new_momentum(param, STATE_DTYPES[group["state_dtype"]]))
        exp_avg: Any = state["exp_avg"]
        if exp_avg.is_floating_point():  # 8 bits start from 0
            # One of both is 0: the optimizer's until now, or the workers' if a loaded run had handed them over.
            in_memory_order(exp_avg.to_local() if hasattr(exp_avg, "to_local") else exp_avg).add_(started)


Result = TypeVar("Result")


def in_turns(votes: Iterable[Generator[None, None, Result]]) -> list[Result]:
    """Hold several votes at once: while one is on the wire, others are cast and counted.

    All ranks give the same votes, so that their collectives are in one order: the first of every vote, then the second
    of every vote.

    Returns:
        What each vote returns.
    """
    waiting = dict(enumerate(votes))
    results: dict[int, Result] = {}
    while waiting:
        for index, vote in list(waiting.items()):
            try:
                next(vote)
            except StopIteration as end:
                results[index] = end.value
                del waiting[index]
    return [results[index] for index in sorted(results)]


def in_parts(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Consecutive entries of `LEAST_PART` elements in all, or more."""
    parts: list[list[Entry]] = []
    size = LEAST_PART
    for entry in entries:
        if size >= LEAST_PART:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.flat.numel()
    return parts


def nonfinite_rule(nonfinite: str | None, *, scaled: bool) -> str:
    """What a gradient that is not finite does: by default "skip" in a loop with a GradScaler, else "raise".

    Raises:
        ValueError: an unknown name, or one that does not go with a GradScaler or goes with nothing else.
    """
    nonfinite = nonfinite or ("skip" if scaled else "raise")
    check_choice("nonfinite", nonfinite, ("raise", "abstain", "skip"))
    if nonfinite == "skip" and not scaled:
        raise ValueError("Invalid nonfinite: 'skip' without grad_scaler, which alone skips a step; use 'abstain'")
    if nonfinite == "abstain" and scaled:
        raise ValueError("Invalid nonfinite: 'abstain' with grad_scaler, which would never lower its scale; use 'skip'")
    return nonfinite


def flag_gradients(flats: Sequence[Tensor], present: Sequence[bool], *, finite: bool) -> bytes:
    """A worker's flag for each of its gradients.

    Args:
        flats: the gradients.
        present: whether backward has reached each parameter.
        finite: all gradients are known to be finite; if not, each is looked at.
    """
    flags = [PRESENT if each else ABSENT for each in present]
    if not finite:
        flags = [f if x.isfinite().all() else NOT_FINITE for f, x in zip(flags, flats, strict=True)]
    return bytes(flags)


def cast(worker: Worker, gradients: Sequence[Gradient], flags: bytes) -> Ballot:
    """The ballot on gradients, one flag each; those that are present enter the worker's momentum."""
    slots, size = worker.slots(gradients)
    share = -(-size // worker.world_size)
    words = torch.zeros(share * worker.world_size, dtype=torch.int64, device=gradients[0].flat.device)
    casting = [i for i, flag in enumerate(flags) if flag == PRESENT and gradients[i].flat.numel() > 0]
    measured = worker.cast([gradients[i] for i in casting], words, [slots[i] for i in casting])
    sums = None
    if measured is not None:
        sums = torch.zeros(len(gradients), 2, dtype=torch.float64, device=words.device)
        sums[casting] = measured
    return Ballot(words, flags, slots, sums)


def cast_entries(worker: Worker, entries: Sequence[Entry], *, finite: bool) -> Ballot:
    """`flag_gradients` and `cast` for whole parameters."""
    flags = flag_gradients([e.flat for e in entries], [e.present for e in entries], finite=finite)
    # Under DDP a gradient that backward has not reached says nothing, whatever it is.
    flags = bytes(flag if e.present else ABSENT for flag, e in zip(flags, entries, strict=True))
    return cast(worker, [Gradient(e.name, in_memory_order(e.param), e.flat) for e in entries], flags)


@functools.lru_cache(maxsize=64)
def words_of(flags: bytes, device: torch.device) -> Tensor:
    """Flags as they are sent, a byte each: int64 [ceil(flags / 8)], only to be read."""
    words = struct.unpack(f"={_words(len(flags))}q", flags.ljust(8 * _words(len(flags)), b"\0"))
    return torch.tensor(words, dtype=torch.int64, device=device)


def flags_of(words: Tensor, count: int) -> list[bytes]:
    """The inverse of `words_of` for every rank's words, int64 [M, ...]: for each rank `count` flags."""
    return [struct.pack(f"={len(row)}q", *row)[:count] for row in words.tolist()]


def _words(flags: int) -> int:
    return -(-flags // 8)


def voters_of(flags: Sequence[bytes]) -> list[int]:
    """How many of the workers vote on each parameter, by the flags of each."""
    return [column.count(PRESENT) for column in zip(*flags, strict=True)]


def _cut(slot: Slot, first: int, share: int) -> Slot | None:
    """The part of a slot in words [first, first + share), counted from there; None if there is none."""
    begin = max(slot.first, first)
    end = min(slot.first + bits.word_count(slot.segment.size), first + share)
    if begin >= end:
        return None
    skipped = (begin - slot.first) * WORD
    size = min(slot.segment.size - skipped, (end - begin) * WORD)
    return Slot(begin - first, Segment(slot.segment.parameter, slot.segment.start + skipped, size))


@functools.lru_cache(maxsize=256)
def _cuts(slots: tuple[Slot, ...], first: int, share: int) -> tuple[list[int], list[Slot]]:
    """Which of the slots have a part in words [first, first + share), and the parts; the same in every step."""
    found = [(i, cut) for i, slot in enumerate(slots) if (cut := _cut(slot, first, share)) is not None]
    return [i for i, _ in found], [cut for _, cut in found]

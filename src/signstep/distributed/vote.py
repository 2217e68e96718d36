"""Majority vote (Bernstein et al. 2019, arXiv 1810.05291): each worker sends signs and receives the majority's.

With n coordinates and M workers: every worker packs its signs into n bits, sends the m-th part of them to worker m
(all-to-all), counts the ballots for its own part, and sends the result to all (all-gather). That is n (M - 1) / (4 M)
bytes per worker and step, where the fp32 ring all-reduce sends 8 n (M - 1) / M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.hooks import Bucket, CollectiveError, Entry, GradientHook
from signstep.distributed.worker import Gradient, Worker, in_memory_order
from signstep.kernels import bits
from signstep.kernels import momentum as buffers
from signstep.kernels.bits import WORD, Slot
from signstep.kernels.reference import Segment
from signstep.optim.hybrid import HybridSignSGD
from signstep.optim.signsgd import SignSGD

__all__ = ["Election", "MajorityVote", "all_gather", "hold"]

ABSENT, PRESENT, NOT_FINITE = 0, 1, 2
"""A worker's flag for a parameter, one byte: it abstains, it votes, or its gradient is not finite, and not counted."""

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Concatenates one tensor per rank; torch renamed it."""


class Election(NamedTuple):
    """What came out of a vote, the same on every rank."""

    words: Tensor
    """The majority, int64 [W]."""
    ties: Tensor | None
    """Coordinates without a majority, int64 [W]; None where a coin has decided them."""
    flags: Tensor
    """uint8 [M, slots], on the CPU: who voted where."""


def hold(
    words: Tensor,
    flags: Sequence[int],
    slots: Sequence[Slot],
    *,
    group: dist.ProcessGroup,
    seeds: Sequence[int],
    steps: Sequence[int],
    keep_ties: bool,
) -> Election:
    """One vote over the wire; every rank calls it with the same slots.

    Bytes sent per rank, with W words and P slots: 8 W (M - 1) / M in the first phase, and as many in the second, twice
    that with keep_ties; W is rounded up to a multiple of M. Beside that P bytes to each other rank.

    Args:
        words: this worker's ballot, int64 [W]; zeros in slots from which it abstains.
        flags: `ABSENT`, `PRESENT` or `NOT_FINITE` for each slot.
        slots: what the words hold, without gaps from word 0.
        group: the workers; gloo or NCCL.
        seeds: for each slot, of the coins that decide its ties, the same on all ranks.
        steps: for each slot, the step count in those coins.
        keep_ties: mark ties instead of deciding them, at the price of a second bit on the way back.
    """
    size, rank, device = dist.get_world_size(group), dist.get_rank(group), words.device
    share = -(-len(words) // size)
    header = -(-len(flags) // 8)
    outgoing = torch.zeros(size, share + header, dtype=torch.int64, device=device)
    ballots = outgoing[:, :share]
    full, rest = divmod(len(words), share) if share else (0, 0)
    ballots[:full] = words[: full * share].view(full, share)
    if rest:
        ballots[full, :rest] = words[full * share :]
    own_flags = torch.zeros(8 * header, dtype=torch.uint8)
    own_flags[: len(flags)] = torch.tensor(list(flags), dtype=torch.uint8)
    outgoing[:, share:] = own_flags.view(torch.int64).to(device)
    incoming = torch.empty_like(outgoing)
    if size > 1:
        dist.all_to_all_single(incoming, outgoing, group=group)
    else:
        incoming = outgoing
    all_flags = incoming[:, share:].cpu().contiguous().view(torch.uint8)[:, : len(flags)]

    voters = (all_flags == PRESENT).sum(dim=0).tolist()
    cuts = [(i, cut) for i, slot in enumerate(slots) if (cut := _cut(slot, rank * share, share)) is not None]
    result = tally(
        incoming[:, :share],
        [voters[i] for i, _ in cuts],
        [cut for _, cut in cuts],
        seeds=[seeds[i] for i, _ in cuts],
        steps=[steps[i] for i, _ in cuts],
        keep_ties=keep_ties,
    )
    gathered = result[None]
    if size > 1:
        flat = torch.empty(size * result.numel(), dtype=torch.int64, device=device)
        all_gather(flat, result.view(-1), group=group)
        gathered = flat.view(size, *result.shape)
    elected = gathered[:, 0].reshape(-1)
    return Election(elected, gathered[:, 1].reshape(-1) if keep_ties else None, all_flags)


def tally(
    ballots: Tensor,
    voters: Sequence[int],
    slots: Sequence[Slot],
    *,
    seeds: Sequence[int],
    steps: Sequence[int],
    keep_ties: bool,
) -> Tensor:
    """Count the ballots of slots that may differ in the seed and the step of their coins; arguments as of `hold`.

    Args:
        ballots: int64 [M, W].
        voters: for each slot, how many workers vote in it.

    Returns:
        int64 [1, W], the majority; with keep_ties [2, W], the second row marking ties.
    """
    result = torch.zeros(2 if keep_ties else 1, ballots.shape[1], dtype=torch.int64, device=ballots.device)
    by_coin: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(seeds, steps, strict=True)):
        by_coin.setdefault(key, []).append(i)
    ties = torch.zeros_like(result[0]) if keep_ties else None
    for (seed, step), members in by_coin.items():
        numbers, chosen = [voters[i] for i in members], [slots[i] for i in members]
        result[0] |= bits.count(ballots, numbers, chosen, seed=seed, step=torch.tensor(step), ties=ties)
        if ties is not None:
            result[1] |= ties
    return result


def _cut(slot: Slot, first: int, share: int) -> Slot | None:
    """The part of a slot in words [first, first + share), counted from there; None if there is none."""
    begin = max(slot.first, first)
    end = min(slot.first + bits.word_count(slot.segment.size), first + share)
    if begin >= end:
        return None
    skipped = (begin - slot.first) * WORD
    size = min(slot.segment.size - skipped, (end - begin) * WORD)
    return Slot(begin - first, Segment(slot.segment.parameter, slot.segment.start + skipped, size))


class Ballot(NamedTuple):
    """What a worker has cast on some parameters."""

    words: Tensor
    """int64 [W]; zeros where the worker abstains."""
    flags: list[int]
    """For each parameter."""
    slots: list[Slot]
    """Where its bits are."""


def fill(worker: Worker, entries: Sequence[Entry], *, finite: bool) -> Ballot:
    """Take a worker's gradients into its momentum, and cast.

    Args:
        worker: whose state changes.
        entries: parameters that vote.
        finite: all gradients are known to be; where not (or their squares are not), each is looked at.
    """
    flags = [PRESENT if e.present else ABSENT for e in entries]
    if not finite:
        flags = [NOT_FINITE if f and not e.flat.isfinite().all() else f for f, e in zip(flags, entries, strict=True)]
    return cast(worker, [Gradient(e.name, in_memory_order(e.param), e.flat) for e in entries], flags)


def cast(worker: Worker, gradients: Sequence[Gradient], flags: list[int]) -> Ballot:
    """The ballot on gradients, one flag each, of which those that are present enter the worker's momentum."""
    slots, size = worker.slots(gradients)
    words = torch.zeros(size, dtype=torch.int64, device=gradients[0].flat.device)
    casting = [i for i, flag in enumerate(flags) if flag == PRESENT and gradients[i].flat.numel() > 0]
    worker.cast([gradients[i] for i in casting], words, [slots[i] for i in casting])
    return Ballot(words, flags, slots)


def accept(worker: Worker, entries: Sequence[Entry], ballot: Ballot, election: Election) -> tuple[set[int], Tensor]:
    """Write the result over a worker's gradients, and 0 where nobody has voted.

    Returns:
        The param_groups in which somebody has, and float64 [param_groups, 2]: in the hybrid's, <v, g> and
        ||g||^2 of this worker's gradients g where it has voted.
    """
    groups = worker.optimizer.param_groups
    hybrid = isinstance(worker.optimizer, HybridSignSGD)
    device = entries[0].flat.device
    sums = torch.zeros(len(entries), 2, dtype=torch.float64, device=device) if hybrid else None
    by_group = torch.zeros(len(groups), 2, dtype=torch.float64, device=device)
    elected = (election.flags == PRESENT).any(dim=0).tolist()
    voted = set()
    bits.spread(election.words, election.ties, ballot.slots, [e.flat for e in entries], sums)
    for i, entry in enumerate(entries):
        index = worker.groups[entry.name]
        if not elected[i]:
            entry.flat.zero_()
            continue
        voted.add(index)
        if sums is not None and ballot.flags[i] == PRESENT:
            # What is averaged is -g under maximize, as in one process.
            by_group[index, 0] += -sums[i, 0] if groups[index]["maximize"] else sums[i, 0]
            by_group[index, 1] += sums[i, 1]
    return voted, by_group


def nonfinite_found(flags: Tensor, entries: Sequence[Entry]) -> str | None:
    """Whose gradient is not finite, as a sentence; None if all are."""
    found = (flags == NOT_FINITE).nonzero().tolist()
    if not found:
        return None
    rank, i = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"the gradient of {entries[i].name} on rank {rank} is not finite{more}: lower the learning rate, or "
        'pass nonfinite="abstain" to leave such a worker out, or grad_scaler for float16'
    )


def give_up_momentum(worker: Worker, param: Tensor) -> Tensor | None:
    """Free a parameter's momentum when its group has switched to SGD.

    Returns:
        It, float32 in the parameter's shape; None where SGD does not go on with it.
    """
    name = worker.names[param]
    state = worker.state.pop(name, {})
    group = worker.optimizer.param_groups[worker.groups[name]]
    if group["sgd_momentum"] == 0 or param in worker.optimizer.state:
        return None
    momentum = torch.zeros_like(param, dtype=torch.float32)
    if "exp_avg" in state:
        in_memory_order(momentum).copy_(buffers.read(state["exp_avg"], state.get("exp_avg_scale")))
    return momentum


def start_sgd(worker: Worker, param: Tensor, mean: Tensor) -> None:
    """SGD's momentum starts from the mean of the workers'."""
    group = worker.optimizer.param_groups[worker.groups[worker.names[param]]]
    kept = buffers.new_momentum(param, group["state_dtype"])
    if kept["exp_avg"].is_floating_point():  # 8 bits start from 0
        kept["exp_avg"].copy_(mean)
    worker.optimizer.state[param] = kept


def check_options(ties: str, nonfinite: str | None, *, scaled: bool) -> str:
    """What `nonfinite` stands for, by default "skip" in a loop with a GradScaler and "raise" in another.

    Raises:
        ValueError: an unknown name, or one that does not go with a GradScaler or goes with nothing else.
    """
    nonfinite = nonfinite or ("skip" if scaled else "raise")
    for option, value, allowed in (
        ("ties", ties, ("random", "abstain")),
        ("nonfinite", nonfinite, ("raise", "abstain", "skip")),
    ):
        if value not in allowed:
            raise ValueError(f"Invalid {option}: {value!r}, expected one of {', '.join(map(repr, allowed))}")
    if nonfinite == "skip" and not scaled:
        raise ValueError("Invalid nonfinite: 'skip' without grad_scaler, which alone skips a step; use 'abstain'")
    if nonfinite == "abstain" and scaled:
        raise ValueError("Invalid nonfinite: 'abstain' with grad_scaler, which would never lower its scale; use 'skip'")
    return nonfinite


class MajorityVote(GradientHook):
    r"""Train a DDP model by majority vote: one bit per coordinate each way.

    With :math:`m_w` the momentum of worker w's own gradient and :math:`\xi_w` its own dither,

    .. math::
        v = \mathrm{sign}\Big(\sum_w \mathrm{sign}(m_w + \xi_w)\Big), \qquad x \leftarrow x - \delta\, v

    Momentum, dither and sign of the optimizer move to the worker's side; ``p.grad`` holds v after backward, and
    ``optimizer.step()``, schedulers, ``zero_grad`` and ``no_sync`` are used as ever. The step takes the sign of what is
    in ``p.grad``, so clipping and ``GradScaler.unscale_``, which scale v, change nothing.

    What one bit cannot say is decided so:

    - a coordinate whose momentum is exactly 0 casts a coin, from a stream of its rank's own;
    - a parameter that this rank's backward has not reached, or a rank that has joined (``model.join()``), abstains: one
      byte per parameter, and its momentum stays as it is;
    - a tie of an even number of voters is a coin that all ranks share.

    Args:
        model: wrapped in DistributedDataParallel; parameters that are not the optimizer's get the ordinary mean.
        optimizer: `SignSGD` or `HybridSignSGD` over the model's parameters, with dither before the sign or none.
        ties: "random", or "abstain": a tied coordinate does not move, which costs a second bit on the way back, 3 n (M
            - 1) / (8 M) bytes in all.
        error_feedback: each worker adds to its momentum what its earlier signs left out, see `Worker`.
        nonfinite: what a gradient that is not finite does. "raise": backward raises on all ranks, with rank and
            parameter. "abstain": that worker has no vote on that parameter, and its momentum stays as it is. "skip":
            the gradients become NaN on all ranks, so that a GradScaler skips the step; what was finite stays in its
            worker's momentum. With a grad_scaler it is "skip" or "raise", by default "skip"; else "raise" or "abstain",
            by default "raise".
        dither_workers: "independent": every worker's noise has the optimizer's sigma; "scaled": sigma sqrt(M), which
            keeps the range in which the expected vote is linear in the momentum.
        grad_scaler: of a loop with float16 autocast: gradients are divided by its scale before they enter the momentum.
        after_switch: how gradients are averaged in the SGD phase of HybridSignSGD: "mean" (all-reduce), "bf16" or
            "powersgd" (rank 2, with error feedback; Vogels et al. 2019, arXiv 1905.13727; what it keeps between steps
            is not saved).

    Attributes:
        worker: this rank's `signstep.distributed.worker.Worker`; names, group, rank, world_size: see `GradientHook`.

    Raises:
        TypeError, ValueError: a model, optimizer or option that does not fit, one sentence.
        CollectiveError: from backward, on all ranks: a gradient is not finite.

    HybridSignSGD calibrates on each worker's own gradient g_w against the vote: the means over workers of <v, g_w> and
    ||g_w||^2 take the place of <s, g> and ||g||^2. A worker's gradient is noisier than the mean's, so the rate is that
    of a worker's batch, too small for the mean's rather than too large. "applied" is the same as "ratio" here.

    Example:
        .. code-block:: python

            model = DistributedDataParallel(net)
            optimizer = SignSGD(model.parameters(), lr=1e-3)
            vote = MajorityVote(model, optimizer)
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: SignSGD,
        *,
        ties: str = "random",
        error_feedback: bool = False,
        nonfinite: str | None = None,
        dither_workers: str = "independent",
        grad_scaler: GradScaler | None = None,
        after_switch: str = "mean",
    ) -> None:
        nonfinite = check_options(ties, nonfinite, scaled=grad_scaler is not None)
        if after_switch not in ("mean", "bf16", "powersgd"):
            raise ValueError(f"Invalid after_switch: {after_switch!r}, expected one of 'mean', 'bf16', 'powersgd'")
        super().__init__(model)
        self.worker = Worker(
            optimizer,
            self.names,
            self.rank,
            self.world_size,
            dither_workers=dither_workers,
            error_feedback=error_feedback,
        )
        self.optimizer, self.ties, self.nonfinite = optimizer, ties, nonfinite
        self.grad_scaler, self.after_switch = grad_scaler, after_switch
        self._voted: set[int] = set()
        self._skip = False
        self._sums = self._no_sums()
        self._power: Any = None
        self.attach(model)

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(self.optimizer.param_groups), 2, dtype=torch.float64, device=self.device)

    def begin(self) -> None:
        """Votes are numbered by the optimizer's steps; a step may have been left out, as by a GradScaler."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.worker.steps):
            raise RuntimeError("add_param_group after MajorityVote was made: the group has no vote; add it before")
        for index, (group, votes) in enumerate(zip(groups, self.worker.steps, strict=True)):
            taken = int(group["step"])
            if group.get("phase", "sign") == "sign" and abs(votes - taken) > 1:
                raise RuntimeError(
                    f"param_group {index} has taken {taken} steps and {votes} votes: load vote.state_dict() together "
                    "with the optimizer's, after MajorityVote was made, and step once per backward"
                )
            self.worker.steps[index] = taken

    def reduce(self, bucket: Bucket) -> None:
        """Vote on what is in the sign phase, average the rest."""
        voting = [e for e in bucket.entries if self.worker.votes(e.name)]
        if self.grad_scaler is not None:
            for entry in voting:  # the scaler unscales what is averaged
                entry.flat.mul_(1.0 / self.grad_scaler.get_scale())
        if voting:
            self._vote(voting, finite=bool(bucket.buffer.dot(bucket.buffer).isfinite()))
        averaged = [e for e in bucket.entries if not self.worker.votes(e.name)]
        for own in (False, True):  # strangers, then those that have switched
            chosen = [e for e in averaged if (e.name in self.worker.groups) == own]
            if chosen:
                self._average(bucket, chosen, self.after_switch if own else "mean")
        if bucket.is_last:
            self._end_round(bucket.joined)

    def _vote(self, entries: Sequence[Entry], finite: bool) -> None:
        worker = self.worker
        ballot = fill(worker, entries, finite=finite)
        indices = [worker.groups[e.name] for e in entries]
        election = hold(
            ballot.words,
            ballot.flags,
            ballot.slots,
            group=self.group,
            seeds=[self.optimizer.param_groups[i]["seed"] for i in indices],
            steps=[worker.steps[i] for i in indices],
            keep_ties=self.ties == "abstain",
        )
        # What `nonfinite` says is done on all ranks alike.
        found = nonfinite_found(election.flags, entries) if self.nonfinite != "abstain" else None
        if found is not None:
            self._skip = True
            if self.nonfinite == "raise":
                raise CollectiveError(found)
        voted, sums = accept(worker, entries, ballot, election)
        self._voted |= voted
        self._sums += sums
        if self._skip:
            for entry in entries:
                entry.flat.fill_(torch.nan)

    def _average(self, bucket: Bucket, entries: Sequence[Entry], how: str) -> None:
        for entry in entries:
            if entry.name in self.worker.groups:
                self._hand_over(entry)
        if how == "powersgd" and len(entries) == len(bucket.entries):
            if self._power is None:
                from signstep.distributed.power_sgd import PowerSGD  # takes its time to import

                self._power = PowerSGD(self.group)
            self._power.average(bucket)
            return
        whole = bucket.buffer if len(entries) == len(bucket.entries) else torch.cat([e.flat for e in entries])
        mean = whole / self.world_size
        if how == "bf16":
            mean = mean.to(torch.bfloat16)
        if self.world_size > 1:
            dist.all_reduce(mean, group=self.group)
        for entry, part in zip(entries, torch.split(mean, [e.flat.numel() for e in entries]), strict=True):
            entry.flat.copy_(part)

    def _hand_over(self, entry: Entry) -> None:
        """After the switch: SGD's momentum starts from the mean of the workers', and theirs is freed."""
        mean = give_up_momentum(self.worker, entry.param)
        if mean is None:
            return
        mean /= self.world_size
        if self.world_size > 1:
            dist.all_reduce(mean, group=self.group)
        start_sgd(self.worker, entry.param, mean)

    def _end_round(self, joined: bool) -> None:
        """After the last bucket: the calibration's sums, and the count of votes."""
        sums = None
        if isinstance(self.optimizer, HybridSignSGD):
            if self.world_size > 1 and self._voted:  # by all ranks alike
                dist.all_reduce(self._sums, group=self.group)
            sums = list((self._sums / self.world_size).unbind())
            self.optimizer.receive_voted_sums(sums)
        self._sums = self._no_sums()
        if not self._skip:
            for index in self._voted:
                self.worker.steps[index] += 1
                if joined:  # the others step their optimizers now
                    group = self.optimizer.param_groups[index]
                    like = group["step"] if sums is None else group["lr_ratio"]
                    own = None if sums is None else sums[index].to(like.device, like.dtype)
                    self.optimizer._finish_step(group, own)
        self._voted, self._skip = set(), False

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state, with the momentum of its own gradients by parameter name: save it per rank."""
        return self.worker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load this rank's state, after the optimizer's; ValueError for another rank's or another world size's."""
        for p, name in self.names.items():
            for key, x in state["state"].get(name, {}).items():
                if key in ("exp_avg", "residual") and x.numel() != p.numel():
                    raise ValueError(
                        f"the {key} of {name} was saved with {x.numel()} elements, the parameter has {p.numel()}: load "
                        "the state of this model"
                    )
        self.worker.load_state_dict(state)

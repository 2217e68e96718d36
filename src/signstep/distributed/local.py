"""`LocalVote`: workers that train by themselves for some steps, then vote on where they went.

With n coordinates and M workers a worker sends n (M - 1) / (4 M) bytes in a round, n (M - 1) / (4 M H) per step where
a round is H steps. DiLoCo (Douillard et al. 2023, arXiv 2311.08105) averages in its rounds what is here voted on. The
rules of the vote are in vote.py, and when a round is due in rounds.py.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from signstep.distributed.compressors.base import Page
from signstep.distributed.hooks import Entry
from signstep.distributed.rounds import LocalSteps, Rounds, Schedule, check_outer
from signstep.distributed.vote import Vote, cast_entries, in_parts, in_turns, nonfinite_rule
from signstep.distributed.worker import Worker, check_choice
from signstep.optim.signsgd import SignSGD

__all__ = ["LocalVote", "OuterOptions", "OuterVote"]


class OuterOptions(NamedTuple):
    """How workers vote on where they went, the same on all; see `LocalVote`."""

    outer_lr: float = 1.0
    outer_momentum: float = 0.0
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
        check_outer(self.outer_lr, self.outer_momentum)
        if not 0 <= self.dither < math.inf:
            raise ValueError(f"Invalid dither: {self.dither}, expected a finite dither >= 0")


class OuterVote:
    """The votes of the workers of this process on their ways, fragment by fragment.

    Args:
        owner: class that the user has made, for messages.
        rounds: their common point.
        ranks: of each worker.
        world_size: M.
        options: see `LocalVote`.
    """

    def __init__(
        self, owner: str, rounds: Rounds, ranks: Sequence[int], world_size: int, options: OuterOptions
    ) -> None:
        self.options, self.rounds = options, rounds
        params = rounds.params[0]
        # It takes no steps itself: the workers' momentum and noise have its options, and it counts the rounds of each
        # fragment, which is a param_group.
        self.optimizer = SignSGD(
            [{"params": [params[name] for name in names]} for names in rounds.fragments],
            momentum=options.outer_momentum,
            dither=options.dither**2,
            dither_decay=0.0,
            dither_scale="relative",
            seed=options.seed,
        )
        names: dict[Tensor, str] = {p: name for name, p in params.items()}
        self.workers = [
            Worker(self.optimizer, names, rank, world_size, error_feedback=options.error_feedback) for rank in ranks
        ]
        self.vote = Vote(
            owner, self.workers, ties=options.ties, nonfinite=options.nonfinite, what="change",
            advice='pass nonfinite="abstain" to leave such a worker out',
        )  # fmt: skip

    def move(self, fragment: int, votes: Sequence[Entry], median: Tensor) -> None:
        """Move the common point by the votes, and count the round.

        Args:
            fragment: which part of it.
            votes: +1 and -1, or 0 for no step, in the place of the ways.
            median: what `Rounds.median_of` has returned.
        """
        for entry, length in zip(votes, median[2 : 2 + len(votes)].tolist(), strict=True):
            rate = self.options.outer_lr * (length if self.options.scale == "tensor" else 1.0)
            self.rounds.start[entry.name].add_(entry.flat.to(self.rounds.start[entry.name].dtype), alpha=-rate)
        self.vote.count_votes([fragment], joined=True)


class LocalVote(LocalSteps):
    r"""Train on M workers that talk once in H steps, with one bit per coordinate.

    All workers set out from the same point x. Each takes H steps of its own optimizer, to :math:`x_w`. Then they vote
    on the way back, :math:`d_w = x - x_w`, as `MajorityVote` does on gradients, and go on from where the vote leads:

    .. math::
        m_w \leftarrow \beta m_w + (1 - \beta)\, d_w, \qquad
        v = \mathrm{sign}\Big(\sum_w \mathrm{sign}(m_w + \xi_w)\Big), \qquad x \leftarrow x - \eta\, s\, v

    with s of each parameter the median over workers of :math:`\mathrm{mean}|d_w|`, 4 bytes, so that the step is as long
    as the workers' own ways; all workers are at the same x after a round, bit for bit (with a `delay` after
    `hold_round`). The optimizers' states are each
    worker's own and are not sent. Buffers of floats, such as batch norm's, become their median over workers. So
    fewer than half of the workers, whatever they send, cannot make the step longer than the others' ways.

    A weight that no worker ever moves has a momentum of 0, for which each casts a coin: it wanders by :math:`\eta s` in
    every round, unless its whole parameter stands still. So do the rows of an embedding that no batch has.

    Args:
        model: not wrapped, or wrapped in a DistributedDataParallel of the ranks of one machine while `group` has one
            rank of each machine: then gradients are averaged inside a machine and machines vote with each other.
        optimizer: of the model, any one.
        every: H, steps of a round.
        delay: steps that a round's vote may take while the workers train on, below `every`; then the step of the vote
            is added to where each worker is, as rounds.py has it. (default: 0)
        fragments: parts of the model that vote at different steps of a round, so that less is sent at a time.
            (default: 1)
        outer_lr: :math:`\eta`. (default: 1)
        outer_momentum: :math:`\beta`, in [0, 1). It delays the vote by some rounds, so it needs hundreds of them.
            (default: 0)
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
        since: steps that not all workers have agreed on; 0: all ranks have the same weights.
        rounds: the common point, a `signstep.distributed.rounds.Rounds`.

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
        delay: int = 0,
        fragments: int = 1,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        scale: str = "tensor",
        dither: float = 0.0,
        ties: str = "random",
        error_feedback: bool = False,
        nonfinite: str = "raise",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        schedule = Schedule(every, delay, fragments)
        options = OuterOptions(outer_lr, outer_momentum, scale, dither, ties, error_feedback, nonfinite, seed)
        options.check()
        super().__init__(model, optimizer, schedule, abstain=nonfinite == "abstain", group=group)
        self.outer = OuterVote("LocalVote", self.rounds, [self.rank], self.world_size, options)

    def begin(self, fragment: int) -> None:
        """Number the votes of the round."""
        self.outer.vote.begin()

    def agree(self, fragment: int, entries: Sequence[Entry]) -> None:
        """Vote on the ways."""
        in_turns(self._elect(part) for part in in_parts(entries))

    def _elect(self, entries: Sequence[Entry]) -> Generator[None, None, None]:
        names, vote, worker = [e.name for e in entries], self.outer.vote, self.outer.workers[0]
        finite = all(bool(e.flat.dot(e.flat).isfinite()) for e in entries)
        ballot = cast_entries(worker, entries, finite=finite)
        election = yield from vote.hold(ballot, names, self.group)
        vote.accept(worker, ballot, election, names, [e.flat for e in entries])

    def move(self, fragment: int, entries: Sequence[Entry], median: Tensor) -> None:
        """Move the common point by the votes."""
        self.outer.move(fragment, entries, median)

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state, as `LocalSteps.state_dict` has it, with one momentum per parameter if it has any."""
        # First what waits for the thread that may be voting.
        own = super().state_dict()
        return {**self.outer.workers[0].state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of the same rank gave, or a part of `resplit`; see `LocalSteps`."""
        self.check_state(state)
        self.outer.workers[0].load_state_dict(state)
        for group, taken in zip(self.outer.optimizer.param_groups, state["steps"], strict=True):
            group["step"].fill_(taken)
        super().load_state_dict(state)


PAGE = Page(
    paper="this library",
    bytes="(M-1)/(4 M H)",
    biased="yes: a sign, of a length",
    state="4n bytes: common point; 8n with a momentum",
    good_for="slow links: H times less than a vote at every step",
    not_for="embeddings with rare rows",
)

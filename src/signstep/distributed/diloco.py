"""`DiLoCo` (Douillard et al. 2023, arXiv 2311.08105): workers that train by themselves, then average where they went.

It is here to be compared with `LocalVote`, which has the same rounds, see rounds.py, and votes instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from signstep.distributed.compressors import CompressedMean, Compressor, Exact
from signstep.distributed.compressors.base import Page
from signstep.distributed.hooks import Entry
from signstep.distributed.rounds import LocalSteps, Schedule, check_outer
from signstep.distributed.worker import check_choice

__all__ = ["DiLoCo"]


class DiLoCo(LocalSteps):
    r"""Train on M workers that talk once in H steps, and average then how far each has gone.

    All workers set out from the same point x. Each takes H steps of its own optimizer, to :math:`x_w`. The mean of the
    ways back is the gradient of an outer step of SGD with Nesterov's momentum, as torch.optim.SGD takes it:

    .. math::
        g = \frac 1 M \sum_w C(x - x_w), \qquad m \leftarrow \mu m + g, \qquad x \leftarrow x - \eta\, (g + \mu m)

    and all go on from there, with the same bits (with a `delay` after `hold_round`). The optimizers' states are each
    worker's own and are not sent. Buffers of floats, such as batch norm's, become their median over workers.

    Args:
        model: not wrapped, or wrapped in a DistributedDataParallel of the ranks of one machine while `group` has one
            rank of each machine.
        optimizer: of the model, any one; the paper's is AdamW.
        every: H, steps of a round; the paper has 500.
        delay: steps that a mean may take while the workers train on, below `every`; then the outer step is added to
            where each worker is, as rounds.py has it. (default: 0)
        fragments: parts of the model that are averaged at different steps of a round. (default: 1)
        outer_lr: :math:`\eta`. (default: 0.7)
        outer_momentum: :math:`\mu`, in [0, 1). (default: 0.9)
        compressor: C, see `signstep.distributed.compressors`: `QSGD(levels=127)` sends 8 bits. None: `Exact()`, 32
            bits. What a compressor with error feedback has not sent waits for the next round.
        nonfinite: what weights that are not finite do. "raise": `step` raises on all ranks. "abstain": the mean is that
            of the other workers, and that worker goes on from where they go; its optimizer's state is cleared. If no
            worker is left, all go back to where the round began.
        group: the workers; None: all ranks.
        seed: of stochastic rounding, the same on all ranks, in [0, 2^64).

    Attributes:
        since: steps that not all workers have agreed on; 0: all ranks have the same weights.
        rounds: the common point, a `signstep.distributed.rounds.Rounds`.

    Raises:
        TypeError: a parameter is complex.
        ValueError: an option out of its range.
        CollectiveError: from `step`, on all ranks: weights are not finite.

    Example:
        .. code-block:: python

            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            local = DiLoCo(model, optimizer, every=100)
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
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        compressor: Compressor | None = None,
        nonfinite: str = "raise",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        schedule = Schedule(every, delay, fragments)
        check_choice("nonfinite", nonfinite, ("raise", "abstain"))
        check_outer(outer_lr, outer_momentum)
        super().__init__(model, optimizer, schedule, abstain=nonfinite == "abstain", group=group)
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        self.momenta: dict[str, Tensor] = {}
        """m by parameter, 1-D like the common point; none before the first round, nor without momentum."""
        self.mean = CompressedMean(self.rounds.params[0], self.group, compressor or Exact(), seed=seed, what="change")

    def begin(self, fragment: int) -> None:
        """There is nothing to do."""

    def agree(self, fragment: int, entries: Sequence[Entry]) -> None:
        """Average the ways over the workers that take part."""
        present = self.mean.average(entries)
        self.mean.step += 1
        for entry, workers in zip(entries, present, strict=True):
            if 0 < workers < self.world_size:
                entry.flat.mul_(self.world_size / workers)

    def move(self, fragment: int, entries: Sequence[Entry], median: Tensor) -> None:
        """Take an outer step."""
        names = [e.name for e in entries]
        momenta = [self.momenta.get(name) for name in names]
        sgd(
            [self.rounds.start[name] for name in names],
            [e.flat for e in entries],
            momenta,
            foreach=False,
            weight_decay=0.0,
            momentum=self.outer_momentum,
            lr=self.outer_lr,
            dampening=0.0,
            nesterov=self.outer_momentum > 0,
            maximize=False,
        )
        self.momenta.update({name: m for name, m in zip(names, momenta, strict=True) if m is not None})

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state, as `LocalSteps.state_dict` has it, with a momentum and a residual per parameter."""
        # First what waits for the thread that may be averaging.
        own = super().state_dict()
        return {**own, "mean": self.mean.state_dict(), "momenta": {name: m.clone() for name, m in self.momenta.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of the same rank gave; see `LocalSteps`."""
        self.check_state(state)
        self.mean.load_state_dict(state["mean"])
        super().load_state_dict(state)
        start = self.rounds.start
        self.momenta = {name: m.to(start[name], copy=True) for name, m in state["momenta"].items()}


PAGES = {
    "diloco": Page(
        paper="Douillard et al. 2023, [2311.08105](https://arxiv.org/abs/2311.08105)",
        bytes="8 (M-1)/(M H)",
        biased="no",
        state="4n bytes: common point; 8n with a momentum",
        good_for="H of 100 and more",
        not_for="the slowest links, where 8 bits or a vote send less",
    ),
    "diloco-int8": Page(
        paper="the same, with QSGD's rounding",
        bytes="257/128 (M-1)/(M H)",
        biased="no",
        state="4n bytes: common point; 8n with a momentum",
        good_for="a quarter of the bytes, without bias",
        not_for="where a bit is enough",
    ),
}

"""`MajorityVote`: a DDP model trained by majority vote. The rules of the vote are in vote.py.

With n coordinates and M workers a worker sends n (M - 1) / (4 M) bytes per step, where the fp32 ring all-reduce sends
8 n (M - 1) / M.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signstep.distributed.compressors.base import Page
from signstep.distributed.hooks import Bucket, Entry, GradientHook
from signstep.distributed.nodes import Node
from signstep.distributed.power_sgd import PowerSGD
from signstep.distributed.vote import Vote, cast_entries, in_parts, in_turns, nonfinite_rule
from signstep.distributed.worker import Worker, check_choice

__all__ = ["MajorityVote"]


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
        optimizer: `SignSGD` or `HybridSignSGD` over the model's parameters, with dither before the sign or none; it may
            be in wrappers, see `signstep.optim.wrappers`.
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
        replicate_group: the ranks that vote with this one, one of each node: of a mesh of nodes and ranks the group of
            the first dimension. A node is then one worker, with the mean of its ranks' gradients, as under HSDP. Each
            of its ranks votes on some of the parameters, whole ones, and keeps momentum for these alone. None: every
            rank is a worker.

    Attributes:
        worker: this rank's `signstep.distributed.worker.Worker`, which with replicate_group has the rank of the node
            among nodes; names, group, rank, world_size: of all ranks, see `GradientHook`.

    Raises:
        TypeError, ValueError: a model, optimizer or option that does not fit, one sentence.
        CollectiveError: from backward, on all ranks: a gradient is not finite.

    HybridSignSGD calibrates on each worker's own gradient g_w against the vote: the means over workers of <v, g_w> and
    ||g_w||^2 take the place of <s, g> and ||g||^2. A worker's gradient is noisier than the mean's, so the rate is that
    of a worker's batch, too small for the mean's rather than too large. "applied" is the same as "ratio" here.

    With M nodes the ranks of a node send n (M - 1) / (4 M) bytes to other nodes, all together. Inside a node each of
    its L ranks sends 4 n (L - 1) / L bytes of gradients, and on average n (L - 1) / (8 L) of results. A rank whose
    backward has not reached a parameter adds 0 to the mean of its node, which abstains if none has. Errors name the
    node as a rank.

    Example:
        .. code-block:: python

            model = DistributedDataParallel(net)
            optimizer = SignSGD(model.parameters(), lr=1e-3)
            vote = MajorityVote(model, optimizer)
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        *,
        ties: str = "random",
        error_feedback: bool = False,
        nonfinite: str | None = None,
        dither_workers: str = "independent",
        grad_scaler: GradScaler | None = None,
        after_switch: str = "mean",
        replicate_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_choice("ties", ties, ("random", "abstain"))
        nonfinite = nonfinite_rule(nonfinite, scaled=grad_scaler is not None)
        check_choice("after_switch", after_switch, ("mean", "bf16", "powersgd"))
        super().__init__(model)
        self._node = None if replicate_group is None else Node(self.group, replicate_group, self.device)
        voters = self.group if self._node is None else self._node.voters
        self.worker = Worker(
            optimizer,
            self.names,
            dist.get_rank(voters),
            dist.get_world_size(voters),
            dither_workers=dither_workers,
            error_feedback=error_feedback,
            part=(0, 1) if self._node is None else (self._node.rank, self._node.size),
        )
        if self._node is not None:
            self._node.share_out(self.worker)
        self.optimizer, self.ties, self.nonfinite = self.worker.optimizer, ties, nonfinite
        self.grad_scaler, self.after_switch = grad_scaler, after_switch
        self._vote = Vote("MajorityVote", [self.worker], ties=ties, nonfinite=nonfinite)
        self._power: PowerSGD | None = None
        self._start_round()
        self.attach(model)

    def _start_round(self) -> None:
        """Of one backward's buckets: who has voted, whether the step is to be skipped, the calibration's sums."""
        self._voted: set[int] = set()
        self._spoiled = False
        self._sums = self._vote.no_sums(self.device)

    def begin(self) -> None:
        """Number the votes by the optimizer's steps."""
        self._vote.begin()

    def reduce(self, bucket: Bucket) -> None:
        """Vote on what is in the sign phase, average the rest."""
        voting = [e for e in bucket.entries if self.worker.votes(e.name)]
        if self.grad_scaler is not None:
            for entry in voting:  # the scaler unscales what is averaged
                entry.flat.mul_(1.0 / self.grad_scaler.get_scale())
        if voting:
            finite = bool(bucket.buffer.dot(bucket.buffer).isfinite())
            in_turns(self._elect(part, finite) for part in in_parts(voting))
        averaged = [e for e in bucket.entries if not self.worker.votes(e.name)]
        strangers = [e for e in averaged if e.name not in self.worker.groups]
        switched = [e for e in averaged if e.name in self.worker.groups]
        if strangers:
            self._average(bucket, strangers, "mean")
        if switched:
            for entry in switched:
                self._vote.hand_over(entry.param, self._mean_of_workers)
            self._average(bucket, switched, self.after_switch)
        if bucket.is_last:
            self._end_round(bucket.joined)

    def _elect(self, entries: Sequence[Entry], finite: bool) -> Generator[None, None, None]:
        if self._node is not None:
            entries = self._node.by_owner(entries)
        names, outs = [e.name for e in entries], [e.flat for e in entries]
        if self._node is not None:
            ballot, election = yield from self._node.elect(self._vote, entries)
        else:
            ballot = cast_entries(self.worker, entries, finite=finite)
            election = yield from self._vote.hold(ballot, names, self.group)
        outcome = self._vote.accept(self.worker, ballot, election, names, outs, spoiled=self._spoiled)
        self._voted |= outcome.voted
        if outcome.sums is not None:
            self._sums += outcome.sums
        self._spoiled = outcome.spoiled

    def _average(self, bucket: Bucket, entries: Sequence[Entry], how: str) -> None:
        if how == "powersgd" and len(entries) == len(bucket.entries):
            self._power = self._power or PowerSGD(self.group)
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

    def _mean_of_workers(self, momenta: Sequence[Tensor]) -> Tensor:
        """Over all ranks: of a node's, one has the momentum and others have 0."""
        total = momenta[0] / self.worker.world_size
        if self.world_size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def _end_round(self, joined: bool) -> None:
        if self.optimizer.calibrates:
            if self.world_size > 1 and self._voted:  # by all ranks alike
                dist.all_reduce(self._sums, group=self.group)
            self._vote.receive_means(self._sums / self.worker.world_size)
        if not self._spoiled:
            self._vote.count_votes(self._voted, joined=joined)
        self._start_round()

    def close(self) -> None:
        """End the thread and the process groups, once the model is not trained any more. A collective."""
        if self._node is not None and not self._closed:
            self._node.close()
        super().close()

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state, with the momentum of its own gradients by parameter name: save it per rank.

        With replicate_group it has the parameters that this rank votes on for its node.
        """
        return self.worker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load this rank's state, after the optimizer's; with replicate_group also a whole worker's, as of `resplit`.

        Raises:
            ValueError: it is another rank's, or of another number of workers or of other parameters.
        """
        for p, name in self.names.items():
            for key, x in state["state"].get(name, {}).items():
                if key in ("exp_avg", "residual") and x.numel() != p.numel():
                    raise ValueError(
                        f"the {key} of {name} was saved with {x.numel()} elements, the parameter has {p.numel()}: load "
                        "the state of this model"
                    )
        self.worker.load_state_dict(state)
        if self._node is not None:
            self._node.keep_own(self.worker)


PAGES = {
    "SignSGD": Page(
        paper="Bernstein et al. 2019, [1810.05291](https://arxiv.org/abs/1810.05291)",
        bytes="1/4 (M-1)/M",
        biased="yes: the sign alone",
        state="none: each worker's momentum is the optimizer's",
        good_for="slow links, any M; a minority that flip their own signs (colluders need fewer where signs are noisy)",
        not_for="optimizers that need magnitudes",
    ),
    "Lion": Page(
        paper="Distributed Lion: Liu et al. 2024, [2404.00438](https://arxiv.org/abs/2404.00438)",
        bytes="1/4 (M-1)/M",
        biased="yes: the sign alone",
        state="none: each worker's momentum is the optimizer's",
        good_for="as above, where Lion is the better optimizer",
        not_for="as above",
    ),
}

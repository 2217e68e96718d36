"""Majority vote for FSDP2: where `fully_shard` averages a gradient and cuts it up, the owner of a shard counts votes.

FSDP reduces a module's gradients when this rank has all of them for its own batch, so each rank is a worker, just as
under DDP: it takes the whole gradient into its momentum and casts. The bits go to the owners of the shards, and as
nobody but the owner needs a result, there is no way back: n (M - 1) / (8 M) bytes per worker and step. Noise and coins
are those of the element's index in the whole parameter, so that DDP and FSDP2 take identical steps.

FSDP calls what is registered here in the order of the modules, on one thread; torch keeps the interface private.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_api as fsdp_api
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd import Variable
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from signstep.distributed.collectives import all_gather, mean_over, own_group, reduce_scatter
from signstep.distributed.fsdp_shards import Part, Reduced, Routes, Unit, check_groups, check_optimizer, find_units
from signstep.distributed.vote import (
    Ballot,
    Vote,
    cast,
    flag_gradients,
    flags_of,
    in_turns,
    nonfinite_rule,
    voters_of,
    words_of,
)
from signstep.distributed.worker import Gradient, Worker, check_choice, sign_optimizer, state_key
from signstep.kernels.bits import word_count
from signstep.kernels.engine import Slot
from signstep.kernels.reference import Segment
from signstep.optim.signsgd import SignSGD

__all__ = ["FSDPMajorityVote"]


class _ReduceScatter(getattr(fsdp_api, "ReduceScatter", object)):  # type: ignore[misc]
    """What FSDP calls in place of its reduce-scatter."""

    def __init__(self, reduce: Callable[[Tensor, Tensor], None]) -> None:
        self.reduce = reduce

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        with torch.no_grad():
            self.reduce(input_tensor, output_tensor)


class FSDPMajorityVote:
    r"""Train a model under `fully_shard` by majority vote: one bit per coordinate, to the owner of its shard.

    The same steps, bit for bit, as `signstep.distributed.MajorityVote` takes under DDP with the same batches; see there
    for what the vote is and what one bit cannot say. The loop stays as it is: ``p.grad`` holds the owner's shard of the
    vote after backward.

    Every rank keeps the momentum of its own gradients whole, as much memory as under DDP: ``state_dtype=torch.int8``
    makes that one byte per parameter, ``momentum=0`` none. With ``replicate_group`` the vote is between replicas
    (HSDP): ranks of a shard group average their gradients as ever, are one worker, and share its momentum.

    Args:
        model: the root, with `fully_shard` applied to it and to its parts along the first dimension of their
            parameters, over one 1-D mesh. What it used as reduce-scatter, all-reduce hook and divide factor is
            replaced.
        optimizer: `SignSGD` or `HybridSignSGD` over the model's sharded parameters, with dither before the sign or
            none. Parameters that are not the optimizer's get the ordinary mean.
        ties: "random", or "abstain": a tied coordinate does not move, which costs nothing here for SignSGD.
        error_feedback: each worker adds to its momentum what its earlier signs left out, see `Worker`; not with
            replicate_group.
        nonfinite: "raise", "abstain" or "skip", as in `MajorityVote`; where replicas vote, the rank that is named is
            one in replicate_group.
        dither_workers: "independent" or "scaled", as in `MajorityVote`.
        grad_scaler: of a loop that scales its loss, for float16: gradients are divided by its scale before they enter
            the momentum.
        replicate_group: ranks that hold the same shard, each of another replica: of a 2-D mesh with `fully_shard` over
            its second dimension alone, the group of the first.

    Raises:
        RuntimeError: this torch has no custom reduce-scatter.
        TypeError, ValueError: a model, optimizer or option that does not fit, one sentence.
        CollectiveError: from backward, on all ranks: a gradient is not finite.

    HybridSignSGD needs the result on all ranks until it switches, to compare it with each worker's gradient: n (M - 1)
    / (4 M) bytes, as under DDP. After the switch gradients are averaged by a reduce-scatter.

    Example:
        .. code-block:: python

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            optimizer = SignSGD(model.parameters(), lr=1e-3)
            vote = FSDPMajorityVote(model, optimizer)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        *,
        ties: str = "random",
        error_feedback: bool = False,
        nonfinite: str | None = None,
        dither_workers: str = "independent",
        grad_scaler: GradScaler | None = None,
        replicate_group: dist.ProcessGroup | None = None,
    ) -> None:
        optimizer = sign_optimizer(optimizer)
        check_choice("ties", ties, ("random", "abstain"))
        nonfinite = nonfinite_rule(nonfinite, scaled=grad_scaler is not None)
        if error_feedback and replicate_group is not None:
            raise ValueError(
                "Invalid error_feedback: True with replicate_group, where no rank has what a worker's sign leaves out"
            )
        self._units = find_units(model)
        self._parts = {part.name: part for unit in self._units for part in unit.parts}
        self.names: Mapping[Tensor, str] = {part.param: name for name, part in self._parts.items()}
        check_optimizer(optimizer, self.names)
        first = self._units[0].parts[0].param
        self.device = first.device
        mesh_group = first.device_mesh.get_group()
        check_groups(self._units, mesh_group, replicate_group)
        self._shards, self._shard = dist.get_world_size(mesh_group), dist.get_rank(mesh_group)
        self._shard_group = own_group(mesh_group, self.device)
        self._among_shards = replicate_group is None and self._shards > 1
        self.group = self._shard_group if replicate_group is None else own_group(replicate_group, self.device)
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._bring_momentum(optimizer)
        self.worker = Worker(
            optimizer,
            self.names,
            self.rank,
            self.world_size,
            dither_workers=dither_workers,
            error_feedback=error_feedback,
        )
        self.worker.state = {
            state_key(name, self._extent(self._parts[name])[0]): kept for name, kept in self.worker.state.items()
        }
        self.optimizer, self.ties, self.nonfinite, self.grad_scaler = optimizer, ties, nonfinite, grad_scaler
        self._vote = Vote("FSDPMajorityVote", [self.worker], ties=ties, nonfinite=nonfinite, counted=False)
        self._backward = -1
        for unit in self._units:
            self._attach(unit)

    def _attach(self, unit: Unit) -> None:
        unit.watch()
        # Else float16 and float64 are divided before the reduction and after it, votes too.
        unit.module.set_gradient_divide_factor(1.0)
        if self._among_shards:
            unit.module.set_custom_reduce_scatter(
                _ReduceScatter(lambda whole, shard: self._reduce_whole(unit, whole, shard))
            )
            return
        unit.module.set_custom_reduce_scatter(_ReduceScatter(self._average_shards))  # which torch skips for one shard
        unit.module.set_all_reduce_hook(lambda shard: self._reduce_shard(unit, shard))

    def _bring_momentum(self, optimizer: SignSGD) -> None:
        """What an optimizer that has taken steps keeps of the shards becomes what a worker keeps."""
        voting = [group["params"] for group in optimizer.param_groups if optimizer.in_sign_phase(group)]
        for param in itertools.chain(*voting):
            state = optimizer.state.get(param, {})
            if "exp_avg_scale" in state:
                raise ValueError(
                    "the optimizer has taken steps with 8-bit momentum, which cannot be handed to a vote: make "
                    "FSDPMajorityVote before the first step"
                )
            for key in ("exp_avg", "mean_square"):
                x = state.get(key)
                if isinstance(x, DTensor):
                    state[key] = x.full_tensor() if self._among_shards or x.ndim == 0 else x.to_local()

    def _extent(self, part: Part) -> tuple[int, int]:
        """First element and number of elements of what this rank's worker has of a parameter."""
        return (0, part.size) if self._among_shards else (part.begin(self._shard), part.count(self._shard))

    def _reduce_whole(self, unit: Unit, whole: Tensor, shard: Tensor) -> None:
        """Every rank of the shard group is a worker: from its whole gradients to a shard of the result."""
        table = whole.view(self._shards, -1)
        voting, averaged = self._divide(unit, shard)
        if voting:
            gradients = self._whole_gradients(table, voting)
            ballot = cast(self.worker, gradients, self._flags(voting, gradients, whole))
            if self.optimizer.calibrates:
                self._elect_whole(unit, gradients, ballot)
                for r, g in zip(voting, gradients, strict=True):
                    begin, size = r.part.begin(self._shard), r.part.count(self._shard)
                    shard[r.column : r.column + size] = g.flat[begin : begin + size]
            else:
                self._elect_shard(unit, voting, ballot, shard)
        if averaged:
            self._hand_over(averaged)
            runs = [table[:, r.column : r.column + r.part.run] for r in averaged]
            mean = self._mean_of_runs(table if not voting else torch.cat(runs, dim=1))
            self._put(averaged, mean, shard)

    def _average_shards(self, whole: Tensor, shard: Tensor) -> None:
        shard.copy_(self._mean_of_runs(whole.view(self._shards, -1)))

    def _mean_of_runs(self, table: Tensor) -> Tensor:
        """Of [ranks, n] on every rank, this rank's row of the mean."""
        mean = table / self._shards
        out = torch.empty_like(mean[0])
        reduce_scatter(out, mean.view(-1), group=self._shard_group)
        return out

    def _reduce_shard(self, unit: Unit, shard: Tensor) -> None:
        """Every replica is a worker, and this is a shard of its gradient; with one shard, all of it."""
        with torch.no_grad():
            voting, averaged = self._divide(unit, shard)
            if voting:
                self._elect_replicas(unit, voting, shard)
            if averaged:
                self._hand_over(averaged)
                mean = torch.cat([shard[r.column : r.column + r.part.run] for r in averaged])
                self._put(averaged, mean_over(self.group, mean), shard)

    def _put(self, averaged: Sequence[Reduced], mean: Tensor, shard: Tensor) -> None:
        for r, run in zip(averaged, torch.split(mean, [r.part.run for r in averaged]), strict=True):
            shard[r.column : r.column + r.part.run] = run

    def _divide(self, unit: Unit, shard: Tensor) -> tuple[list[Reduced], list[Reduced]]:
        """Those that vote, and those that are averaged."""
        self._vote.begin()
        voting: list[Reduced] = []
        averaged: list[Reduced] = []
        for reduced in unit.take(shard.numel()):
            (voting if self.worker.votes(reduced.part.name) else averaged).append(reduced)
        self._warn_of_second_backward(voting)
        task = torch._C._current_graph_task_id()
        if self.optimizer.calibrates and voting and task != self._backward:
            self._backward = task
            Variable._execution_engine.queue_callback(self._share_sums)
        return voting, averaged

    def _warn_of_second_backward(self, voting: Sequence[Reduced]) -> None:
        kept = next((g for r in voting if (g := r.part.param.grad) is not None and r.part.count(self._shard) > 0), None)
        if isinstance(kept, DTensor) and bool(kept.to_local().any()):
            warnings.warn(
                "FSDPMajorityVote: backward again without zero_grad(): votes add up; call zero_grad() after step(), "
                "and accumulate gradients with set_requires_gradient_sync(False)",
                stacklevel=2,
            )

    def _gradient(self, part: Part, x: Tensor) -> Tensor:
        """As a worker takes it: in no fewer bits than the parameter has, and unscaled."""
        x = x.to(torch.promote_types(x.dtype, part.param.dtype))
        return x if self.grad_scaler is None else x * (1.0 / self.grad_scaler.get_scale())

    def _whole_gradients(self, table: Tensor, voting: Sequence[Reduced]) -> list[Gradient]:
        """With the whole parameter where coupled weight decay asks for it, which costs an all-gather."""
        weights: dict[str, Tensor] = {}
        decaying = [r.part for r in voting if self._decays(r.part)]
        if decaying:
            runs = []
            for part in decaying:
                local = part.param.to_local().reshape(-1)
                runs.append(torch.nn.functional.pad(local, (0, part.run - len(local))))
            gathered = torch.empty(self._shards * sum(p.run for p in decaying), dtype=runs[0].dtype, device=self.device)
            all_gather(gathered, torch.cat(runs), group=self._shard_group)
            column = 0
            for part in decaying:
                weights[part.name] = part.whole(gathered.view(self._shards, -1), column)
                column += part.run
        gradients = []
        for part, column, _ in voting:
            flat = self._gradient(part, part.whole(table, column))
            weight = weights[part.name].to(flat.dtype) if part.name in weights else flat
            gradients.append(Gradient(part.name, weight, flat))
        return gradients

    def _decays(self, part: Part) -> bool:
        group = self.optimizer.param_groups[self.worker.groups[part.name]]
        return group["weight_decay"] != 0 and not group["decoupled_weight_decay"]

    def _flags(self, voting: Sequence[Reduced], gradients: Sequence[Gradient], reduced: Tensor) -> bytes:
        finite = bool(reduced.dot(reduced).isfinite())
        return flag_gradients([g.flat for g in gradients], [r.present for r in voting], finite=finite)

    def _elect_shard(self, unit: Unit, voting: Sequence[Reduced], ballot: Ballot, shard: Tensor) -> None:
        """The bits of each shard go to its owner, with every flag, and the result stays there."""
        names = [r.part.name for r in voting]
        key = tuple(names)
        if key not in unit.routes:
            unit.routes[key] = Routes.of([r.part for r in voting], self._shards, self.device)
        ballots = unit.routes[key].cut(ballot.words)
        width = ballots.shape[1]
        outgoing = torch.cat([ballots, words_of(ballot.flags, self.device).expand(self._shards, -1)], dim=1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        flags = flags_of(incoming[:, width:], len(names))
        voters = voters_of(flags)
        slots, outs, first = [], [], 0
        for r in voting:
            size = r.part.count(self._shard)
            ordinal = self.worker.ordinals[r.part.name]
            slots.append(Slot(first, Segment(ordinal, r.part.begin(self._shard), size)))
            outs.append(shard[r.column : r.column + size])
            first += word_count(r.part.run)
        election = self._vote.election(self._vote.tally(incoming[:, :width], voters, slots, names), flags, voters)
        self._vote.accept(self.worker, ballot._replace(slots=slots), election, names, outs)

    def _elect_replicas(self, unit: Unit, voting: Sequence[Reduced], shard: Tensor) -> None:
        pieces = [shard[r.column : r.column + r.part.count(self._shard)] for r in voting]
        gradients = []
        for r, piece in zip(voting, pieces, strict=True):
            flat = self._gradient(r.part, piece)
            weight = r.part.param.to_local().reshape(-1).to(flat.dtype) if self._decays(r.part) else flat
            gradients.append(Gradient(r.part.name, weight, flat, r.part.begin(self._shard)))
        flags = self._flags(voting, gradients, shard)
        if self._shards > 1:  # a worker has one opinion, that of its least finite shard
            agreed = torch.tensor(list(flags), dtype=torch.uint8, device=self.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._shard_group)
            flags = bytes(agreed.tolist())
        ballot = cast(self.worker, gradients, flags)
        self._share_mean_squares(voting)
        self._elect_whole(unit, gradients, ballot)
        for piece, g in zip(pieces, gradients, strict=True):
            piece.copy_(g.flat)

    def _share_mean_squares(self, voting: Sequence[Reduced]) -> None:
        """Relative dither goes by the rms of the whole momentum, of which every rank has had a shard."""
        worker = self.worker

        def is_relative(part: Part) -> bool:
            group = self.optimizer.param_groups[worker.groups[part.name]]
            return bool(group["dither"] > 0 and group["dither_scale"] == "relative")

        relative = [r.part for r in voting if is_relative(r.part)]
        if self._shards == 1 or not relative:
            return
        squares = torch.zeros(len(relative), dtype=torch.float32, device=self.device)
        states = []
        for i, part in enumerate(relative):
            states.append(worker.state.get(state_key(part.name, self._extent(part)[0]), {}))
            if "mean_square" in states[i]:
                squares[i] = states[i]["mean_square"] * (part.count(self._shard) / part.size)
        dist.all_reduce(squares, group=self._shard_group)
        for state, square in zip(states, squares, strict=True):
            if "mean_square" in state:
                state["mean_square"].copy_(square)

    def _elect_whole(self, unit: Unit, gradients: Sequence[Gradient], ballot: Ballot) -> None:
        """A vote as under DDP, whose result all workers know and which is written over the gradients."""
        names, outs = [g.name for g in gradients], [g.flat for g in gradients]
        (election,) = in_turns([self._vote.hold(ballot, names, self.group)])
        outcome = self._vote.accept(self.worker, ballot, election, names, outs)
        if outcome.sums is not None:
            unit.sums[tuple(names)] = (list(self.worker.steps), outcome.sums)

    def _share_sums(self) -> None:
        """After a backward: the sums of the calibration, over what has been voted on for this step."""
        steps = [int(group["step"]) for group in self.optimizer.param_groups]
        total = self._vote.no_sums(self.device)
        for unit in self._units:
            for then, sums in unit.sums.values():
                if then == steps:
                    total += sums
        total = mean_over(self.group, total)
        if not self._among_shards and self._shards > 1:
            dist.all_reduce(total, group=self._shard_group)
        self._vote.receive_means(total)

    def _hand_over(self, averaged: Sequence[Reduced]) -> None:
        for part in (r.part for r in averaged if r.part.name in self.worker.groups):

            def mean(momenta: list[Tensor], part: Part = part) -> Tensor:
                if not self._among_shards:
                    return mean_over(self.group, momenta[0])
                return self._mean_of_runs(part.rows(momenta[0], self._shards))[: part.count(self._shard)]

            start, size = self._extent(part)
            self._vote.hand_over(part.param, mean, start=start, size=size)

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state, with the momentum of its own gradients by parameter name: save it per rank.

        It is what `MajorityVote` keeps for the same worker, and can be loaded there. With replicate_group it is one
        shard's, and a parameter's name is followed by the index of the shard's first element.
        """
        return self.worker.state_dict() | {"steps": [int(group["step"]) for group in self.optimizer.param_groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load this rank's state, after the optimizer's.

        Raises:
            ValueError: it is another rank's, of another number of workers, of another shard or of other parameters.
        """
        for key, tensors in state["state"].items():
            name, _, start = key.partition("@")
            if name not in self._parts or "exp_avg" not in tensors:
                continue
            begin, size = self._extent(self._parts[name])
            saved = tensors["exp_avg"].numel()
            if (int(start or 0), saved) != (begin, size):
                raise ValueError(
                    f"the momentum of {name} was saved for {saved} elements from {start or 0} on, this rank has {size} "
                    f"from {begin} on: load the state of the same shard"
                )
        self.worker.load_state_dict(state)

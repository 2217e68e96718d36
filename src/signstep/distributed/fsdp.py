"""Majority vote for FSDP2: where `fully_shard` averages a gradient and cuts it up, the owner of a shard counts votes.

FSDP reduces a module's gradients when this rank has all of them for its own batch, so each rank is a worker, just as
under DDP: it takes the whole gradient into its momentum and casts. The bits go to the owners of the shards, and as
nobody but the owner needs a result, there is no way back: n (M - 1) / (8 M) bytes per worker and step. Noise and coins
are those of the element's index in the whole parameter, so that DDP and FSDP2 take identical steps.

FSDP calls what is registered here in the order of the modules, on one thread; torch keeps the interface private.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_api as fsdp_api
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from signstep.distributed.hooks import CollectiveError, Entry, own_group
from signstep.distributed.vote import (
    ABSENT,
    NOT_FINITE,
    PRESENT,
    Ballot,
    accept,
    all_gather,
    cast,
    check_options,
    hold,
    nonfinite_found,
    tally,
)
from signstep.distributed.worker import Gradient, Worker
from signstep.kernels import bits
from signstep.kernels import momentum as buffers
from signstep.kernels.bits import WORD, Slot, word_count
from signstep.kernels.reference import Segment
from signstep.optim.hybrid import HybridSignSGD
from signstep.optim.signsgd import SignSGD

__all__ = ["FSDPMajorityVote"]

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Adds up and cuts up; torch renamed it."""


class _Part(NamedTuple):
    """One parameter, which FSDP cuts into runs of consecutive elements, one per rank and padded to the same length."""

    name: str
    param: DTensor
    size: int
    """Elements of the whole parameter."""
    run: int
    """Elements of a run, padding included."""

    def begin(self, rank: int) -> int:
        """Index of the first element of a rank's shard, in the whole parameter."""
        return min(rank * self.run, self.size)

    def count(self, rank: int) -> int:
        """Elements of a rank's shard, 0 for many a rank if there are few rows."""
        return self.begin(rank + 1) - self.begin(rank)

    def whole(self, table: Tensor, column: int) -> Tensor:
        """All elements, 1-D, out of rows of which each has one rank's run from a column on."""
        return table[:, column : column + self.run].reshape(-1)[: self.size]

    def rows(self, whole: Tensor, ranks: int) -> Tensor:
        """The inverse: [ranks, run], padded with zeros."""
        padded = torch.nn.functional.pad(whole, (0, ranks * self.run - self.size))
        return padded.view(ranks, self.run)


class _Reduced(NamedTuple):
    """A parameter in one reduction."""

    part: _Part
    column: int
    """Where its run begins in what a rank gets."""
    present: bool
    """This rank's backward has reached the parameter since the last reduction; where not, its gradient here is 0."""


class _Routes(NamedTuple):
    """How the bits of whole parameters become words for each rank: int32, int32 and int8 [ranks, words]."""

    low: Tensor
    """Index of the word that has the lowest bit."""
    high: Tensor
    """Index of the one after it, both that of a zero word beyond the parameter's end."""
    shift: Tensor
    """Position of the lowest bit."""

    @classmethod
    def of(cls, parts: Sequence[_Part], ranks: int, device: torch.device) -> _Routes:
        """For parameters whose bits lie side by side, each from a word on."""
        lows, highs, shifts = [], [], []
        nothing = sum(word_count(part.size) for part in parts)
        first = 0
        for part in parts:
            begin = torch.arange(ranks)[:, None] * part.run
            source = begin // WORD + torch.arange(word_count(part.run))
            words = word_count(part.size)
            lows.append(torch.where(source < words, first + source, nothing))
            highs.append(torch.where(source + 1 < words, first + source + 1, nothing))
            shifts.append((begin % WORD).expand_as(source))
            first += words
        low, high = (torch.cat(each, dim=1).to(device, torch.int32) for each in (lows, highs))
        return cls(low, high, torch.cat(shifts, dim=1).to(device, torch.int8))

    def cut(self, words: Tensor) -> Tensor:
        """Int64 [W] to [ranks, words]; what is beyond the last bit of a run is undefined."""
        extended = torch.nn.functional.pad(words, (0, 1))
        # Two shifts, as one by 64 is undefined; >> extends the sign.
        rest = WORD - 1 - self.shift
        low = extended[self.low] >> self.shift
        return (low & ~(torch.full_like(low, -2) << rest)) | (extended[self.high] << 1 << rest)


class _Unit:
    """The parameters that one FSDPModule reduces together."""

    def __init__(self, module: FSDPModule, label: str, group: Any, names: Mapping[Tensor, str]) -> None:
        self.module, self.label, self.group = module, label, group
        self.parts: list[_Part] = []
        for each in group.fsdp_params:
            param = each.sharded_param
            _check_sharding(names[param], param)
            ranks = param.device_mesh.size()
            run = -(-param.shape[0] // ranks) * math.prod(param.shape[1:])
            self.parts.append(_Part(names[param], param, param.numel(), run))
        self.reached: set[int] = set()
        self.routes: dict[tuple[str, ...], _Routes] = {}
        self.sums: dict[tuple[str, ...], tuple[list[int], Tensor]] = {}
        """Of the hybrid's calibration, with the step counts of the vote that they are from."""

    def watch(self) -> None:
        """Note which parameters backward reaches; FSDP creates what it differentiates when it first gathers it."""
        self.module.unshard()
        for i, each in enumerate(self.group.fsdp_params):
            full = each.unsharded_param
            if full.is_floating_point():
                wanted = full.requires_grad
                full.requires_grad_(True)  # which frozen parameters get later, perhaps
                full.register_post_accumulate_grad_hook(lambda _, i=i: self.reached.add(i))
                full.requires_grad_(wanted)
        self.module.reshard()

    def take(self, elements: int) -> list[_Reduced]:
        """What is in a reduction of so many elements per rank, in FSDP's order."""
        unused_too = getattr(self.group, "reduce_scatter_unused_params", False)
        out, column = [], 0
        for i, part in enumerate(self.parts):
            if i in self.reached or (unused_too and part.param.requires_grad):
                out.append(_Reduced(part, column, i in self.reached))
                column += part.run
        self.reached.clear()
        if column != elements:
            raise RuntimeError(
                f"FSDP reduces {elements} elements per rank for {self.label}, whose parameters with a gradient have "
                f"{column}: leave .grad of unsharded parameters to backward"
            )
        return out


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
        optimizer: SignSGD,
        *,
        ties: str = "random",
        error_feedback: bool = False,
        nonfinite: str | None = None,
        dither_workers: str = "independent",
        grad_scaler: GradScaler | None = None,
        replicate_group: dist.ProcessGroup | None = None,
    ) -> None:
        nonfinite = check_options(ties, nonfinite, scaled=grad_scaler is not None)
        if error_feedback and replicate_group is not None:
            raise ValueError(
                "Invalid error_feedback: True with replicate_group, where no rank has what a worker's sign leaves out"
            )
        self._units = _units(model)
        self._parts = {part.name: part for unit in self._units for part in unit.parts}
        self.names: Mapping[Tensor, str] = {part.param: name for name, part in self._parts.items()}
        _check_optimizer(optimizer, self.names)
        first = self._units[0].parts[0].param
        self.device = first.device
        mesh_group = first.device_mesh.get_group()
        _check_groups(self._units, mesh_group, replicate_group)
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
        self.worker.state = {self._key(self._parts[name]): kept for name, kept in self.worker.state.items()}
        self.optimizer, self.ties, self.nonfinite, self.grad_scaler = optimizer, ties, nonfinite, grad_scaler
        self._hybrid = isinstance(optimizer, HybridSignSGD)
        self._backward = -1
        for unit in self._units:
            self._attach(unit)

    def _attach(self, unit: _Unit) -> None:
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
        for param in self.names:
            state = optimizer.state.get(param, {})
            if "exp_avg_scale" in state:
                raise ValueError(
                    "the optimizer has taken steps with 8-bit momentum, which cannot be handed to a vote: make "
                    "FSDPMajorityVote before the first step"
                )
            for key, x in state.items():
                if isinstance(x, DTensor):
                    state[key] = x.full_tensor() if self._among_shards or x.ndim == 0 else x.to_local()

    def _extent(self, part: _Part) -> tuple[int, int]:
        """First element and number of elements of what this rank's worker has of a parameter."""
        return (0, part.size) if self._among_shards else (part.begin(self._shard), part.count(self._shard))

    def _key(self, part: _Part) -> str:
        """Of a parameter in the worker's state."""
        begin, _ = self._extent(part)
        return f"{part.name}@{begin}" if begin else part.name

    def _reduce_whole(self, unit: _Unit, whole: Tensor, shard: Tensor) -> None:
        """Every rank of the shard group is a worker: from its whole gradients to a shard of the result."""
        table = whole.view(self._shards, -1)
        voting, averaged = self._divide(unit, shard)
        if voting:
            entries = self._whole_gradients(table, voting)
            finite = bool(whole.dot(whole).isfinite())
            flags = [self._flag(r, e.flat, finite) for r, e in zip(voting, entries, strict=True)]
            ballot = self._cast(entries, [0] * len(entries), flags)
            if self._hybrid:
                self._elect_whole(unit, voting, entries, ballot, shard)
            else:
                self._elect_shard(unit, voting, entries, ballot, shard)
        if averaged:
            self._hand_over([r.part for r in averaged])
            runs = [table[:, r.column : r.column + r.part.run] for r in averaged]
            mean = self._mean_of_runs(table if not voting else torch.cat(runs, dim=1))
            for r, run in zip(averaged, torch.split(mean, [r.part.run for r in averaged]), strict=True):
                shard[r.column : r.column + r.part.run] = run

    def _average_shards(self, whole: Tensor, shard: Tensor) -> None:
        shard.copy_(self._mean_of_runs(whole.view(self._shards, -1)))

    def _mean_of_runs(self, table: Tensor) -> Tensor:
        """Of [ranks, n] on every rank, this rank's row of the mean."""
        mean = table / self._shards
        out = torch.empty_like(mean[0])
        reduce_scatter(out, mean.view(-1), group=self._shard_group)
        return out

    def _reduce_shard(self, unit: _Unit, shard: Tensor) -> None:
        """Every replica is a worker, and this is a shard of its gradient; with one shard, all of it."""
        with torch.no_grad():
            voting, averaged = self._divide(unit, shard)
            if voting:
                self._elect_replicas(unit, voting, shard)
            if not averaged:
                return
            self._hand_over([r.part for r in averaged])
            mean = torch.cat([shard[r.column : r.column + r.part.run] for r in averaged])
            self._mean_of_replicas(mean)
            for r, run in zip(averaged, torch.split(mean, [r.part.run for r in averaged]), strict=True):
                shard[r.column : r.column + r.part.run] = run

    def _mean_of_replicas(self, x: Tensor) -> None:
        x /= self.world_size
        if self.world_size > 1:
            dist.all_reduce(x, group=self.group)

    def _divide(self, unit: _Unit, shard: Tensor) -> tuple[list[_Reduced], list[_Reduced]]:
        """Those that vote, and those that are averaged."""
        worker = self.worker
        for index, (group, last) in enumerate(zip(self.optimizer.param_groups, worker.steps, strict=True)):
            taken = int(group["step"])
            if not last <= taken <= last + 1 and group.get("phase", "sign") == "sign":
                raise RuntimeError(
                    f"param_group {index} has taken {taken} steps and the last vote was before step {last}: load "
                    "vote.state_dict() together with the optimizer's, after FSDPMajorityVote was made"
                )
            worker.steps[index] = taken
        voting: list[_Reduced] = []
        averaged: list[_Reduced] = []
        for reduced in unit.take(shard.numel()):
            (voting if worker.votes(reduced.part.name) else averaged).append(reduced)
        self._warn_of_second_backward(voting)
        task = torch._C._current_graph_task_id()
        if self._hybrid and voting and task != self._backward:
            self._backward = task
            Variable._execution_engine.queue_callback(self._share_sums)
        return voting, averaged

    def _warn_of_second_backward(self, voting: Sequence[_Reduced]) -> None:
        kept = next((g for r in voting if (g := r.part.param.grad) is not None and r.part.count(self._shard) > 0), None)
        if isinstance(kept, DTensor) and bool(kept.to_local().any()):
            warnings.warn(
                "FSDPMajorityVote: backward again without zero_grad(): votes add up; call zero_grad() after step(), "
                "and accumulate gradients with set_requires_gradient_sync(False)",
                stacklevel=2,
            )

    def _gradient(self, part: _Part, x: Tensor) -> Tensor:
        """As a worker takes it: in no fewer bits than the parameter has, and unscaled."""
        x = x.to(torch.promote_types(x.dtype, part.param.dtype))
        return x if self.grad_scaler is None else x * (1.0 / self.grad_scaler.get_scale())

    def _whole_gradients(self, table: Tensor, voting: Sequence[_Reduced]) -> list[Entry]:
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
        entries = []
        for part, column, present in voting:
            flat = self._gradient(part, part.whole(table, column))
            weight = weights[part.name].to(flat.dtype) if part.name in weights else flat
            entries.append(Entry(part.name, weight, flat, present))
        return entries

    def _decays(self, part: _Part) -> bool:
        group = self.optimizer.param_groups[self.worker.groups[part.name]]
        return group["weight_decay"] != 0 and not group["decoupled_weight_decay"]

    def _flag(self, reduced: _Reduced, flat: Tensor, finite: bool) -> int:
        if not finite and not flat.isfinite().all():
            return NOT_FINITE
        return PRESENT if reduced.present else ABSENT

    def _cast(self, entries: Sequence[Entry], starts: Sequence[int], flags: list[int]) -> Ballot:
        gradients = [Gradient(e.name, e.param, e.flat, start) for e, start in zip(entries, starts, strict=True)]
        return cast(self.worker, gradients, flags)

    def _coins(self, entries: Sequence[Entry]) -> tuple[list[int], list[int]]:
        """For each, the seed and the step of what decides ties."""
        indices = [self.worker.groups[e.name] for e in entries]
        return [self.optimizer.param_groups[i]["seed"] for i in indices], [self.worker.steps[i] for i in indices]

    def _elect_shard(
        self, unit: _Unit, voting: Sequence[_Reduced], entries: Sequence[Entry], ballot: Ballot, shard: Tensor
    ) -> None:
        """The bits of each shard go to its owner, with every flag, and the result stays there."""
        key = tuple(e.name for e in entries)
        if key not in unit.routes:
            unit.routes[key] = _Routes.of([r.part for r in voting], self._shards, self.device)
        ballots = unit.routes[key].cut(ballot.words)
        width = ballots.shape[1]
        header = torch.zeros(-(-len(entries) // 8) * 8, dtype=torch.uint8)
        header[: len(entries)] = torch.tensor(ballot.flags, dtype=torch.uint8)
        packed = header.view(torch.int64).to(self.device).expand(self._shards, -1)
        outgoing = torch.cat([ballots, packed], dim=1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        flags = incoming[:, width:].cpu().contiguous().view(torch.uint8)[:, : len(entries)]
        unusable = self._refuse_nonfinite(flags, entries)

        voters = (flags == PRESENT).sum(dim=0).tolist()
        slots, outs, first = [], [], 0
        for r in voting:
            size = r.part.count(self._shard)
            ordinal = self.worker.ordinals[r.part.name]
            slots.append(Slot(first, Segment(ordinal, r.part.begin(self._shard), size)))
            outs.append(shard[r.column : r.column + size])
            first += word_count(r.part.run)
        keep_ties = self.ties == "abstain"
        seeds, steps = self._coins(entries)
        result = tally(incoming[:, :width], voters, slots, seeds=seeds, steps=steps, keep_ties=keep_ties)
        bits.spread(result[0], result[1] if keep_ties else None, slots, outs)
        for out, number in zip(outs, voters, strict=True):
            if unusable or number == 0:
                out.fill_(torch.nan if unusable else 0.0)

    def _elect_whole(
        self, unit: _Unit, voting: Sequence[_Reduced], entries: Sequence[Entry], ballot: Ballot, shard: Tensor
    ) -> None:
        """As under DDP, for who wants to know the result beyond the own shard."""
        self._hold(unit, entries, ballot)
        for r, e in zip(voting, entries, strict=True):
            begin, size = r.part.begin(self._shard), r.part.count(self._shard)
            shard[r.column : r.column + size] = e.flat[begin : begin + size]

    def _elect_replicas(self, unit: _Unit, voting: Sequence[_Reduced], shard: Tensor) -> None:
        pieces = [shard[r.column : r.column + r.part.count(self._shard)] for r in voting]
        entries = []
        for r, piece in zip(voting, pieces, strict=True):
            flat = self._gradient(r.part, piece)
            weight = r.part.param.to_local().reshape(-1).to(flat.dtype) if self._decays(r.part) else flat
            entries.append(Entry(r.part.name, weight, flat, r.present))
        finite = bool(shard.dot(shard).isfinite())
        flags = [self._flag(r, e.flat, finite) for r, e in zip(voting, entries, strict=True)]
        if self._shards > 1:  # a worker has one opinion, that of its least finite shard
            agreed = torch.tensor(flags, dtype=torch.uint8, device=self.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._shard_group)
            flags = agreed.tolist()
        ballot = self._cast(entries, [r.part.begin(self._shard) for r in voting], flags)
        self._share_mean_squares(voting)
        self._hold(unit, entries, ballot)
        for piece, e in zip(pieces, entries, strict=True):
            piece.copy_(e.flat)

    def _share_mean_squares(self, voting: Sequence[_Reduced]) -> None:
        """Relative dither goes by the rms of the whole momentum, of which every rank has had a shard."""
        worker = self.worker

        def is_relative(part: _Part) -> bool:
            group = self.optimizer.param_groups[worker.groups[part.name]]
            return bool(group["dither"] > 0 and group["dither_scale"] == "relative")

        relative = [r.part for r in voting if is_relative(r.part)]
        if self._shards == 1 or not relative:
            return
        squares = torch.zeros(len(relative), device=self.device)
        states = []
        for i, part in enumerate(relative):
            states.append(worker.state.get(self._key(part), {}))
            if "mean_square" in states[i]:
                squares[i] = states[i]["mean_square"] * (part.count(self._shard) / part.size)
        dist.all_reduce(squares, group=self._shard_group)
        for state, square in zip(states, squares, strict=True):
            if "mean_square" in state:
                state["mean_square"].copy_(square)

    def _hold(self, unit: _Unit, entries: Sequence[Entry], ballot: Ballot) -> None:
        """A vote whose result is written over the entries' gradients."""
        seeds, steps = self._coins(entries)
        keep_ties = self.ties == "abstain"
        election = hold(*ballot, group=self.group, seeds=seeds, steps=steps, keep_ties=keep_ties)
        unusable = self._refuse_nonfinite(election.flags, entries)
        _, sums = accept(self.worker, entries, ballot, election)
        unit.sums[tuple(e.name for e in entries)] = (list(self.worker.steps), sums)
        if unusable:
            for e in entries:
                e.flat.fill_(torch.nan)

    def _refuse_nonfinite(self, flags: Tensor, entries: Sequence[Entry]) -> bool:
        """Do what `nonfinite` says, on all ranks alike; whether these gradients are to become NaN."""
        found = nonfinite_found(flags, entries) if self.nonfinite != "abstain" else None
        if found is not None and self.nonfinite == "raise":
            raise CollectiveError(found)
        return found is not None

    def _share_sums(self) -> None:
        """After a backward: the sums of the hybrid's calibration, over what has been voted on for this step."""
        steps = [int(group["step"]) for group in self.optimizer.param_groups]
        total = torch.zeros(len(steps), 2, dtype=torch.float64, device=self.device)
        for unit in self._units:
            for then, sums in unit.sums.values():
                if then == steps:
                    total += sums
        self._mean_of_replicas(total)
        if not self._among_shards and self._shards > 1:
            dist.all_reduce(total, group=self._shard_group)
        assert isinstance(self.optimizer, HybridSignSGD)
        self.optimizer.receive_voted_sums(total.unbind())

    def _hand_over(self, parts: Sequence[_Part]) -> None:
        """After the switch: SGD's momentum starts from the mean of the workers', and theirs is freed."""
        optimizer, worker = self.optimizer, self.worker
        for part in parts:
            if part.name not in worker.groups:
                continue
            state = worker.state.pop(self._key(part), {})
            group = optimizer.param_groups[worker.groups[part.name]]
            if group["sgd_momentum"] == 0 or part.param in optimizer.state:
                continue
            mean = torch.zeros(self._extent(part)[1], device=self.device)
            if "exp_avg" in state:
                mean.copy_(state["exp_avg"])
            if self._among_shards:
                mean = self._mean_of_runs(part.rows(mean, self._shards))[: part.count(self._shard)]
            else:
                self._mean_of_replicas(mean)
            kept = buffers.new_momentum(part.param, group["state_dtype"])
            local = kept["exp_avg"]
            assert isinstance(local, DTensor)
            local.to_local().view(-1).copy_(mean)
            optimizer.state[part.param] = kept

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


def _units(model: torch.nn.Module) -> list[_Unit]:
    """What the model reduces together, each once: fully_shard may take several modules at a time."""
    if not isinstance(model, FSDPModule):
        raise TypeError(
            f"FSDPMajorityVote: expected a model under fully_shard, got {type(model).__name__}; apply fully_shard to "
            "its parts and to itself first, or wrap it in DistributedDataParallel and take MajorityVote"
        )
    if not hasattr(model, "set_custom_reduce_scatter"):
        raise RuntimeError(
            f"torch {torch.__version__} has no FSDPModule.set_custom_reduce_scatter, by which FSDPMajorityVote counts "
            "votes: upgrade torch, or take MajorityVote with DistributedDataParallel"
        )
    modules = [(label, module) for label, module in model.named_modules() if isinstance(module, FSDPModule)]
    for _, module in modules:
        module.reshard()  # which a forward may have left undone
    # A compiled module puts its own prefix before every name.
    names: dict[Tensor, str] = {p: name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
    seen, units = set(), []
    for label, module in modules:
        groups = _param_groups(module)
        if len(groups) > 1:
            raise ValueError(
                f"the parameters of {label or 'the root'} are sharded over several meshes, for which torch takes no "
                "custom reduce-scatter: apply fully_shard to the parts of each mesh"
            )
        if groups and id(groups[0]) not in seen:
            seen.add(id(groups[0]))
            units.append(_Unit(module, label or "the root", groups[0], names))
    if not units:
        raise ValueError("FSDPMajorityVote: the model has no parameters")
    return units


def _param_groups(module: FSDPModule) -> Sequence[Any]:
    """FSDP's own lists of parameters; a torch that does not know of several meshes has but one for each module."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        groups: Sequence[Any] = state._fsdp_param_groups
        return groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _check_sharding(name: str, param: DTensor) -> None:
    if param.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: materialise the model before FSDPMajorityVote is made")
    placements = tuple(param.placements)
    if placements == (Shard(0),):
        return
    if placements == (Replicate(), Shard(0)):
        raise ValueError(
            f"{name} is sharded over a 2-D mesh, where torch averages over replicas before a vote can be held: apply "
            "fully_shard over the mesh's second dimension, and pass the group of its first as replicate_group"
        )
    raise ValueError(f"{name} is sharded as {placements}, FSDPMajorityVote needs (Shard(dim=0),), on a 1-D mesh")


def _check_optimizer(optimizer: SignSGD, names: Mapping[Tensor, str]) -> None:
    for group in optimizer.param_groups:
        if any(p not in names for p in group["params"]):
            raise ValueError(
                "the optimizer has parameters that fully_shard does not manage in this model: make it after "
                "fully_shard, which replaces parameters, and without its ignored_params"
            )
        if group.get("state_dtype") == torch.int8 and group.get("sgd_momentum", 0) > 0:
            raise ValueError("Invalid state_dtype: torch.int8 with sgd_momentum > 0 on sharded parameters")


def _check_groups(
    units: Sequence[_Unit], mesh_group: dist.ProcessGroup, replicate_group: dist.ProcessGroup | None
) -> None:
    ranks = dist.get_process_group_ranks(mesh_group)
    for unit in units:
        for part in unit.parts:
            others = dist.get_process_group_ranks(part.param.device_mesh.get_group())
            if others != ranks:
                raise ValueError(
                    f"{part.name} is sharded over ranks {others}, others over {ranks}: FSDPMajorityVote takes one mesh"
                )
        if unit.group.device.type != unit.parts[0].param.device.type:
            raise ValueError("FSDPMajorityVote does not work with CPUOffloadPolicy: leave parameters on their device")
    if replicate_group is not None:
        shared = sorted(set(dist.get_process_group_ranks(replicate_group)) & set(ranks))
        if shared != [dist.get_rank()]:
            raise ValueError(
                f"replicate_group shares ranks {shared} with those that hold the shards, expected this rank alone: "
                "pass the ranks that hold the same shard"
            )

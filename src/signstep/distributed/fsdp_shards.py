"""How FSDP2 cuts parameters up and what it reduces together: units, parts, shards, and the bits that go to each owner.

What is voted on, and when, is in fsdp.py. torch keeps much of what is read here private.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from signstep.kernels.bits import WORD, word_count
from signstep.optim.options import STATE_DTYPES
from signstep.optim.signsgd import SignSGD

__all__ = ["Part", "Reduced", "Routes", "Unit", "check_groups", "check_optimizer", "find_units"]


class Part(NamedTuple):
    """One parameter. FSDP cuts it into runs of consecutive elements, one per rank, padded to the same length."""

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
        """Number of elements in a rank's shard; 0 for some ranks if there are fewer rows than ranks."""
        return self.begin(rank + 1) - self.begin(rank)

    def whole(self, table: Tensor, column: int) -> Tensor:
        """All elements, 1-D, from a table of one row per rank, in which the runs begin at a column."""
        return table[:, column : column + self.run].reshape(-1)[: self.size]

    def rows(self, whole: Tensor, ranks: int) -> Tensor:
        """The inverse of `whole`: [ranks, run], padded with zeros."""
        padded = torch.nn.functional.pad(whole, (0, ranks * self.run - self.size))
        return padded.view(ranks, self.run)


class Reduced(NamedTuple):
    """A parameter in one reduction."""

    part: Part
    column: int
    """Where its run begins in what a rank gets."""
    present: bool
    """Whether this rank's backward has reached the parameter since the last reduction. If not, its gradient is 0."""


class Routes(NamedTuple):
    """How the bits of whole parameters become words for each rank: int32, int32 and int8 [ranks, words]."""

    low: Tensor
    """Index of the word that has the lowest bit."""
    high: Tensor
    """Index of the word after it. Beyond the parameter's end both are the index of a zero word."""
    shift: Tensor
    """Position of the lowest bit."""

    @classmethod
    def of(cls, parts: Sequence[Part], ranks: int, device: torch.device) -> Routes:
        """The routes of parameters whose bits lie side by side, each beginning at a word."""
        lows, highs, shifts = [], [], []
        nothing = sum(word_count(part.size) for part in parts)
        first = 0
        for part in parts:
            begin = torch.arange(ranks, device="cpu")[:, None] * part.run
            source = begin // WORD + torch.arange(word_count(part.run), device="cpu")
            words = word_count(part.size)
            lows.append(torch.where(source < words, first + source, nothing))
            highs.append(torch.where(source + 1 < words, first + source + 1, nothing))
            shifts.append((begin % WORD).expand_as(source))
            first += words
        low, high = (torch.cat(each, dim=1).to(device, torch.int32) for each in (lows, highs))
        return cls(low, high, torch.cat(shifts, dim=1).to(device, torch.int8))

    def cut(self, words: Tensor) -> Tensor:
        """Int64 [W] to [ranks, words]; bits beyond the end of a run are undefined."""
        extended = torch.nn.functional.pad(words, (0, 1))
        # Two shifts, as one by 64 is undefined; >> extends the sign.
        rest = WORD - 1 - self.shift
        low = extended[self.low] >> self.shift
        return (low & ~(torch.full_like(low, -2) << rest)) | (extended[self.high] << 1 << rest)


class Unit:
    """The parameters that one FSDPModule reduces together."""

    def __init__(self, module: FSDPModule, label: str, group: Any, names: Mapping[Tensor, str]) -> None:
        self.module, self.label, self.group = module, label, group
        self.parts: list[Part] = []
        for each in group.fsdp_params:
            param = each.sharded_param
            _check_sharding(names[param], param)
            ranks = param.device_mesh.size()
            run = -(-param.shape[0] // ranks) * math.prod(param.shape[1:])
            self.parts.append(Part(names[param], param, param.numel(), run))
        self.reached: set[int] = set()
        self.routes: dict[tuple[str, ...], Routes] = {}
        self.sums: dict[tuple[str, ...], tuple[list[int], Tensor]] = {}
        """Sums for the calibration by the names of the parameters, with the step counts at which they were voted on."""

    def watch(self) -> None:
        """Note which parameters backward reaches. FSDP makes the tensors to differentiate at its first gather."""
        self.module.unshard()
        for i, each in enumerate(self.group.fsdp_params):
            full = each.unsharded_param
            if full.is_floating_point():
                wanted = full.requires_grad
                full.requires_grad_(True)  # which frozen parameters get later, perhaps
                full.register_post_accumulate_grad_hook(lambda _, i=i: self.reached.add(i))
                full.requires_grad_(wanted)
        self.module.reshard()

    def take(self, elements: int) -> list[Reduced]:
        """The parameters in a reduction of this many elements per rank, in FSDP's order."""
        unused_too = getattr(self.group, "reduce_scatter_unused_params", False)
        out, column = [], 0
        for i, part in enumerate(self.parts):
            if i in self.reached or (unused_too and part.param.requires_grad):
                out.append(Reduced(part, column, i in self.reached))
                column += part.run
        self.reached.clear()
        if column != elements:
            raise RuntimeError(
                f"FSDP reduces {elements} elements per rank for {self.label}, whose parameters with a gradient have "
                f"{column}: leave .grad of unsharded parameters to backward"
            )
        return out


def find_units(model: torch.nn.Module) -> list[Unit]:
    """The units of a model, each once: fully_shard may take several modules at a time."""
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
            units.append(Unit(module, label or "the root", groups[0], names))
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


def check_optimizer(optimizer: SignSGD, names: Mapping[Tensor, str]) -> None:
    for group in optimizer.param_groups:
        if any(p not in names for p in group["params"]):
            raise ValueError(
                "the optimizer has parameters that fully_shard does not manage in this model: make it after "
                "fully_shard, which replaces parameters, and without its ignored_params"
            )
        if STATE_DTYPES[group["state_dtype"]] == torch.int8 and group.get("sgd_momentum", 0) > 0:
            raise ValueError("Invalid state_dtype: torch.int8 with sgd_momentum > 0 on sharded parameters")


def check_groups(
    units: Sequence[Unit], mesh_group: dist.ProcessGroup, replicate_group: dist.ProcessGroup | None
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

"""Parameters that are cut up over ranks, as by torch's `fully_shard`: what an engine is given of them, and their state.

An engine sees this rank's shard as a tensor like any other, with the index of its first element in the whole parameter,
which the noise goes by. What a step measures of a whole parameter or group is added up over the ranks after it.
torch.distributed.tensor is imported by whoever makes such parameters; here only where there are some.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from signstep.kernels import momentum
from signstep.kernels.engine import Tensors, real, select
from signstep.kernels.momentum import BLOCK, read_momentum
from signstep.kernels.reference import wide_dtype

__all__ = [
    "ALL",
    "WHOLE",
    "Measurement",
    "Shards",
    "add_up",
    "check_sharding",
    "is_sharded",
    "mean_square",
    "new_momentum",
    "shards_of",
]

_NOT_DIFFERENTIABLE = "Invalid differentiable: True with sharded parameters (DTensor); pass differentiable=False"


class _Place(NamedTuple):
    """Which shard of a parameter this rank has, and who has the others."""

    rank: int
    ranks: int
    group: Any
    """The process group of these ranks; None if this rank has all of the parameter."""
    device_type: str
    """Where that group can send tensors from."""

    def rows(self, shape: Sequence[int], rank: int) -> int:
        """Index of the first row of a rank's shard. torch cuts as torch.chunk does."""
        return min(-(-shape[0] // self.ranks) * rank, shape[0]) if shape else 0


WHOLE = _Place(0, 1, None, "")

ALL = slice(None)
"""All rows of what is measured of a param_group."""


class Shards(NamedTuple):
    """Parameters of one param_group that are cut up over the same ranks, or not at all."""

    tensors: Tensors
    """This rank's shards, as an engine takes them."""
    sizes: list[int]
    """Elements of the whole parameters."""
    place: _Place

    def rows(self, ordinals: Sequence[int]) -> Sequence[int] | slice:
        """Where these parameters are among those of their param_group, which have these ordinals."""
        own = self.tensors.ordinals
        return ALL if len(own) == len(ordinals) else [ordinals.index(each) for each in own]


class Measurement(NamedTuple):
    """What a step has measured of some parameters of a param_group."""

    part: Shards
    sums: Tensor | None = None
    """A row for each of them."""
    total: Tensor | None = None
    """A row for each parameter of the param_group."""
    rows: Sequence[int] | slice = ALL
    """Which of these are theirs."""


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which a rank may have a part."""
    return hasattr(type(p), "to_local")


def check_sharding(params: Sequence[Tensor], *, differentiable: bool) -> list[Tensor]:
    """Give this rank's shards of the parameters, a whole one as it is.

    Raises:
        RuntimeError: autograd is to follow a step of sharded parameters.
        ValueError: a parameter is not cut as `fully_shard` cuts it, see `shards_of`.
    """
    if differentiable and any(map(is_sharded, params)):
        raise RuntimeError(_NOT_DIFFERENTIABLE)
    with torch.no_grad():
        return [_cut(p)[1] for p in params]


def shards_of(tensors: Tensors) -> list[Shards]:
    """What this rank has of parameters, together what is cut up over the same ranks.

    Args:
        tensors: parameters, gradients and state; what is sharded is a DTensor, but for 0-dim mean squares.

    Raises:
        ValueError: a parameter is sharded other than along its first dimension, over one dimension of its mesh.
        RuntimeError: a gradient or a state is not sharded as its parameter is, or autograd follows the step.
    """
    if not any(map(is_sharded, tensors.params)):
        return [Shards(tensors, [p.numel() for p in tensors.params], WHOLE)]
    if torch.is_grad_enabled():
        raise RuntimeError(_NOT_DIFFERENTIABLE)
    params, grads, exp_avgs, scales, offsets = [], [], [], [], []
    members: dict[Any, tuple[_Place, list[int]]] = {}
    for i, p in enumerate(tensors.params):
        place, shard = _cut(p)
        members.setdefault(place.group, (place, []))[1].append(i)
        params.append(shard)
        grads.append(_like(p, shard, tensors.grads[i], "gradient"))
        if tensors.exp_avgs:
            exp_avgs.append(_like(p, shard, tensors.exp_avgs[i], "exp_avg"))
        if tensors.scales:
            scales.append(_own_scales(p, place, exp_avgs[-1].numel(), tensors.scales[i]))
        offsets.append(tensors.offsets[i] + place.rows(p.shape, place.rank) * math.prod(p.shape[1:]))
    own = tensors._replace(params=params, grads=grads, exp_avgs=exp_avgs, scales=scales, offsets=offsets)
    sizes = [p.numel() for p in tensors.params]
    if len(members) == 1:
        return [Shards(own, sizes, place) for place, _ in members.values()]
    return [Shards(select(own, indices), [sizes[i] for i in indices], place) for place, indices in members.values()]


def add_up(measured: Sequence[Measurement]) -> None:
    """Make what a step has measured of shards that of whole parameters, in place and the same on all ranks, and write
    the sums to their rows of the totals.

    That is the sums, if they are given, and the mean squares of relative dither. It takes one all-reduce for each group
    of ranks, in float64, so that its order hardly ever shows after rounding.
    """
    groups: dict[Any, list[tuple[Shards, Tensor | None]]] = {}
    for shards, sums, *_ in measured:
        if shards.place.group is not None and (sums is not None or shards.tensors.mean_squares):
            groups.setdefault(shards.place.group, []).append((shards, sums))
    for group, entries in groups.items():
        kept: list[Tensor] = []
        parts: list[Tensor] = []
        for shards, sums in entries:
            if sums is not None:
                kept.append(sums)
                parts.append(sums)
            squares = shards.tensors.mean_squares
            if squares:
                kept += squares
                shares = [p.numel() / max(1, n) for p, n in zip(shards.tensors.params, shards.sizes, strict=True)]
                parts += torch._foreach_mul(squares, shares)
        device = torch.device(entries[0][0].place.device_type)
        total = torch.cat([x.to(device, wide_dtype(device)).reshape(-1) for x in parts])
        dist.all_reduce(total, group=group)
        for x, whole in zip(kept, torch.split(total, [x.numel() for x in kept]), strict=True):
            x.copy_(whole.view(x.shape))
    for _, sums, all_sums, rows in measured:
        if sums is not None and all_sums is not None and rows != ALL:
            all_sums[rows] = sums


def new_momentum(p: Tensor, state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Momentum of zeros, sharded as the parameter is, see `signstep.kernels.momentum.new_momentum`.

    The blocks of 8-bit momentum lie within the shards. ``exp_avg_scale`` has a row for each shard, as long as the first
    shard's, which is the longest; a rank has one.
    """
    state = momentum.new_momentum(p, state_dtype)
    if "exp_avg_scale" in state and is_sharded(p):
        from torch.distributed.tensor import DTensor

        sharded: Any = p
        place, _ = _cut(p)
        row = torch.zeros(1, _most_scales(p, place), dtype=torch.float32, device=p.device)
        state["exp_avg_scale"] = DTensor.from_local(row, sharded.device_mesh, sharded.placements, run_check=False)
    return state


def mean_square(p: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Mean square of the whole momentum that is kept of a parameter, 0-dim float32; 0 if none is."""
    square = torch.zeros((), dtype=torch.float32, device=p.device)
    if "exp_avg" not in state:
        return square
    scales = [state["exp_avg_scale"]] if "exp_avg_scale" in state else []
    (shards,) = shards_of(Tensors([p], [p], [state["exp_avg"]], scales, [square], [0], [0]))
    square.copy_(momentum.mean_square(real(read_momentum(*shards.tensors.exp_avgs, *shards.tensors.scales))))
    add_up([Measurement(shards)])
    return square


def _cut(p: Any) -> tuple[_Place, Tensor]:
    """The place of a parameter on this rank, and its shard there."""
    if not is_sharded(p):
        return WHOLE, p
    from torch.distributed.tensor import Replicate, Shard

    mesh, shard = p.device_mesh, p.to_local()
    dims = [i for i, placement in enumerate(p.placements) if type(placement) is not Replicate]
    place = WHOLE
    if dims:
        ranks = mesh.size(dims[0])
        group = mesh.get_group(dims[0]) if ranks > 1 else None
        place = _Place(mesh.get_local_rank(dims[0]), ranks, group, mesh.device_type)
    rows = place.rows(p.shape, place.rank + 1) - place.rows(p.shape, place.rank)
    if (
        len(dims) > 1
        or any(type(p.placements[i]) is not Shard or p.placements[i].dim != 0 for i in dims)
        or shard.shape[:1] != ((rows,) if p.ndim else ())
    ):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is sharded as {tuple(p.placements)} over a mesh of shape "
            f"{tuple(mesh.shape)}: signstep steps what fully_shard cuts up along dimension 0, in equal runs over one "
            "dimension of the mesh; give this parameter to another optimizer"
        )
    return place, shard


def _like(p: Tensor, shard: Tensor, x: Any, name: str) -> Tensor:
    """The part on this rank of what must be sharded as its parameter is."""
    own: Tensor = x.to_local() if is_sharded(x) else x
    if getattr(x, "placements", None) != getattr(p, "placements", None) or own.shape[: shard.ndim] != shard.shape:
        raise RuntimeError(
            f"the {name} of a parameter of shape {tuple(p.shape)}, sharded as {getattr(p, 'placements', 'none')}, has "
            f"{tuple(own.shape)} on this rank, sharded as {getattr(x, 'placements', 'none')}: reduce gradients as "
            "fully_shard does, and load a state with torch.distributed.checkpoint"
        )
    return own


def _own_scales(p: Tensor, place: _Place, count: int, scale: Any) -> Tensor:
    """The scales on this rank of 8-bit momentum of so many elements."""
    if not is_sharded(p):
        return scale  # type: ignore[no-any-return]
    row = scale.to_local() if is_sharded(scale) else scale
    if row.shape != (1, _most_scales(p, place)):
        raise RuntimeError(
            f"the 8-bit momentum of a parameter of shape {tuple(p.shape)} has scales of shape {tuple(scale.shape)}, "
            f"not those of {place.ranks} shards: load it on as many ranks as it was saved on, as its blocks of {BLOCK} "
            "elements lie within the shards"
        )
    return row[0, : -(-count // BLOCK)]  # type: ignore[no-any-return]


def _most_scales(p: Tensor, place: _Place) -> int:
    """Number of scales of the first shard."""
    return -(-place.rows(p.shape, 1) * math.prod(p.shape[1:]) // BLOCK) if p.ndim else 1

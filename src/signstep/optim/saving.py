"""What is saved and loaded of an optimizer, beside what torch does: names that no phase changes, and old options."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from signstep.kernels.momentum import is_freed
from signstep.optim.calibration import HYBRID_PROGRESS
from signstep.optim.options import HYBRID_OPTIONS, STATE_DTYPES
from signstep.optim.shards import new_momentum

__all__ = ["changes_nothing", "completed_group", "fill_freed"]


def changes_nothing(group: Mapping[str, Any], grads: Sequence[Tensor]) -> bool:
    """True for a step with lr 0 and zero gradients, which is not counted while the optimizer has no state.

    torch.distributed.checkpoint takes such a step, to make state, whenever it finds an optimizer without any.
    """
    lr = group["lr"]
    on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
    if group["capturable"] or not on_host or lr != 0:
        return False
    return not any(g.is_meta or _of_all_ranks(g.any()) for g in grads)


def _of_all_ranks(x: Tensor) -> Tensor:
    """A number that a sharded tensor was reduced to, over all shards."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


def fill_freed(state: dict[int, dict[str, Any]], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Replace momenta without memory by zeros that can be written to, as checkpoints are loaded into them.

    Args:
        state: of a state_dict, by number of the parameter; replaced where it is not the same.
        param_groups: of the optimizer.
    """
    owners = [(p, STATE_DTYPES[group["state_dtype"]]) for group in param_groups for p in group["params"]]
    for index, kept in state.items():
        # Others may keep there what they like.
        if isinstance(kept, dict) and "exp_avg" in kept and is_freed(kept["exp_avg"]):
            state[index] = kept | new_momentum(*owners[index])


def completed_group(
    saved: Mapping[str, Any], own: Mapping[str, Any], options: Collection[str], progress: Collection[str], owner: str
) -> dict[str, Any]:
    """A saved param_group with what it lacks of our own, but for how far that has come.

    Args:
        saved: of SignSGD, HybridSignSGD or Lion.
        own: of the optimizer that loads.
        options: that it has.
        progress: keys of its param_groups that say how far they have come.
        owner: its name.

    Raises:
        ValueError: the group of another optimizer, or one that has switched to SGD for an optimizer that cannot.
    """
    average, owners = ("betas", "Lion") if "betas" in options else ("momentum", "SignSGD or HybridSignSGD")
    if not {average, "step"} <= saved.keys():
        names = ", ".join(sorted(saved.keys() - {"params"}))
        raise ValueError(
            f"this state is not one of {owners}: its param_group has {names}; load it into the "
            "optimizer that saved it, and start this one without a state"
        )
    if saved.get("phase") == "sgd" and "phase" not in progress:
        raise ValueError(
            f"this state was saved after its switch to SGD, and {owner} takes sign steps only; load it into "
            "HybridSignSGD"
        )
    strange = {*HYBRID_OPTIONS, *HYBRID_PROGRESS} - {*options, *progress}
    kept = {name: value for name, value in own.items() if name not in progress}
    return kept | {name: value for name, value in saved.items() if name not in strange}

"""The optimizers that a run can have: for each its class, its options, and the learning rate it has by default.

The names of `RunConfig.optimizer`, the check of its options, the presets' learning rates and the optimizer itself all
derive from `OPTIMIZERS`: a new optimizer is an entry there. What an option does is said at its field of
`RunConfig`. Nothing here imports torch, so that a command's help need not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from signstep.lab.errors import BadInput


@dataclass(frozen=True)
class KnownOptimizer:
    """What the lab knows of an optimizer."""

    place: str
    """Module and class, with a dot between them. The class takes parameters, lr, weight_decay and its options."""
    lr: float
    """The default learning rate: a point of the sweep's grid, and its centre."""
    options: tuple[str, ...] = ()
    """Fields of `RunConfig` that it has, beside lr and weight_decay; a field that is None is not passed on."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of the lab's own for options that are None."""
    signs: bool = False
    """Its steps are signs: lr is the length of each weight's step, and workers can vote."""
    seeded: bool = False
    """It draws noise, and takes the run's seed."""


_DITHER_OPTIONS = ("dither", "dither_decay", "dither_position", "dither_scale", "dither_law", "state_dtype")
_SIGN_OPTIONS = ("momentum", *_DITHER_OPTIONS)
_HYBRID_OPTIONS = ("switch", "switch_tolerance", "calibration", "calibration_scope", "ema_decay", "sgd_momentum")

OPTIMIZERS: dict[str, KnownOptimizer] = {
    "sgd": KnownOptimizer("torch.optim.SGD", 0.1, ("momentum", "nesterov"), {"momentum": 0.9}),
    "adam": KnownOptimizer("torch.optim.Adam", 1e-3),
    "adamw": KnownOptimizer("torch.optim.AdamW", 1e-3),
    "swats": KnownOptimizer("signstep.lab.training.swats.SWATS", 1e-3, ("switch_tolerance",)),
    "noisy-sgd": KnownOptimizer(
        "signstep.lab.training.gradient_noise.NoisySGD",
        0.1,
        ("momentum", "gradient_noise"),
        {"momentum": 0.9},
        seeded=True,
    ),
    "signsgd": KnownOptimizer("signstep.optim.SignSGD", 3.16e-3, _SIGN_OPTIONS, signs=True, seeded=True),
    "lion": KnownOptimizer("signstep.optim.Lion", 1e-3, ("betas", *_DITHER_OPTIONS), signs=True, seeded=True),
    "hybrid": KnownOptimizer(
        "signstep.optim.HybridSignSGD", 3.16e-3, _SIGN_OPTIONS + _HYBRID_OPTIONS, signs=True, seeded=True
    ),
    "fixed-switch": KnownOptimizer(
        "signstep.lab.training.fixed_switch.FixedRateSwitch",
        3.16e-3,
        (*_SIGN_OPTIONS, "switch", "sgd_momentum", "sgd_lr"),
        signs=True,
        seeded=True,
    ),
}


def known_optimizer(name: str) -> KnownOptimizer:
    """What the lab knows of an optimizer; of a user's own, whose name has a colon in it, that it takes lr alone."""
    if name not in OPTIMIZERS and ":" not in name:
        raise BadInput(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS.get(name) or KnownOptimizer(name, 1e-3)


if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]

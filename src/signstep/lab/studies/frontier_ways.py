"""The ways to train over slow links that `signstep study frontier` compares, and the runs that belong to each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from signstep.distributed.local_methods import LOCAL_METHODS
from signstep.distributed.reductions import REDUCTIONS, Gradients
from signstep.lab.training import gpt
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.optimizers import OptimizerName

_CONTEXT, _WIDTH = 32, 0.5
_BATCH = 16
"""Sequences per step, of all workers."""
PEER = "ddp"
"""The way that all others are compared with."""


@dataclass(frozen=True)
class Family:
    """Ways that are tuned together."""

    reduce: str
    """The way that is tuned for all."""
    optimizer: OptimizerName
    trials: tuple[Mapping[str, float], ...]
    """Fields of `RunConfig` that are tried, as many combinations in every family."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields that all have."""


_DECAY = {"weight_decay": 0.1}


def _rates(*rates: float) -> tuple[Mapping[str, float], ...]:
    return tuple({"lr": lr} for lr in rates)


def _outer(*pairs: tuple[float, float, float]) -> tuple[Mapping[str, float], ...]:
    return tuple({"lr": lr, "outer_lr": outer, "outer_momentum": momentum} for lr, outer, momentum in pairs)


FAMILIES: dict[str, Family] = {
    "AdamW, mean": Family("mean", "adamw", _rates(3.16e-4, 1e-3, 3.16e-3, 1e-2), _DECAY),
    "SignSGD, vote": Family("vote", "signsgd", _rates(1e-4, 3.16e-4, 1e-3, 3.16e-3), _DECAY),
    "Lion, vote": Family("vote", "lion", _rates(1e-4, 3.16e-4, 1e-3, 3.16e-3), _DECAY),
    # DeMo keeps the momentum, and takes the sign of what comes of it.
    "DeMo": Family("demo", "signsgd", _rates(1e-4, 3.16e-4, 1e-3, 3.16e-3), {**_DECAY, "momentum": 0.0}),
    "local vote": Family(
        "local-vote",
        "adamw",
        _outer((1e-3, 0.5, 0.0), (1e-3, 1.0, 0.0), (3.16e-3, 0.5, 0.0), (3.16e-3, 0.25, 0.0)),
        {**_DECAY, "every": 32},
    ),
    "DiLoCo": Family(
        "diloco",
        "adamw",
        _outer((1e-3, 1.0, 0.0), (1e-3, 0.7, 0.9), (3.16e-3, 1.0, 0.0), (3.16e-3, 0.7, 0.9)),
        {**_DECAY, "every": 32},
    ),
}
"""By name."""


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    label: str
    family: str
    reduce: str
    every: int | None = None
    epochs: int = 1
    """Times that a run goes through its text."""

    def payload(self, gradients: Gradients, workers: int) -> float:
        """Bytes that each worker sends per step, on average over a round."""
        if self.every is not None:
            return LOCAL_METHODS[self.reduce].payload(gradients, workers) / self.every
        return REDUCTIONS["ddp-fp32" if self.reduce == "mean" else self.reduce].payload(gradients, workers)


WAYS: dict[str, Way] = {
    PEER: Way("DDP, fp32", "AdamW, mean", "mean"),
    "bf16": Way("DDP, bf16", "AdamW, mean", "bf16"),
    "powersgd": Way("PowerSGD", "AdamW, mean", "powersgd"),
    "vote": Way("SignSGD, vote", "SignSGD, vote", "vote"),
    "vote-lion": Way("Lion, vote", "Lion, vote", "vote"),
    "demo": Way("DeMo", "DeMo", "demo"),
    **{
        f"{reduce}-{every}": Way(f"{LOCAL_METHODS[reduce].label}, H = {every}", family, reduce, every)
        for reduce, family in (("local-vote", "local vote"), ("diloco", "DiLoCo"), ("diloco-int8", "DiLoCo"))
        for every in (8, 32, 128)
    },
    # As many bytes as local-vote-32 in a run, and more steps.
    "local-vote-64-twice": Way("local vote, H = 64, twice the steps", "local vote", "local-vote", 64, epochs=2),
    "local-vote-128-4x": Way("local vote, H = 128, 4 times the steps", "local vote", "local-vote", 128, epochs=4),
}
"""By key."""


@dataclass(frozen=True)
class Workload:
    """What all ways train: a GPT over bytes."""

    dataset: Dataset
    subset: int
    workers: int

    @functools.cached_property
    def gradients(self) -> Gradients:
        """The shapes of the model's parameters."""
        model = gpt.build("gpt", width=_WIDTH, context=_CONTEXT)
        return Gradients(tuple(tuple(p.shape) for p in model.parameters()))

    def bytes_of(self, steps: int) -> int:
        """Bytes of text that so many steps need."""
        return (steps * _BATCH + 1) * _CONTEXT

    def trial(self, family: str, trial: Mapping[str, float]) -> RunConfig:
        """The run of a trial, on held-out text."""
        tuned = FAMILIES[family]
        return self.config(tuned.optimizer, tuned.reduce, {**tuned.options, **trial, "split": "tune"})

    def final(self, key: str, trial: Mapping[str, float], seed: int) -> RunConfig:
        """The run of a way with the options that were chosen for its family."""
        way = WAYS[key]
        tuned = FAMILIES[way.family]
        own = {**tuned.options, **trial} | ({} if way.every is None else {"every": way.every})
        return self.config(tuned.optimizer, way.reduce, {**own, "seed": seed, "epochs": way.epochs})

    def config(self, optimizer: OptimizerName, reduce: str, options: Mapping[str, Any]) -> RunConfig:
        """A run with other fields as given."""
        common: dict[str, Any] = {
            "dataset": self.dataset,
            "model": "gpt",
            "width": _WIDTH,
            "context": _CONTEXT,
            "subset": self.subset,
            "batch_size": _BATCH,
            "epochs": 1,
            "warmup": 0.05,
            "optimizer": optimizer,
            "reduce": reduce,
            "workers": None if reduce == "mean" else self.workers,
        }
        return RunConfig(**common | dict(options))

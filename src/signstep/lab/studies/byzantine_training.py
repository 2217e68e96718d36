"""One training run of the Byzantine study: what distinguishes it, and how it is trained, simulated or in processes.

A simulated step draws a pool of images, cut into blocks. Gradients are computed once per block, with batch norm's
statistics of that block, and every worker averages over blocks of its own choice. So 100 workers with large batches
cost no more than one pass over the pool; the price is that their batches overlap.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.attacks import Attack, Collude, Random, SignFlip
from signstep.distributed.ddp import MajorityVote
from signstep.distributed.hooks import Bucket, GradientHook
from signstep.distributed.simulation import SimulatedMean, SimulatedVote, per_worker_gradients
from signstep.lab.data import normalise
from signstep.lab.training.batches import Batches
from signstep.lab.training.config import RunConfig
from signstep.lab.training.recipe import build_model, build_optimizer, lr_factor
from signstep.lab.training.workers import Workers
from signstep.optim import SignSGD

REDUCTION_OF = {"signsgd": "vote", "sgd": "mean"}
"""How gradients are reduced, by optimizer."""
ATTACK_TITLES = {
    "flip": "sign flip",
    "flip-10": "sign flip, times 10",
    "random": "random",
    "collude": "colluding",
}
ATTACKS: Mapping[str, Callable[[int], Attack]] = {
    "flip": lambda rank: SignFlip(),
    "flip-10": lambda rank: SignFlip(scale=10),
    "random": lambda rank: Random(seed=rank),
    "collude": lambda rank: Collude(),
}
"""By key, of an attacker's rank."""
_STATISTICS = 2000
"""Number of training images from which batch norm takes its mean and variance for the evaluation."""


@dataclass(frozen=True)
class ByzantineRun:
    """What distinguishes one run from the others."""

    config: RunConfig
    """signsgd votes, sgd takes the mean. The batch is that of all processes together, or the simulation's pool."""
    workers: int
    real: bool
    """Each worker is a process of its own; otherwise all are simulated in one."""
    blocks: int = 1
    """Number of blocks that a simulated step's pool is cut into."""
    worker_blocks: int = 1
    """Number of blocks that each simulated worker averages over."""
    attack: str = ""
    attackers: int = 0

    @property
    def reduction(self) -> str:
        return REDUCTION_OF[self.config.optimizer]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}

    @property
    def key(self) -> str:
        """12 hex digits that name the run's file."""
        fields = {**dataclasses.asdict(self), "config": self.config.hash}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        who = f"{self.workers} honest"
        if self.attackers:
            who = f"{self.attackers} of {self.workers} {ATTACK_TITLES[self.attack]}"
        where = "real" if self.real else "simulated"
        config = self.config
        return f"{self.reduction}, lr {config.lr:g}, {who}, {where}, {config.split}, seed {config.seed}"


def train_byzantine(run: ByzantineRun, workers: Workers, data: Path | None) -> dict[str, Any]:
    """Train and evaluate a run.

    Args:
        run: what to train.
        workers: the processes that train it; one for a simulated run.
        data: a folder to look for the images in first.

    Returns:
        "status" (done or diverged), "step" (the number of steps taken) and "accuracy" in percent.
    """
    training = _Training(run, workers, data)
    return _train_in_processes(training, run) if run.real else _train_simulated(training, run)


class _Training:
    """Model, optimizer and images of a run."""

    def __init__(self, run: ByzantineRun, workers: Workers, data: Path | None) -> None:
        self.workers, config = workers, run.config
        self.batches = Batches(config, workers, data)
        self.model = build_model(config, self.batches, workers.device, config.batch_size)
        self.steps = config.epochs * self.batches.steps_per_epoch
        self.optimizer = build_optimizer(config, self.model, self.steps)
        factor = functools.partial(lr_factor, config, total_steps=self.steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(min(step, self.steps)))

    def train(self, set_gradients: Callable[[Tensor, Tensor], None]) -> dict[str, Any]:
        """Train and evaluate. `set_gradients` sets ``p.grad`` from the images and labels of a step."""
        for step in range(self.steps):
            set_gradients(*self.batches.training(*divmod(step, self.batches.steps_per_epoch)))
            self.optimizer.step()
            self.scheduler.step()
            if not all(p.isfinite().all() for p in self.model.parameters()):
                return {"status": "diverged", "step": step, "accuracy": 100 / self.batches.images.num_classes}
        return {"status": "done", "step": self.steps, "accuracy": 100 * self.evaluate()}

    @torch.no_grad()
    def evaluate(self) -> float:
        """Accuracy; batch norm takes its statistics from training images without augmentation."""
        images = self.batches.images
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the mean over all batches
        self.model.train()
        for x in torch.split(self.batches.train_x[:_STATISTICS], 500):
            self.model(normalise(x, images.mean, images.std))
        self.model.eval()
        right = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in self.batches.evaluation())
        return float(self.workers.total(torch.tensor(right))) / len(self.batches.eval_x)


def _train_simulated(training: _Training, run: ByzantineRun) -> dict[str, Any]:
    attacks = {rank: ATTACKS[run.attack](rank) for rank in range(run.attackers)}
    reduce: Callable[[Sequence[Mapping[str, Tensor | None] | None]], None]
    if isinstance(training.optimizer, SignSGD):
        reduce = SimulatedVote(training.model, training.optimizer, run.workers, attacks=attacks).vote
    else:
        reduce = SimulatedMean(training.model, run.workers, attacks=attacks).mean
    generator = torch.Generator().manual_seed(run.config.seed)

    def set_gradients(x: Tensor, y: Tensor) -> None:
        by_block = per_worker_gradients(training.model, F.cross_entropy, x, y, run.blocks)
        chosen = torch.rand(run.workers, run.blocks, generator=generator).argsort(dim=1)[:, : run.worker_blocks]
        weights = torch.zeros(run.workers, run.blocks).scatter_(1, chosen, 1 / run.worker_blocks)
        mixed = {}
        for name, p in training.model.named_parameters():
            stacked = torch.stack([own[name].flatten() for own in by_block])  # type: ignore[union-attr]
            mixed[name] = (weights @ stacked).view(run.workers, *p.shape)
        reduce([{name: g[worker] for name, g in mixed.items()} for worker in range(run.workers)])

    return training.train(set_gradients)


class _AttackableMean(GradientHook):
    """DistributedDataParallel's own mean, as a hook that can be attacked."""

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self.attach(model)

    def reduce(self, bucket: Bucket) -> None:
        bucket.buffer.div_(self.world_size)
        dist.all_reduce(bucket.buffer, group=self.group)


def _train_in_processes(training: _Training, run: ByzantineRun) -> dict[str, Any]:
    model, optimizer, workers = DistributedDataParallel(training.model), training.optimizer, training.workers
    hook = MajorityVote(model, optimizer) if isinstance(optimizer, SignSGD) else _AttackableMean(model)
    if run.attackers and workers.rank == workers.size - 1:
        hook.attack = ATTACKS[run.attack](workers.rank)

    def set_gradients(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]

    try:
        return training.train(set_gradients)
    finally:
        hook.close()

"""Accuracy against the share of Byzantine workers, for majority vote and for the mean.

    signstep study byzantine                                        100 workers, simulated in one process
    torchrun --nproc-per-node 4 -m signstep study byzantine         4 processes, one of which attacks

A simulated step draws a pool of images, cut into blocks. Gradients are computed once per block, with batch norm's
statistics by block, and every worker averages over blocks of its own choice: so 100 workers with large batches cost no
more than one pass over the pool, at the price that their batches overlap. Both kinds of run are resumable: each
finished run is one file, and the same command does what is missing.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.attacks import Attack, Collude, Random, SignFlip
from signstep.distributed.ddp import MajorityVote
from signstep.distributed.hooks import Bucket, GradientHook
from signstep.distributed.simulation import SimulatedMean, SimulatedVote, per_worker_gradients
from signstep.lab.data import normalise
from signstep.lab.errors import BadInput
from signstep.lab.output import figures
from signstep.lab.output.lines import Line, lines
from signstep.lab.output.machine import environment
from signstep.lab.output.stats import Estimate, estimate, with_interval
from signstep.lab.training import models
from signstep.lab.training.batches import Batches
from signstep.lab.training.checkpoint import write_atomically
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.recipe import build_optimizer, lr_factor
from signstep.lab.training.workers import Workers
from signstep.optim import SignSGD

NAME = "byzantine"
AttackName = Literal["flip", "collude", "flip-10", "random"]
ATTACKS: Mapping[str, Callable[[int], Attack]] = {
    "flip": lambda rank: SignFlip(),
    "flip-10": lambda rank: SignFlip(scale=10),
    "random": lambda rank: Random(seed=rank),
    "collude": lambda rank: Collude(),
}
_TITLES = {
    "flip": "sign flip",
    "flip-10": "sign flip, times 10",
    "random": "random",
    "collude": "colluding",
}
METHODS = {"signsgd": "vote", "sgd": "mean"}
"""By optimizer: how gradients are reduced."""
GRID: Mapping[str, tuple[float, ...]] = {"signsgd": (1e-3, 3e-3, 1e-2), "sgd": (0.3, 1.0, 3.0)}
"""Learning rates tried without attackers, on held-out training images."""
_STATISTICS = 2000
"""Training images whose mean and variance batch norm takes for the evaluation."""


@dataclass(frozen=True)
class Case:
    """One run."""

    config: RunConfig
    """signsgd votes, sgd has the mean; a batch is that of all processes, or the pool."""
    workers: int
    real: bool
    """In processes of their own; else simulated."""
    blocks: int = 1
    """That a simulated step's pool is cut into."""
    worker_blocks: int = 1
    """How many of them each simulated worker averages over."""
    attack: str = ""
    attackers: int = 0

    @property
    def method(self) -> str:
        return METHODS[self.config.optimizer]

    @property
    def share(self) -> float:
        """Of the attackers, in percent."""
        return 100 * self.attackers / self.workers

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}

    @property
    def key(self) -> str:
        """12 hex digits that name the run's file."""
        fields = {**dataclasses.asdict(self), "config": self.config.hash}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Options:
    """Measure accuracy against the share of Byzantine workers, for majority vote and for the mean."""

    out: Path = Path("results/byzantine")
    """Folder of the results."""
    data: Path | None = None
    """Folder to look for the images in first."""
    dataset: Dataset = "cifar10"
    """The images."""
    attacks: tuple[AttackName, ...] = ("flip", "collude", "flip-10", "random")
    """What attackers do. flip-10, a flip times 10, is for the mean alone: a vote has no use for the scale."""
    shares: tuple[int, ...] = (49, 25, 40, 10)
    """Attackers among the simulated workers, in percent, in this order; one of torchrun's processes attacks."""
    workers: int = 100
    """Simulated workers; under torchrun, its processes."""
    pool: int = 400
    """Images per simulated step."""
    block: int = 8
    """Images per block of the pool."""
    worker_batch: int = 128
    """Images of the pool that each simulated worker has, in blocks; under torchrun its batch is half of this."""
    epochs: int = 2
    """Times that a run goes through the training images."""
    width: float = 0.5
    """Of ResNet-8."""
    seeds: int = 3
    """Runs without attackers and at the first share of the first attack; the others have one."""
    max_minutes: float | None = None
    """Stop after this many minutes; the same command goes on."""


def run(options: Options, *, command: str, say: Callable[[str], None] = print) -> None:
    """Do what is missing, and write byzantine.json, .md, .png and .svg into `options.out`.

    Under torchrun the runs in real processes are done, else the simulated ones; the report has both.

    Args:
        options: of the study.
        command: how it was called, for the report's header.
        say: gets a line per run.

    Raises:
        BadInput: options that do not fit each other.
    """
    end = None if options.max_minutes is None else time.monotonic() + 60 * options.max_minutes
    workers = Workers.join("cpu")
    folder = options.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    plan = _real_cases if workers.size > 1 else _simulated_cases
    measured: dict[str, dict[str, Any]] = {}
    for case in plan(options, workers.size, measured):
        late = end is not None and time.monotonic() >= end
        if workers.any(late)[0]:
            break
        path = folder / f"{case.key}.json"
        earlier = workers.from_first(functools.partial(_finished, path))
        if earlier is not None:
            measured[case.key] = earlier
            continue
        started = time.process_time()
        result = (_train_real if case.real else _train_simulated)(case, workers, options.data)
        record = {
            "case": case.to_dict(),
            **result,
            "cpu_seconds": round(time.process_time() - started, 1),
            "environment": environment(workers.device, workers.size),
            "command": command,
        }
        measured[case.key] = record
        if workers.rank == 0:
            _put_json(path, record)
            say(f"{_describe(case)}: {record['accuracy']:.2f} %, {record['cpu_seconds']} s")
    if workers.rank == 0 and measured:
        for path in write(options.out, command):
            say(f"written: {path}")


def _finished(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _describe(case: Case) -> str:
    who = f"{case.attackers} of {case.workers} {_TITLES[case.attack]}" if case.attackers else f"{case.workers} honest"
    where = "real" if case.real else "simulated"
    return f"{case.method}, lr {case.config.lr:g}, {who}, {where}, {case.config.split}, seed {case.config.seed}"


def _config(options: Options, optimizer: str, lr: float, batch: int, seed: int, split: str) -> RunConfig:
    return RunConfig(
        dataset=options.dataset,
        split=split,  # type: ignore[arg-type]
        model="resnet8",
        width=options.width,
        stem="imagenet",
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=lr,
        warmup=0.05,
        epochs=options.epochs,
        batch_size=batch,
        channels_last=False,
        seed=seed,
    )


def _best_lr(trials: Sequence[Case], measured: Mapping[str, dict[str, Any]]) -> float:
    best = max(trials, key=lambda case: float(measured[case.key]["accuracy"]))
    return best.config.lr


def _simulated_cases(options: Options, size: int, measured: Mapping[str, dict[str, Any]]) -> Iterator[Case]:
    """Learning rates first, then what matters most; `measured` grows while this goes on."""
    if options.pool % options.block or options.worker_batch % options.block or options.worker_batch > options.pool:
        raise BadInput(
            f"pool={options.pool}, worker_batch={options.worker_batch}: expected multiples of block={options.block}, "
            "the worker's not above the pool's"
        )

    def case(optimizer: str, lr: float, seed: int = 0, split: str = "final", attack: str = "", share: int = 0) -> Case:
        return Case(
            _config(options, optimizer, lr, options.pool, seed, split),
            options.workers,
            real=False,
            blocks=options.pool // options.block,
            worker_blocks=options.worker_batch // options.block,
            attack=attack,
            attackers=options.workers * share // 100,
        )

    lrs = {}
    for optimizer, grid in GRID.items():
        trials = [case(optimizer, lr, split="tune") for lr in grid]
        yield from trials
        lrs[optimizer] = _best_lr(trials, measured)

    def against(attack: str, *shares: int, seed: int = 0) -> Iterator[Case]:
        for share in shares:
            for optimizer, lr in lrs.items():
                if METHODS[optimizer] == "mean" or attack != "flip-10":  # a vote has no use for the scale
                    yield case(optimizer, lr, seed, attack=attack, share=share)

    for seed in range(options.seeds):
        yield from against("", 0, seed=seed)
        yield from against(options.attacks[0], *options.shares[: None if seed == 0 else 1], seed=seed)
    for attack in options.attacks[1:]:
        yield from against(attack, *options.shares)


def _real_cases(options: Options, size: int, measured: Mapping[str, dict[str, Any]]) -> Iterator[Case]:
    def case(optimizer: str, lr: float, seed: int = 0, split: str = "final", attack: str = "") -> Case:
        config = _config(options, optimizer, lr, size * options.worker_batch // 2, seed, split)
        return Case(config, size, real=True, attack=attack, attackers=int(attack != ""))

    for optimizer, grid in GRID.items():
        trials = [case(optimizer, lr, split="tune") for lr in grid]
        yield from trials
        lr = _best_lr(trials, measured)
        for seed in range(options.seeds):
            yield case(optimizer, lr, seed)
            for attack in options.attacks:
                if seed == 0 or attack == options.attacks[0]:
                    yield case(optimizer, lr, seed, attack=attack)


class _Training:
    """Model, optimizer and images of a run."""

    def __init__(self, case: Case, workers: Workers, folder: Path | None) -> None:
        self.workers, config = workers, case.config
        self.batches = Batches(config, workers, folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = models.build(
                config.model,
                num_classes=self.batches.images.num_classes,
                in_channels=self.batches.images.channels,
                width=config.width,
                stem=config.stem,
            )
        self.steps = config.epochs * self.batches.steps_per_epoch
        self.optimizer = build_optimizer(config, self.model, self.steps)
        factor = functools.partial(lr_factor, config, total_steps=self.steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(min(step, self.steps)))

    def go(self, gradients: Callable[[int, Tensor, Tensor], None]) -> dict[str, Any]:
        """Train, `gradients` setting ``p.grad`` for each step's images, and evaluate."""
        for step in range(self.steps):
            gradients(step, *self.batches.training(*divmod(step, self.batches.steps_per_epoch)))
            self.optimizer.step()
            self.scheduler.step()
            if not all(p.isfinite().all() for p in self.model.parameters()):
                return {"status": "diverged", "step": step, "accuracy": 100 / self.batches.images.num_classes}
        return {"status": "done", "step": self.steps, "accuracy": 100 * self.evaluate()}

    @torch.no_grad()
    def evaluate(self) -> float:
        """Accuracy, with the statistics of batch norm taken from training images as they are."""
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


def _train_simulated(case: Case, workers: Workers, folder: Path | None) -> dict[str, Any]:
    training = _Training(case, workers, folder)
    attacks = {rank: ATTACKS[case.attack](rank) for rank in range(case.attackers)}
    reduce: Callable[[Sequence[Mapping[str, Tensor | None] | None]], None]
    if isinstance(training.optimizer, SignSGD):
        reduce = SimulatedVote(training.model, training.optimizer, case.workers, attacks=attacks).vote
    else:
        reduce = SimulatedMean(training.model, case.workers, attacks=attacks).mean
    generator = torch.Generator().manual_seed(case.config.seed)

    def gradients(step: int, x: Tensor, y: Tensor) -> None:
        by_block = per_worker_gradients(training.model, F.cross_entropy, x, y, case.blocks)
        chosen = torch.rand(case.workers, case.blocks, generator=generator).argsort(dim=1)[:, : case.worker_blocks]
        weights = torch.zeros(case.workers, case.blocks).scatter_(1, chosen, 1 / case.worker_blocks)
        mixed = {}
        for name, p in training.model.named_parameters():
            stacked = torch.stack([own[name].flatten() for own in by_block])  # type: ignore[union-attr]
            mixed[name] = (weights @ stacked).view(case.workers, *p.shape)
        reduce([{name: g[worker] for name, g in mixed.items()} for worker in range(case.workers)])

    return training.go(gradients)


class Mean(GradientHook):
    """DistributedDataParallel's own mean, as a hook that can be attacked."""

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self.attach(model)

    def reduce(self, bucket: Bucket) -> None:
        """All-reduce."""
        bucket.buffer.div_(self.world_size)
        dist.all_reduce(bucket.buffer, group=self.group)


def _train_real(case: Case, workers: Workers, folder: Path | None) -> dict[str, Any]:
    training = _Training(case, workers, folder)
    model = DistributedDataParallel(training.model)
    optimizer = training.optimizer
    hook = MajorityVote(model, optimizer) if isinstance(optimizer, SignSGD) else Mean(model)
    if case.attackers and workers.rank == workers.size - 1:
        hook.attack = ATTACKS[case.attack](workers.rank)

    def gradients(step: int, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]

    try:
        result = training.go(gradients)
    finally:
        hook.close()
    return result


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of all finished runs, by `Case.key`."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _put_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class Point:
    """Accuracy of one method under one attack by one share of the workers, over seeds."""

    method: str
    lr: float
    real: bool
    attack: str
    attackers: int
    workers: int
    accuracies: tuple[float, ...]
    diverged: int

    @property
    def estimate(self) -> Estimate:
        """In percent."""
        return estimate(self.accuracies)


def points(measured: Mapping[str, dict[str, Any]], split: str) -> list[Point]:
    """What the runs on a split give, seeds together."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in measured.values():
        case = record["case"]
        if case["config"]["split"] == split:
            method = METHODS[case["config"]["optimizer"]]
            where = (case["real"], method, case["config"]["lr"], case["attack"], case["attackers"], case["workers"])
            grouped.setdefault(where, []).append(record)
    return [
        Point(
            method,
            lr,
            real,
            attack,
            attackers,
            workers,
            tuple(r["accuracy"] for r in records),
            sum(r["status"] == "diverged" for r in records),
        )
        for (real, method, lr, attack, attackers, workers), records in sorted(grouped.items())
    ]


def write(out: Path, command: str) -> list[Path]:
    """Write the report of all finished runs in `out`, and return its paths."""
    measured = read(out / "runs")
    final, tuned = points(measured, "final"), points(measured, "tune")
    made = sorted({record["command"] for record in measured.values()} | {command})
    record = {
        "commands": made,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": next(iter(measured.values()))["environment"],
        "final": [dataclasses.asdict(p) for p in final],
        "learning_rates": [dataclasses.asdict(p) for p in tuned],
    }
    _put_json(out / f"{NAME}.json", record)
    paths = [out / f"{NAME}.json", out / f"{NAME}.md"]
    text = _markdown(final, tuned, record, measured)
    write_atomically(paths[1], lambda file: file.write(text.encode()))
    simulated = [p for p in final if not p.real]
    if any(p.attackers for p in simulated):
        figure = figure_of(simulated)
        drawn = figures.png(figure), figures.svg(figure, name=NAME, description=_TITLE, alone=True).encode()
        for suffix, content in zip(("png", "svg"), drawn, strict=True):
            paths.append(out / f"{NAME}.{suffix}")
            write_atomically(paths[-1], functools.partial(_put, content))
    return paths


def _put(content: bytes, file: Any) -> None:
    file.write(content)


_TITLE = "Accuracy against the share of Byzantine workers"
_SHADES = {"flip": "blue", "collude": "vermillion", "random": "green", "flip-10": "pink"}


def figure_of(simulated: Sequence[Point]) -> Figure:
    """Accuracy over the share of attackers: a line per method and attack, the mean dashed."""
    drawn = []
    for method in METHODS.values():
        for attack in ATTACKS:
            own = [p for p in simulated if p.method == method and (p.attack == attack or p.attackers == 0)]
            own.sort(key=lambda p: p.attackers)
            if any(p.attackers for p in own):
                drawn.append(
                    Line(
                        f"{method}, {_TITLES[attack]}",
                        _SHADES[attack],
                        tuple(100 * p.attackers / p.workers for p in own),
                        tuple(p.estimate for p in own),
                        dashed=method == "mean",
                    )
                )
    workers = simulated[0].workers
    subtitle = f"{workers} simulated workers, ResNet-8; 95 % intervals where there are several seeds"
    return lines(
        drawn,
        across="attackers, %",
        up="test accuracy, %",
        heading=(_TITLE, subtitle),
        ticks=sorted({100 * p.attackers / p.workers for p in simulated}),
        limits=(0, None),
    )


def _row(p: Point) -> tuple[str, ...]:
    attack = _TITLES.get(p.attack, "none")
    diverged = f"{p.diverged} of {len(p.accuracies)} diverged" if p.diverged else ""
    share = f"{p.attackers} of {p.workers}"
    return (p.method, f"{p.lr:g}", attack, share, with_interval(p.estimate), str(len(p.accuracies)), diverged)


def _table(rows: Sequence[Point]) -> list[str]:
    head = ("reduction", "lr", "attack", "attackers", "test accuracy, %", "seeds", "")
    cells = [head, ("---", "---:", "---", "---:", "---:", "---:", "---"), *map(_row, rows)]
    return ["| " + " | ".join(line) + " |" for line in cells]


def _markdown(
    final: Sequence[Point], tuned: Sequence[Point], record: dict[str, Any], measured: Mapping[str, dict[str, Any]]
) -> str:
    made = next(iter(measured.values()))["environment"]
    out = [f"# {_TITLE}", ""]
    out += [f"- `{each}`" for each in record["commands"]]
    out += ["", f"{record['date']}, {made['cpu']}, {made['threads']} thread(s), torch {made['torch']}", ""]
    for real in (False, True):
        chosen = [p for p in final if p.real == real]
        if not chosen:
            continue
        cases = [r["case"] for r in measured.values() if r["case"]["real"] == real]
        one = cases[0]
        config = one["config"]
        images = config["batch_size"] // one["blocks"] * one["worker_blocks"]
        if real:
            title, batch = "Real processes", f"{config['batch_size'] // one['workers']} images per worker and step"
        else:
            title = f"{one['workers']} simulated workers"
            batch = (
                f"{images} images per worker and step, out of a pool of {config['batch_size']} that the workers share"
            )
        steps = max(r["step"] for r in measured.values() if r["case"]["real"] == real)
        network = f"{config['dataset']}, ResNet-8, width {config['width']:g}, imagenet stem"
        length = f"{config['epochs']} epochs ({steps} steps)"
        how = "momentum 0.9, cosine schedule; vote: SignSGD, mean: SGD"
        if real:
            note = "Colluding: the attacker pushes in one random direction, as it cannot know the others' gradients."
        else:
            overlap = 100 * one["worker_blocks"] / one["blocks"]
            note = (
                f"Two workers have {overlap:.0f} % of their images in common on average, so honest workers agree more "
                "than with batches of their own. Colluding: attackers send the negated mean of the honest gradients."
            )
        out += [f"## {title}", "", f"{network}; {length}; {batch}; {how}. {note}", "", *_table(chosen), ""]
        grid = [p for p in tuned if p.real == real]
        words = ", ".join(f"{p.method} {p.lr:g}: {p.accuracies[0]:.2f} %" for p in grid)
        out += [f"Learning rates, without attackers, on held-out training images: {words}.", ""]
    return "\n".join(out)


def command_of(options: Options) -> str:
    """The command line that runs these options."""
    words = ["signstep", "study", NAME]
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if value != f.default and f.name not in ("out", "data", "max_minutes"):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{f.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)

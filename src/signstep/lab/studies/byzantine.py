"""The study of accuracy against the share of Byzantine workers, for majority vote and for the mean: what is run, when.

    signstep study byzantine                                        100 workers, simulated in one process
    torchrun --nproc-per-node 4 -m signstep study byzantine         4 processes, one of which attacks

Both kinds of run are resumable: each finished run is one file, and the same command does what is missing.
byzantine_training.py trains a run; byzantine_report.py has the tables and the figure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from signstep.lab.arguments import check_folder, check_minutes
from signstep.lab.errors import BadInput
from signstep.lab.output.command import by_torchrun, command_line
from signstep.lab.output.files import make_folder, read_json, write_json
from signstep.lab.output.machine import environment
from signstep.lab.studies.byzantine_report import write_report
from signstep.lab.studies.byzantine_training import REDUCTION_OF, ByzantineRun, train_byzantine
from signstep.lab.training.config import Dataset, RunConfig
from signstep.lab.training.workers import Workers

AttackName = Literal["flip", "collude", "flip-10", "random"]
GRID: Mapping[str, tuple[float, ...]] = {"signsgd": (1e-3, 3e-3, 1e-2), "sgd": (0.3, 1.0, 3.0)}
"""Learning rates tried without attackers, on held-out training images."""
Records = Mapping[str, dict[str, Any]]
"""The records of finished runs, by `ByzantineRun.key`."""


@dataclass(frozen=True)
class ByzantineStudy:
    """Measure accuracy against the share of Byzantine workers, for majority vote and for the mean."""

    out: Path = Path("results/byzantine")
    """Folder of the results."""
    data: Path | None = None
    """Folder to look for the images in first."""
    dataset: Dataset = "cifar10"
    """The images."""
    attacks: tuple[AttackName, ...] = ("flip", "collude", "flip-10", "random")
    """What attackers do. flip-10, a flip times 10, is for the mean alone: a vote ignores the scale."""
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
    """Width of ResNet-8."""
    seeds: int = 3
    """Runs without attackers and at the first share of the first attack; the others have one."""
    max_minutes: float | None = None
    """Stop after this many minutes; the same command goes on."""

    def command(self, processes: int) -> str:
        """The command line of this study, in one process or by torchrun in several."""
        return by_torchrun(command_line(["study", "byzantine"], self, omit=("out", "data", "max_minutes")), processes)

    def run(self) -> int:
        """Do the runs that are missing, and write byzantine.json, .md, .png and .svg into `out`.

        Under torchrun the runs in processes are done, otherwise the simulated ones; the report has both.

        Raises:
            BadInput: options that do not fit each other, or a `data` that is no folder.
        """
        check_minutes(self.max_minutes)
        check_folder(self.data)
        end = None if self.max_minutes is None else time.monotonic() + 60 * self.max_minutes
        workers = Workers.join("cpu")
        folder = self.out / "runs"
        make_folder(folder)
        measured: dict[str, dict[str, Any]] = {}
        trained = False
        planned = self.real_runs(workers.size, measured) if workers.size > 1 else self.simulated_runs(measured)
        for run in planned:
            late = end is not None and time.monotonic() >= end
            if workers.any(late)[0]:
                break
            path = folder / f"{run.key}.json"
            record = workers.from_first(partial(_finished, path))
            if record is None:
                trained = True
                record = self._train(run, workers)
                if workers.rank == 0:
                    write_json(path, record, allow_nan=False)
                    print(f"{run}: {record['accuracy']:.2f} %, {record['cpu_seconds']} s", flush=True)
            measured[run.key] = record
        else:
            if workers.rank == 0 and not trained:
                print(f"nothing to train: all {len(measured)} runs have ended before")
        if workers.rank == 0 and measured:
            for path in write_report(self.out, self.command(workers.size)):
                print(f"written: {path}")
        return 0

    def _train(self, run: ByzantineRun, workers: Workers) -> dict[str, Any]:
        started = time.process_time()
        result = train_byzantine(run, workers, self.data)
        return {
            "case": run.to_dict(),
            **result,
            "cpu_seconds": round(time.process_time() - started, 1),
            "environment": environment(workers.device, workers.size),
            "command": self.command(workers.size),
        }

    def simulated_runs(self, measured: Records) -> Iterator[ByzantineRun]:
        """The runs with simulated workers: learning rates first, then what matters most.

        Args:
            measured: the records of finished runs; it must have those of a learning rate's trials before the next
                run is asked for.

        Raises:
            BadInput: batches that are not made of whole blocks of the pool.
        """
        if self.pool % self.block or self.worker_batch % self.block or self.worker_batch > self.pool:
            raise BadInput(
                f"pool={self.pool}, worker_batch={self.worker_batch}: expected multiples of block={self.block}, "
                "the worker's not above the pool's"
            )

        def planned(
            optimizer: str, lr: float, seed: int = 0, split: str = "final", attack: str = "", share: int = 0
        ) -> ByzantineRun:
            return ByzantineRun(
                self._config(optimizer, lr, self.pool, seed, split),
                self.workers,
                real=False,
                blocks=self.pool // self.block,
                worker_blocks=self.worker_batch // self.block,
                attack=attack,
                attackers=self.workers * share // 100,
            )

        lrs = {}
        for optimizer, grid in GRID.items():
            trials = [planned(optimizer, lr, split="tune") for lr in grid]
            yield from trials
            lrs[optimizer] = _best_lr(trials, measured)

        def against(attack: str, *shares: int, seed: int = 0) -> Iterator[ByzantineRun]:
            for share in shares:
                for optimizer, lr in lrs.items():
                    if REDUCTION_OF[optimizer] == "mean" or attack != "flip-10":  # a vote ignores the scale
                        yield planned(optimizer, lr, seed, attack=attack, share=share)

        for seed in range(self.seeds):
            yield from against("", 0, seed=seed)
            yield from against(self.attacks[0], *self.shares[: None if seed == 0 else 1], seed=seed)
        for attack in self.attacks[1:]:
            yield from against(attack, *self.shares)

    def real_runs(self, size: int, measured: Records) -> Iterator[ByzantineRun]:
        """The runs in `size` processes, one of which attacks; `measured` as for `simulated_runs`."""

        def planned(optimizer: str, lr: float, seed: int = 0, split: str = "final", attack: str = "") -> ByzantineRun:
            config = self._config(optimizer, lr, size * self.worker_batch // 2, seed, split)
            return ByzantineRun(config, size, real=True, attack=attack, attackers=int(attack != ""))

        for optimizer, grid in GRID.items():
            trials = [planned(optimizer, lr, split="tune") for lr in grid]
            yield from trials
            lr = _best_lr(trials, measured)
            for seed in range(self.seeds):
                yield planned(optimizer, lr, seed)
                for attack in self.attacks:
                    if seed == 0 or attack == self.attacks[0]:
                        yield planned(optimizer, lr, seed, attack=attack)

    def _config(self, optimizer: str, lr: float, batch: int, seed: int, split: str) -> RunConfig:
        return RunConfig(
            dataset=self.dataset,
            split=split,  # type: ignore[arg-type]
            model="resnet8",
            width=self.width,
            stem="imagenet",
            optimizer=optimizer,
            lr=lr,
            warmup=0.05,
            epochs=self.epochs,
            batch_size=batch,
            channels_last=False,
            seed=seed,
        )


def _finished(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _best_lr(trials: Sequence[ByzantineRun], measured: Records) -> float:
    best = max(trials, key=lambda run: float(measured[run.key]["accuracy"]))
    return best.config.lr

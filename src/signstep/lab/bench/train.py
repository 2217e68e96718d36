"""`signstep bench train`: ResNet-8 on CIFAR-10 over a slow network, with each way to reduce gradients.

Every rank trains in a network namespace of its own whose link has the given rate (see `netns`) and latency (see
`delayed`), by the same `signstep train` that anyone calls. Seconds are those of training, without start-up and
evaluation; bytes are the interface's own count of all of it: of training, of the weights that DDP sends at the start,
of evaluation, and of the last checkpoint, for which the first rank gathers what the others keep. A finished run is kept
and not trained again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from signstep.distributed.plan import Link
from signstep.lab.arguments import check_folder
from signstep.lab.bench import delayed, netns
from signstep.lab.bench.spread import BenchError
from signstep.lab.errors import BadInput
from signstep.lab.output import stats
from signstep.lab.output.command import command_line, option_words
from signstep.lab.output.files import make_folder, read_json, write_all, write_json
from signstep.lab.output.tables import markdown_table
from signstep.lab.training.config import Reduce, RunConfig
from signstep.lab.training.records import Run, read_run

NAME = "bench-train"
_PORT = "29500"
_HEAD = ("method", "seconds", "seconds to target", "MB per rank", "accuracy")


@dataclass(frozen=True)
class TrainMethod:
    """One way to train: a row of the table."""

    label: str
    reduce: Reduce
    options: dict[str, Any]


_SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
_SIGN = {"optimizer": "signsgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}
_RELATIVE = {"lr": 3.16e-3, "dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"}
# Learning rates are those that `signstep sweep table1 --scale cpu` found for one worker.
TRAIN_METHODS = {
    "mean": TrainMethod("SGD, fp32 mean", "mean", _SGD),
    "bf16": TrainMethod("SGD, bf16 mean", "bf16", _SGD),
    "powersgd": TrainMethod("SGD, PowerSGD", "powersgd", _SGD),
    "sign-mean": TrainMethod("SignSGD of the fp32 mean", "mean", _SIGN),
    "vote": TrainMethod("SignSGD, majority vote", "vote", _SIGN),
    "vote-relative": TrainMethod("SignSGD, majority vote, relative dither", "vote", _SIGN | _RELATIVE),
    "ef-sign-two-sided": TrainMethod("SGD, EF-SignSGD, two-sided", "ef-sign-two-sided", _SGD),
    "qsgd": TrainMethod("SGD, QSGD", "qsgd", _SGD),
    "top-k": TrainMethod("SGD, Top-K", "top-k", _SGD),
}


@dataclass(frozen=True)
class TrainSample:
    """One run, as measured."""

    method: str
    seed: int
    seconds: float
    to_target: float | None
    """Seconds of training until an epoch ended with the target accuracy; None: none did."""
    megabytes: float
    """Sent by a rank, on average."""
    accuracy: float
    """In percent, after the last epoch."""


@dataclass(frozen=True)
class BenchTrain:
    """Train ResNet-8 on CIFAR-10 over a slow network with ways to reduce gradients; needs root."""

    methods: tuple[str, ...] = ()
    """Which ones; default: all."""
    rate: str = "100mbit"
    """The rate of the links; with the latency of a round trip: 10mbit/50ms."""
    ranks: int = 4
    """Processes that train a run together."""
    seeds: int = 3
    """Runs of each method."""
    epochs: int = 6
    """Epochs of each run."""
    subset: int = 10_000
    """Training images."""
    target: float = 45.0
    """Accuracy in percent; the table has the seconds until it was reached."""
    data: Path | None = None
    """Folder to look for the images in first."""
    out: Path = Path("results/bench-train")
    """Folder of the runs, and of bench-train.json and .md; the same command again goes on."""

    @property
    def runs(self) -> Path:
        """Folder of the runs at this rate and number of ranks."""
        return self.out / "runs" / f"{self.rate.replace('/', '-')}-{self.ranks}"

    def run(self) -> int:
        check_folder(self.data)
        options = replace(self, methods=tuple(dict.fromkeys(self.methods)) or tuple(TRAIN_METHODS))
        # End as after Ctrl-C, so that namespaces and processes are taken down.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        samples = train_all(options)
        table = Table(*_HEAD, box=rich.box.SIMPLE_HEAD)
        for line in rows(samples):
            table.add_row(*line)
        Console().print(table)
        for path in write(samples, options):
            print(f"written: {path}")
        return 0


def config_of(key: str, seed: int, options: BenchTrain) -> RunConfig:
    """The run of a method."""
    method = TRAIN_METHODS[key]
    return RunConfig(
        model="resnet8",
        subset=options.subset,
        epochs=options.epochs,
        warmup=0.05,
        seed=seed,
        reduce=method.reduce,
        workers=None if method.reduce == "mean" else options.ranks,
        **method.options,
    )


def _sent(network: netns.Network, ranks: int) -> int:
    """Bytes that all ranks' interfaces have sent."""
    return sum(network.bytes_sent(rank) for rank in range(ranks))


def train_over(network: netns.Network, config: RunConfig, folder: Path, data: Path | None, minutes: float) -> float:
    """Train a run to its end over a network, each rank in its namespace.

    Args:
        network: as it has been shaped.
        config: the run.
        folder: of its files.
        data: folder to look for the data in first.
        minutes: after which it is given up.

    Returns:
        The bytes that a rank has sent, on average.

    Raises:
        BenchError: the run fails, or is not done in time.
    """
    ranks = network.ranks
    before = _sent(network, ranks)
    command = [sys.executable, "-m", "signstep", "train", *option_words(config)]
    command += ["--out", str(folder), "--device", "cpu"]
    command += [] if data is None else ["--data", str(data)]
    processes = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": _PORT}
            place |= {"MASTER_ADDR": network.address(0), "GLOO_SOCKET_IFNAME": netns.DEVICE}
            # torchrun sets this too; a worker knows by it that it is one.
            place |= {"TORCHELASTIC_RUN_ID": NAME, "OMP_NUM_THREADS": "1"}
            errors = (folder / f"rank-{rank}.err").open("wb")
            words = network.command(rank, command)
            processes.append(subprocess.Popen(words, env=os.environ | place, stdout=subprocess.DEVNULL, stderr=errors))
            errors.close()
        deadline = time.monotonic() + 60 * minutes
        while (codes := [process.poll() for process in processes]) != [0] * ranks:
            if any(codes) or time.monotonic() > deadline:
                worst = next((rank for rank, code in enumerate(codes) if code), 0)
                said = (folder / f"rank-{worst}.err").read_text(errors="replace").strip().splitlines()
                what = said[-1] if any(codes) and said else f"not done after {minutes:g} minutes"
                raise BenchError(f"{config.reduce}, seed {config.seed}, rank {worst}: {what}")
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank in range(ranks):
        (folder / f"rank-{rank}.err").unlink()
    return (_sent(network, ranks) - before) / ranks


def _sample(key: str, run: Run, sent: float, target: float) -> TrainSample:
    seconds, to_target = 0.0, None
    for epoch in run.epochs:
        images = epoch["step"] * run.config.batch_size / epoch["epoch"]
        seconds += images / epoch["timing"]["images_per_second"]
        if to_target is None and 100 * epoch["eval_accuracy"] >= target:
            to_target = seconds
    return TrainSample(key, run.config.seed, seconds, to_target, sent / 1e6, run.result)


def train_all(options: BenchTrain) -> list[TrainSample]:
    """Train what is missing, and return all samples.

    Raises:
        BadInput: an unknown method or rate.
        NetworkError: no namespaces to be had.
        BenchError: a run fails.
    """
    if unknown := [key for key in options.methods if key not in TRAIN_METHODS]:
        raise BadInput(f"--methods {unknown[0]}: expected some of {', '.join(TRAIN_METHODS)}")
    try:
        link = Link.of(options.rate)
    except ValueError as error:
        raise BadInput(f"--rate {error}") from error
    make_folder(options.runs)
    samples = []
    with delayed.network(options.ranks, latency=link.latency > 0) as network:
        network.shape(link)
        for seed in range(options.seeds):
            for key in options.methods:
                config = config_of(key, seed, options)
                record = options.runs / f"{config.hash}.jsonl"
                kept = options.runs / f"{config.hash}.json"
                if not kept.exists():
                    print(f"{TRAIN_METHODS[key].label}, seed {seed}: {options.ranks} ranks at {options.rate}")
                    # A run that was cut short has lost the count of its bytes.
                    for old in options.runs.glob(f"{config.hash}.*"):
                        old.unlink()
                    sent = train_over(network, config, options.runs, options.data, minutes=30)
                    write_json(kept, {"bytes_per_rank": sent})
                    record.with_suffix(".pt").unlink()
                sent = read_json(kept)["bytes_per_rank"]
                samples.append(_sample(key, read_run(record), sent, options.target))
    return samples


def _mean(values: Sequence[float], digits: int) -> str:
    return stats.with_interval(stats.estimate(values)) if digits == 2 else f"{sum(values) / len(values):.{digits}f}"


def rows(samples: Sequence[TrainSample]) -> list[tuple[str, ...]]:
    """The table's lines: means over seeds, of the accuracy with its 95 % interval."""
    lines: list[tuple[str, ...]] = []
    for key in dict.fromkeys(sample.method for sample in samples):
        own = [sample for sample in samples if sample.method == key]
        reached = [sample.to_target for sample in own if sample.to_target is not None]
        to_target = _mean(reached, 1) + ("" if len(reached) == len(own) else f" ({len(reached)} of {len(own)} runs)")
        lines.append(
            (
                TRAIN_METHODS[key].label,
                _mean([sample.seconds for sample in own], 1),
                to_target if reached else "not reached",
                _mean([sample.megabytes for sample in own], 1),
                _mean([sample.accuracy for sample in own], 2),
            )
        )
    return lines


def write(samples: Sequence[TrainSample], options: BenchTrain) -> list[Path]:
    command = command_line(["bench", "train"], options, omit=["data"], everything=True)
    first = read_run(min(options.runs.glob("*.jsonl")))
    record = {
        "command": command,
        "environment": first.start["environment"],
        "rate": options.rate,
        "ranks": options.ranks,
        "target_accuracy": options.target,
        "samples": [asdict(sample) for sample in samples],
    }
    lines = [
        f"# CIFAR-10, ResNet-8, {options.ranks} ranks at {options.rate}",
        "",
        f"    {command}",
        "",
        f"Target: {options.target:g} % test accuracy. Means over {len({s.seed for s in samples})} seeds, the accuracy "
        "with its 95 % interval. Seconds are of training, with all ranks on the cores of one machine, and links "
        + ("have the latency of a round trip that follows their rate" if "/" in options.rate else "add no latency")
        + ". MB sent per rank.",
        "",
        *markdown_table(_HEAD, rows(samples)),
        "",
    ]
    return write_all(options.out, {f"{NAME}.json": record, f"{NAME}.md": "\n".join(lines)})

"""`signstep bench train`: ResNet-8 on CIFAR-10 over a slow network, with each way to reduce gradients.

Every rank trains in a network namespace of its own whose link has the given rate (see `netns`), by the same
`signstep train` that anyone calls. Seconds are those of training, without start-up and evaluation; bytes are the
interface's own count of all of it: of training, of the weights that DDP sends at the start, of evaluation, and of the
last checkpoint, for which the first rank gathers what the others keep. A finished run is kept and not trained again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from signstep.distributed.plan import bits_per_second
from signstep.lab.bench import netns
from signstep.lab.bench.step import BenchError
from signstep.lab.errors import BadInput
from signstep.lab.output import stats
from signstep.lab.training import records as runs
from signstep.lab.training.checkpoint import write_atomically
from signstep.lab.training.config import Reduce, RunConfig

NAME = "bench-train"
_PORT = "29500"
_HEAD = ("method", "seconds", "seconds to target", "MB per rank", "accuracy")


@dataclass(frozen=True)
class Method:
    """One row."""

    label: str
    reduce: Reduce
    options: dict[str, Any]


_SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
_SIGN = {"optimizer": "signsgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}
_RELATIVE = {"lr": 3.16e-3, "dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"}
# Learning rates are those that `signstep sweep table1 --scale cpu` found for one worker.
METHODS = {
    "mean": Method("SGD, fp32 mean", "mean", _SGD),
    "bf16": Method("SGD, bf16 mean", "bf16", _SGD),
    "powersgd": Method("SGD, PowerSGD", "powersgd", _SGD),
    "sign-mean": Method("SignSGD of the fp32 mean", "mean", _SIGN),
    "vote": Method("SignSGD, majority vote", "vote", _SIGN),
    "vote-relative": Method("SignSGD, majority vote, relative dither", "vote", _SIGN | _RELATIVE),
    "ef-sign-two-sided": Method("SGD, EF-SignSGD, two-sided", "ef-sign-two-sided", _SGD),
    "qsgd": Method("SGD, QSGD", "qsgd", _SGD),
    "top-k": Method("SGD, Top-K", "top-k", _SGD),
}


@dataclass(frozen=True)
class Sample:
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


def config_of(key: str, seed: int, ranks: int, epochs: int, subset: int) -> RunConfig:
    """The run of a method."""
    method = METHODS[key]
    return RunConfig(
        model="resnet8",
        subset=subset,
        epochs=epochs,
        warmup=0.05,
        seed=seed,
        reduce=method.reduce,
        workers=None if method.reduce == "mean" else ranks,
        **method.options,
    )


def _arguments(config: RunConfig) -> list[str]:
    """What `signstep train` is to be given for a configuration."""
    defaults = RunConfig().to_dict()
    words = []
    for name, value in config.to_dict().items():
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _sent(network: netns.Network, ranks: int) -> int:
    """Bytes that all ranks' interfaces have sent."""
    return sum(network.bytes_sent(rank) for rank in range(ranks))


def _train(
    network: netns.Network, config: RunConfig, ranks: int, folder: Path, data: Path | None, minutes: float
) -> float:
    """Train a run to its end; bytes that its ranks have sent."""
    before = _sent(network, ranks)
    command = [sys.executable, "-m", "signstep", "train", *_arguments(config), "--out", str(folder), "--device", "cpu"]
    command += [] if data is None else ["--data", str(data)]
    processes = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": _PORT}
            place |= {"MASTER_ADDR": network.address(0), "GLOO_SOCKET_IFNAME": netns.DEVICE}
            # As torchrun sets it, by which a worker knows that it is one.
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


def _sample(key: str, run: runs.Run, sent: float, target: float) -> Sample:
    seconds, to_target = 0.0, None
    for epoch in run.epochs:
        images = epoch["step"] * run.config.batch_size / epoch["epoch"]
        seconds += images / epoch["timing"]["images_per_second"]
        if to_target is None and 100 * epoch["eval_accuracy"] >= target:
            to_target = seconds
    return Sample(key, run.config.seed, seconds, to_target, sent / 1e6, run.final_accuracy)


def run(
    methods: Sequence[str],
    *,
    rate: str,
    ranks: int,
    seeds: int,
    epochs: int,
    subset: int,
    target: float,
    out: Path,
    data: Path | None,
    say: Callable[[str], None],
) -> list[Sample]:
    """Train what is missing, and return all samples.

    Raises:
        BadInput: an unknown method or rate.
        NetworkError: no namespaces to be had.
        BenchError: a run fails.
    """
    if unknown := [key for key in methods if key not in METHODS]:
        raise BadInput(f"--methods {unknown[0]}: expected some of {', '.join(METHODS)}")
    try:
        bits = bits_per_second(rate)
    except ValueError as error:
        raise BadInput(f"--rate {error}") from error
    folder = out / "runs" / f"{rate}-{ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    with netns.Network(ranks) as network:
        network.shape(bits)
        for seed in range(seeds):
            for key in methods:
                config = config_of(key, seed, ranks, epochs, subset)
                record = folder / f"{config.hash}.jsonl"
                kept = folder / f"{config.hash}.json"
                if not kept.exists():
                    say(f"{METHODS[key].label}, seed {seed}: {ranks} ranks at {rate}")
                    # A run that was cut short has lost the count of its bytes.
                    for old in folder.glob(f"{config.hash}.*"):
                        old.unlink()
                    sent = _train(network, config, ranks, folder, data, minutes=30)
                    content = json.dumps({"bytes_per_rank": sent}).encode()
                    write_atomically(kept, lambda file, content=content: file.write(content))  # type: ignore[misc]
                    record.with_suffix(".pt").unlink()
                sent = json.loads(kept.read_text())["bytes_per_rank"]
                samples.append(_sample(key, runs.read_run(record), sent, target))
    return samples


def _mean(values: Sequence[float], digits: int) -> str:
    return stats.with_interval(stats.estimate(values)) if digits == 2 else f"{sum(values) / len(values):.{digits}f}"


def rows(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """The table's lines: means over seeds, of the accuracy with its 95 % interval."""
    lines: list[tuple[str, ...]] = []
    for key in dict.fromkeys(sample.method for sample in samples):
        own = [sample for sample in samples if sample.method == key]
        reached = [sample.to_target for sample in own if sample.to_target is not None]
        to_target = _mean(reached, 1) + ("" if len(reached) == len(own) else f" ({len(reached)} of {len(own)} runs)")
        lines.append(
            (
                METHODS[key].label,
                _mean([sample.seconds for sample in own], 1),
                to_target if reached else "not reached",
                _mean([sample.megabytes for sample in own], 1),
                _mean([sample.accuracy for sample in own], 2),
            )
        )
    return lines


def show(console: Console, samples: Sequence[Sample]) -> None:
    """Print the table."""
    table = Table(*_HEAD, box=rich.box.SIMPLE_HEAD)
    for line in rows(samples):
        table.add_row(*line)
    console.print(table)


def write(samples: Sequence[Sample], out: Path, *, command: str, target: float, rate: str, ranks: int) -> list[Path]:
    """Write bench-train.json and .md."""
    first = runs.read_run(next(iter(sorted((out / "runs" / f"{rate}-{ranks}").glob("*.jsonl")))))
    record = {
        "command": command,
        "environment": first.start["environment"],
        "rate": rate,
        "ranks": ranks,
        "target_accuracy": target,
        "samples": [asdict(sample) for sample in samples],
    }
    lines = [
        f"# CIFAR-10, ResNet-8, {ranks} ranks at {rate}",
        "",
        f"    {command}",
        "",
        f"Target: {target:g} % test accuracy. Means over {len({s.seed for s in samples})} seeds, the accuracy with its "
        "95 % interval. Seconds are of training, with all ranks on the cores of one machine, and the links have no "
        "latency but their own. MB sent per rank.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|---|" + "---:|" * (len(_HEAD) - 1),
        *("| " + " | ".join(line) + " |" for line in rows(samples)),
        "",
    ]
    contents = {f"{NAME}.json": json.dumps(record, indent=1) + "\n", f"{NAME}.md": "\n".join(lines)}
    for name, content in contents.items():
        write_atomically(out / name, lambda file, content=content: file.write(content.encode()))  # type: ignore[misc]
    return [out / name for name in contents]

"""The monitor of a run of the lab: it changes nothing, and survives a stop."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny

from signstep.lab.errors import BadInput
from signstep.lab.training.config import RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.records import read_runs
from signstep.lab.training.watch import Watching
from signstep.monitor.sinks import read

WATCHING = Watching(every=2, micro_batches=8, images=64)


HYBRID: dict[str, Any] = {"optimizer": "hybrid", "lr": 2e-3, "switch": 0.6, "dither": 0.1}


def weights(config: RunConfig, out: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / f"{config.hash}.pt", weights_only=True)["model"]
    return state


def path_of(config: RunConfig, out: Path) -> Path:
    return out / "monitor" / f"{config.hash}.jsonl"


def records(config: RunConfig, out: Path) -> list[dict[str, Any]]:
    return read(path_of(config, out))


def test_a_watched_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = tiny(**HYBRID)
    assert train(config, tmp_path / "bare", device="cpu", progress=False) == "done"
    assert train(config, tmp_path / "watched", device="cpu", progress=False, watching=WATCHING) == "done"
    bare, watched = weights(config, tmp_path / "bare"), weights(config, tmp_path / "watched")
    assert all(torch.equal(bare[name], watched[name]) for name in bare)
    assert list(read_runs(tmp_path / "watched")) == [config.hash]  # records are no runs
    found = records(config, tmp_path / "watched")
    assert [r["step"] for r in found] == [0, 2, 4]
    assert {r["micro_batches"] for r in found} == {8}
    assert [r["calibration"]["groups"][0]["phase"] for r in found] == ["sign", "sign", "sgd"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_records(tmp_path: Path) -> None:
    config = tiny(**HYBRID)
    train(config, tmp_path / "whole", device="cpu", progress=False, watching=WATCHING)
    options: dict[str, Any] = {"device": "cpu", "progress": False, "watching": WATCHING}
    statuses = []
    while statuses[-1:] != ["done"]:
        statuses.append(train(config, tmp_path / "parts", max_minutes=1e-9, **options))
        # As if killed after a record, before the next checkpoint; and while writing one.
        with path_of(config, tmp_path / "parts").open("a") as file:
            file.write('{"step": 999}\n{"step": 1')
    assert len(statuses) == 6
    path = path_of(config, tmp_path / "parts")
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    assert records(config, tmp_path / "parts") == records(config, tmp_path / "whole")


@pytest.mark.slow
def test_two_workers_share_the_micro_batches(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "signstep", "train", "--dataset", "digits", "--subset", "96", "--crop", "1", "--no-flip"]
    command += ["--model", "resnet8", "--width", "0.25", "--epochs", "1", "--batch-size", "32", "--lr", "0.01"]
    command += ["--optimizer", "signsgd", "--vote", "--watch", "2", "--watch-micro-batches", "8"]
    command += ["--out", str(tmp_path), "--device", "cpu"]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    (path,) = (tmp_path / "monitor").glob("*.jsonl")
    assert [(r["step"], r["micro_batches"]) for r in read(path)] == [(0, 8), (2, 8)]
    assert all(r["dither"]["rms"] > 0 for r in read(path))  # of the momentum that the voters have


def test_a_run_that_has_ended_unwatched_is_not_called_watched(tmp_path: Path) -> None:
    config = tiny(**HYBRID)
    train(config, tmp_path, device="cpu", progress=False)
    with pytest.raises(BadInput, match="of a run that has ended: delete it"):
        train(config, tmp_path, device="cpu", progress=False, watching=WATCHING)


@pytest.mark.parametrize(
    ("watching", "said"),
    [
        (Watching(every=0), "every 0 steps: expected at least 1"),
        (Watching(micro_batches=3), "at least 4"),
        (Watching(micro_batches=64), "an image for each"),
        (Watching(micro_batches=8, images=4096), "no more than the 96 of an epoch"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path: Path, watching: Watching, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        train(tiny(**HYBRID), tmp_path, device="cpu", progress=False, watching=watching)

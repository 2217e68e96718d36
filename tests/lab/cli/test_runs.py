"""`signstep runs`: what it says of a folder's records."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from signstep.lab.cli import main
from signstep.lab.training import checkpoint, records
from signstep.lab.training.config import RunConfig


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["runs", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def record(folder: Path, config: RunConfig, accuracies: list[float], end: str | None = None) -> Path:
    """The record of a run whose epochs ended with these accuracies, as shares; 10 steps each."""
    events: list[dict[str, Any]] = [records.start_event(config, 9, {}, torch.device("cpu"), 1)]
    events += [{"event": "epoch", "epoch": i + 1, "eval_accuracy": each} for i, each in enumerate(accuracies)]
    if end is not None:
        events.append({"event": "end", "status": end, "step": 10 * len(accuracies)})
    path = folder / f"{config.hash}.jsonl"
    records.write_events(path, events)
    return path


def test_a_line_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign = RunConfig(optimizer="signsgd", lr=1e-3, epochs=3)
    hybrid = RunConfig(dataset="digits", optimizer="hybrid", switch=0.3, momentum=0.9, dither=0.1, lr=3e-3, epochs=3)
    record(tmp_path, RunConfig(epochs=2, seed=10), [0.5], "diverged")
    record(tmp_path, RunConfig(epochs=2, seed=9), [0.5, 0.51236], "done")
    record(tmp_path, sign, [0.25, 0.5])
    record(tmp_path, hybrid, [])
    record(tmp_path, RunConfig(optimizer="signsgd", lr=1e-2, epochs=3, reduce="vote", workers=2), [0.1, 0.2, 0.3])
    (tmp_path / "other.jsonl").write_text("{}\n")
    with checkpoint.lock(tmp_path / f"{hybrid.hash}.lock", over=lambda: True):
        assert run(str(tmp_path)) == 0
    title, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == f"5 runs in {tmp_path}"
    assert head.split() == ["dataset", "method", "lr", "seed", "epochs", "accuracy", "state", "run"]
    found = [re.split(r"\s{2,}", line.strip())[:-1] for line in lines if line.startswith(("  cifar", "  digits"))]
    assert found == [
        ["cifar10", "sgd", "0.1", "9", "2", "51.24", "finished"],
        ["cifar10", "sgd", "0.1", "10", "2", "diverged at step 10"],
        ["cifar10", "signsgd", "0.001", "0", "3", "50.00", "interrupted in epoch 3"],
        ["cifar10", "signsgd vote", "0.01", "0", "3", "30.00", "interrupted in epoch 3"],
        ["digits", "hybrid dither 0.1 switch 0.3", "0.003", "0", "3", "running in epoch 1"],
    ]
    assert f"{tmp_path / 'other.jsonl'}, line 1: not a line of a run's record" in lines[-1]
    assert list(tmp_path.glob("*.lock")) == []


def test_a_narrow_terminal_gets_whole_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = record(tmp_path, RunConfig(epochs=2), [0.5, 0.5], "done")
    assert run(str(tmp_path)) == 0
    assert path.stem in capsys.readouterr().out


def test_runs_of_another_user_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    path = record(tmp_path, RunConfig(), [0.5])
    path.with_suffix(".lock").touch()
    assert run(str(tmp_path)) == 0
    assert "interrupted in epoch 2" in capsys.readouterr().out


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    (tmp_path / "tune").mkdir()
    record(tmp_path / "tune", RunConfig(), [])
    assert run(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}; there are records in {tmp_path / 'tune'}\n"
    assert run(str(tmp_path / "none")) == 2
    assert "there is no such folder; name the one that signstep train wrote to" in capsys.readouterr().err

"""Reading a run's record: whole, cut short, damaged."""

from pathlib import Path

import pytest
from tiny_runs import tiny

from signstep.lab.training import records as runs
from signstep.lab.training.loop import train


@pytest.fixture
def written(tmp_path: Path) -> Path:
    config = tiny()
    train(config, tmp_path, progress=False)
    return tmp_path / f"{config.hash}.jsonl"


def test_a_line_cut_short_by_a_kill_is_left_out(written: Path) -> None:
    text = written.read_bytes()
    whole = runs.read_run(written)
    lines = text.splitlines(keepends=True)
    for cut in range(len(lines[0]), len(text)):
        written.write_bytes(text[:cut])
        run = runs.read_run(written)
        complete = text[:cut].count(b"\n")
        assert len(run.epochs) == min(complete - 1, 2)
        assert run.end is None
        assert run.epochs == whole.epochs[: len(run.epochs)]
    written.write_bytes(text[: len(lines[0]) - 1])
    with pytest.raises(ValueError, match=r"jsonl, line 1: .*cut short"):
        runs.read_run(written)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, b"{}"),
        (1, b'{"event": "epoch"}'),
        (1, b'{"event": "start", "config": {"colour": 1}}'),
        (1, b'{"event": "start", "config": {"lr": -1}}'),
        (2, b"not json"),
        (2, b"[1]"),
        (2, b'"event"'),
        (3, b"\xff\xfe"),
        (3, b'{"event": "start"}'),
        (3, b'{"event": "end", "status": "done"}'),
    ],
)
def test_a_damaged_line_is_named(written: Path, number: int, line: bytes) -> None:
    lines = written.read_bytes().split(b"\n")
    lines[number - 1] = line
    written.write_bytes(b"\n".join(lines))
    at = number + (line == b'{"event": "end", "status": "done"}')
    with pytest.raises(ValueError, match=rf"{written.name}, line {at}: .*delete the file"):
        runs.read_run(written)
    with pytest.raises(ValueError, match=written.name):
        runs.read_runs(written.parent)


def test_an_empty_record(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: .*empty"):
        runs.read_run(tmp_path / "x.jsonl")
    assert runs.read_runs(tmp_path / "nowhere") == {}


def test_an_unfinished_record_has_no_result(written: Path) -> None:
    written.write_bytes(written.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="not been evaluated yet"):
        _ = runs.read_run(written).result


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        runs.write_events(tmp_path / "x.jsonl", [{"event": "epoch", "train_loss": float("nan")}])
    assert not (tmp_path / "x.jsonl").exists()

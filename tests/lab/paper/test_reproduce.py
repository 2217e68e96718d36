"""Reproduce: which runs it trains, in which order, what it leaves out, and the whole of it on real (small) images."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from signstep.lab.cli import main
from signstep.lab.errors import UserError
from signstep.lab.paper import reproduce as reproducing
from signstep.lab.paper.experiments import OF_THE_PAPER, load, load_all
from signstep.lab.paper.plan import first_seeds, plan
from signstep.lab.paper.reproduce import reproduce
from signstep.lab.paper.tuned import learning_rate
from signstep.lab.training.config import RunConfig
from signstep.lab.training.records import is_done, read_runs

TABLE = load("table1", scale="smoke", datasets=["digits", "mnist"])


class FakeLab:
    """Marks runs as done instead of training them."""

    def __init__(self) -> None:
        self.trained: list[RunConfig] = []
        self.finished: set[str] = set()
        self.says: list[str] = []
        self.answers: dict[str, str] = {}
        self.budget = math.inf

    def train(self, config: RunConfig, out: Path, **options: object) -> str:
        assert out.name == "runs"
        if config.hash in self.answers:
            return self.answers[config.hash]
        if len(self.trained) >= self.budget:
            return "stopped"
        assert config.hash not in self.finished, "trained twice"
        self.trained.append(config)
        self.finished.add(config.hash)
        return "done"

    def reproduce(self, experiments: Any, **options: Any) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reproducing, "train_run", self.train)
            patch.setattr(reproducing, "is_done", lambda path: path.stem in self.finished)
            options = {"seeds": 2, "tuned": {}, **options}
            return reproduce(experiments, Path("results"), say=self.says.append, **options)


def test_seed_0_of_every_row_comes_first() -> None:
    lab = FakeLab()
    assert lab.reproduce([TABLE], seeds=3)
    seeds = [config.seed for config in lab.trained]
    assert seeds == sorted(seeds)
    cells = len(TABLE.rows) * 2
    assert seeds.count(0) == seeds.count(1) == seeds.count(2) == cells
    assert (
        len({(c.dataset, c.to_dict()["optimizer"], c.dither, c.dither_position) for c in lab.trained[:cells]}) == cells
    )
    assert {c.split for c in lab.trained} == {"final"}


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = replace(TABLE, rows=TABLE.rows[:3], datasets=("digits",))
    assert reproduce([few], tmp_path / "two", seeds=1, tuned={}, processes=2)
    printed = capfd.readouterr()
    assert sorted(line.partition(":")[0] for line in printed.out.splitlines() if line.startswith("run ")) == [
        "run 1 of 3",
        "run 2 of 3",
        "run 3 of 3",
    ]
    assert "epoch" not in printed.err
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert reproduce([few], tmp_path / "one", seeds=1, tuned={}, say=lambda line: None)
    finally:
        torch.set_num_threads(threads)
    one, two = (read_runs(tmp_path / name / "runs") for name in ("one", "two"))
    assert len(one) == 3
    assert {key: run.result for key, run in one.items()} == {key: run.result for key, run in two.items()}
    assert reproduce([few], tmp_path / "two", seeds=1, tuned={}, processes=2, say=lambda line: None)


@pytest.mark.slow
def test_a_process_that_fails_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    few = replace(TABLE, rows=TABLE.rows[:1], datasets=("digits",))
    (tmp_path / "runs" / f"{few.rows[0].config('digits').hash}.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="a process that trains has failed"):
        reproduce([few], tmp_path, seeds=1, tuned={}, processes=2)
    assert "is not a readable checkpoint" in capfd.readouterr().err


def test_tuned_learning_rates_are_used_and_the_others_named() -> None:
    tuned = {"digits": {"sgd": {"lr": 0.5}}, "cifar10": {"sgd": {"lr": 7.0}}}
    assert learning_rate(TABLE.row("sgd"), "digits", tuned) == 0.5
    assert learning_rate(TABLE.row("sgd"), "mnist", tuned) == TABLE.row("sgd").lr
    lab = FakeLab()
    lab.reproduce([TABLE], seeds=1, tuned=tuned)
    assert [c.lr for c in lab.trained if c.optimizer == "sgd"] == [0.5, 0.1]
    assert "digits/adam" in lab.says[0]
    assert "mnist/sgd" in lab.says[0]
    assert "digits/sgd" not in lab.says[0]


def test_a_run_that_several_experiments_need_is_trained_once() -> None:
    everything = load_all("all", scale="smoke", recipe="strong", datasets=["cifar100"])
    runs = plan(everything, [0], {})
    assert len(runs) < sum(len(e.rows) for e in everything)
    needed = {row.config("cifar100").hash for e in everything for row in e.rows}
    assert {each.config.hash for each in runs} == needed
    assert [e.name for e in everything] == list(OF_THE_PAPER)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_shards_cover_every_run_exactly_once(count: int) -> None:
    lab = FakeLab()
    results = [lab.reproduce([TABLE], shard=(index, count)) for index in range(count)]
    assert {c.hash for c in lab.trained} == {each.config.hash for each in plan([TABLE], range(2), {})}
    assert len(lab.trained) == len(lab.finished)
    assert results[-1]


def test_it_stops_and_goes_on_without_repeating_a_run() -> None:
    lab = FakeLab()
    lab.budget = 5
    assert not lab.reproduce([TABLE])
    total = len(plan([TABLE], range(2), {}))
    assert lab.says[-1].startswith(f"{total - 5} of {total} runs are left, the next one: ")
    assert lab.says[-1].endswith("The same command goes on with them.")
    lab.budget = math.inf
    assert lab.reproduce([TABLE])
    assert len(lab.trained) == total
    assert not any("nothing to train" in line for line in lab.says)
    assert lab.reproduce([TABLE])
    assert lab.says[-1] == f"nothing to train: all {total} runs have ended before"


def test_no_run_starts_after_the_time_is_up() -> None:
    lab = FakeLab()
    assert not lab.reproduce([TABLE], max_minutes=1e-9)
    assert lab.trained == []


def test_a_busy_run_is_left_to_the_other_process_and_counted_as_missing() -> None:
    lab = FakeLab()
    busy = TABLE.row("adam").config("digits").hash
    lab.answers = {busy: "busy"}
    assert not lab.reproduce([TABLE], seeds=1)
    assert len(lab.trained) == len(TABLE.rows) * 2 - 1
    assert "1 of 14 runs are left" in lab.says[-1]


def test_the_number_of_seeds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="seeds=0: expected at least 1"):
        first_seeds(0)


def test_only_a_record_with_an_end_is_done(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert not is_done(path)
    start = {"event": "start", "hash": "x", "config": RunConfig().to_dict()}
    path.write_text(json.dumps(start) + "\n")
    assert not is_done(path)
    end = {"event": "end", "status": "diverged", "epoch": 1, "step": 3, "eval_accuracy": None, "reason": "loss nan"}
    path.write_text(json.dumps(start) + "\n" + json.dumps(end) + "\n")
    assert is_done(path)


@pytest.mark.slow
def test_sweep_and_reproduce_end_to_end_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def signstep(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--scale", "smoke", "--dataset", "digits", "--out", str(tmp_path)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    folder = tmp_path / "smoke-strong"
    assert "every method is tuned" in signstep("sweep", "fig2", "--trials", "2")
    tuned = json.loads((folder / "tuned.json").read_text())["choices"]["digits"]
    assert set(tuned) == {"sgd", "signsgd", "hybrid"}

    assert "nothing to train: all " in signstep("sweep", "fig2", "--trials", "2")
    said = signstep("reproduce", "fig2", "--seeds", "2")
    assert "not tuned" not in said
    assert f"report: {folder / 'fig2.html'}" in said
    records = {path: path.read_bytes() for path in (folder / "runs").glob("*.jsonl")}
    assert len(records) == 6
    page = (folder / "fig2.html").read_text(encoding="utf-8")
    assert "signstep sweep fig2 --scale smoke --recipe strong --dataset digits --trials 2" in page
    assert "signstep reproduce fig2 --scale smoke --recipe strong --dataset digits --seeds 2" in page
    assert str(tmp_path) not in page
    table = json.loads((folder / "fig2.json").read_text(encoding="utf-8"))
    assert table

    # A second time there is nothing to train, and the reports say the same.
    first = (folder / "fig2.json").read_bytes()
    assert "run 1 of" not in signstep("reproduce", "fig2", "--seeds", "2")
    assert {path: path.read_bytes() for path in (folder / "runs").glob("*.jsonl")} == records
    assert (folder / "fig2.json").read_bytes() == first

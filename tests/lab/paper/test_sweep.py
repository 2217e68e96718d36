"""The sweep with a fake trainer: which trials it makes, which one it chooses, and what it leaves behind."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from signstep.lab.paper import sweep as sweeping
from signstep.lab.paper.experiments import Experiment, grid_point, load
from signstep.lab.paper.sweep import MAX_EXTENSIONS, search, sweep
from signstep.lab.paper.tuned import learning_rate, read_tuned
from signstep.lab.training.config import RunConfig


@dataclass
class FakeRecord:
    """What the sweep reads of a run."""

    result: float
    done: bool = True
    diverged: bool = False
    config: RunConfig = field(default_factory=RunConfig)
    start: Mapping[str, Any] = field(default_factory=dict)  # of no machine, so it says nothing of the time
    epochs: Sequence[Mapping[str, Any]] = ()


class FakeLab:
    """Records made by a function of the configuration instead of a training."""

    def __init__(self, judge: Callable[[RunConfig], FakeRecord]) -> None:
        self.judge = judge
        self.records: dict[str, FakeRecord] = {}
        self.trained: list[RunConfig] = []
        self.says: list[str] = []
        self.refuse: dict[str, str] = {}
        self.budget = math.inf

    def train(self, config: RunConfig, out: Path, **options: object) -> str:
        assert out.name == "tune"
        if config.hash in self.refuse:
            return self.refuse[config.hash]
        if len(self.trained) >= self.budget:
            return "stopped"
        assert config.hash not in self.records, "trained twice"
        self.trained.append(config)
        self.records[config.hash] = self.judge(config)
        return "diverged" if self.records[config.hash].diverged else "done"

    def sweep(self, experiments: list[Experiment], folder: Path, **options: object) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweeping, "train_run", self.train)
            patch.setattr(sweeping, "read_runs", lambda out: self.records)
            return sweep(experiments, folder, say=self.says.append, **options)  # type: ignore[arg-type]


def peak_at(lr: float) -> Callable[[RunConfig], FakeRecord]:
    """Accuracy falls with the distance from `lr` in decades."""
    return lambda config: FakeRecord(90 - 10 * abs(math.log10(config.lr / lr)))


ONE = load("fig2", scale="smoke", datasets=["digits"])
TABLE = load("table1", scale="smoke", datasets=["digits", "mnist"])


def test_a_best_trial_inside_the_grid_ends_the_search(tmp_path: Path) -> None:
    lab = FakeLab(lambda config: FakeRecord(50 - abs(math.log10(config.lr / ONE.row("sgd").lr))))
    experiment = load("fig2", scale="smoke", datasets=["digits"])
    assert experiment.row("sgd").lr == 0.1
    state = search("digits", experiment.row("sgd"), 5, {})
    assert [c.lr for c in state.pending] == [0.01, 0.0316, 0.1, 0.316, 1.0]
    records = {c.hash: lab.judge(c) for c in state.pending}
    over = search("digits", experiment.row("sgd"), 5, records)
    assert not over.pending
    assert (over.best.lr, over.extensions, over.at_edge) == (0.1, 0, False)


@pytest.mark.parametrize(
    ("best", "lrs", "chosen", "extensions", "at_edge"),
    [
        (0.1, [0.01, 0.0316, 0.1, 0.316, 1.0], 0.1, 0, False),
        (1.0, [0.01, 0.0316, 0.1, 0.316, 1.0, 3.16], 1.0, 1, False),
        (3.16, [0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0], 3.16, 2, False),
        (100.0, [0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0], 10.0, 2, True),
        (0.01, [0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0], 0.01, 1, False),
        (1e-5, [0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0], 0.001, 2, True),
    ],
)
def test_a_best_trial_at_the_edge_extends_the_grid(
    tmp_path: Path, best: float, lrs: list[float], chosen: float, extensions: int, at_edge: bool
) -> None:
    lab = FakeLab(peak_at(best))
    assert lab.sweep([ONE], tmp_path)
    assert sorted(c.lr for c in lab.trained if c.optimizer == "sgd") == lrs
    entry = read_tuned(tmp_path)["digits"]["sgd"]
    assert (entry["lr"], entry["extensions"], entry["at_edge"]) == (chosen, extensions, at_edge)
    assert [t["lr"] for t in entry["trials"]] == lrs
    assert len(entry["trials"]) == 5 + extensions
    assert any("still at the grid's edge" in line and ", SGD:" in line for line in lab.says) == at_edge


def test_every_method_has_the_same_number_of_trials_before_extensions(tmp_path: Path) -> None:
    for trials in (1, 2, 3, 4, 5):
        lab = FakeLab(lambda config: FakeRecord(50 + config.seed))
        lab.sweep([TABLE], tmp_path / str(trials), trials=trials)
        for rows in read_tuned(tmp_path / str(trials)).values():
            assert {len(row["trials"]) - row["extensions"] for row in rows.values()} == {trials}
            assert all(row["extensions"] <= MAX_EXTENSIONS for row in rows.values())


def test_ties_go_to_the_smaller_learning_rate(tmp_path: Path) -> None:
    lab = FakeLab(lambda config: FakeRecord(60 if config.lr in (0.0316, 0.1, 0.316) else 10))
    lab.sweep([ONE], tmp_path)
    assert read_tuned(tmp_path)["digits"]["sgd"]["lr"] == 0.0316


def test_a_diverged_trial_is_listed_and_never_preferred(tmp_path: Path) -> None:
    # An untrained net can be below chance: 9 % beats the 10 % that a diverged run counts with.
    lab = FakeLab(
        lambda c: FakeRecord(10, diverged=True) if c.lr >= 0.1 else FakeRecord(9 - abs(math.log10(c.lr / 0.0316)))
    )
    lab.sweep([ONE], tmp_path)
    entry = read_tuned(tmp_path)["digits"]["sgd"]
    assert entry["lr"] == 0.0316
    assert [t["diverged"] for t in entry["trials"]] == [False, False, True, True, True]


def test_a_method_that_always_diverges_ends_with_the_smallest_rate_it_may_try(tmp_path: Path) -> None:
    lab = FakeLab(lambda config: FakeRecord(10, diverged=True))
    assert lab.sweep([ONE], tmp_path)
    entry = read_tuned(tmp_path)["digits"]["sgd"]
    assert (entry["lr"], entry["at_edge"], entry["extensions"]) == (0.001, True, MAX_EXTENSIONS)


def test_only_the_tuning_split_is_ever_trained_on(tmp_path: Path) -> None:
    lab = FakeLab(peak_at(0.01))
    lab.sweep([TABLE], tmp_path)
    assert {c.split for c in lab.trained} == {"tune"}


def test_rows_that_experiments_share_are_tuned_once(tmp_path: Path) -> None:
    alone, together = FakeLab(peak_at(0.01)), FakeLab(peak_at(0.01))
    digits = load("table1", scale="smoke", datasets=["digits"])
    alone.sweep([digits], tmp_path / "a")
    together.sweep([digits, ONE], tmp_path / "b")
    assert [c.hash for c in alone.trained] == [c.hash for c in together.trained]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
def test_shards_cover_every_trial_exactly_once(tmp_path: Path, count: int) -> None:
    whole, split = FakeLab(peak_at(0.05)), FakeLab(peak_at(0.05))
    whole.sweep([TABLE], tmp_path / "whole")
    shares = []
    for index in range(count):
        before = len(split.trained)
        over = split.sweep([TABLE], tmp_path / "split", shard=(index, count))
        shares.append(split.trained[before:])
        assert over == (index >= min(count, 14) - 1)
    hashes = [c.hash for share in shares for c in share]
    assert len(set(hashes)) == len(hashes)
    assert set(hashes) == {c.hash for c in whole.trained}
    assert read_tuned(tmp_path / "split") == read_tuned(tmp_path / "whole")


def test_it_stops_and_goes_on_without_repeating_a_trial(tmp_path: Path) -> None:
    whole, lab = FakeLab(peak_at(0.05)), FakeLab(peak_at(0.05))
    whole.sweep([ONE], tmp_path / "whole")
    calls = 0
    for budget in itertools.count(2, 4):
        lab.budget, calls = budget, calls + 1
        if lab.sweep([ONE], tmp_path / "parts"):
            break
        assert "The same command goes on" in lab.says[-1]
    assert calls > 2
    assert [c.hash for c in lab.trained] == [c.hash for c in whole.trained]
    assert (tmp_path / "parts/tuned.json").read_bytes() == (tmp_path / "whole/tuned.json").read_bytes()


def test_a_row_that_takes_anothers_rate_has_no_trials(tmp_path: Path) -> None:
    experiment = load("state", scale="smoke", datasets=["digits"])
    lab = FakeLab(peak_at(0.001))
    assert lab.sweep([experiment], tmp_path)
    assert {config.state_dtype for config in lab.trained} == {None}
    tuned = read_tuned(tmp_path)
    assert set(tuned["digits"]) == {"signsgd"}
    assert {learning_rate(row, "digits", tuned) for row in experiment.rows} == {0.001}
    assert {learning_rate(row, "digits", {}) for row in experiment.rows} == {3.16e-3}


def test_an_incomplete_sweep_names_what_is_missing_and_keeps_what_is_done(tmp_path: Path) -> None:
    lab = FakeLab(lambda config: FakeRecord(50 - abs(math.log10(config.lr / 0.1))))
    lab.budget = 7
    assert not lab.sweep([ONE], tmp_path)
    assert set(read_tuned(tmp_path)["digits"]) == {"sgd"}
    assert "digits/signsgd (3)" in lab.says[-1]
    assert "digits/hybrid (5)" in lab.says[-1]


def test_no_trial_starts_after_the_time_is_up(tmp_path: Path) -> None:
    lab = FakeLab(peak_at(0.1))
    assert not lab.sweep([ONE], tmp_path, max_minutes=1e-9)
    assert lab.trained == []
    assert read_tuned(tmp_path) == {}


def test_a_trial_that_another_process_has_is_left_to_it(tmp_path: Path) -> None:
    lab = FakeLab(peak_at(0.1))
    busy = search("digits", ONE.row("sgd"), 5, {}).pending[2]
    lab.refuse = {busy.hash: "busy"}
    assert not lab.sweep([ONE], tmp_path)
    assert "digits/sgd (1)" in lab.says[-1]
    assert set(read_tuned(tmp_path)["digits"]) == {"signsgd", "hybrid"}
    lab.refuse = {}
    assert lab.sweep([ONE], tmp_path)


def test_an_unfinished_record_is_no_trial(tmp_path: Path) -> None:
    pending = search("digits", ONE.row("sgd"), 3, {}).pending
    records = {c.hash: FakeRecord(99, done=False) for c in pending}
    assert search("digits", ONE.row("sgd"), 3, records).pending == pending


def test_a_sweep_keeps_the_choices_of_others(tmp_path: Path) -> None:
    FakeLab(peak_at(0.1)).sweep([ONE], tmp_path)
    before = read_tuned(tmp_path)["digits"]
    FakeLab(peak_at(0.01)).sweep([load("fig1", scale="smoke", datasets=["mnist"])], tmp_path)
    after = read_tuned(tmp_path)
    assert set(after) == {"digits", "mnist"}
    assert after["digits"] == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"choices": 3}', '{"choices": {"digits": {"sgd": {}}}}', '{"choices": {"digits": 1}}']
)
def test_a_damaged_tuned_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json: not a file that sweep writes .*; delete it"):
        read_tuned(tmp_path)


def test_the_file_says_how_it_was_made(tmp_path: Path) -> None:
    FakeLab(peak_at(0.1)).sweep([ONE], tmp_path)
    values = json.loads((tmp_path / "tuned.json").read_text())
    assert (values["scale"], values["recipe"], values["epochs"]) == ("smoke", "strong", ONE.tune_epochs)
    assert "held-out" in values["criterion"]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_the_number_of_trials_must_be_positive() -> None:
    with pytest.raises(ValueError, match="trials=0: expected at least 1"):
        search("digits", ONE.row("sgd"), 0, {})


def test_the_grid_never_holds_a_point_twice() -> None:
    points = [grid_point(index) for index in range(-20, 10)]
    assert len(set(points)) == len(points)

"""The Byzantine study: what is in a run's file, what the report says, and that a second call trains nothing again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gang import gang
from signstep.lab.errors import BadInput
from signstep.lab.studies import byzantine
from signstep.lab.studies.byzantine import ByzantineStudy
from signstep.lab.studies.byzantine_report import points, read_runs

SMALL: dict[str, Any] = {
    "dataset": "digits",
    "workers": 8,
    "pool": 128,
    "block": 16,
    "worker_batch": 64,
    "width": 0.25,
    "epochs": 1,
    "seeds": 1,
    "attacks": ("flip",),
    "shares": (25,),
}


@pytest.fixture(autouse=True)
def _one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byzantine, "GRID", {"signsgd": (0.01,), "sgd": (0.5,)})


@pytest.mark.slow
def test_study_is_resumable_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = ByzantineStudy(out=tmp_path, **SMALL)
    assert study.run() == 0
    runs = sorted((tmp_path / "runs").glob("*.json"))
    assert len(runs) == 2 + 2 * 2  # two methods: the rate, honest and attacked
    for path in runs:
        record = json.loads(path.read_text())
        assert record["status"] == "done"
        assert 5 <= record["accuracy"] <= 100
    report = (tmp_path / "byzantine.md").read_text()
    assert "signstep study byzantine --dataset digits" in report
    assert "| vote | 0.01 | sign flip | 2 of 8 |" in report
    assert {p.suffix for p in tmp_path.glob("byzantine.*")} == {".json", ".md", ".png", ".svg"}
    times = [path.stat().st_mtime_ns for path in runs]
    runs[0].unlink()
    capsys.readouterr()
    study.run()
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[1:]] == ["written"] * 4
    assert [path.stat().st_mtime_ns for path in runs[1:]] == times[1:]
    study.run()
    assert capsys.readouterr().out.splitlines()[0] == "nothing to train: all 6 runs have ended before"


def test_accuracies_are_by_seed_whatever_the_files_are_called() -> None:
    def record(seed: int) -> dict[str, Any]:
        config = {"split": "final", "optimizer": "sgd", "lr": 0.1, "seed": seed}
        case = {"config": config, "real": False, "attack": "", "attackers": 0, "workers": 8}
        return {"case": case, "status": "done", "accuracy": 10.0 * seed}

    (point,) = points({"c": record(1), "a": record(2), "b": record(0)}, "final")
    assert (point.seeds, point.accuracies) == ((0, 1, 2), (0.0, 10.0, 20.0))


def test_a_run_is_named_by_all_that_changes_it() -> None:
    cases = ByzantineStudy(**SMALL | {"seeds": 2}).simulated_runs(_Scores())
    keys = {case.key: case for case in cases}
    assert len(keys) == 10
    others = ByzantineStudy(**SMALL | {"worker_batch": 32}).simulated_runs(_Scores())
    assert not keys.keys() & {case.key for case in others}


class _Scores(dict[str, Any]):
    def __missing__(self, key: str) -> dict[str, float]:
        return {"accuracy": 50.0}


def test_worker_batch_must_be_made_of_blocks() -> None:
    with pytest.raises(BadInput, match="expected multiples of block=16"):
        list(ByzantineStudy(**SMALL | {"worker_batch": 100}).simulated_runs({}))


def _real(out: Path) -> None:
    byzantine.GRID = {"signsgd": (0.01,), "sgd": (0.5,)}  # type: ignore[misc]
    ByzantineStudy(out=out, **SMALL | {"attacks": ("flip-10",), "seeds": 1}).run()
    dist.barrier()


@pytest.mark.slow
def test_study_in_real_processes(tmp_path: Path) -> None:
    gang(2).run(_real, tmp_path)
    final = points(read_runs(tmp_path / "runs"), "final")
    assert [(p.real, p.method, p.attack, p.attackers, p.workers) for p in final] == [
        (True, "mean", "", 0, 2),
        (True, "mean", "flip-10", 1, 2),
        (True, "vote", "", 0, 2),
        (True, "vote", "flip-10", 1, 2),
    ]
    assert all(5 <= p.accuracies[0] <= 100 for p in final)
    written = (tmp_path / "byzantine.md").read_text()
    assert "## Real processes" in written
    assert "- `torchrun --nproc-per-node 2 -m signstep study byzantine" in written

"""The studies of slow links: the frontier, attackers of local votes, and workers' momenta."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signstep.distributed import SimulatedVote
from signstep.lab.errors import BadInput
from signstep.lab.studies import frontier_report, momenta
from signstep.lab.studies.byzantine_local import LocalByzantineStudy
from signstep.lab.studies.frontier import FrontierStudy
from signstep.lab.studies.frontier_ways import FAMILIES, PEER, WAYS, Workload
from signstep.lab.studies.momenta import MomentaStudy
from signstep.lab.training.config import RunConfig
from signstep.lab.training.records import write_events
from signstep.optim import SignSGD

LOAD = Workload("bible", 20_000, 4)


def record(config: RunConfig, out: Path, result: float | None) -> None:
    """A run that nobody has trained; None: it has diverged."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    environment = {"cpu": "A CPU", "torch": "2.13.0", "signstep": "0.1.0", "git": None}
    events: list[dict[str, Any]] = [
        {"event": "start", "hash": config.hash, "config": config.to_dict(), "environment": environment}
    ]
    if result is not None:
        events.append(
            {"event": "epoch", "epoch": 1, "step": 39, "eval_loss": result * math.log(2), "eval_accuracy": 0.5,
             "timing": {"seconds": 1.0, "sequences_per_second": 100.0}}
        )  # fmt: skip
    status = "diverged" if result is None else "done"
    events.append({"event": "end", "status": status, "epoch": 1, "step": 39})
    write_events(out / "runs" / f"{config.hash}.jsonl", events)


def test_every_family_has_as_many_trials() -> None:
    assert len({len(family.trials) for family in FAMILIES.values()}) == 1
    assert {way.family for way in WAYS.values()} <= FAMILIES.keys()
    hashes = [LOAD.trial(name, trial).hash for name, family in FAMILIES.items() for trial in family.trials]
    finals = [LOAD.final(key, FAMILIES[way.family].trials[0], seed=1).hash for key, way in WAYS.items()]
    assert len(set(hashes + finals)) == len(hashes) + len(finals)


def test_local_votes_send_a_thousandth_of_ddp() -> None:
    ddp = WAYS[PEER].payload(LOAD.gradients, 4)
    assert ddp == 6 * LOAD.gradients.parameters
    assert 950 < ddp / WAYS["local-vote-32"].payload(LOAD.gradients, 4) < 1024


def test_report_takes_the_best_trial_and_compares_seed_by_seed(tmp_path: Path) -> None:
    for family in ("AdamW, mean", "local vote"):
        for i, trial in enumerate(FAMILIES[family].trials):
            record(LOAD.trial(family, trial), tmp_path, None if i == 0 else 3.0 + abs(i - 2))
    assert frontier_report.best_trial(tmp_path / "runs", LOAD, "local vote") == FAMILIES["local vote"].trials[2]
    for key, results in ((PEER, (3.1, 3.2, 3.3)), ("local-vote-32", (3.4, 3.6, 3.5))):
        for seed, result in enumerate(results):
            record(LOAD.final(key, FAMILIES[WAYS[key].family].trials[2], seed), tmp_path, result)
    (tmp_path / "links").mkdir()
    timed = {"link": "10mbit/50ms", "ways": {PEER: {"seconds_per_step": 1.5}}}
    (tmp_path / "links" / "10mbit-50ms.json").write_text(json.dumps(timed))
    study = FrontierStudy(out=tmp_path, subset=20_000)
    assert study.run() == 0
    page = (tmp_path / "frontier.md").read_text()
    assert "| DDP, fp32 | 3.200 ± 0.248 | 3 |" in page
    assert "| local vote, H = 32 | 3.500 ± 0.248 | 3 | +0.300 ±" in page
    assert "1500" in page
    assert "lr 0.00316 outer_lr 0.5 outer_momentum 0: 3.000" in page
    assert {p.name for p in tmp_path.glob("*.png")} == {"frontier-bytes.png", "frontier-10mbit-50ms.png"}
    with pytest.raises(BadInput, match="--ways nothing: expected some of ddp"):
        FrontierStudy(out=tmp_path, ways=("nothing",)).run()
    with pytest.raises(BadInput, match="no run has ended"):
        FrontierStudy(out=tmp_path / "empty").run()


def test_local_votes_hold_against_attackers_that_a_mean_does_not(tmp_path: Path) -> None:
    study = LocalByzantineStudy(out=tmp_path, workers=7, shares=(40,), rounds=6, every=6, seeds=1)
    assert study.run() == 0
    cells = json.loads((tmp_path / "byzantine-local.json").read_text())["cells"]
    found = {(c["method"], c["attack"]): c["accuracies"][0] for c in cells}
    assert found["local vote", ""] > 60
    assert found["local vote", "flip-10"] > 60
    assert found["mean of the ways", ""] > 60
    assert found["mean of the ways", "flip-10"] < 40


@given(size=st.integers(1, 3000), seed=st.integers(0, 20))
def test_momenta_become_their_mean_but_for_rounding(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(size, 1, bias=False)
    vote = SimulatedVote(model, SignSGD(model.parameters(), lr=0.1), 3)
    vote.vote([{"weight": torch.randn(1, size, generator=generator)} for _ in range(3)])
    before = [worker.state["weight"]["exp_avg"].clone() for worker in vote.workers]
    momenta._average(vote.workers)
    largest = max(float(x.abs().max()) for x in before)
    for worker in vote.workers:
        off = worker.state["weight"]["exp_avg"] - torch.stack(before).mean(dim=0)
        assert float(off.abs().max()) <= 2 * largest / 254 * 1.001
    assert abs(momenta._mean_cosine(vote.workers) - 1) < 1e-4


def test_momenta_study_is_resumable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "words.txt"
    text.write_text("in the beginning was the word, and the word was with all\n" * 200)
    study = MomentaStudy(out=tmp_path, data=text, dataset="text", workers=2, periods=(0, 3), subset=3000, seeds=1)
    assert study.run() == 0
    assert capsys.readouterr().out.count("period") == 4
    assert study.run() == 0
    assert "period" not in capsys.readouterr().out
    cells = json.loads((tmp_path / "momenta.json").read_text())["cells"]
    assert [cell["period"] for cell in cells] == [0, 3, 0, 3]
    assert all(-1 <= cell["cosine"] <= 1 for cell in cells)
    assert cells[1]["bytes_per_parameter"] > cells[0]["bytes_per_parameter"] == 0.125

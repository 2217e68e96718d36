"""`signstep study monitor`: trained, resumed, drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from signstep.lab.errors import BadInput
from signstep.lab.studies import monitored
from signstep.lab.studies.monitored import Options


@pytest.mark.slow
def test_study_trains_what_is_missing_and_draws(tmp_path: Path) -> None:
    options = Options(
        datasets=("digits",),
        methods=("signsgd", "pre-relative", "hybrid"),
        micro_batches=24,
        micro_batch_size=8,
        every=30,
        tuned=tmp_path,
        out=tmp_path / "out",
    )
    said: list[str] = []
    for index in (0, 1):
        monitored.run(options, shard=(index, 2), command="signstep study monitor", say=said.append)
    assert [line for line in said if "missing" in line] == ["1 of 3 runs are still missing: no figures yet"]
    out = options.out
    for name in ("snr", "violations", "dither", "noise-signsgd", "noise-hybrid", "rates-signsgd"):
        ElementTree.fromstring((out / f"digits-{name}.svg").read_text())
    assert "digits (8 × 8), SignSGD-M" in (out / "digits-signsgd" / "monitor.html").read_text()
    table = (out / "digits.md").read_text()
    assert "| SignSGD-M | 0.00316 |" in table
    assert "| hybrid |" in table
    records = next(each for each in monitored.planned(options) if each.method == "hybrid").records
    assert [r["step"] for r in records] == [0, 30, 60]
    phases = [r["calibration"]["groups"][0]["phase"] for r in records]
    assert phases == ["sign", "sgd", "sgd"]

    said.clear()
    monitored.run(options, shard=(0, 1), command="signstep study monitor", say=said.append)
    assert said == []  # nothing to train
    with pytest.raises(BadInput, match="was watched at steps"):
        monitored.run(replace(options, every=20), shard=(0, 1), command="", say=said.append)


def test_rates_are_the_tuned_ones() -> None:
    tuned = Path(__file__).parents[3] / "results" / "cpu-strong"
    chosen = {(w.dataset, w.method): w.config for w in monitored.planned(Options(tuned=tuned))}
    assert chosen["cifar10", "signsgd"].lr == 0.001
    assert chosen["cifar100", "sgd"].lr == 0.316
    assert chosen["cifar10", "pre-relative"].dither_scale == "relative"
    with pytest.raises(BadInput, match="method 'adam': expected one of sgd"):
        list(monitored.planned(Options(methods=("adam",))))


def test_the_command_names_what_differs() -> None:
    assert monitored.command_of(Options()) == "signstep study monitor"
    named = monitored.command_of(Options(datasets=("digits",), every=7))
    assert named == "signstep study monitor --datasets digits --every 7"

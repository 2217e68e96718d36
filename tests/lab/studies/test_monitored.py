"""`signstep study monitor`: trained, resumed, drawn."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from signstep.lab.errors import BadInput
from signstep.lab.studies.monitored import MonitorStudy


@pytest.mark.slow
def test_study_trains_what_is_missing_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = MonitorStudy(
        datasets=("digits",),
        methods=("signsgd", "pre-relative", "hybrid"),
        micro_batches=24,
        micro_batch_size=8,
        every=30,
        tuned=tmp_path,
        out=tmp_path / "out",
    )
    for shard in ("0/2", "1/2"):
        assert replace(study, shard=shard).run() == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "missing" in line] == ["1 of 3 runs are still missing: no figures yet"]
    out = study.out
    for name in ("snr", "violations", "dither", "noise-signsgd", "noise-hybrid", "rates-signsgd"):
        ElementTree.fromstring((out / f"digits-{name}.svg").read_text())
    assert "digits (8 × 8), SignSGD-M" in (out / "digits-signsgd" / "monitor.html").read_text()
    table = (out / "digits.md").read_text()
    assert "| SignSGD-M | 0.00316 |" in table
    assert "| hybrid |" in table
    records = next(each for each in study.planned() if each.method == "hybrid").records
    assert [r["step"] for r in records] == [0, 30, 60]
    phases = [r["calibration"]["groups"][0]["phase"] for r in records]
    assert phases == ["sign", "sgd", "sgd"]

    study.run()
    assert capsys.readouterr().out == f"nothing to train: all 3 runs have ended before\nwritten: {out}\n"
    with pytest.raises(BadInput, match="was watched at steps"):
        replace(study, every=20).run()


def test_rates_are_the_tuned_ones() -> None:
    tuned = Path(__file__).parents[3] / "results" / "cpu-strong"
    chosen = {(w.dataset, w.method): w.config for w in MonitorStudy(tuned=tuned).planned()}
    assert chosen["cifar10", "signsgd"].lr == 0.001
    assert chosen["cifar100", "sgd"].lr == 0.316
    assert chosen["cifar10", "pre-relative"].dither_scale == "relative"
    with pytest.raises(BadInput, match="method 'adam': expected one of sgd"):
        list(MonitorStudy(methods=("adam",)).planned())


def test_the_command_names_what_differs() -> None:
    assert MonitorStudy().command == "signstep study monitor"
    assert MonitorStudy(datasets=("digits",), every=7).command == "signstep study monitor --datasets digits --every 7"

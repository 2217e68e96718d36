"""The study of the vote curve: its files, and that measured votes are those of the formula."""

import json
from pathlib import Path

import pytest

from signstep.lab.studies import vote_curve


def test_measured_votes_are_those_of_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote_curve, "WORKERS", (1, 4, 15))
    assert vote_curve.VoteCurveStudy(out=tmp_path, elements=4000, steps=2).run() == 0
    record = json.loads((tmp_path / "vote-curve.json").read_text())
    assert [c["workers"] for c in record["curves"]] == [1, 4, 15] * 2
    for curve in record["curves"]:
        assert curve["worst"] < 5
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png", ".svg"}

"""Experiments on a text: fewer bits per byte are better, from the sweep to the report's words."""

import json
import math
from pathlib import Path

import pytest

from signstep.lab.cli import main
from signstep.lab.paper import charts
from signstep.lab.paper.experiments import Experiment, Row, load
from signstep.lab.paper.report import to_dict, write
from signstep.lab.paper.results import Results
from signstep.lab.paper.sentences import Sentences
from signstep.lab.paper.sweep import search
from signstep.lab.training.records import Run, read_runs

LANGUAGE = load("language", scale="cpu2", rows=["adam", "sgd", "signsgd"])
TUNED = {"bible": {row.key: {"lr": row.lr, "trials": [], "extensions": 0, "at_edge": False} for row in LANGUAGE.rows}}


def run(row: Row, seed: int, bits: float | None) -> Run:
    """A finished run that ends at so many bits per byte; None: it diverged."""
    config = row.config("bible", seed)
    start = {"event": "start", "config": config.to_dict(), "train_bytes": 3_964_028, "environment": {}}
    epochs = [
        {"event": "epoch", "epoch": epoch, "eval_loss": math.log(2) * each, "eval_accuracy": 0.5}
        for epoch, each in enumerate([4.0, bits or 0.0], 1)
    ]
    if bits is None:
        return Run(config, start, epochs[:1], {"event": "end", "status": "diverged", "epoch": 2})
    return Run(config, start, epochs, {"event": "end", "status": "done", "epoch": 2})


def results(experiment: Experiment = LANGUAGE, **bits: list[float | None]) -> Results:
    runs = [run(experiment.row(key), seed, each) for key, values in bits.items() for seed, each in enumerate(values)]
    return Results(experiment, {each.config.hash: each for each in runs}, TUNED)


ADAM, SGD, SIGN = [2.0, 2.1, 2.2], [2.5, 2.7, 2.6], [2.2004, 2.3, 2.1]


def test_the_lowest_is_the_best_and_beats_the_others() -> None:
    found = results(adam=ADAM, sgd=SGD, signsgd=SIGN)
    best = {key: found.is_best(cell) for (key, _), cell in found.cells.items()}
    assert not any(best.values())  # not told from SignSGD-M
    decided = results(adam=ADAM, sgd=SGD)
    assert [decided.is_best(cell) for (key, _), cell in decided.cells.items() if key in ("adam", "sgd")] == [
        True,
        False,
    ]
    assert found.cells["adam", "bible"].text == "2.100 ± 0.248"
    assert [line.method for line, _ in charts.by_result(found, "bible")] == ["adam", "signsgd", "sgd"]
    difference = found.difference("bible", LANGUAGE.row("adam"), LANGUAGE.row("sgd"))
    assert difference is not None
    assert difference.estimate is not None
    assert difference.estimate.mean == pytest.approx(-0.5)
    words = Sentences(found)
    assert words.headline == "On King James Bible, AdamW beats SGD by 0.500 ± 0.248 bits per byte."
    assert "GPT, 3,964,028 training bytes, 2 epochs, 3 seeds" in words.scope
    assert any("the tenth of the text before the last" in guess for guess in words.guesses)


def test_an_undecided_outcome_and_one_that_seeds_contradict() -> None:
    close = results(adam=ADAM, signsgd=SIGN)
    assert "is lowest, but 3 seeds do not tell it from Sign (−0.100 ± 0." in Sentences(close).headline
    alone = results(sgd=SGD[:1], signsgd=SIGN[:1])
    assert "2 methods reach 2.200 to 2.500 bits per byte, which ranks none" in Sentences(alone).headline


def test_a_diverged_seed_counts_with_eight_bits() -> None:
    found = results(adam=[2.0, None, 2.0], sgd=SGD, signsgd=[None, None, None])
    assert found.cells["adam", "bible"].results[1] == 8.0
    assert found.cells["signsgd", "bible"].estimate is None
    assert any("counted with the bits per byte of chance" in gap for gap in Sentences(found).gaps)
    assert "SGD" in Sentences(found).headline


def test_the_report_speaks_of_bits(tmp_path: Path) -> None:
    found = results(adam=ADAM, sgd=SGD, signsgd=SIGN)
    page = write(LANGUAGE, {each.config.hash: each for each in found.finished}, tmp_path, tuned=TUNED, commands=[])
    table, html = page.with_suffix(".md").read_text(), page.read_text()
    assert "## Final test bits per byte\n\nBits per byte, fewer are better, mean over seeds" in table
    assert "| 2.100 ± 0.248 (3) |" in table
    assert "| −0.500 ± 0.248 | 3 |" in table
    for text in (table, html, *(path.read_text() for path in tmp_path.glob("*.svg"))):
        assert "accuracy" not in text.lower()
        assert "Percent" not in text
    cell = to_dict(found, [])["rows"][0]["cells"]["bible"]
    assert cell["bits_per_byte_by_seed"]["1"] == pytest.approx(2.1)


def test_the_sweep_chooses_the_fewest_bits() -> None:
    row = LANGUAGE.row("adam")
    configs = search("bible", row, 3, {}).pending
    records = {}
    for config, bits in zip(configs, (2.4, 2.2, None), strict=True):
        made = run(row, 0, bits)
        records[config.hash] = Run(config, made.start, made.epochs, made.end)
    over = search("bible", row, 3, records)
    assert not over.pending
    assert over.best.lr == configs[1].lr
    assert [trial.result for trial in over.trials] == pytest.approx([2.4, 2.2, 8.0])


def code(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


@pytest.mark.slow
def test_from_the_sweep_to_the_report_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "book.txt", tmp_path / "other.txt"
    file.write_bytes(b"To be, or not to be, that is the question. " * 200)
    other.write_bytes(file.read_bytes().upper())
    words = ["language", "--scale", "smoke", "--dataset", "text", "--rows", "sgd", "lion", "--out", str(tmp_path)]
    trained = [*words, "--device", "cpu", "--data"]
    for shard in ("0/2", "1/2"):
        assert code("sweep", *trained, str(file), "--trials", "1", "--shard", shard) == 0
    assert code("reproduce", *trained, str(file), "--seeds", "1") == 0
    assert code("report", *words, "--seeds", "1") == 0
    folder = tmp_path / "smoke-strong"
    tuned = json.loads((folder / "tuned.json").read_text())
    assert tuned["text"]["criterion"].startswith("last epoch's bits per byte")
    assert {2.0 < choice["bits_per_byte"] < 8.0 for choice in tuned["choices"]["text"].values()} == {True}
    assert all(each.done for each in read_runs(folder / "runs").values())
    assert "fewer are better" in (folder / "language.md").read_text()
    capsys.readouterr()
    assert code("reproduce", *trained, str(other), "--seeds", "1") not in (0, None)
    assert "has begun with another text" in capsys.readouterr().err

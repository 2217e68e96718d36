"""`signstep study dither`: its runs on real digits, what a summed loss amounts to, what its report says of a map."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from signstep.lab.studies import dither_map
from signstep.lab.studies.dither_map import CONDITIONS, DitherStudy
from signstep.lab.studies.dither_report import MARGIN, DitherMap, noise_words, write_report
from signstep.lab.studies.dither_training import DitherRun, train_dithered

DECOUPLED, COUPLED = CONDITIONS[:2]
SMALL = DitherStudy(dataset="digits", subset=512, width=0.25)


def small_run(kind: str, size: float, condition: dither_map.Condition = DECOUPLED) -> DitherRun:
    return SMALL.cell(condition, kind, size, 1e-2, seed=0, split="tune")


def test_a_summed_loss_is_an_averaged_one_with_a_smaller_variance() -> None:
    """Under decoupled decay, and exactly: a batch of 128 images multiplies momentum and noise by a power of two."""
    averaged = small_run("absolute", 1e-4)
    batch = averaged.config.batch_size
    summed = dataclasses.replace(small_run("absolute", 1e-4 * batch**2), loss="sum")
    assert batch == 128
    assert train_dithered(summed, None) == train_dithered(averaged, None)
    assert train_dithered(dataclasses.replace(averaged, loss="sum"), None) != train_dithered(averaged, None)


def test_coupled_decay_is_added_to_the_gradient_of_the_sum() -> None:
    run = small_run("clean", 0.0, COUPLED)
    assert run.config.weight_decay == 0
    strong = dataclasses.replace(run, coupled_decay=1.0)
    summed = dataclasses.replace(strong, loss="sum")
    weaker = dataclasses.replace(strong, coupled_decay=1 / run.config.batch_size)
    assert train_dithered(summed, None) == train_dithered(weaker, None) != train_dithered(strong, None)


def test_runs_name_their_files_by_what_changes_their_numbers() -> None:
    run = small_run("absolute", 1e-4)
    keys = {
        run.key,
        small_run("relative", 1.0).key,
        small_run("absolute", 1e-4, COUPLED).key,
        dataclasses.replace(run, loss="sum").key,
        dataclasses.replace(run, coupled_decay=1e-3).key,
    }
    assert len(keys) == 5


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dither_map, "NOISES", (("clean", 0.0), ("absolute", 1e-6), ("relative", 1.0)))
    monkeypatch.setattr(dither_map, "LRS", (1e-3, 1e-2))
    study = dataclasses.replace(SMALL, conditions=("decoupled",), seeds=2, out=tmp_path)
    assert dataclasses.replace(study, max_minutes=1e-9).run() == 0
    assert not list((tmp_path / "runs").iterdir())
    assert dataclasses.replace(study, shard="0/2").run() == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3  # half of the map, and no finals before it is whole
    assert study.run() == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert len(made) == 6 + 3 * 2
    record = json.loads((tmp_path / "dither.json").read_text())
    (found,) = record["maps"]
    assert {final["noise"] for final in found["finals"]} == {"clean", "absolute", "relative"}
    assert all(len(final["accuracies"]) == 2 for final in found["finals"])
    assert "σ = 1 rms(m)" in (tmp_path / "dither.md").read_text()
    assert (tmp_path / "dither.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert study.run() == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()} == made
    assert "lr" not in capsys.readouterr().out  # nothing was trained


def made_map(**cells: float) -> DitherMap:
    """A map whose clean step ends at 20 % and, tuned, at 50 %, with these accuracies of noise at the lower rate."""
    found = {("clean", 0.0, 1e-3): 20.0, ("clean", 0.0, 1e-2): 50.0}
    found |= {("absolute", float(name.removeprefix("a")), 1e-3): value for name, value in cells.items()}
    return DitherMap("a condition", found, {}, {})


def test_a_win_is_one_over_the_tuned_step() -> None:
    cells = made_map(a1=50 + MARGIN, a2=49 + MARGIN, a3=20 + MARGIN, a4=19 + MARGIN)
    by_size = {cell[1]: cell for cell in cells.cells if cell[0] == "absolute"}
    assert [cells.wins(by_size[size]) for size in (1.0, 2.0, 3.0, 4.0)] == [True, False, False, False]
    assert [cells.seems_to_win(by_size[size]) for size in (1.0, 2.0, 3.0, 4.0)] == [False, True, True, False]
    assert not any(cells.wins(c) or cells.seems_to_win(c) for c in cells.cells if c[0] == "clean")


def test_the_report_compares_seed_by_seed_and_corrects(tmp_path: Path) -> None:
    finals = {"clean": {0: 50.0, 1: 52.0, 2: 51.0}, "absolute": {0: 51.0, 1: 53.1, 2: 52.0}, "relative": {0: 50.0}}
    best = {"clean": (0.0, 1e-2), "absolute": (1e-6, 1e-2), "relative": (1.0, 1e-2)}
    whole = DitherMap("decay", {("clean", 0.0, 1e-2): 50.0}, best, finals)
    write_report(tmp_path, "signstep study dither", [whole, DitherMap("nothing yet", {}, {}, {})])
    gains = json.loads((tmp_path / "dither.json").read_text())["maps"][0]["gains"]
    assert gains["absolute"]["mean"] == pytest.approx(31 / 30)
    assert gains["relative"] is None  # one seed
    text = (tmp_path / "dither.md").read_text()
    assert "| decay | absolute | α = 1e-06 | 0.01 | 52.03 ± 2.61 | 3 | +1.03 ± 0.14 |" in text


def test_noises_have_names() -> None:
    assert [noise_words(*noise) for noise in (("clean", 0.0), ("absolute", 1e-8))] == ["no dither", "α = 1e-08"]

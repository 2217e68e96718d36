"""The report: its numbers against direct computation, what it says, and odd inputs."""

import dataclasses
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import RECORDED, accuracies, by_hash, full, plain, run, table

from signstep.lab.output import figures
from signstep.lab.paper import charts, experiments
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.report import to_dict, write
from signstep.lab.paper.results import Results
from signstep.lab.paper.sentences import Sentences
from signstep.lab.paper.settings import environment as report_environment
from signstep.lab.training.records import Run


@pytest.fixture(autouse=True)
def _no_pixels(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reports that these tests write themselves nobody looks at the PNGs, which take most of the time."""
    monkeypatch.setattr(figures, "png", lambda figure: b"")


def test_files_and_names(page: Path, table1: Experiment) -> None:
    expected = {f"table1.{kind}" for kind in ("html", "md", "json")} | {
        f"table1-{dataset}-{kind}.{ending}"
        for dataset in table1.datasets
        for kind in ("curves", "dots", "differences")
        for ending in ("png", "svg")
    }
    assert {path.name for path in page.parent.iterdir()} == expected
    assert page.stat().st_size < 2_000_000
    for path in page.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_table_against_direct_computation(tmp_path: Path, table1: Experiment) -> None:
    values = accuracies(table1, 4)
    page = write(table1, full(table1, values), tmp_path, tuned=None, commands=[])
    rows = table(page)
    found = json.loads((tmp_path / "table1.json").read_text(encoding="utf-8"))
    cells = {(row["key"], d): cell for row in found["rows"] for d, cell in row["cells"].items()}
    for row in table1.rows:
        for column, dataset in enumerate(table1.datasets):
            sample = [values[row.key, dataset, seed] for seed in range(4)]
            mean, half = np.mean(sample), scipy.stats.t.ppf(0.975, 3) * np.std(sample, ddof=1) / 2
            here, n, paper, difference = (plain(text) for _, text in rows[row.key][4 * column : 4 * column + 4])
            assert [float(part) for part in here.split("±")] == pytest.approx([mean, half], abs=0.0051)
            assert n == "4"
            cell = cells[row.key, dataset]
            assert (cell["mean"], cell["low"], cell["high"]) == pytest.approx((mean, mean - half, mean + half))
            assert [cell["accuracy_by_seed"][str(seed)] for seed in range(4)] == pytest.approx(sample)
            if dataset in row.paper:
                assert float(paper) == row.paper[dataset]
                assert float(difference) == pytest.approx(mean - row.paper[dataset], abs=0.0051)
            else:
                assert (paper, difference, cell["paper"]) == ("—", "—", None)
    for each in found["differences"]:
        dataset = each["dataset"]
        pairs = [[values[each[kind], dataset, seed] for seed in range(4)] for kind in ("row", "baseline")]
        interval = scipy.stats.ttest_rel(*pairs).confidence_interval(0.95)
        assert (each["low"], each["high"]) == pytest.approx((interval.low, interval.high))
        assert each["p"] == pytest.approx(scipy.stats.ttest_rel(*pairs).pvalue)
        assert each["p"] <= each["p_holm"] <= min(1, 30 * each["p"])
        numbers = [table1.row(each[kind]).paper.get(dataset) for kind in ("row", "baseline")]
        if None in numbers:
            assert each["paper"] is each["verdict"] is None
        elif each["p_holm"] >= 0.05:
            assert each["verdict"] == "undecided"
        else:
            agree = (numbers[0] - numbers[1] > 0) == (interval.low > 0)  # type: ignore[operator]
            assert each["verdict"] == ("same sign" if agree else "opposite sign")
    assert len(found["differences"]) == 2 * (6 + 5 + 4)
    assert found["gaps"] == []


def test_best_of_each_column_is_bold(tmp_path: Path) -> None:
    experiment = experiments.load("fig2", scale="cpu")
    means = {"sgd": 70.0, "signsgd": 72.0, "hybrid": 71.0}
    for seeds, spread in ((1, 0.0), (3, 0.1), (3, 2.0)):
        bold = {"72.00"} if spread == 0.1 else set()
        values = {(key, "cifar10", seed): mean + (seed - 1) * spread * (key == "hybrid")
                  for key, mean in means.items() for seed in range(seeds)}  # fmt: skip
        page = write(experiment, full(experiment, values), tmp_path, tuned=None, commands=[])
        assert set(re.findall(r"<strong>([\d.]+)", page.read_text(encoding="utf-8"))) == {"92.18"} | bold
        assert ("**72.00 ± 0.00** (3)" in (tmp_path / "fig2.md").read_text(encoding="utf-8")) is bool(bold)


def test_gaps_are_said(page: Path) -> None:
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    gaps = "\n".join(found["gaps"])
    assert "SignSGD-M + pre-noise (α = 0.5) on CIFAR-100: 1 of 3 diverged (seed 1)" in gaps
    assert "SignSGD-M + post-noise (α = 0.1) on CIFAR-10: seed 2 missing" in gaps
    assert "at epoch 2 of" in gaps
    assert "edge" in gaps
    cells = {row["key"]: row["cells"] for row in found["rows"]}
    assert cells["pre-0.5"]["cifar100"]["accuracy_by_seed"]["1"] == 1.0  # chance of 100 classes
    assert cells["pre-0.5"]["cifar100"]["n"] == 3
    assert cells["adam"]["cifar100"]["n"] == 2
    text = page.read_text(encoding="utf-8")
    assert "1 run diverged, 2 runs are missing" in text
    assert "1 of 3 diverged" in text
    for command in ("signstep sweep table1 --scale cpu", "# &lt;&amp;&#34;&gt;", "A &lt;fast&gt; CPU"):
        assert command in text


def test_tuned_learning_rates_choose_the_runs(tmp_path: Path) -> None:
    experiment = experiments.load("fig2", scale="smoke")
    sgd = experiment.row("sgd")
    runs = by_hash(run(sgd, "cifar10", 0, 60.0), run(sgd, "cifar10", 0, 99.0, lr=0.0123))
    choices = {"cifar10": {"sgd": {"lr": 0.0123, "trials": []}}}
    assert Results(experiment, runs, {}).cells["sgd", "cifar10"].results == pytest.approx({0: 60.0})
    assert Results(experiment, runs, choices).cells["sgd", "cifar10"].results == pytest.approx({0: 99.0})
    tuning = by_hash(Run(sgd.tuning_config("cifar10", sgd.lr), {}, [], {"status": "done"}))
    assert Results(experiment, tuning, {}).seeds == ()


def test_curve_ends_at_the_table_number(page: Path, table1: Experiment) -> None:
    row = table1.row("sgd")
    values = {0: 60.0, 1: None, 2: 64.0}
    results = Results(table1, by_hash(*(run(row, "cifar100", s, v) for s, v in values.items())), {})
    (curve,) = charts.curves(results, "cifar100")
    assert curve.estimates[-1] == results.cells["sgd", "cifar100"].estimate
    assert curve.estimates[-1].mean == pytest.approx((60 + 1 + 64) / 3)
    assert curve.epochs[-1] == row.config("cifar100").epochs
    assert curve.diverged_at == (1,)


def test_all_diverged_has_no_number(tmp_path: Path) -> None:
    experiment = experiments.load("fig2", scale="cpu")
    runs = by_hash(*(run(row, "cifar10", seed, None) for row in experiment.rows for seed in range(3)))
    page = write(experiment, runs, tmp_path, tuned=None, commands=[])
    for cells in table(page).values():
        assert cells[0][1].strip() == "diverged (3 of 3)"
    found = json.loads((tmp_path / "fig2.json").read_text(encoding="utf-8"))
    assert found["headline"] == "On CIFAR-10, every run diverged."
    assert all(row["cells"]["cifar10"]["mean"] is None for row in found["rows"])


def test_one_seed_has_no_interval_anywhere(tmp_path: Path) -> None:
    experiment = experiments.load("fig3", scale="cpu")
    page = write(experiment, full(experiment, accuracies(experiment, 1)), tmp_path, tuned=None, commands=[])
    for cells in table(page).values():
        assert "±" not in cells[0][1]
    found = json.loads((tmp_path / "fig3.json").read_text(encoding="utf-8"))
    assert {each["verdict"] for each in found["differences"]} == {"undecided"}
    assert found["headline"].endswith(
        "ranks none of them: no learning rate was tuned and fewer than 3 seeds are common to all."
    )
    assert not re.search(r"\d ± \d", (tmp_path / "fig3.md").read_text(encoding="utf-8"))


def all_tuned(experiment: Experiment) -> dict[str, dict[str, dict[str, Any]]]:
    choices = {row.key: {"lr": row.lr, "trials": [], "extensions": 0} for row in experiment.rows}
    return dict.fromkeys(experiment.datasets, choices)


@pytest.mark.parametrize(
    ("tuned", "seeds", "reason"),
    [
        (True, 3, ""),
        (False, 3, "no learning rate was tuned"),
        (True, 2, "fewer than 3 seeds are common to all"),
        (False, 2, "no learning rate was tuned and fewer than 3 seeds are common to all"),
    ],
)
def test_the_headline_names_a_winner_only_of_tuned_rates_and_three_seeds(tuned: bool, seeds: int, reason: str) -> None:
    experiment = experiments.load("fig2", scale="demo", datasets=["fashion-mnist"])
    runs = full(experiment, {(row.key, "fashion-mnist", seed): 60.0 + 3 * i + 0.1 * seed * i
                             for i, row in enumerate(experiment.rows) for seed in range(seeds)})  # fmt: skip
    results = Results(experiment, runs, all_tuned(experiment) if tuned else {})
    if reason:
        low, high = "60.00", "66.20" if seeds == 3 else "66.10"
        assert (
            Sentences(results).headline
            == f"On Fashion-MNIST, 3 methods reach {low} to {high} %, which ranks none of them: {reason}."
        )
    else:
        assert Sentences(results).headline.startswith("On Fashion-MNIST, Hybrid beats SGD by 6.20 ±")


@pytest.mark.parametrize(
    ("means", "apart", "verdict"),
    [
        ({"pre-relative": 79.0, "pre-0.1": 50.0}, 2.0, "Use Sign + dither: seeds lie less far"),
        ({"pre-relative": 70.0, "pre-0.1": 79.0}, 2.0, "Use Sign + pre-noise 0.1: seeds lie less far"),
        (
            {"pre-relative": 79.0, "pre-0.1": 77.5},
            2.0,
            "Whether to use Sign + dither or Sign + pre-noise 0.1",
        ),
        (
            {"pre-relative": 79.0, "pre-0.1": 50.0},
            None,
            "Whether to use Sign + dither or Sign + pre-noise 0.1",
        ),
    ],
)
def test_a_lesson_is_drawn_where_two_settings_differ_by_more_than_their_seeds(
    means: dict[str, float], apart: float | None, verdict: str
) -> None:
    experiment = experiments.load("demo", scale="demo")
    assert experiment.lesson is not None
    one = dataclasses.replace(experiment.lesson, remedies={"pre-0.1": "pre-relative"})
    experiment = dataclasses.replace(experiment, lesson=one)
    runs = [
        run(experiment.row(row.key), "fashion-mnist", seed, means.get(row.key, 78.0) + offset)
        for row in experiment.rows
        for seed, offset in enumerate([0.0] if apart is None else [-apart / 2, apart / 2])
    ]
    headline = Sentences(Results(experiment, by_hash(*runs), {})).headline
    first, second, *_ = headline.split("%. ")
    assert first == "On Fashion-MNIST, Sign reaches 78.0 %, SGD 78.0 %, AdamW 78.0 % and Lion 78.0 "
    gains = [f"{means[key] - 78:+.1f}".replace("-", "−") for key in ("pre-relative", "pre-0.1")]
    assert second.startswith(
        f"Sign + dither adds {gains[0]} points to Sign, the paper's Sign + pre-noise 0.1 {gains[1]}. {verdict}"
    )


def test_a_lesson_names_the_rows_that_it_waits_for() -> None:
    experiment = experiments.load("demo", scale="demo")
    runs = by_hash(*(run(row, "fashion-mnist", 0, 70.0) for row in experiment.rows[:2]))
    headline = Sentences(Results(experiment, runs, {})).headline
    assert headline.startswith("On Fashion-MNIST there is no result yet of Sign, Lion, Sign + pre-noise 0.1, ")


def test_one_method_with_fewer_seeds_leaves_the_order_open() -> None:
    experiment = experiments.load("fig2", scale="cpu")
    values = accuracies(experiment, 3)
    del values["signsgd", "cifar10", 1]
    results = Results(experiment, full(experiment, values), all_tuned(experiment))
    assert Sentences(results).headline.endswith("ranks none of them: fewer than 3 seeds are common to all.")


def test_the_recipe_says_whether_rates_were_tuned(tmp_path: Path) -> None:
    experiment = experiments.load("fig2", scale="cpu")
    runs = full(experiment, accuracies(experiment, 1))
    every = all_tuned(experiment)
    some = {"cifar10": {"sgd": every["cifar10"]["sgd"]}}
    chosen, not_tuned = "Learning rates are chosen on a held-out tenth", "The learning rates were not tuned"
    partly = "Not tuned on CIFAR-10, with the preset's learning rate: SignSGD-M and Hybrid (SignSGD-M → SGD)."
    for tuned, words in [(every, {chosen}), (some, {chosen, partly}), (None, {not_tuned})]:
        page = write(experiment, runs, tmp_path, tuned=tuned, commands=[])
        for file in (page, page.with_suffix(".md"), page.with_suffix(".json")):
            text = html.unescape(file.read_text(encoding="utf-8"))
            recipe = text[text.index("What the paper does not say") :] if file.suffix != ".json" else text
            assert {each for each in (chosen, not_tuned, partly) if each in recipe} == words, (file, words)


def test_the_recipe_says_how_many_trials_each_row_had() -> None:
    experiment = experiments.load("fig2", scale="cpu")
    choices = all_tuned(experiment)
    runs = full(experiment, accuracies(experiment, 1))
    for counts, words in (
        ((4, 4, 4), "with the same grid for every method. Each had 4 trials."),
        (
            (4, 5, 4),
            "4 trials: SGD on CIFAR-10 and Hybrid (SignSGD-M → SGD) on CIFAR-10; 5 trials: SignSGD-M on CIFAR-10.",
        ),
    ):
        tuned = {"cifar10": {row.key: {**choices["cifar10"][row.key], "trials": [{"lr": 0.1}] * count}
                             for row, count in zip(experiment.rows, counts, strict=True)}}  # fmt: skip
        results = Results(experiment, runs, tuned)
        assert words in Sentences(results).guesses[-1]
        assert [results.cells[row.key, "cifar10"].trials for row in experiment.rows] == list(counts)


def test_a_headline_and_its_table_correct_p_alike() -> None:
    """A best row that beats SGD in a test of its own, and no longer among all the report's differences."""
    experiment = experiments.load("fig2", scale="cpu")
    means, wobble = (
        {"sgd": 70.0, "signsgd": 70.1, "hybrid": 71.0},
        {"hybrid": (-0.2, 0.0, 0.25), "signsgd": (0.1, -0.3, 0.2)},
    )
    values = {(key, "cifar10", seed): mean + wobble.get(key, (0.0,) * 3)[seed]
              for key, mean in means.items() for seed in range(3)}  # fmt: skip
    results = Results(experiment, full(experiment, values), all_tuned(experiment))
    sgd, hybrid = experiment.row("sgd"), experiment.row("hybrid")
    compared = results.difference("cifar10", hybrid, sgd)
    assert compared is not None
    assert compared.estimate is not None
    p = compared.estimate.p_value()
    assert p is not None
    assert p < 0.05
    assert results.corrected("cifar10", hybrid, sgd) == compared.corrected == pytest.approx(3 * p)
    assert ("beats" in Sentences(results).headline) is (3 * p < 0.05)


def test_what_some_runs_recorded_is_not_said_of_all() -> None:
    experiment = experiments.load("fig2", scale="cpu")
    runs = [run(experiment.row("sgd"), "cifar10", seed, 60.0 + seed) for seed in range(3)]
    runs[2].start["environment"] = RECORDED | {"git": "abc", "torch": "2.6.0"}
    environment = report_environment(Results(experiment, by_hash(*runs), {}))
    assert (environment["git"], environment["device"]) == ("abc (1 run)", "cpu")
    assert environment["torch"] == "2.13.0 (2 runs), 2.6.0 (1 run)"


def test_rows_that_take_anothers_rate_say_so(tmp_path: Path) -> None:
    experiment = experiments.load("state", scale="cpu")
    every = {"cifar10": {"signsgd": all_tuned(experiment)["cifar10"]["signsgd"]}}
    lr = every["cifar10"]["signsgd"]["lr"]
    values = {key: 60 + round(v - 60, -1) + 0.1 * key[2] for key, v in accuracies(experiment, 3).items()}
    runs = by_hash(*(run(experiment.row(key), d, seed, v, lr=lr) for (key, d, seed), v in values.items()))
    page = write(experiment, runs, tmp_path, tuned=every, commands=[])
    results = Results(experiment, runs, every)
    assert "Sign (int8) beats the next best" in Sentences(results).headline
    takers = "SignSGD-M, bfloat16 momentum and SignSGD-M, int8 momentum"
    words = f"Not tuned, with the learning rate of SignSGD-M: {takers}."
    for file in (page, page.with_suffix(".md")):
        text = html.unescape(file.read_text(encoding="utf-8"))
        assert words in text
        assert "with the preset's learning rate" not in text
    assert {row.key for row in experiment.rows if results.difference("cifar10", row, experiment.row("signsgd"))} == {
        "signsgd-bfloat16",
        "signsgd-int8",
    }


def test_a_data_set_that_the_paper_does_not_use(tmp_path: Path) -> None:
    experiment = experiments.load("table1", scale="demo", datasets=["fashion-mnist"])
    page = write(experiment, full(experiment, accuracies(experiment, 2)), tmp_path, tuned=None, commands=[])
    assert [head for head, _ in table(page)["sgd"]] == ["Fashion-MNIST", "n"]
    scope = json.loads((tmp_path / "table1.json").read_text(encoding="utf-8"))["scope"]
    assert "The paper has no numbers on Fashion-MNIST." in scope
    assert "it decides nothing about the methods" in scope


def test_short_names_stand_in_headline_and_charts_and_long_ones_beside_them(tmp_path: Path) -> None:
    experiment = experiments.load("verdict", scale="smoke", datasets=["cifar10"])
    page = write(experiment, full(experiment, accuracies(experiment, 2)), tmp_path, tuned=None, commands=[])
    text, long = html.unescape(page.read_text(encoding="utf-8")), "SignSGD-M + pre-noise (σ = rms(m))"
    for kind in ("curves", "dots"):
        drawing = (tmp_path / f"verdict-cifar10-{kind}.svg").read_text(encoding="utf-8")
        words = " ".join(re.findall(r"<text[^>]*>([^<]*)", drawing))
        assert "Sign + dither" in words
        assert "pre-noise (σ" not in words
        assert long in re.findall(r'aria-label="([^"]*)"', drawing)[0]
    key = re.findall(r'<li data-method="pre-relative">.*', text)[0]
    short, beside = (re.sub(r"<[^>]+>", "", part).replace("\xa0", " ") for part in key.split("<small>"))
    assert short == "Sign + dither"
    assert beside.startswith(long)
    assert f"Sign + dither: {long}" in (tmp_path / "verdict.md").read_text(encoding="utf-8").replace("\\", "")
    row = next(
        r
        for r in json.loads((tmp_path / "verdict.json").read_text(encoding="utf-8"))["rows"]
        if r["key"] == "pre-relative"
    )
    assert (row["label"], row["short"]) == (long, "Sign + dither")


def test_short_names_are_short_and_no_two_rows_share_one() -> None:
    for name in experiments.NAMES:
        for recipe in experiments.Recipe.__args__:  # type: ignore[attr-defined]
            rows = experiments.load(name, recipe=recipe).rows
            shorts = [row.short_label for row in rows]
            assert len(set(shorts)) == len(shorts)
            assert all(len(row.short_label) <= min(24, len(row.label)) for row in rows), shorts


NASTY = "<script>alert(\"1\")</script> & 'q' | *x* `y` [z](w) {{ 7*7 }}"


def test_special_characters_in_labels(tmp_path: Path) -> None:
    experiment = experiments.load("fig2", scale="cpu")
    rows = tuple(
        dataclasses.replace(row, key=row.key if i else "<k>&\"'", label=f"{NASTY} {i}", note=NASTY, in_paper=i != 1)
        for i, row in enumerate(experiment.rows)
    )
    experiment = dataclasses.replace(experiment, rows=rows, title=NASTY, caption=NASTY, guesses=(NASTY,))
    values = {(row.key, "cifar10", seed): 60.0 + i + seed for i, row in enumerate(rows) for seed in (0, 1)}
    page = write(experiment, full(experiment, values), tmp_path, tuned=None, commands=[NASTY])
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert len(table(page)) == 3
    json.loads((tmp_path / "fig2.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "fig2.md").read_text(encoding="utf-8").splitlines()
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in lines[lines.index("## Final test accuracy") :][3:8] if line
    }
    assert widths == {5}


@st.composite
def _situations(draw: st.DrawFn) -> tuple[Experiment, dict[str, Run], dict[tuple[str, str, int], float | None]]:
    experiment = experiments.load("table1", scale="smoke")
    rows = draw(st.lists(st.sampled_from(experiment.rows), min_size=1, unique_by=lambda row: row.key))
    rows = [dataclasses.replace(row, paper=draw(st.sampled_from([row.paper, {}]))) for row in rows]
    datasets = draw(st.sampled_from([("cifar10",), ("cifar100",), ("cifar10", "cifar100")]))
    experiment = dataclasses.replace(experiment, rows=tuple(rows), datasets=datasets)
    cells = [(row.key, d, seed) for row in rows for d in datasets for seed in range(4)]
    accuracy = st.one_of(st.none(), st.floats(0, 100), st.just("unfinished"), st.just("absent"), st.just("absent"))
    drawn = {cell: draw(accuracy) for cell in cells}
    runs, finished = [], {}
    for (key, d, seed), value in drawn.items():
        if value == "unfinished":
            runs.append(run(experiment.row(key), d, seed, 50.0, upto=1))
        elif not isinstance(value, str):
            runs.append(run(experiment.row(key), d, seed, value))
            finished[key, d, seed] = value
    return experiment, by_hash(*runs), finished


@given(_situations())
def test_any_situation_is_reported_as_it_is(situation: Any) -> None:
    experiment, runs, finished = situation
    results = Results(experiment, runs, {})
    found = json.loads(json.dumps(to_dict(results, []), allow_nan=False))
    for row in found["rows"]:
        for dataset, cell in row["cells"].items():
            chance = 1.0 if dataset == "cifar100" else 10.0
            mine = {s: v for (k, d, s), v in finished.items() if (k, d) == (row["key"], dataset)}
            known = {str(seed): chance if v is None else v for seed, v in mine.items()}
            assert cell["accuracy_by_seed"] == pytest.approx(known)
            assert cell["diverged_seeds"] == [seed for seed, v in mine.items() if v is None]
            assert sorted(cell["missing_seeds"]) == [s for s in results.seeds if s not in mine]
            measured = any(v is not None for v in mine.values())
            assert cell["n"] == (len(mine) if measured else 0)
            assert (cell["mean"] is not None) == measured
            assert (cell["low"] is not None) == (measured and len(mine) > 1)
    assert all(
        math.isfinite(e.mean) for d in experiment.datasets for c in charts.curves(results, d) for e in c.estimates
    )
    assert found["headline"].endswith(".")


@given(_situations())
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_situation_can_be_written(tmp_path: Path, situation: Any) -> None:
    experiment, runs, _ = situation
    page = write(experiment, runs, tmp_path, tuned={}, commands=[])
    assert set(table(page)) == {row.key for row in experiment.rows}


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = experiments.load("fig2", scale="smoke")
    page = write(experiment, {}, tmp_path, tuned=None, commands=["first"])
    old = page.read_bytes()

    def full_disk(fd: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(experiment, {}, tmp_path, tuned=None, commands=["second"])
    assert page.read_bytes() == old

"""The figures of a report: colours, intervals, and SVG that stands alone."""

import re
from pathlib import Path

import pytest
from made_runs import accuracies, by_hash, full, run

from signstep.lab.paper import charts, experiments
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.report import write
from signstep.lab.paper.results import Results


def test_a_method_has_one_colour_and_no_two_of_a_table_share_one(table1: Experiment) -> None:
    for name in experiments.NAMES:
        keys = [row.key for row in experiments.load(name).rows]
        assert len({charts.colour(key) for key in keys}) == len(keys)
    assert charts.colour("a method of tomorrow") == charts.colour("a method of tomorrow")


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_text_and_marks_in_both_schemes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    values: dict[str, list[str]] = {}
    for name, value in re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", style):
        values.setdefault(name, []).append(value)
    for i in (0, 1):
        for name in ("c-ink", "c-muted", "good", "bad", "c-switch"):
            assert _contrast(values[name][i], values["page"][i]) >= 4.5, (name, i)
        for key in ("sgd", "adam", "signsgd", "post-0.1", "pre-0.5", "pre-0.1", "hybrid"):
            assert _contrast(values[f"c-{charts.colour(key)}"][i], values["page"][i]) >= 3, (key, i)


@pytest.mark.parametrize(("seeds", "bands", "thin"), [(1, 0, 0), (2, 0, 2), (3, 1, 0)])
def test_two_seeds_are_two_thin_lines_and_three_a_band(seeds: int, bands: int, thin: int) -> None:
    experiment = experiments.load("fig2", scale="cpu")
    lines = charts.curves(Results(experiment, full(experiment, accuracies(experiment, seeds)), {}), "cifar10")
    axes = charts.draw_curves(lines, switches=[], epochs=6).axes[0]
    assert len(axes.collections) == bands * len(lines)
    assert sum(drawn.get_linewidth() < 1 for drawn in axes.lines) == thin * len(lines)
    low, high = axes.get_ylim()
    assert 25 < low < high < 85


def test_a_diverged_one_of_two_seeds_goes_on_at_chance() -> None:
    experiment = experiments.load("fig2", scale="cpu")
    row = experiment.row("sgd")
    runs = by_hash(run(row, "cifar10", 0, 60.0), run(row, "cifar10", 1, None))
    (curve,) = charts.curves(Results(experiment, runs, {}), "cifar10")
    assert [list(values) for values in curve.runs] == [list(curve.epochs)] * 2
    assert set(curve.runs[1].values()) == {10.0}
    for at, epoch in enumerate(curve.epochs):
        assert curve.estimates[at].mean == pytest.approx((curve.runs[0][epoch] + 10) / 2)


def test_the_page_names_no_address(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\w+://|@import|<iframe|<img|<base", text)
    for target in re.findall(r"""(?:src|href|action|srcset|poster)=["']([^"']*)""", text):
        assert target == "data:," or target.startswith("#"), target
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_ids_are_unique_and_references_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', text)
    assert {name for names in used for name in names if name} <= set(ids)


@pytest.mark.slow
def test_svg_files_stand_alone_and_are_reproducible(page: Path, table1: Experiment, tmp_path: Path) -> None:
    for path in page.parent.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert "prefers-color-scheme:dark" in text
        assert "var(--c-ink)" in text
        assert "#1b1b1a" in text
    experiment = experiments.load("fig2", scale="smoke")
    runs = full(experiment, accuracies(experiment, 2))
    once, twice = (write(experiment, runs, tmp_path / name, tuned=None, commands=[]).parent for name in "ab")
    for path in once.iterdir():
        assert path.read_bytes() == (twice / path.name).read_bytes(), path.name

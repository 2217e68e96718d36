"""The page on a monitor's records: its numbers against the records, missing numbers, and the page in a real browser."""

import copy
import functools
import html
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monitor_records import COMMAND, monitored, skewed

from pairwise import every_combination
from signstep.lab.studies import monitor_figures, monitor_numbers
from signstep.lab.studies.monitor_page import PAGE_FILE, write, write_runs

KINDS = ("noise", "snr", "seven", "dither", "calibration")


@pytest.fixture(scope="module")
def page(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(records, tmp_path_factory.mktemp("monitor"), title="a <small> run", command=COMMAND)


class _Cells(HTMLParser):
    """Rows of all tables: lists of the texts of their cells."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def rows_of(page: Path) -> dict[str, list[str]]:
    parser = _Cells()
    parser.feed(page.read_text(encoding="utf-8"))
    return {row[0]: row[1:] for row in parser.rows}


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d[\d.]*(?:e-?\d+)?", text.replace("−", "-"))]


# ---------------------------------------------------------------------------------------------------- the numbers


def test_files_and_names(page: Path) -> None:
    assert page.name == PAGE_FILE
    expected = {PAGE_FILE, "monitor.md", *(f"monitor-{kind}.svg" for kind in KINDS)}
    assert {path.name for path in page.parent.iterdir()} == expected
    assert page.stat().st_size < 1_000_000


def test_numbers_of_the_page_are_those_of_the_last_record(page: Path, records: list[dict[str, Any]]) -> None:
    rows, last = rows_of(page), records[-1]
    signs, dither, rates = last["reliability"], last["dither"], last["calibration"]
    for label, triple in (
        ("1 − 2p, root mean square", signs["reliability"]),
        ("S", signs["snr"]),
        ("Σ |g| (1 − 2p)", signs["alignment"]),
        ("Φ", signs["phi"]),
    ):
        assert numbers(rows[label][0]) == pytest.approx(triple, rel=5e-3)
    third = signs["phi"][0] / 3
    interval = [signs["alignment"][0] / third, *(1 + margin / third for margin in signs["margin"][1:])]
    assert numbers(rows["Σ |g| (1 − 2p) over Φ / 3"][0]) == pytest.approx(interval, rel=5e-3)
    assert numbers(rows["rms(m) / σ"][0]) == pytest.approx([dither["ratio"]], rel=5e-3)
    for rule in ("paper", "ratio", "applied", "lagged"):
        label = f"SGD's lr by {monitor_numbers.RULE_LABELS[rule]}"
        assert numbers(rows[label][0]) == pytest.approx([rates["average"][rule], rates["now"][rule]], rel=5e-3)
    for name, layer in signs["layers"].items():
        assert numbers(rows[name][0]) == pytest.approx(layer["reliability"], rel=5e-3)
        assert numbers(rows[name][1]) == pytest.approx(layer["snr"][:1], rel=5e-3)
    # The Markdown has the same.
    text = (page.parent / "monitor.md").read_text(encoding="utf-8")
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| 0.weight")]
    assert widths == [2 + len(rows["Layer"])]
    assert f"| {rows['rms(m) / σ'][0]} |" in text


def test_alarms_come_first_and_layers_are_marked(tmp_path: Path) -> None:
    page = write(skewed(), tmp_path, title="skewed", command="")
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert "<h1>3 alarms at step 0.</h1>" in text
    assert "Command" not in text
    places = [text.index(words) for words in ("<h1>", "Alarm:", "symmetry: rejected", "<figure", '<h3 id="layers')]
    assert places == sorted(places)
    assert rows_of(page)["weight"][2].endswith("violated")
    assert "violated" in (tmp_path / "monitor.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- missing numbers


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """To every part of a record."""
    yield prefix
    if isinstance(value, dict):
        for key, x in value.items():
            yield from paths(x, (*prefix, key))
    elif isinstance(value, list):
        for i, x in enumerate(value[:4]):
            yield from paths(x, (*prefix, i))


def damaged(record: dict[str, Any], path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(record, dict | list) and path and path != ("step",):
        try:
            record[path[-1]] = new
        except (IndexError, TypeError):
            return


def none_everywhere(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: none_everywhere(x) for key, x in value.items()}
    return [none_everywhere(x) for x in value] if isinstance(value, list) else None


def check(page: Path) -> None:
    for path in (page, page.with_name("monitor.md")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bnan\b|\bNone\b|\binf\b", re.sub(r"<style>.*?</style>", "", text, flags=re.S)), path


@functools.cache
def three() -> str:
    return json.dumps(monitored(steps=5))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_missing_the_page_is_written(tmp_path: Path, data: st.DataObject) -> None:
    kept = json.loads(three())[: data.draw(st.integers(1, 3))]
    for record in kept:
        places = list(paths(record))
        for path in data.draw(st.lists(st.sampled_from(places), max_size=25)):
            damaged(record, path, data.draw(st.sampled_from([None, [], {}, [None, None, None], True, math.inf, "x"])))
    check(write(kept, tmp_path, title="damaged", command=COMMAND))


def test_a_record_of_nones_and_a_single_one(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    empty = {**none_everywhere(records[0]), "step": 0}
    page = write([empty], tmp_path / "none", title="none", command="")
    check(page)
    assert "At step 0 nothing is known of the signs." in page.read_text(encoding="utf-8")
    assert "<figure" not in page.read_text(encoding="utf-8")
    check(write([{"step": 5}], tmp_path / "bare", title="bare", command=""))
    page = write(records[:1], tmp_path / "one", title="one", command="")
    check(page)
    assert {path.name for path in page.parent.glob("*.svg")} == {"monitor-noise.svg", "monitor-snr.svg"}
    check(write([empty, records[1]], tmp_path / "two", title="two", command=""))


@pytest.mark.parametrize("nothing", [[], [{}], [{"step": None, "lr": [0.1]}]])
def test_no_record_is_said(nothing: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no record"):
        write(nothing, tmp_path, title="", command="")
    assert list(tmp_path.iterdir()) == []


def test_special_characters(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    nasty = "<script>alert(\"1\")</script> & 'q' | *x* `y` {{ 7*7 }} $z$"
    record = copy.deepcopy(records[-1])
    for part in ("reliability", "dither", "calibration"):
        layers = record[part]["layers"]
        layers[nasty] = layers.pop("0.weight")
    record |= {"alarms": [nasty], "advice": [nasty], "optimizer": nasty}
    record["samples"][0]["name"] = nasty
    page = write_runs([(nasty, [record]), ("b", records)], tmp_path, title=nasty, command=nasty)
    assert "<script" not in page.read_text(encoding="utf-8")
    assert nasty in rows_of(page)
    lines = (tmp_path / "monitor.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith(("| Layer", "| \\<script", "| 0.bias"))]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:2]}) == 1


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write(records[:1], tmp_path, title="first", command="")
    old = page.read_bytes()

    def full_disk(fd: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(records, tmp_path, title="second", command="")
    assert page.read_bytes() == old


# --------------------------------------------------------------------------------------------------------- figures


@pytest.mark.slow
def test_two_runs_of_different_lengths_and_colours(records: list[dict[str, Any]], tmp_path: Path) -> None:
    runs = [("long", records), ("short", records[:2]), ("undithered", monitored(steps=3, dither=0.0))]
    page = write_runs(runs, tmp_path, title="three", command="", name="inspect")
    names = {path.name for path in tmp_path.glob("*.svg")}
    assert names == {f"inspect-{kind}.svg" for kind in ("snr", "seven", "dither")} | {
        f"inspect-{kind}-{i}.svg" for kind in ("noise", "calibration") for i in (1, 2, 3)
    }
    write_runs([*runs[:2], ("one", records[:1])], tmp_path / "one", title="", command="")
    assert not (tmp_path / "one" / "monitor-calibration-3.svg").exists()
    assert (tmp_path / "inspect.md").exists()
    text = page.read_text(encoding="utf-8")
    assert "3 runs, no alarm in their last records." in text
    assert text.count("Each plot is one coordinate") == 1
    drawn = monitor_figures.dither_meters(runs).axes[0]
    assert "undithered" not in [each.get_text() for each in drawn.texts]
    check_ids(text)


def check_ids(text: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', text)
    assert {name for names in used for name in names if name} <= set(ids)


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\w+://|@import|<iframe|<img|<base|<script", text)
    assert "a &lt;small&gt; run" in text
    assert html.escape(COMMAND, quote=False) in html.unescape(text).replace("&", "&amp;").replace("<", "&lt;").replace(
        ">", "&gt;"
    )
    check_ids(text)


def test_svg_files_stand_alone_and_are_reproducible(page: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
    twice = write(records, tmp_path, title="a <small> run", command=COMMAND)
    for path in page.parent.iterdir():
        assert path.read_bytes() == (twice.parent / path.name).read_bytes(), path.name
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            assert "prefers-color-scheme:dark" in text
            assert "var(--c-ink)" in text


# --------------------------------------------------------------------------------------------------------- browser


# Text that sticks out of the window, cells that are not to be seen, words of a drawing that lie on each other.
_LOOK = """() => {
  const width = document.documentElement.clientWidth;
  const out = [...document.querySelectorAll("main td, main th, main p, main li, h1, h2, figcaption, svg text")]
    .filter((e) => e.getClientRects().length && !e.closest(".scroll, pre"))
    .filter((e) => { const r = e.getBoundingClientRect(); return r.right > width + 1 || r.left < -1; });
  const cells = [...document.querySelectorAll("main td")];
  const crossed = [];
  for (const svg of document.querySelectorAll("svg")) {
    const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent.trim(), t.getBoundingClientRect()]);
    boxes.forEach(([a, r], i) => boxes.slice(i + 1).forEach(([b, s]) => {
      const across = Math.min(r.right, s.right) - Math.max(r.left, s.left);
      const down = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      if (across > 1 && down > 0.45 * Math.min(r.height, s.height)) crossed.push([a, b]);
    }));
  }
  return {
    overflow: document.documentElement.scrollWidth - width,
    out: out.map((e) => e.textContent.trim()),
    crossed,
    invisible: cells.filter((c) => { const r = c.getBoundingClientRect(); return r.width < 5 || r.height < 5; }).length,
    background: getComputedStyle(document.body).backgroundColor,
    smallest: Math.min(...[...document.querySelectorAll("svg text")].map((t) => t.getBoundingClientRect().height)),
  };
}"""


@pytest.fixture(scope="module")
def shown(
    request: pytest.FixtureRequest, records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    runs = {
        "run": [("", records)],
        "one record": [("", records[:1])],
        "alarms": [("", skewed())],
        "several": [("a run with quite a long name indeed", records), ("b", records[:2]), ("c", skewed())],
    }[request.param]
    return write_runs(runs, tmp_path_factory.mktemp("page"), title=request.param, command=COMMAND)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shown", "width", "scheme"),
    every_combination(["run", "one record", "alarms", "several"], [1280, 390], ["light", "dark"]),
    indirect=["shown"],
)
def test_the_page_in_a_browser(browser: Any, shown: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(shown.as_uri())
    look = tab.evaluate(_LOOK)
    context.close()
    assert problems == []
    assert [url for url in requests if url not in (shown.as_uri(), "data:,")] == []
    assert look["overflow"] <= 0
    assert look["out"] == []
    assert look["crossed"] == []
    assert look["invisible"] == 0
    assert look["smallest"] >= 9
    assert (int(re.findall(r"\d+", look["background"])[0]) > 200) == (scheme == "light")

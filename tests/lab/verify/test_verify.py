"""`signstep verify`: which checks are chosen, what is printed, and that the reports are whole."""

import functools
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from signstep.lab.cli import main
from signstep.lab.errors import BadInput
from signstep.lab.verify import registry, verification_report
from signstep.lab.verify.registry import BETTER, CHECKS, FAILS, GROUPS, HOLDS, CheckOutcome, Finding, check
from signstep.lab.verify.theorem_bounds import LAW_NAMES
from signstep.lab.verify.verification import VerifyStatements
from signstep.theory import bounds

CHEAP = ("gauss.bound", "gauss.split", "gauss.bimodal", "vote.slope")


@functools.cache
def outcome(name: str) -> CheckOutcome:
    (found,) = registry.run([CHECKS[name]])
    return found


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    return int(stopped.value.code or 0)


def test_every_group_has_checks_and_every_check_a_claim_and_a_source() -> None:
    assert {each.group for each in CHECKS.values()} == set(GROUPS)
    for each in CHECKS.values():
        assert re.fullmatch(r"[a-z]+\.[a-z0-9-]+", each.name)
        assert each.source
        assert not each.claim.endswith(".")
    assert len({each.claim for each in CHECKS.values()}) == len(CHECKS)


def test_the_record_in_results_is_of_these_statements() -> None:
    """Run `signstep verify --out results/verify` after a statement was added or changed."""
    record = json.loads((Path(__file__).parents[3] / "results" / "verify" / "verify.json").read_text("utf-8"))
    recorded = {each["name"]: (each["claim"], each["source"], each["verdict"]) for each in record["checks"]}
    assert recorded == {name: (each.claim, each.source, each.expected) for name, each in CHECKS.items()}
    assert record["as_expected"]
    counted = {whose: dict.fromkeys((HOLDS, BETTER, FAILS), 0) for whose in ("paper", "ours", "neither")}
    for each in CHECKS.values():
        counted[each.whose][each.expected] += 1
    assert record["by_whose"] == counted


def test_a_source_says_whose_a_statement_is() -> None:
    for each in CHECKS.values():
        first = each.source.split(",")[0].split(":")[0]
        assert each.whose == {"paper": "paper", "neither": "neither"}.get(first, "ours")
    assert CHECKS["gauss.bimodal"].whose == CHECKS["estimators.naive"].whose == "neither"


def test_selection_keeps_the_order_and_drops_repeats() -> None:
    chosen = [each.name for each in registry.select(["vote.slope", "gauss", "gauss.bound", "vote.slope"])]
    assert chosen[-1] == "vote.slope"
    assert chosen.count("gauss.bound") == 1
    assert [each.group for each in registry.select(())] == sorted(
        (each.group for each in CHECKS.values()), key=list(GROUPS).index
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gauss.boundd", "no check is named 'gauss.boundd': did you mean gauss.bound? (signstep verify --list"),
        ("theorems", "no check is named 'theorems': did you mean theorem?"),
        (
            "",
            "no check is named '': expected a group (gauss, theorem, dither, projection, vote, estimators) or a check",
        ),
        ("Ω", "no check is named 'Ω': expected a group"),
    ],
)
def test_unknown_names(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"signstep: {message}")
    assert error.count("\n") == 1
    with pytest.raises(BadInput, match="no check is named"):
        registry.select(["gauss", name])


def test_names_are_taken_once_and_belong_to_a_group() -> None:
    for name in ("gauss.bound", "novel.thing"):
        with pytest.raises(ValueError, match="expected a new name that begins with one of gauss, theorem"):
            check(name, "A claim", source="a test")(lambda rng: Finding("", "", HOLDS))


def _outcomes() -> list[CheckOutcome]:
    found = [outcome(name) for name in CHEAP]
    steps = [32_000, 8_000, 2_000, 500]
    values = {
        "steps": steps,
        "phi": {law: [2.0, 4.0, 8.0, 14.0] for law in LAW_NAMES},
        "l1": {law: [1.0, 2.0, 4.0, 8.0] for law in LAW_NAMES},
        "paper": [5.0, 10.0, 20.0, 40.0],
        "sharp": [3.0, 6.0, 12.0, 24.0],
        "floor": 100.0,
    }
    slope = CheckOutcome(
        CHECKS["theorem.slope"], Finding("a <b> & c | d", "z = 1", HOLDS, detail="why <i>", values=values), 1.25
    )
    odd = CheckOutcome(CHECKS["dither.late-stage"], Finding("sigma_k", "exact", HOLDS), 0.5)
    return [*found, slope, odd]


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(*CHEAP, "--json", "--out", str(tmp_path)) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "verify.json").read_text())
    assert record["as_expected"] is True
    assert record["command"].startswith("signstep verify gauss.bound")
    assert [each["name"] for each in record["checks"]] == list(CHEAP)
    for each in record["checks"]:
        assert each["verdict"] in (HOLDS, BETTER, FAILS)
        assert each["as_expected"] == (each["verdict"] == each["expected"])
        assert math.isfinite(each["seconds"])
    assert record["summary"] == "2 hold, 1 holds with a better constant, 1 fails as expected"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verify.html", "verify.json", "verify.md"]


def test_json_has_no_nan() -> None:
    record = verification_report.to_dict(_outcomes(), command="here")
    json.loads(verification_report.to_json(record))
    record["seconds"] = math.nan
    with pytest.raises(ValueError):
        verification_report.to_json(record)


class _Tags(HTMLParser):
    """That what is opened is closed, and what the page refers to."""

    VOID = frozenset({"meta", "link", "br", "path", "use", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [v for k, v in values.items() if k == "id" and v]
        self.links += [v for k, v in values.items() if k in ("href", "src", "xlink:href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    outcomes = _outcomes()
    verification_report.write(outcomes, verification_report.to_dict(outcomes, command="signstep verify <x>"), tmp_path)
    page = (tmp_path / "verify.html").read_text()
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert all(link.startswith("#") or link == "data:," for link in tags.links)
    assert {link[1:] for link in tags.links if link.startswith("#")} <= set(tags.ids)
    assert "http" not in page
    assert page.count("<svg") == 2
    assert "prefers-color-scheme:dark" in page
    text = " ".join("".join(tags.text).split())
    for each in outcomes:
        assert each.check.name in tags.ids
        assert verification_report.typeset(each.check.claim) in text
    assert "a <b> & c | d" in text
    assert "Expected: fails" in text
    assert "4 hold, 1 holds with a better constant, 1 fails; not as expected: dither.late-stage" in text
    assert "{{" not in page


def test_markdown_is_a_table_of_every_check() -> None:
    outcomes = _outcomes()
    text = verification_report.markdown(outcomes, verification_report.to_dict(outcomes, command="here"))
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(outcomes)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert "**holds**; expected: fails" in text


@pytest.mark.parametrize("width", [60, 100, 200])
def test_table_shows_every_check_and_what_is_odd(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    verification_report.show(console, _outcomes())
    text = console.export_text()
    for name in CHEAP:
        assert name.partition(".")[2] in text
    assert "expected: fails" in " ".join(text.split())
    assert "a <b> & c | d" in text
    assert "not as expected: dither.late-stage" in text


def test_summary_counts() -> None:
    outcomes = _outcomes()
    assert verification_report.summary(outcomes[:1]) == "1 holds"
    assert verification_report.summary(outcomes[:3]) == "1 holds, 1 holds with a better constant, 1 fails as expected"
    assert verification_report.summary(outcomes) == (
        "4 hold, 1 holds with a better constant, 1 fails; not as expected: dither.late-stage"
    )


@pytest.mark.parametrize(
    ("plain", "shown"),
    [
        ("sigma_k = delta sqrt(2/pi)", "σ_k = δ √(2/π)"),
        ("lambda-bar, lambda_k, beta", "λ̄, λ_k, β"),
        ("signstep.theory.stationarity.phi at alpha", "signstep.theory.stationarity.phi at α"),
        ("dither.alpha-drift and theta, betas", "dither.alpha-drift and theta, betas"),
        ("a <= b >= -1.5, x-1, 1e-4, K^(-1/2)", "a ≤ b ≥ −1.5, x-1, 1e-4, K^(−1/2)"),
        ("S^2, e^20, 10^2.5", "S², e^20, 10^2.5"),
    ],
)
def test_typeset(plain: str, shown: str) -> None:
    assert verification_report.typeset(plain) == shown


@given(st.text(max_size=80))
def test_typeset_takes_any_text_and_rests(text: str) -> None:
    once = verification_report.typeset(text)
    assert verification_report.typeset(once) == once or "sqrt" in once or "lambda" in once


def test_list_measures_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "run", lambda checks: pytest.fail("measured"))
    assert run("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [each.name for each in registry.select(())]


def test_exit_code_is_1_when_a_verdict_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("vote.slope", "gauss.sharp") == 0
    assert "2 hold; " in capsys.readouterr().out
    monkeypatch.setattr(bounds, "SHARP_CONSTANT", 1.6)
    assert run("vote.slope", "gauss.sharp") == 1
    out = capsys.readouterr().out
    assert "not as expected: gauss.sharp" in out
    assert "expected: holds" in out


def test_out_that_cannot_be_written_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run("vote.slope", "--out", str(tmp_path / "file")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_options_are_those_of_the_command() -> None:
    assert VerifyStatements() == VerifyStatements((), json=False, out=None, list=False)

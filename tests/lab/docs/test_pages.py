"""Tables and numbers of README and docs are those of results/, and what cannot be written is refused."""

import json
from pathlib import Path

import pytest

from signstep.lab.cli import main
from signstep.lab.docs import numbers, tables
from signstep.lab.docs.claims import read_claims, statements, verdicts
from signstep.lab.docs.claims_page import html, markdown
from signstep.lab.docs.evidence import Evidence
from signstep.lab.docs.numbers import QUOTES, Quote, changes, pages_of, read_quotes, with_tables, written
from signstep.lab.errors import BadInput

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence(ROOT / "results")


def test_readme_and_docs_are_what_results_say(evidence: Evidence) -> None:
    texts = written(pages_of(ROOT), evidence, ROOT)
    differing = {page.name: changes(*pair) for page, pair in texts.items() if pair[0] != pair[1]}
    assert differing == {}, "run `signstep report docs`"


def test_the_page_on_the_claims_is_what_results_say(evidence: Evidence) -> None:
    found = verdicts(evidence, [*read_claims(), *statements(evidence)])
    assert (ROOT / "docs/claims.md").read_text("utf-8") == markdown(found), "run `signstep report claims`"
    assert (ROOT / "results/claims.html").read_text("utf-8") == html(found), "run `signstep report claims`"


def test_every_table_stands_on_a_page(evidence: Evidence) -> None:
    texts = "".join(page.read_text("utf-8") for page in pages_of(ROOT))
    assert {name for name in tables.tables(evidence) if f"<!-- results: {name} -->\n" in texts} == set(
        tables.tables(evidence)
    )


def test_every_quote_has_a_number() -> None:
    assert all("{{" in quote.words for quote in read_quotes(ROOT / QUOTES))


@pytest.fixture
def small(tmp_path: Path) -> Evidence:
    (tmp_path / "a.json").write_text(json.dumps({"x": 12.345, "low": -0.5, "rows": [{"k": 1}, {"k": 2}]}))
    return Evidence(tmp_path)


@pytest.mark.parametrize(
    "text", ["is 9.99 points, or", "is\n9.99   points, or", "is −9,999.9e−7 points, or", "is 9 points, or"]
)
def test_a_number_is_written_whatever_stands_there(small: Evidence, text: str) -> None:
    quote = Quote("README.md", "is {{ file('a.json').x | number(1) }} points,")
    after = quote.written(f"It {text} not.", small)
    assert after.split() == ["It", "is", "12.3", "points,", "or", "not."]
    assert quote.written(after, small) == after


def test_only_the_number_of_the_quote_is_written(small: Evidence) -> None:
    quote = Quote("README.md", "from {{ file('a.json').low | number }} to {{ file('a.json').x | number }}")
    assert quote.written("1 from 2 to 3. From 4 to 5.", small) == "1 from −0.50 to 12.35. From 4 to 5."


@pytest.mark.parametrize("text", ["nothing of the kind", "is 1 points, and is 2 points,"])
def test_words_that_do_not_stand_there_once_are_refused(small: Evidence, text: str) -> None:
    with pytest.raises(BadInput, match=r"is … points,.* stands there [02] times"):
        Quote("README.md", "is {{ file('a.json').x }} points,").written(text, small)


@pytest.mark.parametrize(
    "expression",
    [
        "file('none.json').x",
        "file('a.json').y | number",
        "file('a.json').x |",
        "one(file('a.json').rows, k=3)",
        "nobody()",
    ],
)
def test_an_expression_that_asks_for_what_there_is_not_is_refused(small: Evidence, expression: str) -> None:
    with pytest.raises(BadInput):
        small.value(expression)


def test_a_table_is_written_between_its_markers(evidence: Evidence) -> None:
    page = "before\n<!-- results: network -->\nold\n<!-- end -->\nafter\n"
    after = with_tables(page, evidence)
    assert after.startswith("before\n<!-- results: network -->\n| 4 M parameters |")
    assert after.endswith("|\n<!-- end -->\nafter\n")
    assert with_tables(after, evidence) == after


@pytest.mark.parametrize(
    ("page", "words"),
    [("<!-- results: nobody -->\n<!-- end -->\n", "no table is called"), ("<!-- results: step -->\n", "has to end")],
)
def test_markers_that_are_wrong_are_refused(evidence: Evidence, page: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        with_tables(page, evidence)


def test_the_command_writes_what_differs_and_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results/a.json").write_text('{"x": 2.5}')
    page = tmp_path / "README.md"
    page.write_text("It is 1.0 here.\n")
    (tmp_path / QUOTES).write_text(
        '[[quote]]\npage = "README.md"\nwords = "It is {{ file(\'a.json\').x | number(1) }} here"\n'
    )
    with pytest.raises(SystemExit) as ended:
        main(["report", "docs", "--root", str(tmp_path), "--check"])
    assert ended.value.code == 1
    assert page.read_text() == "It is 1.0 here.\n"
    assert "+It is 2.5 here." in capsys.readouterr().out
    for expected in ("1 of 1 pages", "0 of 1 pages"):
        with pytest.raises(SystemExit) as ended:
            main(["report", "docs", "--root", str(tmp_path)])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out
    assert page.read_text() == "It is 2.5 here.\n"


def test_a_quote_of_a_page_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("")
    (tmp_path / QUOTES).write_text('[[quote]]\npage = "docs/gone.md"\nwords = "x"\n')
    with pytest.raises(BadInput, match=r"docs/gone\.md"):
        numbers.written(pages_of(tmp_path), Evidence(tmp_path), tmp_path)
    (tmp_path / QUOTES).write_text("quote = 3")
    with pytest.raises(BadInput, match="not a list of quotes"):
        read_quotes(tmp_path / QUOTES)

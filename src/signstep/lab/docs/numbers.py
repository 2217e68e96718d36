"""Pages that take their tables and numbers from results/: `signstep report docs` writes them anew.

A table stands between two comments, and its name is one of `tables.tables`:

    <!-- results: step -->
    | step | ...
    <!-- end -->

A number in prose is quoted in docs/numbers.toml, with the words around it and the expression that it comes from:

    [[quote]]
    page = "README.md"
    words = "above tuned SGD by {{ gap('remedies', 'cifar10', 'dither-norm', 'sgd').mean | number(1) }} points"

The words have to stand on the page exactly once, whatever its line breaks. Markers keep a page readable as it is, and
a list of quotes keeps the expressions out of the prose.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from signstep.lab.docs.evidence import Evidence
from signstep.lab.docs.tables import tables
from signstep.lab.errors import BadInput

QUOTES = Path("docs/numbers.toml")
_EXPRESSION = re.compile(r"\{\{(.+?)\}\}", re.DOTALL)
_TABLE = re.compile(r"(?<=<!-- results: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
_ANY_NUMBER = r"(\S*[^\s.,:;)%])"


@dataclass(frozen=True)
class Quote:
    """Words of a page, with the numbers in them as expressions."""

    page: str
    words: str

    def written(self, text: str, evidence: Evidence) -> str:
        """The page's text with the numbers as results/ has them.

        Raises:
            BadInput: the words do not stand there exactly once, or an expression asks for what there is not.
        """
        literals = _EXPRESSION.split(self.words)
        expressions, between = literals[1::2], [re.escape(each) for each in literals[::2]]
        pattern = _ANY_NUMBER.join(re.sub(r"(?:\\ |\\\n|\s)+", r"\\s+", each) for each in between)
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            plain = _EXPRESSION.sub("…", self.words)
            raise BadInput(f"{self.page}: “{plain}” of {QUOTES} stands there {len(found)} times: expected once")
        for i in reversed(range(len(expressions))):
            begin, end = found[0].span(i + 1)
            text = text[:begin] + str(evidence.value(expressions[i].strip())) + text[end:]
        return text


def read_quotes(path: Path) -> list[Quote]:
    """The quotes of a file such as docs/numbers.toml.

    Raises:
        BadInput: it is not one.
    """
    try:
        return [Quote(each["page"], each["words"]) for each in tomllib.loads(path.read_text("utf-8"))["quote"]]
    except (tomllib.TOMLDecodeError, LookupError, TypeError) as error:
        raise BadInput(f"{path}: not a list of quotes ({error!r})") from error


def with_tables(text: str, evidence: Evidence) -> str:
    """A page's text with the tables between its markers as results/ has them.

    Raises:
        BadInput: there is no such table, or no end of one.
    """
    known = tables(evidence)

    def table(found: re.Match[str]) -> str:
        if found[1] not in known:
            raise BadInput(f"no table is called {found[1]!r}: expected one of {', '.join(known)}")
        return found[1] + found[2] + "\n".join(known[found[1]]()) + "\n"

    if text.count("<!-- results: ") != len(_TABLE.findall(text)):
        raise BadInput("a table that begins with <!-- results: name --> has to end with <!-- end -->")
    return _TABLE.sub(table, text)


def written(pages: Iterable[Path], evidence: Evidence, root: Path) -> Mapping[Path, tuple[str, str]]:
    """Each page's text as it is, and as results/ would have it.

    Args:
        pages: those to look at, below `root`.
        evidence: what the numbers come from.
        root: the folder that the quotes name pages in.

    Raises:
        BadInput: as of `Quote.written` and `with_tables`.
    """
    quotes = read_quotes(root / QUOTES)
    if unknown := {each.page for each in quotes} - {page.relative_to(root).as_posix() for page in pages}:
        raise BadInput(f"{QUOTES} quotes {', '.join(sorted(unknown))}, which is no page of these docs")
    texts = {}
    for page in pages:
        before = page.read_text("utf-8")
        after = with_tables(before, evidence)
        for quote in quotes:
            if quote.page == page.relative_to(root).as_posix():
                after = quote.written(after, evidence)
        texts[page] = (before, after)
    return texts


def changes(before: str, after: str) -> list[str]:
    """The lines of a page that differ, the old one after a minus and the new one after a plus."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def pages_of(root: Path) -> list[Path]:
    """README, the changelog and the docs of a repository, as far as they are there."""
    pages = [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").glob("*.md"))]
    return [page for page in pages if page.exists()]

"""What `signstep verify` shows and writes: a table per group, verify.json, verify.md, and the page verify.html."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import torch
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from signstep.lab.output import figures, pages
from signstep.lab.output.files import write_all
from signstep.lab.output.machine import environment, now
from signstep.lab.output.tables import markdown_table
from signstep.lab.verify import drawings
from signstep.lab.verify.registry import BETTER, FAILS, GROUPS, HOLDS, Check, CheckOutcome, StatementVerdict

_WIDTH = 120
_STYLES = {HOLDS: "green", BETTER: "cyan", FAILS: "yellow"}
_KINDS = {HOLDS: "holds", BETTER: "better", FAILS: "fails"}
_NAMES = ("alpha", "beta", "gamma", "delta", "eta", "lambda", "sigma", "tau", "pi", "Phi")
_LETTERS = dict(zip(_NAMES, "αβγδηλστπΦ", strict=True))
_SIGNS = {
    "<=": "≤",
    ">=": "≥",
    "+-": "±",
    " ~ ": " ≈ ",
    " -> ": " → ",
    "|g|_1": "‖g‖₁",
    "|m|_2": "‖m‖₂",
}
_LETTER = re.compile(rf"(?<![A-Za-z_.])({'|'.join(_LETTERS)})(?![A-Za-z])")


def typeset(text: str) -> str:
    """Formulas of a line of plain ASCII with their letters and signs.

    >>> typeset("delta <= sqrt(2/pi) sigma_k, sqrt 3 +- 1")
    'δ ≤ √(2/π) σ_k, √3 ± 1'
    """
    text = _LETTER.sub(lambda found: _LETTERS[found[1]], text.replace("lambda-bar", "λ\u0304"))
    text = re.sub(r"\bsqrt ?", "√", text)
    for plain, sign in _SIGNS.items():
        text = text.replace(plain, sign)
    text = re.sub(r"\^2(?![\w.])", "²", text)
    return re.sub(r"(?<![\w-])-(?=[\d.])", "−", text)


def summary(outcomes: Sequence[CheckOutcome]) -> str:
    """How many of each verdict, in one line."""
    counts = Counter(each.result.verdict for each in outcomes)
    odd = [each.check.name for each in outcomes if not each.as_expected]
    parts = []
    if counts[HOLDS]:
        parts.append(f"{counts[HOLDS]} hold{'s' if counts[HOLDS] == 1 else ''}")
    if counts[BETTER]:
        parts.append(f"{counts[BETTER]} hold{'s' if counts[BETTER] == 1 else ''} with a better constant")
    if counts[FAILS]:
        expected = "" if odd else " as expected"
        parts.append(f"{counts[FAILS]} fail{'s' if counts[FAILS] == 1 else ''}{expected}")
    line = ", ".join(parts)
    if odd:
        line += f"; not as expected: {', '.join(odd)}"
    return line


def by_whose(outcomes: Sequence[CheckOutcome]) -> dict[str, dict[StatementVerdict, int]]:
    """How many of each verdict among the statements of the paper, of ours, and of neither."""
    counts = {whose: dict.fromkeys(_STYLES, 0) for whose in ("paper", "ours", "neither")}
    for each in outcomes:
        counts[each.check.whose][each.result.verdict] += 1
    return counts


def grouped(outcomes: Sequence[CheckOutcome]) -> dict[str, list[CheckOutcome]]:
    groups: dict[str, list[CheckOutcome]] = {}
    for each in outcomes:
        groups.setdefault(each.check.group, []).append(each)
    return groups


def show_list(console: Console, checks: Sequence[Check]) -> None:
    """Name the checks, a line each."""
    for each in checks:
        console.print(
            f"{each.name}: {typeset(each.claim)} [{each.source}]", highlight=False, markup=False, soft_wrap=True
        )


def show(console: Console, outcomes: Sequence[CheckOutcome]) -> None:
    """Print a table for each group, and the summary."""
    # A pipe has no width of its own.
    console.width = max(console.width, _WIDTH) if not console.is_terminal else console.width
    for group, members in grouped(outcomes).items():
        seconds = sum(each.seconds for each in members)
        title = f"{group}: {typeset(GROUPS[group])} ({seconds:.1f} s)"
        head = ("check", "statement, and what was measured", "verdict", "s")
        table = Table(*head, title=escape(title), box=rich.box.SIMPLE, title_justify="left")
        table.columns[1].ratio = 1
        table.columns[2].max_width = 26
        table.columns[3].justify, table.columns[3].no_wrap = "right", True
        for each in members:
            claim, measured, error = (
                escape(typeset(text)) for text in (each.check.claim, each.result.measured, each.result.error)
            )
            detail = f"\n[dim]{escape(typeset(each.result.detail))}[/dim]" if each.result.detail else ""
            verdict = f"[{_STYLES[each.result.verdict]}]{escape(typeset(each.verdict))}[/]"
            if not each.as_expected:
                verdict += f"\n[bold red]expected: {each.check.expected}[/]"
            name, text = each.check.name.partition(".")[2], f"{claim}\n→ {measured} ({error}){detail}"
            table.add_row(name, text, verdict, f"{each.seconds:.1f}", end_section=True)
        console.print(table)
    total = sum(each.seconds for each in outcomes)
    console.print(f"{summary(outcomes)}; {total:.0f} s", highlight=False, markup=False, soft_wrap=True)


def to_dict(outcomes: Sequence[CheckOutcome], *, command: str) -> dict[str, Any]:
    """All that was measured."""
    return {
        "command": command,
        "date": now(),
        "environment": environment(torch.device("cpu"), 1),
        "summary": summary(outcomes),
        "by_whose": by_whose(outcomes),
        "as_expected": all(each.as_expected for each in outcomes),
        "seconds": sum(each.seconds for each in outcomes),
        "checks": [
            {
                "name": each.check.name,
                "group": each.check.group,
                "claim": each.check.claim,
                "source": each.check.source,
                "measured": each.result.measured,
                "error": each.result.error,
                "verdict": each.result.verdict,
                "condition": each.result.condition,
                "expected": each.check.expected,
                "as_expected": each.as_expected,
                "detail": each.result.detail,
                "values": each.result.values,
                "seconds": round(each.seconds, 3),
            }
            for each in outcomes
        ],
    }


def to_json(record: Mapping[str, Any]) -> str:
    """The record as JSON, which has no NaN."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(outcomes: Sequence[CheckOutcome], record: Mapping[str, Any]) -> str:
    made = record["environment"]
    lines = [
        "# What was verified",
        "",
        f"`{record['command']}`, {record['date']}; {made['cpu']}, torch {made['torch']}, signstep {made['signstep']}",
        "",
        f"{record['summary']}; {record['seconds']:.0f} s.",
        "",
        *markdown_table(
            ("whose statement", *_STYLES),
            [(whose, *map(str, counts.values())) for whose, counts in record["by_whose"].items()],
        ),
    ]
    for group, members in grouped(outcomes).items():
        rows = []
        for each in members:
            measured = each.result.measured + (f". {_sentence(each.result.detail)}" if each.result.detail else "")
            texts = (each.check.claim, each.check.source, measured, each.result.error, each.verdict)
            cells = [_cell(typeset(text)) for text in texts]
            if not each.as_expected:
                cells[-1] = f"**{cells[-1]}**; expected: {each.check.expected}"
            rows.append([f"`{each.check.name}`", *cells, f"{each.seconds:.1f}"])
        head = ["check", "statement", "source", "measured", "error", "verdict", "s"]
        lines += ["", f"## {typeset(GROUPS[group])}", "", *markdown_table(head, rows, left=range(6))]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(text: str) -> str:
    """Text without Markdown's marks; the table itself takes care of `|`."""
    return text.translate({ord(c): f"\\{c}" for c in "\\*_`<>"})


def _page(outcomes: Sequence[CheckOutcome], record: Mapping[str, Any]) -> str:
    drawn = {}
    slope = next((each.result.values for each in outcomes if each.check.name == "theorem.slope"), None)
    if slope is not None:
        words = (
            "Averaged Phi against K on logarithmic axes, for four laws of noise, below both bounds and with their slope"
        )
        drawn["theorem"] = Markup(figures.svg(drawings.rates(slope), name="rates", description=words, alone=False))
    if any(each.check.group == "gauss" for each in outcomes):
        words = "The chance of a wrong sign against S for six laws of noise, and the bound with two splits"
        drawn["gauss"] = Markup(figures.svg(drawings.laws(), name="laws", description=words, alone=False))
    context = {
        "record": record,
        "groups": grouped(outcomes),
        "titles": GROUPS,
        "kinds": _KINDS,
        "drawn": drawn,
    }
    return pages.render("verify.html", context, {"typeset": typeset, "sentence": _sentence})


def write(outcomes: Sequence[CheckOutcome], record: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the three files into `out`, a folder, and return their paths."""
    contents = {"html": _page(outcomes, record), "md": markdown(outcomes, record), "json": to_json(record)}
    return write_all(out, {f"verify.{suffix}": text for suffix, text in contents.items()})

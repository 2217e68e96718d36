"""docs/claims.md: what of the paper holds, what does not, what to do instead, and then every claim with its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from signstep.lab.docs.claims import SCALES, Verdict
from signstep.lab.docs.verdicts import OUTCOMES, Outcome
from signstep.lab.output import pages, stats
from signstep.lab.output.tables import markdown_table
from signstep.lab.verify.verification_report import typeset

_HEAD = ("claim", "stated in", "decided by", "n", "measured", "claimed", "p", "verdict")
_LEFT = (0, 1, 2, 7)
"""Columns of words."""
_NOTHING = "Nothing so far."


@dataclass(frozen=True)
class _Part:
    """Verdicts under one heading."""

    title: str
    verdicts: Sequence[Verdict]


def _parts(verdicts: Sequence[Verdict]) -> tuple[_Part, _Part, _Part]:
    paper = [each for each in verdicts if each.claim.whose == "paper"]
    return (
        _Part("The paper on training", [each for each in paper if not each.claim.statement]),
        _Part("Ours", [each for each in verdicts if each.claim.whose == "ours"]),
        _Part("The paper on formulas", [each for each in paper if each.claim.statement]),
    )


def _summary(verdicts: Sequence[Verdict]) -> str:
    trained, ours, formulas = (part.verdicts for part in _parts(verdicts))
    return (
        f"Of the paper's {len(trained)} claims about training {_counted(trained)}. Of its {len(formulas)} statements "
        f"about formulas {_counted(formulas)}. Of our own {len(ours)} claims {_counted(ours)}."
    )


def _short(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """By heading, what a reader wants first."""
    trained = _parts(verdicts)[0].verdicts
    wanted: dict[str, Outcome] = {"holds": "holds", "does not hold": "does not hold", "is not decided": "undecided"}
    short = {
        f"What of the paper {words}{' in training' if outcome != 'undecided' else ''}": [
            f"{typeset(each.claim.says)} {_finding(each)}" for each in trained if each.outcome == outcome
        ]
        for words, outcome in wanted.items()
    }
    return {
        **short,
        "What we recommend instead": _recommended(verdicts),
        "Beside SGD on CIFAR-100": _beside_sgd(verdicts),
    }


def _rules(verdicts: Sequence[Verdict]) -> str:
    tests = sum(each.p is not None for each in verdicts)
    return (
        "A claim about two methods is decided by their difference, seed by seed, at the largest scale "
        f"({', '.join(SCALES)}) at which both have {stats.MIN_SEEDS} seeds or more; `cpu` is a small network on 10,000 "
        "images. Differences are in units in which more is better, with half their 95 % t-interval. A claim holds, or "
        f"does not, where the interval excludes the claimed bound and p is below {stats.LEVEL:g}; p is of the paired "
        f"t-test against the bound, corrected for all {tests} tests of this page (Holm). All else is undecided. Where "
        "no p stands, the number has no test, and its range decides, or the record of `signstep verify` does."
    )


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The page for the docs."""
    lines = ["# The claims, and what decides them", "", _summary(verdicts), ""]
    for title, sentences in _short(verdicts).items():
        lines += [f"## {title}", "", *(f"- {_text(each)}" for each in sentences or [_NOTHING]), ""]
    lines += [
        "## How a claim is decided",
        "",
        "`signstep report claims` writes this page from results/; the list of claims is "
        f"[claims.toml](../src/signstep/lab/docs/claims.toml). {_rules(verdicts)}",
        "",
    ]
    for part in _parts(verdicts):
        table = markdown_table(_HEAD, [[_text(cell) for cell in _row(each)] for each in part.verdicts], left=_LEFT)
        lines += [f"## {part.title}", "", *table, ""]
    return "\n".join(lines).rstrip() + "\n"


def html(verdicts: Sequence[Verdict]) -> str:
    """The page for a browser, which needs no other file."""
    context = {
        "summary": _summary(verdicts),
        "short": _short(verdicts),
        "rules": _rules(verdicts),
        "parts": _parts(verdicts),
        "head": _HEAD,
        "left": _LEFT,
        "nothing": _NOTHING,
    }
    return pages.render("claims.html", context, {"row": _row})


def _counted(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(each.outcome for each in verdicts)
    verbs = {
        "holds": "hold",
        "does not hold": "do not hold",
        "undecided": "are undecided",
        "not measured yet": "are not measured yet",
    }
    parts = [f"{counts[each]} {verbs[each]}" for each in OUTCOMES if counts[each]]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts) or "there is none"


def _finding(verdict: Verdict) -> str:
    """What was measured, in brackets."""
    found = verdict.interval + (
        f", p = {stats.probability(verdict.corrected)}" if verdict.corrected is not None else ""
    )
    under = f"; under {verdict.claim.condition}" if verdict.outcome == "holds" and verdict.claim.condition else ""
    return f"({found}{under})"


def _recommended(verdicts: Sequence[Verdict]) -> list[str]:
    """What a claim of ours that holds recommends, and what to do in place of the paper's that does not."""
    sure = [v for v in verdicts if v.outcome == ("does not hold" if v.claim.whose == "paper" else "holds")]
    return list(dict.fromkeys(each.claim.instead for each in sure if each.claim.instead))


def _beside_sgd(verdicts: Sequence[Verdict]) -> list[str]:
    """Every recipe that was compared with SGD on CIFAR-100, once, the best first."""
    ranked = []
    for each in verdicts:
        claim, gap = each.claim, each.estimate
        if gap is None or claim.dataset != "cifar100" or claim.beside or "sgd" not in claim.rows:
            continue
        row = claim.rows[0] if claim.rows[1] == "sgd" else claim.rows[1]
        gap = gap if row == claim.rows[0] else replace(gap, mean=-gap.mean)
        words = f"{row}: {stats.with_interval(gap, sign=True)} points, {each.evidence.rpartition(', ')[2]}"
        ranked.append((-gap.mean, words))
    return list(dict.fromkeys(words for _, words in sorted(ranked)))


def _row(verdict: Verdict) -> list[str]:
    """A verdict's cells under `_HEAD`."""
    claim = verdict.claim
    return [
        typeset(claim.says),
        typeset(claim.source),
        verdict.evidence,
        str(verdict.n or ""),
        "" if verdict.outcome == "not measured yet" else typeset(verdict.interval),
        "" if claim.statement or claim.target else claim.bound.text,
        "" if verdict.corrected is None else stats.probability(verdict.corrected),
        verdict.text,
    ]


def _text(text: str) -> str:
    """Text without Markdown's marks, but for `code`."""
    parts = text.split("`")
    parts[::2] = [part.translate({ord(c): f"\\{c}" for c in "\\*_<>"}) for part in parts[::2]]
    return "`".join(parts)

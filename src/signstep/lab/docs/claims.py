"""A verdict on each claim of the paper and of ours, from results/: `signstep report claims` writes docs/claims.md.

The claims are in claims.toml, each with what decides it; to them come the paper's statements that `signstep verify`
measures, with the verdict of its record. A claim about two rows is decided at the largest scale at which both have
three seeds in common, of whatever experiment. So a claim has one line and one test, and what the other scales have
stands in that line without one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from signstep.lab.docs.evidence import Evidence
from signstep.lab.docs.verdicts import Bound, Outcome, decide, p_value
from signstep.lab.errors import BadInput
from signstep.lab.output import stats
from signstep.lab.paper.experiments import NAMES, Row, Scale, dataset_title, load
from signstep.lab.paper.tuned import learning_rate, read_tuned
from signstep.lab.training.records import Run
from signstep.lab.training.tasks import task

SCALES: tuple[Scale, ...] = ("full", "cpu2", "cpu")
"""Those that decide a claim, the largest first."""


@dataclass(frozen=True)
class Claim:
    """A sentence, and what decides it: one of `rows`, `statement`, `measured`, `target`, or nothing yet."""

    id: str
    whose: Literal["paper", "ours"]
    source: str
    """Where it is stated."""
    says: str
    bound: Bound
    rows: tuple[str, ...] = ()
    """Two rows: the first less the second, in units in which more is better, is claimed to lie within the bound."""
    dataset: str = ""
    beside: str = ""
    """Another data set, whose difference is taken off."""
    statement: str = ""
    """A statement of `signstep verify`."""
    measured: str = ""
    """An expression of `Evidence`: an estimate, a median with a low and a high end, or a number."""
    place: str = ""
    """Where `measured` comes from, as printed."""
    target: str = ""
    """A promise of `signstep bench step`."""
    condition: str = ""
    """Under which it holds, if it does."""
    instead: str = ""
    """What to do where it does not hold, or what it recommends where it holds."""


@dataclass(frozen=True)
class Verdict:
    """What results/ says of a claim."""

    claim: Claim
    outcome: Outcome
    evidence: str
    """What decided it, or the command that would."""
    n: int = 0
    interval: str = ""
    p: float | None = None
    """Of the paired t-test against the bound."""
    corrected: float | None = None
    """By Holm's correction for all tests of the page."""
    estimate: stats.MeanEstimate | None = None

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.outcome == "holds" and self.claim.condition:
            return f"holds under {self.claim.condition}"
        return self.outcome


def read_claims() -> list[Claim]:
    """The claims of claims.toml.

    Raises:
        BadInput: it has two of one id, or one with another number of bounds than one.
    """
    claims = []
    for each in tomllib.loads(Path(__file__).with_name("claims.toml").read_text("utf-8"))["claim"]:
        kinds = [kind for kind in ("above", "below", "within") if kind in each] or ["above"]
        if len(kinds) != 1:
            raise BadInput(f"claim {each['id']}: expected one bound, not {', '.join(kinds)}")
        bound = Bound(kinds[0], float(each.pop(kinds[0], 0.0)))  # type: ignore[arg-type]
        claims.append(Claim(**{**each, "bound": bound, "rows": tuple(each.get("rows", ()))}))
    if len({each.id for each in claims}) != len(claims):
        raise BadInput("claims.toml: two claims have one id")
    return claims


def statements(evidence: Evidence) -> list[Claim]:
    """The paper's statements that `signstep verify` has measured, as claims."""
    checks = evidence.file("verify/verify.json")["checks"]
    ours = Bound("above", 0.0)
    return [
        Claim(
            each["name"], "paper", each["source"].removeprefix("paper, "), each["claim"], ours, statement=each["name"]
        )
        for each in checks
        if each["source"].startswith("paper")
    ]


def verdicts(evidence: Evidence, claims: Iterable[Claim]) -> list[Verdict]:
    """The verdicts, each test corrected for the number of all."""
    runs = _Runs(evidence)
    raw = [_of_claim(each, evidence, runs) for each in claims]
    corrected = stats.holm([each.p for each in raw])
    return [each if p is None else _tested(each, p) for each, p in zip(raw, corrected, strict=True)]


def _tested(verdict: Verdict, corrected: float) -> Verdict:
    found = verdict.estimate
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    outcome = decide(found.low, found.mean, found.high, verdict.claim.bound, corrected)
    return replace(verdict, corrected=corrected, outcome=outcome)


def _of_claim(claim: Claim, evidence: Evidence, runs: _Runs) -> Verdict:
    if claim.rows:
        return _of_rows(claim, runs)
    if claim.statement:
        return _of_statement(claim, evidence)
    if claim.target:
        return _of_target(claim, evidence)
    if claim.measured:
        return _of_measured(claim, evidence)
    return Verdict(claim, "not measured yet", claim.place or "no experiment of ours")


class _Runs:
    """The finished runs in a folder of results, found by scale, row and data set."""

    def __init__(self, evidence: Evidence) -> None:
        self._folder, self._read = evidence.folder, evidence.runs
        self._tuned = cache(read_tuned)
        self._rows = cache(self._find_rows)

    def _find_rows(self, scale: Scale, dataset: str) -> dict[str, dict[str, Row]]:
        """By experiment that uses the data set, its rows by key."""
        loaded = (load(name, scale=scale) for name in NAMES if name != "demo")
        return {e.name: {row.key: row for row in e.rows} for e in loaded if dataset in e.datasets}

    def by_seed(self, scale: Scale, dataset: str, key: str) -> dict[int, float]:
        """A row's results by seed, in units in which more is better."""
        row = next((rows[key] for rows in self._rows(scale, dataset).values() if key in rows), None)
        folder = self._folder / f"{scale}-strong"
        if row is None or not (folder / "runs").is_dir():
            return {}
        runs: Mapping[str, Run] = self._read(folder / "runs")
        lr = learning_rate(row, dataset, self._tuned(folder))
        seeds = sorted({run.config.seed for run in runs.values()})
        found = {seed: runs.get(row.config(dataset, seed, lr).hash) for seed in seeds}
        sign = task(dataset).metric.sign
        return {seed: sign * run.result for seed, run in found.items() if run is not None and run.done}

    def experiments(self, scale: Scale, dataset: str, keys: Sequence[str]) -> list[str]:
        """The experiments that have all these rows on a data set."""
        return [name for name, rows in self._rows(scale, dataset).items() if set(keys) <= rows.keys()]

    def report(self, scale: Scale, dataset: str, keys: Sequence[str]) -> str | None:
        """The first of them whose report is there."""
        folder = self._folder / f"{scale}-strong"
        return next((n for n in self.experiments(scale, dataset, keys) if (folder / f"{n}.json").exists()), None)


def _of_rows(claim: Claim, runs: _Runs) -> Verdict:
    datasets = [claim.dataset, claim.beside] if claim.beside else [claim.dataset]
    found: list[tuple[Scale, stats.MeanEstimate]] = []
    for scale in SCALES:
        values: dict[str, dict[int, float]] = {}
        for dataset in datasets:
            row, base = (runs.by_seed(scale, dataset, key) for key in claim.rows)
            values[dataset] = {seed: row[seed] - base[seed] for seed in row.keys() & base.keys()}
        less = values[claim.beside] if claim.beside else dict.fromkeys(values[claim.dataset], 0.0)
        if (gap := stats.paired_difference(values[claim.dataset], less)) is not None:
            found.append((scale, gap))
    if not found:
        return Verdict(claim, "not measured yet", _command(claim, runs))
    scale, gap = next(((s, g) for s, g in found if g.n >= stats.MIN_SEEDS), found[0])
    unit = task(claim.dataset).metric
    where = f"{' less '.join(claim.rows)}, {' less '.join(dataset_title(d) for d in datasets)}, {scale}"
    if report := runs.report(scale, claim.dataset, claim.rows):
        where = f"{report}: {where}"
    p = p_value(gap, claim.bound) if gap.n >= stats.MIN_SEEDS else None
    texts = {s: stats.with_interval(g, sign=True, digits=unit.digits) for s, g in found}
    beside = [f"{s} {text}" for s, text in texts.items() if s != scale]
    interval = f"{texts[scale]} {unit.points}" + (f" (without a test: {', '.join(beside)})" if beside else "")
    return Verdict(claim, "undecided", where, gap.n, interval, p, estimate=gap)


def _command(claim: Claim, runs: _Runs) -> str:
    """The command that would measure it, at the scale that two cores can bear."""
    for scale in ("cpu2", "cpu"):
        if names := runs.experiments(scale, claim.dataset, claim.rows):
            return f"`signstep reproduce {names[0]} --scale {scale} --rows {' '.join(claim.rows)} --seeds 5`"
    return "no experiment has both rows"


def _of_statement(claim: Claim, evidence: Evidence) -> Verdict:
    check = evidence.one(evidence.file("verify/verify.json")["checks"], name=claim.statement)
    holds = check["verdict"] != "fails"
    outcome: Outcome = "holds" if holds else "does not hold"
    if check["verdict"].startswith("holds with"):
        claim = replace(claim, condition="")
    under = f", under {check['condition']}" if check["condition"] and not holds else ""
    better = ", with a better constant too" if check["verdict"] == "holds with a better constant" else ""
    return Verdict(claim, outcome, f"`signstep verify {claim.statement}`{under}{better}", interval=check["error"])


def _of_target(claim: Claim, evidence: Evidence) -> Verdict:
    """Met on every kind of machine, or on some, or missed."""
    kept: dict[str, list[str]] = {}
    for path in sorted((evidence.folder / "bench-cpu").glob("bench-step-*.json")):
        record = evidence.file(f"bench-cpu/{path.name}")
        for key, workload in record["workloads"].items():
            for each in workload["targets"]:
                if each["target"].startswith(claim.target):
                    kept.setdefault(each["verdict"], []).append(f"{path.stem.removeprefix('bench-step-')} {key}")
    counts = {verdict: len(kept.get(verdict, [])) for verdict in ("met", "undecided", "missed")}
    if not sum(counts.values()):
        return Verdict(claim, "not measured yet", "`signstep bench step`")
    outcome: Outcome = "undecided"
    if counts["met"] and counts["missed"]:
        claim = replace(claim, condition=f"some machines: {', '.join(kept['met'])}")
        outcome = "holds"
    elif counts["met"] == sum(counts.values()):
        outcome = "holds"
    elif counts["missed"] and not counts["met"]:
        outcome = "does not hold"
    words = ", ".join(f"{verdict} on {count}" for verdict, count in counts.items() if count)
    return Verdict(claim, outcome, f"`signstep bench step`: {words}", sum(counts.values()))


def _of_measured(claim: Claim, evidence: Evidence) -> Verdict:
    try:
        found: Any = evidence.value(claim.measured)
    except BadInput as error:
        if "FileNotFoundError" in str(error):
            return Verdict(claim, "not measured yet", claim.place)
        raise
    if found is None:
        return Verdict(claim, "not measured yet", claim.place)
    if isinstance(found, stats.MeanEstimate):
        interval = stats.with_interval(found, sign=True)
        if found.n < stats.MIN_SEEDS:
            return Verdict(claim, "undecided", claim.place, found.n, interval)
        return Verdict(claim, "undecided", claim.place, found.n, interval, p_value(found, claim.bound), estimate=found)
    low, middle, high = (found[k] for k in ("low", "median", "high")) if isinstance(found, Mapping) else [found] * 3
    words = f"{middle:.3g}" if low == high else f"{middle:.3g} ({low:.3g} to {high:.3g})"
    return Verdict(claim, decide(low, middle, high, claim.bound), claim.place, interval=words.replace("-", "−"))

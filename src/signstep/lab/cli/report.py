"""`signstep report`: tables, figures and a report of the runs there are, and what the docs take from results/."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from signstep.lab.cli.commands import parse, run
from signstep.lab.cli.experiments import ExperimentOptions
from signstep.lab.errors import BadInput


@dataclass(frozen=True)
class Report(ExperimentOptions):
    """Write tables, figures and report from the runs there are; train nothing.

    `signstep report claims` writes the verdict on each claim, `signstep report docs` the tables and numbers of README
    and docs. Each has its own options.
    """

    seeds: int = 3
    """Seeds 0 to this less one are counted."""

    def run(self) -> int:
        from signstep.lab.paper.plan import first_seeds, plan
        from signstep.lab.paper.tuned import read_tuned

        chosen = self.load()
        wanted = plan(chosen, first_seeds(self.seeds), read_tuned(self.folder))
        if not any((self.folder / "runs" / f"{each.config.hash}.jsonl").exists() for each in wanted):
            out = [] if self.out == Report().out else ["--out", str(self.out)]
            first = shlex.join(["signstep", "reproduce", *self.which, *out])
            raise BadInput(f"{self.folder / 'runs'} has none of the runs to report: train them first, with {first}")
        self.write_reports(chosen, self.seeds)
        return 0


@dataclass(frozen=True)
class ReportClaims:
    """Write docs/claims.md and results/claims.html: each claim of the paper and of ours with its verdict."""

    results: Path = Path("results")
    """Folder of the results that decide, and of the HTML page."""
    page: Path = Path("docs/claims.md")
    """Where the Markdown goes."""

    def run(self) -> int:
        from signstep.lab.docs import claims, claims_page
        from signstep.lab.docs.evidence import Evidence
        from signstep.lab.output.files import write_text

        evidence = Evidence(self.results)
        verdicts = claims.verdicts(evidence, [*claims.read_claims(), *claims.statements(evidence)])
        for path, text in (
            (self.page, claims_page.markdown(verdicts)),
            (self.results / "claims.html", claims_page.html(verdicts)),
        ):
            write_text(path, text)
            print(f"written: {path}")
        return 0


@dataclass(frozen=True)
class ReportDocs:
    """Write the tables and numbers of README and docs anew from results/, and say which differed.

    Exit code 1: with --check, something differs.
    """

    root: Path = Path()
    """Folder with README.md, docs and results."""
    check: bool = False
    """Say what differs, and write nothing."""

    def run(self) -> int:
        from signstep.lab.docs import numbers
        from signstep.lab.docs.evidence import Evidence
        from signstep.lab.output.files import write_text

        texts = numbers.written(numbers.pages_of(self.root), Evidence(self.root / "results"), self.root)
        changed = {page: pair for page, pair in texts.items() if pair[0] != pair[1]}
        for page, (before, after) in changed.items():
            for line in numbers.changes(before, after):
                print(f"{page}: {line}")
            if not self.check:
                write_text(page, after)
        print(f"{len(changed)} of {len(texts)} pages {'differ from results/' if self.check else 'were written anew'}")
        return 1 if self.check and changed else 0


_PAGES = {"claims": ReportClaims, "docs": ReportDocs}


def main(arguments: Sequence[str]) -> int:
    """Run `signstep report` with these words: an experiment and options, or one of `_PAGES` and its options."""
    name = arguments[0] if arguments else ""
    if name in _PAGES:
        return run(parse(_PAGES[name], arguments[1:], prog=f"signstep report {name}"))
    return run(parse(Report, arguments, prog="signstep report"))

"""`signstep report`: tables, figures and a report of the runs there are."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from signstep.lab.cli.experiments import ExperimentOptions
from signstep.lab.errors import BadInput


@dataclass(frozen=True)
class Report(ExperimentOptions):
    """Write tables, figures and report from the runs there are; train nothing."""

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

"""`signstep reproduce`: the paper's table and figures."""

from __future__ import annotations

from dataclasses import dataclass

from signstep.lab.cli.experiments import TrainingOptions


@dataclass(frozen=True)
class Reproduce(TrainingOptions):
    """Train what the table or figures still lack, then write them with a report."""

    seeds: int = 3
    """Runs of every row, with seeds 0, 1, ..."""

    def run(self) -> int:
        from signstep.lab.paper.reproduce import reproduce
        from signstep.lab.paper.tuned import read_tuned

        chosen, shard = self.begin()
        reproduce(
            chosen,
            self.folder,
            seeds=self.seeds,
            tuned=read_tuned(self.folder),
            data=self.data,
            device=self.device,
            max_minutes=self.max_minutes,
            shard=shard,
        )
        self.write_reports(chosen, self.seeds)
        return 0

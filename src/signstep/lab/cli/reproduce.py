"""`signstep reproduce`: the paper's table and figures."""

from __future__ import annotations

from dataclasses import dataclass

from signstep.lab.cli.experiments import Trainer, TrainingOptions

__all__ = ["Reproduce"]


@dataclass(frozen=True)
class Reproduce(TrainingOptions):
    """Train what the table or figures still lack, then write them with a report."""

    seeds: int = 3
    """Runs of every row, with seeds 0, 1, ..."""

    def run(self) -> int:
        """Train what is missing and write; the exit code."""
        from signstep.lab.paper.reproduce import reproduce
        from signstep.lab.paper.sweep import read_tuned
        from signstep.lab.training.records import is_done

        chosen, shard = self.begin()
        reproduce(
            chosen,
            self.folder,
            seeds=self.seeds,
            tuned=read_tuned(self.folder),
            train=Trainer(self.data, self.device),
            done=is_done,
            max_minutes=self.max_minutes,
            shard=shard,
        )
        self.write_reports(chosen, self.seeds)
        return 0

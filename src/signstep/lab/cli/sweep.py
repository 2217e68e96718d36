"""`signstep sweep`: the learning rate of every method."""

from __future__ import annotations

from dataclasses import dataclass

from signstep.lab.cli.experiments import TrainingOptions


@dataclass(frozen=True)
class Sweep(TrainingOptions):
    """Tune every method's learning rate with the same grid of trials on held-out training images."""

    trials: int = 5
    """Points of every method's learning rate grid."""

    def run(self) -> int:
        from signstep.lab.paper.sweep import sweep

        chosen, shard = self.begin()
        over = sweep(
            chosen,
            self.folder,
            data=self.data,
            device=self.device,
            trials=self.trials,
            max_minutes=self.max_minutes,
            shard=shard,
        )
        if over:
            print(f"every method is tuned: {self.folder / 'tuned.json'}")
        return 0

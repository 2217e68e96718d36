"""`signstep bench monitor`: its options, and what is done with them. How a loop is timed: `monitor_loops`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from signstep.lab.errors import BadInput
from signstep.lab.output.command import command_line


@dataclass(frozen=True)
class BenchMonitor:
    """Time a training with a Monitor, beside Cockpit if it is installed, and compare with the targets."""

    width: float = 0.25
    """The width of ResNet-18: 1 is 64 to 512 channels."""
    batch: int = 128
    """Images in a step, a multiple of 8."""
    rounds: int = 9
    """Times that every loop is timed, in turn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    out: Path | None = None
    """Folder to write bench-monitor.json and .md to."""

    def run(self) -> int:
        from signstep.lab.bench import monitor_report
        from signstep.lab.bench.monitor_loops import PARTS, measure_network
        from signstep.lab.bench.report import progress
        from signstep.lab.training.workers import Workers

        if self.rounds < 2:
            raise BadInput(f"--rounds {self.rounds}: expected at least 2")
        if self.batch < PARTS or self.batch % PARTS:
            raise BadInput(f"--batch {self.batch}: expected a multiple of {PARTS}")
        if not 0 < self.width < math.inf:
            raise BadInput(f"--width {self.width:g}: expected a number above 0")
        device = Workers.join(self.device).device
        command = command_line(
            ["bench", "monitor"], replace(self, device="cuda" if device.type == "cuda" else "cpu"), everything=True
        )
        with progress() as say:
            one = functools.partial(
                measure_network, width=self.width, batch=self.batch, rounds=self.rounds, device=device, say=say
            )
            results = [one(batch_norm=True), one(batch_norm=False)]
        record = monitor_report.to_dict(results, device, self.batch, command)
        monitor_report.show(results, record)
        if self.out is not None:
            for path in monitor_report.write(results, record, self.out):
                print(f"written: {path}")
        return 0

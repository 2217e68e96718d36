"""`signstep bench step`: its options, and what is done with them. How a step is timed: `step_timing`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from signstep.lab.bench.workloads import STEP_WORKLOADS, StepWorkload
from signstep.lab.errors import BadInput
from signstep.lab.output.command import command_line


@dataclass(frozen=True)
class BenchStep:
    """Time a step beside other optimizers and the speed of memory, in one process, and compare with the targets."""

    workload: tuple[StepWorkload, ...] = STEP_WORKLOADS
    """The networks whose parameters are stepped."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of parameters and gradients."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    rounds: int = 9
    """Times that every optimizer is timed, in turn."""
    millions: float = 50.0
    """Parameters of the workload 50m, in millions."""
    only: tuple[str, ...] = ()
    """Rows to time, by their keys (clean, dither, hybrid, ...), beside fused SGD and the limit; default: all."""
    out: Path | None = None
    """Folder to write bench-step-<processor>-<instruction set>.json, .md, .png and .svg to."""

    def run(self) -> int:
        from rich.console import Console

        from signstep.lab.bench import step_report
        from signstep.lab.bench.report import progress
        from signstep.lab.bench.step_timing import measure_workload
        from signstep.lab.training.workers import Workers

        if not self.workload:
            raise BadInput("--workload: expected at least one of " + ", ".join(STEP_WORKLOADS))
        device, console = Workers.join(self.device).device, Console()
        workloads = tuple(dict.fromkeys(self.workload))
        results = []
        for workload in workloads:
            with progress() as say:
                result = measure_workload(
                    workload,
                    dtype=self.dtype,
                    device=device,
                    rounds=self.rounds,
                    millions=self.millions,
                    only=self.only,
                    say=say,
                )
            step_report.show(console, result, self.dtype)
            results.append(result)
        for note in step_report.NOTES:
            console.print(note, highlight=False)
        if self.out is not None:
            options = replace(self, workload=workloads, device="cuda" if device.type == "cuda" else "cpu")
            command = command_line(["bench", "step"], options, everything=True)
            if forced := os.environ.get("SIGNSTEP_ISA"):
                command = f"SIGNSTEP_ISA={forced} {command}"
            for path in step_report.write(results, self.out, dtype=self.dtype, device=device, command=command):
                print(f"written: {path}")
        return 0

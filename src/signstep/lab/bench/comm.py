"""`signstep bench comm`: its options, and what is done with them. How a cell is measured: `comm_cells`."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path

from signstep.lab.arguments import check_minutes
from signstep.lab.output.command import command_line


@dataclass(frozen=True)
class BenchComm:
    """Time a step over the network with every way to reduce gradients, and count the bytes that are sent.

    As root on Linux every rank gets a network namespace and a link of the given rate; else all share the loopback
    interface.
    """

    rates: tuple[str, ...] = ()
    """Of the links: 10mbit, 1gbit, ...; with the latency of a round trip, half of it each way: 10mbit/50ms; none: not
    shaped; loopback: without namespaces. Default: 10mbit 100mbit 1gbit none as root on Linux, else loopback."""
    ranks: tuple[int, ...] = (2, 4, 8)
    """Numbers of processes."""
    methods: tuple[str, ...] = ()
    """Which ones; default: all. Ratios need ddp-fp32."""
    params: tuple[str, ...] = ("4e6", "resnet18")
    """The gradients that are sent: those of resnet18, or of so many parameters (4e6, 11M) in six tensors."""
    rounds: int = 9
    """Times that every method is timed, in turn, at most; slow cells have fewer, at least 3."""
    seconds: float = 20.0
    """After which no further round of a cell begins."""
    max_minutes: float = 40.0
    """Give up after this many minutes."""
    out: Path | None = None
    """Folder to write bench-comm.json, .md and figures to, after every cell."""

    def run(self) -> int:
        from rich.console import Console

        from signstep.distributed.reductions import REDUCTIONS
        from signstep.lab.bench import comm_report
        from signstep.lab.bench.comm_cells import CommPlan, CommResult, CommWorkload, default_rates, measure_cells
        from signstep.lab.bench.report import progress

        check_minutes(self.max_minutes)
        plan = CommPlan(
            rates=tuple(dict.fromkeys(self.rates)) or default_rates(),
            ranks=tuple(dict.fromkeys(self.ranks)),
            methods=tuple(dict.fromkeys(self.methods)) or tuple(REDUCTIONS),
            workloads=tuple(CommWorkload.of(each) for each in dict.fromkeys(self.params)),
            rounds=self.rounds,
            seconds=self.seconds,
        )
        params = tuple(each.key for each in plan.workloads)
        options = replace(self, rates=plan.rates, ranks=plan.ranks, methods=plan.methods, params=params)
        command = command_line(["bench", "comm"], options, everything=True)
        console = Console()

        def done(result: CommResult) -> None:
            comm_report.show(console, result)
            if self.out is not None:
                comm_report.write(result, self.out, command)

        # End as after Ctrl-C, so that namespaces and processes are taken down.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with progress() as say:
            result = measure_cells(plan, minutes=self.max_minutes, done=done, say=say)
        for line in result.left_out:
            console.print(f"not measured: {line}", highlight=False)
        for note in comm_report.notes(result):
            console.print(note, highlight=False)
        if self.out is not None:
            print(f"written: {self.out}")
        return 0

"""`signstep plan`: what a step over the network costs, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from signstep.lab.arguments import parse_count
from signstep.lab.errors import BadInput


@dataclass(frozen=True)
class Plan:
    """Predict bytes and time of a step over the network with every method, and what a vote is worth."""

    params: str = "11M"
    """Parameters of the model, as in 11M, 4e6 or 1.5B."""
    workers: int = 16
    """Workers that train it together."""
    bandwidth: str = "100mbit"
    """The rate of each worker's link, each way."""
    step_ms: float = 80.0
    """Milliseconds of a step without communication."""
    latency_ms: float = 0.0
    """Latency of a round trip between two workers, in milliseconds."""
    check: Path | None = None
    """Instead, compare the model with this bench-comm.json of signstep bench comm."""

    def run(self) -> int:
        from rich.console import Console

        from signstep.distributed.plan import Cost, Link, bits_per_second
        from signstep.distributed.reductions import Gradients
        from signstep.lab.bench import plan_report

        console = Console()
        if self.check is not None:
            plan_report.show_check(console, plan_report.check(self.check))
            return 0
        for option, good in (
            ("workers", 1 <= self.workers <= 1000),
            ("step-ms", 0 <= self.step_ms < float("inf")),
            ("latency-ms", 0 <= self.latency_ms < float("inf")),
        ):
            if not good:
                value = getattr(self, option.replace("-", "_"))
                raise BadInput(f"--{option} {value:g}: out of range; see signstep plan --help")
        try:
            params = parse_count(self.params)
        except ValueError as error:
            raise BadInput(f"--params {error}") from error
        try:
            bandwidth = bits_per_second(self.bandwidth)
        except ValueError as error:
            raise BadInput(f"--bandwidth {error}") from error
        cost = Cost(self.workers, Link(bandwidth, self.latency_ms / 1e3), self.step_ms / 1e3)
        plan_report.show_costs(console, Gradients.square(params), cost)
        plan_report.show_votes(console, self.workers)
        for note in plan_report.NOTES:
            console.print(note, highlight=False)
        return 0

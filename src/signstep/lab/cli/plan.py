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
    """Parameters of the model, as in 11M, 4e6 or 7B."""
    workers: int = 16
    """Workers that train it together, up to 1000."""
    rate: str = "100mbit"
    """The rate of each worker's link, each way; with the latency of a round trip: 100mbit/20ms."""
    step_ms: float = 80.0
    """Milliseconds of a step without communication."""
    every: tuple[int, ...] = (8, 32, 128)
    """Steps of a round, for methods that talk once in so many."""
    snr: float = 0.1
    """What a vote is about: m / sigma, signal over noise, of a worker's step in a coordinate."""
    measured: Path | None = None
    """A bench-comm.json of signstep bench comm --rates none, which says how much work the methods are for a processor;
    default: results/bench-comm-latency, of an AMD EPYC."""
    check: Path | None = None
    """Instead, compare the model with this bench-comm.json."""

    def run(self) -> int:
        from rich.console import Console

        from signstep.distributed.plan import Cost, Link
        from signstep.distributed.reductions import Gradients
        from signstep.lab.bench import plan_report
        from signstep.lab.bench.work import known_work

        console = Console()
        if self.check is not None:
            plan_report.show_check(console, plan_report.check(self.check, self.measured))
            return 0
        for option, good in (
            ("workers", 1 <= self.workers <= 1000),
            ("step-ms", 0 <= self.step_ms < float("inf")),
            ("snr", self.snr >= 0),
        ):
            if not good:
                value = getattr(self, option.replace("-", "_"))
                raise BadInput(f"--{option} {value:g}: out of range; see signstep plan --help")
        for steps in self.every:
            if steps < 1:
                raise BadInput(f"--every {steps}: expected at least 1")
        try:
            params = parse_count(self.params)
        except ValueError as error:
            raise BadInput(f"--params {error}") from error
        try:
            link = Link.of(self.rate)
        except ValueError as error:
            raise BadInput(f"--rate {error}") from error
        gradients, cost = Gradients.square(params), Cost(self.workers, link, self.step_ms / 1e3)
        rows = plan_report.cost_rows(gradients, cost, self.every, known_work(self.measured, self.workers))
        plan_report.show_costs(console, gradients, cost, rows, self.snr)
        for note in plan_report.NOTES:
            console.print(note, highlight=False)
        plan_report.show_votes(console, self.workers)
        for note in plan_report.VOTE_NOTES:
            console.print(note, highlight=False)
        return 0

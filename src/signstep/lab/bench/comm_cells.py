"""How `signstep bench comm` measures a step over the network, with each way to reduce gradients in turn.

Each rank is a process of its own, as root in a network namespace of its own whose link has the rate of the cell (see
`netns`) and the latency (see `delayed`), else on the loopback interface. The model's forward and backward cost next to
nothing, so a step is communication, hook and optimizer. In every round each method takes a window of steps in turn, in
a shuffled order; a ratio is taken within a round, because two times of one round met the same machine.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from signstep.distributed.plan import Cost, Link, predict
from signstep.distributed.reductions import REDUCTIONS, Gradients
from signstep.lab.arguments import parse_count
from signstep.lab.bench import delayed, netns
from signstep.lab.bench.comm_methods import PEER
from signstep.lab.bench.comm_rank import LEAST_ROUNDS, CommWindow
from signstep.lab.bench.spread import BenchError, Spread
from signstep.lab.bench.workloads import shapes_of
from signstep.lab.errors import BadInput

LOOPBACK, UNSHAPED = "loopback", "none"
RATES = ("10mbit", "100mbit", "1gbit", UNSHAPED)
# A workload whose fp32 step would take longer is left out of a cell: three rounds of it would take minutes.
_SLOWEST_SECONDS = 30.0
# A rank's memory: that of its process; two numbers per parameter that all methods share, the parameter and its
# gradient; and about three for each method, its bucket, momentum and residual.
_PROCESS_BYTES = 350 * 2**20
_SHARED_NUMBERS, _METHOD_NUMBERS = 2, 3
# Bytes that headers, padding and flags may add to a small payload.
_LOOSE = 50_000
_RANK = "signstep.lab.bench.comm_rank"


@dataclass(frozen=True)
class CommWorkload:
    """Whose gradients are sent."""

    key: str
    title: str
    gradients: Gradients

    @classmethod
    def of(cls, text: str) -> CommWorkload:
        """ResNet-18's parameters, or so many in five square matrices and a vector.

        Raises:
            BadInput: neither "resnet18" nor a number from 1000.

        >>> CommWorkload.of("4e6").gradients.shapes
        ((894, 894), (894, 894), (894, 894), (894, 894), (894, 894), (3820,))
        """
        if text == "resnet18":
            title, shapes = shapes_of("resnet18")
        else:
            try:
                count = parse_count(text, least=1000)
            except ValueError as error:
                raise BadInput(f"--params {error}; or resnet18") from error
            side = math.isqrt((count - 1) // 5)
            title, shapes = f"{count / 1e6:g} M in six tensors", [(side, side)] * 5 + [(count - 5 * side * side,)]
        return cls(text, title, Gradients(tuple(shapes)))


@dataclass(frozen=True)
class CommCell:
    """One workload's measurements with so many ranks at one rate."""

    workload: str
    ranks: int
    rate: str
    steps: dict[str, int]
    """How many a window has, by method."""
    rounds: list[dict[str, CommWindow]]
    """What each method took, in the order in which they were timed."""

    def seconds(self, key: str) -> Spread:
        """Of a step."""
        return Spread.of([each[key].seconds for each in self.rounds])

    def faster(self, key: str) -> Spread | None:
        """How many times faster than the peer; None where that did not run."""
        if PEER not in self.steps:
            return None
        return Spread.of([each[PEER].seconds / each[key].seconds for each in self.rounds])

    def sent(self, key: str, gradients: Gradients) -> float:
        """Bytes per rank and step: counted at the interface, or on the loopback interface the method's payload."""
        if self.rate == LOOPBACK:
            return REDUCTIONS[key].payload(gradients, self.ranks)
        return statistics.median(each[key].sent for each in self.rounds)

    def cpu(self, key: str) -> float:
        """Processor seconds per rank and step."""
        return statistics.median(each[key].cpu for each in self.rounds)


@dataclass
class CommResult:
    """All cells, as they come in."""

    workloads: dict[str, CommWorkload]
    methods: list[str]
    cells: list[CommCell] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Cells that were not measured, and why."""


@dataclass(frozen=True)
class CommPlan:
    """What to measure.

    Raises:
        BadInput: an option that names nothing, or less than one can measure.
    """

    rates: tuple[str, ...]
    ranks: tuple[int, ...]
    methods: tuple[str, ...]
    workloads: tuple[CommWorkload, ...]
    rounds: int
    """At most; slow cells have fewer, and none has fewer than 3."""
    seconds: float
    """A cell begins no further round after so long."""

    def __post_init__(self) -> None:
        for option in ("rates", "ranks", "methods", "workloads"):
            if not getattr(self, option):
                raise BadInput(f"--{option.replace('workloads', 'params')}: expected at least one")
        for rate in self.rates:
            self.link(rate)
        for method in self.methods:
            if method not in REDUCTIONS:
                raise BadInput(f"--methods {method}: expected some of {', '.join(REDUCTIONS)}")
        for count in self.ranks:
            if not 2 <= count <= 250:
                raise BadInput(f"--ranks {count}: expected from 2 to 250")
        if self.rounds < LEAST_ROUNDS:
            raise BadInput(f"--rounds {self.rounds}: expected at least {LEAST_ROUNDS}")

    @staticmethod
    def link(rate: str) -> Link | None:
        """A cell's rate and latency; None where links are not shaped."""
        if rate in (LOOPBACK, UNSHAPED):
            return None
        try:
            return Link.of(rate)
        except ValueError as error:
            raise BadInput(f"--rates {error}, {UNSHAPED} (links that are not shaped) or {LOOPBACK}") from error


def default_rates() -> tuple[str, ...]:
    """All of `RATES` where this process can have network namespaces, else loopback."""
    return RATES if netns.missing() is None else (LOOPBACK,)


class Ranks:
    """The processes of one process group, which answer commands; a context manager that ends them.

    Args:
        count: how many.
        network: theirs; None: the loopback interface.

    Raises:
        BenchError: from `ask`: a rank has ended, or no answer came in time.
    """

    def __init__(self, count: int, network: netns.Network | None) -> None:
        self._count, self._network = count, network
        self._stack = ExitStack()
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ranks:
        with self._stack:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="signstep-")))
            for rank in range(self._count):
                command = [sys.executable, "-m", _RANK]
                with (self._folder / f"{rank}.err").open("wb") as errors:
                    process = subprocess.Popen(
                        self._network.command(rank, command) if self._network else command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                        start_new_session=True,
                    )
                self._stack.callback(netns.end, process)
                self.processes.append(process)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def set_up(self, workload: CommWorkload, methods: Sequence[str], deadline: float) -> dict[str, CommWindow]:
        """Have every rank join and set up the methods, and return what a first step of each took.

        Raises:
            BenchError: a method does not send what its formula says.
        """
        common = {
            "ranks": self._count,
            "store": str(self._folder / "store"),
            "interface": netns.DEVICE if self._network else _loopback(),
            "counted": self._network is not None,
            "shapes": workload.gradients.shapes,
            "methods": methods,
        }
        answer = self.ask([{**common, "rank": rank} for rank in range(self._count)], deadline)
        trial = {key: CommWindow(**sample) for key, sample in answer["trial"].items()}
        if self._network:
            for key, sample in trial.items():
                payload = REDUCTIONS[key].payload(workload.gradients, self._count)
                if not payload - _LOOSE < sample.sent < 1.5 * payload + _LOOSE:
                    raise BenchError(
                        f"{key}: a rank sends {sample.sent:,.0f} bytes per step, where the formula of "
                        f"signstep.distributed.plan says {payload:,.0f}; one of the two is wrong"
                    )
        return trial

    def ask(self, commands: Sequence[dict[str, Any]], deadline: float) -> dict[str, Any]:
        """Give each rank its command and return rank 0's answer, when all have; `deadline` is of time.monotonic()."""
        for rank, (process, command) in enumerate(zip(self.processes, commands, strict=True)):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(command).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._ended(rank) from None
        answers = [b""] * self._count
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while selector.get_map():
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise BenchError("the benchmark's time is over: give it more with --max-minutes, or less to do")
                for key, _ in events:
                    content = os.read(key.fd, 1 << 16)
                    if not content:
                        raise self._ended(key.data)
                    answers[key.data] += content
                    if content.endswith(b"\n"):
                        selector.unregister(key.fileobj)
        answer: dict[str, Any] = json.loads(answers[0])
        return answer

    def _ended(self, rank: int) -> BenchError:
        lines = (self._folder / f"{rank}.err").read_text(errors="replace").strip().splitlines()
        said = lines[-1].removeprefix(f"[rank{rank}]: ") if lines else "it said nothing"
        return BenchError(f"rank {rank} of {self._count} has ended: {said}")


def _loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def measure_cells(
    plan: CommPlan,
    *,
    minutes: float,
    done: Callable[[CommResult], None],
    say: Callable[[str], None] = lambda line: None,
) -> CommResult:
    """Measure every cell.

    Args:
        plan: which they are.
        minutes: after which whatever is being measured is given up.
        done: told after every cell.
        say: told what happens.

    Raises:
        NetworkError: a rate other than "loopback" where there are no network namespaces.
        BenchError: a method fails, or does not give all ranks the same parameters; or the time is over.
    """
    deadline = time.monotonic() + 60 * minutes
    result = CommResult({each.key: each for each in plan.workloads}, list(plan.methods))
    for workload in plan.workloads:
        for count in plan.ranks:
            reasons = {rate: _reason_against(plan, workload, count, rate) for rate in plan.rates}
            result.left_out += [
                f"{workload.title}, {count} ranks, {rate}: {reason}" for rate, reason in reasons.items() if reason
            ]
            rates = [rate for rate, reason in reasons.items() if reason is None]
            for chosen in _by_network(rates):
                _run_group(plan, result, workload, count, chosen, deadline, done, say)
    return result


def _reason_against(plan: CommPlan, workload: CommWorkload, ranks: int, rate: str) -> str | None:
    """Why a cell cannot be measured here; None where it can."""
    count = workload.gradients.parameters
    needed = ranks * (_PROCESS_BYTES + 4 * count * (_SHARED_NUMBERS + _METHOD_NUMBERS * len(plan.methods)))
    free = free_memory()
    if free is not None and needed > free:
        return (
            f"{len(plan.methods)} methods take about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free: name "
            "fewer with --methods"
        )
    if PEER in plan.methods:
        seconds = _communication(PEER, workload, ranks, plan.link(rate))
        if seconds > _SLOWEST_SECONDS:
            return f"a step of {REDUCTIONS[PEER].label} would take {seconds:.0f} s"
    return None


def _communication(key: str, workload: CommWorkload, ranks: int, link: Link | None) -> float:
    """Seconds that a step of a method communicates, as predicted."""
    if link is None:
        return 0.0
    return predict(REDUCTIONS[key], workload.gradients, Cost(ranks, link, step=0.0)).communication


def _by_network(rates: Sequence[str]) -> list[list[str]]:
    """The cells that can share one network: those on the loopback interface, those with latency, and the others."""
    groups: dict[tuple[bool, bool], list[str]] = {}
    for rate in rates:
        link = CommPlan.link(rate)
        groups.setdefault((rate == LOOPBACK, link is not None and link.latency > 0), []).append(rate)
    return list(groups.values())


def free_memory() -> int | None:
    """Bytes that processes can still have; None where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    return next(1024 * int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvail"))


def _run_group(
    plan: CommPlan,
    result: CommResult,
    workload: CommWorkload,
    count: int,
    rates: Sequence[str],
    deadline: float,
    done: Callable[[CommResult], None],
    say: Callable[[str], None],
) -> None:
    """The cells that the same processes can measure."""
    with ExitStack() as stack:
        network = None
        if rates[0] != LOOPBACK:
            first = plan.link(rates[0])
            network = stack.enter_context(delayed.network(count, latency=first is not None and first.latency > 0))
        ranks = stack.enter_context(Ranks(count, network))
        say(f"{workload.title}, {count} ranks: setting up {', '.join(plan.methods)}")
        ranks.set_up(workload, plan.methods, deadline)
        for rate in rates:
            link = plan.link(rate)
            if network:
                network.shape(link)
            say(f"{workload.title}, {count} ranks, {rate}: timing")
            expected = {key: _communication(key, workload, count, link) for key in plan.methods}
            command = {"expected": expected, "rounds": plan.rounds, "seconds": plan.seconds}
            answer = ranks.ask([command] * count, deadline)
            rounds = [{key: CommWindow(**sample) for key, sample in each.items()} for each in answer["rounds"]]
            result.cells.append(CommCell(workload.key, count, rate, answer["steps"], rounds))
            done(result)

"""How `signstep bench monitor` measures what a `Monitor` costs a training, beside Cockpit, in one process.

A loop is a training that a `Monitor` or Cockpit looks at. Its own steps are those that are measured, its other steps
those in between, and plain steps are the same training with nobody looking. Every round times all three in a shuffled
order on the same network and batch, and a ratio is taken within a round. Memory: `signstep.lab.bench.peak_memory`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signstep.lab.bench.peak_memory import forward_pass, peaks
from signstep.lab.bench.spread import BenchError, Spread
from signstep.lab.bench.targets import Target
from signstep.lab.training.models import build
from signstep.monitor.monitor import Monitor
from signstep.monitor.sinks import JSONLines
from signstep.optim import SignSGD

Batch = tuple[Tensor, Tensor]
Say = Callable[[str], None]
EVERY, PARTS = 50, 8
COCKPIT: dict[str, tuple[str, ...]] = {
    "cockpit-snr": ("MeanGSNR",),
    "cockpit-histogram": ("GradHist1d",),
    "cockpit-all": ("MeanGSNR", "GradHist1d", "NormTest", "InnerTest", "OrthoTest"),
}
INSTALL = (
    "pip install --no-deps cockpit-for-pytorch==1.0.2 backpack-for-pytorch==1.7.1, then pip install einops unfoldNd "
    "json-tricks pandas seaborn 'setuptools<80'"
)
REPEATS = 4
"""Other and plain steps that a round times beside each own step."""
_SEED = 0


@dataclass(frozen=True)
class Loop:
    """A training that is looked at, and the plain one. `arm(True)` makes the next step an own one, `arm(False)` not."""

    label: str
    plain: Callable[[], None]
    step: Callable[[], None]
    arm: Callable[[bool], None]


@dataclass
class MonitorResult:
    """One network's measurements, by loop."""

    title: str
    parameters: int
    gradient_bytes: int
    labels: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # why a loop has no times
    said: list[str] = field(default_factory=list)  # warnings of Cockpit and BackPACK
    peaks: dict[str, dict[str, tuple[int, int | None]]] = field(default_factory=dict)  # of plain and own steps
    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)  # seconds of plain, other and own steps

    def over(self, key: str, kind: str) -> Spread:
        """An own or other step's time over that of a plain one."""
        return Spread.of([r[key][kind] / r[key]["plain"] for r in self.rounds])

    def extra(self, key: str, than: str = "monitor") -> Spread:
        """How much longer own steps are than plain ones, over the same of another loop."""
        longer = ([r[k]["own"] / r[k]["plain"] - 1 for r in self.rounds] for k in (key, than))
        return Spread.of([a / b if b != 0 else math.inf for a, b in zip(*longer, strict=True)])

    def overhead(self, key: str) -> Spread:
        """(49 other + own) / (50 plain) - 1, in percent."""
        rounds = [r[key] for r in self.rounds]
        return Spread.of([100 * (((EVERY - 1) * r["other"] + r["own"]) / (EVERY * r["plain"]) - 1) for r in rounds])

    def excess(self, key: str) -> tuple[float | None, float | None]:
        """An own step's peaks beyond the plain step's, over the gradients' bytes."""
        pairs = zip(self.peaks[key]["own"], self.peaks[key]["plain"], strict=True)
        whole, lasting = (None if a is None or b is None else (a - b) / self.gradient_bytes for a, b in pairs)
        return whole, lasting

    def targets(self) -> list[Target]:
        """What signstep promises, beside what was measured."""
        found = []
        for key in ("monitor", "monitor-accumulation"):
            label, whole = self.labels[key], self.excess(key)[0]
            assert whole is not None
            found.append(Target(f"{label}: % of {EVERY} plain steps", 5.0, False, self.overhead(key)))
            found.append(Target(f"{label}: peak, over the gradients", 2.0, False, Spread(whole, whole, whole)))
        return found


class Training:
    """A network under SignSGD and one batch of noise; a step begins and ends without gradients."""

    def __init__(self, model: nn.Module, batch: Batch, criterion: Callable[..., Tensor]) -> None:
        self.model, self.batch, self.criterion = model, batch, criterion
        self.optimizer = SignSGD(model.parameters(), lr=1e-6)  # the network stays what it is

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of a batch or a part of it."""
        with forward_pass():
            return self.criterion(self.model(x), y)

    def step(self, parts: int = 1) -> None:
        """Train on the batch, as so many micro-batches."""
        for x, y in zip(*(each.chunk(parts) for each in self.batch), strict=True):
            (self.loss(x, y) / parts).backward()  # type: ignore[no-untyped-call]
        self.end()

    def end(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def monitored(plain: Training, folder: Path, *, accumulate: bool) -> Loop:
    """A loop with a `Monitor`, which writes its records into `folder`."""
    training = Training(plain.model, plain.batch, plain.criterion)  # an optimizer of its own, for the monitor's hooks
    sink = JSONLines(folder / f"accumulate-{accumulate}.jsonl")
    monitor = Monitor(training.model, training.optimizer, every=EVERY, sinks=[sink])

    def step() -> None:
        monitor.measure(training.loss, *training.batch, parts=PARTS)
        training.step()

    def arm(own: bool) -> None:
        monitor.load_state_dict(monitor.state_dict() | {"step": 0 if own else 1})

    loop = Loop(f"Monitor, measure(parts={PARTS})", plain.step, step, arm)
    if accumulate:
        one, other = (functools.partial(each.step, PARTS) for each in (plain, training))
        loop = Loop("Monitor, accumulation", one, other, arm)
    loop.step()
    if monitor.last is None or "snr" not in monitor.last["reliability"]:
        raise BenchError(f"{loop.label}: its own step has measured nothing")
    return loop


def with_cockpit(plain: Training, training: Training, names: Iterable[str], said: list[str]) -> Loop:
    """A loop with some of Cockpit's quantities; BackPACK has extended the training's network and criterion."""
    cockpit, schedules = importlib.import_module("cockpit"), importlib.import_module("cockpit.utils.schedules")
    chosen = [getattr(cockpit.quantities, name)(schedules.linear(EVERY)) for name in names]
    looking, at = cockpit.Cockpit(training.model.parameters(), chosen), 0

    def step() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = training.loss(*training.batch)
            info = {"batch_size": len(training.batch[0]), "loss": loss, "optimizer": training.optimizer}
            with looking(at, info=info):
                loss.backward(create_graph=looking.create_graph(at))  # type: ignore[no-untyped-call]
            training.end()
        texts = [str(each.message) for each in caught if {"backpack", "cockpit"} & set(Path(each.filename).parts)]
        said.extend(text for text in dict.fromkeys(texts) if text not in said)

    def arm(own: bool) -> None:
        nonlocal at
        at = 0 if own else 1

    step()
    if not set(names) <= looking.get_output()[0].keys():
        raise BenchError(f"Cockpit has not measured all of {', '.join(names)}")
    return Loop(f"Cockpit {', '.join(names)}", plain.step, step, arm)


def network(width: float, device: torch.device, *, batch_norm: bool) -> nn.Module:
    """ResNet-18; without batch norm, identities in its place."""
    torch.manual_seed(_SEED)
    model = build("resnet18", num_classes=10, width=width)
    for module in [] if batch_norm else list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model.to(device)


def set_up(make: Callable[[], nn.Module], batch: Batch, folder: Path, result: MonitorResult) -> dict[str, Loop]:
    """The loops that can run, each after an own step; `result` is told why others cannot."""
    plain, extended = Training(make(), batch, F.cross_entropy), None
    plain.step()
    loops = {"monitor": monitored(plain, folder, accumulate=False)}
    loops["monitor-accumulation"] = monitored(plain, folder, accumulate=True)
    for key, names in COCKPIT.items():
        try:
            if extended is None:
                extend = importlib.import_module("backpack").extend
                extended = Training(extend(make()), batch, extend(nn.CrossEntropyLoss()))
            loops[key] = with_cockpit(plain, extended, names, result.said)
        except ImportError as error:
            result.missing["Cockpit"] = f"{error}; {INSTALL}"
            break
        except Exception as error:  # these packages fail in ways of their own
            result.missing[f"Cockpit {', '.join(names)}"] = f"{type(error).__name__}: {error}"
    return loops


def timed(loop: Loop, shuffle: random.Random, device: torch.device) -> dict[str, float]:
    """One round's seconds of a loop: of one own step, and the medians of four other and four plain ones."""
    kinds = ["own", *["other", "plain"] * REPEATS]
    shuffle.shuffle(kinds)
    seconds: dict[str, list[float]] = {}
    gc.collect()
    gc.disable()
    try:
        for kind in kinds:
            loop.arm(kind == "own")
            _wait(device)
            started = time.perf_counter()
            (loop.plain if kind == "plain" else loop.step)()
            _wait(device)
            seconds.setdefault(kind, []).append(time.perf_counter() - started)
    finally:
        gc.enable()
    return {kind: statistics.median(each) for kind, each in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_network(
    *, batch_norm: bool, width: float, batch: int, rounds: int, device: torch.device, say: Say
) -> MonitorResult:
    """Measure ResNet-18 on `batch` images of 3 x 32 x 32; `say` is told what happens."""
    data = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    make = functools.partial(network, width, device, batch_norm=batch_norm)
    sizes = [(p.numel(), p.element_size()) for p in make().parameters()]
    title = "ResNet-18" if batch_norm else "ResNet-18 without batch norm"
    result = MonitorResult(title, sum(n for n, _ in sizes), sum(n * size for n, size in sizes))
    say(f"{title}: setting up")
    with tempfile.TemporaryDirectory() as folder:
        loops = set_up(make, data, Path(folder), result)
        for key, loop in loops.items():
            result.labels[key] = loop.label
            loop.arm(True)
            result.peaks[key] = {"own": peaks(loop.step, device), "plain": peaks(loop.plain, device)}
        shuffle = random.Random(_SEED)
        for number in range(1, rounds + 1):
            say(f"{title}: round {number} of {rounds}")
            order = shuffle.sample(list(loops), len(loops))
            result.rounds.append({key: timed(loops[key], shuffle, device) for key in order})
    return result

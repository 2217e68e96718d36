"""How `signstep bench step` times a step, beside other optimizers and the speed of memory, in one process.

Every round times every contestant of a group once, in a shuffled order, on the same parameters and gradients. A ratio
is taken within a round, because two times of one round met the same machine; absolute times do not mean much on a
machine that is shared.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from signstep.lab.bench.spread import BenchError, Spread
from signstep.lab.bench.step_contestants import (
    COPY,
    PEER,
    Contestant,
    CopyLoop,
    NotAvailable,
    Stepper,
    groups,
    peer_for,
)
from signstep.lab.bench.workloads import StepWorkload, shapes_of
from signstep.lab.errors import BadInput

_SEED = 0
_WARM_UP = 3
# This group's steps take seconds, so it gets a third of the rounds; its ratios are large and need no precision.
_SLOW, _SLOWER = "plain dither", 3
# Leading elements of each tensor that are compared to see a change.
_SAMPLE = 4096


@dataclass(frozen=True)
class StepEntry:
    """What is known of a contestant beside its times."""

    label: str
    kind: str
    bytes_per_parameter: float = 0.0
    """Bytes that a step must move: p and its state read and written, g read; of the copy, what it moves."""
    state_bytes: int = 0
    """Counted in the optimizer's state."""
    missing: str | None = None
    """Why it has no times."""


@dataclass(frozen=True)
class StepRound:
    """One round's seconds by contestant, in the order in which they were timed."""

    group: str
    seconds: dict[str, float]


@dataclass
class StepResult:
    """One workload's measurements."""

    workload: str
    title: str
    tensors: int
    parameters: int
    peer: str = PEER
    """The contestant that ratios are over."""
    entries: dict[str, StepEntry] = field(default_factory=dict)
    rounds: list[StepRound] = field(default_factory=list)

    def measured(self, key: str) -> bool:
        """Whether this contestant has times."""
        return any(key in r.seconds for r in self.rounds)

    def median(self, key: str) -> float:
        """Median of a contestant's seconds."""
        return statistics.median(r.seconds[key] for r in self.rounds if key in r.seconds)

    def ratio(self, over: str, under: str) -> Spread | None:
        """Time of `over` per time of `under`, round by round; None where they never ran together."""
        values = [r.seconds[over] / r.seconds[under] for r in self.rounds if {over, under} <= r.seconds.keys()]
        return Spread.of(values) if values else None

    def share(self, key: str) -> Spread | None:
        """The share of the copy's bytes per second that a contestant's step reaches."""
        ratio = self.ratio(COPY, key)
        if ratio is None:
            return None
        scale = self.entries[key].bytes_per_parameter / self.entries[COPY].bytes_per_parameter
        return ratio.scaled(scale)


def _counted(value: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes by address of every storage in nested dicts and sequences."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for each in value.values():
            _counted(each, found)
    elif isinstance(value, list | tuple):
        for each in value:
            _counted(each, found)
    return found


def state_bytes(state: Mapping[Any, Any]) -> int:
    """Bytes of all the tensors in an optimizer's state, each storage once."""
    return sum(_counted(state, {}).values())


def make_parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[list[Parameter], list[Tensor]]:
    """Parameters of these shapes and a gradient for each, normally distributed and the same in every call."""
    generator = torch.Generator(device).manual_seed(_SEED)
    make = functools.partial(torch.randn, generator=generator, dtype=dtype, device=device)
    return [Parameter(make(shape)) for shape in shapes], [make(shape) for shape in shapes]


class StepRunner:
    """A contestant that is set up: it has stepped, and changed every parameter.

    Raises:
        BenchError: a step leaves a parameter as it was, or changes a gradient.
    """

    def __init__(self, contestant: Contestant, params: list[Parameter], grads: list[Tensor]) -> None:
        self._params, self._grads = params, grads
        self._device = params[0].device
        self._restore()
        self.stepper: Stepper = contestant.make(params)
        before = self._sample(params), self._sample(grads)
        self.seconds()
        if contestant.key != COPY:
            self._check(contestant.label, *before)
        for _ in range(_WARM_UP - 1):
            self.seconds()

    def seconds(self) -> float:
        """Wall time of one step, the device's work included."""
        self._restore()
        self._wait()
        started = time.perf_counter()
        self.stepper.step()
        self._wait()
        return time.perf_counter() - started

    def _restore(self) -> None:
        # Some optimizers set p.grad to None.
        for p, g in zip(self._params, self._grads, strict=True):
            p.grad = g

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @staticmethod
    def _sample(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.detach().flatten()[:_SAMPLE].clone() for t in tensors]

    def _check(self, label: str, params: list[Tensor], grads: list[Tensor]) -> None:
        for i, (old, new) in enumerate(zip(params, self._sample(self._params), strict=True)):
            if torch.equal(old, new):
                raise BenchError(f"{label}: a step left parameter {i} of {len(params)} as it was")
        if not all(torch.equal(old, new) for old, new in zip(grads, self._sample(self._grads), strict=True)):
            raise BenchError(f"{label}: a step changed the gradients, which the other contestants share")


def _label(contestant: Contestant, stepper: Stepper) -> str:
    asked = contestant.kind == "signstep"
    fused = getattr(stepper, "defaults", {}).get("fused")
    return f"{contestant.label} (not fused)" if asked and not fused else contestant.label


def _bytes_per_parameter(stepper: Stepper, params: Sequence[Tensor], kept: int) -> float:
    count = sum(p.numel() for p in params)
    if isinstance(stepper, CopyLoop):
        return stepper.bytes_moved / count
    return 3 * params[0].element_size() + 2 * kept / count


def set_up(
    contestants: Sequence[Contestant], params: list[Parameter], grads: list[Tensor]
) -> tuple[dict[str, StepRunner], dict[str, StepEntry]]:
    """Those of the contestants that can run, and what is known of every one."""
    runners: dict[str, StepRunner] = {}
    entries: dict[str, StepEntry] = {}
    for contestant in contestants:
        own, own_grads = params, grads
        if contestant.dtype is not None:
            own = [Parameter(p.detach().to(contestant.dtype)) for p in params]
            own_grads = [g.to(contestant.dtype) for g in grads]
        try:
            runner = StepRunner(contestant, own, own_grads)
        except BenchError:
            raise
        except NotAvailable as error:
            entries[contestant.key] = StepEntry(contestant.label, contestant.kind, missing=str(error))
            continue
        except Exception as error:  # whatever another package or a compiler does
            if not contestant.optional:
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            entries[contestant.key] = StepEntry(contestant.label, contestant.kind, missing=f"not available: {reason}")
            continue
        kept = state_bytes(runner.stepper.state)
        per_parameter = _bytes_per_parameter(runner.stepper, own, kept)
        label = _label(contestant, runner.stepper)
        runners[contestant.key] = runner
        entries[contestant.key] = StepEntry(label, contestant.kind, per_parameter, kept)
    return runners, entries


def _timed(runners: Mapping[str, StepRunner], shuffle: random.Random) -> dict[str, float]:
    order = list(runners)
    shuffle.shuffle(order)
    gc.collect()
    gc.disable()
    try:
        return {key: runners[key].seconds() for key in order}
    finally:
        gc.enable()


def _run_group(
    result: StepResult,
    name: str,
    contestants: Sequence[Contestant],
    lists: tuple[list[Parameter], list[Tensor]],
    rounds: int,
    say: Callable[[str], None],
) -> None:
    # A function of its own, so that the states are freed before the next group's are made.
    say(f"{result.title}: setting up {name}")
    runners, entries = set_up(contestants, *lists)
    for key, entry in entries.items():
        result.entries.setdefault(key, entry)
    shuffle = random.Random(f"{_SEED} {name}")
    say(f"{result.title}: timing {name}, {rounds} rounds")
    for _ in range(rounds):
        result.rounds.append(StepRound(name, _timed(runners, shuffle)))


def measure_workload(
    workload: StepWorkload,
    *,
    dtype: str = "float32",
    device: torch.device,
    rounds: int,
    millions: float = 50.0,
    only: Collection[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> StepResult:
    """Measure one workload.

    Args:
        workload: whose parameters.
        dtype: of parameters, gradients and, where nothing else is said, state.
        device: where.
        rounds: of every group; the slow one, plain torch with dither, gets a third of them, at least 2.
        millions: parameters of the workload "50m", in millions.
        only: keys of the contestants that are wanted, beside the peer and the limit; none: all.
        say: told what happens.

    Raises:
        BadInput: fewer than 2 rounds, too few parameters, or a key that is nobody's.
        BenchError: a contestant does nothing.
    """
    if rounds < 2:
        raise BadInput(f"--rounds {rounds}: expected at least 2")
    if not millions >= 0.001:
        raise BadInput(f"--millions {millions:g}: expected at least 0.001")
    title, shapes = shapes_of(workload, millions)
    chosen: torch.dtype = getattr(torch, dtype)
    params, grads = make_parameters(shapes, chosen, device)
    result = StepResult(workload, title, len(params), sum(p.numel() for p in params), peer_for(chosen, device))
    for name, contestants in groups(chosen, result.peer, only).items():
        # The shapes of earlier workloads would count towards torch's limit on recompilations.
        torch.compiler.reset()
        gc.collect()
        count = max(2, rounds // _SLOWER) if name == _SLOW else rounds
        _run_group(result, name, contestants, (params, grads), count, say)
    return result

"""One rank of `signstep bench comm`: a process that takes commands from standard input, a line of JSON each.

The first line says which rank it is and what to set up; every later line is a cell to time. The rank answers each line
on standard output. It exits when its input ends, and when it exits the benchmark ends.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from signstep.lab.bench.comm_methods import prepare
from signstep.lab.bench.netns import bytes_sent

LEAST_ROUNDS = 3
_SEED = 0
# DDP rebuilds its buckets after the first step, and PowerSGD compresses from the third on.
_WARM_UP = 4
# A method's window in a round: about so long, and at most so many steps.
_WINDOW_SECONDS, _MOST_STEPS = 0.4, 50
# A window begins with an untimed step, so that the links are busy when timing starts; slower methods go without.
_LEAD_IN_SECONDS = 2.0


class _Constant(torch.autograd.Function):
    """0, whose gradient with respect to p is a given tensor."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return p.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


class Constants(nn.Module):
    """A model whose forward and backward cost next to nothing: its gradients are given."""

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        super().__init__()
        self.params = nn.ParameterList([Parameter(p) for p in params])
        self._grads = list(grads)

    def forward(self) -> Tensor:
        """0."""
        terms = [_Constant.apply(p, g) for p, g in zip(self.params, self._grads, strict=True)]  # type: ignore[no-untyped-call]
        return torch.stack(terms).sum()


@dataclass(frozen=True)
class CommWindow:
    """What a method took in one window, per step; the same on all ranks."""

    seconds: float
    """Of the slowest rank."""
    sent: float
    """Mean over ranks, in bytes; 0 where they are not counted."""
    cpu: float
    """Mean over ranks of processor seconds."""


class CommRunner:
    """A method that is set up and has stepped, with the same result on every rank.

    Args:
        key: in `signstep.distributed.reductions.REDUCTIONS`.
        params: shared by all methods.
        grads: this rank's own, likewise.
        interface: whose bytes are counted; None: they are not.

    Raises:
        RuntimeError: a step leaves a parameter as it was, or ranks differ after it.
    """

    def __init__(self, key: str, params: Sequence[Tensor], grads: Sequence[Tensor], interface: str | None) -> None:
        self._params, self._interface = params, interface
        # Without the views, DDP keeps a second copy of all gradients.
        self._model = DistributedDataParallel(
            Constants(params, grads), init_sync=False, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        self._optimizer = prepare(key, self._model)
        before = self._digest()
        self._steps(_WARM_UP)
        after = self._digest()
        if bool((before == after).any()):
            unmoved = int((before == after).nonzero()[0])
            raise RuntimeError(f"{key}: steps left parameter {unmoved} of {len(params)} as it was")
        every = [torch.empty_like(after) for _ in range(dist.get_world_size())]
        dist.all_gather(every, after)
        if not all(torch.equal(after, each) for each in every):
            raise RuntimeError(f"{key}: parameters differ between ranks after {_WARM_UP} steps")
        self.sample = self.window(1, lead_in=True)

    def _digest(self) -> Tensor:
        return torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in self._params])

    def _sent(self) -> int:
        return 0 if self._interface is None else bytes_sent(self._interface)

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self._model().backward()
            self._optimizer.step()
            self._model.zero_grad()

    def window(self, count: int, *, lead_in: bool) -> CommWindow:
        """Take `count` steps without a barrier between them."""
        dist.barrier()
        sent = self._sent()
        self._steps(lead_in)
        started, busy = time.perf_counter(), time.process_time()
        self._steps(count)
        seconds, cpu = time.perf_counter() - started, time.process_time() - busy
        # All have received, so all that this rank has written has left its interface.
        dist.barrier()
        sent = self._sent() - sent
        own = torch.tensor([seconds / count, sent / (count + lead_in), cpu / count], dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        rows = torch.stack(every)
        return CommWindow(float(rows[:, 0].max()), float(rows[:, 1].mean()), float(rows[:, 2].mean()))


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Timing:
    """Rounds of every method over links of one kind, with the seconds that each is `expected` to communicate."""

    def __init__(self, runners: dict[str, CommRunner], expected: dict[str, float]) -> None:
        self._runners = runners
        self._shuffle = random.Random(_SEED)
        self._expected = {key: max(r.sample.seconds, expected[key]) for key, r in runners.items()}
        self.steps = {
            key: min(_MOST_STEPS, max(1, round(_WINDOW_SECONDS / each))) for key, each in self._expected.items()
        }
        self.rounds: list[dict[str, CommWindow]] = []

    def run(self, rounds: int, seconds: float) -> None:
        """Rounds until there are so many or the time is over, but `LEAST_ROUNDS` in any case."""
        started = time.perf_counter()
        while len(self.rounds) < rounds:
            elapsed = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.broadcast(elapsed, src=0)
            done = len(self.rounds)
            if done >= LEAST_ROUNDS and float(elapsed) * (done + 1) / done > seconds:
                break
            self._round()

    def _round(self) -> None:
        order = list(self._runners)
        self._shuffle.shuffle(order)
        with _without_collector():
            self.rounds.append(
                {
                    key: self._runners[key].window(self.steps[key], lead_in=self._expected[key] < _LEAD_IN_SECONDS)
                    for key in order
                }
            )


def set_up(command: dict[str, Any]) -> dict[str, CommRunner]:
    """Join the process group and set up every method."""
    os.environ["GLOO_SOCKET_IFNAME"] = command["interface"]
    torch.set_num_threads(1)
    rank = command["rank"]
    # The ranks find each other by a file, so that only the methods use the network.
    dist.init_process_group("gloo", init_method=f"file://{command['store']}", rank=rank, world_size=command["ranks"])
    same = torch.Generator().manual_seed(_SEED)
    own = torch.Generator().manual_seed(_SEED + 1 + rank)
    params = [torch.randn(shape, generator=same) for shape in command["shapes"]]
    grads = [torch.randn(shape, generator=own) for shape in command["shapes"]]
    counted = command["interface"] if command["counted"] else None
    return {key: CommRunner(key, params, grads, counted) for key in command["methods"]}


def _listen(commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    os._exit(1)  # the main thread may be waiting for other ranks


def main() -> None:
    """Answer commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    runners = set_up(commands.get())
    gc.collect()
    gc.freeze()
    answer({"trial": {key: asdict(runner.sample) for key, runner in runners.items()}})
    while True:
        command = commands.get()
        timing = Timing(runners, command["expected"])
        timing.run(command["rounds"], command["seconds"])
        rounds = [{key: asdict(sample) for key, sample in each.items()} for each in timing.rounds]
        answer({"steps": timing.steps, "rounds": rounds})


if __name__ == "__main__":
    main()

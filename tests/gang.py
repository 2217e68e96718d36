"""Ranks for tests: processes that keep their gloo group and run one module-level function after another."""

import atexit
import functools
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
"""Of all tests that fork: a test process has one server, and whoever starts it first says what its children find."""
# What takes long to import, so that it is imported once and not by every rank.
PRELOADED = [
    "torch._dynamo",
    "pytest",
    "hypothesis",
    "sklearn.datasets",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint.state_dict",
]
CONTEXT.set_forkserver_preload([*PRELOADED, "signstep.distributed.fsdp", "signstep.lab.training.loop"])
GROUP_TIMEOUT = 60
"""Seconds after which a collective that not all ranks have called fails."""


def _serve(rank: int, size: int, store: str, path: list[str], pipe: Connection) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=GROUP_TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    os._exit(0)


class Gang:
    """`size` ranks with one default group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.store = tempfile.mktemp(prefix="gang-")
        ends = [CONTEXT.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in ends]
        self.processes = [
            CONTEXT.Process(target=_serve, args=(rank, size, self.store, sys.path, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process, (_, theirs) in zip(self.processes, ends, strict=True):
            process.start()
            theirs.close()

    def run(
        self, function: Callable[..., Any], *arguments: Any, timeout: float = 100, victim: int | None = None
    ) -> list[Any]:
        """What the function returns on each rank; an AssertionError with the tracebacks if it fails on any.

        The victim is a rank that must die meanwhile, and answers None.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        end = time.monotonic() + timeout
        while len(answers) + len(errors) < self.size:
            open_ = [p for i, p in enumerate(self.pipes) if i not in answers and i not in errors]
            ready = wait(open_, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                missing = [i for i in range(self.size) if i not in answers and i not in errors]
                self.stop()
                raise AssertionError(f"ranks {missing} have not answered after {timeout} s; {errors}")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    answer, error = pipe.recv()
                except EOFError:
                    answer, error = None, None if rank == victim else "the process has died"
                if error is None:
                    answers[rank] = answer
                else:
                    errors[rank] = error
        if errors or victim is not None:
            self.stop()
        if errors:
            raise AssertionError("\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())))
        return [answers[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End the processes; the next `gang` of this size starts new ones."""
        _GANGS.pop(self.size, None)
        for process in self.processes:
            process.kill()
        Path(self.store).unlink(missing_ok=True)


_GANGS: dict[int, Gang] = {}


def gang(size: int) -> Gang:
    """The ranks of this test process, started on first use."""
    if size not in _GANGS:
        _GANGS[size] = Gang(size)
    return _GANGS[size]


@atexit.register
def stop_all() -> None:
    """End all ranks of this test process, with what their groups keep: gloo's threads, which wake all the time."""
    for each in list(_GANGS.values()):
        each.stop()


def on_ranks(size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a test function: every one of so many ranks runs its body."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            gang(size).run(_run_body, body.__module__, body.__name__, arguments)

        return test

    return decorate


def _run_body(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)

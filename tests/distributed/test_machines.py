"""examples/elastic.py under torchrun, on machines that are killed and come back: what is lost is a round."""

import importlib.util
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gang import gang
from signstep.distributed.elastic import Saved

pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")

EXAMPLE = Path(__file__).parents[2] / "examples/elastic.py"
RENDEZVOUS = "is_host=0,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120"


class Machines:
    """Agents of torchrun with one worker each; the rendezvous' store is the test's, so that any of them may die."""

    def __init__(self, folder: Path, rounds: int, *, shared: bool, least: int = 1) -> None:
        self.folder, self.rounds, self.shared, self.least = folder, rounds, shared, least
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.store = dist.TCPStore("127.0.0.1", self.port, is_master=True, wait_for_workers=False)
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, machine: int) -> None:
        """Switch a machine on; its folder is as it was."""
        own = self.folder / ("all" if self.shared else f"machine-{machine}")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", f"{self.least}:4", "--nproc-per-node=1"]
        command += ["--max-restarts=1000", "--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-conf={RENDEZVOUS}"]
        command += [f"--rdzv-endpoint=127.0.0.1:{self.port}", "--local-addr=127.0.0.1", "--monitor-interval=0.1"]
        command += [str(EXAMPLE), "--folder", str(own), "--rounds", str(self.rounds)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with (self.folder / f"said-{machine}").open("ab") as said:
            self.agents[machine] = subprocess.Popen(command, env=environment, stdout=said, stderr=said)

    def kill_worker(self, machine: int) -> bool:
        """Whether there was one."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                if parent == self.agents[machine].pid:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return True
            except (OSError, ValueError):
                continue
        return False

    def kill(self, machine: int) -> None:
        """Switch a machine off."""
        self.agents[machine].send_signal(signal.SIGSTOP)  # lest it restarts its worker
        self.kill_worker(machine)
        self.agents[machine].kill()
        self.agents.pop(machine).wait()

    def newest(self) -> int:
        """The last round of which there is a file."""
        found = [Saved.of(path.name) for path in self.folder.glob("*/round-*.pt")]
        return max((saved.round for saved in found if saved is not None), default=0)

    def wait(self, until: Callable[[], bool], seconds: float = 90) -> None:
        """Poll."""
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)

    def end(self) -> list[dict[str, torch.Tensor]]:
        """The workers' weights when the training is over."""
        for agent in self.agents.values():
            assert agent.wait(120) == 0, self.said()
        last = [path for path in self.folder.glob("*/round-*.pt") if Saved.of(path.name).round == self.rounds]  # type: ignore[union-attr]
        models = [torch.load(path, weights_only=True)["model"] for path in sorted(last)]
        assert len(models) == len(self.agents)
        return models

    def restored(self) -> list[list[int]]:
        """After which rounds workers have gone on, for each machine that had the first."""
        said = [path.read_text("utf-8", "replace") for path in sorted(self.folder.glob("said-*"))]
        return [[int(found) for found in re.findall(r"goes on after round (\d+),", each)] for each in said]

    def said(self) -> str:
        """What all have printed."""
        return "\n".join(path.read_text("utf-8", "replace")[-3000:] for path in self.folder.glob("said-*"))


@contextmanager
def machines(folder: Path, rounds: int, **options: Any) -> Iterator[Machines]:
    folder.mkdir(exist_ok=True)
    them = Machines(folder, rounds, **options)
    try:
        yield them
    finally:
        for machine in list(them.agents):
            if them.agents[machine].poll() is None:
                them.kill(machine)


def _undisturbed(folder: Path, rounds: int, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    spec = importlib.util.spec_from_file_location("elastic_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    accuracy, same = example.train(folder, rounds, seed)
    assert same
    dist.barrier()
    (path,) = folder.glob(f"round-{rounds:08d}-worker-{dist.get_rank()}-*")
    return torch.load(path, weights_only=True)["model"], accuracy


def equal(models: list[dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(x, models[0][name]) for model in models for name, x in model.items())


@pytest.mark.slow
@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.long), False])
def test_as_many_workers_end_with_the_same_bits_after_kills(shared: bool, tmp_path: Path) -> None:
    """A worker is killed, then both machines, which come back in another order: ranks are numbered anew."""
    rounds = 60
    whole = gang(2).run(_undisturbed, tmp_path / "whole", rounds, 0)
    with machines(tmp_path / "killed", rounds, shared=shared, least=2) as them:
        them.start(0)
        them.start(1)
        them.wait(lambda: them.newest() > 5)
        assert them.kill_worker(0)
        reached = them.newest()
        them.wait(lambda: them.newest() > reached + 5)
        them.kill(1)
        them.kill(0)
        assert "goes on after round" in them.said()
        reached = them.newest()
        assert reached < rounds
    with machines(tmp_path / "killed", rounds, shared=shared, least=2) as them:
        them.start(1)
        them.start(0)
        models = them.end()
        assert f"goes on after round {reached}" in them.said() or f"after round {reached - 1}" in them.said()
    assert equal([*models, whole[0][0]])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_kills_joins_and_leaves(tmp_path: Path) -> None:
    """Workers and whole machines are killed at random moments, machines come: accuracy is that of quiet runs."""
    kills, between = 20, 15
    rounds = kills * between + 20
    quiet = [gang(3).run(_undisturbed, tmp_path / f"seed-{seed}", rounds, seed)[0][1] for seed in range(5)]
    moments = random.Random(0)
    log = []
    told, reached = [0] * 4, 0

    def check() -> None:
        """Since the last kill no worker has gone on from less than a round before it."""
        for machine, after in enumerate(them.restored()):
            assert all(each >= reached - 1 for each in after[told[machine] :]), (log, after)
            told[machine] = len(after)

    with machines(tmp_path / "run", rounds, shared=False) as them:
        for machine in range(3):
            them.start(machine)
        for kill in range(kills):
            at = kill * between + moments.randrange(between)
            them.wait(lambda at=at: them.newest() >= at, 300)  # type: ignore[misc]
            time.sleep(moments.uniform(0.0, 2.0) if moments.random() < 0.3 else 0.0)
            check()
            before, machine = them.newest(), moments.choice(sorted(them.agents))
            reached = before
            if len(them.agents) > 1 and moments.random() < 0.4:
                them.kill(machine)
                log.append(f"{before}: machine {machine} leaves")
            else:
                them.wait(lambda machine=machine: them.kill_worker(machine))  # type: ignore[misc]
                log.append(f"{before}: worker of machine {machine} killed")
            absent = [machine for machine in range(4) if machine not in them.agents]
            if absent and moments.random() < 0.6:
                them.start(absent[0])
                log.append(f"{before}: machine {absent[0]} comes")
        models = them.end()
        check()
        said = them.said()
    accuracies = [float(line.split()[-1].rstrip("%")) / 100 for line in said.splitlines() if "test accuracy" in line]
    spread = statistics.stdev(quiet) * math.sqrt(1 + 1 / len(quiet))
    assert equal(models)
    assert all(x.isfinite().all() for x in models[0].values())
    # A new run's, by Student's t with 4 degrees of freedom, and one of 360 test images.
    assert abs(accuracies[-1] - statistics.mean(quiet)) <= 2.776 * spread + 1 / 360

"""Ranks that die: nobody hangs, everybody says why, and torchrun's restart ends where an undisturbed run does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gang import Gang
from signstep import SignSGD
from signstep.distributed import MajorityVote

KILLS = int(os.environ.get("SIGNSTEP_KILLS", "3"))
"""Moments at which a rank is killed; more of them take longer."""
JOB = Path(__file__).with_name("vote_job.py")


def _train_until_killed(victim: int, delay: float) -> tuple[str, float]:
    """What a rank raises after the victim's death, and after how many seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])
    model = DistributedDataParallel(net, bucket_cap_mb=0.02)
    optimizer = SignSGD(model.parameters())
    MajorityVote(model, optimizer)
    dist.barrier()
    killed = time.monotonic() + delay
    if dist.get_rank() == victim:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        while True:
            optimizer.zero_grad()
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
    except RuntimeError as error:
        return str(error), time.monotonic() - killed


def test_a_killed_rank_ends_the_others() -> None:
    moments = random.Random(0)
    for _ in range(KILLS):
        victim, delay = moments.randrange(3), moments.uniform(0.0, 0.4)
        answers = Gang(3).run(_train_until_killed, victim, delay, timeout=60, victim=victim)
        for rank, answer in enumerate(answers):
            assert (answer is None) == (rank == victim)
            if answer is not None:
                assert answer[1] < 30, answer
                assert "MajorityVote failed (" in answer[0] or "closed" in answer[0] or "reset" in answer[0], answer


def _torchrun(folder: Path, *options: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command += ["--max-restarts", str(restarts)]
    # Else the new ranks find the old ones' addresses in the agent's store (pytorch issue 135712).
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    folder.mkdir()
    return subprocess.run(
        [*command, str(JOB), str(folder), *options], env=environment, capture_output=True, text=True, timeout=120
    )


def _flats(folder: Path) -> list[Any]:
    return [torch.load(folder / f"done-{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.slow
def test_torchrun_restarts_to_the_same_trajectory(tmp_path: Path) -> None:
    ran = _torchrun(tmp_path / "whole")
    assert ran.returncode == 0, ran.stderr
    whole = _flats(tmp_path / "whole")
    moments = random.Random(1)
    for i in range(max(1, KILLS - 3)):
        folder = tmp_path / f"killed-{i}"
        rank, after = moments.randrange(3), moments.uniform(0.2, 0.6)
        ran = _torchrun(folder, "--kill-rank", str(rank), "--kill-after", f"{after:.3f}", restarts=1)
        assert ran.returncode == 0, ran.stderr
        assert (folder / "died").exists()
        for mine, theirs in zip(_flats(folder), whole, strict=True):
            assert torch.equal(mine["flat"], theirs["flat"]), (i, rank, after)
            assert torch.equal(mine["flat"], whole[0]["flat"])

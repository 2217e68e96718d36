"""Ranks that die: nobody hangs, everybody says why, and torchrun's restart ends where an undisturbed run does."""

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
import vote_job
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gang import Gang, gang
from signstep import SignSGD
from signstep.distributed import MajorityVote


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


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.long)])
def test_a_killed_rank_ends_the_others(kills: int) -> None:
    moments = random.Random(0)
    for _ in range(kills):
        victim, delay = moments.randrange(3), moments.uniform(0.0, 0.4)
        answers = Gang(3).run(_train_until_killed, victim, delay, timeout=60, victim=victim)
        for rank, answer in enumerate(answers):
            assert (answer is None) == (rank == victim)
            if answer is not None:
                assert answer[1] < 30, answer
                assert "MajorityVote failed (" in answer[0] or "closed" in answer[0] or "reset" in answer[0], answer


def _torchrun(folder: Path, size: int, *options: str, restarts: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["--max-restarts", str(restarts)]
    # Else the new ranks find the old ones' addresses in the agent's store (pytorch issue 135712).
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    folder.mkdir()
    command += [vote_job.__file__, str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def _flats(folder: Path, size: int) -> list[Any]:
    return [torch.load(folder / f"done-{rank}.pt", weights_only=True) for rank in range(size)]


def _train_or_say(folder: Path, kill_rank: int, kill_after: float) -> str:
    try:
        vote_job.train(folder, kill_rank, kill_after)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_that_start_anew_end_on_the_same_trajectory(tmp_path: Path) -> None:
    """What torchrun does below, with ranks that have imported torch already."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    gang(2).run(vote_job.train, whole)  # undisturbed
    _, said = Gang(2).run(_train_or_say, folder, 0, 0.1, timeout=60, victim=0)
    assert said
    gang(2).run(vote_job.train, folder)
    for mine, theirs in zip(_flats(folder, 2), _flats(whole, 2), strict=True):
        assert mine["first"] > 0
        assert torch.equal(mine["flat"], theirs["flat"])


@pytest.mark.long
@pytest.mark.parametrize(("size", "kills"), [(2, 1), (3, 9)])
def test_torchrun_restarts_to_the_same_trajectory(size: int, kills: int, tmp_path: Path) -> None:
    gang(size).run(vote_job.train, tmp_path)  # undisturbed
    whole = _flats(tmp_path, size)
    moments = random.Random(1)
    for i in range(kills):
        folder = tmp_path / f"killed-{i}"
        rank, after = moments.randrange(size), moments.uniform(0.0, 0.4)
        ran = _torchrun(folder, size, "--kill-rank", str(rank), "--kill-after", f"{after:.3f}", restarts=1)
        assert ran.returncode == 0, ran.stderr
        assert (folder / "died").exists()
        for mine, theirs in zip(_flats(folder, size), whole, strict=True):
            assert torch.equal(mine["flat"], theirs["flat"]), (i, rank, after)
            assert torch.equal(mine["flat"], whole[0]["flat"])

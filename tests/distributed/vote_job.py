"""A small training by majority vote that torchrun starts: resumable, and killed on request. Used by test_faults.py."""

import argparse
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signstep import SignSGD
from signstep.distributed import MajorityVote

STEPS = 40


def train(folder: Path, kill_rank: int = -1, kill_after: float = 0.0) -> None:
    """Train STEPS steps in a process group; a rank can die by SIGKILL, once, so many seconds after a checkpoint."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    model = DistributedDataParallel(net, bucket_cap_mb=0.1)
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1e-6)
    vote = MajorityVote(model, optimizer)
    saved = folder / "checkpoint.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        vote.load_state_dict(state["votes"][rank])
        first = state["step"]
    died = folder / "died"
    try:
        for step in range(first, STEPS):
            if rank == kill_rank and saved.exists() and not died.exists():
                died.touch()
                threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            generator = torch.Generator().manual_seed(step * size + rank)
            x = torch.randn(16, 50, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
            optimizer.step()
            if step % 5 == 4:
                votes: list[dict[str, object]] = [{}] * size
                dist.all_gather_object(votes, vote.state_dict())
                if rank == 0:
                    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                    state |= {"votes": votes, "step": step + 1}
                    torch.save(state, saved.with_suffix(".tmp"))
                    os.replace(saved.with_suffix(".tmp"), saved)
            time.sleep(0.01)
    except RuntimeError as error:
        (folder / f"error-{rank}-{first}").write_text(str(error))
        raise
    result = {"first": first, "flat": torch.cat([p.detach().flatten() for p in net.parameters()])}
    torch.save(result, folder / f"done-{rank}.pt")
    dist.barrier()


def main() -> None:
    """`train` as a process of torchrun."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-rank", type=int, default=-1)
    parser.add_argument("--kill-after", type=float, default=0.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    train(arguments.folder, arguments.kill_rank, arguments.kill_after)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

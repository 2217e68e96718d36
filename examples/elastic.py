"""Workers that come and go: a killed one costs its round, a new one takes over the state and goes on.

Run: torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/elastic.py

Each worker takes 10 steps of AdamW on random batches of scikit-learn's handwritten digits, then all vote and save. On
several machines, of which one to four take part at a time, run this on each, with the first one's address:

    torchrun --nnodes 1:4 --nproc-per-node 1 --max-restarts 100 --rdzv-backend c10d --rdzv-id job \
        --rdzv-endpoint first.example:29400 --rdzv-conf last_call_timeout=5 examples/elastic.py

Rank 0 prints the test accuracy and whether the weights are the same bits on all ranks. At the end each machine deletes
its folder, unless you have named it with --folder. A run goes on from whatever is in its folder, so a run that you have
stopped for good leaves one behind: delete it on all machines, or choose another --rdzv-id.
"""

import argparse
import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from signstep.distributed import LocalVote, RoundCheckpoint


def train(folder: Path, rounds: int, seed: int) -> tuple[float, bool]:
    """The test accuracy after so many rounds, from the last one in the folder, and whether all ranks are the same."""
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    local = LocalVote(model, optimizer, every=10)
    checkpoint = RoundCheckpoint(folder, model, optimizer, local)

    restored = checkpoint.restore()
    step = 0 if restored is None else restored.extra["step"]
    if restored is not None and dist.get_rank() == 0:
        print(f"goes on after round {restored.round}, with {dist.get_world_size()} workers after {restored.workers}")
    while checkpoint.round < rounds:
        # Every worker has batches of its own, which depend on nothing but the step, so that they can be had again.
        own = torch.Generator().manual_seed((seed * 1_000_000 + step) * 100 + dist.get_rank())
        batch = torch.randint(len(train_x), (32,), generator=own)
        optimizer.zero_grad()
        F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
        step += 1
        if local.step():
            checkpoint.save(step=step)

    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    everyones = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, weights)
    return accuracy, all(torch.equal(weights, other) for other in everyones)


def main() -> None:
    """`train` as a process of torchrun."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--folder",
        type=Path,
        help="shared by all machines, or one on each; it is kept at the end, and the next run goes on from it. "
        "Default: a folder in the machine's temporary files, named by --rdzv-id and deleted at the end",
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = os.environ["TORCHELASTIC_RUN_ID"]  # the same after a restart
    folder = arguments.folder or Path(tempfile.gettempdir()) / f"rounds-{run}"
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    accuracy, same = train(folder, arguments.rounds, arguments.seed)
    if dist.get_rank() == 0:
        print(f"rounds {arguments.rounds}, workers {dist.get_world_size()}, test accuracy {accuracy:.1%}")
        print(f"the same bits on all ranks: {same}")
    if arguments.folder is None:
        dist.barrier()  # all have saved
        shutil.rmtree(folder, ignore_errors=True)  # another worker of this machine may delete it, too
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

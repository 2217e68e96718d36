"""FSDP2: SignSGD over a model that fully_shard has cut up, and a checkpoint in the middle.

Run: torchrun --standalone --nproc-per-node 2 examples/fsdp2.py

Parameters, gradients and momentum are sharded over the ranks; the steps are those over whole parameters, also with
dither. After half of the training on scikit-learn's handwritten digits it saves a distributed checkpoint. Rank 0 prints
how much of the momentum it holds, the test accuracy, and whether a new model that goes on from the checkpoint ends with
the same bits. For one bit per gradient coordinate, add `FSDPMajorityVote(model, optimizer)`: see docs/fsdp.md.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from signstep import SignSGD

EPOCHS, BATCH_SIZE = 8, 32

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0)


def build() -> tuple[nn.Module, SignSGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    fully_shard(model, mesh=mesh)
    # After fully_shard, which replaces the parameters.
    return model, SignSGD(model.parameters(), lr=2e-3, dither=1.0, dither_decay=0.0, dither_scale="relative")


def train(model: nn.Module, optimizer: SignSGD, epochs: range) -> None:
    for epoch in epochs:
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(epoch))
        mine = order[rank::ranks][: len(order) // ranks]  # as many batches on every rank
        for batch in mine.split(BATCH_SIZE // ranks):
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()


def whole_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])


model, optimizer = build()
train(model, optimizer, range(EPOCHS // 2))
checkpoint = [tempfile.mkdtemp()]
dist.broadcast_object_list(checkpoint)  # rank 0's folder, on all ranks
states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
dcp.save(states, checkpoint_id=checkpoint[0])
train(model, optimizer, range(EPOCHS // 2, EPOCHS))

resumed_model, resumed_optimizer = build()
states = dict(zip(("model", "optimizer"), get_state_dict(resumed_model, resumed_optimizer), strict=True))
dcp.load(states, checkpoint_id=checkpoint[0])
set_state_dict(resumed_model, resumed_optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
train(resumed_model, resumed_optimizer, range(EPOCHS // 2, EPOCHS))

weights, resumed = whole_weights(model), whole_weights(resumed_model)
with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
held = sum(state["exp_avg"].to_local().numel() for state in optimizer.state.values())
if rank == 0:
    print(f"ranks {ranks}, rank 0 holds {held} of {weights.numel()} elements of the momentum")
    print(f"test accuracy {accuracy:.1%}")
    print(f"resumed from the checkpoint: the same bits: {torch.equal(weights, resumed)}")
dist.destroy_process_group()

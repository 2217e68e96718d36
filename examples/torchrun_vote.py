"""Workers vote: one bit per gradient coordinate each way, in place of DDP's four bytes.

Run: torchrun --standalone --nproc-per-node 2 examples/torchrun_vote.py

Each rank trains on its own part of scikit-learn's handwritten digits and sends the signs of its own momentum; all ranks
step by the majority's. Rank 0 prints the test accuracy and whether the weights are the same bits on all ranks.
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from signstep import SignSGD
from signstep.distributed import MajorityVote

EPOCHS = 8

dist.init_process_group("gloo")
torch.manual_seed(0)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0)
data = TensorDataset(train_x, train_y)
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=32, sampler=sampler)

model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
optimizer = SignSGD(model.parameters(), lr=3e-3)
vote = MajorityVote(model, optimizer)  # the only new line
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # votes, bucket by bucket, while backward goes on
        optimizer.step()
        scheduler.step()

with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
weights = nn.utils.parameters_to_vector(model.parameters()).detach()
everyones = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
dist.all_gather(everyones, weights)
if dist.get_rank() == 0:
    print(f"ranks {len(everyones)}, test accuracy {accuracy:.1%}")
    print(f"the same bits on all ranks: {all(torch.equal(weights, other) for other in everyones)}")
dist.destroy_process_group()

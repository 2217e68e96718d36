"""Hugging Face Accelerate with gradient accumulation.

Run: python examples/accelerate_accumulation.py

It trains a small network on scikit-learn's handwritten digits, with one optimizer step for every eight batches, and
prints the number of batches, the number of steps, and the test accuracy. `Monitor` finds the optimizer in Accelerate's
wrapper, takes each of the eight backward passes for a micro-batch, and says at the end how far their signs agreed.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from signstep import Monitor, SignSGD

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=8)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = SignSGD(model.parameters(), lr=3e-3)
loader = DataLoader(TensorDataset(train_x, train_y), batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
monitor = Monitor(model, optimizer, every=10)

batches = 0
for _ in range(6):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        batches += 1

with torch.no_grad():
    predictions = model(test_x.to(accelerator.device)).argmax(1).cpu()
correct = (predictions == test_y).float().mean().item()
value, low, high = monitor.last["reliability"]["reliability"]
accelerator.print(f"batches {batches}, steps {monitor.step}")
accelerator.print(f"reliability of a micro-batch's signs at the last look: {value:.2f} ({low:.2f} to {high:.2f})")
accelerator.print(f"test accuracy {correct:.1%}")

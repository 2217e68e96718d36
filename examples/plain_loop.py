"""A plain PyTorch loop: SignSGD with relative dither, a learning rate schedule, a checkpoint.

Run: python examples/plain_loop.py

It trains a small convolutional network on scikit-learn's handwritten digits and prints the test accuracy of each epoch.
After the fourth epoch it saves a checkpoint. At the end it goes on from there once more, in a new network with a new
optimizer, and says whether the weights are the same bits: noise needs no generator state to be saved.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from signstep import SignSGD

EPOCHS, BATCH_SIZE = 8, 32

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, random_state=0)
steps_per_epoch = len(train_x) // BATCH_SIZE
checkpoint = Path(tempfile.mkdtemp()) / "checkpoint.pt"


def build() -> tuple[nn.Module, SignSGD, torch.optim.lr_scheduler.LRScheduler]:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)
    )
    # Every weight moves by lr in every step, so lr is near AdamW's and far below SGD's.
    optimizer = SignSGD(
        model.parameters(), lr=3e-3, weight_decay=0.01, dither=1.0, dither_decay=0.0, dither_scale="relative"
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps_per_epoch)
    return model, optimizer, scheduler


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item()


def train_epoch(epoch: int, model: nn.Module, optimizer: SignSGD, scheduler: torch.optim.lr_scheduler.LRScheduler):
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(epoch))
    for batch in order[: steps_per_epoch * BATCH_SIZE].split(BATCH_SIZE):
        optimizer.zero_grad()
        F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
        scheduler.step()


torch.manual_seed(0)
model, optimizer, scheduler = build()
for epoch in range(EPOCHS):
    if epoch == 4:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(states, checkpoint)
    train_epoch(epoch, model, optimizer, scheduler)
    print(f"epoch {epoch + 1}: test accuracy {accuracy(model):.1%}")

resumed_model, resumed_optimizer, resumed_scheduler = build()
states = torch.load(checkpoint, weights_only=True)
resumed_model.load_state_dict(states["model"])
resumed_optimizer.load_state_dict(states["optimizer"])
resumed_scheduler.load_state_dict(states["scheduler"])
for epoch in range(4, EPOCHS):
    train_epoch(epoch, resumed_model, resumed_optimizer, resumed_scheduler)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters())


print(f"resumed from the checkpoint: the same bits: {torch.equal(weights(model), weights(resumed_model))}")

"""timm: SignSGD from timm's own factory, by name, with layer decay and timm's schedule.

Run: python examples/timm_training.py

`register()` adds the names "signsgd", "hybridsignsgd" and "signsteplion" to timm's registry, and leaves timm's own
"lion" alone. A small vision transformer with random weights learns scikit-learn's handwritten digits. It prints the
number of param_groups (two for each layer, one of them without weight decay), the learning rates of the first layer and
the last, and the test accuracy. timm's layer decay takes effect through timm's schedulers only.
"""

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn import functional as F

from signstep.integrations.timm import register

EPOCHS, BATCH_SIZE = 8, 32

register()
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
train_x, test_x, train_y, test_y = train_test_split(images, torch.tensor(digits.target), test_size=0.2, random_state=0)

model = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=4
)
optimizer = create_optimizer_v2(model, opt="signsgd", lr=2e-3, weight_decay=0.1, layer_decay=0.8)
scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=0, min_lr=1e-5)
scheduler.step(0)
rates = [group["lr"] for group in optimizer.param_groups]
print(f"param_groups {len(rates)}, learning rates from {min(rates):.2g} to {max(rates):.2g}")

for epoch in range(EPOCHS):
    model.train()
    for batch in torch.randperm(len(train_x)).split(BATCH_SIZE):
        optimizer.zero_grad()
        F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
    scheduler.step(epoch + 1)

model.eval()
with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
print(f"test accuracy {accuracy:.1%}")

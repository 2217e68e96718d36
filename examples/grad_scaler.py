"""Mixed precision in float16 with GradScaler.

Run: python examples/grad_scaler.py

The scaler starts at a scale that is far too large, so that the first gradients overflow: it skips those steps and
halves the scale until they fit. A step that is skipped leaves weights and momentum alone. It prints how many steps
were skipped, the scale at the end, and the test accuracy on scikit-learn's handwritten digits. It takes a GPU if there
is one.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from signstep import SignSGD

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train_x, test_x, train_y, test_y = (part.to(device) for part in train_test_split(x, y, test_size=0.2, random_state=0))

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
optimizer = SignSGD(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24)

skipped = 0
for _ in range(8):
    for batch in torch.randperm(len(train_x), device=device).split(32):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)  # divides the gradients by the scale first; not at all if one of them is not finite
        scaler.update()
        skipped += scaler.get_scale() < scale

with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
print(f"steps skipped {skipped}, scale at the end {scaler.get_scale():.0f}")
print(f"test accuracy {accuracy:.1%}")

"""Fine-tuning without optimizer state and without a full set of gradients; its peak memory beside AdamW's. Linux only.

Run: python examples/finetune_without_state.py

`attach_to_backward` steps each parameter inside loss.backward() and frees its gradient; with momentum 0 the optimizer
keeps no buffer. So memory holds the weights and the few gradients that are alive at once. AdamW holds the weights, all
gradients, and two buffers as large.

A network of 8.5 million parameters learns scikit-learn's handwritten digits. Then it is fine-tuned to digits that lie
on their side, by each method in a process of its own. It prints the accuracies, and by how much the weights and each
method raised the process's peak memory, as Linux tells it. On a GPU, ask torch.cuda.max_memory_allocated().
"""

import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from signstep.optim import attach_to_backward

WIDTH, STEPS = 2048, 20


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10),
    )  # fmt: skip


def digits(*, turned: bool) -> list[Tensor]:
    """Images to train on and to test on, and their labels."""
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32) / 16
    if turned:
        images = images.rot90(1, (1, 2))
    return train_test_split(images.flatten(1), torch.tensor(loaded.target), random_state=0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for _ in range(STEPS):
        batch = torch.randint(len(x), (32,))
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()  # has nothing left to do after a step inside backward, nor has zero_grad
        optimizer.zero_grad()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def fine_tune(method: str, pretrained: Path) -> None:
    x, test_x, y, test_y = digits(turned=True)
    torch.manual_seed(0)
    small = nn.Linear(64, 10)
    train(small, torch.optim.SGD(small.parameters()), x, y)  # what torch loads for its first steps is not counted
    base = peak_mib()
    with torch.device("meta"):  # without memory for weights that the next line replaces
        model = build()
    model.load_state_dict(torch.load(pretrained, weights_only=True, mmap=True), assign=True)
    if method == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    else:
        optimizer = attach_to_backward(model, {"lr": 2e-4, "momentum": 0.0})
    train(model, optimizer, x, y)
    print(f"{method}: accuracy {accuracy(model, test_x, test_y):.1%}, peak {peak_mib() - base:.0f} MiB", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, (x, test_x, y, test_y) = build(), digits(turned=False)
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-4), x, y)
    on_turned = accuracy(model, *digits(turned=True)[1::2])
    print(f"pretrained: accuracy {accuracy(model, test_x, test_y):.1%} upright, {on_turned:.1%} turned")
    pretrained = Path(tempfile.mkdtemp()) / "pretrained.pt"
    torch.save(model.state_dict(), pretrained)

    # Else glibc keeps, as it happens, up to two large gradients that were freed, and the peak counts them. With a fixed
    # threshold it gives back at once whatever is larger.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    spawn = multiprocessing.get_context("spawn")
    for method in ("AdamW", "SignSGD in backward"):
        process = spawn.Process(target=fine_tune, args=(method, pretrained))
        process.start()
        process.join()
        assert process.exitcode == 0

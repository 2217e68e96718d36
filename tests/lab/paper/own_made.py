"""Small data of a user's: points in three classes, and a folder of digits."""

from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import TensorDataset

from signstep.lab.data import load


def three_classes() -> tuple[TensorDataset, TensorDataset]:
    """120 points to train on and 60 to evaluate on, in four dimensions."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(180, 4, generator=draw)
    y = torch.stack([x[:, 0], x[:, 1], x[:, 2] + 0.3]).argmax(0)
    return TensorDataset(x[:120], y[:120]), TensorDataset(x[120:], y[120:])


def digits_in_folder(folder: Path, count: int) -> None:
    """The first so many images of each of three digits, in a folder for each."""
    images = load("digits")
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for i, x in enumerate(images.train_x[images.train_y == label][:count]):
            Image.fromarray(x[0].numpy()).save(folder / str(label) / f"{i}.png")

"""A data set in memory, and how it is split into images to train on and images to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from signstep.lab.errors import BadInput

_SPLIT_SEED = 20260721


class DataError(BadInput):
    """A data set that is missing, incomplete or not what its format says; the message is one sentence for the user."""


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled image data set, whole and in memory.

    `train_x` and `test_x` are uint8 [N, C, H, W] with values 0..255, `train_y` and `test_y` int64 [N] with values in
    0..len(classes) - 1. `source` says where it was found. Raises DataError where a tensor is anything else.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        for part, x, y in (("training", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            where = f"{self.name}: the {part} part of {self.source}"
            if x.dtype != torch.uint8 or x.ndim != 4 or y.dtype != torch.int64 or y.shape != x.shape[:1] or not len(x):
                raise DataError(
                    f"{where} has images {x.dtype} {tuple(x.shape)} and labels {y.dtype} {tuple(y.shape)}, "
                    "expected uint8 [N, C, H, W] and int64 [N] with N > 0"
                )
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= len(self.classes):
                raise DataError(f"{where} has labels {low}..{high}, expected 0..{len(self.classes) - 1}")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DataError(
                f"{self.name}: {self.source} has training images {tuple(self.train_x.shape[1:])} but test images "
                f"{tuple(self.test_x.shape[1:])}, expected one shape"
            )

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def size(self) -> int:
        """Height of an image in pixels; every set here is square."""
        return self.train_x.shape[2]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the training images, in 0..1."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the training images, in units of 0..1."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # Counts of each pixel value: exact, so the numbers depend neither on threads nor on the order of the images.
        counts = [torch.bincount(self.train_x[:, c].flatten(), minlength=256).double() for c in range(self.channels)]
        histogram = torch.stack(counts) / (len(self.train_x) * self.train_x[0, 0].numel())
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = histogram @ values
        variance = (histogram * (values - mean[:, None]).square()).sum(1)
        return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def split(
    images: Images, split: Literal["tune", "final"], subset: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (train_x, train_y, eval_x, eval_y), the same images for every method and every run seed.

    The training set is put in one fixed random order. "tune" holds out the last tenth of that order for evaluation and
    trains on the rest; the test set is not touched. "final" trains on all of it and evaluates on the test set.
    `subset` keeps the first so many training images of that order, so that a subset of a given size holds the same
    images in both splits. Raises DataError for a subset larger than the training part.
    """
    kept, held_out = split_rows(len(images.train_x), split, subset, images.name)
    if split == "tune":
        evaluation = images.train_x[held_out], images.train_y[held_out]
    else:
        evaluation = images.test_x, images.test_y
        if subset is None:
            return images.train_x, images.train_y, *evaluation
    return images.train_x[kept], images.train_y[kept], *evaluation


def split_rows(total: int, split: Literal["tune", "final"], subset: int | None, name: str) -> tuple[Tensor, Tensor]:
    """Rows of a training set to train on, and those held out, none in split "final": `split` says which.

    Args:
        total: rows of the whole training set.
        split: "tune" or "final".
        subset: how many to train on; None: all.
        name: of the data set, for the message of an error.
    """
    if split not in ("tune", "final"):
        raise DataError(f"split={split!r}: expected tune or final")
    available = total - total // 10 if split == "tune" else total
    if split == "tune" and available == total:
        raise DataError(f"{name} has {total} training examples: a tenth to tune on needs at least 10")
    if subset is not None and not 1 <= subset <= available:
        raise DataError(f"subset={subset}: {name} has 1..{available} training images in split {split}")
    if split == "final" and subset is None:
        return torch.arange(total), torch.arange(0)
    # RandomState's stream is frozen across NumPy versions (NEP 19); torch.randperm promises no such thing.
    order = torch.from_numpy(np.random.RandomState(_SPLIT_SEED).permutation(total))
    return order[: available if subset is None else subset], order[available:]

"""Which images make up each step, and how they are augmented: a pure function of (seed, epoch, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signstep.lab.data import augment, load, normalise, split
from signstep.lab.errors import BadInput
from signstep.lab.training.config import RunConfig
from signstep.lab.training.example_batches import ExampleBatches
from signstep.lab.training.seeds import derived_seed
from signstep.lab.training.tasks import FOLDER, TEXTS, is_own
from signstep.lab.training.text_batches import TextBatches
from signstep.lab.training.workers import Workers

# Small enough for the activations of a small net to stay in a core's cache; a GPU wants more at a time.
_EVAL_BATCH_CPU, _EVAL_BATCH = 64, 1000


def batches_of(config: RunConfig, workers: Workers, place: Path | None) -> AnyBatches:
    """The batches of a run, of images, a text or a user's examples; arguments and errors as of the three classes."""
    if is_own(config.dataset) and not config.dataset.startswith(FOLDER):
        return ExampleBatches(config, workers)
    kind = TextBatches if config.dataset in TEXTS else Batches
    return kind(config, workers, place)


class Batches:
    """The images of one run, uint8 on this worker's device, cut into batches.

    Args:
        config: the run.
        workers: each gets its own slice of every batch.
        folder: where to look for the images first; None: the usual places.

    Raises:
        BadInput: the batch is larger than the training set, or cannot be shared out evenly.
    """

    def __init__(self, config: RunConfig, workers: Workers, folder: Path | None) -> None:
        if config.batch_size % workers.size:
            raise BadInput(f"batch_size={config.batch_size}: expected a multiple of the {workers.size} workers")
        # Rank 0 loads before the others, so that one worker alone downloads what is missing.
        self.images = workers.in_turn(lambda: load(config.dataset, folder, image_size=config.image_size))
        parts = split(self.images, config.split, config.subset)
        self.train_x, self.train_y, self.eval_x, self.eval_y = (part.to(workers.device) for part in parts)
        self.steps_per_epoch = len(self.train_x) // config.batch_size
        if self.steps_per_epoch == 0:
            raise BadInput(
                f"batch_size={config.batch_size}: this run has only {len(self.train_x)} training images; "
                "choose a smaller batch or a larger subset"
            )
        self.shape, self.num_classes = tuple(self.train_x.shape[1:]), self.images.num_classes
        self._config, self._workers = config, workers
        self._generator = torch.Generator(workers.device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def about(self) -> dict[str, Any]:
        """What the record says of the images: how many there are to train on and to evaluate on."""
        return {"train_images": len(self.train_x), "eval_images": len(self.eval_x)}

    def training(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """One worker's part of batch `index` of `epoch`, both from 0: augmented images float32, labels int64.

        Every epoch goes once through the images in a new order; the last, incomplete batch is left out.
        """
        config, workers = self._config, self._workers
        if epoch != self._epoch:
            shuffle = torch.Generator().manual_seed(derived_seed("order", config.seed, epoch))
            self._epoch, self._order = (
                epoch,
                torch.randperm(len(self.train_x), generator=shuffle, device="cpu").to(workers.device),
            )
        share = config.batch_size // workers.size
        first = index * config.batch_size + workers.rank * share
        rows = self._order[first : first + share]
        self._generator.manual_seed(derived_seed("augment", config.seed, epoch, index, workers.rank))
        x = augment(
            self.train_x[rows],
            self._generator,
            crop=config.crop,
            flip=config.flip,
            cutout=config.cutout,
            mean=self.images.mean,
            std=self.images.std,
            channels_last=config.channels_last,
        )
        return x, self.train_y[rows]

    def evaluation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One worker's share of the evaluation images, every `size`-th of them: normalised float32, labels int64."""
        share = slice(self._workers.rank, None, self._workers.size)
        size = _EVAL_BATCH_CPU if self._workers.device.type == "cpu" else _EVAL_BATCH
        for x, y in zip(torch.split(self.eval_x[share], size), torch.split(self.eval_y[share], size), strict=True):
            yield normalise(x, self.images.mean, self.images.std, channels_last=self._config.channels_last), y


AnyBatches = Batches | TextBatches | ExampleBatches

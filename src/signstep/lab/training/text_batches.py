"""Which bytes of a text make up each step: a pure function of (seed, epoch, step, rank), as for images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signstep.lab.data import load_text, split_text
from signstep.lab.errors import BadInput
from signstep.lab.training.config import RunConfig
from signstep.lab.training.gpt import context_of
from signstep.lab.training.seeds import derived_seed
from signstep.lab.training.workers import Workers

_EVAL_BATCH = 32


class TextBatches:
    """The bytes of one run, uint8 on this worker's device, cut into sequences, and these into batches.

    A sequence is T = `RunConfig.context` bytes and, as labels, the T bytes one further.

    Args:
        config: the run.
        workers: each gets its own slice of every batch.
        place: the file of data set "text"; of another one where to look for it first; None: the usual places.

    Raises:
        BadInput: the text is too short for a batch or for each worker's share of the evaluation, or a batch cannot be
            shared out evenly.
    """

    def __init__(self, config: RunConfig, workers: Workers, place: Path | None) -> None:
        if config.batch_size % workers.size:
            raise BadInput(f"batch_size={config.batch_size}: expected a multiple of the {workers.size} workers")
        self.text = workers.in_turn(lambda: load_text(config.dataset, place))
        self.context = context_of(config.model, config.context)
        self.train, self.eval = (p.to(workers.device) for p in split_text(self.text, config.split, config.subset))
        # Wherever an epoch's first sequence begins, so many fit, each with its last label.
        self._sequences = max(0, (len(self.train) - self.context) // self.context)
        self.steps_per_epoch = self._sequences // config.batch_size
        if self.steps_per_epoch == 0 or len(self.eval) <= self.context * workers.size:
            raise BadInput(
                f"{self.text.source} is too short: {len(self.train)} bytes to train on and {len(self.eval)} to "
                f"evaluate on, for batches of {config.batch_size} sequences of {self.context} bytes, which need "
                f"{(config.batch_size + 1) * self.context} and {self.context * workers.size + 1}"
            )
        self._config, self._workers = config, workers
        self._within = torch.arange(self.context + 1, device=workers.device)
        self._epoch, self._starts = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def about(self) -> dict[str, Any]:
        """What the record says of the text: the lengths of the parts in use, and the SHA-256 of all its bytes."""
        return {"train_bytes": len(self.train), "eval_bytes": len(self.eval), "sha256": self.text.sha256}

    def training(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """One worker's part of batch `index` of `epoch`, both from 0: bytes and the bytes after them, int64 [B, T].

        Every epoch goes once through the text in sequences that begin at a multiple of T after a random one of the
        first T bytes, in a new order; what is left at either end, and the last, incomplete batch, is left out.
        """
        config, workers = self._config, self._workers
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed(derived_seed("sequences", config.seed, epoch))
            offset = torch.randint(self.context, (1,), generator=draw, device="cpu")
            order = torch.randperm(self._sequences, generator=draw, device="cpu")
            self._epoch, self._starts = epoch, (offset + self.context * order).to(workers.device)
        share = config.batch_size // workers.size
        first = index * config.batch_size + workers.rank * share
        return self._sequence(self.train, self._starts[first : first + share])

    def evaluation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One worker's share of the bytes to evaluate on, as `training` gives them.

        The sequences follow one another, the last one may be shorter: every byte but the part's first is a label once,
        predicted from the 1 to T bytes before it in its sequence.
        """
        workers, whole = self._workers, (len(self.eval) - 1) // self.context
        starts = self.context * torch.arange(workers.rank, whole, workers.size, device=workers.device)
        for part in torch.split(starts, _EVAL_BATCH):
            yield self._sequence(self.eval, part)
        rest = self.eval[whole * self.context :].long()[None]
        if workers.rank == 0 and rest.shape[1] > 1:
            yield rest[:, :-1], rest[:, 1:]

    def _sequence(self, part: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = part[starts[:, None] + self._within].long()
        return rows[:, :-1], rows[:, 1:]

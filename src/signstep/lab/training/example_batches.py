"""Which examples of a user's own data set make up each step: a pure function of (seed, epoch, step, rank).

A data set is named by a function that makes it, or was registered as an `Examples` (see own.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from signstep.lab.data.images import split_rows
from signstep.lab.errors import BadInput
from signstep.lab.training import own
from signstep.lab.training.config import RunConfig
from signstep.lab.training.seeds import derived_seed, seeded
from signstep.lab.training.workers import Workers

_EVAL_BATCH = 64
_EVAL_SEED = 20261130


@dataclass(frozen=True)
class Examples:
    """A data set of the user's.

    Each part is a map-style data set, of which an item is a pair (input, target) of what
    `torch.utils.data.default_collate` makes tensors of; or a function of a seed that returns an iterable with a length,
    as a DataLoader is, of batches (inputs, targets), with a new order for each seed.
    """

    train: Any
    evaluation: Any
    """What final runs are evaluated on."""
    tune: Any = None
    """What tuning runs are evaluated on; None: a tenth of `train`, which they are then not trained on."""

    @classmethod
    def named(cls, name: str) -> Examples:
        """The data set that a name stands for; BadInput if it is none."""
        made = own.resolve(name, "data")
        if isinstance(made, Examples):
            return made
        if callable(made):
            try:
                made = made()
            except TypeError as error:
                raise BadInput(f"data {name}: {error}; it is called without arguments") from error
        if not isinstance(made, Sequence) or len(made) not in (2, 3):
            raise BadInput(
                f"data {name}: expected a function that returns (train_set, val_set), or with a third set to tune on"
            )
        return cls(*made)


def _pair(batch: Any, where: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets, floating-point numbers in float32 and whole ones in int64."""
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        found = f"{len(batch)} parts" if isinstance(batch, list | tuple) else f"a {type(batch).__name__}"
        raise BadInput(f"{where}: an example has {found}, expected a pair (input, target) of tensors or numbers")
    x, y = (part.float() if part.dtype == torch.float64 else part for part in batch)
    if x.shape[0] != y.shape[0]:
        raise BadInput(f"{where}: a batch has {len(x)} inputs and {len(y)} targets, expected as many of either")
    return x, y if y.is_floating_point() else y.long()


class _Rows:
    """Some rows of a map-style data set.

    Args:
        examples: the data set.
        rows: which.
        where: begins the message of an error.
    """

    def __init__(self, examples: Any, rows: Tensor, where: str) -> None:
        self._examples, self._rows, self._where = examples, rows, where

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The examples at some positions among the rows; what is random in them follows from the seed."""
        rows: list[int] = self._rows[positions].tolist()
        with seeded(seed):
            if isinstance(self._examples, TensorDataset):
                return _pair(self._examples[rows], self._where)
            if hasattr(self._examples, "__getitems__"):
                items = self._examples.__getitems__(rows)
            else:
                items = [self._examples[row] for row in rows]
        try:
            return _pair(default_collate(items), self._where)
        except (TypeError, RuntimeError) as error:
            raise BadInput(
                f"{self._where}: its examples make no batch ({str(error).partition(chr(10))[0]}); each needs an input "
                "that is a tensor, an array or a number, of one shape in all"
            ) from error


class _Loader:
    """The batches of a function of a seed."""

    def __init__(self, make: Callable[[int], Iterable[Any]], where: str) -> None:
        self._make, self._where = make, where
        self._at: tuple[int, int] | None = None
        self._batches: Iterator[Any] = iter(())

    def length(self) -> int:
        """The number of batches."""
        batches = self._begun(0)
        if not isinstance(batches, Sized):
            raise BadInput(f"{self._where}: what the function of a seed returns has no length; return a DataLoader")
        return len(batches)

    def _begun(self, seed: int) -> Iterable[Any]:
        try:
            batches = self._make(seed)
        except TypeError as error:
            raise BadInput(f"{self._where}: {error}; it is called with a seed alone") from error
        if not isinstance(batches, Iterable):
            raise BadInput(f"{self._where}: a function of a seed returned no iterable of batches")
        return batches

    def batch(self, config_seed: int, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch `index` of `epoch`; another than the next one costs those before it."""
        if self._at is None or self._at[0] != epoch or self._at[1] > index:
            seed = derived_seed("loader", config_seed, epoch)
            with seeded(seed):
                self._batches, self._at = iter(self._begun(seed)), (epoch, 0)
        assert self._at is not None
        found = None
        for each in range(self._at[1], index + 1):
            with seeded(derived_seed("augment", config_seed, epoch, each, 0)):
                found = next(self._batches, None)
        self._at = epoch, index + 1
        if found is None:
            raise BadInput(f"{self._where}: it gave fewer batches in epoch {epoch + 1} than its length says")
        return _pair(found, self._where)

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one fixed seed."""
        with seeded(_EVAL_SEED):
            batches = iter(self._begun(_EVAL_SEED))
        for index in range(self.length()):
            with seeded(derived_seed("augment", _EVAL_SEED, index)):
                found = next(batches, None)
            if found is None:
                return
            yield _pair(found, self._where)


def _part(part: Any, where: str) -> _Rows | _Loader:
    if hasattr(part, "__getitem__") and isinstance(part, Sized):
        if len(part) == 0:
            raise BadInput(f"{where}: it is empty")
        return _Rows(part, torch.arange(len(part), device="cpu"), where)
    if callable(part):
        return _Loader(part, where)
    kind = type(part).__name__
    again = "; give a function of a seed that makes it" if hasattr(part, "__iter__") else ""
    raise BadInput(f"{where}: a {kind} is neither a data set with a length and items nor a function of a seed{again}")


class ExampleBatches:
    """The examples of one run, fetched a batch at a time.

    Args:
        config: the run.
        workers: each gets its own slice of every batch.

    Raises:
        BadInput: the data set cannot be had or is not what `Examples` says, the batch is larger than it, or it cannot
            be shared out.
    """

    def __init__(self, config: RunConfig, workers: Workers) -> None:
        if config.batch_size % workers.size:
            raise BadInput(f"batch_size={config.batch_size}: expected a multiple of the {workers.size} workers")
        self._config, self._workers = config, workers
        examples = workers.in_turn(lambda: Examples.named(config.dataset))
        name = config.dataset
        self._train = _part(examples.train, f"{name}, the training set")
        held_out = examples.evaluation if config.split == "final" else examples.tune
        if held_out is not None:
            self._eval = _part(held_out, f"{name}, the set to {'evaluate' if config.split == 'final' else 'tune'} on")
        elif isinstance(self._train, _Loader):
            raise BadInput(f"{name}: of a loader no tenth can be held out to tune on; give a third set for it")
        if isinstance(self._train, _Rows):
            split = config.split if held_out is None else "final"
            kept, rest = split_rows(len(self._train), split, config.subset, name)
            self._train = _Rows(examples.train, kept, f"{name}, the training set")
            if held_out is None:
                self._eval = _Rows(examples.train, rest, f"{name}, the tenth of the training set that is held out")
            self.steps_per_epoch = len(kept) // config.batch_size
        else:
            if workers.size > 1 or config.subset is not None:
                raise BadInput(f"{name}: of a loader there are no subsets, and no shares for workers; give a data set")
            self.steps_per_epoch = self._train.length()
        if self.steps_per_epoch == 0:
            count = len(self._train) if isinstance(self._train, _Rows) else 0
            raise BadInput(f"batch_size={config.batch_size}: this run has only {count} training examples; choose less")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")
        x, _ = self.training(0, 0)
        if len(x) * workers.size != config.batch_size:
            raise BadInput(
                f"batch_size={config.batch_size}: the loader of {name} gives {len(x)} examples at a time; "
                "say the same in both"
            )
        self.shape = tuple(x.shape[1:])
        classes = getattr(examples.train, "classes", None)
        self.num_classes = len(classes) if isinstance(classes, Sized) else None

    @property
    def about(self) -> dict[str, Any]:
        """What the record says of the examples: how many there are to train on and evaluate on, and their shape."""
        train = self.steps_per_epoch * self._config.batch_size
        about = {"train_examples": len(self._train) if isinstance(self._train, _Rows) else train}
        if isinstance(self._eval, _Rows):
            about["eval_examples"] = len(self._eval)
        return {**about, "example_shape": list(self.shape)}

    def training(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """One worker's part of batch `index` of `epoch`, both from 0: inputs and targets.

        Every epoch goes once through the examples in a new order; the last, incomplete batch is left out. What is
        random in an example, by torch's, NumPy's or Python's global generator, follows from seed, epoch, step and rank.
        """
        config, workers = self._config, self._workers
        if isinstance(self._train, _Loader):
            return self._moved(*self._train.batch(config.seed, epoch, index))
        if epoch != self._epoch:
            shuffle = torch.Generator().manual_seed(derived_seed("order", config.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self._train), generator=shuffle, device="cpu")
        share = config.batch_size // workers.size
        first = index * config.batch_size + workers.rank * share
        seed = derived_seed("augment", config.seed, epoch, index, workers.rank)
        return self._moved(*self._train.batch(self._order[first : first + share], seed))

    def evaluation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One worker's share of the examples to evaluate on, every `size`-th of them."""
        if isinstance(self._eval, _Loader):
            for pair in itertools.islice(self._eval.all(), self._workers.rank, None, self._workers.size):
                yield self._moved(*pair)
            return
        mine = torch.arange(self._workers.rank, len(self._eval), self._workers.size, device="cpu")
        for part in torch.split(mine, _EVAL_BATCH) if len(mine) else ():
            yield self._moved(*self._eval.batch(part, derived_seed("evaluation", int(part[0]))))

    def _moved(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        device = self._workers.device
        if self._config.channels_last and x.ndim == 4:
            return x.to(device, memory_format=torch.channels_last), y.to(device)
        return x.to(device), y.to(device)

"""`RoundCheckpoint`: workers of `LocalVote` that come and go, each with a file of what it had after the last rounds.

Under torchrun a worker that is lost, or a new one, ends the processes of all, which start again as another number of
workers perhaps. Then they tell each other which files they see, and go on from the newest round that all have saved.
"""

from __future__ import annotations

import ctypes
import io
import os
import re
import secrets
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signstep.distributed.local import LocalVote
from signstep.distributed.worker import resplit

__all__ = ["Restored", "RoundCheckpoint", "Saved", "newest"]

_CONTENT = {"model", "optimizer", "local", "extra"}


class Saved(NamedTuple):
    """What one worker has saved after a round, as the name of a file says it.

    >>> Saved(7, 3, 0, "5f").name
    'round-00000007-worker-0-of-3-5f.pt'
    >>> Saved.of("round-00000007-worker-0-of-3-5f.pt")
    Saved(round=7, workers=3, worker=0, run='5f')
    """

    round: int
    workers: int
    worker: int
    run: str
    """The same for all workers that have restored together, so that files of the same run and round fit together."""

    @property
    def name(self) -> str:
        return f"round-{self.round:08d}-worker-{self.worker}-of-{self.workers}-{self.run}.pt"

    @classmethod
    def of(cls, name: str) -> Saved | None:
        """The inverse of `name`; None for another file's."""
        found = re.fullmatch(r"round-(\d+)-worker-(\d+)-of-(\d+)-([0-9a-f]+)\.pt", name)
        saved = None if found is None else cls(int(found[1]), int(found[3]), int(found[2]), found[4])
        return None if saved is None or saved.worker >= saved.workers else saved


class Restored(NamedTuple):
    """Where a training goes on."""

    round: int
    """How many rounds have been saved before."""
    workers: int
    """How many workers have saved the last one."""
    extra: dict[str, Any]
    """What was passed to `save`: this worker's own, or, of another number of workers, the same for all."""


def newest(files: Collection[Saved]) -> list[Saved]:
    """The files to go on from: those of the newest round of which no worker's is missing, in the order of workers.

    A round is complete where all workers' files are there that have saved it together, as their names say. Unless files
    are lost, one of the rounds that `RoundCheckpoint` keeps is complete. So a newer round that is not complete is what
    a killed worker has begun, or what is left of another training, and it is passed over. Where no round at all is
    complete, it is the newest, with what there is of it.

    Example:
        >>> files = [Saved(4, 2, 0, "a"), Saved(4, 2, 1, "a"), Saved(5, 2, 1, "a")]
        >>> [(file.round, file.worker) for file in newest(files)]
        [(4, 0), (4, 1)]
        >>> [(file.round, file.worker) for file in newest(files[1:])]
        [(5, 1)]
    """
    by_round: dict[tuple[int, int, str], list[Saved]] = {}
    for file in sorted(files):
        by_round.setdefault((file.round, file.workers, file.run), []).append(file)
    complete = [group for group in by_round.values() if len(group) == group[0].workers]
    return max(complete or by_round.values(), key=lambda group: (group[0].round, len(group)), default=[])


class _Way(NamedTuple):
    """Who reads which of the files to go on from, and where it goes."""

    files: Sequence[Saved]
    exact: bool
    """Each worker takes its own file; else the model is that of the first file, and momenta are split anew."""
    own: Sequence[Saved | None]
    """By rank, whose optimizer's state it takes; None: that of the first file."""
    targets: Mapping[Saved, int]
    """The rank that needs a file's content beside those that `own` it."""
    readers: Mapping[Saved, int]
    """The rank that reads it for that one."""

    @classmethod
    def of(cls, files: Sequence[Saved], seen: Sequence[Collection[Saved]]) -> _Way:
        """From the files that each rank sees."""

        def first(file: Saved) -> int:
            return next(rank for rank, own in enumerate(seen) if file in own)

        exact = len(files) == files[0].workers == len(seen)
        targets = {file: file.worker if exact else first(files[0]) for file in files}
        readers = {file: rank if file in seen[rank] else first(file) for file, rank in targets.items()}
        if exact:
            return cls(files, exact, files, targets, readers)
        own = [next((f for f in files if f.worker == rank and f in see), None) for rank, see in enumerate(seen)]
        for rank, see in enumerate(seen):  # ranks may have been numbered anew
            own[rank] = own[rank] or next((file for file in files if file in see and file not in own), None)
        return cls(files, exact, own, targets, readers)


class RoundCheckpoint:
    """Save every worker's state after each round of `LocalVote`, and go on with any number of workers.

    With fragments a round is what has ended whenever `LocalVote.step` returns True: one fragment's.

    Each worker writes a file of its own, atomically. If all files of the newest round are there and as many workers as
    have saved it, each takes its own, and the run is, bit for bit, the one that was not interrupted. With another
    number of workers, or with files that are lost, all take the model and `extra` of one file; the outer momenta
    become the mean of those that were saved (`resplit`); a worker that sees a file of the round keeps its optimizer's
    state, others get a copy of the first one's, as a momentum or second moment made of a few gradients would be worse.

    Args:
        folder: of the files; one that all workers share, or one on each machine.
        model: as `LocalVote` was given it.
        optimizer: the worker's own, whose state is saved.
        local: the `LocalVote` of both.
        keep: rounds whose files are kept, at least 2. One more is kept if `local` has a delay and fragments that do not
            divide its `every`: then a worker may have saved two rounds that another one has not.

    Attributes:
        round: how many rounds have been saved.

    Raises:
        TypeError: local is not a `LocalVote`.
        ValueError: keep is less than 2.

    Example:
        .. code-block:: python

            local = LocalVote(model, optimizer, every=32)
            checkpoint = RoundCheckpoint("rounds", model, optimizer, local)
            restored = checkpoint.restore()
            position = 0 if restored is None else restored.extra["position"]
            while position < len(batches):
                loss_function(model, batches[position]).backward()
                optimizer.step()
                optimizer.zero_grad()
                position += 1
                if local.step():
                    checkpoint.save(position=position)
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, local: LocalVote, *, keep: int = 2
    ) -> None:
        if keep < 2:
            raise ValueError(f"Invalid keep: {keep}, expected at least 2, as some workers save a round before others")
        if not isinstance(local, LocalVote):
            raise TypeError(
                f"Invalid local: a {type(local).__name__}, expected a LocalVote, as only its state can be split among "
                "another number of workers: save the state_dict() of model, optimizer and this object on each rank"
            )
        self.folder, self.optimizer, self.local = Path(folder), optimizer, local
        # To save, a worker needs all that the others send until that step, and they send it when they have saved what
        # arrived at earlier steps. From one departure to the last step before the next there is one arrival, or there
        # are two if the steps between departures are not always as many.
        schedule = local.schedule
        self.keep = keep + int(schedule.delay > 0 and schedule.every % schedule.fragments > 0)
        self.module = model.module if isinstance(model, DistributedDataParallel) else model
        self.device = next(self.module.parameters()).device
        self.round = 0
        self._run = ""
        self._checked = False

    def save(self, **extra: Any) -> None:
        """Save what this worker has; every worker calls it after a round, and in every round, or in every k-th.

        Files of rounds that are too old are deleted once the new one is there, whoever has saved them.

        Args:
            extra: what else the training needs to go on, such as its position in the data: numbers, strings, tensors,
                and lists and dicts of them.

        Raises:
            RuntimeError: there was no `restore` before.
            TypeError: something in the state is of a type that torch.load(weights_only=True) does not take.
        """
        if not self._run:
            raise RuntimeError("RoundCheckpoint.save before restore: call restore() once on all workers, at the start")
        saved = Saved(self.round + 1, self.local.world_size, self.local.rank, self._run)
        temporary = (self.folder / saved.name).with_suffix(".tmp")
        content = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "local": self.local.state_dict(),
            "extra": extra,
        }
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if not self._checked:  # rather now than when it is needed
            self._check(temporary)
        os.replace(temporary, self.folder / saved.name)
        self.round += 1
        for other in self._files():  # of all workers, who have all saved the oldest round that is kept
            if other.round <= self.round - self.keep:
                (self.folder / other.name).unlink(missing_ok=True)

    def _check(self, path: Path) -> None:
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TypeError(
                "this state could not be loaded again with weights_only=True: pass numbers, strings, tensors, and "
                f"lists and dicts of them as extra ({str(error).partition(chr(10))[0]})"
            ) from error
        self._checked = True

    @torch.no_grad()
    def restore(self) -> Restored | None:
        """Load the newest round; every worker calls it once, when it has made model, optimizer and `LocalVote`.

        A file that cannot be read is passed over with a warning.

        Returns:
            Where to go on; None if nothing was saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for torn in self.folder.glob("round-*.tmp"):  # of workers that were killed; nobody saves before all are here
            torn.unlink(missing_ok=True)
        rank, unusable = self.local.rank, set[Saved]()
        while True:
            told = self._tell_all((self._files() - unusable, secrets.token_hex(8)))
            seen, self._run = [files for files, _ in told], told[0][1]
            files = newest(set().union(*seen))
            if not files:
                return None
            way = _Way.of(files, seen)
            wanted = [file for file in files if way.readers[file] == rank or file == way.own[rank]]
            contents = {file: self._read(file, way) for file in wanted if file in seen[rank]}
            failed = set().union(*self._tell_all({file for file, content in contents.items() if content is None}))
            if not failed:
                break
            unusable |= failed
        state = self._own_of(way, contents) if way.exact else self._split_anew(way, contents)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.local.load_state_dict(state["local"])
        self.round = files[0].round
        return Restored(self.round, files[0].workers, state["extra"])

    def _files(self) -> set[Saved]:
        return {saved for path in self.folder.iterdir() if (saved := Saved.of(path.name)) is not None}

    def _read(self, file: Saved, way: _Way) -> Any:
        """The content of a file, or what is needed of it; None if it cannot be had."""
        path = self.folder / file.name
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or content.keys() != _CONTENT:
                raise ValueError("it is not a file of RoundCheckpoint")
        except Exception as error:  # torch raises whatever it meets
            warnings.warn(f"{path} is passed over: {str(error).partition(chr(10))[0]}", stacklevel=3)
            return None
        whole = way.exact or file in (way.files[0], way.own[self.local.rank])
        return content if whole else {"local": content["local"]}

    def _own_of(self, way: _Way, contents: Mapping[Saved, Any]) -> Any:
        """The worker's own state, from whoever sees it."""
        passed = [self._pass_on(contents.get(f), way.readers[f], way.targets[f]) for f in way.files]
        return passed[self.local.rank]

    def _split_anew(self, way: _Way, contents: Mapping[Saved, Any]) -> Any:
        """The first file's model for all, and the mean of the outer momenta."""
        rank, own, leader = self.local.rank, way.own[self.local.rank], way.targets[way.files[0]]
        old = []
        for i, file in enumerate(way.files):
            local = self._pass_on(contents.get(file, {}).get("local"), way.readers[file], leader)
            if rank == leader:  # what was on its way is lost
                local = local | {"away": {}, "schedule": local["schedule"] | {"away": []}}
                old.append(local | {"rank": i, "world_size": len(way.files)})
        state: Any = None
        if rank == leader:
            state = contents[way.files[0]] | {"local": resplit(old, self.local.world_size)[0]}
        state = self._give_all(state, leader)
        if own is not None:
            state["optimizer"] = contents[own]["optimizer"]
        state["local"]["rank"] = rank
        return state

    def _tell_all(self, said: Any) -> list[Any]:
        told: list[Any] = [None] * self.local.world_size
        dist.all_gather_object(told, said, group=self.local.group)
        return told

    def _pass_on(self, content: Any, source: int, target: int) -> Any:
        """What the source has, on the target; other ranks keep what they have."""
        group, rank = self.local.group, self.local.rank
        if source == target or rank not in (source, target):
            return content
        other = dist.get_global_rank(group, target if rank == source else source)
        if rank == source:
            packed = _pack(content, self.device)
            dist.send(torch.tensor([len(packed)], dtype=torch.int64, device=self.device), other, group=group)
            dist.send(packed, other, group=group)
            return content
        size = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(size, other, group=group)
        packed = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.recv(packed, other, group=group)
        return _unpack(packed)

    def _give_all(self, content: Any, source: int) -> Any:
        """What the source has, on all ranks."""
        group, by = self.local.group, dist.get_global_rank(self.local.group, source)
        packed = torch.empty(0, dtype=torch.uint8, device=self.device)
        if self.local.rank == source:
            packed = _pack(content, self.device)
        size = torch.tensor([len(packed)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, by, group=group)
        packed = packed if self.local.rank == source else packed.new_empty(int(size))
        dist.broadcast(packed, by, group=group)
        return _unpack(packed)


def _pack(content: Any, device: torch.device) -> Tensor:
    """As torch.save writes it: uint8, 1-D."""
    file = io.BytesIO()
    torch.save(content, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8).to(device)


def _unpack(packed: Tensor) -> Any:
    packed = packed.cpu()
    file = io.BytesIO(ctypes.string_at(packed.data_ptr(), len(packed)))
    return torch.load(file, map_location="cpu", weights_only=True)

"""The checkpoint of a run, and the lock that keeps the run to one process."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch

from signstep.lab.errors import UserError
from signstep.lab.output.files import locked, replacing
from signstep.lab.training.config import RunConfig
from signstep.lab.training.unfolded import refuse_large_tuples


class RunBusy(UserError, RuntimeError):
    """Another process is training the same run."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint file cannot be used; the message names it and says what to do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically."""
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint at `path`, tensors on the CPU, or None where there is no file.

    Args:
        path: the file that `save` wrote.
        config: the run's configuration as `RunConfig.to_dict` gives it; the checkpoint must hold the same one.

    Raises:
        CheckpointError: the file is damaged, or belongs to another configuration.
    """
    try:
        state = read(path)
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it to train this run from its start") from error
    if RunConfig.from_dict(state["config"]) != RunConfig.from_dict(config):
        raise CheckpointError(
            f"{path} is the checkpoint of another configuration; delete it or train in another folder"
        )
    return state


def read(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, whatever its configuration; tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, or not a run's checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress: a part that unpacks to more than the file has would fill the memory.
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts unpack to more bytes than it has")
            for part in archive.infolist():
                if part.filename.endswith("data.pkl"):
                    refuse_large_tuples(archive.read(part))
            damaged = archive.testzip()  # torch.load does not compare the checksums that torch.save writes
        if damaged is not None:
            raise ValueError(f"wrong checksum in its part {damaged}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise ValueError("it holds no configuration of a run")
        RunConfig.from_dict(state["config"])
    except FileNotFoundError:
        raise
    except (
        RuntimeError,
        OSError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a readable checkpoint ({reason})") from error
    return state


def is_locked(path: Path) -> bool:
    """Whether a process holds `path` with `lock`."""
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # not ours to write: nobody can say
        return False


@contextlib.contextmanager
def lock(path: Path, over: Callable[[], bool]) -> Iterator[None]:
    """Hold `path` (a `.lock` file) for this process; released when the block ends or the process dies.

    Args:
        path: what to hold.
        over: whether, at the block's end, nobody has anything left to do under this lock: then `path` is removed.
            After an error it is removed if it was not there before.

    Raises:
        RunBusy: another process holds it.
        CannotWrite: there can be no such file.
    """
    useless = not path.exists()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=0))
        except filelock.Timeout:
            raise RunBusy(f"{path.with_suffix('')} is being trained by another process, which holds {path}") from None
        try:
            yield
            # A process that opened the file before it is removed gets its lock, and finds that nothing is left to do.
            useless = over()
        finally:
            if useless:
                with contextlib.suppress(PermissionError):  # Windows removes it when it is released
                    path.unlink(missing_ok=True)

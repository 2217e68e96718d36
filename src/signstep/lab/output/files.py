"""Files that survive a kill: a reader sees the old file or the whole new one, never a part of it.

What cannot be written is a `CannotWrite`, which names the file or the folder and says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import filelock

from signstep.lab.errors import BadInput, CannotWrite

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _cannot_write(path: Path, error: OSError, folder: Path) -> CannotWrite:
    """The error that says why `path`, which is in `folder` or is it, cannot be written, and what to do."""
    reason = error.strerror or str(error)
    in_the_way = next((p for p in (folder, *folder.parents) if os.path.exists(p) and not os.path.isdir(p)), None)
    if in_the_way is not None:
        reason = f"{in_the_way} is not a folder"
    remedy = "name a folder with --out in which you may write"
    if error.errno in _FULL:
        remedy = "free some space there and give the same command again"
    return CannotWrite(f"{path} cannot be written: {reason}; {remedy}")


def make_folder(folder: Path) -> None:
    """Make a folder with all above it, where there is none.

    Raises:
        CannotWrite: there is a file in its place, or it may not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error, folder) from error


@contextlib.contextmanager
def output_folder(folder: Path | None) -> Iterator[None]:
    """See before any work that a file can be written in a folder, which is made; None: there is nothing to see.

    Folders that were made for it and are empty at the end of the block are removed, so that a start that fails leaves
    nothing.

    Raises:
        CannotWrite: it cannot be made, or a file in it cannot be written.
    """
    if folder is None:
        yield
        return
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        make_folder(folder)
        try:
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(bytes(1))
        except OSError as error:
            raise _cannot_write(folder, error, folder) from error
        yield
    finally:
        for each in new:
            with contextlib.suppress(OSError):
                each.rmdir()


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock `path` for this process; released when the block ends or the process dies.

    Raises:
        filelock.Timeout: another process holds it for longer than `timeout` seconds; -1: wait for it.
        CannotWrite: there can be no such file.
    """
    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=timeout)
    except filelock.Timeout:
        raise
    except OSError as error:
        raise _cannot_write(path, error, path.parent) from error
    try:
        yield
    finally:
        held.release()


class _Written(io.BufferedWriter):
    """A file that remembers why it could not be written: torch.save says something else."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, and put it in the place of `path` when the block ends without an error.

    Raises:
        CannotWrite: the file cannot be written; `path` is as it was, and the temporary file is gone.

    Example:
        .. code-block:: python

            with replacing(path) as file:
                torch.save(state, file)
    """
    temporary = path.with_name(path.name + ".tmp")
    file = None
    try:
        with _Written(io.FileIO(temporary, "wb")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        failure = error if isinstance(error, OSError) else file and file.failure
        if failure:
            raise _cannot_write(path, failure, path.parent) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a whole file of UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a value as indented JSON, atomically; without `allow_nan` a number that is not finite is a ValueError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def read_json(path: Path) -> Any:
    """What a file that `write_json` has written holds.

    Raises:
        BadInput: it holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error}); delete it and give the same command again") from error


def write_all(folder: Path, contents: Mapping[str, Any]) -> list[Path]:
    """Write several files into a folder, made where there is none; each file atomically.

    Args:
        folder: where.
        contents: by a file's name, its bytes, its text, or what becomes JSON.

    Returns:
        The paths.

    Raises:
        CannotWrite: a file cannot be written; the others are whole.
    """
    make_folder(folder)
    for name, content in contents.items():
        if isinstance(content, bytes):
            write_bytes(folder / name, content)
        elif isinstance(content, str):
            write_text(folder / name, content)
        else:
            write_json(folder / name, content)
    return [folder / name for name in contents]

"""Files that survive a kill: a reader sees the old file or the whole new one, never a part of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, and put it in the place of `path` when the block ends without an error.

    Raises:
        OSError: the file cannot be written; `path` is as it was.

    Example:
        .. code-block:: python

            with replacing(path) as file:
                torch.save(state, file)
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


def write_all(folder: Path, contents: Mapping[str, Any]) -> list[Path]:
    """Write several files into a folder, made where there is none; each file atomically.

    Args:
        folder: where.
        contents: by a file's name, its bytes, its text, or what becomes JSON.

    Returns:
        The paths.

    Raises:
        OSError: a file cannot be written; the others are whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if isinstance(content, bytes):
            write_bytes(folder / name, content)
        elif isinstance(content, str):
            write_text(folder / name, content)
        else:
            write_json(folder / name, content)
    return [folder / name for name in contents]

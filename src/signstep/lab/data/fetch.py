"""Downloads a file from the first of several mirrors that has it.

The file is compared with its checksum, a download that breaks off is resumed, and a file at its place is whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pooch
import requests
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from signstep.lab.data.images import DataError

_TIMEOUT = (10, 60)
"""Seconds to wait for a connection, and for the next bytes."""
_PAUSE = 1.0
"""Seconds between two attempts at one mirror."""
_MOST = 1 << 28
"""Bytes that are taken from a mirror; the largest file has 170 million."""


@dataclass(frozen=True)
class Archive:
    """A file with one known content, by its SHA-256, and the addresses that serve it, the fastest first."""

    file: str
    digest: str
    mirrors: tuple[str, ...]


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """Give a folder inside `folder` for unfinished files, to one process at a time.

    It lies on the same file system as `folder`, so that a finished file can be moved to its place in one step.
    """
    place = folder / ".download"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            # Remove temporary files and folders that a killed process has left; the .part files stay.
            for leftover in place.glob("tmp*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            yield place
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error}") from error


def download(archive: Archive, folder: Path) -> Path:
    """Return `folder / archive.file`, downloaded from the first mirror that serves the right content.

    A download that breaks off leaves its bytes in .download/<file>.part, where this call, the next one and the next
    mirror go on. Raises DataError with each mirror's failure where none succeeds; a wrong checksum is given beside the
    expected one.
    """
    target = folder / archive.file
    pooch.get_logger().setLevel("WARNING")
    failures = []
    with workspace(folder) as work:
        part = work / f"{archive.file}.part"
        for mirror in archive.mirrors:
            # Bytes of another mirror may have spoiled the checksum: then this mirror is asked for the whole file.
            for _ in range(2 if part.exists() else 1):
                if target.exists():  # another process was faster, or the last round was good
                    return target
                try:
                    done = pooch.retrieve(
                        mirror,
                        known_hash=f"sha256:{archive.digest}",
                        fname=archive.file,
                        path=work,
                        downloader=partial(_download, part=part),
                    )
                except requests.RequestException as error:
                    failures.append(f"{mirror}: {_reason(error)}")
                    break
                except ValueError as error:
                    failures.append(f"{mirror}: {error}")
                else:
                    os.replace(done, target)
                    return target
    raise DataError(f"{archive.file} could not be downloaded ({'; '.join(failures)})")


def _download(url: str, output_file: str, _pooch: Any, *, part: Path) -> None:
    """A pooch downloader: fill `part`, starting again after each cut that brought something, then hand it over."""
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(TextColumn(part.stem), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, visible=False)
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _continue(
                    url, part, before, lambda n, total: progress.update(task, completed=n, total=total, visible=True)
                )
                break
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                if not part.exists() or part.stat().st_size <= before:
                    raise
                time.sleep(_PAUSE)
    os.replace(part, output_file)


def _continue(url: str, part: Path, start: int, report: Callable[[int, int | None], None]) -> None:
    """Append to `part` what `url` has from byte `start` on; raises a requests exception where it ends too soon."""
    # identity: a server must not compress the bytes, which are counted and checked here.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        partial_content = response.status_code == requests.codes.partial_content
        content_range = response.headers.get("Content-Range", "")
        if start and response.status_code == requests.codes.requested_range_not_satisfiable:
            if content_range == f"bytes */{start}":
                return  # nothing was missing
            unusable = True  # longer than the file
        else:
            unusable = partial_content and not content_range.startswith(f"bytes {start}-")
        if start and unusable:
            part.unlink()
            _continue(url, part, 0, report)
            return
        response.raise_for_status()
        done = start if partial_content else 0  # a server that knows no ranges sends all of it again
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        with part.open("ab" if done else "wb") as file:
            try:
                for chunk in response.iter_content(1 << 16):
                    file.write(chunk)
                    done += len(chunk)
                    report(done, total)
                    if done > _MOST:
                        break
            finally:
                file.flush()
                os.fsync(file.fileno())
        if done > _MOST:
            part.unlink()
            raise requests.RequestException(f"it sends more than {_MOST} bytes")
        if total is not None and done < total:
            raise requests.ConnectionError(f"cut off after {done} of {total} bytes")


def _reason(error: requests.RequestException) -> str:
    """Say what the exception means in the words of someone who wants the file."""
    if isinstance(error, requests.HTTPError):
        return str(error).partition(" for url")[0]
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "cut off, and continuing brought nothing more"
    if isinstance(error, requests.ConnectionError) and not str(error).startswith("cut off"):
        return "no connection"
    return str(error)

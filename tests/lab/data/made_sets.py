"""Small data sets in every layout, made up by the tests, and a web server that does what a bad one does."""

import contextlib
import dataclasses
import gzip
import hashlib
import pickle
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from signstep.lab.data import cifar, idx
from signstep.lab.data.fetch import Archive

TRAIN, TEST = 50, 20


@dataclasses.dataclass
class Pixels:
    """What a synthetic CIFAR set holds."""

    x: np.ndarray
    labels: dict[bytes, np.ndarray]


def make_cifar(name: str, folder: Path, *, binary: bool, protocol: int = 2) -> Pixels:
    """Write a small CIFAR set in one of its layouts; the same images whatever the layout."""
    rng = np.random.default_rng(0)
    layout = cifar.LAYOUTS[name][0 if binary else 1]
    x = rng.integers(0, 256, (TRAIN + TEST, 3072), dtype=np.uint8)
    labels = {key: rng.integers(0, classes, TRAIN + TEST, dtype=np.uint8) for key, classes in layout.labels}
    place = folder / layout.folder
    place.mkdir(parents=True)
    parts = [*np.split(np.arange(TRAIN), len(layout.train)), np.arange(TRAIN, TRAIN + TEST)]
    for file, part in zip((*layout.train, layout.test), parts, strict=True):
        columns = [labels[key][part] for key, _ in layout.labels]
        if binary:
            (place / file).write_bytes(np.column_stack([*columns, x[part]]).tobytes())
        else:
            content: dict[bytes, Any] = {key: labels[key][part].tolist() for key, _ in layout.labels}
            content |= {b"data": x[part], b"batch_label": b"testing batch 1 of 1", b"filenames": [b"a.png"] * len(part)}
            (place / file).write_bytes(pickle.dumps(content, protocol=protocol))
    return Pixels(x, labels)


def pack(folder: Path, layout: cifar.CifarLayout, *, prefix: str = "", leave_out: str = "") -> Path:
    """Turn an unpacked set into its official archive, and remove the unpacked one."""
    archive = folder / layout.archive
    with tarfile.open(archive, "w:gz") as tar:
        for file in (*layout.train, layout.test):
            if file != leave_out:
                tar.add(folder / layout.folder / file, f"{prefix}{layout.folder}/{file}")
            (folder / layout.folder / file).unlink()
    (folder / layout.folder).rmdir()
    return archive


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


RECORD10, RECORD100 = 3073, 3074


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def make_idx(place: Path, *, zipped: tuple[bool, ...] = (True,) * 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    place.mkdir(parents=True)
    arrays = {}
    for (file, shape), gz in zip(idx.SHAPES.items(), zipped, strict=True):
        arrays[file] = rng.integers(0, 256 if "images" in file else 10, shape, dtype=np.uint8)
        raw = idx_bytes(arrays[file])
        (place / (f"{file}.gz" if gz else file)).write_bytes(gzip.compress(raw) if gz else raw)
    return arrays


@dataclasses.dataclass
class Server:
    """A web server on this machine that does what a bad one does.

    `log` has (path, first byte, bytes to send) before any is sent: a client that has its answer finds it there.
    """

    url: str
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    cut_after: list[int] = dataclasses.field(default_factory=list)
    """Bytes of each of the first answers after which the connection breaks."""
    status: list[int] = dataclasses.field(default_factory=list)
    """Status of the first answers; 0: the normal one."""
    ranges: bool = True
    drip: float = 0.0
    """Seconds between two pieces."""
    log: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            body = state.files.get(self.path.lstrip("/"))
            status = state.status.pop(0) if state.status else 0
            if body is None or status:
                state.log.append((self.path, 0, 0))
                self.send_error(status or 404)
                return
            start = 0
            if state.ranges and (asked := self.headers.get("Range")):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    state.log.append((self.path, start, 0))
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            cut = state.cut_after.pop(0) if state.cut_after else len(body)
            piece = body[start : start + cut]
            state.log.append((self.path, start, len(piece)))
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            try:
                for at in range(0, len(piece), 1 << 16):
                    self.wfile.write(piece[at : at + (1 << 16)])
                    self.wfile.flush()
                    time.sleep(state.drip)
            except OSError:  # the client was killed
                pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{httpd.server_address[1]}/")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


BODY = np.random.default_rng(1).bytes(10 * (1 << 16) + 123)
BLOCK = 1 << 16


def archive_at(*urls: str, body: bytes = BODY) -> Archive:
    return Archive("set.tar.gz", hashlib.sha256(body).hexdigest(), urls)


def leftovers(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".download/lock"}

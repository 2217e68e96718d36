"""signstep.lab.data against real files: whole, cut, forged and downloaded from a server that breaks off."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import multiprocessing
import os
import pickle
import signal
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from signstep.lab.data import (
    DataError,
    Images,
    augment,
    augmentation,
    catalog,
    cifar,
    debian,
    demo_dataset,
    fetch,
    idx,
    listing,
    load,
    normalise,
    split,
)
from signstep.lab.data.fetch import Archive, download
from signstep.lab.data.unpickle import load_dict

TRAIN, TEST = 50, 20

# Fixed for good: another order would change what every published number was trained on.
FIRST_TEN_OF_500 = [367, 129, 424, 277, 111, 15, 282, 107, 240, 110]
DIGITS_TEST_LABELS = [5, 7, 1, 1, 6, 3, 8, 0, 8, 0, 9, 4]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data of this machine is in reach: only what a test puts under tmp_path."""
    monkeypatch.setattr(catalog.platformdirs, "user_cache_path", lambda package: tmp_path / "cache" / package)
    monkeypatch.delenv("SIGNSTEP_DATA", raising=False)
    monkeypatch.setattr(catalog, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fetch, "_PAUSE", 0.0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# --- CIFAR -----------------------------------------------------------------------------------------------------------


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR sets of 50 and 20 images, so that whole ones can be written."""
    for name, layouts in cifar.LAYOUTS.items():
        smaller = tuple(dataclasses.replace(lay, train_records=TRAIN, test_records=TEST) for lay in layouts)
        monkeypatch.setitem(cifar.LAYOUTS, name, smaller)


def pack(folder: Path, layout: cifar.Layout, *, prefix: str = "", leave_out: str = "") -> Path:
    """Turn an unpacked set into its official archive, and remove the unpacked one."""
    archive = folder / layout.archive
    with tarfile.open(archive, "w:gz") as tar:
        for file in (*layout.train, layout.test):
            if file != leave_out:
                tar.add(folder / layout.folder / file, f"{prefix}{layout.folder}/{file}")
            (folder / layout.folder / file).unlink()
    (folder / layout.folder).rmdir()
    return archive


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("packed", [None, "", "./"])
@pytest.mark.usefixtures("small")
def test_every_cifar_layout_gives_the_same_images(name: str, binary: bool, packed: str | None, tmp_path: Path) -> None:
    layout = cifar.LAYOUTS[name][0 if binary else 1]
    pixels = make_cifar(name, tmp_path, binary=binary)
    where = tmp_path / layout.folder
    if packed is not None:
        where = pack(tmp_path, layout, prefix=packed)
    images = load(name, tmp_path, download=False)
    key = layout.labels[-1][0]
    expected_x = torch.from_numpy(pixels.x).view(-1, 3, 32, 32)
    expected_y = torch.from_numpy(pixels.labels[key]).long()
    assert torch.equal(torch.cat([images.train_x, images.test_x]), expected_x)
    assert torch.equal(torch.cat([images.train_y, images.test_y]), expected_y)
    assert (len(images.train_x), len(images.test_x)) == (TRAIN, TEST)
    assert images.source == str(where)
    assert (images.channels, images.size, images.num_classes) == (3, 32, layout.labels[-1][1])
    images.train_x.add_(1)  # the memory is the tensors' own
    images.test_x.add_(1)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.usefixtures("small")
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    pixels = make_cifar("cifar10", tmp_path, binary=False, protocol=protocol)
    assert np.array_equal(load("cifar10", tmp_path).train_x.view(-1, 3072).numpy(), pixels.x[:TRAIN])


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes that Python 2's cPickle with its NumPy wrote, as the official files have them: byte strings."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    raw = data.tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R" + b"(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01" + b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    state += dtype + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R" + state + b"b"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def test_the_pickles_of_python_2_are_read() -> None:
    data = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
    content = load_dict(python2_pickle(data, [3, 1, 4, 1, 5, 9, 2]), "here")
    assert np.array_equal(content[b"data"], data)
    assert content[b"labels"] == [3, 1, 4, 1, 5, 9, 2]


class Calls:
    """Pickled, a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, os.mkdir, getattr, np.load, np.memmap, torch.load, bytearray, print, __import__]
)
def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(
    function: Callable[..., Any], protocol: int, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    argument = {os.system: f"touch {canary}", os.mkdir: str(canary)}.get(function, f"open({str(canary)!r}, 'w')")
    raw = pickle.dumps({b"data": Calls(function, argument)}, protocol=protocol)
    with pytest.raises(DataError, match=r"batch_7 is not a readable pickle of CIFAR images: asks for .*nothing of it"):
        load_dict(raw, "batch_7")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a readable pickle"),
        (b"\x00" * 100, "not a readable pickle"),
        (b"\x80\x02}(U\x04da", "not a readable pickle"),
        (pickle.dumps([1, 2]), "holds a list, expected a dictionary"),
        (pickle.dumps({"data": np.zeros(4, dtype=np.int64)}), "array of type 'i8' .* expected bytes"),
        (pickle.dumps({"data": np.array([{}], dtype=object)}), "array of type 'O8' .* expected bytes"),
        (b"\x80\x02}U\x01dcnumpy\nndarray\n)Rs.", "array of type None .* expected bytes"),
        (b"\x80\x02}U\x01dc_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86Rs.", "the codec 'zlib'"),
        (b"\x80\x02}U\x01dcnumpy\nndarray\n)\x81s.", "array of type None .* expected bytes"),
        # memory asked for by a number in the stream: 2^62 bytes
        (b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x40.", "not a readable pickle"),
        # an array whose state says more than its bytes
        (python2_pickle(np.zeros((3, 4), np.uint8), [1]).replace(b"M\x03\x00", b"M\x04\x00"), "filling its shape"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_pickle_is_one_clear_error(raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"batch_7 .*{message}"):
        load_dict(raw, "batch_7")


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), min_size=1, max_size=4))
def test_no_damage_to_a_pickle_gives_another_error(writer: int, changes: list[tuple[int, bytes]]) -> None:
    data = np.arange(15, dtype=np.uint8).reshape(3, 5)
    content = {b"data": data, b"labels": [1, 2, 3]}
    raw = bytearray(python2_pickle(data, [1, 2, 3]) if writer == 6 else pickle.dumps(content, protocol=writer))
    for at, new in changes:
        raw[at : at + len(new)] = new
    with contextlib.suppress(DataError):
        load_dict(bytes(raw), "here")


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


RECORD10, RECORD100 = 3073, 3074


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("cifar10", "data_batch_3.bin", lambda raw: raw[:-1], "30729 bytes, expected 30730 .10 records of 3073."),
        ("cifar10", "data_batch_3.bin", lambda raw: raw[:-RECORD10], "27657 bytes, expected 30730"),
        ("cifar10", "test_batch.bin", lambda raw: raw + b"\0", "61461 bytes, expected 61460"),
        ("cifar10", "data_batch_1.bin", lambda raw: b"", "0 bytes, expected 30730"),
        ("cifar10", "data_batch_5.bin", lambda raw: b"\x0a" + raw[1:], r"labels \d..10, expected 0..9"),
        ("cifar10", "test_batch.bin", lambda raw: raw[1:] + b"\0", r"labels \d+..\d+, expected 0..9"),
        ("cifar100", "train.bin", lambda raw: raw[:-1], "153699 bytes, expected 153700 .50 records of 3074."),
        ("cifar100", "train.bin", lambda raw: b"\x14" + raw[1:], r"coarse_labels \d+..20, expected 0..19"),
        ("cifar100", "test.bin", lambda raw: raw[:1] + b"\x64" + raw[2:], r"fine_labels \d+..100, expected 0..99"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_wrong_binary_file_is_named(
    name: str, file: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    make_cifar(name, tmp_path, binary=True)
    path = tmp_path / cifar.LAYOUTS[name][0].folder / file
    edit(path, change)
    with pytest.raises(DataError, match=f"{name}: {path} has {message}"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [0] * 10}, "has none under 'data'"),
        ({"data": b"\0" * 30720, "labels": [0] * 10}, "has none under 'data'"),
        ({"data": np.zeros((9, 3072), np.uint8), "labels": [0] * 10}, r"has an array of \(9, 3072\) .*\(10, 3072\)"),
        ({"data": np.zeros((10, 3071), np.uint8), "labels": [0] * 10}, r"has an array of \(10, 3071\)"),
        ({"data": np.zeros((10, 3072), np.uint8)}, "has no list under 'labels'"),
        ({"data": np.zeros((10, 3072), np.uint8), "labels": [0] * 9}, "has a list of 9 under 'labels'"),
        (
            {"data": np.zeros((10, 3072), np.uint8), "labels": [0.5] * 10},
            "has a list of 10 under .*expected a list of 10 whole numbers",
        ),
        ({"data": np.zeros((10, 3072), np.uint8), "labels": [-1] + [0] * 9}, r"has labels -1..0, expected 0..9"),
        ({"data": np.zeros((10, 3072), np.uint8), "labels": [10] + [0] * 9}, r"has labels 0..10, expected 0..9"),
        ({"data": np.zeros((10, 3072), np.uint8), "labels": [2**80] + [0] * 9}, r"has labels 0..\d{25}, expected"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_wrong_python_batch_is_named(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_cifar("cifar10", tmp_path, binary=False)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"cifar10: {path} {message}"):
        load("cifar10", tmp_path)


@pytest.mark.usefixtures("small")
def test_an_array_in_fortran_order_is_read_as_what_it_means(tmp_path: Path) -> None:
    pixels = make_cifar("cifar10", tmp_path, binary=False)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    content = {"data": np.asfortranarray(pixels.x[TRAIN:]), "labels": [0] * TEST}
    path.write_bytes(pickle.dumps(content, protocol=2))
    assert np.array_equal(load("cifar10", tmp_path).test_x.reshape(-1, 3072).numpy(), pixels.x[TRAIN:])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.usefixtures("small")
def test_a_cut_archive_is_named(binary: bool, keep: float, tmp_path: Path) -> None:
    make_cifar("cifar10", tmp_path, binary=binary)
    archive = pack(tmp_path, cifar.LAYOUTS["cifar10"][0 if binary else 1])
    edit(archive, lambda raw: raw[: int(keep * len(raw) * 0.9)])
    with pytest.raises(DataError, match=f"cifar10: {archive} is not a whole tar.gz archive .*fetch it again"):
        load("cifar10", tmp_path)


@pytest.mark.usefixtures("small")
def test_a_damaged_archive_and_one_that_is_none_are_named(tmp_path: Path) -> None:
    make_cifar("cifar10", tmp_path, binary=True)
    archive = pack(tmp_path, cifar.LAYOUTS["cifar10"][0])
    # Random pixels do not compress, so this changes pixels and nothing else: only gzip's checksum can tell.
    edit(archive, lambda raw: raw[:5000] + bytes(byte ^ 1 for byte in raw[5000:5010]) + raw[5010:])
    with pytest.raises(DataError, match=f"{archive} is not a whole tar.gz archive .CRC check failed"):
        load("cifar10", tmp_path)
    archive.write_bytes(b"<html>Not Found</html>")
    with pytest.raises(DataError, match=f"{archive} is not a whole tar.gz"):
        load("cifar10", tmp_path)


@pytest.mark.usefixtures("small")
def test_an_archive_that_lacks_a_file_names_it(tmp_path: Path) -> None:
    make_cifar("cifar10", tmp_path, binary=True)
    archive = pack(tmp_path, cifar.LAYOUTS["cifar10"][0], leave_out="data_batch_2.bin")
    with pytest.raises(DataError, match=f"{archive} lacks data_batch_2.bin in cifar-10-batches-bin/"):
        load("cifar10", tmp_path)


@pytest.mark.usefixtures("small")
def test_nothing_of_an_archive_is_written_to_disk(tmp_path: Path) -> None:
    make_cifar("cifar10", tmp_path, binary=True)
    archive = pack(tmp_path, cifar.LAYOUTS["cifar10"][0], prefix="../../escape/")
    load("cifar10", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name, "here"]


@pytest.mark.usefixtures("small")
def test_an_incomplete_folder_is_an_error_unless_its_archive_is_there(tmp_path: Path) -> None:
    make_cifar("cifar10", tmp_path, binary=True)
    missing = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    missing.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"cifar-10-batches-bin lacks data_batch_2.bin; put them there or remove"):
        load("cifar10", tmp_path, download=False)
    make_cifar("cifar10", tmp_path, binary=False)
    assert load("cifar10", tmp_path).source.endswith("cifar-10-batches-py")


@pytest.mark.usefixtures("small")
def test_the_folder_may_be_the_unpacked_set_itself(tmp_path: Path) -> None:
    make_cifar("cifar100", tmp_path, binary=True)
    assert load("cifar100", tmp_path / "cifar-100-binary").num_classes == 100
    (tmp_path / "cifar-100-binary").rename(tmp_path / "renamed")
    assert load("cifar100", tmp_path / "renamed").num_classes == 100


# --- idx -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_idx(monkeypatch: pytest.MonkeyPatch) -> None:
    for file, (count, *rest) in list(idx.SHAPES.items()):
        monkeypatch.setitem(idx.SHAPES, file, (TRAIN if count == 60_000 else TEST, *rest))


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


@pytest.mark.parametrize("zipped", [(True,) * 4, (False,) * 4, (True, False, False, True)])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
@pytest.mark.usefixtures("small_idx")
def test_idx_files_are_read_zipped_or_not(name: str, folder: str, zipped: tuple[bool, ...], tmp_path: Path) -> None:
    arrays = list(make_idx(tmp_path / folder, zipped=zipped).values())
    for start in (tmp_path, tmp_path / folder):
        images = load(name, start, download=False)
        for tensor, array in zip((images.train_x, images.train_y, images.test_x, images.test_y), arrays, strict=True):
            assert np.array_equal(tensor.squeeze(1).numpy() if tensor.ndim == 4 else tensor.numpy(), array)
        assert (images.channels, images.size, images.num_classes) == (1, 28, 10)
    other = "mnist" if name == "fashion-mnist" else "fashion-mnist"
    for start in (tmp_path, tmp_path / folder):
        with pytest.raises(DataError, match=f"{other} was not found"):
            load(other, start, download=False)


def packed_again(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda raw: gzip.compress(change(gzip.decompress(raw)))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda raw: raw[: len(raw) // 2], "cannot be read whole"),
        ("train-images-idx3-ubyte", lambda raw: raw[:-8], "cannot be read whole"),
        ("train-images-idx3-ubyte", lambda raw: raw[:-8] + bytes(8), "cannot be read whole"),
        ("train-labels-idx1-ubyte", lambda raw: b"<html>", "cannot be read whole"),
        ("train-labels-idx1-ubyte", lambda raw: b"", "starts with nothing, expected the idx header 00000801"),
        ("t10k-images-idx3-ubyte", packed_again(lambda raw: b"\1" + raw[1:]), "01000803, expected .*00000803"),
        ("t10k-labels-idx1-ubyte", packed_again(lambda raw: raw[:3] + b"\3" + raw[4:]), "starts with 00000803"),
        ("t10k-images-idx3-ubyte", packed_again(lambda raw: raw[:-1]), "holds 15695 bytes, expected 15696"),
        ("t10k-images-idx3-ubyte", packed_again(lambda raw: raw + b"\0"), "holds more bytes, expected 15696"),
        ("t10k-images-idx3-ubyte", packed_again(lambda raw: raw[:9]), r"says it holds \(20,\) values"),
        (
            "train-images-idx3-ubyte",
            packed_again(lambda raw: idx_bytes(np.zeros((TRAIN, 32, 32), np.uint8))),
            r"says it holds \(50, 32, 32\) values, expected \(50, 28, 28\)",
        ),
        ("train-labels-idx1-ubyte", packed_again(lambda raw: raw[:-1] + b"\x0a"), r"labels up to 10, expected 0..9"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("small_idx")
def test_a_wrong_idx_file_is_named(file: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    make_idx(tmp_path / "mnist")
    edit(tmp_path / "mnist" / f"{file}.gz", change)
    with pytest.raises(DataError, match=f"mnist: {tmp_path}/mnist/{file}.gz .*{message}"):
        load("mnist", tmp_path)


@pytest.mark.usefixtures("small_idx")
def test_a_folder_with_some_of_the_idx_files_names_the_others(tmp_path: Path) -> None:
    make_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"mnist lacks t10k-labels-idx1-ubyte .*put them there"):
        load("mnist", tmp_path, download=False)


# --- downloads -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    """A web server on this machine that does what a bad one does. `log` has (path, first byte, bytes sent)."""

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


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            body = state.files.get(self.path.lstrip("/"))
            status = state.status.pop(0) if state.status else 0
            if body is None or status:
                self.send_error(status or 404)
                state.log.append((self.path, 0, 0))
                return
            start = 0
            if state.ranges and (asked := self.headers.get("Range")):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.end_headers()
                    state.log.append((self.path, start, 0))
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cut = state.cut_after.pop(0) if state.cut_after else len(body)
            piece = body[start : start + cut]
            try:
                for at in range(0, len(piece), 1 << 16):
                    self.wfile.write(piece[at : at + (1 << 16)])
                    self.wfile.flush()
                    time.sleep(state.drip)
            except OSError:  # the client was killed
                pass
            state.log.append((self.path, start, len(piece)))

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
    return Archive("set.tar.gz", hashlib.md5(body).hexdigest(), urls)


def leftovers(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".download/lock"}


def test_a_download_arrives_and_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    for _ in range(2):
        assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert server.log == [("/set", 0, len(BODY))]
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_cut_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    server.cut_after = [3 * BLOCK, 2 * BLOCK, 1 * BLOCK]
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[1] for entry in server.log] == [0, 3 * BLOCK, 5 * BLOCK, 6 * BLOCK]
    assert sum(entry[2] for entry in server.log) == len(BODY), "every byte was served once"
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_download_that_failed_goes_on_at_the_next_try(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    server.cut_after, server.status = [4 * BLOCK], [0, 503]
    archive = archive_at(server.url + "set")
    with pytest.raises(DataError, match=r"set.tar.gz could not be downloaded \(.*set: 503 Server Error"):
        download(archive, tmp_path)
    assert leftovers(tmp_path) == {".download/set.tar.gz.part"}
    assert download(archive, tmp_path).read_bytes() == BODY
    assert server.log[-1] == ("/set", 4 * BLOCK, len(BODY) - 4 * BLOCK)
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_server_that_brings_nothing_more_is_left(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    server.cut_after = [2 * BLOCK, 0, 2 * BLOCK]
    first, second = server.url + "set", server.url + "set?mirror"
    server.files["set?mirror"] = BODY
    assert download(archive_at(first, second), tmp_path).read_bytes() == BODY
    assert [(path, start) for path, start, _ in server.log] == [
        ("/set", 0),
        ("/set", 2 * BLOCK),
        ("/set?mirror", 2 * BLOCK),
        ("/set?mirror", 4 * BLOCK),
    ]


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.ranges = BODY, False
    server.cut_after = [4 * BLOCK]
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[2] for entry in server.log] == [4 * BLOCK, len(BODY)]


def test_a_server_without_ranges_that_always_cuts_is_left(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.ranges = BODY, False
    server.cut_after = [4 * BLOCK] * 100
    with pytest.raises(DataError, match="cut off, and continuing brought nothing more"):
        download(archive_at(server.url + "set"), tmp_path)
    assert len(server.log) == 2


def test_mirrors_are_tried_in_turn(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    dead = "http://127.0.0.1:9/set"  # the discard port: nothing listens
    archive = archive_at(dead, server.url + "absent", server.url + "set", server.url + "never")
    assert download(archive, tmp_path).read_bytes() == BODY
    assert [entry[0] for entry in server.log] == ["/absent", "/set"]


def test_when_every_mirror_fails_each_reason_is_given(server: Server, tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9/set"
    with pytest.raises(DataError) as caught:
        download(archive_at(dead, server.url + "absent"), tmp_path)
    assert str(caught.value) == (
        f"set.tar.gz could not be downloaded ({dead}: no connection; {server.url}absent: 404 Client Error: Not Found)"
    )
    assert leftovers(tmp_path) == set()


def test_a_wrong_checksum_falls_through_and_is_reported_with_both_sums(server: Server, tmp_path: Path) -> None:
    server.files |= {"forged": BODY[:-1] + b"x", "set": BODY}
    archive = archive_at(server.url + "forged", server.url + "set")
    assert download(archive, tmp_path / "a").read_bytes() == BODY
    with pytest.raises(DataError) as caught:
        download(archive_at(server.url + "forged"), tmp_path / "b")
    assert hashlib.md5(BODY).hexdigest() in str(caught.value)
    assert hashlib.md5(server.files["forged"]).hexdigest() in str(caught.value)
    assert leftovers(tmp_path / "b") == set()


def test_a_spoiled_beginning_makes_the_mirror_be_asked_for_all_of_it(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / "set.tar.gz.part").write_bytes(bytes(2 * BLOCK))
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[1] for entry in server.log] == [2 * BLOCK, 0]


@pytest.mark.parametrize("extra", [b"", b"too long"])
def test_a_finished_or_too_long_part_is_settled(extra: bytes, server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / "set.tar.gz.part").write_bytes(BODY + extra)
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[2] for entry in server.log] == ([0, len(BODY)] if extra else [0])
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_killed_download_goes_on_and_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.drip = BODY, 0.05
    archive = archive_at(server.url + "set")
    child = multiprocessing.get_context("fork").Process(target=download, args=(archive, tmp_path))
    child.start()
    part = tmp_path / ".download" / "set.tar.gz.part"
    while not (part.exists() and part.stat().st_size >= 2 * BLOCK):
        assert child.is_alive()
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    had = part.stat().st_size
    assert 2 * BLOCK <= had < len(BODY)
    assert leftovers(tmp_path) > {".download/set.tar.gz.part"}, "the killed process left a temporary file"
    server.drip = 0.0
    assert download(archive, tmp_path).read_bytes() == BODY
    assert ("/set", had, len(BODY) - had) in server.log
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_several_at_once_download_once(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.drip = BODY, 0.005
    archive = archive_at(server.url + "set")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=download, args=(archive, tmp_path)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert server.log == [("/set", 0, len(BODY))]


def test_a_place_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"cannot write to {tmp_path}/file/data: "):
        download(archive_at(server.url + "set"), tmp_path / "file" / "data")


@pytest.mark.usefixtures("small")
def test_load_downloads_what_is_nowhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_cifar("cifar10", tmp_path, binary=False)
    body = pack(tmp_path, cifar.LAYOUTS["cifar10"][1]).rename(tmp_path / "served").read_bytes()
    server.files["cifar.tar.gz"] = body
    monkeypatch.setitem(
        cifar.ARCHIVES,
        "cifar10",
        Archive("cifar-10-python.tar.gz", hashlib.md5(body).hexdigest(), (f"{server.url}cifar.tar.gz",)),
    )
    with pytest.raises(DataError, match=r"cifar10 was not found in data .no such folder., .*put cifar-10-batches-bin/"):
        load("cifar10", download=False)
    images = load("cifar10")
    assert images.source == str(tmp_path / "cache" / "signstep" / "data" / "cifar-10-python.tar.gz")
    assert np.array_equal(images.test_x.view(-1, 3072).numpy(), pixels.x[TRAIN:])
    assert load("cifar10", tmp_path / "mine").source == images.source, "the cache is looked in before a download"
    assert len(server.log) == 1


@pytest.fixture
def served_idx(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_idx: None) -> Server:
    """MNIST and Fashion-MNIST on the test's own server, and no Debian."""
    make_idx(tmp_path / "origin")
    sums = []
    for file in idx.SHAPES:
        body = (tmp_path / "origin" / f"{file}.gz").read_bytes()
        server.files[f"{file}.gz"] = body
        sums.append(hashlib.md5(body).hexdigest())
    for name in idx.MIRRORS:
        monkeypatch.setitem(idx.MIRRORS, name, ("http://127.0.0.1:9/", server.url))
        monkeypatch.setitem(idx.CHECKSUMS, name, tuple(sums))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return server


def test_a_download_of_several_files_goes_on_with_those_that_lack(served_idx: Server, tmp_path: Path) -> None:
    served_idx.status = [0, 0, 500]
    with pytest.raises(DataError, match=r"mnist was not found in .*t10k-images-idx3-ubyte.gz could not be downloaded"):
        load("mnist", tmp_path / "data")
    assert len(load("mnist", tmp_path / "data").train_x) == TRAIN
    assert [path for path, _, sent in served_idx.log if sent] == [f"/{file}.gz" for file in idx.SHAPES]


def test_the_demo_takes_fashion_mnist_or_says_why_not(served_idx: Server, tmp_path: Path) -> None:
    served_idx.status = [500]
    name, reason = demo_dataset()
    assert name == "digits"
    assert "scikit-learn" in reason
    assert "no Debian package dataset-fashion-mnist here" in reason
    assert "500 Server Error" in reason
    name, reason = demo_dataset()
    assert name == "fashion-mnist"
    assert load(name, download=False).source in reason


# --- Debian ----------------------------------------------------------------------------------------------------------

APT = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
*update*) {update};;
*download*) if [ -e {lists} ]; then echo deb > x_1_all.deb; else echo "E: Unable to locate package" >&2; exit 100; fi;;
esac
"""
DPKG = """#!/bin/sh
[ "$1" = -x ] && [ -e "$2" ] && /bin/mkdir -p {inside} && /bin/cp {origin}/* {inside}
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_idx: None) -> Callable[..., Path]:
    """A made-up apt-get and dpkg-deb; returns the file in which apt's calls are noted."""
    make_idx(tmp_path / "origin")
    monkeypatch.setitem(idx.MIRRORS, "fashion-mnist", ("http://127.0.0.1:9/",))

    def install(*, lists: bool, update: bool = True, inside: str = "usr/share/datasets/fashion-mnist") -> Path:
        folder, log, marker = tmp_path / "bin", tmp_path / "apt.log", tmp_path / "lists"
        folder.mkdir()
        if lists:
            marker.touch()
        does = f"/bin/touch {marker}" if update else "echo 'E: Could not resolve' >&2; exit 100"
        for name, text in (
            ("apt-get", APT.format(log=log, lists=marker, update=does)),
            ("dpkg-deb", DPKG.format(inside=inside, origin=tmp_path / "origin")),
        ):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return log

    return install


def calls(log: Path) -> list[str]:
    return ["update" if "update" in line else "download" for line in log.read_text().splitlines()]


def test_fashion_mnist_comes_out_of_debians_package(
    apt: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    log = apt(lists=True)
    images = load("fashion-mnist", tmp_path / "data")
    assert images.source == str(tmp_path / "data" / "fashion-mnist")
    assert calls(log) == ["download"]
    assert leftovers(tmp_path / "data" / "fashion-mnist") == {f"{file}.gz" for file in idx.SHAPES}


def test_root_fetches_missing_package_lists_and_others_do_not(
    apt: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = apt(lists=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        DataError, match=r"dataset-fashion-mnist could not be had .*Unable to locate package.*127.0.0.1"
    ):
        load("fashion-mnist", tmp_path / "data")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert len(load("fashion-mnist", tmp_path / "data").test_x) == TEST
    assert calls(log) == ["download", "download", "update", "download"]


def test_apts_own_words_reach_the_user(
    apt: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    apt(lists=False, update=False)
    with pytest.raises(DataError, match="apt-get ended with 100: E: Could not resolve"):
        debian.unpack_package("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist", tmp_path / "data")


def test_a_package_without_the_files_is_an_error(apt: Callable[..., Path], tmp_path: Path) -> None:
    apt(lists=True, inside="usr/share/elsewhere")
    with pytest.raises(DataError, match="has no usr/share/datasets/fashion-mnist"):
        debian.unpack_package("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist", tmp_path / "data")


@pytest.mark.usefixtures("small_idx")
def test_an_installed_debian_package_is_found(tmp_path: Path) -> None:
    make_idx(tmp_path / "debian" / "fashion-mnist")
    assert demo_dataset() == ("fashion-mnist", f"found in {tmp_path}/debian/fashion-mnist")


# --- which data set, from where --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_idx")
def test_places_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["argument", "first", "second", "here/data", "cache/signstep/data", "debian"]
    for number, name in enumerate(names):
        make_idx(tmp_path / name / "mnist", seed=number)
    monkeypatch.setenv("SIGNSTEP_DATA", os.pathsep.join([str(tmp_path / "first"), "", str(tmp_path / "second")]))
    expected = [str(tmp_path / name / "mnist") for name in names]
    expected[3] = "data/mnist"
    found = []
    for name in names:
        found.append(load("mnist", tmp_path / "argument", download=False).source)
        (tmp_path / name / "mnist").rename(tmp_path / name / "gone")
    assert found == expected


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(
        DataError, match="no data set 'cifar', expected cifar10, cifar100, fashion-mnist, mnist or digi"
    ):
        load("cifar")


def test_not_found_says_where_it_looked_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = Archive("cifar-100-python.tar.gz", "0" * 32, ("http://127.0.0.1:9/a", "http://127.0.0.1:9/b"))
    monkeypatch.setitem(cifar.ARCHIVES, "cifar100", dead)
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("SIGNSTEP_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError) as caught:
        load("cifar100", tmp_path / "there")
    message = str(caught.value)
    for part in (
        f"cifar100 was not found in {tmp_path}/there, {tmp_path}/absent (no such folder), data (no such folder), ",
        "cifar-100-python.tar.gz could not be downloaded (http://127.0.0.1:9/a: no connection; http://127.0.0.1:9/b",
        "cifar-100-binary/",
        "--data or $SIGNSTEP_DATA",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.usefixtures("small_idx")
def test_the_listing_has_every_set_and_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.requests, "get", None)
    monkeypatch.setattr(debian.subprocess, "run", None)
    make_idx(tmp_path / "here" / "data" / "mnist")
    (tmp_path / "cifar-10-batches-bin").mkdir()  # an incomplete set is not found
    lines = {line.name: line for line in listing(tmp_path)}
    assert list(lines) == ["cifar10", "cifar100", "fashion-mnist", "mnist", "digits"]
    assert {name: line.found for name, line in lines.items()} == {
        "cifar10": None,
        "cifar100": None,
        "fashion-mnist": None,
        "mnist": "data/mnist",
        "digits": "scikit-learn",
    }
    assert "cifar-10-batches-bin/" in lines["cifar10"].how
    assert "dataset-fashion-mnist" in lines["fashion-mnist"].how


def test_digits_are_the_real_ones_and_always_the_same() -> None:
    from sklearn.datasets import load_digits

    images = load("digits", download=False)
    bunch = load_digits()
    assert images.train_x.shape == (1437, 1, 8, 8)
    assert images.test_x.shape == (360, 1, 8, 8)
    both = torch.cat([images.train_x, images.test_x]).flatten(1)
    ink = torch.from_numpy(np.rint(bunch.data * 255 / 16)).to(torch.uint8)
    labels = torch.cat([images.train_y, images.test_y])
    assert sorted(map(tuple, torch.cat([both, labels.byte()[:, None]], 1).tolist())) == sorted(
        map(tuple, torch.cat([ink, torch.from_numpy(bunch.target).byte()[:, None]], 1).tolist())
    )
    assert (both.min(), both.max()) == (0, 255)
    assert images.test_y.bincount().min() >= 25
    assert images.test_y[:12].tolist() == DIGITS_TEST_LABELS


# --- Images and split ------------------------------------------------------------------------------------------------


def numbered(train: int = 200, test: int = 30, channels: int = 3) -> Images:
    """Images that carry their number in their first two pixels; the test images' numbers follow."""
    x = torch.zeros(train + test, channels, 4, 4, dtype=torch.uint8)
    numbers = torch.arange(train + test)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = (numbers // 256).byte(), (numbers % 256).byte()
    y = numbers % 7
    return Images("numbered", x[:train], y[:train], x[train:], y[train:], tuple("abcdefg"), "memory")


def numbers_of(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 0].int() * 256 + x[:, 0, 0, 1].int()).tolist()


def test_mean_and_std_are_those_of_the_training_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5000, 3, 8, 8), dtype=np.uint8)
    x[:, 1] //= 7
    tensor, y = torch.from_numpy(x), torch.zeros(5000, dtype=torch.int64)
    images = Images("x", tensor[:4000], y[:4000], tensor[4000:], y[4000:], ("a",), "memory")
    np.testing.assert_allclose(images.mean, x[:4000].mean((0, 2, 3), dtype=np.float64) / 255, rtol=1e-12)
    np.testing.assert_allclose(images.std, x[:4000].std((0, 2, 3), dtype=np.float64) / 255, rtol=1e-12)
    assert images.mean is images.mean


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": torch.zeros(200, 3, 4, 4)}, "has images torch.float32"),
        ({"train_x": torch.zeros(200, 48, dtype=torch.uint8)}, r"expected uint8 \[N, C, H, W\]"),
        ({"train_x": torch.zeros(200, 3, 5, 5, dtype=torch.uint8)}, "expected one shape"),
        ({"test_y": torch.zeros(29, dtype=torch.int64)}, "the test part of memory"),
        ({"test_y": torch.zeros(30)}, "labels torch.float32"),
        ({"test_y": torch.full((30,), 7)}, "has labels 7..7, expected 0..6"),
        ({"test_y": torch.full((30,), -1)}, "has labels -1..-1"),
        (
            {"test_x": torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "test_y": torch.zeros(0, dtype=torch.int64)},
            "with N > 0",
        ),
    ],
)
def test_images_that_are_none_are_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(numbered(), **changes)


@pytest.mark.parametrize("total", [10, 199, 200])
def test_tune_holds_out_a_tenth_of_the_training_set(total: int) -> None:
    images = numbered(total)
    train_x, train_y, eval_x, eval_y = split(images, "tune", None)
    train, held = numbers_of(train_x), numbers_of(eval_x)
    assert len(held) == total // 10
    assert sorted(train + held) == list(range(total)), "disjoint, nothing lost, nothing of the test set"
    assert train_y.tolist() == [n % 7 for n in train]
    assert eval_y.tolist() == [n % 7 for n in held]


def test_final_is_everything_and_the_test_set() -> None:
    images = numbered()
    train_x, train_y, eval_x, eval_y = split(images, "final", None)
    assert train_x is images.train_x
    assert train_y is images.train_y
    assert eval_x is images.test_x
    assert eval_y is images.test_y


@pytest.mark.parametrize("kind", ["tune", "final"])
def test_a_subset_is_a_fixed_random_choice_that_only_grows(kind: Any) -> None:
    images = numbered()
    twenty, sixty = (numbers_of(split(images, kind, n)[0]) for n in (20, 60))
    assert sixty[:20] == twenty
    assert len(set(sixty)) == 60
    assert twenty != sorted(twenty), "a random choice, not the first images"
    assert twenty == numbers_of(split(numbered(), "final", 20)[0]), "the same images in both splits"
    torch.manual_seed(99)
    np.random.seed(99)
    assert twenty == numbers_of(split(images, kind, 20)[0]), "whatever the global seeds"
    whole, limited = split(images, kind, None), split(images, kind, 20)
    assert torch.equal(whole[2], limited[2]), "a subset leaves the evaluation images alone"


def test_the_split_is_the_same_on_every_machine_and_version() -> None:
    order = numbers_of(split(numbered(50_000 // 100), "tune", 10)[0])
    assert order == FIRST_TEN_OF_500


@pytest.mark.parametrize(("kind", "subset"), [("tune", 181), ("final", 201), ("tune", 0), ("final", -1)])
def test_a_subset_that_cannot_be_is_refused(kind: Any, subset: int) -> None:
    with pytest.raises(DataError, match=f"subset={subset}: numbered has 1..(180|200) training images in split {kind}"):
        split(numbered(), kind, subset)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="split='test': expected tune or final"):
        split(numbered(), "test", None)  # type: ignore[arg-type]


# --- augmentation ----------------------------------------------------------------------------------------------------

IDENTITY = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
"""With these, the result is the pixel value itself."""

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**32)
quick = settings(max_examples=25, deadline=None)


def batch_of(seed: int, size: tuple[int, int, int]) -> Tensor:
    b, h, w = size
    # 1..255, so that the black of the padding is told apart
    return torch.randint(1, 256, (b, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(x: Tensor, seed: int, **options: Any) -> Tensor:
    defaults: dict[str, Any] = {"crop": 0, "flip": False, "cutout": 0, **IDENTITY}
    return augment(x, torch.Generator().manual_seed(seed), **(defaults | options))


def pixels_of(out: Tensor) -> Tensor:
    rounded = out.round()
    torch.testing.assert_close(out, rounded, rtol=0, atol=1e-4)
    return rounded.to(torch.uint8)


@quick
@given(seeds, sizes, st.integers(0, 5), st.booleans())
def test_a_crop_is_a_shifted_window_and_a_flip_its_mirror(
    seed: int, size: tuple[int, int, int], crop: int, flip: bool
) -> None:
    x = batch_of(seed, size)
    before = x.clone()
    out = pixels_of(run(x, seed, crop=crop, flip=flip))
    assert torch.equal(x, before)
    padded = torch.nn.functional.pad(x, (crop,) * 4)
    _, height, width = size
    for image, got in zip(padded, out, strict=True):
        windows = [
            window
            for top in range(2 * crop + 1)
            for left in range(2 * crop + 1)
            for window in [image[:, top : top + height, left : left + width]]
        ]
        candidates = windows + [window.flip(2) for window in windows] if flip else windows
        assert any(torch.equal(got, candidate) for candidate in candidates)


@quick
@given(seeds, sizes)
def test_a_flip_alone_is_the_image_or_its_exact_mirror(seed: int, size: tuple[int, int, int]) -> None:
    x = batch_of(seed, size)
    out = pixels_of(run(x, seed, flip=True))
    for image, got in zip(x, out, strict=True):
        assert torch.equal(got, image) or torch.equal(got, image.flip(2))


@quick
@given(seeds, sizes, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans())
def test_no_augmentation_is_normalisation(
    seed: int, size: tuple[int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    x = batch_of(seed, size)
    mean, std = (0.49, 0.3, 0.0), (0.25, 0.01, 1.0)
    generator = torch.Generator().manual_seed(seed)
    state = generator.get_state()
    options: dict[str, Any] = {"mean": mean, "std": std, "dtype": dtype, "channels_last": channels_last}
    out = augment(x, generator, crop=0, flip=False, cutout=0, **options)
    assert torch.equal(generator.get_state(), state), "nothing was drawn"
    assert torch.equal(out, normalise(x, mean, std, dtype=dtype, channels_last=channels_last))
    assert out.dtype == dtype
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=memory_format)
    exact = (x.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * 10)


@quick
@given(seeds, sizes, st.integers(1, 12))
def test_cutout_sets_one_clipped_square_to_the_mean(seed: int, size: tuple[int, int, int], cutout: int) -> None:
    x = batch_of(seed, size)
    _, height, width = size
    mean, std = (0.0,) * 3, (0.5,) * 3  # no pixel is at the mean
    out = run(x, seed, cutout=cutout, mean=mean, std=std)
    plain = normalise(x, mean, std)
    for image, got in zip(plain, out, strict=True):
        zero = got == 0
        assert torch.equal(got[~zero], image[~zero]), "the rest is untouched"
        assert torch.equal(zero[0], zero[1])
        assert torch.equal(zero[0], zero[2])
        rows, columns = zero[0].any(1), zero[0].any(0)
        assert torch.equal(zero[0], rows[:, None] & columns[None, :])
        for line, length in ((rows, height), (columns, width)):
            where = line.nonzero().flatten()
            side = len(where)
            assert side == where[-1] - where[0] + 1, "no gaps"
            assert min((cutout + 1) // 2, length) <= side <= min(cutout, length)
            if side < min(cutout, length):
                assert where[0] == 0 or where[-1] == length - 1, "smaller only where the border clips it"


@quick
@given(seeds, sizes)
def test_the_generator_decides_everything_and_nothing_else_does(seed: int, size: tuple[int, int, int]) -> None:
    x = batch_of(seed, size)
    options: dict[str, Any] = {"crop": 2, "flip": True, "cutout": 3}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(x, seed, **options)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was not touched"
    torch.manual_seed(2)
    assert torch.equal(first, run(x, seed, **options))
    last = run(x, seed, channels_last=True, **options)
    assert torch.equal(first, last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(x, seed, dtype=torch.bfloat16, **options), first.bfloat16())


def test_another_draw_is_another_batch() -> None:
    x = batch_of(0, (8, 9, 9))
    generator = torch.Generator().manual_seed(0)
    first, second = (augment(x, generator, crop=4, flip=True, cutout=0, **IDENTITY) for _ in range(2))
    assert not torch.equal(first, second)


def test_offsets_mirrors_and_centres_are_uniform_and_independent() -> None:
    count, size, crop, cutout = 40_000, 8, 1, 1
    x = torch.empty(count, 3, size, size, dtype=torch.uint8)
    x[:, 0], x[:, 1], x[:, 2] = torch.arange(1, 9)[:, None], torch.arange(1, 9), 200
    out = pixels_of(run(x, 5, crop=crop, flip=True))
    top, middle = out[:, 0, 4, 4].int() - 4, out[:, 1, 4, 3].int() - out[:, 1, 4, 4].int()
    mirrored = middle > 0
    left = torch.where(mirrored, out[:, 1, 4, 4].int() - 3, out[:, 1, 4, 4].int() - 4)
    joint = (top * 3 + left) * 2 + mirrored.int()
    marks = run(x, 6, cutout=cutout, mean=(0.0,) * 3)[:, 2].flatten(1)
    for counts, cells in (
        (joint.bincount(minlength=18), 18),
        ((marks == 0).int().argmax(1).bincount(minlength=64), 64),
    ):
        assert len(counts) == cells
        chi_square = ((counts - count / cells) ** 2 / (count / cells)).sum().item()
        assert chi_square < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


def test_nothing_is_read_back_from_the_device() -> None:
    """A fake tensor has no values: anything that looked at one would raise."""
    augmentation._constants.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 3, 8, 8, dtype=torch.uint8)
        out = augment(x, torch.Generator(), crop=2, flip=True, cutout=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    augmentation._constants.cache_clear()
    assert out.shape == (4, 3, 8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_not_waited_for() -> None:
    x = batch_of(0, (16, 32, 32)).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"crop": 4, "flip": True, "cutout": 8, "channels_last": True, **IDENTITY}
    augment(x, generator, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(x, generator, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 3, 4, 4), {}, r"torch.float32 \(2, 3, 4, 4\): expected uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {}, "expected uint8"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), {}, "expected 1 channels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {"std": (0.0, 1.0, 1.0)}, "each with std > 0"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {"crop": -1}, "crop=-1, cutout=0: expected pixels >= 0"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {"cutout": -1}, "cutout=-1: expected pixels >= 0"),
    ],
)
def test_a_batch_that_cannot_be_augmented_is_refused(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(x, 0, **options)


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places() -> str | None:
    return os.environ.get("SIGNSTEP_DATA")


@pytest.mark.parametrize(
    ("name", "per_class", "mean"),
    [
        ("cifar10", 5000, (0.4914, 0.4822, 0.4465)),
        ("cifar100", 500, (0.5071, 0.4865, 0.4409)),
        ("fashion-mnist", 6000, (0.2860,)),
        ("mnist", 6000, (0.1307,)),
    ],
)
def test_real_images(
    name: str, per_class: int, mean: tuple[float, ...], places: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # look where a user's own run looks
    if {line.name: line.found for line in listing()}[name] is None:
        pytest.skip(f"{name} is not on this machine (SIGNSTEP_DATA={places})")
    images = load(name, download=False)
    assert images.mean == pytest.approx(mean, abs=6e-5)
    counts = images.train_y.bincount()
    assert len(counts) == images.num_classes
    if name != "mnist":
        assert (counts == per_class).all()
        assert (images.test_y.bincount() == len(images.test_y) // images.num_classes).all()
    names = Path(images.source) / {"cifar10": "batches.meta.txt"}.get(name, "fine_label_names.txt")
    if names.is_file():
        assert images.classes == tuple(names.read_text().split())
    train_x, _, eval_x, _ = split(images, "tune", None)
    assert (len(train_x), len(eval_x)) == (len(images.train_x) * 9 // 10, len(images.train_x) // 10)

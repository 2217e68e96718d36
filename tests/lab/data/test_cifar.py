"""CIFAR's files in both layouts: whole, cut, damaged, packed or not."""

import gzip
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_sets import RECORD10, TEST, TRAIN, edit, make_cifar, pack

from signstep.lab.data import DataError, cifar, load


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


def write_bomb(path: Path, header: tarfile.TarInfo | None, zeros: bytes = gzip.compress(bytes(1 << 22)) * 512) -> None:
    """An archive of 2 MB that unpacks to 2 GB of zeros: the body of a member, or what comes after the last one."""
    head = bytes(10_240) if header is None else header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(gzip.compress(head) + zeros)


def member(name: str, size: int = 2 << 30, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


LITTLE_MEMORY = """
import resource, sys, time
from pathlib import Path
from signstep.lab.data import DataError, cifar

used = next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").read_text().splitlines() if "VmSize" in l)
resource.setrlimit(resource.RLIMIT_AS, (used + (450 << 20),) * 2)
for folder in sys.argv[1:]:
    started = time.process_time()
    try:
        cifar.read("cifar10", cifar.find("cifar10", Path(folder)))
    except DataError as error:
        print(f"{time.process_time() - started:.1f} {error}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
def test_a_file_that_unpacks_to_gigabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    inside = "cifar-10-batches-py/data_batch_1"
    headers = {
        "a part": member(inside),
        "a part whose size fits": member(inside, 40_000_000),
        "another file": member("readme.html"),
        "a name": member("x", kind=tarfile.GNUTYPE_LONGNAME),
        "a header": member("x", kind=tarfile.XHDTYPE),
        "a sparse part": member(inside, kind=tarfile.GNUTYPE_SPARSE),
        "less than nothing": member(inside, -1),
        "what comes after": None,
    }
    folders = []
    for name, header in headers.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        write_bomb(folders[-1] / "cifar-10-python.tar.gz", header)
    folders.append(tmp_path / "cifar-10-batches-bin")
    folders[-1].mkdir()
    for file in (*cifar.LAYOUTS["cifar10"][0].train, "test_batch.bin"):
        with (folders[-1] / file).open("wb") as sparse:
            sparse.truncate(1 << 36)
    command = [sys.executable, "-c", LITTLE_MEMORY, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders)
    for folder, line in zip(folders, lines, strict=True):
        seconds, _, said = line.partition(" ")
        assert float(seconds) < 3, line
        assert said.startswith("cifar10: "), line
        assert str(folder) in said, line
    assert "has 2147483648 bytes, expected at most" in lines[0]
    assert all("unpacks to more than the set has" in lines[i] for i in (2, 3, 4, 7)), lines
    assert "has 68719476736 bytes, expected 30730000" in lines[-1]

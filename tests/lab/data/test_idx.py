"""The idx files of MNIST and Fashion-MNIST: zipped or not, whole or damaged."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_sets import TRAIN, edit, idx_bytes, make_idx

from signstep.lab.data import DataError, load


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

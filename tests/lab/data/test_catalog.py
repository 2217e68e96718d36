"""Which data set is taken from where, what is downloaded when, and the real sets where they are."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from made_sets import TRAIN, Server, make_cifar, make_idx, pack

from signstep.lab.data import DataError, cifar, debian, demo_dataset, fetch, idx, listing, load, split
from signstep.lab.data.fetch import Archive

DIGITS_TEST_LABELS = [5, 7, 1, 1, 6, 3, 8, 0, 8, 0, 9, 4]


@pytest.mark.usefixtures("small")
def test_load_downloads_what_is_nowhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_cifar("cifar10", tmp_path, binary=False)
    body = pack(tmp_path, cifar.LAYOUTS["cifar10"][1]).rename(tmp_path / "served").read_bytes()
    server.files["cifar.tar.gz"] = body
    monkeypatch.setitem(
        cifar.ARCHIVES,
        "cifar10",
        Archive("cifar-10-python.tar.gz", hashlib.sha256(body).hexdigest(), (f"{server.url}cifar.tar.gz",)),
    )
    with pytest.raises(DataError, match=r"cifar10 was not found in data .no such folder., .*put cifar-10-batches-bin/"):
        load("cifar10", download=False)
    images = load("cifar10")
    assert images.source == str(tmp_path / "cache" / "signstep" / "data" / "cifar-10-python.tar.gz")
    assert np.array_equal(images.test_x.view(-1, 3072).numpy(), pixels.x[TRAIN:])
    assert load("cifar10", tmp_path / "mine").source == images.source, "the cache is looked in before a download"
    assert len(server.log) == 1


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
    assert list(lines) == [*("cifar10", "cifar100", "fashion-mnist", "mnist", "bible", "shakespeare", "text", "digits")]
    assert {name: line.found for name, line in lines.items()} == {
        "cifar10": None,
        "cifar100": None,
        "fashion-mnist": None,
        "mnist": "data/mnist",
        "bible": None,
        "shakespeare": None,
        "text": None,
        "digits": "scikit-learn",
    }
    assert "bible-kjv-text" in lines["bible"].how
    assert lines["text"].how == "any file: name it with --data FILE"
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

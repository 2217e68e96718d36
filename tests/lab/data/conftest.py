"""What keeps the tests of data alone on their machine, and the sets and servers that they share."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_sets import TEST, TRAIN, Server, make_idx, serve

from signstep.lab.data import catalog, cifar, fetch, idx


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data of this machine is in reach: only what a test puts under tmp_path."""
    monkeypatch.setattr(catalog.platformdirs, "user_cache_path", lambda package: tmp_path / "cache" / package)
    monkeypatch.delenv("SIGNSTEP_DATA", raising=False)
    monkeypatch.setattr(catalog, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fetch, "_PAUSE", 0.0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR sets of 50 and 20 images, so that whole ones can be written."""
    for name, layouts in cifar.LAYOUTS.items():
        smaller = tuple(dataclasses.replace(lay, train_records=TRAIN, test_records=TEST) for lay in layouts)
        monkeypatch.setitem(cifar.LAYOUTS, name, smaller)


@pytest.fixture
def small_idx(monkeypatch: pytest.MonkeyPatch) -> None:
    for file, (count, *rest) in list(idx.SHAPES.items()):
        monkeypatch.setitem(idx.SHAPES, file, (TRAIN if count == 60_000 else TEST, *rest))


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as state:
        yield state


@pytest.fixture
def served_idx(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_idx: None) -> Server:
    """MNIST and Fashion-MNIST on the test's own server, and no Debian."""
    make_idx(tmp_path / "origin")
    sums = []
    for file in idx.SHAPES:
        body = (tmp_path / "origin" / f"{file}.gz").read_bytes()
        server.files[f"{file}.gz"] = body
        sums.append(hashlib.sha256(body).hexdigest())
    for name in idx.MIRRORS:
        monkeypatch.setitem(idx.MIRRORS, name, ("http://127.0.0.1:9/", server.url))
        monkeypatch.setitem(idx.CHECKSUMS, name, tuple(sums))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return server

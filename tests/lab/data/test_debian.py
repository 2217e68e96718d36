"""Fashion-MNIST from Debian's package, with a made-up apt-get."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from made_sets import TEST, leftovers, make_idx

from signstep.lab.data import DataError, debian, demo_dataset, idx, load

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

"""What is written is whole or as it was, and what cannot be written is one sentence, found before any work."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from little_room import little_room
from signstep.lab.errors import BadInput, CannotWrite
from signstep.lab.output import files
from signstep.lab.training import checkpoint


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullRaw(io.FileIO):
    """A file on a disk that is full: torch.save hides the reason behind one of its own."""

    def write(self, data: Any, /) -> int:
        fails()
        return 0


class FullAtTheEnd(files._Written):
    """A file on a disk that says only at the end that it is full, as some networks' do."""

    def close(self) -> None:
        super().close()
        fails()


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: files.write_text(path, "new"),
    "json": lambda path: files.write_json(path, ["new"]),
    "several": lambda path: files.write_all(path.parent, {path.name: b"new"}),
    "small checkpoint": lambda path: checkpoint.save(path, {"weights": torch.ones(100)}),
    "checkpoint": lambda path: checkpoint.save(path, {"weights": torch.ones(100_000)}),
}


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("io.FileIO", fails),
        ("io.FileIO", FullRaw),
        ("os.fsync", fails),
        ("_Written", FullAtTheEnd),
        ("os.replace", fails),
    ],
    ids=["open", "write", "fsync", "close", "rename"],
)
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_leaves_what_was(
    where: str, what: Any, old: bool, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    if old:
        path.write_text("old")
    before = everything(tmp_path)
    monkeypatch.setattr(f"signstep.lab.output.files.{where}", what)
    with pytest.raises(CannotWrite) as caught:
        WRITERS[writer](path)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{path} cannot be written: No space left on device; free some space there and give the same command again"
    )
    assert isinstance(caught.value, OSError)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("numbers", [3000, 300_000])
def test_a_checkpoint_that_really_finds_no_room(numbers: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"weights": torch.ones(3)})
    before = everything(tmp_path)
    with little_room(10_000), pytest.raises(CannotWrite, match=f"{path} cannot be written: File too large; free some"):
        checkpoint.save(path, {"weights": torch.ones(numbers)})
    assert everything(tmp_path) == before


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "a.json", float("nan"), allow_nan=False)
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a"):
        raise KeyboardInterrupt
    assert everything(tmp_path) == {}


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").mkdir()
    with pytest.raises(CannotWrite, match=r"a.md cannot be written: Is a directory; name a folder with --out"):
        files.write_text(tmp_path / "a.md", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]


def test_a_place_for_results_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.output_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        assert everything(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
    with files.output_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/kept"]
    (tmp_path / "mine").mkdir()
    with files.output_folder(tmp_path / "mine"), files.output_folder(None):
        pass
    assert (tmp_path / "mine").is_dir(), "a folder that was there is not removed"
    with pytest.raises(CannotWrite, match=rf"{tmp_path}/a/kept/x cannot be written: {tmp_path}/a/kept is not a folder"):
        with files.output_folder(tmp_path / "a" / "kept" / "x"):
            raise AssertionError
    with pytest.raises(CannotWrite, match="/proc/nothing cannot be written: No such file or directory; name a folder"):
        with files.output_folder(Path("/proc/nothing")):
            raise AssertionError
    monkeypatch.setattr(files.tempfile, "TemporaryFile", fails)
    with pytest.raises(CannotWrite, match="new cannot be written: No space left on device; free some space"):
        with files.output_folder(tmp_path / "new"):
            raise AssertionError
    assert not (tmp_path / "new").exists()


def test_a_lock_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"x.lock cannot be written: .*/file is not a folder; name"):
        with files.locked(tmp_path / "file" / "x.lock"):
            raise AssertionError


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udc80"])
def test_what_is_not_json_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(BadInput, match=f"{path}: not JSON"):
        files.read_json(path)

"""Folders of images: pixels come back as they were written, the split is fixed, and a damaged file is named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from signstep.lab.data import DataError, folders, load
from signstep.lab.paper.experiments import dataset_title
from signstep.lab.training.tasks import FOLDER


def write(path: Path, seed: int, size: tuple[int, int] = (6, 5), suffix: str = ".png") -> torch.Tensor:
    """An image of noise, height and width as of `size`; its pixels [3, H, W]."""
    pixels = np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path.with_suffix(suffix))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes, of 10 and of 7 images."""
    for label, (name, count) in enumerate({"cat": 10, "dog": 7}.items()):
        for i in range(count):
            write(tmp_path / "pets" / name / f"{i}.png", 100 * label + i)
    return tmp_path / "pets"


def test_pixels_labels_and_split(pets: Path) -> None:
    images = folders.read(pets)
    assert images.classes == ("cat", "dog")
    assert images.train_y.bincount().tolist() == [8, 6]
    assert images.test_y.bincount().tolist() == [2, 1]
    written = {
        tuple(write(pets / "cat" / "again.png", 100 * label + i).flatten().tolist()): label
        for label, count in enumerate((10, 7))
        for i in range(count)
    }
    both = zip(torch.cat([images.train_x, images.test_x]), torch.cat([images.train_y, images.test_y]), strict=True)
    assert {tuple(x.flatten().tolist()): y.item() for x, y in both} == written


def test_the_parts_may_be_the_folder_s_own(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2), ("test", 5)):
        for name in ("a", "b"):
            for i in range(count):
                write(tmp_path / part / name / "deeper" / f"{i}.png", i)
    images = folders.read(tmp_path)
    assert (len(images.train_x), len(images.test_x)) == (6, 4)
    shutil.rmtree(tmp_path / "val")
    assert len(folders.read(tmp_path).test_x) == 10


def test_the_name_follows_from_the_files_alone(pets: Path, tmp_path: Path) -> None:
    name = folders.read(pets).name
    assert name.startswith(f"{FOLDER}pets@")
    assert FOLDER == folders.PREFIX
    assert dataset_title(name) == "pets"
    moved = tmp_path / "elsewhere" / "pets"
    shutil.copytree(pets, moved)
    for file in moved.rglob("*.png"):
        os.utime(file, (1, 1))
    (moved / "cat" / "notes.txt").write_text("not an image")
    assert folders.read(moved).name == name
    (moved / "cat" / "0.png").rename(moved / "cat" / "00.png")
    renamed = folders.read(moved).name
    (moved / "cat" / "00.png").rename(moved / "dog" / "00.png")
    assert len({name, renamed, folders.read(moved).name}) == 3


def test_decoded_once(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folders.read(pets)
    calls = []
    decode = folders._decoded
    monkeypatch.setattr(folders, "_decoded", lambda *a: calls.append(a) or decode(*a))
    again = folders.read(pets)
    assert not calls
    assert torch.equal(again.train_x, before.train_x)
    write(pets / "cat" / "0.png", 999)
    assert folders.read(pets).name != before.name
    assert len(calls) == 1
    (cached,) = (folders.platformdirs.user_cache_path("signstep") / "folders").glob("*.pt")
    for damage in (b"", b"rubbish", cached.read_bytes()[:-100]):
        cached.write_bytes(damage)
        folders.read(pets)
    assert len(calls) == 4


def test_images_of_several_sizes_are_cut_and_resized(pets: Path) -> None:
    write(pets / "dog" / "9.png", 9, (8, 8))
    with pytest.raises(DataError, match=r"cat/0.png is 5 x 6 pixels and .*dog/9.png is 8 x 8: .*--image-size 64"):
        folders.read(pets)
    images = folders.read(pets, 4)
    assert images.train_x.shape[1:] == (3, 4, 4)
    assert folders.read(pets, 3).name == images.name  # the size is a field of the run


def test_grey_and_turned_images_are_read_as_they_look(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    grey = np.arange(30, dtype=np.uint8).reshape(6, 5)
    for name in ("a", "b"):
        (pets / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(grey).save(pets / name / f"{i}.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.fromarray(grey[::-1, ::-1].copy()).save(pets / "a" / "0.png", exif=turned)
    images = folders.read(pets)
    expected = torch.from_numpy(grey).expand(3, 6, 5)
    assert all(torch.equal(x, expected) for x in torch.cat([images.train_x, images.test_x]))


def _nothing(pets: Path) -> None:
    shutil.rmtree(pets)


def _flat(pets: Path) -> None:
    _nothing(pets)
    write(pets / "0.png", 0)


def _empty_class(pets: Path) -> None:
    (pets / "ant").mkdir()


def _damaged(pets: Path) -> None:
    file = pets / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:60])


def _no_image(pets: Path) -> None:
    (pets / "cat" / "0.png").write_text("hello")


def _one_image(pets: Path) -> None:
    write(pets / "ant" / "0.png", 0)


def _no_test_part(pets: Path) -> None:
    write(pets / "train" / "cat" / "0.png", 0)


def _unknown_class(pets: Path) -> None:
    for name in ("cat", "dog"):
        write(pets / "train" / name / "0.png", 0)
    for name in ("ant", "cat"):
        write(pets / "val" / name / "0.png", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nothing, "there is no such folder"),
        (_flat, "has 0 folders with images"),
        (_empty_class, "ant: this class has no images"),
        (_damaged, "0.png cannot be read as an image"),
        (_no_image, "0.png cannot be read as an image .Pillow knows no such format."),
        (_one_image, "ant has one image"),
        (_no_test_part, "has train, but neither val nor test"),
        (_unknown_class, "there is no class ant in"),
    ],
)
def test_what_is_wrong_with_a_folder(change: Callable[[Path], None], message: str, pets: Path) -> None:
    change(pets)
    with pytest.raises(DataError, match=message) as caught:
        folders.read(pets)
    assert "\n" not in str(caught.value)


def test_a_run_on_other_files_is_refused(pets: Path) -> None:
    name = folders.read(pets).name
    assert load(name, pets).name == name
    with pytest.raises(DataError, match="say where the folder is, with --data folder:PATH"):
        load(name)
    write(pets / "cat" / "0.png", 999)
    with pytest.raises(DataError, match="the files differ"):
        load(name, pets)

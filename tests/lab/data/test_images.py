"""A labelled set in memory, and how it is split."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from signstep.lab.data import DataError, Images, split

# Fixed for good: another order would change what every published number was trained on.
FIRST_TEN_OF_500 = [367, 129, 424, 277, 111, 15, 282, 107, 240, 110]


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

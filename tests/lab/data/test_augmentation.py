"""Crops, mirrors, cutouts and normalisation, against what they say of single pixels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from signstep.lab.data import augment, augmentation, normalise

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

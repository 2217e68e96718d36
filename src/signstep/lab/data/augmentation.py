"""Random crop, flip and cutout of a whole batch at a time, and normalisation."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    crop: int,
    flip: bool,
    cutout: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Augment and normalise a batch on the device it is on, without waiting for that device.

    Args:
        x: uint8 [B, C, H, W].
        generator: the only source of randomness, on x's device; a given state gives a given batch.
        crop: pad every side by this many black pixels and cut a random H x W window per image; 0: off.
        flip: mirror each image left to right with probability 1/2.
        cutout: set a square of this side, centred on a random pixel and clipped at the border, to the mean
            (DeVries and Taylor, 2017); 0: off.
        mean: per channel, in 0..1.
        std: per channel, in units of 0..1.
        dtype: of the result.
        channels_last: give the result torch.channels_last memory format.

    Returns:
        `dtype` [B, C, H, W].

    Raises:
        ValueError: x is not uint8 [B, C, H, W], crop or cutout is negative, or mean and std do not fit the channels.

    >>> x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    >>> generator = torch.Generator().manual_seed(0)
    >>> batch = augment(x, generator, crop=4, flip=True, cutout=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    >>> batch.shape, batch.dtype
    (torch.Size([8, 3, 32, 32]), torch.float32)
    """
    _check(x, mean, std)
    if crop < 0 or cutout < 0:
        raise ValueError(f"crop={crop}, cutout={cutout}: expected pixels >= 0")
    batch, _, height, width = x.shape
    device = x.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (batch,), generator=generator, device=device)

    if crop or flip:
        image = torch.arange(batch, device=device)
        x = torch.nn.functional.pad(x, (crop, crop, crop, crop))
        if flip:
            x = torch.cat([x, x.flip(3)])
            image = image + batch * draw(2)
        # Every window as a view [., C, 2 crop + 1, 2 crop + 1, H, W], of which one per image is copied.
        windows = x.unfold(2, height, 1).unfold(3, width, 1)
        top, left = (draw(2 * crop + 1), draw(2 * crop + 1)) if crop else (0, 0)
        x = windows[image, :, top, left]
    out = _standardise(x, mean, std)
    if cutout:
        rows = torch.arange(height, device=device) - (draw(height) - cutout // 2)[:, None]
        columns = torch.arange(width, device=device) - (draw(width) - cutout // 2)[:, None]
        outside_rows, outside_columns = (rows < 0) | (rows >= cutout), (columns < 0) | (columns >= cutout)
        # The mean is 0 by now.
        out.mul_((outside_rows[:, :, None] | outside_columns[:, None, :])[:, None])
    return out.to(dtype, memory_format=_memory_format(channels_last))


def normalise(
    x: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Return (x / 255 - mean) / std per channel, computed in float32, as `dtype` [B, C, H, W].

    Takes uint8 [B, C, H, W] on any device; raises ValueError for anything else.
    """
    _check(x, mean, std)
    return _standardise(x, mean, std).to(dtype, memory_format=_memory_format(channels_last))


def _standardise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shift, scale = _constants(tuple(mean), tuple(std), x.device)
    return x.to(torch.float32, memory_format=torch.contiguous_format).sub_(shift).mul_(scale)


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@lru_cache(maxsize=64)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """255 mean and 1 / (255 std) as float32 [C, 1, 1]; kept, because copying them to a GPU waits for it."""
    shift = torch.tensor(mean, dtype=torch.float64).mul(255)
    scale = torch.tensor(std, dtype=torch.float64).mul(255).reciprocal()
    return shift.float().view(-1, 1, 1).to(device), scale.float().view(-1, 1, 1).to(device)


def _check(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"images are {x.dtype} {tuple(x.shape)}: expected uint8 [B, C, H, W]")
    if not len(mean) == len(std) == x.shape[1] or min(std) <= 0:
        raise ValueError(f"mean={mean}, std={std}: expected {x.shape[1]} channels, each with std > 0")

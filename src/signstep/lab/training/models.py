"""The residual networks of the experiments: ResNet-18 and the CIFAR family of depth 6n+2.

He et al., 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from signstep.lab.training.tasks import ImageModel

Stem = Literal["cifar", "imagenet"]


def _norm_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class PadShortcut(nn.Module):
    """Option A of He et al., section 4.1: every `stride`-th pixel, new channels filled with zeros, no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Option B of He et al.: a strided 1x1 convolution and batch norm."""
    return _norm_conv(inputs, outputs, 1, stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm, added to the block's input (He et al., figure 2)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, shortcut: Callable[[int, int, int], nn.Module] = projection
    ) -> None:
        super().__init__()
        self.first = _norm_conv(inputs, outputs, 3, stride)
        self.second = _norm_conv(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of `BasicBlock`s (each stage but the first halves the image), global average, linear layer.

    Args:
        channels: output channels of each stage.
        blocks: blocks in each stage.
        shortcut: what joins input and output of a block where their shapes differ: `projection` or `PadShortcut`.
        num_classes: size of the output.
        in_channels: channels of the input images.
        stem: "cifar": a 3x3 convolution; "imagenet": a strided 7x7 convolution and a strided 3x3 max-pool.

    Convolutions start from He et al.'s normal law (2015, arXiv:1502.01852) with variance 2 / fan_out; the linear layer
    and batch norm keep torch's initialisation.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        blocks: int,
        shortcut: Callable[[int, int, int], nn.Module],
        *,
        num_classes: int,
        in_channels: int,
        stem: Stem,
    ) -> None:
        super().__init__()
        if stem == "cifar":
            self.stem = nn.Sequential(_norm_conv(in_channels, channels[0], 3), nn.ReLU())
        else:
            self.stem = nn.Sequential(
                _norm_conv(in_channels, channels[0], 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
            )
        stages: list[nn.Module] = []
        inputs = channels[0]
        for stage, outputs in enumerate(channels):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(inputs, outputs, stride, shortcut))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, num_classes)
        _start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W], float, H and W from 8, to logits [B, num_classes]."""
        logits: Tensor = self.linear(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class ConvNet(nn.Module):
    """A plain network that learns small images in minutes on one core: three stages of two 3x3 convolutions.

    The first convolution of each stage is followed by a 2x2 max-pool, so that all but one layer work on a smaller
    image; the last stage's maximum over the image goes to a linear layer.

    Args:
        channels: output channels of the stem and of each stage.
        num_classes: size of the output.
        in_channels: channels of the input images.

    Convolutions start as those of `ResNet`.
    """

    def __init__(self, channels: tuple[int, ...], *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_norm_conv(in_channels, channels[0], 3), nn.ReLU()]
        for inputs, outputs in itertools.pairwise(channels):
            shrink = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [shrink, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [_norm_conv(outputs, outputs, 3), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels[-1], num_classes)
        _start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W], float, H and W from 8, to logits [B, num_classes]."""
        logits: Tensor = self.linear(self.layers(x).amax((2, 3)))
        return logits


def _start_convolutions(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build(
    model: ImageModel, *, num_classes: int, in_channels: int = 3, width: float = 1.0, stem: Stem = "cifar"
) -> ResNet | ConvNet:
    """A freshly initialised network; the initial weights come from torch's global CPU generator.

    Args:
        model: "resnet18" (four stages of two blocks, 64 to 512 channels, projection shortcuts), or "resnet8" and
            "resnet20" (three stages of n = 1 and 3 blocks, 16 to 64 channels, parameter-free shortcuts); "convnet"
            (`ConvNet`, a stem of 24 channels and stages of 32 to 128).
        num_classes: size of the output.
        in_channels: channels of the input images.
        width: every stage's number of channels is multiplied by this and rounded, to at least 1.
        stem: "cifar" for small images; "imagenet" shrinks the image four times before the first block.

    Raises:
        ValueError: unknown model or stem, width not positive, or fewer than one class or channel.

    Example:
        >>> sum(p.numel() for p in build("resnet20", num_classes=10).parameters())
        269722
    """
    families: dict[str, tuple[tuple[int, ...], Callable[..., ResNet | ConvNet]]] = {
        "resnet8": ((16, 32, 64), functools.partial(ResNet, blocks=1, shortcut=PadShortcut, stem=stem)),
        "resnet20": ((16, 32, 64), functools.partial(ResNet, blocks=3, shortcut=PadShortcut, stem=stem)),
        "resnet18": ((64, 128, 256, 512), functools.partial(ResNet, blocks=2, shortcut=projection, stem=stem)),
        "convnet": ((24, 32, 64, 128), ConvNet),
    }
    if model not in families:
        raise ValueError(f"model={model!r}: expected one of {', '.join(families)}")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem={stem!r}: expected cifar or imagenet")
    if not width > 0:
        raise ValueError(f"width={width!r}: expected a value > 0")
    if num_classes < 1 or in_channels < 1:
        raise ValueError(f"num_classes={num_classes!r}, in_channels={in_channels!r}: expected at least 1 of each")
    base, network = families[model]
    channels = tuple(max(1, round(c * width)) for c in base)
    return network(channels, num_classes=num_classes, in_channels=in_channels)


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers in `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)

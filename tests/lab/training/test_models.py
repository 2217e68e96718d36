"""The networks: published sizes, shapes, initialisation, refused arguments."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from signstep.lab.training.models import PadShortcut, build, count_parameters


@pytest.mark.parametrize(
    ("model", "classes", "stem", "parameters"),
    [
        ("resnet18", 1000, "imagenet", 11_689_512),  # torchvision's table
        ("resnet18", 10, "cifar", 11_173_962),  # the CIFAR stem: 64 * 3 * (49 - 9) fewer, and 10 classes
        ("resnet18", 100, "cifar", 11_220_132),
        ("resnet20", 10, "cifar", 269_722),  # He et al., table 6: 0.27M
        ("resnet8", 10, "cifar", 75_290),
        # 9 (3 24 + 24 32 + 32 32 + 32 64 + 64 64 + 64 128 + 128 128) + 2 (24 + 2 (32 + 64 + 128)) + 10 (128 + 1).
        ("convnet", 10, "cifar", 9 * 32_584 + 2 * 472 + 1_290),
    ],
)
def test_published_parameter_counts(model: Any, classes: int, stem: Any, parameters: int) -> None:
    assert count_parameters(build(model, num_classes=classes, stem=stem)) == parameters


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("model", ["resnet8", "resnet20", "resnet18", "convnet"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 33)])
def test_any_channels_and_size(model: Any, stem: Any, channels: int, size: int) -> None:
    network = build(model, num_classes=7, in_channels=channels, width=0.25, stem=stem)
    logits = network(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(("model", "stem"), [("resnet18", "imagenet"), ("resnet8", "cifar")])
def test_large_images(model: Any, stem: Any) -> None:
    network = build(model, num_classes=3, width=0.25, stem=stem).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 224, 224)).shape == (1, 3)


def test_stages_halve_the_image() -> None:
    network = build("resnet18", num_classes=10)
    sizes = []
    x = network.stem(torch.randn(2, 3, 32, 32))
    for block in network.blocks:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(c, s, s) for c, s in [(64, 32), (128, 16), (256, 8), (512, 4)] for _ in range(2)]
    assert build("resnet18", num_classes=10, stem="imagenet").stem(torch.randn(2, 3, 224, 224)).shape[2:] == (56, 56)


@pytest.mark.parametrize(("width", "channels"), [(2.0, [32, 64, 128]), (0.5, [8, 16, 32]), (1e-6, [1, 1, 1])])
def test_width(width: float, channels: list[int]) -> None:
    network = build("resnet8", num_classes=10, width=width)
    assert [block.second[0].out_channels for block in network.blocks] == channels  # type: ignore[union-attr,index]
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_pad_shortcut() -> None:
    x = torch.randn(2, 3, 5, 5)
    y = PadShortcut(3, 5, 2)(x)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert y.shape == (2, 5, 3, 3)
    assert not y[:, 3:].any()


def test_only_resnet18_has_parameters_in_its_shortcuts() -> None:
    for model, expected in [("resnet20", 0), ("resnet18", 3 * 3)]:
        names = [name for name, _ in build(model, num_classes=2).named_parameters() if "shortcut" in name]  # type: ignore[arg-type]
        assert len(names) == expected


def test_he_initialisation() -> None:
    torch.manual_seed(0)
    for module in build("resnet18", num_classes=10).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            draws = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * draws))
            assert abs(module.weight.mean().item()) < 5 * math.sqrt(2 / fan_out / draws)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_weights_follow_from_the_seed() -> None:
    first, second, other = [], [], []
    for seed, into in [(1, first), (1, second), (2, other)]:
        torch.manual_seed(seed)
        into.extend(build("resnet8", num_classes=10).parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("model", ["resnet8", "resnet18"])
def test_memory_format_does_not_change_the_result(model: Any) -> None:
    network = build(model, num_classes=10, width=0.25).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = network(x)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet50"}, "model='resnet50'"),
        ({"stem": "none"}, "stem='none'"),
        ({"width": 0.0}, "width=0.0"),
        ({"width": math.nan}, "width=nan"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"in_channels": 0}, "in_channels=0"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**({"model": "resnet8", "num_classes": 10} | arguments))

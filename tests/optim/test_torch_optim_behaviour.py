"""What users of torch.optim expect of `SignSGD` and `HybridSignSGD` beyond PyTorch's generic tests.

It has more than 500 lines because it belongs to the port in test_torch_optim_suite.py: one table of configurations and
one training loop serve all its sections.
"""

import io
import math
import pickle
import shutil
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from pairwise import every_combination
from signstep import HybridSignSGD, SignSGD
from signstep.kernels.momentum import is_freed
from signstep.kernels.reference import Segment
from signstep.kernels.rounding import round_parameters
from signstep.optim.calibration import EPS

CLASSES = [SignSGD, HybridSignSGD]
both = pytest.mark.parametrize("cls", CLASSES)
foreach_or_not = pytest.mark.parametrize("foreach", [False, True])

SHAPES = [(4, 3), (5,), (), (2, 3, 2, 2), (0, 3), (17,)]

CONFIGS: dict[str, tuple[type[SignSGD], dict[str, Any]]] = {
    "sign": (SignSGD, {}),
    "no momentum": (SignSGD, {"momentum": 0}),
    "decay": (SignSGD, {"weight_decay": 0.1}),
    "coupled decay": (SignSGD, {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}),
    "dither": (SignSGD, {"dither": 0.3}),
    "relative dither": (SignSGD, {"dither": 0.5, "dither_scale": "relative", "momentum": 0}),
    "post dither": (SignSGD, {"dither": 0.3, "dither_position": "post", "dither_scale": "relative"}),
    "expected": (SignSGD, {"dither": 0.3, "dither_position": "expected", "dither_law": "uniform"}),
    "hybrid, no switch": (HybridSignSGD, {"calibration": "ratio"}),
    "hybrid": (HybridSignSGD, {"switch_step": 4, "ema_decay": 0.5}),
    "hybrid, ratio": (HybridSignSGD, {"switch_step": 4, "calibration": "ratio", "sgd_momentum": 0.9}),
    "hybrid, applied": (
        HybridSignSGD,
        {"switch_step": 4, "calibration": "applied", "dither": 0.3, "weight_decay": 0.1, "momentum": 0},
    ),
}
every_config = pytest.mark.parametrize(("cls", "options"), CONFIGS.values(), ids=CONFIGS)


def tensors(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, shapes: Iterable[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def give_gradients(params: Iterable[Tensor], seed: int) -> None:
    """A gradient for each parameter, of its dtype and layout, that depends on the seed and its place only."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        value = torch.randn(p.shape, generator=generator, dtype=torch.complex64 if p.is_complex() else torch.float32)
        p.grad = torch.empty_like(p).copy_(value)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int], step: Callable[[], Any] | None = None) -> None:
    for i in steps:
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], i)
        (step or optimizer.step)()


def assert_equal(actual: Any, expected: Any) -> None:
    """Tensors bit for bit (NaN equal to NaN), dtypes and devices too; anything else by ==, in dicts and lists."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for x, y in zip(actual, expected, strict=True):
            assert_equal(x, y)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected


# --- Options ----------------------------------------------------------------------------------------------------------

ANY_NUMBER = "a number in [0, inf)"
BELOW_ONE = "a number in [0, 1)"
BAD: list[tuple[type[SignSGD], str, Any, type[Exception], str]] = [
    (SignSGD, "lr", -1e-3, ValueError, ANY_NUMBER),
    (SignSGD, "lr", -0.1, ValueError, ANY_NUMBER),
    (SignSGD, "lr", math.nan, ValueError, ANY_NUMBER),
    (SignSGD, "lr", math.inf, ValueError, ANY_NUMBER),
    (SignSGD, "lr", torch.tensor(math.nan), ValueError, ANY_NUMBER),
    (SignSGD, "lr", torch.tensor(-0.1), ValueError, ANY_NUMBER),
    (SignSGD, "lr", torch.tensor([-1.0]), ValueError, ANY_NUMBER),
    (SignSGD, "lr", "0.1", TypeError, ANY_NUMBER),
    (SignSGD, "lr", None, TypeError, ANY_NUMBER),
    (SignSGD, "lr", True, TypeError, ANY_NUMBER),
    (SignSGD, "momentum", -0.1, ValueError, BELOW_ONE),
    (SignSGD, "momentum", -0.5, ValueError, BELOW_ONE),
    (SignSGD, "momentum", 1, ValueError, BELOW_ONE),
    (SignSGD, "momentum", 1.0, ValueError, BELOW_ONE),
    (SignSGD, "momentum", math.nan, ValueError, BELOW_ONE),
    (SignSGD, "momentum", (0.9, 0.999), TypeError, BELOW_ONE),
    (SignSGD, "momentum", torch.tensor(0.9), TypeError, BELOW_ONE),
    (SignSGD, "dither", -0.1, ValueError, ANY_NUMBER),
    (SignSGD, "dither", math.inf, ValueError, ANY_NUMBER),
    (SignSGD, "dither", True, TypeError, ANY_NUMBER),
    (SignSGD, "dither_decay", -1, ValueError, ANY_NUMBER),
    (SignSGD, "dither_decay", "0.55", TypeError, ANY_NUMBER),
    (SignSGD, "dither_position", "middle", ValueError, "one of 'pre', 'post', 'expected'"),
    (SignSGD, "dither_position", "mid", ValueError, "one of 'pre', 'post', 'expected'"),
    (SignSGD, "dither_position", None, TypeError, "one of 'pre', 'post', 'expected'"),
    (SignSGD, "dither_law", "normal", ValueError, "one of 'gaussian', 'uniform'"),
    (SignSGD, "dither_scale", "rms", ValueError, "one of 'absolute', 'relative'"),
    (SignSGD, "dither_scale", 1.0, TypeError, "one of 'absolute', 'relative'"),
    (SignSGD, "param_rounding", "up", ValueError, "None, 'nearest' or 'stochastic'"),
    (SignSGD, "param_rounding", True, TypeError, "None, 'nearest' or 'stochastic'"),
    (SignSGD, "seed", -1, ValueError, "an integer in [0, 18446744073709551616)"),
    (SignSGD, "seed", 2**64, ValueError, "an integer in [0, 18446744073709551616)"),
    (SignSGD, "seed", 1.0, TypeError, "an integer in [0, 18446744073709551616)"),
    (SignSGD, "weight_decay", -1e-4, ValueError, ANY_NUMBER),
    (SignSGD, "weight_decay", -1, ValueError, ANY_NUMBER),
    (SignSGD, "weight_decay", math.nan, ValueError, ANY_NUMBER),
    (SignSGD, "weight_decay", None, TypeError, ANY_NUMBER),
    (SignSGD, "decoupled_weight_decay", 1, TypeError, "True or False"),
    (SignSGD, "maximize", "yes", TypeError, "True or False"),
    (SignSGD, "maximize", None, TypeError, "True or False"),
    (SignSGD, "capturable", "cuda", TypeError, "True or False"),
    (SignSGD, "differentiable", 0, TypeError, "True or False"),
    (SignSGD, "foreach", "yes", TypeError, "True, False or None"),
    (SignSGD, "fused", 1, TypeError, "True, False or None"),
    (HybridSignSGD, "switch_step", 0, ValueError, "None, 'auto' or an integer >= 1"),
    (HybridSignSGD, "switch_step", "soon", ValueError, "None, 'auto' or an integer >= 1"),
    (HybridSignSGD, "switch_tolerance", -0.1, ValueError, "a number in [0, inf)"),
    (HybridSignSGD, "switch_patience", 0, ValueError, "an integer >= 1"),
    (HybridSignSGD, "calibration_scope", "layer", ValueError, "None, 'group' or 'tensor'"),
    (HybridSignSGD, "switch_step", 10.0, TypeError, "None, 'auto' or an integer >= 1"),
    (HybridSignSGD, "switch_step", True, TypeError, "None, 'auto' or an integer >= 1"),
    (HybridSignSGD, "ema_decay", 1, ValueError, BELOW_ONE),
    (HybridSignSGD, "ema_decay", 1.0, ValueError, BELOW_ONE),
    (HybridSignSGD, "ema_decay", -0.1, ValueError, BELOW_ONE),
    (HybridSignSGD, "ema_decay", "0.99", TypeError, BELOW_ONE),
    (HybridSignSGD, "calibration", "exact", ValueError, "one of 'norm', 'paper', 'ratio', 'applied', 'swats'"),
    (HybridSignSGD, "calibration", "guess", ValueError, "one of 'norm', 'paper', 'ratio', 'applied', 'swats'"),
    (HybridSignSGD, "calibration", None, TypeError, "one of 'norm', 'paper', 'ratio', 'applied', 'swats'"),
    (HybridSignSGD, "sgd_momentum", 1.0, ValueError, BELOW_ONE),
    (HybridSignSGD, "sgd_momentum", 1.5, ValueError, BELOW_ONE),
    (HybridSignSGD, "sgd_momentum", None, TypeError, BELOW_ONE),
]
bad_options = pytest.mark.parametrize(
    ("cls", "name", "value", "error", "allowed"), BAD, ids=[f"{name}={value!r}" for _, name, value, _, _ in BAD]
)


def check_message(caught: pytest.ExceptionInfo[Exception], name: str, value: Any, allowed: str) -> None:
    kind = f" of type {type(value).__name__}" if caught.type is TypeError else ""
    assert f"Invalid {name}: {value!r}{kind}, expected {allowed}" in str(caught.value)


@bad_options
def test_bad_option_is_refused_at_construction(
    cls: type[SignSGD], name: str, value: Any, error: type[Exception], allowed: str
) -> None:
    for kind in {cls, HybridSignSGD}:
        with pytest.raises(error) as caught:
            kind(tensors(), **{name: value})
        check_message(caught, name, value, allowed)


@bad_options
def test_bad_option_of_a_group_is_refused_and_changes_nothing(
    cls: type[SignSGD], name: str, value: Any, error: type[Exception], allowed: str
) -> None:
    params, extra = tensors(), tensors(1)
    with pytest.raises(error) as caught:
        cls([{"params": params}, {"params": extra, name: value}])
    check_message(caught, name, value, allowed)

    optimizer = cls(params)
    train(optimizer, range(2))
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(error) as caught:
        optimizer.add_param_group({"params": extra, name: value})
    check_message(caught, name, value, allowed)
    assert_equal(optimizer.state_dict(), before)
    # The refused parameters are not left behind: they can still be added properly.
    optimizer.add_param_group({"params": extra})
    train(optimizer, range(2))


@both
@pytest.mark.parametrize("name", ["nesterov", "betas", "dampening", "Lr", "dithr"])
def test_unknown_option_is_a_type_error(cls: type[SignSGD], name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        cls(tensors(), **{name: 0.1})


def test_hybrid_options_are_unknown_to_signsgd() -> None:
    for name in ("switch_step", "ema_decay", "calibration", "sgd_momentum"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            SignSGD(tensors(), **{name: 1})


@both
def test_options_that_exclude_each_other(cls: type[SignSGD]) -> None:
    with pytest.raises(ValueError, match=r"Tensor lr must be 1-element, got shape \(2,\)"):
        cls(tensors(), lr=torch.tensor([0.1, 0.1]))
    with pytest.raises(RuntimeError, match=r"Invalid foreach: True.*differentiable"):
        cls(tensors(), foreach=True, differentiable=True)
    with pytest.raises(RuntimeError, match=r"Invalid fused: True with foreach=True"):
        cls(tensors(), fused=True, foreach=True)
    with pytest.raises(RuntimeError, match=r"Invalid fused: True with differentiable=True"):
        cls(tensors(), fused=True, differentiable=True)


def test_capturable_hybrid_cannot_read_its_step_count() -> None:
    with pytest.raises(ValueError, match=r"Invalid switch_step: 3 with capturable=True.*call switch\(\)"):
        HybridSignSGD(tensors(), switch_step=3, capturable=True)
    optimizer = HybridSignSGD(tensors(), capturable=True)
    with pytest.raises(ValueError, match="Invalid switch_step: 3"):
        optimizer.add_param_group({"params": tensors(1), "switch_step": 3})
    assert len(optimizer.param_groups) == 1


@both
def test_a_group_keeps_keys_that_are_not_ours(cls: type[SignSGD]) -> None:
    """Layer-wise decay tools and schedulers put their own keys into groups; they survive saving."""
    optimizer = cls([{"params": tensors(), "lr_scale": 0.5, "name": "head"}])
    other = cls([{"params": tensors()}])
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["lr_scale"], other.param_groups[0]["name"]) == (0.5, "head")


# --- param_groups -----------------------------------------------------------------------------------------------------

# Each option, another value than the default, and what else must be set for it to matter. None: it must not matter.
OVERRIDES: list[tuple[str, Any, dict[str, Any] | None]] = [
    ("lr", 0.05, {}),
    ("lr", torch.tensor(0.05), {}),
    ("momentum", 0.3, {}),
    ("momentum", 0, {}),
    ("dither", 0.5, {}),
    ("dither_decay", 2.0, {"dither": 0.5}),
    ("dither_position", "post", {"dither": 0.5}),
    ("dither_position", "expected", {"dither": 0.5}),
    ("dither_law", "uniform", {"dither": 0.5}),
    ("dither_law", "uniform", {"dither": 0.5, "dither_position": "expected"}),
    ("dither_scale", "relative", {"dither": 0.5}),
    ("seed", 7, {"dither": 0.5}),
    ("weight_decay", 0.5, {}),
    ("decoupled_weight_decay", False, {"weight_decay": 0.5}),
    ("maximize", True, {}),
    ("param_rounding", "stochastic", None),
    ("foreach", False, None),
    ("fused", False, None),
    ("capturable", True, None),
]
HYBRID_OVERRIDES: list[tuple[str, Any, dict[str, Any] | None]] = [
    ("switch_step", 2, {"switch_step": 4}),
    ("switch_step", "auto", {"switch_step": 4}),
    ("switch_tolerance", 0.0, {"switch_step": "auto", "ema_decay": 0.5, "switch_patience": 2, "calibration": "ratio"}),
    ("switch_patience", 3, {"switch_step": "auto", "ema_decay": 0.5, "switch_tolerance": 10.0}),
    ("calibration_scope", "group", {"switch_step": 3}),
    ("switch_step", None, {"switch_step": 4}),
    ("ema_decay", 0.2, {"switch_step": 3}),
    ("calibration", "ratio", {"switch_step": 3}),
    ("calibration", "applied", {"switch_step": 3, "dither": 0.5}),
    ("sgd_momentum", 0.7, {"switch_step": 3}),
]


@pytest.mark.parametrize(
    ("cls", "name", "value", "common"),
    [(cls, *case) for cls in CLASSES for case in OVERRIDES + (HYBRID_OVERRIDES if cls is HybridSignSGD else [])],
)
def test_group_overrides_an_option(cls: type[SignSGD], name: str, value: Any, common: dict[str, Any] | None) -> None:
    """Two groups step as two optimizers with the two values do, and the value matters."""
    matters, common = common is not None, {"lr": 0.01, **(common or {})}
    common.pop(name, None) if name == "lr" else None
    a, b = tensors(0), tensors(1)
    together = cls([{"params": a, name: value}, {"params": b}], **common)
    a_alone, b_alone = tensors(0), tensors(1)
    # The noise's key holds a parameter's place over all groups: parameters without gradients keep b's places.
    place_holders = tensors(0)
    first = cls(a_alone, **{**common, name: value})
    second = cls([*place_holders, *b_alone], **common)
    plain = tensors(0)
    default = cls(plain, **common)
    for i in range(7):
        for mine in (a, a_alone, plain):
            give_gradients(mine, i)
        for mine in (b, b_alone):
            give_gradients(mine, 100 + i)
        for optimizer in (together, first, second, default):
            optimizer.step()
        assert_equal([*a, *b], [*a_alone, *b_alone])
    assert all(torch.equal(x, y) for x, y in zip(a, plain, strict=True)) != matters


@every_config
def test_parameters_added_in_mid_training(cls: type[SignSGD], options: dict[str, Any]) -> None:
    """The old group goes on as if nothing had happened (its noise too); the new one starts its own count."""
    alone, old, new = tensors(0), tensors(0), tensors(1)
    reference, optimizer = cls(alone, **options), cls(old, **options)
    for i in range(9):
        if i == 6:
            optimizer.add_param_group({"params": new, "lr": 0.1})
        give_gradients(alone, i)
        give_gradients([*old, *new] if i >= 6 else old, i)
        for p, q in zip(old, alone, strict=True):
            p.grad = q.grad.clone()
        reference.step()
        optimizer.step()
        assert_equal(old, alone)
    assert int(optimizer.param_groups[1]["step"]) == 3
    assert not any(torch.equal(p, q) for p, q in zip(new, tensors(1), strict=True) if p.numel())


def test_group_added_after_the_switch_runs_its_own_sign_phase() -> None:
    old, new = tensors(0), tensors(1)
    optimizer = HybridSignSGD(old, lr=0.01, switch_step=3, ema_decay=0.5, calibration_scope="group")
    train(optimizer, range(4))
    assert optimizer.phase == "sgd"
    rate = optimizer.calibrated_lr
    optimizer.add_param_group({"params": new})
    assert optimizer.phase == "sgd"
    assert optimizer.calibrated_lr == [rate, 0]
    for i in range(1, 5):
        before = [p.clone() for p in new]
        train(optimizer, [i])
        in_sign = i <= 3
        assert optimizer.phase == ("sign" if i < 3 else "sgd")
        for p, q in zip(new, before, strict=True):
            moved = (p - q).abs()
            assert bool(torch.allclose(moved, torch.full_like(moved, 0.01), rtol=1e-3)) == in_sign or not p.numel()
    assert optimizer.calibrated_lr[0] == rate
    assert [g["phase"] for g in optimizer.param_groups] == ["sgd", "sgd"]


def test_switch_by_hand() -> None:
    params, waiting = tensors(0), tensors(1)
    optimizer = HybridSignSGD([{"params": params}, {"params": waiting}])
    with pytest.raises(RuntimeError, match="before the first sign step"):
        optimizer.switch()
    assert optimizer.phase == "sign"
    give_gradients(params, 0)
    optimizer.step()
    optimizer.switch()
    assert [g["phase"] for g in optimizer.param_groups] == ["sgd", "sign"]
    assert optimizer.phase == "sgd"
    assert [optimizer.state[p]["exp_avg"].untyped_storage().nbytes() for p in params] == [4] * len(params)
    state = deepcopy(optimizer.state_dict())
    optimizer.switch()
    assert_equal(optimizer.state_dict(), state)


@both
def test_empty_groups_and_parameters_without_elements_or_gradients(cls: type[SignSGD]) -> None:
    for options in ({}, {"dither": 0.1}, {"dither": 0.1, "dither_scale": "relative"}, {"momentum": 0}):
        for foreach in (False, True):
            empty, still, scalar = torch.zeros(0, 3), torch.ones(3), torch.tensor(1.0)
            optimizer = cls(
                [{"params": []}, {"params": [empty]}, {"params": [still, scalar]}], foreach=foreach, **options
            )
            for _ in range(3):
                empty.grad, scalar.grad = torch.zeros(0, 3), torch.tensor(-1.0)
                optimizer.step()
            assert torch.equal(still, torch.ones(3))
            assert still not in optimizer.state
            torch.testing.assert_close(scalar, torch.tensor(1.003))
            assert [int(g["step"]) for g in optimizer.param_groups] == [0, 3, 3]
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])


# --- step() -----------------------------------------------------------------------------------------------------------


@every_config
def test_closure(cls: type[SignSGD], options: dict[str, Any]) -> None:
    """It runs once, with gradients on, before the step; its value comes back as it is."""
    p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizer, plain = cls([p], **options), cls([q], **options)
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p - 3).square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    for i in range(6):
        with torch.no_grad():
            assert optimizer.step(closure) is losses[-1]
        assert len(losses) == i + 1
        plain.zero_grad()
        (q - 3).square().sum().backward()
        assert plain.step() is None
        assert torch.equal(p, q)


@pytest.mark.parametrize(("config", "foreach", "shape"), every_combination(CONFIGS, [False, True], [(), (1,), (1, 1)]))
def test_tensor_lr_is_the_float(config: str, foreach: bool, shape: tuple[int, ...]) -> None:
    cls, options = CONFIGS[config]
    # Powers of two: 1 - lr * weight_decay and post dither's lr * xi round alike in double and in single precision.
    options = {**options, "foreach": foreach, "weight_decay": 0.125 if options.get("weight_decay") else 0.0}
    a, b = tensors(), tensors()
    with_float = cls(a, lr=2**-6, **options)
    with_tensor = cls(b, lr=torch.full(shape, 2**-6), **options)
    for i in range(7):
        for optimizer in (with_float, with_tensor):
            train(optimizer, [i])
        assert_equal(b, a)
    assert with_tensor.param_groups[0]["lr"].shape == shape


def test_tensor_lr_keeps_double_precision() -> None:
    for options in ({}, {"dither": 0.5}, {"dither": 0.5, "foreach": False}):
        p = torch.zeros(4, dtype=torch.float64)
        p.grad = torch.ones_like(p)
        SignSGD([p], lr=torch.tensor(0.1, dtype=torch.float64), **options).step()
        assert torch.equal(p.abs(), torch.full_like(p, 0.1))


@foreach_or_not
@every_config
def test_tensor_lr_of_another_dtype(cls: type[SignSGD], options: dict[str, Any], foreach: bool) -> None:
    """A float64 lr over float32 parameters (as from numpy) acts as its value and casts nothing."""
    options = {**options, "foreach": foreach, "weight_decay": 0.125 if options.get("weight_decay") else 0.0}
    a, b = tensors(), tensors()
    with_float = cls(a, lr=2**-6, **options)
    with_tensor = cls(b, lr=torch.tensor(2**-6, dtype=torch.float64), **options)
    for optimizer in (with_float, with_tensor):
        train(optimizer, range(7))
    torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
    assert with_tensor.param_groups[0]["lr"].dtype is torch.float64


@both
def test_sparse_gradient_is_refused_before_anything_moves(cls: type[SignSGD]) -> None:
    dense, embedding = torch.ones(3), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = cls([{"params": [dense]}, {"params": list(embedding.parameters())}])
    dense.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    for part in (cls.__name__, "sparse", "parameter 1", "(4, 2)", "sparse=False"):
        assert part in str(caught.value)
    assert torch.equal(dense, torch.ones(3))
    assert [int(g["step"]) for g in optimizer.param_groups] == [0, 0]


@foreach_or_not
@every_config
def test_layout_does_not_matter(cls: type[SignSGD], options: dict[str, Any], foreach: bool) -> None:
    """channels_last, transposed and strided parameters, with gradients of any layout, step as contiguous ones do."""
    shape = (3, 4, 2, 5)
    contiguous = tensors(shapes=[shape] * 4)
    strided = [
        contiguous[0].clone(memory_format=torch.channels_last),
        contiguous[1].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.stack([contiguous[2], contiguous[2]], dim=-1)[..., 0],
        contiguous[3].clone(),
    ]
    assert not any(p.is_contiguous() for p in strided[:3])
    assert_equal(strided, contiguous)
    optimizers = [cls(params, foreach=foreach, **options) for params in (contiguous, strided)]
    for i in range(7):
        for params, optimizer in zip((contiguous, strided), optimizers, strict=True):
            give_gradients(params, i)
            if params is strided:
                params[3].grad = params[3].grad.clone(memory_format=torch.channels_last)
            optimizer.step()
        torch.testing.assert_close(strided, contiguous, rtol=0 if cls is SignSGD else 1e-6, atol=0)
    for p in strided[:2]:
        momentum = optimizers[1].state.get(p, {}).get("exp_avg")
        if momentum is not None and not is_freed(momentum):
            assert momentum.stride() == p.stride()


@pytest.mark.parametrize(
    ("config", "form", "foreach"),
    every_combination(
        CONFIGS, [(torch.bfloat16, "nearest"), (torch.bfloat16, None), (torch.float16, None)], [False, True]
    ),
)
def test_half_precision_rounds_once(config: str, form: tuple[torch.dtype, str | None], foreach: bool) -> None:
    """The step of a half-precision parameter is the float32 step from the same momentum, rounded once."""
    (cls, options), (dtype, rounding) = CONFIGS[config], form
    if not options.get("decoupled_weight_decay", True):  # which is in the momentum already
        options = {k: v for k, v in options.items() if k != "weight_decay"}
    params = tensors(dtype=dtype)
    optimizer = cls(params, lr=2**-5, foreach=foreach, param_rounding=rounding, **options)
    for i in range(7):
        wide = [p.float() for p in params]
        before = [
            optimizer.state[p]["mean_square"].clone() if "mean_square" in optimizer.state[p] else None for p in params
        ]
        phase = optimizer.param_groups[0].get("phase", "sign")
        train(optimizer, [i])
        assert all(p.dtype is dtype for p in params)
        momentum = "momentum" if phase == "sign" else "sgd_momentum"
        kept = options.get(momentum, 0.9 if momentum == "momentum" else 0) > 0
        momenta = [optimizer.state[p].get("exp_avg") if kept else None for p in params]
        m = [p.grad if x is None or is_freed(x) else x for p, x in zip(params, momenta, strict=True)]
        if kept and m[0] is params[0].grad:
            continue  # The switch has just freed the buffers that this step used.
        assert all(x.dtype is dtype for x in m)
        for p, x in zip(wide, m, strict=True):
            p.grad = x.float()
        if phase == "sign":
            # The same momentum, as the gradient of a float32 step without momentum at the same count.
            same = {k: v for k, v in options.items() if k.startswith("dither") or k == "weight_decay"}
            twin = SignSGD(wide, lr=2**-5, momentum=0, **same)
            twin.param_groups[0]["step"].fill_(i)
            twin.state.update({p: {"mean_square": b} for p, b in zip(wide, before, strict=True) if b is not None})
            twin.step()
        else:
            for p, ratio in zip(wide, optimizer.param_groups[0]["lr_ratio"].expand(len(wide)), strict=True):
                p *= 1 - 2**-5 * options.get("weight_decay", 0)
                p -= p.grad * (ratio * 2**-5)
        if dtype == torch.bfloat16 and rounding is None:
            key = optimizer.options(optimizer.param_groups[0], None)._replace(step=torch.tensor(i))
            segments = [Segment(ordinal, 0, p.numel()) for ordinal, p in enumerate(wide)]
            assert_equal(params, round_parameters(wide, segments, seed=key.seed, step=key.step))
        else:
            assert_equal(params, [p.to(dtype) for p in wide])


def test_half_precision_calibration_is_float32() -> None:
    """lambda-bar sums 1e5 squares: past float16's range, and past what bfloat16 can add up."""
    for dtype in (torch.float16, torch.bfloat16):
        p = torch.zeros(100_000, dtype=dtype)
        p.grad = torch.full_like(p, 2.0)
        # sign(m) is 1, g 2 and m a tenth of that.
        for rule, rate in (("paper", 0.5), ("norm", 5.0)):
            optimizer = HybridSignSGD([p], lr=1.0, ema_decay=0.0, calibration=rule, calibration_scope="group")
            optimizer.step()
            assert optimizer.calibrated_lr == pytest.approx(rate, rel=1e-5 if rule == "paper" else 1e-3)


@pytest.mark.parametrize(
    ("config", "foreach", "value"), every_combination(CONFIGS, [False, True], [math.nan, math.inf, -math.inf])
)
def test_non_finite_gradient_makes_its_coordinate_nan(config: str, foreach: bool, value: float) -> None:
    """torch.sign(nan) is 0: it must not hide the overflow."""
    cls, options = CONFIGS[config]
    p = torch.ones(4)
    p.grad = torch.tensor([1.0, value, -1.0, 0.0])
    cls([p], foreach=foreach, **options).step()
    assert p.isnan()[1]
    if options.get("dither_scale") != "relative":  # There the noise's scale is the whole tensor's rms.
        assert p.isfinite().tolist() == [True, False, True, True]


@foreach_or_not
@pytest.mark.parametrize("sgd_momentum", [0.0, 0.9])
def test_non_finite_gradient_in_the_sgd_phase_is_as_in_sgd(foreach: bool, sgd_momentum: float) -> None:
    p = torch.ones(4)
    optimizer = HybridSignSGD([p], switch_step=1, sgd_momentum=sgd_momentum, foreach=foreach)
    p.grad = torch.ones(4)
    optimizer.step()
    p.grad = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    optimizer.step()
    assert p.isfinite().tolist() == [True, False, False, False]
    assert p.isnan()[1]
    assert p[2] == -math.inf
    assert p[3] == math.inf


@every_config
def test_capturable_changes_no_number(cls: type[SignSGD], options: dict[str, Any]) -> None:
    options = {k: v for k, v in options.items() if k != "switch_step"}
    a, b = tensors(), tensors()
    plain, capturable = cls(a, **options), cls(b, capturable=True, **options)
    (group,) = capturable.param_groups
    counted = {name: value for name, value in group.items() if isinstance(value, Tensor)}
    for i in range(7):
        for optimizer in (plain, capturable):
            if i == 4 and isinstance(optimizer, HybridSignSGD):
                optimizer.switch()
            train(optimizer, [i])
        assert_equal(b, a)
    assert group["step"].device == b[0].device
    # A captured step advances the tensors that were there when it was captured.
    for name, value in counted.items():
        assert group[name] is value


@both
def test_complex_state_is_complex(cls: type[SignSGD]) -> None:
    z = torch.zeros(3, dtype=torch.complex64)
    z.grad = torch.tensor([1 - 2j, 0 + 3j, -1 + 0j])
    optimizer = cls([z], lr=0.5)
    optimizer.step()
    assert optimizer.state[z]["exp_avg"].dtype is torch.complex64
    assert torch.equal(z, torch.tensor([-0.5 + 0.5j, 0 - 0.5j, 0.5 + 0j]))


# --- Saving, loading, copying -----------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("at", [0, 2, 4, 6], ids=["fresh", "sign phase", "at the switch", "sgd phase"])
@every_config
def test_resumed_training_is_the_uninterrupted_one(cls: type[SignSGD], options: dict[str, Any], at: int) -> None:
    params, lr = tensors(), torch.tensor(0.01)
    optimizer = cls(params, lr=lr, **options)
    scheduler = StepLR(optimizer, 3, 0.5)
    train(optimizer, range(at), lambda: (optimizer.step(), scheduler.step()))
    state = saved_and_loaded({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    assert_equal(state["optimizer"], optimizer.state_dict())
    # What is loaded decides, not what the new optimizer was made with.
    others = [p.clone() for p in params]
    other = cls(others, lr=torch.tensor(1.0), momentum=0.5, dither=9.0)
    other_scheduler = StepLR(other, 3, 0.5)
    other.load_state_dict(state["optimizer"])
    other_scheduler.load_state_dict(state["scheduler"])
    for o, s in ((optimizer, scheduler), (other, other_scheduler)):
        train(o, range(at, 9), lambda o=o, s=s: (o.step(), s.step()))
    assert_equal(others, params)
    assert_equal(other.state_dict(), optimizer.state_dict())


@both
def test_loading_shares_no_count(cls: type[SignSGD]) -> None:
    """load_state_dict aliases per-parameter tensors in torch, not what is in a group: neither do we."""
    optimizer, other = cls(tensors(), dither=0.1), cls(tensors(), dither=0.1)
    train(optimizer, range(3))
    other.load_state_dict(optimizer.state_dict())
    expected = deepcopy(optimizer.state_dict()["param_groups"])
    train(other, range(3))
    assert_equal(optimizer.state_dict()["param_groups"], expected)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls in CLASSES for name, option in cls.OPTIONS.items() if not option.always],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_state_saved_before_an_option_existed(cls: type[SignSGD], name: str) -> None:
    """The option stays as it was constructed, and the run goes on as one that had it from there on."""
    then, params = tensors(), tensors()
    old = cls(then)
    train(old, range(2))
    state = deepcopy(old.state_dict())
    for group in state["param_groups"]:
        del group[name]
    set_now = {
        "dither": 0.5,
        "seed": 3,
        "weight_decay": 0.1,
        "maximize": True,
        "calibration": "ratio",
        "switch_step": 3,
    }
    new = cls(params, **({name: set_now[name]} if name in set_now else {}))
    for p, q in zip(params, then, strict=True):
        p.copy_(q)
    new.load_state_dict(state)
    assert new.param_groups[0][name] == set_now.get(name, old.param_groups[0][name])
    old.param_groups[0][name] = new.param_groups[0][name]
    for optimizer in (old, new):
        train(optimizer, range(2, 5))
    assert_equal(params, then)


def test_hybrid_starts_from_a_signsgd_checkpoint() -> None:
    """The calibration's own tensors and the phase may be missing as well."""
    then, params = tensors(), tensors()
    old = SignSGD(then, dither=0.1)
    train(old, range(3))
    new = HybridSignSGD(params, calibration_scope="group")
    for p, q in zip(params, then, strict=True):
        p.copy_(q)
    new.load_state_dict(deepcopy(old.state_dict()))
    assert new.phase == "sign"
    assert new.calibrated_lr == 0
    for optimizer in (old, new):
        train(optimizer, range(3, 6))
    assert_equal(params, then)
    assert new.calibrated_lr > 0
    new.switch()
    train(new, range(6, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("saved_dtype", [torch.bfloat16, torch.float32, torch.float64])
@both
def test_loading_onto_another_dtype(cls: type[SignSGD], saved_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """exp_avg follows the parameter; the step count stays exact, lambda-bar keeps at least float32."""
    source = cls(tensors(dtype=saved_dtype), lr=torch.tensor(0.3, dtype=torch.float64))
    train(source, range(2))
    source.param_groups[0]["step"].fill_(2**24 + 1)
    params = tensors(dtype=dtype)
    target = cls(params)
    target.load_state_dict(saved_and_loaded(source.state_dict()))
    (group,), (old,) = target.param_groups, source.param_groups
    assert (group["step"].dtype, int(group["step"])) == (torch.int64, 2**24 + 1)
    assert group["lr"].dtype is torch.float64
    for p in params:
        assert target.state[p]["exp_avg"].dtype is dtype
    if cls is HybridSignSGD:
        for name in ("calibrated_lr", "lr_ratio", "inner_avg", "square_avg"):
            assert group[name].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
            torch.testing.assert_close(group[name], old[name].to(group[name].dtype), rtol=1e-7, atol=0)
    train(target, range(2))
    assert int(group["step"]) == 2**24 + 3


@every_config
def test_deepcopy_and_pickle(cls: type[SignSGD], options: dict[str, Any]) -> None:
    params = tensors()
    optimizer = cls(params, **options)
    train(optimizer, range(3))
    copies = [deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    state = deepcopy(optimizer.state_dict())
    for copy in copies:
        assert type(copy) is cls
        assert_equal(copy.state_dict(), state)
        train(copy, range(3, 7))
    assert_equal(optimizer.state_dict(), state)
    train(optimizer, range(3, 7))
    for copy in copies:
        assert_equal(copy.state_dict(), optimizer.state_dict())
        assert_equal(copy.param_groups[0]["params"], params)


@every_config
def test_distributed_checkpoint_state_dict(cls: type[SignSGD], options: dict[str, Any]) -> None:
    """torch.distributed.checkpoint's get and set: the fresh optimizer goes on bit for bit, the saved one undisturbed.

    Where an optimizer has no state, "get" takes a step with lr 0 and gradients 0 to make one.
    """
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")

    def make() -> tuple[torch.nn.Module, SignSGD]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.02}]
        return model, cls(groups, **options)

    (model, optimizer), (same_model, undisturbed), (new_model, new) = make(), make(), make()
    for at in (3, 6):
        for o in (optimizer, undisturbed):
            train(o, range(at - 3, at))
            o.zero_grad()
        state = checkpoint.get_optimizer_state_dict(model, optimizer)
        assert state["param_groups"][0]["params"] == ["0.weight", "0.bias"]
        new_model.load_state_dict(model.state_dict())
        checkpoint.set_optimizer_state_dict(new_model, new, optim_state_dict=saved_and_loaded(state))
    assert_equal(optimizer.state_dict(), undisturbed.state_dict())
    assert_equal(new.state_dict(), optimizer.state_dict())
    for o in (optimizer, undisturbed, new):
        train(o, range(6, 9))
    assert_equal(list(model.parameters()), list(same_model.parameters()))
    assert_equal(list(new_model.parameters()), list(model.parameters()))


def test_hooks_see_the_switch() -> None:
    optimizer = HybridSignSGD(tensors(), switch_step=2)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("before", opt.phase)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("after", opt.phase)))
    train(optimizer, range(3))
    assert seen == [
        ("before", "sign"),
        ("after", "sign"),
        ("before", "sign"),
        ("after", "sgd"),
        ("before", "sgd"),
        ("after", "sgd"),
    ]


# --- LR schedulers ----------------------------------------------------------------------------------------------------

SWITCH = 6
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "none": lambda o: LambdaLR(o, lambda k: 1.0),
    "milestone at the switch": lambda o: StepLR(o, SWITCH, 0.1),
    "milestone before the last sign step": lambda o: StepLR(o, SWITCH - 1, 0.1),
    "milestone after the switch": lambda o: StepLR(o, SWITCH + 1, 0.1),
    "exponential": lambda o: ExponentialLR(o, 0.8),
    "cosine to 0": lambda o: CosineAnnealingLR(o, T_max=10),
    "cosine restarted": lambda o: CosineAnnealingLR(o, T_max=4, eta_min=1e-4),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=14),
    "warm-up from 0": lambda o: LambdaLR(o, lambda k: min(k / 8, 1.0)),
    "0 after the switch": lambda o: LambdaLR(o, lambda k: 0.0 if SWITCH <= k < SWITCH + 2 else 1.0),
    "0 at the last sign step": lambda o: LambdaLR(o, lambda k: 0.0 if k == SWITCH - 1 else 1.0),
    "0 before and after": lambda o: LambdaLR(o, lambda k: float(k % 2)),
    "next to 0 at the last sign step": lambda o: LambdaLR(o, lambda k: 1e-9 if k == SWITCH - 1 else 1.0),
    "warm restart at the switch": lambda o: CosineAnnealingWarmRestarts(o, T_0=SWITCH, eta_min=1e-9),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1),
    "sequence": lambda o: SequentialLR(o, [ExponentialLR(o, 1.5), ExponentialLR(o, 0.5)], milestones=[SWITCH]),
}


@pytest.mark.parametrize(
    ("name", "tensor_lr", "calibration"), every_combination(SCHEDULES, [False, True], ["paper", "ratio", "applied"])
)
@pytest.mark.filterwarnings("ignore:.*call of `lr_scheduler.step:UserWarning")
def test_schedule_goes_on_through_the_switch(name: str, tensor_lr: bool, calibration: str) -> None:
    """Sign steps have size lr; SGD steps have rate lambda-bar * lr / (mean of lr, weighted as in lambda-bar).

    So that rate over lr is a mean of the steps' own ratios |<s, g>| / |g|^2, whatever any single lr was.
    """
    p, decayed = torch.zeros(8, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    lr: Any = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    optimizer = HybridSignSGD(
        [{"params": [p]}, {"params": [decayed], "weight_decay": 0.5}],
        lr=lr,
        switch_step=SWITCH,
        ema_decay=0.6,
        calibration=calibration,
    )
    scheduler = SCHEDULES[name](optimizer)
    lrs, ratios, ratio = [], [], math.nan
    generator = torch.Generator().manual_seed(0)
    for k in range(13):
        p.grad = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
        decayed.grad = torch.zeros_like(decayed)
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        before, decayed_before = p.clone(), decayed.clone()
        optimizer.step()
        step = before - p
        if k < SWITCH:
            # Of this group: the other's first step at lr 0 and gradient 0 is not counted.
            assert optimizer.param_groups[0]["phase"] == ("sgd" if k == SWITCH - 1 else "sign")
            torch.testing.assert_close(step, torch.full_like(step, lrs[-1]))
            ratios.append(float(p.grad.sum() / (p.grad.square().sum() + EPS)))
            calibrated = float(optimizer.param_groups[0]["calibrated_lr"])
            weights = 0.6 ** torch.arange(k, -1, -1, dtype=torch.float64)
            if calibration == "paper":
                rates = torch.tensor(lrs, dtype=torch.float64) * torch.tensor(ratios, dtype=torch.float64)
                assert calibrated == pytest.approx(float((0.4 * weights * rates).sum()))
                mean_lr = float(torch.tensor(lrs, dtype=torch.float64) @ weights / weights.sum())
                if mean_lr > 0:
                    ratio = calibrated / mean_lr
                    assert ratio < max(ratios)
            else:
                # These average without lr, so they measure on at lr 0.
                ratio = float(optimizer.param_groups[0]["lr_ratio"])
                assert calibrated == pytest.approx(ratio * lrs[-1])
                assert min(ratios) <= ratio * (1 + 1e-9)
                assert ratio <= max(ratios) * (1 + 1e-9)
        else:
            torch.testing.assert_close(step, p.grad * ratio * lrs[-1])
            assert ratio > 0
            assert float(optimizer.param_groups[0]["calibrated_lr"]) == calibrated
        # Decoupled decay takes the scheduled lr in both phases.
        torch.testing.assert_close(decayed, decayed_before * (1 - 0.5 * lrs[-1]))
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert len(set(lrs)) > 1 or name == "none"


@pytest.mark.parametrize("calibration", ["paper", "ratio", "applied"])
def test_switch_keeps_the_rate_that_was_measured(calibration: str) -> None:
    """Under a steady gradient lambda-bar settles at lr <s, g> / |g|^2: both steps project alike on g."""
    p = torch.zeros(3, dtype=torch.float64)
    g = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    optimizer = HybridSignSGD([p], lr=0.01, momentum=0.5, switch_step=200, ema_decay=0.9, calibration=calibration)
    steps = []
    for _ in range(202):
        p.grad = g.clone()
        before = p.clone()
        optimizer.step()
        steps.append(before - p)
    assert optimizer.calibrated_lr == pytest.approx(0.01 * 7 / 21, rel=1e-6)
    assert float(steps[199] @ g) == pytest.approx(float(steps[200] @ g), rel=1e-6)
    torch.testing.assert_close(steps[200], 0.01 / 3 * g)


@both
def test_one_cycle_cycles_momentum(cls: type[SignSGD]) -> None:
    params = tensors(shapes=[(3,)])
    optimizer = cls(params, momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.5, max_momentum=0.8)
    m = torch.zeros(3)
    seen = []
    for i in range(10):
        beta = optimizer.param_groups[0]["momentum"]
        seen.append(beta)
        train(optimizer, [i])
        m = beta * m + (1 - beta) * params[0].grad
        torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], m)
        if i < 9:
            scheduler.step()
    assert min(seen) == pytest.approx(0.5)
    assert max(seen) == pytest.approx(0.8)


def test_plateau_schedule_in_both_phases() -> None:
    p = torch.zeros(2)
    optimizer = HybridSignSGD([p], lr=1.0, switch_step=2, ema_decay=0.0, momentum=0)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    moves = []
    for _ in range(5):
        p.grad = torch.tensor([2.0, 2.0])
        before = p.clone()
        optimizer.step()
        scheduler.step(1.0)
        moves.append(float((before - p)[0]))
    # lambda is 4 / 8 at lr 1; from the second step on, every loss that is no better halves lr.
    assert moves == pytest.approx([1.0, 1.0, 0.5, 0.25, 0.125])


# --- GradScaler -------------------------------------------------------------------------------------------------------


@every_config
def test_grad_scaler(cls: type[SignSGD], options: dict[str, Any]) -> None:
    """Scaled training is the unscaled one bit for bit; a step with an overflow leaves parameters and counts alone."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizer, plain = cls([p], **options), cls([q], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(9):
        target = torch.sin(torch.arange(7.0) + i)
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        scaler.scale(loss).backward()
        if i == 2:
            p.grad[3] = math.inf
        before = deepcopy([p.detach(), optimizer.state_dict()])
        scaler.step(optimizer)
        scaler.update()
        if i == 2:
            assert_equal([p.detach(), optimizer.state_dict()], before)
            assert scaler.get_scale() == 2.0**9
            continue
        plain.zero_grad()
        (q - target).square().sum().backward()
        plain.step()
        assert torch.equal(p, q)
    assert_equal(optimizer.state_dict(), plain.state_dict())


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled_against_eager(
    cls: type[SignSGD], options: dict[str, Any], backend: str, shapes: list[tuple[int, ...]], *, exact: bool = True
) -> None:
    """Trains both, with a scheduler over a Tensor lr; fails on a recompilation once each phase has run two steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        params = tensors(shapes=shapes)
        optimizer = cls(params, lr=torch.tensor(0.01), fused=False, **options)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        scheduler = ExponentialLR(optimizer, 0.9)
        trajectory = []
        warm = {1, 2} | ({SWITCH, SWITCH + 1, SWITCH + 2} if options.get("switch_step") else set())
        for i in range(1, 12):
            with torch._dynamo.config.patch(error_on_recompile=compiled and i not in warm):
                train(optimizer, [i], step)
            optimizer._opt_called = True  # By a function that the scheduler does not see; else it warns.
            scheduler.step()
            trajectory.append([p.clone() for p in params])
        results.append((trajectory, deepcopy(optimizer.state_dict())))
    (expected, state), (actual, compiled_state) = results
    # A reduction may add in another order: lambda-bar, and the SGD phase after it, are equal but for rounding.
    last_exact = SWITCH if options.get("switch_step") else 11
    assert_equal(actual[:last_exact], expected[:last_exact])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        [g.get("calibrated_lr", 0) for g in compiled_state["param_groups"]],
        [g.get("calibrated_lr", 0) for g in state["param_groups"]],
        rtol=1e-6,
        atol=0,
    )
    assert [g["step"] for g in compiled_state["param_groups"]] == [g["step"] for g in state["param_groups"]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (11 if options.get("switch_step") else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SignSGD, {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}),
        (SignSGD, {"momentum": 0, "dither": 0.5, "dither_scale": "relative", "capturable": True}),
        (HybridSignSGD, {"calibration": "paper", "switch_step": SWITCH}),
        (HybridSignSGD, {"calibration": "ratio", "switch_step": SWITCH, "sgd_momentum": 0.9, "foreach": False}),
    ],
    ids=["signsgd", "dither", "hybrid", "hybrid, sgd_momentum"],
)
def test_compile_traces_the_whole_step(cls: type[SignSGD], options: dict[str, Any]) -> None:
    """Dynamo and AOTAutograd, without code generation: no recompilation as the count, lr and lambda-bar change."""
    compiled_against_eager(cls, options, "aot_eager", [(3, 2), (5,), ()])


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler on the CPU"
)


@pytest.fixture(scope="module")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first, so that every kernel is compiled here; shared, so that its C++ headers are compiled once."""
    return tmp_path_factory.mktemp("inductor")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SignSGD, {"momentum": 0, "dither": 0.3, "dither_position": "post"}),
        pytest.param(
            HybridSignSGD,
            {"dither": 0.3, "calibration": "applied", "switch_step": SWITCH, "weight_decay": 0.125},
            marks=pytest.mark.long,
        ),
    ],
    ids=["signsgd", "hybrid"],
)
def test_compile_with_inductor_makes_the_same_decisions(
    cls: type[SignSGD], options: dict[str, Any], inductor_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inductor_cache))
    # 1003 elements: full vectors and a tail.
    compiled_against_eager(cls, options, "inductor", [(59, 17)])

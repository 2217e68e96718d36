"""The generic tests of torch.optim, driven over `SignSGD`, `HybridSignSGD` and `Lion`.

PyTorch holds every optimizer to one set of tests, written against an `OptimizerInfo` (test/test_optim.py, which does
not ship in the wheel; the OptimizerInfo machinery does). Each test here has the name of the one it stands for and asks
at least as much; the bodies are our own. `NOT_RUN` lists the ones that cannot run, and why; `pytest -rs` prints them.
The file has more than 500 lines because it is the port of one class.
"""

import functools
import io
import re
import unittest
import warnings
import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from signstep import HybridSignSGD, Lion, SignSGD
from signstep.kernels import reference
from signstep.kernels.engine import real
from signstep.kernels.fused import missing
from signstep.optim import signsgd

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest, of the extra signstep[dev]")

from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

# That import forbids the whole process to set torch.backends.*; other tests in the process may.
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)

# --- What the optimizers support, in PyTorch's terms ------------------------------------------------------------------

SIGN_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("non-default lr", {"lr": 1e-2}),
    ("Tensor lr", {"lr": torch.tensor(0.001)}),
    ("no momentum", {"momentum": 0}),
    ("decoupled weight_decay", {"weight_decay": 0.1}),
    ("coupled weight_decay", {"weight_decay": 0.1, "decoupled_weight_decay": False}),
    ("coupled weight_decay, no momentum", {"weight_decay": 0.1, "decoupled_weight_decay": False, "momentum": 0}),
    ("maximize", {"maximize": True}),
    ("maximize, decoupled weight_decay", {"maximize": True, "weight_decay": 0.1}),
    ("maximize, coupled weight_decay", {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": False}),
    ("capturable", {"capturable": True}),
    ("capturable, Tensor lr", {"capturable": True, "lr": torch.tensor(0.001), "weight_decay": 0.1}),
    ("dither", {"dither": 0.01, "dither_decay": 0, "seed": 2**64 - 1}),
    ("dither, relative", {"dither": 0.5, "dither_scale": "relative"}),
    ("dither, relative, no momentum", {"dither": 0.5, "dither_scale": "relative", "momentum": 0, "maximize": True}),
    ("dither, uniform", {"dither": 0.01, "dither_law": "uniform"}),
    ("dither, expected", {"dither": 0.01, "dither_position": "expected"}),
    ("dither, uniform, expected", {"dither": 1.0, "dither_position": "expected", "dither_law": "uniform"}),
    ("dither, post", {"dither": 0.1, "dither_position": "post"}),
    (
        "dither, post, relative",
        {"dither": 0.01, "dither_position": "post", "dither_scale": "relative", "dither_decay": 1.0},
    ),
    ("dither, maximize, weight_decay", {"dither": 0.01, "maximize": True, "weight_decay": 0.1}),
    ("dither, capturable, Tensor lr", {"dither": 0.01, "capturable": True, "lr": torch.tensor(0.001)}),
]

HYBRID_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("non-default lr", {"lr": 1e-2}),
    ("Tensor lr, switch", {"lr": torch.tensor(0.001), "switch_step": 4}),
    ("capturable", {"capturable": True, "calibration": "applied", "dither": 0.01, "lr": torch.tensor(0.001)}),
    ("switch at once", {"switch_step": 1}),
    ("switch", {"switch_step": 2, "ema_decay": 0.5}),
    ("switch, later", {"switch_step": 15, "ema_decay": 0.9}),
    ("switch, no average", {"switch_step": 4, "ema_decay": 0.0}),
    ("switch, ratio", {"switch_step": 2, "calibration": "ratio"}),
    ("switch, applied", {"switch_step": 4, "calibration": "applied", "dither": 0.01}),
    (
        "switch, applied, relative",
        {"switch_step": 4, "calibration": "applied", "dither": 0.5, "dither_scale": "relative"},
    ),
    ("switch, no momentum", {"switch_step": 4, "momentum": 0}),
    ("switch, sgd_momentum", {"switch_step": 4, "sgd_momentum": 0.9, "calibration": "ratio"}),
    ("switch, sgd_momentum only", {"switch_step": 2, "sgd_momentum": 0.5, "momentum": 0}),
    ("switch, decoupled weight_decay", {"switch_step": 4, "weight_decay": 0.1}),
    ("switch, coupled weight_decay", {"switch_step": 4, "weight_decay": 0.1, "decoupled_weight_decay": False}),
    ("switch, maximize", {"switch_step": 4, "maximize": True}),
    ("switch, maximize, everything", {"switch_step": 4, "maximize": True, "weight_decay": 0.1, "sgd_momentum": 0.9}),
    ("switch, post dither", {"switch_step": 4, "dither": 0.1, "dither_position": "post", "calibration": "applied"}),
]


LION_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("betas", {"betas": (0.8, 0.9)}),
    ("no momentum", {"betas": (0.0, 0.0)}),
    *((name, options) for name, options in SIGN_OPTIONS if "momentum" not in options),
]


def inputs_of(options: list[tuple[str, dict[str, Any]]]) -> Callable[..., list[OptimizerInput]]:
    def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
        # Fresh values each time: a scheduler fills a Tensor lr in place.
        return [OptimizerInput(params=None, kwargs=deepcopy(kwargs), desc=desc) for desc, kwargs in options]

    return inputs


def error_inputs_of(cls: type[SignSGD]) -> Callable[..., list[ErrorOptimizerInput]]:
    """PyTorch's own and a sparse gradient; options out of range are in test_torch_optim_behaviour.py."""

    def errors(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
        sparse = Parameter(torch.zeros(2, 3, device=device, dtype=dtype))
        sparse.grad = torch.ones(2, 3, device=device, dtype=dtype).to_sparse()
        return [
            *get_error_inputs_for_all_optims(device, dtype),
            ErrorOptimizerInput(
                OptimizerInput(params=[sparse], kwargs={}, desc="sparse gradient"),
                error_on=OptimizerErrorEnum.STEP_ERROR,
                error_type=RuntimeError,
                error_regex=f"{cls.__name__} does not support sparse gradients",
            ),
        ]

    return errors


SCHEDULERS: tuple[list[Callable[[Optimizer], LRScheduler]], ...] = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
    [
        lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4),
        lambda opt: ConstantLR(opt, factor=0.8, total_iters=4),
        lambda opt: PolynomialLR(opt, power=0.9, total_iters=40),
    ],
    [lambda opt: CosineAnnealingLR(opt, T_max=30), lambda opt: ExponentialLR(opt, gamma=0.99)],
)

FUSED_ON: tuple[str, ...] = tuple(
    device
    for device in ("cpu", "cuda")
    if (device == "cpu" or torch.cuda.is_available()) and missing([torch.empty(1, device=device)]) is None
)
"""Device types with fused kernels here."""


def info(cls: type[SignSGD], options: list[tuple[str, dict[str, Any]]]) -> OptimizerInfo:
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs_of(options),
        optim_error_inputs_func=error_inputs_of(cls),
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "fused", "differentiable"),
        not_og_supported_flags=tuple(name for name, option in cls.OPTIONS.items() if not option.always),
        has_capturable_arg=True,
        supports_fused_on=FUSED_ON,
    )


OPTIONS: dict[type[SignSGD], list[tuple[str, dict[str, Any]]]] = {
    SignSGD: SIGN_OPTIONS,
    HybridSignSGD: HYBRID_OPTIONS,
    Lion: LION_OPTIONS,
}
DB = [info(cls, options) for cls, options in OPTIONS.items()]

NO_FUSED = "no fused kernels for this device here: fused=True is a RuntimeError, which test_fused_is_refused checks"
NOT_RUN = {
    "test_rosenbrock_sparse": "sparse gradients are unsupported, as in Adam: momentum moves every coordinate at every "
    "step; test_errors checks the refusal",
    "test_second_order_optims_return_consistent_types": "only for optimizers whose step requires a closure (LBFGS)",
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs",
    "test_foreach_large_tensor": "needs a GPU with 72 GB",
    "test_fused_large_tensor": "needs 64 GB; tests/kernels/test_engine_calls.py reaches such indices by arithmetic",
    "test_fused_does_not_step_if_foundinf": "GradScaler unscales and skips by itself, as for SGD foreach",
    "test_fused_cpu_matches_cuda": "needs a GPU; test_triton.py compares it with the CPU's reference",
}
"""Generic tests that nothing here stands for, with the reason."""

NEEDS_GPU = "needs an accelerator: moves state from the CPU to it"


# --- Helpers ----------------------------------------------------------------------------------------------------------


def every_input(device: Any, dtype: Any, info: OptimizerInfo, skip: tuple[str, ...] = ()) -> list[OptimizerInput]:
    """Each option list plain, with foreach=True, with fused=True where there are kernels, with differentiable=True."""
    return _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info, skip=skip)


# As PyTorch's tests do: parameters that are leaves cannot be stepped differentiably.
plain_inputs = functools.partial(every_input, skip=("differentiable",))


class Regression:
    """A linear layer under a squared loss: weight [10, 5], bias [10]."""

    def __init__(self, device: Any, dtype: torch.dtype, *, contiguous: bool = True) -> None:
        def make(*shape: int) -> Parameter:
            if contiguous:
                return Parameter(torch.randn(shape, device=device, dtype=dtype))
            return Parameter(torch.randn((*shape, 2), device=device, dtype=dtype)[..., 0])

        self.weight, self.bias = make(10, 5), make(10)
        self.input = torch.randn(5, device=device, dtype=dtype)
        self.params = [self.weight, self.bias]

    def copy(self) -> "Regression":
        twin = object.__new__(Regression)
        twin.weight, twin.bias = (Parameter(p.detach().clone()) for p in self.params)
        twin.input, twin.params = self.input, [twin.weight, twin.bias]
        return twin

    def loss(self) -> Tensor:
        """The loss, with fresh gradients."""
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss.detach()


def conv_model(device: Any, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[[], None]]:
    """A small convolution net and the function that gives its parameters fresh gradients."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2)).to(device, dtype)
    image = torch.rand(1, 4, 16, 16, device=device, dtype=dtype)

    def backward() -> None:
        model.zero_grad()
        model(image).square().sum().backward()

    return model, backward


def named(params: Iterable[Tensor], with_names: bool) -> list[Any]:
    return [(f"name{i}", p) for i, p in enumerate(params)] if with_names else list(params)


def assert_same(actual: Any, expected: Any, where: str = "", **tolerance: float) -> None:
    """Equal structure, types, values, dtypes and devices; tensors bit for bit unless given a tolerance."""
    assert type(actual) is type(expected), f"{where}: {actual!r} is not {expected!r}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: keys {list(actual)} are not {list(expected)}"
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]", **tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} entries are not {len(expected)}"
        for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
            assert_same(x, y, f"{where}[{i}]", **tolerance)
    elif isinstance(expected, Tensor):
        limits = tolerance or {"rtol": 0, "atol": 0}
        torch.testing.assert_close(actual, expected, **limits, msg=lambda message: f"{where}: {message}")
    else:
        assert actual == expected, f"{where}: {actual!r} is not {expected!r}"


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def moves_up(optim_input: OptimizerInput) -> bool:
    return bool(optim_input.kwargs.get("maximize", False))


def advance(schedulers: Iterable[LRScheduler], loss: Tensor) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()


class NoWritesInto(TorchDispatchMode):
    """Fails an operator that writes into memory shared with one of the given tensors."""

    def __init__(self, protected: Iterable[Tensor]) -> None:
        super().__init__()
        self.protected = {t.untyped_storage().data_ptr() for t in protected}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[i] if i < len(args) else kwargs.get(argument.name)
            for t in tree_leaves(written):
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self.protected:
                    raise AssertionError(f"{func} writes into a gradient")
        return func(*args, **kwargs)


class PeakMemory(TorchDispatchMode):
    """The most bytes of storage that operators' results have kept alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.now = self.peak = 0

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            if storage.data_ptr() in old or storage in self.seen:
                continue
            self.seen[storage] = storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
            self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return out


# --- The generic tests ------------------------------------------------------------------------------------------------


class TestOptimSuite(TestCase):
    """One class for every device type that this machine has; see the end of the file."""

    # -- the options themselves

    @optims(DB)
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device=device):
            assert not {"foreach", "fused", "differentiable"} & set(optim_input.kwargs), optim_input.desc

    @optims(DB)
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            optim_input = error.optimizer_error_input
            params = optim_input.params
            if params is None and not issubclass(error.error_type, Warning):
                params = [Parameter(torch.zeros(2, device=device, dtype=dtype))]

            def run(optim_input=optim_input, params=params, on=error.error_on):
                optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
                if on is OptimizerErrorEnum.STEP_ERROR:
                    optimizer.step()

            expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
            with self.subTest(optim_input.desc), expected(error.error_type, match=error.error_regex):
                run()

    @optims(DB)
    def test_fused_is_refused(self, device, dtype, optim_info):
        """Ours: without kernels, fused=True fails at construction and fused=None, False work."""
        with pytest.raises(RuntimeError, match="Invalid fused: True, there are no fused kernels for meta tensors"):
            optim_info.optim_cls([Parameter(torch.zeros(2, device="meta", dtype=dtype))], fused=True)
        params = [Parameter(torch.zeros(2, device=device, dtype=dtype))]
        if torch.device(device).type in FUSED_ON:
            return
        with pytest.raises(RuntimeError, match="Invalid fused: True"):
            optim_info.optim_cls(params, fused=True)
        for fused in (None, False):
            optim_info.optim_cls(params, fused=fused).step()

    @optims(DB, dtypes=[torch.float32])
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
        for optim_input in every_input(device, dtype, optim_info):
            text = repr(optim_info.optim_cls(params, **optim_input.kwargs))
            assert text.startswith(f"{optim_info.name} (\nParameter Group 0\n")
            for name in optim_input.kwargs:
                assert re.search(rf"^    {name}: ", text, re.MULTILINE), f"{name} is missing from {text}"

    # -- the direction of the step

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims(DB, dtypes=[torch.float32])
    def test_forloop_goes_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        every = optim_info.scheduler_inputs if with_lrsched else [[]]
        for i, optim_input in enumerate(optim_info.optim_inputs_func(device=device)):
            # Pairs meet: of the tensors with gaps, each option with one list of schedules.
            for constructors in every if contiguous else [every[i % len(every)]]:
                problem = Regression(device, dtype, contiguous=contiguous)
                optimizer = optim_info.optim_cls(problem.params, foreach=False, **optim_input.kwargs)
                schedulers = [make(optimizer) for make in constructors]
                first = problem.loss()
                for _ in range(20):
                    loss = problem.loss()
                    optimizer.step()
                    advance(schedulers, loss)
                last = problem.loss()
                assert last > first if moves_up(optim_input) else last < first, (optim_input.desc, first, last)

    @optims(DB, dtypes=[torch.float32])
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for constructors in optim_info.scheduler_inputs:
            problem = Regression(device, dtype)
            groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
            optimizer = optim_info.optim_cls(groups)
            schedulers = [make(optimizer) for make in constructors]
            first = problem.loss()
            for _ in range(20):
                loss = optimizer.step(problem.loss)
                advance(schedulers, loss)
            assert problem.loss() < first

    @parametrize("num_dim", [0, 1, 2])
    @optims(DB, dtypes=[torch.float32])
    def test_tensor_lr(self, device, dtype, optim_info, num_dim):
        lr_devices = {torch.device(device), torch.device("cpu")}
        for lr_device in lr_devices:
            for optim_input in plain_inputs(device, dtype, optim_info):
                kwargs = {k: v for k, v in optim_input.kwargs.items() if k != "lr"}
                problem = Regression(device, dtype)
                twin = problem.copy()
                with_float = optim_info.optim_cls(problem.params, lr=1e-3, **kwargs)
                lr = torch.tensor(1e-3, device=lr_device).reshape([1] * num_dim)
                with_tensor = optim_info.optim_cls(twin.params, lr=lr, **kwargs)
                for _ in range(6):
                    for p, optimizer in ((problem, with_float), (twin, with_tensor)):
                        p.loss()
                        optimizer.step()
                    torch.testing.assert_close(twin.params, problem.params, msg=optim_input.desc)
                assert with_tensor.param_groups[0]["lr"] is lr
                assert lr.shape == (1,) * num_dim
                assert float(lr) == float(torch.tensor(1e-3))

    # -- complex parameters

    @optims(DB, dtypes=[torch.complex64])
    def test_complex(self, device, dtype, optim_info):
        """A complex parameter steps as its view_as_real does; the last parameter is real, to mix both."""
        for optim_input in plain_inputs(device, dtype, optim_info):
            complex_params = [
                torch.randn(10, 5, device=device, dtype=dtype),
                torch.randn(10, device=device, dtype=dtype),
            ]
            complex_params.append(torch.randn(10, 5, device=device))
            real_params = [real(p).clone() for p in complex_params]
            complex_optimizer = optim_info.optim_cls(complex_params, **deepcopy(optim_input.kwargs))
            real_optimizer = optim_info.optim_cls(real_params, **deepcopy(optim_input.kwargs))
            for _ in range(6):
                for c, r in zip(complex_params, real_params, strict=True):
                    r.grad = torch.randn_like(r)
                    c.grad = torch.view_as_complex(r.grad.clone()) if c.is_complex() else r.grad.clone()
                complex_optimizer.step()
                real_optimizer.step()
                # lambda-bar is a sum over the tensors, complex and real ones grouped: its last bits may differ.
                tolerance = {} if optim_info.optim_cls is SignSGD else {"rtol": 1e-6, "atol": 1e-7}
                assert_same([real(p) for p in complex_params], real_params, optim_input.desc, **tolerance)
                for c, r in zip(complex_params, real_params, strict=True):
                    state, real_state = complex_optimizer.state.get(c, {}), real_optimizer.state.get(r, {})
                    state = {k: real(v) for k, v in state.items()}
                    assert_same(state, dict(real_state), optim_input.desc, **tolerance)

    @optims(DB, dtypes=[torch.complex64])
    def test_complex_2d(self, device, dtype, optim_info):
        """A complex parameter against two real ones, its real and its imaginary part."""
        for optim_input in plain_inputs(device, dtype, optim_info):
            kwargs = optim_input.kwargs
            z = torch.randn(2, device=device, dtype=dtype, requires_grad=True)
            x, y = (part.detach().clone().requires_grad_() for part in (z.real, z.imag))
            if optim_info.optim_cls is HybridSignSGD:  # or two parameters would have two rates
                kwargs = {**kwargs, "calibration_scope": "group"}
            whole = optim_info.optim_cls([z], **deepcopy(kwargs))
            parts = optim_info.optim_cls([x, y], **deepcopy(kwargs))
            for step in range(6):
                for p in (z, x, y):
                    p.grad = None
                for a, b in (z, torch.complex(x, y)):
                    ((1 - a).square() + 100 * (b - a.square()).square()).abs().backward()
                torch.testing.assert_close(torch.view_as_real(z.grad), torch.stack([x.grad, y.grad], dim=-1))
                if kwargs.get("dither", 0) and step == 0:
                    # The noise of an element belongs to its place in its parameter, so two parameters draw other noise
                    # than one: the parts cannot follow the whole through a dithered step. test_complex compares it.
                    break
                whole.step()
                parts.step()
                torch.testing.assert_close(torch.view_as_real(z), torch.stack([x, y], dim=-1), msg=optim_input.desc)

    # -- the implementations against each other

    def _compare_implementations(self, device, dtype, optim_info, flag, inputs=None, **tolerance):
        """Seven steps with the flag False and True: a frozen layer, a step without gradients, a 0-dim parameter."""
        for optim_input in inputs or optim_info.optim_inputs_func(device=device, dtype=dtype):
            models, optimizers, extras = [], [], []
            for value in (False, True):
                torch.manual_seed(1)
                model = torch.nn.Sequential(
                    torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
                ).to(device, dtype)
                # As PyTorch's test does, a 0-dim parameter comes last; and one without elements beside it.
                extra = [torch.rand((), device=device, dtype=dtype), torch.rand((0, 3), device=device, dtype=dtype)]
                params = [*model.parameters(), *extra]
                optimizers.append(optim_info.optim_cls(params, **{**deepcopy(optim_input.kwargs), flag: value}))
                models.append(model)
                extras.append(extra)
            data = torch.linspace(0.1, 0.6, 6, device=device, dtype=dtype).reshape(3, 2)
            for i in range(7):
                for model, optimizer, extra in zip(models, optimizers, extras, strict=True):
                    optimizer.zero_grad()
                    model[2].requires_grad_(i not in (3, 4))
                    if i != 2:
                        model(data).sum().backward()
                        for p in extra:
                            p.grad = torch.full_like(p, 0.3 - i)
                    optimizer.step()
                states = [o.state_dict() for o in optimizers]
                for state in states:
                    for group in state["param_groups"]:
                        del group[flag]
                where = f"{optim_input.desc}, step {i}"
                both = [[p.detach() for p in [*m.parameters(), *e]] for m, e in zip(models, extras, strict=True)]
                assert_same(both[1], both[0], where, **tolerance)
                assert_same(states[1], states[0], where, **tolerance)

    @optims(DB, dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self._compare_implementations(device, dtype, optim_info, "foreach")

    @optims(DB, dtypes=[torch.float64])
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        """The dtype of the state follows the parameter, and the step count is int64, whatever the default dtype is."""
        before = torch.get_default_dtype()
        for default in (torch.float64, torch.float16):
            try:
                torch.set_default_dtype(default)
                self._compare_implementations(device, dtype, optim_info, "foreach")
                for optim_input in optim_info.optim_inputs_func(device=device):
                    p = torch.ones(3, device=device, dtype=torch.float32)
                    p.grad = torch.ones_like(p)
                    optimizer = optim_info.optim_cls([p], **optim_input.kwargs)
                    optimizer.step()
                    assert optimizer.param_groups[0]["step"].dtype is torch.int64
                    assert p.dtype is torch.float32
                    for value in optimizer.state[p].values():
                        assert value.dtype is torch.float32
            finally:
                torch.set_default_dtype(before)

    @parametrize("impl", ["foreach", "fused"])
    @optims(DB)
    def test_mixed_device_dtype(self, device, dtype, optim_info, impl):
        """Every float dtype in one group, on two devices where there are two, with a tensor that takes no part."""
        if impl == "fused" and torch.device(device).type not in FUSED_ON:
            self.skipTest(NO_FUSED)
        devices = [torch.device(device)]
        if devices[0].type != "cpu":
            count = torch.accelerator.device_count()
            devices.append(torch.device(devices[0].type, 1) if count > 1 else torch.device("cpu"))
        params = []
        for where in devices:
            for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                p = torch.rand(2, 3, device=where, dtype=kind)
                p.grad = torch.rand_like(p) - 0.5
                params.append(p)
            params.append(torch.randint(1024, (2, 3), device=where))
        for optim_input in optim_info.optim_inputs_func(device=device):
            copies, states = [], []
            for use in (False, True):
                mine = [p.detach().clone() for p in params]
                for p, q in zip(mine, params, strict=True):
                    p.grad = None if q.grad is None else q.grad.clone()
                optimizer = optim_info.optim_cls(mine, **{**deepcopy(optim_input.kwargs), impl: use})
                for _ in range(7 if impl == "foreach" else 1):
                    optimizer.step()
                copies.append(mine)
                states.append([dict(optimizer.state.get(p, {})) for p in mine])
            # lambda-bar sums over the group's tensors, in an order that the implementation may choose.
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if impl == "foreach" else {"rtol": 1e-3, "atol": 1e-4}
            for p, q, expected in zip(copies[1], copies[0], params, strict=True):
                if p.dtype in (torch.float16, torch.bfloat16):
                    torch.testing.assert_close(p, q, msg=lambda m, d=optim_input.desc: f"{d}: {m}")
                else:
                    assert_same(p, q, optim_input.desc, **tolerance)
                if expected.grad is None:
                    assert torch.equal(p, expected), optim_input.desc
                elif p.dtype.itemsize >= 4:  # A step of 0.001 is less than half a bfloat16 apart from no step.
                    assert not torch.equal(p, expected), optim_input.desc
            assert_same(states[1], states[0], optim_input.desc, **tolerance)

    @optims(DB, dtypes=[torch.float32])
    def test_defaults_changed_to_foreach(self, device, dtype, optim_info):
        """foreach=None takes the multi-tensor path where it may not take fused kernels, in both phases.

        PyTorch asks it on CUDA, we on every device.
        """
        for optim_input in optim_info.optim_inputs_func(device=device):
            model = torch.nn.Linear(5, 5, device=device, dtype=dtype)
            optimizer = optim_info.optim_cls(model.parameters(), fused=False, **optim_input.kwargs)
            model(torch.rand(2, 5, device=device, dtype=dtype)).sum().backward()
            with patch.object(signsgd, "multi_tensor_step", wraps=signsgd.multi_tensor_step) as called:
                optimizer.step()
            assert called.call_count == 1, optim_input.desc
            if isinstance(optimizer, HybridSignSGD):
                optimizer.switch()
                with patch.object(signsgd, "multi_tensor_step") as called:
                    optimizer.step()
                assert called.call_count == 1, optim_input.desc

    @optims(DB, dtypes=[torch.float32])
    def test_peak_memory_foreach(self, device, dtype, optim_info):
        """The multi-tensor path may hold one intermediate of the parameters' size more than the loop does.

        PyTorch reads the CUDA allocator; counting the storages that live operators' results hold works everywhere.
        """
        for optim_input in optim_info.optim_inputs_func(device=device):
            if optim_input.kwargs.get("dither", 0):
                continue  # The noise is drawn for many tensors at once: test_dither_memory_is_bounded.
            params = [torch.rand(16, 8, device=device, dtype=dtype) for _ in range(10)]
            for p in params:
                p.grad = torch.rand_like(p)
            peaks = []
            for foreach in (False, True):
                optimizer = optim_info.optim_cls(params, foreach=foreach, **deepcopy(optim_input.kwargs))
                optimizer.step()
                with PeakMemory() as memory:
                    optimizer.step()
                peaks.append(memory.peak)
            size = sum(p.numel() * p.element_size() for p in params)
            # A coupled decay, like maximize, makes a new list of gradients before the list of directions; Lion one of
            # averages that are not kept.
            changed = moves_up(optim_input) or not optim_input.kwargs.get("decoupled_weight_decay", True)
            intermediates = 1 + changed + (optim_info.optim_cls is Lion)
            assert peaks[1] <= peaks[0] + intermediates * size, (optim_input.desc, peaks, size)

    @parametrize("position", ["pre", "post"])
    @optims(DB[:1], dtypes=[torch.float32])
    def test_dither_memory_is_bounded(self, device, dtype, optim_info, position):
        """Ours: the noise of many elements, in one tensor or in several, is drawn a chunk at a time."""
        peaks = {}
        with patch.object(reference, "CHUNK", 4096):
            for foreach in (False, True):
                for sizes in ([4096], [4096] * 8, [8 * 4096]):
                    params = [torch.rand(n, device=device, dtype=dtype) for n in sizes]
                    for p in params:
                        p.grad = torch.rand_like(p)
                    optimizer = SignSGD(params, momentum=0, dither=0.1, dither_position=position, foreach=foreach)
                    with PeakMemory() as memory:
                        optimizer.step()
                    peaks[foreach, len(sizes), sum(sizes)] = memory.peak
        for (foreach, count, size), peak in peaks.items():
            # The sign, the direction and the new parameter are one float32 an element each.
            assert peak <= 1.25 * peaks[foreach, 1, 4096] + 3 * 4 * size, (count, size, peaks)

    @optims(DB, dtypes=[torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        if torch.device(device).type not in optim_info.supports_fused_on:
            self.skipTest(NO_FUSED)
        # Sums are formed in another order; what does not depend on them is compared exactly in test_native.py.
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype.itemsize == 2 else {"rtol": 1e-6, "atol": 1e-7}
        self._compare_implementations(device, dtype, optim_info, "fused", **tolerance)

    # -- param_groups

    @optims(DB, dtypes=[torch.float32])
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        for optim_input in plain_inputs(device, dtype, optim_info):
            problem = Regression(device, dtype)
            groups = [
                {"params": [problem.weight], **optim_input.kwargs},
                {"params": [problem.bias], **deepcopy(optim_input.kwargs), "weight_decay": 0.0},
            ]
            optimizer = optim_info.optim_cls(groups)
            first = problem.loss()
            for _ in range(20):
                last = problem.loss()
                optimizer.step()
            assert last > first if moves_up(optim_input) else last < first, optim_input.desc

    @optims(DB, dtypes=[torch.float32])
    def test_param_groups_lr(self, device, dtype, optim_info):
        for optim_input in plain_inputs(device, dtype, optim_info):
            problem = Regression(device, dtype)
            still = Parameter(torch.randn(2, device=device, dtype=dtype))
            before = still.detach().clone()
            groups = [{"params": problem.params, "lr": 1e-3, **optim_input.kwargs}, {"params": [still]}]
            optimizer = optim_info.optim_cls(groups, lr=1e-28)
            first = problem.loss()
            for _ in range(20):
                last = problem.loss()
                still.grad = torch.rand_like(still)
                optimizer.step()
            assert last > first if moves_up(optim_input) else last < first, optim_input.desc
            torch.testing.assert_close(still.detach(), before)

    # -- steps that must do nothing, and what a step may not touch

    @optims(DB, dtypes=[torch.float32])
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
        before = [p.clone() for p in params]
        for optim_input in every_input(device, dtype, optim_info):
            optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
            state = deepcopy(optimizer.state_dict())
            assert optimizer.step(lambda: torch.tensor([1.0])) == torch.tensor([1.0])
            assert_same(params, before, optim_input.desc)
            assert_same(optimizer.state_dict(), state, optim_input.desc)

    @optims(DB, dtypes=[torch.float32])
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        """A coordinate whose momentum is exactly 0 stays, dithered or not."""
        for optim_input in every_input(device, dtype, optim_info):
            if optim_input.kwargs.get("weight_decay", 0) != 0:
                continue  # Decay moves a parameter without a gradient's help.
            param = torch.randn((5, 1), device=device, dtype=dtype, requires_grad=True)
            before = param.detach().clone()
            # A leaf cannot be stepped differentiably.
            p = param.clone() if optim_input.kwargs.get("differentiable") else param
            optimizer = optim_info.optim_cls([p], **optim_input.kwargs)
            p.grad = torch.zeros_like(p)
            for _ in range(3):
                optimizer.step(lambda: torch.tensor([1.0]))
                assert torch.equal(p.detach(), before), optim_input.desc

    @optims(DB, dtypes=[torch.float32])
    def test_grads_are_never_inplaced_into(self, device, dtype, optim_info):
        for optim_input in plain_inputs(device, dtype, optim_info):
            problem = Regression(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **optim_input.kwargs)
            for _ in range(6):
                problem.loss()
                grads = [p.grad for p in problem.params]
                before = [(g.clone(), g._version) for g in grads]
                with NoWritesInto(grads):
                    optimizer.step()
                for p, g, (value, version) in zip(problem.params, grads, before, strict=True):
                    assert p.grad is g, optim_input.desc
                    assert g._version == version, optim_input.desc
                    assert torch.equal(g, value), optim_input.desc

    @optims(DB, dtypes=[torch.float32])
    def test_step_iteration(self, device, dtype, optim_info):
        """The count goes up by one per step that had a gradient, and is what dither_decay and the switch read."""
        for optim_input in plain_inputs(device, dtype, optim_info):
            problem = Regression(device, dtype)
            optimizer = optim_info.optim_cls(problem.params, **optim_input.kwargs)
            (group,) = optimizer.param_groups
            assert group["step"] == 0
            last = group.get("switch_step") or 20
            for i in range(1, 20):
                problem.loss()
                optimizer.step()
                optimizer.zero_grad()
                optimizer.step()
                assert int(group["step"]) == i, optim_input.desc
                if isinstance(optimizer, HybridSignSGD):
                    assert optimizer.phase == ("sign" if i < last else "sgd"), optim_input.desc

    @optims(DB, dtypes=[torch.float32])
    def test_non_empty_state(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device=device):
            model = torch.nn.Linear(5, 5, device=device, dtype=dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **optim_input.kwargs)
            model(torch.rand(2, 5, device=device, dtype=dtype)).sum().backward()
            optimizer.step()
            for state in optimizer.state.values():
                assert len(state) > 0, optim_input.desc
            for group in optimizer.state_dict()["param_groups"]:
                assert group["step"] == 1

    # -- state_dict

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(DB, dtypes=[torch.float32])
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        """An optimizer that loads another's state goes on bit for bit as the other does."""
        # The four cases share the inputs: what is named has no part in a step.
        for optim_input in plain_inputs(device, dtype, optim_info)[is_named_optim0 + 2 * is_named_optim1 :: 4]:
            problem = Regression(device, dtype)
            optimizer = optim_info.optim_cls(named(problem.params, is_named_optim0), **deepcopy(optim_input.kwargs))
            for _ in range(10):
                problem.loss()
                optimizer.step()
            twin = problem.copy()
            other = optim_info.optim_cls(named(twin.params, is_named_optim1), **deepcopy(optim_input.kwargs))
            other.load_state_dict(deepcopy(optimizer.state_dict()))
            for _ in range(10):
                for p, o in ((problem, optimizer), (twin, other)):
                    p.loss()
                    o.step()
                assert_same(twin.params, problem.params, optim_input.desc)
            assert_same(without_names(other.state_dict()), without_names(optimizer.state_dict()), optim_input.desc)
            # A parameter that is in two groups is written the same way twice.
            other.param_groups.extend(other.param_groups)
            repeated = without_names(other.state_dict())["param_groups"]
            assert_same(repeated[-1], without_names(optimizer.state_dict())["param_groups"][-1], optim_input.desc)

    @optims(DB, dtypes=[torch.float32])
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        """A state saved before any of the options existed loads and steps, with the options of the constructor."""
        for optim_input in plain_inputs(device, dtype, optim_info):
            model, backward = conv_model(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **optim_input.kwargs)
            for _ in range(3):
                backward()
                optimizer.step()
            old = deepcopy(optimizer.state_dict())
            for group in old["param_groups"]:
                for name in optim_info.not_og_supported_flags:
                    group.pop(name)
            optimizer.load_state_dict(old)
            (group,) = optimizer.param_groups
            for name in optim_info.not_og_supported_flags:
                assert group[name] == optimizer.defaults[name], f"{optim_input.desc}: {name}"
            before = [p.detach().clone() for p in model.parameters()]
            backward()
            optimizer.step()
            assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(DB, dtypes=[torch.float32])
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        for optim_input in plain_inputs(device, dtype, optim_info)[is_named_optim0 + 2 * is_named_optim1 :: 4]:
            model, backward = conv_model(device, dtype)

            def make(with_names, model=model, kwargs=optim_input.kwargs):
                params = model.named_parameters() if with_names else model.parameters()
                return optim_info.optim_cls(params, **deepcopy(kwargs))

            first = make(is_named_optim0)
            for _ in range(3):
                backward()
                first.step()
            second = make(is_named_optim1)
            second.load_state_dict(deepcopy(first.state_dict()))
            backward()
            second.step()
            if is_named_optim0 or is_named_optim1:
                names = second.state_dict()["param_groups"][0]["param_names"]
                assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]

    @parametrize("is_named_optim", [True, False])
    @optims(DB, dtypes=[torch.float32])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        for optim_input in plain_inputs(device, dtype, optim_info):
            problem = Regression(device, dtype)
            optimizer = optim_info.optim_cls(named(problem.params, is_named_optim), **optim_input.kwargs)
            for _ in range(3):
                optimizer.step(problem.loss)
            state = optimizer.state_dict()
            for weights_only in (False, True):
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                assert_same(torch.load(file, weights_only=weights_only), state, optim_input.desc)

    @optims(DB, dtypes=[torch.float32])
    def test_load_nontensor_step(self, device, dtype, optim_info):
        """A step count (and lambda-bar) saved as a Python number loads as the tensor that it was."""
        for optim_input in plain_inputs(device, dtype, optim_info):
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            for p in params:
                p.grad = torch.rand_like(p)
            optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
            for _ in range(3):
                optimizer.step()
            state = deepcopy(optimizer.state_dict())
            expected = deepcopy(state)
            for group in state["param_groups"]:
                for name in ("step", "calibrated_lr", "lr_ratio", "inner_avg", "square_avg"):
                    if name in group:
                        group[name] = group[name].tolist()
            optimizer.load_state_dict(state)
            assert_same(optimizer.state_dict(), expected, optim_input.desc)
            optimizer.step()

    @optims(DB, dtypes=[torch.float32])
    def test_state_dict_with_cuda_params(self, device, dtype, optim_info):
        """State saved on the CPU loads onto an accelerator, leaves its source alone and steps alike."""
        if torch.device(device).type == "cpu":
            self.skipTest(NEEDS_GPU)
        for optim_input in plain_inputs("cpu", dtype, optim_info):
            params = [Parameter(torch.randn(2, 3, dtype=dtype)) for _ in range(2)]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = optim_info.optim_cls(params, **deepcopy(optim_input.kwargs))
            for _ in range(3):
                optimizer.step()
            moved = [Parameter(p.detach().to(device)) for p in params]
            for p, q in zip(moved, params, strict=True):
                p.grad = q.grad.to(device)
            other = optim_info.optim_cls(moved, **deepcopy(optim_input.kwargs))
            state = deepcopy(optimizer.state_dict())
            given = deepcopy(state)
            other.load_state_dict(given)
            assert_same(given, state, optim_input.desc)
            (group,) = other.param_groups
            assert (group["step"].device.type == "cpu") == (not group["capturable"])
            for _ in range(5):
                optimizer.step()
                other.step()
                torch.testing.assert_close([p.detach().cpu() for p in moved], [p.detach() for p in params])

    @parametrize("impl", ["fused", "capturable"])
    @optims(DB, dtypes=[torch.float32])
    def test_cpu_load_state_dict(self, device, dtype, impl, optim_info):
        """A capturable (or fused) optimizer on an accelerator takes a state that was mapped to the CPU."""
        kind = torch.device(device).type
        if impl == "fused" and kind not in optim_info.supports_fused_on:
            self.skipTest(NO_FUSED)
        if kind == "cpu":
            self.skipTest(NEEDS_GPU)
        for optim_input in optim_info.optim_inputs_func(device="cpu"):
            if impl == "capturable" and optim_input.kwargs.get("switch_step") is not None:
                continue
            p = torch.tensor([0.1, 0.2], dtype=dtype)
            p.grad = torch.rand_like(p)
            optimizer = optim_info.optim_cls([p], **deepcopy(optim_input.kwargs))
            optimizer.step()
            state = deepcopy(optimizer.state_dict())
            state["param_groups"][0][impl] = True
            q = p.clone().to(device)
            other = optim_info.optim_cls([q], **{**optim_input.kwargs, impl: True})
            other.load_state_dict(state)
            q.grad = torch.rand_like(q)
            other.step()
            assert other.param_groups[0]["step"].device == q.device

    @optims(DB, dtypes=[torch.float32])
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(x):
            return {name for name in vars(x) if not name.startswith("_")}

        for optim_input in plain_inputs(device, dtype, optim_info):
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            for p in params:
                p.grad = torch.rand_like(p)
            optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
            for _ in range(3):
                optimizer.step()
            copied = deepcopy(optimizer)
            assert public(copied) == public(optimizer)
            assert_same(copied.state_dict(), optimizer.state_dict(), optim_input.desc)

    # -- hooks

    def _hooked(self, device, dtype, optim_info):
        for optim_input in every_input(device, dtype, optim_info):
            yield optim_info.optim_cls([torch.rand(2, 3, device=device, dtype=dtype)], **optim_input.kwargs)

    @optims(DB, dtypes=[torch.float32])
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for optimizer in self._hooked(device, dtype, optim_info):
            optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("mark", 1))
            assert optimizer.state_dict()["state"]["mark"] == 1

    @optims(DB, dtypes=[torch.float32])
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for optimizer in self._hooked(device, dtype, optim_info):
            optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "marked": "mark" in state["state"]})
            assert optimizer.state_dict()["marked"] is False

    @optims(DB, dtypes=[torch.float32])
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        def post(opt, state):
            return {**state, "found": state["state"].pop("mark", None)}

        for optimizer in self._hooked(device, dtype, optim_info):
            optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("mark", 1))
            optimizer.register_state_dict_post_hook(post)
            state = optimizer.state_dict()
            assert state["found"] == 1
            assert "mark" not in state["state"]

    @optims(DB, dtypes=[torch.float32])
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        def in_place(opt, state):
            state["param_groups"][0]["lr"] = 0.002

        def replaced(opt, state):
            state = deepcopy(state)
            state["param_groups"][0]["lr"] = 0.003
            return state

        for optimizer in self._hooked(device, dtype, optim_info):
            state = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(in_place)
            optimizer.load_state_dict(state)
            assert optimizer.param_groups[0]["lr"] == 0.002
            optimizer.register_load_state_dict_pre_hook(replaced, prepend=True)
            optimizer.load_state_dict(state)
            assert optimizer.param_groups[0]["lr"] == 0.002

    @optims(DB, dtypes=[torch.float32])
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for optimizer in self._hooked(device, dtype, optim_info):
            seen = []
            optimizer.register_load_state_dict_post_hook(lambda opt, seen=seen: seen.append(opt))
            optimizer.load_state_dict(optimizer.state_dict())
            assert len(seen) == 1
            assert seen[0] is optimizer

    @optims(DB, dtypes=[torch.float32])
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        def pre(opt, state):
            state = deepcopy(state)
            state["param_groups"][0]["lr"] = 0.003
            return state

        for optimizer in self._hooked(device, dtype, optim_info):
            seen = []
            optimizer.register_load_state_dict_pre_hook(pre)
            optimizer.register_load_state_dict_post_hook(lambda opt, seen=seen: seen.append(opt.param_groups[0]["lr"]))
            optimizer.load_state_dict(optimizer.state_dict())
            assert seen == [0.003]

    def _counted(self, device, dtype, optim_info, register):
        for optimizer in self._hooked(device, dtype, optim_info):
            seen = []
            handle = getattr(optimizer, register)(lambda opt, args, kwargs, seen=seen: seen.append(opt))
            optimizer.step()
            optimizer.step()
            assert len(seen) == 2
            assert seen[0] is seen[1] is optimizer
            handle.remove()
            optimizer.step()
            assert len(seen) == 2

    @optims(DB, dtypes=[torch.float32])
    def test_step_pre_hook(self, device, dtype, optim_info):
        self._counted(device, dtype, optim_info, "register_step_pre_hook")

    @optims(DB, dtypes=[torch.float32])
    def test_step_post_hook(self, device, dtype, optim_info):
        self._counted(device, dtype, optim_info, "register_step_post_hook")

    @optims(DB, dtypes=[torch.float32])
    def test_step_all_hooks(self, device, dtype, optim_info):
        """Global pre, own pre, own post, global post; beside another optimizer; and none once removed."""
        for optimizer in self._hooked(device, dtype, optim_info):
            other = torch.optim.SGD(optimizer.param_groups[0]["params"])
            order: list[str] = []

            def note(word, order=order):
                return lambda opt, args, kwargs: order.append(word)

            handles = [
                register_optimizer_step_pre_hook(note("global pre")),
                register_optimizer_step_post_hook(note("global post")),
            ]
            for o in (optimizer, other):
                handles += [o.register_step_pre_hook(note("pre")), o.register_step_post_hook(note("post"))]
            once = ["global pre", "pre", "post", "global post"]
            try:
                for count, o in enumerate((optimizer, other, optimizer), start=1):
                    o.step()
                    assert order == once * count
            finally:
                for handle in handles:
                    handle.remove()
            optimizer.step()
            other.step()
            assert order == once * 3


for _name, _reason in NOT_RUN.items():

    @unittest.skip(_reason)
    def _not_run(self: TestCase) -> None: ...

    _not_run.__name__ = _name
    setattr(TestOptimSuite, _name, _not_run)

instantiate_device_type_tests(TestOptimSuite, globals(), only_for=("cpu", "cuda", "xpu"))


# --- differentiable=True ----------------------------------------------------------------------------------------------


def differentiable_steps(
    cls: type[SignSGD], kwargs: dict[str, Any], param: Tensor, lr: Tensor, exp_avg: Tensor | None, *grads: Tensor
) -> tuple[Tensor, ...]:
    """Where the parameter and its momentum end after one step per gradient, as a function of all that enters."""
    p = param.clone()
    optimizer = cls([p], lr=lr, differentiable=True, **kwargs)
    if exp_avg is not None:
        optimizer.state[p]["exp_avg"] = exp_avg.clone()
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return (p, *optimizer.state.get(p, {}).values())


def differentiable_cases() -> list[Any]:
    return [
        pytest.param(cls, kwargs, id=f"{cls.__name__}-{desc}")
        for cls, options in OPTIONS.items()
        for desc, kwargs in options
    ]


class TestDifferentiableOptimizer:
    @pytest.mark.parametrize(("cls", "kwargs"), differentiable_cases())
    def test_gradcheck(self, cls: type[SignSGD], kwargs: dict[str, Any]) -> None:
        """Autograd's derivative by the parameter, lr, the momentum and every gradient is the numerical one."""
        torch.manual_seed(0)
        kwargs = {k: v for k, v in kwargs.items() if k != "lr"}
        steps = 1 if cls is SignSGD else min(kwargs.get("switch_step") or 2, 4) + 2
        make = functools.partial(torch.rand, 3, dtype=torch.float64, requires_grad=True)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        exp_avg = make() if kwargs.get("momentum", 0.9) > 0 else None
        # sigma and the expected sign are float32 for any parameter: a difference must be wide to stand above rounding.
        options = {"relative", "applied", "expected"}
        wide = any(kwargs.get(name) in options for name in ("dither_scale", "calibration", "dither_position"))
        precision = {"eps": 1e-3, "atol": 1e-3, "rtol": 1e-2} if wide else {"eps": 1e-6}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*moves every weight by")
            assert torch.autograd.gradcheck(
                functools.partial(differentiable_steps, cls, kwargs),
                (make(), lr, exp_avg, *(make() for _ in range(steps))),
                **precision,
            )

"""What every fused engine is asked for in the tests: options, parameters, gradients."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from signstep import SignSGD
from signstep.kernels.engine import Direction, Options, Tensors
from signstep.kernels.plain import multi_tensor_step

ENGINES = ["native", "triton"]
"""Of the fixture `engine`, for tests that name it among the options of which pairs meet."""
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where Triton works: in its interpreter it steps CPU tensors."""
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATE_DTYPES = [None, torch.float32, torch.bfloat16, torch.int8]
DITHERS: dict[str, dict[str, Any]] = {
    "clean": {},
    "pre": {"dither": 0.01, "dither_decay": 0.3, "seed": 5},
    "pre, wide seed": {"dither": 1.0, "seed": (1 << 63) + 12345},
    "relative": {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"},
    "uniform": {"dither": 0.01, "dither_law": "uniform", "seed": 5},
    "uniform, relative": {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative", "dither_law": "uniform"},
    "expected": {"dither": 0.01, "dither_position": "expected"},
    "expected, uniform, relative": {
        "dither": 1.0,
        "dither_position": "expected",
        "dither_scale": "relative",
        "dither_law": "uniform",
    },
    "post": {"dither": 0.1, "dither_position": "post", "seed": 7},
    "post, uniform": {"dither": 0.1, "dither_position": "post", "dither_law": "uniform"},
    "post, relative": {"dither": 0.1, "dither_position": "post", "dither_scale": "relative"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no momentum": {"momentum": 0.0},
    "little momentum": {"momentum": 0.25},
    "decoupled decay": {"weight_decay": 0.1},
    "coupled decay, maximize": {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
    "Tensor lr": {"lr": torch.tensor(0.03)},
    "to the nearest": {"param_rounding": "nearest", "weight_decay": 0.1},
}


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device = CPU
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [torch.nn.Parameter(p.to(device)) for p in made]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1
        g[torch.rand(p.shape, generator=generator) < 0.1] = 0  # a momentum of exactly 0 does not move
        p.grad = g.to(p.dtype).to(p.device)


def strided(dtype: torch.dtype, device: torch.device = CPU) -> list[torch.nn.Parameter]:
    """channels_last, transposed, every other row, permuted."""
    a, b, c, d = (p.detach() for p in parameters([(4, 3, 5, 7), (33, 19), (40, 6), (6, 4, 9)], dtype, device))
    views = [a.contiguous(memory_format=torch.channels_last), b.t(), c[::2], d.permute(2, 0, 1)]
    return [torch.nn.Parameter(v) for v in views]


class Dither(NamedTuple):
    """Noise that a step is asked for."""

    position: str
    sigma: Tensor
    law: str = "gaussian"


UNIT = Dither("pre", torch.tensor(1.0))


def request(*, dither: Dither | None = UNIT, **changes: Any) -> Options:
    """Options of a step: dithered, of step 3 and seed 9, and without momentum, but for what is given."""
    options: dict[str, Any] = {
        "step": torch.tensor(3),
        "rate": 1.0,
        "decay": 1.0,
        "coupled_weight_decay": 0.0,
        "momentum": 0.0,
        "state_dtype": None,
        "direction": Direction.SIGN if dither is None else Direction[dither.position.upper()],
        "sigma": None if dither is None else dither.sigma,
        "seed": 9,
        "maximize": False,
        "law": "gaussian" if dither is None else dither.law,
    }
    return Options(**(options | changes))


class Engine(NamedTuple):
    """An engine, and the device of the tensors that it steps."""

    name: str
    module: ModuleType
    device: torch.device


def differing(actual: Tensor, expected: Tensor) -> int:
    """Elements that are not equal; two NaNs are."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    return int((~((actual == expected) | (actual.isnan() & expected.isnan()))).sum())


def close(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected.detach(), rtol=rtol, atol=atol, equal_nan=True)


def momenta(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def directions(
    m: Tensor,
    engine_step: Callable[..., None] = multi_tensor_step,
    *,
    device: torch.device = CPU,
    offset: int = 0,
    ordinal: int = 0,
    **changes: Any,
) -> Tensor:
    """What a step without momentum moves along, on the CPU: the parameter starts at 0 and the rate is 1."""
    p = torch.zeros_like(m, device=device)
    options = {name: changes.pop(name) for name in list(changes) if name in (*Options._fields, "dither")}
    engine_step(Tensors([p], [m.to(device)], [], [], [], [ordinal], [offset]), request(**options), **changes)
    return -p.cpu()


Make = Callable[[torch.device], list[torch.nn.Parameter]]
RAGGED = {
    "native": [(1000, 37), (5,), (), (0, 3), (257,), (255,), (1,), (70001,)],
    "triton": [(41, 51), (5,), (), (0, 3), (257,)],
}
FEW = RAGGED | {"triton": [(9, 29), (), (0, 3)]}


def check_equal(engine: Engine, cls: type[SignSGD], options: dict[str, Any], make: Make, steps: int = 3) -> None:
    """Momentum bit for bit; parameters too, but for one decision, or the rounding of post-sign noise and lambda."""
    params, expected = make(engine.device), make(CPU)
    options = {"lr": 0.03, **options}
    optimizer, plain = cls(params, **options, fused=True), cls(expected, **options, foreach=True, fused=False)
    # On CPUs both work with the same functions, so that only a relative sigma has a rounding of its own.
    allowed = 0 if engine.name == "native" and options.get("dither_scale") != "relative" else 1
    for step in range(steps):
        for ps, each in ((params, optimizer), (expected, plain)):
            give_gradients(ps, step)
            each.step()
        exact = options.get("dither_position", "pre") == "pre" and getattr(plain, "phase", "sign") == "sign"
        if exact:
            assert sum(differing(p, q) for p, q in zip(params, expected, strict=True)) <= allowed
        for p, q in zip(params, expected, strict=True):
            wide = 1e-2 if p.dtype.itemsize == 2 else 1e-5
            if not exact:
                close(p, q, wide, 1e-6 if engine.name == "native" else 1e-5)
            state, wanted = optimizer.state.get(p, {}), plain.state.get(q, {})
            assert state.keys() == wanted.keys()
            for name in state:
                if name == "mean_square" and engine.name == "native":
                    close(state[name], wanted[name], 1e-5, 1e-12)
                elif name == "mean_square" or (not exact and options.get("decoupled_weight_decay") is False):
                    close(state[name].float(), wanted[name].float(), wide, 1e-6)
                else:
                    assert differing(state[name], wanted[name]) == 0


def five_steps(optimizer: SignSGD, params: list[Tensor], backend: Any = None) -> list[Tensor]:
    """Parameters and state after five steps at falling rates, in one graph each if there is a compiler's backend."""
    whole = torch.compile(inspect.unwrap(type(optimizer).step), backend=backend, fullgraph=True) if backend else None
    for step in range(5):
        give_gradients(params, step)
        if whole is None:
            optimizer.step()
        else:
            # The first step makes the state, so that the second one is another function.
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 1):
                whole(optimizer)
        optimizer.param_groups[0]["lr"].mul_(0.9)
    assert optimizer.param_groups[0]["step"] == 5
    return [*params, *(x for state in optimizer.state.values() for x in state.values())]

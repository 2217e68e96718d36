"""What torch.compile is given of a step: operators in place of the noise, so that it has no more to trace than a clean
step has, and the same decisions as without it.
"""

from typing import Any

import pytest
import torch
from engine_cases import DITHERS, five_steps, parameters
from torch import Tensor
from torch.library import opcheck

from signstep import HybridSignSGD, SignSGD
from signstep.kernels import native, opaque_noise, reference
from signstep.kernels.reference import Segment

SHAPES = [(30, 7), (5,), (), (257,)]


def train(
    cls: type[SignSGD], options: dict[str, Any], *, compiled: bool, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[torch.fx.GraphModule]]:
    """Parameters and state after five steps at falling rates, and the graphs that the compiler was given."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    params = parameters(SHAPES, dtype)
    optimizer = cls(params, lr=torch.tensor(0.01), **options)
    return five_steps(optimizer, params, backend if compiled else None), graphs


def operators(graphs: list[torch.fx.GraphModule]) -> set[str]:
    """Those of ours that each graph calls."""
    called = [{str(node.target) for node in graph.graph.nodes if "signstep" in str(node.target)} for graph in graphs]
    assert all(names == called[0] for names in called)
    return called[0]


PLAIN = {"fused": False}
CASES: dict[str, tuple[type[SignSGD], dict[str, Any], set[str]]] = {
    "default": (SignSGD, DITHERS["relative"], {"signstep.step"}),
    "plain": (SignSGD, PLAIN | DITHERS["pre, wide seed"] | {"capturable": True}, {"signstep.directions"}),
    "uniform": (SignSGD, PLAIN | DITHERS["uniform, relative"], {"signstep.directions"}),
    "one by one": (SignSGD, PLAIN | DITHERS["post"] | {"foreach": False}, {"signstep.directions"}),
    "8 bits": (SignSGD, PLAIN | {"state_dtype": torch.int8}, {"signstep.noise_bytes"}),
    "16 bits": (
        HybridSignSGD,
        PLAIN | DITHERS["relative"] | {"calibration": "applied", "state_dtype": torch.bfloat16},
        {"signstep.directions", "signstep.noise_bytes", "signstep.round_parameters", "signstep.mean_square"},
    ),
}
SHORT = ("default", "16 bits")
"""The cases that are not left to `make test-long`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [pytest.param(*case, id=name, marks=() if name in SHORT else pytest.mark.long) for name, case in CASES.items()],
)
def test_a_compiled_step_calls_operators_for_its_noise(
    cls: type[SignSGD], options: dict[str, Any], expected: set[str]
) -> None:
    """And takes the same bits, in two graphs: neither the count nor the rate makes another one."""
    if "signstep.step" in expected and native.unavailable() is not None:
        pytest.skip(str(native.unavailable()))
    dtype = torch.bfloat16 if "signstep.round_parameters" in expected else torch.float32
    values, none = train(cls, options, compiled=False, dtype=dtype)
    actual, graphs = train(cls, options, compiled=True, dtype=dtype)
    assert not none
    assert len(graphs) == 2
    assert operators(graphs) == expected
    assert all(torch.equal(x, y) for x, y in zip(actual, values, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param({}, id="default", marks=pytest.mark.long), pytest.param(PLAIN, id="plain")]
)
def test_a_compiled_dithered_step_is_hardly_longer_than_a_clean_one(engine: dict[str, Any]) -> None:
    """How long it takes to compile goes with the nodes of its graph: traced, Philox made it 12 times as long."""
    _, clean = train(SignSGD, engine, compiled=True)
    _, dithered = train(SignSGD, engine | DITHERS["pre"], compiled=True)
    assert len(dithered[1].graph.nodes) <= 1.5 * len(clean[1].graph.nodes)


def test_autograd_follows_the_noise_of_a_compiled_step() -> None:
    """Noise after the sign is a multiple of sigma, which no operator has a derivative of."""
    m, step = torch.ones(9), torch.tensor(3)

    def noise(sigma: Tensor) -> Tensor:
        (drawn,) = opaque_noise.directions([m], [sigma], [Segment(0, 0, 9)], seed=1, step=step, position="post")
        return drawn.sum()

    sigma = torch.tensor(0.5, requires_grad=True)
    torch._dynamo.reset()
    slopes = [torch.autograd.grad(f(sigma), sigma)[0] for f in (noise, torch.compile(noise, backend="eager"))]
    assert slopes[0] == slopes[1] != 0


def test_operators_are_what_torch_expects_of_them() -> None:
    """Schemas, and the shapes, dtypes and layouts that are promised to the compiler."""
    m, step = torch.linspace(-1, 1, 35).view(5, 7), torch.tensor(3)
    numbers = ([0, 9], [5, 0], [35, 0])
    seed = opaque_noise.signed(2**64 - 7)
    sigmas = [torch.tensor(0.5)] * 2
    for name, arguments in {
        "directions": ([m.t(), m[:0]], sigmas, *numbers, seed, step, "post", "uniform"),
        "round_parameters": ([m.t(), m[:0]], *numbers, seed, step),
        "mean_square": (m,),
        "noise_bytes": (*numbers, reference.ROUNDING, seed, step, torch.device("cpu")),
    }.items():
        operator = getattr(torch.ops.signstep, name).default
        opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    segments = [Segment(*each) for each in zip(*numbers, strict=True)]
    drawn = torch.ops.signstep.noise_bytes(*numbers, reference.ROUNDING, seed, step, torch.device("cpu"))
    expected = reference.noise_bytes(
        segments, reference.ROUNDING, seed=2**64 - 7, step=step, device=torch.device("cpu")
    )
    assert all(torch.equal(x, y.int()) for x, y in zip(drawn, expected, strict=True))

"""torch's default device and dtype are the user's: they change nothing of what the library computes, nor where."""

import ast
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import signstep
from signstep import HybridSignSGD, Lion, SignSGD
from signstep.distributed.compressors import blocks
from signstep.distributed.compressors.noise import random_integers
from signstep.distributed.fsdp_shards import Part, Routes
from signstep.distributed.simulation import SimulatedMean, SimulatedVote
from signstep.monitor import Monitor
from signstep.theory.noise import LAWS
from signstep.theory.problems import coupled_quadratic, run, separable_quadratic

SOURCE = Path(signstep.__file__).parent
CPU = torch.device("cpu")
FACTORIES = {f.__name__ for f in _device_constructors()}
WHOLE_NUMBERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
"""Factories whose dtype does not depend on the default; of arange, as long as it is given whole numbers."""


@pytest.mark.parametrize("room", ["optim", "kernels", "distributed", "monitor", "theory", "lab/training"])
def test_every_new_tensor_names_its_device_and_dtype(room: str) -> None:
    """A tensor without them would be wherever, and of whatever type, the user has said that theirs shall be."""
    assert {"tensor", "zeros", "empty", "full", "arange", "randn"} <= FACTORIES
    nameless = []
    for path in sorted((SOURCE / room).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=factory)) if factory in FACTORIES:
                    needed = {"device"} if factory in WHOLE_NUMBERS else {"device", "dtype"}
                    if not needed <= {keyword.arg for keyword in call.keywords}:
                        nameless.append(f"{path.relative_to(SOURCE)}:{call.lineno}: {ast.unparse(call)}")
    assert not nameless, "name their device (and dtype):\n" + "\n".join(nameless)


DEFAULTS: dict[str, tuple[str, torch.dtype]] = {
    "meta": ("meta", torch.float32),
    "float64": ("cpu", torch.float64),
    "bfloat16": ("cpu", torch.bfloat16),
}


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def equal_under_all_defaults(compute: Callable[[], Any]) -> None:
    expected = compute()
    for device, dtype in DEFAULTS.values():
        with defaults(device, dtype):
            found = compute()
        with defaults("cpu", torch.float32):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# --- Optimizers -------------------------------------------------------------------------------------------------------

RELATIVE = {"dither": 1.0, "dither_scale": "relative"}
CONFIGS: dict[str, tuple[type[SignSGD], dict[str, Any]]] = {
    "clean": (SignSGD, {}),
    "decay": (SignSGD, {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}),
    "dither": (SignSGD, {"dither": 0.01, "weight_decay": 0.1}),
    "post": (SignSGD, {"dither": 0.1, "dither_position": "post", **RELATIVE, "momentum": 0.0}),
    "relative, 8 bits": (SignSGD, {**RELATIVE, "state_dtype": torch.int8}),
    "relative, bf16": (SignSGD, {**RELATIVE, "state_dtype": torch.bfloat16}),
    "capturable": (SignSGD, {**RELATIVE, "capturable": True}),
    "lion, 8 bits": (Lion, {**RELATIVE, "state_dtype": torch.int8}),
    "hybrid": (HybridSignSGD, {"switch_step": 2, "sgd_momentum": 0.9}),
    "hybrid, ratio, 8 bits": (
        HybridSignSGD,
        {"switch_step": 2, "calibration": "ratio", "sgd_momentum": 0.9, "state_dtype": torch.int8, **RELATIVE},
    ),
    "hybrid, applied": (HybridSignSGD, {"calibration": "applied", "dither": 0.01, "capturable": True}),
}
ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True, "fused": False},
    "one by one": {"foreach": False, "fused": False},
}
every_config = pytest.mark.parametrize(("cls", "options"), CONFIGS.values(), ids=CONFIGS)
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(CPU).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=CPU)


def tensors_of(state: Any) -> dict[str, Tensor]:
    """All tensors in nested dicts and lists, by their path."""
    if isinstance(state, Tensor):
        return {"": state.detach().clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {f"{key}.{path}": x for key, value in items for path, x in tensors_of(value).items()}


@pytest.mark.slow
@every_config
@every_engine
def test_a_step_of_cpu_parameters_does_not_depend_on_the_defaults(
    cls: type[SignSGD], options: dict[str, Any], engine: dict[str, Any]
) -> None:
    """Two steps, saved and loaded into another optimizer, two more: parameters, state, and its devices and dtypes."""

    def train() -> dict[str, Tensor]:
        values = {"weight": numbers(30, 11), "bias": numbers(7, seed=1), "scalar": numbers(seed=2)}
        params = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        optimizer = cls(params.values(), lr=0.01, **options, **engine)
        for step in range(4):
            if step == 2:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = cls(params.values())
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            for i, p in enumerate(params.values()):
                p.grad = numbers(*p.shape, seed=10 * step + i)
            optimizer.step()
        return tensors_of(params) | tensors_of(optimizer.state_dict())

    equal_under_all_defaults(train)


@pytest.mark.slow
@every_config
@pytest.mark.parametrize("engine", [{}, {"foreach": False}], ids=["default", "one by one"])
@pytest.mark.parametrize("lr", [0.01, pytest.param(0.0, marks=pytest.mark.long)])
def test_a_model_on_meta_is_stepped_as_any(
    cls: type[SignSGD], options: dict[str, Any], engine: dict[str, Any], lr: float
) -> None:
    """As torch.optim.AdamW: nothing is computed, and everything that a parameter has is beside it."""
    with torch.device("meta"):
        model = nn.Linear(4, 3)
        optimizer = cls(model.parameters(), lr=lr, **options, **engine)
        for _ in range(4):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        other = cls(model.parameters(), **options, **engine)
        other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        assert int(each.param_groups[0]["step"].device.type == "meta") == options.get("capturable", False)
        assert all(x.is_meta for state in each.state.values() for x in state.values())


def test_a_step_at_rate_0_on_meta_is_taken() -> None:
    """Without state, such a step asks whether the gradients are 0, which gradients on meta do not tell."""
    with torch.device("meta"):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = SignSGD([p], lr=0.0)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


# --- Votes, monitor, theory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"error_feedback": True, "ties": "abstain", "dither_workers": "scaled"}])
def test_a_vote_does_not_depend_on_the_defaults(options: dict[str, Any]) -> None:
    def vote() -> dict[str, Tensor]:
        model = nn.Linear(1, 1, bias=False, device="cpu", dtype=torch.float32)
        model.weight = nn.Parameter(numbers(20, 13))
        optimizer = HybridSignSGD(model.parameters(), lr=0.01, switch_step=3, sgd_momentum=0.9, **RELATIVE)
        simulated = SimulatedVote(model, optimizer, world_size=4, **options)
        for step in range(4):
            simulated.vote([{"weight": numbers(20, 13, seed=10 * step + rank)} for rank in range(4)])
            optimizer.step()
        SimulatedMean(model, world_size=2).mean([{"weight": numbers(20, 13)}, None])
        assert model.weight.grad is not None
        workers = [worker.state_dict() for worker in simulated.workers]
        return tensors_of([model.weight, model.weight.grad, optimizer.state_dict(), workers])

    equal_under_all_defaults(vote)


def test_the_layout_of_messages_does_not_depend_on_the_defaults() -> None:
    def lay_out() -> list[Tensor]:
        blocks._table.cache_clear()
        layout = blocks.Layout([3000, 5, 1024], [0, 3, 4], 2, 1, CPU)
        wire = layout.wire(1, 4, dealt=True)
        rows = layout.all.clear(numbers(layout.rows, blocks.BLOCK))
        words = rows[:, : wire.width].contiguous().view(torch.int32)
        parts: list[Any] = [Part("a", nn.Parameter(rows), 1000, 512), Part("b", nn.Parameter(rows), 100, 50)]
        return [
            *Routes.of(parts, 2, CPU),
            rows,
            wire.send(words),
            wire.place(wire.send(words)),
            blocks.unpack(blocks.pack(words.view(torch.uint8) & 15, 4), tuple(map(float, range(16)))),
            random_integers([2, 1], [0, 5], 256, seed=3, rank=1, step=2, device=CPU),
        ]

    equal_under_all_defaults(lay_out)


def test_the_monitor_does_not_depend_on_the_defaults() -> None:
    def watch() -> dict[str, Any]:
        model = nn.Linear(40, 10, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            model.weight.copy_(numbers(10, 40))
            model.bias.zero_()
        optimizer = SignSGD(model.parameters(), **RELATIVE)
        monitor = Monitor(model, optimizer, every=1, coordinates=300)
        for step in range(2):
            optimizer.zero_grad()
            for part in range(8):
                (model(numbers(4, 40, seed=10 * step + part)).square().mean() / 8).backward()
            optimizer.step()
        assert monitor.last is not None
        return {name: value for name, value in monitor.last.items() if name not in ("time", "seconds")}

    def compared() -> str:
        return repr(watch())

    expected = compared()
    for device, dtype in DEFAULTS.values():
        with defaults(device, dtype):
            found = compared()
        assert found == expected


@pytest.mark.parametrize("law", LAWS)
def test_theory_does_not_depend_on_the_defaults(law: str) -> None:
    def compute() -> list[Tensor]:
        snr = numbers(9).abs()
        found = [LAWS[law].failure(snr), LAWS[law].sample((50,), torch.Generator(CPU).manual_seed(4))]
        for problem in (separable_quadratic(5, law=LAWS[law]), coupled_quadratic(5, law=LAWS[law])):
            generator = torch.Generator(CPU).manual_seed(1)
            path = run(problem, steps=4, batch_size=2, lr=0.02, dither_std=0.1, generator=generator)
            found += [path.values, path.phi, path.l1]
        return found

    equal_under_all_defaults(compute)

"""The Triton engine proves itself: it must do on a device what plain torch does, before its first step there counts.

What a kernel does, the device's compiler and driver decide as well, which its authors have not seen. So a small step of
every kind is taken on the device and, in plain torch, on the CPU. All that the two write is compared, the gaps between
the tensors too: momenta and gradients bit for bit; parameters also, but for one dithered decision, or the rounding of
noise after the sign and of SGD; sums to 1e-5.

A process asks once per device. That the two agree is also kept in a file, by what the answer depends on: the names of
the device and its driver, the versions of torch and Triton, and the engine's source. That they do not is forgotten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from signstep.kernels.engine import Direction, Measured, Options, Tensors
from signstep.kernels.momentum import BLOCK
from signstep.kernels.plain import multi_tensor_step

_SIZES = (1, 255, 0, 256, 257, 2300)
"""Of the tensors of each case: less and more than a row of 256, and than the block of a program."""
_GAP = 16
"""Elements between two tensors, at least; each begins at a multiple of as many."""

FOUND: dict[torch.device, str | None] = {}
"""What `failure` has found on each device."""


def failure(engine: Any, device: torch.device) -> str | None:
    """Why an engine's step must not be taken on a device, one sentence; None if it does there what plain torch does.

    It is asked once per process and device; random states stay as they are, and the work is on the current stream.

    Args:
        engine: the module of the Triton kernels, of which `step` is checked.
        device: of the tensors to step.
    """
    if device in FOUND:
        return FOUND[device]
    known = _Known(engine, device)
    found = None
    if not known.is_kept():
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return (
                f"the Triton kernels have not been compared with plain torch on {device} yet, which cannot be done "
                "while a CUDA graph is captured: take a step before"
            )
        differs = difference(engine, device)
        if differs is None:
            known.keep()
        else:
            found = (
                f"the Triton kernels fail their self-check on {device}, {known.name} ({differs}): update Triton and "
                "the driver, or report it"
            )
    FOUND[device] = found
    return found


# --- what is known of a kind of device -------------------------------------------------------------------------------


class _Known:
    """The file that says that the engine agrees with plain torch on this kind of device.

    Where there can be none, there is none: the check is made anew.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._record: dict[str, str | None] = {}
        self._path: Path | None = None
        with contextlib.suppress(OSError, RuntimeError):  # the source is in an archive; nobody has a home
            self._record = {
                "device": self.name,
                "driver": driver(),
                "torch": str(torch.__version__),
                "triton": engine.triton.__version__,
                "interpreter": os.environ.get("TRITON_INTERPRET"),
                "source": _digest(*(Path(__file__).with_name(name).read_bytes() for name in _SOURCES)),
            }
            cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
            cache = cache if cache.is_absolute() else Path.home() / ".cache"
            self._path = cache / "signstep" / f"triton-{_digest(self._text())[:16]}.json"

    def _text(self) -> bytes:
        return json.dumps(self._record, indent=1).encode() + b"\n"

    def is_kept(self) -> bool:
        """Whether there is a file, and it is whole."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                return self._path.read_bytes() == self._text()
        return False

    def keep(self) -> None:
        """Write the file: a reader sees all of it or nothing."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent)
            try:
                with open(handle, "wb") as file:
                    file.write(self._text())
                os.replace(temporary, self._path)
            except OSError:
                os.unlink(temporary)


_SOURCES = ("self_check.py", "triton.py", "triton_noise.py", "triton_tables.py")


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()


def driver() -> str | None:
    """The version of the GPUs' driver."""
    for driver in ("nvidia", "amdgpu"):
        with contextlib.suppress(OSError):
            return Path(f"/sys/module/{driver}/version").read_text().strip()
    get = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if get is None else str(get())


# --- the cases -------------------------------------------------------------------------------------------------------


class _Case(NamedTuple):
    """A step of one kind."""

    name: str
    dtype: torch.dtype
    changes: dict[str, Any]
    """Options that are not those of `_options`; "sums" is True where they are wanted."""
    relative: bool = False
    offset: int = 0
    shift: int = 0
    """Elements by which every tensor begins after a multiple of 16 bytes."""
    odd: bool = False
    """Some gradients are not finite."""
    on_device: bool = False
    """The numbers of the options are on the device."""


_FLOAT32, _FLOAT64, _BFLOAT16, _FLOAT16, _INT8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8
_PRE: dict[str, Any] = {"direction": Direction.PRE, "sigma": 0.1}
_POST: dict[str, Any] = {"direction": Direction.POST, "sigma": 0.3, "rate": 0.5}
_UNIFORM: dict[str, Any] = {"law": "uniform"}
_SGD: dict[str, Any] = {"direction": Direction.MOMENTUM, "rate": 0.5}
_RELATIVE: dict[str, Any] = {"direction": Direction.PRE, "sigma": 1.0}
_LION: dict[str, Any] = {"momentum": 0.99, "interpolation": 0.9}

_CASES = [
    _Case("float32", _FLOAT32, {}, odd=True),
    _Case("dither and weight decay", _FLOAT32, _PRE | {"decay": 0.9}, offset=16 * 2**31 - 16, odd=True),
    _Case(
        "relative dither of a shard, maximize, sums of expected signs",
        _FLOAT32,
        _RELATIVE | {"maximize": True, "momentum": 0.3, "sums": True, "measured": Measured.EXPECTED_SIGN},
        relative=True,
        offset=2**36 - 7,
        shift=1,
    ),
    _Case("expected sign, relative", _FLOAT32, _RELATIVE | {"direction": Direction.EXPECTED}, relative=True, odd=True),
    _Case("expected sign of uniform dither", _BFLOAT16, _PRE | _UNIFORM | {"direction": Direction.EXPECTED}, offset=13),
    _Case("uniform dither, relative", _FLOAT32, _RELATIVE | _UNIFORM | {"decay": 0.9}, relative=True, odd=True),
    _Case("uniform noise after the sign", _FLOAT32, _POST | _UNIFORM),
    _Case("noise after the sign, without momentum", _FLOAT32, _POST | {"momentum": 0.0, "decay": 0.9}, odd=True),
    _Case("8-bit momentum, sums", _FLOAT32, {"state_dtype": _INT8, "sums": True}),
    _Case("bfloat16 momentum of a shard", _FLOAT32, {"state_dtype": _BFLOAT16, "coupled_weight_decay": 0.1}, offset=13),
    _Case("bfloat16", _BFLOAT16, {"decay": 0.9}, odd=True),
    _Case(
        "bfloat16 to the nearest, 8-bit momentum, relative dither",
        _BFLOAT16,
        _RELATIVE | {"state_dtype": _INT8, "stochastic_params": False},
        relative=True,
        odd=True,
    ),
    _Case("float16, float32 momentum, dither", _FLOAT16, _PRE | {"state_dtype": _FLOAT32, "coupled_weight_decay": 0.1}),
    _Case("float64, dither, sums", _FLOAT64, _PRE | {"decay": 0.9, "sums": True}),
    _Case(
        "SGD with momentum",
        _FLOAT32,
        {"direction": Direction.MOMENTUM, "coupled_weight_decay": 0.1, "rate": 0.5},
        odd=True,
    ),
    _Case("sums of the momentum", _FLOAT32, {"sums": True, "measured": Measured.MOMENTUM}),
    _Case(
        "SGD with a rate for each tensor",
        _FLOAT32,
        {
            "direction": Direction.MOMENTUM,
            "rate": torch.tensor([0.5, 0.25, 1.0, 2.0, 0.1, 0.7], dtype=torch.float32, device="cpu"),
        },
    ),
    _Case("Lion, sums of the momentum", _FLOAT32, _LION | {"decay": 0.9, "sums": True, "measured": Measured.MOMENTUM}),
    _Case(
        "Lion of a shard with relative dither and 8-bit momentum",
        _BFLOAT16,
        _RELATIVE | _LION | {"state_dtype": _INT8},
        relative=True,
        offset=13,
        odd=True,
    ),
    _Case("Lion with bfloat16 momentum", _FLOAT16, _LION | {"interpolation": 0.3, "state_dtype": _BFLOAT16}),
    _Case("numbers on the device", _FLOAT32, _PRE | {"decay": 0.9}, on_device=True),
]


def _options(case: _Case) -> Options:
    options: dict[str, Any] = {
        "step": torch.tensor(2**31 + 5, dtype=torch.int64, device="cpu"),
        "rate": 0.013,
        "decay": 1.0,
        "coupled_weight_decay": 0.0,
        "momentum": 0.9,
        "state_dtype": None,
        "direction": Direction.SIGN,
        "sigma": None,
        "seed": 0x9E3779B97F4A7C15,
        "maximize": False,
    }
    options |= case.changes
    if options["sigma"] is not None:
        options["sigma"] = torch.tensor(options["sigma"], dtype=torch.float32, device="cpu")
    if options.pop("sums", False):
        options["sums"] = torch.ones(len(_SIZES), 2, dtype=torch.promote_types(case.dtype, torch.float32), device="cpu")
    return Options(**options)


def _on(device: torch.device, options: Options, *, numbers: bool) -> Options:
    """The options for a device: their sums there, and their numbers too if those are to be."""
    there: dict[str, Any] = {}
    if options.sums is not None:
        there["sums"] = options.sums.to(device, copy=True)
    if isinstance(options.rate, Tensor):
        there["rate"] = options.rate.to(device)
    if numbers:
        there |= {n: torch.tensor(getattr(options, n), dtype=torch.float64, device=device) for n in ("rate", "decay")}
        there |= {n: x.to(device) for n, x in (("step", options.step), ("sigma", options.sigma)) if x is not None}
    return options._replace(**there)


class _Buffers(NamedTuple):
    """The memory of all tensors of a case: they lie one after another, with gaps, in one buffer per column."""

    params: Tensor
    grads: Tensor
    exp_avgs: Tensor
    scales: Tensor
    mean_squares: Tensor

    def tensors(self, case: _Case, options: Options) -> Tensors:
        """The tensors that are in it."""
        count = len(_SIZES)
        keeps = options.momentum > 0
        return Tensors(
            list(_views(self.params, _SIZES, case.shift)),
            list(_views(self.grads, _SIZES, case.shift)),
            list(_views(self.exp_avgs, _SIZES, case.shift)) if keeps else [],
            list(_views(self.scales, _rows(), 0)) if options.state_dtype == torch.int8 else [],
            [x.view(()) for x in _views(self.mean_squares, [1] * count, 0)] if case.relative else [],
            [3, 2**20 + 1, 4, 5, 2**31 + 6, 7],
            [case.offset] * count,
        )


def _views(buffer: Tensor, sizes: Sequence[int], shift: int) -> Iterator[Tensor]:
    start = _GAP + shift
    for size in sizes:
        yield buffer[start : start + size]
        start += -(-size // _GAP) * _GAP + _GAP


def _rows() -> list[int]:
    return [-(-size // BLOCK) for size in _SIZES]


def _filled(case: _Case, options: Options) -> _Buffers:
    """Numbers that are the same each time. Every ninth momentum is exactly 0 and stays 0."""
    generator = torch.Generator("cpu").manual_seed(7)

    def numbers(sizes: Sequence[int]) -> Tensor:
        size = sum(-(-size // _GAP) * _GAP + _GAP for size in sizes) + 2 * _GAP
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")

    params, grads, exp_avgs = numbers(_SIZES), numbers(_SIZES) * 0.1 + 0.02, numbers(_SIZES) * 0.1 + 0.02
    if options.state_dtype == torch.int8:
        exp_avgs = (exp_avgs * 400).clamp(-127, 127)
    for x in (grads, exp_avgs):
        x[::9] = 0
    if case.odd:
        *_, odd, _ = _views(grads, _SIZES, case.shift)
        odd[2], odd[200], odd[256] = torch.nan, torch.inf, -torch.inf
    return _Buffers(
        params.to(case.dtype),
        grads.to(case.dtype),
        exp_avgs.to(options.state_dtype or case.dtype),
        numbers(_rows()).abs() * 1e-3 + 1e-4,
        numbers([1] * len(_SIZES)).abs() * 1e-2 + 1e-3,
    )


# --- the comparison --------------------------------------------------------------------------------------------------


def difference(engine: Any, device: torch.device) -> str | None:
    """In which case the engine does something else than plain torch, and how many numbers differ; None: in none."""
    with torch.inference_mode(False), torch.no_grad():
        for case in _CASES:
            try:
                found = _differing(engine, device, case)
            except Exception as error:  # whatever a compiler or a driver may raise
                first = str(error).strip().partition("\n")[0]
                found = f"{type(error).__name__}: {first}"
            if found is not None:
                return f"{case.name}: {found}"
    return None


def _differing(engine: Any, device: torch.device, case: _Case) -> str | None:
    options = _options(case)
    expected = _filled(case, options)
    actual = _Buffers(*(x.to(device, copy=True) for x in expected))
    requested = _on(device, options, numbers=case.on_device)
    multi_tensor_step(expected.tensors(case, options), options)
    engine.step(actual.tensors(case, requested), requested)
    # Noise after the sign and the product with the rate are rounded otherwise.
    decides = options.direction in (Direction.SIGN, Direction.PRE)
    columns = [
        ("parameters", actual.params, expected.params, 0.0 if decides else 1e-5),
        ("gradients", actual.grads, expected.grads, 0.0),
        ("momenta", actual.exp_avgs, expected.exp_avgs, 0.0),
        ("scales of the momentum", actual.scales, expected.scales, 0.0),
        ("mean squares", actual.mean_squares, expected.mean_squares, 1e-5),
    ]
    if options.sums is not None and requested.sums is not None:
        columns.append(("sums", requested.sums, options.sums, 1e-5))
    for name, x, y, tolerance in columns:
        a, b = x.cpu().double(), y.double()
        count = int((~torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)).sum())
        # Of 10^6 decisions, one may differ.
        if count > (name == "parameters" and options.direction is Direction.PRE):
            return f"{count} of {x.numel()} {name} differ from plain torch's"
    return None

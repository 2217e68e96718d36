"""Triton for the tests: on a GPU, else in its interpreter, which steps CPU tensors. Skips where there is neither."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_cases import DEVICE

ON_GPU = DEVICE.type == "cuda"
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from signstep.kernels import fused, self_check  # noqa: E402
from signstep.kernels import triton as engine  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and isinstance(tl.sum, triton.runtime.JITFunction):
    pytest.skip(
        "triton was imported before its interpreter was asked for: set TRITON_INTERPRET=1 in conftest.py",
        allow_module_level=True,
    )
if INTERPRETED and not hasattr(triton._C.libtriton.interpreter, "fma_fp32"):
    pytest.skip(f"the interpreter of Triton {triton.__version__} rounds an fma twice", allow_module_level=True)
if engine.unavailable() is not None:
    pytest.skip(str(engine.unavailable()), allow_module_level=True)


@contextmanager
def triton_steps_cpu_tensors() -> Iterator[None]:
    """Inside, Triton steps CPU tensors, without a self-check; the interpreter rounds to bfloat16 as a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

            cast = InterpreterBuilder.cast_impl

            def rounding_cast(self: Any, source: Any, to: Any) -> Any:
                if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
                    rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16).numpy()
                    return TensorHandle(rounded.view("uint16"), tl.bfloat16)
                return cast(self, source, to)

            # It truncates.
            patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
            patch.setitem(fused._ENGINES, "cpu", engine.__name__)
            patch.setattr(fused, "_SERVED", set())
            patch.setitem(self_check.FOUND, torch.device("cpu"), None)
        yield


def compiled_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: Any, warps: int) -> Any:
    """A kernel compiled for a target that need not be here."""
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: types[name] for name in kernel.signature.parameters}, constants, {})
    return triton.compile(source, target, {"num_warps": warps, "enable_fp_fusion": False})

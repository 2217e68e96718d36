"""The table of options against the constructors, and how long a gradient's way to the native engine is."""

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import signstep
from signstep import HybridSignSGD, Lion, SignSGD
from signstep.kernels import native


@pytest.mark.parametrize("cls", [SignSGD, HybridSignSGD, Lion])
def test_the_table_and_the_constructor_agree(cls: type[SignSGD]) -> None:
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in ("params", "self")
    }
    assert arguments == {name: option.default for name, option in cls.OPTIONS.items()}
    group = cls([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    assert {name: group[name] for name in cls.OPTIONS} == arguments


@pytest.mark.skipif(native.unavailable() is not None, reason="the native library is not built")
def test_a_gradient_reaches_the_native_engine_through_twelve_functions() -> None:
    params = [torch.nn.Parameter(torch.ones(64)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(64)
    optimizer = SignSGD(params)
    optimizer.step()
    called: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        ours = Path(code.co_filename).is_relative_to(Path(signstep.__file__).parent)
        if event == "call" and ours and not code.co_name.startswith("<"):
            called.add(code.co_qualname)

    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert len(called - {"SignSGD.finish_step"}) <= 12, sorted(called)

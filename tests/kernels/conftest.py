"""The two engines, for tests that ask the same of both."""

from collections.abc import Iterator

import pytest
from engine_cases import CPU, DEVICE, ENGINES, Engine

from signstep.kernels import native


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine that fused=True takes."""
    if request.param == "native":
        if (reason := native.unavailable()) is not None:
            pytest.skip(reason)
        yield Engine("native", native, CPU)
        return
    import triton_cases

    with triton_cases.triton_steps_cpu_tensors():
        yield Engine("triton", triton_cases.engine, DEVICE)

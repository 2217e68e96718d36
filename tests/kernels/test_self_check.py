"""The Triton engine's self-check: it lets the engine pass, catches what may be wrong with it, and is asked seldom."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from engine_cases import DEVICE
from triton_cases import engine, triton_steps_cpu_tensors

from signstep import SignSGD
from signstep.kernels import fused, self_check, triton_noise

CUDA = [torch.device("cuda", i) for i in range(2)]


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of what is known, which is empty."""
    start_anew(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused._warn_once.cache_clear()
    return tmp_path / "signstep"


# --- what it finds ----------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, str, str]] = {
    "the sign is flipped": ("triton", "tl.where(m > 0, 1.0, 0.0)", "-tl.where(m > 0, 1.0, 0.0)"),
    "zero is taken for +1": ("triton", "noisy = tl.where(narrow == 0, 0.0, noisy)", "noisy = noisy + 0.0"),
    "NaN is swallowed": ("triton", "direction = tl.fma(m, 0.0, signs)", "direction = signs"),
    "NaN is swallowed by dither": ("triton", "tl.fma(narrow, 0.0, noisy).to(WIDE)", "noisy.to(WIDE)"),
    "a block that is not full is not written": ("triton", "tl.store(address, value, mask=inside)", "pass"),
    "one element too many is written": ("triton", "inside = first + local < size", "inside = first + local <= size"),
    "the offset is ignored": ("triton", "element = tl.load(row + 6) + first", "element = first + 0"),
    "a shard's blocks of noise are taken for whole ones": (
        "triton",
        "aligned = offset % 16 == 0 or",
        "aligned = True or",
    ),
    "the ordinal is another": ("triton", "tl.load(row + 7).to(tl.uint32)", "tl.load(row + 7).to(tl.uint32) + 1"),
    "weight decay comes after the step": (
        "triton",
        "tl.fma(-rate, direction, p * decay)",
        "(p - rate * direction) * decay",
    ),
    "the seed's high word is dropped": ("triton_noise", "k1 = seed >> 32", "k1 = seed >> 64 - 1"),
    "a round of Philox is left out": ("triton_noise", "tl.static_range(10)", "tl.static_range(9)"),
    "the mean square is not written": (
        "triton",
        "tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), mean.to(tl.float32))",
        "pass",
    ),
    "the mean square is not read": ("triton", "sigma = sigma * tl.sqrt_rn(", "sigma = sigma * tl.abs("),
    "the sums are doubled": ("triton", "add_(totals.to(", "add_(totals.mul(2).to("),
    "the sums are of the first program": ("triton", "mine = start + lane < end", "mine = start + lane < begin + 1"),
    "the expected sign is the sign": ("triton", "tl.where(narrow == 0, 0.0, mean).to(WIDE)", "signs"),
    "uniform noise is Gaussian": ("triton", 'UNIFORM=options.law == "uniform"', "UNIFORM=False"),
    "the scale is another block's": ("triton", "first // 256, tl.float32, False)", "first // 2048, tl.float32, False)"),
    "rounding is to the nearest": ("triton", "((bits + random) >> 16)", "((bits + 0x8000) >> 16)"),
    "the momentum's weight is that of the gradient": (
        "triton",
        "weight=_bits(1 - options.momentum)",
        "weight=_bits(options.momentum)",
    ),
    "it descends instead of ascending": ("triton", "g = -g", "g = g + 0"),
    "coupled decay is ignored": ("triton", "g = tl.fma(coupled_decay, p, g)", "g = g + 0"),
    "the noise's tail is another": ("triton_noise", "tl.fma(far, x, 1.41659073)", "tl.fma(far, x, 1.4176)"),
    "float64 is computed in float32": (
        "triton",
        "wide = torch.promote_types(kind.dtype, torch.float32)",
        "wide = torch.float32",
    ),
    "the step count on the device is not read": (
        "triton",
        "else tl.load(step_at).to(tl.uint32)",
        "else step.to(tl.uint32)",
    ),
    "the gradient is overwritten": (
        "triton",
        "    if MAXIMIZE:\n",
        "    _store(grad_at, (g + 1).to(PARAM), inside, FULL)\n    if MAXIMIZE:\n",
    ),
    "a kernel does not compile": ("triton", "    chunk = tl.program_id(0)\n", "    chunk = tl.no_such_name(0)\n"),
}


def break_engine(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The engine, with a piece of its source replaced."""
    file, old, new = BROKEN[what]
    for module in (triton_noise, engine):
        name = module.__name__.rpartition(".")[2]
        source = Path(str(module.__file__)).read_text()
        if name == file:
            assert source.count(old) == 1
            source = source.replace(old, new)
        copy = folder / f"broken_{name}.py"
        copy.write_text(source.replace("from signstep.kernels.triton_noise ", "from broken_triton_noise "))
        spec = importlib.util.spec_from_file_location(copy.stem, copy)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, copy.stem, loaded)
        spec.loader.exec_module(loaded)
    if "on the device" in what:  # where the interpreter has nothing
        monkeypatch.setattr(sys.modules["broken_triton_noise"], "on_host", lambda x: not isinstance(x, torch.Tensor))
    return loaded


LONG = [
    "NaN is swallowed by dither",
    "a round of Philox is left out",
    "the mean square is not read",
    "the sums are of the first program",
    "the noise's tail is another",
    "float64 is computed in float32",
    "the step count on the device is not read",
]


@pytest.mark.slow
@pytest.mark.parametrize("what", [pytest.param(x, marks=pytest.mark.long) if x in LONG else x for x in BROKEN])
def test_a_broken_engine_is_caught(
    what: str, nothing_is_known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with triton_steps_cpu_tensors():
        start_anew(monkeypatch)
        found = self_check.failure(break_engine(what, tmp_path, monkeypatch), DEVICE)
    assert found is not None
    assert ("AttributeError" if "compile" in what else "differ from plain torch's") in found
    assert not nothing_is_known.exists()


@pytest.mark.slow
def test_the_engine_passes_and_random_states_stay(nothing_is_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    with triton_steps_cpu_tensors(), torch.inference_mode():
        start_anew(monkeypatch)
        assert self_check.failure(engine, DEVICE) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert len(list(nothing_is_known.iterdir())) == 1


def test_its_memory_is_small() -> None:
    for case in self_check._CASES:
        buffers = self_check._filled(case, self_check._options(case))
        assert sum(x.numel() * x.itemsize for x in buffers) < 1 << 17


# --- when it is asked -------------------------------------------------------------------------------------------------


class Asked:
    """In place of the comparison: the devices that were compared, and what is found on each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices: list[str] = []
        self.found: dict[str, str] = {}
        self.driver = "570.1"
        self.names = {"cuda:0": "one GPU", "cuda:1": "another GPU"}
        monkeypatch.setattr(self_check, "difference", self._difference)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: self.names[str(device)])
        monkeypatch.setattr(self_check, "driver", lambda: self.driver)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def _difference(self, engine: ModuleType, device: torch.device) -> str | None:
        self.devices.append(str(device))
        return self.found.get(str(device))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process knows."""
    monkeypatch.setattr(self_check, "FOUND", {})
    monkeypatch.setattr(fused, "_SERVED", set())


def test_what_passed_is_asked_once_for_all_processes(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert self_check.failure(engine, CUDA[0]) is None
    start_anew(monkeypatch)
    assert self_check.failure(engine, CUDA[0]) is None
    assert asked.devices == ["cuda:0"]


def test_what_failed_is_asked_once_per_process(
    asked: Asked, nothing_is_known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked.found["cuda:0"] = "dither: 3 of 9 parameters differ from plain torch's"
    for _ in range(2):
        assert self_check.failure(engine, CUDA[0]) == (
            "the Triton kernels fail their self-check on cuda:0, one GPU (dither: 3 of 9 parameters differ from plain "
            "torch's): update Triton and the driver, or report it"
        )
    start_anew(monkeypatch)
    asked.found.clear()
    assert self_check.failure(engine, CUDA[0]) is None
    assert asked.devices == ["cuda:0"] * 2
    assert len(list(nothing_is_known.iterdir())) == 1


@pytest.mark.parametrize("changed", ["device", "driver", "torch", "triton", "source", "interpreter"])
def test_it_is_asked_again_after_a_change(changed: str, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    self_check.failure(engine, CUDA[0])
    start_anew(monkeypatch)
    changes: dict[str, Callable[[], None]] = {
        "device": lambda: asked.names.update({"cuda:0": "a third GPU"}),
        "driver": lambda: setattr(asked, "driver", "570.2"),
        "torch": lambda: monkeypatch.setattr(torch, "__version__", "99.0"),
        "triton": lambda: monkeypatch.setattr(engine.triton, "__version__", "99.0"),
        "source": lambda: monkeypatch.setattr(self_check, "_SOURCES", ("triton.py",)),
        "interpreter": lambda: monkeypatch.setenv("TRITON_INTERPRET", "maybe"),
    }
    changes[changed]()
    self_check.failure(engine, CUDA[0])
    assert len(asked.devices) == 2


def test_a_damaged_file_is_ignored_and_replaced(
    asked: Asked, nothing_is_known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    self_check.failure(engine, CUDA[0])
    (path,) = nothing_is_known.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], b"\xff" + whole, b"[" * 100000):
        path.write_bytes(damaged)
        start_anew(monkeypatch)
        assert self_check.failure(engine, CUDA[0]) is None
        assert path.read_bytes() == whole
    assert len(asked.devices) == 5
    assert list(nothing_is_known.iterdir()) == [path]


def test_without_a_place_for_a_file_each_process_asks(
    asked: Asked, nothing_is_known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_known.write_text("a file in the folder's place")
    self_check.failure(engine, CUDA[0])
    monkeypatch.setenv("XDG_CACHE_HOME", "not absolute")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("nobody")))
    start_anew(monkeypatch)
    for _ in range(2):
        assert self_check.failure(engine, CUDA[0]) is None
    assert asked.devices == ["cuda:0"] * 2


def test_each_device_is_asked_unless_its_like_has_passed(asked: Asked) -> None:
    asked.found["cuda:1"] = "float32: 2 of 9 parameters differ from plain torch's"
    assert self_check.failure(engine, CUDA[0]) is None
    assert "cuda:1, another GPU (float32" in str(self_check.failure(engine, CUDA[1]))
    assert asked.devices == ["cuda:0", "cuda:1"]
    asked.names["cuda:2"] = "one GPU"
    assert self_check.failure(engine, torch.device("cuda", 2)) is None
    assert asked.devices == ["cuda:0", "cuda:1"]


def test_a_captured_graph_is_not_disturbed(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "while a CUDA graph is captured: take a step before" in str(self_check.failure(engine, CUDA[0]))
    assert not asked.devices
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert self_check.failure(engine, CUDA[0]) is None
    start_anew(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert self_check.failure(engine, CUDA[0]) is None


# --- which engine steps -----------------------------------------------------------------------------------------------


class Fake:
    """An engine for CPU tensors that counts its steps and takes none; the name of its module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        module = SimpleNamespace(unavailable=lambda: None, step=self._step, triton=engine.triton)
        monkeypatch.setitem(sys.modules, "fake_engine", module)
        for device_type in ("cpu", "meta"):
            monkeypatch.setitem(fused._ENGINES, device_type, "fake_engine")

    def _step(self, *_: object) -> None:
        self.steps += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def parameter(device: str = "cpu") -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones(3, device=device)
    return p


def test_a_proven_engine_is_the_default(asked: Asked, fake: Fake, recwarn: pytest.WarningsRecorder) -> None:
    optimizer = SignSGD([parameter()])
    for _ in range(2):
        optimizer.step()
    assert (fake.steps, asked.devices, len(recwarn)) == (2, ["cpu"], 0)


def test_by_default_plain_torch_does_the_work_of_one_that_failed(
    asked: Asked, fake: Fake, recwarn: pytest.WarningsRecorder
) -> None:
    asked.found["cpu"] = "dither: 3 of 9 parameters differ from plain torch's"
    p = parameter()
    for _ in range(2):
        SignSGD([p], lr=0.25 / 16).step()
    assert p.tolist() == [1 - 2 * 0.25 / 16] * 3
    assert (fake.steps, asked.devices) == (0, ["cpu"])
    (warning,) = recwarn
    assert "on cpu, cpu (dither: 3 of 9 parameters differ from plain torch's): update" in str(warning.message)
    assert "; until then the step is plain torch" in str(warning.message)


def test_who_demands_fused_kernels_is_refused_where_they_failed(
    asked: Asked, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = parameter()
    optimizer = SignSGD([p], fused=True)
    optimizer.step()
    start_anew(monkeypatch)
    asked.driver, asked.found = "570.2", {"cpu": "TypeError: no"}
    with pytest.raises(
        RuntimeError, match=r"Invalid fused: True, .* \(TypeError: no\): .*; pass fused=None to do without"
    ):
        optimizer.step()
    with pytest.raises(RuntimeError, match="TypeError: no"):
        SignSGD([p], fused=True)
    assert fake.steps == 1


def test_one_device_that_failed_is_enough(asked: Asked, fake: Fake) -> None:
    asked.found["meta"] = "float32: 1 of 9 parameters differ from plain torch's"
    with pytest.warns(UserWarning, match="fail their self-check on meta"):
        SignSGD([parameter(), parameter("meta")]).step()
    assert fake.steps == 0
    SignSGD([parameter()]).step()
    assert fake.steps == 1
    assert sorted(asked.devices) == ["cpu", "meta"]


@pytest.mark.parametrize("demanded", [None, True])
def test_a_compiled_step_asks_when_it_runs(
    demanded: bool | None, asked: Asked, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = parameter()
    optimizer = SignSGD([p], lr=0.25 / 16, fused=demanded)
    start_anew(monkeypatch)
    asked.devices.clear()
    asked.driver, asked.found = "570.2", {"cpu": "TypeError: no"}
    torch._dynamo.reset()
    step = torch.compile(inspect.unwrap(SignSGD.step), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        if demanded:
            with pytest.raises(RuntimeError, match="TypeError: no"):
                step(optimizer)
        else:
            with pytest.warns(UserWarning, match="TypeError: no"):
                step(optimizer)
            assert p.tolist() == [1 - 0.25 / 16] * 3
    assert (fake.steps, asked.devices) == (0, ["cpu"])

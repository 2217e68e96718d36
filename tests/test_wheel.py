"""The wheels: one for every Python, with the native library in it, and one of Python alone for other machines."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STEP = """
import torch, signstep
from pathlib import Path
p = torch.nn.Parameter(torch.ones(9)); p.grad = p.detach()
signstep.SignSGD([p], lr=0.01, fused={fused}, dither=0.1).step()
assert (p != 1).all()
print(Path(signstep.__file__).parent)
"""


def wheel(folder: Path, *options: str, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(folder), *options]
    made = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if "No matching distribution found for scikit-build-core" in made.stderr:
        pytest.skip("no network to get scikit-build-core from")
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.whl")
    return path


def step_without_compiler(path: Path, folder: Path, *, fused: bool) -> None:
    """Unpack a wheel and take a step with it, without any command on PATH."""
    zipfile.ZipFile(path).extractall(folder)
    torch_in = Path(torch.__file__).parents[1]
    # -S and -I leave out the folders where this checkout is installed.
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(torch_in)!r}]\n" + STEP.format(fused=fused)
    command = [sys.executable, "-I", "-S", "-c", code]
    environment = {"PATH": "", "HOME": os.environ.get("HOME", "/")}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(folder / "signstep")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks for a .so")
def test_a_wheel_has_the_native_library(tmp_path: Path) -> None:
    path = wheel(tmp_path / "wheels")
    assert path.name.split("-")[2:4] == ["py3", "none"]
    assert "linux" in path.name
    names = zipfile.ZipFile(path).namelist()
    assert {"signstep/py.typed", "signstep/kernels/libsignstep.so"} <= set(names)
    assert not [name for name in names if "csrc" in name]
    step_without_compiler(path, tmp_path / "unpacked", fused=True)


@pytest.mark.long
def test_a_wheel_of_python_alone_serves_every_machine(tmp_path: Path) -> None:
    path = wheel(tmp_path / "wheels", "--config-settings", "wheel.cmake=false")
    assert path.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(path).namelist()
    assert "signstep/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".dylib", ".cpp"))]
    step_without_compiler(path, tmp_path / "unpacked", fused=False)


@pytest.mark.long
def test_a_wheel_that_is_built_without_a_compiler_says_so_in_its_name(tmp_path: Path) -> None:
    path = wheel(tmp_path / "wheels", PATH=str(Path(sys.executable).parent), CXX="no-such-compiler")
    assert path.name.endswith("-py3-none-any.whl")
    step_without_compiler(path, tmp_path / "unpacked", fused=False)

"""Build what is published, check it, and try each wheel in a fresh environment that has no compiler: `make dist`.

dist/ gets the source archive, a wheel for this platform, repaired for manylinux on Linux, and the wheel of Python
alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"

_TRY = """
import torch, signstep
from signstep.kernels import native

p = torch.nn.Parameter(torch.ones(9))
p.grad = torch.ones(9)
signstep.SignSGD([p], lr=0.01, dither=0.1).step()
assert (p != 1).all()
reason = native.unavailable()
if {with_library}:
    assert reason is None, reason
    signstep.SignSGD([p], fused=True).step()
else:
    assert "was not built" in reason, reason
    try:
        signstep.SignSGD([p], fused=True)
    except RuntimeError as error:
        assert "was not built" in str(error), error
    else:
        raise AssertionError("fused=True did not say that there is no library")
print("signstep", signstep.__version__, "torch", torch.__version__, "library:", reason or "there")
"""


def main() -> None:
    """Build, check, try."""
    shutil.rmtree(DIST, ignore_errors=True)
    call(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    if sys.platform == "linux":
        (made,) = DIST.glob("*.whl")
        call(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, made)
        if len(list(DIST.glob("*.whl"))) > 1:
            made.unlink()
    call(sys.executable, "-m", "build", "--wheel", "-C", "wheel.cmake=false", "--outdir", DIST, ROOT)
    call(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    for wheel in sorted(DIST.glob("*.whl")):
        call(sys.executable, "-m", "check_wheel_contents", wheel)
        attempt(wheel)


def attempt(wheel: Path) -> None:
    """Install a wheel and what it needs where there is no compiler, and take steps with it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        commands = Path(folder, "Scripts" if os.name == "nt" else "bin")
        alone = os.environ | {"PATH": str(commands)}
        constraint = ROOT / "constraints.txt"
        call(commands / "python", "-m", "pip", "install", "--quiet", "--constraint", constraint, wheel, env=alone)
        code = _TRY.format(with_library="none-any" not in wheel.name)
        call(commands / "python", "-I", "-c", code, env=alone, cwd=folder)


def call(*command: object, env: dict[str, str] | None = None, cwd: object = ROOT) -> None:
    """Run a command; where it fails, stop with its exit status."""
    print("+", *("..." if "\n" in str(word) else word for word in command), flush=True)
    code = subprocess.run([str(word) for word in command], cwd=str(cwd), env=env, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()

"""What the project promises about itself: light import, clean code, runnable docstrings."""

import doctest
import importlib
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import signstep

ROOT = Path(__file__).parents[1]
PACKAGES = pkgutil.walk_packages(signstep.__path__, "signstep.")
MODULES = sorted(m.name for m in PACKAGES if not m.name.endswith(("__main__", "libsignstep")))


def test_import_takes_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import signstep; "
        "signstep.SignSGD, signstep.HybridSignSGD, signstep.Lion, signstep.optim, signstep.kernels; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = [n for n in loaded if n not in sys.stdlib_module_names and not n.startswith("_")]
    assert set(ours) <= {"signstep", "torch"}
    assert "signstep" in ours


@pytest.mark.slow
def test_core_does_not_import_the_lab() -> None:
    code = "import sys, signstep.optim, signstep.kernels.reference; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "signstep.lab" not in printed


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize(
    "command",
    [
        "ruff check",
        "ruff format --check",
        pytest.param("mypy", marks=pytest.mark.slow),
        "lint-imports --no-cache --no-logo",
    ],
    ids=["check", "format", "types", "imports"],
)
def test_lint(command: str) -> None:
    name, *options = command.split()
    script = shutil.which(name, path=sysconfig.get_path("scripts"))
    if script is None:
        pytest.skip(f"{name} is not installed")
    ran = subprocess.run([script, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_no_files_import_each_other_in_a_circle() -> None:
    """The contract in pyproject.toml looks at siblings; here a package's own __init__.py is a file among the others."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("signstep", cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imported) > 100
    TopologicalSorter(imported).prepare()  # raises an error that names the circle

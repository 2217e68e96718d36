"""The search for the native library, and files that no one may load."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from signstep import kernels
from signstep.kernels import native, shared_library

NAME = shared_library._NAME
WHOLE = next((p for folder in kernels.__path__ if (p := Path(folder) / NAME).exists()), Path(NAME))
needs_library = pytest.mark.skipif(not WHOLE.exists(), reason="the native library is not built")


def packaged(where: Path) -> Path:
    """A package `where`/other/kernels that has the module under test and nothing else; importing it needs no torch."""
    folder = where / "other" / "kernels"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    shutil.copy(shared_library.__file__, folder)
    return folder


def imported(monkeypatch: pytest.MonkeyPatch, *places: str) -> ModuleType:
    """That package's module, with these places first on sys.path."""
    monkeypatch.setattr(sys, "path", [*places, *sys.path])
    for name in [n for n in sys.modules if n.split(".")[0] == "other"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return importlib.import_module("other.kernels.shared_library")


@needs_library
@pytest.mark.parametrize("place", ["", "."])
def test_what_was_planted_in_the_working_directory_is_not_opened(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor in any other place on sys.path; beside the package's own files the same library is opened."""
    own, planted = packaged(tmp_path / "installed"), tmp_path / "cwd" / "other" / "kernels"
    planted.mkdir(parents=True)
    shutil.copy(WHOLE, planted)
    monkeypatch.chdir(tmp_path / "cwd")
    module = imported(monkeypatch, place, str(tmp_path / "installed"))
    with pytest.raises(OSError, match="was not built"):
        module.load(native._ABI)
    shutil.copy(WHOLE, own)
    assert Path(module.load(native._ABI)._name) == own / NAME


@needs_library
def test_an_editable_install_keeps_the_library_in_its_second_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As scikit-build-core does it: the sources stay where they are, and the package's path names both folders."""
    sources, built = packaged(tmp_path / "checkout"), tmp_path / "site-packages" / "other" / "kernels"
    built.mkdir(parents=True)
    shutil.copy(WHOLE, built)
    module = imported(monkeypatch, str(tmp_path / "checkout"))
    monkeypatch.setattr(sys.modules["other.kernels"], "__path__", [str(sources), str(built)])
    assert Path(module.load(native._ABI)._name) == built / NAME


@needs_library
def test_a_package_in_an_archive_says_that_its_library_cannot_be_loaded_from_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(WHOLE, packaged(tmp_path))
    archive = tmp_path / "wheel.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "other").rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    module = imported(monkeypatch, str(archive))
    with pytest.raises(OSError, match=rf"wheel\.zip.*{NAME} is in an archive.*: unpack the archive, or install"):
        module.load(native._ABI)


@needs_library
def test_a_library_of_another_kind_or_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = packaged(tmp_path)
    shutil.copy(WHOLE, folder)
    module = imported(monkeypatch, str(tmp_path))
    with pytest.raises(OSError, match=rf"{NAME} is of another version: install signstep again"):
        module.load(native._ABI + 1)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda path: object())  # the system's libraries have no such function
    with pytest.raises(OSError, match="is of another version"):
        module.load(native._ABI)


TRUNCATED = """
import sys
from pathlib import Path
from other.kernels.shared_library import load
whole, path, abi = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3])
size = len(whole)
for length in [*range(0, 600, 8), *range(600, size, 30011), *(size - n for n in (2000, 1000, 257, 64, 8, 1))]:
    path.unlink(missing_ok=True)
    path.write_bytes(whole[:length])
    try:
        load(abi)
    except OSError as error:
        assert f"{path} cannot be loaded (" in str(error), error
    else:
        raise SystemExit(f"a library of {length} bytes in place of {size} was loaded")
path.write_bytes(whole)
load(abi)
print("none was loaded")
"""


@needs_library
def test_a_truncated_library_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    """To open one ends the process by SIGBUS, so it is tried in another one."""
    folder = packaged(tmp_path)
    arguments = [sys.executable, "-c", TRUNCATED, str(WHOLE), str(folder / NAME), str(native._ABI)]
    ran = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.stdout == "none was loaded\n", (ran.returncode, ran.stdout, ran.stderr)

"""The file of the native engine's library: where it is, whether it is whole, and what to do if it cannot be loaded."""

from __future__ import annotations

import ctypes
import importlib.resources
import os
import struct
import sys

_NAME = "libsignstep.dylib" if sys.platform == "darwin" else "libsignstep.so"
_REMEDY = (
    "install a C++17 compiler (GCC or Clang), then signstep again from its source folder "
    "(pip install --force-reinstall --no-deps --no-cache-dir .)"
)


def load(abi: int) -> ctypes.CDLL:
    """Open the library.

    It is looked for in the folders of this package alone, which are two in an editable install. Never on all of
    sys.path: whatever lies in the working directory would run.

    Args:
        abi: version of the library's interface that the caller speaks.

    Raises:
        OSError: there is no library that can be used; one sentence that says why, and what to do.
    """
    package = __name__.rpartition(".")[0]
    folders = sys.modules[package].__path__
    path = next((p for p in (os.path.join(folder, _NAME) for folder in folders) if os.path.exists(p)), None)
    if path is None:
        packed = importlib.resources.files(package).joinpath(_NAME)
        if packed.is_file() and not isinstance(packed, os.PathLike):
            raise OSError(
                f"signstep's native library {packed} is in an archive, from which it cannot be loaded: "
                "unpack the archive, or install signstep"
            )
        raise OSError(f"signstep's native library was not built: {_REMEDY}")
    try:
        if _is_cut_short(path):
            raise OSError("the file is cut short")
        library = ctypes.CDLL(path)
    except OSError as error:
        raise OSError(f"signstep's native library {path} cannot be loaded ({error}): {_REMEDY}") from None
    if not hasattr(library, "signstep_abi") or library.signstep_abi() != abi:
        raise OSError(f"signstep's native library {path} is of another version: install signstep again")
    return library


def _is_cut_short(path: str) -> bool:
    """Whether a 64-bit ELF file ends before what its headers name.

    The loader maps pages beyond the end of such a file, and to touch one of them ends the process. Of other files it
    can tell by itself: what is not ELF it refuses on Linux, and macOS compares a library with the size of its file.
    """
    with open(path, "rb") as file:
        data = file.read()
    if not data.startswith(b"\x7fELF\x02"):
        return False
    try:
        order = {1: "<", 2: ">"}[data[5]]
        programs, sections = struct.unpack_from(order + "QQ", data, 32)
        program_size, program_count, section_size, section_count = struct.unpack_from(order + "HHHH", data, 54)
        ends = [programs + program_count * program_size, sections + section_count * section_size]
        for i in range(program_count):
            offset, _, _, size = struct.unpack_from(order + "QQQQ", data, programs + i * program_size + 8)
            ends.append(offset + size)
    except (IndexError, KeyError, struct.error):
        return True
    return any(end > len(data) for end in ends)

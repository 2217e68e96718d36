"""Reads the pickles of CIFAR's python layout, and runs nothing that a pickle asks for.

NumPy is not called while unpickling: the names below, those that an array of bytes needs, only record their arguments,
and any other name is refused. The arrays are made afterwards, from bytes whose type and length have been checked.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt

from signstep.lab.data.images import DataError


class _Dtype:
    """What `numpy.dtype(...)` was called with."""

    code: Any = None

    def __init__(self, *args: Any) -> None:
        self.code = args[0] if args else None

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: neither means anything for single bytes."""


class _Array:
    """What an array was made of."""

    parts: tuple[Any, Any, Any, Any] = (None, None, None, None)
    """Shape, dtype, whether in Fortran order, bytes."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.parts = (shape, dtype, fortran, raw)


def _reconstruct(*args: Any) -> _Array:
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.parts = (shape, dtype, order == "F", raw)
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"asks for the codec {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


# The unpickler written in Python: the one in C reserves as much memory as a damaged stream's numbers say.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"asks for {module}.{name}, which no array of bytes needs, so nothing of it was run"
            ) from None


def load_dict(raw: bytes, where: str) -> dict[bytes, Any]:
    """Unpickle a dictionary of plain values and byte arrays.

    Keys come as bytes, as Python 2 wrote them. An array comes as uint8 of its own shape. Raises DataError, naming
    `where`, if the pickle is damaged, asks for any other name, or holds another kind of array.
    """
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # the pickle module's documentation leaves open what a damaged stream raises
        raise DataError(f"{where} is not a readable pickle of CIFAR images: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise DataError(f"{where} holds a {type(content).__name__}, expected a dictionary")
    return {
        key.encode() if isinstance(key, str) else key: _to_numpy(value, where) if isinstance(value, _Array) else value
        for key, value in content.items()
    }


def _to_numpy(array: _Array, where: str) -> npt.NDArray[np.uint8]:
    shape, dtype, fortran, raw = array.parts
    code = dtype.code if isinstance(dtype, _Dtype) else None
    if code in (b"u1", "u1", b"|u1", "|u1") and isinstance(raw, (bytes, bytearray)) and isinstance(shape, tuple):
        flat = np.frombuffer(raw, dtype=np.uint8)
        try:
            return flat.reshape(shape, order="F" if fortran else "C")
        except (TypeError, ValueError):
            pass
    raise DataError(
        f"{where} holds an array of type {code!r} and shape {shape!r}, expected bytes (u1) filling its shape"
    )

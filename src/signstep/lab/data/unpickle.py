"""Reads the pickles of CIFAR's python layout, and runs nothing that a pickle asks for.

Python's own unpickler is not used. `pickletools` takes the file apart, and what is done for each of its instructions
is written here: those that plain values and arrays of bytes need, at most a million of them. The names that a pickle
asks for only record their arguments, and any other name is refused. The arrays are made afterwards, from bytes whose
type and length have been checked. Nothing is hashed or printed but text and numbers: a tuple may hold itself a
million times over.
"""

from __future__ import annotations

import itertools
import math
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from signstep.lab.data.images import DataError

_MOST_INSTRUCTIONS = 1_000_000
"""A part of CIFAR-100 with 50,000 images needs 600,000 at most."""
_SHOWN = 300
"""Characters of a reason that are shown."""


class _Refused(Exception):
    """A pickle that is damaged, or no dictionary of values and arrays of bytes."""


class _Dtype:
    """What `numpy.dtype(...)` was called with."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def build(self, state: Any) -> None:
        """Byte order and alignment: neither means anything for single bytes."""


class _Array:
    """What an array was made of."""

    parts: tuple[Any, Any, Any, Any] = (None, None, None, None)
    """Shape, dtype, whether in Fortran order, bytes."""

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.parts = (shape, dtype, fortran, raw)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.parts = (shape, dtype, order == "F", raw)
    return array


_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_PUSHED = frozenset((*_NUMBERS, *_TEXTS, "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MADE: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Reader:
    """Does the instructions of one pickle."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._encoded = raw, 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        """The stacks below each open mark."""
        self._memo: dict[int, Any] = {}
        self._names: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): self._encode,
        }
        for core in ("numpy.core", "numpy._core"):
            self._names[f"{core}.multiarray", "_reconstruct"] = _reconstruct
            self._names[f"{core}.numeric", "_frombuffer"] = _frombuffer

    def read(self) -> Any:
        for opcode, argument, _ in itertools.islice(pickletools.genops(self._raw), _MOST_INSTRUCTIONS):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._do(opcode.name, argument)
        raise _Refused(f"it has more than {_MOST_INSTRUCTIONS:,} instructions")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("SHORT_BINSTRING", "BINSTRING"):  # text of Python 2, which pickletools takes for Latin-1
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            self._stack = self._below.pop()
            self._take(name, stack)
        elif name == "APPEND":
            self._take("APPENDS", self._pop(1))
        elif name == "SETITEM":
            self._take("SETITEMS", self._pop(2))
        elif name == "GLOBAL":
            stack.append(self._name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._name(*self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            if not callable(function) or not isinstance(arguments, tuple):
                raise _Refused("it calls what is no function")
            stack.append(function(*arguments) if name == "REDUCE" else function())
        elif name == "BUILD":
            (state,) = self._pop(1)
            if not isinstance(stack[-1], (_Array, _Dtype)):
                raise _Refused("it changes what is no array")
            stack[-1].build(state)
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"it has the instruction {name}, which no array of bytes needs")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise _Refused("it takes more values than it has given")
        popped = self._stack[-count:]
        del self._stack[-count:]
        return popped

    def _take(self, name: str, items: list[Any]) -> None:
        """Make a container of items, or add them to the one on top of the stack."""
        stack = self._stack
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "LIST":
            stack.append(items)
        elif name == "APPENDS":
            if type(stack[-1]) is not list:
                raise _Refused("it adds an item to what is no list")
            stack[-1].extend(items)
        else:
            if name == "DICT":
                stack.append({})
            keys, values = items[::2], items[1::2]
            if type(stack[-1]) is not dict or not all(type(key) in (bytes, str) for key in keys):
                raise _Refused("it has a key that is not text")
            stack[-1].update(zip(keys, values, strict=True))

    def _name(self, module: Any, name: Any) -> Callable[..., Any]:
        if type(module) is not str or type(name) is not str:
            raise _Refused("it asks for a name that is not text")
        if (module, name) not in self._names:
            raise _Refused(f"asks for {module}.{name}, which no array of bytes needs, so nothing of it was run")
        return self._names[module, name]

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or type(encoding) is not str:
            raise _Refused("it encodes what is not text")
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"asks for the codec {encoding!r}")
        self._encoded += len(text)
        if self._encoded > len(self._raw):
            raise _Refused("it has more text than bytes")
        return text.encode("latin-1")


def load_dict(raw: bytes, where: str) -> dict[bytes, Any]:
    """Read a pickled dictionary of plain values and byte arrays.

    Keys come as bytes, as Python 2 wrote them. An array comes as uint8 of its own shape. Raises DataError, naming
    `where`, if the pickle is damaged, asks for any other name, or holds another kind of array.

    >>> import pickle
    >>> load_dict(pickle.dumps({"labels": [3, 1]}), "here")
    {b'labels': [3, 1]}
    """
    try:
        content = _Reader(raw).read()
    except Exception as error:  # pickletools' documentation leaves open what a damaged stream raises
        reason = (str(error) or type(error).__name__)[:_SHOWN]
        raise DataError(f"{where} is not a readable pickle of CIFAR images: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{where} holds a {type(content).__name__}, expected a dictionary")
    return {
        key.encode(errors="replace") if isinstance(key, str) else key: (
            _to_numpy(value, where) if isinstance(value, _Array) else value
        )
        for key, value in content.items()
    }


def _to_numpy(array: _Array, where: str) -> npt.NDArray[np.uint8]:
    shape, dtype, fortran, raw = array.parts
    code = dtype.code if isinstance(dtype, _Dtype) else None
    code = code if isinstance(code, (bytes, str)) else None
    sizes = shape if isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int for n in shape) else None
    of_bytes = code in (b"u1", "u1", b"|u1", "|u1") and isinstance(raw, (bytes, bytearray))
    if of_bytes and sizes is not None and all(0 <= n <= len(raw) for n in sizes) and math.prod(sizes) == len(raw):
        return np.frombuffer(raw, dtype=np.uint8).reshape(sizes, order="F" if fortran else "C")
    found = f"array of type {code and code[:20]!r} and shape {sizes if sizes else 'unknown'}"[:_SHOWN]
    raise DataError(f"{where} holds an {found}, expected bytes (u1) filling its shape")

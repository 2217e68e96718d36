"""Pickles that hold a batch of CIFAR are read, and nothing that a pickle asks for is run."""

import contextlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signstep.lab.data import DataError
from signstep.lab.data.unpickle import load_dict


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes that Python 2's cPickle with its NumPy wrote, as the official files have them: byte strings."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    raw = data.tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R" + b"(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01" + b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    state += dtype + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R" + state + b"b"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def test_the_pickles_of_python_2_are_read() -> None:
    data = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
    content = load_dict(python2_pickle(data, [3, 1, 4, 1, 5, 9, 2]), "here")
    assert np.array_equal(content[b"data"], data)
    assert content[b"labels"] == [3, 1, 4, 1, 5, 9, 2]


class Calls:
    """Pickled, a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, os.mkdir, getattr, np.load, np.memmap, torch.load, bytearray, print, __import__]
)
def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(
    function: Callable[..., Any], protocol: int, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    argument = {os.system: f"touch {canary}", os.mkdir: str(canary)}.get(function, f"open({str(canary)!r}, 'w')")
    raw = pickle.dumps({b"data": Calls(function, argument)}, protocol=protocol)
    with pytest.raises(DataError, match=r"batch_7 is not a readable pickle of CIFAR images: asks for .*nothing of it"):
        load_dict(raw, "batch_7")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a readable pickle"),
        (b"\x00" * 100, "not a readable pickle"),
        (b"\x80\x02}(U\x04da", "not a readable pickle"),
        (pickle.dumps([1, 2]), "holds a list, expected a dictionary"),
        (pickle.dumps({"data": np.zeros(4, dtype=np.int64)}), "array of type 'i8' .* expected bytes"),
        (pickle.dumps({"data": np.array([{}], dtype=object)}), "array of type 'O8' .* expected bytes"),
        (b"\x80\x02}U\x01dcnumpy\nndarray\n)Rs.", "array of type None .* expected bytes"),
        (b"\x80\x02}U\x01dc_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86Rs.", "the codec 'zlib'"),
        (b"\x80\x02}U\x01dcnumpy\nndarray\n)\x81s.", "array of type None .* expected bytes"),
        # memory asked for by a number in the stream: 2^62 bytes
        (b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x40.", "not a readable pickle"),
        # an array whose state says more than its bytes
        (python2_pickle(np.zeros((3, 4), np.uint8), [1]).replace(b"M\x03\x00", b"M\x04\x00"), "filling its shape"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_pickle_is_one_clear_error(raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"batch_7 .*{message}"):
        load_dict(raw, "batch_7")


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), min_size=1, max_size=4))
def test_no_damage_to_a_pickle_gives_another_error(writer: int, changes: list[tuple[int, bytes]]) -> None:
    data = np.arange(15, dtype=np.uint8).reshape(3, 5)
    content = {b"data": data, b"labels": [1, 2, 3]}
    raw = bytearray(python2_pickle(data, [1, 2, 3]) if writer == 6 else pickle.dumps(content, protocol=writer))
    for at, new in changes:
        raw[at : at + len(new)] = new
    with contextlib.suppress(DataError):
        load_dict(bytes(raw), "here")

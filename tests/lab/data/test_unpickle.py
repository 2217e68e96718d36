"""Pickles that hold a batch of CIFAR are read, and nothing that a pickle asks for is run."""

import contextlib
import itertools
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
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


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


DOUBLED = b"(t" + b"q\x00h\x00\x86" * 100  # ((), ()), then a pair of that, and so on: 2^100 leaves
PAIRED_BY_COPY = b"(t" + b"2\x86" * 100
DEEP = b")" + b"\x85" * 200_000
EMPTY_ARRAY = b"cnumpy\nndarray\n)R"
DTYPE = b"cnumpy\ndtype\n" + text("u1") + b"\x85R"


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x80\x04}" + DOUBLED + b"Ns.", "a key that is not text"),
        (b"\x80\x04}(" + DOUBLED + b"Nu.", "a key that is not text"),
        (b"\x80\x04(" + DOUBLED + b"Nd.", "a key that is not text"),
        (b"\x80\x04}" + DEEP + b"Ns.", "a key that is not text"),
        (b"\x80\x04}" + PAIRED_BY_COPY + b"Ns.", "the instruction DUP"),
        (b"\x80\x04" + DOUBLED + b".", "holds a tuple"),
        (b"\x80\x04" + DEEP + b".", "holds a tuple"),
        # a shape, a type, bytes and a codec that are such tuples
        (b"}X\1\0\0\0d" + EMPTY_ARRAY + b"(K\1" + DOUBLED + DTYPE + b"\x89C\0tbs.", "type 'u1' and shape unknown"),
        (b"}X\1\0\0\0d" + EMPTY_ARRAY + b"(K\1)cnumpy\ndtype\n" + DOUBLED + b"\x85R\x89C\0tbs.", "type None"),
        (b"}X\1\0\0\0d" + EMPTY_ARRAY + b"(K\1)" + DTYPE + b"\x89" + DOUBLED + b"tbs.", "expected bytes"),
        (b"c_codecs\nencode\nX\1\0\0\0a" + DOUBLED + b"\x86R.", "encodes what is not text"),
        # shapes that no array has
        (b"}X\1\0\0\0d" + EMPTY_ARRAY + b"(K\1K\0\x8a\6" + b"\xff" * 5 + b"\0\x86" + DTYPE + b"\x89C\0tbs.", "filling"),
        (b"}X\1\0\0\0d" + EMPTY_ARRAY + b"(K\1J\xff\xff\xff\xff\x85" + DTYPE + b"\x89C\4abcdtbs.", "filling its shape"),
        # a number of instructions, of places, and of texts that no set needs
        (b"N\x94" * 500_001 + b".", "more than 1,000,000 instructions"),
        (
            b"c_codecs\nencode\nq\0" + text("a" * 9000) + text("latin1") + b"\x86q\2](" + b"h\0h\2R" * 99 + b"e.",
            "more text than bytes",
        ),
        # what our stand-ins for numpy must not let change
        (b"c_codecs\nencode\n}X\1\0\0\0aNsb.", "changes what is no array"),
        (b"}X\1\0\0\0d" + b"\x8bx\1\0\0" + b"\xff" * 376 + b"s.", "the instruction LONG4"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_pickle_that_wants_all_of_the_machine_is_refused_at_once(raw: bytes, message: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError, match=f"batch_7 .*{message}") as refused:
        load_dict(raw, "batch_7")
    assert time.process_time() - started < 4
    assert len(str(refused.value)) < 500


def test_a_key_that_is_no_unicode_is_read() -> None:
    assert list(load_dict(b"\x80\x04}X\3\0\0\0\xed\xa0\x80Ns.", "batch_7")) == [b"?"]


@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), min_size=1, max_size=4))
def test_no_damage_to_a_pickle_gives_another_error(writer: int, changes: list[tuple[int, bytes]]) -> None:
    data = np.arange(15, dtype=np.uint8).reshape(3, 5)
    content = {b"data": data, b"labels": [1, 2, 3]}
    raw = bytearray(python2_pickle(data, [1, 2, 3]) if writer == 6 else pickle.dumps(content, protocol=writer))
    for at, new in changes:
        raw[at : at + len(new)] = new
    with contextlib.suppress(DataError):
        load_dict(bytes(raw), "here")

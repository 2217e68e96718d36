"""Texts, as bytes: the King James Bible out of Debian's package, tiny Shakespeare, and any file.

A text is cut once, in the order of its bytes: the last tenth is the test part, the tenth before it is held out for
tuning, and the rest is to train on. So the parts differ in style as a book's end does from its beginning.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from signstep.lab.data.debian import unpack_package
from signstep.lab.data.fetch import Archive, download
from signstep.lab.data.images import DataError

SHAKESPEARE = Archive(
    "input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
)
FILES = {"bible": "bible.data", "shakespeare": SHAKESPEARE.file}
"""The file that a data set lies in, by the data set's name."""

_FEWEST = 10
"""Bytes of the shortest text that has a test part."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text, whole and in memory, cut into three parts: uint8 [N] each, N > 0.

    `train` and `validation` together are what a final run trains on. `source` says where the text was found, `sha256`
    is that of its bytes, all parts in order.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    source: str
    sha256: str

    @classmethod
    def cut(cls, name: str, content: bytes, source: str) -> Text:
        """The text that has this content: its last tenth (rounded down) to test, as much before it to validate.

        Raises:
            DataError: fewer than ten bytes.

        >>> text = Text.cut("text", bytes(range(100)), "here")
        >>> len(text.train), text.validation[0].item(), text.test[0].item()
        (80, 80, 90)
        """
        if len(content) < _FEWEST:
            found = f"only {len(content)} bytes" if content else "no bytes"
            raise DataError(f"{name}: {source} has {found}, expected a text of at least {_FEWEST}")
        part = len(content) // 10
        whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        train, validation, test = torch.split(whole, [len(content) - 2 * part, part, part])
        return cls(name, train, validation, test, source, hashlib.sha256(content).hexdigest())


def split_text(text: Text, split: Literal["tune", "final"], subset: int | None = None) -> tuple[Tensor, Tensor]:
    """The bytes to train on and those to evaluate on, uint8 [N] each.

    "tune": `train`, and `validation`; "final": `train` and `validation`, and `test`. `subset` keeps the first so many
    bytes to train on, the same ones in both splits.

    Raises:
        DataError: a subset that is larger than the part to train on.
    """
    if split not in ("tune", "final"):
        raise DataError(f"split={split!r}: expected tune or final")
    if split == "tune":
        train, evaluation = text.train, text.validation
    else:
        train, evaluation = torch.cat([text.train, text.validation]), text.test
    if subset is not None and not 1 <= subset <= len(train):
        raise DataError(f"subset={subset}: {text.name} has 1..{len(train)} training bytes in split {split}")
    return train[:subset], evaluation


def find(name: str, place: Path) -> Path | None:
    """The file of a data set in `place` or in a folder of the set's name in it, if there is one."""
    return next((p for p in (place / name / FILES[name], place / FILES[name]) if p.is_file()), None)


def fetch(name: str, place: Path) -> Path:
    """Put the file of a data set into a folder of its name in `place`; its path.

    Raises:
        DataError: it could not be had.
    """
    if name == "bible":
        unpack_package("bible-kjv-text", "usr/lib", place / name)
        return place / name / FILES[name]
    return download(SHAKESPEARE, place / name)


def read(name: str, path: Path) -> Text:
    """The text in a file of a data set, or in any file where `name` is "text".

    Raises:
        DataError: the file is missing, damaged, of another data set or too short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: {path} cannot be read ({error.strerror})") from error
    if name == "bible":
        content = unsquish(content, f"{name}: {path}")
    elif name == "shakespeare" and hashlib.sha256(content).hexdigest() != SHAKESPEARE.digest:
        raise DataError(f"{name}: {path} is another file, or damaged; remove it and fetch it again")
    return Text.cut(name, content, str(path))


_MAGIC = b"EC02"
_HEADER = 0x54
"""Bytes before the size and the number of windows."""


def unsquish(content: bytes, where: str) -> bytes:
    """The text in a file of the Bible Retrieval System (Chapin, 1989), which Debian's package bible-kjv-text has.

    Such a file is "EC02", a title, and at byte 84 big-endian uint32: the size of a window, the number of windows, and
    where in the file each begins. A window is that much of the text (the last one: the rest), as Unix's compress
    writes it with 16 bits and block mode but without its three magic bytes.

    Args:
        content: of the file.
        where: begins the message of an error.

    Raises:
        DataError: another format, or a window of another length.
    """
    try:
        if not content.startswith(_MAGIC):
            raise ValueError(f"it starts with {content[:4].hex() or 'nothing'}, expected {_MAGIC.hex()}")
        size, count = struct.unpack_from(">II", content, _HEADER)
        starts = (*struct.unpack_from(f">{count}I", content, _HEADER + 8), len(content))
        windows = [uncompress(content[a:b], size) for a, b in pairwise(starts)]
        if not windows or any(len(window) != size for window in windows[:-1]):
            raise ValueError("a window of another length")
    except (ValueError, struct.error) as error:
        raise DataError(f"{where} is not what Debian's bible-kjv-text has ({error}); fetch it again") from error
    return b"".join(windows)


_CLEAR, _FEWEST_BITS, _MOST_BITS = 256, 9, 16


def uncompress(packed: bytes, size: int) -> bytes:
    """The first `size` bytes of what Unix's compress packed (Welch, 1984, "A technique for high-performance data
    compression"), from after its magic bytes.

    Codes of 9 bits, then of one more each time that the table has outgrown them, to 16; code 256 empties the table.
    Codes are written in groups of eight: where their length changes, the rest of a group is left out.

    Raises:
        ValueError: a code that the table does not have.
    """
    table = [bytes([i]) for i in range(256)] + [b""]
    out = bytearray()
    length, at, group = _FEWEST_BITS, 0, 0  # in bits, each code from the low end of its first byte
    before = b""
    while at + length <= 8 * len(packed) and len(out) < size:
        code = int.from_bytes(packed[at >> 3 : (at >> 3) + 3], "little") >> (at & 7) & ((1 << length) - 1)
        at += length
        cleared = code == _CLEAR
        if cleared:
            del table[_CLEAR + 1 :]
            before = b""
        else:
            if code > len(table) or (code == len(table) and not before):
                raise ValueError(f"code {code} where there are {len(table)}")
            entry = table[code] if code < len(table) else before + before[:1]
            out += entry
            if before and len(table) < 1 << _MOST_BITS:
                table.append(before + entry[:1])
            before = entry
        if cleared or (len(table) >= 1 << length and length < _MOST_BITS):
            at = group - (group - at) // (8 * length) * 8 * length
            length, group = _FEWEST_BITS if cleared else length + 1, at
    return bytes(out[:size])

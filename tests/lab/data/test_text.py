"""Texts: Debian's squished Bible, a file that is checked by its digest, any file, and how they are cut."""

import hashlib
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signstep.lab.data import DataError, catalog, load_text, split_text, text
from signstep.lab.data.text import Text, uncompress, unsquish


def squish(windows: list[bytes], size: int) -> bytes:
    """The windows, packed, in a file as Debian's package has it."""
    place = 0x54 + 8 + 4 * len(windows)
    starts = [place + sum(map(len, windows[:i])) for i in range(len(windows))]
    head = b"EC02Compressed Data File".ljust(0x54, b"\0") + struct.pack(">II", size, len(windows))
    return head + struct.pack(f">{len(starts)}I", *starts) + b"".join(windows)


def compress(content: bytes) -> bytes:
    """Unix's compress without its magic bytes, with codes of 9 bits alone and a clear code before they run out."""
    codes, room = [], 0
    for byte in content:
        if room == 250:
            codes += [256] + [0] * (-(len(codes) + 1) % 8)  # the rest of a group is left out
            room = 0
        codes.append(byte)
        room += 1
    number = sum(code << (9 * i) for i, code in enumerate(codes))
    return number.to_bytes(-(-9 * len(codes) // 8), "little")


@given(st.binary(max_size=2000))
def test_unpacking_undoes_packing(content: bytes) -> None:
    assert uncompress(compress(content), len(content)) == content


@pytest.mark.skipif(shutil.which("compress") is None, reason="needs Unix's compress")
@given(st.lists(st.sampled_from([b"the ", b"of ", b"\0", b"and he said "]), max_size=3000))
def test_unpacking_undoes_unixs_compress(words: list[bytes]) -> None:
    content = b"".join(words)
    packed = subprocess.run(["compress", "-cf"], input=content, capture_output=True, check=False).stdout
    assert uncompress(packed[3:], len(content)) == content


def test_a_code_that_stands_for_what_it_begins() -> None:
    """abababa: the third code is the entry that it makes; computed by hand."""
    codes = [97, 98, 257, 259]
    packed = sum(code << (9 * i) for i, code in enumerate(codes)).to_bytes(5, "little")
    assert uncompress(packed, 7) == b"abababa"
    with pytest.raises(ValueError, match="code 300 where there are 257"):
        uncompress((97 | 300 << 9).to_bytes(3, "little"), 7)


def test_windows_are_joined_and_a_short_one_is_damage() -> None:
    parts = [b"In the be", b"ginning G", b"od"]
    assert unsquish(squish([compress(part) for part in parts], 9), "here") == b"".join(parts)
    parts[0] = b"In the"
    damaged = squish([compress(part) for part in parts], 9)
    for content, why in ((damaged, "a window of another"), (b"", "starts with nothing"), (damaged[:90], "unpack")):
        with pytest.raises(DataError, match=rf"^here is not what Debian's bible-kjv-text has \(.*{why}") as caught:
            unsquish(content, "here")
        assert "\n" not in str(caught.value)


def test_the_bible_where_its_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"Ge1:1 In the beginning God created the heaven and the earth."
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "bible.data").write_bytes(squish([compress(content)], 1000))
    monkeypatch.setitem(catalog._TEXTS, "bible", replace(catalog._TEXTS["bible"], installed=(tmp_path / "lib",)))
    monkeypatch.setattr(catalog, "_ON_DISK", catalog._IMAGES | catalog._TEXTS)
    found = load_text("bible", tmp_path, download=False)
    assert found.source == str(tmp_path / "lib" / "bible.data")
    assert bytes(torch.cat([found.train, found.validation, found.test]).tolist()) == content
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert len(found.test) == len(found.validation) == len(content) // 10


def test_shakespeare_is_known_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shakespeare").mkdir()
    path = tmp_path / "shakespeare" / "input.txt"
    path.write_bytes(b"First Citizen: Speak.")
    with pytest.raises(DataError, match=r"input.txt is another file, or damaged; remove it"):
        load_text("shakespeare", tmp_path)
    made = replace(text.SHAKESPEARE, digest=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(text, "SHAKESPEARE", made)
    assert len(load_text("shakespeare", tmp_path).test) == 2


@given(st.binary(min_size=10, max_size=300), st.data())
def test_the_parts_of_a_text_and_its_subsets(content: bytes, data: st.DataObject) -> None:
    whole = Text.cut("text", content, "here")
    tenth = len(content) // 10
    train, evaluation = split_text(whole, "final")
    assert bytes(train.tolist()) + bytes(evaluation.tolist()) == content
    tune, held_out = split_text(whole, "tune")
    assert bytes(tune.tolist()) + bytes(held_out.tolist()) == bytes(train.tolist())
    assert len(evaluation) == len(held_out) == tenth
    subset = data.draw(st.integers(1, len(tune)))
    assert torch.equal(split_text(whole, "tune", subset)[0], split_text(whole, "final", subset)[0])
    with pytest.raises(DataError, match=rf"text has 1..{len(tune)} training bytes in split tune"):
        split_text(whole, "tune", len(tune) + 1)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"nine byte")
    for place, why in (
        (tmp_path / "empty", "has no bytes"),
        (tmp_path / "short", "only 9 bytes, expected a text of at least 10"),
        (tmp_path / "none", "cannot be read .No such file"),
        (tmp_path, "cannot be read .Is a directory"),
        (None, "name one with --data FILE"),
    ):
        with pytest.raises(DataError, match=why):
            load_text("text", place)
    with pytest.raises(DataError, match="no text 'koran', expected bible, shakespeare or text"):
        load_text("koran")

"""Downloads that are cut, refused, spoiled, killed, and several at once."""

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from made_sets import BLOCK, BODY, Server, archive_at, leftovers

from signstep.lab.data import DataError, fetch
from signstep.lab.data.fetch import download


def test_a_download_arrives_and_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    for _ in range(2):
        assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert server.log == [("/set", 0, len(BODY))]
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_cut_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    server.cut_after = [3 * BLOCK, 2 * BLOCK, 1 * BLOCK]
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[1] for entry in server.log] == [0, 3 * BLOCK, 5 * BLOCK, 6 * BLOCK]
    assert sum(entry[2] for entry in server.log) == len(BODY), "every byte was served once"
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_download_that_failed_goes_on_at_the_next_try(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    server.cut_after, server.status = [4 * BLOCK], [0, 503]
    archive = archive_at(server.url + "set")
    with pytest.raises(DataError, match=r"set.tar.gz could not be downloaded \(.*set: 503 Server Error"):
        download(archive, tmp_path)
    assert leftovers(tmp_path) == {".download/set.tar.gz.part"}
    assert download(archive, tmp_path).read_bytes() == BODY
    assert server.log[-1] == ("/set", 4 * BLOCK, len(BODY) - 4 * BLOCK)
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_server_that_brings_nothing_more_is_left(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    server.cut_after = [2 * BLOCK, 0, 2 * BLOCK]
    first, second = server.url + "set", server.url + "set?mirror"
    server.files["set?mirror"] = BODY
    assert download(archive_at(first, second), tmp_path).read_bytes() == BODY
    assert [(path, start) for path, start, _ in server.log] == [
        ("/set", 0),
        ("/set", 2 * BLOCK),
        ("/set?mirror", 2 * BLOCK),
        ("/set?mirror", 4 * BLOCK),
    ]


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.ranges = BODY, False
    server.cut_after = [4 * BLOCK]
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[2] for entry in server.log] == [4 * BLOCK, len(BODY)]


def test_a_server_without_ranges_that_always_cuts_is_left(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.ranges = BODY, False
    server.cut_after = [4 * BLOCK] * 100
    with pytest.raises(DataError, match="cut off, and continuing brought nothing more"):
        download(archive_at(server.url + "set"), tmp_path)
    assert len(server.log) == 2


def test_mirrors_are_tried_in_turn(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    dead = "http://127.0.0.1:9/set"  # the discard port: nothing listens
    archive = archive_at(dead, server.url + "absent", server.url + "set", server.url + "never")
    assert download(archive, tmp_path).read_bytes() == BODY
    assert [entry[0] for entry in server.log] == ["/absent", "/set"]


def test_when_every_mirror_fails_each_reason_is_given(server: Server, tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9/set"
    with pytest.raises(DataError) as caught:
        download(archive_at(dead, server.url + "absent"), tmp_path)
    assert str(caught.value) == (
        f"set.tar.gz could not be downloaded ({dead}: no connection; {server.url}absent: 404 Client Error: Not Found)"
    )
    assert leftovers(tmp_path) == set()


def test_a_wrong_checksum_falls_through_and_is_reported_with_both_sums(server: Server, tmp_path: Path) -> None:
    server.files |= {"forged": BODY[:-1] + b"x", "set": BODY}
    archive = archive_at(server.url + "forged", server.url + "set")
    assert download(archive, tmp_path / "a").read_bytes() == BODY
    with pytest.raises(DataError) as caught:
        download(archive_at(server.url + "forged"), tmp_path / "b")
    assert hashlib.sha256(BODY).hexdigest() in str(caught.value)
    assert hashlib.sha256(server.files["forged"]).hexdigest() in str(caught.value)
    assert leftovers(tmp_path / "b") == set()


def test_a_mirror_that_never_ends_is_left(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_MOST", 3 * BLOCK)
    server.files["set"] = BODY
    with pytest.raises(DataError, match=rf"set: it sends more than {3 * BLOCK} bytes"):
        download(archive_at(server.url + "set"), tmp_path)
    assert leftovers(tmp_path) == set()


def test_a_spoiled_beginning_makes_the_mirror_be_asked_for_all_of_it(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / "set.tar.gz.part").write_bytes(bytes(2 * BLOCK))
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[1] for entry in server.log] == [2 * BLOCK, 0]


@pytest.mark.parametrize("extra", [b"", b"too long"])
def test_a_finished_or_too_long_part_is_settled(extra: bytes, server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / "set.tar.gz.part").write_bytes(BODY + extra)
    assert download(archive_at(server.url + "set"), tmp_path).read_bytes() == BODY
    assert [entry[2] for entry in server.log] == ([0, len(BODY)] if extra else [0])
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_a_killed_download_goes_on_and_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.drip = BODY, 0.05
    archive = archive_at(server.url + "set")
    child = multiprocessing.get_context("fork").Process(target=download, args=(archive, tmp_path))
    child.start()
    part = tmp_path / ".download" / "set.tar.gz.part"
    while not (part.exists() and part.stat().st_size >= 2 * BLOCK):
        assert child.is_alive()
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    had = part.stat().st_size
    assert 2 * BLOCK <= had < len(BODY)
    assert leftovers(tmp_path) > {".download/set.tar.gz.part"}, "the killed process left a temporary file"
    server.drip = 0.0
    assert download(archive, tmp_path).read_bytes() == BODY
    assert ("/set", had, len(BODY) - had) in server.log
    assert leftovers(tmp_path) == {"set.tar.gz"}


def test_several_at_once_download_once(server: Server, tmp_path: Path) -> None:
    server.files["set"], server.drip = BODY, 0.005
    archive = archive_at(server.url + "set")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=download, args=(archive, tmp_path)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert server.log == [("/set", 0, len(BODY))]


def test_a_place_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    server.files["set"] = BODY
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"cannot write to {tmp_path}/file/data: "):
        download(archive_at(server.url + "set"), tmp_path / "file" / "data")

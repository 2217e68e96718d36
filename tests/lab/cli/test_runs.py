"""`signstep runs`: what it says of a folder's records."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from signstep.lab.cli import main
from signstep.lab.training import checkpoint, records
from signstep.lab.training.config import RunConfig


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["runs", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def record(folder: Path, config: RunConfig, accuracies: list[float], end: str | None = None) -> Path:
    """The record of a run whose epochs ended with these accuracies, as shares; 10 steps each."""
    events: list[dict[str, Any]] = [records.start_event(config, 9, {}, torch.device("cpu"), 1)]
    events += [{"event": "epoch", "epoch": i + 1, "eval_accuracy": each} for i, each in enumerate(accuracies)]
    if end is not None:
        events.append({"event": "end", "status": end, "step": 10 * len(accuracies)})
    path = folder / f"{config.hash}.jsonl"
    records.write_events(path, events)
    return path


def test_a_line_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign = RunConfig(optimizer="signsgd", lr=1e-3, epochs=3)
    hybrid = RunConfig(dataset="digits", optimizer="hybrid", switch=0.3, momentum=0.9, dither=0.1, lr=3e-3, epochs=3)
    record(tmp_path, RunConfig(epochs=2, seed=10), [0.5], "diverged")
    record(tmp_path, RunConfig(epochs=2, seed=9), [0.5, 0.51236], "done")
    record(tmp_path, sign, [0.25, 0.5])
    record(tmp_path, hybrid, [])
    record(tmp_path, RunConfig(optimizer="signsgd", lr=1e-2, epochs=3, reduce="vote", workers=2), [0.1, 0.2, 0.3])
    (tmp_path / "other.jsonl").write_text("{}\n")
    with checkpoint.lock(tmp_path / f"{hybrid.hash}.lock", over=lambda: True):
        assert run(str(tmp_path)) == 0
    title, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == f"5 runs in {tmp_path}"
    assert head.split() == ["dataset", "method", "lr", "seed", "epochs", "accuracy", "state", "run"]
    found = [re.split(r"\s{2,}", line.strip())[:-1] for line in lines if line.startswith(("  cifar", "  digits"))]
    assert found == [
        ["cifar10", "sgd", "0.1", "9", "2", "51.24", "finished"],
        ["cifar10", "sgd", "0.1", "10", "2", "diverged at step 10"],
        ["cifar10", "signsgd", "0.001", "0", "3", "50.00", "interrupted in epoch 3"],
        ["cifar10", "signsgd vote", "0.01", "0", "3", "30.00", "interrupted in epoch 3"],
        ["digits", "hybrid dither 0.1 switch 0.3", "0.003", "0", "3", "running in epoch 1"],
    ]
    assert f"{tmp_path / 'other.jsonl'}, line 1: not a line of a run's record" in lines[-1]
    assert list(tmp_path.glob("*.lock")) == []


def test_a_narrow_terminal_gets_whole_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = record(tmp_path, RunConfig(epochs=2), [0.5, 0.5], "done")
    assert run(str(tmp_path)) == 0
    assert path.stem in capsys.readouterr().out


def test_runs_of_another_user_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    path = record(tmp_path, RunConfig(), [0.5])
    path.with_suffix(".lock").touch()
    assert run(str(tmp_path)) == 0
    assert "interrupted in epoch 2" in capsys.readouterr().out


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    (tmp_path / "tune").mkdir()
    record(tmp_path / "tune", RunConfig(), [])
    assert run(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}; there are records in {tmp_path / 'tune'}\n"
    assert run(str(tmp_path / "none")) == 2
    assert "there is no such folder; name the one that signstep train wrote to" in capsys.readouterr().err


NASTY = "own:</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"


def hostile(folder: Path) -> None:
    """Records that no run has written: with markup, without numbers, with text that is none, and no records at all."""
    record(folder, RunConfig(epochs=3), [0.25, 0.5, 0.75], "done")
    record(folder, RunConfig(epochs=3, seed=1), [0.5], "diverged")
    record(folder, RunConfig(epochs=3, seed=2), [])
    record(folder, RunConfig(dataset="bible", model="gpt"), [])
    record(folder, RunConfig(dataset=NASTY, model="resnet8", epochs=2), [0.5])  # type: ignore[arg-type]
    path = record(folder, RunConfig(epochs=9), [0.5, 0.625])
    text = path.read_text()
    changes = {
        "end": [text, json.dumps({"event": "end", "status": "<i>", "step": NASTY}) + "\n"],
        "score": [text.replace("0.625", '"<b>"')],
        "nan": [text.replace("0.625", "NaN"), '{"event": "epoch", "epoch": 1e999, "eval_accuracy": 1e999}\n'],
        "huge": [text.replace("0.625", "1" + 400 * "0")],
        "seed": [text.replace('"seed": 0', '"seed": "<u>"')],
        "list": [text.replace('"dataset": "cifar10"', '"dataset": [":"]')],
        "status": [text, '{"event": "end"}\n'],
        "half": [text, '{"event": "end", "status": "x", "step": "\\ud800"}\n'],
        "field": [text.replace('"lr":', '"\\ud800<s>":')],
        "<script>alert(2)": ["{}\n"],
    }
    for name, parts in changes.items():
        (folder / f"{name}.jsonl").write_text("".join(parts))
    (folder / "bytes.jsonl").write_bytes(b"\xff\x00\n")
    (folder / "empty.jsonl").touch()


def test_a_page_of_hostile_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile(tmp_path)
    assert run(str(tmp_path), "--html") == 0
    page = tmp_path / "runs.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {page}"
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 1
    assert not re.search(r"\w+://|@import|<iframe|<img|<base|<[ibus]>", text.replace("<i>n</i>", ""))
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", text, re.DOTALL)
    # Those of "end" and "nan" are runs, if odd ones.
    assert len(rows) == 5 + 1 + 2
    assert sum(html.escape(NASTY, quote=False)[4:30] in row for row in rows) == 2
    unread = re.findall(r"<li>(.*)</li>", text)
    named = {m[1] for line in unread if (m := re.search(r"/([^/]*)\.jsonl", html.unescape(line)))}
    assert named == {"score", "huge", "seed", "list", "status", "half", "field", "<script>alert(2)", "bytes", "empty"}
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_curves_of_a_data_set_share_their_scale(tmp_path: Path) -> None:
    record(tmp_path, RunConfig(epochs=4), [0.2, 0.4, 0.6, 0.6], "done")
    record(tmp_path, RunConfig(epochs=4, seed=1), [0.4, 0.2])
    record(tmp_path, RunConfig(epochs=4, seed=2, dataset="digits"), [0.9])
    record(tmp_path, RunConfig(epochs=4, seed=3, dataset="digits"), [])
    assert run(str(tmp_path), "--html") == 0
    text = (tmp_path / "runs.html").read_text(encoding="utf-8")
    curves = re.findall(r'points="([^"]*)"', text)
    assert curves == ["31,28 60,15 89,2 118,2", "31,15 60,28", "31,15"]
    assert "accuracy: 20.00 % in epoch 1, 60.00 % in epoch 4" in text
    assert text.count("not evaluated yet") == 1
    assert "<h1>4 runs in " in text
    assert "1 finished, 3 interrupted." in text


def test_a_folder_without_runs_gets_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path), "--html") == 0
    assert list(tmp_path.iterdir()) == []
    assert "page" not in capsys.readouterr().out


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, RunConfig(), [0.5])
    assert run(str(tmp_path), "--html") == 0
    old = (tmp_path / "runs.html").read_bytes()

    def full_disk(fd: int) -> None:
        raise OSError("no space left on device")

    record(tmp_path, RunConfig(seed=1), [0.5])
    monkeypatch.setattr("os.fsync", full_disk)
    assert run(str(tmp_path), "--html") != 0
    assert "runs.html cannot be written" in capsys.readouterr().err
    assert (tmp_path / "runs.html").read_bytes() == old


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path, browser: Any) -> None:
    hostile(tmp_path)
    for seed, result in ((11, 0.9), (12, 0.1)):
        record(tmp_path, RunConfig(epochs=3, seed=seed), [0.3, result])
    assert run(str(tmp_path), "--html") == 0
    problems: list[str] = []
    for width in (390, 1280):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        for event in ("console", "pageerror", "dialog"):
            tab.on(event, lambda said: problems.append(str(said)))
        tab.goto((tmp_path / "runs.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        results = "() => [...document.querySelectorAll('tbody tr')].map((row) => row.cells[5].dataset.value)"
        start = tab.evaluate(results)
        known = sorted(float(value) for value in start if value and value != "inf")
        assert [*known[:1], *known[-1:]] == [10.0, 90.0]
        head = tab.locator("thead th", has_text="result")
        absent = len(start) - len(known)
        for order, values in (("ascending", known), ("descending", known[::-1])):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == order
            found = tab.evaluate(results)
            assert [float(value) for value in found[: len(known)]] == values
            assert all(value in ("", "inf") for value in found[len(known) :])
            assert len(found) == len(known) + absent
        tab.locator("thead th", has_text="seed").locator("button").focus()
        tab.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") is None
        seeds = tab.evaluate("() => [...document.querySelectorAll('tbody tr')].map((row) => +row.cells[3].textContent)")
        assert seeds == sorted(seeds)
        assert seeds[-1] == 12
        tab.close()
    assert problems == []

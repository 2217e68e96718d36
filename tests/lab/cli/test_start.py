"""A command that cannot do its work says so before it begins, in one sentence, and leaves nothing behind."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_command import ALL, target_of

from missing import Missing
from signstep.lab.cli import COMMANDS, EXTRA, main
from signstep.lab.cli.commands import Commands

TINY = ["--dataset", "digits", "--model", "resnet8", "--width", "0.25", "--subset", "96", "--batch-size", "32"]
WRITING = [
    words.split()[1:]
    for words, place, _ in ALL
    if not isinstance(target := target_of(place), Commands) and (place.endswith(":main") or hasattr(target, "out"))
]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_which_commands_write_results() -> None:
    assert {" ".join(words) for words in WRITING} == {
        "train", "find-lr", "compare", "sweep", "reproduce", "report", "demo", "bench step", "bench comm",
        "bench train", "bench monitor", "study byzantine", "study byzantine-local", "study dither", "study frontier",
        "study momenta", "study monitor", "study vote-curve",
        "verify", "inspect",
    }  # fmt: skip


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing", "full"])
def test_a_place_that_cannot_be_written_is_said_before_any_work(
    command: list[str],
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def nothing_may_happen(*_: object, **__: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr("signstep.lab.data.catalog._locate", nothing_may_happen)
    monkeypatch.setattr("signstep.lab.data.digits.read", nothing_may_happen)
    monkeypatch.setattr(torch.nn.Module, "train", nothing_may_happen)
    (tmp_path / "file").write_text("mine")
    said = "No such file or directory; name a folder with --out"
    if place == "full":
        monkeypatch.setattr("signstep.lab.output.files.tempfile.TemporaryFile", full_disk)
        said = "No space left on device; free some space"
    elif place.startswith("file"):
        said = f"{tmp_path / 'file'} is not a folder; name a folder with --out"
    monkeypatch.chdir(tmp_path)
    needed = ["--model", "resnet8", "--data", "folder:pets"] if command == ["compare"] else []
    assert run(*command, *needed, "--out", str(tmp_path / place)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"signstep: {tmp_path / place}")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert everything(tmp_path) == {"file"}


def full_disk(**_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--subset", "999999"], "subset=999999"),
        (["--momentum", "-1"], "Invalid momentum value"),
        (["--watch", "0"], "watching every 0 steps"),
        (["--watch", "1", "--tensorboard", "--batch-size", "4"], "micro-batches of 4 images"),
    ],
)
def test_a_start_that_fails_leaves_nothing(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *TINY, *options, "--out", str(tmp_path / "new" / "runs")) == 2
    assert said in capsys.readouterr().err
    assert everything(tmp_path) == set()


@pytest.mark.parametrize(("option", "folder"), [("--tensorboard", "tensorboard"), ("--watch=5", "monitor")])
def test_the_places_of_what_else_is_written_are_tried_too(
    option: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / folder).write_text("mine")
    assert run("train", *TINY, option, "--out", str(tmp_path)) == 2
    assert f"{tmp_path / folder} is not a folder; name a folder with --out" in capsys.readouterr().err
    assert everything(tmp_path) == {folder}


def test_a_file_that_is_no_monitors_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", *TINY, "--epochs", "1", "--out", str(tmp_path)) == 0
    (record,) = tmp_path.glob("*.jsonl")
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor" / record.name).write_text("mine")
    record.unlink()
    capsys.readouterr()
    assert (
        run("train", *TINY, "--epochs", "1", "--watch", "2", "--watch-micro-batches", "4", "--out", str(tmp_path)) == 2
    )
    assert "is not a file of records: give a new one, or delete it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_standard_output_is_said() -> None:
    command = [sys.executable, "-m", "signstep", "data"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("signstep: standard output, or a file, cannot be written: No space left on device;")
    assert "Traceback" not in done.stderr


# Without the extra


def test_the_extra_is_that_of_the_package() -> None:
    required = importlib.metadata.requires("signstep") or []
    names = {re.split(r"[>=;\[]", line)[0] for line in required if line.endswith('extra == "lab"')}
    assert {{"sklearn": "scikit-learn", "PIL": "pillow"}.get(name, name) for name in EXTRA} == names


@pytest.mark.parametrize("package", sorted(EXTRA))
def test_a_package_of_the_extra_that_is_missing_is_said(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    monkeypatch.setattr(type(COMMANDS), "__call__", lambda *_: __import__(f"{package}.part"))
    assert run("train") == 2
    assert capsys.readouterr().err == (
        f'signstep: the package {package} is not installed; pip install "signstep[lab]"\n'
    )


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("of ours", name="signstep.lab.nothing"),
        ModuleNotFoundError("of another version", name="numpy.nothing"),
        ModuleNotFoundError("a package of a package", name="kiwisolver"),
        ModuleNotFoundError("without a name"),
        ImportError("cannot import name 'cli' from 'tyro'", name="tyro"),
    ],
    ids=str,
)
def test_another_failed_import_is_a_mistake_of_ours(error: ImportError, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise error

    monkeypatch.setattr(type(COMMANDS), "__call__", broken)
    with pytest.raises(ImportError) as caught:
        main(["train"])
    assert caught.value is error


WITHOUT = """
import os, sys
import signstep.lab.cli.data, signstep.lab.data, signstep.lab.studies.inspect_run, torch.utils.tensorboard
from missing import Missing

def ours(name, package):
    return name.startswith(("signstep.lab", "torch.utils.tensorboard", package))

for line in sys.stdin.read().splitlines():
    package, *words = line.split()
    if os.fork() == 0:
        for name in [name for name in sys.modules if ours(name, package)]:
            del sys.modules[name]
        sys.meta_path.insert(0, Missing(package))
        from signstep.lab.cli import main
        main(words)
    print(package, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.parametrize(
    "needs",
    [
        pytest.param({"data": ["tyro"]}, id="tyro", marks=pytest.mark.slow),
        pytest.param(
            {
                "data": ["tyro", "numpy", "sklearn", "pooch", "requests", "platformdirs", "filelock", "rich", "PIL"],
                "inspect nothing.pt": ["matplotlib", "jinja2", "markupsafe", "scipy"],
                "train --dataset digits --tensorboard": ["tensorboard"],
            },
            id="all",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_command_whose_package_is_missing(needs: dict[str, list[str]], tmp_path: Path) -> None:
    lines = [f"{package} {command}" for command, packages in needs.items() for package in packages]
    assert len(lines) in (1, len(EXTRA))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        input="\n".join(lines),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"{line.split()[0]} 2" for line in lines]
    assert done.stderr.splitlines() == [
        f'signstep: the package {line.split()[0]} is not installed; pip install "signstep[lab]"' for line in lines
    ]
    assert everything(tmp_path) == set()

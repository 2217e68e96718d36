"""The command line: what it accepts, what it refuses and how, and how it stops."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from every_command import ALL, target_of

import signstep
from signstep.lab.cli import COMMANDS, main
from signstep.lab.cli.commands import _ELSEWHERE, _option_names
from signstep.lab.cli.data import say_where
from signstep.lab.cli.train import Train, default_config
from signstep.lab.paper.experiments import load
from signstep.lab.training.config import RunConfig
from signstep.lab.training.optimizers import OPTIMIZERS

TINY = ["--model", "resnet8", "--width", "0.25", "--subset", "128", "--batch-size", "64", "--epochs", "1"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    code = stopped.value.code
    return 0 if code is None else int(code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--lr", "-1"], "lr=-1.0: expected a finite value >= 0"),
        (["train", "--optimizer", "sgd", "--dither", "0.1"], "dither=0.1: optimizer sgd has no such option"),
        (["train", "--optimizer", "adam", "--state-dtype", "int8"], "state_dtype='int8': optimizer adam has no such"),
        (["train", "--optimizer", "hybrid"], "optimizer hybrid needs one of them, to know when to switch"),
        (["train", "--dataset", "digits", "--momentum", "-1"], "Invalid momentum value: -1.0, for optimizer sgd"),
        (["train", "--dataset", "digits", "--data", "/not/here"], "--data /not/here: there is no such folder; make it"),
        (["sweep", "fig2", "--data", "/not/here"], "--data /not/here: there is no such folder"),
        (["reproduce", "fig2", "--data", "/not/here"], "--data /not/here: there is no such folder"),
        (["demo", "--processes", "0"], "--processes 0: expected at least 1"),
        (["demo", "--data", "/not/here"], "--data /not/here: there is no such folder"),
        (["data", "--data", "/not/here"], "--data /not/here: there is no such folder"),
        (["data", "get", "digits", "--data", "/not/here"], "--data /not/here: there is no such folder"),
        (["train", "--dataset", "digits", "--subset", "999999", "--epochs", "1"], "subset=999999"),
        (["train", "--dataset", "digits", "--batch-size", "5000", "--epochs", "1"], "batch_size=5000"),
        (["train", "--dataset", "digits", "--device", "abacus"], "device='abacus'"),
        (["train", "--dataset", "digits", "--max-minutes", "0"], "--max-minutes 0.0: expected a number above 0"),
        (["train", "--preset", "table1"], "table1 has no row ''"),
        (["train", "--preset", "table1/lion"], "table1 has no row 'lion': it has sgd"),
        (["train", "--preset", "table3/sgd"], "experiment 'table3': expected one of table1"),
        (["sweep", "--shard", "2/2"], "--shard 2/2: expected i/n"),
        (["sweep", "--shard", "half"], "--shard half: expected i/n"),
        (["sweep", "--shard", "-1/2"], "--shard -1/2: expected i/n"),
        (["sweep", "--trials", "0"], "trials=0: expected at least 1"),
        (["sweep", "--max-minutes", "-3"], "--max-minutes -3.0"),
        (["reproduce", "--max-minutes", "nan"], "--max-minutes nan"),
        (["reproduce", "--seeds", "0"], "seeds=0: expected at least 1"),
        (["report", "--seeds", "0"], "seeds=0: expected at least 1"),
        (["report", "fig2"], "train them first, with signstep reproduce fig2 --scale cpu --recipe strong --out"),
        (["data", "get"], "name the sets to get"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [] if arguments[0] == "data" else ["--out", str(tmp_path)]
    assert run(*arguments, *out) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("signstep: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path | None) -> None:
        raise ValueError("not the user's fault")

    monkeypatch.setattr("signstep.lab.data.listing", broken)
    with pytest.raises(ValueError, match="not the user's fault"):
        main(["data"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train", "--dataset", "imagenet"],
        ["train", "--lr", "fast"],
        ["train", "--learning-rate", "1"],
        ["reproduce", "table9"],
        ["sweep", "table1", "--scale", "huge"],
        ["data", "get", "imagenet"],
    ],
)
def test_what_the_parser_refuses_ends_with_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err + captured.out
    assert "Traceback" not in captured.err


def test_every_option_of_train_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--help") == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    before = re.findall(r"(\S+) \(default:", text)
    assert len(before) > 40
    assert [word for word in before if not word.endswith(".")] == []
    for optimizer in OPTIMIZERS:
        assert re.search(rf"{optimizer} [a-z ]*{OPTIMIZERS[optimizer].lr:g}\b", text), optimizer


@pytest.mark.parametrize("words", ["signstep", *(words for words, _, _ in ALL)])
def test_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words.split()[1:], "--help") == 0
    assert f"usage: {words}" in capsys.readouterr().out


def test_a_line_of_help_is_that_of_the_command() -> None:
    assert {words for words, _, _ in ALL} >= {"signstep train", "signstep bench comm", "signstep study vote-curve"}
    for words, place, line in ALL:
        target = target_of(place)
        if isinstance(target, type):
            assert (target.__doc__ or "").replace("\n    ", " ").startswith(line.removesuffix(".")), words


def test_the_list_of_commands_is_short_and_imports_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, (_, line) in COMMANDS.entries.items():
        assert f"{name} {line}" in printed
    code = """
import sys
from signstep.lab.cli import main
try:
    main(["--help"])
except SystemExit:
    print("loaded:", *sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.rpartition("loaded: ")[2].split())
    # Those that a command needs, by their names in the registries, so that none of them goes by unnoticed.
    heavy = {place.partition(":")[0] for _, place, _ in ALL}
    assert {"signstep.lab.cli.train", "signstep.lab.bench.step"} <= heavy <= sys.modules.keys()
    heavy |= {"torch", "tyro", "rich", "matplotlib", "scipy", "sklearn", "numpy", "signstep.optim"}
    assert "signstep.lab.cli.commands" in loaded
    assert loaded & heavy == set()


@pytest.mark.slow
def test_the_options_of_train_need_torch_and_nothing_heavier() -> None:
    # torch: the table of optimizers has their classes.
    code = (
        "import sys; from signstep.lab.cli.train import default_config; default_config(['--preset', 'table1/sgd']); "
        "print(*[m for m in ('matplotlib', 'sklearn', 'scipy', 'signstep.lab.training.loop', "
        "'signstep.lab.data') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "signstep: error: there is no command trian: did you mean train?"),
        (["bench", "stpe"], "signstep bench: error: there is no command stpe: did you mean step?"),
        (["study", "votecurve"], "there is no command votecurve: did you mean vote-curve?"),
        (["xyz"], "there is no command xyz: the commands are data, train, find-lr, runs, "),
        (["--verison"], "unrecognized option: --verison; did you mean --version?"),
        (["--lr", "1", "train"], "unrecognized option: --lr; a command comes first"),
        (["train", "--learning-rate", "0.1"], "--learning-rate: did you mean --lr?"),
        (["train", "--learning_rate=0.1"], "--learning_rate: did you mean --lr?"),
        (["train", "--wd", "0.1"], "--wd: did you mean --weight-decay?"),
        (["sweep", "--output", "here"], "--output: did you mean --out?"),
        (["train", "--optimiser", "sgd"], "--optimizer {sgd,adam,adamw,swats,"),
    ],
)
def test_a_word_that_is_not_ours_gets_the_one_that_is(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


def test_only_options_that_a_command_has_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--learning-rate", "0.1") == 2
    assert "did you mean" not in capsys.readouterr().err


def test_what_other_programs_call_an_option_is_none_of_train() -> None:
    names = set(_option_names(Train(config=RunConfig())))
    assert names >= set(_ELSEWHERE.values())
    assert not names & _ELSEWHERE.keys()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"signstep {signstep.__version__}\n"


def test_a_preset_is_the_runs_default_and_options_override_it() -> None:
    arguments = ["--preset", "table1/pre-0.1", "--scale", "smoke", "--recipe", "paper", "--dataset", "digits"]
    preset = default_config(arguments)
    assert (preset.dataset, preset.dither, preset.dither_position, preset.schedule) == ("digits", 0.1, "pre", "step")
    assert default_config(["--lr", "1"]) == RunConfig()


@pytest.mark.parametrize(
    ("arguments", "lr"),
    [
        ([], 0.1),
        (["--optimizer", "sgd"], 0.1),
        (["--optimizer=adam"], 1e-3),
        (["--optimizer", "adamw"], 1e-3),
        (["--optimizer", "signsgd"], 3.16e-3),
        (["--optimizer", "hybrid"], 3.16e-3),
        (["--preset", "table1/signsgd"], 3.16e-3),
        (["--preset", "table1/signsgd", "--optimizer", "sgd"], 0.1),
    ],
)
def test_each_optimizer_has_its_own_learning_rate(arguments: list[str], lr: float) -> None:
    assert default_config(arguments).lr == lr


def test_train_says_where_the_data_is_if_not_in_the_folder_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--dataset", "digits", *TINY, "--out", str(tmp_path / "runs")]
    assert run(*arguments, "--data", str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"digits is not in {tmp_path}: found in scikit-learn"


def test_nothing_is_said_of_data_that_is_in_the_folder_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from signstep.lab.data import Listed

    lines = [
        Listed("mnist", str(tmp_path / "mnist"), ""),
        Listed("cifar10", "/elsewhere/cifar10", ""),
        Listed("cifar100", "/elsewhere/cifar100", ""),
        Listed("fashion-mnist", None, ""),
    ]
    monkeypatch.setattr("signstep.lab.data.listing", lambda folder: lines)
    say_where(["mnist", "cifar10", "fashion-mnist"], tmp_path)
    assert capsys.readouterr().out == f"cifar10 is not in {tmp_path}: found in /elsewhere/cifar10\n"
    say_where(["cifar10"], None)
    assert capsys.readouterr().out == ""


def test_a_stop_is_said_once_and_going_on_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--dataset", "digits", *TINY, "--epochs", "3", "--out", str(tmp_path)]
    assert run(*arguments, "--max-minutes", "1e-9") == 0
    first = capsys.readouterr()
    assert (first.out + first.err).count("stopped") == 1
    assert "the same command goes on with" in first.out
    assert run(*arguments) == 0
    assert re.search(r"^\w{12}: goes on after step 1 of 6, in epoch 1 of 3$", capsys.readouterr().err, re.MULTILINE)
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".jsonl", ".pt"]


def test_train_from_a_preset_writes_the_run_that_the_experiment_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = load("fig2", scale="smoke", datasets=["digits"]).row("hybrid")
    arguments = ["train", "--preset", "fig2/hybrid", "--scale", "smoke", "--dataset", "digits", "--seed", "1"]
    assert run(*arguments, "--out", str(tmp_path)) == 0
    path = tmp_path / f"{row.config('digits', 1).hash}.jsonl"
    assert path.exists()
    assert f"% accuracy after the last epoch; see {path}" in capsys.readouterr().out
    before = path.read_bytes()
    assert run(*arguments, "--out", str(tmp_path)) == 0
    assert path.read_bytes() == before
    first, last, how = capsys.readouterr().out.splitlines()
    assert first == "nothing was trained: this run has ended before"
    assert re.fullmatch(rf"done: [\d.]+ % accuracy after the last epoch; see {path}", last)
    saved = path.with_suffix(".pt")
    assert how == f"to train it anew, delete {path} and {saved}; or choose another --seed or --out"
    path.unlink()
    saved.unlink()
    assert run(*arguments, "--out", str(tmp_path)) == 0
    assert "nothing was trained" not in capsys.readouterr().out
    assert len(path.read_bytes().splitlines()) == len(before.splitlines())


def test_a_diverged_run_is_reported_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--dataset", "digits", *TINY, "--epochs", "3", "--lr", "1e30", "--out", str(tmp_path)]
    assert run(*arguments) == 1
    assert "diverged: the loss of step" in capsys.readouterr().out
    assert run(*arguments) == 1
    again = capsys.readouterr().out.splitlines()
    assert again[0] == "nothing was trained: this run has ended before"
    assert again[1].startswith("diverged: the loss of step")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--optimizer", "signsgd", "--lr", "0.1"], ["signsgd: lr=0.1 moves every weight by 0.1 in each step, "]),
        (["--optimizer", "sgd", "--lr", "0.1"], []),
        (["--optimizer", "signsgd"], []),
    ],
)
def test_a_learning_rate_meant_for_sgd_is_said_once_and_not_as_a_warning(
    options: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run("train", "--dataset", "digits", *TINY, *options, "--out", str(tmp_path)) == 0
    assert not [each for each in caught if "lr=" in str(each.message)]
    found = [line for line in capsys.readouterr().err.splitlines() if "every weight" in line]
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_a_damaged_record_or_tuned_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "smoke-strong"
    (folder / "runs").mkdir(parents=True)
    record = f"{load('fig2', scale='smoke', datasets=['digits']).row('sgd').config('digits').hash}.jsonl"
    (folder / "runs" / record).write_text("not json\n")
    arguments = ["report", "fig2", "--scale", "smoke", "--dataset", "digits", "--out", str(tmp_path)]
    assert run(*arguments) == 2
    assert f"{record}, line 1" in capsys.readouterr().err
    (folder / "tuned.json").write_text("{}")
    assert run(*arguments) == 2
    assert "tuned.json: not a file that sweep writes" in capsys.readouterr().err


def test_torchrun_is_for_train_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("sweep", "fig2", "--scale", "smoke") == 2
    assert "use it with signstep train" in capsys.readouterr().err


def test_a_report_needs_one_of_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = ["--scale", "smoke", "--dataset", "digits", "--out", str(tmp_path)]
    assert run("train", "--preset", "fig2/sgd", *preset[:4], "--out", str(tmp_path / "smoke-strong/runs")) == 0
    assert run("report", "fig2", *preset) == 0
    page = tmp_path / "smoke-strong/fig2.html"
    assert str(page) in capsys.readouterr().out
    assert page.exists()
    assert run("report", "fig2", "--scale", "smoke", "--dataset", "mnist", "--out", str(tmp_path)) == 2
    assert "none of the runs to report" in capsys.readouterr().err


def test_data_lists_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data") == 0
    out = capsys.readouterr().out
    for name in ("cifar10", "cifar100", "fashion-mnist", "mnist", "digits"):
        assert name in out
    assert run("data", "get", "digits") == 0
    assert "digits: 1437 training and 360 test images" in capsys.readouterr().out


def test_data_shows_whole_paths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from signstep.lab.data import cifar

    place = tmp_path / ("deep-" * 20) / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    for file in (*cifar.LAYOUTS["cifar10"][0].train, cifar.LAYOUTS["cifar10"][0].test):
        (place / file).touch()
    monkeypatch.setenv("COLUMNS", "80")
    assert run("data", "--data", str(place.parent)) == 0
    assert f"cifar10: {place}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_falls_back_to_digits_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signstep.lab.data.demo_dataset", lambda folder: ("digits", "Fashion-MNIST is not to be had"))
    assert run("demo", "--out", str(tmp_path), "--seeds", "1", "--max-minutes", "0.01", "--processes", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data set digits: Fashion-MNIST is not to be had"
    assert any("runs are left" in line for line in lines)
    written = [line for line in lines if line.startswith(("table: ", "report: "))]
    assert written == [
        f"table: {tmp_path / 'demo-strong/demo.md'}",
        f"report: {tmp_path / 'demo-strong/demo.html'}",
    ]
    assert all(Path(line.partition(": ")[2]).exists() for line in written)
    assert " not run  Sign: SignSGD-M" in lines
    assert lines[-1].startswith("On digits (8 × 8) there is no result yet of ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("train", signal.SIGTERM),
        ("sweep", signal.SIGINT),
        pytest.param("train", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("sweep", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(
    tmp_path: Path, command: str, number: signal.Signals
) -> None:
    if command == "train":
        options = ["train", "--dataset", "digits", *TINY, "--epochs", "100000", "--out", str(tmp_path)]
        records = tmp_path
    else:
        options = ["sweep", "table1", "--scale", "smoke", "--dataset", "digits", "--out", str(tmp_path)]
        records = tmp_path / "smoke-strong/tune"
    arguments = [sys.executable, "-m", "signstep", *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not any(b'"epoch"' in path.read_bytes() for path in records.glob("*.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    # Between two of a sweep's runs, a SIGTERM is the plain one.
    assert process.returncode in ((130,) if command == "train" or number == signal.SIGINT else (130, -signal.SIGTERM))
    if process.returncode == 130:
        assert "the same command goes on" in out + err
        assert (out + err).count("stopped") == 1
    for path in records.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        assert json.loads(lines[0])["event"] == "start"
    assert not list(records.glob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--vote"],
            "workers vote with signs, choose optimizer signsgd or lion or hybrid or fixed-switch, not sgd",
        ),
        (["--vote", "--optimizer", "signsgd"], "reduce='vote': start the run's workers with torchrun"),
        (["--reduce", "ef-sign"], "reduce='ef-sign': start the run's workers with torchrun"),
    ],
)
def test_a_reduction_needs_workers(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--dataset", "digits", *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err

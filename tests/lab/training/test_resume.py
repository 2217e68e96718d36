"""A run that was killed, stopped or started twice ends as if nothing had happened."""

import functools
import os
import random
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import filelock
import pytest
import tiny_runs
import torch

from gang import CONTEXT
from little_room import little_room
from signstep.lab.output.files import replacing
from signstep.lab.training import checkpoint
from signstep.lab.training import records as runs
from signstep.lab.training.checkpoint import CheckpointError, RunBusy
from signstep.lab.training.config import RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.watch import Watching
from signstep.lab.training.workers import StopRequest

tiny = functools.partial(tiny_runs.tiny, epochs=3)
# What leaves the most behind: momentum, dither, both phases, a running calibration.
HYBRID: dict[str, Any] = {"optimizer": "hybrid", "lr": 2e-3, "switch": 0.6, "dither": 0.1, "sgd_momentum": 0.5}


def run_alone(config: RunConfig, out: Path, **options: Any) -> None:
    """The body of a child process; one thread, so that its sums are those of every other one."""
    torch.set_num_threads(1)
    train(config, out, progress=False, **options)


def start(config: RunConfig, out: Path, **options: Any) -> ForkServerProcess:
    return start_process(run_alone, config, out, device="cpu", **options)


def start_process(body: Callable[..., None], *arguments: Any, **options: Any) -> ForkServerProcess:
    process = CONTEXT.Process(target=body, args=arguments, kwargs=options)
    process.start()
    return process


def outcome(config: RunConfig, out: Path) -> dict[str, Any]:
    """Everything a run leaves behind, but for times and the environment."""
    state = torch.load(out / f"{config.hash}.pt", weights_only=True)
    run = runs.read_run(out / f"{config.hash}.jsonl")
    assert state.pop("events") == [run.start, *run.epochs]
    events = [run.start, *run.epochs, run.end or {}]
    state["record"] = [{k: v for k, v in event.items() if k not in ("timing", "environment")} for event in events]
    return state


def assert_same_bits(a: Any, b: Any, at: str = "run") -> None:
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, at
        assert a.shape == b.shape, at
        assert torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b))), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same_bits(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{at}[{index}]")
    else:
        assert a == b, at


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        pytest.param(HYBRID, 2, id="hybrid"),
        pytest.param(HYBRID, 12, id="hybrid-long", marks=pytest.mark.long),
        pytest.param({"momentum": 0.9, "weight_decay": 1e-3}, 12, id="sgd-long", marks=pytest.mark.long),
    ],
)
def test_killed_at_random_moments(changes: dict[str, Any], kills: int, tmp_path: Path) -> None:
    """SIGKILL, several times: in a step, an evaluation, a checkpoint or before the first one."""
    config = tiny(subset=480, epochs=8 if kills > 3 else 3, **changes)  # 15 steps an epoch, each with its checkpoint
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(config, whole, checkpoint_minutes=0)
    began = wait_for_checkpoint(config, whole, process)
    process.join()
    lasted = time.monotonic() - began
    assert process.exitcode == 0

    moments = random.Random(20260101)
    for kill in range(kills):
        process = start(config, broken, checkpoint_minutes=0)
        if kill % 4:
            wait_for_checkpoint(config, broken, process)
        time.sleep(moments.uniform(0, lasted / (2 * kills)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed often enough"
    process = start(config, broken)
    process.join()
    assert process.exitcode == 0
    assert_same_bits(outcome(config, broken), outcome(config, whole))
    assert sorted(p.name for p in broken.iterdir() if p.suffix != ".lock") == [
        f"{config.hash}.jsonl",
        f"{config.hash}.pt",
    ]


def wait_for_checkpoint(config: RunConfig, out: Path, process: ForkServerProcess) -> float:
    """Return when `process` has written one more checkpoint."""
    path = out / f"{config.hash}.pt"
    before = path.stat().st_ino if path.exists() else None
    while not path.exists() or path.stat().st_ino == before:
        assert process.is_alive(), "the run was over before it could be killed often enough"
        time.sleep(0.002)
    return time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        HYBRID,
        {"optimizer": "signsgd", "lr": 1e-3, "dither": 0.2, "dither_position": "post", "weight_decay": 0.1},
        {"optimizer": "signsgd", "lr": 1e-3, "state_dtype": "int8", "dither": 1.0, "dither_scale": "relative"},
        HYBRID | {"state_dtype": "bfloat16"},
        {"momentum": 0.9, "nesterov": True, "schedule": "step", "warmup": 0.2},
        {"optimizer": "adam", "channels_last": False, "eval_every": 2},
        {"optimizer": "lion", "lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"optimizer": "swats", "weight_decay": 0.1, "switch_tolerance": 1e-3},
        {"optimizer": "noisy-sgd", "gradient_noise": 0.3, "seed": 3},
        {"optimizer": "adamw", "cutout": 2, "label_smoothing": 0.1, "split": "tune"},
    ],
    ids=lambda changes: "-".join([changes.get("optimizer", "sgd"), *filter(None, [changes.get("state_dtype")])]),
)
def test_stopped_after_every_step(changes: dict[str, Any], tmp_path: Path, one_thread: None) -> None:
    config = tiny(**changes)
    assert train(config, tmp_path / "whole", progress=False) == "done"
    statuses = []
    while not statuses or statuses[-1] == "stopped":
        statuses.append(train(config, tmp_path / "parts", max_minutes=0, progress=False))
    assert statuses == ["stopped"] * 8 + ["done"]
    assert_same_bits(outcome(config, tmp_path / "parts"), outcome(config, tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint(number: signal.Signals, tmp_path: Path, one_thread: None) -> None:
    config = tiny(subset=480, epochs=8, **HYBRID)
    process = start(config, tmp_path / "parts", checkpoint_minutes=1e9)
    while not (tmp_path / "parts" / f"{config.hash}.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid or 0, number)
    process.join()
    assert process.exitcode == 0
    state = torch.load(tmp_path / "parts" / f"{config.hash}.pt", weights_only=True)
    assert 0 < state["step"] < 120
    assert runs.read_run(tmp_path / "parts" / f"{config.hash}.jsonl").end is None
    assert train(config, tmp_path / "parts", progress=False) == "done"
    train(config, tmp_path / "whole", progress=False)
    assert_same_bits(outcome(config, tmp_path / "parts"), outcome(config, tmp_path / "whole"))


def test_a_second_signal_kills() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        stop.answered = True
        for number in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(number) is signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_in_the_last_step_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loop over runs would go on with the next one."""
    config = tiny(epochs=1)
    evaluate = TrainingRun.evaluate

    def interrupted(run: TrainingRun) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(run)

    monkeypatch.setattr(TrainingRun, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=False)
    assert runs.read_run(tmp_path / f"{config.hash}.jsonl").done


def test_a_finished_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    train(config, tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("signstep.lab.training.batches.load", None)
    assert train(config, tmp_path, progress=False) == "done"
    (tmp_path / f"{config.hash}.pt").unlink()
    assert train(config, tmp_path, progress=False) == "done"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items() <= before.items()


def test_killed_between_the_last_checkpoint_and_the_end_of_the_record(tmp_path: Path) -> None:
    config = tiny()
    train(config, tmp_path, progress=False)
    expected = outcome(config, tmp_path)
    record = tmp_path / f"{config.hash}.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:-1]))
    assert train(config, tmp_path, progress=False) == "done"
    assert_same_bits(outcome(config, tmp_path), expected)


def test_the_record_goes_back_to_the_checkpoint(tmp_path: Path, one_thread: None) -> None:
    """Epochs recorded after the last checkpoint are trained and recorded again, once."""
    config = tiny()
    train(config, tmp_path / "whole", progress=False)
    out = tmp_path / "parts"
    for _ in range(2):
        train(config, out, max_minutes=0, progress=False)
    older = (out / f"{config.hash}.pt").read_bytes()
    for _ in range(3):
        train(config, out, max_minutes=0, progress=False)
    assert len(runs.read_run(out / f"{config.hash}.jsonl").epochs) == 1
    (out / f"{config.hash}.pt").write_bytes(older)
    assert train(config, out, progress=False) == "done"
    assert_same_bits(outcome(config, out), outcome(config, tmp_path / "whole"))


# Damage


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "other", "list", "code", "bomb", "doubled"])
def test_a_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    config = tiny()
    train(config, tmp_path, max_minutes=0, progress=False)
    path = tmp_path / f"{config.hash}.pt"
    content = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 64]) + content[middle + 64 :]
        )
    elif damage == "other":
        path.write_bytes(b"not a checkpoint at all\n" * 100)
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 24))
    elif damage == "doubled":  # a key that is a pair of pairs of pairs ... of nothing, 100 deep
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "new", "w") as archive:
            for name in whole.namelist():
                pairs = b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + b"Ns."
                archive.writestr(name, pairs if name.endswith("data.pkl") else whole.read(name))
        (tmp_path / "new").rename(path)
    else:
        torch.save({"config": subprocess.Popen}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name} is not a readable checkpoint \(.*\); delete it") as caught:
        train(config, tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    said = {"bomb": "unpack to more bytes than it has", "doubled": "a tuple of more values than a checkpoint needs"}
    assert said.get(damage, "") in str(caught.value)
    path.unlink()
    assert train(config, tmp_path, progress=False) == "done"
    assert len(runs.read_run(tmp_path / f"{config.hash}.jsonl").epochs) == 3


def test_another_runs_checkpoint(tmp_path: Path) -> None:
    train(tiny(seed=1), tmp_path, progress=False)
    (tmp_path / f"{tiny(seed=1).hash}.pt").rename(tmp_path / f"{tiny().hash}.pt")
    with pytest.raises(CheckpointError, match="another configuration"):
        train(tiny(), tmp_path, progress=False)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"config": {}, "step": 1})

    def half() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert checkpoint.load(path, {}) == {"config": {}, "step": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "watching", "full"),
    [(10, None, "{0}.jsonl"), (10_000, Watching(2, 4), "monitor/{0}.jsonl"), (20_000, Watching(2, 4), "{0}.pt")],
    ids=["record", "monitor", "checkpoint"],
)
def test_a_run_whose_disk_gets_full_goes_on_once_there_is_room(
    room: int, watching: Watching | None, full: str, tmp_path: Path, one_thread: None
) -> None:
    config, out = tiny(), tmp_path / "runs"
    train(config, tmp_path / "whole", progress=False, watching=watching)
    with little_room(room), pytest.raises(OSError, match=f"{out / full.format(config.hash)}.*") as caught:
        train(config, out, progress=False, watching=watching, checkpoint_minutes=0)
    assert "File too large" in str(caught.value)
    left = {path.name for path in tmp_path.glob("runs/**/*") if path.is_file()}
    # A start that fails leaves nothing; a run that has begun has its record, and no half of anything.
    assert left == ({f"{config.hash}.jsonl"} if watching else set())
    assert out.exists() == (watching is not None)
    assert train(config, out, progress=False, watching=watching) == "done"
    assert_same_bits(outcome(config, out), outcome(config, tmp_path / "whole"))
    if watching:
        monitored = [tmp_path / folder / "monitor" / f"{config.hash}.jsonl" for folder in ("runs", "whole")]
        assert monitored[0].read_text() == monitored[1].read_text()


# Two processes, one run


def test_a_run_belongs_to_one_process(tmp_path: Path) -> None:
    config = tiny()
    lock = tmp_path / f"{config.hash}.lock"
    with filelock.FileLock(lock):
        with pytest.raises(RunBusy, match=rf"{config.hash} is being trained by another process"):
            train(config, tmp_path, progress=False)
        assert train(tiny(seed=1), tmp_path, progress=False) == "done"
    assert train(config, tmp_path, progress=False) == "done"


@pytest.mark.slow
def test_a_killed_process_gives_its_run_free(tmp_path: Path) -> None:
    config = tiny(subset=480, epochs=8)
    process = start(config, tmp_path, checkpoint_minutes=0)
    wait_for_checkpoint(config, tmp_path, process)
    with pytest.raises(RunBusy):
        train(config, tmp_path, progress=False)
    process.kill()
    process.join()
    assert train(config, tmp_path, max_minutes=0, progress=False) == "stopped"


# Workers


def one_worker(rank: int, port: int, config: RunConfig, out: Path, said: Path, **options: Any) -> None:
    """The body of a worker's process, with the environment that torchrun gives it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test"} | {name: str(value) for name, value in place.items()}
    with said.open("a") as file:
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        train(config, out, device="cpu", **options)


def two_workers(config: RunConfig, out: Path, said: Path, **options: Any) -> list[ForkServerProcess]:
    """Two processes that train one run; what they print to stderr goes to a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start_process(one_worker, rank, port, config, out, said, **options) for rank in range(2)]


def codes(workers: list[ForkServerProcess]) -> list[int | None]:
    for each in workers:
        each.join()
    return [each.exitcode for each in workers]


@pytest.mark.slow
@pytest.mark.parametrize(
    "reduce",
    ["vote", "local-vote", *(pytest.param(x, marks=pytest.mark.long) for x in ("mean", "qsgd", "ef-sign-two-sided"))],
)
def test_two_workers(reduce: Any, tmp_path: Path) -> None:
    workers = None if reduce == "mean" else 2
    every = 4 if reduce == "local-vote" else None
    options = HYBRID | {"reduce": reduce, "workers": workers, "every": every}
    config, said = tiny(subset=480, epochs=3, **options), tmp_path / "said"
    assert codes(two_workers(config, tmp_path / "whole", said)) == [0, 0], said.read_text()
    run = runs.read_run(tmp_path / "whole" / f"{config.hash}.jsonl")
    assert run.config == config
    assert run.start["environment"]["world_size"] == 2
    assert [e["step"] for e in run.epochs] == [15, 30, 45]
    assert run.epochs[-1]["train_loss"] < run.epochs[0]["train_loss"]
    assert said.read_text().count("epoch 1/3") == 1  # rank 0 alone speaks

    # Stopped once by a signal to all of them, then continued: the same bits.
    parts = two_workers(config, tmp_path / "parts", said, checkpoint_minutes=0)
    while not (tmp_path / "parts" / f"{config.hash}.pt").exists():
        assert all(each.is_alive() for each in parts)
        time.sleep(0.01)
    for each in parts:
        each.terminate()
    assert codes(parts) == [0, 0]
    state = torch.load(tmp_path / "parts" / f"{config.hash}.pt", weights_only=True)
    assert 0 < state["step"] < 45
    assert codes(two_workers(config, tmp_path / "parts", said)) == [0, 0], said.read_text()
    assert_same_bits(outcome(config, tmp_path / "parts"), outcome(config, tmp_path / "whole"))


@pytest.mark.slow
def test_two_workers_go_on_with_the_run_of_one(tmp_path: Path) -> None:
    config, said = tiny(), tmp_path / "said"
    train(config, tmp_path, max_minutes=0, progress=False)
    with filelock.FileLock(tmp_path / f"{config.hash}.lock"):
        assert 0 not in codes(two_workers(config, tmp_path, said))
    assert "is being trained by another process" in said.read_text()
    assert codes(two_workers(config, tmp_path, said)) == [0, 0], said.read_text()
    run = runs.read_run(tmp_path / f"{config.hash}.jsonl")
    assert [e["step"] for e in run.epochs] == [3, 6, 9]
    assert run.end is not None

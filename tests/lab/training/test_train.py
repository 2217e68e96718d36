"""The training loop: what it computes, what it records, and how it says no."""

import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny_runs import record, tiny

from signstep.lab.data import load, normalise, split
from signstep.lab.training import display, models, recipe
from signstep.lab.training import records as runs
from signstep.lab.training.batches import Batches
from signstep.lab.training.config import RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.workers import Workers
from signstep.optim import HybridSignSGD

ALONE = Workers(0, 1, torch.device("cpu"))


def test_the_loop_is_the_plain_one(tmp_path: Path) -> None:
    """Against the dozen lines anyone would write."""
    config = tiny(optimizer="hybrid", lr=1e-3, switch=0.5, dither=0.1, label_smoothing=0.1, channels_last=False, seed=3)
    assert train(config, tmp_path, progress=False) == "done"

    torch.manual_seed(3)
    model = models.build("resnet8", num_classes=10, in_channels=1, width=0.25)
    optimizer = HybridSignSGD(model.parameters(), lr=1e-3, switch_step=3, dither=0.1, seed=3)
    batches = Batches(config, ALONE, None)
    for epoch in range(2):
        losses = []
        for index in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + np.cos(np.pi * (3 * epoch + index) / 6))
            x, y = batches.training(epoch, index)
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    images = load("digits")
    _, _, eval_x, eval_y = split(images, "final", 96)
    with torch.no_grad():
        logits = model(normalise(eval_x, images.mean, images.std))

    saved = torch.load(tmp_path / f"{config.hash}.pt", weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved["model"][name], value, rtol=1e-5, atol=1e-6)
    last = record(config, tmp_path).epochs[-1]
    assert last["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert last["eval_loss"] == pytest.approx(F.cross_entropy(logits, eval_y).item(), rel=1e-4)
    assert last["eval_accuracy"] == pytest.approx((logits.argmax(1) == eval_y).double().mean().item(), abs=1.5 / 360)
    assert last["phase"] == "sgd"
    assert last["calibrated_lr"] == pytest.approx(torch.tensor(optimizer.calibrated_lr).median().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "adamw", "lr": 5e-3},
        {"optimizer": "signsgd", "lr": 3e-3},
        {"optimizer": "hybrid", "lr": 3e-3, "switch": 0.7, "calibration": "ratio"},
    ],
)
def test_it_learns(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(subset=None, width=0.5, epochs=4, **changes)
    assert train(config, tmp_path, progress=False) == "done"
    assert record(config, tmp_path).result > 60


def test_the_record(tmp_path: Path) -> None:
    config = tiny(epochs=5, eval_every=2, schedule="step", milestones=(0.5,), gamma=0.1, split="tune")
    assert train(config, tmp_path, progress=False) == "done"
    run = record(config, tmp_path)
    assert run.config == config
    assert run.done
    assert not run.diverged
    assert run.start["hash"] == config.hash
    assert run.start["train_images"] == 96
    assert run.start["eval_images"] == 1437 // 10
    assert run.start["parameters"] == models.count_parameters(
        models.build("resnet8", num_classes=10, in_channels=1, width=0.25)
    )
    assert {"torch", "python", "cpu", "device", "threads", "signstep", "git"} <= set(run.start["environment"])
    assert [e["epoch"] for e in run.epochs] == [1, 2, 3, 4, 5]
    assert [e["step"] for e in run.epochs] == [3, 6, 9, 12, 15]
    assert [e["lr"] for e in run.epochs] == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.001])
    assert ["eval_accuracy" in e for e in run.epochs] == [False, True, False, True, True]
    assert run.end == {
        "event": "end",
        "status": "done",
        "epoch": 5,
        "step": 15,
        "eval_accuracy": run.epochs[-1]["eval_accuracy"],
    }
    assert run.result == 100 * run.epochs[-1]["eval_accuracy"]
    assert (run.epochs[-1]["eval_accuracy"] * 143) == pytest.approx(round(run.epochs[-1]["eval_accuracy"] * 143))
    assert runs.read_runs(tmp_path) == {config.hash: run}


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(tiny(), tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    losses = []
    for seed, folder in [(0, "a"), (0, "b"), (1, "c")]:
        train(tiny(seed=seed), tmp_path / folder, progress=False)
        losses.append([e["train_loss"] for e in record(tiny(seed=seed), tmp_path / folder).epochs])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    try:
        recipe.require_compiler("cpu")
    except ValueError as error:
        pytest.skip(str(error))
    status = train(tiny(compile=True), tmp_path, progress=False)
    assert status == train(tiny(), tmp_path, progress=False) == "done"
    compiled, plain = (record(tiny(compile=flag), tmp_path).epochs[0] for flag in (True, False))
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)


def test_no_compiler_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    recipe.require_compiler.cache_clear()
    monkeypatch.setattr(recipe.torch, "compile", broken)
    with pytest.raises(ValueError, match=r"compile=True.*No working C\+\+ compiler.*set compile to False"):
        train(tiny(compile=True), tmp_path, progress=False)
    recipe.require_compiler.cache_clear()


# What it says


def test_a_line_per_epoch_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tiny(), tmp_path)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("epoch ")[1].split()[0] for line in lines] == ["1/2", "2/2"]
    assert re.match(r"epoch 1/2  accuracy [\d.]+%, eval [\d.]+%  loss ", lines[0]), "what 40 columns show"
    for word in ("images/s", " s left", "digits sgd lr"):
        assert word in lines[0]
    train(tiny(seed=1), tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal_and_a_clock_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As time.monotonic does on Windows, for 16 ms."""
    monkeypatch.setattr("time.monotonic", lambda: 1.0)
    screen = io.StringIO()

    def terminal(**_: Any) -> Console:
        return Console(file=screen, force_terminal=True, width=80)

    monkeypatch.setattr(display, "Console", terminal)
    train(tiny(), tmp_path)
    assert "epoch 2/2" in screen.getvalue()
    assert "images/s" in screen.getvalue()
    assert "eval " in screen.getvalue()
    assert "…" not in screen.getvalue()


def test_forty_columns_show_epoch_and_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(display, "Console", lambda **_: Console(file=screen, force_terminal=True, width=40))
    config = RunConfig(epochs=200)
    with display.Display(config, 2999, 4000, show=True, quiet=False, board=None) as shown:
        shown._evaluated = ", eval 45.1%"
        shown.step(3000, torch.ones(3), torch.full((3,), 0.456))
    assert "epoch 151/200 accuracy 45.6%, eval 45" in screen.getvalue()


def test_going_on_says_from_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny(epochs=3)
    for step, epoch in [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2)]:
        train(config, tmp_path, max_minutes=0, progress=False)
        going_on = f"{config.hash}: goes on after step {step} of 9, in epoch {epoch} of 3\n" if step else ""
        assert capfd.readouterr() == ("", going_on)


def test_no_lock_is_left_by_a_run_that_is_over(tmp_path: Path) -> None:
    config, lock = tiny(), tmp_path / f"{tiny().hash}.lock"
    assert train(config, tmp_path, max_minutes=0, progress=False) == "stopped"
    assert lock.exists()
    assert train(config, tmp_path, progress=False) == "done"
    assert not lock.exists()
    assert train(config, tmp_path, progress=False) == "done"
    assert not lock.exists()
    hot = tiny(lr=1e20)
    assert train(hot, tmp_path, progress=False) == "diverged"
    assert not (tmp_path / f"{hot.hash}.lock").exists()


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny()
    train(config, tmp_path, progress=False, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "tensorboard" / config.hash))
    board.Reload()
    epochs = record(config, tmp_path).epochs
    for name in ("train_loss", "eval_accuracy", "lr"):
        assert [(s.step, s.value) for s in board.Scalars(name)] == [
            (e["epoch"], pytest.approx(e[name])) for e in epochs
        ]


# What it refuses


def test_too_large_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=128: this run has only 96 training images"):
        train(tiny(batch_size=128), tmp_path, progress=False)


def test_the_last_batch_may_be_left_out(tmp_path: Path) -> None:
    train(tiny(batch_size=50), tmp_path, progress=False)
    assert [e["step"] for e in record(tiny(batch_size=50), tmp_path).epochs] == [1, 2]


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_no_such_device(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"device='{device}'"):
        train(tiny(), tmp_path, device=device, progress=False)


def test_a_loss_that_is_not_finite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny(lr=1e20)
    assert train(config, tmp_path, checkpoint_minutes=0, progress=False) == "diverged"
    run = record(config, tmp_path)
    assert run.diverged
    assert run.result == 10.0
    assert run.end is not None
    assert run.end["status"] == "diverged"
    assert run.end["step"] == 2
    said = capfd.readouterr().err
    for words in ("the loss of step 2 (of 6) is nan", "lr=1e+20 is too high for sgd", f"{config.hash}.pt"):
        assert words in said
    assert str(tmp_path) not in run.end["reason"]
    saved = torch.load(tmp_path / f"{config.hash}.pt", weights_only=True)
    assert saved["step"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())
    before = (tmp_path / f"{config.hash}.jsonl").read_bytes()
    assert train(config, tmp_path, progress=False) == "diverged"
    assert (tmp_path / f"{config.hash}.jsonl").read_bytes() == before


def test_weights_that_are_not_finite_after_the_last_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny(subset=32, epochs=1, lr=1e38)
    assert train(config, tmp_path, progress=False) == "diverged"
    run = record(config, tmp_path)
    assert run.end is not None
    assert "the evaluation loss after step 1 (of 1)" in run.end["reason"]
    assert run.end["eval_accuracy"] is None
    assert "there is no earlier checkpoint" in capfd.readouterr().err
    json.loads((tmp_path / f"{config.hash}.jsonl").read_text().splitlines()[-1])


def test_bf16_where_the_processor_dies_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(*_: Any, **__: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess([], -4)

    recipe.require_bf16_on_cpu.cache_clear()
    monkeypatch.setattr(recipe.subprocess, "run", died)
    with pytest.raises(ValueError, match=r"SIGILL.*use fp32.*ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"):
        train(tiny(precision="bf16"), tmp_path, device="cpu", progress=False)
    recipe.require_bf16_on_cpu.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, False),
        # a torch that cannot say, on Linux and elsewhere
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n", False),
        ("Features\t: fp asimd i8mm\n", True),
        ("Features\t: fp asimd i8mm bf16\n", False),
        (None, False),
    ],
)
def test_bf16_where_the_processor_has_no_arithmetic_for_it(
    capabilities: dict[str, Any] | str | None,
    slow: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if isinstance(capabilities, dict):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(recipe, "_CPUINFO", tmp_path / "cpuinfo")
    if isinstance(capabilities, str):
        (tmp_path / "cpuinfo").write_text(capabilities)

    def tried(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"the first step comes after {capfd.readouterr().err!r}")

    monkeypatch.setattr(recipe, "require_bf16_on_cpu", tried)
    recipe.say_slow_bf16.cache_clear()
    said = "bf16 will be many times slower than fp32: this CPU has no bfloat16 arithmetic .*--precision fp32"
    with pytest.raises(RuntimeError, match=said if slow else "after ''"):
        train(tiny(precision="bf16"), tmp_path, device="cpu", progress=False)
    with pytest.raises(RuntimeError, match="after ''"):  # once is enough for the runs of a sweep
        train(tiny(precision="bf16", seed=1), tmp_path, device="cpu", progress=False)
    recipe.say_slow_bf16.cache_clear()


@pytest.mark.slow
def test_bf16(tmp_path: Path) -> None:
    half, full = tiny(precision="bf16"), tiny()
    try:
        assert train(half, tmp_path, device="cpu", progress=False) == "done"
    except ValueError as error:
        pytest.skip(str(error))
    train(full, tmp_path, progress=False)
    losses = [record(config, tmp_path).epochs[0]["train_loss"] for config in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]

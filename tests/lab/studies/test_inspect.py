"""`signstep inspect` on real runs: what it measures, against the slow way; what it leaves alone; how it says no."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gang import gang
from signstep.lab import cli
from signstep.lab.studies import inspect_run
from signstep.lab.studies.inspect_run import InspectRun
from signstep.lab.training.batches import Batches
from signstep.lab.training.config import RunConfig
from signstep.lab.training.loop import train
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.workers import Workers
from signstep.monitor.calibration_panel import CalibrationPanel
from signstep.monitor.dither_meter import DitherMeter
from signstep.monitor.sinks import JSONLines
from signstep.theory import stationarity
from signstep.theory.bounds import CRITICAL_SNR

TINY: dict[str, Any] = {
    "dataset": "digits",
    "subset": 640,
    "crop": 1,
    "flip": False,
    "model": "resnet8",
    "width": 0.25,
    "epochs": 3,
    "batch_size": 64,
    "optimizer": "signsgd",
    "lr": 0.003,
}
ALONE = Workers(0, 1, torch.device("cpu"))
FEW = {"micro_batches": 24, "micro_batch_size": 16}


def stopped(out: Path, **changes: Any) -> tuple[RunConfig, Path]:
    """A run that was stopped after its first step, and its checkpoint."""
    config = RunConfig(**(TINY | changes))
    assert train(config, out, max_minutes=1e-9, progress=False) == "stopped"
    return config, out / f"{config.hash}.pt"


def measured(path: Path, **changes: Any) -> tuple[inspect_run.Inspected, dict[str, Any]]:
    found = InspectRun((path,), **(FEW | changes)).inspect(path)
    (record,) = found.records
    return found, json.loads(json.dumps(record, allow_nan=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def dithered(folder: Path) -> tuple[RunConfig, Path]:
    return stopped(folder, dither=0.01, dither_scale="absolute")


# ------------------------------------------------------------------------------------------------ what it measures


def restored(config: RunConfig, path: Path) -> TrainingRun:
    run = TrainingRun(config, ALONE, None)
    run.restore(torch.load(path, weights_only=True))
    return run


def test_reliability_is_that_of_gradients_taken_one_by_one(dithered: tuple[RunConfig, Path]) -> None:
    config, path = dithered
    _, record = measured(path)
    run = restored(config, path)
    batches = Batches(config, ALONE, None)
    pairs = [batches.training(config.epochs + 1, i) for i in range(6)]
    x, y = (torch.cat(column) for column in zip(*pairs, strict=True))
    rows = []
    for part in range(24):
        model = copy.deepcopy(run.model)
        F.cross_entropy(model(x[16 * part : 16 * part + 16]), y[16 * part : 16 * part + 16]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    slow = torch.stack(rows)
    for name in ("alignment", "phi", "margin", "reliability", "snr"):
        estimate = getattr(stationarity, name)(slow)
        expected = [float(each) for each in (estimate.value, estimate.low, estimate.high)]
        assert record["reliability"][name] == pytest.approx(expected, rel=1e-3, abs=1e-6), name
    # A step of the run is the mean of 64 / 16 = 4 micro-batches.
    below = float((4 * stationarity.snr_squared(slow) < CRITICAL_SNR**2).double().mean())
    assert record["reliability"]["below_critical_step"] == pytest.approx(below, abs=1e-3)
    assert (record["step"], record["micro_batches"], len(record["samples"])) == (1, 24, 8)
    assert record["symmetry"]["micro_batches"] == 24


def alike(a: Any, b: Any) -> bool:
    """Equal up to the digits that a record keeps."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == pytest.approx(b, rel=1e-5) if isinstance(a, float) else a == b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"dither": 0.01},
        {"dither": 1.0, "dither_scale": "relative", "dither_decay": 0.0, "state_dtype": "int8"},
        {"optimizer": "hybrid", "switch": 0.9},
        {"optimizer": "hybrid", "switch": 0.01},
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "adam", "lr": 0.001},
    ],
    ids=["dither", "relative int8", "hybrid", "hybrid as SGD", "sgd", "adam"],
)
def test_dither_and_calibration_are_those_of_the_runs_own_next_step(changes: dict[str, Any], tmp_path: Path) -> None:
    config, path = stopped(tmp_path, **changes)
    _, record = measured(path)
    run = restored(config, path)
    names = {p: name for name, p in run.model.named_parameters()}
    meters = DitherMeter(names), CalibrationPanel(names)
    for meter in meters:
        run.optimizer.register_step_pre_hook(lambda *_, meter=meter: meter.before_step(run.optimizer))
    found: list[dict[str, Any]] = []
    run.optimizer.register_step_post_hook(lambda *_: found.extend(meter.after_step(run.optimizer) for meter in meters))
    run.train_step()
    assert alike([record["dither"], record["calibration"]], found)
    assert record["optimizer"] == type(run.optimizer).__name__


def test_a_finished_run_has_the_rate_of_its_last_step(tmp_path: Path) -> None:
    config = RunConfig(**(TINY | {"subset": 128, "epochs": 2}))
    assert train(config, tmp_path, progress=False) == "done"
    found, record = measured(tmp_path / f"{config.hash}.jsonl")
    assert record["step"] == 4
    assert record["lr"] == pytest.approx([0.003 * 0.5 * (1 - 2**-0.5)])
    assert record["calibration"]["average"]["ratio"] > 0
    assert "step 4 of 4" in found.about
    assert "of which there are 128: intervals are too narrow" in found.about


def test_nothing_changes(dithered: tuple[RunConfig, Path]) -> None:
    _, path = dithered
    files = {each: (each.read_bytes(), each.stat().st_mtime_ns) for each in path.parent.iterdir()}
    random = torch.get_rng_state()
    first, second = measured(path)[1], measured(path.with_suffix(".jsonl"))[1]
    assert first == second
    assert torch.equal(random, torch.get_rng_state())
    assert files == {each: (each.read_bytes(), each.stat().st_mtime_ns) for each in path.parent.iterdir()}


def _train_voting(out: Path) -> str:
    config = RunConfig(**(TINY | {"reduce": "vote", "workers": 2, "subset": 128, "epochs": 1}))
    return train(config, out, device="cpu", progress=False)


@pytest.mark.slow
def test_of_a_vote_signs_and_noise_are_measured_and_the_rest_is_said(tmp_path: Path) -> None:
    assert gang(2).run(_train_voting, tmp_path) == ["done", "done"]
    (path,) = tmp_path.glob("*.pt")
    _, record = measured(path)
    assert record["reliability"]["alignment"][0] is not None
    assert "momentum is with the run's workers" in record["advice"][-1]
    assert record["dither"] == record["calibration"]
    run_inspect(path, out=tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- the command


def run_inspect(*paths: Path, out: Path | None = None, **changes: Any) -> None:
    assert InspectRun(paths, **(FEW | {"out": out} | changes)).run() == 0


def test_it_prints_and_writes(
    dithered: tuple[RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = dithered
    code = call("inspect", str(path), "--micro-batches=24", "--micro-batch-size=16", f"--out={tmp_path}")
    assert code == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    for words in (config.hash, "dither 0.01", "step 1 of 30", "rms(m) / σ", "linear.weight", "symmetry: "):
        assert words in said
    names = {each.name for each in tmp_path.iterdir()}
    assert names == {"inspect.json", "inspect.md", "monitor.html", "inspect-noise.svg", "inspect-snr.svg"}
    written = json.loads((tmp_path / "inspect.json").read_text(encoding="utf-8"))
    (one,) = written["runs"]
    assert RunConfig.from_dict(one["config"]) == config
    assert one["record"] == measured(path)[1]
    page = (tmp_path / "monitor.html").read_text(encoding="utf-8")
    assert f"--out {tmp_path}" in page
    assert "digits, resnet8, signsgd, lr 0.003, dither 0.01" in page


@pytest.mark.slow
def test_a_monitors_file_and_several_runs(
    dithered: tuple[RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = dithered
    record = measured(path)[1]
    records = [record | {"step": step, "lr": [0.1 * (step + 1)]} for step in (0, 10, 20)]
    for name in ("a", "b"):
        sink = JSONLines(tmp_path / name / "monitor.jsonl")
        for each in records:
            sink.write(each)
    with (tmp_path / "b" / "monitor.jsonl").open("a") as file:
        file.write('{"step": 30, "reliab')  # killed here
    run_inspect(tmp_path / "a" / "monitor.jsonl", out=tmp_path / "one")
    said = capsys.readouterr().out
    assert "3 records, steps 0 to 20" in said
    assert {each.name for each in (tmp_path / "one").glob("*.svg")} >= {"inspect-seven.svg", "inspect-dither.svg"}
    run_inspect(*(tmp_path / name / "monitor.jsonl" for name in "ab"), path, out=tmp_path / "all")
    said = capsys.readouterr().out
    assert "a/monitor" in said
    written = json.loads((tmp_path / "all" / "inspect.json").read_text(encoding="utf-8"))
    assert [each["record"]["step"] for each in written["runs"]] == [20, 20, 1]
    assert [each["config"] is None for each in written["runs"]] == [True, True, False]
    page = (tmp_path / "all" / "monitor.html").read_text(encoding="utf-8")
    assert "3 runs, no alarm in their last records." in page


def test_alarms_are_printed_in_red_and_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"step": 7, "reliability": {"reason": "too few"}, "alarms": ["the [bold] sign"], "advice": ["wait"]}
    JSONLines(tmp_path / "m.jsonl").write(record)
    run_inspect(tmp_path / "m.jsonl")
    said = capsys.readouterr().out
    assert said.index("1 alarm at step 7") < said.index("alarm: the [bold] sign") < said.index("- wait")
    assert "too few" in said


# ----------------------------------------------------------------------------------------------------- how it says no


def call(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that it says on stderr."""
    assert call("inspect", *arguments) == 2
    said, errors = capsys.readouterr()
    assert said == ""
    assert errors.startswith("signstep: ")
    assert errors.count("\n") == 1
    return errors


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _save(path: Path, value: Any) -> None:
    torch.save(value, path)


def _changed(path: Path, **changes: Any) -> None:
    state = torch.load(path, weights_only=True)
    for key, change in changes.items():
        state[key] = change(state[key]) if callable(change) else change
    torch.save(state, path)


class Foreign:
    """What weights_only refuses."""


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), "is not a readable checkpoint"),
        (_flip, "is not a readable checkpoint"),
        (lambda p: p.write_bytes(b""), "is not a readable checkpoint"),
        (lambda p: p.write_text("no archive"), "is not a readable checkpoint"),
        (lambda p: _save(p, torch.zeros(3)), "holds no configuration of a run"),
        (lambda p: _save(p, {"weight": torch.zeros(3)}), "holds no configuration of a run"),
        (lambda p: _save(p, {"config": [1], "model": {}}), "holds no configuration of a run"),
        (lambda p: _save(p, {"config": Foreign()}), "is not a readable checkpoint"),
        (lambda p: _changed(p, config=lambda c: c | {"depth": 3}), "unknown field(s)"),
        (lambda p: _changed(p, config=lambda c: c | {"lr": -1.0}), "lr=-1.0"),
        (lambda p: _changed(p, config=lambda c: c | {"width": 0.5}), "does not hold the network and optimizer"),
        (lambda p: _changed(p, step=10_000), "step 10000 of 30"),
        (lambda p: _changed(p, step=None), "does not hold the network and optimizer"),
        (lambda p: _changed(p, model=None), "does not hold the network and optimizer"),
        (lambda p: _changed(p, optimizer={"state": {}, "param_groups": []}), "does not hold the network and optimizer"),
    ],
)  # fmt: skip
def test_a_spoiled_checkpoint(
    spoil: Any, words: str, dithered: tuple[RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / dithered[1].name
    shutil.copy(dithered[1], path)
    spoil(path)
    said = refused(capsys, str(path), f"--out={tmp_path / 'out'}")
    assert str(path) in said
    assert words in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_one_of_ours(
    dithered: tuple[RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such file" in refused(capsys, str(tmp_path / "nothing.pt"))
    assert "there is no such file" in refused(capsys, str(tmp_path))
    for i, content in enumerate(
        (b"", b"\xff\xfe\x00", b"words\n", b"[1, 2]\n", b'{"a": 1}\n', b'{"step": 1}\n', b'{"step": 1, "relia', b"\n\n")
    ):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(content)
        assert "neither the record of a run nor that of a monitor" in refused(capsys, str(path)), content
    alone = tmp_path / dithered[1].with_suffix(".jsonl").name
    shutil.copy(dithered[1].with_suffix(".jsonl"), alone)
    assert f"{dithered[1].name} is not beside it" in refused(capsys, str(alone))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--micro-batches=3"], "--micro-batches 3: expected at least 4"),
        (["--micro-batch-size=0"], "--micro-batch-size 0: expected at least 1"),
        (["--device=tpu"], "device='tpu'"),
        (["--data=/nowhere/at/all"], "--data /nowhere/at/all"),
    ],
)
def test_options_out_of_range(
    arguments: list[str], words: str, dithered: tuple[RunConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, str(dithered[1]), *arguments)


def test_no_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the files of a run" in refused(capsys)


def test_a_folder_that_cannot_be_written(
    dithered: tuple[RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert call("inspect", str(dithered[1]), "--micro-batches=4", f"--out={tmp_path / 'file'}") == 2
    assert capsys.readouterr().err.startswith("signstep: ")


def test_images_come_again_only_when_an_epoch_is_over() -> None:
    config = dataclasses.replace(RunConfig(**TINY), crop=0)
    batches = Batches(config, ALONE, None)

    def distinct(x: Tensor) -> int:
        return len({row.numpy().tobytes() for row in x})

    x, y = inspect_run._images(batches, config, 640)
    assert (len(x), len(y)) == (640, 640)
    many, _ = inspect_run._images(batches, config, 1000)
    assert torch.equal(many[:640], x)
    assert distinct(many) == distinct(x) == distinct(batches.train_x)

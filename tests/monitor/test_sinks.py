"""Sinks: files that survive kills and are shared, TensorBoard read back, the panel on a terminal, W&B."""

import gc
import io
import json
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from little_room import little_room
from signstep.monitor import sinks
from signstep.monitor.sinks import JSONLines, LivePanel, TensorBoard, WandB, flatten, plain, read

FORK = multiprocessing.get_context("fork")
"""The processes only write files, and need not import torch for that."""


def _record(step: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "optimizer": "SignSGD",
        "lr": [1e-3, 2e-3],
        "micro_batches": 16,
        "reliability": {
            "alignment": [1.5, 1.0, 2.0],
            "snr": [0.5, None, 0.7],
            "ratio": 2.5,
            "zeros": 0.25,
            "snr_histogram": [0.1] * 10,
            "layers": {"fc.weight": {"snr": [0.4, 0.3, 0.5], "ratio": None}, "[red]": {"snr": [0.1, 0.0, 0.2]}},
        },
        "symmetry": {"rejected_share": 0.5, "tested": 64, "skewness": {"q50": 1.0}, "advice": "symmetry: said"},
        "dither": {"rms": 0.1, "ratio": 0.05, "linear_share": 0.9, "layers": {"fc.weight": {"rms": 0.2, "ratio": 0.1}}},
        "calibration": {
            "average": {"paper": 0.01, "ratio": 0.02, "lagged": None},
            "negative": [0.1, 0.05, 0.2],
            "groups": [{"lr": 1e-3, "phase": "sign"}, {"lr": 2e-3, "phase": "sgd"}],
        },
        "samples": [{"name": "fc.weight", "values": [1.0, 2.0, 3.0]}],
        "alarms": [],
        "advice": ["set dither_scale='relative'"],
    } | changes


# A file of lines


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "monitor.jsonl"
    sink = JSONLines(path)
    assert read(path) == []
    for k in range(3):
        sink.write(_record(k))
    sink.close()
    assert read(path) == [_record(k) for k in range(3)]
    assert read(str(path)) == read(path)


@given(st.integers(0, 400))
def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "m.jsonl"
    sink = JSONLines(path)
    records = [{"step": k, "text": "ä\n\r" * 30} for k in range(3)]
    for record in records:
        sink.write(record)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    left = records[: max(0, len(whole) - cut) // (len(whole) // 3)]
    assert read(path) == left
    again = JSONLines(path)
    assert read(path) == left
    again.write({"step": 9})
    assert read(path) == [*left, {"step": 9}]


def test_a_line_that_is_torn_between_two_writes(tmp_path: Path) -> None:
    """Another process has died in the middle of its own, longer than a block of the search for its begin."""
    path = tmp_path / "m.jsonl"
    sink = JSONLines(path)
    sink.write({"step": 0})
    with path.open("ab") as file:
        file.write(b'{"step": 1, "x": "' + b"y" * 200_000)
    sink.write({"step": 2})
    assert read(path) == [{"step": 0}, {"step": 2}]


def test_a_line_for_which_there_is_no_room(tmp_path: Path) -> None:
    path = tmp_path / "monitor.jsonl"
    sink = JSONLines(path)
    sink.write(_record(0))
    whole = path.read_bytes()
    with little_room(len(whole) + 20), pytest.raises(OSError, match="File too large") as caught:
        sink.write(_record(1))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == whole
    sink.write(_record(1))
    assert read(path) == [_record(0), _record(1)]


def test_a_run_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    sink = JSONLines(path)
    for k in (0, 50, 100, 150):
        sink.write({"step": k})
    JSONLines(path, before=151)
    assert len(read(path)) == 4
    resumed = JSONLines(path, before=100)
    assert read(path) == [{"step": 0}, {"step": 50}]
    resumed.write({"step": 100, "again": True})
    assert read(path)[-1] == {"step": 100, "again": True}
    JSONLines(path, before=0)
    assert path.read_bytes() == b""
    JSONLines(tmp_path / "new.jsonl", before=7)


def test_somebodys_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x04 no lines here")
    with pytest.raises(ValueError, match="not a file of records"):
        JSONLines(path)
    assert path.read_bytes() == b"PK\x03\x04 no lines here"
    with pytest.raises(OSError):
        JSONLines(tmp_path)


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not a record"):
        read(path)
    path.write_text('{"step": 0}\n[1]\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl")


def _write_many(path: Path, who: int, count: int) -> None:
    sink = JSONLines(path)
    for k in range(count):
        sink.write({"who": who, "step": k, "pad": "x" * (10_000 if k % 7 == 0 else 10)})


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    processes = [FORK.Process(target=_write_many, args=(path, who, 150)) for who in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    records = read(path)
    for who in (0, 1):
        assert [r["step"] for r in records if r["who"] == who] == list(range(150))


def _write_until_killed(path: Path) -> None:
    sink = JSONLines(path)
    for k in range(10**9):
        sink.write({"step": k, "pad": "x" * 5000})


def test_a_killed_process_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    process = FORK.Process(target=_write_until_killed, args=(path,))
    process.start()
    while not path.exists() or path.stat().st_size < 100_000:
        assert process.is_alive()
    process.kill()
    process.join()
    JSONLines(path).write({"step": -1})
    steps = [r["step"] for r in read(path)]
    assert steps == [*range(len(steps) - 1), -1]


def test_numbers_that_are_not_finite_become_none(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    JSONLines(path).write({"step": 0, "x": [math.nan, (math.inf, 1)], "y": {"z": -math.inf}, 3: True})
    assert "NaN" not in path.read_text()
    assert read(path) == [{"step": 0, "x": [None, [None, 1]], "y": {"z": None}, "3": True}]
    with pytest.raises(TypeError):
        JSONLines(path).write({"step": object()})
    assert len(read(path)) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=15)
@given(st.dictionaries(st.text(), JSON))
def test_any_record_goes_through(tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "m.jsonl"
    JSONLines(path).write(record)
    assert read(path) == [plain(record)]
    assert all(math.isfinite(x) for x in flatten(record).values())


def test_flatten() -> None:
    numbers = flatten(_record())
    assert numbers["reliability/alignment"] == 1.5
    assert numbers["reliability/alignment/high"] == 2.0
    assert "reliability/snr/low" not in numbers
    assert numbers["reliability.layers/fc.weight/snr"] == 0.4
    assert "reliability.layers/fc.weight/ratio" not in numbers
    assert numbers["symmetry/skewness/q50"] == 1.0
    assert numbers["calibration/groups/1/lr"] == numbers["lr/1"] == 2e-3
    assert not any("histogram" in name or "samples" in name or name == "step" for name in numbers)
    assert flatten(_record(lr=[0.5]))["lr"] == 0.5
    assert flatten(_record(lr=[0.1, 0.2, 0.3]))["lr/2"] == 0.3


# TensorBoard


def _board(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(folder))
    board.Reload()
    return board


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sink = TensorBoard(tmp_path)
    for k in (0, 50, 100):
        sink.write(_record(k, alarms=["uphill"] if k == 50 else []))
    board = _board(tmp_path)  # before it is closed: it is on the disk already
    sink.close()
    sink.close()
    events = board.Scalars("reliability.layers/fc.weight/snr")
    assert [(e.step, round(e.value, 6)) for e in events] == [(0, 0.4), (50, 0.4), (100, 0.4)]
    assert set(board.Tags()["scalars"]) == set(flatten(_record()))
    assert [e.step for e in board.Tensors("advice/text_summary")] == [0]  # it has not changed
    alarms = board.Tensors("alarms/text_summary")
    assert [(e.step, e.tensor_proto.string_val[0]) for e in alarms] == [(50, b"uphill"), (100, b"none")]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, value in ((0, 1.0), (100, 2.0)):
        sink = TensorBoard(tmp_path)
        for k in range(first, first + 150, 50):
            sink.write(_record(k, lr=[value]))
        sink.close()
    events = _board(tmp_path).Scalars("lr")
    assert [(e.step, e.value) for e in events] == [(0, 1), (50, 1), (100, 2), (150, 2), (200, 2)]


def test_tensorboard_writes_nothing_without_records(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    TensorBoard(tmp_path / "board").close()
    assert not (tmp_path / "board").exists()


# The terminal


def _console(**options: Any) -> Any:
    console = pytest.importorskip("rich.console")
    return console.Console(file=io.StringIO(), record=True, width=120, **options)


def test_the_panel_on_a_terminal() -> None:
    console = _console(force_terminal=True, height=40)
    panel = LivePanel(console)
    panel.write(_record(0, alarms=["points uphill"]))
    panel.write(_record(50, alarms=["points uphill"]))
    panel.close()
    raw = console.file.getvalue()
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 1  # the cursor comes back
    text = console.export_text()
    last = text[text.rindex("step 50") :]
    for found in ("SignSGD", "lr 0.001, 0.002", "16 micro-batches", "points uphill", "dither_scale='relative'"):
        assert found in last
    rows = {line.split()[0]: line.split()[1:] for line in last.splitlines() if line.split()}
    assert rows["fc.weight"] == ["0.4", "0.2", "0.1"]
    assert rows["all"] == ["0.5", "2.5", "25%", "0.1", "0.05", "90%"]
    assert rows["[red]"] == ["0.1"]  # a name, no markup
    assert "lr for SGD: paper 0.01, ratio 0.02" in last
    assert "lagged" not in last


def test_more_layers_than_lines() -> None:
    console = _console(force_terminal=True, height=15)
    layers = {f"layer{i}": {"snr": [float(i), None, None]} for i in range(30)}
    panel = LivePanel(console)
    panel.write(_record(0, reliability={"layers": layers}, dither={}, calibration={}))
    panel.close()
    text = console.export_text()
    assert "layer0" in text
    assert "layer29" not in text
    assert "more" in text
    assert "all" in text


def test_a_record_with_next_to_nothing() -> None:
    for options in ({"force_terminal": True}, {}):
        panel = LivePanel(_console(**options))
        panel.write({"step": 0})
        panel.write({"step": 1, "reliability": {"reason": "2 micro-batches"}, "dither": {"layers": {}, "rms": None}})
        panel.close()
        assert "step 1" in panel.console.export_text()


def test_without_a_terminal_there_is_a_line_per_record_and_advice_when_it_changes() -> None:
    console = _console()
    panel = LivePanel(console)
    panel.write(_record(0))
    panel.write(_record(50))
    panel.write(_record(100, advice=["[bold]new[/bold]"]))
    panel.close()
    lines = console.export_text().splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 0", "step 50", "step 100"]
    said = [line.strip() for line in lines if line.startswith("  ")]
    assert said == ["set dither_scale='relative'", "[bold]new[/bold]"]
    assert "S 0.5" in lines[0]
    assert "\x1b" not in console.file.getvalue()


def test_a_panel_that_is_dropped_gives_the_cursor_back() -> None:
    console = _console(force_terminal=True)
    panel = LivePanel(console)
    panel.write(_record())
    del panel
    gc.collect()
    assert console.file.getvalue().count("\x1b[?25h") == 1


# Weights & Biases


class _Run:
    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


def test_wandb_logs_on_the_optimizers_steps() -> None:
    run = _Run()
    sink = WandB(run)
    sink.write(_record(50, alarms=["one", "two"]))
    sink.close()
    assert run.metrics == [("signstep/step", None), ("signstep/*", "signstep/step")]
    (logged,) = run.logged
    assert logged["signstep/step"] == 50
    assert logged["signstep/dither/ratio"] == 0.05
    assert logged["signstep/alarms"] == "one\ntwo"
    json.dumps(logged, allow_nan=False)


def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert wandb.run is None
    with pytest.raises(RuntimeError, match=r"call wandb\.init\(\) first"):
        WandB()
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test", settings=wandb.Settings(x_disable_stats=True))
    try:
        sink = WandB()
        sink.write(_record(50))
        run.log({"loss": 1.0}, step=7)  # the loop's own steps go on
        sink.write(_record(100, alarms=["one"]))
        sink.close()
        assert run.summary["signstep/step"] == 100
        assert run.summary["signstep/reliability/alignment"] == 1.5
        assert wandb.run is run  # not finished by the sink
    finally:
        run.finish()


# What is not installed is said


@pytest.mark.parametrize(
    ("package", "make", "said"),
    [
        ("torch.utils.tensorboard", lambda: TensorBoard("board"), "tensorboard is not installed"),
        ("rich.live", LivePanel, "rich is not installed"),
        ("wandb", WandB, "wandb is not installed"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, make: Any, said: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=said):
        make()


def test_files_need_nothing_but_the_standard_library() -> None:
    assert not {"rich", "tensorboard", "wandb"} & set(vars(sinks))

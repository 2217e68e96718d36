"""`signstep bench monitor`: what it records and refuses. Nothing here says how fast anything is."""

import copy
import json
import random
import statistics
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signstep.lab.bench import monitor_loops, monitor_report
from signstep.lab.bench.monitor_loops import (
    COCKPIT,
    EVERY,
    PARTS,
    Loop,
    MonitorResult,
    Training,
    network,
    set_up,
    timed,
)
from signstep.lab.bench.spread import BenchError
from signstep.lab.cli import main
from signstep.lab.training.models import build

CPU = torch.device("cpu")


def rounds(*seconds: tuple[float, float, float]) -> list[dict[str, float]]:
    return [dict(zip(("plain", "other", "own"), each, strict=True)) for each in seconds]


@pytest.fixture
def result() -> MonitorResult:
    made = MonitorResult("net", 250, 1000)
    monitor = rounds((1, 1, 3), (2, 2, 8), (1, 1, 6))
    accumulation = rounds((2, 2.2, 3), (2, 2, 4), (2, 2, 2))
    made.rounds = [{"monitor": a, "monitor-accumulation": b} for a, b in zip(monitor, accumulation, strict=True)]
    made.labels = {key: key for key in made.rounds[0]}
    made.peaks = {
        "monitor": {"plain": (9000, 1000), "own": (10500, 4000)},
        "monitor-accumulation": {"plain": (5000, 1500), "own": (7100, None)},
    }
    return made


def test_ratios_are_taken_within_a_round(result: MonitorResult) -> None:
    assert result.over("monitor", "other").median == 1
    assert result.over("monitor", "own").median == 4
    own = [(49 * 1 + 3) / 50 - 1, (49 * 2 + 8) / 100 - 1, (49 * 1 + 6) / 50 - 1]
    assert result.overhead("monitor").median == pytest.approx(100 * statistics.median(own))
    assert result.extra("monitor").median == 1
    assert result.extra("monitor-accumulation").median == pytest.approx(1 / 4)  # 0.5 / 2, 1 / 3, 0 / 5
    assert result.excess("monitor") == (1.5, 3.0)
    assert result.excess("monitor-accumulation") == (2.1, None)


def test_targets_compare_the_rounds_with_the_limits(result: MonitorResult) -> None:
    verdicts = [(5, "undecided"), (2, "met"), (5, "undecided"), (2, "missed")]
    assert [(t.limit, t.verdict) for t in result.targets()] == verdicts
    assert [t.row[2] for t in result.targets()][1::2] == ["1.50", "2.10"]


def test_a_round_has_one_own_step_among_the_others_and_plain_ones() -> None:
    calls: list[str] = []
    armed = [False]
    loop = Loop(
        "loop",
        lambda: calls.append("plain, armed" if armed[0] else "plain"),
        lambda: calls.append("own" if armed[0] else "other"),
        lambda own: armed.__setitem__(0, own),
    )
    shuffle, orders = random.Random(0), []
    for _ in range(3):
        calls.clear()
        seconds = timed(loop, shuffle, CPU)
        assert seconds.keys() == {"plain", "other", "own"}
        assert all(each >= 0 for each in seconds.values())
        assert sorted(calls) == [*["other"] * 4, "own", *["plain"] * 4]
        orders.append(list(calls))
    assert orders[0] != orders[1] != orders[2]


def test_the_network_without_batch_norm() -> None:
    with_norm, without = (network(0.02, CPU, batch_norm=norm) for norm in (True, False))
    norms = [m for m in with_norm.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert not [m for m in without.modules() if isinstance(m, nn.BatchNorm2d)]
    counts = [sum(p.numel() for p in m.parameters()) for m in (with_norm, without)]
    assert counts[0] - counts[1] == sum(2 * m.num_features for m in norms)
    assert without(torch.randn(2, 3, 32, 32)).isfinite().all()


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))


def make() -> nn.Module:
    return network(0.02, CPU, batch_norm=True)


def test_accumulation_takes_the_mean_over_the_batch() -> None:
    torch.manual_seed(0)
    data = torch.randn(16, 5), torch.randint(3, (16,))
    model = nn.Linear(5, 3)
    F.cross_entropy(model(data[0]), data[1]).backward()
    assert model.weight.grad is not None
    whole = model.weight.grad.clone()
    training = Training(model, data, F.cross_entropy)
    seen: list[Tensor] = []

    def keep(*_: object) -> None:
        assert model.weight.grad is not None
        seen.append(model.weight.grad.clone())

    training.optimizer.register_step_pre_hook(keep)
    for parts in (1, PARTS):
        model.zero_grad()
        training.step(parts)
        assert model.weight.grad is None
    assert all(torch.allclose(each, whole, atol=1e-6) for each in seen)


@pytest.fixture
def without_cockpit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cockpit", "backpack"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.slow
@pytest.mark.usefixtures("without_cockpit")
def test_without_cockpit_the_others_run_and_it_is_said(tmp_path: Path) -> None:
    found = MonitorResult("net", 1, 1)
    loops = set_up(make, batch(), tmp_path, found)
    assert loops.keys() == {"monitor", "monitor-accumulation"}
    assert list(found.missing) == ["Cockpit"]
    assert "backpack" in found.missing["Cockpit"]
    assert "setuptools<80" in found.missing["Cockpit"]
    for key in ("monitor", "monitor-accumulation"):
        path = tmp_path / f"accumulate-{key != 'monitor'}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [r["micro_batches"] for r in records] == [PARTS]
        for own, lines in ((False, 1), (True, 2), (False, 2), (True, 3)):
            loops[key].arm(own)
            loops[key].step()
            loops[key].plain()
            assert len(path.read_text().splitlines()) == lines


@pytest.mark.usefixtures("without_cockpit")
def test_a_monitor_that_measures_nothing_ends_the_benchmark(tmp_path: Path) -> None:
    model = nn.Linear(3, 10)
    data = torch.full((16, 3), float("nan")), torch.randint(10, (16,))
    with pytest.raises(BenchError, match="has measured nothing"):
        set_up(lambda: model, data, tmp_path, MonitorResult("net", 1, 1))


class FakeCockpit:
    """Measures at the steps of its quantities' schedule, and warns, as Cockpit does."""

    def __init__(self, params: Iterator[nn.Parameter], quantities: Sequence[tuple[str, Callable[[int], bool]]]) -> None:
        self.quantities, self.output, self.asked = quantities, dict[int, dict[str, float]](), list[int]()

    def create_graph(self, step: int) -> bool:
        return False

    def get_output(self) -> dict[int, dict[str, float]]:
        return self.output

    def __call__(self, step: int, info: Mapping[str, Any]) -> "FakeCockpit":
        assert info["batch_size"] == 16
        self.asked.append(step)
        self.output[step] = {name: 1.0 for name, due in self.quantities if due(step)}
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any], extend: Callable[[Any], Any]) -> None:
    schedules: Any = types.ModuleType("cockpit.utils.schedules")
    schedules.linear = lambda interval: lambda step: step % interval == 0
    cockpit: Any = types.ModuleType("cockpit")
    cockpit.Cockpit = made
    names = {name for each in COCKPIT.values() for name in each}
    cockpit.quantities = types.SimpleNamespace(**{name: (lambda due, name=name: (name, due)) for name in names})
    backpack: Any = types.ModuleType("backpack")
    backpack.extend = extend
    for module in (cockpit, schedules, backpack):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_cockpit_looks_at_the_same_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[FakeCockpit] = []

    def build(*arguments: Any) -> FakeCockpit:
        made.append(FakeCockpit(*arguments))
        return made[-1]

    install(monkeypatch, build, copy.copy)
    found = MonitorResult("net", 1, 1)
    loops = set_up(make, batch(), tmp_path, found)
    assert found.missing == {}
    assert [each.output for each in made] == [{0: dict.fromkeys(names, 1.0)} for names in COCKPIT.values()]
    for key, cockpit in zip(COCKPIT, made, strict=True):
        for own in (False, True):
            loops[key].arm(own)
            loops[key].step()
        assert [step % EVERY == 0 for step in cockpit.asked] == [True, False, True]


@pytest.mark.parametrize("fails", ["extend", "measure"])
def test_what_cockpit_cannot_do_is_said_in_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: str
) -> None:
    def extend(module: nn.Module) -> nn.Module:
        if fails == "extend":
            raise NotImplementedError("no such layer")
        return module

    def build(params: Any, quantities: Any) -> FakeCockpit:
        return FakeCockpit(params, quantities[:-1])

    install(monkeypatch, build, extend)
    found = MonitorResult("net", 1, 1)
    assert not set_up(make, batch(), tmp_path, found).keys() & COCKPIT.keys()
    first = f"Cockpit {COCKPIT['cockpit-snr'][0]}"
    expected = "NotImplementedError: no such layer" if fails == "extend" else "BenchError: Cockpit has not measured all"
    assert found.missing[first].startswith(expected)
    assert "pip" not in found.missing[first]


def test_the_real_cockpit_has_something_to_say(tmp_path: Path) -> None:
    pytest.importorskip("cockpit")
    found = MonitorResult("net", 1, 1)
    loops = set_up(make, batch(), tmp_path, found)
    assert found.missing == {}
    assert loops.keys() >= COCKPIT.keys()
    assert any("BatchNorm module in training mode" in text for text in found.said)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", "1"], "--rounds 1: expected at least 2"),
        (["--batch", "12"], "--batch 12: expected a multiple of 8"),
        (["--batch", "0"], "--batch 0: expected a multiple of 8"),
        (["--width", "0"], "--width 0: expected a number above 0"),
        (["--width", "nan"], "--width nan: expected a number above 0"),
    ],
)
def test_bad_options_get_one_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "monitor", *options])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"signstep: {sentence}\n"


@pytest.mark.slow
@pytest.mark.usefixtures("without_cockpit")
def test_the_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A third of the layers, and fewer steps a round.
    monkeypatch.setattr(monitor_loops, "build", lambda name, **options: build("resnet8", **options))
    monkeypatch.setattr(monitor_loops, "REPEATS", 1)
    out = tmp_path / "new" / "folder"
    size = ["--width", "0.02", "--batch", "16", "--rounds", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "monitor", *size, "--out", str(out)])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "bench-monitor.json").read_text())
    text = (out / "bench-monitor.md").read_text()
    assert record["command"] == " ".join(["signstep bench monitor", *size, "--out", str(out)])
    assert {"cpu", "cores", "threads", "torch", "packages", "device"} <= record["machine"].keys()
    assert (record["batch"], record["every"], record["parts"]) == (16, EVERY, PARTS)
    assert [each["title"] for each in record["networks"]] == ["ResNet-18", "ResNet-18 without batch norm"]
    for each in record["networks"]:
        assert each["gradient_bytes"] == 4 * each["parameters"]
        assert each["title"] in printed
        assert f"## {each['title']}, {each['parameters']:,} parameters" in text
        assert len(each["rounds"]) == 2
        assert each["loops"].keys() == {"monitor", "monitor-accumulation"}
        assert list(each["missing"]) == ["Cockpit"]
        assert [target["limit"] for target in each["targets"]] == [5, 2, 5, 2]
        for key, loop in each["loops"].items():
            times = [r[key] for r in each["rounds"]]
            for kind in ("own", "other"):
                ratios = [r[kind] / r["plain"] for r in times]
                assert loop[f"{kind}_over_plain"]["median"] == pytest.approx(statistics.median(ratios))
            both = [100 * ((49 * r["other"] + r["own"]) / (50 * r["plain"]) - 1) for r in times]
            assert loop["overhead_percent"]["median"] == pytest.approx(statistics.median(both))
            plain, own = (loop["peak_bytes"][kind] for kind in ("plain", "own"))
            for name, value in (("all", "peak_over_gradients"), ("lasting", "lasting_peak_over_gradients")):
                assert loop[value] == pytest.approx((own[name] - plain[name]) / each["gradient_bytes"])
            # Of the plain loop the gradients last, and the sums that a loss is made of.
            assert each["gradient_bytes"] <= plain["lasting"] < 2 * each["gradient_bytes"] < plain["all"]
            assert own["lasting"] > plain["lasting"]
    for line in (*monitor_report.NOTES, "Cockpit: not measured: "):
        assert line in text
    assert str(monitor_loops.INSTALL) in text

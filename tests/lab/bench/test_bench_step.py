"""`signstep bench step`: what it records and refuses. Nothing here says how fast anything is."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from signstep.lab.bench import step_report, step_timing
from signstep.lab.bench.spread import BenchError, Spread
from signstep.lab.bench.step_contestants import COPY, PEER, SPARE_PEER, Contestant, CopyLoop, PlainDither, groups
from signstep.lab.bench.step_table import read_records, step_table
from signstep.lab.bench.step_targets import step_targets
from signstep.lab.bench.step_timing import StepEntry, StepResult, StepRound, StepRunner, set_up
from signstep.lab.bench.targets import Target
from signstep.lab.bench.workloads import STEP_WORKLOADS, shapes_of
from signstep.lab.cli import main
from signstep.lab.errors import BadInput

CPU = torch.device("cpu")
ALL = {contestant.key for group in groups(torch.float32).values() for contestant in group}
PACKAGES = {"pytorch-optimizer": "pytorch_optimizer", "lion-pytorch": "lion_pytorch", "heavyball": "heavyball"}
MAY_BE_MISSING = {*PACKAGES, "plain-compiled"}


class Fake:
    """An optimizer that does what it is told."""

    def __init__(self, params: Sequence[Parameter], change: str) -> None:
        self.params, self.change = list(params), change
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        with torch.no_grad():
            for p in self.params[: 1 if self.change == "first" else None]:
                if self.change != "nothing":
                    p.sub_(1)
                if self.change == "gradients":
                    assert p.grad is not None
                    p.grad.neg_()
                if self.change == "takes gradients":
                    assert p.grad is not None
                    p.grad = None


def fake(change: str, *, optional: bool = False) -> Contestant:
    return Contestant("fake", "Fake", "package", lambda params: Fake(params, change), optional=optional)


def lists() -> tuple[list[Parameter], list[torch.Tensor]]:
    return [Parameter(torch.randn(n)) for n in (3, 4)], [torch.randn(n) for n in (3, 4)]


@pytest.fixture(scope="module", params=["eager", pytest.param("compiled", marks=pytest.mark.long)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote; a process of its own, because packages change torch's settings on import.

    To compile what two contestants compile takes ten seconds and changes nothing of what is tested here.
    """
    out = tmp_path_factory.mktemp("bench")
    options = ["--workload", "50m", "--millions", "0.05", "--rounds", "4", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-m", "signstep", "bench", "step", *options]
    environment = os.environ | ({"TORCHDYNAMO_DISABLE": "1"} if request.param == "eager" else {})
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    (out / "printed").write_text(ran.stdout)
    return out


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file_of(folder, "json").read_text())
    return loaded


def file_of(folder: Path, suffix: str) -> Path:
    """The one result, named by the kind of machine."""
    (found,) = folder.glob(f"bench-step-*.{suffix}")
    return found


@pytest.fixture
def workload(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["workloads"]["50m"]
    return found


def spread(values: Sequence[float]) -> Mapping[str, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return pytest.approx({"median": statistics.median(values), "low": deciles[0], "high": deciles[-1]})


@pytest.mark.slow
def test_the_record_names_machine_command_and_date(record: dict[str, Any]) -> None:
    assert record["command"].startswith("signstep bench step --workload 50m --dtype float32 --device cpu --rounds 4")
    known = {"torch", "platform", "cpu", "cpu_capability", "isa", "caches", "threads", "device", "packages"}
    assert known <= record["machine"].keys()
    assert record["machine"]["torch"] == torch.__version__
    assert record["date"].endswith("+00:00")
    assert (record["workloads"]["50m"]["peer"], record["copy"]) == (PEER, COPY)


@pytest.mark.slow
def test_every_contestant_has_times_or_a_reason(workload: dict[str, Any]) -> None:
    contestants = workload["contestants"]
    assert contestants.keys() == ALL
    for key, each in contestants.items():
        assert "missing" not in each or (key in MAY_BE_MISSING and len(each["missing"]) > 15), each
    for key, module in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            assert contestants[key]["missing"] == f"not installed: pip install {key}"
        else:
            assert "median_seconds" in contestants[key], contestants[key]


@pytest.mark.slow
def test_every_round_has_each_of_its_group_once_in_a_changing_order(workload: dict[str, Any]) -> None:
    there = {key for key, each in workload["contestants"].items() if "missing" not in each}
    by_group: dict[str, list[list[str]]] = {}
    for each in workload["rounds"]:
        assert all(seconds > 0 for seconds in each["seconds"].values())
        by_group.setdefault(each["group"], []).append(list(each["seconds"]))
    for name, group in groups(torch.float32).items():
        orders = by_group[name]
        assert len(orders) == (2 if name == "plain dither" else 4)
        assert all(set(order) == {c.key for c in group} & there for order in orders)
        assert orders[0] != orders[1]
    assert {PEER, COPY} <= set.intersection(*(set(each["seconds"]) for each in workload["rounds"]))


@pytest.mark.slow
def test_ratios_and_shares_are_those_of_the_raw_times(workload: dict[str, Any]) -> None:
    contestants = workload["contestants"]
    for key, each in contestants.items():
        if "missing" in each:
            continue
        rounds = [r["seconds"] for r in workload["rounds"] if key in r["seconds"]]
        assert each["median_seconds"] == pytest.approx(statistics.median(r[key] for r in rounds))
        assert each["over_peer"] == spread([r[key] / r[PEER] for r in rounds])
        scale = each["bytes_per_parameter"] / contestants[COPY]["bytes_per_parameter"]
        assert each["share_of_copy"] == spread([scale * r[COPY] / r[key] for r in rounds])


@pytest.mark.slow
def test_targets_say_whether_the_median_meets_them(workload: dict[str, Any]) -> None:
    assert len(workload["targets"]) == 21
    for target in workload["targets"]:
        if target["measured"] is None:
            assert target["verdict"] == "not measured"
        else:
            kept = [
                value >= target["limit"] if target["at_least"] else value <= target["limit"]
                for value in (target["measured"]["low"], target["measured"]["high"])
            ]
            assert target["verdict"] == ("undecided" if len(set(kept)) == 2 else "met" if kept[0] else "missed")
    by_text = {target["target"]: target for target in workload["targets"]}
    clean = [r["seconds"]["clean"] / r["seconds"][PEER] for r in workload["rounds"]]
    assert by_text["clean, time over torch SGD(momentum=0.9, fused)"]["measured"] == spread(clean)


@pytest.mark.slow
def test_bytes(workload: dict[str, Any]) -> None:
    assert (workload["tensors"], workload["parameters"]) == (5, 50_000)
    moved = {"copy": 20, "sgd-fused": 20, "clean": 20, "dither": 20, "relative": 20, "momentum-0": 12, "hybrid": 20,
             "hybrid-sgd": 12, "bf16": 10, "eager": 20, "plain-foreach": 20}  # fmt: skip
    kept = {"copy": 0, "clean": 4, "momentum-0": 0, "hybrid": 4, "hybrid-sgd": 0, "bf16": 2, "sgd-fused": 4}
    moved |= {"state-bf16": 16}
    kept |= {"state-bf16": 2}
    assert 1 <= workload["contestants"]["state-int8"]["state_bytes_per_parameter"] < 1.1
    for key, expected in moved.items():
        # Relative dither keeps one number per tensor.
        assert workload["contestants"][key]["bytes_per_parameter"] == pytest.approx(expected, abs=0.01), key
    for key, expected in kept.items():
        # One number per tensor stands for a momentum that has been freed.
        freed = 5 * 4 if key == "hybrid-sgd" else 0
        assert workload["contestants"][key]["state_bytes"] == expected * 50_000 + freed, key
    # torch's Adam has a step count per tensor.
    assert workload["contestants"]["adam-fused"]["bytes_per_parameter"] == pytest.approx(28, abs=0.1)


@pytest.mark.slow
def test_the_table_is_printed_and_written(folder: Path, workload: dict[str, Any]) -> None:
    printed, written = (folder / "printed").read_text(), file_of(folder, "md").read_text()
    for each in workload["contestants"].values():
        assert each["label"] in written
        assert each["label"] in printed
    for target in workload["targets"]:
        assert f"| {target['target']} | " in written
    assert str(file_of(folder, "json")) in printed
    assert file_of(folder, "png").read_bytes().startswith(b"\x89PNG")
    drawing = file_of(folder, "svg").read_text()
    assert "var(--c-blue)" in drawing
    assert all(each["label"] in drawing for each in workload["contestants"].values() if "missing" not in each)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nothing", "Fake: a step left parameter 0 of 2 as it was"),
        ("first", "Fake: a step left parameter 1 of 2 as it was"),
        ("gradients", "Fake: a step changed the gradients"),
    ],
)
def test_a_contestant_that_does_not_do_its_work_is_an_error(change: str, message: str, optional: bool) -> None:
    with pytest.raises(BenchError, match=message):
        set_up([fake(change, optional=optional)], *lists())


def test_gradients_that_an_optimizer_takes_away_are_given_back() -> None:
    params, grads = lists()
    runner = StepRunner(fake("takes gradients"), params, grads)
    assert params[0].grad is None
    assert runner.seconds() > 0


def test_a_missing_package_and_a_failure_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(params: list[Parameter]) -> Fake:
        raise RuntimeError("no compiler\nand many lines")

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in PACKAGES.values() else find(name))
    broken = Contestant("broken", "Broken", "plain", fails, optional=True)
    runners, entries = set_up([*groups(torch.float32)["packages"], broken], *lists())
    assert runners.keys() == {COPY, PEER, "clean", "dither", "relative"}
    assert {key: entries[key].missing for key in PACKAGES} == {
        key: f"not installed: pip install {key}" for key in PACKAGES
    }
    assert entries["broken"].missing == "not available: no compiler"
    result = StepResult("50m", "few", 2, 7, PEER, entries, [StepRound("packages", dict.fromkeys(runners, 1.0))] * 2)
    assert step_report.row(result, "lion-pytorch") == ("lion-pytorch Lion", "not installed: pip install lion-pytorch")
    assert {t.text: t.verdict for t in step_targets(replace_missing(result))}[
        "clean, times faster than lion-pytorch Lion"
    ] == "not measured"
    with pytest.raises(RuntimeError, match="no compiler"):
        set_up([replace(broken, optional=False)], *lists())


def replace_missing(result: StepResult) -> StepResult:
    """`result` with an entry for every contestant."""
    for key in ALL:
        result.entries.setdefault(key, StepEntry(key, "torch", missing="not here"))
    return result


@pytest.mark.long
def test_a_compiler_that_is_not_there_is_a_row_of_the_table() -> None:
    code = (
        "import torch; from signstep.lab.bench.step_timing import set_up; "
        "from signstep.lab.bench.step_contestants import groups; "
        "c = [c for c in groups(torch.float32)['plain dither'] if c.key == 'plain-compiled']; "
        "print(set_up(c, [torch.nn.Parameter(torch.randn(7))], [torch.randn(7)])[1]['plain-compiled'].missing)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )
    assert ran.stdout.startswith("not available: ")
    assert "compiler" in ran.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ("signstep", "torch")
    monkeypatch.setattr(
        step_timing, "groups", lambda dtype, peer, only: {k: v for k, v in groups(dtype, peer).items() if k in fast}
    )
    result = step_timing.measure_workload("50m", dtype=dtype, device=CPU, rounds=2, millions=0.01)
    assert result.entries["clean"].bytes_per_parameter == result.entries[COPY].bytes_per_parameter == 10
    assert result.entries["clean"].state_bytes == 2 * result.parameters
    assert "bf16" not in result.entries
    works = result.peer == PEER
    assert result.entries[PEER].missing is None or not works
    assert result.entries[SPARE_PEER].missing is None
    of_sgd = {t.verdict for t in step_targets(replace_missing(result)) if "time over torch SGD(" in t.text}
    assert of_sgd <= {"met", "missed", "undecided", "not measured"}


def test_workloads() -> None:
    expected = {"resnet18": (62, 11_173_962), "50m": (5, 50_000_000), "gpt2": (148, 124_439_808)}
    for name in STEP_WORKLOADS:
        _, shapes = shapes_of(name, 50.0)
        assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == expected[name]


def test_the_plain_dither_is_a_dithered_sign_step() -> None:
    torch.manual_seed(0)
    params, grads = [Parameter(torch.zeros(1000))], [torch.full((1000,), 0.1)]
    params[0].grad = grads[0]
    optimizer = PlainDither(params, compiled=False)
    optimizer.step()
    # m is 0.01, as is sigma: the share of minus signs is Phi(-1).
    assert sorted(set(params[0].tolist())) == pytest.approx([-0.01, 0.01])
    assert 0.11 < float((params[0] > 0).float().mean()) < 0.21


def test_rows_that_are_not_wanted_are_left_out() -> None:
    chosen = groups(torch.float32, only=("hybrid", "clean", "adam-fused"))
    assert {name: [each.key for each in group] for name, group in chosen.items()} == {
        "signstep": [COPY, PEER, "clean", "hybrid"],
        "torch": [COPY, PEER, "adam-fused"],
    }
    assert [c.key for group in groups(torch.float32, only=(PEER,)).values() for c in group] == [COPY, PEER]
    result = step_timing.measure_workload("50m", device=CPU, rounds=2, millions=0.01, only=("momentum-0",))
    assert result.entries.keys() == {COPY, PEER, "momentum-0"}
    assert [t.text for t in step_targets(result)] == ["momentum 0, time over torch SGD(momentum=0.9, fused)"]


@pytest.mark.parametrize(
    ("values", "at_least", "verdict"),
    [
        ([0.7, 0.8, 0.9], False, "met"),
        ([0.7, 0.9, 1.4], False, "undecided"),
        ([0.9, 1.1, 1.4], False, "undecided"),
        ([1.1, 1.2, 1.3], False, "missed"),
        ([1.1, 1.2, 1.3], True, "met"),
        ([1.0, 1.0, 1.0], True, "met"),
        ([0.7, 0.8, 0.9], True, "missed"),
    ],
)
def test_a_range_that_straddles_the_limit_decides_nothing(values: list[float], at_least: bool, verdict: str) -> None:
    assert Target("clean", 1.0, at_least, Spread.of(values)).verdict == verdict
    assert Target("clean", 1.0, at_least, None).verdict == "not measured"


def test_the_table_has_every_kind_of_machine(tmp_path: Path) -> None:
    def entry(ratio: float) -> dict[str, Any]:
        moved = {"bytes_per_parameter": 20.0, "state_bytes_per_parameter": 4.0}
        return {"median_seconds": 1.0, "over_peer": {"median": ratio, "low": ratio, "high": ratio}} | moved

    kinds: list[tuple[dict[str, Any], float]] = [
        ({"cpu_capability": "AVX512"}, 0.5),
        ({"isa": "avx2"}, 1.5),
        ({"isa": None}, 3.0),
    ]
    for i, (isa, ratio) in enumerate(kinds):
        record = {
            "dtype": "float32",
            "machine": {"device": "cpu", "cpu": "AMD EPYC"} | isa,
            "workloads": {"50m": {"contestants": {"sgd-fused": entry(1.0), "clean": entry(ratio)}}},
        }
        (tmp_path / f"bench-step-{i}.json").write_text(json.dumps(record))
    assert step_table(read_records(tmp_path)) == [
        "| step | AMD EPYC, NO LIBRARY: 50 M | AMD EPYC, AVX512: 50 M | AMD EPYC, AVX2: 50 M | bytes moved | state |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| SGD, momentum 0.9, fused | 1.00 | 1.00 | 1.00 | 20 | 4 |",
        "| SignSGD | 3.00 | 0.50 | 1.50 | 20 | 4 |",
    ]


def test_a_table_without_results_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no result of a CPU; measure one with signstep bench step --out"):
        read_records(tmp_path)
    (tmp_path / "bench-step-x.json").write_text("{}")
    with pytest.raises(BadInput, match="not what signstep bench step writes"):
        read_records(tmp_path)


def test_the_limit_moves_the_clean_steps_bytes_in_place() -> None:
    loop = CopyLoop([torch.zeros(600), torch.zeros(400)])
    p, g, m = loop._p, loop._g, loop._m
    loop.step()
    assert loop._p is p
    assert loop._m is m
    assert [x.numel() * 8 for x in (p, g, m)] == [4000] * 3
    assert bool((p == -1).all())


def test_the_copy_moves_the_clean_steps_bytes() -> None:
    params = [torch.zeros(600), torch.zeros(400)]
    assert CopyLoop(params).bytes_moved == 20 * 1000
    assert CopyLoop([p.half() for p in params]).bytes_moved == 10 * 1000


def test_state_is_counted_once_and_at_any_depth() -> None:
    t = torch.zeros(10)
    assert (
        step_timing.state_bytes({"a": {0: [t, t[2:]], "step": 3}, "b": (torch.zeros(2, dtype=torch.int8), None)}) == 42
    )
    assert Spread.of([1.0, 3.0]) == Spread(2.0, pytest.approx(1.2), pytest.approx(2.8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload"], "--workload: expected at least one of resnet18, 50m, gpt2"),
        (["--rounds", "1"], "--rounds 1: expected at least 2"),
        (["--millions", "0"], "--millions 0: expected at least 0.001"),
        (["--millions", "nan"], "--millions nan: expected at least 0.001"),
        (
            ["--only", "clear"],
            "--only clear: expected some of "
            + ", ".join(dict.fromkeys(c.key for group in groups(torch.float32).values() for c in group)),
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "step", "--workload", "50m", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"signstep: {message}\n"

"""The cost model: its formulas, and the command."""

import json
import math
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signstep.distributed.local_methods import LOCAL_METHODS
from signstep.distributed.plan import FRAMING, Cost, Link, bits_per_second, outside, predict, steps_under_way
from signstep.distributed.reductions import REDUCTIONS, Gradients
from signstep.lab.bench import plan_report
from signstep.lab.bench.comm_methods import PEER
from signstep.lab.bench.work import NANOSECONDS, known_work
from signstep.lab.cli import main


@given(st.integers(1, 10**9))
def test_square_matrices_have_as_many_parameters(count: int) -> None:
    gradients = Gradients.square(count)
    assert gradients.parameters == count
    assert all(1 <= side <= 1000 for shape in gradients.shapes for side in shape)


@given(st.integers(10**9, 10**15))
def test_large_models_are_about_a_thousand_matrices(count: int) -> None:
    gradients = Gradients.square(count)
    assert gradients.parameters == count
    assert 999 <= len(gradients.shapes) <= 1010


@pytest.mark.parametrize(
    ("text", "rate"), [("1bit", 1), ("10kbit", 1e4), ("100Mbit", 1e8), ("2.5gbit", 2.5e9), (" 1gbit ", 1e9)]
)
def test_rates(text: str, rate: float) -> None:
    assert bits_per_second(text) == rate


@pytest.mark.parametrize("text", ["", "10", "0mbit", "-1mbit", "10mbps", "1e3mbit", "nanbit", "tenmbit"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="expected a rate such as 100mbit"):
        bits_per_second(text)


@pytest.mark.parametrize(
    ("text", "link"),
    [("1gbit", Link(1e9)), ("10mbit/50ms", Link(1e7, 0.05)), (" 1kbit/2.5S ", Link(1e3, 2.5)), ("1bit/0us", Link(1))],
)
def test_links(text: str, link: Link) -> None:
    assert Link.of(text) == link


@pytest.mark.parametrize("text", ["10mbit/", "10mbit/50", "10mbit/-1ms", "10mbit/1m", "10mbit/1ms/1ms", "10mbit/nanms"])
def test_what_is_no_latency(text: str) -> None:
    with pytest.raises(ValueError, match="expected a rate and the latency of a round trip, such as 10mbit/50ms"):
        Link.of(text)


@given(st.integers(1, 10**8), st.integers(1, 300))
def test_bytes_of_the_collectives(count: int, workers: int) -> None:
    gradients = Gradients.square(count)
    share = (workers - 1) / workers
    expected = {"ddp-fp32": 8, "bf16": 4, "int8-sum": 2, "vote": 1 / 4, "vote-dithered": 1 / 4, "vote-ef": 1 / 4}
    expected |= {"vote-abstain": 3 / 8}
    for key, each_way in expected.items():
        assert REDUCTIONS[key].payload(gradients, workers) == pytest.approx(each_way * count * share)
    # One sided error feedback sends everything to everybody, with a scale of 4 bytes per 1024 elements.
    one_way = count * (workers - 1) * (1 / 8 + 4 / 1024)
    assert REDUCTIONS["ef-sign"].payload(gradients, workers) == pytest.approx(one_way)
    assert REDUCTIONS["ef-sign-two-sided"].payload(gradients, workers) == pytest.approx(one_way * 2 / workers)
    assert REDUCTIONS["top-k"].payload(gradients, workers) == pytest.approx(0.08 * count * (workers - 1))


def test_powersgd_sends_factors_of_large_matrices_and_all_of_small_ones() -> None:
    payload = REDUCTIONS["powersgd"].payload
    assert payload(Gradients(((512, 256, 3, 3),)), 4) == 8 * 2 * (512 + 256 * 9) * 3 / 4
    assert payload(Gradients(((512,), (4, 4), ())), 4) == 8 * (512 + 16 + 1) * 3 / 4
    # 2 (64 + 3) 2 = 268 of 192 elements: nothing would be saved.
    assert payload(Gradients(((64, 3),)), 2) == 8 * 192 / 2


def test_the_first_is_what_the_benchmark_compares_with() -> None:
    assert next(iter(REDUCTIONS)) == PEER


@given(st.integers(1, 10**8), st.integers(1, 64), st.floats(1e5, 1e11), st.floats(0, 10), st.floats(0, 0.1))
def test_predictions(count: int, workers: int, bandwidth: float, step: float, latency: float) -> None:
    gradients, cost = Gradients.square(count), Cost(workers, Link(bandwidth, latency), step)
    for method in REDUCTIONS.values():
        found = predict(method, gradients, cost)
        waiting = method.round_trips(gradients, workers) * latency if workers > 1 else 0.0
        wire = 8 * FRAMING * found.payload / bandwidth
        assert found.wire == pytest.approx(wire)
        assert found.communication == pytest.approx(wire + waiting)
        assert found.best == pytest.approx(max(step, wire + waiting / gradients.buckets))
        assert found.worst == pytest.approx(step + found.communication)
        assert found.best <= found.worst
        assert (found.communication == 0) == (workers == 1 or found.payload == 0)


@given(st.integers(1, 10**8), st.integers(1, 64), st.integers(1, 1000), st.floats(0, 10), st.floats(0, 10))
def test_a_round_is_shared_by_its_steps(count: int, workers: int, every: int, step: float, work: float) -> None:
    gradients, cost = Gradients.square(count), Cost(workers, Link(1e8, 0.02), step)
    for method in LOCAL_METHODS.values():
        whole = predict(method, gradients, cost, work=work)
        share = predict(method, gradients, cost, work=work, every=every)
        for name in ("payload", "wire", "waiting", "work", "communication"):
            assert every * getattr(share, name) == pytest.approx(getattr(whole, name))
        assert share.worst == pytest.approx(step + share.communication + work / every)
        assert max(step, share.best) <= share.worst <= whole.worst * (1 + 1e-9)
        under_way = steps_under_way(share, cost, every)
        assert 0 <= under_way < every
        assert under_way == every - 1 or under_way * step >= every * share.communication * (1 - 1e-9)


@given(st.integers(1, 10**9), st.integers(2, 1000), st.integers(1, 500))
def test_bytes_of_rounds(count: int, workers: int, every: int) -> None:
    """A vote sends n (M - 1) / (4 M H), DiLoCo 32 times as much in fp32 and 8 times in int8, with 4 bytes more per
    1024 elements; all tell everybody 4 bytes of each parameter, and 8 of themselves.
    """
    gradients, cost = Gradients.square(count), Cost(workers, Link(1e8), 0.1)
    vote = count * (workers - 1) / (4 * workers * every)
    said = 4 * (workers - 1) * (2 + len(gradients.shapes)) / every
    for key, times in (("local-vote", 1), ("diloco", 32), ("diloco-int8", 8 * (1 + 4 / 1024))):
        assert predict(LOCAL_METHODS[key], gradients, cost, every=every).payload == pytest.approx(times * vote + said)


def test_round_trips_of_one_bucket() -> None:
    """Rings of all-reduces are 2 (M - 1) long; a vote goes there and back, and so does a mean of two phases."""
    expected = {"ddp-fp32": 30, "bf16": 30, "int8-sum": 30, "powersgd": 90, "vote": 2, "vote-ef": 2}
    expected |= {"ef-sign": 1, "ef-sign-two-sided": 2, "one-bit-adam": 2, "top-k": 1}
    one, three = Gradients.square(200_000), Gradients.square(10_000_000)
    assert (one.buckets, three.buckets) == (1, 3)
    assert {key: REDUCTIONS[key].round_trips(one, 16) for key in expected} == expected
    # 10 parts, two at a time.
    expected = {key: 3 * trips for key, trips in expected.items()} | {"vote": 10, "vote-ef": 10}
    assert {key: REDUCTIONS[key].round_trips(three, 16) for key in expected} == expected


@pytest.mark.parametrize(("parameters", "parts"), [(200_000, 1), (2_000_000, 1), (4_000_000, 2), (10_000_000, 5)])
def test_round_trips_of_a_round(parameters: int, parts: int) -> None:
    """What is said, then there and back: DiLoCo in one message, the vote in parts of two matrices, two at a time."""
    gradients, cost = Gradients.square(parameters), Cost(16, Link(1e9, 0.02), 0.0)
    expected = {"local-vote": 1 + 2 * math.ceil(parts / 2), "diloco": 3, "diloco-int8": 3}
    for key, trips in expected.items():
        found = predict(LOCAL_METHODS[key], gradients, cost, every=8)
        assert found.waiting == pytest.approx(trips * 0.02 / 8)
        assert found.best == pytest.approx(found.wire + 3 * 0.02 / 8)


def test_the_plan_counts_what_a_local_vote_sends_in_turns() -> None:
    with mock.patch("signstep.distributed.vote.LEAST_PART", 10):
        assert LOCAL_METHODS["local-vote"].round_trips(Gradients(((3, 4), (4,), (6,), (5,))), 4) == 1 + 2 * 2


@pytest.mark.parametrize("options", [{"workers": 0}, {"every": 0}])
def test_no_workers_or_steps_are_an_error(options: dict[str, int]) -> None:
    cost = Cost(options.get("workers", 4), Link(1e8), 0.0)
    with pytest.raises(ValueError, match=r"(workers|every)=0: expected at least 1"):
        predict(REDUCTIONS["vote"], Gradients.square(10), cost, every=options.get("every", 1))


@given(st.floats(0.1, 10), st.floats(1, 2), st.floats(0.01, 20))
def test_outside(low: float, ratio: float, measured: float) -> None:
    found = outside(measured, low, low * ratio)
    assert (found == 0) == (low <= measured <= low * ratio)
    assert found >= -1
    assert (found < 0) == (measured < low)


def test_the_command_shows_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--params", "11e6", "--workers", "15", "--rate", "100mbit/20ms", "--step-ms", "80",
              "--every", "8", "100"])  # fmt: skip
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(method.label.partition(",")[0] in printed for method in REDUCTIONS.values())
    assert "82.1 MB" in printed  # 8 n 14 / 15
    assert "11,000,000 parameters, 15 workers, 100 Mbit/s each way, round trip 20 ms, step 80 ms" in printed
    assert all(f"{method.label}, H = {every}" in printed for method in LOCAL_METHODS.values() for every in (8, 100))
    assert "Expected vote of 15 workers; slope at 0: 2.51" in printed
    assert "7 of 15" in printed


def test_one_worker_whose_steps_take_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--params", "1", "--workers", "1", "--step-ms", "0", "--rate", "1gbit/1s", "--snr", "inf"])
    assert stopped.value.code == 0
    assert "1 parameters, 1 workers" in capsys.readouterr().out


def test_seven_billion_parameters_and_a_thousand_workers(capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--params", "7e9", "--workers", "1000", "--rate", "10mbit/50ms", "--step-ms", "1000"])
    assert stopped.value.code == 0
    assert "55.9 GB" in capsys.readouterr().out  # 8 n 999 / 1000
    assert time.process_time() - begin < 20  # a second or two: no method goes through 7e9 of anything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "fast"], "--rate fast: expected a rate such as 100mbit or 1gbit"),
        (["--rate", "1gbit/"], "--rate 1gbit/: expected a rate and the latency of a round trip, such as 10mbit/50ms"),
        (["--every", "8", "0"], "--every 0: expected at least 1"),
        (["--snr", "nan"], "--snr nan: out of range; see signstep plan --help"),
        *(
            (["--params", bad], f"--params {bad}: expected a whole number from 1 to 1e15, such as 4e6, 250K or 11M")
            for bad in ("0", "nan", "many", "11X", "1e16", "-3", "0.5")
        ),
        (["--workers", "0"], "--workers 0: out of range; see signstep plan --help"),
        (["--step-ms", "-1"], "--step-ms -1: out of range; see signstep plan --help"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"signstep: {message}\n"


def cell(rate: str, bits: float | None, seconds: float, latency: float | None = None) -> dict[str, object]:
    """Of bench-comm.json, of fp32 DDP on two ranks that each work for 20 ms."""
    spread = {"median": seconds, "low": seconds, "high": seconds}
    methods = {"ddp-fp32": {"seconds": spread, "bytes_sent": 4.04e6, "cpu_seconds": 0.02}}
    found: dict[str, object] = {"workload": "1e6", "ranks": 2, "rate": rate, "bits_per_second": bits}
    found |= {} if latency is None else {"latency_seconds": latency}
    return {**found, "methods": methods}


def write_record(path: Path, *cells: dict[str, object], cores: int = 2) -> Path:
    workload = {"title": "small", "shapes": [[1000, 1000]]}
    path.write_text(json.dumps({"machine": {"cores": cores}, "workloads": {"1e6": workload}, "cells": cells}))
    return path


def test_the_model_is_checked_against_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 MB at 100 Mbit/s are 320 ms, and with frames 334.6; 20 ms more with nothing overlapped. Two buckets wait for
    two round trips of 40 ms each, at the same time or one after the other.
    """
    slow, late = cell("100mbit", 1e8, 0.34), cell("100mbit/40ms", 1e8, 0.5, 0.04)
    path = write_record(tmp_path / "bench-comm.json", cell("none", None, 0.02), slow, cell("10mbit", 1e7, 6.7317), late)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--check", str(path)])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "20.0–20.0" in printed
    assert "335–355" in printed
    assert "415–515" in printed
    assert "time: 3 of 4 predictions hold; error median 0.0 %, largest +100 % (1e6, 2 ranks, 10mbit" in printed
    assert "bytes: median +1.0 %, from +1.0 to +1.0 %" in printed


def test_work_is_taken_from_another_record_and_ranks_take_turns_on_cores(tmp_path: Path) -> None:
    path = write_record(tmp_path / "one.json", cell("100mbit", 1e8, 0.34), cores=1)
    other = write_record(tmp_path / "other.json", cell("none", None, 0.02))
    (checked,) = plan_report.check(path, other)
    assert checked.predicted.work == pytest.approx(0.04)
    assert known_work(other, 16) == {"ddp-fp32": pytest.approx(2e-8)}


def test_work_is_that_of_the_nearest_number_of_workers(tmp_path: Path) -> None:
    cells = [cell("none", None, 0.02) | {"ranks": ranks} for ranks in (2, 8)]
    cells[1]["methods"] = {"ddp-fp32": {"cpu_seconds": 0.05}}
    path = write_record(tmp_path / "two.json", *cells)
    assert [known_work(path, workers)["ddp-fp32"] for workers in (1, 3, 5, 1000)] == pytest.approx(
        [2e-8, 2e-8, 5e-8, 5e-8]
    )


@pytest.mark.parametrize("content", ["[]", '{"cells": [], "workloads": {}}', '{"cells": [3], "workloads": {}}'])
def test_a_record_without_work(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench-comm.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--measured", str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"signstep: --measured {path}: ")
    assert len(error.splitlines()) == 1


def test_the_work_that_is_known_is_the_measured_one() -> None:
    path = Path(__file__).parents[2] / "results/bench-comm-latency/bench-comm.json"
    measured = known_work(path, 4)
    assert set(measured) <= set(REDUCTIONS)
    assert {*(method.like for method in LOCAL_METHODS.values()), PEER} <= set(measured)
    assert {key: round(1e9 * each, 1) for key, each in measured.items()} == NANOSECONDS
    assert {key: 1e9 * each for key, each in known_work(None, 16).items()} == pytest.approx(NANOSECONDS)


@pytest.mark.parametrize("folder", ["bench-comm", "bench-comm-amd-epyc", "bench-comm-resnet18", "bench-comm-latency"])
def test_records_of_every_age_can_be_checked(folder: str) -> None:
    path = Path(__file__).parents[2] / "results" / folder / "bench-comm.json"
    checked = plan_report.check(path)
    assert len(checked) >= 18
    assert all(math.isfinite(each.time_error) and -0.05 < each.bytes_error < 0.5 for each in checked)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not what signstep bench comm writes"),
        ("{}", "not what signstep bench comm writes"),
        ('{"cells": [{"rate": 3}]}', "not what signstep bench comm writes"),
        ('{"cells": [{"rate": 3}], "workloads": {}}', "not what signstep bench comm writes"),
        ('{"cells": [], "workloads": {}}', "a prediction needs the same methods at a rate and at the rate none"),
    ],
)
def test_a_record_that_cannot_be_checked(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench-comm.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--check", str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"signstep: --check {path}: ")
    assert message in error

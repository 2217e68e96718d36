"""The cost model: its formulas, and the command."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signstep.distributed.plan import FRAMING, Cost, Link, bits_per_second, outside, predict
from signstep.distributed.reductions import REDUCTIONS, Gradients
from signstep.lab.bench.comm_methods import PEER
from signstep.lab.cli import main


@given(st.integers(1, 10**9))
def test_square_matrices_have_as_many_parameters(count: int) -> None:
    gradients = Gradients.square(count)
    assert gradients.parameters == count
    assert all(1 <= side <= 1000 for shape in gradients.shapes for side in shape)


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
        waits = method.delays(workers) * gradients.buckets * latency / 2 if workers > 1 else 0.0
        assert found.communication == pytest.approx(8 * FRAMING * found.payload / bandwidth + waits)
        assert found.best == max(step, found.communication)
        assert found.worst == pytest.approx(step + found.communication)
        assert (found.communication == 0) == (workers == 1 or found.payload == 0)


def test_no_workers_is_an_error() -> None:
    with pytest.raises(ValueError, match="workers=0: expected at least 1"):
        predict(REDUCTIONS["vote"], Gradients.square(10), Cost(0, Link(1e8), 0.0))


@given(st.floats(0.1, 10), st.floats(1, 2), st.floats(0.01, 20))
def test_outside(low: float, ratio: float, measured: float) -> None:
    found = outside(measured, low, low * ratio)
    assert (found == 0) == (low <= measured <= low * ratio)
    assert found >= -1
    assert (found < 0) == (measured < low)


def test_the_command_shows_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--params", "11e6", "--workers", "15", "--bandwidth", "100mbit", "--step-ms", "80"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(method.label.partition(",")[0] in printed for method in REDUCTIONS.values())
    assert "82,133,333" in printed  # 8 n 14 / 15
    assert "Expected vote of 15 workers; slope at 0: 2.51" in printed
    assert "7 of 15" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bandwidth", "fast"], "--bandwidth fast: expected a rate such as 100mbit or 1gbit"),
        *(
            (["--params", bad], f"--params {bad}: expected a whole number from 1 to 1e15, such as 4e6, 250K or 11M")
            for bad in ("0", "nan", "many", "11X", "1e16", "-3", "0.5")
        ),
        (["--workers", "0"], "--workers 0: out of range; see signstep plan --help"),
        (["--step-ms", "-1"], "--step-ms -1: out of range; see signstep plan --help"),
        (["--latency-ms", "inf"], "--latency-ms inf: out of range; see signstep plan --help"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"signstep: {message}\n"


def record(rate: str, bits: float | None, seconds: float) -> dict[str, object]:
    """One cell of bench-comm.json, of fp32 DDP on two ranks."""
    spread = {"median": seconds, "low": seconds, "high": seconds}
    methods = {"ddp-fp32": {"seconds": spread, "bytes_sent": 4.04e6}}
    return {"workload": "1e6", "ranks": 2, "rate": rate, "bits_per_second": bits, "methods": methods}


def test_the_model_is_checked_against_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 MB at 100 Mbit/s are 320 ms, and with frames 334.6; 20 ms more with nothing overlapped."""
    path = tmp_path / "bench-comm.json"
    workload = {"title": "small", "shapes": [[1000, 1000]]}
    free, slow, slower = record("none", None, 0.02), record("100mbit", 1e8, 0.34), record("10mbit", 1e7, 6.7317)
    path.write_text(json.dumps({"workloads": {"1e6": workload}, "cells": [free, slow, slower]}))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--check", str(path)])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "335–355" in printed
    assert "time: 1 of 2 predictions hold; error median 50.0 %, largest +100 % (1e6, 2 ranks, 10mbit" in printed
    assert "bytes: median +1.0 %, from +1.0 to +1.0 %" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not what signstep bench comm writes"),
        ("{}", "not what signstep bench comm writes"),
        ('{"cells": [{"rate": 3}]}', "not what signstep bench comm writes"),
        ('{"cells": []}', "a prediction needs the same workload and ranks at a rate and at the rate none"),
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

"""`signstep bench comm` with real processes: what it counts, what it writes, and that nothing is left behind."""

import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gang import gang
from signstep.distributed import Bucket, GradientHook
from signstep.distributed.plan import FRAMING, Link
from signstep.distributed.reductions import REDUCTIONS
from signstep.lab.bench import comm_cells, comm_report, netns, plan_report
from signstep.lab.bench.comm_cells import (
    CommCell,
    CommPlan,
    CommResult,
    CommWorkload,
    Ranks,
    default_rates,
    measure_cells,
)
from signstep.lab.bench.comm_methods import PEER
from signstep.lab.bench.comm_rank import CommRunner, CommWindow
from signstep.lab.bench.spread import BenchError
from signstep.lab.cli import main

REASON = netns.missing()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LOOPBACK = ["--rates", "loopback", "--ranks", "2"]


def processes(of: int) -> list[int]:
    """The ids of a process's descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [child for child, parent in parents.items() if parent == of]
    return found + [each for child in found for each in processes(child)]


def are_gone(ids: list[int], seconds: float = 30) -> bool:
    """Whether all end in this time; what nobody has waited for counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stats = [Path(f"/proc/{each}/stat") for each in ids]
        alive = [s for s in stats if s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z"]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def check_cell(cell: dict[str, Any], methods: list[str]) -> None:
    """Summaries are those of the raw windows, which every method has once per round."""
    assert len(cell["rounds"]) >= 3
    for each in cell["rounds"]:
        assert sorted(each) == sorted(methods)
    for key in methods:
        seconds = [each[key]["seconds"] for each in cell["rounds"]]
        ratios = [each[PEER]["seconds"] / each[key]["seconds"] for each in cell["rounds"]]
        found = cell["methods"][key]
        assert found["seconds"]["median"] == pytest.approx(statistics.median(seconds))
        assert found["times_faster"]["median"] == pytest.approx(statistics.median(ratios))
        assert found["seconds"]["low"] <= found["seconds"]["median"] <= found["seconds"]["high"]
        assert found["steps_per_window"] >= 1


@pytest.mark.slow
def test_loopback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = [PEER, "bf16", "int8-sum", "vote"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "comm", *LOOPBACK, "--params", "2e4", "--methods", *methods, "--rounds", "3",
              "--seconds", "0.05", "--out", str(tmp_path)])  # fmt: skip
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "bench-comm.json").read_text())
    assert record["command"].startswith("signstep bench comm --rates loopback --ranks 2 --methods ddp-fp32 bf16")
    assert record["workloads"]["2e4"]["parameters"] == 20_000
    assert {"torch", "cpu", "cores", "platform"} <= record["machine"].keys()
    (cell,) = record["cells"]
    check_cell(cell, methods)
    assert cell["methods"][PEER]["payload"] == 80_000
    assert all(each["bytes_sent"] is None for each in cell["methods"].values())
    written = (tmp_path / "bench-comm.md").read_text()
    for text in (printed, written):
        assert "int8 sum of signs" in text
        assert "payload by formula, not counted" in text.replace("\n", " ")
    assert "| vote | " in written
    assert (tmp_path / "bench-comm-2e4.png").read_bytes().startswith(b"\x89PNG")
    assert "int8 sum of signs" in (tmp_path / "bench-comm-2e4.svg").read_text()


@pytest.mark.slow
@needs_namespaces
def test_every_method_sends_what_its_formula_says() -> None:
    workload = CommWorkload.of("1e5")
    with netns.Network(3) as network, Ranks(3, network) as ranks:
        trial = ranks.set_up(workload, list(REDUCTIONS), time.monotonic() + 100)
    for key in REDUCTIONS:
        payload = REDUCTIONS[key].payload(workload.gradients, 3)
        # Headers, acknowledgements, padding and two barriers.
        assert payload <= trial[key].sent < 1.03 * payload + 12_000, key


@pytest.mark.slow
@needs_namespaces
def test_namespaces_limit_rates(tmp_path: Path) -> None:
    """No step is faster than its bytes at the rate of the link."""
    cells: list[int] = []
    seen: set[int] = set()

    def done(result: CommResult) -> None:
        cells.append(len(result.cells))
        seen.update(processes(os.getpid()))

    workload, methods = CommWorkload.of("1e5"), (PEER, "vote")
    plan = CommPlan(("none", "20mbit"), (2,), methods, (workload,), rounds=3, seconds=0.0)
    result = measure_cells(plan, minutes=3, done=done)
    assert cells == [1, 2]
    assert len(seen) >= 5  # a hub, and for each rank a namespace's holder and a process
    assert are_gone(list(seen - set(processes(os.getpid()))))
    shaped = result.cells[1]
    for key, steps in shaped.steps.items():
        total = steps * shaped.sent(key, workload.gradients) - netns.burst(20e6)
        for each in shaped.rounds:
            assert each[key].seconds * steps > 0.9 * total * 8 / 20e6, key

    paths = comm_report.write(result, tmp_path, "signstep bench comm")
    checked = [each for each in plan_report.check(paths[0]) if each.rate == "20mbit"]
    assert [each.label for each in checked] == [REDUCTIONS[key].label for key in methods]
    peer = checked[0]
    assert peer.predicted.communication == pytest.approx(8 * 400_000 * FRAMING / 20e6)
    assert 0 <= peer.bytes_error < 0.05


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (["10mbit", "none"], "gloo, links without added latency"),
        (["10mbit/50ms"], "gloo, after a slash the latency of a round trip"),
        (["10mbit", "10mbit/50ms"], "gloo, after a slash the latency of a round trip, else none added"),
    ],
)
def test_reports_name_the_latency(rates: list[str], said: str, tmp_path: Path) -> None:
    workload, window = CommWorkload.of("1e4"), CommWindow(1.0, 41_000.0, 0.1)
    cells = [CommCell("1e4", 2, rate, {PEER: 1}, [{PEER: window}] * 3) for rate in rates]
    comm_report.write(CommResult({"1e4": workload}, [PEER], cells), tmp_path, "signstep bench comm")
    record = json.loads((tmp_path / "bench-comm.json").read_text())
    assert [each["latency_seconds"] for each in record["cells"]] == [0.05 if "/" in rate else 0.0 for rate in rates]
    assert [each["bits_per_second"] for each in record["cells"]] == [None if rate == "none" else 1e7 for rate in rates]
    written = (tmp_path / "bench-comm.md").read_text()
    assert ("links of 10mbit and 50ms for a round trip" in written) == ("10mbit/50ms" in rates)
    assert f"{said}<" in (tmp_path / "bench-comm-1e4.svg").read_text()


@needs_namespaces
def test_two_networks_live_side_by_side_and_leave_nothing() -> None:
    before = os.readlink("/proc/self/ns/net"), sorted(os.listdir("/sys/class/net"))
    with netns.Network(2) as one, netns.Network(3) as other:
        for network in (one, other):
            network.shape(Link(1e8))
            network.shape(None)
            network.shape(None)
            spaces = [
                subprocess.run(network.command(rank, ["readlink", "/proc/self/ns/net"]), capture_output=True, text=True)
                for rank in range(network.ranks)
            ]
            assert len({each.stdout for each in spaces}) == network.ranks
            assert before[0] not in {each.stdout.strip() for each in spaces}
        holders = [*one.holders, *other.holders]
        assert len(holders) == 7
    assert are_gone(holders)
    assert (os.readlink("/proc/self/ns/net"), sorted(os.listdir("/sys/class/net"))) == before


@needs_namespaces
def test_the_counter_is_the_kernels(tmp_path: Path) -> None:
    """What /proc shows is what /sys shows, in this process's own namespace."""
    assert netns.bytes_sent("lo") <= int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())
    with pytest.raises(ValueError, match="device='nothing': there is no such interface"):
        netns.bytes_sent("nothing")
    code = (
        "import socket; from signstep.lab.bench.netns import bytes_sent; before = bytes_sent('wire'); "
        "s = socket.socket(type=socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1); "
        "s.sendto(bytes(1000), ('10.231.0.255', 9)); print(bytes_sent('wire') - before)"
    )
    with netns.Network(2) as network:
        ran = subprocess.run(network.command(0, [sys.executable, "-c", code]), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 1042  # payload, and headers of UDP, IP and Ethernet


@needs_namespaces
def test_a_network_that_cannot_be_set_up_is_one_sentence() -> None:
    with netns.Network(2) as network:
        with pytest.raises(netns.NetworkError, match=r"^setting up the network failed at tc 'qdisc replace[^\n]*$"):
            network.shape(Link(0))


def test_without_root_or_tools_a_rate_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_rates() == ("loopback",)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "comm", "--rates", "100mbit", "--ranks", "2", "--params", "1e4"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    if sys.platform.startswith("linux"):
        assert error == "signstep: network namespaces need root; --rates loopback measures without them"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(netns, "SEARCH_PATH", "/nowhere")
    if sys.platform.startswith("linux"):
        assert netns.missing() == "there is no unshare and no nsenter and no ip and no tc here: " + (
            "install iproute2 and util-linux"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rate"),
    [
        pytest.param(signal.SIGKILL, "1gbit", marks=pytest.mark.long),
        (signal.SIGTERM, "1gbit"),
        (signal.SIGKILL, "1gbit/1ms"),
    ],
)
def test_no_rank_outlives_the_command(number: signal.Signals, rate: str, tmp_path: Path) -> None:
    rates = ["--rates", "loopback" if REASON else rate]
    options = [*LOOPBACK[2:], "--params", "1e4", "--methods", PEER, "--rounds", "100000", "--seconds", "1e9"]
    with (tmp_path / "said").open("w") as said:
        command = [sys.executable, "-m", "signstep", "bench", "comm", *rates, *options]
        # A killed process leaves its temporary files.
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 60
        while "timing" not in (tmp_path / "said").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        children = processes(process.pid)
        assert len(children) >= (2 if REASON else 5)
        process.send_signal(number)
        assert process.wait(timeout=30) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert are_gone(children)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_rank_that_fails_is_named() -> None:
    with Ranks(2, None) as ranks:
        with pytest.raises(BenchError, match=r"rank [01] of 2 has ended: KeyError: 'nonsense'"):
            ranks.set_up(CommWorkload.of("1000"), ["nonsense"], time.monotonic() + 60)
        ids = [each.pid for each in ranks.processes]
    assert are_gone(ids)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_benchmark_and_time_runs_out() -> None:
    with Ranks(2, None) as ranks:
        ranks.set_up(CommWorkload.of("1000"), [PEER], time.monotonic() + 60)
        endless = {"expected": {PEER: 0.0}, "rounds": 10**9, "seconds": 1e9}
        with pytest.raises(BenchError, match="time is over: give it more with --max-minutes"):
            ranks.ask([endless] * 2, time.monotonic() + 0.2)
        ranks.processes[1].kill()
        with pytest.raises(BenchError, match=r"rank [01] of 2 has ended"):
            ranks.ask([endless] * 2, time.monotonic() + 60)


class Local(GradientHook):
    """A reduction that reduces nothing."""

    def reduce(self, bucket: Bucket) -> None:
        pass


def _idle(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.0


def _local(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    Local(model).attach(model)


def _refusal(make: str) -> str:
    attach = {"idle": _idle, "local": _local}[make]
    REDUCTIONS["wrong"] = dataclasses.replace(REDUCTIONS["bf16"], attach=attach)
    params = [torch.ones(5, 4), torch.ones(7)]
    grads = [torch.full_like(p, 1.0 + dist.get_rank()) for p in params]
    try:
        CommRunner("wrong", params, grads, None)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("idle", "wrong: steps left parameter 0 of 2 as it was"),
        ("local", "wrong: parameters differ between ranks after 4 steps"),
    ],
)
def test_a_method_that_does_not_do_its_work_is_refused(make: str, message: str) -> None:
    assert gang(2).run(_refusal, make) == [message, message]


def _default_mean() -> list[float]:
    params = [torch.zeros(3)]
    CommRunner("ddp-fp32", params, [torch.full((3,), 1.0 + dist.get_rank())], None)
    return params[0].tolist()


def test_the_given_gradients_are_the_models() -> None:
    """The mean gradient is 1.5; four steps and two of the trial, by SGD with momentum 0.9 and rate 1e-3."""
    momentum, position = 0.0, 0.0
    for _ in range(6):
        momentum = 0.9 * momentum + 1.5
        position -= 1e-3 * momentum
    for each in gang(2).run(_default_mean):
        assert each == pytest.approx([position] * 3, rel=1e-5)


@pytest.mark.parametrize("text", ["4e6", "1000", "123457"])
def test_workloads_have_as_many_parameters_in_six_tensors(text: str) -> None:
    gradients = CommWorkload.of(text).gradients
    assert gradients.parameters == int(float(text))
    assert len(gradients.shapes) == 6
    assert all(math.prod(shape) > 0 for shape in gradients.shapes)
    assert CommWorkload.of("resnet18").gradients.parameters == 11_173_962


def test_cells_that_would_take_minutes_or_all_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = CommWorkload.of("resnet18")
    plan = CommPlan(("10mbit",), (4,), (PEER, "vote"), (workload,), rounds=3, seconds=1.0)
    result = measure_cells(plan, minutes=1, done=lambda _: None)
    assert result.cells == []
    assert result.left_out == ["ResNet-18, 4 ranks, 10mbit: a step of DDP, fp32 would take 56 s"]
    monkeypatch.setattr(comm_cells, "free_memory", lambda: 2**30)
    plan = CommPlan(("100mbit",), (4,), (PEER, "vote"), (workload,), rounds=3, seconds=1.0)
    (line,) = measure_cells(plan, minutes=1, done=lambda _: None).left_out
    assert line.startswith("ResNet-18, 4 ranks, 100mbit: 2 methods take about 2.7 GiB and 1.0 are free: name fewer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "5"], "--rates 5: expected a rate such as 100mbit or 1gbit, none (links that are not shaped) or "
         "loopback"),
        (["--rates", "10mbit/50"], "--rates 10mbit/50: expected a rate and the latency of a round trip, such as "
         "10mbit/50ms, none (links that are not shaped) or loopback"),
        (["--rates", "none/50ms"], "--rates none: expected a rate such as 100mbit or 1gbit, none (links that are not "
         "shaped) or loopback"),
        (["--ranks", "1"], "--ranks 1: expected from 2 to 250"),
        (["--ranks"], "--ranks: expected at least one"),
        (["--methods", "best"], f"--methods best: expected some of {', '.join(REDUCTIONS)}"),
        (
            ["--params", "few"],
            "--params few: expected a whole number from 1000 to 1e15, such as 4e6, 250K or 11M; or resnet18",
        ),
        (
            ["--params", "inf"],
            "--params inf: expected a whole number from 1000 to 1e15, such as 4e6, 250K or 11M; or resnet18",
        ),
        (["--params"], "--params: expected at least one"),
        (["--rounds", "2"], "--rounds 2: expected at least 3"),
        (["--max-minutes", "0"], "--max-minutes 0.0: expected a number above 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "comm", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"signstep: {message}\n"

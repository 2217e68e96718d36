"""Links with latency: what the relay does with packets, and what real processes see of it."""

import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signstep.distributed.plan import Link
from signstep.lab.bench import netns, relay
from signstep.lab.bench.delayed import DelayedNetwork, network

REASON = netns.missing() or (None if Path("/dev/net/tun").exists() else "there is no /dev/net/tun")
needs_devices = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def packet(to: int, size: int = 100, version: int = 4, segment: int = 0) -> bytes:
    """As a device gives it: a virtio_net_hdr, then an IP packet of `size` bytes to the rank `to`."""
    header = struct.pack("=BBHHHH", 0, int(segment > 0), 0, segment, 0, 0)
    return header + bytes([version << 4, *[0] * 15, 10, 231, 0, to + 1]) + bytes(size - 20)


class Devices:
    """Pairs of sockets in the place of TUN devices: what is written to one end is a packet that the relay reads."""

    def __init__(self, count: int) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
        self.outer = [pair[0] for pair in pairs]
        inner = [pair[1].detach() for pair in pairs]
        for each in (*inner, *(s.fileno() for s in self.outer)):
            os.set_blocking(each, False)
        self.inner = inner
        self.relay = relay.Relay(inner)

    def close(self) -> None:
        for s in self.outer:
            s.close()
        for each in self.inner:
            os.close(each)

    def received(self, rank: int) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self.outer[rank].recv(100_000))
            except BlockingIOError:
                return found


@pytest.fixture
def devices() -> Devices:
    made = Devices(3)
    yield made
    made.close()


def test_a_packet_arrives_when_its_delay_is_over_and_not_before(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(relay.time, "monotonic", lambda: now)
    devices.relay.delay = 0.5
    first, second = packet(2), packet(2, 200)
    devices.outer[0].send(first)
    devices.relay.take(devices.inner[0], now)
    devices.outer[1].send(second)
    devices.relay.take(devices.inner[1], now + 0.25)
    assert devices.relay.deliver() == pytest.approx(0.5)
    now = 100.499
    assert devices.relay.deliver() == pytest.approx(0.001)
    assert devices.received(2) == []
    now = 100.5
    assert devices.relay.deliver() == pytest.approx(0.25)
    assert devices.received(2) == [first]
    now = 101
    assert devices.relay.deliver() is None
    assert devices.received(2) == [second]
    assert devices.received(0) == devices.received(1) == []


def test_a_receivers_link_takes_packets_one_after_the_other_and_loses_what_would_wait_too_long(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets of 1000 bytes at 100 kbit/s are on the link for 0.08 s each; others' links are free meanwhile."""
    now = 0.0
    monkeypatch.setattr(relay.time, "monotonic", lambda: now)
    devices.relay.delay, devices.relay.rate, devices.relay.patience = 1.0, 100e3, 0.1
    for to in (1, 1, 1, 2):
        devices.outer[0].send(packet(to, 1000))
    devices.relay.take(devices.inner[0], now)
    assert devices.relay.deliver() == pytest.approx(1.08)
    now = 1.08 + 1e-9
    assert devices.relay.deliver() == pytest.approx(0.08)
    assert len(devices.received(1)) == len(devices.received(2)) == 1
    now = 10
    assert devices.relay.deliver() is None
    assert len(devices.received(1)) == 1  # the third would have waited for 0.16 s


def test_what_is_for_nobody_goes_nowhere(devices: Devices) -> None:
    for each in (packet(3), packet(254), packet(-1), packet(1, version=6)):
        devices.outer[0].send(each)
    devices.relay.take(devices.inner[0], 0.0)
    assert devices.relay.deliver() is None
    assert devices.received(1) == []


@given(st.integers(1, 65_000), st.integers(500, 1460))
def test_several_segments_take_the_time_of_each_with_its_headers(payload: int, segment: int) -> None:
    whole = packet(0, 52 + payload, segment=segment)
    full, rest = divmod(payload, segment)
    assert relay.bytes_on_link(whole) == full * (52 + segment) + (rest > 0) * (52 + rest)
    assert relay.bytes_on_link(packet(0, 52 + payload)) == 52 + payload


_ECHO = """
import socket
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 9))
print("up", flush=True)
while True:
    s.sendto(*s.recvfrom(100))
"""
_ASK = """
import socket, sys, time
s = socket.socket(type=socket.SOCK_DGRAM)
s.connect((sys.argv[1], 9))
for _ in range(5):
    begin = time.perf_counter()
    s.send(b"x")
    s.recv(100)
    print(time.perf_counter() - begin)
"""
_RECEIVE = """
import socket, sys, threading, time
server = socket.create_server(("0.0.0.0", 9))
print("up", flush=True)
def drain(connection):
    while connection.recv(1 << 20):
        pass
    connection.send(b"x")
threads = [threading.Thread(target=drain, args=server.accept()[:1]) for _ in range(int(sys.argv[1]))]
for each in threads:
    each.start()
for each in threads:
    each.join()
"""
_SEND = """
import socket, sys, time
begin = time.perf_counter()
s = socket.create_connection((sys.argv[1], 9))
s.sendall(bytes(int(sys.argv[2])))
s.shutdown(socket.SHUT_WR)
s.recv(1)
print(time.perf_counter() - begin)
"""


def start(net: netns.Network, rank: int, code: str, *words: str) -> subprocess.Popen[str]:
    command = net.command(rank, [sys.executable, "-c", code, *words])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@needs_devices
def test_a_round_trip_takes_its_time() -> None:
    with network(2, latency=True) as net:
        echo = start(net, 0, _ECHO)
        try:
            assert echo.stdout is not None
            assert echo.stdout.readline() == "up\n"
            for latency in (0.04, 0.0):
                net.shape(Link(1e8, latency))
                ask = start(net, 1, _ASK, net.address(0))
                trips = [float(line) for line in ask.communicate(timeout=30)[0].split()]
                assert len(trips) == 5
                assert all(trip >= latency for trip in trips)
                assert min(trips) < latency + 0.03  # more only on a machine that has no time at all, five times over
        finally:
            echo.kill()
            echo.communicate()


@needs_devices
@pytest.mark.parametrize("senders", [1, 2])
def test_rates_hold_where_packets_leave_and_where_they_arrive(senders: int) -> None:
    """Two senders to one receiver share its link."""
    size, rate = 1_000_000, 40e6
    with network(3, latency=True) as net:
        net.shape(Link(rate, 0.01))
        receiver = start(net, 0, _RECEIVE, str(senders))
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "up\n"
            sending = [start(net, 1 + i, _SEND, net.address(0), str(size)) for i in range(senders)]
            seconds = [float(each.communicate(timeout=60)[0]) for each in sending]
        finally:
            receiver.kill()
            receiver.communicate()
        assert max(seconds) > 8 * (senders * size - 2 * netns.burst(rate)) / rate
        assert net.bytes_sent(1) >= size


@needs_devices
def test_the_congestion_control_does_not_depend_on_the_machine() -> None:
    code = "import socket; s = socket.create_connection(('10.231.0.1', 9)); print(s.getsockopt(6, 13, 16))"
    with network(2, latency=True) as net:
        receiver = start(net, 0, _RECEIVE, "1")
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "up\n"
            assert start(net, 1, code).communicate(timeout=30)[0].startswith("b'cubic")
        finally:
            receiver.kill()
            receiver.communicate()


@needs_devices
def test_the_relay_ends_with_the_network() -> None:
    with network(2, latency=True) as net:
        assert isinstance(net, DelayedNetwork)
        process = net._relay
        assert process.poll() is None
        net.shape(Link(1e7, 0.02))
        net.shape(None)
    assert process.returncode is not None
    assert type(network(2, latency=False)) is netns.Network


@needs_devices
@pytest.mark.parametrize("line", ["", "no number"])
def test_a_relay_that_has_ended_is_an_error_in_one_sentence(line: str) -> None:
    """It was killed, or has said why it gave up."""
    with network(2, latency=True) as net:
        assert isinstance(net, DelayedNetwork)
        assert net._relay.stdin is not None
        if line:
            net._relay.stdin.write(line.encode())
        else:
            net._relay.kill()
        net._relay.wait(timeout=30)
        reason = "ValueError: [^\n]*" if line else "exit status -9"
        with pytest.raises(netns.NetworkError, match=rf"^the relay, [^\n]* has ended \({reason}\)$"):
            net.shape(Link(1e7, 0.02))


@needs_devices
def test_the_relay_ends_with_its_input() -> None:
    process = subprocess.Popen([sys.executable, "-I", relay.__file__, "wire"], stdin=-1, stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    assert process.stdin is not None
    process.stdin.close()
    process.stdout.close()
    assert process.wait(timeout=30) == 0


@needs_devices
def test_without_devices_a_network_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "DEVICE", "no/name")
    begin = time.monotonic()
    with pytest.raises(netns.NetworkError, match=r"^links with latency need TUN devices \(OSError: \[Errno 22\][^\n]*"):
        network(2, latency=True).__enter__()
    assert time.monotonic() - begin < 60


_COLLECTIVES = """
import os, sys, time, torch, torch.distributed as dist
rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ["GLOO_SOCKET_IFNAME"] = "wire"
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
x, out, wide = torch.ones(64), torch.empty(64 * world), torch.ones(64 * world)
def run(name):
    if name == "all_reduce":
        dist.all_reduce(x)
    elif name == "all_gather":
        dist.all_gather(list(out.chunk(world)), x)
    else:
        dist.all_to_all_single(out, wide)
for name in ("all_reduce", "all_gather", "all_to_all"):
    run(name)
    best = float("inf")
    for _ in range(3):
        dist.barrier()
        begin = time.perf_counter()
        run(name)
        best = min(best, time.perf_counter() - begin)
    most = torch.tensor(best)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if rank == 0:
        print(name, float(most), flush=True)
"""


@pytest.mark.slow
@needs_devices
def test_collectives_wait_for_as_many_round_trips_as_the_plan_says(tmp_path: Path) -> None:
    """Gloo's, of three ranks: a ring of 4 or 2, and 1. Ranks set out half a trip apart at most, after a barrier."""
    latency, world = 0.1, 3
    with network(world, latency=True) as net:
        net.shape(Link(1e9, latency))
        words = [str(world), str(tmp_path / "store")]
        ranks = [start(net, rank, _COLLECTIVES, str(rank), *words) for rank in range(world)]
        said = ranks[0].communicate(timeout=120)[0].split()
        assert [each.wait(timeout=60) for each in ranks] == [0] * world
    found = {name: float(seconds) / latency for name, seconds in zip(said[::2], said[1::2], strict=True)}
    for name, trips in {"all_reduce": 4, "all_gather": 2, "all_to_all": 1}.items():
        assert trips - 1 < found[name] < trips + 1.5, found

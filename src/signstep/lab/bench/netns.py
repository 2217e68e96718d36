"""A slow network on one machine: a Linux network namespace per rank, links of a chosen rate, and one bridge.

Every namespace is held open by a `cat` whose input is a pipe from this process. When this process ends, however it
ends, `cat` reads the end of its input and the kernel takes the namespaces apart with all that is in them. Nothing has a
name, so two networks never collide, and nothing touches the machine's own interfaces.

Links are shaped at both ends by tc's token bucket, `tbf`. It holds packets back but adds no latency of its own; links
with latency are in `delayed`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from signstep.distributed.plan import Link
from signstep.lab.errors import UserError

DEVICE = "wire"
"""A rank's interface, in its namespace."""
SUBNET = "10.231.0.0/24"
"""Of the ranks' addresses."""
_COUNTERS = "/proc/self/net/dev"
_TOOLS = ("unshare", "nsenter", "ip", "tc")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Where the tools are looked for."""
# Packets of up to 64 KiB pass whole, as they do on an unshaped link; else tbf cuts them up, and the interface counts
# each of the parts' headers.
_LEAST_BURST = 72_000
# A link holds so much back, beyond its burst; what comes then is lost.
_BUFFER_SECONDS = 0.1
# What a link may send at once after a pause. A timer that is late by less loses no throughput.
_BURST_SECONDS = 2e-3


class NetworkError(UserError, RuntimeError):
    """Namespaces cannot be had, or a command that sets them up has failed."""


def missing() -> str | None:
    """Why this process cannot have network namespaces; None where it can try."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in _TOOLS if shutil.which(tool, path=SEARCH_PATH) is None]
    if absent:
        return f"there is no {' and no '.join(absent)} here: install iproute2 and util-linux"
    return None


def burst(rate: float) -> int:
    """Bytes that a link of `rate` bits per second may send at once after a pause.

    >>> burst(100e6), burst(1e9)
    (72000, 250000)
    """
    return max(_LEAST_BURST, round(rate / 8 * _BURST_SECONDS))


def patience(rate: float) -> float:
    """Seconds after which a packet has its turn on a link of `rate` bits per second, or else is lost.

    >>> round(patience(10e6), 4)
    0.1576
    """
    return _BUFFER_SECONDS + 8 * burst(rate) / rate


def _tool(name: str) -> str:
    found = shutil.which(name, path=SEARCH_PATH)
    assert found is not None  # `missing` has looked
    return found


class Network:
    """Namespaces for `ranks` processes, the i-th with address `address(i)` on `DEVICE`; a context manager.

    Args:
        ranks: from 1 to 250.

    Raises:
        NetworkError: from `with`: not Linux, not root, a tool is missing, or the kernel refuses.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._stack = ExitStack()
        self.holders: list[int] = []
        """Ids of the processes that hold the namespaces: the bridge's, then one for each rank."""
        self._shaped = False

    def __enter__(self) -> Network:
        reason = missing()
        if reason is not None:
            raise NetworkError(f"{reason}; --rates loopback measures without them")
        with self._stack:
            for _ in range(1 + self.ranks):
                self._hold()
            self._connect()
            for rank, own in enumerate(self.holders[1:]):
                self._ip(own, *self._commands(rank))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.holders = []

    def address(self, rank: int) -> str:
        """A rank's IPv4 address."""
        return f"10.231.0.{rank + 1}"

    def command(self, rank: int, words: Sequence[str]) -> list[str]:
        """A command that runs `words` in the namespace of a rank."""
        return [*self._inside(self.holders[rank + 1]), *words]

    def bytes_sent(self, rank: int) -> int:
        """What a rank's interface has sent."""
        words = self.command(rank, ["cat", _COUNTERS])
        counters = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return _tx_bytes(counters.splitlines(), DEVICE)

    def _connect(self) -> None:
        """Make every rank's `DEVICE`, and what lies between them."""
        hub = self.holders[0]
        self._ip(hub, "link add hub type bridge", "link set hub up")
        for rank, own in enumerate(self.holders[1:]):
            self._ip(
                hub,
                f"link add port{rank} type veth peer name {DEVICE} netns {own}",
                f"link set port{rank} master hub up",
            )

    def _commands(self, rank: int) -> list[str]:
        """What `ip` has to do in a rank's namespace, once there is a `DEVICE`."""
        return [f"addr add {self.address(rank)}/24 dev {DEVICE}", f"link set {DEVICE} up", "link set lo up"]

    def shape(self, link: Link | None) -> None:
        """Limit both directions of every link to a rate; None lifts the limit. These links take no latency."""
        assert link is None or link.latency == 0
        hub = self.holders[0]
        self._shape([(hub, f"port{rank}") for rank in range(self.ranks)] + self._own_ends(), link)

    def _own_ends(self) -> list[tuple[int, str]]:
        return [(own, DEVICE) for own in self.holders[1:]]

    def _shape(self, ends: Sequence[tuple[int, str]], link: Link | None) -> None:
        """Limit what the devices send, each given with its namespace's holder."""
        for holder, device in ends:
            words = ["qdisc", "replace", "dev", device, "root"]
            if link is not None:
                limits = f"tbf rate {link.rate:.0f}bit burst {burst(link.rate)} latency {1e3 * _BUFFER_SECONDS:.0f}ms"
                self._run([*self._inside(holder), _tool("tc"), *words, *limits.split()])
            elif self._shaped:
                self._run([*self._inside(holder), _tool("tc"), "qdisc", "del", *words[2:]])
        self._shaped = link is not None

    def _inside(self, holder: int) -> list[str]:
        return [_tool("nsenter"), f"--net=/proc/{holder}/ns/net"]

    def _hold(self) -> int:
        """Make a namespace that lasts as long as this process wants; the process id of its holder."""
        holder = subprocess.Popen(
            [_tool("unshare"), "--net", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._stack.callback(end, holder)
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"\n":
            said = holder.stderr.read().decode(errors="replace").strip()
            raise NetworkError(f"no network namespace to be had ({said}); --rates loopback measures without them")
        self.holders.append(holder.pid)
        return holder.pid

    def _ip(self, holder: int, *lines: str) -> None:
        self._run([*self._inside(holder), _tool("ip"), "-batch", "-"], "\n".join(lines) + "\n")

    @staticmethod
    def _run(words: Sequence[str], given: str = "") -> None:
        ran = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            wanted = "; ".join(given.splitlines()) or " ".join(words[3:])
            said = ran.stderr.strip().partition("\n")[0]
            raise NetworkError(f"setting up the network failed at {Path(words[2]).name} {wanted!r}: {said}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and wait until it is gone."""
    process.kill()
    process.communicate()


def bytes_sent(device: str) -> int:
    """What an interface of this process's own namespace has sent, by the kernel's counter `tx_bytes`.

    Read from /proc/self/net/dev, which shows the process's own namespace; /sys/class/net shows that of its mount.

    Raises:
        ValueError: no such interface.
    """
    with open(_COUNTERS) as file:
        return _tx_bytes(file, device)


def _tx_bytes(lines: Iterable[str], device: str) -> int:
    for line in lines:
        name, _, counters = line.partition(":")
        if name.strip() == device:
            return int(counters.split()[8])
    raise ValueError(f"device={device!r}: there is no such interface here")

"""A slow network with latency: as `netns` has it, with a relay in the place of the bridge.

Linux delays packets with netem, which not every kernel has. Here every rank's interface is a TUN device, and one
process, `relay`, carries packets from device to device, each a fixed time after it was sent. Packets have at most
1500 bytes, so TCP begins as slowly as on a real link; its congestion control is cubic, whatever the machine's own is.
tbf limits what a device sends, and the relay what it receives.
On two cores of 2026 the relay carries 4 ranks' all-to-all at 1 Gbit/s each at 96 % of that rate.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys

from signstep.distributed.plan import Link
from signstep.lab.bench import netns, relay


class DelayedNetwork(netns.Network):
    """A `Network` whose links have latency; a context manager.

    Raises:
        NetworkError: from `with`: as `Network`, or there are no TUN devices; from `shape`: the relay has ended.
    """

    def _connect(self) -> None:
        holders = map(str, self.holders[1:])
        self._relay = subprocess.Popen(
            [sys.executable, "-I", relay.__file__, netns.DEVICE, *holders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self._stack.callback(netns.end, self._relay)
        if said := self._unanswered():
            raise netns.NetworkError(f"links with latency need TUN devices ({said}); give a rate alone, as in 10mbit")

    def _commands(self, rank: int) -> list[str]:
        # A namespace may not choose among all algorithms, but a route may.
        route = f"dev {netns.DEVICE} proto kernel scope link src {self.address(rank)} congctl cubic"
        return [*super()._commands(rank), f"route replace {netns.SUBNET} {route}"]

    def _unanswered(self) -> str | None:
        """Why the relay has ended instead of answering; None: it has answered."""
        assert self._relay.stdout is not None
        assert self._relay.stderr is not None
        if self._relay.stdout.readline() == b"\n":
            return None
        said = self._relay.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        return said or f"exit status {self._relay.wait()}"

    def shape(self, link: Link | None) -> None:
        """Give every link a rate in both directions, and half its latency each way; None: neither."""
        # First the relay: when it ends, the devices that tc would shape are gone with it.
        delay, rate = (link.latency / 2, link.rate) if link else (0.0, math.inf)
        patience = netns.patience(link.rate) if link else math.inf
        assert self._relay.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why instead of answering
            self._relay.stdin.write(f"{delay} {rate} {patience}\n".encode())
        if said := self._unanswered():
            raise netns.NetworkError(f"the relay, which carries the packets of links with latency, has ended ({said})")
        self._shape(self._own_ends(), link)


def network(ranks: int, *, latency: bool) -> netns.Network:
    """Namespaces for so many ranks, whose links can have latency or not."""
    return DelayedNetwork(ranks) if latency else netns.Network(ranks)

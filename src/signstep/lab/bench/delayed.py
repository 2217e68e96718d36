"""A slow network with latency: as `netns` has it, with a relay in the place of the bridge.

Linux delays packets with netem, which not every kernel has. Here every rank's interface is a TUN device, and one
process, `relay`, carries packets from device to device, each a fixed time after it was sent. Packets have at most
1500 bytes, so TCP begins as slowly as on a real link; its congestion control is cubic, whatever the machine's own is.
tbf limits what a device sends, and the relay what it receives.
On two cores of 2026 the relay carries 4 ranks' all-to-all at 1 Gbit/s each at 96 % of that rate.
"""

from __future__ import annotations

import math
import subprocess
import sys

from signstep.distributed.plan import Link
from signstep.lab.bench import netns, relay


class DelayedNetwork(netns.Network):
    """A `Network` whose links have latency; a context manager.

    Raises:
        NetworkError: from `with`: as `Network`, or there are no TUN devices.
    """

    def _connect(self) -> None:
        holders = map(str, self.holders[1:])
        self._relay = subprocess.Popen(
            [sys.executable, "-I", relay.__file__, netns.DEVICE, *holders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._stack.callback(netns.end, self._relay)
        self._await_relay()

    def _commands(self, rank: int) -> list[str]:
        # A namespace may not choose among all algorithms, but a route may.
        route = f"dev {netns.DEVICE} proto kernel scope link src {self.address(rank)} congctl cubic"
        return [*super()._commands(rank), f"route replace {netns.SUBNET} {route}"]

    def _await_relay(self) -> None:
        assert self._relay.stdout is not None
        assert self._relay.stderr is not None
        if self._relay.stdout.readline() != b"\n":
            said = self._relay.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise netns.NetworkError(f"links with latency need TUN devices ({said}); give a rate alone, as in 10mbit")

    def shape(self, link: Link | None) -> None:
        """Give every link a rate in both directions, and half its latency each way; None: neither."""
        self._shape(self._own_ends(), link)
        delay, rate = (link.latency / 2, link.rate) if link else (0.0, math.inf)
        patience = netns.patience(link.rate) if link else math.inf
        assert self._relay.stdin is not None
        self._relay.stdin.write(f"{delay} {rate} {patience}\n".encode())
        self._relay.stdin.flush()
        self._await_relay()


def network(ranks: int, *, latency: bool) -> netns.Network:
    """Namespaces for so many ranks, whose links can have latency or not."""
    return DelayedNetwork(ranks) if latency else netns.Network(ranks)

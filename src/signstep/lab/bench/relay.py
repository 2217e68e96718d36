"""The process that carries packets between namespaces, a fixed time after they were sent: see `delayed`.

It is run as a file of its own, `python -I relay.py DEVICE HOLDER...`, and imports nothing of ours, so that it starts at
once and stays small. Each HOLDER is the id of a process in a namespace. There the relay makes a TUN device of the given
name, and the i-th has to get the address whose last byte is i + 1. When all are made the relay writes a line of output.

Every line of input, three numbers, sets the delay of a packet in seconds, the rate in bits per second at which a device
receives, and the seconds that a packet may wait for its turn there before it is lost; the relay answers with a line. It
ends with its input, and its devices with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time
from typing import NamedTuple

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
# Before each packet stands a virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset. By it the
# kernel hands over TCP's segments of one connection as one packet of up to 64 KiB, and takes them so.
_HEADER = struct.Struct("=BBHHHH")
_LARGEST = _HEADER.size + 65_535
_IP_AND_TCP = 52
_IP_VERSION, _DESTINATION = _HEADER.size, _HEADER.size + 16
# Packets that are read from one device before the others have their turn.
_TURN = 32


class Packet(NamedTuple):
    """What is on its way; packets are ordered by the time at which they are due, then as they came."""

    due: float
    number: int
    receiver: int
    content: bytes


def open_device(name: str, holder: int) -> int:
    """Make the TUN device of a process's namespace, in which this process stays, and return its file."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{holder}/ns/net") as space:
        if libc.setns(space.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to the network namespace of process {holder}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return device


def bytes_on_link(packet: bytes) -> int:
    """How long a packet is on a link: that of its TCP segments, each with headers of its own, if it is several."""
    segment: int = _HEADER.unpack_from(packet)[3]
    length = len(packet) - _HEADER.size
    segments = -(-(length - _IP_AND_TCP) // segment) if segment else 1
    return length + (segments - 1) * _IP_AND_TCP


class Relay:
    """Devices, and the packets that are on their way between them.

    Args:
        devices: open TUN devices.
    """

    def __init__(self, devices: list[int]) -> None:
        self._devices = devices
        self._way: list[Packet] = []
        self._count = 0
        self._free_at = [0.0] * len(devices)
        self.delay, self.rate, self.patience = 0.0, float("inf"), float("inf")

    def take(self, device: int, now: float) -> None:
        """Send what a device has sent on its way."""
        for _ in range(_TURN):
            try:
                content = os.read(device, _LARGEST)
            except BlockingIOError:
                return
            # What is not for one of the others, such as IPv6's search for routers, goes nowhere.
            receiver = content[_DESTINATION + 3] - 1 if content[_IP_VERSION] >> 4 == 4 else -1
            if not 0 <= receiver < len(self._devices):
                continue
            # The receiver's link takes packets one after the other.
            begin = max(now + self.delay, self._free_at[receiver])
            if begin - now - self.delay > self.patience:
                continue
            self._free_at[receiver] = due = begin + 8 * bytes_on_link(content) / self.rate
            self._count += 1
            heapq.heappush(self._way, Packet(due, self._count, receiver, content))

    def deliver(self) -> float | None:
        """Hand over what is due, and return the seconds until something is; None: nothing is on its way."""
        while self._way:
            wait = self._way[0].due - time.monotonic()
            if wait > 0:
                return wait
            packet = heapq.heappop(self._way)
            try:
                os.write(self._devices[packet.receiver], packet.content)
            except OSError:  # the device is not up, or has no room: the packet is lost
                continue
        return None

    def run(self) -> None:
        """Carry packets until the input ends."""
        while True:
            ready, _, _ = select.select([0, *self._devices], [], [], self.deliver())
            now = time.monotonic()
            for device in ready:
                if device != 0:
                    self.take(device, now)
                    continue
                line = os.read(0, 1000)
                if not line:
                    return
                self.delay, self.rate, self.patience = map(float, line.split())
                os.write(1, b"\n")


if __name__ == "__main__":
    # A link does not wait for a processor. Niceness would not do: Linux may compare it within a session alone.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    opened = [open_device(sys.argv[1], int(word)) for word in sys.argv[2:]]
    os.write(1, b"\n")
    Relay(opened).run()

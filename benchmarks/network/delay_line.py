"""Two network devices joined by a line of constant delay: what the kernel's netem would do.

    python -m benchmarks.network.delay_line DEVICE DEVICE MILLISECONDS

Makes both TUN devices, says so with a line on stdout, and once it has read a line carries packets from each
to the other, every packet so many milliseconds after it came, until it is ended. Whoever starts it moves
the devices to their network namespaces and sets their rate (tc) in between, so that this process delays and
does nothing else. TCP runs
end to end and sees the whole round trip. Its segments stay joined on the way (IFF_VNET_HDR): a system
call carries up to 64 KiB, where single packets would cost more processor time than the line has.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CHECKSUM, _TSO4, _TSO6, _TSO_ECN = 1, 2, 4, 8
_LARGEST = 65536 + 64


def open_device(name: str) -> int:
    """Makes a TUN device; it exists for as long as the descriptor is open."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _CHECKSUM | _TSO4 | _TSO6 | _TSO_ECN)
    return device


class _Direction:
    """Packets on their way from one device to the other.

    The rate of the first device bounds what is on the way: rate times delay, and a burst.
    """

    def __init__(self, source: int, target: int, delay: float) -> None:
        self._source = source
        self._target = target
        self._delay = delay
        self._waiting: deque[tuple[float, bytes]] = deque()

    @property
    def due(self) -> float:
        """When the next packet is to be delivered, in seconds of the monotonic clock."""
        return self._waiting[0][0] if self._waiting else float("inf")

    def take(self) -> None:
        """Takes all packets that have come."""
        due = time.monotonic() + self._delay
        while True:
            try:
                self._waiting.append((due, os.read(self._source, _LARGEST)))
            except BlockingIOError:
                return

    def deliver(self) -> None:
        """Delivers all packets that are due."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            os.write(self._target, self._waiting.popleft()[1])


def main() -> None:
    one, other = open_device(sys.argv[1]), open_device(sys.argv[2])
    delay = float(sys.argv[3]) / 1e3
    directions = {one: _Direction(one, other, delay), other: _Direction(other, one, delay)}
    print("ready", flush=True)
    sys.stdin.readline()  # nothing can be read from a device that is down
    while True:
        due = min(x.due for x in directions.values())
        wait = None if due == float("inf") else max(0.0, due - time.monotonic())
        readable, _, _ = select.select(list(directions), [], [], wait)
        for device in readable:
            directions[device].take()
        for direction in directions.values():
            direction.deliver()


if __name__ == "__main__":
    main()

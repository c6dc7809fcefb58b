"""A link of a given bandwidth and delay between two network namespaces of this machine.

    client's namespace                                     workers' namespace
    processes - TUN device, tc tbf rate ... - delay line - TUN device, tc tbf rate ... - processes

The kernel shapes each direction by itself, as two network cards would, so the link is full duplex. Needs
root, the commands `ip` and `tc`, and a kernel with TUN and sch_tbf; not sch_netem, which many lack: see
`delay_line`.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Link", "LinkError", "inside", "shaped_link"]

CLIENT, WORKERS = "10.77.0.1", "10.77.0.2"
_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/run/netns")
# A burst holds some of the joined segments that TCP hands down, and is soon over: 2 ms at 1 Gb/s.
_BURST = 256 << 10
# More than TCP ever queues in its own machine, so that nothing is dropped.
_QUEUE = 16 << 20


class LinkError(Exception):
    """The link can't be made here."""


@dataclass(frozen=True)
class Link:
    """Two namespaces and what joins them.

    Attributes:
        client, workers: names of the namespaces.
        address: of the workers' side.
        delay_line: process id of what delays.
        device: of the client's side.
    """

    client: str
    workers: str
    address: str
    delay_line: int
    device: str


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def shaped_link(rate: float, one_way: float, congestion_control: str | None = None) -> Iterator[Link]:
    """The block has the link.

    Args:
        rate: bits a second in each direction, headers of IP and TCP included.
        one_way: seconds of delay in each direction.
        congestion_control: of TCP; the kernel's own default unless given.

    Raises:
        LinkError: it takes root, or the kernel or a command lacks something.
    """
    if os.geteuid() != 0:
        raise LinkError("network namespaces need root")
    number = os.getpid()
    spaces = [f"blindtune-{side}-{number}" for side in ("client", "workers")]
    devices = [f"bt{side}{number}" for side in "cw"]
    with ExitStack() as stack:
        for space in spaces:
            _run("ip", "netns", "add", space)
            stack.callback(_run, "ip", "netns", "delete", space)
        line = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("delay_line.py")), *devices, str(one_way * 1e3)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, line)
        assert line.stdin is not None and line.stdout is not None and line.stderr is not None
        if not line.stdout.readline():
            raise LinkError(f"no TUN devices: {line.stderr.read().strip()}")
        addresses = (CLIENT, WORKERS)
        for k, (space, device) in enumerate(zip(spaces, devices, strict=True)):
            _run("ip", "link", "set", device, "netns", space)
            _run("ip", "-n", space, "address", "add", addresses[k], "peer", addresses[1 - k], "dev", device)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", device, "up")
            tbf = ("root", "tbf", "rate", f"{rate:.0f}bit", "burst", str(_BURST), "limit", str(_QUEUE))
            _run("tc", "-n", space, "qdisc", "replace", "dev", device, *tbf)
            if congestion_control is not None:
                route = (addresses[1 - k], "dev", device, "src", addresses[k])
                _run("ip", "-n", space, "route", "replace", *route, "congctl", congestion_control)
        print("go", file=line.stdin, flush=True)
        yield Link(*spaces, WORKERS, line.pid, devices[0])


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """What this thread starts in the block lives in a namespace, and so does its view of /proc/sys/net."""
    with open("/proc/thread-self/ns/net") as before, open(_NAMESPACES / namespace) as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise LinkError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")

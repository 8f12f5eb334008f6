"""The ground that all contenders share: namespaces, devices, counters, running programs."""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .._harness import BenchError, child, wait_ready
from ._contenders import Contender

TXQUEUELEN = 1000
SECONDS = 30  # for an order to be carried out


def ip(*commands: str, netns: str | None = None) -> None:
    """Several commands of iproute2, in one go."""
    prefix = ["nsenter", f"--net={netns}"] if netns else []
    done = subprocess.run(
        [*prefix, "ip", "-batch", "-"],
        input="\n".join(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"ip {'; '.join(commands)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Traffic:
    """An interface's counters, as its namespace sees them."""

    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int
    tx_dropped: int


def traffic(device: str, pid: int | str = "self") -> Traffic:
    """The counters of a device in that process's namespace."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            found = [int(each) for each in numbers.split()]
            return Traffic(found[0], found[1], found[8], found[9], found[11])
    raise BenchError(f"there is no {device}")


class Program:
    """A contender at work."""

    def __init__(self, process: "subprocess.Popen[str]", contender: Contender) -> None:
        self._process = process
        self.contender = contender
        self.pid = process.pid

    def order(self, *words: object) -> list[int]:
        """Give a line to its stdin, and the numbers that it answers."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(*words, file=process.stdin, flush=True)
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            raise BenchError(f"{self.contender.name} did not answer within {SECONDS} s")
        return [int(each) for each in process.stdout.readline().split()]

    def check(self) -> None:
        if self._process.poll() is not None:
            raise BenchError(f"{self.contender.name} ended: {self._process.returncode}")

    @property
    def cpu(self) -> float:
        """Seconds that all its threads have had a core, in user mode and in the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, field: str = "VmRSS") -> float:
        """Mebibytes; `VmHWM` is the most that it ever had."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
        raise BenchError(f"no {field} of {self.contender.name}")


@contextlib.contextmanager
def running(
    contender: Contender, mode: str, *names: str, core: int | None = None
) -> Iterator[Program]:
    """A contender's program, with its devices open."""
    command = (*contender.command, mode, *names)
    with child(*command, core=core, stdin=subprocess.PIPE) as process:
        wait_ready(process)
        yield Program(process, contender)


def configure(
    device: str, address: str, *, netns: str | None = None, qlen: int = TXQUEUELEN
) -> None:
    ip(
        f"address add {address} dev {device}",
        f"link set dev {device} mtu 1500 txqueuelen {qlen} up",
        netns=netns,
    )


def napi_threads(device: str, *, netns: str | None = None) -> None:
    """Have the kernel receive from this device in a thread of its own: it was opened for NAPI.

    A sysfs shows the namespace in which it was mounted.
    """
    into = [f"--net={netns}"] if netns else []
    script = f"mount -t sysfs sysfs /mnt && echo 1 >/mnt/class/net/{device}/threaded"
    command = ["nsenter", *into, "unshare", "-m", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"no NAPI thread for {device}: {done.stderr.strip()}")


class Far:
    """Another network namespace, with a sink and a server of iperf3 in it."""

    def __init__(self, stack: contextlib.ExitStack, *, iperf: bool) -> None:
        command = ("unshare", "-n", sys.executable, "-m", "benchmarks.peers._sink")
        self._sink = stack.enter_context(child(*command, stdin=subprocess.PIPE))
        wait_ready(self._sink)
        self.pid = self._sink.pid
        self.netns = f"/proc/{self.pid}/ns/net"
        ip("link set lo up", netns=self.netns)
        if iperf:
            # What it prints would fill a pipe that nobody reads, and stop it.
            quiet = ("sh", "-c", "exec iperf3 -s >/dev/null")
            server = stack.enter_context(child("nsenter", f"--net={self.netns}", *quiet))
            while ":1451 00000000" not in self._listening():  # 5201
                if server.poll() is not None:
                    raise BenchError("iperf3 -s did not start; is it installed?")
                time.sleep(0.02)

    def _listening(self) -> str:
        tables = (Path(f"/proc/{self.pid}/net/{name}") for name in ("tcp", "tcp6"))
        return "".join(table.read_text() for table in tables if table.exists())

    @property
    def sunk(self) -> int:
        """Datagrams that came to port 9."""
        assert self._sink.stdin is not None
        assert self._sink.stdout is not None
        print(file=self._sink.stdin, flush=True)
        return int(self._sink.stdout.readline())


@dataclass(frozen=True)
class Forwarder:
    """A program between two devices, the second of which is in the far namespace."""

    program: Program
    near: str
    far: str
    target: str  # an address behind it
    far_pid: int

    @property
    def bytes(self) -> tuple[int, int]:
        """What it was given at the near end, and what it handed over at the far one."""
        return traffic(self.near).tx_bytes, traffic(self.far, self.far_pid).rx_bytes


def forwarder(
    stack: contextlib.ExitStack, contender: Contender, number: int, far: Far
) -> Forwarder:
    """Start one. It opens both devices here; a device that is moved stays open."""
    names = f"tun{2 * number}", f"tun{2 * number + 1}"
    program = stack.enter_context(running(contender, "forward", *names))
    ip(f"link set dev {names[1]} netns {far.pid}")
    configure(names[0], f"10.81.{number}.1/24")
    configure(names[1], f"10.81.{number}.2/24", netns=far.netns)
    if contender.napi_threads:
        napi_threads(names[0])
        napi_threads(names[1], netns=far.netns)
    time.sleep(0.1)  # some say on stderr that it was down
    program.check()
    return Forwarder(program, *names, f"10.81.{number}.2", far.pid)

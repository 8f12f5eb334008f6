"""What the parts share: namespaces, devices, counters, running programs."""

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .._contenders import Contender
from .._harness import BenchError, child, output_of, processor_time, wait_ready

TXQUEUELEN = 1000
SECONDS = 30  # that a program has for an order

T = TypeVar("T")


def ip(*commands: str, netns: str | None = None) -> None:
    """Run several commands of ip(8) in one batch."""
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
    """An interface's counters, as seen in its namespace."""

    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int
    tx_dropped: int


def traffic(device: str, pid: int | str = "self") -> Traffic:
    """Return the counters of a device in the namespace of a process."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            found = [int(each) for each in numbers.split()]
            return Traffic(found[0], found[1], found[8], found[9], found[11])
    raise BenchError(f"there is no interface {device}")


class Program:
    """A contender's running program."""

    def __init__(self, process: "subprocess.Popen[str]", contender: Contender) -> None:
        self._process = process
        self.contender = contender
        self.pid = process.pid

    def order(self, *words: object) -> list[int]:
        """Write a line to its stdin, and return the numbers that it answers."""
        return [int(each) for each in self.ask(*words).split()]

    def ask(self, *words: object) -> str:
        """Write a line to its stdin, and return the line that it answers."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(*words, file=process.stdin, flush=True)
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            raise BenchError(f"{self.contender.name} did not answer within {SECONDS} s")
        # A program that ends still takes the order while it is being ended; its answer is empty.
        if not (answer := process.stdout.readline()):
            raise BenchError(f"{self.contender.name} ended before it answered")
        return answer

    def check(self) -> None:
        if self._process.poll() is not None:
            status = self._process.returncode
            raise BenchError(f"{self.contender.name} exited with status {status}")

    @property
    def cpu(self) -> float:
        """The processor time of all its threads in seconds, in user mode and in the kernel."""
        return processor_time(self.pid)

    def memory(self, field: str = "VmRSS") -> float:
        """Return its memory in MiB. The field `VmHWM` is the maximum so far."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
        raise BenchError(f"the kernel reports no {field} for {self.contender.name}")


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


class Far:
    """Another network namespace, with a sink and perhaps an iperf3 server in it."""

    def __init__(self, stack: contextlib.ExitStack, *, iperf: bool) -> None:
        command = ("unshare", "-n", sys.executable, "-m", "benchmarks.peers._sink")
        self._sink = stack.enter_context(child(*command, stdin=subprocess.PIPE))
        wait_ready(self._sink)
        self.pid = self._sink.pid
        self.netns = f"/proc/{self.pid}/ns/net"
        ip("link set lo up", netns=self.netns)
        if iperf:
            # Drop its output. Otherwise it would fill a pipe that nobody reads, and block.
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
        """The number of datagrams that came to port 9."""
        assert self._sink.stdin is not None
        assert self._sink.stdout is not None
        print(file=self._sink.stdin, flush=True)
        return int(self._sink.stdout.readline())


def iperf3(
    ask: Callable[[Sequence[str]], str], target: str, streams: int, *options: str
) -> tuple[int, float]:
    """Have iperf3 send for a second; return the bytes received, and Gbit/s.

    `ask` runs the command, and returns its output.
    """
    command = ("iperf3", "-c", target, "-P", str(streams), "-t", "1", "-J", *options)
    said = json.loads(ask(command))
    if "error" in said:
        raise BenchError(f"iperf3 -c {target}: {said['error']}")
    received = said["end"]["sum_received"]
    return received["bytes"], received["bits_per_second"] / 1e9


def output(command: Sequence[str]) -> str:
    """Run a command, and return its output."""
    with child(*command) as process:
        return output_of(process)


def insist(work: Callable[[], T]) -> T:
    """Try again once: on a busy machine, iperf3's control connection gets stuck now and then."""
    try:
        return work()
    except BenchError as error:
        if "busy" not in str(error):  # "busy": the server is still ending the stream before
            print(f"trying again: {error}", file=sys.stderr)
        time.sleep(1)
        return work()


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
        """The counters of the near end, where packets go in, and of the far end."""
        return traffic(self.near).tx_bytes, traffic(self.far, self.far_pid).rx_bytes


def forwarder(
    stack: contextlib.ExitStack, contender: Contender, number: int, far: Far
) -> Forwarder:
    """Start a forwarder. It opens both devices here; moving one to a namespace keeps it open."""
    names = f"tun{2 * number}", f"tun{2 * number + 1}"
    program = stack.enter_context(running(contender, "forward", *names))
    ip(f"link set dev {names[1]} netns {far.pid}")
    configure(names[0], f"10.81.{number}.1/24")
    configure(names[1], f"10.81.{number}.2/24", netns=far.netns)
    time.sleep(0.1)  # some programs print on stderr that the device was down
    program.check()
    return Forwarder(program, *names, f"10.81.{number}.2", far.pid)

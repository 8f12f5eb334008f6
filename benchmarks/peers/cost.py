"""What a packet costs to read and to write, in each library's own loop.

The packets to read wait in the kernel's ring. Written packets go through the kernel's whole IP
layer to a socket that drops them. All programs run on one core. Each program measures the time of
its loop only. The counters of the interface and of the socket confirm that it did the work.

`aiotun split` and wireguard-go merge the packets of one flow before they write them, so that one
system call writes dozens.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence

from .._contenders import Contender
from .._harness import LAST_CORE, BenchError, Row, Table, expect, in_turn
from ..send import udp_packet_of
from ._contenders import PEERS
from ._field import Program, configure, running, traffic
from ._sink import PORT, Sink

NAMES = (
    "C",
    "aiotun",
    "aiotun, one by one",
    "aiotun, uvloop",
    "aiotun split",
    *PEERS,
    "wireguard-go",
    "smoltcp",
)
SIZES = (84, 1400)
COUNT = 4096
SLOW = {"scapy": 256}  # fewer packets for libraries that take a hundred times as long
RING = 5000  # more packets than `growth` has waiting
ROUNDS = 8  # a run takes only milliseconds; many short runs suffer less from noise than few long


class Lane:
    """A contender's device, and the packets for it."""

    def __init__(self, program: Program, number: int, sink: Sink | None) -> None:
        self.program = program
        self.device = f"tun{number}"
        self.here, self.there = f"10.80.{number}.1", f"10.80.{number}.2"
        self.sink = sink
        configure(self.device, f"{self.here}/24", qlen=RING)

    @property
    def count(self) -> int:
        return SLOW.get(self.program.contender.name, COUNT)

    def read(self, size: int, count: int) -> float:
        """Nanoseconds a packet."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((self.there, PORT))
            payload = bytes(size - 28)
            before = traffic(self.device).tx_packets
            for _ in range(count):
                sock.send(payload)
        (elapsed,) = self.program.order(count)
        read = traffic(self.device).tx_packets - before
        expect(f"packets read by {self.program.contender.name}", read, count)
        return elapsed / count

    def write(self, size: int, count: int) -> float:
        """Nanoseconds a packet."""
        assert self.sink is not None
        packet = udp_packet_of(size, self.there, self.here, PORT)
        before = self.sink.count
        (elapsed,) = self.program.order(count, packet.hex())
        written = self.sink.count - before
        expect(f"packets written by {self.program.contender.name}", written, count)
        return elapsed / count


@contextlib.contextmanager
def lanes(contenders: Sequence[Contender], mode: str) -> Iterator[dict[str, Lane]]:
    with contextlib.ExitStack() as stack:
        sink = None
        if mode == "write":
            sink = Sink()
            stack.callback(sink.close)
        found = {}
        for number, contender in enumerate(contenders):
            program = stack.enter_context(running(contender, mode, f"tun{number}", core=LAST_CORE))
            found[contender.name] = Lane(program, number, sink)
        yield found


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    for mode in ("read", "write"):
        with lanes(contenders, mode) as found:
            for size in SIZES:
                cases = {name: _case(lane, mode, size) for name, lane in found.items()}
                samples = in_turn(cases, runs * ROUNDS)
                yield table(mode, size, samples)


def _case(lane: Lane, mode: str, size: int) -> Callable[[], float]:
    work = lane.read if mode == "read" else lane.write
    return lambda: work(size, lane.count)


def table(mode: str, size: int, samples: dict[str, list[float]]) -> Table:
    c = samples.get("C")
    if c is None:
        raise BenchError("the costs are compared with C; install a C compiler")
    rows = [
        Row(name, "ns/packet", values, None if values is c else c)
        for name, values in samples.items()
    ]
    for name in ("aiotun", "aiotun, one by one", "aiotun, uvloop"):
        if (ours := samples.get(name)) is None:
            continue
        if "pytun" in samples:
            rows.append(Row(f"{name} / pytun", "ns/packet", ours, samples["pytun"], target=1.0))
        # C reads one by one, and a batch is our answer to that.
        if mode == "read" and size == 84 and name != "aiotun, one by one":
            rows.append(Row(f"{name} / C", "ns/packet", ours, c, target=1.15))
    return Table("cost", "all", f"to {mode} a packet of {size} bytes", rows)

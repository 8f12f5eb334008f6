"""TCP into each stack: throughput in both directions, processor time, connections a second.

The client is a program in C in the benchmark's namespace; the kernel routes to each stack through
a device of its own. Each stack runs during the whole benchmark, and sleeps while another is
measured. Nothing is pinned to a core. The receiver of each stream counts its bytes, and the
benchmark fails if one is missing, or if the device did not carry them.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from .._contenders import Contender
from .._harness import BenchError, Row, Table, child, columns, compiled, in_turn, output_of
from ..peers._field import traffic
from ._contenders import MTU, RAW, STACKS, Host, host

NAMES = STACKS
MILLISECONDS = 1000
CASES = {
    ("up", 1): "one TCP stream into the stack",
    ("up", 16): "16 TCP streams into the stack",
    ("down", 1): "one TCP stream out of the stack",
    ("down", 16): "16 TCP streams out of the stack",
}
TASKS = 16  # that connect, one connection after the other
TARGETS: Mapping[str, Mapping[tuple[str, int], float]] = {
    "gVisor": {("up", 1): 8, ("up", 16): 5, ("down", 1): 10, ("down", 16): 5},
    "smoltcp": {("up", 1): 4},
    "lwIP": {("up", 1): 10},
}
CONNECTIONS_TARGET = 3  # times gVisor's


def settle(at: Host) -> None:
    """Wait until the device carries nothing.

    After a stream that was reset, the queue of the device is full for a while, and the kernel drops
    the first SYN of the next measurement. It sends another one only after a second.
    """
    until = time.monotonic() + 10
    before = None
    while (now := traffic(at.device)) != before:
        if time.monotonic() > until:
            raise BenchError(f"{at.program.contender.name} does not come to rest")
        before = now
        time.sleep(0.1)


def client(way: str, at: Host, number: int, length: int = MILLISECONDS) -> list[int]:
    """Run the client; return the numbers that it prints."""
    command = (str(compiled("netclient.c")), way, at.address, str(number), str(length))
    with child(*command) as process:
        try:
            return [int(word) for word in output_of(process).split()]
        except BenchError as error:
            raise BenchError(f"{at.program.contender.name}: {error}") from None


def stream(at: Host, way: str, streams: int, length: int = MILLISECONDS) -> tuple[float, float]:
    """Return Gbit/s, and the stack's processor time for each gigabyte in seconds."""
    settle(at)
    cpu, before = at.program.cpu, traffic(at.device)
    count, nanoseconds = client(way, at, streams, length)
    after = traffic(at.device)
    carried = after.tx_bytes - before.tx_bytes if way == "up" else after.rx_bytes - before.rx_bytes
    if not 0 < count <= carried:
        name = at.program.contender.name
        raise BenchError(f"{name}: {count} bytes arrived, and the device carried {carried}")
    return count * 8 / nanoseconds, (at.program.cpu - cpu) / count * 1e9


def connections(at: Host, length: int = MILLISECONDS) -> float:
    """Return connections a second: each one connects, sends a byte, gets it back, and ends."""
    settle(at)
    count, nanoseconds = client("connections", at, TASKS, length)
    return count / nanoseconds * 1e9


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    # The client's ports stay in TIME_WAIT for a minute.
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("10000 65000")
    with contextlib.ExitStack() as stack:
        hosts = {each.name: host(stack, each, number) for number, each in enumerate(contenders)}
        for (way, streams), what in CASES.items():
            cases = {name: partial(stream, at, way, streams) for name, at in hosts.items()}
            speeds, costs = columns(in_turn(cases, runs))
            targets = {
                p: goals[way, streams] for p, goals in TARGETS.items() if (way, streams) in goals
            }
            yield table(what, "Gbit/s", speeds, costs, targets)
        made = in_turn({name: partial(connections, at) for name, at in hosts.items()}, runs)
    what = f"connections with one byte each way, {TASKS} at a time"
    yield table(what, "connections/s", made, {}, {"gVisor": CONNECTIONS_TARGET})


def table(
    what: str,
    unit: str,
    samples: Mapping[str, list[float]],
    costs: Mapping[str, list[float]],
    targets: Mapping[str, float],
) -> Table:
    rows = [
        Row(f"{name}, MTU {MTU}", unit, found, cost=costs.get(name, ()))
        for name, found in samples.items()
    ]
    rows += [
        Row(f"{RAW} / {peer}", unit, samples[RAW], samples[peer], 50, target, True)
        for peer, target in targets.items()
        if RAW in samples and peer in samples
    ]
    return Table("netstack", "all", what, rows)

"""One TCP stream of iperf3 between two namespaces, through a forwarder between two TUN devices.

The forwarders are in C and Python, with offload and without. Each has its own devices and runs
during the whole benchmark; it sleeps while another is measured. Nothing is pinned to a core: a
forwarder, the sender and the receiver share the cores, as they would in real use.

It also measures how long it takes to split a super-packet, and to merge its packets again.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import timeit
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from aiotun._kernel.abi import VNET_HDR
from aiotun._packets import gso, native

from ._harness import (
    HERE,
    BenchError,
    Row,
    Table,
    child,
    compiled,
    expect,
    in_turn,
    output_of,
    wait_ready,
)

SECONDS = 2  # of each stream
SEGMENTS, SEGMENT = 45, 1448


def segments() -> list[bytes]:
    """Return the TCP packets of one super-packet: 45 with 1,448 bytes each."""
    header = native.split(_super_packet(), False)
    expect("segments", [len(each) for each in header], [SEGMENT + 52] * SEGMENTS)
    return header


def _super_packet() -> bytes:
    payload = os.urandom(SEGMENTS * SEGMENT)
    tcp = bytes.fromhex("03e807d0000000010000000780100200 0000 0000 0101080a0000000100000002")
    ip = bytes.fromhex("450000000001400040060000 0a000001 0a000002")
    length = len(ip) + len(tcp) + len(payload)
    ip = ip[:2] + length.to_bytes(2, "big") + ip[4:]
    header = (1, 1, 52, SEGMENT, 20, 16)
    return VNET_HDR.pack(*header) + ip + tcp + payload


def cut_and_put() -> Table:
    packets = segments()
    (whole,) = gso.merge(packets)
    expect("C module", native.SPEEDUPS, True)
    cases: dict[str, tuple[Callable[[], object], int, float | None]] = {
        "split, C": (lambda: native.split(whole, False), 300, 8),
        "split, Python": (lambda: gso.split(whole), 10, 200),
        "merge, C": (lambda: native.merge(packets, False), 300, 6),
        "merge, Python": (lambda: gso.merge(packets), 10, None),
    }

    def microseconds(function: Callable[[], object], count: int, _: object) -> float:
        return timeit.timeit(function, number=count) / count * 1e6

    samples = in_turn({name: partial(microseconds, *case) for name, case in cases.items()}, 30)
    rows = [Row(name, "us", samples[name], target=target) for name, (_, _, target) in cases.items()]
    return Table("offload", "any loop", "a 64 KiB super-packet of 45 segments", rows)


@contextlib.contextmanager
def far_namespace() -> Iterator[str]:
    """Another network namespace, with an iperf3 server in it; gives its path."""
    command = ("unshare", "-n", "sh", "-c", "ip link set lo up; exec iperf3 -s --forceflush")
    with child(*command) as server:
        assert server.stdout is not None
        while "listening" not in (line := server.stdout.readline()):
            if not line:
                raise BenchError("iperf3 -s did not start")
        # Read its further output. Otherwise the pipe would fill up and block the server.
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield f"/proc/{server.pid}/ns/net"


def stream(address: str) -> float:
    """Return the throughput in Gbit/s."""
    with child("iperf3", "-c", address, "-t", str(SECONDS), "-J") as client:
        said = json.loads(output_of(client))
    if "error" in said:
        raise BenchError(f"iperf3 -c {address}: {said['error']}")
    received = said["end"]["sum_received"]
    if not received["bytes"]:
        raise BenchError(f"{address} received nothing")
    return float(received["bits_per_second"]) / 1e9


def forwarders(netns: str, loop: str) -> dict[str, list[str]]:
    """Return the commands by name, each with its own devices and subnet."""
    c, python = str(compiled("forwarder.c")), str(HERE / "forward.py")
    kinds = {
        "C, offload": [c, "raw"],
        "C": [c, "off"],
        "raw": [sys.executable, python, "raw"],
        "split": [sys.executable, python, "split"],
        "off": [sys.executable, python, "off"],
    }
    commands = {}
    for number, (name, command) in enumerate(kinds.items()):
        command += [netns, f"near{number}", f"far{number}", f"10.90.{number}"]
        commands[name] = [*command, loop] if command[0] == sys.executable else command
    return commands


def forwarding(runs: int, loop: str) -> Table:
    with far_namespace() as netns, contextlib.ExitStack() as stack:
        commands = forwarders(netns, loop)
        for command in commands.values():
            wait_ready(stack.enter_context(child(*command)))
        cases = {name: partial(stream, f"10.90.{number}.2") for number, name in enumerate(commands)}
        samples = in_turn(cases, runs)
    rows = [
        Row("C forwarder, offload", "Gbit/s", samples["C, offload"]),
        Row("C forwarder", "Gbit/s", samples["C"]),
        _row("raw / C with offload", samples["raw"], samples["C, offload"], 0.95),
        _row("split / raw", samples["split"], samples["raw"], 0.85),
        _row("split / off", samples["split"], samples["off"], 2.5),
        _row("off / C", samples["off"], samples["C"], 0.95),
    ]
    return Table("offload", loop, "one TCP stream through a forwarder", rows)


def _row(name: str, ours: Sequence[float], theirs: Sequence[float], target: float) -> Row:
    return Row(name, "Gbit/s", ours, theirs, target=target, at_least=True)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    yield cut_and_put()
    for tool in ("iperf3", "ip"):
        if shutil.which(tool) is None:
            raise BenchError(f"{tool} is not installed; install iperf3 and iproute2")
    for loop in loops:
        yield forwarding(runs, loop)

"""TAP devices: a guest's throughput through a passed device, and the DHCP server's limits.

A guest has two network cards. One is on a TAP device with virtio-net headers that aiotun opened and
passed to QEMU. The other is on a TAP device that `ip tuntap` made and QEMU opens by its name. The
host fetches a file from the guest through each in turn. The guest's web server uses sendfile(2), so
its kernel sends super-packets, and the TAP device is what limits the speed, as far as software
emulation allows. Half of the turns use another guest with the cards swapped, because a guest may
treat its two cards differently.

The clients of `examples/dhcp_server.py` are simulated: they exchange frames with its bridge, and
share the machine with it. Guests and clients are those of the tests.
"""

import asyncio
import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path

import pytest

import aiotun
from tests.helpers import ip
from tests.integration import dhcp
from tests.integration.guest import guest
from tests.integration.programs import Program, cpu_seconds

from ._harness import BenchError, Row, Table, expect

# --- A guest -------------------------------------------------------------------------------------

PIECE = 8_000_000  # bytes a turn
TURNS = 24  # of each side, a run
PASSED, BY_NAME = "passed by aiotun", "made by ip tuntap"

SERVE = f"""
for net in 1 2; do
    ip addr add 10.87.$net.2/24 dev eth$((net - 1))
    ip link set eth$((net - 1)) up
done
mkdir /www
dd if=/dev/zero of=/www/data bs=1000000 count={PIECE // 1_000_000} 2>/dev/null
httpd -h /www
echo "guest: serves"
sleep 100000
"""


async def open_passed(net: int) -> int:
    """Open a TAP device with virtio-net headers and the host's address; return its fd."""
    addresses = [f"10.87.{net}.1/24"]
    async with aiotun.open_tap("q0", offload="raw", addresses=addresses) as tap:
        return tap.queues[0].detach()


def make_by_name(net: int) -> None:
    ip("tuntap", "add", "dev", "q1", "mode", "tap")
    ip("addr", "add", f"10.87.{net}.1/24", "dev", "q1")
    ip("link", "set", "q1", "up")


@contextlib.contextmanager
def booted(passed: int, by_name: int) -> Iterator[Program]:
    """A guest with a card on each device. The numbers are of the cards and of their networks."""
    fd = asyncio.run(open_passed(passed))
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(contextlib.ExitStack())
        ours.callback(os.close, fd)
        make_by_name(by_name)
        stack.callback(ip, "tuntap", "del", "dev", "q1", "mode", "tap")
        netdevs = {
            passed: f"tap,id=net{passed},fd={fd}",
            by_name: f"tap,id=net{by_name},ifname=q1,script=no,downscript=no",
        }
        devices = []
        for net, netdev in sorted(netdevs.items()):
            devices += ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=net{net}"]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # One processor, because the host needs a core for its own end.
        machine = stack.enter_context(guest(folder, devices, [fd], SERVE, cpus=1))
        ours.close()  # QEMU has its own copy of the fd
        machine.expect("guest: serves", 120)
        yield machine


def fetch(net: int) -> tuple[int, float]:
    """Fetch the file; return the bytes after the first read, and the seconds they took."""
    buffer = bytearray(1 << 20)
    with socket.create_connection((f"10.87.{net}.2", 80), timeout=60) as sock:
        sock.sendall(b"GET /data HTTP/1.0\r\n\r\n")
        first = got = sock.recv_into(buffer)
        head = bytes(buffer[:got]).partition(b"\r\n\r\n")[0]
        start = time.perf_counter()
        while count := sock.recv_into(buffer):
            got += count
        took = time.perf_counter() - start
    expect("bytes of the guest's file", got - len(head) - 4, PIECE)
    return got - first, took


def in_turns(sides: dict[str, int]) -> dict[str, float]:
    """Return Gbit/s of each side, from many short turns, so that noise affects both equally."""
    got, took = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0)
    order = list(sides)
    for _ in range(TURNS):
        for name in order:
            count, seconds = fetch(sides[name])
            got[name] += count
            took[name] += seconds
        order.reverse()
    return {name: got[name] * 8 / took[name] / 1e9 for name in sides}


def guest_to_host(runs: int) -> Table:
    rates: dict[str, list[float]] = {PASSED: [], BY_NAME: []}
    for passed, by_name in ((1, 2), (2, 1)):
        with booted(passed, by_name):
            sides = {PASSED: passed, BY_NAME: by_name}
            in_turns(sides)  # warms up, and is not counted
            for _ in range(runs):
                for name, rate in in_turns(sides).items():
                    rates[name].append(rate)
    rows = [Row(name, "Gbit/s", samples) for name, samples in rates.items()]
    ratio = (rates[PASSED], rates[BY_NAME])
    rows.append(Row("passed / ip tuntap", "Gbit/s", *ratio, target=0.95, at_least=True))
    return Table(
        "tap", "any loop", f"a guest sends {TURNS} times {PIECE // 1_000_000} MB by TCP", rows
    )


# --- The DHCP server -----------------------------------------------------------------------------

CLIENTS = 200  # that hold leases
RATE = 1200  # renewals a second that they ask for
RENEWALS = 3600  # a run
PROBE = 0.5  # seconds, the server's default
PATIENCE = 0.5  # seconds, for a new client, after that
# Room for the new clients of all runs.
NETWORK = ["--address", f"{dhcp.SERVER}/16", "--range", "10.85.1.0-10.85.99.255"]


class Newcomers:
    """Clients that are new to the server."""

    def __init__(self, wire: dhcp.Wire) -> None:
        self._wire = wire
        self._next = CLIENTS

    def offers(self, count: int) -> list[float]:
        """Have so many ask at once; how long each waits for its offer, in milliseconds."""
        asked: dict[bytes, float] = {}
        waited: list[float] = []
        for _ in range(count):
            mac = dhcp.mac_of(self._next)
            self._next += 1
            asked[mac] = time.perf_counter()
            self._wire.send(dhcp.Message(dhcp.Type.DISCOVER, 1, mac))
        while asked:
            answer = self._wire.answer()
            expect("what a new client gets", answer.type, dhcp.Type.OFFER)
            waited.append((time.perf_counter() - asked.pop(answer.chaddr)) * 1000)
        return waited


def renew(
    wire: dhcp.Wire, leases: dict[bytes, IPv4Address], rate: int
) -> tuple[float, list[float]]:
    """Return the renewals answered in a second, and the milliseconds that each took."""
    answered, took = dhcp.renewals(wire, leases, rate, RENEWALS)
    expect("renewals answered", len(took), RENEWALS)
    return answered, [seconds * 1000 for seconds in took]


def dhcp_server(runs: int) -> Iterator[Table]:
    rates: list[float] = []
    took: list[float] = []
    computed: list[float] = []
    most: list[float] = []
    alone: list[float] = []
    together: list[float] = []
    dhcp.add_bridge()
    with (
        tempfile.TemporaryDirectory() as folder,
        dhcp.serving("--leases", f"{folder}/leases.db", network=NETWORK) as server,
        dhcp.Wire() as wire,
    ):
        leases = dhcp.lease_many(wire, CLIENTS)
        newcomers = Newcomers(wire)
        renew(wire, leases, RATE)  # warms up, and is not counted
        for _ in range(runs):
            before = cpu_seconds(server.process.pid)
            rate, times = renew(wire, leases, RATE)
            computed.append((cpu_seconds(server.process.pid) - before) * 1000 / RENEWALS)
            rates.append(rate)
            took += times
            most.append(renew(wire, leases, 1_000_000)[0])
            alone += newcomers.offers(1)
            together += newcomers.offers(CLIENTS)
        expect("refusals", dhcp.counters(server).get("nak_sent", 0), 0)
    yield Table(
        "tap",
        "asyncio",
        f"{CLIENTS} clients renew leases, {RATE} times a second",
        [
            Row("renewals answered", "per second", rates, target=1000, at_least=True),
            Row("time to answer", "ms", took, percentile=99, target=20),
            Row("server's processor time", "ms", computed),
            Row("answered at full speed", "per second", most),
        ],
    )
    target = (PROBE + PATIENCE) * 1000
    yield Table(
        "tap",
        "asyncio",
        f"discover to offer, including a probe of {PROBE * 1000:.0f} ms",
        [
            Row("a new client", "ms", alone, percentile=100, target=target),
            Row(f"{CLIENTS} new clients at once", "ms", together, percentile=100, target=target),
        ],
    )


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    # The helpers belong to the tests, and raise what tests raise.
    try:
        yield from dhcp_server(runs)
    except (AssertionError, TimeoutError, pytest.skip.Exception) as error:
        raise BenchError(str(error)) from error
    try:
        yield guest_to_host(runs)
    except pytest.skip.Exception as error:
        print(f"tap: guest_to_host is skipped: {error}")
    except (AssertionError, TimeoutError) as error:
        raise BenchError(str(error)) from error

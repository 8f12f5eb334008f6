"""A netstack under load, and at the limits of descriptors and of backlogs."""

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun

from ..helpers import checksum, wait_until
from .kernel import children_of, resident_kib
from .stacks import client_of, force_mechanism

SYN, RST, ACK = 0x02, 0x04, 0x10


@pytest.fixture(params=["tproxy", "listeners"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force_mechanism(monkeypatch, request.param)
    name: str = request.param
    return name


@pytest.fixture
async def stack(mechanism: str) -> AsyncIterator[aiotun.Netstack]:
    async with aiotun.open_netstack(intercept=True, txqueuelen=10_000) as opened:
        yield opened


@pytest.fixture
def few_descriptors(stack: aiotun.Netstack) -> Iterator[int]:
    """Leave this process some forty descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir("/proc/self/fd")}
    limit = [fd for fd in range(1000) if fd not in used][40]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def segment(port: int, flags: int, *, sport: int = 1234, src: str = "10.77.0.2") -> bytes:
    """A TCP segment to a port of 192.0.2.1."""
    tcp = struct.pack("!HHIIBBHHH", sport, port, 7, 0, 0x50, flags, 1000, 0, 0)
    addresses = socket.inet_aton(src) + socket.inet_aton("192.0.2.1")
    value = checksum(addresses + struct.pack("!HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", value) + tcp[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 9, 0, 64, 6, 0) + addresses
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + tcp


async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


# The first and the last ports, and those around the limits of signed numbers.
SOME_PORTS = [*range(1, 1001), *range(32_500, 33_000), *range(65_000, 65_536)]


@pytest.mark.parametrize(
    "ports",
    [
        pytest.param(SOME_PORTS, id="2,036 ports"),
        pytest.param([*range(1, 65_536)], id="all ports", marks=pytest.mark.slow),
    ],
)
async def test_a_scan_finds_all_ports_open(stack: aiotun.Netstack, ports: list[int]) -> None:
    await stack.intercept_tcp(close)
    found: set[int] = set()
    for start in range(0, len(ports), 100):
        some = ports[start : start + 100]
        await stack.tun.send_many([segment(port, SYN) for port in some])
        async with asyncio.timeout(20):
            while not found.issuperset(some):
                for packet in await stack.tun.recv_many():
                    if packet[9] == 6 and packet[33] == SYN | ACK:
                        found.add(int.from_bytes(packet[20:22], "big"))
        await stack.tun.send_many([segment(port, RST) for port in some])
    assert found == set(ports)


async def test_a_flood_of_syns_costs_no_descriptors_and_does_not_stop_service(
    stack: aiotun.Netstack,
) -> None:
    await stack.intercept_tcp(close, backlog=64)
    async with client_of(stack) as client:
        reader, writer = await client.open_connection("192.0.2.1", 80)
        assert await reader.read() == b""
        writer.close()
        before = descriptors()
        for start in range(0, 4000, 250):
            flood = [
                segment(80, SYN, sport=1000 + number, src="10.99.0.1")
                for number in range(start, start + 250)
            ]
            await stack.tun.send_many(flood)
            await asyncio.sleep(0)
        assert descriptors() <= before + 8  # the pool of sockets
        reader, writer = await client.open_connection("192.0.2.1", 80)
        assert await reader.read() == b""
        writer.close()


async def test_a_flood_that_waits_for_admit_is_bounded_and_forgotten(
    stack: aiotun.Netstack,
) -> None:
    asked = 0

    async def admit(local: Any, peer: Any) -> bool:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        return True

    server = await stack.intercept_tcp(close, admit=admit)
    for start in range(0, 2000, 250):
        await stack.tun.send_many(
            [segment(80, SYN, sport=1000 + number) for number in range(start, start + 250)]
        )
    await wait_until(lambda: asked == 512)
    assert stack.stats.packets_refused == 2000 - 512
    server.close()
    await server.wait_closed()
    assert stack.stats.connections_refused == 512


async def connect(client: aiotun.Netstack, count: int) -> None:
    held: list[asyncio.StreamWriter] = []
    port = 0

    async def work() -> None:
        nonlocal port
        while port < count:
            port += 1
            reader, writer = await client.open_connection("192.0.2.1", 1 + port % 1000)
            held.append(writer)
            assert await reader.readexactly(1) == b"!"

    await asyncio.gather(*(work() for _ in range(50)))
    for writer in held:
        writer.close()


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
async def test_many_connections_at_once(stack: aiotun.Netstack, count: int) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] < 3 * count + 1000:
        pytest.skip(f"missing: a limit of {3 * count + 1000} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3 * count + 1000, limit[1]))
    most = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        writer.write(b"!")
        most = max(most, stack.stats.connections_open)
        await reader.read()
        writer.close()

    try:
        server = await stack.intercept_tcp(handle)
        async with client_of(stack, txqueuelen=10_000) as client:
            before = descriptors()
            await connect(client, count)
            server.close()  # and the sockets of each port, where there are some
            assert most == stack.stats.connections_accepted == count
            await wait_until(lambda: stack.stats.connections_open == 0, 30)
            await wait_until(lambda: descriptors() <= before + 62)  # the pools
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


async def test_without_descriptors_connections_are_refused_and_then_accepted_again(
    stack: aiotun.Netstack, few_descriptors: int
) -> None:
    reported: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    release = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    await stack.intercept_tcp(hold, limit=1000)
    answered = 0

    async def answer() -> None:
        """Complete each handshake."""
        nonlocal answered
        async for packet in stack.tun:
            if packet[9] == 6 and packet[33] == SYN | ACK:
                await stack.tun.send(acknowledge(packet))
                answered += 1

    answering = asyncio.create_task(answer())
    for sport in range(100):
        await stack.tun.send(segment(80, SYN, sport=2000 + sport))
    await wait_until(lambda: answered >= 100 and stack.stats.connections_refused > 0)
    await wait_until(
        lambda: stack.stats.connections_accepted + stack.stats.connections_refused >= 100
    )
    # The loop does not spin: it is asleep while nothing can be accepted.
    release.set()
    await wait_until(lambda: stack.stats.connections_open == 0)
    accepted = stack.stats.connections_accepted
    await stack.tun.send(segment(80, SYN, sport=5000))
    await wait_until(lambda: stack.stats.connections_accepted == accepted + 1)
    answering.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await answering


async def test_many_first_syns_for_one_port_need_one_socket(
    stack: aiotun.Netstack, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = aiotun.Namespace.socket

    async def slow(namespace: aiotun.Namespace, *args: Any) -> socket.socket:
        made.append(1)
        await asyncio.sleep(0.1)
        return await make(namespace, *args)

    monkeypatch.setattr(aiotun.Namespace, "socket", slow)
    await stack.intercept_tcp(close)
    made.clear()
    await stack.tun.send_many([segment(80, SYN, sport=2000 + number) for number in range(100)])
    answered = 0
    async with asyncio.timeout(20):
        while answered < 100:
            answered += sum(packet[33] == SYN | ACK for packet in await stack.tun.recv_many())
    assert len(made) == (mechanism == "listeners")


async def test_syns_that_wait_while_no_socket_can_be_made_are_refused_together(
    stack: aiotun.Netstack, mechanism: str
) -> None:
    """One attempt and one report are enough: a flood must not cause one for each SYN."""
    if mechanism == "tproxy":
        pytest.skip("its sockets are made at the start")
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    await stack.intercept_tcp(close)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        await stack.tun.send_many([segment(port, SYN) for port in range(1, 101)])
        await wait_until(lambda: stack.stats.connections_refused == 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [each["exception"].errno for each in reported] == [errno.EMFILE]
    await stack.tun.send_many([segment(port, SYN, sport=2000) for port in range(1, 101)])
    answered = 0
    async with asyncio.timeout(20):
        while answered < 100:
            answered += sum(packet[33] == SYN | ACK for packet in await stack.tun.recv_many())


def acknowledge(packet: bytes) -> bytes:
    """Answer a SYN and ACK, as a client does."""
    sport, dport, sequence, acknowledged = struct.unpack_from("!HHII", packet, 20)
    tcp = struct.pack("!HHIIBBHHH", dport, sport, acknowledged, sequence + 1, 0x50, ACK, 1000, 0, 0)
    addresses = packet[16:20] + packet[12:16]
    value = checksum(addresses + struct.pack("!HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", value) + tcp[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 9, 0, 64, 6, 0) + addresses
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + tcp


@pytest.mark.parametrize("rootless", [True, False])
def test_ctrl_c_ends_a_program_and_its_helper(rootless: bool) -> None:
    program = f"""
        import asyncio, aiotun

        async def handle(reader, writer):
            await reader.read()

        async def main():
            async with (
                aiotun.new_namespace(rootless={rootless}) as ns,
                aiotun.open_netstack(namespace=ns, intercept=True) as stack,
            ):
                await stack.intercept_tcp(handle, admit=lambda local, peer: True)
                print("ready", ns.fileno(), flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("ready")
    children = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    errors = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "ResourceWarning" not in errors
    for child in children:
        assert not Path(f"/proc/{child}").exists()


# --- Asleep --------------------------------------------------------------------------------------


async def processor_seconds() -> float:
    """How much processor time this thread, which runs the loop, needs in half a second."""
    await asyncio.sleep(0.1)  # what is still under way
    before = time.thread_time()
    await asyncio.sleep(0.5)  # nothing must happen, so there is nothing to wait for
    return time.thread_time() - before


async def test_the_loop_sleeps_while_no_descriptor_is_left(
    stack: aiotun.Netstack, few_descriptors: int
) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
    release = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    await stack.intercept_tcp(hold, limit=1000)
    answering = asyncio.create_task(answer_syns(stack.tun))
    await stack.tun.send(segment(80, SYN, sport=2000))
    await wait_until(lambda: stack.stats.connections_accepted == 1)
    # Others take all that is left, the spare one of the interceptor too.
    held: list[int] = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    try:
        for sport in range(50):
            await stack.tun.send(segment(80, SYN, sport=3000 + sport))
        await wait_until(lambda: stack.stats.connections_refused == 50)
        assert await processor_seconds() < 0.1
    finally:
        for fd in held:
            os.close(fd)
        release.set()
    await stack.tun.send(segment(80, SYN, sport=4000))
    await wait_until(lambda: stack.stats.connections_accepted == 2)
    answering.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await answering


async def test_connections_that_wait_while_no_descriptor_is_allowed_are_accepted_later(
    stack: aiotun.Netstack,
) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    await stack.intercept_tcp(close, limit=1000)
    handshakes: set[int] = set()
    answering = asyncio.create_task(answer_syns(stack.tun, handshakes))
    # The first connection: where sockets are made on demand, the port has one from now on.
    await stack.tun.send(segment(80, SYN, sport=2000))
    await wait_until(lambda: stack.stats.connections_accepted == 1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        for sport in range(3000, 3050):
            await stack.tun.send(segment(80, SYN, sport=sport))
        await wait_until(lambda: len(handshakes) == 51 and bool(reported))
        assert stack.stats.connections_accepted == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    await wait_until(lambda: stack.stats.connections_accepted == 51)
    assert stack.stats.connections_refused == 0
    assert {each["exception"].errno for each in reported} == {errno.EMFILE}, reported
    answering.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await answering


async def answer_syns(tun: aiotun.TunDevice, handshakes: set[int] | None = None) -> None:
    """Complete each handshake, and note the client's port."""
    async for packet in tun:
        if packet[9] == 6 and packet[33] == SYN | ACK:
            await tun.send(acknowledge(packet))
            if handshakes is not None:
                handshakes.add(int.from_bytes(packet[22:24], "big"))


@pytest.mark.parametrize("ending", ["stalled", "half-closed", "piped"])
async def test_the_loop_sleeps_with_connections_that_make_no_progress(
    stack: aiotun.Netstack, ending: str
) -> None:
    kept: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept.append(writer)
        if ending == "stalled":
            writer.write(bytes(8 << 20))  # which the client does not read
            await writer.drain()
        elif ending == "half-closed":
            assert await reader.read() == b""  # and then neither writes nor closes
        else:
            there = await stack_out.open_connection("198.51.100.1", 80)
            kept.append(there[1])
            await aiotun.netstack.pipe((reader, writer), there)

    async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept.append(writer)
        reader._transport.pause_reading()  # type: ignore[attr-defined]  # a full buffer, at once

    await stack.intercept_tcp(handle)
    async with contextlib.AsyncExitStack() as exits:
        client = await exits.enter_async_context(client_of(stack))
        far = await exits.enter_async_context(aiotun.open_netstack(intercept=True))
        stack_out = await exits.enter_async_context(client_of(far))
        await far.intercept_tcp(never_reads)
        for _ in range(20):
            reader, writer = await client.open_connection("192.0.2.1", 80)
            kept.append(writer)
            if ending == "half-closed":
                writer.write_eof()
            elif ending == "stalled":
                reader._transport.pause_reading()  # type: ignore[attr-defined]
            else:
                writer.write(bytes(1 << 20))
                writer.write_eof()
        await wait_until(lambda: len(kept) >= (80 if ending == "piped" else 40), 20)
        await asyncio.sleep(1)  # until all buffers are full
        assert await processor_seconds() < 0.1
        assert stack.stats.connections_open == 20
        for each in kept:
            each.transport.abort()
        await wait_until(lambda: stack.stats.connections_open == 0)


# --- One after the other -------------------------------------------------------------------------


@pytest.mark.parametrize("rootless", [True, False], ids=["rootless", "privileged"])
async def test_fifty_stacks_leave_descriptors_processes_and_memory_as_they_were(
    rootless: bool, mechanism: str
) -> None:
    async def one() -> None:
        async with (
            aiotun.new_namespace(rootless=rootless) as ns,
            aiotun.open_netstack(namespace=ns, intercept=True) as stack,
        ):
            await stack.intercept_tcp(close, admit=lambda local, peer: True)
            await stack.tun.send(segment(80, SYN))
            async for packet in stack.tun:
                if packet[9] == 6 and packet[33] == SYN | ACK:
                    break

    for _ in range(10):  # what is made once
        await one()
    gc.collect()
    before, children = descriptors(), children_of(os.getpid())
    memory = resident_kib()
    for _ in range(50):
        await one()
    gc.collect()  # a namespace is kept by a cycle until then
    # Fewer, if something of an earlier test was still being closed.
    assert descriptors() <= before
    assert children_of(os.getpid()) == children
    assert resident_kib() - memory < 2048

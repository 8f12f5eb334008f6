"""Admission: the SYN of an intercepted connection waits until the program has decided."""

import asyncio
import contextlib
import errno
import gc
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvloop

import aiotun
from aiotun.netstack import Refusal
from aiotun.runs import Pool

from ..helpers import checksum, wait_until
from .stacks import CLIENT, client_of, force_mechanism

HOSTS = ["192.0.2.1", "2001:db8::1"]


@pytest.fixture(params=["tproxy", "listeners"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force_mechanism(monkeypatch, request.param)
    name: str = request.param
    return name


@pytest.fixture
async def stack(mechanism: str) -> AsyncIterator[aiotun.Netstack]:
    async with aiotun.open_netstack(intercept=True) as opened:
        yield opened


@pytest.fixture(params=["off", "split", "raw"])
async def any_stack(
    request: pytest.FixtureRequest, mechanism: str
) -> AsyncIterator[aiotun.Netstack]:
    async with aiotun.open_netstack(intercept=True, offload=request.param) as opened:
        yield opened


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    writer.close()


async def hear(client: aiotun.Netstack, host: str, port: int = 80) -> bytes:
    reader, writer = await client.open_connection(host, port)
    try:
        return await reader.read()
    finally:
        writer.close()


def async_function(answer: Any) -> Callable[..., Any]:
    async def admit(local: Any, peer: Any) -> Any:
        await asyncio.sleep(0)
        return answer

    return admit


def plain(answer: Any) -> Callable[..., Any]:
    return lambda local, peer: answer


@pytest.mark.parametrize("made", [async_function, plain])
async def test_the_client_sees_each_refusal(any_stack: aiotun.Netstack, made: Any) -> None:
    stack = any_stack
    async with client_of(stack) as client:
        for answer, code, code6 in (
            (False, errno.ECONNREFUSED, errno.ECONNREFUSED),
            (Refusal.NET, errno.ENETUNREACH, errno.ENETUNREACH),
            (Refusal.HOST, errno.EHOSTUNREACH, errno.EHOSTUNREACH),
            (Refusal.PROHIBITED, errno.EHOSTUNREACH, errno.EACCES),
        ):
            async with await stack.intercept_tcp(greet, admit=made(answer)):
                for host in HOSTS:
                    with pytest.raises(OSError, match="Connect call failed") as caught:
                        await client.open_connection(host, 80)
                    assert caught.value.errno == (code6 if ":" in host else code)
    assert stack.stats.connections_refused == 8
    assert stack.stats.connections_accepted == 0


@pytest.mark.parametrize("made", [async_function, plain])
async def test_what_is_admitted_comes(any_stack: aiotun.Netstack, made: Any) -> None:
    await any_stack.intercept_tcp(greet, admit=made(True))
    async with client_of(any_stack) as client:
        for host in HOSTS:
            for port in (1, 80, 65_535):
                assert await hear(client, host, port) == b"hello"
    assert any_stack.stats.connections_accepted == 6


@pytest.mark.parametrize("host", HOSTS)
async def test_admit_is_told_what_the_handler_sees(stack: aiotun.Netstack, host: str) -> None:
    asked, handled = [], []

    def admit(local: Any, peer: Any) -> bool:
        asked.append((local, peer))
        return True

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = writer.get_extra_info
        handled.append((info("sockname")[:2], info("peername")[:2]))
        writer.close()

    await stack.intercept_tcp(handle, admit=admit)
    async with client_of(stack) as client:
        await hear(client, host, 443)
    assert asked == handled
    assert asked[0][0] == (host, 443)


async def test_a_syn_that_is_repeated_asks_once() -> None:
    asked = 0
    decided = asyncio.Event()

    async def admit(local: Any, peer: Any) -> bool:
        nonlocal asked
        asked += 1
        await decided.wait()
        return True

    async with aiotun.open_netstack(intercept=True) as stack:
        await stack.intercept_tcp(greet, admit=admit)
        async with aiotun.open_netstack(addresses=["10.77.0.2/24"]) as client:
            attempt = asyncio.ensure_future(hear(client, "192.0.2.1"))
            syn = await client.tun.recv()
            for _ in range(3):
                await stack.tun.send(syn)
            await wait_until(lambda: asked == 1)
            with pytest.raises(BlockingIOError):
                stack.tun.recv_nowait()
            decided.set()
            await client.tun.send(await stack.tun.recv())  # SYN and ACK
            await stack.tun.send(syn)  # it was repeated while that was under way
            attempt.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await attempt
        assert asked == 1


async def test_the_clients_reset_cancels_admit() -> None:
    ended: list[str] = []

    async def admit(local: Any, peer: Any) -> bool:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return True

    async with aiotun.open_netstack(intercept=True) as stack:
        await stack.intercept_tcp(greet, admit=admit)
        await stack.tun.send(segment("10.77.0.2", "192.0.2.1", flags=0x02))
        await asyncio.sleep(0)
        await stack.tun.send(segment("10.77.0.2", "192.0.2.1", flags=0x04))
        await wait_until(lambda: ended == ["cancelled"])
        assert stack.stats.connections_expired == 1


async def test_a_client_that_repeats_its_syn_no_more_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aiotun._netstack.admission._FIRST_PATIENCE", 0.05)
    monkeypatch.setattr("aiotun._netstack.admission._SWEEP", 0.05)
    async with aiotun.open_netstack(intercept=True) as stack:
        await stack.intercept_tcp(greet, admit=lambda local, peer: asyncio.sleep(3600, True))
        await stack.tun.send(segment("10.77.0.2", "192.0.2.1", flags=0x02))
        await wait_until(lambda: stack.stats.connections_expired == 1)


@pytest.mark.parametrize("whole", [True, False])
async def test_closing_cancels_admit_and_refuses_what_is_held(whole: bool) -> None:
    asked = cancelled = 0

    async def admit(local: Any, peer: Any) -> bool:
        nonlocal asked, cancelled
        asked += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise
        return True

    async with aiotun.open_netstack(intercept=True) as stack:
        server = await stack.intercept_tcp(greet, admit=admit)
        async with client_of(stack) as client:
            attempts = [asyncio.ensure_future(hear(client, host)) for host in HOSTS]
            await wait_until(lambda: asked == 2)
            if whole:
                await stack.aclose()
            else:
                server.close()
                await server.wait_closed()
            assert cancelled == 2
            for attempt in attempts:
                with pytest.raises(ConnectionRefusedError):
                    await attempt


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
@pytest.mark.parametrize("waits_for", ["admit", "socket"])
def test_a_stack_that_holds_syns_can_be_closed_after_its_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    waits_for: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*args: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    async def leave() -> aiotun.Netstack:
        stack = await aiotun.open_netstack(intercept=True)
        await stack.intercept_tcp(greet, admit=never if waits_for == "admit" else None)
        monkeypatch.setattr(aiotun.Namespace, "socket", never)
        for port in range(1, 4):
            await stack.tun.send(segment("10.77.0.2", "192.0.2.1", sport=port, flags=0x02))
        await asyncio.sleep(0)
        return stack

    force_mechanism(monkeypatch, "listeners")
    reported: list[Any] = []
    loop = new_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    stack = loop.run_until_complete(leave())
    tasks = asyncio.all_tasks(loop)
    loop.close()
    stack.close()
    assert stack.tun.closed
    assert len(tasks) == stack.stats.connections_refused == 3
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch
    del task, tasks, stack
    gc.collect()
    assert reported == []


async def test_an_admit_that_fails_refuses_and_is_reported(stack: aiotun.Netstack) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    def fail(local: Any, peer: Any) -> bool:
        raise ArithmeticError

    async def fail_later(local: Any, peer: Any) -> bool:
        raise ArithmeticError

    async with client_of(stack) as client:
        for admit in (fail, fail_later, plain("yes"), async_function(None)):
            async with await stack.intercept_tcp(greet, admit=admit):
                with pytest.raises(ConnectionRefusedError):
                    await client.open_connection("192.0.2.1", 80)
    kinds = [type(each["exception"]) for each in reported]
    assert kinds == [ArithmeticError, ArithmeticError, TypeError, TypeError]
    assert stack.stats.connections_refused == 4


async def test_the_stacks_own_servers_need_no_admission() -> None:
    async with aiotun.open_netstack(intercept=True, addresses=["10.77.0.1/24"]) as stack:
        await stack.intercept_tcp(greet, admit=plain(False))
        await stack.start_server(greet, port=80)
        async with client_of(stack) as client:
            assert await hear(client, "10.77.0.1") == b"hello"


async def test_packets_are_looked_at_only_while_it_is_needed(
    stack: aiotun.Netstack, mechanism: str
) -> None:
    intake = stack._core.intake
    async with await stack.intercept_tcp(greet):
        assert intake.active == (mechanism == "listeners")
    async with await stack.intercept_tcp(greet, admit=plain(True)):
        assert intake.active
    assert not intake.active


async def test_held_syns_are_limited_for_each_destination_and_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aiotun._netstack.admission._HELD_FOR_ONE", 3)
    monkeypatch.setattr("aiotun._netstack.admission._HELD_MAX", 5)
    asked: list[str] = []

    def admit(local: Any, peer: Any) -> Any:
        asked.append(local[0])
        return asyncio.sleep(3600, True)

    async with aiotun.open_netstack(intercept=True) as stack:
        await stack.intercept_tcp(greet, admit=admit)
        for host in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
            for port in range(1, 11):
                await stack.tun.send(segment("10.77.0.2", host, sport=port, flags=0x02))
        assert asked == ["192.0.2.1"] * 3 + ["192.0.2.2"] * 2
        assert stack.stats.packets_refused == 25


async def test_what_is_sent_to_many_hosts_is_neither_asked_about_nor_answered(
    stack: aiotun.Netstack,
) -> None:
    asked: list[Any] = []

    def admit(local: Any, peer: Any) -> bool:
        asked.append(local)
        return False

    await stack.intercept_tcp(greet, admit=admit)
    for host in ("224.0.0.1", "239.1.2.3", "255.255.255.255", "0.0.0.0"):
        await stack.tun.send(segment("10.77.0.2", host, flags=0x02))
    await stack.tun.send(segment("10.77.0.2", "240.0.0.1", flags=0x02))
    answer = await stack.tun.recv()
    assert answer[12:16] == socket.inet_aton("240.0.0.1")
    assert asked == [("240.0.0.1", 80)]


async def test_a_syn_in_fragments_is_held_and_admitted(any_stack: aiotun.Netstack) -> None:
    await any_stack.intercept_tcp(greet, admit=async_function(True))
    syn = segment("10.77.0.2", "192.0.2.1", flags=0x02, payload=b"x" * 100)
    first, second = fragments(syn, 24)
    header = bytes(10 if any_stack.tun.offload == "raw" else 0)
    await any_stack.tun.send(header + second)
    await any_stack.tun.send(header + first)
    answer = (await any_stack.tun.recv())[len(header) :]
    assert answer[9] == 6
    assert answer[33] == 0x12  # SYN and ACK


async def test_fragments_that_hide_the_flags_are_dropped_and_counted(
    any_stack: aiotun.Netstack,
) -> None:
    await any_stack.intercept_tcp(greet, admit=plain(False))
    syn = segment("10.77.0.2", "192.0.2.1", flags=0x02, payload=b"x" * 100)
    header = bytes(10 if any_stack.tun.offload == "raw" else 0)
    for each in fragments(syn, 8):
        await any_stack.tun.send(header + each)
    assert any_stack.stats.packets_refused == 2
    assert any_stack.stats.connections_refused == 0


async def test_batches_keep_their_order_and_count(any_stack: aiotun.Netstack) -> None:
    asked: list[int] = []

    def admit(local: Any, peer: Any) -> bool:
        asked.append(peer[1])
        return False

    await any_stack.intercept_tcp(greet, admit=admit)
    header = bytes(10 if any_stack.tun.offload == "raw" else 0)
    batch = []
    for port in range(1, 21):
        flags = 0x10 if port % 3 else 0x02
        batch.append(header + segment("10.77.0.2", "192.0.2.1", sport=port, flags=flags))
    assert await any_stack.tun.send_many(batch) == 20
    assert asked == [3, 6, 9, 12, 15, 18]


@pytest.mark.parametrize("offload", ["off", "split"])
async def test_what_is_sent_in_runs_is_admitted_too(mechanism: str, offload: Any) -> None:
    async def carry(source: aiotun.TunDevice, target: aiotun.TunDevice) -> None:
        pool = Pool(4)
        with contextlib.suppress(aiotun.DeviceClosedError):
            while True:
                with await source.recv_run(pool) as run:
                    await target.send_run(run)

    asked: list[Any] = []

    async def admit(local: Any, peer: Any) -> bool:
        asked.append(local)
        return bool(local[1] == 80)

    async with (
        aiotun.open_netstack(intercept=True, offload=offload) as stack,
        aiotun.open_netstack(addresses=CLIENT, offload=offload) as client,
        asyncio.TaskGroup() as group,
    ):
        tasks = [
            group.create_task(carry(stack.tun, client.tun)),
            group.create_task(carry(client.tun, stack.tun)),
        ]
        await stack.intercept_tcp(greet, admit=admit)
        for host in HOSTS:
            assert await hear(client, host) == b"hello"
            with pytest.raises(ConnectionRefusedError):
                await hear(client, host, 81)
        assert len(asked) == 4
        for task in tasks:
            task.cancel()


async def test_a_capture_records_what_is_answered_too(
    any_stack: aiotun.Netstack, tmp_path: Any
) -> None:
    file = tmp_path / "packets.pcap"
    with aiotun.capture.PcapWriter(file, mode="tun") as writer, any_stack.tun.capture(writer):
        server = await any_stack.intercept_tcp(greet, admit=plain(False))
        async with client_of(any_stack) as client:
            with pytest.raises(ConnectionRefusedError):
                await client.open_connection("192.0.2.1", 80)
        server.close()
        await wait_until(lambda: writer.written == 2)  # its thread writes


def segment(src: str, dst: str, *, sport: int = 1234, flags: int, payload: bytes = b"") -> bytes:
    """A TCP segment from src to dst, port 80."""
    tcp = struct.pack("!HHIIBBHHH", sport, 80, 7, 0, 0x50, flags, 1000, 0, 0) + payload
    addresses = socket.inet_aton(src) + socket.inet_aton(dst)
    value = checksum(addresses + struct.pack("!HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", value) + tcp[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 9, 0, 64, 6, 0) + addresses
    return with_checksum(head + tcp)


def with_checksum(packet: bytes) -> bytes:
    packet = packet[:10] + b"\0\0" + packet[12:]
    return packet[:10] + struct.pack("!H", checksum(packet[:20])) + packet[12:]


def fragments(packet: bytes, size: int) -> tuple[bytes, bytes]:
    """Cut an IPv4 packet in two, the first with so many bytes of payload."""
    head, payload = packet[:20], packet[20:]
    one = head[:2] + struct.pack("!HHH", 20 + size, 9, 0x2000) + head[8:] + payload[:size]
    rest = payload[size:]
    two = head[:2] + struct.pack("!HHH", 20 + len(rest), 9, size // 8) + head[8:] + rest
    return with_checksum(one), with_checksum(two)

"""Datagrams and pings to any address, answered by the program.

The client is this test's own namespace: its sockets are ordinary ones, and its packets are carried
to the stack by a task.
"""

import asyncio
import contextlib
import contextvars
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun._netstack import flows, udp
from aiotun._packets.fragments import fragment
from aiotun._packets.udp import build
from aiotun.netstack import Netstack, NetstackStats, Ping, Refusal, UdpFlow

from ..helpers import checksum, make_icmp_echo, need, wait_until
from .stacks import force_mechanism

HOSTS = ["8.8.8.8", "2001:db8::8"]
PEERS = {4: "10.9.0.7", 6: "fd09::7"}
OWN = {4: "10.9.0.1", 6: "fd09::1"}
each_host = pytest.mark.parametrize("host", HOSTS)

Ways = list[tuple[str, bool]]
WAYS: Ways = [(way, rootless) for way in ("tproxy", "listeners") for rootless in (True, False)]


def version(host: str) -> int:
    return 6 if ":" in host else 4


def check(table: udp.UdpInterceptor) -> None:
    """Assert the invariants of a table of flows; see its docstring."""
    flows = table._flows
    assert flows == {**table._line, **table._dns_line}
    assert len(flows) == len(table._line) + len(table._dns_line)
    assert not any(flow.ended for flow in flows.values())
    assert table.queued == sum(flow.bytes for flow in flows.values())
    assert len(flows) <= table._most
    expires = any(line and idle < float("inf") for line, idle in table._idle)
    assert expires == (table._timer is not None) or not flows


@pytest.fixture(autouse=True)
def checked_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def checking(method: Callable[..., Any]) -> Callable[..., Any]:
        def checked(table: udp.UdpInterceptor, *args: Any) -> Any:
            result = method(table, *args)
            check(table)
            return result

        return checked

    for name in ("take", "take_error", "send", "close", "_expire"):
        monkeypatch.setattr(udp.UdpInterceptor, name, checking(getattr(udp.UdpInterceptor, name)))


class Net:
    """A stack, and this namespace as its client."""

    def __init__(self, stack: Netstack, client: aiotun.TunDevice) -> None:
        self.stack = stack
        self.client = client
        self.sockets: list[socket.socket] = []

    def socket(self, host: str = "", port: int = 0, family: int = 0) -> socket.socket:
        """Make a client's socket, connected to an address if one is given."""
        family = family or (socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sockets.append(sock)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        if host:
            sock.connect((host, port))
        else:
            sock.bind((PEERS[6 if family == socket.AF_INET6 else 4], 0))
        return sock

    async def up(self) -> None:
        async for batch in self.client.batches():
            await self.stack.tun.send_many(batch)

    async def down(self) -> None:
        async for batch in self.stack.tun.batches():
            await self.client.send_many(batch)


async def heard(sock: socket.socket) -> tuple[bytes, tuple[Any, ...]]:
    """Receive a datagram, and where it came from."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        async with asyncio.timeout(5):
            await ready
    finally:
        loop.remove_reader(sock)
    data, sender = sock.recvfrom(70_000)
    return data, sender[:2]


async def ask(sock: socket.socket, data: bytes) -> bytes:
    sock.send(data)
    return (await heard(sock))[0]


async def echo(flow: UdpFlow[bytes]) -> None:
    async for data in flow:
        await flow.send(data)


@contextlib.asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Net]:
    """Open a stack and its client, and carry packets between them."""
    client_options = {
        "mtu": options.get("mtu", 1500),
        "offload": options.get("offload", "off"),
    }
    options.setdefault("addresses", [f"{OWN[4]}/24", f"{OWN[6]}/64"])
    async with (
        aiotun.open_netstack(intercept=True, **options) as stack,
        aiotun.open_tun(
            "client",
            addresses=[f"{PEERS[4]}/32", f"{PEERS[6]}/128"],
            routes=["default", "::/0"],
            txqueuelen=5000,
            ipv6_autoconf=False,
            **client_options,
        ) as client,
    ):
        net = Net(stack, client)
        tasks = [asyncio.create_task(net.up()), asyncio.create_task(net.down())]
        try:
            yield net
        finally:
            for sock in net.sockets:
                sock.close()
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    async with opened() as made:
        yield made


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{'rootless' if way[1] else 'privileged'}")
async def any_net(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Net]:
    mechanism, rootless = request.param
    force_mechanism(monkeypatch, mechanism)
    async with (
        aiotun.new_namespace(rootless=rootless) as namespace,
        opened(namespace=namespace) as made,
    ):
        yield made


class Reports:
    """What the loop's exception handler was told."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.errors.append(context["exception"])
        )


@pytest.fixture
async def reports() -> Reports:
    return Reports()


# --- Any address and port ------------------------------------------------------------------------


async def test_every_address_and_port_answers(any_net: Net) -> None:
    seen = []

    async def on_flow(flow: UdpFlow[bytes]) -> None:
        seen.append((flow.local, flow.peer))
        await echo(flow)

    async with await any_net.stack.intercept_udp(on_flow):
        for host in (*HOSTS, "0.1.2.3", "240.0.0.1", "169.254.7.7", "192.168.1.255", "fd00::5"):
            for port in (1, 53, 443, 65535):
                sock = any_net.socket(host, port)
                assert await ask(sock, b"hello") == b"hello"
                assert seen.pop() == ((host, port), sock.getsockname()[:2])
    assert seen == []
    assert any_net.stack.stats.flows_accepted == 28


async def test_datagrams_of_every_size_go_both_ways(any_net: Net) -> None:
    async with await any_net.stack.intercept_udp(echo):
        for host in HOSTS:
            sock = any_net.socket(host, 443)
            for size in (0, 1, 1452, 1472, 1473, 9000, 65507):
                data = os.urandom(size)
                assert await ask(sock, data) == data


@pytest.mark.parametrize("offload", ["off", "split", "raw"])
@each_host
async def test_every_offload_mode_carries_datagrams(host: str, offload: str) -> None:
    async with opened(offload=offload) as net, await net.stack.intercept_udp(echo):
        sock = net.socket(host, 443)
        for size in (0, 100, 1452, 3000):
            data = os.urandom(size)
            assert await ask(sock, data) == data
        sock.setsockopt(socket.IPPROTO_UDP, 103, 1000)  # UDP_SEGMENT: three datagrams at once
        try:
            sock.send(b"a" * 1000 + b"b" * 1000 + b"c")
        except OSError as error:
            if (offload, error.errno) != ("off", errno.EIO):
                raise
            pytest.skip("before Linux 6.2, UDP_SEGMENT needs an offload device")
        assert [(await heard(sock))[0] for _ in range(3)] == [b"a" * 1000, b"b" * 1000, b"c"]
        assert net.stack.stats.flows_accepted == 1


@each_host
async def test_port_0_is_a_port(host: str) -> None:
    async with aiotun.open_netstack(intercept=True) as stack, await stack.intercept_udp(echo):
        local = socket.inet_pton(*packed(host)) + bytes(2)
        peer = socket.inet_pton(*packed(PEERS[version(host)])) + bytes(2)
        await stack.tun.send(build(peer, local, b"zero", 1))
        answer = await first(stack, host)
        assert answer[-4:] == b"zero"
        start = 20 if version(host) == 4 else 40
        assert answer[start : start + 4] == bytes(4)


def packed(host: str) -> tuple[int, str]:
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), host


def end_of(host: str, port: int) -> bytes:
    return socket.inet_pton(*packed(host)) + port.to_bytes(2, "big")


async def first(stack: Netstack, host: str) -> bytes:
    """Receive the first packet of a host's IP version."""
    async with asyncio.timeout(5):
        while True:
            packet = await stack.tun.recv()
            if packet[0] >> 4 == version(host):
                return packet


@each_host
async def test_the_stacks_own_addresses_are_the_kernels(any_net: Net, host: str) -> None:
    own = OWN[version(host)]
    sock = await any_net.stack.socket(packed(host)[0], socket.SOCK_DGRAM)
    with sock:
        sock.bind((own, 4000))
        for per in ("flow", "client"):
            async with await any_net.stack.intercept_udp(echo, per=per):  # type: ignore[call-overload]
                client = any_net.socket(family=packed(host)[0])
                client.sendto(b"for the kernel", (own, 4000))
                assert (await heard(sock))[0] == b"for the kernel"
                client.connect((own, 4001))
                client.send(b"nobody")
                with pytest.raises(ConnectionRefusedError):
                    await heard(client)
    assert any_net.stack.stats.flows_accepted == 0


async def test_multicast_and_broadcast_are_not_intercepted(net: Net) -> None:
    async with await net.stack.intercept_udp(echo):
        for host in ("255.255.255.255", "239.1.2.3", "127.0.0.1", "0.0.0.0"):
            packet = build(end_of(PEERS[4], 5), end_of(host, 5), b"x", 1)
            await net.stack.tun.send(packet)
        for host in ("ff02::1", "ff0e::1", "::1", "fe80::1", "::ffff:1.2.3.4", "::"):
            packet = build(end_of(PEERS[6], 5), end_of(host, 5), b"x", 1)
            await net.stack.tun.send(packet)
        assert await ask(net.socket("8.8.8.8", 53), b"x") == b"x"
        assert net.stack.stats.flows_accepted == 1


# --- Flows ---------------------------------------------------------------------------------------


@each_host
async def test_each_pair_of_addresses_is_a_flow(net: Net, host: str) -> None:
    flows: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(flows.append):
        one, other = net.socket(host, 1), net.socket(host, 1)
        for data in (b"a", b"b"):
            one.send(data)
            other.send(data)
        await wait_until(lambda: len(flows) == 2)
        first, second = flows
        assert first.local == second.local == (host, 1)
        assert {first.peer, second.peer} == {one.getsockname()[:2], other.getsockname()[:2]}
        for flow in flows:
            assert [await flow.recv(), await flow.recv()] == [b"a", b"b"]
            flow.send_nowait(memoryview(b"answer"))
        for sock in (one, other):
            assert await heard(sock) == (b"answer", (host, 1))


@each_host
async def test_a_client_is_one_flow_wherever_it_sends_to(any_net: Net, host: str) -> None:
    """Full cone: two STUN servers see the same client, and strangers can answer it."""
    flows: list[UdpFlow[tuple[bytes, tuple[str, int]]]] = []
    second = "9.9.9.9" if version(host) == 4 else "2001:db8::9"
    stranger = "1.2.3.4" if version(host) == 4 else "2001:db8::1234"
    async with await any_net.stack.intercept_udp(flows.append, per="client"):
        sock = any_net.socket(family=packed(host)[0])
        sock.sendto(b"who am I?", (host, 3478))
        sock.sendto(b"who am I?", (second, 3479))
        await wait_until(lambda: bool(flows))
        (flow,) = flows
        asked = [await flow.recv() for _ in range(2)]
        assert asked == [(b"who am I?", (host, 3478)), (b"who am I?", (second, 3479))]
        assert (flow.local, flow.peer) == ((host, 3478), sock.getsockname()[:2])
        await flow.send(b"you", (second, 3479))
        assert await heard(sock) == (b"you", (second, 3479))
        await flow.send(b"peer", (stranger, 65000))
        assert await heard(sock) == (b"peer", (stranger, 65000))
        both = ("::ffff:1.2.3.4", 5, 0, 0) if version(host) == 4 else ("2001:db8::4", 5, 0, 0)
        await flow.send(b"as a socket has it", both)
        assert (await heard(sock))[1] == (both[0].removeprefix("::ffff:"), 5)
        await flow.send(b"first")
        assert await heard(sock) == (b"first", (host, 3478))
        sock.sendto(b"back", (stranger, 65000))
        assert await flow.recv() == (b"back", (stranger, 65000))
        assert any_net.stack.stats.flows_open == 1


WORLD = "1.2.3.4"


class Heard(asyncio.DatagramProtocol):
    """Gives what it receives to a function, with the sender."""

    def __init__(self, function: Callable[[bytes, Any], None]) -> None:
        self._function = function

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._function(data, addr)


async def test_two_stun_servers_see_the_same_address(net: Net) -> None:
    """A client's flow is passed on by one socket, and strangers reach the client by it."""
    loop = asyncio.get_running_loop()
    seen: list[Any] = []
    servers: dict[tuple[str, int], Any] = {}
    transports: list[asyncio.DatagramTransport] = []

    async def endpoint(function: Callable[[bytes, Any], None]) -> asyncio.DatagramTransport:
        transport, _ = await loop.create_datagram_endpoint(
            lambda: Heard(function), local_addr=("127.0.0.1", 0)
        )
        transports.append(transport)
        return transport

    async def pass_on(flow: UdpFlow[tuple[bytes, tuple[str, int]]]) -> None:
        # Outside is the loopback network here, and a flow's answers can't come from there.
        outside = await endpoint(lambda data, sender: flow.send_nowait(data, (WORLD, sender[1])))
        async for data, local in flow:
            outside.sendto(data, servers[local])

    for host in ("8.8.8.8", "9.9.9.9"):
        server = await endpoint(lambda data, sender: seen.append(sender))
        servers[host, 3478] = server.get_extra_info("sockname")
    stranger = await endpoint(lambda data, sender: None)
    async with await net.stack.intercept_udp(pass_on, per="client"):
        sock = net.socket(family=socket.AF_INET)
        for host, port in servers:
            sock.sendto(b"who am I?", (host, port))
        await wait_until(lambda: len(seen) == 2)
        assert seen[0] == seen[1]
        stranger.sendto(b"found you", seen[0])
        port = stranger.get_extra_info("sockname")[1]
        assert await heard(sock) == (b"found you", (WORLD, port))
        assert net.stack.stats.flows_accepted == 1
    for transport in transports:
        transport.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_slow_handler_does_not_stall_the_others(net: Net) -> None:
    stop = asyncio.Event()

    async def on_flow(flow: UdpFlow[bytes]) -> None:
        if flow.local[1] == 1:
            await stop.wait()
        await echo(flow)

    async with await net.stack.intercept_udp(on_flow):
        slow, fast = net.socket("8.8.8.8", 1), net.socket("8.8.8.8", 2)
        for number in range(100):
            slow.send(b"x")
            assert await ask(fast, b"%d" % number) == b"%d" % number
        stop.set()
        assert [(await heard(slow))[0] for _ in range(100)] == [b"x"] * 100


async def test_what_nobody_receives_is_bounded_and_counted(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp, "_FLOW_BYTES", 50 * (1000 + flows.OVERHEAD))
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append):
        sock = net.socket("8.8.8.8", 9)
        for number in range(500):
            sock.send(b"%4d" % number + bytes(996))

        def dropped() -> int:
            return net.stack.stats.datagrams_dropped

        await wait_until(lambda: dropped() == 450)
        (flow,) = held
        assert [await flow.recv() for _ in range(50)][-1][:4] == b"  49"
        sock.send(b"more")
        assert await flow.recv() == b"more"
        # All flows together are bounded, too.
        monkeypatch.setattr(udp, "_ALL_BYTES", 3000)
        for port in range(10, 20):
            net.socket("8.8.8.8", port).send(bytes(1000))
        await wait_until(lambda: len(held) == 11)
        await wait_until(lambda: dropped() == 450 + 7)
    assert dropped() == 450 + 10  # and what was left in the queues at the end


async def test_a_cancelled_receiver_loses_nothing(net: Net) -> None:
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append):
        sock = net.socket("8.8.8.8", 9)
        sock.send(b"begin")
        await wait_until(lambda: bool(held))
        (flow,) = held
        assert await flow.recv() == b"begin"
        got: list[bytes] = []
        for number in range(200):
            receiving = [asyncio.create_task(flow.recv()) for _ in range(3)]
            for _ in range(number % 3):
                await asyncio.sleep(0)
            sock.send(b"%d" % number)
            for _ in range(number % 5):
                await asyncio.sleep(0)
            receiving[number % 3].cancel()
            if number % 2:
                await asyncio.wait(receiving, return_when=asyncio.FIRST_COMPLETED)
            for task in receiving:
                task.cancel()
            done = await asyncio.gather(*receiving, return_exceptions=True)
            got += [each for each in done if isinstance(each, bytes)]
        while len(got) < 200:
            async with asyncio.timeout(2):
                got.append(await flow.recv())
        assert got == [b"%d" % number for number in range(200)]
        assert net.stack.stats.datagrams_dropped == 0


async def test_a_wake_up_is_passed_on_by_who_is_cancelled(net: Net) -> None:
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append):
        sock = net.socket("8.8.8.8", 9)
        sock.send(b"begin")
        await wait_until(lambda: bool(held))
        (flow,) = held
        await flow.recv()
        one, other = asyncio.create_task(flow.recv()), asyncio.create_task(flow.recv())
        await asyncio.sleep(0)
        packet = build(flow_end(flow.peer), flow_end(flow.local), b"next", 1)
        await net.stack.tun.send(packet)  # wakes the first
        one.cancel()
        async with asyncio.timeout(2):
            assert await other == b"next"
        assert one.cancelled()


def flow_end(address: tuple[str, int]) -> bytes:
    return end_of(*address)


# --- The end of a flow ---------------------------------------------------------------------------


@each_host
async def test_flows_expire_and_come_back(any_net: Net, host: str) -> None:
    begun: list[UdpFlow[bytes]] = []
    ended: list[UdpFlow[bytes]] = []

    async def on_flow(flow: UdpFlow[bytes]) -> None:
        begun.append(flow)
        await echo(flow)
        ended.append(flow)

    async with await any_net.stack.intercept_udp(on_flow, idle=0.1):
        sock = any_net.socket(host, 9)
        for number in (1, 2):
            assert await ask(sock, b"x") == b"x"
            await wait_until(lambda number=number: len(ended) == number)  # type: ignore[misc]
            assert begun == ended
            assert begun[-1].closed
            with pytest.raises(aiotun.DeviceClosedError, match="has expired"):
                await begun[-1].recv()
            with pytest.raises(aiotun.DeviceClosedError, match="has expired"):
                await begun[-1].send(b"late")
    stats = any_net.stack.stats
    assert (stats.flows_expired, stats.flows_accepted, stats.flows_open) == (2, 2, 0)


async def test_a_flow_with_traffic_does_not_expire(net: Net) -> None:
    async with await net.stack.intercept_udp(echo, idle=0.3):
        busy, quiet = net.socket("8.8.8.8", 1), net.socket("8.8.8.8", 2)
        assert await ask(quiet, b"x") == b"x"
        while net.stack.stats.flows_expired == 0:
            assert await ask(busy, b"x") == b"x"
        assert net.stack.stats.flows_accepted == 2
        assert await ask(busy, b"x") == b"x"
        assert net.stack.stats.flows_accepted == 2


@pytest.mark.parametrize("per", ["flow", "client"])
async def test_dns_flows_end_soon_after_their_answer(
    net: Net, monkeypatch: pytest.MonkeyPatch, per: Any
) -> None:
    monkeypatch.setattr(udp, "_DNS_IDLE", 0.1)
    held: list[UdpFlow[Any]] = []
    async with await net.stack.intercept_udp(held.append, per=per):
        asking, silent, other = (net.socket("8.8.8.8", port) for port in (53, 53, 54))
        for sock in (asking, silent, other):
            sock.send(b"question")
        await wait_until(lambda: len(held) == 3)
        for flow in held:
            if flow.peer[1] != silent.getsockname()[1]:
                await flow.send(b"answer")
        await wait_until(lambda: net.stack.stats.flows_expired == 1)
        assert [flow.peer[1] for flow in held if flow.closed] == [asking.getsockname()[1]]


async def test_closing_a_flow_ends_it_and_the_next_datagram_begins_another(net: Net) -> None:
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append):
        sock = net.socket("8.8.8.8", 9)
        sock.send(b"1")
        await wait_until(lambda: len(held) == 1)
        flow = held[0]
        assert await flow.recv() == b"1"
        waiting = [asyncio.create_task(flow.recv()) for _ in range(3)]
        await asyncio.sleep(0)
        flow.close()
        flow.close()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, aiotun.DeviceClosedError)
        assert [data async for data in flow] == []
        assert "closed" in repr(flow)
        sock.send(b"2")
        await wait_until(lambda: len(held) == 2)
        assert await held[1].recv() == b"2"
    assert held[1].closed


async def test_an_async_handler_that_returns_closes_its_flow(net: Net) -> None:
    async def answer(flow: UdpFlow[bytes]) -> None:
        await flow.send(b"to " + await flow.recv())

    async with await net.stack.intercept_udp(answer):
        sock = net.socket("8.8.8.8", 53)
        for data in (b"A?", b"AAAA?"):
            assert await ask(sock, data) == b"to " + data
        assert net.stack.stats.flows_accepted == 2
        await wait_until(lambda: net.stack.stats.flows_open == 0)


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_handlers_error_is_reported_and_closes_its_flow(
    net: Net, reports: Reports, kind: str
) -> None:
    def plain(flow: UdpFlow[bytes]) -> None:
        raise LookupError("plain")

    async def asynchronous(flow: UdpFlow[bytes]) -> None:
        raise LookupError("async")

    async with await net.stack.intercept_udp(plain if kind == "plain" else asynchronous):
        net.socket("8.8.8.8", 1).send(b"x")
        await wait_until(lambda: [str(each) for each in reports.errors] == [kind])
        await wait_until(lambda: net.stack.stats.flows_open == 0)


@each_host
async def test_a_client_that_has_gone_ends_its_flow(any_net: Net, host: str) -> None:
    held: list[UdpFlow[bytes]] = []
    async with await any_net.stack.intercept_udp(held.append):
        sock = any_net.socket(host, 9)
        sock.send(b"x")
        await wait_until(lambda: bool(held))
        assert await held[0].recv() == b"x"
        sock.close()
        receiving = asyncio.create_task(held[0].recv())
        await held[0].send(b"nobody listens")
        with pytest.raises(aiotun.DeviceClosedError):
            await asyncio.wait_for(receiving, 5)
        assert any_net.stack.stats.flows_unreachable == 1


async def test_a_client_that_refuses_a_stranger_keeps_its_flow(net: Net) -> None:
    held: list[UdpFlow[Any]] = []
    async with await net.stack.intercept_udp(held.append, per="client"):
        sock = net.socket("8.8.8.8", 9)
        sock.send(b"x")
        await wait_until(lambda: bool(held))
        await held[0].send(b"stranger", ("1.2.3.4", 5))
        await wait_until(lambda: net.stack.stats.flows_unreachable == 1)
        await held[0].send(b"friend")
        assert await heard(sock) == (b"friend", ("8.8.8.8", 9))


@each_host
async def test_closing_the_server_ends_its_flows_and_the_kernel_refuses(
    any_net: Net, host: str
) -> None:
    server = await any_net.stack.intercept_udp(echo)
    sock = any_net.socket(host, 9)
    assert await ask(sock, b"x") == b"x"
    with pytest.raises(RuntimeError, match="already intercepts UDP"):
        await any_net.stack.intercept_udp(echo)
    server.close()
    server.close()
    await server.wait_closed()
    assert server.closed
    assert any_net.stack.stats.flows_open == 0
    sock.send(b"x")
    with pytest.raises(ConnectionRefusedError):
        await heard(sock)
    async with await any_net.stack.intercept_udp(echo):
        assert await ask(sock, b"again") == b"again"


async def test_closing_the_stack_ends_flows_and_questions() -> None:
    asked = asyncio.Event()
    ended: list[str] = []

    async def admit(local: tuple[str, int], peer: tuple[str, int]) -> bool:
        if local[1] == 1:
            return True
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("question")
        return True

    async def on_flow(flow: UdpFlow[bytes]) -> None:
        await echo(flow)
        ended.append("flow")

    async with opened() as net:
        await net.stack.intercept_udp(on_flow, admit=admit)
        assert await ask(net.socket("8.8.8.8", 1), b"x") == b"x"
        net.socket("8.8.8.8", 2).send(b"x")
        await asked.wait()
        await net.stack.aclose()
        await wait_until(lambda: sorted(ended) == ["flow", "question"])
        with pytest.raises(aiotun.DeviceClosedError):
            await net.stack.intercept_udp(echo)


# --- Admission -----------------------------------------------------------------------------------


@each_host
async def test_the_first_datagrams_wait_for_admission(any_net: Net, host: str) -> None:
    asked: list[Any] = []
    decide = asyncio.Event()

    async def admit(local: tuple[str, int], peer: tuple[str, int]) -> bool:
        asked.append((local, peer))
        await decide.wait()
        return True

    async with await any_net.stack.intercept_udp(echo, admit=admit):
        sock = any_net.socket(host, 9)
        for data in (b"1", b"2", b"3"):
            sock.send(data)
        await wait_until(lambda: bool(asked))
        assert any_net.stack.stats.flows_open == 0
        decide.set()
        assert [(await heard(sock))[0] for _ in range(3)] == [b"1", b"2", b"3"]
        assert asked == [((host, 9), sock.getsockname()[:2])]
        assert await ask(sock, b"4") == b"4"
        assert len(asked) == 1


IP_RECVERR, IPV6_RECVERR = 11, 25


REFUSALS: dict[Any, dict[int, int]] = {
    False: {4: errno.ECONNREFUSED, 6: errno.ECONNREFUSED},
    Refusal.NET: {4: errno.ENETUNREACH, 6: errno.ENETUNREACH},
    Refusal.HOST: {4: errno.EHOSTUNREACH, 6: errno.EHOSTUNREACH},
    Refusal.PROHIBITED: {4: errno.EHOSTUNREACH, 6: errno.EACCES},
}


@each_host
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_the_client_sees_why_it_is_refused(any_net: Net, host: str, kind: str) -> None:
    answers = dict(enumerate(REFUSALS, 1))

    def plain(local: tuple[str, int], peer: Any) -> Any:
        return answers[local[1]]

    async def asynchronous(local: tuple[str, int], peer: Any) -> Any:
        return answers[local[1]]

    admit = plain if kind == "plain" else asynchronous
    async with await any_net.stack.intercept_udp(echo, admit=admit):
        for port, answer in answers.items():
            sock = any_net.socket(host, port)
            # Without it the kernel tells a UDP socket of some kinds only.
            if version(host) == 4:
                sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
            for size in (3, 3000):
                sock.send(bytes(size))
                with pytest.raises(OSError, match=r"\[Errno") as caught:
                    await heard(sock)
                assert caught.value.errno == REFUSALS[answer][version(host)]
                with contextlib.suppress(BlockingIOError):
                    sock.recvmsg(100, 1000, socket.MSG_ERRQUEUE)
    stats = any_net.stack.stats
    assert (stats.flows_accepted, stats.flows_refused, stats.packets_refused) == (0, 8, 8)


@pytest.mark.parametrize("wrong", ["raises", "returns None"])
async def test_an_admission_that_fails_refuses_and_is_reported(
    net: Net, reports: Reports, wrong: str
) -> None:
    def admit(local: Any, peer: Any) -> Any:
        if wrong == "raises":
            raise LookupError("x")

    async with await net.stack.intercept_udp(echo, admit=admit):
        sock = net.socket("8.8.8.8", 9)
        sock.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            await heard(sock)
    (error,) = reports.errors
    assert isinstance(error, LookupError if wrong == "raises" else TypeError)


async def test_a_flow_that_makes_room_is_not_asked_for_any_more(net: Net) -> None:
    asked: list[int] = []
    cancelled: list[int] = []

    async def admit(local: tuple[str, int], peer: Any) -> bool:
        asked.append(local[1])
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(local[1])
            raise
        return True

    server = await net.stack.intercept_udp(echo, admit=admit, max_flows=2)
    for port in (1, 2, 3, 4):
        net.socket("8.8.8.8", port).send(b"x")
        await wait_until(lambda port=port: len(asked) == port)  # type: ignore[misc]
    await wait_until(lambda: cancelled == [1, 2])
    server.close()
    await server.wait_closed()
    assert cancelled == [1, 2, 3, 4]
    assert net.stack.stats.flows_displaced == 2


# --- Limits --------------------------------------------------------------------------------------


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_ten_thousand_flows_where_a_hundred_may_be_open(net: Net) -> None:
    most = 0

    async def on_flow(flow: UdpFlow[bytes]) -> None:
        nonlocal most
        most = max(most, net.stack.stats.flows_open)
        await echo(flow)

    async with await net.stack.intercept_udp(on_flow, max_flows=100):
        sock = net.socket(family=socket.AF_INET)
        before = open_fds()
        for number in range(10_000):
            sock.sendto(b"x", (f"9.{number >> 8}.{number & 255}.1", 7))
            if number % 50 == 49:
                await heard(sock)

        def stats() -> NetstackStats:
            return net.stack.stats

        await wait_until(lambda: stats().flows_displaced == 9_900, 20)
        await wait_until(lambda: stats().flows_open == 100)
        assert most <= 100
        assert open_fds() == before
        # The youngest are those that are left.
        accepted = stats().flows_accepted
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.recv(100)  # answers, as many as the buffer held
        sock.sendto(b"y", ("9.39.15.1", 7))
        while await heard(sock) != (b"y", ("9.39.15.1", 7)):
            pass
        assert stats().flows_accepted == accepted
    assert stats().flows_open == 0


async def test_the_flow_that_was_idle_for_longest_makes_room(net: Net) -> None:
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append, max_flows=3):
        socks = [net.socket("8.8.8.8", port) for port in (1, 2, 3, 4)]
        for sock in socks[:3]:
            sock.send(b"x")
            await wait_until(lambda sock=sock: len(held) > socks.index(sock))  # type: ignore[misc]
        await held[0].send(b"still busy")
        socks[3].send(b"x")
        await wait_until(lambda: len(held) == 4)
        assert [flow.closed for flow in held] == [False, True, False, False]


async def test_handlers_that_go_on_after_their_flows_are_bounded(net: Net) -> None:
    stop = asyncio.Event()

    async def deaf(flow: UdpFlow[bytes]) -> None:
        await stop.wait()

    def decided() -> int:
        return net.stack.stats.flows_accepted + net.stack.stats.flows_refused

    async with await net.stack.intercept_udp(deaf, max_flows=5):
        sock = net.socket(family=socket.AF_INET)
        for port in range(1, 31):
            sock.sendto(b"x", ("8.8.8.8", port))
            await wait_until(lambda port=port: decided() == port)  # type: ignore[misc]
        await wait_until(lambda: net.stack.stats.flows_refused == 20)
        assert net.stack.stats.flows_accepted == 10
        stop.set()
        while net.stack.stats.flows_accepted == 10:
            before = decided()
            sock.sendto(b"x", ("8.8.8.8", 99))
            await wait_until(lambda before=before: decided() > before)  # type: ignore[misc]


# --- Fragments and path MTU ----------------------------------------------------------------------


@each_host
async def test_fragments_from_the_client_are_put_together_in_any_order(host: str) -> None:
    peer, local = end_of(PEERS[version(host)], 5), end_of(host, 6)
    held: list[UdpFlow[bytes]] = []
    async with aiotun.open_netstack(intercept=True) as stack:  # noqa: SIM117 - so it reads
        async with await stack.intercept_udp(held.append):
            data = os.urandom(5000)
            pieces = fragment(build(peer, local, data, 7), 1400, 7)
            await stack.tun.send_many([*pieces[1:], pieces[0]])
            await wait_until(lambda: bool(held))
            assert await held[0].recv() == data
            # Of a datagram with a wrong checksum, and of an overlapping one, nothing is left.
            damaged = bytearray(pieces[1])
            damaged[-1] ^= 1
            await stack.tun.send_many([pieces[0], bytes(damaged), *pieces[2:]])
            assert stack.stats.packets_refused == 1
            await stack.tun.send_many([pieces[0], pieces[1], bytes(damaged)])
            assert stack.stats.fragments_dropped == 3


@each_host
async def test_a_datagram_larger_than_the_mtu_leaves_in_fragments(host: str) -> None:
    peer, local = end_of(PEERS[version(host)], 5), end_of(host, 6)
    async with aiotun.open_netstack(intercept=True, mtu=1400) as stack:  # noqa: SIM117
        async with await stack.intercept_udp(echo):
            await stack.tun.send(build(peer, local, bytes(3000), 7))
            sizes = [len(await first(stack, host)) for _ in range(3)]
            assert max(sizes) <= 1400
            await stack.tun.link.set_mtu(1500)
            await stack.tun.send(build(peer, local, bytes(1500 - 48), 7))
            assert len(await first(stack, host)) in (1480, 1500)


def too_big(packet: bytes, mtu: int) -> bytes:
    """What a router says of an IPv6 packet that is larger than its link's MTU."""
    message = struct.pack("!BBHI", 2, 0, 0, mtu) + packet[:1200]
    addresses = socket.inet_pton(socket.AF_INET6, "2001:db8:99::1") + packet[8:24]
    value = checksum(addresses + struct.pack("!II", len(message), 58) + message)
    message = message[:2] + struct.pack("!H", value) + message[4:]
    return struct.pack("!IHBB", 6 << 28, len(message), 58, 64) + addresses + message


async def test_a_smaller_path_mtu_is_learned(net: Net) -> None:
    host = HOSTS[1]
    peer, local = end_of(PEERS[6], 5), end_of(host, 6)
    async with aiotun.open_netstack(intercept=True) as stack, await stack.intercept_udp(echo):
        await stack.tun.send(build(peer, local, bytes(1400), 7))
        answer = await first(stack, host)
        assert len(answer) == 1448
        await stack.tun.send(too_big(answer, 1300))
        await stack.tun.send(build(peer, local, bytes(1400), 7))
        assert [len(await first(stack, host)) > 1300 for _ in range(2)] == [False, False]
        await stack.tun.send(too_big(answer, 100))  # nobody's MTU is below 1280
        await stack.tun.send(build(peer, local, bytes(1400), 7))
        assert len(await first(stack, host)) == 1280
        await first(stack, host)
        # Another host's is not affected.
        other = end_of("fd09::99", 5)
        await stack.tun.send(build(other, local, bytes(1400), 7))
        assert len(await first(stack, host)) == 1448


async def test_a_path_mtu_smaller_than_the_links_reaches_the_client(net: Net) -> None:
    """The client's kernel puts the fragments together."""
    await net.stack.tun.link.set_mtu(1280)
    async with await net.stack.intercept_udp(echo):
        for host in HOSTS:
            data = os.urandom(4000)
            assert await ask(net.socket(host, 9), data) == data


# --- Sending -------------------------------------------------------------------------------------


async def test_sending_refuses_what_can_not_be_sent(net: Net) -> None:
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append):
        sock = net.socket("8.8.8.8", 9)
        sock.send(b"x")
        await wait_until(lambda: bool(held))
        flow = held[0]
        for source in (("::1", 1), ("239.0.0.1", 1), ("nowhere", 1), ("1.2.3.4", 65536)):
            with pytest.raises(ValueError, match="source must have"):
                await flow.send(b"x", source)
        with pytest.raises(aiotun.PacketError, match="65508 bytes") as caught:
            await flow.send(bytes(65508))
        assert caught.value.errno == errno.EMSGSIZE
        with pytest.raises(TypeError):
            await flow.send("text")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            await flow.send(5)  # type: ignore[arg-type]
        await net.stack.tun.link.down()
        with pytest.raises(aiotun.LinkDownError, match="is down"):
            await flow.send(b"x")
        await net.stack.tun.link.up()
        await flow.send(bytearray(b"fine"))
        assert (await heard(sock))[0] == b"fine"
        await net.stack.tun.aclose()
        with pytest.raises(aiotun.DeviceLostError, match="closed or deleted"):
            await flow.send(b"x")


async def test_sending_waits_where_a_shaper_holds_packets_back(net: Net) -> None:
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append):
        sock = net.socket("8.8.8.8", 9)
        sock.send(b"x")
        await wait_until(lambda: bool(held))
        flow = held[0]

        async def tc(command: str) -> None:
            process = await net.stack.create_subprocess_exec(need("tc"), *command.split())
            assert await process.wait() == 0

        await tc("qdisc replace dev tun0 root tbf rate 1kbit burst 10kb limit 10mb")
        with pytest.raises(BlockingIOError):  # noqa: PT012 - one of them must
            for _ in range(1000):
                flow.send_nowait(bytes(1400))
        cancelled = asyncio.create_task(flow.send(b"never sent"))
        waiting = [asyncio.create_task(flow.send(b"last")) for _ in range(3)]
        await asyncio.sleep(0)
        cancelled.cancel()
        await tc("qdisc del dev tun0 root")
        await asyncio.gather(*waiting)
        while (data := (await heard(sock))[0]) != b"last":
            assert data == bytes(1400)


# --- Arguments -----------------------------------------------------------------------------------


async def test_arguments_are_checked(net: Net) -> None:
    stack: Any = net.stack
    for options, kind in (
        ({"on_flow": 5}, TypeError),
        ({"admit": 5}, TypeError),
        ({"per": "host"}, ValueError),
        ({"idle": 0}, ValueError),
        ({"idle": float("nan")}, ValueError),
        ({"idle": "60"}, ValueError),
        ({"max_flows": 0}, ValueError),
        ({"max_flows": 1.5}, ValueError),
    ):
        with pytest.raises(kind):
            await stack.intercept_udp(**{"on_flow": echo, **options})
    with pytest.raises(TypeError):
        await stack.intercept_ping(5)
    async with aiotun.open_netstack() as plain:
        for attempt in (plain.intercept_udp(echo), plain.intercept_ping(lambda ping: True)):
            with pytest.raises(RuntimeError, match="intercept=True"):
                await attempt


async def test_flows_without_end_and_two_calls_at_once(net: Net) -> None:
    calls = [net.stack.intercept_udp(echo, idle=float("inf")) for _ in range(3)]
    server, *errors = sorted(
        await asyncio.gather(*calls, return_exceptions=True),
        key=lambda each: isinstance(each, BaseException),
    )
    assert [type(each) for each in errors] == [RuntimeError, RuntimeError]
    assert not isinstance(server, BaseException)
    assert await ask(net.socket("8.8.8.8", 9), b"x") == b"x"
    server.close()


async def test_limits_follow_the_programs_descriptors(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotun._netstack.interception.spare_descriptors", lambda: 8)
    held: list[UdpFlow[bytes]] = []
    async with await net.stack.intercept_udp(held.append):
        sock = net.socket(family=socket.AF_INET)
        for port in range(1, 11):
            sock.sendto(b"x", ("8.8.8.8", port))
        await wait_until(lambda: net.stack.stats.flows_displaced == 6)
        await wait_until(lambda: net.stack.stats.flows_open == 4)


async def test_stacks_with_flows_leave_nothing_behind() -> None:
    async def one() -> None:
        async with opened() as net:
            await net.stack.intercept_udp(echo)
            await net.stack.intercept_ping(lambda ping: True)
            for host in HOSTS:
                assert await ask(net.socket(host, 9), b"x") == b"x"

    await one()
    before = open_fds()
    for _ in range(10):
        await one()
    assert open_fds() <= before


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_stack_can_be_closed_after_its_loop() -> None:
    async def leave() -> tuple[Netstack, UdpFlow[bytes], asyncio.Task[bytes]]:
        stack = await aiotun.open_netstack(intercept=True)
        held: list[UdpFlow[bytes]] = []

        async def admit(local: Any, peer: Any) -> bool:
            return local[1] == 1 or await asyncio.Event().wait()

        await stack.intercept_udp(held.append, admit=admit)
        await stack.intercept_ping(lambda ping: True)
        for port in (1, 2):
            await stack.tun.send(build(end_of(PEERS[4], 5), end_of("8.8.8.8", port), b"x", 1))
        await wait_until(lambda: bool(held))
        await held[0].recv()
        waiting = asyncio.create_task(held[0].recv())
        await asyncio.sleep(0)
        return stack, held[0], waiting

    loop = asyncio.new_event_loop()
    stack, flow, waiting = loop.run_until_complete(leave())
    loop.close()
    stack.close()
    assert flow.closed
    assert not waiting.done()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio would warn of it


async def test_a_capture_sees_what_is_intercepted(net: Net, tmp_path: Path) -> None:
    from aiotun.capture import PcapWriter

    with PcapWriter(tmp_path / "all.pcap", mode="tun") as writer, net.stack.tun.capture(writer):
        async with await net.stack.intercept_udp(echo):
            assert await ask(net.socket("8.8.8.8", 9), b"find me") == b"find me"
    assert (tmp_path / "all.pcap").read_bytes().count(b"find me") == 2


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")


async def test_handlers_run_in_the_context_of_the_call_that_began(net: Net) -> None:
    seen: list[str] = []

    async def on_flow(flow: UdpFlow[bytes]) -> None:
        seen.append(variable.get())

    variable.set("mine")
    async with await net.stack.intercept_udp(on_flow):
        variable.set("changed")
        net.socket("8.8.8.8", 9).send(b"x")
        await wait_until(lambda: seen == ["mine"])
    variable.set("")


# --- Pings ---------------------------------------------------------------------------------------


class Pinging:
    """A raw socket that has sent an echo request."""

    def __init__(self, net: Net, host: str, size: int = 8, ident: int = 7) -> None:
        self.net, self.host, self.data = net, host, os.urandom(size)
        four = version(host) == 4
        self._head = bytes((0 if four else 129, 0)), struct.pack("!H", ident)
        self._skip = 20 if four else 0
        proto = 1 if four else 58
        self.sock = socket.socket(packed(host)[0], socket.SOCK_RAW, proto)
        net.sockets.append(self.sock)
        self.sock.setblocking(False)
        request = make_icmp_echo(PEERS[version(host)], host, ident, 1, self.data)
        self.sock.sendto(request[20 if four else 40 :], (host, 0))

    def is_reply(self, packet: bytes, sender: str) -> bool:
        got = packet[self._skip :]
        return (sender, (got[:2], got[4:6]), got[8:]) == (self.host, self._head, self.data)


async def pong(net: Net, host: str, size: int = 8, ident: int = 7) -> bytes:
    """Ping an address, wait for the reply, and give the data that it repeats."""
    pinging = Pinging(net, host, size, ident)
    while True:
        packet, (sender, _) = await heard(pinging.sock)
        if pinging.is_reply(packet, sender):
            return pinging.data


async def silence(net: Net, host: str, size: int = 8, ident: int = 7) -> None:
    """Ping an address, and assert that the request is counted and not answered."""
    before = net.stack.stats.packets_refused
    pinging = Pinging(net, host, size, ident)
    await wait_until(lambda: net.stack.stats.packets_refused == before + 1)
    await pong(net, OWN[version(host)])  # what comes before this reply has come
    with contextlib.suppress(BlockingIOError):
        while True:
            packet, (sender, *_) = pinging.sock.recvfrom(70_000)
            assert not pinging.is_reply(packet, sender)


@each_host
async def test_the_kernel_answers_pings_unless_told_otherwise(host: str) -> None:
    async with opened() as net:
        assert await pong(net, host)
    async with opened(answer_pings=False) as net:
        for size in (8, 3000):  # whole, and in fragments
            await silence(net, host, size)
        assert await pong(net, OWN[version(host)])
        assert await pong(net, OWN[version(host)], 3000)


@each_host
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_program_decides_which_pings_are_answered(
    any_net: Net, host: str, kind: str
) -> None:
    seen: list[Ping] = []

    def plain(ping: Ping) -> bool:
        seen.append(ping)
        return ping.ident == 1

    async def asynchronous(ping: Ping) -> bool:
        await asyncio.sleep(0)
        return plain(ping)

    stack = any_net.stack
    async with await stack.intercept_ping(plain if kind == "plain" else asynchronous):
        for size in (0, 8, 3000, 60_000):
            data = await pong(any_net, host, size, ident=1)
            ping = seen.pop()
            assert (ping.local, ping.peer, ping.ident) == (host, PEERS[version(host)], 1)
            assert (ping.sequence, ping.data) == (1, data)
            assert 0 < ping.ttl <= 64
        await silence(any_net, host, ident=2)
        assert await pong(any_net, OWN[version(host)])
        with pytest.raises(RuntimeError, match="already intercepts pings"):
            await stack.intercept_ping(plain)
    assert len(seen) == 1
    assert await pong(any_net, host)  # the kernel answers again


async def test_pings_that_the_kernel_does_not_answer_can_be_intercepted() -> None:
    async with opened(answer_pings=False) as net:
        for host in HOSTS:
            async with await net.stack.intercept_ping(lambda ping: True):
                assert await pong(net, host)
            await silence(net, host)


@each_host
@pytest.mark.parametrize("refusal", list(Refusal))
async def test_a_ping_can_be_refused(net: Net, host: str, refusal: Refusal) -> None:
    codes = {
        4: {Refusal.NET: (3, 0), Refusal.HOST: (3, 1), Refusal.PROHIBITED: (3, 13)},
        6: {Refusal.NET: (1, 0), Refusal.HOST: (1, 3), Refusal.PROHIBITED: (1, 1)},
    }
    request = make_icmp_echo(PEERS[version(host)], host)
    async with aiotun.open_netstack(intercept=True) as stack:  # noqa: SIM117 - so it reads
        async with await stack.intercept_ping(lambda ping: refusal):
            await stack.tun.send(request)
            answer = await first(stack, host)
            start = 20 if version(host) == 4 else 40
            assert (answer[start], answer[start + 1]) == codes[version(host)][refusal]
            assert answer[start + 8 :] == request


@each_host
async def test_damaged_pings_are_left_to_the_kernel(host: str) -> None:
    request = make_icmp_echo(PEERS[version(host)], host)
    seen: list[Ping] = []

    def on_ping(ping: Ping) -> bool:
        seen.append(ping)
        return True

    async with aiotun.open_netstack(intercept=True) as stack:  # noqa: SIM117 - so it reads
        async with await stack.intercept_ping(on_ping):
            await stack.tun.send(request[:-1] + b"x")
            await stack.tun.send(request[:-1])
            await stack.tun.send(request)
            await first(stack, host)
    assert len(seen) == 1


async def test_pings_that_wait_for_an_answer_are_bounded(net: Net) -> None:
    stop = asyncio.Event()

    async def on_ping(ping: Ping) -> bool:
        await stop.wait()
        return True

    request = make_icmp_echo(PEERS[4], HOSTS[0])
    server = await net.stack.intercept_ping(on_ping)
    await net.stack.tun.send_many([request] * 300)
    assert net.stack.stats.packets_refused == 300 - 256
    server.close()
    await server.wait_closed()
    await wait_until(lambda: net.stack.stats.packets_refused == 300)
    stop.set()
    async with await net.stack.intercept_ping(on_ping):
        assert await pong(net, HOSTS[0])


async def test_an_error_while_a_ping_is_judged_is_reported(net: Net, reports: Reports) -> None:
    def on_ping(ping: Ping) -> bool:
        raise LookupError

    async with await net.stack.intercept_ping(on_ping):
        await net.stack.tun.send(make_icmp_echo(PEERS[4], HOSTS[0]))
        await wait_until(lambda: [type(each) for each in reports.errors] == [LookupError])
        assert net.stack.stats.packets_refused == 1

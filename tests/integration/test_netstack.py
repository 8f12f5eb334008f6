"""The kernel of a private namespace as a TCP/IP stack: opening, connections, interception."""

import asyncio
import contextlib
import copy
import errno
import os
import pickle
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_address
from typing import Any

import pytest

import aiotun

from ..helpers import wait_until
from .stacks import client_of, force_mechanism, joined, need_resets


@pytest.fixture(params=[True, False], ids=["rootless", "privileged"])
async def ns(request: pytest.FixtureRequest) -> AsyncIterator[aiotun.Namespace]:
    async with aiotun.new_namespace(rootless=request.param) as made:
        yield made


@pytest.fixture(params=["tproxy", "listeners"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force_mechanism(monkeypatch, request.param)
    name: str = request.param
    return name


@pytest.fixture
async def stack(mechanism: str) -> AsyncIterator[aiotun.Netstack]:
    async with aiotun.open_netstack(intercept=True) as opened:
        yield opened


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A handler that answers with what the client asked for, and echoes."""
    host, port = writer.get_extra_info("sockname")[:2]
    writer.write(f"{host} {port}\n".encode())
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def ask(client: aiotun.Netstack, host: str, port: int, **options: Any) -> str:
    """Connect, and return what `tell` says."""
    reader, writer = await client.open_connection(host, port, **options)
    try:
        answer = await reader.readline()
        writer.write(b"x" * 100)
        writer.write_eof()
        assert await reader.read() == b"x" * 100
    finally:
        writer.close()
    return answer.decode().strip()


# --- Opening -------------------------------------------------------------------------------------


async def test_an_opener_can_be_awaited_and_used_once() -> None:
    opener = aiotun.open_netstack()
    stack = await opener
    with pytest.raises(RuntimeError, match="once"):
        await opener
    async with stack:
        assert stack.tun.name == "tun0"
    assert stack.closed
    assert stack.tun.closed
    assert stack.namespace.closed
    await stack.aclose()
    stack.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mtu": 67}, ValueError),
        ({"mtu": "1500"}, TypeError),
        ({"mtu": None}, TypeError),
        ({"offload": "on"}, ValueError),
        ({"intercept": 1}, TypeError),
        ({"namespace": "blue"}, TypeError),
        ({"addresses": "10.0.0.1/24"}, TypeError),
        ({"addresses": ["10.0.0.1/33"]}, ValueError),
        ({"routes": ["nowhere"]}, ValueError),
        ({"mtu": 1000, "routes": ["::/0"]}, ValueError),
        ({"name": "a b"}, ValueError),
        ({"txqueuelen": -1}, ValueError),
    ],
)
def test_arguments_are_checked_when_it_is_called(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        aiotun.open_netstack(**options)


async def test_the_variable_has_no_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOTUN_NETSTACK", "magic")
    opener = aiotun.open_netstack(intercept=True)
    with pytest.raises(ValueError, match="AIOTUN_NETSTACK"):
        await opener


async def test_it_can_not_be_copied_or_pickled(stack: aiotun.Netstack) -> None:
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copied"):
            attempt(stack)


async def test_an_unclosed_stack_warns_and_is_closed() -> None:
    stack = await aiotun.open_netstack(intercept=True)
    tun = stack.tun
    with pytest.warns(ResourceWarning, match="unclosed <Netstack"):
        del stack
    assert tun.closed
    await tun.aclose()


async def test_addresses_may_be_iterators_and_routes_are_everywhere() -> None:
    async with aiotun.open_netstack(addresses=iter(["10.1.0.1/24", "fd01::1/64"])) as stack:
        routes = {str(each.dst) for each in await stack.tun.link.routes()}
        assert {"0.0.0.0/0", "::/0"} <= routes
        shown = {str(each.interface) for each in await stack.tun.link.addresses()}
        assert shown == {"10.1.0.1/24", "fd01::1/64"}


async def test_the_default_ipv6_route_needs_an_mtu_for_ipv6() -> None:
    async with aiotun.open_netstack(mtu=1000) as stack:
        assert [str(each.dst) for each in await stack.tun.link.routes()] == ["0.0.0.0/0"]


async def test_a_stack_sends_nothing_by_itself(stack: aiotun.Netstack) -> None:
    for _ in range(100):
        await asyncio.sleep(0.001)
    with pytest.raises(BlockingIOError):
        stack.tun.recv_nowait()


async def test_a_namespace_that_is_given_stays_open_and_gets_its_rules_back(
    ns: aiotun.Namespace, mechanism: str
) -> None:
    async def look() -> bytes:
        process = await ns.create_subprocess_shell(
            "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all",
            stdout=asyncio.subprocess.PIPE,
        )
        return (await process.communicate())[0]

    before = await look()
    async with aiotun.open_netstack(namespace=ns, intercept=True) as stack:
        assert stack.namespace is ns
        assert await look() != before
        with pytest.raises(aiotun.LinkError):
            await aiotun.open_netstack(namespace=ns, intercept=True)
        server = await stack.intercept_tcp(tell)
        async with client_of(stack) as client:
            assert await ask(client, "192.0.2.1", 7) == "192.0.2.1 7"
        server.close()
    assert not ns.closed
    async with asyncio.timeout(5):
        while await look() != before:  # noqa: ASYNC110 - each look is a program
            await asyncio.sleep(0.01)
    async with aiotun.open_netstack(namespace=ns, intercept=True):
        pass


async def test_fifty_stacks_leave_nothing_behind() -> None:
    need_resets()

    async def one() -> None:
        async with aiotun.open_netstack(intercept=True) as stack:
            await stack.intercept_tcp(tell)
            async with client_of(stack) as client:
                await ask(client, "192.0.2.1", 80)

    await one()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(25):
        await one()
    assert len(os.listdir("/proc/self/fd")) <= before


# --- Interception --------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["off", "split", "raw"])
async def test_every_address_and_port_is_accepted(
    ns: aiotun.Namespace, mechanism: str, offload: Any
) -> None:
    async with aiotun.open_netstack(namespace=ns, intercept=True, offload=offload) as stack:
        await stack.intercept_tcp(tell)
        async with client_of(stack) as client:
            for host in ("8.8.8.8", "0.1.2.3", "240.0.0.1", "169.254.1.1", "2001:db8::1", "fd00::"):
                for port in (1, 80, 65_535):
                    assert await ask(client, host, port) == f"{ip_address(host)} {port}"


async def test_the_stacks_own_address_is_not_intercepted(mechanism: str) -> None:
    async with aiotun.open_netstack(
        intercept=True, addresses=["10.77.0.1/24", "fd77::1/64"]
    ) as stack:
        await stack.intercept_tcp(tell)

        async def own(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"own")
            writer.close()

        await stack.start_server(own, port=81)
        async with client_of(stack) as client:
            for host in ("10.77.0.1", "fd77::1"):
                reader, writer = await client.open_connection(host, 81)
                assert await reader.read() == b"own"
                writer.close()
                with pytest.raises(ConnectionRefusedError):
                    await client.open_connection(host, 1)
            assert await ask(client, "10.77.0.9", 2) == "10.77.0.9 2"
            for host in ("10.77.0.1", "fd77::1"):
                with pytest.raises(ConnectionRefusedError):
                    await client.open_connection(host, 2)


async def test_what_nobody_accepts_is_refused_as_by_a_host(stack: aiotun.Netstack) -> None:
    async with client_of(stack) as client:
        for host in ("192.0.2.1", "2001:db8::1"):
            with pytest.raises(ConnectionRefusedError):
                await client.open_connection(host, 80)
        server = await stack.intercept_tcp(tell)
        assert await ask(client, "192.0.2.1", 80) == "192.0.2.1 80"
        async with server:
            with pytest.raises(RuntimeError, match="already"):
                await stack.intercept_tcp(tell)
        assert server.closed
        with pytest.raises(ConnectionRefusedError):
            await client.open_connection("192.0.2.1", 80)
        await stack.intercept_tcp(tell)
        assert await ask(client, "192.0.2.1", 80) == "192.0.2.1 80"


async def test_port_0_can_be_asked_for_with_nf_tables_only(
    stack: aiotun.Netstack, mechanism: str
) -> None:
    await stack.intercept_tcp(tell)
    async with client_of(stack) as client:
        for host in ("192.0.2.1", "2001:db8::1"):
            if mechanism == "tproxy":
                assert await ask(client, host, 0) == f"{host} 0"
            else:
                with pytest.raises(ConnectionRefusedError):
                    await client.open_connection(host, 0)
    assert stack.stats.connections_refused == (0 if mechanism == "tproxy" else 2)


async def test_a_server_of_the_stack_can_have_a_port_that_was_intercepted(
    stack: aiotun.Netstack,
) -> None:
    await stack.intercept_tcp(tell)
    async with client_of(stack) as client:
        assert await ask(client, "192.0.2.1", 80) == "192.0.2.1 80"
        server = await stack.start_server(tell, "127.0.0.1", 80)
        assert await ask(client, "192.0.2.1", 80) == "192.0.2.1 80"
        server.close()


async def test_interception_takes_a_stack_that_was_opened_for_it() -> None:
    async with aiotun.open_netstack() as stack:
        with pytest.raises(RuntimeError, match="intercept=True"):
            await stack.intercept_tcp(tell)
    with pytest.raises(aiotun.DeviceClosedError):
        await stack.intercept_tcp(tell)


async def test_a_stack_without_an_address_says_so_when_it_connects() -> None:
    async with aiotun.open_netstack() as stack:
        for host in ("192.0.2.1", "2001:db8::1"):
            with pytest.raises(OSError, match="address") as caught:
                await stack.open_connection(host, 80)
            assert caught.value.errno == errno.EADDRNOTAVAIL
        server = await stack.start_server(tell, "127.0.0.1", 80)
        assert await ask(stack, "127.0.0.1", 80) == "127.0.0.1 80"
        server.close()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (aiotun.new_namespace, "socket"),
        (aiotun.open_netstack, "intercept_tcp"),
        (lambda: aiotun.open_datagrams(("127.0.0.1", 0)), "recv_many"),
    ],
)
def test_a_forgotten_await_says_what_to_write(make: Any, name: str) -> None:
    opener = make()
    with pytest.raises(AttributeError, match=rf"{name}', because it was not awaited; write '"):
        getattr(opener, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        opener.nonsense  # noqa: B018 - it raises
    assert not hasattr(opener, "_nonsense")


async def test_another_loop_is_told_that_the_stack_is_not_its_own(stack: aiotun.Netstack) -> None:
    async def use_elsewhere() -> None:
        for attempt in (
            stack.intercept_tcp(tell),
            stack.intercept_udp(lambda flow: None),
            stack.intercept_ping(lambda ping: True),
            stack.start_server(tell, "127.0.0.1", 80),
        ):
            with pytest.raises(RuntimeError, match="opened in another event loop"):
                await attempt

    await asyncio.to_thread(asyncio.run, use_elsewhere())
    async with await stack.intercept_tcp(tell):
        pass


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"handle": None}, TypeError),
        ({"limit": 0}, ValueError),
        ({"limit": True}, TypeError),
        ({"backlog": 0}, ValueError),
    ],
)
async def test_arguments_of_intercept_tcp_are_checked(
    stack: aiotun.Netstack, options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await stack.intercept_tcp(**{"handle": tell, **options})


async def test_a_backlog_can_be_as_long_as_the_kernel_allows(stack: aiotun.Netstack) -> None:
    async with await stack.intercept_tcp(tell, backlog=1 << 40), client_of(stack) as client:
        assert await ask(client, "192.0.2.1", 80) == "192.0.2.1 80"


@pytest.mark.parametrize("mtu", [68, 87, 88, 65535])
async def test_a_stack_of_every_mtu_answers_connections(mechanism: str, mtu: int) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    async with (
        aiotun.open_netstack(intercept=True, mtu=mtu) as stack,
        await stack.intercept_tcp(echo),
        client_of(stack) as client,
    ):
        reader, writer = await client.open_connection("192.0.2.1", 80)
        writer.write(bytes(10_000))
        writer.write_eof()
        async with asyncio.timeout(10):
            assert await reader.read() == bytes(10_000)
        writer.close()


async def test_a_plain_function_may_handle_connections(stack: aiotun.Netstack) -> None:
    writers = []

    def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\n")
        writers.append(writer)

    await stack.intercept_tcp(keep)
    async with client_of(stack) as client:
        reader, writer = await client.open_connection("192.0.2.1", 80)
        assert await reader.readline() == b"hello\n"
        writer.close()
        assert stack.stats.connections_open == 1
        writers[0].close()
        await wait_until(lambda: stack.stats.connections_open == 0)


@pytest.mark.parametrize("plain", [True, False])
async def test_a_handler_that_fails_is_reported_and_its_connection_closed(
    stack: aiotun.Netstack, plain: bool
) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise ArithmeticError

    def fail_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise ArithmeticError

    await stack.intercept_tcp(fail_at_once if plain else fail)
    async with client_of(stack) as client:
        reader, writer = await client.open_connection("192.0.2.1", 80)
        assert await reader.read() == b""
        writer.close()
        await wait_until(lambda: stack.stats.connections_open == 0)
    assert [type(each["exception"]) for each in reported] == [ArithmeticError]


async def test_connections_above_the_limit_are_reset_and_counted(stack: aiotun.Netstack) -> None:
    await stack.intercept_tcp(tell, limit=2)
    async with client_of(stack) as client:
        kept = [await client.open_connection("192.0.2.1", port) for port in (1, 2)]
        for reader, _ in kept:
            await reader.readline()
        # With nf_tables it stands before the program sees it.
        with pytest.raises((ConnectionResetError, ConnectionRefusedError)):
            await ask(client, "192.0.2.1", 3)
        assert stack.stats.connections_refused == 1
        assert stack.stats.connections_open == 2
        kept[0][1].close()
        await wait_until(lambda: stack.stats.connections_open == 1)
        assert await ask(client, "192.0.2.1", 3) == "192.0.2.1 3"
        kept[1][1].close()


async def test_a_client_that_resets_leaves_nothing_open(stack: aiotun.Netstack) -> None:
    ended: list[BaseException | None] = []

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"!")
        try:
            await reader.read()
            ended.append(None)
        except ConnectionError as error:
            ended.append(error)
        writer.close()

    await stack.intercept_tcp(wait)
    async with client_of(stack) as client:
        reader, writer = await client.open_connection("192.0.2.1", 80)
        await reader.readexactly(1)
        writer.close()
        sock = await client.socket()
        with contextlib.suppress(BlockingIOError):
            sock.connect(("192.0.2.1", 80))
        await wait_until(lambda: stack.stats.connections_accepted == 2)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        await wait_until(lambda: len(ended) == 2)
        assert stack.stats.connections_open == 0
        assert [type(each) for each in ended] == [type(None), ConnectionResetError]


# --- Closing -------------------------------------------------------------------------------------


async def test_closing_resets_connections_here_and_at_the_far_end(
    ns: aiotun.Namespace, mechanism: str
) -> None:
    need_resets()
    stack = await aiotun.open_netstack(
        namespace=ns, intercept=True, addresses=["10.77.0.1/24", "fd77::1/64"]
    )
    outcome: list[str] = []

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        except ConnectionError as error:
            outcome.append(type(error).__name__)
        writer.close()

    await stack.intercept_tcp(wait)
    async with client_of(stack) as client:
        server = await client.start_server(wait, port=80)
        writers = []
        for host in ("192.0.2.1", "2001:db8::1"):
            reader, writer = await client.open_connection(host, 80)
            asyncio.get_running_loop().create_task(wait(reader, writer))
            writers.append(writer)
        for host in ("10.77.0.2", "fd77::2"):
            reader, writer = await stack.open_connection(host, 80)
            asyncio.get_running_loop().create_task(wait(reader, writer))
            writers.append(writer)
        await wait_until(lambda: stack.stats.connections_open == 2)
        await stack.aclose()
        await wait_until(lambda: len(outcome) == 8)
        assert sorted(outcome) == ["ConnectionAbortedError"] * 4 + ["ConnectionResetError"] * 4
        server.close()
    assert stack.stats.connections_open == 0


async def test_a_connection_attempt_ends_when_the_stack_is_closed() -> None:
    need_resets()
    stack = await aiotun.open_netstack(addresses=["10.77.0.1/24"])
    attempt = asyncio.ensure_future(stack.open_connection("192.0.2.1", 80))
    assert await stack.tun.recv()  # the SYN
    await stack.aclose()
    with pytest.raises(ConnectionAbortedError):
        await attempt


async def test_closing_ends_servers_and_is_not_stopped_by_cancellation() -> None:
    stack = await aiotun.open_netstack(intercept=True)
    server = await stack.intercept_tcp(tell)
    closing = asyncio.ensure_future(stack.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    assert server.closed
    await server.wait_closed()
    assert stack.tun.closed
    assert stack.namespace.closed
    await stack.aclose()


async def test_a_stack_closes_after_its_helper_has_died() -> None:
    need_resets()
    async with (
        aiotun.new_namespace(rootless=True) as ns,
        aiotun.open_netstack(namespace=ns, intercept=True) as opened,
        client_of(opened) as client,
    ):
        await opened.intercept_tcp(tell)
        reader, writer = await client.open_connection("192.0.2.1", 80)
        await reader.readline()
        ns.close()
        with pytest.raises(aiotun.LinkError) as caught:
            await opened.socket(socket.AF_INET, socket.SOCK_RAW, 1)
        assert caught.value.errno == errno.ESHUTDOWN
        await opened.aclose()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_packets_are_carried_by_whoever_reads_the_device(stack: aiotun.Netstack) -> None:
    await stack.intercept_tcp(tell)
    async with (
        aiotun.open_netstack(addresses=["10.77.0.2/24"], offload="split") as client,
        joined(stack.tun, client.tun),
    ):
        assert await ask(client, "192.0.2.1", 80) == "192.0.2.1 80"

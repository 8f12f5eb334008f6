"""Namespaces as objects: with the program's own privilege, and without root by a helper process."""

import asyncio
import contextlib
import copy
import errno
import gc
import os
import pickle
import resource
import socket
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun._kernel import places
from aiotun._kernel.rootless import Helper
from aiotun._namespaces.pool import _BATCH_MAX
from aiotun.errors import ResourceLimitError
from aiotun.namespaces import Namespace

from ..helpers import REAL_ROOT, make_icmp_echo, wait_until
from .kernel import another_namespace, children_of


@pytest.fixture(params=[True, False], ids=["rootless", "privileged"])
async def ns(request: pytest.FixtureRequest) -> AsyncIterator[Namespace]:
    async with aiotun.new_namespace(rootless=request.param) as made:
        yield made


@pytest.fixture
async def rootless() -> AsyncIterator[Namespace]:
    async with aiotun.new_namespace(rootless=True) as made:
        yield made


def children() -> set[int]:
    return children_of(os.getpid())


async def output(process: asyncio.subprocess.Process) -> str:
    out, _ = await process.communicate()
    assert process.returncode == 0, out
    return out.decode()


async def shell(ns: Namespace, command: str, **options: Any) -> str:
    process = await ns.create_subprocess_shell(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    return await output(process)


# --- What it is ----------------------------------------------------------------------------------


async def test_it_is_private_and_empty_with_lo_up(ns: Namespace) -> None:
    assert os.fstat(ns.fileno()).st_ino != os.stat("/proc/thread-self/ns/net").st_ino
    assert (await aiotun.Link("lo", netns=ns).info()).up
    assert await aiotun.list_devices(netns=ns) == []
    assert (await shell(ns, "ls /sys/class/net")).split() == ["lo"]


async def test_the_callers_capabilities_come_first() -> None:
    async with aiotun.new_namespace() as ns:
        assert not ns.rootless
    async with aiotun.new_namespace(rootless=True) as ns:
        assert ns.rootless


async def test_an_opener_can_be_awaited_and_used_once() -> None:
    opener = aiotun.new_namespace()
    ns = await opener
    with pytest.raises(RuntimeError, match="used once"):
        await opener
    async with ns:
        assert not ns.closed
    assert ns.closed


async def test_it_can_not_be_copied_or_pickled(ns: Namespace) -> None:
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="use the same object everywhere"):
            attempt(ns)


@pytest.mark.parametrize("value", [1, "yes"])
def test_rootless_is_a_switch(value: object) -> None:
    with pytest.raises(TypeError, match="rootless"):
        aiotun.new_namespace(rootless=value)  # type: ignore[arg-type]  # the point of the test


async def test_an_existing_namespace_is_opened_by_path_and_fd() -> None:
    with another_namespace("ip link add br7 type bridge") as path:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for name in (path, fd):
                async with aiotun.open_namespace(name) as ns:
                    assert not ns.rootless
                    assert (await aiotun.Link("br7", netns=ns).info()).name == "br7"
                    assert "br7" in await shell(ns, "ls /sys/class/net")
        finally:
            os.close(fd)


async def test_a_namespace_that_does_not_exist_is_not_created() -> None:
    with pytest.raises(aiotun.LinkError) as caught:
        await aiotun.open_namespace("/run/netns/none-of-this-name")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(TypeError):
        aiotun.open_namespace(None)  # type: ignore[arg-type]  # the point of the test


async def test_opened_again_it_has_the_same_helper_and_does_not_end_it(
    rootless: Namespace,
) -> None:
    for name in (rootless, rootless.fileno()):
        async with aiotun.open_namespace(name) as again:
            assert again.rootless
            (await again.socket()).close()
    (await rootless.socket()).close()


# --- Everything that takes a namespace takes this one --------------------------------------------


async def test_devices_links_and_bridges(ns: Namespace) -> None:
    await aiotun.create_bridge("br0", netns=ns)
    async with aiotun.open_tap("tap0", netns=ns, bridge="br0") as tap:
        assert (await tap.link.info()).master == "br0"
    await aiotun.delete_bridge("br0", netns=ns)
    name = await aiotun.create_persistent("keep%d", netns=ns, mode="tap")
    assert [each.name for each in await aiotun.list_devices(netns=ns)] == [name]
    await aiotun.delete_persistent(name, netns=ns)
    assert await aiotun.list_devices(netns=ns) == []
    with pytest.raises(aiotun.LinkError) as caught:
        await aiotun.Link("nix", netns=ns).info()
    assert caught.value.errno == errno.ENODEV


async def first_ipv4(tun: aiotun.TunDevice) -> tuple[str, str]:
    """Receive, leaving out what IPv6 says by itself; give source and destination."""
    async for packet in tun:
        if packet[0] >> 4 == 4:
            header = aiotun.IPHeader(packet)
            return str(header.src), str(header.dst)
    raise AssertionError("the device was closed")


async def test_packets_go_to_a_device_inside_and_back(ns: Namespace) -> None:
    async with aiotun.open_tun(
        "tun0", netns=ns, addresses=["10.0.0.1/24"], routes=["10.9.0.0/16"], mtu=1400
    ) as tun:
        assert tun.mtu == 1400
        with await ns.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"out", ("10.9.0.1", 9))
        assert await first_ipv4(tun) == ("10.0.0.1", "10.9.0.1")
        await tun.send(make_icmp_echo("10.0.0.2", "10.0.0.1"))
        assert await first_ipv4(tun) == ("10.0.0.1", "10.0.0.2")


async def test_events_are_heard_inside(ns: Namespace) -> None:
    # Not every kernel can rename a link that is up.
    async with aiotun.open_tun("tun0", netns=ns, up=False) as tun, tun.link.events() as events:
        await tun.link.rename("tun7")
        event = await anext(events)
        assert (event.kind, tun.name) == ("renamed", "tun7")


async def test_a_device_moves_from_one_to_the_other(ns: Namespace) -> None:
    """Also between two rootless ones, of which neither helper may do anything in the other."""
    async with (
        aiotun.new_namespace(rootless=ns.rootless) as other,
        aiotun.open_tun("tun0", netns=ns) as tun,
    ):
        await tun.link.move_to_netns(other)
        await tun.link.up()
        assert [each.name for each in await aiotun.list_devices(netns=other)] == ["tun0"]
        assert await aiotun.list_devices(netns=ns) == []


async def test_an_fd_of_a_device_inside_finds_its_namespace(rootless: Namespace) -> None:
    async with aiotun.open_tun("tun0", netns=rootless, addresses=["10.0.0.1/24"]) as tun:
        again = aiotun.TunDevice.from_fd(os.dup(tun.fileno()))
        assert "10.0.0.1/24" in [str(each) for each in await again.link.addresses()]
        await again.aclose()


# --- Sockets -------------------------------------------------------------------------------------


async def test_a_socket_is_a_plain_one_made_inside(ns: Namespace) -> None:
    with await ns.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        assert type(sock) is socket.socket
        assert (sock.family, sock.type) == (socket.AF_INET6, socket.SOCK_DGRAM)
        assert not sock.getblocking()
        assert not sock.get_inheritable()
    async with aiotun.open_tap("only0", netns=ns):
        with await ns.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("only0", 0))  # no such interface outside


async def test_code_that_can_not_await_gets_sockets_too(ns: Namespace) -> None:
    """A blocking client in another thread talks with an asynchronous server, both inside."""

    def ask() -> bytes:
        with ns.socket_blocking() as sock:
            assert type(sock) is socket.socket
            assert not sock.getblocking()
            sock.settimeout(10)
            sock.connect(("127.0.0.1", port))
            sock.sendall(b"hello\n")
            return sock.recv(100)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    async with await ns.start_server(echo, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(ask) == b"hello\n"
    with pytest.raises(OSError, match="Protocol not supported"):
        ns.socket_blocking(socket.AF_INET, socket.SOCK_STREAM, 250)
    made = [ns.socket_blocking() for _ in range(100)]
    assert len({sock.fileno() for sock in made}) == 100
    for sock in made:
        sock.close()
    await ns.aclose()
    with pytest.raises(aiotun.LinkError):
        ns.socket_blocking()


async def test_what_the_kernel_refuses_is_raised_as_outside(ns: Namespace) -> None:
    with pytest.raises(OSError, match="Protocol not supported") as caught:
        await ns.socket(socket.AF_INET, socket.SOCK_STREAM, 250)
    assert caught.value.errno == errno.EPROTONOSUPPORT


@pytest.mark.parametrize("what", ["family", "type", "proto"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(1 << 70, ValueError), (-1 << 31, OSError), (1.0, TypeError), ("1", TypeError)],
)
async def test_a_socket_that_can_not_be_loses_nothing_but_itself(
    ns: Namespace, what: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await ns.socket(**{what: value})
    with pytest.raises(error):
        ns.socket_blocking(**{what: value})
    (await ns.socket()).close()


async def test_the_helper_goes_on_after_a_request_that_no_socket_can_have(
    rootless: Namespace,
) -> None:
    helper = rootless._namespace.helper  # type: ignore[union-attr]  # it is open
    assert isinstance(helper, Helper)
    with pytest.raises(OSError, match="Invalid argument"):
        helper.make_sockets(1 << 70, 1, 0, 1)
    (await rootless.socket()).close()


async def test_the_helper_goes_on_after_no_descriptor_was_allowed(rootless: Namespace) -> None:
    """While RLIMIT_NOFILE is 0, poll(2) fails."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(ResourceLimitError):
            await rootless.socket()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (await rootless.socket()).close()


async def test_many_sockets_at_once_leave_few_in_the_pool(ns: Namespace) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = await asyncio.gather(*(ns.socket() for _ in range(200)))
    assert len({sock.fileno() for sock in made}) == 200
    for sock in made:
        sock.close()
    assert len(os.listdir("/proc/self/fd")) < before + _BATCH_MAX


async def test_after_descriptors_ran_out_sockets_are_made_one_at_a_time(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the helper makes 32 sockets for each attempt, and the kernel drops them."""
    asked: list[int] = []
    make = places.make_sockets

    def noted(family: int, kind: int, proto: int, count: int) -> list[socket.socket]:
        asked.append(count)
        return make(family, kind, proto, count)

    monkeypatch.setattr(places, "make_sockets", noted)
    for sock in await asyncio.gather(*(ns.socket() for _ in range(100))):
        sock.close()
    assert asked[-1] == _BATCH_MAX
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with contextlib.suppress(ResourceLimitError):
            while True:  # the pool still has some
                (await ns.socket()).close()
        asked.clear()
        with pytest.raises(ResourceLimitError):
            await ns.socket()
        assert asked == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (await ns.socket()).close()


async def test_whoever_wants_one_socket_holds_one(ns: Namespace) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with await ns.socket():
        assert len(os.listdir("/proc/self/fd")) == before + 1


async def test_a_socket_that_hears_at_once_is_not_kept_ready(ns: Namespace) -> None:
    """It would have received something before anybody had it."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        (await ns.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300)).close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_cancelled_request_leaves_no_socket(ns: Namespace) -> None:
    task = asyncio.create_task(ns.socket(socket.AF_INET, socket.SOCK_RAW, 1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_two_loops_may_use_one_namespace(ns: Namespace) -> None:
    def elsewhere() -> None:
        async def main() -> None:
            for _ in range(50):
                (await ns.socket()).close()

        asyncio.run(main())

    threads = [threading.Thread(target=elsewhere) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        (await ns.socket()).close()
    for thread in threads:
        await asyncio.to_thread(thread.join)


# --- asyncio's shapes ----------------------------------------------------------------------------


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    await writer.drain()
    writer.close()


async def say(ns: Namespace, host: str, port: int, **options: Any) -> bytes:
    reader, writer = await ns.open_connection(host, port, **options)
    writer.write(b"hello\n")
    said = await reader.read()
    writer.close()
    await writer.wait_closed()
    return said


async def test_connections_and_a_server_at_all_addresses(ns: Namespace) -> None:
    server = await ns.start_server(echo, None, 0)
    async with server:
        ports = {sock.family: sock.getsockname()[1] for sock in server.sockets}
        assert ports.keys() == {socket.AF_INET, socket.AF_INET6}
        assert await say(ns, "127.0.0.1", ports[socket.AF_INET]) == b"hello\n"
        assert await say(ns, "::1", ports[socket.AF_INET6]) == b"hello\n"
    assert not server.is_serving()
    with pytest.raises(ConnectionRefusedError):
        await ns.open_connection("127.0.0.1", ports[socket.AF_INET])


async def test_a_server_at_one_address_is_asyncios_own(ns: Namespace) -> None:
    server = await ns.start_server(echo, "127.0.0.1")
    async with server:
        (sock,) = server.sockets
        port = sock.getsockname()[1]
        assert await say(ns, "127.0.0.1", port, local_addr=("127.0.0.9", 0)) == b"hello\n"
        with pytest.raises(OSError, match="use") as caught:
            await ns.start_server(echo, "127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE


async def test_a_zone_is_an_interface_inside(ns: Namespace) -> None:
    async with aiotun.open_tap("zone0", netns=ns, addresses=["fe80::77/64"]):
        server = await ns.start_server(echo, "fe80::77%zone0")
        async with server:
            port = server.sockets[0].getsockname()[1]
            assert await say(ns, "fe80::77%zone0", port) == b"hello\n"
        with pytest.raises(aiotun.LinkError, match="nozone"):
            await ns.open_connection("fe80::77%nozone", port)


async def test_a_name_is_resolved_by_the_resolver_given_and_nobody_else(ns: Namespace) -> None:
    asked: list[str] = []

    async def resolver(name: str) -> list[str]:
        asked.append(name)
        return ["127.0.0.2", "127.0.0.1"]

    server = await ns.start_server(echo, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await say(ns, "somewhere", port, resolver=resolver) == b"hello\n"
        assert await say(ns, "127.0.0.1", port, resolver=resolver) == b"hello\n"
    assert asked == ["somewhere"]
    with pytest.raises(ValueError, match="'localhost' is not an IP address"):
        await ns.open_connection("localhost", port)
    with pytest.raises(ValueError, match="'localhost' is not an IP address"):
        await ns.create_datagram_endpoint(asyncio.DatagramProtocol, ("localhost", 0))
    with pytest.raises(OSError, match="Multiple exceptions"):
        await ns.open_connection("somewhere", port, resolver=lambda name: ["127.0.0.1", "::1"])


@pytest.mark.parametrize(
    ("answer", "error"),
    [("127.0.0.1", TypeError), (None, TypeError), (["somewhere"], ValueError), ([], OSError)],
)
async def test_an_answer_of_a_resolver_that_is_none_is_told(
    ns: Namespace, answer: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="somewhere"):
        await ns.open_connection("somewhere", 80, resolver=lambda name: answer)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"host": 1}, TypeError, "host"),
        ({"port": "http"}, TypeError, "port"),
        ({"port": 65536}, ValueError, "port"),
        ({"family": socket.AF_UNIX}, ValueError, "family"),
        ({"family": None}, ValueError, "family"),
        ({"local_addr": "127.0.0.1"}, TypeError, "tuple of host and port"),
        ({"local_addr": ("127.0.0.1",)}, TypeError, "tuple of host and port"),
    ],
)
async def test_arguments_of_connections_are_checked(
    ns: Namespace, options: Any, error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        await ns.open_connection(**{"host": "127.0.0.1", "port": 1, **options})


async def test_a_server_at_all_addresses_of_no_family_is_refused(ns: Namespace) -> None:
    with pytest.raises(ValueError, match="family"):
        await ns.start_server(echo, family=socket.AF_UNIX)


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[bytes, tuple[Any, ...]]] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self.received.put_nowait((data, addr))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagram_endpoints_exchange_datagrams_inside(ns: Namespace, host: str) -> None:
    one, heard = await ns.create_datagram_endpoint(Datagrams, (host, 0))
    address = one.get_extra_info("sockname")
    other, answered = await ns.create_datagram_endpoint(Datagrams, remote_addr=address[:2])
    other.sendto(b"question")
    data, sender = await heard.received.get()
    one.sendto(b"answer", sender)
    assert (data, (await answered.received.get())[0]) == (b"question", b"answer")
    # As outside, an address may be what getsockname gives for IPv6, too.
    third, _ = await ns.create_datagram_endpoint(Datagrams, remote_addr=address)
    third.sendto(b"more")
    assert (await heard.received.get())[0] == b"more"
    third.close()
    one.close()
    other.close()
    await asyncio.sleep(0)  # asyncio closes the sockets in the loop's next turn
    await asyncio.sleep(0)


async def test_a_cancelled_endpoint_leaves_no_socket(ns: Namespace) -> None:
    made: list[asyncio.BaseTransport] = []

    class Noting(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    for _ in range(6):  # from now on the pool has sockets, and none has to be waited for
        (await ns.socket(socket.AF_INET, socket.SOCK_DGRAM)).close()
    cancelled = 0
    for turns in range(4):
        task = asyncio.create_task(ns.create_datagram_endpoint(Noting, ("127.0.0.1", 0)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            transport, _ = await task
        except asyncio.CancelledError:
            cancelled += 1
        else:
            transport.close()
    assert cancelled > 0
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(transport.is_closing() for transport in made)


# --- Programs inside -----------------------------------------------------------------------------


async def test_a_program_is_the_same_user_and_has_its_own_files(ns: Namespace) -> None:
    script = "id -u; grep CapEff /proc/self/status; ls /sys/class/net; cat /etc/resolv.conf; pwd"
    lines = (await shell(ns, script, resolv_conf="nameserver 192.0.2.1\n", cwd="/")).split("\n")
    assert lines[0] == str(os.getuid())
    capabilities = int(lines[1].split()[1], 16)
    assert (capabilities == 0) == ns.rootless
    assert lines[2:-1] == ["lo", "nameserver 192.0.2.1", "/"]
    assert "192.0.2.1" not in await asyncio.to_thread(Path("/etc/resolv.conf").read_text)


_TELL = """
echo "$1 $A"; cat; echo fd >/proc/self/fd/$2
grep SigIgn /proc/self/status
ls /proc/self/fd | wc -l
"""


async def test_a_program_gets_what_asyncio_gives_it_outside(ns: Namespace) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    told = []
    try:
        for create in (asyncio.create_subprocess_exec, ns.create_subprocess_exec):
            process = await create(
                "sh", "-c", _TELL, "sh", "word", str(write),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[write],
                env={"A": "variable", "PATH": os.environ["PATH"]}, cwd="/",
            )  # fmt: skip
            out, _ = await process.communicate(b"input\n")
            assert os.read(read, 100) == b"fd\n"
            told.append(out.decode().splitlines())
    finally:
        os.close(read)
        os.close(write)
    assert told[0] == told[1]
    assert told[1][:2] == ["word variable", "input"]


async def test_ping_works_inside_without_root(ns: Namespace) -> None:
    if "ping_group_range" not in os.listdir("/proc/sys/net/ipv4"):
        pytest.skip("missing: ping_group_range; a kernel with ICMP sockets")
    assert "1 received" in await shell(ns, "ping -n -c1 127.0.0.1")


async def test_a_program_that_can_not_be_run_is_an_error_as_outside(ns: Namespace) -> None:
    before = children()
    with pytest.raises(FileNotFoundError):
        await ns.create_subprocess_exec("/no/such/program", stdout=subprocess.PIPE)
    with pytest.raises(PermissionError):
        await ns.create_subprocess_exec("/etc/passwd")
    assert children() == before


@pytest.mark.parametrize(
    ("words", "options", "error", "told"),
    [
        (("sleep\0",), {}, ValueError, "null byte"),
        (("sleep", "\0"), {}, ValueError, "null byte"),
        (("sleep",), {"env": {"A": "\0"}}, ValueError, "null byte"),
        (("sleep",), {"env": {"A=B": "C"}}, ValueError, "environment variable"),
        (("",), {}, FileNotFoundError, "No such file"),
        (("sleep",), {"resolv_conf": b"nameserver"}, TypeError, "resolv_conf must be a str"),
        (("sleep",), {"user": -1}, ValueError, "user must be"),
        (("sleep",), {"group": 1 << 32}, ValueError, "group must be"),
        (("sleep",), {"extra_groups": [1.5]}, TypeError, "integer"),
    ],
)
async def test_a_program_that_can_not_be_is_refused_before_it_is_started(
    ns: Namespace, words: Any, options: Any, error: type[Exception], told: str
) -> None:
    before, open_before = children(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=told):
        await ns.create_subprocess_exec(*words, **options)
    assert (children(), len(os.listdir("/proc/self/fd"))) == (before, open_before)


async def test_a_user_who_is_not_in_the_namespace_is_told(rootless: Namespace) -> None:
    with pytest.raises(OSError, match="can't have this user, group or extra_groups"):
        await rootless.create_subprocess_exec("true", user=os.getuid() + 1)


async def test_a_cancelled_start_leaves_no_process(ns: Namespace) -> None:
    before = children()
    for turns in range(5):
        task = asyncio.create_task(ns.create_subprocess_exec("sleep", "60"))
        for _ in range(turns * 3):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await wait_until(lambda: children() <= before)


async def test_the_status_of_a_program_comes_back(ns: Namespace) -> None:
    process = await ns.create_subprocess_exec("sh", "-c", "exit 7")
    assert await process.wait() == 7
    process = await ns.create_subprocess_exec("sleep", "60")
    process.terminate()
    assert await process.wait() == -15


@pytest.mark.skipif(not REAL_ROOT, reason="only root can become another user")
async def test_a_program_of_another_user() -> None:
    async with aiotun.new_namespace(rootless=False) as ns:
        script = "id -u; id -g; cat /sys/class/net/lo/address"
        said = await shell(ns, script, user=65534, group=65534, extra_groups=[], cwd="/")
    assert said.split() == ["65534", "65534", "00:00:00:00:00:00"]


# --- Closing -------------------------------------------------------------------------------------


async def test_closing_ends_the_helper_and_what_is_open_goes_on() -> None:
    before = children()
    ns = await aiotun.new_namespace(rootless=True)
    assert len(children() - before) == 1
    tun = await aiotun.open_tun("tun0", netns=ns, addresses=["10.0.0.1/24"])
    sock = await ns.socket(socket.AF_INET, socket.SOCK_DGRAM)
    link = aiotun.Link("lo", netns=ns)
    await asyncio.gather(ns.aclose(), ns.aclose())
    await ns.aclose()
    assert children() == before
    assert (ns.closed, ns.fileno()) == (True, -1)
    sock.sendto(b"still", ("10.0.0.2", 9))
    assert await first_ipv4(tun) == ("10.0.0.1", "10.0.0.2")
    for request in (
        tun.link.info(),
        link.info(),
        ns.socket(),
        ns.create_subprocess_exec("true"),
        aiotun.list_devices(netns=ns),
        opened(aiotun.open_tun("tun1", netns=ns)),
    ):
        with pytest.raises(aiotun.LinkError, match="was closed") as caught:
            await request
        assert caught.value.errno == errno.ESHUTDOWN
    sock.close()
    await tun.aclose()


async def opened(opener: "aiotun.device.Opener[aiotun.TunDevice]") -> None:
    await (await opener).aclose()


async def test_a_helper_does_not_serve_the_next_namespace_of_the_same_number() -> None:
    """The kernel gives the lowest free inode number, so that the next namespace has this one's."""
    closed = []
    for _ in range(5):
        closed.append(await aiotun.new_namespace(rootless=True))
        await closed[-1].aclose()
        for _ in range(5):
            async with aiotun.new_namespace(rootless=False) as ns:
                assert not ns.rootless
                assert (await shell(ns, "ls /sys/class/net")).split() == ["lo"]


async def test_a_device_in_a_privileged_one_keeps_its_link() -> None:
    ns = await aiotun.new_namespace(rootless=False)
    async with aiotun.open_tun("tun0", netns=ns) as tun:
        await ns.aclose()
        assert (await tun.link.info()).name == "tun0"


async def test_a_killed_helper_is_told_and_what_is_open_goes_on(rootless: Namespace) -> None:
    before = children()
    async with aiotun.new_namespace(rootless=True) as ns:
        (pid,) = children() - before
        async with aiotun.open_tun("tun0", netns=ns, addresses=["10.0.0.1/24"]) as tun:
            os.kill(pid, 9)
            await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(aiotun.LinkError, match=f"pid {pid}.*new_namespace"):
                await tun.link.info()
            with pytest.raises(aiotun.LinkError, match=f"pid {pid}"):
                await ns.socket()
            await tun.send(make_icmp_echo("10.0.0.2", "10.0.0.1"))
            assert await first_ipv4(tun) == ("10.0.0.1", "10.0.0.2")
    assert children() == before
    (await rootless.socket()).close()  # which has another helper


async def test_a_stopped_helper_is_ended_too() -> None:
    before = children()
    ns = await aiotun.new_namespace(rootless=True)
    (pid,) = children() - before
    os.kill(pid, 19)
    asking = asyncio.create_task(ns.socket())
    await asyncio.sleep(0)
    await ns.aclose()
    with pytest.raises(aiotun.LinkError, match="was closed"):
        await asking
    assert children() == before


async def test_cancelled_while_it_is_made_nothing_is_left() -> None:
    before = children()
    for turns in range(5):
        task = asyncio.create_task(opened_namespace())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await wait_until(lambda: children() == before)


async def opened_namespace() -> None:
    async with aiotun.new_namespace(rootless=True):
        await asyncio.sleep(60)


def let_go(holder: list[Namespace]) -> None:
    holder.clear()
    for thread in threading.enumerate():  # the one that made it may hold it for a moment longer
        if thread.name == "aiotun":
            thread.join()


@pytest.mark.filterwarnings("default")
async def test_one_that_nobody_closed_warns_and_is_closed() -> None:
    before = children()
    holder = [await aiotun.new_namespace(rootless=True)]
    with pytest.warns(ResourceWarning, match="unclosed <Namespace"):
        let_go(holder)
    await wait_until(lambda: children() == before)


async def test_fifty_one_after_the_other_leave_nothing() -> None:
    def memory_kb() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    async def once() -> None:
        async with (
            aiotun.new_namespace(rootless=True) as ns,
            aiotun.open_tun("tun0", netns=ns, addresses=["10.0.0.1/24"]) as tun,
        ):
            (await ns.socket()).close()
            await tun.link.info()

    await once()
    gc.collect()
    before, fds, kilobytes = children(), len(os.listdir("/proc/self/fd")), memory_kb()
    for _ in range(50):
        await once()
    gc.collect()
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == fds
    assert memory_kb() < kilobytes + 4096

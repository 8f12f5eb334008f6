"""UDP sockets: runs of datagrams both ways, what goes wrong with them, and a queue's promises."""

import asyncio
import contextlib
import copy
import errno
import gc
import ipaddress
import os
import pickle
import random
import select
import socket
import struct
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import aiotun
from aiotun import (
    DatagramSocket,
    DeviceBusyError,
    DeviceClosedError,
    DeviceLostError,
    LinkError,
    PacketError,
    PacketTruncatedError,
    open_datagrams,
)
from aiotun._datagrams import opening
from aiotun._datagrams import port as ports
from aiotun._kernel import features, udp
from aiotun._packets import native
from aiotun.datagrams import Address

from ..helpers import ip, wait_until
from .kernel import ordinary_child
from .rig import waiting

LOCAL: dict[int, Address] = {4: ("127.0.0.1", 0), 6: ("::1", 0)}
SIZES = [1000] * 100 + [400] + [1200] * 3 + [0, 0, 1200, 1300] + [9000] * 5 + [7]

each_version = pytest.mark.parametrize("version", [4, 6])

_ERRORS: Any = (PacketError, DeviceClosedError)


def numbered(sizes: list[int]) -> list[bytes]:
    return [bytes([number % 256]) * size for number, size in enumerate(sizes)]


def opened(version: int = 4, **options: Any) -> Any:
    """An ordinary user gets less than 1 MiB, which warns where more was asked for."""
    return open_datagrams(LOCAL[version], receive_bytes=500_000, **options)


@contextlib.asynccontextmanager
async def pair(
    version: int = 4, **options: Any
) -> AsyncIterator[tuple[DatagramSocket, DatagramSocket]]:
    async with opened(version, **options) as one, opened(version, **options) as other:
        yield one, other


async def collect(sock: DatagramSocket, count: int, limit: int = 64) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        got += (await sock.recv_many(limit))[0]
    return got


async def has_come(sock: DatagramSocket, what: int = select.POLLIN) -> None:
    """Wait for a datagram: the kernel may deliver it a moment after it was sent."""
    poll = select.poll()
    poll.register(sock.fileno(), what)
    await wait_until(lambda: bool(poll.poll(0)))


async def error_has_come(sock: DatagramSocket) -> None:
    await has_come(sock, 0)  # POLLERR


async def nobody(version: int = 4) -> Address:
    """An address where no socket is any more."""
    async with opened(version) as sock:
        where: Address = sock.address
    return where


def runs_pass() -> bool:
    """Whether runs pass `lo` as they are; Linux 5.10 sends their datagrams one by one there."""
    return bool(features.has_feature("lo", "tx-udp-segmentation"))


def need_runs() -> None:
    """Skip a test that is about runs that arrive."""
    if not runs_pass():
        pytest.skip("this kernel cuts runs on lo")


# --- Datagrams, and runs of them -----------------------------------------------------------------


@pytest.fixture(params=["native", "python"])
def each_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send with the C module, if there is one, and without."""
    if request.param == "python":
        monkeypatch.setattr(ports, "_send_run", native._send_run)


@each_version
@pytest.mark.usefixtures("each_module")
@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("limit", [1, 10, 64, 1000])
async def test_datagrams_come_as_they_were_sent(version: int, offload: bool, limit: int) -> None:
    async with pair(version, offload=offload) as (one, other):
        sent = numbered(SIZES)
        assert await one.send_many(sent, other.address) == len(sent)
        got: list[bytes] = []
        while len(got) < len(sent):
            batch, source = await other.recv_many(limit)
            assert 1 <= len(batch) <= limit
            assert source == one.address
            got += batch
        assert got == sent
        ours, theirs = one.stats, other.stats
        assert ours.datagrams_sent == theirs.datagrams_received == len(sent)
        assert (ours.runs_sent > 2) == offload
        assert (theirs.runs_received > 2) == (offload and runs_pass())
        assert (ours.fallbacks, dict(ours.refused), theirs.dropped) == (0, {}, 0)


@each_version
@pytest.mark.usefixtures("each_module")
@pytest.mark.parametrize("sizes", [[1400] * 45, [1400] * 44 + [9], [7, 7], [1400] * 46 + [1401]])
async def test_a_list_that_fits_one_run_goes_in_one_call(version: int, sizes: list[int]) -> None:
    async with pair(version) as (one, other):
        sent = numbered(sizes)
        for _ in range(3):
            await one.send_many(sent, other.address)
            assert await collect(other, len(sent)) == sent
        assert one.stats.runs_sent == 3
        assert one.stats.datagrams_sent == 3 * len(sent)


@each_version
async def test_single_datagrams_come_with_their_source(version: int) -> None:
    async with pair(version) as (one, other):
        await one.send(b"one", other.address)
        one.send_nowait(bytearray(b"two"), other.address)
        iterator: Any = iter([memoryview(b"three"), b""])
        await one.send_many(iterator, other.address[:2])
        assert one.send_many_nowait([b"five", bytearray(b"six")], other.address) == 2
        assert await other.recv() == (b"one", one.address)
        await has_come(other)
        assert other.recv_nowait() == (b"two", one.address)
        assert await anext(aiter(other)) == (b"three", one.address)
        assert await anext(other.batches(1)) == ([b""], one.address)
        assert await collect(other, 1, 1) == [b"five"]
        assert other.recv_many_nowait() == ([b"six"], one.address)
        with pytest.raises(BlockingIOError):
            other.recv_nowait()
        with pytest.raises(BlockingIOError):
            other.recv_many_nowait()


async def test_a_batch_has_one_source() -> None:
    async with pair() as (one, other), opened() as third:
        for _ in range(20):  # so that it has learnt that more than one is there at once
            for sock in (one, third, third):
                await sock.send_many([b"x" * 100] * 3, other.address)
        got: list[tuple[int, Address]] = []
        while sum(count for count, _ in got) < 180:
            batch, source = await other.recv_many()
            got.append((len(batch), source))
        assert {source for _, source in got} == {one.address, third.address}
        assert sum(count for count, source in got if source == third.address) == 120


async def test_a_run_that_several_tasks_share_goes_on_without_another_wake_up() -> None:
    async with pair() as (one, other):
        tasks = [await waiting(other.recv()) for _ in range(5)]
        sent = numbered([100] * 5)
        await one.send_many(sent, other.address)
        assert one.stats.runs_sent == 1
        assert [data for data, _ in await asyncio.gather(*tasks)] == sent  # in their order


async def test_what_nobody_took_is_counted_when_the_socket_closes() -> None:
    need_runs()
    async with pair() as (one, other):
        await one.send_many(numbered([100] * 5), other.address)
        await other.recv()
    assert other.stats.dropped == 4


async def test_datagrams_that_are_not_bytes_are_refused_in_their_place() -> None:
    async with pair() as (one, other):
        mixed: Any = [b"a", bytearray(b"b"), "c", b"d"]
        with pytest.raises(TypeError) as caught:
            await one.send_many(mixed, other.address)
        assert caught.value.sent == 2  # type: ignore[attr-defined]  # send_many sets it
        assert await collect(other, 2) == [b"a", b"b"]


@pytest.mark.parametrize("address", [("localhost", 9), ("::1", 9), "127.0.0.1", ["127.0.0.1", 9]])
async def test_an_address_that_is_not_the_sockets_kind_is_an_error(address: Any) -> None:
    async with opened() as sock:
        for send in (sock.send_nowait, sock.send_many_nowait):
            with pytest.raises((TypeError, ValueError), match="address"):
                send(b"", address)
        for asend in (sock.send, sock.send_many):
            with pytest.raises((TypeError, ValueError), match="address"):
                await asend(b"", address)
        assert sock.stats.datagrams_sent == 0


@each_version
async def test_a_datagram_that_is_too_long_is_a_packet_error_and_changes_nothing(
    version: int,
) -> None:
    async with pair(version) as (one, other):
        for size in (65_508, 100_000):
            with pytest.raises(PacketError, match="65507 at most"):
                await one.send(bytes(size), other.address)
        with pytest.raises(PacketError) as caught:
            await one.send_many([bytes(100)] * 3 + [bytes(65_508)] * 2, other.address)
        assert (caught.value.sent, caught.value.errno) == (3, errno.EMSGSIZE)
        assert [len(each) for each in caught.value.unsent] == [65_508] * 2
        assert (one.stats.fallbacks, one.stats.runs_sent) == (0, 1)
        await collect(other, 3)
        await one.send(bytes(65_507), other.address)
        assert len((await other.recv())[0]) == 65_507


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_is_at_least_one(limit: int) -> None:
    async with opened() as sock:
        for method in (sock.recv_many, sock.batches, sock.recv_many_nowait):
            with pytest.raises(ValueError, match="at least 1"):
                method(limit)


# --- What a path does not take -------------------------------------------------------------------


def narrow(version: int) -> Address:
    """A local address whose path takes packets of 1,300 bytes at most."""
    host = "127.0.0.9" if version == 4 else "fd00::9"
    if version == 6:
        ip("address", "add", f"{host}/128", "dev", "lo", "nodad")
        table = ("-6", "route", "show", "table", "local")
        while host not in [route["dst"] for route in ip(*table)]:
            pass  # the kernel adds it a moment later
        ip("-6", "route", "del", "local", host, "dev", "lo", "table", "local")
    ip(f"-{version}", "route", "add", "local", host, "dev", "lo", "table", "local", "mtu", "1300")
    return host, 0


@each_version
@pytest.mark.usefixtures("each_module")
async def test_runs_that_one_path_does_not_take_go_singly_there_and_nowhere_else(
    version: int,
) -> None:
    async with (
        pair(version) as (one, other),
        open_datagrams(narrow(version), receive_bytes=500_000) as small,
    ):
        sender = await open_datagrams(("0.0.0.0" if version == 4 else "::", 0), send_bytes=300_000)
        large, fitting = numbered([1400] * 30), numbered([1000] * 30)
        for _ in range(3):
            await sender.send_many(large, small.address)
            assert await collect(small, 30) == large
        stats = sender.stats
        assert (stats.fallbacks, stats.runs_sent) == (1, 0)
        await sender.send_many(fitting, small.address)  # smaller ones still go in runs
        assert await collect(small, 30) == fitting
        await sender.send_many(large, other.address)
        assert await collect(other, 30) == large
        assert (sender.stats.fallbacks, sender.stats.runs_sent) == (1, 2)
        await sender.aclose()
        assert one.stats.fallbacks == 0


async def test_a_fallback_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(ports, "time", types.SimpleNamespace(monotonic=lambda: now))
    async with open_datagrams(narrow(4), receive_bytes=500_000) as small, opened() as one:
        for now in (0.0, 59.0, 61.0):  # noqa: B007 - the clock's
            await one.send_many(numbered([1400] * 5), small.address)
        assert one.stats.fallbacks == 2
        assert await collect(small, 15) == numbered([1400] * 5) * 3


async def test_the_fallbacks_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_MOST_FALLBACKS", 1)
    where = narrow(4)
    async with (
        open_datagrams(where, receive_bytes=500_000) as one,
        open_datagrams(where, receive_bytes=500_000) as other,
        opened() as sender,
    ):
        for sock in (one, other, one):
            await sender.send_many(numbered([1400] * 5), sock.address)
        assert sender.stats.fallbacks == 3


class Refusing:
    """A socket whose kernel takes no runs, for one reason or another."""

    def __init__(self, real: Any, code: int) -> None:
        self.real, self.code, self.refused = real, code, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def sendmsg(self, buffers: Any, control: Any, *args: Any) -> int:
        if control:
            self.refused += 1
            raise OSError(self.code, os.strerror(self.code))
        sent: int = self.real.sendmsg(buffers, control, *args)
        return sent


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EMSGSIZE, errno.EIO])
async def test_whatever_refuses_runs_gets_single_datagrams(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "_send_run", native._send_run)
    async with pair() as (one, other):
        refusing = Refusing(one.port._sock, code)
        one.port._sock = refusing  # type: ignore[assignment]
        sent = numbered([1000] * 60 + [500] * 60)
        for _ in range(2):
            await one.send_many(sent, other.address)
            assert await collect(other, len(sent)) == sent
        # A smaller run may fit the path. Without checksum offload none does.
        kinds = 1 if code == errno.EIO else 2
        assert one.stats.fallbacks == kinds
        assert not one.stats.refused
        one.port._sock = refusing.real


async def test_offload_false_and_the_variable_switch_runs_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIOTUN_UDP_GSO", "off")
    async with pair() as (one, other):
        sent = numbered([100] * 20)
        await one.send_many(sent, other.address)
        assert await collect(other, 20) == sent
        assert one.stats.runs_sent == 0


async def test_kernels_that_corrupt_full_tails_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "corrupts_full_tails", lambda release: True)
    async with pair() as (one, other):
        sent = numbered([100] * 20)
        await one.send_many(sent, other.address)
        assert one.stats.runs_sent == 0
        await one.send_many([*sent, b"tail"], other.address)
        assert one.stats.runs_sent == 1
        assert await collect(other, 41) == [*sent, *sent, b"tail"]


async def test_a_kernel_without_the_options_gets_single_datagrams() -> None:
    class Old(socket.socket):
        def getsockopt(self, level: int, option: int, *more: int) -> Any:
            if option == udp.UDP_SEGMENT and level == socket.IPPROTO_UDP:
                raise OSError(errno.ENOPROTOOPT, "no such option")
            return super().getsockopt(level, option, *more)

        def setsockopt(self, *args: Any) -> None:
            raise OSError(errno.ENOPROTOOPT, "no such option")

    old = Old(socket.AF_INET, socket.SOCK_DGRAM)
    old.bind(("127.0.0.1", 0))
    async with DatagramSocket.from_socket(old) as one, opened() as other:
        await one.send_many(numbered([100] * 20), other.address)
        assert one.stats.runs_sent == 0
        assert await collect(other, 20) == numbered([100] * 20)


# --- What the kernel refuses, and what it reports ------------------------------------------------


async def test_a_refused_datagram_is_a_packet_error_and_counted() -> None:
    async with pair() as (one, other):
        nowhere = ("192.0.2.1", 9)
        with pytest.raises(PacketError, match=r"192\.0\.2\.1:9 was not sent: there is no route"):
            await one.send(b"", nowhere)
        with pytest.raises(PacketError) as caught:
            await one.send_many([b"a"] * 5, nowhere)
        assert (caught.value.errno, caught.value.sent) == (errno.ENETUNREACH, 0)
        with pytest.raises(PacketError) as caught:
            one.send_many_nowait([b"a"] * 5, nowhere)
        assert (caught.value.sent, caught.value.unsent) == (0, [b"a"] * 5)
        assert one.stats.refused == {errno.ENETUNREACH: 3}
        await one.send(b"fits", other.address)
        assert await other.recv() == (b"fits", one.address)


@each_version
async def test_an_icmp_error_is_told_once_to_who_sends_there(version: int) -> None:
    async with pair(version) as (one, other):
        dead = await nobody(version)
        await one.send(b"", dead)
        await error_has_come(one)
        await one.send(b"alive", other.address)  # another destination is not told
        assert await other.recv() == (b"alive", one.address)
        with pytest.raises(PacketError, match="was not delivered") as caught:
            await one.send(b"", dead)
        assert caught.value.errno == errno.ECONNREFUSED
        assert one.stats.datagrams_sent == 2
        assert one.stats.refused == {errno.ECONNREFUSED: 1}
        await one.send(b"", dead)  # once
        await error_has_come(one)
        with pytest.raises(PacketError) as caught:
            await one.send_many([b""] * 3, dead)
        assert caught.value.sent == 0


async def test_an_icmp_error_is_forgotten_where_the_other_end_has_come_back() -> None:
    async with opened() as one:
        where = await nobody()
        receiving = await waiting(one.recv())
        await one.send(b"", where)
        await wait_until(lambda: bool(one.port.failed))
        async with open_datagrams(where, receive_bytes=500_000) as back:
            await back.send(b"here again", one.address)
            assert await receiving == (b"here again", where)
            await one.send(b"welcome", where)
            assert await back.recv() == (b"welcome", one.address)
        assert one.stats.refused == {errno.ECONNREFUSED: 1}


@each_version
async def test_an_icmp_error_does_not_disturb_who_receives(version: int) -> None:
    async with pair(version) as (one, other):
        receiving = await waiting(one.recv())
        dead = await nobody(version)
        await one.send(b"", dead)
        await wait_until(lambda: one.stats.refused == {errno.ECONNREFUSED: 1})
        assert not receiving.done()
        await other.send(b"still", one.address)
        assert await receiving == (b"still", other.address)
        with pytest.raises(PacketError, match="not delivered"):
            one.send_nowait(b"", dead)


async def test_many_icmp_errors_are_counted_and_what_is_kept_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "_MOST_FAILED", 2)
    async with opened() as one:
        dead = [await nobody() for _ in range(4)]
        receiving = await waiting(one.recv())
        for number, where in enumerate(dead, 1):
            await one.send(b"", where)
            await wait_until(lambda number=number: sum(one.stats.refused.values()) == number)  # type: ignore[misc]
        assert [*one.port.failed] == dead[2:]
        receiving.cancel()


async def connected(version: int = 4) -> tuple[DatagramSocket, Address]:
    """A connected socket and where it is connected to: nobody is there any more."""
    where = await nobody(version)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect(where)
    return DatagramSocket.from_socket(sock), where


@each_version
@pytest.mark.parametrize("method", ["send", "recv", "recv_many"])
async def test_an_icmp_error_on_a_connected_socket_is_raised_once(
    version: int, method: str
) -> None:
    sock, where = await connected(version)
    calls: dict[str, Callable[[], Any]] = {
        "send": lambda: sock.send(b"again"),
        "recv": sock.recv,
        "recv_many": sock.recv_many,
    }
    async with sock:
        await sock.send(b"")
        await error_has_come(sock)
        with pytest.raises(PacketError) as caught:
            await calls[method]()
        assert caught.value.errno == errno.ECONNREFUSED
        assert sock.stats.refused == {errno.ECONNREFUSED: 1}
        async with open_datagrams(where, receive_bytes=500_000) as back:  # and it goes on
            await sock.send(b"hello")
            data, source = await back.recv()
            await back.send(data, source)
            assert await sock.recv() == (b"hello", back.address)


async def test_a_queue_of_a_connected_socket_receives_after_an_icmp_error() -> None:
    """On uvloop, too, which stops watching an fd that is in error for a moment."""
    where = await nobody()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(where)
    here = sock.getsockname()
    async with aiotun.Queue.from_fd(sock.detach()) as queue:
        for _ in range(2):
            receiving = await waiting(queue.recv())
            await queue.send(b"nobody there")
            with pytest.raises(PacketError, match="not delivered"):
                await receiving
        receiving = await waiting(queue.recv())
        async with open_datagrams(where, receive_bytes=500_000) as back:
            await back.send(b"now", here)
            assert await receiving == b"now"


async def test_without_an_address_only_a_connected_socket_sends() -> None:
    async with opened() as one:
        for send in (one.send_nowait, one.send_many_nowait):
            with pytest.raises(PacketError, match="not connected; give an address"):
                send([b"x"] if send == one.send_many_nowait else b"x")


async def test_what_overflows_the_buffer_is_counted_also_after_closing() -> None:
    async with opened() as one, open_datagrams(LOCAL[4], receive_bytes=5000) as other:
        await one.send_many(numbered([*range(1000, 1100)]), other.address)  # not in runs
        came = 0

        def all_are_known() -> bool:
            nonlocal came
            with contextlib.suppress(BlockingIOError):
                while True:
                    came += len(other.recv_many_nowait()[0])
            return came + other.stats.overflowed == 100

        await wait_until(lambda: other.stats.overflowed > 0)
        await wait_until(all_are_known)
        assert 0 < came < 100
    assert other.stats.overflowed == 100 - came


async def test_what_came_cut_is_dropped_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    need_runs()
    async with pair() as (one, other):
        monkeypatch.setattr(ports, "CONTROL_BYTES", 1)  # no room for the segment size
        await one.send_many([b"x" * 10] * 5, other.address)
        with pytest.raises(PacketTruncatedError, match="was dropped"):
            await other.recv()
        monkeypatch.undo()
        monkeypatch.setattr(ports, "_READ_BYTES", 100)
        await one.send(b"x" * 101, other.address)
        with pytest.raises(PacketTruncatedError, match="was dropped"):
            await other.recv_many()
        await one.send(b"fits", other.address)
        assert await other.recv() == (b"fits", one.address)
        assert other.stats.truncated == 2
        assert other.stats.datagrams_received == 1


async def test_an_error_in_the_middle_of_a_batch_comes_after_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (one, other):
        other.port._more = True
        await one.send(b"first", other.address)
        await one.send(b"x" * 101, other.address)
        await one.send(b"last", other.address)
        monkeypatch.setattr(ports, "_READ_BYTES", 100)
        assert await other.recv_many() == ([b"first"], one.address)
        with pytest.raises(PacketTruncatedError):
            await other.recv_many()
        assert await other.recv_many() == ([b"last"], one.address)


# --- A full send buffer --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def unanswered() -> AsyncIterator[tuple[aiotun.TapDevice, DatagramSocket, Address]]:
    """A neighbour who does not answer: what is sent to it stays in the sender's send buffer."""
    async with (
        aiotun.open_tap("far0", addresses=["10.7.0.1/24"], ipv6_autoconf=False) as tap,
        open_datagrams(("10.7.0.1", 0), receive_bytes=500_000, send_bytes=10_000) as sock,
    ):
        ip("neighbour", "flush", "dev", "far0")
        yield tap, sock, ("10.7.0.2", 9)


async def answer(tap: aiotun.TapDevice) -> None:
    mac = "02:00:00:00:00:02"
    async for frame in tap:
        reply = aiotun.reply.arp(frame, mac, [ipaddress.ip_address("10.7.0.2")])
        if reply is not None:
            await tap.send(reply)
            return


async def udp_frames(tap: aiotun.TapDevice, count: int) -> list[bytes]:
    got: list[bytes] = []
    async for frame in tap:
        if frame[12:14] == b"\x08\0" and frame[23] == socket.IPPROTO_UDP:
            got.append(frame[42:])
        if len(got) == count:
            break
    return got


@pytest.mark.parametrize("offload", [True, False])
async def test_send_many_waits_while_the_send_buffer_is_full(offload: bool) -> None:
    async with unanswered() as (tap, sock, where):
        sent = numbered([1000] * 200)
        sending = await waiting(sock.send_many(sent, where))
        behind = await waiting(sock.send(b"behind", where))
        assert 0 < sock.stats.datagrams_sent < 200
        with pytest.raises(BlockingIOError):
            sock.send_nowait(b"overtakes", where)
        assert sock.send_many_nowait([b"overtakes"], where) == 0
        await answer(tap)
        frames = await udp_frames(tap, 201)
        assert await sending == 200
        await behind
        assert sorted(frames) == sorted([*sent, b"behind"])


async def test_send_many_nowait_says_how_many_went() -> None:
    async with unanswered() as (_, sock, where):
        went = sock.send_many_nowait(numbered([1000] * 200), where)
        assert 0 < went < 200
        assert sock.stats.datagrams_sent == went
        assert sock.send_many_nowait([b"x"], where) == 0
        with pytest.raises(BlockingIOError):
            sock.send_nowait(b"x", where)


async def test_a_cancelled_send_has_sent_nothing_and_says_how_many_went() -> None:
    async with unanswered() as (_, sock, where):
        sending = await waiting(sock.send_many(numbered([1000] * 200), where))
        went = sock.stats.datagrams_sent
        sending.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await sending
        assert caught.value.sent == went == sock.stats.datagrams_sent  # type: ignore[attr-defined]


async def test_closing_wakes_who_waits_to_send() -> None:
    async with unanswered() as (_, sock, where):
        sending = await waiting(sock.send_many(numbered([1000] * 200), where))
        one = await waiting(sock.send(b"", where))
        sock.close()
        for task in (sending, one):
            with pytest.raises(DeviceClosedError, match="was closed"):
                await task


# --- A queue's promises --------------------------------------------------------------------------


@each_version
async def test_cancelling_at_random_moments_loses_nothing(version: int) -> None:
    chance = random.Random(20)
    async with pair(version) as (one, other):
        got: list[bytes] = []

        async def receive() -> None:
            while True:
                if chance.random() < 0.5:
                    got.append((await other.recv())[0])
                else:
                    got.extend((await other.recv_many(chance.choice([1, 3, 64])))[0])

        sent: list[bytes] = []
        tasks = [asyncio.create_task(receive()) for _ in range(3)]
        for turn in range(300):
            batch = [struct.pack("!I", turn) * chance.randrange(1, 20)] * chance.randrange(4)
            sent += batch
            await one.send_many(batch, other.address)
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            chance.choice(tasks).cancel()
            tasks = [
                asyncio.create_task(receive()) if task.cancelling() or task.done() else task
                for task in tasks
            ]
        await wait_until(lambda: len(got) == len(sent))
        assert sorted(got) == sorted(sent)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_waits_is_served_in_order_and_not_overtaken() -> None:
    async with pair() as (one, other):
        tasks = [await waiting(other.recv()) for _ in range(4)]
        tasks[1].cancel()
        for number in range(3):
            await one.send(bytes([number]), other.address)
        with pytest.raises(BlockingIOError):
            other.recv_nowait()
        waited = [await task for task in (tasks[0], tasks[2], tasks[3])]
        assert [data for data, _ in waited] == [b"\0", b"\1", b"\2"]


async def test_a_flood_lets_other_tasks_run() -> None:
    need_runs()  # 1,500 datagrams one by one don't fit into the buffer
    async with pair() as (one, other):
        await one.send_many([b"x" * 10] * 1500, other.address)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        for _ in range(1500):
            await other.recv()
        assert turns >= 3
        counting.cancel()


async def test_sending_without_end_lets_other_tasks_run() -> None:
    async with opened() as one:
        ran = asyncio.Event()
        asyncio.get_running_loop().call_soon(ran.set)
        await one.send_many([b"x"] * 600, one.address)
        assert ran.is_set()


@pytest.mark.parametrize("how", ["close", "aclose"])
async def test_closing_wakes_who_waits_and_ends_iteration(how: str) -> None:
    sock = await opened()
    where = sock.address
    tasks = [await waiting(sock.recv()), await waiting(sock.recv_many())]

    async def iterate() -> str:
        async for _ in sock:
            pass
        async for _ in sock.batches():
            pass
        return "ended"

    iterating = await waiting(iterate())
    if how == "close":
        sock.close()
    await sock.aclose()
    for task in tasks:
        with pytest.raises(DeviceClosedError, match="was closed; open another"):
            await task
    assert await iterating == "ended"
    assert sock.closed
    assert sock.fileno() == -1
    assert sock.address == where
    for call in (sock.recv, sock.recv_many, lambda: sock.send(b"", where)):
        with pytest.raises(DeviceClosedError):
            await call()
    with pytest.raises(DeviceClosedError):
        await sock.send_many([b""], where)
    for nowait in (
        sock.recv_nowait,
        sock.recv_many_nowait,
        lambda: sock.send_nowait(b"", where),
        lambda: sock.send_many_nowait([b""], where),
        lambda: sock.receive_bytes,
    ):
        with pytest.raises(DeviceClosedError):
            nowait()
    await sock.aclose()


async def test_no_fd_number_is_touched_after_it_was_given_up() -> None:
    sock = await opened()
    number = sock.fileno()
    await sock.aclose()
    replacement = os.open("/dev/null", os.O_RDONLY)
    os.dup2(replacement, number)
    stats = sock.stats
    del sock
    gc.collect()
    os.fstat(number)  # still open
    assert stats.overflowed == 0
    for fd in {replacement, number}:
        os.close(fd)


async def test_a_socket_that_is_not_closed_warns_and_is_closed() -> None:
    sock = await opened()
    number = sock.fileno()
    task = asyncio.create_task(sock.recv())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    del task
    held = [sock]
    del sock
    with pytest.warns(ResourceWarning, match=r"unclosed <DatagramSocket 127\.0\.0\.1"):
        held.clear()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_socket_belongs_to_one_loop() -> None:
    async def use(sock: DatagramSocket) -> None:
        await sock.send(b"x", sock.address)
        await sock.recv()

    async def make() -> DatagramSocket:
        sock: DatagramSocket = await opened()
        await use(sock)
        return sock

    first = asyncio.new_event_loop()
    sock = first.run_until_complete(make())

    async def elsewhere() -> None:
        for call in (sock.recv, sock.recv_many, lambda: sock.send(b"", sock.address)):
            with pytest.raises(RuntimeError, match="another event loop"):
                await call()
        with pytest.raises(RuntimeError, match="another event loop"):
            await sock.send_many([b""], sock.address)

    second = asyncio.new_event_loop()
    second.run_until_complete(elsewhere())
    second.close()
    first.run_until_complete(sock.aclose())
    first.close()


async def test_an_fd_that_somebody_else_closed_is_lost() -> None:
    sock = await opened()
    os.close(sock.fileno())
    with pytest.raises(DeviceLostError, match="closed by something else"):
        sock.recv_nowait()
    with pytest.raises(DeviceLostError):
        await sock.send(b"", ("127.0.0.1", 9))
    await sock.aclose()


async def test_a_socket_is_neither_copied_nor_pickled() -> None:
    async with opened() as sock:
        for make in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="can't be copied or pickled"):
                make(sock)


# --- Opening -------------------------------------------------------------------------------------


async def test_an_opener_is_used_once() -> None:
    opener = opened()
    sock = await opener
    with pytest.raises(RuntimeError, match="used once"):
        await opener
    await sock.aclose()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"address": ("example.org", 1)}, ValueError),
        ({"address": "127.0.0.1:1"}, TypeError),
        ({"mark": -1}, ValueError),
        ({"mark": "1"}, TypeError),
        ({"receive_bytes": 0}, ValueError),
        ({"receive_bytes": 1 << 30}, ValueError),
        ({"send_bytes": 1.5}, TypeError),
        ({"netns": 1.5}, TypeError),
    ],
)
def test_invalid_arguments_are_errors_before_anything_is_opened(options: Any, error: Any) -> None:
    with pytest.raises(error):
        open_datagrams(**({"address": ("127.0.0.1", 0)} | options))


async def test_why_a_socket_could_not_be_bound_is_told() -> None:
    async with opened() as sock:
        with pytest.raises(DeviceBusyError, match="reuse_port=True"):
            await open_datagrams(sock.address, receive_bytes=500_000)
    with pytest.raises(LinkError, match="no interface has the address"):
        await open_datagrams(("192.0.2.77", 0), receive_bytes=500_000)
    with pytest.raises(LinkError, match="no network namespace"):
        await opened(netns="not-there")


async def test_several_sockets_may_share_a_port() -> None:
    async with (
        opened(reuse_port=True) as one,
        open_datagrams(one.address, reuse_port=True, receive_bytes=500_000) as other,
    ):
        assert other.address == one.address


async def test_the_ipv6_socket_carries_no_ipv4() -> None:
    async with open_datagrams(("::", 0), receive_bytes=500_000) as six:
        port = six.address[1]
        async with open_datagrams(("0.0.0.0", port), receive_bytes=500_000) as four:
            assert four.address == ("0.0.0.0", port)


async def test_what_was_granted_can_be_read() -> None:
    async with opened(send_bytes=100_000) as sock:
        assert 0 < sock.receive_bytes <= 500_000
        assert sock.send_bytes == 100_000
        assert not os.get_inheritable(sock.fileno())
        assert not os.get_blocking(sock.fileno())


async def test_a_mark_is_set() -> None:
    async with opened(mark=0xFFFF_FFF0) as sock:
        duplicate = socket.socket(fileno=os.dup(sock.fileno()))
        mark = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
        assert mark & 0xFFFF_FFFF == 0xFFFF_FFF0
        duplicate.close()


async def test_a_small_receive_buffer_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports.DatagramPort, "buffer_bytes", lambda self, option: 212_992)
    opener = open_datagrams(LOCAL[4])
    with pytest.warns(RuntimeWarning, match=r"212992 bytes.*net\.core\.rmem_max=4194304") as told:
        sock = await opener
    await sock.aclose()
    assert told[0].filename == __file__
    with pytest.warns(RuntimeWarning) as told:
        async with open_datagrams(LOCAL[4]):
            pass
    assert told[0].filename == __file__
    async with opened(), open_datagrams(LOCAL[4], offload=False):
        pass  # where less was asked for, or no runs come, it is enough


def test_an_ordinary_user_is_told_what_a_low_port_and_a_mark_need() -> None:
    low, mark = ordinary_child(
        """
        async def main():
            told = []
            for options in ({"address": ("127.0.0.1", 1)}, {"mark": 1}):
                given = {"address": ("127.0.0.1", 0), "receive_bytes": 1000} | options
                try:
                    await aiotun.open_datagrams(**given)
                except aiotun.NotPermittedError as error:
                    told.append(error.strerror)
            return told
        import asyncio, json
        print(json.dumps(asyncio.run(main())))
        """
    )
    assert "CAP_NET_BIND_SERVICE" in low
    assert "CAP_NET_ADMIN" in mark


# --- Sockets of others ---------------------------------------------------------------------------


async def test_a_socket_that_is_there_already_is_taken_over() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    os.set_inheritable(sock.fileno(), True)
    async with opened() as one, DatagramSocket.from_socket(sock) as other:
        assert sock.fileno() == -1
        assert not os.get_inheritable(other.fileno())
        assert not os.get_blocking(other.fileno())
        await one.send_many(numbered([100] * 20), other.address)
        assert await collect(other, 20) == numbered([100] * 20)
        assert other.stats.runs_received == runs_pass()
        await other.send_many(numbered([100] * 20), one.address)
        assert other.stats.runs_sent == 1
        assert await collect(one, 20) == numbered([100] * 20)


async def test_without_offload_a_socket_that_had_it_gets_single_datagrams() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_UDP, udp.UDP_GRO, 1)
    async with opened() as one, DatagramSocket.from_socket(sock, offload=False) as other:
        await one.send_many(numbered([100] * 20), other.address)
        assert await collect(other, 20) == numbered([100] * 20)
        assert other.stats.runs_received == 0


async def test_a_socket_that_is_not_bound_is_bound_when_it_sends() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    async with opened() as one, DatagramSocket.from_socket(sock) as other:
        assert other.address == ("0.0.0.0", 0)
        await other.send(b"x", one.address)
        assert (await one.recv())[1] == ("127.0.0.1", other.address[1])


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_NETLINK, socket.SOCK_RAW),
    ],
)
def test_other_sockets_are_refused_and_stay_the_callers(family: int, kind: int) -> None:
    with socket.socket(family, kind) as sock:
        with pytest.raises(ValueError, match="not a UDP socket"):
            DatagramSocket.from_socket(sock)
        assert sock.fileno() >= 0
    with pytest.raises(ValueError, match="closed"):
        DatagramSocket.from_socket(sock)
    with pytest.raises(TypeError, match="needs a socket"):
        DatagramSocket.from_socket(5)  # type: ignore[arg-type]


async def test_sockets_live_in_a_namespace() -> None:
    async with aiotun.new_namespace() as ns:
        async with open_datagrams(LOCAL[4], netns=ns, receive_bytes=100_000) as one:
            theirs = await ns.socket(socket.AF_INET, socket.SOCK_DGRAM)
            theirs.bind(("127.0.0.1", 0))
            async with DatagramSocket.from_socket(theirs) as other:
                await one.send_many(numbered([100] * 20), other.address)
                assert await collect(other, 20) == numbered([100] * 20)
                assert other.stats.runs_received == runs_pass()
        async with opened() as outside:
            await outside.send(b"", one.address)  # nobody is there, outside
            await error_has_come(outside)
            with pytest.raises(PacketError, match="not delivered"):
                await outside.send(b"", one.address)

"""What `send_many` tells when it raises: how many packets it sent, and which it did not."""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest

from aiotun import DeviceClosedError, LinkDownError, PacketError, PacketIO, Queue
from aiotun.offload import split
from aiotun.testing import memory_pair

from ..test_gso import Packet, run_of, written
from .rig import KINDS, OURS, THEIRS, rig, udp, waiting

each_kind = pytest.mark.parametrize("kind", [*KINDS, "memory"])

# All of one flow, and not alike: so each kind of device keeps them in order.
PACKETS = [udp(THEIRS, 1, OURS, 2, bytes([place % 256, place // 256])) for place in range(2500)]


@contextlib.asynccontextmanager
async def device(kind: str) -> AsyncIterator[PacketIO]:
    async with contextlib.AsyncExitStack() as stack:
        if kind == "memory":
            one, other = memory_pair()
            await stack.enter_async_context(other)
            yield await stack.enter_async_context(one)
        else:
            yield (await stack.enter_async_context(rig(kind))).io


async def failing(io: PacketIO, packets: Iterable[Any], error: type[Exception]) -> tuple[int, Any]:
    with pytest.raises(error) as caught:
        await io.send_many(packets)
    return told(caught.value)


def told(error: BaseException) -> tuple[int, Any]:
    return error.sent, error.unsent  # type: ignore[attr-defined]  # promised on all classes


@each_kind
@pytest.mark.parametrize("form", [list, tuple, deque])
@pytest.mark.parametrize("bad", [0, 3, 40])
async def test_the_packet_that_is_refused_and_all_behind_it(
    kind: str, form: Callable[..., Any], bad: int
) -> None:
    async with device(kind) as io:
        packets = PACKETS[:80]
        packets[bad] = b""
        assert await failing(io, form(packets), PacketError) == (bad, packets[bad:])


@pytest.mark.parametrize("kind", ["device", "split", "split group"])
@pytest.mark.parametrize("bad", [255, 256, 600, 1023, 1024, 2400])
async def test_a_batch_that_is_sent_in_several_turns(kind: str, bad: int) -> None:
    async with device(kind) as io:
        packets: list[Any] = PACKETS[:]
        packets[bad] = 5
        assert await failing(io, packets, TypeError) == (bad, packets[bad:])


@each_kind
async def test_of_a_generator_only_what_was_taken(kind: str) -> None:
    """The others are still in it."""
    async with device(kind) as io:
        packets = PACKETS[:20]
        packets[7] = b""
        assert await failing(io, iter(packets), PacketError) == (7, packets[7:])

        def endless() -> Iterator[bytes]:
            yield from packets
            while True:
                yield PACKETS[0]

        source = endless()
        sent, unsent = await failing(io, source, PacketError)
        assert (sent, unsent[:13]) == (7, packets[7:])
        assert sent + len(unsent) == io._format.batch
        assert next(source) == PACKETS[0]


@each_kind
async def test_the_iterable_raises(kind: str) -> None:
    """Everything that it gave was sent."""

    def broken() -> Iterator[bytes]:
        yield from PACKETS[:5]
        raise KeyError("no more")

    async with device(kind) as io:
        assert await failing(io, broken(), KeyError) == (5, [])
        sent, unsent = await failing(io, 5, TypeError)  # type: ignore[arg-type]  # the test
        assert (sent, unsent) == (0, [])


@each_kind
async def test_a_device_that_is_closed(kind: str) -> None:
    async with device(kind) as io:
        await io.aclose()
        assert await failing(io, PACKETS, DeviceClosedError) == (0, PACKETS)
        assert await failing(io, iter(PACKETS), DeviceClosedError) == (0, [])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_link_that_is_down(kind: str) -> None:
    async with rig(kind) as r:
        await r.tun.link.down()
        sent, unsent = await failing(r.io, PACKETS[:9], LinkDownError)
        assert (sent, unsent) == (0, PACKETS[:9])
        unsent.clear()  # it is the caller's own
        assert PACKETS[:9]


@each_kind
async def test_cancelled_between_the_turns(kind: str) -> None:
    async with device(kind) as io:
        task = asyncio.create_task(io.send_many(PACKETS))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        sent, unsent = told(caught.value)
        assert 0 < sent <= io._format.batch
        assert unsent == PACKETS[sent:]


@pytest.mark.parametrize("offload", ["off", "split"])
@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_while_it_waits_for_room(offload: Any, how: str) -> None:
    """With several flows: what arrived and what is told to be unsent are all there is."""
    runs = [written(run_of(Packet(ports=(port, 9)), [1000] * 5)) for port in range(50)]
    packets = [packet for turn in zip(*runs, strict=True) for packet in turn]
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        far.setblocking(False)
        async with Queue.from_fd(near.detach(), offload=offload) as queue:
            task = await waiting(queue.send_many(packets))
            task.cancel() if how == "cancel" else queue.close()
            with pytest.raises((asyncio.CancelledError, DeviceClosedError)) as caught:
                await task
            sent, unsent = told(caught.value)
            arrived: list[bytes] = []
            with contextlib.suppress(BlockingIOError):
                while data := far.recv(70_000):
                    arrived += split(data) if offload == "split" else [data]
            assert 0 < sent == len(arrived)
            assert sent + len(unsent) == len(packets)
            gone = set(arrived)
            assert unsent == [packet for packet in packets if packet not in gone]
            if offload == "off":
                assert unsent == packets[sent:]


async def test_going_on_with_what_was_not_sent() -> None:
    """As a program may do it, with flows that are merged."""
    runs = [written(run_of(Packet(ports=(port, 9)), [1000] * 5)) for port in range(50)]
    packets = [packet for turn in zip(*runs, strict=True) for packet in turn]
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arrived: list[bytes] = []
    with far:
        far.setblocking(False)
        async with Queue.from_fd(near.detach(), offload="split") as queue:
            waiting_ones, cancelled = packets, 0
            while waiting_ones:
                task = asyncio.create_task(queue.send_many(waiting_ones))
                await asyncio.sleep(0)
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError as error:
                    _, waiting_ones = told(error)
                    cancelled += 1
                else:
                    waiting_ones = []
                with contextlib.suppress(BlockingIOError):
                    while True:
                        arrived += split(far.recv(70_000))
    assert cancelled
    for run in runs:
        members = set(run)
        assert [packet for packet in arrived if packet in members] == run

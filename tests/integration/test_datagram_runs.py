"""Runs of datagrams in one buffer, both ways."""

import asyncio
from typing import Any

import pytest

from aiotun import DeviceClosedError, PacketError
from aiotun.runs import Pool, Run

from .rig import waiting
from .test_datagrams import collect, each_version, need_runs, nobody, numbered, opened, pair

SOON = 5.0


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, SOON)


def run_with(datagrams: list[bytes], room: int = 0) -> Run:
    """A run of datagrams of one size, but for the last, with room between them."""
    size = len(datagrams[0])
    stride = size + room
    buffer = bytearray(b"\xa5" * (room + stride * len(datagrams)))
    for index, datagram in enumerate(datagrams):
        at = room + index * stride
        buffer[at : at + len(datagram)] = datagram
    return Run(memoryview(buffer), room, stride, size, len(datagrams[-1]), len(datagrams))


async def received(sock: Any, count: int, pool: Pool) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        run, _ = await soon(sock.recv_run(pool))
        with run:
            got += run.segments()
    return got


@each_version
@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("room", [0, 16])
@pytest.mark.parametrize(
    "sizes", [[1000] * 45, [1000] * 44 + [7], [100], [0], [9000] * 20 + [1], [200] * 150, [50, 0]]
)
async def test_a_run_arrives_as_it_was_sent(
    version: int, offload: bool, room: int, sizes: list[int]
) -> None:
    async with pair(version, offload=offload) as (one, other):
        sent = numbered(sizes)
        assert await soon(one.send_run(run_with(sent, room), other.address)) == len(sent)
        assert await received(other, len(sent), Pool(1)) == sent
        assert one.stats.datagrams_sent == other.stats.datagrams_received == len(sent)


async def test_a_run_is_one_call_each_way() -> None:
    need_runs()
    async with pair() as (one, other):
        sent = numbered([1400] * 44 + [900])
        await soon(one.send_run(run_with(sent), other.address))
        run, source = await soon(other.recv_run(Pool(1)))
        with run:
            assert (run.start, run.stride, run.size, run.last) == (0, 1400, 1400, 900)
            assert run.segments() == sent
        assert source == one.address
        assert (one.stats.runs_sent, other.stats.runs_received) == (1, 1)


async def test_what_another_method_left_of_a_run_comes_first() -> None:
    need_runs()
    pool = Pool(1)
    async with pair() as (one, other):
        sent = numbered([1000] * 9 + [50])
        await soon(one.send_run(run_with(sent), other.address))
        await soon(one.send(b"after", other.address))
        assert (await soon(other.recv()))[0] == sent[0]
        run, source = await soon(other.recv_run(pool))
        with run:
            assert (run.segments(), source) == (sent[1:], one.address)
        assert (await soon(other.recv()))[0] == b"after"


async def test_with_no_buffer_free_nothing_is_read() -> None:
    pool = Pool(1)
    async with pair() as (one, other):
        held = Run(pool.free.pop(), 0, 0, 0, 0, 1, pool)
        await soon(one.send(b"data", other.address))
        task = await waiting(other.recv_run(pool))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        assert other.stats.datagrams_received == 0
        held.release()
        run, _ = await soon(task)
        with run:
            assert run.segments() == [b"data"]


async def test_closing_wakes_who_waits_for_a_buffer_or_a_datagram() -> None:
    pool = Pool(1)
    async with opened() as sock:
        for_datagram = await waiting(sock.recv_run(pool))
        pool.free.pop()
        for_buffer = await waiting(sock.recv_run(pool))
        sock.close()
        for task in (for_datagram, for_buffer):
            with pytest.raises(DeviceClosedError):
                await soon(task)


async def test_a_cancelled_task_loses_nothing_and_holds_no_buffer() -> None:
    pool = Pool(1)
    async with pair() as (one, other):
        task = await waiting(other.recv_run(pool))
        await soon(one.send(b"data", other.address))
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            run, _ = task.result()
            with run:
                assert run.segments() == [b"data"]
        else:
            assert await collect(other, 1) == [b"data"]
        assert len(pool.free) == 1


async def test_an_icmp_error_for_the_destination_is_told_before_anything_is_sent() -> None:
    async with opened() as sock:
        where = await nobody()
        run = run_with(numbered([100] * 3))
        await soon(sock.send_run(run, where))

        async def send_until_refused() -> None:
            while True:
                await sock.send_run(run, where)
                await asyncio.sleep(0)

        with pytest.raises(PacketError, match="an earlier datagram") as caught:
            await soon(send_until_refused())
        assert caught.value.sent == 0


async def test_a_run_outside_its_buffer_and_a_pool_of_another_kind_are_refused() -> None:
    async with pair() as (one, other):
        run = Run(memoryview(bytearray(100)), 0, 50, 50, 51, 2)
        with pytest.raises(ValueError, match="ends outside its buffer of 100 bytes"):
            await one.send_run(run, other.address)
        with pytest.raises(TypeError, match=r"aiotun\.runs\.Pool, not list"):
            await one.recv_run([])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not a valid IP address"):
            await one.send_run(run, ("localhost", 1))

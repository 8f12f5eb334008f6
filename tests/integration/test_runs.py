"""Runs with the real kernel: what is received, what is sent, and that nothing is lost."""

import asyncio
import itertools
import socket
import struct
from typing import Any

import pytest

import aiotun
from aiotun import DeviceClosedError, DeviceLostError, LinkDownError, PacketError, PacketStats
from aiotun._queue.packetio import BUDGET
from aiotun.runs import Pool, Run
from aiotun.testing import FaultInjector, memory_pair

from ..helpers import ip, wait_until
from ..test_gso import Packet, run_of, written
from .rig import KINDS, OURS, PORT, THEIRS, needs_uso, number, rest, rig, udp, waiting
from .test_capturing import Recorder, writer  # noqa: F401 - a fixture

SOON = 5.0  # seconds; everything below takes much less

each_kind = pytest.mark.parametrize("kind", KINDS)


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, SOON)


async def numbers(io: aiotun.PacketIO, pool: Pool, **options: Any) -> list[int]:
    """Receive a run, and return the numbers of its packets."""
    with await soon(io.recv_run(pool, **options)) as run:
        return [number(packet) for packet in run.segments()]


class TestReceiving:
    @each_kind
    async def test_every_packet_comes_once_and_in_order(self, kind: str) -> None:
        pool = Pool(1)
        async with rig(kind) as r:
            found: list[int] = []
            for _ in range(8):
                r.inject(100)
                while len(found) < r.count:
                    found += await numbers(r.io, pool)
            assert found == list(range(800))
            assert await rest(r.io, 0) == []

    async def test_a_super_packet_is_one_run(self) -> None:
        async with rig("split") as r:
            r.inject(20)
            with await soon(r.io.recv_run(Pool(1))) as run:
                assert (run.count, run.size, run.last) == (20, 32, 32)
                assert (run.start, run.stride) == (16, 64)
                assert [number(packet) for packet in run.segments()] == list(range(20))

    @pytest.mark.parametrize("kind", ["device", "split"])
    async def test_single_packets_are_gathered_until_one_of_another_size(self, kind: str) -> None:
        pool = Pool(2)
        async with rig(kind) as r:
            r.sock.setsockopt(socket.IPPROTO_UDP, 103, 0)
            sizes = [100] * 5 + [50, 200, 200, 201]
            for index, size in enumerate(sizes):
                r.sock.send(struct.pack("!I", index).ljust(size, b"x"))
            assert await numbers(r.io, pool) == [0, 1, 2, 3, 4, 5]
            assert await numbers(r.io, pool) == [6, 7]
            assert r.tun.queues[0].port.pending == 1
            assert await rest(r.io, 1) == [8]

    @pytest.mark.parametrize("kind", ["device", "split"])
    async def test_what_ended_a_run_is_the_next_packet_of_any_method(self, kind: str) -> None:
        pool = Pool(1)
        async with rig(kind) as r:
            r.sock.setsockopt(socket.IPPROTO_UDP, 103, 0)

            def inject() -> None:
                for size in (100, 200, 300):
                    r.sock.send(struct.pack("!I", size).ljust(size, b"x"))

            inject()
            assert await numbers(r.io, pool) == [100]
            assert number(r.io.recv_nowait()) == 200
            assert await rest(r.io, 1) == [300]
            inject()
            assert await numbers(r.io, pool) == [100]
            assert [number(each) for each in await soon(r.io.recv_many())] == [200, 300]
            inject()
            assert await numbers(r.io, pool) == [100]
            buffer = bytearray(2000)
            await soon(r.io.recv_into(buffer))
            assert number(bytes(buffer)) == 200
            assert await numbers(r.io, pool) == [300]

    async def test_a_limit_below_a_super_packets_segments_makes_several_runs(self) -> None:
        pool = Pool(1)
        async with rig("split") as r:
            r.inject(20)
            found = [await numbers(r.io, pool, limit=8) for _ in range(3)]
            assert [len(each) for each in found] == [8, 8, 4]
            assert list(itertools.chain(*found)) == list(range(20))
            r.inject(20)
            assert len(await numbers(r.io, pool, limit=8)) == 8
            assert await rest(r.io, 12) == list(range(28, 40))

    @pytest.mark.parametrize(("kind", "lost"), [("device", 1), ("split", 20)])
    async def test_the_kept_packet_is_counted_when_the_queue_closes(
        self, kind: str, lost: int
    ) -> None:
        async with rig(kind) as r:
            r.sock.setsockopt(socket.IPPROTO_UDP, 103, 0)
            r.sock.send(b"first")
            if kind == "split":
                needs_uso(r.tun)
                r.sock.setsockopt(socket.IPPROTO_UDP, 103, 4)
                r.inject(20)
            else:
                r.sock.send(b"longer packet")
            with await soon(r.io.recv_run(Pool(1))) as run:
                assert run.count == 1
            r.tun.close()
            assert r.tun.stats == PacketStats(segments_dropped=lost)

    async def test_a_kept_packet_wakes_who_waits(self) -> None:
        async with rig("device") as r:
            pool = Pool(2)
            tasks = [await waiting(r.io.recv_run(pool)) for _ in range(2)]
            for size in (100, 200):
                r.sock.send(bytes(size))
            for task, size in zip(tasks, (128, 228), strict=True):
                with await soon(task) as run:
                    assert (run.count, run.size) == (1, size)

    async def test_room_and_padding_are_as_asked_for(self) -> None:
        async with rig("device") as r:
            r.sock.send(bytes(101))
            with await soon(r.io.recv_run(Pool(1), before=4, after=8, align=8)) as run:
                assert (run.start, run.size, run.stride) == (4, 129, 4 + 136 + 8)
                assert run.buffer[4 + 129 : 4 + 136] == bytes(7)

    async def test_padding_ends_at_the_mtu(self) -> None:
        async with rig("device", mtu=1417) as r:
            r.sock.send(bytes(1417 - 28))
            with await soon(r.io.recv_run(Pool(1))) as run:
                assert run.stride == 1417 + 32

    @pytest.mark.parametrize("kind", ["device", "split"])
    async def test_a_captured_run_is_recorded_packet_by_packet(
        self,
        kind: str,
        writer: Recorder,  # noqa: F811 - the fixture
    ) -> None:
        pool = Pool(1)
        async with rig(kind) as r:
            port = r.sock.getsockname()[1]
            run = run_with([udp(THEIRS, PORT, OURS, port, b"answer")] * 3)
            with r.tun.capture(writer):
                r.inject(20)
                found: list[int] = []
                while len(found) < 20:
                    found += await numbers(r.io, pool)
                await soon(r.io.send_run(run))
            r.inject(1)
            assert await numbers(r.io, pool) == [20]
        incoming = [packet for packet, way in writer.seen if way == "in"]
        assert [number(packet) for packet in incoming] == list(range(20))
        assert [packet for packet, way in writer.seen if way == "out"] == run.segments()

    async def test_other_receivers_give_runs_too(self) -> None:
        near, far = memory_pair()
        async with near, FaultInjector(far) as faults:
            for size in (100, 100, 50):
                await near.send(udp(OURS, 1, THEIRS, 2, bytes(size)))
            found = 0
            while found < 3:
                with await soon(faults.recv_run(Pool(1))) as run:
                    found += run.count
            run = run_with([udp(OURS, 1, THEIRS, 2, b"x")] * 3)
            assert await soon(faults.send_run(run)) == 3
            with await soon(near.recv_run(Pool(1))) as got:
                assert got.segments() == run.segments()

    async def test_frames_come_in_runs(self) -> None:
        near, far = memory_pair("tap")
        frames = written(run_of(Packet(protocol="udp", link=bytes(12)), [300] * 4))
        async with near, far:
            await near.send_many(frames)
            with await soon(far.recv_run(Pool(1))) as run:
                assert run.segments() == frames

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"before": -1}, ValueError),
            ({"after": 1.5}, TypeError),
            ({"align": 0}, ValueError),
            ({"limit": 0}, ValueError),
            ({"limit": 257}, ValueError),
            ({"limit": True}, TypeError),
        ],
    )
    async def test_invalid_arguments_are_refused_and_read_nothing(
        self, options: dict[str, Any], error: type[Exception]
    ) -> None:
        near, far = memory_pair()
        async with near, far:
            await near.send(udp(OURS, 1, THEIRS, 2))
            with pytest.raises(error, match=next(iter(options))):
                await far.recv_run(Pool(1), **options)
            with pytest.raises(TypeError, match=r"aiotun\.runs\.Pool, not list"):
                await far.recv_run([])  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"Pool\(\.\.\., size=131194\)"):
                await far.recv_run(Pool(1), before=65_581)
            assert far.recv_nowait()

    @pytest.mark.parametrize("options", [{"offload": "raw"}, {"packet_info": True}])
    async def test_packets_with_a_header_are_no_runs(self, options: dict[str, Any]) -> None:
        async with aiotun.open_tun("raw0", **options) as tun:
            with pytest.raises(ValueError, match="without a header"):
                await tun.recv_run(Pool(1))


class TestWaitingForABuffer:
    @each_kind
    async def test_with_none_free_nothing_is_read(self, kind: str) -> None:
        pool = Pool(1)
        async with rig(kind) as r:
            r.inject(20)
            first = await soon(r.io.recv_run(pool, limit=5))
            task = await waiting(r.io.recv_run(pool, limit=100))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done()
            first.release()
            with await soon(task) as run:
                assert number(run.view(0)) == 5
            left = 20 - 5 - run.count
            assert await rest(r.io, left) == list(range(20 - left, 20))

    @each_kind
    async def test_a_cancelled_task_loses_nothing_and_holds_no_buffer(self, kind: str) -> None:
        pool = Pool(1)
        async with rig(kind) as r:
            held = Run(pool.free.pop(), 0, 0, 0, 0, 1, pool)
            for_buffer = await waiting(r.io.recv_run(pool))
            for_buffer.cancel()
            await asyncio.wait([for_buffer])
            held.release()
            for_packet = await waiting(r.io.recv_run(pool))
            r.inject(20)
            for_packet.cancel()
            await asyncio.wait([for_packet])
            found: list[int] = []
            if not for_packet.cancelled():
                with for_packet.result() as run:
                    found = [number(packet) for packet in run.segments()]
            assert found + await rest(r.io, 20 - len(found)) == list(range(20))
            assert len(pool.free) == 1

    async def test_an_idle_queue_does_not_hold_the_only_buffer(self) -> None:
        pool = Pool(1)
        async with rig("device") as r, aiotun.open_tun("idle0") as idle:
            held = Run(pool.free.pop(), 0, 0, 0, 0, 1, pool)
            tasks = [await waiting(io.recv_run(pool)) for io in (idle, r.io)]
            held.release()
            r.inject(1)
            with await soon(tasks[1]) as run:
                assert run.count == 1
            assert not tasks[0].done()
            tasks[0].cancel()

    async def test_tasks_get_runs_in_the_order_they_began_to_wait(self) -> None:
        pool = Pool(1)
        async with rig("device") as r:
            held = Run(pool.free.pop(), 0, 0, 0, 0, 1, pool)
            tasks = [await waiting(r.io.recv_run(pool, limit=1)) for _ in range(3)]
            r.inject(3)
            held.release()
            for place, task in enumerate(tasks):
                with await soon(task) as run:
                    assert number(run.view(0)) == place

    @each_kind
    @pytest.mark.parametrize("end", ["close", "delete"])
    async def test_the_end_of_the_device_wakes_who_waits_for_a_buffer(
        self, kind: str, end: str
    ) -> None:
        pool = Pool(1)
        async with rig(kind) as r:
            pool.free.pop()
            task = await waiting(r.io.recv_run(pool))
            if end == "close":
                r.tun.close()
                with pytest.raises(DeviceClosedError):
                    await soon(task)
                return
            # The loop watches the fd only for somebody who waits for a packet.
            other = await waiting(r.io.recv())
            ip("link", "del", r.tun.name)
            for each in (other, task):
                with pytest.raises(DeviceLostError):
                    await soon(each)

    async def test_the_loop_has_turns_while_runs_never_end(self) -> None:
        pool = Pool(1)
        async with rig("split", txqueuelen=4000) as r:
            r.inject(BUDGET * 6)
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            found = 0
            while found < r.count:
                with await r.io.recv_run(pool) as run:
                    found += run.count
            task.cancel()
            assert turns >= 4


def run_with(packets: list[bytes], before: int = 0, after: int = 0) -> Run:
    """A run of packets of one size, but for the last."""
    size, last = len(packets[0]), len(packets[-1])
    stride = before + size + after
    buffer = bytearray(b"\xa5" * (before + stride * len(packets)))
    for index, packet in enumerate(packets):
        at = before + index * stride
        buffer[at : at + len(packet)] = packet
    return Run(memoryview(buffer), before, stride, size, last, len(packets))


def datagrams(count: int, size: int = 100) -> list[bytes]:
    return [
        udp(THEIRS, PORT, OURS, 5, struct.pack("!I", each).ljust(size)) for each in range(count)
    ]


class TestSending:
    @pytest.mark.parametrize("kind", ["device", "group", "split", "split group"])
    async def test_the_kernel_gets_every_packet_in_order(self, kind: str) -> None:
        async with rig(kind) as r:
            port = r.sock.getsockname()[1]
            packets = written(run_of(Packet(protocol="udp", ports=(PORT, port)), [1000] * 29 + [5]))
            addressed = [udp(THEIRS, PORT, OURS, port, packet[28:]) for packet in packets]
            run = run_with(addressed, before=16, after=16)
            assert await soon(r.io.send_run(run)) == 30
            assert [r.sock.recv(2000) for _ in range(30)] == [each[28:] for each in packets]

    async def test_packets_are_merged_as_by_send_many(self) -> None:
        """A raw device sees what one in split mode writes."""
        near, far = memory_pair()
        packets = written(run_of(Packet(), [1000] * 20))
        async with near, far:
            queue = aiotun.Queue.from_fd(near.queues[0].detach(), offload="split")
            other = aiotun.Queue.from_fd(far.queues[0].detach(), offload="raw")
            async with queue, other:
                assert await soon(queue.send_run(run_with(packets, 32, 16))) == 20
                assert await soon(other.recv()) == aiotun.offload.merge(packets)[0]

    async def test_before_and_sizes_choose_what_is_sent(self) -> None:
        near, far = memory_pair()
        packets = datagrams(3)
        padded = [b"head" + packet + bytes(7) for packet in packets]
        async with near, far:
            sizes = [len(packet) for packet in packets]
            assert await soon(near.send_run(run_with(padded), before=4, sizes=sizes)) == 3
            assert await soon(far.recv_many()) == packets
            with pytest.raises(ValueError, match="needs one size for each packet"):
                await near.send_run(run_with(padded), sizes=[1])
            with pytest.raises(ValueError, match="outside the buffer"):
                await near.send_run(run_with(padded), sizes=[1, 1, 1000])

    async def test_it_waits_for_room_and_sends_the_rest(self) -> None:
        near, far = memory_pair()
        async with near, far:
            run = run_with(datagrams(250, 3000))
            task = await waiting(near.send_run(run))
            found: list[bytes] = []
            while len(found) < 250:
                found += await soon(far.recv_many())
            assert await soon(task) == 250
            assert found == run.segments()

    async def test_a_run_of_more_packets_than_a_budget(self) -> None:
        near, far = memory_pair()
        async with near, far:
            run = run_with(datagrams(700, 100))
            task = asyncio.create_task(near.send_run(run))
            found: list[bytes] = []
            while len(found) < 700:
                found += await soon(far.recv_many())
            assert await soon(task) == 700
            assert found == run.segments()

    async def test_an_error_says_how_many_were_sent(self) -> None:
        near, far = memory_pair()
        async with near, far:
            packets = datagrams(4)
            run = run_with([*packets[:2], b"\0" * len(packets[0]), packets[3]])
            with pytest.raises(PacketError) as caught:
                await soon(near.send_run(run))
            assert caught.value.sent == 2
            assert await soon(far.recv_many()) == packets[:2]

    async def test_a_cancelled_send_says_how_many_were_sent(self) -> None:
        near, far = memory_pair()
        async with near, far:
            task = await waiting(near.send_run(run_with(datagrams(250, 3000))))
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert 0 < caught.value.sent < 250  # type: ignore[attr-defined]

    async def test_a_link_that_is_down_is_an_error(self) -> None:
        async with rig("split") as r:
            await r.tun.link.down()
            with pytest.raises(LinkDownError) as caught:
                await r.tun.send_run(run_with(datagrams(3)))
            assert caught.value.sent == 0

    async def test_a_closed_device_is_an_error(self) -> None:
        near, far = memory_pair()
        async with far:
            near.close()
            with pytest.raises(DeviceClosedError):
                await near.send_run(run_with(datagrams(3)))


async def test_what_is_received_can_be_sent_on() -> None:
    """Through two devices, in both directions at once."""
    async with rig("split") as r:
        near, far = memory_pair()
        async with near, far:
            pool = Pool(2)

            async def forward() -> None:
                while True:
                    with await r.io.recv_run(pool) as run:
                        await near.send_run(run)

            task = asyncio.create_task(forward())
            r.inject(100)
            found: list[int] = []
            while len(found) < 100:
                found += [number(packet) for packet in await soon(far.recv_many())]
            assert found == list(range(100))
            task.cancel()
            await wait_until(task.done)
            assert len(pool.free) == 2

"""Orders of events that once lost a packet, a wake-up or an fd, or blocked the loop."""

import asyncio
import contextlib
import ctypes
import errno
import gc
import itertools
import os
import pickle
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import uvloop

import aiotun
from aiotun import DeviceClosedError, DeviceLostError, LinkDownError, PacketError, Queue
from aiotun._queue.packetio import BUDGET
from aiotun._queue.port import PacketFormat
from aiotun._queue.waiting import Line, Waiter
from aiotun.capture import PcapWriter
from aiotun.testing import FaultInjector, memory_pair

from ..helpers import ip, wait_until
from .rig import OURS, PORT, THEIRS, number, rig, udp, waiting
from .test_offload import sealed
from .test_sending import fill, shaped_tap

SOON = 5.0  # seconds; everything below takes much less


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, SOON)


# --- The rest of a super-packet ------------------------------------------------------------------


async def test_a_device_gets_the_rest_that_its_queue_left() -> None:
    async with rig("split", queues=2) as r:
        for queue in r.tun.queues:
            other = await waiting(queue.recv())
            r.inject(10)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(other), 0.2)
            if other.done():
                break
            other.cancel()
            r.count -= 10
            assert [number(await soon(r.tun.recv())) for _ in range(10)] == list(range(10))
        assert number(await other) == 0
        assert [number(await soon(r.tun.recv())) for _ in range(9)] == list(range(1, 10))


@pytest.mark.parametrize("end", ["close", "detach"])
async def test_a_queue_that_ends_with_a_rest_takes_no_other_along(end: str) -> None:
    async with rig("split", queues=2) as r:
        first = await waiting(r.tun.recv())
        r.inject(10)
        assert number(await soon(first)) == 0
        (queue,) = [queue for queue in r.tun.queues if queue.port.pending]
        (other,) = [other for other in r.tun.queues if other is not queue]
        if end == "close":
            queue.close()
        else:
            os.close(queue.detach())
        assert r.tun.stats.segments_dropped == 9
        task = await waiting(r.tun.recv())
        # The kernel sends a flow's packets to the queue that the flow came from.
        await other.send(udp(THEIRS, PORT, OURS, r.sock.getsockname()[1]))
        r.count = 0
        r.inject(1)
        assert number(await soon(task)) == 0
        assert not r.tun.closed


async def test_a_rest_that_recv_nowait_left_is_received() -> None:
    async with rig("split") as r:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(r.tun.recv(), 0.02)
        r.inject(10)
        assert number(r.tun.recv_nowait()) == 0
        assert [number(await soon(r.tun.recv())) for _ in range(9)] == list(range(1, 10))


async def test_a_device_gets_the_rest_of_a_packet_that_was_cut() -> None:
    async with rig("split", queues=2) as r:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(r.tun.recv(), 0.02)  # from now on the loop watches both
        r.inject(10)
        (queue,) = select.select(r.tun.queues, [], [], SOON)[0]
        with pytest.raises(aiotun.PacketTruncatedError):
            await queue.recv_into(bytearray(4))
        assert number(await soon(r.tun.recv())) == 1


async def test_a_wrong_loop_does_not_stop_the_right_one() -> None:
    async with rig("split") as r:
        r.inject(10)
        assert number(await soon(r.tun.recv())) == 0

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                asyncio.run(r.tun.recv())

        await asyncio.to_thread(elsewhere)
        assert [number(await soon(r.tun.recv())) for _ in range(9)] == list(range(1, 10))


@pytest.mark.parametrize("kind", ["memory", "device", "group"])
async def test_another_loop_is_refused_by_a_fault_injector_too(kind: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        if kind == "memory":
            device, other = memory_pair()
            stack.push_async_callback(other.aclose)
        else:
            device = (await stack.enter_async_context(rig(kind))).tun
        faulty = await stack.enter_async_context(FaultInjector(device))
        task = await waiting(faulty.recv())
        await asyncio.sleep(0)  # for the task that reads

        def elsewhere() -> None:
            for way in (faulty.recv, lambda: faulty.send_many([udp(THEIRS, 1, OURS, 2)])):
                with pytest.raises(RuntimeError, match="another event loop"):
                    asyncio.run(soon(way()))

        await asyncio.to_thread(elsewhere)
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("kind", ["device", "group", "split", "faults"])
@pytest.mark.parametrize("packet", [20, [0x45] * 20, "text", None])
async def test_what_is_no_buffer_is_no_packet(kind: str, packet: Any) -> None:
    async with one_waiting_packet(kind) as io:
        for way in (io.send, lambda packet: io.send_many([packet])):
            with pytest.raises(TypeError):
                await soon(way(packet))
        with pytest.raises(TypeError):
            io.send_nowait(packet)


# --- A buffer is judged before a packet is taken -------------------------------------------------


@contextlib.asynccontextmanager
async def one_waiting_packet(kind: str) -> AsyncIterator[Any]:
    if kind == "faults":
        one, other = memory_pair()
        async with FaultInjector(one) as faulty, other:
            await other.send(udp(THEIRS, 1, OURS, 2, bytes(4)))
            yield faulty
    else:
        async with rig(kind) as r:
            r.inject()
            yield r.io


@pytest.mark.parametrize("kind", ["device", "split", "split group", "faults"])
async def test_a_buffer_that_will_not_do_costs_no_packet(kind: str) -> None:
    # Only a module of the interpreter's own tests can make such buffers.
    testing = pytest.importorskip("_testbuffer")
    fortran = testing.ndarray(
        [0] * 64, shape=[8, 8], format="B", flags=testing.ND_FORTRAN | testing.ND_WRITABLE
    )
    async with one_waiting_packet(kind) as io:
        for buffer in (fortran, memoryview(bytearray(64))[::2], bytes(64), "text", None):
            with pytest.raises((TypeError, ValueError)):
                await soon(io.recv_into(buffer))
        assert await soon(io.recv_into(memoryview((ctypes.c_uint8 * 8 * 8)()))) == 32


@pytest.mark.parametrize("kind", ["device", "split", "split group", "faults"])
@pytest.mark.parametrize(
    "buffer", [bytearray(), memoryview(bytearray(9))[9:]], ids=["bytearray", "memoryview"]
)
async def test_an_empty_buffer_truncates(kind: str, buffer: Any) -> None:
    async with one_waiting_packet(kind) as io:
        with pytest.raises(aiotun.PacketTruncatedError):
            await soon(io.recv_into(buffer))
        assert io.stats.truncated == 1
        with pytest.raises(BlockingIOError):
            io.recv_nowait()


# --- Capturing -----------------------------------------------------------------------------------


async def test_what_waits_to_be_sent_is_recorded_when_it_goes(tmp_path: Path) -> None:
    """Both a packet that waited when the capture began, and those that its call sent later."""
    seen = 0

    class Counting(PcapWriter):
        def record(self, packet: Any, direction: Any) -> None:
            nonlocal seen
            seen += direction == "out"
            super().record(packet, direction)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    device = _OneQueue(Queue.from_fd(ours.detach(), offload="split"))
    packet = udp(THEIRS, 1, OURS, 2, bytes(1000))
    arrived = 0

    def drain() -> None:
        nonlocal arrived
        with contextlib.suppress(BlockingIOError):
            while theirs.recv(70_000):
                arrived += 1

    with theirs, Counting(tmp_path / "out.pcap") as writer:
        async with device.queue:
            many = await waiting(device.queue.send_many([packet] * 1000))
            drain()
            before = arrived
            capture = device.capture(writer)
            while not many.done():
                await asyncio.sleep(0)
                drain()
            drain()
            assert await many == 1000
            capture.stop()
            assert arrived == 1000
            assert seen == 1000 - before
            assert before > 0


class _OneQueue(aiotun.TunDevice):
    """A device whose only queue is a socket."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.queues = (queue,)


async def test_capturing_changes_no_traffic(tmp_path: Path) -> None:
    """Consecutive segments reach the kernel as one super-packet, recorded or not."""
    async with rig("split") as r:
        port = r.sock.getsockname()[1]
        plain = [udp(THEIRS, PORT, OURS, port, n.to_bytes(8, "big")) for n in range(64)]
        segments = [sealed(packet) for packet in plain]

        async def reach() -> int:
            before = (await r.tun.link.stats()).rx_packets
            assert await r.tun.send_many(segments) == 64
            return (await r.tun.link.stats()).rx_packets - before

        uncaptured = await reach()
        with PcapWriter(tmp_path / "x.pcap") as writer, r.tun.capture(writer):
            assert await reach() == uncaptured == 1


# --- Fairness ------------------------------------------------------------------------------------


async def test_one_packet_is_not_looked_for_by_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand tasks wait on a device of two queues."""
    async with rig(queues=2) as r:
        tasks = [asyncio.create_task(r.tun.recv()) for _ in range(1000)]
        await asyncio.sleep(0)
        reads = 0
        for queue in r.tun.queues:
            honest = queue._read

            def counted(fd: int, size: int, honest: Callable[..., bytes] = honest) -> bytes:
                nonlocal reads
                reads += 1
                return honest(fd, size)

            queue._read = counted
        r.inject()
        done, rest = await asyncio.wait(tasks, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
        assert [number(task.result()) for task in done] == [0]
        for task in rest:
            task.cancel()
        await asyncio.wait(rest)
        assert reads <= 3


async def test_a_task_woken_in_vain_does_not_overtake_an_older_one() -> None:
    """The older one waits for a queue; the other for the device, and another queue woke it."""
    async with rig(queues=2) as r:
        first, second = r.tun.queues
        port = r.sock.getsockname()[1]

        async def feed(queue: Queue) -> None:
            # The kernel sends a flow's packets to the queue that the flow came from.
            await queue.send(udp(THEIRS, PORT, OURS, port))
            r.sock.recv(1)
            r.inject()

        older = await waiting(second.recv())
        younger = [await waiting(r.tun.recv()) for _ in range(2)]
        await feed(first)  # resumes both of the device's tasks, for one packet
        await soon(younger[0])
        await asyncio.sleep(0.01)
        assert not younger[1].done()
        await feed(second)
        assert number(await soon(older)) == 1
        assert not younger[1].done()
        younger[1].cancel()


# Without and with offload="split".
LARGEST = (PacketFormat("tun").batch, PacketFormat("tun", "split").batch)


@pytest.mark.parametrize("kind", ["device", "split", "split group"])
async def test_no_batch_is_larger_than_the_budget(kind: str) -> None:
    most = LARGEST[kind.startswith("split")]
    async with rig(kind, txqueuelen=5000) as r:
        r.inject(3 * most)
        got: list[int] = []
        while len(got) < 3 * most:
            batch = await soon(r.tun.recv_many(2**70))
            assert len(batch) <= most
            got += map(number, batch)
        assert got == list(range(3 * most))


@pytest.mark.parametrize("kind", ["device", "group", "split", "split group"])
async def test_packets_that_are_cut_leave_the_loop_its_turns(kind: str) -> None:
    async with rig(kind, txqueuelen=5000) as r:
        r.inject(BUDGET * 8)
        turns = 0

        async def turning() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(turning())
        for _ in range(BUDGET * 8):
            with pytest.raises(aiotun.PacketTruncatedError):
                await r.tun.recv_into(bytearray(4))
        other.cancel()
        assert turns >= 4


@pytest.mark.parametrize("limit", [1.5, "64", None])
async def test_a_limit_that_is_no_int_is_refused(limit: Any) -> None:
    async with rig() as r:
        for method in (r.tun.recv_many, r.tun.batches):
            with pytest.raises(TypeError, match="limit must be an int"):
                method(limit)


@pytest.mark.parametrize("offload", ["off", "split"])
async def test_a_long_list_leaves_the_loop_its_turns(offload: Any) -> None:
    async with rig(offload=offload) as r:
        most = LARGEST[offload == "split"]
        packets = [udp(THEIRS, PORT, OURS, 1, n.to_bytes(4, "big")) for n in range(most * 20)]
        turns = 0

        async def turning() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(turning())
        assert await r.tun.send_many(packets) == len(packets)
        other.cancel()
        assert turns >= 19

        task = asyncio.create_task(r.tun.send_many(packets))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        sent = caught.value.sent  # type: ignore[attr-defined]  # promised on foreign classes, too
        assert 0 < sent < len(packets)
        assert sent % most == 0


@pytest.mark.parametrize("kind", ["device", "group", "split", "split group", "memory"])
async def test_closing_between_the_turns_of_a_long_batch(kind: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        if kind == "memory":
            io, other = memory_pair()
            stack.push_async_callback(other.aclose)
        else:
            io = (await stack.enter_async_context(rig(kind))).tun
        most = LARGEST[kind.startswith("split")]
        task = asyncio.create_task(io.send_many([udp(THEIRS, 1, OURS, 2)] * most * 2))
        await asyncio.sleep(0)
        await io.aclose()
        with pytest.raises(DeviceClosedError) as caught:
            await soon(task)
        assert 0 < caught.value.sent <= most


async def test_a_list_that_changes_while_it_is_sent() -> None:
    async with rig() as r:
        packets = [udp(THEIRS, 1, OURS, 2)] * BUDGET * 3
        task = asyncio.create_task(r.tun.send_many(packets))
        await asyncio.sleep(0)
        packets.clear()
        assert await soon(task) == BUDGET * 3


@pytest.mark.parametrize("kind", ["device", "group", "split", "split group", "memory"])
async def test_what_stands_before_a_released_view_is_sent(kind: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        if kind == "memory":
            io, other = memory_pair()
            stack.push_async_callback(other.aclose)
            stack.push_async_callback(io.aclose)
        else:
            io = (await stack.enter_async_context(rig(kind))).tun
        good, view = udp(THEIRS, 1, OURS, 2), memoryview(b"E")
        view.release()
        with pytest.raises((ValueError, TypeError)) as caught:  # as split has it
            await soon(io.send_many([good, bytearray(good), good, view, good]))
        assert caught.value.sent == 3  # type: ignore[attr-defined]  # promised on foreign classes


async def test_cancelling_many_waiters_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order: each cancellation looks at a few other waiters at most."""
    looked = 0
    honest = Waiter.done

    def done(waiter: Waiter) -> bool:
        nonlocal looked
        looked += 1
        return honest(waiter)

    async with rig() as r:
        for order in (reversed, iter, lambda tasks: random.Random(1).sample(tasks, len(tasks))):
            tasks = [asyncio.create_task(r.tun.recv()) for _ in range(3000)]
            await asyncio.sleep(0)
            looked = 0
            with monkeypatch.context() as patched:
                patched.setattr(Waiter, "done", done)
                patched.setattr(Line, "remove", None)  # it would look at all waiters
                for task in order(tasks):
                    task.cancel()
                await asyncio.wait(tasks)
            assert looked < 8 * len(tasks)


async def test_tasks_that_come_and_go_leave_nothing_in_the_line() -> None:
    """Two take turns, so that each is cancelled while the other stands behind it."""
    async with rig() as r:
        oldest = await waiting(r.tun.recv())
        previous = await waiting(r.tun.recv())
        for _ in range(1000):
            task = await waiting(r.tun.recv())
            previous.cancel()
            previous = task
        assert len(r.tun.queues[0]._receivers) < 10
        r.inject(2)
        assert number(await soon(oldest)) == 0
        assert number(await soon(previous)) == 1


# --- Sending to a link that goes down ------------------------------------------------------------


async def test_a_send_that_waits_hears_that_the_link_is_down() -> None:
    async with shaped_tap(rate="8kbit") as (tap, frame, _):
        fill(tap, frame)
        one = await waiting(tap.send(frame))
        many = await waiting(tap.send_many([frame] * 9))
        started = time.monotonic()
        await tap.link.down()
        with pytest.raises(LinkDownError, match="the link is down"):
            await soon(one)
        with pytest.raises(LinkDownError) as caught:
            await soon(many)
        assert caught.value.sent == 0
        assert time.monotonic() - started < 2


async def test_a_send_that_waits_hears_of_a_link_that_others_renamed() -> None:
    async with shaped_tap(rate="8kbit") as (tap, frame, _):
        fill(tap, frame)
        task = await waiting(tap.send(frame))
        ip("link", "set", tap.name, "name", "another")
        ip("tuntap", "add", tap.name, "mode", "tun")  # the name is another's now, which is down
        assert await asyncio.wait([task], timeout=1) == (set(), {task})
        ip("link", "set", "another", "down")
        with pytest.raises(LinkDownError):
            await soon(task)


async def test_a_send_that_waits_on_a_queue_from_elsewhere_hears_that_the_link_is_down() -> None:
    async with shaped_tap(rate="8kbit") as (tap, frame, _):
        try:
            sent: Queue = pickle.loads(ForkingPickler.dumps(tap.queues[0]))
        finally:
            resource_sharer.stop()
        adopted = Queue.from_fd(os.dup(tap.queues[0].fileno()))
        async with sent, adopted:
            fill(tap, frame)
            tasks = [await waiting(queue.send(frame)) for queue in (sent, adopted)]
            await tap.link.down()
            for task in tasks:
                with pytest.raises(LinkDownError):
                    await soon(task)


async def test_each_that_waits_to_send_is_told_its_own_count() -> None:
    async with shaped_tap(rate="8kbit") as (tap, frame, _):
        fill(tap, frame)

        tasks = [await waiting(tap.send_many([frame] * 9)) for _ in range(2)]
        await tap.link.down()
        one, other = await soon(asyncio.gather(*tasks, return_exceptions=True))
        assert isinstance(one, LinkDownError)
        assert isinstance(other, LinkDownError)
        assert one is not other
        assert one.sent == other.sent == 0


async def test_a_waiting_send_says_that_there_is_no_descriptor_left() -> None:
    async with shaped_tap(rate="8kbit") as (tap, frame, _):
        fill(tap, frame)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(
                aiotun.ResourceLimitError, match="could not wait to send on tap0"
            ) as caught:
                await soon(tap.send(frame))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.EMFILE
        task = await waiting(tap.send(frame))
        task.cancel()


# --- Closing -------------------------------------------------------------------------------------


async def test_a_lost_device_goes_without_the_collector() -> None:
    tun = await aiotun.open_tun("tun0")
    ip("link", "del", "tun0")
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(DeviceLostError):
            await tun.recv()
        await tun.aclose()
        queue = weakref.ref(tun.queues[0])
        del tun
        assert queue() is None
    finally:
        gc.enable()


def test_closed_in_one_loop_and_awaited_in_the_next() -> None:
    async def opening() -> aiotun.TunDevice:
        tun = await aiotun.open_tun("tun0")
        tun.close()
        return tun

    tun = asyncio.run(opening())
    asyncio.run(asyncio.wait_for(tun.aclose(), SOON))
    asyncio.run(asyncio.wait_for(tun.aclose(), SOON))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("queues", [1, 2])
def test_tasks_of_a_closed_loop_keep_nobody_from_anything(
    new_loop: Callable[[], asyncio.AbstractEventLoop], queues: int
) -> None:
    async def opening() -> aiotun.TunDevice:
        tun = await aiotun.open_tun("tun0", queues=queues)
        tasks.append(await waiting(tun.recv()))
        tasks.append(await waiting(tun.queues[0].recv()))
        return tun

    for lost in (False, True):
        tasks: list[asyncio.Task[bytes]] = []
        loop = new_loop()
        tun = loop.run_until_complete(opening())
        loop.close()
        if lost:
            ip("link", "del", "tun0")
            with pytest.raises(DeviceLostError):
                tun.send_nowait(udp(THEIRS, 1, OURS, 2))
        tun.close()
        assert tun.closed
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # we know


def test_a_rest_is_handed_out_after_the_loop_was_closed() -> None:
    rigged = rig("split")

    async def opening() -> Any:
        r = await rigged.__aenter__()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(r.tun.recv(), 0.02)
        return r

    loop = asyncio.new_event_loop()
    r = loop.run_until_complete(opening())
    loop.close()
    r.inject(10)
    assert [number(r.tun.recv_nowait()) for _ in range(10)] == list(range(10))
    asyncio.run(rigged.__aexit__(None, None, None))


@pytest.mark.parametrize("end", ["close", "detach", "drop"])
async def test_a_forked_child_leaves_the_loop_of_its_parent_alone(end: str) -> None:
    async with rig() as r:
        task = await waiting(r.tun.recv())
        with warnings.catch_warnings():
            # Python 3.12 warns where there are other threads, which a closing before may have left.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            status = 1
            try:
                warnings.simplefilter("ignore")
                if end == "close":
                    r.tun.close()
                elif end == "detach":
                    os.close(r.tun.queues[0].detach())
                else:
                    r.tun.queues[0].__del__()
                status = 0
            finally:
                os._exit(status)
        assert await asyncio.to_thread(os.waitpid, child, 0) == (child, 0)
        r.inject()
        assert number(await soon(task)) == 0


@pytest.mark.parametrize("offload", ["off", "raw", "split"])
async def test_a_long_list_meets_the_closing_between_two_turns(offload: Any) -> None:
    async with rig(offload=offload) as r:
        header = bytes(10) if offload == "raw" else b""
        task = asyncio.create_task(r.tun.send_many([header + udp(THEIRS, 1, OURS, 2)] * 5000))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        r.tun.close()
        with pytest.raises(DeviceClosedError) as caught:
            await soon(task)
        assert 0 < caught.value.sent < 5000


# --- Sockets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["off", "raw", "split"])
async def test_the_end_of_a_seqpacket_socket_is_a_loss(offload: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    async with Queue.from_fd(ours.detach(), offload=offload) as queue:
        packet = udp(THEIRS, 1, OURS, 2, b"1234")
        theirs.send(packet if offload == "off" else bytes(10) + packet)
        theirs.close()
        assert (await soon(queue.recv())).endswith(packet)
        ways: list[Callable[[], Any]] = [
            queue.recv,
            lambda: queue.recv_into(bytearray(100)),
            queue.recv_many,
            lambda: anext(aiter(queue)),
            lambda: anext(queue.batches()),
        ]
        for way in ways:
            with pytest.raises(DeviceLostError, match="other end was closed"):
                await soon(way())


@pytest.mark.parametrize("offload", ["off", "split"])
async def test_an_empty_datagram_is_no_end(offload: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        async with Queue.from_fd(ours.detach(), offload=offload) as queue:
            packet = udp(THEIRS, 1, OURS, 2, b"1234")
            theirs.send(b"")
            theirs.send(packet if offload == "off" else bytes(10) + packet)
            if offload == "off":
                assert await soon(queue.recv()) == b""
            assert await soon(queue.recv()) == packet
            assert queue.stats.undecodable == (offload == "split")


async def test_an_icmp_error_is_told_once_and_ends_nothing() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as theirs,
    ):
        theirs.bind(("127.0.0.1", 0))
        target = theirs.getsockname()
        ours.bind(("127.0.0.1", 0))
        ours.connect(target)
        source = ours.getsockname()
        async with Queue.from_fd(os.dup(ours.fileno())) as queue:
            theirs.close()
            await queue.send(b"to nobody")
            with pytest.raises(PacketError, match="nobody listens") as caught:
                await soon(queue.recv())
            assert caught.value.errno == errno.ECONNREFUSED
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind(target)
                again.sendto(b"here I am", source)
                assert await soon(queue.recv()) == b"here I am"
                await queue.send(b"hello")
                assert again.recv(100) == b"hello"


async def test_an_icmp_error_while_a_task_waits_to_send_ends_nothing() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as theirs,
    ):
        theirs.bind(("127.0.0.1", 0))
        ours.connect(theirs.getsockname())
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
        shape = "tc qdisc add dev lo root tbf rate 80kbit burst 2500 limit 1000000"
        await asyncio.to_thread(subprocess.run, shape.split(), check=True)
        async with Queue.from_fd(os.dup(ours.fileno())) as queue:
            with contextlib.suppress(BlockingIOError):
                while True:
                    queue.send_nowait(bytes(1000))
            theirs.close()
            for _ in range(3):
                with pytest.raises(PacketError, match="nobody listens"):
                    await soon(queue.send_many(itertools.repeat(bytes(1000))))


@pytest.mark.parametrize("number", [-1, 2**31 - 1, 2**31, 2**70])
def test_a_number_that_is_no_open_fd_is_a_value_error(number: int) -> None:
    for from_fd in (Queue.from_fd, aiotun.TunDevice.from_fd):
        with pytest.raises(ValueError, match="open"):
            from_fd(number)


@pytest.mark.parametrize("kind", ["stream", "pipe", "file", "folder", "null", "zero"])
def test_what_keeps_no_packets_apart_is_no_queue(kind: str, tmp_path: Path) -> None:
    one, other = socket.socketpair()
    reader, writer = os.pipe()
    fds = {
        "stream": one.fileno(),
        "pipe": reader,
        "file": os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT),
        "folder": os.open(tmp_path, os.O_RDONLY),
        "null": os.open("/dev/null", os.O_RDWR),
        "zero": os.open("/dev/zero", os.O_RDWR),
    }
    try:
        with pytest.raises(ValueError, match=f"fd {fds[kind]} is"):
            Queue.from_fd(fds[kind])
        assert os.get_blocking(fds[kind])  # untouched
    finally:
        for fd in (reader, writer, fds["file"], fds["folder"], fds["null"], fds["zero"]):
            os.close(fd)
        one.close()
        other.close()


BLOCKING = """
import asyncio, os, signal, socket, sys
import aiotun

async def main():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    queue = aiotun.Queue.from_fd(ours.detach(), offload=sys.argv[1])
    os.set_blocking(queue.fileno(), True)  # as another process might, that shares the description
    os.set_blocking(theirs.fileno(), True)
    # asyncio's own handler, which would cancel this task, needs a loop that turns.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("reading", flush=True)
    queue.recv_nowait()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("offload", ["off", "split"])
async def test_a_signal_gets_through_a_read_that_blocks(offload: str) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-c", BLOCKING, offload), stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert await soon(child.stdout.readline()) == b"reading\n"

    def blocked() -> bool:
        where = Path(f"/proc/{child.pid}/wchan").read_text()
        return "recv" in where or "wait" in where or where == "0"

    await wait_until(blocked)
    child.send_signal(signal.SIGINT)
    assert await soon(child.stdout.readline()) == b"interrupted\n"
    assert await soon(child.wait()) == 0


# --- Cancelled in the middle ---------------------------------------------------------------------


async def test_a_task_that_closes_the_queue_while_it_is_being_resumed() -> None:
    async with rig("split group") as r:
        tasks = [asyncio.create_task(r.tun.recv()) for _ in range(5)]

        async def closing() -> None:
            await r.tun.recv()
            r.tun.close()

        tasks.insert(0, asyncio.create_task(closing()))  # type: ignore[arg-type]  # gives nothing
        await asyncio.sleep(0)
        r.inject(40)
        results = await soon(asyncio.gather(*tasks, return_exceptions=True))
        for result in results:
            assert result is None or isinstance(result, bytes | DeviceClosedError)

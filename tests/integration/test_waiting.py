"""Promises 5 and 6: waiters are served in order, exactly once, and the loop keeps running."""

import asyncio
import gc
import itertools
import socket
import struct
import time
from typing import Literal

import pytest

import aiotun
from aiotun import PacketIO, PacketTruncatedError

from ..helpers import wait_until
from .rig import KINDS, OURS, PORT, RECEIVE, THEIRS, Rig, number, rest, rig, udp, waiting

each_kind = pytest.mark.parametrize("kind", KINDS)
each_method = pytest.mark.parametrize("method", RECEIVE)


@each_kind
@each_method
async def test_waiters_are_served_in_order(kind: str, method: str) -> None:
    async with rig(kind) as r:
        served: list[tuple[int, int]] = []

        async def receive(place: int) -> None:
            served.append((place, number(await RECEIVE[method](r.io))))

        tasks = [await waiting(receive(place)) for place in range(6)]
        r.inject(6)
        await asyncio.gather(*tasks)
        assert served == [(place, place) for place in range(6)]


@each_kind
async def test_a_new_task_does_not_overtake_waiting_tasks(kind: str) -> None:
    """A task that comes when a packet is already there queues behind the waiting tasks."""
    async with rig(kind) as r:
        first = await waiting(r.io.recv())
        r.inject(2)
        with pytest.raises(BlockingIOError):
            r.io.recv_nowait()
        second = asyncio.create_task(r.io.recv())
        third = asyncio.create_task(r.io.recv_many(1))
        r.inject(1)
        assert number(await first) == 0
        assert number(await second) == 1
        assert number((await third)[0]) == 2


async def test_a_queue_and_its_device_have_one_order() -> None:
    """Tasks that wait for any queue and tasks that wait for one queue are in one line."""
    async with rig("member") as r:
        queue, device = r.io, r.tun
        receivers: list[PacketIO] = [device, queue, queue, device, queue, device]
        tasks = [await waiting(io.recv()) for io in receivers]
        with pytest.raises(BlockingIOError):
            device.recv_nowait()
        r.inject(6)
        with pytest.raises(BlockingIOError):
            queue.recv_nowait()
        assert [number(packet) for packet in await asyncio.gather(*tasks)] == list(range(6))


async def test_a_device_does_not_overtake_who_waits_for_its_queue() -> None:
    """Also if the device knows that the queue is ready and could read immediately."""
    async with rig("member") as r:
        r.inject(2)
        assert number(await r.tun.recv()) == 0
        assert number(await r.io.recv()) == 1
        waiter = await waiting(r.io.recv())
        r.inject(2)
        late = asyncio.create_task(r.tun.recv())
        assert number(await asyncio.wait_for(waiter, 5)) == 2
        assert number(await asyncio.wait_for(late, 5)) == 3


@each_kind
async def test_each_packet_goes_to_one_of_several_readers(kind: str) -> None:
    async with rig(kind) as r:
        received: list[list[int]] = [[], [], []]

        async def read(mine: list[int]) -> None:
            async for packet in r.io:
                mine.append(number(packet))  # noqa: PERF401 - seen while it goes on

        tasks = [await waiting(read(mine)) for mine in received]
        r.inject(300)
        await wait_until(lambda: sum(map(len, received)) == 300)
        r.io.close()
        await asyncio.gather(*tasks)
        assert sorted(received[0] + received[1] + received[2]) == list(range(300))
        assert all(mine == sorted(mine) for mine in received)
        assert min(map(len, received)) > 50


@each_kind
@pytest.mark.parametrize("way", [*RECEIVE, "for", "for batches", "recv_many(64)", "two readers"])
async def test_the_loop_turns_while_packets_wait(kind: str, way: str) -> None:
    """A reader that always finds packets lets other tasks run."""
    async with rig(kind) as r:
        r.inject(900)
        seen = 0

        async def read() -> None:
            nonlocal seen
            if way in ("for", "two readers"):
                async for _ in r.io:
                    seen += 1
            elif way == "for batches":
                async for batch in r.io.batches():
                    seen += len(batch)
            elif way == "recv_many(64)":
                while True:
                    seen += len(await r.io.recv_many())
            else:
                while True:
                    await RECEIVE[way](r.io)
                    seen += 1

        readers = [asyncio.create_task(read()) for _ in range(2 if way == "two readers" else 1)]
        jumps = [0]
        while seen < 900:
            await asyncio.sleep(0)
            jumps.append(seen)
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert max(b - a for a, b in itertools.pairwise(jumps)) <= 512


@pytest.mark.parametrize("kind", ["device", "split"])
async def test_batches_share_a_turn_of_the_loop(kind: str) -> None:
    """Two batches of 64 in each turn, except the first, as there may be only one packet."""
    async with rig(kind) as r:
        seen = turns = 0

        async def read() -> None:
            nonlocal seen
            async for batch in r.io.batches(64):
                seen += len(batch)

        reader = await waiting(read())
        for _ in range(3):  # then it no longer expects more packets
            r.inject(1)
            await asyncio.sleep(0.02)
        assert seen == 3
        r.inject(640)
        while seen < 643:
            await asyncio.sleep(0)
            turns += 1
        assert turns <= 8
        r.io.close()
        await reader


@each_kind
@pytest.mark.parametrize("ahead", [1, 3])
async def test_a_dialogue_stays_in_order_and_the_loop_runs(kind: str, ahead: int) -> None:
    """Each answer brings the next packet, or the next three."""
    async with rig(kind) as r:
        numbers: list[int] = []

        async def answer() -> None:
            async for packet in r.io:
                numbers.append(number(packet))
                if r.count < 999 and len(numbers) % ahead == 0:
                    r.inject(ahead)

        task = await waiting(answer())
        r.inject(ahead)
        jumps = [0]
        while len(numbers) < 999:
            await asyncio.sleep(0)
            jumps.append(len(numbers))
        task.cancel()
        await asyncio.wait([task])
        assert numbers == list(range(999))
        # The loop handles the rest of a super-packet in a separate callback.
        most = 512 if kind.startswith("split") else 256
        assert max(b - a for a, b in itertools.pairwise(jumps)) <= most


@each_kind
async def test_a_dialogue_with_another_thread(kind: str) -> None:
    """The next packet comes a little after the task has started to wait."""

    def talk(sock: socket.socket) -> None:
        for place in range(500):
            sock.send(struct.pack("!I", place))
            assert sock.recv(100) == struct.pack("!I", place)

    async with rig(kind) as r:
        r.sock.settimeout(5)
        port = r.sock.getsockname()[1]
        talking = asyncio.create_task(asyncio.to_thread(talk, r.sock))
        for place in range(500):
            packet = await asyncio.wait_for(r.io.recv(), 5)
            assert number(packet) == place
            await r.io.send(udp(THEIRS, PORT, OURS, port, packet[28:]))
        await talking


@each_kind
async def test_a_reader_that_waits_elsewhere_costs_nothing(kind: str) -> None:
    """While packets wait and no task receives, the loop sleeps."""
    async with rig(kind) as r:
        await_first = await waiting(r.io.recv())
        r.inject(50)
        await await_first
        before = time.process_time()
        await asyncio.sleep(0.2)
        assert time.process_time() - before < 0.1
        assert await rest(r.io, 49) == list(range(1, 50))


@each_kind
async def test_recv_many_returns_up_to_the_limit(kind: str) -> None:
    async with rig(kind) as r:
        r.inject(100)
        batches = [await r.io.recv_many(30) for _ in range(4)]
        assert [len(batch) for batch in batches] == [30, 30, 30, 10]
        assert [number(packet) for batch in batches for packet in batch] == list(range(100))
        for limit in (0, -1):
            with pytest.raises(ValueError, match="at least 1"):
                await r.io.recv_many(limit)
            with pytest.raises(ValueError, match="at least 1"):
                r.io.batches(limit)


async def test_recv_many_takes_from_all_queues() -> None:
    """In turn, so that a busy queue does not delay the others."""
    async with rig("group") as r:
        await fill_queues(r, 8)
        packets = await r.tun.recv_many(12)
        ports = [packet[22:24] for packet in packets]
        assert [ports.count(port) for port in sorted(set(ports))] == [3, 3, 3, 3]
        assert len(await r.tun.recv_many(100)) == 20


async def test_a_device_receives_from_its_queues_in_turn() -> None:
    async with rig("group") as r:
        await fill_queues(r, 5)
        ports = [(await r.tun.recv())[22:24] for _ in range(20)]
        for start in range(4, 20, 4):
            assert len(set(ports[start : start + 4])) == 4


async def fill_queues(r: Rig, packets: int) -> None:
    """Put this many packets of one flow, chosen by its port, into each of the four queues."""
    socks = []
    for place, queue in enumerate(r.tun.queues):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((THEIRS, 4000 + place))
        # The kernel sends a flow's packets to the queue that the flow came from.
        await queue.send(udp(THEIRS, 4000 + place, OURS, sock.getsockname()[1]))
        for _ in range(packets):
            sock.send(b"1234")
        socks.append(sock)
    # Wait until each queue is known to be ready, as the loop may report them in any order.
    task = await waiting(r.tun.recv())
    await task
    await asyncio.sleep(0)
    socks[int.from_bytes(task.result()[22:24], "big") - 4000].send(b"1234")
    for sock in socks:
        sock.close()


@each_kind
async def test_recv_into_writes_at_the_beginning_of_the_buffer(kind: str) -> None:
    async with rig(kind) as r:
        r.inject(3)
        exact = bytearray(32)
        assert await r.io.recv_into(exact) == 32
        assert number(bytes(exact)) == 0
        large = memoryview(bytearray(100))[10:90]
        assert await r.io.recv_into(large) == 32
        assert number(bytes(large[:32])) == 1
        assert not any(large[32:])


@each_kind
async def test_recv_into_lets_go_of_the_buffer(kind: str) -> None:
    """A bytearray can't be resized while a view of it exists, even one in a traceback."""
    async with rig(kind) as r:
        buffer = bytearray(1)
        r.inject(1)
        with pytest.raises(PacketTruncatedError) as caught:
            await r.io.recv_into(buffer)
        assert caught.tb is not None
        buffer.extend(bytes(100))
        task = await waiting(r.io.recv_into(buffer))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
        assert cancelled.tb is not None
        buffer.clear()


@each_kind
@pytest.mark.parametrize("size", [0, 1, 31])
async def test_recv_into_too_small_a_buffer(kind: str, size: int) -> None:
    """The buffer has the beginning, the truncation is counted, and the next packet is whole."""
    async with rig(kind) as r:
        r.inject(2)
        buffer = bytearray(size)
        with pytest.raises(PacketTruncatedError, match=f"32 bytes .* {size}.*larger buffer"):
            await r.io.recv_into(buffer)
        assert bytes(buffer[:2]) == b"\x45\0"[:size]
        assert r.io.stats.truncated == 1
        assert r.tun.stats == aiotun.PacketStats(truncated=1)
        assert await rest(r.io, 1) == [1]


@each_kind
async def test_recv_into_what_is_no_buffer(kind: str) -> None:
    """The error comes before anything is received."""
    async with rig(kind) as r:
        r.inject(1)
        with pytest.raises(TypeError, match="writable"):
            await r.io.recv_into(b"read-only")
        with pytest.raises(TypeError):
            await r.io.recv_into("text")  # type: ignore[arg-type]  # that is the test
        with pytest.raises(ValueError, match="contiguous"):
            await r.io.recv_into(memoryview(bytearray(100))[::2])
        assert await rest(r.io, 1) == [0]


@each_kind
async def test_recv_nowait_raises_when_no_packet_waits(kind: str) -> None:
    async with rig(kind) as r:
        with pytest.raises(BlockingIOError):
            r.io.recv_nowait()
        r.inject(2)
        assert number(r.io.recv_nowait()) == 0
        assert number(r.io.recv_nowait()) == 1
        with pytest.raises(BlockingIOError):
            r.io.recv_nowait()


@each_kind
async def test_decoded_skips_or_raises_undecodable_packets(kind: str) -> None:
    """Packets that dpkt can't decode are counted and skipped, or raised."""
    async with rig(kind) as r:
        r.inject(1)
        packet = await anext(r.io.decoded())
        assert (packet.src, packet.udp.dport) == (b"\x0a\x09\x00\x01", PORT)
        with pytest.raises(ValueError, match="'skip' or 'raise'"):
            r.io.decoded("ignore")  # type: ignore[arg-type]  # that is the test


def indigestible() -> bytes:
    """An IPv4 packet that any host may send and that dpkt can't decode.

    It contains an IPv6 packet whose fragment header is followed by another extension header.
    """
    ip6 = struct.pack("!IHBB16s16s", 6 << 28, 24, 44, 64, bytes(16), bytes(16))
    ip6 += struct.pack("!BBHI", 60, 0, 0, 1) + struct.pack("!BB6x", 59, 0) + bytes(8)
    addresses = socket.inet_aton(OURS) + socket.inet_aton(THEIRS)
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(ip6), 1, 0, 64, 41, 0) + addresses + ip6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("errors", ["skip", "raise"])
async def test_errors_inside_the_parser_are_decode_errors(
    kind: str, errors: Literal["skip", "raise"]
) -> None:
    async with rig(kind) as r:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(indigestible(), (THEIRS, 0))
        # Send the next packet later, because the two may come by different queues.
        packets = r.tun.decoded(errors)
        if errors == "raise":
            with pytest.raises(aiotun.PacketDecodeError, match="AttributeError") as caught:
                await anext(packets)
            assert isinstance(caught.value.__cause__, AttributeError)
            assert isinstance(caught.value, ValueError)
            r.inject(1)
        else:
            task = await waiting(anext(packets))  # type: ignore[arg-type]  # a coroutine it is
            await wait_until(lambda: r.tun.stats.undecodable == 1)
            r.inject(1)
            packet = await task
        if errors == "raise":
            packet = await anext(packets)
        assert packet.udp.data == b"\0\0\0\0"
        assert r.tun.stats == aiotun.PacketStats(undecodable=1)


async def test_a_task_woken_for_nothing_keeps_its_place_in_line() -> None:
    """Another process has read the packet first; the task keeps its place in line."""
    async with rig() as r:
        tasks = [await waiting(r.io.recv()) for _ in range(3)]
        # As if the loop had found the fd readable before another process read the packet.
        asyncio.get_running_loop().call_soon(r.tun.queues[0]._readable)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        r.inject(3)
        assert [number(packet) for packet in await asyncio.gather(*tasks)] == [0, 1, 2]


@pytest.mark.parametrize("queues", [1, 4])
async def test_a_waiting_task_is_not_garbage_collected(queues: int) -> None:
    """Only the task refers to the device, and nothing refers to the task."""
    done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    waits = asyncio.Event()

    async def receive() -> None:
        async with aiotun.open_tun("lone0", queues=queues, addresses=["10.9.0.1/24"]) as tun:
            waits.set()
            packet = await tun.recv()
        done.set_result(packet)

    asyncio.ensure_future(receive())  # noqa: RUF006 - that is the test
    await waits.wait()
    await asyncio.sleep(0)
    gc.collect()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"still there?", ("10.9.0.2", 9))
    assert (await asyncio.wait_for(done, 5))[28:] == b"still there?"

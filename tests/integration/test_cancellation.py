"""Promise 1: cancellation never loses or tears a packet, whichever method receives it."""

import asyncio
import contextlib
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from aiotun import PacketIO

from .rig import KINDS, RECEIVE, number, rest, rig, waiting

each_kind = pytest.mark.parametrize("kind", KINDS)
each_method = pytest.mark.parametrize("method", RECEIVE)


@each_kind
@each_method
async def test_a_receive_cancelled_as_the_packet_comes_loses_nothing(
    kind: str, method: str
) -> None:
    """The packet and the cancellation come in the same turn, before the loop polls."""
    async with rig(kind) as r:
        task = await waiting(RECEIVE[method](r.io))
        r.inject(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await rest(r.io, 3) == [0, 1, 2]


@contextlib.contextmanager
def ready_fd(callback: Callable[[], object]) -> Iterator[None]:
    """Call `callback` in the loop's next turn, by an fd that is ready."""
    reader, writer = os.pipe()
    loop = asyncio.get_running_loop()

    def once() -> None:
        loop.remove_reader(reader)
        callback()

    loop.add_reader(reader, once)
    os.write(writer, b"x")
    try:
        yield
    finally:
        loop.remove_reader(reader)
        os.close(reader)
        os.close(writer)


@each_kind
@each_method
@pytest.mark.parametrize("first", ["cancel", "packet"])
async def test_a_receive_cancelled_when_the_fd_is_ready_loses_nothing(
    kind: str, method: str, first: str
) -> None:
    """Both fds are ready in one turn; the loop may run either callback first."""
    async with rig(kind) as r:
        task = await waiting(RECEIVE[method](r.io))
        received = []
        if first == "packet":
            r.inject(2)
        with ready_fd(task.cancel):
            if first == "cancel":
                r.inject(2)
            with contextlib.suppress(asyncio.CancelledError):
                received.append(number(await task))
        assert received + await rest(r.io, 2 - len(received)) == [0, 1]


@each_kind
@each_method
async def test_cancelled_waiters_give_their_place_to_the_next(kind: str, method: str) -> None:
    """The next waiter in line gets the packet that the cancelled waiter would have received."""
    async with rig(kind) as r:
        tasks = [await waiting(RECEIVE[method](r.io)) for _ in range(7)]
        gone = [tasks[0], tasks[3], tasks[6]]
        r.inject(4)
        for task in gone:
            task.cancel()
        left = [task for task in tasks if task not in gone]
        assert [number(packet) for packet in await asyncio.gather(*left)] == [0, 1, 2, 3]
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(
            *gone, return_exceptions=True))  # fmt: skip
        assert await rest(r.io, 0) == []


@each_kind
@each_method
async def test_timeouts_in_a_storm(kind: str, method: str) -> None:
    """Timeouts at any moment of a stream of packets lose no packet and keep the order."""
    total = 400
    async with rig(kind) as r:
        chance = random.Random(1)

        async def storm() -> None:
            while r.count < total:
                r.inject(min(chance.randrange(1, 6), total - r.count))
                await asyncio.sleep(chance.random() * 0.0005)

        sender = asyncio.create_task(storm())
        received: list[int] = []
        timeouts = 0
        while len(received) < total:
            try:
                async with asyncio.timeout(chance.random() * 0.0008):
                    received.append(number(await RECEIVE[method](r.io)))
            except TimeoutError:
                timeouts += 1
        await sender
        assert received == list(range(total))
        assert timeouts
        assert await rest(r.io, 0) == []


@each_kind
async def test_a_batch_is_all_or_nothing(kind: str) -> None:
    """A cancelled recv_many returns all the packets that it took, or takes none."""
    async with rig(kind) as r:
        received: list[int] = []
        chance = random.Random(2)
        while r.count < 500:
            task = await waiting(r.io.recv_many(8))
            r.inject(chance.randrange(1, 5))
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                received += [number(packet) for packet in await task]
            while len(received) < r.count:
                received += [number(packet) for packet in await r.io.recv_many(3)]
        assert received == list(range(r.count))


@each_kind
async def test_a_reader_is_cancelled_in_a_burst(kind: str) -> None:
    """Many packets wait; the iterating task is cancelled, and another task continues."""
    total = 600
    async with rig(kind) as r:
        r.inject(total)
        received: list[int] = []

        async def read() -> None:
            async for packet in r.io:
                received.append(number(packet))
                if len(received) % 40 == 0:
                    await asyncio.sleep(0)

        turns = 0
        while len(received) < total:
            task = asyncio.create_task(read())
            for _ in range(turns % 5 + 1):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            turns += 1
        assert received == list(range(total))
        assert turns > 3
        assert await rest(r.io, 0) == []


@each_kind
async def test_a_task_cancelled_by_another_resumed_task_loses_nothing(kind: str) -> None:
    """A task is cancelled by another task that the same wake-up resumed."""
    async with rig(kind) as r:
        received: list[int] = []

        async def first() -> None:
            received.append(number(await r.io.recv()))
            second.cancel()

        async def other() -> None:
            received.append(number(await r.io.recv()))

        task = await waiting(first())
        second = await waiting(other())
        r.inject(2)
        await task
        with contextlib.suppress(asyncio.CancelledError):
            await second
        assert received + await rest(r.io, 2 - len(received)) == [0, 1]


async def test_cancellation_on_several_queues_delivers_each_packet_once() -> None:
    """Receivers of a device and its queues are cancelled at random; each packet comes once."""
    async with rig("group") as r:
        chance = random.Random(3)
        received: list[int] = []

        async def receive(io: PacketIO) -> None:
            received.append(number(await RECEIVE[chance.choice(list(RECEIVE))](io)))

        receivers: list[PacketIO] = [r.tun, *r.tun.queues]
        tasks: set[asyncio.Task[None]] = set()
        total = 1000
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(12)]
        for sock in socks:
            sock.connect(("10.9.0.2", 9))
        while r.count < total or len(received) < total:
            while len(tasks) < 9:
                tasks.add(asyncio.create_task(receive(chance.choice(receivers))))
            for _ in range(chance.randrange(4)):
                if r.count < total:
                    chance.choice(socks).send(r.count.to_bytes(4, "big"))
                    r.count += 1
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            task = chance.choice(list(tasks))
            task.cancel()
            await asyncio.wait([task])
            tasks = {task for task in tasks if not task.done()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in socks:
            sock.close()
        assert sorted(received) == list(range(total))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brought eager tasks")
# uvloop 0.23 passes an argument that the task factories of Python 3.12 and 3.13.0 don't accept.
@pytest.mark.asyncio(loop_factories=["asyncio"])
@each_kind
@each_method
async def test_eager_tasks_receive_in_order_and_cancel_without_loss(kind: str, method: str) -> None:
    """An eager task starts to wait while it is being created, or need not wait at all."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    async with rig(kind) as r:
        tasks = [asyncio.create_task(RECEIVE[method](r.io)) for _ in range(3)]
        r.inject(2)
        tasks[0].cancel()
        found = await asyncio.gather(*tasks[1:])
        assert [number(packet) for packet in found] == [0, 1]
        r.inject(2)
        assert number(await asyncio.create_task(RECEIVE[method](r.io))) == 2
        assert await rest(r.io, 1) == [3]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brought eager tasks")
@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_an_eager_task_that_waits_is_not_overtaken() -> None:
    """The eager task waits for any queue; the task that started it reads from one queue."""
    async with rig("member") as r:
        order: list[tuple[str, int]] = []

        async def receive(io: PacketIO) -> None:
            order.append(("device" if io is r.tun else "queue", number(await io.recv())))

        async def receive_and_start() -> asyncio.Task[None]:
            await receive(r.io)
            eager = asyncio.Task(receive(r.tun), loop=asyncio.get_running_loop(), eager_start=True)  # type: ignore[call-arg,unused-ignore]  # new in 3.12
            await receive(r.io)
            return eager

        task = await waiting(receive_and_start())
        r.inject(3)
        await (await task)
        assert order == [("queue", 0), ("device", 1), ("queue", 2)]

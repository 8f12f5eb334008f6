"""Promises 2, 3 and 7: closing is orderly, loss is loud and cheap, nothing leaks."""

import asyncio
import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import aiotun
from aiotun import DeviceClosedError, DeviceLostError, PacketIO, Queue
from aiotun._kernel.words import Offload

from ..helpers import SLOWER, ip, wait_until
from .rig import KINDS, RECEIVE, number, rig, waiting

each_kind = pytest.mark.parametrize("kind", KINDS)
each_method = pytest.mark.parametrize("method", RECEIVE)


def names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


# Closing


@each_kind
@each_method
async def test_closing_wakes_every_waiter(kind: str, method: str) -> None:
    expected = (
        StopAsyncIteration if method in ("anext", "batches", "decoded") else DeviceClosedError
    )
    async with rig(kind) as r:
        tasks = [await waiting(_caught(RECEIVE[method](r.io))) for _ in range(3)]
        r.io.close()
        assert r.io.closed
        for task in tasks:
            assert isinstance(await asyncio.wait_for(task, 5), expected)


async def _caught(coroutine: Coroutine[Any, Any, bytes]) -> BaseException | None:
    # A task can't raise StopAsyncIteration, so return the error.
    try:
        await coroutine
    except (aiotun.AiotunError, StopAsyncIteration) as error:
        return error
    return None


@each_kind
async def test_receiving_after_closing_raises_or_ends(kind: str) -> None:
    async with rig(kind) as r:
        await r.io.aclose()
        for method in ("recv", "recv_into", "recv_many"):
            with pytest.raises(DeviceClosedError, match="again"):
                await RECEIVE[method](r.io)
        assert [packet async for packet in r.io] == []
        assert [batch async for batch in r.io.batches()] == []
        assert [packet async for packet in r.io.decoded()] == []
        with pytest.raises(DeviceClosedError):
            r.io.recv_nowait()
        with pytest.raises(DeviceClosedError):
            r.io.send_nowait(b"E")
        with pytest.raises(DeviceClosedError):
            await r.io.send(b"E")
        with pytest.raises(DeviceClosedError) as caught:
            await r.io.send_many([b"E"])
        assert caught.value.sent == 0
        assert (r.io.fileno(), r.io.closed) == (-1, True)
        assert "closed" in repr(r.io)


@each_kind
async def test_iteration_ends_when_the_queue_is_closed(kind: str) -> None:
    async with rig(kind) as r:
        seen = []

        async def read() -> str:
            async for packet in r.io:
                seen.append(number(packet))
                if len(seen) == 3:
                    r.io.close()
            return "ended"

        r.inject(5)
        assert await asyncio.wait_for(read(), 5) == "ended"
        assert seen == [0, 1, 2]


async def test_closing_again_and_again() -> None:
    for order in ("close aclose close", "aclose aclose close", "close close aclose"):
        tun = await aiotun.open_tun("again0")
        for word in order.split():
            if word == "close":
                tun.close()
            else:
                await tun.aclose()
        assert tun.closed
        assert "again0" not in names()


async def test_aclose_waits_until_the_interface_is_gone() -> None:
    tun = await aiotun.open_tun("gone0", queues=3)
    tun.close()
    await asyncio.gather(*(tun.aclose() for _ in range(4)))
    assert "gone0" not in names()


async def test_aclose_cancelled_closes_all_the_same() -> None:
    tun = await aiotun.open_tun("gone0")
    task = asyncio.create_task(tun.aclose())
    await asyncio.sleep(0)
    # If the thread that closes was quicker, there is nothing left to cancel.
    cancelled = task.cancel()
    with pytest.raises(asyncio.CancelledError) if cancelled else contextlib.nullcontext():
        await task
    await wait_until(lambda: "gone0" not in names())
    await tun.aclose()


async def test_name_index_and_mtu_stay_known_after_closing() -> None:
    async with aiotun.open_tun("known0", mtu=1400) as tun:
        index = tun.index
    assert (tun.name, tun.index, tun.mtu, tun.mode, tun.offload) == (
        "known0", index, 1400, "tun", "off",
    )  # fmt: skip
    assert len(tun.queues) == 1


@each_kind
async def test_a_queue_closed_between_readiness_and_reading_wakes_its_reader(kind: str) -> None:
    """Another callback of the same turn closes the queue, before or after the reader's callback."""
    for close_first in (True, False):
        async with rig(kind) as r:
            task = await waiting(r.io.recv())
            loop = asyncio.get_running_loop()
            if close_first:
                loop.call_soon(r.io.close)
            r.inject(1)
            if not close_first:
                await asyncio.sleep(0)
                r.io.close()
            await asyncio.wait([task])
            if task.exception() is None:
                assert number(task.result()) == 0
            else:
                assert isinstance(task.exception(), DeviceClosedError)


async def test_closed_by_the_first_of_several_waiters() -> None:
    """The first of three waiters closes the queue; the others must not read the old fd."""
    async with rig() as r:

        async def first() -> int:
            packet = await r.io.recv()
            r.io.close()
            return number(packet)

        task = await waiting(first())
        others = [await waiting(r.io.recv()) for _ in range(2)]
        r.inject(3)
        assert await task == 0
        results = await asyncio.gather(*others, return_exceptions=True)
        assert all(isinstance(result, DeviceClosedError) for result in results)


async def test_a_reused_number_is_left_alone() -> None:
    """The closed device never reads, closes or unregisters an fd that has got its old number."""
    loop = asyncio.get_running_loop()
    for _ in range(20):
        async with rig() as r:
            task = await waiting(r.io.recv())
            fd = r.tun.fileno()
            await r.tun.aclose()
            pair = socket.socketpair()
            assert fd in (pair[0].fileno(), pair[1].fileno())
            reader, writer = pair if pair[0].fileno() == fd else (pair[1], pair[0])
            reader.setblocking(False)
            with reader, writer:
                r.tun.close()
                await r.tun.aclose()
                with pytest.raises(DeviceClosedError):
                    await task
                for data in (b"mine", b"also mine"):
                    receiving = await waiting(loop.sock_recv(reader, 10))
                    writer.send(data)
                    assert await asyncio.wait_for(receiving, 5) == data


async def test_other_devices_get_the_number() -> None:
    """Devices reuse the fd number of the last one, and each receives its own packets."""
    for _ in range(10):
        async with rig() as r:
            r.inject(1)
            assert number(await asyncio.wait_for(r.io.recv(), 5)) == 0
            task = await waiting(r.io.recv())
            r.tun.close()
            with pytest.raises(DeviceClosedError):
                await task


async def test_closing_one_queue_of_several() -> None:
    async with rig("group") as r:
        fds = {queue.fileno() for queue in r.tun.queues}
        assert len(fds) == 4
        with pytest.raises(ValueError, match="4 queues"):
            r.tun.fileno()
        await r.tun.queues[2].aclose()
        assert [queue.closed for queue in r.tun.queues] == [False, False, True, False]
        task = await waiting(r.tun.recv())
        r.inject(1)
        assert number(await asyncio.wait_for(task, 5)) == 0
        waiter = await waiting(r.tun.recv())
        for queue in r.tun.queues:
            await queue.aclose()
        with pytest.raises(DeviceClosedError):
            await waiter
        assert r.tun.closed
        assert r.tun.fileno() == -1


@each_kind
async def test_detach_gives_the_fd_away_and_closes_the_queue(kind: str) -> None:
    """The fd stays open, is unregistered from the loop, and belongs to the caller."""
    async with rig(kind) as r:
        queue = r.tun.queues[1 if kind == "member" else 0]
        task = await waiting(queue.recv())
        fd = queue.detach()
        with pytest.raises(DeviceClosedError, match="detached"):
            await task
        assert queue.closed
        assert queue in r.tun.queues
        assert r.tun.closed == (len(r.tun.queues) == 1)
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        with pytest.raises(DeviceClosedError):
            queue.detach()
        if "group" not in kind:
            async with Queue.from_fd(fd, offload=r.tun.offload) as again:
                r.inject(1)
                assert number(await asyncio.wait_for(again.recv(), 5)) == 0
        else:
            os.close(fd)


# Loss


@each_kind
@each_method
async def test_deletion_wakes_every_waiter(kind: str, method: str) -> None:
    async with rig(kind) as r:
        tasks = [await waiting(_caught(RECEIVE[method](r.io))) for _ in range(3)]
        ip("link", "del", "rig0")
        # The kernel has reported it by now: one turn for the loop to see it, and one for the other
        # tasks.
        for _ in range(3):
            await asyncio.sleep(0)
        for task in tasks:
            assert task.done()
            error = task.result()
            assert isinstance(error, DeviceLostError)
            assert error.filename == "rig0"


@each_kind
async def test_a_deletion_while_idle_does_not_spin_and_is_told_next(kind: str) -> None:
    """No task waits and the loop sleeps; the next call raises DeviceLostError."""
    async with rig(kind) as r:
        r.inject(1)
        await r.io.recv()  # leaves the fd registered with the loop
        ip("link", "del", "rig0")
        before = time.process_time()
        await asyncio.sleep(0.2)
        assert time.process_time() - before < 0.1
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="close this device"):
                await r.io.recv()
            with pytest.raises(DeviceLostError):
                r.io.recv_nowait()
            with pytest.raises(DeviceLostError):
                await r.io.send(b"\x45" + bytes(19))
            with pytest.raises(DeviceLostError):
                r.io.send_nowait(b"\x45" + bytes(19))
            with pytest.raises(DeviceLostError):
                await anext(aiter(r.io))
        assert not r.io.closed
        before = time.process_time()
        await asyncio.sleep(0.2)
        assert time.process_time() - before < 0.1


async def test_a_lost_device_can_be_closed() -> None:
    async with rig() as r:
        ip("link", "del", "rig0")
        with pytest.raises(DeviceLostError):
            await r.io.recv()
        await r.tun.aclose()
        with pytest.raises(DeviceClosedError):
            await r.io.recv()


async def test_a_device_lives_on_after_ip_netns_del(netns: int) -> None:
    """The device holds its namespace open after the namespace's name is deleted."""
    ip("netns", "add", "away")
    async with aiotun.open_tun("away0", netns="away", addresses=["10.9.0.1/24"]) as tun:
        ip("netns", "del", "away")
        await tun.link.down()
        await tun.link.up()
        info = await tun.link.info()
        assert (info.name, info.up, info.carrier) == ("away0", True, True)
        await tun.send(b"\x45" + bytes(19))
        assert (await tun.link.stats()).rx_packets == 1


# Leaks


@each_kind
@pytest.mark.parametrize("before", ["nothing", "received", "waited"])
async def test_a_device_that_nobody_holds_warns_and_is_freed(kind: str, before: str) -> None:
    queues = 4 if kind in ("group", "member", "split group") else 1
    offload: Offload = "split" if kind.startswith("split") else "off"
    addresses = ["10.9.0.1/24"]
    tun = await aiotun.open_tun("left0", queues=queues, addresses=addresses, offload=offload)
    if before == "waited":
        task = await waiting(tun.recv())
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        del task
    if before == "received":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("10.9.0.2", 9))
        await tun.recv()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del tun
        # A task that a packet resumed runs inside the loop's call to the queue until it next
        # awaits.
        await asyncio.sleep(0)
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning] * queues
    assert "unclosed" in str(caught[0].message)
    assert "left0" in str(caught[0].message)
    assert "left0" not in names()


async def test_a_warning_made_an_error_still_closes() -> None:
    code = (
        "import asyncio, aiotun, socket, gc\n"
        "async def main():\n"
        "    tun = await aiotun.open_tun('left0')\n"
        "    del tun\n"
        "    gc.collect()\n"
        "    print([name for _, name in socket.if_nameindex()])\n"
        "asyncio.run(main())\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.stdout == "['lo']\n", done.stderr
    assert "ResourceWarning: unclosed <Queue of left0" in done.stderr


@pytest.mark.parametrize("waited", [False, True])
def test_a_device_can_be_closed_after_its_loop(waited: bool) -> None:
    """After the loop is closed, close() closes the fd immediately in the calling thread."""
    loop = asyncio.new_event_loop()

    async def start() -> aiotun.TunDevice:
        tun = await aiotun.open_tun("late0")
        if waited:
            asyncio.ensure_future(tun.recv())  # noqa: RUF006 - left alone with the loop
            await asyncio.sleep(0)
        return tun

    tun = loop.run_until_complete(start())
    tasks = asyncio.all_tasks(loop)
    loop.close()
    tun.close()
    assert "late0" not in names()
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch
        task.get_coro().close()


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("queues", [1, 3])
def test_another_loop_is_refused(queues: int, debug: bool) -> None:
    """A send that need not wait asks for the loop in debug mode only."""

    async def start() -> aiotun.TunDevice:
        tun = await aiotun.open_tun("loop0", queues=queues, addresses=["10.9.0.1/24"])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(tun.recv(), 0.001)
        return tun

    async def use(tun: aiotun.TunDevice) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("10.9.0.2", 9))
        calls: list[Callable[[], object]] = [
            tun.recv,
            tun.recv_many,
            lambda: tun.recv_into(bytearray(100)),
            lambda: tun.send_many([]),
            lambda: anext(aiter(tun)),
        ]
        if debug:
            calls.append(lambda: tun.send(b"\x45" + bytes(19)))
        else:
            await tun.send(b"\x45" + bytes(19))
        for call in calls:
            with pytest.raises(RuntimeError, match="another event loop"):
                await call()  # type: ignore[misc]  # all of them give awaitables
        await tun.aclose()

    with asyncio.Runner(debug=debug) as first, asyncio.Runner() as second:
        tun = first.run(start())
        second.run(use(tun))


async def test_no_fd_goes_to_a_new_program() -> None:
    async with aiotun.open_tun(queues=3) as tun:
        fds = {queue.fileno() for queue in tun.queues}
        assert not any(os.get_inheritable(fd) for fd in fds)
        done = await asyncio.to_thread(
            subprocess.run, ["ls", "-l", "/proc/self/fd"],
            close_fds=False, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "/proc" in done.stdout
        assert "/dev/net/tun" not in done.stdout


async def test_a_fork_holds_the_interface() -> None:
    """close() returns here; the interface exists until the last copy of its fd is closed."""
    tun = await aiotun.open_tun("fork0")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent closes its end
        os._exit(0)
    os.close(reader)
    await asyncio.wait_for(tun.aclose(), 5)
    assert "fork0" in names()
    os.close(writer)
    await asyncio.to_thread(os.waitpid, pid, 0)
    await wait_until(lambda: "fork0" not in names())


async def test_the_loop_is_not_blocked_by_the_last_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes some ms to delete an interface; here it takes until the loop has run."""
    ran, close = threading.Event(), os.close
    async with aiotun.open_tun("slow0") as tun:
        number = tun.fileno()

        def slow(fd: int) -> None:
            if fd == number:
                assert ran.wait(5 * SLOWER)
            close(fd)

        monkeypatch.setattr(os, "close", slow)
        task = asyncio.create_task(tun.aclose())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        ran.set()
        await task
    assert names() == ["lo"]


async def test_many_devices_at_once_and_one_after_the_other() -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def one(place: int) -> None:
        async with aiotun.open_tun(f"many{place}") as tun:
            io: PacketIO = tun
            task = await waiting(io.recv())
            await asyncio.sleep(0)
            task.cancel()

    await asyncio.gather(*(one(place) for place in range(30)))
    for place in range(20):
        await one(place)
    await wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert names() == ["lo"]

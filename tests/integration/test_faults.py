"""Faults around a device: slow consumers, closed fds, many devices. Nothing grows or hangs."""

import asyncio
import gc
import os
import socket
import threading

import pytest

import aiotun
from aiotun import DeviceLostError
from aiotun.testing import memory_pair

from ..helpers import ip, wait_until
from .kernel import link, names, resident_kib
from .rig import OURS, PORT, THEIRS, number, rig, udp


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """Count aiotun's threads; the interpreter and the tests may have others."""
    return sum(thread.name.startswith("aiotun") for thread in threading.enumerate())


# --- Consumers -----------------------------------------------------------------------------------


async def test_a_consumer_that_never_reads() -> None:
    """The kernel keeps packets up to its ring's size, and drops and counts the others."""
    async with rig(txqueuelen=100) as r:
        await asyncio.sleep(0)
        before = resident_kib()
        r.inject(5000)
        stats = await r.tun.link.stats()
        assert stats.tx_dropped == 4900
        assert resident_kib() - before < 4096
        got = [number(await asyncio.wait_for(r.io.recv(), 5)) for _ in range(100)]
        assert got == list(range(100))


async def test_a_consumer_that_stops_reading() -> None:
    """The task has read before, so the loop watches the fd; the loop must not spin."""
    async with rig(txqueuelen=100) as r:
        r.inject(1)
        assert number(await r.io.recv()) == 0
        r.inject(200)
        loop = asyncio.get_running_loop()
        turns = 0
        end = loop.time() + 0.1
        busy = os.times()
        while loop.time() < end:
            turns += 1
            await asyncio.sleep(0.01)
        spent = os.times()
        # A spinning loop would use the processor all the time.
        assert spent.user + spent.system - busy.user - busy.system < 0.06
        assert turns > 3
        assert number(await asyncio.wait_for(r.io.recv(), 5)) == 1


async def test_a_consumer_that_raises_goes_on() -> None:
    async with rig() as r:
        r.inject(3)
        got: list[int] = []
        while len(got) < 3:
            try:
                async for packet in r.io:
                    got.append(number(packet))
                    raise LookupError
            except LookupError:
                continue
        assert got == [0, 1, 2]


async def test_a_reader_in_memory_that_never_reads_stops_its_writer() -> None:
    one, other = memory_pair()
    async with one, other:
        packets = [b"\x45" + bytes(999)] * 10_000
        task = asyncio.create_task(one.send_many(packets))
        await wait_until(lambda: bool(one.queues[0]._senders))
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        sent = int(getattr(caught.value, "sent", -1))
        got = 0
        while got < sent:
            got += len(await other.recv_many())
        with pytest.raises(BlockingIOError):
            other.recv_nowait()


# --- Owners --------------------------------------------------------------------------------------


async def test_an_fd_that_its_owner_closed() -> None:
    """The fd was closed by other code: that is a loss, and closing still works."""
    tun = await aiotun.open_tun("rig0", addresses=[f"{OURS}/24"])
    os.close(tun.fileno())
    with pytest.raises(DeviceLostError):
        await tun.send(udp(THEIRS, PORT, OURS, PORT))
    for attempt in (tun.recv(), tun.recv_many()):
        with pytest.raises(DeviceLostError):
            await asyncio.wait_for(attempt, 5)
    with pytest.raises(DeviceLostError):
        tun.recv_nowait()
    await tun.aclose()
    assert names() == []


async def test_an_fd_that_its_owner_gave_to_somebody_else() -> None:
    """Duplicates of the fd: one is closed elsewhere, one stays open; neither is the device's."""
    tun = await aiotun.open_tun("rig0", addresses=[f"{OURS}/24"])
    copy, stays = os.dup(tun.fileno()), os.dup(tun.fileno())
    os.close(copy)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (THEIRS, PORT))
    assert (await asyncio.wait_for(tun.recv(), 5)).endswith(b"x")
    await tun.aclose()
    assert names() == ["rig0"]
    os.close(stays)
    assert names() == []


async def test_a_tap_where_a_tun_is_meant() -> None:
    tap = await aiotun.open_tap("rig0")
    fd = tap.queues[0].detach()
    try:
        with pytest.raises(aiotun.DeviceMismatchError, match=r"TapDevice\.from_fd"):
            aiotun.TunDevice.from_fd(fd)
    finally:
        os.close(fd)
    async with aiotun.open_tap("rig0"):
        with pytest.raises(aiotun.DeviceMismatchError, match="TAP"):
            await aiotun.open_tun("rig0")


# --- Crowds --------------------------------------------------------------------------------------


async def open_and_close(cycles: int, place: int) -> None:
    for _ in range(cycles):
        async with aiotun.open_tun(f"rig{place}") as tun:
            await tun.send(b"\x45" + bytes(19))


async def cycle(count: int, at_once: int = 50) -> None:
    # Many at once, because the kernel takes about 15 ms for each close.
    await asyncio.gather(*(open_and_close(count // at_once, place) for place in range(at_once)))


def settled() -> tuple[int, int, int]:
    """Count the fds, aiotun's threads, and objects."""
    gc.collect()
    return open_fds(), threads(), len(gc.get_objects())


@pytest.mark.parametrize(
    "count", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
async def test_opening_and_closing_again_and_again(count: int) -> None:
    # The allocator's arenas, one a thread, have to fill first.
    await cycle(max(100, count // 10))
    await wait_until(lambda: threads() == 0)
    before, memory = settled(), resident_kib()
    await cycle(count)
    await wait_until(lambda: threads() == 0)
    after = settled()
    assert after[:2] == before[:2]
    # Less than one object per two cycles. A device consists of dozens of objects.
    assert after[2] - before[2] < count / 2 + 100
    assert resident_kib() - memory < 4096
    assert names() == []


async def test_200_devices_at_once() -> None:
    before = open_fds()

    async def serve(place: int) -> aiotun.TunDevice:
        return await aiotun.open_tun(f"rig{place}", netns=None, txqueuelen=10)

    devices = await asyncio.gather(*(serve(place) for place in range(200)))
    assert len(names()) == 200
    assert len({tun.fileno() for tun in devices}) == 200
    # Each device gets the packet to its own address.
    for place, tun in enumerate(devices):
        ip("addr", "add", f"10.77.{place}.1/24", "dev", tun.name)
    tasks = [asyncio.create_task(tun.recv()) for tun in devices]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for place in range(200):
            sock.sendto(b"%d" % place, (f"10.77.{place}.2", PORT))
    packets = await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert [packet[28:] for packet in packets] == [b"%d" % place for place in range(200)]
    assert "UP" in link("rig199")["flags"]
    await asyncio.gather(*(tun.aclose() for tun in devices))
    assert names() == []
    await wait_until(lambda: threads() == 0)
    devices.clear()
    del tun
    gc.collect()
    assert open_fds() <= before

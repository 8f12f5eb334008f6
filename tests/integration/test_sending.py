"""Sending: packets that arrive, packets that are refused, and waiting for room; promise 4."""

import asyncio
import contextlib
import errno
import gc
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import aiotun
from aiotun import DeviceLostError, LinkDownError, PacketError, PacketIO, TapDevice
from aiotun._kernel.threads import run_blocking
from aiotun.offload import VnetHeader

from ..helpers import ip, wait_until
from .kernel import forward
from .rig import KINDS, OURS, PORT, THEIRS, number, rig, udp, waiting

each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
async def test_sent_packets_reach_the_kernels_sockets(kind: str, form: Any) -> None:
    async with rig(kind) as r:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((OURS, 7777))
            packet = form(udp(THEIRS, 5, OURS, 7777, b"one"))
            assert await r.io.send(packet) is None  # type: ignore[func-returns-value]
            r.io.send_nowait(packet)
            assert await r.io.send_many([packet] * 3) == 3
            assert await r.io.send_many(packet for _ in range(2)) == 2
            assert await r.io.send_many([]) == 0
            got = [sock.recvfrom(100, socket.MSG_DONTWAIT) for _ in range(7)]
            assert got == [(b"one", (THEIRS, 5))] * 7
            with pytest.raises(BlockingIOError):
                sock.recv(1, socket.MSG_DONTWAIT)


async def test_ipv6_packets_are_sent_and_received() -> None:
    async with aiotun.open_tun("six0", addresses=["fd00::1/64"]) as tun:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("fd00::1", 7777))
            sock.connect(("fd00::2", 5))
            sock.send(b"ask")
            packet = await tun.recv()
            while packet[6] != 17:  # the kernel's own multicasts
                packet = await tun.recv()
            assert packet[48:] == b"ask"
            # Swap the addresses and the ports; the checksum stays the same.
            answer = packet[:8] + packet[24:40] + packet[8:24]
            answer += packet[42:44] + packet[40:42] + packet[44:]
            await tun.send(answer)
            sock.setblocking(False)
            assert sock.recv(10) == b"ask"


@each_kind
@pytest.mark.parametrize(
    "packet",
    [b"", b"\x15" + bytes(19), bytes(20), b"\x75" + bytes(40)],
    ids=["empty", "v1", "v0", "v7"],
)
async def test_a_packet_that_the_kernel_refuses_raises_packet_error(
    kind: str, packet: bytes
) -> None:
    async with rig(kind) as r:
        with pytest.raises(PacketError, match="neither IPv4 nor IPv6") as caught:
            await r.io.send(packet)
        error = caught.value
        assert (error.errno, error.filename) == (errno.EINVAL, "rig0")
        assert isinstance(error, ValueError)
        with pytest.raises(PacketError):
            r.io.send_nowait(packet)
        with pytest.raises(PacketError) as caught:
            await r.io.send_many([udp(THEIRS, 1, OURS, 2), packet, packet])
        assert caught.value.sent == 1
        assert r.io.stats.refused == 3
        assert r.tun.stats == aiotun.PacketStats(refused=3)


async def test_a_packet_beyond_all_bounds() -> None:
    async with rig() as r:
        with pytest.raises(PacketError, match="shorter") as caught:
            await r.io.send(b"\x45" + bytes(8 << 20))
        assert caught.value.errno == errno.ENOBUFS


@each_kind
async def test_sent_is_told_whatever_is_raised(kind: str) -> None:
    async with rig(kind) as r:
        good = udp(THEIRS, 1, OURS, 2)

        def broken() -> Iterator[bytes]:
            yield good
            yield good
            raise KeyError("no more")

        with pytest.raises(KeyError) as failed:
            await r.io.send_many(broken())
        assert failed.value.sent == 2  # type: ignore[attr-defined]  # promised on all classes
        with pytest.raises(TypeError) as wrong:
            await r.io.send_many([good, "text"])  # type: ignore[list-item]  # that is the test
        assert wrong.value.sent == 1  # type: ignore[attr-defined]  # promised on all classes
        with pytest.raises(TypeError):
            await r.io.send(7)  # type: ignore[arg-type]  # that is the test


@each_kind
async def test_while_the_link_is_down_sending_raises_and_receiving_waits(kind: str) -> None:
    """Both work again when the link is up."""
    async with rig(kind) as r:
        packet = udp(THEIRS, PORT, OURS, r.sock.getsockname()[1])
        task = await waiting(r.io.recv())
        await r.tun.link.down()
        for call in (r.io.send(packet), r.io.send_many([packet])):
            with pytest.raises(LinkDownError, match=r"down.*link\.up\(\)") as caught:
                await call
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, "rig0")
        with pytest.raises(LinkDownError):
            r.io.send_nowait(packet)
        assert not task.done()
        await r.tun.link.up()
        await r.io.send(packet)
        r.inject(1)
        assert number(await asyncio.wait_for(task, 5)) == 0


# Headers


async def test_packet_info_precedes_packets_both_ways() -> None:
    """struct tun_pi: flags in the machine's byte order, the ethertype in the network's."""
    async with rig(packet_info=True) as r:
        r.sock.send(b"out")
        packet = await r.io.recv()
        assert packet[:4] == struct.pack("=H", 0) + b"\x08\x00"
        assert packet[32:] == b"out"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((OURS, 7777))
            await r.io.send(bytes(2) + b"\x08\x00" + udp(THEIRS, 5, OURS, 7777, b"in"))
            assert sock.recv(10) == b"in"
        r.sock.send(b"again")
        assert (await anext(r.io.decoded())).udp.data == b"again"
        with pytest.raises(PacketError, match="header"):
            await r.io.send(b"\0\0")


async def test_raw_offload_passes_virtio_headers_both_ways() -> None:
    """Also with several segments in one packet."""
    async with rig(offload="raw") as r:
        r.sock.send(b"out")
        packet = await r.io.recv()
        header = VnetHeader.unpack(packet)
        assert (header.flags, header.csum_start, header.csum_offset) == (1, 20, 6)
        assert packet[38:] == b"out"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((OURS, 7777))
            await r.io.send(VnetHeader().pack() + udp(THEIRS, 5, OURS, 7777, b"in"))
            assert sock.recv(10) == b"in"
        # UDP_SEGMENT: one call of the sender, one super-packet here (Linux 6.2).
        r.sock.setsockopt(socket.IPPROTO_UDP, 103, 1000)
        r.sock.send(bytes(10_000))
        packet = await r.io.recv()
        header = VnetHeader.unpack(packet)
        assert (header.gso_type, header.gso_size, len(packet)) == (5, 1000, 10_038)
        bad = VnetHeader(gso_type=1, gso_size=0).pack() + packet[10:]
        with pytest.raises(PacketError, match="header"):
            await r.io.send(bad)


async def test_frames_are_sent_and_received_on_a_tap() -> None:
    async with aiotun.open_tap("tap0", addresses=["10.9.0.1/24"]) as tap:
        mac = bytes.fromhex(ip("link", "show", "tap0")[0]["address"].replace(":", ""))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((OURS, 7777))
            frame = mac + b"\x02\0\0\0\0\x09" + b"\x08\x00" + udp(THEIRS, 5, OURS, 7777, b"in")
            await tap.send(frame)
            sock.setblocking(False)
            assert sock.recv(10) == b"in"
            sock.sendto(b"out", (THEIRS, 5))
        frame = await tap.recv()
        while frame[12:14] != b"\x08\x06":  # who has 10.9.0.2?
            frame = await tap.recv()
        assert frame[:6] == b"\xff" * 6
        with pytest.raises(PacketError, match="14-byte Ethernet header"):
            await tap.send(bytes(13))


# Backpressure


async def slow_bridge(rate: str) -> None:
    """Make a bridge, br0, with a port that is limited to `rate`; v1 is its other end."""
    for line in (
        "link add br0 type bridge",
        "link set br0 up",
        "link add v0 type veth peer name v1",
        "link set v0 master br0 up",
        "link set v1 up",
    ):
        ip(*line.split())
    tc = f"tc qdisc add dev v0 root tbf rate {rate} burst 3000 limit 1000000"
    await asyncio.to_thread(subprocess.run, tc.split(), check=True)


# To v1 only: copies for several ports would not be charged to the sender's buffer.
FRAME = b"\x02\0\0\0\0\x0a" + b"\x02\0\0\0\0\x09" + b"\x88\xb5" + bytes(1386)


@contextlib.asynccontextmanager
async def shaped_tap(
    rate: str = "400kbit",
) -> AsyncIterator[tuple[TapDevice, bytes, socket.socket]]:
    """A TAP on a bridge whose other port is slow, and a frame for that port's other end.

    Only packets that wait in a queue of the kernel fill a send buffer.
    """
    await slow_bridge(rate)
    async with aiotun.open_tap("tap0", bridge="br0", sndbuf=65536) as tap:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as sock:
            sock.bind(("v1", 0x88B5))
            sock.setblocking(False)
            await wait_until(lambda: forward("tap0", "v0"))
            yield tap, FRAME, sock


def fill(io: PacketIO, frame: bytes) -> int:
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 1000:
            io.send_nowait(frame)
            sent += 1
    assert sent < 1000
    return sent


async def test_send_waits_while_the_kernel_is_full() -> None:
    async with shaped_tap() as (tap, frame, sock):
        fill(tap, frame)
        order: list[int] = []

        async def send(place: int) -> None:
            await tap.send(frame[:-1] + bytes([place]))
            order.append(place)

        tasks = [await waiting(send(place)) for place in range(1, 6)]
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert order == [1, 2, 3, 4, 5]
        seen: list[int] = []

        def arrived() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    seen.append(sock.recv(2000)[-1])
            return 5 in seen

        await wait_until(arrived)
        assert [place for place in seen if place] == [1, 2, 3, 4, 5]


async def test_a_send_that_would_wait_in_another_loop_is_refused() -> None:
    async with shaped_tap() as (tap, frame, _):
        fill(tap, frame)
        (await waiting(tap.send(frame))).cancel()

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                asyncio.run(tap.send(frame))

        await asyncio.to_thread(elsewhere)


async def test_a_send_needs_no_loop_and_still_says_what_ended() -> None:
    """After the first one, and on a queue that was lost or closed."""
    async with aiotun.open_tun("h0", addresses=[f"{OURS}/24"], queues=2) as tun:
        packet = udp(THEIRS, 1, OURS, 2)
        for queue in tun.queues:
            await queue.send(packet)
        await asyncio.to_thread(ip, "link", "del", "h0")
        for io in (tun, *tun.queues):
            for _ in range(2):
                with pytest.raises(DeviceLostError):
                    await io.send(packet)
        tun.close()
        for io in (tun, *tun.queues):
            with pytest.raises(aiotun.DeviceClosedError):
                await io.send(packet)


async def test_who_did_not_wait_does_not_overtake() -> None:
    async with shaped_tap() as (tap, frame, _):
        fill(tap, frame)
        first = await waiting(tap.send_many([frame] * 3))
        second = await waiting(tap.send(frame))
        with pytest.raises(BlockingIOError):
            tap.send_nowait(frame)
        assert await asyncio.wait_for(first, 10) == 3
        await asyncio.wait_for(second, 10)


async def test_a_cancelled_send_has_sent_nothing() -> None:
    async with shaped_tap() as (tap, frame, sock):
        fill(tap, frame)
        marked = frame[:-1] + b"\x01"
        tasks = [await waiting(tap.send(frame[:-1] + bytes([place]))) for place in (1, 2, 3)]
        many = await waiting(tap.send_many([marked] * 5))
        tasks[1].cancel()
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        with pytest.raises(asyncio.CancelledError) as caught:
            await many
        assert caught.value.sent == 0  # type: ignore[attr-defined]  # promised on all classes
        await asyncio.wait_for(asyncio.gather(tasks[0], tasks[2]), 10)
        seen: list[int] = []

        def arrived() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    seen.append(sock.recv(2000)[-1])
            return 3 in seen

        await wait_until(arrived)
        assert [place for place in seen if place] == [1, 3]


async def test_waiting_to_send_does_not_turn_the_loop() -> None:
    """With unread packets and a waiting sender the loop still sleeps."""
    async with shaped_tap() as (tap, frame, _):
        fill(tap, frame)
        task = await waiting(tap.send_many([frame] * 30))
        turns = 0
        loop = asyncio.get_running_loop()
        start = loop.time()
        while not task.done():
            turns += 1
            await asyncio.wait([task], timeout=0.05)
        assert await task == 30
        assert turns <= (loop.time() - start) / 0.05 + 2


async def test_closing_wakes_a_waiting_sender() -> None:
    async with shaped_tap() as (tap, frame, _):
        fill(tap, frame)
        tasks = [await waiting(tap.send(frame)), await waiting(tap.send_many([frame]))]
        await tap.aclose()
        for task in tasks:
            with pytest.raises(aiotun.DeviceClosedError):
                await asyncio.wait_for(task, 5)


async def test_deletion_wakes_a_waiting_sender() -> None:
    """Also if no task reads, although the kernel reports it only to polls for reading."""
    async with shaped_tap(rate="8kbit") as (tap, frame, _):
        fill(tap, frame)
        tasks = [await waiting(tap.send(frame)), await waiting(tap.send_many([frame] * 9))]
        ip("link", "del", "tap0")
        for task in tasks:
            with pytest.raises(DeviceLostError):
                await asyncio.wait_for(task, 1)  # sending the next frame would take longer


async def test_a_sender_that_gave_up_leaves_nothing_in_the_loop() -> None:
    """A device that is dropped and then collected in another thread removes its watch."""
    await slow_bridge("8kbit")
    dropped = [await aiotun.open_tap("tap0", bridge="br0", sndbuf=65536)]
    await wait_until(lambda: forward("tap0", "v0"))
    fill(dropped[0], FRAME)
    task = await waiting(dropped[0].send(FRAME))
    task.cancel()
    await asyncio.wait([task])
    del task  # it refers to an error, which refers to the device
    watch = dropped[0].queues[0]._watch._send_watch
    assert watch is not None
    epoll = watch._epoll.fileno()
    del watch

    def drop() -> None:
        dropped.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed <Queue of tap0"):
        run_blocking(drop)
    await wait_until(lambda: "tap0" not in [name for _, name in socket.if_nameindex()])
    assert not asyncio.get_running_loop().remove_reader(epoll)

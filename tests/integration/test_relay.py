"""`aiotun.relay`: packets both ways between two devices, whatever the format of each."""

import asyncio
import contextlib
import fcntl
import itertools
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiotun
from aiotun import Device, DeviceLostError, Offloads, PacketIO, TunDevice
from aiotun._kernel import namespaces, threads
from aiotun._kernel.abi import Iff, Ioctl, OffloadFlag
from aiotun._netstack.relay import converter
from aiotun._queue.port import PacketFormat
from aiotun.netstack import RelayCounts, RelayStats
from aiotun.offload import GsoType, VnetHeader, merge
from aiotun.queue import Queue
from aiotun.testing import FaultInjector, memory_pair

from ..helpers import SLOWER, ip, make_icmp_echo, wait_until
from ..test_gso import Packet, run_of, written
from .kernel import another_namespace, inside
from .test_from_fd import TUN, raw_open
from .test_offload import FAR, NEAR, TCP_CLIENT, TCP_SERVER, UDP_CLIENT, UDP_SERVER, transfer

KINDS = ["off", "information", "split", "raw", "raw of 12 bytes"]
_ALL = OffloadFlag.CSUM | OffloadFlag.TSO4 | OffloadFlag.TSO6 | OffloadFlag.USO4 | OffloadFlag.USO6


@contextlib.asynccontextmanager
async def device(
    kind: str, name: str, addresses: dict[int, str], netns: str | None, **options: Any
) -> AsyncIterator[Device]:
    """A device of one of these kinds, up and with addresses."""
    if kind == "raw of 12 bytes":
        there = namespaces.NamespaceFd(namespaces.open_netns(netns))
        fd = threads.run_blocking(lambda: raw_open(name, TUN | Iff.VNET_HDR), there.fd)
        fcntl.ioctl(fd, Ioctl.TUNSETVNETHDRSZ, struct.pack("i", 12))
        try:
            fcntl.ioctl(fd, Ioctl.TUNSETOFFLOAD, int(_ALL))
        except OSError:  # before Linux 6.2
            fcntl.ioctl(fd, Ioctl.TUNSETOFFLOAD, int(_ALL & ~(OffloadFlag.USO4 | OffloadFlag.USO6)))
        run = ip if netns is None else lambda *args: inside(netns, "ip", *args)
        run("link", "set", name, "txqueuelen", "2000", "up")
        run("addr", "add", f"{addresses[4]}/24", "dev", name)
        run("addr", "add", f"{addresses[6]}/64", "dev", name, "nodad")
        async with TunDevice.from_fd(fd, netns=netns) as tun:
            assert tun.vnet_header_size == 12
            yield tun
        return
    options["offload"] = "off" if kind == "information" else kind
    options["packet_info"] = kind == "information"
    options["addresses"] = [f"{addresses[4]}/24", f"{addresses[6]}/64"]
    options.setdefault("txqueuelen", 2000)
    async with aiotun.open_tun(name, netns=netns, **options) as tun:
        yield tun


@contextlib.asynccontextmanager
async def path(near: str, far: str, **options: Any) -> AsyncIterator[tuple[str, Device, Device]]:
    """Two devices in two namespaces, and a relay; yields the far namespace's path."""
    with another_namespace() as there:
        async with (
            device(near, "near0", NEAR, None, **options) as one,
            device(far, "far0", FAR, there, **options) as other,
        ):
            stats = RelayStats()
            task = asyncio.create_task(aiotun.relay(one, other, stats=stats))
            yield there, one, other
            assert not task.done(), task.result()
            task.cancel()
            await asyncio.wait([task])
            for counts in (stats.a_to_b, stats.b_to_a):
                assert counts == RelayCounts(passed=counts.passed)
                assert counts.passed > 0


class TestFormats:
    @pytest.mark.parametrize(("near", "far"), list(itertools.product(KINDS, KINDS)))
    async def test_tcp_and_udp_arrive_whole_whatever_the_formats(self, near: str, far: str) -> None:
        async with path(near, far) as (there, one, other):
            await transfer(there, TCP_SERVER, TCP_CLIENT, 4, 5_000_000)
            await transfer(there, UDP_SERVER, UDP_CLIENT, 6, 300_000)
            assert one.stats == other.stats == aiotun.PacketStats()

    @pytest.mark.parametrize(("near", "far"), [("raw", "raw"), ("off", "split")])
    async def test_between_devices_of_several_queues(self, near: str, far: str) -> None:
        async with path(near, far, queues=3) as (there, _, _):
            await transfer(there, TCP_SERVER, TCP_CLIENT, 4, 5_000_000)

    @pytest.mark.parametrize("near", ["off", "split", "raw"])
    @pytest.mark.parametrize("far", ["off", "split", "raw"])
    async def test_between_tap_devices(self, near: Any, far: Any) -> None:
        with another_namespace() as there:
            async with (
                aiotun.open_tap("near0", offload=near, addresses=[f"{NEAR[4]}/24"]) as one,
                aiotun.open_tap(
                    "far0", offload=far, addresses=[f"{FAR[4]}/24"], netns=there
                ) as other,
            ):
                task = asyncio.create_task(aiotun.relay(one, other))
                await transfer(there, TCP_SERVER, TCP_CLIENT, 4, 3_000_000)
                task.cancel()
                await asyncio.wait([task])

    async def test_super_packets_pass_unchanged_where_both_sides_take_them(self) -> None:
        one, other = PacketFormat("tun", "raw"), PacketFormat("tun", "raw")
        assert converter(one, other) is None

    def test_a_kernel_without_udp_gets_the_packets_of_a_super_packet(self) -> None:
        datagrams = written(run_of(Packet(protocol="udp"), [100] * 5))
        segments = written(run_of(Packet(), [100] * 5))
        old = PacketFormat("tun", "raw", accepted=~Offloads.USO)
        repack = converter(PacketFormat("tun", "raw"), old)
        assert repack is not None
        tcp, udp = merge(segments), merge(datagrams)
        assert repack([*tcp, *udp]) == ([*tcp, *(bytes(10) + each for each in datagrams)], 0)
        ecn = VnetHeader.unpack(udp[0])._replace(gso_type=GsoType.UDP_L4 | GsoType.ECN)
        assert len(repack([ecn.pack() + udp[0][10:]])[0]) == 5
        combine = converter(PacketFormat("tun"), old)
        assert combine is not None
        assert combine(segments + datagrams)[0] == [
            *tcp,
            *(bytes(10) + each for each in datagrams),
        ]

    def test_what_cannot_be_split_is_counted(self) -> None:
        (whole,) = merge(written(run_of(Packet(), [100] * 5)))
        broken = VnetHeader.unpack(whole)._replace(gso_size=0).pack() + whole[10:]
        for target in (PacketFormat("tun"), PacketFormat("tun", "split")):
            split = converter(PacketFormat("tun", "raw"), target)
            assert split is not None
            packets, unreadable = split([broken, b"short", whole])
            assert (len(packets), unreadable) == (5, 2)

    @pytest.mark.parametrize("mode", ["tun", "tap"])
    def test_packet_information_has_the_ethertype(self, mode: Any) -> None:
        link = bytes.fromhex("020000000002020000000001") if mode == "tap" else b""
        packets = [bytes(Packet(version=version, link=link)) for version in (4, 6)]
        plain, with_it = PacketFormat(mode), PacketFormat(mode, "off", True)
        add, remove = converter(plain, with_it), converter(with_it, plain)
        assert add is not None
        assert remove is not None
        longer, _ = add(packets)
        assert [each[:4] for each in longer] == [b"\0\0\x08\x00", b"\0\0\x86\xdd"]
        assert remove(longer) == (packets, 0)
        assert converter(with_it, with_it) is None


class TestArguments:
    async def test_tun_and_tap_do_not_fit(self) -> None:
        tun, tun2 = memory_pair()
        tap, tap2 = memory_pair("tap")
        async with tun, tun2, tap, tap2:
            with pytest.raises(ValueError, match="can't connect a TUN and a TAP"):
                await aiotun.relay(tun, tap)
            with pytest.raises(ValueError, match="twice"):
                await aiotun.relay(tun, tun)

    async def test_only_devices(self) -> None:
        tun, tun2 = memory_pair()
        async with tun, tun2:
            with pytest.raises(TypeError, match="two devices, got str"):
                await aiotun.relay(tun, "tun1")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="stats must be a RelayStats"):
                await aiotun.relay(tun, tun2, stats=5)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def relayed(
    *, faults: bool = False, queues: bool = False
) -> AsyncIterator[tuple[TunDevice, PacketIO, PacketIO, TunDevice, RelayStats, asyncio.Task[None]]]:
    """Two memory pairs with a relay between them: left, a, b, right."""
    left, a = memory_pair()
    b, right = memory_pair()
    near: PacketIO = FaultInjector(a) if faults else a.queues[0] if queues else a
    far: PacketIO = FaultInjector(b) if faults else b.queues[0] if queues else b
    stats = RelayStats()
    async with left, a, b, right:
        task = asyncio.create_task(aiotun.relay(near, far, stats=stats))
        try:
            yield left, near, far, right, stats, task
        finally:
            task.cancel()
            await asyncio.wait([task])


def ping(seq: int) -> bytes:
    return make_icmp_echo("10.0.0.1", "10.0.0.2", seq=seq)


class TestMoving:
    @pytest.mark.parametrize("what", ["devices", "queues", "faults"])
    async def test_both_ways_in_order(self, what: str) -> None:
        async with relayed(faults=what == "faults", queues=what == "queues") as (
            left, _, _, right, stats, _,
        ):  # fmt: skip
            packets = [ping(seq) for seq in range(1000)]
            for source, target in ((left, right), (right, left)):
                sending = asyncio.create_task(source.send_many(packets))
                got: list[bytes] = []
                while len(got) < len(packets):
                    got += await target.recv_many()
                assert got == packets
                await sending
            assert stats == RelayStats(RelayCounts(passed=1000), RelayCounts(passed=1000))

    async def test_a_capture_shows_them(self, tmp_path: Any) -> None:
        async with relayed() as (left, a, b, right, _, _):
            assert isinstance(a, Device)
            assert isinstance(b, Device)
            writers = [aiotun.capture.PcapWriter(tmp_path / f"{n}.pcap", "tun") for n in "ab"]
            captures = [a.capture(writers[0]), b.capture(writers[1])]
            await left.send(ping(1))
            assert await right.recv() == ping(1)
            for capture, writer in zip(captures, writers, strict=True):
                capture.stop()
                await writer.aclose()
        assert [(tmp_path / f"{n}.pcap").read_bytes()[40:] for n in "ab"] == [ping(1)] * 2

    async def test_other_tasks_run_while_packets_never_run_out(self) -> None:
        async with relayed() as (left, _, _, right, stats, _):

            async def flood() -> None:
                while True:
                    await left.send_many([ping(1)] * 64)

            async def drain() -> None:
                async for _ in right.batches():
                    pass

            tasks = [asyncio.create_task(flood()), asyncio.create_task(drain())]
            longest, passed = 0, 0
            for _ in range(200):
                await asyncio.sleep(0)
                longest = max(longest, stats.a_to_b.passed - passed)
                passed = stats.a_to_b.passed
            assert passed > 1000
            # What the socket holds, and once the budget.
            assert longest <= 512
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def test_a_relay_with_nothing_to_do_costs_no_processor_time(self) -> None:
        async with relayed():
            await asyncio.sleep(0.05)
            before = time.process_time()
            await asyncio.sleep(0.3)  # nothing must happen, so there is nothing to wait for
            assert time.process_time() - before < 0.05


class TestEnding:
    @pytest.mark.parametrize("which", ["a", "b"])
    @pytest.mark.parametrize("how", ["close", "aclose", "before"])
    async def test_closed_here_it_returns(self, which: str, how: str) -> None:
        async with relayed() as (left, a, b, _, _, task):
            await left.send(ping(1))
            if how != "before":
                await asyncio.sleep(0)
            device, other = (a, b) if which == "a" else (b, a)
            if how == "aclose":
                await device.aclose()
            else:
                device.close()
            await asyncio.wait_for(task, 5)
            assert not other.closed

    @pytest.mark.parametrize("which", ["a", "b"])
    async def test_a_lost_device_is_raised(self, which: str) -> None:
        async with relayed() as (left, a, b, right, _, task):
            await asyncio.sleep(0)
            await (left if which == "a" else right).aclose()
            with pytest.raises(DeviceLostError, match=r"memory[01] came to its end"):
                await asyncio.wait_for(asyncio.shield(task), 5)
            assert not a.closed
            assert not b.closed

    @pytest.mark.parametrize("name", ["near0", "far0"])
    async def test_a_deleted_interface_is_raised(self, name: str) -> None:
        async with aiotun.open_tun("near0") as one, aiotun.open_tun("far0", offload="raw") as two:
            task = asyncio.create_task(aiotun.relay(one, two))
            await asyncio.sleep(0)
            ip("link", "del", name)
            with pytest.raises(DeviceLostError, match=name):
                await asyncio.wait_for(task, 5)

    async def test_closed_with_packets_on_their_way_each_is_counted(self) -> None:
        """The far side is full, so packets wait in the relay's hands when it is closed."""
        async with relayed() as (left, _, b, _, stats, task):
            sent = await fill(left, stats)
            b.close()
            await asyncio.wait_for(task, 5)
            counts = stats.a_to_b
            assert counts.unsent > 0
            assert counts.passed + counts.unsent <= sent

    async def test_cancelled_it_closes_neither_and_loses_no_packet(self) -> None:
        async with relayed() as (left, a, b, right, stats, task):
            sent = await fill(left, stats)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not a.closed
            assert not b.closed
            counts = stats.a_to_b
            passed = [await right.recv() for _ in range(counts.passed)]
            waiting = await drain_nowait(a)
            assert len(passed) + counts.unsent + len(waiting) == sent
            assert passed == [ping(seq) for seq in range(counts.passed)]
            assert waiting == [ping(seq) for seq in range(sent - len(waiting), sent)]

    async def test_cancelled_it_sends_what_goes_without_waiting(self) -> None:
        """A task that is cancelled just before there is room again."""
        async with relayed() as (left, a, _, right, stats, task):
            sent = await fill(left, stats)
            got = [right.recv_nowait() for _ in range(stats.a_to_b.passed)]
            task.cancel()
            await asyncio.wait([task])
            assert stats.a_to_b.unsent == 0
            got += await drain_nowait(right)
            got += await drain_nowait(a)
            assert got == [ping(seq) for seq in range(sent)]

    async def test_it_may_be_started_again(self) -> None:
        async with relayed() as (left, a, b, right, _, task):
            task.cancel()
            await asyncio.wait([task])
            again = asyncio.create_task(aiotun.relay(b, a))
            await left.send(ping(1))
            assert await asyncio.wait_for(right.recv(), 5) == ping(1)
            again.cancel()
            await asyncio.wait([again])


async def fill(left: TunDevice, stats: RelayStats) -> int:
    """Send until nothing moves any more; return how many packets went."""
    sent = 0
    while True:
        try:
            left.send_nowait(ping(sent))
        except BlockingIOError:
            before = stats.a_to_b.passed
            for _ in range(5):
                await asyncio.sleep(0)
            if stats.a_to_b.passed == before:
                return sent
        else:
            sent += 1


async def drain_nowait(device: PacketIO) -> list[bytes]:
    got = []
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(device.recv_nowait())
    return got


class TestTrouble:
    @pytest.mark.parametrize("offload", ["off", "split", "raw"])
    async def test_while_a_link_is_down_packets_are_counted_and_it_goes_on(
        self, offload: Any
    ) -> None:
        left, a = memory_pair()
        stats = RelayStats()
        async with left, a, aiotun.open_tun("far0", offload=offload, up=False) as far:
            task = asyncio.create_task(aiotun.relay(a, far, stats=stats))
            for seq in range(3):
                await left.send(ping(seq))
            await wait_until(lambda: stats.a_to_b.link_down == 3)
            await far.link.up()
            await left.send(ping(3))
            await wait_until(lambda: stats.a_to_b.passed == 1)
            assert (await far.link.stats()).rx_packets == 1
            assert stats.a_to_b == RelayCounts(passed=1, link_down=3)
            task.cancel()
            await asyncio.wait([task])

    @pytest.mark.parametrize("offload", ["off", "split"])
    async def test_refused_packets_are_counted_and_it_goes_on(self, offload: Any) -> None:
        """A device with packet information may carry what is neither IPv4 nor IPv6."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        stats = RelayStats()
        with ours:
            async with (
                Queue.from_fd(theirs.detach(), packet_info=True) as queue,
                aiotun.open_tun("far0", offload=offload) as far,
            ):
                for packet in (ping(0), b"\0 is no IP version", ping(1), b"\0", ping(2)):
                    ours.send(b"\0\0\x08\0" + packet)
                task = asyncio.create_task(aiotun.relay(queue, far, stats=stats))
                await wait_until(lambda: stats.a_to_b.passed == 3)
                await wait_until(lambda: stats.a_to_b.refused == 2)
                assert (await far.link.stats()).rx_packets == 3
                assert far.stats.refused == 2
                task.cancel()
                await asyncio.wait([task])


# One second each of a stream through a relay, with other programs at work: each must move data.


async def one_second(offload: Any) -> tuple[int, RelayStats]:
    """Return how many bytes a stream moved in a second, and what the relay counted."""
    stats = RelayStats()
    async with (
        aiotun.new_namespace() as here,
        aiotun.new_namespace() as there,
        aiotun.open_tun("a0", netns=here, addresses=["10.0.0.1/24"], offload=offload) as a,
        aiotun.open_tun("b0", netns=there, addresses=["10.0.0.2/24"], offload=offload) as b,
    ):
        pump = asyncio.create_task(aiotun.relay(a, b, stats=stats))
        moved = 0
        served = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal moved
            while data := await reader.read(1 << 18):
                moved += len(data)
            writer.close()
            served.set()

        server = await there.start_server(serve, "10.0.0.2", 80)
        async with server:
            _, writer = await here.open_connection("10.0.0.2", 80)
            end = time.monotonic() + 1
            block = bytes(1 << 18)
            while time.monotonic() < end:
                writer.write(block)
                await writer.drain()
            writer.close()
            await writer.wait_closed()
            await asyncio.wait_for(served.wait(), 20)
        assert not pump.done(), pump.result()
        pump.cancel()
        await asyncio.wait([pump])
    return moved, stats


async def test_a_stream_moves_in_each_of_thirty_runs_under_load() -> None:
    """Two programs that never rest, beside fifteen runs on each loop.

    A run would move nothing if its SYN were lost: the kernel sends the next one after a second.
    """
    burner = "while True: pass"
    busy = [await asyncio.create_subprocess_exec(sys.executable, "-c", burner) for _ in range(2)]
    try:
        for run in range(15):
            moved, stats = await one_second(("raw", "split", "off")[run % 3])
            assert moved > 1_000_000 // SLOWER, (run, moved, stats)
    finally:
        for each in busy:
            each.kill()
            await each.wait()

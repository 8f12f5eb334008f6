"""Which super-packets the kernel accepts (`Device.offloads`), and kernels that accept fewer."""

import asyncio
import errno
import json
import os
import socket
import types
from typing import Any

import pytest

import aiotun
from aiotun import DeviceMismatchError, Offloads, PacketError, PacketStats, TapDevice, TunDevice
from aiotun._kernel import features, ioctl, namespaces, threads
from aiotun._kernel.abi import Iff, OffloadFlag
from aiotun._packets import native
from aiotun._queue import rawport, splitport
from aiotun.offload import GsoType, VnetHeader, merge
from aiotun.queue import Queue

from ..test_gso import Packet, run_of, written
from .kernel import another_namespace, child, held, make, ordinary_child
from .rig import OURS, PORT, THEIRS
from .test_from_fd import TUN, raw_open

ALL = Offloads.TSO4 | Offloads.TSO6 | Offloads.USO
TCP = Offloads.TSO4 | Offloads.TSO6
NONE = Offloads(0)

_UDP_SEGMENT = 103  # udp.h


class OldKernel:
    """Refuses super-packets of UDP in every way that Linux does before 6.2.

    This kernel accepts them, so aiotun's system calls go through here.
    """

    def __init__(self) -> None:
        self.limit = 1 << 30  # how many more packets find room
        self.kinds: list[int] = []  # gso_type of everything that was written

    def set_offload(self, fd: int, name: str, mask: OffloadFlag) -> None:
        if mask & (OffloadFlag.USO4 | OffloadFlag.USO6):
            raise DeviceMismatchError(errno.EINVAL, "unknown offloads", name)
        _set_offload(fd, name, mask)

    def write(self, fd: int, data: bytes) -> int:
        self.kinds.append(data[1])
        if data[1] == GsoType.UDP_L4:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not self.limit:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.limit -= 1
        return os.write(fd, data)


_set_offload = ioctl.set_offload


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> OldKernel:
    kernel = OldKernel()
    monkeypatch.setattr(ioctl, "set_offload", kernel.set_offload)
    monkeypatch.setattr(features, "has_feature", lambda name, feature: False)
    monkeypatch.setattr(rawport, "_write", kernel.write)
    monkeypatch.setattr(splitport, "_write", kernel.write)
    # The twins in Python, whose writes can be replaced.
    calls = types.SimpleNamespace(**{**vars(os), "write": kernel.write})
    monkeypatch.setattr(native, "os", calls)
    monkeypatch.setattr(native, "write_many", native._write_many)
    monkeypatch.setattr(splitport, "_write_merged", native._write_merged)
    return kernel


def opener(mode: str) -> Any:
    return aiotun.open_tun if mode == "tun" else aiotun.open_tap


class TestOffloads:
    @pytest.mark.parametrize("mode", ["tun", "tap"])
    async def test_a_device_tells_what_the_kernel_took(self, mode: str) -> None:
        if not features_know_udp():
            pytest.skip("this kernel has no UDP segmentation offload")
        for offload, expected in (("off", NONE), ("split", ALL), ("raw", ALL)):
            async with opener(mode)("own0", offload=offload) as device:
                assert device.offloads == device.queues[0].offloads == expected
            assert device.offloads == expected  # after closing, too

    @pytest.mark.parametrize("offload", ["split", "raw"])
    async def test_before_linux_6_2_there_is_no_udp(
        self, offload: str, old_kernel: OldKernel
    ) -> None:
        async with opener("tun")("own0", offload=offload) as tun:
            assert tun.offloads == TCP
            assert Offloads.USO not in tun.offloads

    @pytest.mark.parametrize("known", [True, False, None])
    async def test_of_a_shared_device_the_driver_is_asked(
        self, known: bool | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(features, "has_feature", lambda name, feature: known)
        flags = TUN | Iff.VNET_HDR | Iff.MULTI_QUEUE
        with held("own0", flags) as (fd,):
            _set_offload(fd, "own0", OffloadFlag.CSUM)
            async with aiotun.open_tun("own0", offload="raw", multi_queue=True) as tun:
                assert tun.offloads == (ALL if known else TCP)

    @pytest.mark.parametrize("known", [True, False, None])
    async def test_of_an_adopted_device_the_driver_is_asked(
        self, known: bool | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(features, "has_feature", lambda name, feature: known)
        expected = ALL if known else TCP
        async with TunDevice.from_fd(raw_open("given0", TUN | Iff.VNET_HDR)) as tun:
            assert tun.offloads == expected
            duplicate = os.dup(tun.queues[0].fileno())
            async with Queue.from_fd(duplicate, offload="split") as queue:
                assert queue.offloads == expected

    async def test_without_a_virtio_header_there_are_none(self) -> None:
        async with TunDevice.from_fd(raw_open("given0", TUN)) as tun:
            assert tun.offloads == NONE

    async def test_a_socket_accepts_all(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            async with Queue.from_fd(ours.detach(), offload="raw") as queue:
                assert queue.offloads == ALL

    def test_where_the_interface_cannot_be_reached_tcp_is_certain(self) -> None:
        """And a stranger of the same name, here, is not asked in its place."""
        make("given0", "tun", "vnet_hdr")
        with another_namespace() as path:
            there = namespaces.NamespaceFd(namespaces.open_netns(path))
            flags = TUN | Iff.VNET_HDR
            fd = threads.run_blocking(lambda: raw_open("given0", flags), there.fd)
            try:
                said = ordinary_child(
                    f"""
                    device = aiotun.TunDevice.from_fd(os.dup({fd}))
                    queue = aiotun.Queue.from_fd({fd}, offload="raw")
                    print(json.dumps([device.offloads.value, queue.offloads.value]))
                    device.close()
                    queue.close()
                    """,
                    fds=[fd],
                )
            finally:
                os.close(fd)
        assert said == [TCP.value] * 2, json.dumps(said)

    def test_what_the_driver_can_do_is_read_by_name(self) -> None:
        make("own0")
        assert features.has_feature("own0", "tx-tcp-segmentation") is True
        assert features.has_feature("own0", "no such feature") is False
        assert features.has_feature("none0", "tx-tcp-segmentation") is None


def features_know_udp() -> bool:
    make("ask0")
    known = bool(features.has_feature("ask0", "tx-udp-segmentation"))
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        ioctl.attach(fd, "ask0", TUN)
        ioctl.set_persist(fd, "ask0", False)
    finally:
        os.close(fd)
    return known


@pytest.mark.parametrize("offload", ["split", "raw"])
def test_further_devices_take_no_more_memory(offload: str) -> None:
    said = child(
        f"""
        def resident():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

        async def main():
            found = []
            for _ in range(4):
                async with aiotun.open_tun(offload={offload!r}):
                    found.append(resident())
            print(json.dumps(found))

        asyncio.run(main())
        """
    )
    assert said[-1] - said[0] < 4096  # kB; once it was 16 MiB


DATAGRAMS = written(run_of(Packet(protocol="udp"), [100] * 10))
SEGMENTS = written(run_of(Packet(), [100] * 10))


class TestWithoutUdp:
    """Forwarding to a kernel before 6.2 does the right thing without the user's knowing."""

    @pytest.mark.parametrize("mode", ["tun", "tap"])
    @pytest.mark.parametrize("size", [10, 12])
    async def test_raw_sends_the_packets_of_a_super_packet(
        self, mode: str, size: int, old_kernel: OldKernel
    ) -> None:
        link = bytes.fromhex("020000000002020000000001") if mode == "tap" else b""
        datagrams = written(run_of(Packet(protocol="udp", link=link), [100] * 10))
        segments = written(run_of(Packet(link=link), [100] * 10))
        merged = merge(segments + datagrams, frame=mode == "tap")
        longer = [each[:10] + bytes(size - 10) + each[10:] for each in merged]
        flags = (Iff.TUN if mode == "tun" else Iff.TAP) | Iff.NO_PI | Iff.VNET_HDR
        fd = raw_open("given0", flags)
        ioctl.set_vnet_header_size(fd, "given0", size)
        ioctl.set_up("given0")
        async with (TunDevice if mode == "tun" else TapDevice).from_fd(fd) as device:
            assert await device.send_many(longer * 2) == 4
            kinds = [GsoType.TCPV4, *[GsoType.UDP_L4] * 2, *[0] * 10]
            assert old_kernel.kinds == kinds * 2
            await device.send(longer[1])
            device.send_nowait(longer[1])
            assert device.stats == PacketStats(split_fallbacks=4)
            counted = (await device.link.stats()).rx_packets
            assert counted == 2 * 11 + 2 * 10

    async def test_datagrams_arrive_from_split_to_raw(self, old_kernel: OldKernel) -> None:
        """The forwarder of the documentation: `merge`, and `send_many`."""
        data = [bytes([letter]) * 100 for letter in b"abcde"]
        with another_namespace() as there:
            async with (
                aiotun.open_tun("near0", offload="split", addresses=[f"{OURS}/24"]) as near,
                aiotun.open_tun(
                    "far0", netns=there, offload="raw", addresses=[f"{THEIRS}/24"]
                ) as far,
            ):
                fd = os.open(there, os.O_RDONLY)
                try:
                    sock = threads.run_blocking(
                        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), fd
                    )
                finally:
                    os.close(fd)
                with sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sock.bind((THEIRS, PORT))
                    sock.settimeout(5)
                    sender.connect((THEIRS, PORT))
                    sender.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 100)
                    sender.send(b"".join(data))
                    batch: list[bytes] = []
                    async with asyncio.timeout(5):
                        while len(batch) < len(data):
                            batch += await near.recv_many()
                    await far.send_many(merge(batch))
                    assert far.stats == PacketStats(split_fallbacks=1)
                    await far.send_many(merge(batch, udp=Offloads.USO in far.offloads))
                    assert far.stats == PacketStats(split_fallbacks=1)
                    assert [sock.recv(200) for _ in range(10)] == data * 2

    async def test_split_merges_tcp_only(self, old_kernel: OldKernel) -> None:
        async with aiotun.open_tun("own0", offload="split") as tun:
            assert await tun.send_many(DATAGRAMS + SEGMENTS) == 20
            assert old_kernel.kinds == [0] * 10 + [GsoType.TCPV4]
            assert tun.stats == PacketStats()

    async def test_a_super_packet_that_finds_no_room_goes_on_where_it_stopped(
        self, old_kernel: OldKernel
    ) -> None:
        (whole,) = merge(DATAGRAMS)
        async with aiotun.open_tun("own0", offload="raw") as tun:
            old_kernel.limit = 3
            with pytest.raises(BlockingIOError):
                tun.send_nowait(whole)
            old_kernel.limit = 1 << 30
            tun.send_nowait(bytearray(whole))
            assert (await tun.link.stats()).rx_packets == 10
            # Another packet in its place begins at its own beginning.
            old_kernel.limit = 3
            with pytest.raises(BlockingIOError):
                tun.send_nowait(whole)
            old_kernel.limit = 1 << 30
            (another,) = merge(DATAGRAMS[:5])
            tun.send_nowait(another)
            assert (await tun.link.stats()).rx_packets == 10 + 3 + 5

    async def test_a_task_that_waits_for_room_goes_on_where_it_stopped(
        self, old_kernel: OldKernel
    ) -> None:
        (whole,) = merge(DATAGRAMS)
        async with aiotun.open_tun("own0", offload="raw") as tun:
            old_kernel.limit = 3
            sending = asyncio.create_task(tun.send_many([whole, *merge(SEGMENTS)]))
            await asyncio.sleep(0)
            old_kernel.limit = 1 << 30
            assert await sending == 2
            assert (await tun.link.stats()).rx_packets == 11


def refuse(fd: int, data: bytes) -> int:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class TestTheErrorNamesTheCause:
    async def test_of_a_super_packet_that_cannot_be_split_either(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Linux 5.10 accepts a gso_type that contradicts the packet, so the refusal is simulated.
        monkeypatch.setattr(rawport, "_write", refuse)
        (whole,) = merge(DATAGRAMS)
        header = VnetHeader.unpack(whole)
        async with aiotun.open_tun("own0", offload="raw") as tun:
            for broken, reason in (
                (header._replace(gso_size=0), "gso_size must not be 0"),
                (header._replace(gso_type=GsoType.TCPV6), "gso_type 4 does not match"),
                (header._replace(gso_type=GsoType.TCPV4), "gso_type 1 does not match"),
            ):
                with pytest.raises(PacketError, match="single packets: " + reason) as caught:
                    await tun.send(broken.pack() + whole[10:])
                assert caught.value.errno == errno.EINVAL
            assert tun.stats == PacketStats(refused=3)

    async def test_of_a_packet_that_is_none(self) -> None:
        async with aiotun.open_tun("own0", offload="raw") as tun:
            for packet in (bytes(5), bytes(11), bytes(10) + b"\0 is no IP version"):
                with pytest.raises(PacketError, match="look at its header"):
                    await tun.send(packet)


@pytest.mark.parametrize("packet", [b"", bytes(9), bytes(10), bytes(40)], ids=len)
async def test_what_is_no_super_packet_is_refused_with_raw_too(packet: bytes) -> None:
    async with opener("tun")("own0", offload="raw") as tun:
        for _ in range(2):
            with pytest.raises(aiotun.PacketError):
                await tun.send(packet)
            with pytest.raises(aiotun.PacketError) as caught:
                await tun.send_many([packet, packet])
            assert caught.value.unsent == [packet, packet]
        assert tun.stats.refused == 4

"""Fds that somebody else opened: their headers, and interfaces that we may not look at."""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun import TunDevice
from aiotun._kernel import namespaces, rtnetlink, threads
from aiotun._kernel.abi import Iff, Ioctl, OffloadFlag
from aiotun._kernel.words import Offload
from aiotun.capture import PcapWriter
from aiotun.offload import VnetHeader, merge, split
from aiotun.queue import Queue

from ..helpers import REAL_ROOT, ip, make_icmp_echo
from ..test_gso import Packet, run_of, written
from .kernel import another_namespace, inside, make, names, ordinary_child
from .rig import OURS, PORT, THEIRS, udp
from .test_from_fd import TAP, TUN, raw_open, untouched

_UDP_SEGMENT = 103  # udp.h

FromFd = Callable[..., Any]
each_from_fd = pytest.mark.parametrize(
    "from_fd", [Queue.from_fd, TunDevice.from_fd], ids=["queue", "device"]
)


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Fds that are the test's to close."""
    opened: list[int] = []
    yield opened
    for fd in opened:
        with contextlib.suppress(OSError):
            os.close(fd)


_NONE = OffloadFlag(0)
_ALL = OffloadFlag.CSUM | OffloadFlag.TSO4 | OffloadFlag.TSO6 | OffloadFlag.USO4 | OffloadFlag.USO6


def open_with_header(size: int, offloads: OffloadFlag = _NONE) -> int:
    """Open a device as a virtual machine monitor does, with a virtio-net header of that size."""
    fd = raw_open("given0", TUN | Iff.VNET_HDR)
    fcntl.ioctl(fd, Ioctl.TUNSETVNETHDRSZ, struct.pack("i", size))
    fcntl.ioctl(fd, Ioctl.TUNSETOFFLOAD, int(offloads))
    ip("link", "set", "given0", "up")
    ip("addr", "add", f"{OURS}/24", "dev", "given0")
    return fd


def send_datagrams(*data: bytes) -> None:
    """Have the kernel send datagrams of 100 bytes, in one super-packet where it can."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((OURS, 7777))
        sock.connect((THEIRS, PORT))
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 100)
        sock.send(b"".join(data))


DATA = [bytes([letter]) * 100 for letter in b"abcde"]


def _written_nothing(fd: int, packets: list[bytes], *args: object) -> range:
    return range(len(packets))


class TestAVirtioHeader:
    @each_from_fd
    @pytest.mark.parametrize("size", [10, 12])
    async def test_raw_is_the_fds_own(self, from_fd: FromFd, size: int) -> None:
        async with from_fd(open_with_header(size, _ALL), offload="raw") as io:
            assert io.vnet_header_size == size
            send_datagrams(*DATA)
            packet = await asyncio.wait_for(io.recv(), 5)
            header = VnetHeader.unpack(packet, size)
            assert header.num_buffers == (None if size == 10 else 0)
            assert packet[size] == 0x45
            parts = split(packet[:10] + packet[size:])
            while len(parts) < len(DATA):  # a kernel that does not leave this to us
                parts.append((await asyncio.wait_for(io.recv(), 5))[size:])
            assert [part[28:] for part in parts] == DATA
            ping = make_icmp_echo(THEIRS, OURS)
            await io.send(VnetHeader(num_buffers=None if size == 10 else 1).pack() + ping)
            answer = await asyncio.wait_for(io.recv(), 5)
            assert (len(answer), answer[size + 20]) == (size + len(ping), 0)
        assert names() == []

    @each_from_fd
    @pytest.mark.parametrize("size", [10, 12])
    async def test_split_does_not_show_it(self, from_fd: FromFd, size: int) -> None:
        async with from_fd(open_with_header(size, _ALL), offload="split") as io:
            assert io.vnet_header_size == size
            send_datagrams(*DATA)
            assert [(await asyncio.wait_for(io.recv(), 5))[28:] for _ in DATA] == DATA
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((OURS, 7777))
                sock.settimeout(5)
                packets = [udp(THEIRS, PORT, OURS, 7777, data) for data in DATA]
                await io.send(packets[0])
                assert await io.send_many(packets[1:]) == 4
                assert [sock.recv(200) for _ in DATA] == DATA
            assert io.stats == aiotun.PacketStats()

    @pytest.mark.parametrize("size", [10, 12])
    async def test_what_split_writes_when_merging_is_refused(
        self, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The slow way has the same header: a super-packet by itself, and its packets."""
        written_ones: list[bytes] = []

        def write(fd: int, data: bytes) -> int:
            written_ones.append(data)
            if data[1]:
                raise OSError(errno.EINVAL, "Invalid argument")
            return os.write(fd, data)

        monkeypatch.setattr("aiotun._queue.splitport._write", write)
        monkeypatch.setattr("aiotun._queue.splitport._write_merged", _written_nothing)
        packets = written(run_of(Packet(), [100] * 3))
        (whole,) = merge(packets)
        async with Queue.from_fd(open_with_header(size), offload="split") as queue:
            assert await queue.send_many(packets) == 3
        padding = bytes(size - 10)
        assert written_ones[0] == whole[:10] + padding + whole[10:]
        assert [each[:size] for each in written_ones[1:]] == [bytes(size)] * 3
        assert [each[size:] for each in written_ones[1:]] == split(whole)

    @pytest.mark.parametrize("size", [10, 12])
    async def test_decoding_and_capturing_skip_it(self, size: int, tmp_path: Path) -> None:
        fd = open_with_header(size)
        own = udp(THEIRS, PORT, OURS, 9)
        async with TunDevice.from_fd(fd) as tun:
            with PcapWriter(tmp_path / "a.pcap", tun.mode) as writer, tun.capture(writer):
                send_datagrams(b"x")
                decoded = await asyncio.wait_for(anext(tun.decoded(errors="raise")), 5)
                assert decoded.udp.data == b"x"
                await tun.send(bytes(size) + own)
        data = (tmp_path / "a.pcap").read_bytes()
        assert data[24 + 16] == 0x45
        assert data.endswith(own)

    @pytest.mark.parametrize("size", [11, 13, 20, 24, 1000])
    @each_from_fd
    def test_of_any_other_size(self, fds: list[int], from_fd: FromFd, size: int) -> None:
        fds.append(open_with_header(size))
        for offload in ("raw", "split"):
            with pytest.raises(
                aiotun.DeviceMismatchError, match=f"given0 .* header of {size} bytes; .* 10 or 12"
            ):
                from_fd(fds[0], offload=offload)
        assert untouched(*fds)

    async def test_no_header_has_no_size(self) -> None:
        async with aiotun.open_tun("given0") as tun:
            assert tun.vnet_header_size == tun.queues[0].vnet_header_size == 0
        async with aiotun.open_tun("given0", offload="split") as tun:
            assert tun.vnet_header_size == tun.queues[0].vnet_header_size == 10

    def test_the_texts_are_the_same(self, fds: list[int]) -> None:
        fds += [raw_open("given0", TUN), raw_open("given1", TUN | Iff.VNET_HDR)]
        said: list[set[str]] = []
        pairs: list[tuple[int, Offload]] = [(fds[0], "raw"), (fds[1], "off")]
        for fd, offload in pairs:
            texts = set()
            for from_fd in (Queue.from_fd, TunDevice.from_fd):
                with pytest.raises(aiotun.DeviceMismatchError) as caught:
                    from_fd(fd, offload=offload)
                texts.add(str(caught.value))
            said.append(texts)
        assert [len(texts) for texts in said] == [1, 1]


class TestPacketInformation:
    @each_from_fd
    def test_unsaid_is_refused(self, fds: list[int], from_fd: FromFd) -> None:
        """pytun and others open with it by default."""
        fds.append(raw_open("given0", Iff.TUN))
        with pytest.raises(
            aiotun.DeviceMismatchError, match=r"given0 has a packet-info header.*packet_info=True"
        ) as caught:
            from_fd(fds[0])
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "given0")
        assert untouched(*fds)

    @each_from_fd
    def test_said_and_missing_is_refused(self, fds: list[int], from_fd: FromFd) -> None:
        fds.append(raw_open("given0", TUN))
        with pytest.raises(aiotun.DeviceMismatchError, match="given0 has no packet-info header"):
            from_fd(fds[0], packet_info=True)
        assert untouched(*fds)

    @each_from_fd
    def test_with_a_virtio_header(self, fds: list[int], from_fd: FromFd) -> None:
        fds.append(raw_open("given0", Iff.TUN | Iff.VNET_HDR))
        with pytest.raises(ValueError, match="packet_info"):
            from_fd(fds[0], offload="raw", packet_info=True)
        with pytest.raises(aiotun.DeviceMismatchError, match="IFF_NO_PI"):
            from_fd(fds[0], offload="raw")
        assert untouched(*fds)

    @each_from_fd
    async def test_said_is_taken(self, from_fd: FromFd) -> None:
        fd = raw_open("given0", Iff.TUN)
        ip("link", "set", "given0", "up")
        ip("addr", "add", "10.0.0.1/24", "dev", "given0")
        async with from_fd(fd, packet_info=True) as io:
            await io.send(bytes.fromhex("00000800") + make_icmp_echo("10.0.0.2", "10.0.0.1"))
            decoded = await asyncio.wait_for(anext(io.decoded(errors="raise")), 5)
            assert decoded.src == socket.inet_aton("10.0.0.1")

    @each_from_fd
    def test_in_another_namespace(self, fds: list[int], from_fd: FromFd) -> None:
        """The kernel says where it is; what is called so here does not matter."""
        make("given0")
        with another_namespace() as path:
            there = namespaces.NamespaceFd(namespaces.open_netns(path))
            fds.append(threads.run_blocking(lambda: raw_open("given0", Iff.TUN), there.fd))
            with pytest.raises(aiotun.DeviceMismatchError, match="packet_info=True"):
                from_fd(fds[0])
            assert untouched(*fds)

    def test_packet_info_is_told_to_an_ordinary_user_too(self, fds: list[int]) -> None:
        fds += [raw_open("given0", Iff.TUN), raw_open("given1", Iff.TAP)]
        said = ordinary_child(
            f"""
            said = []
            for fd, kind in (({fds[0]}, aiotun.TunDevice), ({fds[1]}, aiotun.TapDevice)):
                for from_fd in (aiotun.Queue.from_fd, kind.from_fd):
                    try:
                        from_fd(fd)
                    except aiotun.DeviceMismatchError as error:
                        said.append("packet_info=True" in str(error))
                    from_fd(os.dup(fd), packet_info=True).close()
            print(json.dumps(said))
            """,
            fds=fds,
        )
        assert said == [True] * 4

    async def test_of_a_socket_it_is_believed(self) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with right:
            async with Queue.from_fd(left.detach(), packet_info=True) as queue:
                right.send(bytes(4) + make_icmp_echo("10.0.0.2", "10.0.0.1"))
                decoded = await asyncio.wait_for(anext(queue.decoded(errors="raise")), 5)
                assert decoded.src == socket.inet_aton("10.0.0.2")
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with left, right, pytest.raises(ValueError, match="packet_info"):
            Queue.from_fd(left.fileno(), "raw", packet_info=True)

    @pytest.mark.parametrize("flags", [TUN, TAP, Iff.TUN, Iff.TAP | Iff.VNET_HDR])
    @pytest.mark.parametrize("more", [Iff(0), Iff.MULTI_QUEUE])
    def test_what_netlink_says(self, fds: list[int], flags: Iff, more: Iff) -> None:
        fds.append(raw_open("given0", flags | more))
        index = socket.if_nametoindex("given0")
        assert rtnetlink.get_flags(index) == flags | more
        fcntl.ioctl(fds[0], Ioctl.TUNSETPERSIST, 1)
        assert rtnetlink.get_flags(index) == flags | more | Iff.PERSIST

    def test_what_netlink_does_not_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ip("link", "add", "br0", "type", "bridge")
        for name in ("lo", "br0"):
            assert rtnetlink.get_flags(socket.if_nametoindex(name)) is None
        assert rtnetlink.get_flags(12345) is None

        def refuse(*args: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        with monkeypatch.context() as patch:
            patch.setattr("aiotun._kernel.rtnetlink.socket.socket", refuse)
            assert rtnetlink.get_flags(1) is None


CONVERSE = """
    async def converse(device):
        async with device:
            ping = bytes.fromhex({ping!r})
            await device.send(ping)
            answer = b"\\x60"
            while answer[:1] == b"\\x60":  # what IPv6 says unasked
                answer = await asyncio.wait_for(device.recv(), 5)
            assert (answer[20], answer[24:]) == (0, ping[24:])
            said = [device.name, device.index, device.mtu]
            for ask in (device.link.info(), device.link.set_mtu(1400), anext(device.link.events())):
                try:
                    await ask
                except aiotun.AiotunError as error:
                    said.append([type(error).__name__, "can't look into" in str(error)])
        print(json.dumps(said))
"""
PING = CONVERSE.format(ping=make_icmp_echo("10.0.0.2", "10.0.0.1").hex())


OPEN_AND_SEND = f"""
import fcntl, os, socket, struct, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, {int(Ioctl.TUNSETIFF)}, struct.pack("16sH22x", b"given0", {int(TAP)}))
with socket.socket(fileno=int(sys.argv[1])) as channel:
    socket.send_fds(channel, [b"x"], [fd])
"""


class TestElsewhere:
    """Where we may not look at the interface, packets pass all the same."""

    @contextlib.contextmanager
    def given(self, fds: list[int], flags: Iff) -> Iterator[None]:
        """Have a device in another namespace, which knows nothing of an ordinary user."""
        with another_namespace() as path:
            there = namespaces.NamespaceFd(namespaces.open_netns(path))
            fds.append(threads.run_blocking(lambda: raw_open("given0", flags), there.fd))
            inside(path, "ip", "link", "set", "given0", "up")
            inside(path, "ip", "addr", "add", "10.0.0.1/24", "dev", "given0")
            yield

    @pytest.mark.parametrize("stranger", [None, "tap", "tun"])
    def test_in_a_namespace_of_which_nobody_tells(
        self, fds: list[int], stranger: str | None
    ) -> None:
        """A stranger of the same name, here, is neither asked nor changed."""
        if stranger is not None:
            make("given0", stranger)  # persistent, which the other is not
        with self.given(fds, TUN):
            said = ordinary_child(
                f"{PING}\n    asyncio.run(converse(aiotun.TunDevice.from_fd({fds[0]})))", fds=fds
            )
        assert said == ["given0", 0, 0] + [["LinkError", True]] * 3

    def test_packet_information_is_believed_there(self, fds: list[int]) -> None:
        make("given0")
        with self.given(fds, Iff.TUN):
            said = ordinary_child(
                f"""
                for from_fd in (aiotun.Queue.from_fd, aiotun.TunDevice.from_fd):
                    from_fd(os.dup({fds[0]}), packet_info=True).close()
                    from_fd(os.dup({fds[0]})).close()
                print("[]")
                """,
                fds=fds,
            )
        assert said == []

    def test_a_namespace_that_was_named_has_another(self, fds: list[int]) -> None:
        make("given0", "tap")
        with self.given(fds, TUN):
            said = ordinary_child(
                f"""
                try:
                    aiotun.TunDevice.from_fd({fds[0]}, netns="/proc/self/ns/net")
                except aiotun.LinkError as error:
                    print(json.dumps([error.errno, str(error)]))
                """,
                fds=fds,
            )
        assert said[0] == errno.ENODEV
        assert "not the one that the fd is a queue of" in said[1]

    def test_in_a_user_namespace_of_ones_own(self) -> None:
        """Its maker is told where the interface is, and still may not go there."""
        if not REAL_ROOT:
            pytest.skip("an ordinary user's run: who maps root needs CAP_SETFCAP to map it again")
        said = ordinary_child(
            f"""
            import socket, subprocess

            ours, theirs = socket.socketpair()
            with ours, theirs:
                command = [sys.executable, "-c", {OPEN_AND_SEND!r}, str(theirs.fileno())]
                subprocess.run(
                    ["unshare", "-rn", *command], pass_fds=[theirs.fileno()], check=True, timeout=20
                )
                _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)

            async def main():
                async with aiotun.Queue.from_fd(os.dup(fd)) as queue:
                    said = [queue.name]
                async with aiotun.TapDevice.from_fd(fd) as tap:
                    said += [tap.name, tap.mode, tap.index, tap.mtu]
                    try:
                        await tap.link.up()
                    except aiotun.NotPermittedError as error:
                        said.append("namespace" in str(error))
                    try:
                        await tap.send(bytes(14))
                    except aiotun.LinkDownError:
                        said.append("down")
                print(json.dumps(said))

            asyncio.run(main())
            """
        )
        assert said == ["given0", "given0", "tap", 0, 0, True, "down"]

"""Devices and queues made from fds that other code opened."""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

import aiotun
from aiotun._kernel import abi, namespaces, threads
from aiotun._kernel.abi import Iff, Ioctl
from aiotun._kernel.words import Offload
from aiotun.queue import Queue

from ..helpers import ip, make_icmp_echo
from .kernel import another_namespace, held, link, make, names, ordinary_child

TUN = Iff.TUN | Iff.NO_PI
TAP = Iff.TAP | Iff.NO_PI

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def raw_open(name: str, flags: Iff) -> int:
    """Attach a blocking, inheritable fd, as a C program could."""
    fd = os.open(abi.NODE, os.O_RDWR)
    try:
        fcntl.ioctl(fd, Ioctl.TUNSETIFF, abi.IFREQ.pack(name.encode(), flags))
    except OSError:
        os.close(fd)
        raise
    os.set_inheritable(fd, True)
    return fd


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Fds that are closed at the end unless a device has taken them; the test closes the device."""
    opened: list[int] = []
    yield opened
    for fd in opened:
        with contextlib.suppress(OSError):
            os.close(fd)


def untouched(*fds: int) -> bool:
    """Whether the fds are as `raw_open` left them."""
    return all(os.get_blocking(fd) and os.get_inheritable(fd) for fd in fds)


class TestWhatTheKernelTells:
    @pytest.mark.parametrize("kind", ["tun", "tap"])
    async def test_kind_name_index_and_mtu(self, kind: str) -> None:
        fd = raw_open("given0", TUN if kind == "tun" else TAP)
        ip("link", "set", "given0", "mtu", "1333")
        cls = aiotun.TunDevice if kind == "tun" else aiotun.TapDevice
        device = cls.from_fd(fd)
        assert type(device) is cls
        assert (device.name, device.mode, device.mtu) == ("given0", kind, 1333)
        assert device.index == socket.if_nametoindex("given0")
        assert (device.offload, len(device.queues)) == ("off", 1)
        assert device.fileno() == device.queues[0].fileno() == fd
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        await device.link.up()
        assert "UP" in link("given0")["flags"]
        await device.aclose()
        assert names() == []

    async def test_the_interfaces_present_name_is_used(self) -> None:
        fd = raw_open("given0", TUN)
        ip("link", "set", "given0", "name", "other0")
        async with aiotun.TunDevice.from_fd(fd) as tun:
            assert tun.name == "other0"

    @pytest.mark.parametrize("offload", [None, "raw"])
    async def test_a_virtio_header_is_recognized(self, offload: Any) -> None:
        fd = raw_open("given0", TUN | Iff.VNET_HDR)
        async with aiotun.TunDevice.from_fd(fd, offload=offload) as tun:
            assert tun.offload == tun.queues[0].offload == "raw"
            await tun.link.up()
            await tun.link.add_address("10.0.0.1/24")
            ping = make_icmp_echo("10.0.0.2", "10.0.0.1")
            await tun.send(bytes(10) + ping)
            answer = await asyncio.wait_for(tun.recv(), 5)
            assert (len(answer), answer[30]) == (10 + len(ping), 0)

    async def test_packet_info_is_taken_off_before_decoding(self) -> None:
        fd = raw_open("given0", Iff.TUN)
        async with aiotun.TunDevice.from_fd(fd, packet_info=True) as tun:
            await tun.link.up()
            await tun.link.add_address("10.0.0.1/24")
            await tun.send(bytes.fromhex("00000800") + make_icmp_echo("10.0.0.2", "10.0.0.1"))
            decoded = await asyncio.wait_for(anext(tun.decoded(errors="raise")), 5)
            assert decoded.src == socket.inet_aton("10.0.0.1")

    async def test_several_fds_become_queues_of_one_device(self) -> None:
        fds = [raw_open("given0", TUN | Iff.MULTI_QUEUE) for _ in range(3)]
        async with aiotun.TunDevice.from_fd(*fds) as tun:
            assert [queue.fileno() for queue in tun.queues] == fds
            assert not any(os.get_blocking(fd) or os.get_inheritable(fd) for fd in fds)
            tun.queues[2].disable()
            await tun.link.up()
            await tun.link.add_address("10.0.0.1/24")
            await tun.send(make_icmp_echo("10.0.0.2", "10.0.0.1"))
            assert (await asyncio.wait_for(tun.recv(), 5))[20] == 0
        assert names() == []

    async def test_the_namespace_of_the_fd_is_found(self) -> None:
        with another_namespace() as path:
            async with aiotun.open_tun("given0", netns=path, mtu=1400) as opened:
                fd = opened.queues[0].detach()
                for netns in (None, path):  # the kernel tells us the namespace
                    tun = aiotun.TunDevice.from_fd(fd, netns=netns)
                    assert (tun.name, tun.mtu) == ("given0", 1400)
                    await tun.link.set_mtu(1300)
                    assert tun.mtu == 1300
                    await tun.link.set_mtu(1400)
                    tun.queues[0].detach()
                os.close(fd)
        assert names() == []

    async def test_the_namespaces_fd_is_duplicated(self) -> None:
        fd = raw_open("given0", TUN)
        netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            async with aiotun.TunDevice.from_fd(fd, netns=netns) as tun:
                os.fstat(netns)
                os.close(netns)
                netns = -1
                await tun.link.set_mtu(1400)
                assert link("given0")["mtu"] == 1400
        finally:
            if netns >= 0:
                os.close(netns)

    @pytest.mark.parametrize("kind", LOOPS)
    def test_before_there_is_a_loop(self, kind: str) -> None:
        """`from_fd` is not a coroutine: a program may call it before it runs a loop."""
        tun = aiotun.TunDevice.from_fd(raw_open("given0", TUN))

        async def main() -> None:
            async with tun:
                await tun.link.up()
                await tun.link.add_address("10.0.0.1/24")
                await tun.send(make_icmp_echo("10.0.0.2", "10.0.0.1"))
                assert (await asyncio.wait_for(tun.recv(), 5))[20] == 0

        with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
            runner.run(main())
        assert names() == []


class TestHandedOver:
    CODE = """
        import array, asyncio, socket, sys
        import aiotun

        def received():
            with socket.socket(fileno=int(sys.argv[2])) as channel:
                data, ancillary, flags, _ = channel.recvmsg(1, socket.CMSG_LEN(64))
                fds = array.array("i")
                for level, kind, payload in ancillary:
                    fds.frombytes(payload[: len(payload) // 4 * 4])
                return list(fds)

        fds = received() if sys.argv[1] == "scm" else [int(each) for each in sys.argv[2:]]

        async def main():
            async with aiotun.TunDevice.from_fd(*fds) as tun:
                print(tun.name, tun.index, tun.mtu, tun.mode, len(tun.queues), flush=True)
                async for packet in tun:
                    await tun.send(aiotun.reply.icmp_echo(packet))
                    return

        asyncio.run(main())
    """

    def start(self, fds: list[int], *args: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(self.CODE), *args],
            pass_fds=fds,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def prepare(self, queues: int, fds: list[int]) -> None:
        flags = TUN | Iff.MULTI_QUEUE if queues > 1 else TUN
        fds += [raw_open("given0", flags) for _ in range(queues)]
        ip("link", "set", "given0", "up", "mtu", "1450")
        ip("addr", "add", "10.0.0.1/24", "dev", "given0")

    def converse(self, child: "subprocess.Popen[str]", queues: int) -> None:
        """Ping through the child, which answers its first packet."""
        assert child.stdout is not None
        index = socket.if_nametoindex("given0")
        with child:
            assert child.stdout.readline() == f"given0 {index} 1450 tun {queues}\n"
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ping:
                ping.settimeout(10)
                ping.bind(("10.0.0.1", 0))
                ping.sendto(make_icmp_echo("10.0.0.1", "10.0.0.2")[20:], ("10.0.0.2", 0))
                answer = ping.recv(100)
            assert answer[20] == 0
            assert child.communicate(timeout=10) == ("", "")
        assert child.returncode == 0

    @pytest.mark.parametrize("queues", [1, 2])
    def test_a_child_uses_inherited_fds(self, fds: list[int], queues: int) -> None:
        self.prepare(queues, fds)
        child = self.start(fds, "inherited", *(str(fd) for fd in fds))
        self.converse(child, queues)
        # The child has closed its copies; ours keep the interface.
        assert names() == ["given0"]

    @pytest.mark.parametrize("queues", [1, 2])
    def test_another_process_uses_fds_received_in_a_message(
        self, fds: list[int], queues: int
    ) -> None:
        self.prepare(queues, fds)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            child = self.start([theirs.fileno()], "scm", str(theirs.fileno()))
            socket.send_fds(ours, [b"x"], fds)
        for fd in fds:
            os.close(fd)
        self.converse(child, queues)
        assert names() == []

    @pytest.mark.parametrize("queues", [1, 2])
    def test_an_ordinary_user_uses_fds_that_root_opened(self, fds: list[int], queues: int) -> None:
        """Only opening the device needs a privilege, using it does not."""
        self.prepare(queues, fds)
        said = ordinary_child(
            f"""
            import pathlib

            async def main():
                status = pathlib.Path("/proc/self/status").read_text()
                assert "CapEff:\\t0000000000000000" in status
                async with aiotun.TunDevice.from_fd(*{fds}) as tun:
                    info = await tun.link.info()
                    ping = bytes.fromhex({make_icmp_echo("10.0.0.2", "10.0.0.1").hex()!r})
                    await tun.send(ping)
                    answer = await asyncio.wait_for(tun.recv(), 5)
                    assert (answer[20], answer[24:]) == (0, ping[24:])
                    try:
                        await tun.link.set_mtu(1400)
                    except aiotun.NotPermittedError as error:
                        refused = error.filename
                    print(json.dumps([tun.name, tun.mtu, info.mtu, len(tun.queues), refused]))

            asyncio.run(main())
            """,
            fds=fds,
        )
        assert said == ["given0", 1450, 1450, queues, "given0"]

    async def test_detached_fds_become_a_device_again(self) -> None:
        async with aiotun.open_tun("given0", queues=2) as first:
            fds = [queue.detach() for queue in first.queues]
            assert first.closed
            async with aiotun.TunDevice.from_fd(*fds) as second:
                assert (second.name, second.index) == ("given0", first.index)
        assert names() == []


class TestRefused:
    """If `from_fd` raises, the fds still belong to the caller and are unchanged."""

    def test_an_fd_of_the_other_mode_is_refused(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TAP))
        with pytest.raises(aiotun.DeviceMismatchError, match="given0 is a TAP") as caught:
            aiotun.TunDevice.from_fd(*fds)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "given0")
        assert untouched(*fds)
        fds.append(raw_open("given1", TUN))
        with pytest.raises(aiotun.DeviceMismatchError, match="given1 is a TUN"):
            aiotun.TapDevice.from_fd(fds[1])
        assert untouched(*fds)

    def test_fds_of_two_interfaces_are_refused(self, fds: list[int]) -> None:
        fds += [raw_open(f"given{number}", TUN | Iff.MULTI_QUEUE) for number in (0, 1)]
        with pytest.raises(aiotun.DeviceMismatchError, match="given0 and of given1"):
            aiotun.TunDevice.from_fd(*fds)
        assert untouched(*fds)

    def test_the_same_fd_twice_is_refused(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TUN))
        with pytest.raises(ValueError, match="twice"):
            aiotun.TunDevice.from_fd(fds[0], fds[0])
        assert untouched(*fds)

    def test_closed_fds_are_refused(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TUN | Iff.MULTI_QUEUE))
        closed = os.dup(fds[0])
        os.close(closed)
        for given in ([closed], [fds[0], closed], [-1]):
            with pytest.raises(ValueError, match=r"fd|descriptor"):
                aiotun.TunDevice.from_fd(*given)
        assert untouched(*fds)

    @pytest.mark.parametrize("given", ["3", None, 1.5])
    def test_fds_that_are_no_ints_are_refused(self, given: Any) -> None:
        with pytest.raises(TypeError):
            aiotun.TunDevice.from_fd(given)

    def test_fds_of_other_files_are_refused(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TUN | Iff.MULTI_QUEUE))
        reader, writer = os.pipe()
        left, right = socket.socketpair()
        folder = os.open("/", os.O_RDONLY)
        null = os.open("/dev/null", os.O_RDWR)
        try:
            for fd in (reader, writer, left.fileno(), folder, null):
                for given in ([fd], [fds[0], fd], [fd, fds[0]]):
                    with pytest.raises(ValueError, match=f"fd {fd} is not a queue"):
                        aiotun.TunDevice.from_fd(*given)
                assert os.get_blocking(fd)
        finally:
            left.close()
            right.close()
            for fd in (reader, writer, folder, null):
                os.close(fd)
        assert untouched(*fds)

    def test_an_fd_that_was_never_attached_is_refused(self, fds: list[int]) -> None:
        fds.append(os.open(abi.NODE, os.O_RDWR))
        with pytest.raises((ValueError, aiotun.DeviceLostError)):
            aiotun.TunDevice.from_fd(*fds)
        assert os.get_blocking(fds[0])
        # It can still be attached.
        fcntl.ioctl(fds[0], Ioctl.TUNSETIFF, abi.IFREQ.pack(b"given0", TUN))

    def test_an_fd_of_a_deleted_interface_is_refused(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TUN))
        ip("link", "del", "given0")
        with pytest.raises(aiotun.DeviceLostError) as caught:
            aiotun.TunDevice.from_fd(*fds)
        assert caught.value.errno == errno.EBADFD
        assert untouched(*fds)

    @pytest.mark.parametrize(
        ("flags", "options", "words"),
        [
            (TUN, {"offload": "raw"}, "no virtio-net header"),
            (TUN | Iff.VNET_HDR, {"offload": "off"}, "a virtio-net header"),
        ],
    )
    def test_an_offload_that_does_not_fit_the_header_is_refused(
        self, fds: list[int], flags: Iff, options: dict[str, Any], words: str
    ) -> None:
        fds.append(raw_open("given0", flags))
        with pytest.raises(aiotun.DeviceMismatchError, match=words):
            aiotun.TunDevice.from_fd(*fds, **options)
        assert untouched(*fds)

    def test_packet_info_with_a_virtio_header_is_refused(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", Iff.TUN | Iff.VNET_HDR))
        with pytest.raises(ValueError, match="packet_info"):
            aiotun.TunDevice.from_fd(*fds, packet_info=True)
        assert untouched(*fds)

    @pytest.mark.parametrize("offload", ["split", "on"])
    def test_offload_modes_that_an_fd_cannot_have_are_refused(
        self, fds: list[int], offload: Any
    ) -> None:
        fds.append(raw_open("given0", TUN))
        with pytest.raises((ValueError, aiotun.DeviceMismatchError), match="offload"):
            aiotun.TunDevice.from_fd(*fds, offload=offload)
        assert untouched(*fds)

    def test_a_missing_namespace_is_refused(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TUN))
        with pytest.raises(aiotun.LinkError) as caught:
            aiotun.TunDevice.from_fd(*fds, netns="missing")
        assert caught.value.errno == errno.ENOENT
        assert untouched(*fds)

    def test_a_namespace_fd_that_is_not_open(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TUN))
        closed = os.dup(fds[0])
        os.close(closed)
        with pytest.raises(aiotun.LinkError) as caught:
            aiotun.TunDevice.from_fd(*fds, netns=closed)
        assert caught.value.errno == errno.EBADF
        assert untouched(*fds)

    def test_a_namespace_that_has_another_of_that_name(self, fds: list[int]) -> None:
        """The device's link must not be another interface, which a program could then change."""
        fds.append(raw_open("given0", TUN))
        with (
            another_namespace("ip tuntap add given0 mode tun") as path,
            pytest.raises((aiotun.LinkError, aiotun.DeviceMismatchError)),
        ):
            aiotun.TunDevice.from_fd(*fds, netns=path).close()

    def test_two_interfaces_of_one_name(self, fds: list[int]) -> None:
        """In two namespaces: a device with both fds would send packets to the wrong interface."""
        fds.append(raw_open("given0", TUN | Iff.MULTI_QUEUE))
        with another_namespace() as path:
            namespace = namespaces.NamespaceFd(namespaces.open_netns(path))
            fds.append(
                threads.run_blocking(
                    lambda: raw_open("given0", TUN | Iff.MULTI_QUEUE), namespace.fd
                )
            )
            with pytest.raises((ValueError, aiotun.DeviceMismatchError)):
                aiotun.TunDevice.from_fd(*fds).close()
            assert untouched(*fds)

    async def test_an_unclosed_one_warns(self) -> None:
        fd = raw_open("given0", TUN)
        with pytest.warns(ResourceWarning, match="unclosed"):
            aiotun.TunDevice.from_fd(fd)
        assert names() == []


class TestQueue:
    @pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
    async def test_a_socket_that_keeps_boundaries(self, kind: socket.SocketKind) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, kind)
        with right:
            fd = left.detach()
            os.set_inheritable(fd, True)
            async with Queue.from_fd(fd) as queue:
                assert (queue.fileno(), queue.closed, queue.offload) == (fd, False, "off")
                assert not os.get_blocking(fd)
                assert not os.get_inheritable(fd)
                waiting = asyncio.create_task(queue.recv())
                await asyncio.sleep(0)
                for data in (b"one", b"two" * 1000, b"3"):
                    right.send(data)
                assert await asyncio.wait_for(waiting, 5) == b"one"
                assert await queue.recv_many() == [b"two" * 1000, b"3"]
                assert await queue.send_many([b"four", bytearray(b"five")]) == 2
                assert [right.recv(100), right.recv(100)] == [b"four", b"five"]
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

    async def test_the_end_of_a_unix_socket_is_not_called_icmp(self) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        async with Queue.from_fd(left.detach()) as queue:
            right.close()
            with pytest.raises(aiotun.DeviceLostError, match="the other end was closed") as caught:
                await queue.send(b"x")
            assert "ICMP" not in str(caught.value)

    async def test_a_full_socket_makes_a_sender_wait(self) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with right:
            async with Queue.from_fd(left.detach()) as queue:
                count = 0
                with contextlib.suppress(BlockingIOError):
                    while True:
                        queue.send_nowait(b"x" * 1000)
                        count += 1
                waiting = asyncio.create_task(queue.send(b"last"))
                await asyncio.sleep(0)
                assert not waiting.done()
                for _ in range(count):
                    right.recv(2000)
                await asyncio.wait_for(waiting, 5)
                assert right.recv(10) == b"last"

    async def test_a_peer_that_goes_is_a_loss(self) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        async with Queue.from_fd(left.detach()) as queue:
            right.close()
            with pytest.raises(aiotun.DeviceLostError):
                await asyncio.wait_for(queue.send(b"x"), 5)

    async def test_a_socket_that_is_not_connected(self) -> None:
        """One of the Internet can be connected yet; nobody deleted anything."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            async with Queue.from_fd(os.dup(sock.fileno())) as queue:
                with pytest.raises(aiotun.PacketError, match="not connected; connect it first"):
                    await queue.send(b"x")
                sock.connect(sock.getsockname())
                await queue.send(b"x")
                assert await asyncio.wait_for(queue.recv(), 5) == b"x"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        async with Queue.from_fd(sock.detach()) as queue:
            with pytest.raises(aiotun.DeviceLostError, match="no other end") as caught:
                await queue.send(b"x")
            assert "deleted" not in str(caught.value)

    async def test_a_socket_whose_peer_reads_no_more(self) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with right:
            right.shutdown(socket.SHUT_RD)
            async with Queue.from_fd(left.detach()) as queue:
                with pytest.raises(aiotun.DeviceLostError, match="other end was closed") as caught:
                    await queue.send(b"x")
                assert caught.value.errno == errno.EPIPE

    async def test_a_socket_without_a_route(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            ip("route", "add", "10.7.0.0/16", "dev", "lo")
            sock.connect(("10.7.0.1", 9))
            ip("route", "del", "10.7.0.0/16", "dev", "lo")
            async with Queue.from_fd(os.dup(sock.fileno())) as queue:
                with pytest.raises(aiotun.PacketError, match="no route to the other end") as caught:
                    await queue.send(b"x")
                assert caught.value.errno == errno.ENETUNREACH
                assert "shorter" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["tun", "tap"])
    async def test_a_queue_of_a_device(self, kind: str) -> None:
        fd = raw_open("given0", TUN if kind == "tun" else TAP)
        async with Queue.from_fd(fd) as queue:
            assert queue.name == "given0"
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)
            ip("link", "set", "given0", "up")
            ip("addr", "add", "10.0.0.1/24", "dev", "given0")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", ("10.0.0.2", 9))
            packet = await asyncio.wait_for(queue.recv(), 5)
            assert packet[:1] == b"\x45" if kind == "tun" else packet[:6] == b"\xff" * 6
            decoded = queue.decoded()
            assert aiter(decoded) is decoded
        assert names() == []

    async def test_a_queue_of_a_raw_fd_is_raw(self) -> None:
        fd = raw_open("given0", TUN | Iff.VNET_HDR)
        async with Queue.from_fd(fd, offload="raw") as queue:
            assert queue.offload == "raw"

    @pytest.mark.parametrize("offload", ["off", "raw"])
    def test_a_queue_refuses_an_offload_that_does_not_fit(
        self, fds: list[int], offload: Offload
    ) -> None:
        fds.append(raw_open("given0", TUN | Iff.VNET_HDR if offload == "off" else TUN))
        with pytest.raises(
            aiotun.DeviceMismatchError, match=f"given0 has .* so offload='{offload}' does not fit"
        ):
            Queue.from_fd(fds[0], offload=offload)
        assert untouched(*fds)

    @pytest.mark.parametrize(
        ("offload", "kind"),
        [("on", ValueError), (None, ValueError), ("split", aiotun.DeviceMismatchError)],
    )
    def test_offload_is_checked(self, fds: list[int], offload: Any, kind: type[Exception]) -> None:
        fds.append(raw_open("given0", TUN))
        with pytest.raises(kind, match="offload"):
            Queue.from_fd(fds[0], offload=offload)
        assert untouched(*fds)

    def test_a_queue_refuses_a_closed_fd(self, fds: list[int]) -> None:
        closed = os.dup(0)
        os.close(closed)
        for fd in (closed, -1):
            with pytest.raises(ValueError, match=str(fd)):
                Queue.from_fd(fd)

    def test_a_queue_refuses_an_fd_that_was_never_attached(self, fds: list[int]) -> None:
        fds.append(os.open(abi.NODE, os.O_RDWR))
        with pytest.raises((ValueError, aiotun.DeviceLostError)):
            Queue.from_fd(fds[0])
        assert os.get_blocking(fds[0])
        fcntl.ioctl(fds[0], Ioctl.TUNSETIFF, abi.IFREQ.pack(b"given0", TUN))

    def test_a_queue_refuses_an_fd_of_a_deleted_interface(self, fds: list[int]) -> None:
        fds.append(raw_open("given0", TUN))
        ip("link", "del", "given0")
        with pytest.raises(aiotun.DeviceLostError):
            Queue.from_fd(fds[0])
        assert untouched(*fds)


async def test_a_persistent_device_stays() -> None:
    make("given0")
    with held("given0") as (fd,):
        async with aiotun.TunDevice.from_fd(os.dup(fd)) as tun:
            assert tun.name == "given0"
    assert names() == ["given0"]

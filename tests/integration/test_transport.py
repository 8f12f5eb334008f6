"""Transport and protocol: asyncio's rules on a real interface."""

import asyncio
import contextlib
import functools
import gc
import operator
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

import aiotun
from aiotun import DeviceLostError, DeviceTransport, PacketError
from aiotun.reply import icmp_echo

from ..helpers import ip, make_icmp_echo, wait_until
from .kernel import forward, names
from .rig import OURS, PORT, THEIRS, udp
from .test_sending import FRAME, slow_bridge

OPTIONS: dict[str, Any] = {"addresses": [f"{OURS}/24"]}


class Recorder(aiotun.PacketProtocol):
    """Records every callback, and does what a test asks for in it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.packets: list[bytes] = []
        self.errors: list[BaseException | None] = []
        self.on_packet: Callable[[bytes], object] = self.packets.append
        self.on_error: Callable[[], object] = lambda: None
        self.on_resume: Callable[[], object] = lambda: None
        self.transport: DeviceTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, DeviceTransport)
        self.transport = transport
        self.log.append("made")

    def packet_received(self, data: bytes) -> None:
        self.on_packet(data)

    def error_received(self, exc: OSError) -> None:
        self.errors.append(exc)
        self.on_error()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.log.append("lost")
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.log.append("pause")

    def resume_writing(self) -> None:
        self.log.append("resume")
        self.resumed_at = self.transport.get_write_buffer_size()
        self.on_resume()


@contextlib.asynccontextmanager
async def endpoint(**options: Any) -> Any:
    transport, protocol = await aiotun.create_tun_endpoint(Recorder, "tp0", **OPTIONS, **options)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((OURS, 0))
        sock.connect((THEIRS, PORT))
        sock.setblocking(False)
        try:
            yield transport, protocol, sock
        finally:
            transport.abort()
            await transport.get_extra_info("device").aclose()
    await wait_until(lambda: protocol.log[-1] == "lost")
    assert protocol.log.count("lost") == 1
    assert names() == []


def numbers(packets: list[bytes]) -> list[int]:
    return [int(packet[28:]) for packet in packets]


# --- Packets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 3])
async def test_a_tun_endpoint_delivers_and_sends_packets(queues: int) -> None:
    async with endpoint(queues=queues) as (transport, protocol, sock):
        assert protocol.log == ["made"]
        assert protocol.transport is transport
        assert transport.get_protocol() is protocol
        for number in range(100):
            sock.send(b"%d" % number)
        await wait_until(lambda: len(protocol.packets) == 100)
        assert numbers(protocol.packets) == list(range(100))
        answer = udp(THEIRS, PORT, OURS, sock.getsockname()[1], b"in")
        for data in (answer, bytearray(answer), memoryview(answer)):
            transport.sendto(data)
            assert sock.recv(10) == b"in"
        assert transport.get_write_buffer_size() == 0


async def test_get_extra_info_gives_the_device_name_and_fd() -> None:
    async with endpoint() as (transport, _, _):
        device = transport.get_extra_info("device")
        assert isinstance(device, aiotun.TunDevice)
        assert transport.get_extra_info("name") == "tp0"
        assert transport.get_extra_info("fd") == device.fileno()
        assert transport.get_extra_info("socket") is None
        assert transport.get_extra_info("socket", 7) == 7
        assert isinstance(transport, asyncio.DatagramTransport)
        await device.link.down()
        await device.link.rename("tp1")
        assert transport.get_extra_info("name") == "tp1"
        assert "tp1 reading" in repr(transport)
    assert transport.get_extra_info("fd") is None
    async with endpoint(queues=2) as (transport, _, _):
        assert transport.get_extra_info("fd", "none") == "none"


async def test_a_datagram_protocol_of_asyncio_unchanged() -> None:
    """A protocol that was written for a socket answers to the address that it was given."""

    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            assert addr is None
            if (answer := icmp_echo(data)) is not None:
                self.transport.sendto(answer, addr)

    transport, _ = await aiotun.create_tun_endpoint(Echo, "tp0", **OPTIONS)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setblocking(False)
        request = make_icmp_echo(OURS, THEIRS, payload=b"hello")[20:]
        sock.sendto(request, (THEIRS, 0))
        loop = asyncio.get_running_loop()
        answer = await asyncio.wait_for(loop.sock_recv(sock, 2000), 5)
    assert answer[28:] == b"hello"
    transport.close()
    await transport.get_extra_info("device").aclose()


async def test_a_tap_endpoint_delivers_frames() -> None:
    transport, protocol = await aiotun.create_tap_endpoint(
        Recorder, "tp0", mac="02:00:00:00:00:01", **OPTIONS
    )
    assert transport.get_extra_info("device").mode == "tap"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (THEIRS, PORT))
    await wait_until(lambda: any(frame[12:14] == b"\x08\x06" for frame in protocol.packets))
    transport.close()
    await transport.get_extra_info("device").aclose()
    assert protocol.log == ["made", "lost"]


# --- Bad input -----------------------------------------------------------------------------------


async def test_invalid_packets_are_refused_or_reported_later() -> None:
    async with endpoint() as (transport, protocol, _):
        with pytest.raises(TypeError, match="got str"):
            transport.sendto("text")
        with pytest.raises(ValueError, match="contains its addresses"):
            transport.sendto(b"x", ("10.0.0.1", 1))
        transport.sendto(b"")
        transport.sendto(b"\x00 no packet")
        assert protocol.errors == []  # not from within the call
        await asyncio.sleep(0)
        assert [type(error) for error in protocol.errors] == [PacketError, PacketError]
        await transport.get_extra_info("device").link.down()
        transport.sendto(udp(THEIRS, 1, OURS, 2))
        await asyncio.sleep(0)
        assert isinstance(protocol.errors[2], aiotun.LinkDownError)
        await transport.get_extra_info("device").link.up()
        transport.sendto(udp(THEIRS, 1, OURS, 2))
        assert len(protocol.errors) == 3
        assert transport.dropped == 0


async def test_a_protocol_of_another_kind_is_refused() -> None:
    for factory in (asyncio.Protocol, object):
        made: Any = factory
        with pytest.raises(TypeError, match="derive it from"):
            await aiotun.create_tun_endpoint(made, "tp0")
        assert names() == []

    def broken() -> Recorder:
        raise LookupError("in the factory")

    with pytest.raises(LookupError, match="in the factory"):
        await aiotun.create_tun_endpoint(broken, "tp0")
    assert names() == []
    with pytest.raises(ValueError, match="1 to 256"):
        await aiotun.create_tun_endpoint(Recorder, queues=0)


class RaisingError(Exception):
    pass


def caught_by_the_loop() -> list[dict[str, Any]]:
    caught: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: caught.append(context))
    return caught


@pytest.mark.parametrize("kind", [RaisingError, asyncio.CancelledError])
async def test_a_callback_that_raises(kind: type[BaseException]) -> None:
    """The error goes to the loop's exception handler, and later packets are still delivered."""
    caught = caught_by_the_loop()

    class Broken(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            raise kind("made")

        def packet_received(self, data: bytes) -> None:
            self.packets.append(data)
            raise kind("received")

        def error_received(self, exc: OSError) -> None:
            raise kind("error")

        def connection_lost(self, exc: BaseException | None) -> None:
            raise kind("lost")

    transport, protocol = await aiotun.create_tun_endpoint(Broken, "tp0", **OPTIONS)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(3):
            sock.sendto(b"%d" % number, (THEIRS, PORT))
    await wait_until(lambda: len(protocol.packets) == 3)
    assert numbers(protocol.packets) == [0, 1, 2]
    transport.sendto(b"")
    transport.close()
    await wait_until(lambda: transport.get_extra_info("device").closed)
    await transport.get_extra_info("device").aclose()
    said = [str(context["exception"]) for context in caught]
    assert said == ["made", "received", "received", "received", "error", "lost"]
    assert caught[1]["message"] == "Broken.packet_received raised"
    assert caught[1]["transport"] is transport
    assert caught[1]["protocol"] is protocol


# --- Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
async def test_pausing_loses_nothing(inside: bool) -> None:
    """Pauses again and again during a flood, from within the callback and from outside."""
    async with endpoint(txqueuelen=1000) as (transport, protocol, sock):

        def take(packet: bytes) -> None:
            assert transport.is_reading()
            protocol.packets.append(packet)
            if inside and len(protocol.packets) % 3 == 0:
                transport.pause_reading()
                assert not transport.is_reading()
                transport.pause_reading()
                if len(protocol.packets) % 2:
                    transport.resume_reading()

        protocol.on_packet = take
        for number in range(300):
            sock.send(b"%d" % number)
        deadline = asyncio.get_running_loop().time() + 10
        while len(protocol.packets) < 300:
            assert asyncio.get_running_loop().time() < deadline
            if not inside:
                transport.pause_reading()
                before = len(protocol.packets)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert len(protocol.packets) == before
            transport.resume_reading()
            transport.resume_reading()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert numbers(protocol.packets) == list(range(300))
        transport.resume_reading()
        await asyncio.sleep(0)
        sock.send(b"300")
        await wait_until(lambda: len(protocol.packets) == 301)


async def test_while_reading_is_paused_the_kernel_keeps_and_counts() -> None:
    """While the consumer is paused, memory does not grow; the kernel counts dropped packets."""
    async with endpoint(txqueuelen=10) as (transport, protocol, sock):
        transport.pause_reading()
        for number in range(30):
            sock.send(b"%d" % number)
        stats = await transport.get_extra_info("device").link.stats()
        assert stats.tx_dropped == 20
        assert protocol.packets == []
        transport.resume_reading()
        await wait_until(lambda: len(protocol.packets) == 10)


async def test_closing_within_a_callback() -> None:
    for end in (DeviceTransport.close, DeviceTransport.abort):
        async with endpoint() as (transport, protocol, sock):

            def take(
                packet: bytes,
                transport: DeviceTransport = transport,
                protocol: Recorder = protocol,
                end: Callable[[DeviceTransport], None] = end,
            ) -> None:
                protocol.packets.append(packet)
                end(transport)
                assert protocol.log == ["made"]  # not from within the call

            protocol.on_packet = take
            device = transport.get_extra_info("device")
            for number in range(5):
                sock.send(b"%d" % number)
            await wait_until(functools.partial(operator.attrgetter("closed"), device))
            assert protocol.log == ["made", "lost"]
            assert numbers(protocol.packets) == [0]
            assert protocol.errors == [None]


# --- Writing -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def slow_endpoint() -> Any:
    """A TAP on a slow bridge, and a socket at the bridge's far end."""
    await slow_bridge("4mbit")
    transport, protocol = await aiotun.create_tap_endpoint(
        Recorder, "tp0", bridge="br0", sndbuf=65536
    )
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as sock:
        sock.bind(("v1", 0x88B5))
        sock.setblocking(False)
        try:
            await wait_until(lambda: forward("tp0", "v0"))
            yield transport, protocol, sock
        finally:
            transport.abort()
            await transport.get_extra_info("device").aclose()


def frame(number: int) -> bytes:
    return FRAME[:-2] + number.to_bytes(2, "big")


def fill(transport: DeviceTransport) -> int:
    """Send until the kernel is full and one packet waits; return how many were sent."""
    number = 0
    while not transport.get_write_buffer_size():
        transport.sendto(frame(number))
        number += 1
        assert number < 1000
    return number


def arrived(sock: socket.socket, seen: list[int]) -> list[int]:
    with contextlib.suppress(BlockingIOError):
        while True:
            seen.append(int.from_bytes(sock.recv(2000)[-2:], "big"))
    return seen


async def test_the_write_buffer_pauses_and_resumes_the_protocol() -> None:
    async with slow_endpoint() as (transport, protocol, sock):
        size = len(FRAME)
        assert transport.get_write_buffer_limits() == (16 * 1024, 64 * 1024)
        transport.set_write_buffer_limits(high=3 * size, low=size)
        assert transport.get_write_buffer_limits() == (size, 3 * size)
        count = fill(transport)
        data = bytearray(frame(count))
        transport.sendto(data)
        data[-2:] = b"\xff\xff"  # after sendto returns, the buffer is the caller's again
        transport.sendto(memoryview(frame(count + 1)))
        assert transport.get_write_buffer_size() == 3 * size
        assert protocol.log == ["made"]
        transport.sendto(frame(count + 2))
        assert protocol.log == ["made", "pause"]
        transport.sendto(frame(count + 3))
        seen: list[int] = []
        await wait_until(lambda: protocol.log == ["made", "pause", "resume"])
        assert protocol.resumed_at == size
        await wait_until(lambda: len(arrived(sock, seen)) == count + 4)
        # In order, whole, and no duplicates.
        assert seen == list(range(count + 4))
        assert transport.get_write_buffer_size() == 0


@pytest.mark.parametrize("shape", ["items of four bytes", "two dimensions", "every other byte"])
async def test_a_view_is_counted_in_bytes(shape: str) -> None:
    async with slow_endpoint() as (transport, _, sock):
        count = fill(transport)
        data = FRAME[:-2] + bytes(-len(FRAME) % 4) + count.to_bytes(2, "big")
        view = memoryview(data)
        if shape == "items of four bytes":
            view = view.cast("I")
        elif shape == "two dimensions":
            view = view.cast("B", (len(data) // 4, 4))
        else:
            view = memoryview(b"".join(bytes([each, 0]) for each in data))[::2]
        before = transport.get_write_buffer_size()
        transport.sendto(view)
        assert transport.get_write_buffer_size() == before + len(data)
        await wait_until(lambda: transport.get_write_buffer_size() == 0)
        seen: list[int] = []
        await wait_until(lambda: len(arrived(sock, seen)) == count + 1)
        assert seen == list(range(count + 1))
        transport.sendto(view)  # it need not wait
        await wait_until(lambda: arrived(sock, seen)[-2:] == [count, count])


async def test_write_buffer_limits_are_checked_and_applied() -> None:
    async with slow_endpoint() as (transport, protocol, _):
        for high, low in ((1, 2), (-1, None), (None, -1)):
            with pytest.raises(ValueError, match="must be at least"):
                transport.set_write_buffer_limits(high, low)
        transport.set_write_buffer_limits(low=100)
        assert transport.get_write_buffer_limits() == (100, 400)
        transport.set_write_buffer_limits()
        fill(transport)
        transport.set_write_buffer_limits(high=0)
        assert protocol.log == ["made", "pause"]


async def test_close_sends_what_waits() -> None:
    async with slow_endpoint() as (transport, protocol, sock):
        count = fill(transport)
        for number in range(count, count + 5):
            transport.sendto(frame(number))
        transport.close()
        assert transport.is_closing()
        transport.close()
        transport.sendto(frame(999))  # too late
        assert protocol.log == ["made"]
        await wait_until(lambda: protocol.log[-1] == "lost")
        seen: list[int] = []
        await wait_until(lambda: len(arrived(sock, seen)) == count + 5)
        assert seen == list(range(count + 5))
        assert (protocol.errors, transport.dropped) == ([None], 1)


async def test_abort_drops_and_counts() -> None:
    async with slow_endpoint() as (transport, protocol, _):
        fill(transport)
        for number in range(5):
            transport.sendto(frame(number))
        transport.close()
        transport.abort()
        assert transport.get_write_buffer_size() == 0
        await wait_until(lambda: protocol.log[-1] == "lost")
        transport.abort()
        transport.close()
        await asyncio.sleep(0)
        assert protocol.log.count("lost") == 1
        assert (protocol.errors, transport.dropped) == ([None], 6)


async def test_abort_from_the_writer_itself() -> None:
    """A waiting frame is refused, and the protocol aborts in the callback that reports it."""
    async with slow_endpoint() as (transport, protocol, _):
        fill(transport)
        transport.sendto(b"no frame")
        transport.sendto(frame(1))
        protocol.on_error = transport.abort
        await wait_until(lambda: protocol.log[-1] == "lost")
        assert [type(error) for error in protocol.errors] == [PacketError, type(None)]
        assert transport.dropped == 2


@pytest.mark.parametrize("end", [DeviceTransport.close, DeviceTransport.abort])
async def test_the_end_while_writing_is_resumed(end: Callable[[DeviceTransport], None]) -> None:
    async with slow_endpoint() as (transport, protocol, _):
        transport.set_write_buffer_limits(high=0)
        fill(transport)
        protocol.on_resume = lambda: end(transport)
        await wait_until(lambda: protocol.log[-1] == "lost")
        await transport.get_extra_info("device").aclose()
        assert protocol.log == ["made", "pause", "resume", "lost"]
        assert transport.dropped == 0


# --- The end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 2])
async def test_deletion_ends_the_transport_with_device_lost_error(queues: int) -> None:
    async with endpoint(queues=queues) as (transport, protocol, _):
        ip("link", "del", "tp0")
        await wait_until(lambda: protocol.log == ["made", "lost"])
        assert isinstance(protocol.errors[0], DeviceLostError)
        assert transport.is_closing()
        transport.sendto(udp(THEIRS, 1, OURS, 2))
        assert transport.dropped == 1


async def test_a_loss_found_by_sending_ends_the_transport() -> None:
    async with endpoint() as (transport, protocol, _):
        transport.pause_reading()
        await asyncio.sleep(0)
        ip("link", "del", "tp0")
        transport.sendto(udp(THEIRS, 1, OURS, 2))
        await wait_until(lambda: protocol.log == ["made", "lost"])
        assert isinstance(protocol.errors[0], DeviceLostError)
        assert transport.dropped == 1


async def test_a_loss_ends_the_transport_while_packets_wait() -> None:
    async with slow_endpoint() as (transport, protocol, _):
        fill(transport)
        transport.sendto(frame(0))
        ip("link", "del", "tp0")
        await wait_until(lambda: protocol.log[-1] == "lost")
        assert isinstance(protocol.errors[0], DeviceLostError)
        assert transport.dropped == 2


@pytest.mark.parametrize("queues", [1, 2])
async def test_loss_while_reading_is_paused(queues: int) -> None:
    """The loss is reported although nothing is sent or received; waiting packets cause no error."""
    async with endpoint(queues=queues) as (transport, protocol, sock):
        transport.pause_reading()
        sock.send(b"1")
        transport.resume_reading()
        transport.pause_reading()
        ip("link", "del", "tp0")
        await wait_until(lambda: protocol.log == ["made", "lost"])
        assert isinstance(protocol.errors[0], DeviceLostError)
        assert protocol.packets == []


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("how", ["close", "detach"])
async def test_closed_while_reading_is_paused(how: str, queues: int) -> None:
    async with endpoint(queues=queues) as (transport, protocol, _):
        transport.pause_reading()
        device = transport.get_extra_info("device")
        if how == "close":
            device.close()
        else:
            for queue in device.queues:
                os.close(queue.detach())
        await wait_until(lambda: protocol.log == ["made", "lost"])
        assert protocol.errors == [None]
        assert transport.is_closing()


async def test_a_paused_transport_that_nobody_holds_is_collected() -> None:
    transport, _ = await aiotun.create_tun_endpoint(asyncio.DatagramProtocol, "tp0")
    transport.pause_reading()
    await asyncio.sleep(0)
    with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 - by either of them
        del transport, _
        gc.collect()
    assert names() == []


async def test_callbacks_do_not_come_from_within_each_other() -> None:
    """Errors of `sendto` are reported soon, in order, and before the end."""
    async with endpoint() as (transport, protocol, sock):
        inside: list[str] = []

        def take(packet: bytes) -> None:
            inside.append("packet")
            transport.sendto(b"\x00 no packet")
            transport.sendto(b"")
            assert inside == ["packet"]
            transport.close()
            inside.append("end of packet")

        protocol.on_packet = take
        protocol.on_error = lambda: inside.append("error")
        sock.send(b"1")
        await wait_until(lambda: protocol.log == ["made", "lost"])
        assert inside == ["packet", "end of packet", "error", "error"]
        assert [type(error) for error in protocol.errors] == [PacketError, PacketError, type(None)]


@pytest.mark.parametrize("paused", [False, True])
async def test_the_device_itself_is_closed(paused: bool) -> None:
    async with endpoint() as (transport, protocol, _):
        if paused:
            transport.pause_reading()
        await asyncio.sleep(0)
        transport.get_extra_info("device").close()
        if paused:
            transport.sendto(udp(THEIRS, 1, OURS, 2))
        await wait_until(lambda: protocol.log == ["made", "lost"])
        assert (protocol.errors, transport.dropped) == ([None], int(paused))


def test_a_transport_left_open_is_aborted_with_asyncio_run() -> None:
    """It is aborted with the program's tasks and leaves nothing behind."""
    made = []

    async def main() -> None:
        made.append(await aiotun.create_tun_endpoint(Recorder, "tp0"))
        await asyncio.sleep(0)

    asyncio.run(main())
    transport, protocol = made[0]
    assert protocol.log == ["made", "lost"]
    assert protocol.errors == [None]
    assert transport.is_closing()


async def test_set_protocol_switches_to_another_protocol() -> None:
    async with endpoint() as (transport, protocol, sock):
        second = Recorder()
        transport.set_protocol(second)
        assert transport.get_protocol() is second
        sock.send(b"1")
        await wait_until(lambda: len(second.packets) == 1)
        with pytest.raises(TypeError):
            transport.set_protocol(asyncio.Protocol())
        transport.set_protocol(protocol)
        gc.collect()


async def test_a_cancelled_creation_leaves_no_device() -> None:
    task = asyncio.create_task(aiotun.create_tun_endpoint(Recorder, "tp0"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names() == []


# --- A device that is open already ---------------------------------------------------------------


async def test_endpoint_gives_an_open_device_to_a_protocol() -> None:
    device = aiotun.open_tun("tp0", addresses=[f"{OURS}/24"]).open_blocking()
    protocol = Recorder()
    transport = aiotun.endpoint(device, protocol)
    assert protocol.log == ["made"]
    assert transport.get_extra_info("device") is device
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((OURS, 0))
        sock.sendto(b"7", (THEIRS, PORT))
        await wait_until(lambda: bool(protocol.packets))
        assert numbers(protocol.packets) == [7]
        transport.sendto(udp(THEIRS, PORT, OURS, sock.getsockname()[1], b"in"))
        assert sock.recv(10) == b"in"
    transport.close()
    await wait_until(lambda: device.closed)
    await device.aclose()
    assert protocol.log == ["made", "lost"]


async def test_endpoint_refuses_what_is_no_open_device_and_leaves_it_alone() -> None:
    opener = aiotun.open_tun("tp0")
    with pytest.raises(TypeError, match=r"got Opener; await it, or call its open_blocking\(\)"):
        aiotun.endpoint(opener, Recorder())  # type: ignore[arg-type]  # what is tested
    async with opener as device:
        with pytest.raises(TypeError, match="derive it from"):
            aiotun.endpoint(device, asyncio.Protocol())
        assert not device.closed
    with pytest.raises(aiotun.DeviceClosedError):
        aiotun.endpoint(device, Recorder())


async def test_endpoint_refuses_a_device_of_another_loop() -> None:
    async with aiotun.open_tun("tp0") as device:
        with contextlib.suppress(BlockingIOError):
            device.recv_nowait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(device.recv(), 0.01)

        async def elsewhere() -> None:
            aiotun.endpoint(device, Recorder())

        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, elsewhere())


def test_endpoint_needs_a_running_loop() -> None:
    with contextlib.closing(aiotun.open_tun("tp0").open_blocking()) as device:
        with pytest.raises(RuntimeError, match="no running event loop"):
            aiotun.endpoint(device, Recorder())
        assert not device.closed

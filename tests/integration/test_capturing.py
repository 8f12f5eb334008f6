"""`Device.capture`: every packet once, whichever way it comes and goes."""

import asyncio
import itertools
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import aiotun
from aiotun._queue.port import Port
from aiotun.capture import Direction, PcapWriter
from aiotun.queue import Queue

from ..helpers import make_icmp_echo, wait_until
from ..test_capture import packets, tshark
from .rig import KINDS, OURS, PORT, RECEIVE, THEIRS, Receive, number, rest, rig, udp, waiting


class Recorder(PcapWriter):
    """A writer that also keeps what it writes."""

    def __init__(self, file: Path, mode: Any = "tun") -> None:
        super().__init__(file, mode)
        self.seen: list[tuple[bytes, Direction]] = []

    def record(self, packet: Any, direction: Direction) -> None:
        self.seen.append((bytes(packet), direction))
        super().record(packet, direction)

    def numbers(self) -> list[int]:
        assert {direction for _, direction in self.seen} == {"in"}
        return [number(packet) for packet, _ in self.seen]


@pytest.fixture
def writer(tmp_path: Path) -> Any:
    with Recorder(tmp_path / "file.pcap") as writer:
        yield writer
        assert writer.dropped == 0


class TestReceiving:
    @pytest.mark.parametrize("way", RECEIVE)
    @pytest.mark.parametrize("kind", KINDS)
    async def test_each_way_of_receiving_captures_a_packet_once(
        self, kind: str, way: str, writer: Recorder, tmp_path: Path
    ) -> None:
        """Packets that wait already, and awaited packets; before, during and after a capture."""
        receive = RECEIVE[way]
        async with rig(kind) as r:
            found = []

            async def some(count: int) -> None:
                found.extend([await receive(r.io) for _ in range(count)])

            r.inject(3)
            await some(3)
            with r.tun.capture(writer):
                task = await waiting(some(4))
                r.inject(2)
                await asyncio.sleep(0)
                r.inject(2)
                await task
                r.inject(2)
                await some(2)
            r.inject(2)
            await some(2)
        assert [number(packet) for packet in found] == list(range(11))
        assert writer.numbers() == list(range(3, 9))
        assert [packet for packet, _ in writer.seen] == found[3:9]
        writer.close()
        assert packets(tmp_path / "file.pcap") == found[3:9]

    @pytest.mark.parametrize("receive", RECEIVE.values(), ids=RECEIVE)
    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_task_that_waits_already_is_captured(
        self, kind: str, receive: Receive, writer: Recorder
    ) -> None:
        async with rig(kind) as r:
            task = await waiting(receive(r.io))
            with r.tun.capture(writer):
                r.inject()
                await task
                task = await waiting(receive(r.io))
            r.inject()
            await task
        assert writer.numbers() == [0]

    @pytest.mark.parametrize("kind", KINDS)
    async def test_recv_many_and_recv_nowait_capture_each_packet_once(
        self, kind: str, writer: Recorder
    ) -> None:
        async with rig(kind) as r:
            with r.tun.capture(writer):
                r.inject(10)
                assert len(await r.io.recv_many(7)) == 7
                assert number(r.io.recv_nowait()) == 7
                assert len(await r.io.recv_many()) == 2
                with pytest.raises(BlockingIOError):
                    r.io.recv_nowait()
        assert writer.numbers() == list(range(10))

    async def test_a_flood_to_several_tasks(self, writer: Recorder) -> None:
        async with rig("group") as r:
            found: list[int] = []

            async def reading() -> None:
                async for packet in r.tun:
                    found.append(number(packet))  # noqa: PERF401 - in the order of all tasks

            with r.tun.capture(writer):
                tasks = [asyncio.create_task(reading()) for _ in range(3)]
                for _ in range(10):
                    r.inject(50)
                    await wait_until(lambda: len(found) == r.count)
                r.tun.close()
                await asyncio.gather(*tasks)
        assert writer.numbers() == found
        assert sorted(found) == list(range(500))

    async def test_a_truncated_packet_is_captured_as_it_was_received(
        self, writer: Recorder
    ) -> None:
        async with rig() as r:
            with r.tun.capture(writer):
                r.inject()
                short = bytearray(30)
                with pytest.raises(aiotun.PacketTruncatedError, match=r"32 bytes .* buffer of 30"):
                    await r.io.recv_into(short)
                assert short == writer.seen[0][0][:30]
                r.inject()
                large = bytearray(b"\xff" * 40)
                assert await r.io.recv_into(large) == 32
                assert large == writer.seen[1][0] + b"\xff" * 8
            assert r.tun.stats.truncated == 1
        assert writer.numbers() == [0, 1]
        assert {len(packet) for packet, _ in writer.seen} == {32}

    @pytest.mark.parametrize("kind", ["device", "group"])
    async def test_cancelled_waiters_lose_nothing(self, kind: str, writer: Recorder) -> None:
        async with rig(kind) as r:
            with r.tun.capture(writer):
                tasks = [await waiting(r.io.recv()) for _ in range(10)]
                r.inject(10)
                for task in tasks[::2]:
                    task.cancel()
                await asyncio.wait(tasks)
                found = [number(task.result()) for task in tasks[1::2]]
                found += await rest(r.io, 5)
        assert writer.numbers() == found == list(range(10))


class TestSending:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_each_way_of_sending_captures_a_packet_once(
        self, kind: str, writer: Recorder
    ) -> None:
        sent = [udp(THEIRS, PORT, OURS, 9, bytes([n])) for n in range(7)]
        async with rig(kind) as r:
            await r.io.send(udp(THEIRS, PORT, OURS, 9))
            with r.tun.capture(writer):
                await r.io.send(sent[0])
                await r.io.send(bytearray(sent[1]))
                r.io.send_nowait(memoryview(sent[2]))
                assert await r.io.send_many(iter(sent[3:])) == 4
            await r.io.send(udp(THEIRS, PORT, OURS, 9))
        assert writer.seen == [(packet, "out") for packet in sent]

    async def test_a_refused_packet_is_not_captured(self, writer: Recorder) -> None:
        good = udp(THEIRS, PORT, OURS, 9)
        async with rig() as r:
            with r.tun.capture(writer):
                with pytest.raises(aiotun.PacketError):
                    await r.io.send(b"")
                with pytest.raises(aiotun.PacketError) as caught:
                    await r.io.send_many([good, b"\xff", good])
                assert caught.value.sent == 1
                await r.tun.link.down()
                with pytest.raises(aiotun.LinkDownError):
                    await r.io.send(good)
                with pytest.raises(aiotun.LinkDownError):
                    r.io.send_nowait(good)
        assert writer.seen == [(good, "out")]

    async def test_a_send_that_waits_is_captured_when_its_packet_goes(
        self, writer: Recorder
    ) -> None:
        """If capturing begins or ends while a send waits, what counts is when its packet goes."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        with theirs:
            queue = Queue.from_fd(ours.detach())
            opened = _Opened(queue)

            def fill() -> int:
                for count in itertools.count():
                    try:
                        queue.send_nowait(bytes(1000))
                    except BlockingIOError:
                        return count
                raise AssertionError

            def drain() -> int:
                count = 0
                try:
                    while theirs.recv(2000):
                        count += 1
                except BlockingIOError:
                    pass
                return count

            filled = fill()
            many = await waiting(queue.send_many([b"0", b"1", b"2"]))
            one = await waiting(queue.send(b"3"))
            capture = opened.capture(writer)
            assert drain() == filled
            assert await many == 3
            await one
            assert fill() > 0
            many = await waiting(queue.send_many([b"4", b"5"]))
            one = await waiting(queue.send(b"6"))
            capture.stop()
            drain()
            await many
            await one
            await queue.aclose()
        short = sorted(packet for packet, _ in writer.seen if len(packet) == 1)
        assert short == [b"0", b"1", b"2", b"3"]


class _Opened:
    """Captures one queue as a device's queues are captured."""

    def __init__(self, queue: Queue) -> None:
        self.queues = (queue,)

    def capture(self, writer: PcapWriter) -> Any:
        from aiotun._queue.recordingport import record

        return record(self.queues, writer)


class TestContents:
    async def test_a_dialogue_as_tshark_reads_it(self, tmp_path: Path) -> None:
        file = tmp_path / "file.pcapng"
        request = make_icmp_echo(THEIRS, OURS, seq=7)
        async with rig() as r:
            before = time.time_ns()
            async with PcapWriter(file) as writer:
                with r.tun.capture(writer):
                    await r.tun.send(request)
                    await r.tun.recv()
            after = time.time_ns()
        fields = ("frame.time_epoch", "frame.packet_flags_direction", "icmp.type", "icmp.seq")
        asked, answered = tshark(file, *fields)
        assert asked[1:] == ["0x00000002", "8", "7"]
        assert answered[1:] == ["0x00000001", "0", "7"]
        times = [int(each[0].replace(".", "")) for each in (asked, answered)]
        assert before <= times[0] <= times[1] <= after

    async def test_sent_frames_are_captured_whole(self, tmp_path: Path) -> None:
        async with aiotun.open_tap("cap0", mac="02:00:00:00:00:01") as tap:
            frame = bytes.fromhex("ffffffffffff 020000000002 88b5") + b"hello"
            with PcapWriter(tmp_path / "a.pcap", tap.mode) as writer, tap.capture(writer):
                await tap.send(frame)
        assert packets(tmp_path / "a.pcap") == [frame]
        ((kind, source),) = tshark(tmp_path / "a.pcap", "eth.type", "eth.src")
        assert (kind, source) == ("0x88b5", "02:00:00:00:00:02")

    @pytest.mark.parametrize("options", [{"packet_info": True}, {"offload": "raw"}])
    async def test_packets_are_captured_without_their_header(
        self, options: dict[str, Any], writer: Recorder
    ) -> None:
        async with rig(**options) as r:
            header = r.tun._header_bytes
            assert header > 0
            with r.tun.capture(writer):
                r.inject()
                packet = await r.tun.recv()
                buffer = bytearray(2000)
                r.inject()
                length = await r.tun.recv_into(buffer)
                own = udp(THEIRS, PORT, OURS, 9)
                start = bytes.fromhex("00000800") if "packet_info" in options else bytes(10)
                await r.tun.send(start + own)
        assert [packet for packet, _ in writer.seen] == [
            packet[header:],
            buffer[header:length],
            own,
        ]


class TestCapture:
    async def test_off_is_a_plain_queue(self, writer: Recorder) -> None:
        async with rig("group") as r:
            capture = r.tun.capture(writer)
            assert all(type(queue.port) is not Port for queue in r.tun.queues)
            states = [capture.stopped]
            capture.stop()
            assert [*states, capture.stopped] == [False, True]
            assert all(type(queue.port) is Port for queue in r.tun.queues)
            capture.stop()

    async def test_several_captures_of_a_device_are_independent(
        self, tmp_path: Path, writer: Recorder
    ) -> None:
        with Recorder(tmp_path / "other") as other:
            async with rig() as r:
                first, second, third = (r.tun.capture(each) for each in (writer, other, writer))
                for stop in (third, first, second):
                    r.inject()
                    await r.tun.recv()
                    stop.stop()
                    stop.stop()
                r.inject()
                await r.tun.recv()
        assert writer.numbers() == [0, 0, 1]
        assert other.numbers() == [0, 1, 2]

    async def test_capture_refuses_a_writer_of_the_other_mode(self, tmp_path: Path) -> None:
        with PcapWriter(tmp_path / "b", "tap") as frames:
            async with rig() as r:
                with pytest.raises(ValueError, match="mode='tun'"):
                    r.tun.capture(frames)
                frames.close()

    async def test_receiving_goes_on_when_the_writer_is_closed(self, tmp_path: Path) -> None:
        async with rig() as r:
            writer = PcapWriter(tmp_path / "b")
            with r.tun.capture(writer):
                writer.close()
                r.inject()
                assert number(await r.tun.recv()) == 0  # receiving goes on
            assert writer.dropped == 1
            with pytest.raises(ValueError, match="is closed"):
                r.tun.capture(writer)

    async def test_a_full_disk_is_no_matter_of_receiving(self) -> None:
        writer = PcapWriter("/dev/full")
        async with rig() as r:
            with r.tun.capture(writer):
                await wait_until(lambda: writer.error is not None)
                r.inject()
                assert number(await r.tun.recv()) == 0
        assert writer.dropped == 1
        with pytest.raises(OSError, match="No space left"):
            writer.close()

    async def test_closing_and_loss_go_on_as_ever(self, writer: Recorder) -> None:
        async with rig() as r:
            with r.tun.capture(writer):
                task = await waiting(r.tun.recv())
                ends = await waiting(anext(aiter(r.tun), None))
                r.tun.close()
                with pytest.raises(aiotun.DeviceClosedError):
                    await task
                assert await ends is None
                with pytest.raises(aiotun.DeviceClosedError):
                    await r.tun.send(b"x")
                with pytest.raises(aiotun.DeviceClosedError):
                    r.tun.recv_nowait()


def test_the_module_is_loaded_lazily() -> None:
    import subprocess
    import sys

    code = "import sys, aiotun; assert 'aiotun.capture' not in sys.modules; aiotun.capture.Capture"
    subprocess.run([sys.executable, "-c", code], check=True)

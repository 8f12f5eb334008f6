"""Runs: many packets in one buffer, read and written by the C module and by its Python twin."""

import errno
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from aiotun._kernel.abi import READ_SIZE
from aiotun._packets import native
from aiotun._packets.runs import Layout, padded
from aiotun.offload import GsoType, VnetHeader, merge
from aiotun.runs import Pool, Run

from .test_gso import ETHERNET, LINKS, NONE, Packet, run_of, written
from .test_native import MISSING, Pair, _speedups, twins

ReadRun = Callable[..., native.Taken]
WriteRun = Callable[..., Sequence[int]]

each_read_run = twins(native._read_run, "read_run")
each_write_run = twins(native._write_run, "write_run")
each_version = pytest.mark.parametrize("version", [4, 6])
each_header = pytest.mark.parametrize("header", [0, 10, 12])

LAYOUT = Layout(before=16, after=16, align=16, most=1420, limit=45)


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def headed(super_packet: bytes, header: int) -> bytes:
    """The same with a header of 12 bytes, or without one."""
    return (
        super_packet[10:]
        if not header
        else super_packet[:10] + bytes(header - 10) + (super_packet[10:])
    )


class Reading:
    """A buffer that was full of other bytes before a run was read into it."""

    def __init__(
        self,
        read_run: ReadRun,
        fd: int,
        *,
        first: bytes | None = None,
        layout: Layout = LAYOUT,
        frame: bool = False,
        header: int = 10,
        room: int = 1 << 17,
    ) -> None:
        self.buffer = memoryview(bytearray(b"\xa5" * room))
        taken = read_run(fd, first, self.buffer, layout, frame, header)
        self.count, self.size, self.last, self.stride, self.kept, self.drained = taken
        self.layout = layout

    @property
    def packets(self) -> list[bytes]:
        run = Run(self.buffer, self.layout.before, self.stride, self.size, self.last, self.count)
        return run.segments() if self.count else []

    def check_padding(self) -> None:
        for index in range(self.count):
            length = self.size if index < self.count - 1 else self.last
            end = self.layout.before + index * self.stride + length
            up = padded(length, self.layout) - length
            assert self.buffer[end : end + up] == bytes(up)


class TestReadRun:
    @each_read_run
    @each_version
    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_a_super_packet_is_split_into_the_buffer(
        self, pair: Pair, read_run: ReadRun, version: int, protocol: str
    ) -> None:
        packets = written(run_of(Packet(version=version, protocol=protocol), [1000] * 9 + [7]))
        (whole,) = merge(packets)
        pair[1].send(whole)
        found = Reading(read_run, pair[0].fileno())
        assert found.packets == packets
        size = len(packets[0])
        assert (found.kept, found.stride) == (None, 16 + size + -size % 16 + 16)
        found.check_padding()

    @each_read_run
    @pytest.mark.parametrize(
        ("size", "padding"), [(1420, 0), (1415, 5), (1408, 0), (1405, 3), (41, 7), (2000, 0)]
    )
    def test_a_packet_is_padded_but_not_beyond_the_mtu(
        self, pair: Pair, read_run: ReadRun, size: int, padding: int
    ) -> None:
        packet = bytes(Packet(payload=bytes(size - 28), protocol="udp"))
        pair[1].send(packet)
        found = Reading(read_run, pair[0].fileno(), header=0)
        assert (found.packets, found.stride) == ([packet], 32 + size + padding)
        found.check_padding()

    @each_read_run
    @each_header
    @each_version
    @pytest.mark.parametrize("link", ["packet", "frame"])
    def test_single_packets_of_one_size_and_pair_of_addresses_are_gathered(
        self, pair: Pair, read_run: ReadRun, header: int, version: int, link: str
    ) -> None:
        frame = link == "frame"
        packets = written(
            run_of(Packet(version=version, protocol="udp", link=LINKS[link]), [500] * 5 + [20])
        )
        other = bytes(
            Packet(
                version=version, protocol="udp", link=LINKS[link], payload=bytes(20),
                source={4: "10.9.9.9", 6: "fd99::9"}[version],
            )
        )  # fmt: skip
        for each in [*packets, packets[0], other, packets[0]]:
            pair[1].send(headed(NONE + each, header))
        found = Reading(read_run, pair[0].fileno(), frame=frame, header=header)
        assert (found.packets, found.kept, found.drained) == (packets, None, False)
        found.check_padding()
        # What ended this one is the first of the next.
        found = Reading(read_run, pair[0].fileno(), frame=frame, header=header)
        assert (found.packets, found.kept) == ([packets[0]], headed(NONE + other, header))
        found = Reading(read_run, pair[0].fileno(), first=found.kept, frame=frame, header=header)
        assert (found.packets, found.kept) == ([other], headed(NONE + packets[0], header))
        found = Reading(read_run, pair[0].fileno(), first=found.kept, frame=frame, header=header)
        assert (found.packets, found.kept, found.drained) == ([packets[0]], None, True)

    @each_read_run
    @pytest.mark.parametrize(
        "other",
        [
            bytes(Packet(payload=bytes(101), protocol="udp")),  # longer
            bytes(Packet(payload=bytes(20), version=6, protocol="udp")),
            b"E",
            b"\x40" + bytes(60),
        ],
    )
    def test_other_packets_end_a_run(self, pair: Pair, read_run: ReadRun, other: bytes) -> None:
        packets = written(run_of(Packet(protocol="udp"), [100] * 3))
        for each in [*packets, other]:
            pair[1].send(each)
        found = Reading(read_run, pair[0].fileno(), header=0)
        assert (found.packets, found.kept) == (packets, other)

    @each_read_run
    @pytest.mark.parametrize("frame", [ETHERNET + b"\x08\x06" + bytes(46), bytes(14), b"short"])
    def test_frames_without_an_ip_packet_are_not_gathered(
        self, pair: Pair, read_run: ReadRun, frame: bytes
    ) -> None:
        for _ in range(2):
            pair[1].send(frame)
        found = Reading(read_run, pair[0].fileno(), frame=True, header=0)
        assert (found.packets, found.kept) == ([frame], frame)

    @each_read_run
    def test_checksums_that_the_sender_left_out_are_written(
        self, pair: Pair, read_run: ReadRun
    ) -> None:
        packets = written(run_of(Packet(protocol="udp"), [100] * 3))
        for each in packets:
            pseudo = native.checksum(each[12:20] + bytes([0, 17]) + each[24:26], 0) ^ 0xFFFF
            partial = each[:26] + pseudo.to_bytes(2, "big") + each[28:]
            pair[1].send(VnetHeader(1, 0, 0, 0, 20, 6).pack() + partial)
        assert Reading(read_run, pair[0].fileno()).packets == packets

    @each_read_run
    def test_a_super_packet_that_is_no_run_is_given_back(
        self, pair: Pair, read_run: ReadRun
    ) -> None:
        """It has too many segments, for the limit or for the buffer."""
        (whole,) = merge(written(run_of(Packet(), [1000] * 9)))
        for options in ({"layout": LAYOUT._replace(limit=8)}, {"room": 9000}):
            pair[1].send(whole)
            found = Reading(read_run, pair[0].fileno(), **options)
            assert (found.count, found.kept, found.drained) == (0, whole, False)

    @each_read_run
    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_gathering_ends_at_the_limit_and_at_the_end_of_the_buffer(
        self, pair: Pair, read_run: ReadRun, limit: int
    ) -> None:
        packets = written(run_of(Packet(protocol="udp"), [1000] * 5))
        for options in (
            {"layout": LAYOUT._replace(limit=limit)},
            {"room": limit * (1028 + 12 + 32) + 1071},
        ):
            for each in packets:
                pair[1].send(NONE + each)
            found = Reading(read_run, pair[0].fileno(), **options)
            assert (found.packets, found.kept) == (packets[:limit], None)
            while len(native._read_many(pair[0].fileno(), READ_SIZE, 9)) + limit < 5:
                pass

    @each_read_run
    def test_invalid_super_packets_raise_and_end_a_run(self, pair: Pair, read_run: ReadRun) -> None:
        packets = written(run_of(Packet(protocol="udp"), [100] * 2))
        damaged = [
            VnetHeader(1, GsoType.TCPV6, 0, 100).pack() + packets[0],
            VnetHeader(1, 0, 0, 0, 60_000, 6).pack() + packets[0],
            b"short",
        ]
        for wrong in damaged:
            for each in (NONE + packets[0], wrong, NONE + packets[1]):
                pair[1].send(each)
            found = Reading(read_run, pair[0].fileno())
            assert (found.packets, found.kept) == ([packets[0]], wrong)
            with pytest.raises(ValueError, match=r"\w"):
                Reading(read_run, pair[0].fileno(), first=wrong)
            found = Reading(read_run, pair[0].fileno())
            assert (found.packets, found.drained) == ([packets[1]], True)

    @each_read_run
    def test_nothing_waits_or_the_end_is_an_error(self, pair: Pair, read_run: ReadRun) -> None:
        with pytest.raises(BlockingIOError):
            Reading(read_run, pair[0].fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            Reading(read_run, 2**31 - 1)
        pair[1].close()
        for first in (None, b""):
            with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
                Reading(read_run, pair[0].fileno(), first=first)

    @each_read_run
    @pytest.mark.parametrize(
        ("field", "value"), [("before", -1), ("after", -1), ("align", 0), ("limit", 0)]
    )
    def test_read_run_refuses_an_impossible_layout(
        self, pair: Pair, read_run: ReadRun, field: str, value: int
    ) -> None:
        pair[1].send(NONE + bytes(20))
        with pytest.raises(ValueError, match="no such layout"):
            Reading(read_run, pair[0].fileno(), layout=LAYOUT._replace(**{field: value}))
        assert Reading(read_run, pair[0].fileno()).packets == [bytes(20)]

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    @pytest.mark.parametrize(
        "args",
        [
            (),
            (0, None, bytearray(9), [1, 2, 3, 4, 5], False, 0),
            (0, None, bytearray(9), (1, 2), False, 0),
            ("0", None, bytearray(9), LAYOUT, False, 0),
            (0, 5, bytearray(9), LAYOUT, False, 0),
        ],
    )
    def test_read_run_refuses_invalid_arguments(self, args: tuple[Any, ...]) -> None:
        with pytest.raises(TypeError):
            _speedups.read_run(*args)

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    def test_a_buffer_that_can_not_be_written_is_refused(self) -> None:
        with pytest.raises(BufferError):
            _speedups.read_run(0, None, bytes(100), LAYOUT, False, 0)


class TestWriteRun:
    @each_write_run
    @each_header
    @pytest.mark.parametrize("link", ["packet", "vlan"])
    def test_what_send_many_would_write(
        self, pair: Pair, write_run: WriteRun, header: int, link: str
    ) -> None:
        packets = written(run_of(Packet(link=LINKS[link]), [500] * 20 + [9]))
        packets += written(run_of(Packet(link=LINKS[link], ports=(5, 6)), [480] * 3))
        stride = 700
        buffer = bytearray(stride * len(packets) + 40)
        for index, packet in enumerate(packets):
            at = 40 + index * stride
            buffer[at : at + len(packet)] = packet
        lengths = [len(packet) for packet in packets]
        frame = link != "packet"
        left = write_run(pair[1].fileno(), buffer, 40, stride, lengths, frame, header)
        assert list(left) == []
        written_now = native._read_many(pair[0].fileno(), READ_SIZE, 99)
        if header:
            assert written_now == [headed(each, header) for each in merge(packets, frame=frame)]
        else:
            assert written_now == packets

    @each_write_run
    @each_header
    def test_it_stops_when_the_fd_is_full(
        self, pair: Pair, write_run: WriteRun, header: int
    ) -> None:
        # Each is of another flow, so they are not merged.
        packets = [bytes(Packet(ports=(n, 9), payload=bytes(5000))) for n in range(200)]
        buffer = b"".join(packets)
        size = len(packets[0])
        left = write_run(pair[1].fileno(), buffer, 0, size, [size] * 200, False, header)
        done = left[0]
        assert 0 < done < 200
        assert list(left) == list(range(done, 200))
        read = native._read_many(pair[0].fileno(), READ_SIZE, 999)
        assert read == [headed(NONE + each, header) for each in packets[:done]]
        assert list(write_run(2**31 - 1, buffer, 0, size, [size], False, header)) == [0]

    @each_write_run
    def test_streams_that_alternate_are_merged_by_flow(
        self, pair: Pair, write_run: WriteRun
    ) -> None:
        one = written(run_of(Packet(ports=(1, 9)), [500] * 4))
        other = written(run_of(Packet(ports=(2, 9), protocol="udp"), [524] * 4))
        packets = [each for both in zip(one, other, strict=True) for each in both]
        size = len(packets[0])
        assert {len(packet) for packet in packets} == {size}
        for udp in (True, False):
            left = write_run(
                pair[1].fileno(), b"".join(packets), 0, size, [size] * 8, False, 10, udp
            )
            assert list(left) == []
            read = native._read_many(pair[0].fileno(), READ_SIZE, 99)
            assert read == merge(packets, udp=udp)
            assert len(read) == (2 if udp else 5)

    @each_write_run
    @pytest.mark.parametrize(
        ("start", "stride", "lengths"),
        [(0, 10, [10, 11]), (91, 0, [10]), (0, 50, [10, 10, 1]), (0, 10, [-1]), (-1, 10, [5])],
    )
    def test_a_packet_outside_the_buffer_is_refused_before_any_is_written(
        self, pair: Pair, write_run: WriteRun, start: int, stride: int, lengths: list[int]
    ) -> None:
        buffer = bytes(20 if stride == 10 else 100)
        with pytest.raises(ValueError, match=r"\w"):
            write_run(pair[1].fileno(), buffer, start, stride, lengths, False, 0)
        with pytest.raises(BlockingIOError):
            native.read(pair[0].fileno(), 100)

    @each_write_run
    @pytest.mark.parametrize("lengths", [(1, 2), [1] * 257, None])
    def test_lengths_that_are_no_list(self, pair: Pair, write_run: WriteRun, lengths: Any) -> None:
        with pytest.raises(TypeError, match="at most 256"):
            write_run(pair[1].fileno(), bytes(9), 0, 0, lengths, False, 0)

    @each_write_run
    @pytest.mark.parametrize("header", [1, 9, 11])
    def test_write_run_refuses_another_header(
        self, pair: Pair, write_run: WriteRun, header: int
    ) -> None:
        with pytest.raises(ValueError, match="10"):
            write_run(pair[1].fileno(), bytes(9), 0, 0, [1], False, header)


class TestRun:
    def run_of(self, count: int, size: int, last: int, stride: int, start: int = 16) -> Run:
        buffer = memoryview(bytearray(random.Random(5).randbytes(start + count * stride + 9)))
        return Run(buffer, start, stride, size, last, count)

    def test_views_and_segments_are_the_packets(self) -> None:
        run = self.run_of(3, 100, 7, 132)
        expected = [
            run.buffer[at : at + n].tobytes() for at, n in ((16, 100), (148, 100), (280, 7))
        ]
        assert run.segments() == expected
        assert [view.tobytes() for view in run.views()] == expected
        assert [run.view(n).tobytes() for n in range(3)] == expected
        assert [run.view(n - 3).tobytes() for n in range(3)] == expected
        assert len(run) == 3
        run.view(2)[0] ^= 1
        assert run.segments() != expected
        for index in (3, -4):
            with pytest.raises(IndexError, match="3 packets"):
                run.view(index)

    def test_words_are_one_field_of_all_packets(self) -> None:
        run = self.run_of(3, 100, 7, 132)
        for offset in (-16, 0, 4):
            words = run.words(offset)
            assert words.tolist() == [
                int.from_bytes(run.buffer[at : at + 4], __import__("sys").byteorder)
                for at in range(16 + offset, 16 + offset + 3 * 132, 132)
            ]
        run.words(4)[:] = memoryview(b"abcdefghijkl").cast("I")
        assert [run.buffer[at : at + 4].tobytes() for at in (20, 152, 284)] == [
            b"abcd", b"efgh", b"ijkl",
        ]  # fmt: skip
        assert self.run_of(1, 9, 9, 0).words(0).nbytes == 4

    @pytest.mark.parametrize("offset", [1, -20, 140])
    def test_words_that_are_not_aligned_or_outside(self, offset: int) -> None:
        with pytest.raises(ValueError, match="not aligned in every packet, or outside"):
            self.run_of(3, 100, 7, 132).words(offset)
        with pytest.raises(ValueError, match="not aligned"):
            self.run_of(3, 100, 7, 133).words(0)

    def test_lengths_are_what_is_left_or_what_was_asked_for(self) -> None:
        run = self.run_of(3, 100, 7, 132)
        assert run.lengths() == [100, 100, 7]
        assert run.lengths(7) == [93, 93, 0]
        assert run.lengths(4, (5, 6, 7)) == [5, 6, 7]
        for before, sizes in ((8, None), (0, [1, 2]), (0, [1, 2, 200]), (0, [1, -1, 1])):
            with pytest.raises(ValueError, match=r"one size|outside"):
                run.lengths(before, sizes)


class TestPool:
    def run_of(self, pool: Pool) -> Run:
        return Run(pool.free.pop(), 0, 10, 10, 10, 1, pool)

    def test_a_released_buffer_is_free_again_once(self) -> None:
        pool = Pool(2)
        run, other = self.run_of(pool), self.run_of(pool)
        assert pool.free == []
        run.release()
        run.release()
        assert pool.free == [run.buffer]
        with other:
            pass
        assert len(pool.free) == 2

    def test_a_kept_buffer_is_replaced(self) -> None:
        pool = Pool(1)
        kept = self.run_of(pool).keep()
        (other,) = pool.free
        assert other.obj is not kept.obj

    def test_a_run_that_is_dropped_warns_and_its_buffer_is_replaced(self) -> None:
        pool = Pool(1)
        view = self.run_of(pool).keep()
        run = self.run_of(pool)
        view = run.view(0)
        with pytest.warns(ResourceWarning, match="was not released"):
            del run
        (other,) = pool.free
        assert other.obj is not view.obj

    @pytest.mark.parametrize("buffers", [0, -1])
    def test_a_pool_has_a_buffer(self, buffers: int) -> None:
        with pytest.raises(ValueError, match="buffers must be at least 1"):
            Pool(buffers)

    @pytest.mark.parametrize("args", [(1.5,), (True,), ("1",)])
    def test_numbers_are_ints(self, args: tuple[Any, ...]) -> None:
        with pytest.raises(TypeError, match="must be an int"):
            Pool(*args)

    def test_a_buffer_holds_the_longest_packet(self) -> None:
        with pytest.raises(ValueError, match="size must be at least 65581"):
            Pool(1, size=65_580)
        assert Pool(1, size=65_581).size == 65_584

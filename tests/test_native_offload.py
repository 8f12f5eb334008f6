"""Reading and writing super-packets: the C module and its twins, over a packet socket."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from aiotun._kernel import abi
from aiotun._packets import native
from aiotun.offload import GsoType, VnetHeader

from .test_gso import LINKS, Packet, run_of, written
from .test_native import MISSING, Pair, _speedups, twins

ReadSplit = Callable[..., tuple[list[bytes], int]]
WriteMerged = Callable[..., Sequence[int]]

each_read_split = twins(native._read_split, "read_split")
each_write_merged = twins(native._write_merged, "write_merged")


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


class TestReadSplit:
    @each_read_split
    @pytest.mark.parametrize(("limit", "count"), [(1, 3), (3, 3), (4, 4), (5, 9), (9, 9), (99, 9)])
    def test_whole_super_packets_until_there_are_enough(
        self, pair: Pair, read_split: ReadSplit, limit: int, count: int
    ) -> None:
        packets = written(run_of(Packet(), [100] * 9))
        for start, end in ((0, 3), (3, 4), (4, 9)):
            pair[1].send(native.merge(packets[start:end], False)[0])
        assert read_split(pair[0].fileno(), False, limit) == (packets[:count], 0)
        if count < 9:
            assert read_split(pair[0].fileno(), False, 99) == (packets[count:], 0)

    @each_read_split
    def test_invalid_super_packets_are_counted_and_skipped(
        self, pair: Pair, read_split: ReadSplit
    ) -> None:
        packets = written(run_of(Packet(), [100] * 3))
        whole = native.merge(packets, False)[0]
        damaged = whole[:1] + b"\4" + whole[2:]  # it is not TCP over IPv6
        for each in (damaged, whole, b"short", damaged):
            pair[1].send(each)
        assert read_split(pair[0].fileno(), False, 99) == (packets, 3)
        pair[1].send(damaged)
        assert read_split(pair[0].fileno(), False, 1) == ([], 1)

    @each_read_split
    def test_super_packets_that_grow_too_much_are_dropped_and_counted(
        self, pair: Pair, read_split: ReadSplit
    ) -> None:
        """They are dropped and counted."""
        whole = bytes(Packet(payload=bytes(60_000)))
        pair[1].send(VnetHeader(1, GsoType.TCPV4, 0, 1).pack() + whole)
        pair[1].send(native.merge(written(run_of(Packet(), [1000])), False)[0])
        assert read_split(pair[0].fileno(), False, 2) == (written(run_of(Packet(), [1000])), 1)

    @each_read_split
    def test_read_split_splits_frames_with_a_vlan_tag(
        self, pair: Pair, read_split: ReadSplit
    ) -> None:
        frames = written(run_of(Packet(link=LINKS["vlan"]), [1448] * 45))
        pair[1].send(native.merge(frames, True)[0])
        assert read_split(pair[0].fileno(), True, 64) == (frames, 0)

    @each_read_split
    def test_read_split_raises_when_nothing_waits_or_the_fd_is_closed(
        self, pair: Pair, read_split: ReadSplit
    ) -> None:
        with pytest.raises(BlockingIOError):
            read_split(pair[0].fileno(), False, 5)
        with pytest.raises(OSError, match="Bad file descriptor"):
            read_split(2**31 - 1, False, 5)

    @each_read_split
    def test_a_header_of_12_bytes(self, pair: Pair, read_split: ReadSplit) -> None:
        """Whatever num_buffers says; what has no room for it is lost."""
        packets = written(run_of(Packet(), [100] * 9))
        whole = native.merge(packets, False)[0]
        for buffers in (b"\0\0", b"\xff\xff"):
            pair[1].send(whole[:10] + buffers + whole[10:])
        for length in (10, 11):
            pair[1].send(bytes(length))
        pair[1].send(bytes(12) + b"plain")
        assert read_split(pair[0].fileno(), False, 99, 12) == ([*packets, *packets, b"plain"], 2)

    @each_read_split
    @pytest.mark.parametrize("size", [0, 9, 11, 13, 24, 2**40])
    def test_no_other_header(self, pair: Pair, read_split: ReadSplit, size: int) -> None:
        pair[1].send(bytes(30))
        with pytest.raises(ValueError, match=f"10 or 12 bytes, not {size}"):
            read_split(pair[0].fileno(), False, 1, size)
        assert read_split(pair[0].fileno(), False, 1) == ([bytes(20)], 0)

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    @pytest.mark.parametrize("args", [(), (1, False), (1, False, 1, 10, 1), ("1", False, 1)])
    def test_read_split_refuses_invalid_arguments(self, args: tuple[object, ...]) -> None:
        with pytest.raises(TypeError):
            _speedups.read_split(*args)


class TestWriteMerged:
    @each_write_merged
    def test_write_merged_writes_what_merge_returns(
        self, pair: Pair, write_merged: WriteMerged
    ) -> None:
        packets: list[bytes] = []
        for protocol in ("tcp", "udp"):
            packets += written(run_of(Packet(protocol=protocol), [100] * 9 + [7]))
            packets += [b"", b"neither TCP nor UDP"]
        expected = native.merge(packets, False)
        assert len(expected) == 6
        assert list(write_merged(pair[1].fileno(), iter(packets), False)) == []
        assert native.read_many(pair[0].fileno(), abi.READ_SIZE, 100) == expected

    @each_write_merged
    def test_write_merged_merges_frames_with_two_vlan_tags(
        self, pair: Pair, write_merged: WriteMerged
    ) -> None:
        packets = written(run_of(Packet(link=LINKS["qinq"]), [1448] * 45))
        assert list(write_merged(pair[1].fileno(), map(bytearray, packets), True)) == []
        assert os.read(pair[0].fileno(), 70_000) == native.merge(packets, True)[0]

    @each_write_merged
    def test_a_header_of_12_bytes(self, pair: Pair, write_merged: WriteMerged) -> None:
        """As one of 10, and two zeroes behind it."""
        packets = [*written(run_of(Packet(), [1448] * 40)), b"", b"x" * 2000]
        assert list(write_merged(pair[1].fileno(), packets, False, 12)) == []
        expected = [each[:10] + bytes(2) + each[10:] for each in native.merge(packets, False)]
        assert native.read_many(pair[0].fileno(), abi.READ_SIZE, 100) == expected

    @each_write_merged
    def test_write_merged_leaves_udp_alone_if_asked(
        self, pair: Pair, write_merged: WriteMerged
    ) -> None:
        datagrams = written(run_of(Packet(protocol="udp"), [100] * 3))
        segments = written(run_of(Packet(), [100] * 3))
        assert not write_merged(pair[1].fileno(), datagrams + segments, False, 10, False)
        got = [os.read(pair[0].fileno(), 70_000) for _ in range(4)]
        assert got[:3] == [bytes(10) + packet for packet in datagrams]
        assert VnetHeader.unpack(got[3]).gso_type == GsoType.TCPV4

    @each_write_merged
    @pytest.mark.parametrize("size", [0, 9, 11, 13, 24, 2**40])
    def test_no_other_header(self, pair: Pair, write_merged: WriteMerged, size: int) -> None:
        with pytest.raises(ValueError, match=f"10 or 12 bytes, not {size}"):
            write_merged(pair[1].fileno(), [bytes(20)], False, size)
        with pytest.raises(BlockingIOError):
            os.read(pair[0].fileno(), 100)

    @each_write_merged
    def test_until_it_is_full(self, pair: Pair, write_merged: WriteMerged) -> None:
        """Nothing is left over that was written, and nothing else was written."""
        packets: list[bytes] = []
        for number in range(1000):
            packets += written(run_of(Packet(sequence=number * 50_000), [100] * (1 + number % 4)))
        left = list(write_merged(pair[1].fileno(), packets, False))
        done = len(packets) - len(left)
        assert 0 < done < len(packets)
        assert left == list(range(done, len(packets)))
        arrived: list[bytes] = []
        for whole in native.read_many(pair[0].fileno(), abi.READ_SIZE, 10_000):
            arrived += native.split(whole, False)
        assert arrived == packets[:done]

    @each_write_merged
    def test_everything_is_left_when_the_fd_fails(
        self, pair: Pair, write_merged: WriteMerged
    ) -> None:
        packets = written(run_of(Packet(), [100] * 3))
        assert list(write_merged(2**31 - 1, packets, False)) == [0, 1, 2]
        pair[0].close()
        assert list(write_merged(pair[1].fileno(), packets, False)) == [0, 1, 2]

    @each_write_merged
    def test_write_merged_writes_what_comes_before_an_object_that_is_no_packet(
        self, pair: Pair, write_merged: WriteMerged
    ) -> None:
        assert list(write_merged(pair[1].fileno(), [bytes(20), "text", b""], False)) == [1, 2]
        assert os.read(pair[0].fileno(), 100) == bytes(30)
        with pytest.raises(TypeError):
            write_merged(pair[1].fileno(), None, False)
        with pytest.raises(BlockingIOError):
            os.read(pair[0].fileno(), 100)

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    @pytest.mark.parametrize("args", [(), (1, []), (1, [], False, 10, 1, 1), ("1", [], False)])
    def test_write_merged_refuses_invalid_arguments(self, args: tuple[object, ...]) -> None:
        with pytest.raises(TypeError):
            _speedups.write_merged(*args)

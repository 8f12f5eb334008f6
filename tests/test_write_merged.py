"""Merging and writing in one go: the C module and its twin, over a socket that keeps boundaries."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from aiotun import _abi, _native

from .test_gso import LINKS, Packet, run_of, written
from .test_native import MISSING, Pair, _speedups, twins

WriteMerged = Callable[[int, Iterable[Any], bool], int]

each_write_merged = twins(_native._write_merged, "write_merged")


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


class TestWriteMerged:
    @each_write_merged
    def test_what_merge_gives(self, pair: Pair, write_merged: WriteMerged) -> None:
        packets: list[bytes] = []
        for protocol in ("tcp", "udp"):
            packets += written(run_of(Packet(protocol=protocol), [100] * 9 + [7]))
            packets += [b"", b"neither TCP nor UDP"]
        expected = _native.merge(packets, False)
        assert len(expected) == 6
        assert write_merged(pair[1].fileno(), iter(packets), False) == len(packets)
        assert _native.read_many(pair[0].fileno(), _abi.READ_SIZE, 100) == expected

    @each_write_merged
    def test_frames(self, pair: Pair, write_merged: WriteMerged) -> None:
        packets = written(run_of(Packet(link=LINKS["qinq"]), [1448] * 45))
        assert write_merged(pair[1].fileno(), map(bytearray, packets), True) == 45
        assert os.read(pair[0].fileno(), 70_000) == _native.merge(packets, True)[0]

    @each_write_merged
    def test_until_it_is_full(self, pair: Pair, write_merged: WriteMerged) -> None:
        """What was written is counted in packets, and nothing else was written."""
        packets: list[bytes] = []
        for number in range(1000):
            packets += written(run_of(Packet(sequence=number * 50_000), [100] * (1 + number % 4)))
        done = write_merged(pair[1].fileno(), packets, False)
        assert 0 < done < len(packets)
        arrived: list[bytes] = []
        for whole in _native.read_many(pair[0].fileno(), _abi.READ_SIZE, 10_000):
            arrived += _native.split(whole, False)
        assert arrived == packets[:done]

    @each_write_merged
    def test_what_it_does_not_take(self, pair: Pair, write_merged: WriteMerged) -> None:
        packets = written(run_of(Packet(), [100] * 3))
        assert write_merged(2**31 - 1, packets, False) == 0
        pair[0].close()
        assert write_merged(pair[1].fileno(), packets, False) == 0

    @each_write_merged
    def test_what_is_no_packet(self, pair: Pair, write_merged: WriteMerged) -> None:
        with pytest.raises(TypeError):
            write_merged(pair[1].fileno(), [bytes(20), "text"], False)
        with pytest.raises(TypeError):
            write_merged(pair[1].fileno(), None, False)  # type: ignore[arg-type]  # on purpose
        with pytest.raises(BlockingIOError):
            os.read(pair[0].fileno(), 100)

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    @pytest.mark.parametrize("args", [(), (1, []), (1, [], False, 4), ("1", [], False)])
    def test_wrong_arguments(self, args: tuple[object, ...]) -> None:
        with pytest.raises(TypeError):
            _speedups.write_merged(*args)

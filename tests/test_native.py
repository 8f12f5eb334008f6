"""The functions of the C module and their Python twins: both behave the same."""

import contextlib
import errno
import importlib
import os
import random
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiotun._kernel import abi
from aiotun._packets import gso, native

MISSING = "missing: the C module was not built"

_speedups: Any = None
with contextlib.suppress(ImportError):
    _speedups = importlib.import_module("aiotun._packets._speedups")

Read = Callable[[int, int], bytes]
ReadMany = Callable[[int, int, int], list[bytes]]
WriteMany = Callable[[int, list[Any]], int]


def twins(python: object, name: str) -> pytest.MarkDecorator:
    both = [pytest.param(python, id="python")]
    if _speedups is None:
        both.append(pytest.param(None, id="c", marks=pytest.mark.skip(MISSING)))
    else:
        both.append(pytest.param(getattr(_speedups, name), id="c"))
    return pytest.mark.parametrize(name, both)


each_read = twins(os.read, "read")
each_read_many = twins(native._read_many, "read_many")
each_write_many = twins(native._write_many, "write_many")
each_find_other = twins(native._find_other, "find_other")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


class TestRead:
    @each_read
    @pytest.mark.parametrize("size", [0, 1, 84, 1500, 65_535, abi.READ_SIZE])
    def test_read_returns_a_packet_of_any_size(self, pair: Pair, read: Read, size: int) -> None:
        packet = os.urandom(size)
        pair[1].send(packet)
        assert read(pair[0].fileno(), abi.READ_SIZE) == packet

    @each_read
    def test_read_returns_no_more_than_asked_for(self, pair: Pair, read: Read) -> None:
        for _ in range(2):
            pair[1].send(b"0123456789")
        assert read(pair[0].fileno(), 4) == b"0123"
        assert read(pair[0].fileno(), 0) == b""

    @each_read
    def test_read_raises_when_no_packet_waits(self, pair: Pair, read: Read) -> None:
        with pytest.raises(BlockingIOError) as caught:
            read(pair[0].fileno(), 100)
        assert caught.value.errno == errno.EAGAIN

    @each_read
    def test_read_of_an_fd_that_is_not_open_raises(self, read: Read) -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            read(2**31 - 1, 100)

    @each_read
    @pytest.mark.parametrize("args", [(), (1,), (1, 2, 3), ("1", 2), (1, "2"), (2**80, 1), (1, -1)])
    def test_read_refuses_invalid_arguments(
        self, read: Callable[..., bytes], args: tuple[object, ...]
    ) -> None:
        with pytest.raises((TypeError, ValueError, OverflowError, OSError)):
            read(*args)


SIZES = (0, 1, 84, 8191, 8192, 8193, 65_222, 65_535, abi.READ_SIZE)


class TestLongPackets:
    """The C module guesses that a packet is as long as the last one, and reads into that size."""

    @each_read
    @pytest.mark.parametrize("first", SIZES)
    @pytest.mark.parametrize("second", SIZES)
    def test_packets_of_changing_lengths_are_read_whole(
        self, pair: Pair, read: Read, first: int, second: int
    ) -> None:
        fd = pair[0].fileno()
        for size in (first, second, second, first):
            packet = os.urandom(size)
            pair[1].send(packet)
            assert read(fd, abi.READ_SIZE) == packet
        with pytest.raises(BlockingIOError):
            read(fd, abi.READ_SIZE)

    @each_read
    def test_less_room_than_the_last_one_took(self, pair: Pair, read: Read) -> None:
        for room in (65_535, 20_000, 9000, 9001, 100):
            packet = os.urandom(65_535)
            pair[1].send(packet)
            assert read(pair[0].fileno(), room) == packet[:room]

    @each_read_many
    def test_short_ones_among_them(self, pair: Pair, read_many: ReadMany) -> None:
        chance = random.Random(8)
        for _ in range(200):
            short = chance.choice((0, 1, 20))  # enough that it no longer expects a long one
            sizes = [chance.choice(SIZES)] + [chance.randrange(100) for _ in range(short)]
            batches = []
            for size in sizes:
                batches.append(chance.randbytes(size))
                pair[1].send(batches[-1])
                if len(batches) == 3:  # the socket may not hold more
                    assert read_many(pair[0].fileno(), abi.READ_SIZE, 9) == batches
                    batches = []
            if batches:
                assert read_many(pair[0].fileno(), abi.READ_SIZE, 9) == batches

    @each_read_many
    def test_no_packet_is_kept(self, pair: Pair, read_many: ReadMany) -> None:
        def two() -> list[bytes]:
            for size in (65_000, 60_000):
                pair[1].send(bytes(size))
            return read_many(pair[0].fileno(), abi.READ_SIZE, 9)

        two()
        with contextlib.suppress(BlockingIOError):
            read_many(pair[0].fileno(), abi.READ_SIZE, 9)
        tracemalloc.start()
        try:
            for _ in range(50):
                two()
                with contextlib.suppress(BlockingIOError):
                    read_many(pair[0].fileno(), abi.READ_SIZE, 9)
            assert tracemalloc.get_traced_memory()[0] < 65_000
        finally:
            tracemalloc.stop()


class TestReadMany:
    @each_read_many
    @pytest.mark.parametrize("waiting", [1, 2, 9])
    @pytest.mark.parametrize("limit", [0, 1, 2, 8, 9, 10, 2**40])
    def test_in_order_and_no_more_than_the_limit(
        self, pair: Pair, read_many: ReadMany, waiting: int, limit: int
    ) -> None:
        for number in range(waiting):
            pair[1].send(bytes([number]) * (number + 1))
        batch = read_many(pair[0].fileno(), 100, limit)
        assert batch == [bytes([number]) * (number + 1) for number in range(min(waiting, limit))]
        rest = waiting - len(batch)
        assert len(read_many(pair[0].fileno(), 100, rest)) == rest

    @each_read_many
    def test_read_many_raises_when_no_packet_waits(self, pair: Pair, read_many: ReadMany) -> None:
        with pytest.raises(BlockingIOError):
            read_many(pair[0].fileno(), 100, 5)

    @each_read_many
    def test_read_many_of_an_fd_that_is_not_open_raises(self, read_many: ReadMany) -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            read_many(2**31 - 1, 100, 5)

    @each_read_many
    @pytest.mark.parametrize("args", [(), (1, 2), (1, 2, 3, 4), ("1", 2, 3), (1, -1, 3)])
    def test_read_many_refuses_invalid_arguments(
        self, read_many: Callable[..., object], args: tuple[object, ...]
    ) -> None:
        with pytest.raises((TypeError, ValueError, OSError)):
            read_many(*args)


class TestWriteMany:
    @each_write_many
    def test_write_many_writes_in_order(self, pair: Pair, write_many: WriteMany) -> None:
        packets = [bytes([number]) * number for number in range(9)]
        assert write_many(pair[1].fileno(), packets) == 9
        assert native.read_many(pair[0].fileno(), 100, 100) == packets
        assert write_many(pair[1].fileno(), []) == 0

    @each_write_many
    def test_write_many_stops_when_the_socket_is_full(
        self, pair: Pair, write_many: WriteMany
    ) -> None:
        packets = [number.to_bytes(4, "big") for number in range(10_000)]
        pair[1].setblocking(False)
        written = write_many(pair[1].fileno(), packets)
        assert 0 < written < 10_000
        assert native.read_many(pair[0].fileno(), 100, 20_000) == packets[:written]

    @each_write_many
    @pytest.mark.parametrize("wrong", ["text", None, 7, memoryview(b"abcd")[::2]])
    def test_write_many_stops_before_an_object_that_is_no_packet(
        self, pair: Pair, write_many: WriteMany, wrong: object
    ) -> None:
        assert write_many(pair[1].fileno(), [b"one", b"two", wrong, b"three"]) == 2
        assert native.read_many(pair[0].fileno(), 100, 100) == [b"one", b"two"]

    @each_write_many
    def test_write_many_returns_0_when_the_fd_fails(
        self, pair: Pair, write_many: WriteMany
    ) -> None:
        assert write_many(2**31 - 1, [b"packet"]) == 0
        pair[0].close()
        assert write_many(pair[1].fileno(), [b"packet"]) == 0

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    @pytest.mark.parametrize("args", [(), (1, [], 1), ("1", []), (1, (b"tuple",)), (1, None)])
    def test_write_many_refuses_invalid_arguments(self, args: tuple[object, ...]) -> None:
        with pytest.raises(TypeError):
            _speedups.write_many(*args)


class _Odd(int):
    """An int with its own arithmetic, which must not be used."""

    def __mod__(self, other: int) -> Any:
        return "odd"

    __add__ = __radd__ = __index__ = __int__ = __mod__  # type: ignore[assignment]  # on purpose


@twins(gso.checksum, "checksum")
class TestChecksum:
    @pytest.mark.parametrize("value", [0, 1, 0xFFFF, 2**63 - 1, 2**63, 2**64, 2**70, 2**64 - 1])
    def test_a_subclass_of_int(self, checksum: Callable[..., int], value: int) -> None:
        for data in (b"", b"\0\0", b"abc"):
            assert checksum(data, _Odd(value)) == checksum(data, value)

    def test_anything_with_an_index(self, checksum: Callable[..., int]) -> None:
        class Index:
            def __index__(self) -> int:
                return 2**70

        assert checksum(b"abc", Index()) == checksum(b"abc", 2**70)
        assert checksum(b"abc", True) == checksum(b"abc", 1)

    @pytest.mark.parametrize("value", [-1, -(2**70)])
    def test_a_negative_sum(self, checksum: Callable[..., int], value: int) -> None:
        with pytest.raises(ValueError, match="initial must not be negative"):
            checksum(b"abc", value)

    @pytest.mark.parametrize("value", ["1", 1.5, None])
    def test_checksum_refuses_an_initial_that_is_no_integer(
        self, checksum: Callable[..., int], value: object
    ) -> None:
        with pytest.raises(TypeError):
            checksum(b"abc", value)


@pytest.mark.skipif(_speedups is None, reason=MISSING)
def test_numbers_may_be_of_a_subclass(pair: Pair) -> None:
    fd, size = _Odd(pair[0].fileno()), _Odd(100)
    pair[1].send(b"packet")
    assert _speedups.read(fd, size) == b"packet"
    pair[1].send(b"packet")
    assert _speedups.read_many(fd, size, _Odd(1)) == [b"packet"]
    pair[1].send(bytes(10) + b"packet")
    assert _speedups.read_split(fd, False, _Odd(1)) == ([b"packet"], 0)
    assert _speedups.write_many(_Odd(pair[1].fileno()), [b"packet"]) == 1
    assert _speedups.write_merged(_Odd(pair[1].fileno()), [b"packet"], False) == []


@pytest.mark.skipif(_speedups is None, reason=MISSING)
def test_the_c_module_knows_the_longest_packet() -> None:
    assert _speedups.READ_SIZE == abi.READ_SIZE
    with pytest.raises(ValueError, match="a size must be 0 to 65581, got 65582"):
        _speedups.read(0, abi.READ_SIZE + 1)


SMALL_STACK = """
import os, socket, threading
from aiotun._packets import native
from tests.test_gso import Packet, run_of, written

packets = written(run_of(Packet(), [60] * 1000))
super_packet = native.merge(packets, False)[0]

def everything():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        for again in range(2):
            theirs.send(super_packet)
            assert native.read(ours.fileno(), 65_581) == super_packet
            theirs.send(super_packet)
            assert native.read_many(ours.fileno(), 65_581, 1) == [super_packet]
            theirs.send(super_packet)
            assert native.read_split(ours.fileno(), False, 1) == (packets, 0)
            assert native.write_many(theirs.fileno(), [super_packet]) == 1
            assert os.read(ours.fileno(), 65_581) == super_packet
            assert not native.write_merged(theirs.fileno(), packets, False)
            assert os.read(ours.fileno(), 65_581) == super_packet
    print(native.SPEEDUPS)

try:
    threading.stack_size(65_536)
except ValueError:  # on arm64, glibc refuses less than this
    threading.stack_size(128 << 10)
thread = threading.Thread(target=everything)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("choice", ["", "forbid"])
def test_a_thread_with_a_stack_of_64_kib(choice: str) -> None:
    done = _python(SMALL_STACK, choice)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{_speedups is not None and choice == ''}\n"


def _python(code: str, choice: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AIOTUN_SPEEDUPS": choice}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


SHOW = (
    "from aiotun._packets import native; from aiotun._queue import port; "
    "print(native.SPEEDUPS, port.Port.read.__module__)"
)
HIDE = "import sys; sys.modules['aiotun._packets._speedups'] = None\n"


class TestChoice:
    def test_forbid_uses_the_python_functions(self) -> None:
        assert _python(SHOW, "forbid").stdout == "False posix\n"

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    @pytest.mark.parametrize("choice", ["", "require"])
    def test_the_c_module_is_used_when_it_is_installed(self, choice: str) -> None:
        done = _python(SHOW, choice)
        assert done.stdout.startswith("True "), done.stderr

    def test_without_the_c_module_the_python_functions_are_used(self) -> None:
        assert _python(HIDE + SHOW, "").stdout == "False posix\n"

    def test_required_and_missing(self) -> None:
        done = _python(HIDE + SHOW, "require")
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: AIOTUN_SPEEDUPS is 'require', but aiotun")

    def test_an_unknown_aiotun_speedups_fails_the_import(self) -> None:
        done = _python(SHOW, "yes")
        assert done.returncode == 1
        assert "AIOTUN_SPEEDUPS must be 'require', 'forbid' or unset, got 'yes'" in done.stderr


FindOther = Callable[[list[Any], int, int, bool], int]

# An IPv4 and an IPv6 header, and TCP with an ACK.
_TCP4 = bytes.fromhex("4500002800000000400600000a0000010a000002")
_TCP6 = bytes.fromhex("6000000000140640" + "00" * 15 + "01" + "00" * 15 + "02")
_ACK = bytes.fromhex("0050005000000000000000005010000000000000")


def _changed(packet: bytes, at: int, value: int) -> bytes:
    return packet[:at] + bytes([value]) + packet[at + 1 :]


class TestFindOther:
    PLAIN = (_TCP4 + _ACK, _TCP6 + _ACK)
    OPENING = (
        _changed(_TCP4 + _ACK, 33, 0x02),  # SYN
        _changed(_TCP4 + _ACK, 33, 0x14),  # RST and ACK
        _changed(_TCP4 + _ACK, 6, 0x20),  # more fragments
        _changed(_TCP4 + _ACK, 7, 0x01),  # a later fragment
        _changed(_TCP4 + _ACK, 0, 0x46),  # options
        _changed(_TCP6 + _ACK, 53, 0x02),
    )
    OTHER = (
        _changed(_TCP4 + _ACK, 9, 17),
        _changed(_TCP6 + _ACK, 6, 17),
        _changed(_TCP6 + _ACK, 6, 44),  # a fragment header
        bytearray(_TCP4 + _ACK),
        memoryview(_TCP6 + _ACK),
    )

    @each_find_other
    @pytest.mark.parametrize("header", [0, 10, 12])
    def test_it_finds_what_the_program_is_asked_about(
        self, find_other: FindOther, header: int
    ) -> None:
        front = bytes(header)
        for tcp, asked in ((False, self.OTHER), (True, self.OTHER + self.OPENING)):
            for packet in asked:
                kept = packet if type(packet) is not bytes else front + packet
                batch = [front + self.PLAIN[0], front + self.PLAIN[1], kept, kept]
                assert find_other(batch, 0, header, tcp) == 2
                assert find_other(batch, 3, header, tcp) == 3
                assert find_other(batch, 4, header, tcp) == 4
        batch = [front + each for each in self.PLAIN + self.OPENING]
        assert find_other(batch, 0, header, False) == len(batch)
        assert find_other([], 0, header, False) == 0

    @each_find_other
    def test_it_does_not_find_what_is_too_short_to_tell(self, find_other: FindOther) -> None:
        for packet, least in ((self.OTHER[0], 10), (self.OTHER[1], 7), (self.OPENING[0], 34)):
            for length in range(len(packet)):
                found = find_other([bytes(packet[:length])], 0, 0, True)
                assert found == (0 if length >= least else 1), length

    @pytest.mark.skipif(_speedups is None, reason=MISSING)
    def test_both_find_the_same(self) -> None:
        rng = random.Random(1)
        for _ in range(3000):
            packet = bytearray(rng.choice(self.PLAIN)[: rng.randrange(62)])
            for _ in range(rng.randrange(3)):
                if packet:
                    packet[rng.randrange(len(packet))] = rng.randrange(256)
            arguments: Any = [bytes(packet)], 0, rng.choice((0, 0, 10)), rng.random() < 0.5
            assert _speedups.find_other(*arguments) == native._find_other(*arguments)

"""Runs: many packets in one buffer, a fixed number of bytes apart.

A program that encrypts or copies each packet of a run needs no object for each. This module knows
where the packets of a run are, and which buffers are free. `native.read_run` and `native.write_run`
read and write runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from .._kernel.abi import READ_SIZE

__all__ = ["LIMIT", "Layout", "Pool", "Run", "leading", "padded", "place"]

LIMIT = 256
"""The most packets of a run; the C module has an array of this length."""


class Run:
    """Packets in one buffer: all of one size, only the last may be shorter.

    Packet `i` begins at ``start + i * stride``. The bytes between the packets are for the program:
    the room that it asked for, and the padding, which is zero.

    A run of a `Pool` holds its buffer until `release`; ``with run:`` releases it at the end of the
    block. If a run becomes garbage without that, it emits a `ResourceWarning`, and the pool makes
    another buffer.

    Attributes:
        buffer (memoryview): all of the buffer, writable bytes.
        start (int): where the first packet begins.
        stride (int): the distance from one packet to the next, in bytes.
        size (int): the length of every packet but the last, in bytes.
        last (int): the length of the last packet, in bytes.
        count (int): how many packets there are.
    """

    __slots__ = ("_pool", "buffer", "count", "last", "size", "start", "stride")

    def __init__(
        self,
        buffer: memoryview,
        start: int,
        stride: int,
        size: int,
        last: int,
        count: int,
        pool: Pool | None = None,
    ) -> None:
        """Describe packets that are in a buffer already.

        Args:
            buffer: a view of bytes. It must be writable if the packets are to be changed.
            start, stride, size, last, count: see the attributes. They are not checked here.
            pool: where `release` puts the buffer.
        """
        self.buffer: memoryview = buffer
        self.start: int = start
        self.stride: int = stride
        self.size: int = size
        self.last: int = last
        self.count: int = count
        self._pool = pool

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return (
            f"<Run of {self.count} packets of {self.size} bytes, the last of {self.last}, "
            f"from {self.start} every {self.stride}>"
        )

    def view(self, index: int) -> memoryview:
        """Return packet `index` as a view of the buffer.

        Raises:
            IndexError: there is no such packet. Negative numbers count from the end.
        """
        count = self.count
        if not -count <= index < count:
            raise IndexError(f"this run has {count} packets, and no packet {index}")
        index %= count
        start = self.start + index * self.stride
        return self.buffer[start : start + (self.size if index < count - 1 else self.last)]

    def views(self) -> list[memoryview]:
        """Return all packets as views of the buffer."""
        buffer, start, stride, size = self.buffer, self.start, self.stride, self.size
        last = self.count - 1
        starts = [start + index * stride for index in range(last)]
        views = [buffer[at : at + size] for at in starts]
        at = start + last * stride
        views.append(buffer[at : at + self.last])
        return views

    def words(self, offset: int) -> memoryview:
        """Return one 32-bit field of all packets, as a view of `count` numbers.

        The numbers have the machine's byte order. All can be written at once:
        ``run.words(12)[:] = ...`` takes a buffer of the format ``"I"``.

        Args:
            offset: where the field is, in bytes from each packet's beginning; below 0 it is in the
                room before the packet.

        Raises:
            ValueError: in some packet the field does not begin at a multiple of 4 bytes in the
                buffer, or is outside the buffer.
        """
        at, stride = self.start + offset, self.stride
        end = at + (self.count - 1) * stride + 4
        if at % 4 or stride % 4 or at < 0 or end > self.buffer.nbytes:
            raise ValueError(
                f"a word at {offset} is not aligned in every packet, or outside the buffer: the "
                f"packets begin at {self.start}, every {stride} bytes"
            )
        whole = self.buffer.nbytes & ~3
        return self.buffer[:whole].cast("I")[at // 4 : end // 4 : stride // 4 or 1]

    def segments(self) -> list[bytes]:
        """Return copies of all packets."""
        return [view.tobytes() for view in self.views()]

    def lengths(self, before: int = 0, sizes: Sequence[int] | None = None) -> list[int]:
        """Return how many bytes of each packet to send; see `Queue.send_run`.

        Raises:
            ValueError: there is not one size for each packet, or a packet ends outside the buffer.
        """
        count, stride = self.count, self.stride
        if sizes is None:
            lengths = [self.size - before] * (count - 1)
            lengths.append(self.last - before)
            least = most = lengths[0]  # of all but the last
        else:
            lengths = list(sizes)
            least, most = min(lengths, default=0), max(lengths, default=0)
        if len(lengths) != count or before < 0 or least < 0 or lengths[-1] < 0:
            raise ValueError(
                f"{self!r} needs one size for each packet, and sizes and 'before' must be at least "
                f"0; got before={before} and {len(lengths)} sizes"
            )
        # Compare two ends: that of the last packet, and that of the longest packet if it were the
        # last but one. The second is a bound for all others.
        last = self.start + before + (count - 1) * stride
        room = self.buffer.nbytes - last
        if lengths[-1] > room or most > room + stride:
            raise ValueError(f"a packet of {self!r} would end outside the buffer")
        return lengths

    def release(self) -> None:
        """Give the buffer back to the pool. After that, other packets may overwrite its views.

        A second call does nothing, nor does a call for a run without a pool.
        """
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.put(self.buffer)

    def keep(self) -> memoryview:
        """Take the buffer out of the pool and return it; the pool makes another."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.replace()
        return self.buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pool = self._pool
        if pool is not None:
            self._pool = None
            pool.put(self.buffer)

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            # Views of the buffer may still be in use, so no other run may get the buffer.
            self.keep()
            warnings.warn(
                f"{self!r} was not released; use 'with run:'", ResourceWarning, 1, source=self
            )


class _Line(Protocol):
    """Tasks that wait for a buffer."""

    def dismiss(self) -> None: ...


class Pool:
    """Buffers for runs.

    Args:
        buffers: how many runs can exist at the same time. With one buffer, a program must release
            each run before it receives the next.
        size: the size of each buffer, in bytes. 128 KiB is enough for the longest super-packet with
            the usual room around each segment. A super-packet that does not fit becomes several
            runs.

    Use a pool in one thread only. Any number of queues and sockets may share it.

    Attributes:
        free: the buffers that no run holds.
        size: the size of each buffer, in bytes.

    Raises:
        TypeError, ValueError: an argument is not an int, or too small.
    """

    __slots__ = ("__weakref__", "_lines", "free", "size")

    def __init__(self, buffers: int, *, size: int = 1 << 17) -> None:
        for what, number, least in (("buffers", buffers, 1), ("size", size, READ_SIZE)):
            if type(number) is not int:
                raise TypeError(f"{what} must be an int, got {number!r}")
            if number < least:
                raise ValueError(f"{what} must be at least {least}, got {number}")
        self.size: int = size + -size % 8
        self.free: list[memoryview] = [self._make() for _ in range(buffers)]
        self._lines: list[_Line] = []

    def _make(self) -> memoryview:
        return memoryview(bytearray(self.size))

    def put(self, buffer: memoryview) -> None:
        """Add a free buffer, and wake the tasks that wait for one."""
        self.free.append(buffer)
        if self._lines:
            lines, self._lines = self._lines, []
            for line in lines:
                line.dismiss()

    def replace(self) -> None:
        """Add a new buffer in place of one that a run has kept."""
        self.put(self._make())

    def wake(self, line: _Line) -> None:
        """Have `put` wake the tasks in this line, once."""
        if not any(each is line for each in self._lines):
            self._lines.append(line)


class Layout(NamedTuple):
    """The room around each packet of a run, and its limits, in bytes and packets.

    Attributes:
        before, after: the room in front of each packet, and behind its padding.
        align: packets are padded with zeros to a multiple of this, but not beyond `most`.
        most: the length up to which packets are padded.
        limit: how many packets a run has at most.
    """

    before: int
    after: int
    align: int
    most: int
    limit: int


Measures = tuple[int, int, int, int]
"""The count, size, last and stride of a run."""


def padded(length: int, layout: Layout) -> int:
    """Return the length of a packet with its padding."""
    return max(length, min(length + -length % layout.align, layout.most))


def place(buffer: memoryview, layout: Layout, packets: Sequence[bytes]) -> Measures | None:
    """Copy packets into a buffer, all of one size but the last; None if they are too many."""
    size, last, count = len(packets[0]), len(packets[-1]), len(packets)
    stride = layout.before + padded(size, layout) + layout.after
    if count > layout.limit or count * stride > buffer.nbytes:
        return None
    for index, packet in enumerate(packets):
        at = layout.before + index * stride
        end = at + len(packet)
        buffer[at:end] = packet
        padding = padded(len(packet), layout) - len(packet)
        buffer[end : end + padding] = bytes(padding)
    return count, size, last, stride


def leading(packets: Iterable[bytes], layout: Layout, room: int, frame: bool) -> list[bytes]:
    """Return the first packets that can form one run: of one size, with the same addresses.

    Args:
        packets: at least one.
        layout: the run's layout.
        room: the buffer's size in bytes.
        frame: whether the packets are Ethernet frames.
    """
    run: list[bytes] = []
    most = layout.limit
    for packet in packets:
        if not run:
            stride = layout.before + padded(len(packet), layout) + layout.after
            most = max(1, min(most, room // (stride or 1)))
        elif len(run) >= most or not follows(run[0], packet, frame):
            break
        run.append(packet)
        if len(packet) < len(run[0]):
            break
    return run


def follows(first: bytes, packet: bytes, frame: bool) -> bool:
    """Return whether a packet may be in the same run as `first`."""
    one, other = _addresses(first, frame), _addresses(packet, frame)
    return len(packet) <= len(first) and other is not None and one == other


def _addresses(packet: bytes, frame: bool) -> bytes | None:
    """Return the bytes that packets of a run have in common: link layer, version, addresses."""
    ip = 14 if frame else 0
    version = packet[ip] >> 4 if len(packet) > ip else 0
    start, end = (ip + 12, ip + 20) if version == 4 else (ip + 8, ip + 40)
    if version not in (4, 6) or len(packet) < end:
        return None
    if frame and packet[12:14] != (b"\x08\x00" if version == 4 else b"\x86\xdd"):
        return None
    return packet[: ip + 1] + packet[start:end]

"""What a queue reads from and writes to: a port, which turns system calls into packets.

A queue decides who may read or write, and when; its port does it. No method here waits. Each takes
the fd as an argument, so that its number is kept in one place, the queue; and each raises what the
system call raises. Every fd has a `Port` (here), a `SplitPort` (``offload="split"``) or a
`MemoryPort` (the testing kit). While a queue is captured, a `RecordingPort` stands in front of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .._kernel.abi import PI_SIZE, READ_SIZE, VNET_HDR_SIZE
from .._packets import native, runs

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._kernel.words import Mode, Offload

__all__ = [
    "BUDGET",
    "TUN_ENDS",
    "Counts",
    "Offloads",
    "PacketFormat",
    "Port",
    "RunPort",
    "SocketPort",
    "Taken",
    "copy_into",
    "is_packet",
    "packets_in",
    "socket_ends",
]

BUDGET = 256
"""How many packets may be read or written before the loop gets a turn.

At one microsecond a packet, and a few more for what the user does with it, the loop turns once a
millisecond.
"""

_ETHERNET_HEADER = 14

# Where read_into puts what does not fit, so that no packet is cut without our noticing. Nobody
# reads it, so all queues of all threads may share it.
_OVERFLOW = bytearray(READ_SIZE)


Taken = tuple[int, int, int, int, bool]
"""A run that was read: count, size, last and stride, and whether nothing more waits."""

TUN_ENDS = frozenset({errno.EBADFD, errno.EBADF})
"""What a TUN or TAP queue says once its interface was deleted, or its number is no longer ours."""


class Offloads(enum.Flag):
    """The kinds of super-packets that the kernel exchanges with a device; see `Device.offloads`."""

    TSO4 = 1
    """TCP over IPv4."""
    TSO6 = 2
    """TCP over IPv6."""
    USO = 4
    """UDP over IPv4 and IPv6, from Linux 6.2 on."""


class PacketFormat(NamedTuple):
    """What packets look like to the user of a queue."""

    mode: Mode
    offload: Offload = "off"
    packet_info: bool = False
    vnet_bytes: int = VNET_HDR_SIZE  # of the kernel's virtio-net header, where there is one
    accepted: Offloads = ~Offloads(0)  # by the kernel, or by a socket's other end

    @property
    def offloads(self) -> Offloads:
        """The super-packets that may be sent; none without a virtio-net header."""
        return Offloads(0) if self.offload == "off" else self.accepted

    @property
    def vnet_header_size(self) -> int:
        """The size of the virtio-net header between the kernel and us; 0 where there is none."""
        return 0 if self.offload == "off" else self.vnet_bytes

    @property
    def batch(self) -> int:
        """The most packets that are read or written at once, which takes about a millisecond.

        A segment of a super-packet takes less than half as long as a packet by itself. Large
        batches are faster, because whoever receives their packets is woken up less often.
        """
        return 1024 if self.offload == "split" else BUDGET

    @property
    def header_bytes(self) -> int:
        """How many bytes stand before the packet itself."""
        pi = PI_SIZE if self.packet_info else 0
        return pi + self.vnet_bytes if self.offload == "raw" else pi


@dataclasses.dataclass(slots=True)
class Counts:
    """What a queue and its port count, in the order of `PacketStats`' fields."""

    truncated: int = 0
    refused: int = 0
    undecodable: int = 0
    split_fallbacks: int = 0
    segments_dropped: int = 0


class Port:
    """One system call a packet: a TUN or TAP queue with ``offload="off"`` or ``"raw"``.

    A pickled port is one for a duplicate of the fd: it keeps nothing, and has counted nothing.

    Attributes:
        ends: the errnos that say that nothing will ever come or go here again.
        pending: how many packets the port itself keeps, where no poll sees them.
    """

    __slots__ = ("counts", "ends", "format", "pending")

    def __init__(
        self,
        format: PacketFormat,  # noqa: A002 - it is one
        counts: Counts | None = None,
        ends: frozenset[int] = TUN_ENDS,
    ) -> None:
        self.format: PacketFormat = format
        self.counts: Counts = counts or Counts()
        self.ends: frozenset[int] = ends
        # A slot, as the queue asks at each wake-up: an attribute of the class would take longer.
        self.pending: int = 0

    def __reduce__(self) -> tuple[Callable[..., Port], tuple[object, ...]]:
        return type(self), (self.format, None, self.ends)

    # Both are called for every packet, and bound by the queue: plain functions, no method.
    read: Callable[[int, int], bytes] = staticmethod(native.read)
    """Read one packet: ``read(fd, READ_SIZE)``."""
    write: Callable[[int, Buffer], object] = staticmethod(os.write)
    """Write one packet: ``write(fd, packet)``."""

    def read_into(self, fd: int, octets: memoryview) -> int:
        """Read one packet into a view of bytes; give its whole length, also if it did not fit."""
        return os.readv(fd, (octets, _OVERFLOW))

    def read_many(self, fd: int, limit: int) -> list[bytes]:
        """Read packets until none waits, or there are `limit`. Never empty: else it raises."""
        return native.read_many(fd, READ_SIZE, limit)

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        """Write as many packets as go without waiting.

        Raises nothing: the first packet left over meets the error when it is written by itself.

        Returns:
            Where in `packets` those are that were not written, in order.
        """
        return range(native.write_many(fd, packets), len(packets))

    def for_runs(self) -> Port:
        """Return the port that reads runs: this one, or one to use in place of this."""
        return RunPort(self)

    def read_run(self, fd: int, buffer: memoryview, layout: runs.Layout) -> Taken:
        """Read packets into a buffer; see `for_runs`.

        The buffer has room for the longest packet there can be.
        """
        raise NotImplementedError

    def write_run(
        self, fd: int, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> Sequence[int]:
        """Write packets that are in a buffer, as `write_many`."""
        return self.write_many(fd, packets_in(buffer, start, stride, lengths))

    def drop_rest(self) -> None:
        """Drop and count what the port keeps; the fd is about to be given up."""


class SocketPort(Port):
    """A socket that keeps packets apart, which someone else made (`Queue.from_fd`)."""

    __slots__ = ()

    def read(self, fd: int, size: int) -> bytes:
        return native.read(fd, size) or self._empty()

    def read_into(self, fd: int, octets: memoryview) -> int:
        length = super().read_into(fd, octets)
        if not length:
            self._empty()
        return length

    def read_many(self, fd: int, limit: int) -> list[bytes]:
        batch = super().read_many(fd, limit)
        if errno.ENODATA in self.ends:
            # The end reads as any number of empty packets. What came before it goes first.
            batch = [packet for packet in batch if packet] or [self._empty()]
        return batch

    def _empty(self) -> bytes:
        """Give an empty datagram; raise the end of a seqpacket socket, which reads the same."""
        if errno.ENODATA in self.ends:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return b""


class RunPort(Port):
    """A port in front of another, from which a program receives runs.

    A packet that can't be in the same run is read, and then kept for the next call. Other programs
    pay nothing for that: their queues have no such port.
    """

    __slots__ = ("_frames", "_kept", "inner")

    def __init__(self, inner: Port) -> None:
        super().__init__(inner.format, inner.counts, inner.ends)
        self.inner = inner
        self._frames = inner.format.mode == "tap"
        self._kept: bytes | None = None

    def __reduce__(self) -> tuple[Callable[..., Port], tuple[object, ...]]:
        return self.inner.__reduce__()  # what this keeps stays here

    def for_runs(self) -> Port:
        return self

    # Receiving

    def read(self, fd: int, size: int) -> bytes:
        if self._kept is not None:
            return self._take_kept()
        return self.inner.read(fd, size)

    def read_into(self, fd: int, octets: memoryview) -> int:
        if self._kept is not None:
            return copy_into(octets, self._take_kept())
        return self.inner.read_into(fd, octets)

    def read_many(self, fd: int, limit: int) -> list[bytes]:
        if self._kept is None:
            return self.inner.read_many(fd, limit)
        batch = [self._take_kept()]
        if limit > 1:
            # What we have goes first; the next call meets an error again.
            with contextlib.suppress(OSError):
                batch += self.inner.read_many(fd, limit - 1)
        return batch

    def read_run(self, fd: int, buffer: memoryview, layout: runs.Layout) -> Taken:
        try:
            count, size, last, stride, kept, drained = native.read_run(
                fd, self._kept, buffer, layout, self._frames, 0
            )
        except OSError as error:
            if error.errno != errno.ENODATA or errno.ENODATA in self.ends:
                raise
            # A datagram socket's empty datagram is a packet.
            count, size, last, stride = 1, 0, 0, layout.before + layout.after
            kept, drained = None, False
        if kept == b"" and errno.ENODATA in self.ends:
            kept = None  # the end, which reads the same again
        self._kept = kept
        self.pending = 0 if kept is None else 1
        return count, size, last, stride, drained

    def _take_kept(self) -> bytes:
        kept, self._kept, self.pending = self._kept, None, 0
        assert kept is not None
        return kept

    def drop_rest(self) -> None:
        self.counts.segments_dropped += self.pending
        self._kept, self.pending = None, 0
        self.inner.drop_rest()

    # Sending

    def write(self, fd: int, packet: Buffer) -> None:
        self.inner.write(fd, packet)

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        return self.inner.write_many(fd, packets)

    def write_run(
        self, fd: int, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> Sequence[int]:
        return self.inner.write_run(fd, buffer, start, stride, lengths)


def socket_ends(family: int, kind: int) -> frozenset[int]:
    """What says that a socket came to its end; ENODATA stands for reading an empty packet.

    The far end of a Unix socket is one other socket. What an Internet socket reports is an ICMP
    error about one datagram, and the next datagram may arrive.
    """
    ends = TUN_ENDS
    if family == socket.AF_UNIX:
        ends |= {errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE}
    if kind == socket.SOCK_SEQPACKET:
        ends |= {errno.ENODATA}
    return ends


def is_packet(packet: Buffer, mode: Mode) -> bool:
    """Whether a TUN or TAP device without headers of its own takes this; it looks no further."""
    with memoryview(packet) as view, view.cast("B") as octets:
        if mode == "tap":
            return len(octets) >= _ETHERNET_HEADER
        return len(octets) > 0 and octets[0] >> 4 in (4, 6)


def copy_into(octets: memoryview, packet: bytes) -> int:
    """Copy what fits of a packet into a view of bytes; give the packet's whole length."""
    kept = min(len(packet), octets.nbytes)
    octets[:kept] = packet[:kept]
    return len(packet)


def packets_in(buffer: memoryview, start: int, stride: int, lengths: list[int]) -> list[Buffer]:
    """Copies of the packets of a run."""
    return [
        buffer[start + index * stride :][:length].tobytes() for index, length in enumerate(lengths)
    ]

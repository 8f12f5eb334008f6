"""The port of ``offload="split"``: super-packets towards the kernel, ordinary packets to the user.

What is kept here is the rest of a super-packet that is being handed out, and after it what was read
last and could not be in the same run: a packet or super-packet, as it was read. Both come before
anything is read; `pending` tells the queue of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from .._packets import native, runs
from .port import TUN_ENDS, Offloads, Port, SocketPort, Taken, copy_into, packets_in, socket_ends
from .rawport import RawPort

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from .port import Counts, PacketFormat

__all__ = ["SplitPort", "make_port"]

_UDP = 5  # VIRTIO_NET_HDR_GSO_UDP_L4
_ONLY_UDP = frozenset({_UDP})

_read_split = native.read_split
_write_merged = native.write_merged
_read_run = native.read_run
_write_run = native.write_run
_write = os.write


class SplitPort(Port):
    """Splits what it reads, merges what it writes."""

    __slots__ = ("_frames", "_header", "_kept", "_no_header", "_refused_types", "_rest")

    def __init__(
        self,
        format: PacketFormat,  # noqa: A002 - it is one
        counts: Counts | None = None,
        ends: frozenset[int] = TUN_ENDS,
    ) -> None:
        super().__init__(format, counts, ends)
        self._frames = format.mode == "tap"
        self._header = format.vnet_bytes
        self._no_header = bytes(self._header)
        self._rest: list[bytes] = []  # the next packet is the last one here
        self._kept: bytes | None = None  # comes after the rest, and has a virtio-net header
        # Types of super-packets (gso_type) that this kernel refuses. Some kernels reject valid ones
        # with EINVAL, so we stop merging those.
        self._refused_types: set[int] = set() if Offloads.USO in format.offloads else {_UDP}

    # Receiving

    def read(self, fd: int, size: int) -> bytes:
        if not self._rest:
            packets = self._read_split(fd, 1)
            if len(packets) == 1:
                return packets[0]
            packets.reverse()
            self._rest = packets
        packet = self._rest.pop()
        self._count_pending()
        return packet

    def read_into(self, fd: int, octets: memoryview) -> int:
        return copy_into(octets, self.read(fd, octets.nbytes))

    def read_many(self, fd: int, limit: int) -> list[bytes]:
        # A stream comes in super-packets and acknowledgments, in turn: one super-packet a call.
        batch = self._read_after_rest(fd, limit) if self._rest else self._read_split(fd, limit)
        if len(batch) > limit:
            self._rest = batch[: limit - 1 : -1]
            del batch[limit:]
            self._count_pending()
        return batch

    def _read_after_rest(self, fd: int, limit: int) -> list[bytes]:
        """Read as `_read_split`, but what is left of the last super-packet comes first."""
        batch = self._rest[: -limit - 1 : -1]
        del self._rest[-len(batch) :]
        self._count_pending()
        if len(batch) < limit:
            # What we have goes first; the next call meets the error again.
            with contextlib.suppress(OSError):
                batch += self._read_split(fd, limit - len(batch))
        return batch

    def for_runs(self) -> Port:
        return self

    def read_run(self, fd: int, buffer: memoryview, layout: runs.Layout) -> Taken:
        if not self._rest:
            try:
                count, size, last, stride, kept, drained = _read_run(
                    fd, self._kept, buffer, layout, self._frames, self._header
                )
            except ValueError:
                self._kept, self.pending = None, 0
                self.counts.undecodable += 1
                raise _nothing() from None
            except OSError as error:
                if error.errno != errno.ENODATA or errno.ENODATA in self.ends:
                    raise
                self._kept, self.pending = None, 0
                self.counts.undecodable += 1  # an empty datagram
                raise _nothing() from None
            if kept == b"" and errno.ENODATA in self.ends:
                kept = None  # the end, which reads the same again
            if count:
                self._kept = kept
                self.pending = 0 if kept is None else 1
                return count, size, last, stride, drained
            # A super-packet of too many segments: it becomes several runs.
            assert kept is not None
            self._kept = None
            self._rest = native.split(native.short_header(kept, self._header), self._frames)[::-1]
        packets = runs.leading(reversed(self._rest), layout, buffer.nbytes, self._frames)
        measures = runs.place(buffer, layout, packets)
        assert measures is not None
        del self._rest[-len(packets) :]
        self._count_pending()
        return *measures, False

    def _count_pending(self) -> None:
        self.pending = len(self._rest) + (self._kept is not None)

    def _read_split(self, fd: int, limit: int) -> list[bytes]:
        """Read super-packets until there are `limit` packets, or more. Never empty: it raises."""
        kept = self._take_kept() if self._kept is not None else []
        if len(kept) >= limit:
            return kept
        try:
            packets, lost = _read_split(fd, self._frames, limit - len(kept), self._header)
        except OSError as error:
            if kept:
                return kept  # it goes first; the next call meets the error again
            if error.errno != errno.ENODATA or errno.ENODATA in self.ends:
                raise
            packets, lost = [], 1  # an empty datagram
        if lost:
            self.counts.undecodable += lost
        packets = kept + packets if kept else packets
        if not packets:
            # Only what can't be split came, and more may wait: the loop gets a turn first.
            raise _nothing()
        return packets

    def _take_kept(self) -> list[bytes]:
        """Split what was kept, which is none where it can't be split."""
        if self._kept is None:
            return []
        kept, self._kept, self.pending = self._kept, None, 0
        try:
            return native.split(native.short_header(kept, self._header), self._frames)
        except ValueError:
            self.counts.undecodable += 1
            return []

    def drop_rest(self) -> None:
        self.counts.segments_dropped += len(self._rest) + len(self._take_kept())
        self._rest = []
        self.pending = 0

    # Sending

    def write(self, fd: int, packet: Buffer) -> None:
        _write(fd, b"".join((self._no_header, packet)))

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        udp = _UDP not in self._refused_types
        left: Sequence[int]
        if self._refused_types <= _ONLY_UDP:
            left = _write_merged(fd, packets, self._frames, self._header, udp)
        else:
            left = range(len(packets))
        return self._write_left(fd, packets, left, udp) if left else left

    def _write_left(
        self, fd: int, packets: list[Buffer], left: Sequence[int], udp: bool
    ) -> Sequence[int]:
        """Write as `write_many`, but what this kernel refuses to take merged as packets."""
        places: list[int] = []  # of the packets of all super-packets, in `left`
        done = 0
        try:
            for super_packet in native.merge(
                [packets[at] for at in left], self._frames, udp, places
            ):
                written = self._write_super(fd, super_packet)
                done += written
                if written < native.packets_in(super_packet):
                    break
        except (OSError, TypeError, ValueError, BufferError):
            pass  # the first packet left over meets it again
        return [left[place] for place in sorted(places[done:])] if places else left

    def write_run(
        self, fd: int, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> Sequence[int]:
        left: Sequence[int] = range(len(lengths))
        udp = _UDP not in self._refused_types
        if self._refused_types <= _ONLY_UDP:
            left = _write_run(fd, buffer, start, stride, lengths, self._frames, self._header, udp)
        if not left:
            return left
        return self._write_left(fd, packets_in(buffer, start, stride, lengths), left, udp)

    def _write_super(self, fd: int, super_packet: bytes) -> int:
        """Write a super-packet, or its packets where the kernel refuses it; give how many."""
        gso_type = super_packet[1]
        if gso_type not in self._refused_types:
            try:
                _write(fd, native.long_header(super_packet, self._header))
            except OSError as error:
                if error.errno != errno.EINVAL or not gso_type:
                    raise
                self.counts.split_fallbacks += 1
                self._refused_types.add(gso_type)
            else:
                return native.packets_in(super_packet)
        written = 0
        with contextlib.suppress(OSError):
            for packet in native.split(super_packet, self._frames):
                self.write(fd, packet)
                written += 1
        return written


def _nothing() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def make_port(format: PacketFormat, socket_of: tuple[int, int] | None = None) -> Port:  # noqa: A002
    """Make the port of an fd.

    Args:
        format: what the user gets to see.
        socket_of: family and type of the socket that the fd is, if it is one.
    """
    if format.offload != "off":
        native.keep_freed_memory()
    ends = TUN_ENDS if socket_of is None else socket_ends(*socket_of)
    if format.offload == "split":
        return SplitPort(format, None, ends)
    if socket_of is not None:
        return SocketPort(format, None, ends)
    return RawPort(format) if format.offload == "raw" else Port(format)

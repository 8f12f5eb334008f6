"""A port for ``offload="raw"``: sends a super-packet that the kernel refuses as single packets.

Before Linux 6.2 the kernel has no super-packets of UDP, and some kernels refuse valid ones of TCP.
A program that forwards super-packets to such a device should not have to care.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from .._packets import native
from .port import TUN_ENDS, Port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from .port import Counts, PacketFormat

__all__ = ["RawPort"]

_write = os.write


class RawPort(Port):
    """Passes super-packets on; splits those that the kernel refuses."""

    __slots__ = ("_frames", "_header", "_unfinished")

    def __init__(
        self,
        format: PacketFormat,  # noqa: A002 - it is one
        counts: Counts | None = None,
        ends: frozenset[int] = TUN_ENDS,
    ) -> None:
        super().__init__(format, counts, ends)
        self._frames = format.mode == "tap"
        self._header = format.vnet_bytes
        # A super-packet that was sent in part before room ran out (EAGAIN), and the packets of it
        # that are left, in reverse order.
        self._unfinished: tuple[bytes, list[bytes]] = (b"", [])

    def write(self, fd: int, packet: Buffer) -> None:
        try:
            _write(fd, packet)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._write_split(fd, bytes(packet), error)

    def _write_split(self, fd: int, super_packet: bytes, error: OSError) -> None:
        """Write the packets of a super-packet that the kernel refused with `error`."""
        begun, left = self._unfinished
        if not left or begun != super_packet:
            left = self._packets_of(super_packet, error)
        # If room runs out, the task waits and writes the same super-packet again. Then this goes on
        # with the packets that are left.
        self._unfinished = (super_packet, left)
        no_header = bytes(self._header)
        while left:
            _write(fd, no_header + left[-1])
            left.pop()
        self._unfinished = (b"", [])

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        done = native.write_many(fd, packets)
        # It may have stopped at a super-packet that the kernel refuses.
        while done < len(packets):
            try:
                self.write(fd, packets[done])
            except (OSError, TypeError, ValueError, BufferError):
                break  # the caller writes this packet again and meets the error then
            done += 1
            done += native.write_many(fd, packets[done:])
        return range(done, len(packets))

    def _packets_of(self, super_packet: bytes, error: OSError) -> list[bytes]:
        """Split a super-packet, the last packet first; raise `error` if that is impossible."""
        if len(super_packet) <= self._header or super_packet[1] == 0:
            raise error  # not a super-packet
        try:
            packets = native.split(native.short_header(super_packet, self._header), self._frames)
        except ValueError as reason:
            raise error from reason
        self.counts.split_fallbacks += 1
        return packets[::-1]

"""The port of a stack's device: it keeps packets from the kernel that the intake takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._packets import native
from .._packets.ipheader import IPHeader
from .._packets.udp import TCP
from .._queue.port import Port
from .intake import is_checked
from .seen import Seen

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .intake import Intake

__all__ = ["IntakePort"]

# As in `_packets.ipheader`: the IPv6 extension headers that may come before the TCP header.
_EXTENSIONS = frozenset({0, 43, 44, 51, 60})


class IntakePort(Port):
    """Offers every sent packet to the intake before writing it.

    It is the last port before the device's own, so that a capture also sees the packets that the
    intake takes. Reading uses the methods of the device's own port directly, which costs nothing.
    """

    __slots__ = ("_header", "_intake", "inner", "read", "read_into", "read_many", "read_run")

    def __init__(self, inner: Port, intake: Intake) -> None:
        # Don't call the parent's __init__: it would set `pending`, which is a property here.
        self.format, self.counts, self.ends = inner.format, inner.counts, inner.ends
        self._intake = intake
        self._header = inner.format.header_bytes
        self._use(inner)

    def _use(self, inner: Port) -> None:
        self.inner = inner
        self.read = inner.read
        self.read_into = inner.read_into  # type: ignore[method-assign]  # a slot
        self.read_many = inner.read_many  # type: ignore[method-assign]  # a slot
        self.read_run = inner.read_run  # type: ignore[method-assign]  # a slot

    def for_runs(self) -> Port:
        self._use(self.inner.for_runs())
        return self

    def __reduce__(self) -> tuple[Callable[..., Port], tuple[object, ...]]:
        return self.inner.__reduce__()  # the stack stays in this process

    @property
    def pending(self) -> int:  # type: ignore[override]  # asked, not set
        return self.inner.pending

    def write(self, fd: int, packet: Buffer) -> None:
        if not (self._intake.active and self._find([packet], 0) == 0 and self._take(packet)):
            self.inner.write(fd, packet)

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        if not self._intake.active:
            return self.inner.write_many(fd, packets)
        done = 0  # how many were written or taken
        at = -1
        while (at := self._find(packets, at + 1)) < len(packets):
            # First write the packets before this one. If one of them can't be written, the packets
            # after it must not count as sent.
            if done < at and (left := self.inner.write_many(fd, packets[done:at])):
                return [*(done + place for place in left), *range(at, len(packets))]
            done = at + self._take(packets[at])
        if done < len(packets):
            return [done + place for place in self.inner.write_many(fd, packets[done:])]
        return ()

    def write_run(
        self, fd: int, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> Sequence[int]:
        if not self._intake.active:
            return self.inner.write_run(fd, buffer, start, stride, lengths)
        return super().write_run(fd, buffer, start, stride, lengths)

    def drop_rest(self) -> None:
        self.inner.drop_rest()

    def _find(self, packets: list[Buffer], start: int) -> int:
        return native.find_other(packets, start, self._header, self._intake.tcp is not None)

    def _take(self, packet: Buffer) -> bool:
        try:
            octets = packet if type(packet) is bytes else bytes(memoryview(packet))
        except (TypeError, BufferError):
            return False  # writing the packet raises the error
        tcp = self._intake.tcp
        if tcp is not None and (seen := _tcp(octets, self._header)) is not None:
            return tcp.take(seen)
        if self._header:
            return self._intake.take_super(octets, self._header)
        return self._intake.take(octets)


def _tcp(sent: bytes, at: int) -> Seen | None:
    """Parse a packet with TCP; None if it is anything else."""
    if len(sent) < at + 20:
        return None
    version = sent[at] >> 4
    protocol = sent[at + 9] if version == 4 else sent[at + 6]
    if protocol != TCP and (version == 4 or protocol not in _EXTENSIONS):
        return None
    packet = sent[at:]
    try:
        header = IPHeader(packet)
    except ValueError:
        return None
    if header.proto != TCP:
        return None
    return Seen(sent, packet, header, at > 0 and is_checked(sent))

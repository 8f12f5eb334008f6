"""The port of a stack's device: what is intercepted does not go to the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._packets.udp import TCP
from .._queue.port import Port

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .intake import Intake

__all__ = ["IntakePort"]


class IntakePort(Port):
    """Shows every packet that is sent to the intake, before it is written.

    It stands right in front of the device's own port, so that a capture sees all packets. Reading
    takes no detour.
    """

    __slots__ = ("_header", "_intake", "inner", "read", "read_into", "read_many")

    def __init__(self, inner: Port, intake: Intake) -> None:
        # Not by the parent's __init__, which would set `pending`.
        self.format, self.counts, self.ends = inner.format, inner.counts, inner.ends
        self.inner = inner
        self._intake = intake
        self._header = inner.format.header_bytes
        self.read = inner.read
        self.read_into = inner.read_into  # type: ignore[method-assign]  # a slot
        self.read_many = inner.read_many  # type: ignore[method-assign]  # a slot

    def __reduce__(self) -> tuple[Callable[..., Port], tuple[object, ...]]:
        return self.inner.__reduce__()  # another process has no part in the stack

    @property
    def pending(self) -> int:  # type: ignore[override]  # asked, not set
        return self.inner.pending

    def write(self, fd: int, packet: Buffer) -> None:
        if not (self._intake.active and self._concerns(packet) and self._take(packet)):
            self.inner.write(fd, packet)

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        if not self._intake.active:
            return self.inner.write_many(fd, packets)
        done = 0  # how many were written or taken
        for at, packet in enumerate(packets):
            if not self._concerns(packet):
                continue
            # All before it first: where one of them can't be written, none after it counts as sent.
            if done < at and (left := self.inner.write_many(fd, packets[done:at])):
                return [*(done + place for place in left), *range(at, len(packets))]
            done = at + self._take(packet)
        if done < len(packets):
            return [done + place for place in self.inner.write_many(fd, packets[done:])]
        return ()

    def drop_rest(self) -> None:
        self.inner.drop_rest()

    def _concerns(self, packet: Buffer) -> bool:
        """Whether a packet is any but TCP; quickly, as most packets are TCP."""
        if type(packet) is not bytes:
            return True
        at = self._header
        try:
            return packet[at + (9 if packet[at] >> 4 == 4 else 6)] != TCP
        except IndexError:
            return False  # the kernel knows what is wrong with it

    def _take(self, packet: Buffer) -> bool:
        try:
            octets = packet if type(packet) is bytes else bytes(memoryview(packet))
        except (TypeError, BufferError):
            return False  # writing it raises the error
        if self._header:
            return self._intake.take_super(octets, self._header)
        return self._intake.take(octets)

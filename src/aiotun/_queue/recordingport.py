"""Capturing: a port in front of a queue's own, which records what passes.

A queue that is not captured has no such port, so capturing costs nothing while it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from .._kernel.abi import READ_SIZE
from ..capture import Capture, PcapWriter
from .port import Port, Taken, copy_into, packets_in

if TYPE_CHECKING:
    from typing import Protocol

    from typing_extensions import Buffer

    from .._packets.runs import Layout
    from ..capture import Direction

    class Captured(Protocol):
        """What is needed of a queue."""

        port: Port

        def use(self, port: Port) -> None: ...


__all__ = ["RecordingPort", "record"]


def record(queues: Sequence[Captured], writer: PcapWriter) -> Capture:
    """Record every packet of these queues from now on, until the capture is stopped."""
    recorder = [writer]  # an object of its own: the same writer may be given twice

    def stop() -> None:
        for queue in queues:
            port = queue.port
            if isinstance(port, RecordingPort):
                port.recorders = [each for each in port.recorders if each is not recorder]
                if not port.recorders:
                    queue.use(port.inner)

    for queue in queues:
        if not isinstance(queue.port, RecordingPort):
            queue.use(RecordingPort(queue.port))
        port = queue.port
        assert isinstance(port, RecordingPort)
        port.recorders.append(recorder)
    return Capture(stop)


class RecordingPort(Port):
    """Records a packet when it is handed out, or when the kernel has taken it."""

    __slots__ = ("_header_bytes", "inner", "recorders")

    def __init__(self, inner: Port) -> None:
        # Not by the parent's __init__, which would set `pending`.
        self.format, self.counts, self.ends = inner.format, inner.counts, inner.ends
        self.inner = inner
        self.recorders: list[list[PcapWriter]] = []
        self._header_bytes = inner.format.header_bytes

    def __reduce__(self) -> tuple[Callable[..., Port], tuple[object, ...]]:
        return self.inner.__reduce__()  # the capture stays here

    @property
    def pending(self) -> int:  # type: ignore[override]  # asked, not set
        return self.inner.pending

    def read(self, fd: int, size: int) -> bytes:
        packet = self.inner.read(fd, size)
        self._record((packet,), "in")
        return packet

    def read_into(self, fd: int, octets: memoryview) -> int:
        # In one piece first, so that what a short buffer cuts off is recorded, too.
        return copy_into(octets, self.read(fd, READ_SIZE))

    def read_many(self, fd: int, limit: int) -> list[bytes]:
        batch = self.inner.read_many(fd, limit)
        self._record(batch, "in")
        return batch

    def for_runs(self) -> Port:
        self.inner = self.inner.for_runs()
        return self

    def read_run(self, fd: int, buffer: memoryview, layout: Layout) -> Taken:
        taken = self.inner.read_run(fd, buffer, layout)
        count, size, last, stride, _ = taken
        lengths = [size] * (count - 1) + [last]
        self._record(packets_in(buffer, layout.before, stride, lengths), "in")
        return taken

    def write_run(
        self, fd: int, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> Sequence[int]:
        left = self.inner.write_run(fd, buffer, start, stride, lengths)
        kept = frozenset(left)
        packets = packets_in(buffer, start, stride, lengths)
        self._record((each for place, each in enumerate(packets) if place not in kept), "out")
        return left

    def write(self, fd: int, packet: Buffer) -> None:
        self.inner.write(fd, packet)
        self._record((packet,), "out")

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        left = self.inner.write_many(fd, packets)
        kept = set(left)
        self._record((each for at, each in enumerate(packets) if at not in kept), "out")
        return left

    def drop_rest(self) -> None:
        self.inner.drop_rest()

    def _record(self, packets: Iterable[Buffer], direction: Direction) -> None:
        header = self._header_bytes
        for packet in packets:
            bare = memoryview(packet).cast("B")[header:] if header else packet
            for recorder in self.recorders:
                for writer in recorder:
                    writer.record(bare, direction)

"""Queues that record: what a device's queues become while they are captured.

A plain queue knows nothing of this, so that capturing costs nothing while it is off: it takes
another class and gives it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from . import _native
from ._abi import VNET_HDR_SIZE
from ._packetio import PacketIO
from ._split import SplitQueue
from .capture import Capture, PcapWriter
from .queue import Queue

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .capture import Direction

__all__ = ["RecordingQueue", "RecordingSplitQueue", "record"]


def record(queues: Sequence[Queue], writer: PcapWriter) -> Capture:
    """Record every packet of these queues from now on, until the capture is stopped."""
    writers = [writer]  # a list of our own: the same writer may be given twice

    def stop() -> None:
        for queue in queues:
            queue._recorders = tuple(each for each in queue._recorders if each is not writers)
            if not queue._recorders:
                queue.__class__ = _plain(type(queue))

    for queue in queues:
        queue._recorders = (*queue._recorders, writers)
        queue.__class__ = _recording(type(queue))
    return Capture(stop)


class RecordingQueue(Queue):
    """A queue each of whose packets is written down, as the user sees it.

    A packet is recorded where it is handed out or was taken by the kernel, with no await between.
    """

    # As a plain queue has them, so that one can become the other.
    __slots__ = ()

    # What stands before a packet in what is written to the kernel, and is not the user's.
    _prefix: ClassVar[bytes] = b""

    # Receiving: all of it through _take and _take_many

    recv = PacketIO.recv
    __anext__ = PacketIO.__anext__

    def _take(self) -> bytes:
        packet = super()._take()
        self._record(packet, "in")
        return packet

    def _take_many(self, limit: int) -> list[bytes]:
        batch = super()._take_many(limit)
        for packet in batch:
            self._record(packet, "in")
        return batch

    def _take_into(self, view: memoryview) -> int:
        # In one piece first, so that what a short buffer cuts off is recorded all the same.
        with view.cast("B") as target:
            packet = self._take()
            length = len(packet)
            kept = min(length, target.nbytes)
            target[:kept] = packet[:kept]
        return self._check_fits(length, view)

    # Sending: a task that waits ends up in _put

    async def send(self, packet: Buffer) -> None:
        self._bind()
        try:
            self.send_nowait(packet)
        except BlockingIOError:
            await self._send_waiting(b"".join((self._prefix, packet)) if self._prefix else packet)

    async def send_many(self, packets: Iterable[Buffer]) -> int:
        sent = 0
        try:
            self._bind()
            for packet in packets:
                await self.send(packet)
                sent += 1
        except BaseException as error:
            error.sent = sent  # type: ignore[attr-defined]  # promised on foreign classes, too
            raise
        return sent

    def send_nowait(self, packet: Buffer) -> None:
        super().send_nowait(packet)
        self._record(packet, "out")

    def _put(self, fd: int, packet: Buffer) -> None:
        super()._put(fd, packet)
        self._record(packet, "out")

    def _record(self, packet: Buffer, direction: Direction) -> None:
        header = self._header_bytes
        if header:
            packet = memoryview(packet).cast("B")[header:]
        for writers in self._recorders:
            for writer in writers:
                writer.record(packet, direction)


class RecordingSplitQueue(RecordingQueue, SplitQueue):
    """The same of a queue with ``offload="split"``. While it records, nothing is merged."""

    __slots__ = ()

    _prefix: ClassVar[bytes] = bytes(VNET_HDR_SIZE)

    def _put(self, fd: int, packet: Buffer) -> None:
        SplitQueue._put(self, fd, packet)
        # A super-packet where a task has been waiting to send it since before.
        for each in _native.split(packet, self._frames):
            self._record(each, "out")


# By the plain class. Whoever makes queues of another kind gets a recording kind of them as well.
_KINDS: dict[type[Queue], type[Queue]] = {Queue: RecordingQueue, SplitQueue: RecordingSplitQueue}


def _recording(kind: type[Queue]) -> type[Queue]:
    if issubclass(kind, RecordingQueue):
        return kind
    if kind not in _KINDS:
        made = type(f"Recording{kind.__name__}", (RecordingQueue, kind), {"__slots__": ()})
        _KINDS[kind] = cast("type[Queue]", made)
    return _KINDS[kind]


def _plain(kind: type[Queue]) -> type[Queue]:
    return next((plain for plain, recording in _KINDS.items() if recording is kind), kind)

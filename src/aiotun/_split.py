"""A queue with ``offload="split"``: super-packets towards the kernel, ordinary packets to the user.

The rest of a super-packet that is being handed out is all that is kept here. It comes before
anything is read; and since the loop knows nothing of it, whoever waits for it is called by
`nudge`.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from . import _native
from ._abi import VNET_HDR_SIZE
from ._packetio import PacketIO, PacketStats, take_one
from .errors import DeviceClosedError, PacketError
from .queue import Queue

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SplitQueue"]

T = TypeVar("T")

_read_split = _native.read_split
_write_merged = _native.write_merged
_NO_HEADER = bytes(VNET_HDR_SIZE)

# How many packets `send_many` takes from an iterable before it merges what it has: those of a few
# dozen super-packets, so that few are cut short by it.
_CHUNK = 1024


class SplitQueue(Queue):
    """See the module; a user sees a `Queue`."""

    __slots__ = ("_fallbacks", "_frames", "_nudged", "_refused_kinds", "_rest", "_rest_dropped")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._frames = self._mode == "tap"
        self._rest: list[bytes] = []
        self._nudged = False
        # Kinds of super-packets (their gso_type) that this kernel was seen to refuse.
        self._refused_kinds: set[int] = set()
        self._fallbacks = self._rest_dropped = 0

    # Receiving

    async def recv(self) -> bytes:
        if self._free and self._rest:
            self._free -= 1
            return self._rest.pop(0)
        return await self._receive(take_one)

    async def __anext__(self) -> bytes:
        try:
            return await self.recv()
        except DeviceClosedError:
            raise StopAsyncIteration from None

    async def _receive(self, take: Callable[[PacketIO], T]) -> T:
        if self._rest and self._budget + self._free <= 0:
            self.nudge()
        return await super()._receive(take)

    def _take(self) -> bytes:
        while not self._rest:
            self._rest = self._read(1)
        self._spend(1)
        return self._rest.pop(0)

    def _read(self, limit: int) -> list[bytes]:
        """The packets of the next super-packets: so many, or more; fewer where no more wait."""
        packets, lost = _read_split(self._fd, self._frames, limit)
        # Nothing that a kernel of today gives can't be cut up.
        self._undecodable += lost
        return packets

    def _take_into(self, view: memoryview) -> int:
        packet = self._take()
        length = len(packet)
        with view.cast("B") as octets:
            octets[: min(length, view.nbytes)] = packet[: view.nbytes]
        return self._check_fits(length, view)

    def _take_many(self, limit: int) -> list[bytes]:
        batch = self._rest
        if len(batch) < limit:
            try:
                batch += self._read(limit - len(batch))
                while not batch:  # none could be cut up
                    batch += self._read(limit)
                self._drained = len(batch) < limit
            except OSError as error:
                if not batch:
                    raise
                # What we have goes first; the next call meets any other error again.
                self._drained = isinstance(error, BlockingIOError)
        self._rest = batch[limit:]
        del batch[limit:]
        self._spend(len(batch))
        return batch

    # Waking for what the loop can't see

    def nudge(self) -> None:
        if self._rest and not self._nudged:
            self._nudged = True
            self._bind().call_soon(_answer_nudge, weakref.ref(self))

    def _readable(self) -> None:
        if self._nudged:  # one budget in a turn of the loop is enough
            return
        if self._rest:
            self._burst = True
        super()._readable()
        if self._rest and self._somebody_waits() and self._fd >= 0 and self._lost is None:
            self.nudge()

    def _look(self) -> int:
        return 1 if self._rest else super()._look()

    # Sending

    def send(self, packet: Buffer) -> Coroutine[Any, Any, None]:
        return super().send(b"".join((_NO_HEADER, packet)))

    def send_nowait(self, packet: Buffer) -> None:
        super().send_nowait(b"".join((_NO_HEADER, packet)))

    async def send_many(self, packets: Iterable[Buffer]) -> int:
        sent = 0
        try:
            self._bind()
            for chunk in _chunks(packets):
                done = self._send_at_once(chunk)
                sent += done
                if done == len(chunk):
                    continue
                for super_packet in self._merged(chunk[done:]):
                    try:
                        await super().send(super_packet)
                        sent += _native.packets_in(super_packet)
                        continue
                    except PacketError as error:
                        if error.errno != errno.EINVAL or not super_packet[1]:
                            raise
                    self._fall_back(super_packet)
                    for packet in _native.split(super_packet, self._frames):
                        await self.send(packet)
                        sent += 1
        except BaseException as error:
            error.sent = sent  # type: ignore[attr-defined]  # promised on foreign classes, too
            raise
        return sent

    def _send_at_once(self, packets: list[Buffer]) -> int:
        """Send what goes without further ado: how many. Whatever else happens to those left."""
        if self._fd < 0 or self._senders or self._refused_kinds or self._recorders:
            return 0
        try:
            return _write_merged(self._fd, packets, self._frames)
        except (TypeError, BufferError):
            return 0

    def _merged(self, packets: list[Buffer]) -> Iterator[bytes]:
        merged: Iterable[bytes]
        try:
            merged = _native.merge(packets, self._frames)
        except (TypeError, BufferError):
            # One of them is no packet. It raises again below, once those before it are sent.
            merged = (b"".join((_NO_HEADER, packet)) for packet in packets)
        for super_packet in merged:
            if super_packet[1] in self._refused_kinds:
                for packet in _native.split(super_packet, self._frames):
                    yield _NO_HEADER + packet
            else:
                yield super_packet

    def _fall_back(self, super_packet: bytes) -> None:
        """Note that this kernel refuses a kind of super-packet that is none the worse for it."""
        self._refused -= 1
        self._fallbacks += 1
        self._refused_kinds.add(super_packet[1])

    # The end, and what was counted

    def _release(self, end: str) -> int:
        self._rest_dropped += len(self._rest)
        self._rest = []
        return super()._release(end)

    @property
    def stats(self) -> PacketStats:
        return dataclasses.replace(
            super().stats, split_fallbacks=self._fallbacks, segments_dropped=self._rest_dropped
        )


def _answer_nudge(queue_ref: weakref.ref[SplitQueue]) -> None:
    queue = queue_ref()
    if queue is not None:
        queue._nudged = False
        queue._readable()


def _chunks(packets: Iterable[Buffer]) -> Iterator[list[Buffer]]:
    """Give so many packets at a time. What an iterable gives before it raises comes before that."""
    if type(packets) is list and 0 < len(packets) <= _CHUNK:
        yield packets  # as nearly always: no need to copy it
        return
    source = iter(packets)
    while True:
        chunk: list[Buffer] = []
        failure: Exception | None = None
        try:
            chunk.extend(itertools.islice(source, _CHUNK))
        except Exception as error:  # noqa: BLE001 - raised again below
            failure = error
        if chunk:
            yield chunk
        if failure is not None:
            raise failure
        if len(chunk) < _CHUNK:
            return

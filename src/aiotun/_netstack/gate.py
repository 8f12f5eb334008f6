"""A port in front of the TUN's own: the stack sees what the program sends, before the kernel does.

It is there only while something asks for it (admission, listeners on demand), so that a stack
without these passes packets at no cost. A *guard* is asked about every packet of its protocol that
could open something: of TCP, segments with SYN or RST and fragments; of UDP, everything. What it
takes it may let in later (`let_in`), or answer in the place of its destination (`answer`).

An answer is a packet for whoever reads the device: it is kept here until it is read, and the queue
is told as it is of the rest of a super-packet (`Port.pending`).

Next to a capture the gate is the inner port: what the program sends and receives is recorded, and
what the gate lets in is not recorded again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .._packets.ipheader import IPHeader
from .._queue.port import Port, copy_into
from .._queue.recordingport import RecordingPort

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..queue import Queue
    from .counts import Counts

__all__ = ["Gate", "Guard", "Seen", "guard", "unguard"]


class Seen(NamedTuple):
    """A packet that a guard is asked about.

    Attributes:
        sent: as the program sent it. Its virtio-net header may say that the checksum is not
            complete, so this and nothing else is let in later.
        packet: the same without that header.
        header: its IP header.
    """

    sent: bytes
    packet: bytes
    header: IPHeader


Guard = Callable[[Seen], bool]
"""Looks at a packet; True if it keeps it."""

# How many answers wait to be read. Who reads nothing gets none.
_ANSWERS_MAX = 256

_TCP, _UDP = 6, 17
_SYN_OR_RST = 0x06
# As in `_packets.ipheader`, where a header follows that may be TCP's.
_EXTENSIONS = frozenset({0, 43, 44, 51, 60})


class Gate(Port):
    """See above."""

    __slots__ = ("_answers", "_guards", "_header", "_no_header", "_queue", "_totals", "inner")

    def __init__(self, inner: Port, queue: Queue, totals: Counts) -> None:
        # Not by the parent's __init__, which would set `pending`.
        self.format, self.counts, self.ends = inner.format, inner.counts, inner.ends
        self.inner = inner
        self._queue = queue
        self._totals = totals
        self._guards: dict[int, Guard] = {}
        self._answers: deque[bytes] = deque()
        self._header = inner.format.header_bytes
        self._no_header = bytes(self._header)

    def __reduce__(self) -> tuple[Callable[..., Port], tuple[object, ...]]:
        return self.inner.__reduce__()  # another process has no stack

    # What guards do

    def let_in(self, seen: Seen) -> None:
        """Give the kernel a packet that a guard kept."""
        if self._queue.closed:
            return
        try:
            self.inner.write(self._queue.fileno(), seen.sent)
        except OSError:  # the link is down, say; the sender repeats it
            self._totals.packets_refused += 1

    def answer(self, packet: bytes) -> None:
        """Hand a packet to whoever reads the device."""
        if self._queue.closed:
            return
        if len(self._answers) >= _ANSWERS_MAX:
            self._answers.popleft()
            self._totals.packets_refused += 1
        self._answers.append(self._no_header + packet)
        self._queue.watch()

    def set_guard(self, protocol: int, function: Guard | None) -> None:
        """Have this guard asked about a protocol from now on; None: nobody."""
        if function is not None:
            self._guards[protocol] = function
            return
        self._guards.pop(protocol, None)
        if not self._guards and not self._answers:
            _remove(self._queue, self)

    # Receiving

    @property
    def pending(self) -> int:  # type: ignore[override]  # asked, not set
        return len(self._answers) + self.inner.pending

    def read(self, fd: int, size: int) -> bytes:
        return self._next_answer() if self._answers else self.inner.read(fd, size)

    def read_into(self, fd: int, octets: memoryview) -> int:
        if self._answers:
            return copy_into(octets, self._next_answer())
        return self.inner.read_into(fd, octets)

    def read_many(self, fd: int, limit: int) -> list[bytes]:
        if not self._answers:
            return self.inner.read_many(fd, limit)
        batch: list[bytes] = []
        while self._answers and len(batch) < limit:
            batch.append(self._next_answer())
        if len(batch) < limit:
            with contextlib.suppress(OSError):  # the next call meets it
                batch += self.inner.read_many(fd, limit - len(batch))
        return batch

    def _next_answer(self) -> bytes:
        answer = self._answers.popleft()
        if not self._guards and not self._answers:
            _remove(self._queue, self)
        return answer

    def drop_rest(self) -> None:
        self._totals.packets_refused += len(self._answers)
        self._answers.clear()
        self.inner.drop_rest()

    # Sending

    def write(self, fd: int, packet: Buffer) -> None:
        if not self._keeps(packet):
            self.inner.write(fd, packet)

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        done = 0
        while done < len(packets):
            # Those before the next one that a guard is asked about go in one call: they may be
            # merged. The guard is asked only once they are written.
            found = find_opening(packets, done, self._header, _UDP in self._guards)
            if done < found and (left := self.inner.write_many(fd, packets[done:found])):
                return [*(done + place for place in left), *range(found, len(packets))]
            done = found
            if found < len(packets):
                try:
                    self.write(fd, packets[found])
                except (OSError, TypeError, ValueError, BufferError):
                    break  # it meets the error when it is written by itself
                done += 1
        return range(done, len(packets))

    def _keeps(self, packet: Buffer) -> bool:
        if find_opening([packet], 0, self._header, _UDP in self._guards):
            return False
        sent = bytes(memoryview(packet).cast("B"))
        bare = sent[self._header :]
        try:
            header = IPHeader(bare)
        except ValueError:
            return False  # the kernel drops and counts it
        asked = self._guards.get(header.proto)
        return asked is not None and asked(Seen(sent, bare, header))


def guard(queue: Queue, protocol: int, function: Guard, totals: Counts) -> Gate:
    """Have a guard asked about the packets of a protocol that are sent through a queue."""
    outer = queue.port
    inner = outer.inner if isinstance(outer, RecordingPort) else outer
    gate = inner if isinstance(inner, Gate) else Gate(inner, queue, totals)
    if gate is not inner:
        if isinstance(outer, RecordingPort):
            outer.inner = gate
        else:
            queue.use(gate)
    gate.set_guard(protocol, function)
    return gate


def unguard(queue: Queue, protocol: int) -> None:
    """Ask nobody any more about a protocol; the last one takes the gate away."""
    port = queue.port
    if isinstance(port, RecordingPort):
        port = port.inner
    if isinstance(port, Gate):
        port.set_guard(protocol, None)


def _remove(queue: Queue, gate: Gate) -> None:
    port = queue.port
    if port is gate:
        queue.use(gate.inner)
    elif isinstance(port, RecordingPort) and port.inner is gate:
        port.inner = gate.inner


def find_opening(packets: list[Buffer], start: int, header: int, udp: bool) -> int:
    """Find the next packet that a guard is asked about.

    Args:
        packets: bytes-like objects.
        start: where to begin.
        header: the size of the virtio-net header in front of each.
        udp: whether all of UDP is looked for.

    Returns:
        The index; the number of packets where there is none.
    """
    for index in range(start, len(packets)):
        packet = packets[index]
        if type(packet) is not bytes:
            packet = memoryview(packet).cast("B")
        try:
            if _may_open(packet, header, udp):
                return index
        except IndexError:
            pass  # too short for what it says it is: the kernel drops it
    return len(packets)


def _may_open(packet: bytes | memoryview, at: int, udp: bool) -> bool:
    first = packet[at]
    if first == 0x45:
        protocol = packet[at + 9]
        if protocol == _TCP:
            # The flags of a whole segment; else any fragment.
            if not packet[at + 6] & 0x3F and not packet[at + 7]:
                return packet[at + 33] & _SYN_OR_RST != 0
            return True
        return udp and protocol == _UDP
    if first >> 4 == 6:
        protocol = packet[at + 6]
        if protocol == _TCP:
            return packet[at + 53] & _SYN_OR_RST != 0
        return protocol in _EXTENSIONS or (udp and protocol == _UDP)
    return first >> 4 == 4  # with options

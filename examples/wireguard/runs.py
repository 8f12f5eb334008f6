"""The fast path of data messages: a run of packets is sealed or opened in its buffer.

What is the same in all packets of a run is checked or written for all of them at once, in strided
views of 32-bit words. What is left for each packet is the call that seals or opens it.

`Interface.send` and `Interface.receive` do the same with lists, and everything else: they are the
reference. Here `None` means that the run is theirs: something in it is out of sequence, forged, of
several senders or of an old session, or a handshake has to begin first. Nothing has changed then.
"""

import struct
import sys
from array import array
from collections import deque
from itertools import repeat
from typing import NamedTuple

from cryptography.exceptions import InvalidTag

from aiotun.runs import Run

from .cookies import Endpoint
from .interface import Interface
from .messages import DATA, OVERHEAD_BYTES
from .session import Session

__all__ = ["Opener", "Packets", "Sealer"]

_HEAD, _TAG = 16, 16  # bytes, before and after each packet
_MOST = 256  # packets of a run
_LAYOUTS = 16  # to keep; each is for one size of packets
_LITTLE = sys.byteorder == "little"  # the words of a message are, whatever the machine's are

_ZEROS = memoryview(bytes(4 * _MOST)).cast("I")
_TYPES = memoryview(DATA * _MOST).cast("I")
_NO_DATA = repeat(None)  # for encrypt_into: no associated data
_HEADER = struct.Struct("<4s4sQ")
_COUNTER = struct.Struct("<Q")

_call_all = deque[object](maxlen=0).extend
"""Make all calls of a `map`, in C."""


class Packets(NamedTuple):
    """Packets for the device: a run, and the length of each packet in it without its padding."""

    run: Run
    sizes: list[int]


class _Layout:
    """Views of a buffer for packets of one size: making them costs as much as sealing does.

    Args:
        buffer: begins with a message's header.
        stride: the length of a message.
        target: where the other form of the packets goes.
        sealing: whether `buffer` has the packets, or the messages.
    """

    def __init__(
        self, buffer: memoryview, stride: int, target: memoryview, *, sealing: bool
    ) -> None:
        self.buffer = buffer
        count = self.most = min(_MOST, buffer.nbytes // stride)
        starts = range(0, count * stride, stride)
        packet = slice(_HEAD, stride - _TAG), slice(_HEAD, stride)
        source, result = packet if sealing else packet[::-1]
        # Four zeros and the counter, if the receiver's index is zero for the moment.
        self.nonces = [buffer[start + 4 : start + _HEAD] for start in starts]
        self.sources = [buffer[start:][source] for start in starts]
        self.results = [target[start:][result] for start in starts]
        words = Run(buffer, 0, stride, stride, stride, count).words
        self.types, self.indices, self.low, self.high = map(words, (0, 4, 8, 12))

    def write_counters(self, first: int, count: int) -> None:
        low, high = first & 0xFFFFFFFF, first >> 32
        self.low[:count] = memoryview(array("I", range(low, low + count)))
        self.high[:count] = memoryview(array("I", [high]) * count) if high else _ZEROS[:count]

    def has_counters(self, first: int, count: int) -> bool:
        low, high = first & 0xFFFFFFFF, first >> 32
        return (
            self.low[:count].tolist() == list(range(low, low + count))
            and self.high[:count].tobytes() == high.to_bytes(4, "little") * count
        )


class _Layouts(dict[tuple[int, int], _Layout]):
    """The layouts that were used last."""

    def of(self, buffer: memoryview, stride: int, target: memoryview, *, sealing: bool) -> _Layout:
        layout = self.get((id(buffer), stride))
        if layout is None or layout.buffer is not buffer:
            if len(self) >= _LAYOUTS:
                self.clear()
            layout = _Layout(buffer, stride, target, sealing=sealing)
            self[id(buffer), stride] = layout
        return layout


class Sealer:
    """Seals the packets of a device, in the buffers that they come in."""

    def __init__(self, interface: Interface) -> None:
        self._interface = interface
        self._layouts = _Layouts()

    def seal(self, run: Run, now: float) -> tuple[Run, Endpoint] | None:
        """Make a run of packets one of messages, and say where to send it.

        Args:
            run: of packets with one destination, with 16 bytes of room before and after each, and
                padded with zeros between (section 5.4.6).
        """
        buffer, count, stride = run.buffer, run.count, run.stride
        if run.start != _HEAD or stride % 4 or run.last < 20 or not _LITTLE:
            return None
        version = buffer[_HEAD] >> 4
        destination = buffer[32:36] if version == 4 else buffer[40:56]
        peer = self._interface.owner(destination.tobytes())
        if peer is None or (session := peer.ready(now)) is None:
            return None
        first = session.sent
        if (first & 0xFFFFFFFF) + count > 0xFFFFFFFF or peer.endpoint is None:
            return None
        # The last packet may be shorter, and is padded by itself.
        padded = min(run.last + -run.last % 16, stride - _HEAD - _TAG)
        if count > 1:
            layout = self._layouts.of(buffer, stride, buffer, sealing=True)
            if count > layout.most:
                return None
            whole = count - 1
            layout.write_counters(first, count)
            layout.types[:count] = _TYPES[:count]
            layout.indices[:count] = _ZEROS[:count]
            calls = map(
                session.encrypt_into,
                layout.nonces[:whole],
                layout.sources,
                _NO_DATA,
                layout.results,
            )
            _call_all(calls)
        at = (count - 1) * stride
        packet, end = at + _HEAD, at + _HEAD + padded + _TAG
        if count == 1:
            _HEADER.pack_into(buffer, 0, DATA, b"", first)
        session.encrypt_into(
            buffer[at + 4 : packet], buffer[packet : end - _TAG], None, buffer[packet:end]
        )
        if count == 1:
            buffer[4:8] = session.remote
        else:
            layout.indices[:count] = session.remote_words[:count]
        session.sent = first + count
        peer.sent_run(session, end, now)
        return Run(buffer, 0, stride, stride, end - at, count), peer.endpoint


class Opener:
    """Opens messages from a socket into a buffer of its own, which the next run overwrites."""

    def __init__(self, interface: Interface, size: int = 1 << 17) -> None:
        self._interface = interface
        self._layouts = _Layouts()
        self._plain = memoryview(bytearray(size))

    def open(self, run: Run, source: Endpoint, now: float) -> Packets | None:
        """Open a run of messages; no packets (None) where `Interface.receive` has to do it.

        Args:
            run: of messages without room between them.
        """
        buffer, count, size = run.buffer, run.count, run.stride if run.count > 1 else run.last
        if run.start or size % 4 or run.last <= OVERHEAD_BYTES or not _LITTLE:
            return None
        if (count - 1) * size + run.last > self._plain.nbytes:
            return None
        index = buffer[4:8].tobytes()
        session = self._interface.indices.get(index)
        if not isinstance(session, Session):
            return None
        peer, window = session.peer, session.window
        first = window.next
        if session is not peer.current or now >= session.reject_at:
            return None
        if (first & 0xFFFFFFFF) + count > 0xFFFFFFFF:
            return None
        opened = self._open_one if count == 1 else self._open_many
        if not opened(session, run, size, first):
            return None
        sizes = self._sizes(session, count, size, run.last)
        if sizes is None:
            # Genuine, but not to be believed as they are: the list path looks at each.
            return None
        window.take(count)
        peer.received_run(session, (count - 1) * size + run.last, source, now)
        plain = size - OVERHEAD_BYTES
        return Packets(
            Run(self._plain, _HEAD, size, plain, run.last - OVERHEAD_BYTES, count), sizes
        )

    def _open_one(self, session: Session, run: Run, size: int, first: int) -> bool:
        head = run.buffer[:_HEAD].tobytes()
        if head[:4] != DATA or head[8:] != _COUNTER.pack(first):
            return False
        try:
            session.decrypt_into(
                bytes(4) + head[8:],
                run.buffer[_HEAD:size],
                None,
                self._plain[_HEAD : size - _TAG],
            )
        except InvalidTag:
            return False
        return True

    def _open_many(self, session: Session, run: Run, size: int, first: int) -> bool:
        buffer, count, last = run.buffer, run.count, run.last
        layout = self._layouts.of(buffer, size, self._plain, sealing=False)
        index = session.local
        if (
            count > layout.most
            or not layout.has_counters(first, count)
            or layout.types[:count].tobytes() != DATA * count
            or layout.indices[:count].tobytes() != index * count
        ):
            return False
        whole = count - 1
        at = whole * size
        layout.indices[:count] = _ZEROS[:count]
        try:
            calls = map(
                session.decrypt_into,
                layout.nonces[:whole],
                layout.sources,
                _NO_DATA,
                layout.results,
            )
            _call_all(calls)
            session.decrypt_into(
                layout.nonces[whole],
                buffer[at + _HEAD : at + last],
                None,
                self._plain[at + _HEAD : at + last - _TAG],
            )
        except InvalidTag:
            return False
        finally:
            layout.indices[:count] = memoryview(index * count).cast("I")
        return True

    def _sizes(self, session: Session, count: int, size: int, last: int) -> list[int] | None:
        """The lengths that the IP headers name, if all packets are the peer's and alike."""
        plain, whole = self._plain, count - 1
        run = Run(plain, _HEAD, size, size - OVERHEAD_BYTES, last - OVERHEAD_BYTES, count)
        at = _HEAD + whole * size
        version = plain[_HEAD] >> 4
        if version == 4:
            firsts, sources = run.words(0)[:whole].tobytes(), (12,)
            each, final = _number(plain, _HEAD + 2), _number(plain, at + 2)
        elif version == 6:
            firsts, sources = run.words(4)[:whole].tobytes(), (8, 12, 16, 20)
            each, final = _number(plain, _HEAD + 4) + 40, _number(plain, at + 4) + 40
        else:
            return None
        least = 20 if version == 4 else 40
        if (
            firsts != firsts[:4] * whole
            or set(plain[_HEAD : at + 1 : size].tobytes()) != {plain[_HEAD]}
            or not least <= final <= last - OVERHEAD_BYTES
            or (whole and not least <= each <= size - OVERHEAD_BYTES)
        ):
            return None
        address = b""
        for offset in sources:
            words = run.words(offset).tobytes()
            if words != words[:4] * count:
                return None
            address += words[:4]
        if self._interface.owner(address) is not session.peer:
            return None
        return [each] * whole + [final]


def _number(buffer: memoryview, at: int) -> int:
    return buffer[at] << 8 | buffer[at + 1]

"""The fast path of data messages: a run of packets is sealed or opened in its buffer.

What is the same in all packets of a run is checked or written for all of them at once, in strided
views of 32-bit words. What is left for each packet is the call that seals or opens it.

`Interface.send` and `Interface.receive` do the same with lists, and everything else: they are the
reference. Here `None` means that the run is theirs: something in it is out of sequence, forged, of
several senders or of an old session, or a handshake has to begin first. Nothing has changed then.
"""

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
from .peer import Peer
from .session import Session

__all__ = ["Opener", "Packets", "Sealer"]

_HEAD, _TAG = 16, 16  # bytes, before and after each packet
_MOST = 256  # packets of a run
_LAYOUTS = 16  # to keep; each is for one size of packets
_LITTLE = sys.byteorder == "little"  # the words of a message are, whatever the machine's are

_ZEROS = memoryview(bytes(4 * _MOST)).cast("I")
_TYPES = memoryview(DATA * _MOST).cast("I")
_NO_DATA = repeat(None)  # for encrypt_into: no associated data
# The words of the source address in an IP header.
_SOURCE_4: tuple[int, ...] = (3,)
_SOURCE_6: tuple[int, ...] = (2, 3, 4, 5)

_call_all = deque[object](maxlen=0).extend
"""Make all calls of a `map`, in C."""


class Packets(NamedTuple):
    """Packets for the device: a run, and the length of each packet in it without its padding."""

    run: Run
    sizes: list[int]

    def segments(self) -> list[bytes]:
        """Copies of the packets."""
        pairs = zip(self.run.views(), self.sizes, strict=True)
        return [view[:size].tobytes() for view, size in pairs]


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
        self.buffer, self.target = buffer, target
        count = self.most = min(_MOST, min(buffer.nbytes, target.nbytes) // stride)
        starts = range(0, count * stride, stride)
        packet = slice(_HEAD, stride - _TAG), slice(_HEAD, stride)
        source, result = packet if sealing else packet[::-1]
        # Four zeros and the counter, if the receiver's index is zero for the moment.
        self.nonces = [buffer[start + 4 : start + _HEAD] for start in starts]
        self.sources = [buffer[start:][source] for start in starts]
        self.results = [target[start:][result] for start in starts]
        words = Run(buffer, 0, stride, stride, stride, count).words
        self.types, self.indices, self.low, self.high = map(words, (0, 4, 8, 12))
        # The words of each packet's IP header.
        packets = Run(target, _HEAD, stride, stride - OVERHEAD_BYTES, 0, count)
        self.inner = [packets.words(offset) for offset in range(0, stride - OVERHEAD_BYTES, 4)[:6]]

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
        if count < 2 or run.start != _HEAD or stride % 4 or run.last < 20 or not _LITTLE:
            return None
        destination = buffer[32:36] if buffer[_HEAD] < 0x60 else buffer[40:56]
        peer = self._interface.owner(destination.tobytes())
        if peer is None or peer.endpoint is None or (session := peer.ready(now)) is None:
            return None
        first, whole = session.sent, count - 1
        layout = self._layouts.of(buffer, stride, buffer, sealing=True)
        if count > layout.most or (first & 0xFFFFFFFF) + count > 0xFFFFFFFF:
            return None
        layout.write_counters(first, count)
        layout.types[:count] = _TYPES[:count]
        layout.indices[:count] = _ZEROS[:count]
        seal, nonces = session.encrypt_into, layout.nonces
        _call_all(map(seal, nonces[:whole], layout.sources, _NO_DATA, layout.results))
        # The last packet may be shorter, and is padded by itself.
        at = whole * stride + _HEAD
        end = at + min(run.last + -run.last % 16, stride - _HEAD - _TAG)
        seal(nonces[whole], buffer[at:end], None, buffer[at : end + _TAG])
        layout.indices[:count] = session.remote_words[:count]
        session.sent = first + count
        length = end + _TAG
        peer.sent_run(session, length, now)
        return Run(buffer, 0, stride, stride, length - whole * stride, count), peer.endpoint


class Opener:
    """Opens messages from a socket into a buffer of its own, which the next run overwrites."""

    def __init__(self, interface: Interface, size: int = 1 << 17) -> None:
        self._interface = interface
        self._layouts = _Layouts()
        self._plain = memoryview(bytearray(size))

    def open(self, run: Run, source: Endpoint, now: float) -> Packets | None:
        """Open a run of messages.

        Args:
            run: of messages without room between them.
        """
        count, size, last = run.count, run.stride, run.last
        if count < 2 or run.start or size % 4 or last <= OVERHEAD_BYTES or not _LITTLE:
            return None
        session = self._interface.indices.get(run.buffer[4:8].tobytes())
        if not isinstance(session, Session) or session is not session.peer.current:
            return None
        layout = self._layouts.of(run.buffer, size, self._plain, sealing=False)
        if now >= session.reject_at or count > layout.most:
            return None
        if not _opened(session, layout, run):
            return None
        sizes = self._sizes(session.peer, layout, run)
        if sizes is None:
            return None
        session.window.take(count)
        session.peer.received_run(session, (count - 1) * size + last, source, now)
        inner = size - OVERHEAD_BYTES
        return Packets(Run(self._plain, _HEAD, size, inner, last - OVERHEAD_BYTES, count), sizes)

    def _sizes(self, peer: Peer, layout: _Layout, run: Run) -> list[int] | None:
        """The lengths that the IP headers name, if all packets are alike and the peer's."""
        plain, whole, size = self._plain, run.count - 1, run.stride
        at = whole * size + _HEAD
        version = plain[_HEAD] >> 4
        if version == 4:  # the word with the length, and those of the source address
            alike, sources, least = 0, _SOURCE_4, 20
            each, final = _number(plain, _HEAD + 2), _number(plain, at + 2)
        elif version == 6:
            alike, sources, least = 1, _SOURCE_6, 40
            each, final = _number(plain, _HEAD + 4) + 40, _number(plain, at + 4) + 40
        else:
            return None
        words = layout.inner[alike][:whole].tobytes()
        if (
            words != words[:4] * whole
            or set(plain[_HEAD : at + 1 : size].tobytes()) != {plain[_HEAD]}
            or not least <= final <= run.last - OVERHEAD_BYTES
            or not least <= each <= size - OVERHEAD_BYTES
        ):
            return None
        address = b""
        for place in sources:
            words = layout.inner[place][: whole + 1].tobytes()
            if words != words[:4] * (whole + 1):
                return None
            address += words[:4]
        if self._interface.owner(address) is not peer:
            return None
        return [each] * whole + [final]


def _opened(session: Session, layout: _Layout, run: Run) -> bool:
    """Decrypt messages that come next in sequence; False if one does not, or is not genuine."""
    count, whole, first = run.count, run.count - 1, session.window.next
    if (
        (first & 0xFFFFFFFF) + count > 0xFFFFFFFF
        or not layout.has_counters(first, count)
        or layout.types[:count].tobytes() != DATA * count
        or layout.indices[:count].tobytes() != session.local * count
    ):
        return False
    at, end = whole * run.stride + _HEAD, whole * run.stride + run.last
    layout.indices[:count] = _ZEROS[:count]
    unseal, nonces = session.decrypt_into, layout.nonces
    try:
        _call_all(map(unseal, nonces[:whole], layout.sources, _NO_DATA, layout.results))
        unseal(nonces[whole], run.buffer[at:end], None, layout.target[at : end - _TAG])
    except InvalidTag:
        return False
    finally:
        layout.indices[:count] = memoryview(session.local * count).cast("I")
    return True


def _number(buffer: memoryview, at: int) -> int:
    return buffer[at] << 8 | buffer[at + 1]

"""The fast path of data messages: a run of packets is sealed or opened in its buffer.

What is the same in all packets of a run is checked or written for all of them at once, in strided
views of 32-bit words. What is left for each packet is the call that seals or opens it.

A single packet takes a shorter way, without views.

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
from .peer import Peer
from .session import REJECT_AFTER_MESSAGES, Session

__all__ = ["Opener", "Packets", "Sealer"]

_HEAD, _TAG = 16, 16  # bytes, before and after each packet
_MOST = 256  # packets of a run
_LAYOUTS = 16  # to keep; each is for one size of packets
_LITTLE = sys.byteorder == "little"  # the words of a message are, whatever the machine's are

_ZEROS = memoryview(bytes(4 * _MOST)).cast("I")
_NONCE = bytes(4)  # how each nonce begins
_TYPES = memoryview(DATA * _MOST).cast("I")
_NO_DATA = repeat(None)  # for encrypt_into: no associated data
_UINT16 = struct.Struct(">H").unpack_from
_COUNTER = struct.Struct("<Q").pack

# By version of IP: which word all packets but the last have in common, where the length is, what to
# add to it, the least it may be then, and the words of the source address.
_VERSIONS: dict[int, tuple[int, int, int, int, tuple[int, ...]]] = {
    4: (0, 2, 0, 20, (3,)),
    6: (1, 4, 40, 40, (2, 3, 4, 5)),
}

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


class _Views:
    """The views of the first packets of a layout, as many as a run has.

    Attributes:
        types, indices, low, high: the words of the messages' headers.
        nonces, sources, results: of all packets but the last, which may be shorter.
        last_nonce: of the last packet.
        inner: the first words of the packets' IP headers.
    """

    def __init__(self, layout: "_Layout", count: int) -> None:
        whole = count - 1
        self.types, self.indices, self.low, self.high = (each[:count] for each in layout.head)
        self.nonces, self.last_nonce = layout.nonces[:whole], layout.nonces[whole]
        self.sources, self.results = layout.sources[:whole], layout.results[:whole]
        self.inner = [each[:count] for each in layout.inner]
        self.no_index, self.data_types = _ZEROS[:count], _TYPES[:count]

    def write_counters(self, first: int) -> None:
        low, high, count = first & 0xFFFFFFFF, first >> 32, len(self.low)
        self.low[:] = memoryview(array("I", range(low, low + count)))
        self.high[:] = memoryview(array("I", [high]) * count) if high else self.no_index

    def has_counters(self, first: int) -> bool:
        low, count = first & 0xFFFFFFFF, len(self.low)
        return (
            self.low.tolist() == list(range(low, low + count))
            and self.high.tobytes() == (first >> 32).to_bytes(4, "little") * count
        )


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
        self.head = [words(offset) for offset in (0, 4, 8, 12)]
        # The words of each packet's IP header.
        packets = Run(target, _HEAD, stride, stride - OVERHEAD_BYTES, 0, count)
        self.inner = [packets.words(offset) for offset in range(0, stride - OVERHEAD_BYTES, 4)[:6]]
        self._views: dict[int, _Views] = {}  # by the number of packets

    def views(self, count: int) -> _Views:
        found = self._views.get(count)
        if found is None:
            found = self._views[count] = _Views(self, count)
        return found


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
        if run.start != _HEAD or run.last < 20:
            return None
        destination = buffer[32:36] if buffer[_HEAD] < 0x60 else buffer[40:56]
        peer = self._interface.owner(destination.tobytes())
        if peer is None or (endpoint := peer.endpoint) is None:
            return None
        if (session := peer.ready(now)) is None:
            return None
        if count == 1:
            return _sealed(run, peer, session, now), endpoint
        if stride % 4 or not _LITTLE:
            return None
        first = session.sent
        layout = self._layouts.of(buffer, stride, buffer, sealing=True)
        if count > layout.most or (first & 0xFFFFFFFF) + count > 0xFFFFFFFF:
            return None
        views, seal = layout.views(count), session.encrypt_into
        views.write_counters(first)
        views.types[:] = views.data_types
        views.indices[:] = views.no_index
        _call_all(map(seal, views.nonces, views.sources, _NO_DATA, views.results))
        # The last packet may be shorter, and is padded by itself.
        begin = (count - 1) * stride
        at = begin + _HEAD
        end = at + min(run.last + -run.last % 16, stride - _HEAD - _TAG)
        length = end + _TAG
        seal(views.last_nonce, buffer[at:end], None, buffer[at:length])
        views.indices[:] = session.remote_words[:count]
        session.sent = first + count
        peer.sent_run(session, length, now)
        return Run(buffer, 0, stride, stride, length - begin, count), endpoint


def _sealed(run: Run, peer: Peer, session: Session, now: float) -> Run:
    """Make a single packet a message: as in every ping, where views would cost too much."""
    buffer, number = run.buffer, _COUNTER(session.sent)
    end = _HEAD + min(run.last + -run.last % 16, run.stride - _HEAD - _TAG)
    length = end + _TAG
    session.encrypt_into(_NONCE + number, buffer[_HEAD:end], None, buffer[_HEAD:length])
    buffer[:_HEAD] = session.head + number
    session.sent += 1
    peer.sent_run(session, length, now)
    return Run(buffer, 0, length, length, length, 1)


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
        if run.start or last <= OVERHEAD_BYTES:
            return None
        session = self._interface.indices.get(run.buffer[4:8].tobytes())
        if not isinstance(session, Session) or session is not session.peer.current:
            return None
        if now >= session.reject_at:
            return None
        if count == 1:
            return self._open_one(session, run, source, now)
        if size % 4 or not _LITTLE:
            return None
        layout = self._layouts.of(run.buffer, size, self._plain, sealing=False)
        if count > layout.most:
            return None
        views = layout.views(count)
        if not _opened(session, views, run, self._plain):
            return None
        sizes = self._sizes(session.peer, views, run)
        if sizes is None:
            return None
        session.window.take(count)
        session.peer.received_run(session, (count - 1) * size + last, source, now)
        inner = size - OVERHEAD_BYTES
        return Packets(Run(self._plain, _HEAD, size, inner, last - OVERHEAD_BYTES, count), sizes)

    def _open_one(self, session: Session, run: Run, source: Endpoint, now: float) -> Packets | None:
        plain, window, last = self._plain, session.window, run.last
        number = _COUNTER(window.next)
        if run.buffer[:_HEAD].tobytes() != DATA + session.local + number:
            return None
        if window.next >= REJECT_AFTER_MESSAGES:
            return None
        try:
            sealed = run.buffer[_HEAD:last]
            session.decrypt_into(_NONCE + number, sealed, None, plain[_HEAD : last - _TAG])
        except InvalidTag:
            return None
        version = _VERSIONS.get(plain[_HEAD] >> 4)
        if version is None:
            return None
        _, offset, more, least, sources = version
        length = _UINT16(plain, _HEAD + offset)[0] + more
        begin = _HEAD + 4 * sources[0]
        address = plain[begin : begin + 4 * len(sources)].tobytes()
        inner, peer = last - OVERHEAD_BYTES, session.peer
        if not least <= length <= inner or self._interface.owner(address) is not peer:
            return None
        window.take(1)
        peer.received_run(session, last, source, now)
        return Packets(Run(plain, _HEAD, last, inner, inner, 1), [length])

    def _sizes(self, peer: Peer, views: _Views, run: Run) -> list[int] | None:
        """The lengths that the IP headers name, if all packets are alike and the peer's."""
        plain, count, size, last = self._plain, run.count, run.stride, run.last
        first, whole, at = plain[_HEAD], count - 1, (count - 1) * size + _HEAD
        version = _VERSIONS.get(first >> 4)
        if version is None:
            return None
        alike, offset, more, least, sources = version
        each = _UINT16(plain, _HEAD + offset)[0] + more
        final = _UINT16(plain, at + offset)[0] + more
        if not (
            least <= each <= size - OVERHEAD_BYTES
            and least <= final <= last - OVERHEAD_BYTES
            and plain[_HEAD : at + 1 : size].tobytes() == bytes((first,)) * count
        ):
            return None
        words = views.inner[alike].tobytes()
        if words[:-4] != words[:4] * whole:
            return None
        address = b""
        for place in sources:
            words = views.inner[place].tobytes()
            if words != words[:4] * count:
                return None
            address += words[:4]
        if self._interface.owner(address) is not peer:
            return None
        return [each] * whole + [final]


def _opened(session: Session, views: _Views, run: Run, plain: memoryview) -> bool:
    """Decrypt messages that come next in sequence; False if one does not, or is not genuine."""
    count, first = run.count, session.window.next
    indices = session.local * count
    if (
        (first & 0xFFFFFFFF) + count > 0xFFFFFFFF
        or not views.has_counters(first)
        or views.types.tobytes() != DATA * count
        or views.indices.tobytes() != indices
    ):
        return False
    begin = (count - 1) * run.stride
    at, end = begin + _HEAD, begin + run.last
    views.indices[:] = views.no_index
    unseal = session.decrypt_into
    try:
        _call_all(map(unseal, views.nonces, views.sources, _NO_DATA, views.results))
        unseal(views.last_nonce, run.buffer[at:end], None, plain[at : end - _TAG])
    except InvalidTag:
        return False
    finally:
        views.indices[:] = memoryview(indices).cast("I")
    return True

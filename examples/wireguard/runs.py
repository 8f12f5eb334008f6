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
from collections import deque
from itertools import repeat

from cryptography.exceptions import InvalidTag

from aiotun.runs import Run

from .cookies import Endpoint
from .interface import Interface
from .messages import DATA, OVERHEAD_BYTES
from .peer import Peer
from .session import Session

__all__ = ["Opener", "Sealer"]

_HEAD, _TAG = 16, 16  # bytes, before and after each packet
_MOST = 256  # packets of a run
_SIZES = 16  # of messages, for which to keep views
_LITTLE = sys.byteorder == "little"  # the words of a message are, whatever the machine's are
# The counters of runs are written and compared as numbers of 32 bits. A session that is 180 seconds
# old has ended, long before it needs more.
_LAST_COUNTER = 0xFFFFFFFF

_ZEROS = memoryview(bytes(4 * _MOST)).cast("I")
_TYPES = memoryview(DATA * _MOST).cast("I")
_NO_DATA = repeat(None)  # for encrypt_into: no associated data
_UINT16 = struct.Struct(">H").unpack_from
_NONCE = struct.Struct("<4xQ").pack  # four zeros and the counter

# By version of IP: where the length is, what to add to it, the least it may be then, and where the
# source address is.
_VERSIONS = {4: (2, 0, 20, 12, 16), 6: (4, 40, 40, 8, 24)}

_call_all = deque[object](maxlen=0).extend
"""Make all calls of a `map`, in C."""


class _Places:
    """Where the parts of messages of one size are in a buffer.

    Args:
        buffer: begins with a message's header.
        stride: the length of a message.
        target: where the other form of the packets goes.
        sealing: whether `buffer` has the packets, or the messages.

    Attributes:
        nonces, sources, results: of each message.
        head: the words of the messages' headers.
        inner: the first words of the packets' IP headers.
        versions: the first bytes of those.
    """

    def __init__(
        self, buffer: memoryview, stride: int, target: memoryview, *, sealing: bool
    ) -> None:
        count = min(_MOST, min(buffer.nbytes, target.nbytes) // stride)
        starts = range(0, count * stride, stride)
        packet = slice(_HEAD, stride - _TAG), slice(_HEAD, stride)
        source, result = packet if sealing else packet[::-1]
        # Four zeros and the counter, if the receiver's index is zero for the moment.
        self.nonces = [buffer[start + 4 : start + _HEAD] for start in starts]
        self.sources = [buffer[start:][source] for start in starts]
        self.results = [target[start:][result] for start in starts]
        words = Run(buffer, 0, stride, stride, stride, count).words
        self.head = [words(offset) for offset in (0, 4, 8, 12)]
        words = Run(target, _HEAD, stride, stride - OVERHEAD_BYTES, 0, count).words
        self.inner = [words(offset) for offset in range(0, stride - OVERHEAD_BYTES, 4)[:6]]
        self.versions = target[_HEAD : count * stride : stride]


class _Views:
    """Views of the first `count` messages of a buffer.

    Attributes:
        alike: by version of IP, pairs of views. If all are equal, all packets have one version and
            one source address, and all but the last have one length.
    """

    def __init__(self, places: _Places, count: int) -> None:
        self.nonces = places.nonces[:count]
        self.all_but_last = places.nonces[: count - 1]
        self.sources, self.results = places.sources, places.results
        self.types, self.indices, self.low, self.high = (each[:count] for each in places.head)
        self.zeros, self.data_types = _ZEROS[:count], _TYPES[:count]
        lengths = {4: places.inner[:1], 6: places.inner[1:2]}
        addresses = {4: places.inner[3:4], 6: places.inner[2:6]}
        self.alike = {
            version: [
                (each[1:end], each[: end - 1])
                for views, end in (
                    (lengths[version], count - 1),
                    ([places.versions], count),
                    (addresses[version], count),
                )
                for each in views
            ]
            for version in (4, 6)
        }
        self._ones = sum(1 << 32 * place for place in range(count))
        self._steps = sum(place << 32 * place for place in range(count))
        self._bytes = 4 * count

    def counters(self, first: int) -> memoryview:
        """Return consecutive numbers. They are computed side by side in one large int."""
        numbers = first * self._ones + self._steps
        return memoryview(numbers.to_bytes(self._bytes, "little")).cast("I")


class _Kept(dict[tuple[int, int], _Views]):
    """The views that were used last, by the size and number of messages.

    To make them takes as long as to seal the packets.
    """

    def __init__(self, buffer: memoryview, target: memoryview, *, sealing: bool) -> None:
        self.buffer, self._target, self._sealing = buffer, target, sealing
        self._places: dict[int, _Places] = {}

    def __missing__(self, key: tuple[int, int]) -> _Views:
        stride, count = key
        places = self._places.get(stride)
        if places is None:
            if len(self._places) >= _SIZES:
                self.clear()
                self._places.clear()
            places = _Places(self.buffer, stride, self._target, sealing=self._sealing)
            self._places[stride] = places
        views = self[key] = _Views(places, count)
        return views


class Sealer:
    """Seals the packets of a device, in the buffers that they come in."""

    def __init__(self, interface: Interface) -> None:
        self._owner = interface.owner
        nothing = memoryview(b"")
        self._views = _Kept(nothing, nothing, sealing=True)

    def seal(self, run: Run, now: float) -> Endpoint | None:
        """Make a run of packets one of messages, and say where to send it.

        Args:
            run: of packets with one destination, with 16 bytes of room before and after each, and
                padded with zeros between (section 5.4.6).
        """
        buffer, count, stride, last = run.buffer, run.count, run.stride, run.last
        if run.start != _HEAD or last < 20:
            return None
        destination = buffer[32:36] if buffer[_HEAD] < 0x60 else buffer[40:56]
        peer = self._owner(destination.tobytes())
        if peer is None or peer.endpoint is None or (session := peer.ready(now)) is None:
            return None
        # The last packet may be shorter, and is padded by itself.
        inner = min(last + -last % 16, stride - OVERHEAD_BYTES)
        if count == 1:
            _seal_one(session, buffer, inner)
        elif not self._seal_all(session, run, inner):
            return None
        run.start, run.size, run.last = 0, stride, inner + OVERHEAD_BYTES
        peer.sent_run(session, (count - 1) * stride + run.last, now)
        return peer.endpoint

    def _seal_all(self, session: Session, run: Run, inner: int) -> bool:
        buffer, count, stride, first = run.buffer, run.count, run.stride, session.sent
        if stride % 4 or not _LITTLE or first + count > _LAST_COUNTER:
            return False
        if buffer is not self._views.buffer:
            self._views = _Kept(buffer, buffer, sealing=True)
        views, seal = self._views[stride, count], session.encrypt_into
        views.types[:] = views.data_types
        views.indices[:] = views.high[:] = views.zeros
        views.low[:] = views.counters(first)
        short = inner < stride - OVERHEAD_BYTES
        nonces = views.all_but_last if short else views.nonces
        _call_all(map(seal, nonces, views.sources, _NO_DATA, views.results))
        if short:
            at = (count - 1) * stride + _HEAD
            end = at + inner
            seal(views.nonces[-1], buffer[at:end], None, buffer[at : end + _TAG])
        views.indices[:] = session.remote_words[:count]
        session.sent = first + count
        return True


def _seal_one(session: Session, buffer: memoryview, inner: int) -> None:
    """Seal a single packet: as in every ping, where views would cost too much."""
    nonce, end = _NONCE(session.sent), _HEAD + inner
    session.encrypt_into(nonce, buffer[_HEAD:end], None, buffer[_HEAD : end + _TAG])
    buffer[:_HEAD] = session.head + nonce[4:]
    session.sent += 1


class Opener:
    """Opens messages from a socket into a buffer of its own, which the next run overwrites."""

    def __init__(self, interface: Interface, size: int = 1 << 17) -> None:
        self._owner, self._sessions = interface.owner, interface.indices
        self._packets = Run(memoryview(bytearray(size)), _HEAD, 0, 0, 0, 0)
        self._views = _Kept(memoryview(b""), self._packets.buffer, sealing=False)

    def open(self, run: Run, source: Endpoint, now: float) -> Run | None:
        """Open a run of messages; return the packets, without their padding.

        Args:
            run: of messages without room between them.
        """
        count, last = run.count, run.last
        if run.start or last <= OVERHEAD_BYTES:
            return None
        session = self._sessions.get(run.buffer[4:8].tobytes())
        if not isinstance(session, Session):
            return None
        peer = session.peer
        if session is not peer.current or now >= session.reject_at:
            return None
        packets = self._packets
        packets.count, packets.stride = count, run.stride
        opened = self._open_one(session, run) if count == 1 else self._open_all(session, run)
        if not opened:
            return None
        session.window.take(count)
        peer.received_run(session, (count - 1) * run.stride + last, source, now)
        return packets

    def _open_one(self, session: Session, run: Run) -> bool:
        plain, last = self._packets.buffer, run.last
        nonce = _NONCE(session.window.next)
        if run.buffer[:_HEAD] != session.local_head + nonce[4:]:
            return False
        try:
            session.decrypt_into(nonce, run.buffer[_HEAD:last], None, plain[_HEAD : last - _TAG])
        except InvalidTag:
            return False
        version = _VERSIONS.get(plain[_HEAD] >> 4)
        if version is None:
            return False
        place, more, least, begin, end = version
        self._packets.size = self._packets.last = length = _UINT16(plain, _HEAD + place)[0] + more
        address = plain[_HEAD + begin : _HEAD + end].tobytes()
        return least <= length <= last - OVERHEAD_BYTES and self._owner(address) is session.peer

    def _open_all(self, session: Session, run: Run) -> bool:
        """Open messages that come next in sequence; False if one does not, or is not genuine."""
        buffer, count, size, last = run.buffer, run.count, run.stride, run.last
        first, indices = session.window.next, session.local_words[:count]
        if size % 4 or not _LITTLE or first + count > _LAST_COUNTER:
            return False
        if buffer is not self._views.buffer:
            self._views = _Kept(buffer, self._packets.buffer, sealing=False)
        views, unseal = self._views[size, count], session.decrypt_into
        if (
            views.low != views.counters(first)
            or views.indices != indices
            or views.types != views.data_types
            or views.high != views.zeros
        ):
            return False
        views.indices[:] = views.zeros
        nonces = views.nonces if last == size else views.all_but_last
        try:
            _call_all(map(unseal, nonces, views.sources, _NO_DATA, views.results))
            if last < size:
                at = (count - 1) * size + _HEAD
                end = at + last - _HEAD
                plain = self._packets.buffer[at : end - _TAG]
                unseal(views.nonces[-1], buffer[at:end], None, plain)
        except InvalidTag:
            opened = False
        else:
            opened = self._measure(session.peer, views, size, last)
        if not opened:
            views.indices[:] = indices  # the other path reads it
        return opened

    def _measure(self, peer: Peer, views: _Views, size: int, last: int) -> bool:
        """Find the lengths that the IP headers name, if all packets are alike and the peer's."""
        packets, plain = self._packets, self._packets.buffer
        number, at = plain[_HEAD] >> 4, (packets.count - 1) * size + _HEAD
        version = _VERSIONS.get(number)
        if version is None:
            return False
        place, more, least, begin, end = version
        packets.size = each = _UINT16(plain, _HEAD + place)[0] + more
        packets.last = final = _UINT16(plain, at + place)[0] + more
        if not (least <= each <= size - OVERHEAD_BYTES and least <= final <= last - OVERHEAD_BYTES):
            return False
        for one, other in views.alike[number]:
            if one != other:
                return False
        return self._owner(plain[_HEAD + begin : _HEAD + end].tobytes()) is peer

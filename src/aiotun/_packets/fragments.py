"""IP fragments: making them, and putting them together again; bytes only, no I/O, no clock.

Sources: RFC 791, section 3.2; RFC 8200, section 4.5; RFC 5722 (overlapping fragments are dropped).
"""

from __future__ import annotations

import struct

from .ipheader import IPHeader
from .native import checksum

__all__ = ["Reassembler", "fragment", "fragment_of"]

_IPV6_FRAGMENT = 44
_FRAGMENT = struct.Struct("!BBHI")  # RFC 8200, section 4.5

# As Linux has them (ipfrag_high_thresh, ipfrag_time). Memory counts what an object costs, too.
_MAX_BYTES = 4 * 1024 * 1024
_SECONDS = 30.0
_OVERHEAD = 256

Key = tuple[bytes, int]


def fragment(packet: bytes, mtu: int, ident: int) -> list[bytes]:
    """Cut an IP packet into fragments that fit an MTU; a packet that fits is returned as it is.

    Args:
        packet: a packet without IPv6 extension headers. IPv4's options are repeated in each
            fragment.
        mtu: at least 68 bytes; 1280 for IPv6.
        ident: the identification that the fragments of an IPv6 packet share, 32 bits. An IPv4
            packet has one in its header already.
    """
    if len(packet) <= mtu:
        return [packet]
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        head = packet[:size]
        most = (mtu - size) & ~7
    else:
        size = 40
        most = (mtu - 48) & ~7
    made = []
    for start in range(size, len(packet), most):
        piece = packet[start : start + most]
        offset, more = start - size, start + most < len(packet)
        if packet[0] >> 4 == 4:
            made.append(_fragment4(head, offset, more, piece))
        else:
            made.append(_fragment6(packet, offset, more, ident, piece))
    return made


def _fragment4(head: bytes, offset: int, more: bool, piece: bytes) -> bytes:
    length = (len(head) + len(piece)).to_bytes(2, "big")
    place = (more << 13 | offset >> 3).to_bytes(2, "big")
    head = b"".join((head[:2], length, head[4:6], place, head[8:10], b"\0\0", head[12:]))
    return b"".join((head[:10], checksum(head, 0).to_bytes(2, "big"), head[12:], piece))


def _fragment6(packet: bytes, offset: int, more: bool, ident: int, piece: bytes) -> bytes:
    length = (8 + len(piece)).to_bytes(2, "big")
    extension = _FRAGMENT.pack(packet[6], 0, offset | more, ident)
    head = (packet[:4], length, bytes((_IPV6_FRAGMENT,)), packet[7:40])
    return b"".join((*head, extension, piece))


def fragment_of(packet: bytes) -> int:
    """Return the protocol (such as UDP) of the packet that this is a fragment of; else 0."""
    if len(packet) < 20:
        return 0
    if packet[0] >> 4 == 4:
        return packet[9] if packet[6] & 0x3F or packet[7] else 0
    # In practice no extension header precedes the fragment header; leave such packets to the
    # kernel. An atomic fragment (RFC 6946) is a whole packet.
    if packet[6] != _IPV6_FRAGMENT or packet[0] >> 4 != 6 or len(packet) < 48:
        return 0
    return packet[40] if packet[42] or packet[43] & 0xF9 else 0


class _Parts:
    """The fragments of one packet that have come."""

    __slots__ = ("bytes", "end", "have", "head", "pieces", "since")

    def __init__(self, since: float) -> None:
        self.pieces: dict[int, bytes] = {}
        self.have = 0  # bytes in `pieces`
        self.end = 0  # the length of the whole payload, once the last fragment has come
        self.head = b""  # of the first fragment, once it has come
        self.since = since
        self.bytes = 0


class Reassembler:
    """Puts fragments together, within bounds of memory and time.

    Attributes:
        dropped: how many fragments were dropped: invalid and overlapping ones, and fragments of
            packets that did not become complete in time.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._bytes = 0
        self._parts: dict[Key, _Parts] = {}

    def add(self, packet: bytes, now: float) -> bytes | None:
        """Take a fragment; return the whole packet if no fragment of it is missing any more.

        Args:
            packet: an IP packet for which `fragment_of` is not 0.
            now: the time in seconds, of any clock that never goes back.
        """
        self._expire(now)
        try:
            key, head, offset, more, piece = _take_apart(packet)
        except (ValueError, struct.error):
            self.dropped += 1
            return None
        parts = self._parts.get(key)
        if parts is None:
            parts = self._parts[key] = _Parts(now)
        if parts.pieces.get(offset) == piece:
            return None  # a duplicate of the same fragment, which does no harm
        end = offset + len(piece)
        if offset in parts.pieces or (parts.end and (end > parts.end or not more)):
            self._drop(key, 1)
            return None
        if not more:
            parts.end = end
        if not offset:
            parts.head = head
        parts.pieces[offset] = piece
        parts.have += len(piece)
        parts.bytes += len(piece) + _OVERHEAD
        self._bytes += len(piece) + _OVERHEAD
        if parts.end and parts.have >= parts.end:
            return self._whole(key)
        while self._bytes > _MAX_BYTES:
            self._drop(next(iter(self._parts)))
        return None

    def _whole(self, key: Key) -> bytes | None:
        parts = self._parts[key]
        at = 0
        for offset in sorted(parts.pieces):
            if offset != at:  # the fragments overlap: drop the whole packet (RFC 5722)
                self._drop(key)
                return None
            at += len(parts.pieces[offset])
        if at != parts.end or len(parts.head) + at > 65535 + (40 if len(key[0]) > 9 else 0):
            self._drop(key)
            return None
        del self._parts[key]
        self._bytes -= parts.bytes
        payload = b"".join(parts.pieces[offset] for offset in sorted(parts.pieces))
        head = parts.head
        if head[0] >> 4 == 4:
            return _fragment4(head, 0, False, payload)
        return b"".join((head[:4], at.to_bytes(2, "big"), head[6:], payload))

    def _expire(self, now: float) -> None:
        while self._parts:
            key, oldest = next(iter(self._parts.items()))
            if now - oldest.since < _SECONDS:
                break
            self._drop(key)

    def _drop(self, key: Key, more: int = 0) -> None:
        parts = self._parts.pop(key)
        self._bytes -= parts.bytes
        self.dropped += len(parts.pieces) + more

    def clear(self) -> None:
        """Drop the fragments of all packets."""
        for key in [*self._parts]:
            self._drop(key)


def _take_apart(packet: bytes) -> tuple[Key, bytes, int, bool, bytes]:
    """Return a fragment's key, the whole packet's header, its offset, its more flag, and its data.

    Raises:
        ValueError, struct.error: the fragment is invalid.
    """
    header = IPHeader(packet)
    end = header.total_length
    if packet[0] >> 4 == 4:
        start = header.payload_offset
        if checksum(packet[:start], 0):
            raise ValueError("invalid checksum")
        head = packet[:start]
        place = packet[6] << 8 | packet[7]
        offset, more = (place & 0x1FFF) * 8, bool(place & 0x2000)
        key = packet[12:20] + packet[9:10], packet[4] << 8 | packet[5]
    else:
        start = 48
        following, _, place, ident = _FRAGMENT.unpack_from(packet, 40)
        head = packet[:6] + bytes((following,)) + packet[7:40]
        offset, more = place & 0xFFF8, bool(place & 1)
        key = packet[8:40], ident
    piece = packet[start:end]
    if end > len(packet) or not piece or (more and len(piece) & 7) or offset + len(piece) > 65535:
        raise ValueError("not a valid fragment")
    return key, head, offset, more, piece

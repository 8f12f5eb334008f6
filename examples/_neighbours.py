"""A host's requests to a neighbor: "who has this address?", and pings. Pure functions of bytes."""

import dataclasses
import struct
from ipaddress import IPv4Address, IPv6Address

from _priority import untagged

from aiotun.offload import checksum

__all__ = ["Neighbour", "Reply"]

_PAYLOAD = bytes(range(56))  # the size that ping(8) sends

# Ethernet and ARP for IPv4 (RFC 826).
_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")
_ARP_FIXED = (0x0806, 1, 0x0800, 6, 4)
_ASK, _ANSWER = 1, 2
_EVERYBODY = b"\xff" * 6
# IPv4 without options (RFC 791).
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_SOLICITATION, _ADVERTISEMENT = 135, 136  # RFC 4861, sections 4.3 and 4.4
_SOURCE_LINK, _TARGET_LINK = b"\1\1", b"\2\1"  # options with a MAC
_SOLICITED_NODE = IPv6Address("ff02::1:ff00:0").packed[:13]  # RFC 4291, section 2.7.1


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer to a ping."""

    number: int
    bytes: int
    ttl: int


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A host on the same Ethernet, and our own addresses. Both are of the same IP version."""

    mac: bytes  # ours
    source: IPv4Address | IPv6Address  # ours
    target: IPv4Address | IPv6Address
    ident: int  # identifies our pings

    def find(self) -> bytes:
        """Ask who has the address: by ARP, or by neighbor discovery."""
        ours, theirs = self.source.packed, self.target.packed
        if self.target.version == 4:
            head = (_EVERYBODY, self.mac, *_ARP_FIXED, _ASK)
            return _ARP.pack(*head, self.mac, ours, bytes(6), theirs)
        group = _SOLICITED_NODE + theirs[13:]
        rest = bytes(4) + theirs + _SOURCE_LINK + self.mac
        message = _icmp(_SOLICITATION, rest, _pseudo(ours, group, 4 + len(rest)))
        return b"\x33\x33" + group[12:] + self._packet(message, group, 255)

    def found(self, frame: bytes) -> bytes | None:
        """Return the neighbor's MAC if the frame is its answer, or None."""
        frame, _ = untagged(frame)
        if frame[:6] != self.mac:
            return None
        if self.target.version == 4 and len(frame) >= _ARP.size:
            _, _, *fixed, operation, mac, sender, _, _ = _ARP.unpack_from(frame)
            theirs = (*fixed, operation, sender) == (*_ARP_FIXED, _ANSWER, self.target.packed)
            return mac if theirs else None
        message, hops = self._message(frame)
        told, option = message[8:24], message[24:26]
        # A hop limit of 255 shows that no router has forwarded it.
        if (message[:2], hops) != (bytes((_ADVERTISEMENT, 0)), 255):
            return None
        return message[26:32] if (told, option) == (self.target.packed, _TARGET_LINK) else None

    def ping(self, mac: bytes, number: int) -> bytes:
        """An echo request to the neighbor, which has this MAC."""
        kind = 8 if self.target.version == 4 else 128
        return mac + self._packet(self._echo(kind, number), self.target.packed, 64)

    def reply(self, frame: bytes) -> Reply | None:
        """Read the answer to one of our pings; None for any other or a damaged frame."""
        frame, _ = untagged(frame)
        if frame[:6] != self.mac:
            return None
        message, ttl = self._message(frame)
        if len(message) < 8:
            return None
        number = int.from_bytes(message[6:8], "big")
        wanted = self._echo(0 if self.target.version == 4 else 129, number)
        if message[:2] + message[4:] != wanted[:2] + wanted[4:]:
            return None
        return Reply(number, len(message), ttl)

    def _echo(self, kind: int, number: int) -> bytes:
        rest = struct.pack("!HH", self.ident, number) + _PAYLOAD
        pseudo = 0
        if self.target.version == 6:
            pseudo = _pseudo(self.source.packed, self.target.packed, 4 + len(rest))
        return _icmp(kind, rest, pseudo)

    def _packet(self, message: bytes, to: bytes, hops: int) -> bytes:
        """A frame without its destination MAC."""
        ours = self.source.packed
        if self.target.version == 4:
            head = _IPV4.pack(0x45, 0, 20 + len(message), 0, 0, hops, 1, 0, ours, to)
            head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
            return self.mac + b"\x08\x00" + head + message
        head = _IPV6.pack(6 << 28, len(message), 58, hops, ours, to)
        return self.mac + b"\x86\xdd" + head + message

    def _message(self, frame: bytes) -> tuple[bytes, int]:
        """The ICMP message from the neighbor, empty if there is none, and its TTL or hop limit."""
        theirs, own = self.target.packed, self.source.packed
        pair, packet = theirs + own, frame[14:]
        if self.target.version == 4:
            length = int.from_bytes(packet[2:4], "big")
            # No options, no fragment. Short frames are padded.
            ours = frame[12:15] == b"\x08\x00\x45" and packet[12:20] == pair and packet[9] == 1
            ours = ours and not packet[6] & 0x3F and not packet[7] and checksum(packet[:20]) == 0
            start, hops, pseudo = 20, packet[8:9], 0
        else:
            length = 40 + int.from_bytes(packet[4:6], "big")
            ours = frame[12:14] == b"\x86\xdd" and packet[8:40] == pair and packet[6] == 58
            start, hops, pseudo = 40, packet[7:8], _pseudo(theirs, own, length - 40)
        message = packet[start:length]
        if not ours or len(packet) < length or checksum(message, pseudo) != 0:
            return b"", 0
        return message, hops[0]


def _icmp(kind: int, rest: bytes, pseudo: int) -> bytes:
    message = bytes((kind, 0, 0, 0)) + rest
    return message[:2] + checksum(message, pseudo).to_bytes(2, "big") + rest


def _pseudo(source: bytes, target: bytes, length: int) -> int:
    """The sum of ICMPv6's pseudo-header (RFC 8200, section 8.1)."""
    words: tuple[int, ...] = struct.unpack("!16H", source + target)
    return sum(words) + length + 58

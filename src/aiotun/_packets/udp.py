"""UDP datagrams in IP packets, and ICMP errors about them; pure functions of bytes.

An *end* is an address followed by a port, as packed bytes: 6 bytes for IPv4, 18 for IPv6.

Sources: RFC 768 and RFC 8200, section 8.1 (UDP); RFC 792 and RFC 4443 (ICMP).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from .ipheader import IPHeader
from .native import checksum

__all__ = [
    "ICMP",
    "ICMPV6",
    "MAX_DATA",
    "TCP",
    "UDP",
    "Quoted",
    "build",
    "parse",
    "pseudo_header",
    "quoted",
]

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58

_HOPS = 64  # TTL and hop limit (RFC 1700's default)

_IPV4 = struct.Struct("!BBHHHBBH")  # RFC 791, section 3.1, up to the addresses
_IPV6 = struct.Struct("!IHBB")  # RFC 8200, section 3, up to the addresses
_UDP = struct.Struct("!HHHH")
_ICMP = struct.Struct("!BBHI")
_ADDRESSES4, _ADDRESSES6 = struct.Struct("!4H"), struct.Struct("!16H")

MAX_DATA = {4: 65535 - 20 - 8, 6: 65535 - 8}
"""The most bytes that a datagram can carry, by IP version."""


def pseudo_header(packet: bytes, length: int, proto: int) -> int:
    """Return the sum of the pseudo-header for a message of `length` bytes in this packet."""
    layout, start = (_ADDRESSES4, 12) if packet[0] >> 4 == 4 else (_ADDRESSES6, 8)
    words: tuple[int, ...] = layout.unpack_from(packet, start)
    return sum(words) + length + proto


def parse(packet: bytes, checked: bool = False) -> tuple[bytes, bytes, bytes] | None:
    """Take a datagram out of an IP packet.

    Args:
        packet: an IP packet; bytes after its end are ignored.
        checked: whether to skip the check of UDP's checksum, because it is known to be right or is
            only partial (virtio-net's NEEDS_CSUM).

    Returns:
        The source's end, the destination's end, and the data. None if the packet is a fragment, not
        UDP, truncated, or has an invalid checksum. A host's kernel would not deliver it either.
    """
    if len(packet) < 28:
        return None
    version = packet[0] >> 4
    if version == 4:
        start = (packet[0] & 15) * 4
        end = packet[2] << 8 | packet[3]
        if packet[9] != UDP or packet[6] & 0x3F or packet[7] or start < 20:
            return None
        source, target = packet[12:16], packet[16:20]
    elif version == 6:
        start, end = 40, (packet[4] << 8 | packet[5]) + 40
        if packet[6] != UDP:
            start = _after_extensions(packet)
        source, target = packet[8:24], packet[24:40]
    else:
        return None
    if not start or not start + 8 <= end <= len(packet):
        return None
    if version == 4 and checksum(packet[:start], 0):
        return None
    _, _, length, received = _UDP.unpack_from(packet, start)
    if not 8 <= length <= end - start:
        return None
    # Zero means that there is no checksum, which IPv6 forbids (RFC 8200, section 8.1).
    if received:
        if not checked:
            datagram = packet[start : start + length]
            if checksum(datagram, pseudo_header(packet, length, UDP)):
                return None
    elif version == 6:
        return None
    return (
        source + packet[start : start + 2],
        target + packet[start + 2 : start + 4],
        packet[start + 8 : start + length],
    )


def _after_extensions(packet: bytes) -> int:
    """Return where UDP begins after IPv6 extension headers; 0 if there is none, or a fragment."""
    try:
        header = IPHeader(packet)
    except ValueError:
        return 0
    return 0 if header.proto != UDP or header.fragment else header.payload_offset


def build(source: bytes, target: bytes, data: bytes, ident: int) -> bytes:
    """Make the IP packet of a datagram. It may be larger than the MTU; see `fragments`.

    Args:
        source, target: the ends, both of the same IP version.
        data: at most `MAX_DATA` bytes.
        ident: IPv4's identification, 16 bits. Routers may fragment the packet.
    """
    length = 8 + len(data)
    addresses = source[:-2] + target[:-2]
    if len(source) == 6:
        head = _IPV4.pack(0x45, 0, 20 + length, ident, 0, _HOPS, UDP, 0)
        head = head[:10] + checksum(head + addresses, 0).to_bytes(2, "big") + addresses
    else:
        head = _IPV6.pack(6 << 28, length, UDP, _HOPS) + addresses
    ports = source[-2:] + target[-2:]
    size = length.to_bytes(2, "big")
    # The pseudo-header has the same bytes in another order, which does not change the sum.
    value = checksum(b"".join((ports, size, b"\0\0", data)), pseudo_header(head, length, UDP))
    # A checksum of zero is sent as 0xFFFF, because zero means that there is no checksum.
    return b"".join((head, ports, size, (value or 0xFFFF).to_bytes(2, "big"), data))


class Quoted(NamedTuple):
    """What an ICMP error says about a datagram that was sent before."""

    source: bytes
    """The end that sent the datagram."""
    target: bytes
    """The end that the datagram was for."""
    port_unreachable: bool
    mtu: int
    """With ICMPv6's Packet Too Big the MTU of the link that was too small, otherwise 0."""


def quoted(packet: bytes) -> Quoted | None:
    """Parse an ICMP error about a UDP datagram; None if the packet is anything else or invalid."""
    try:
        outer = IPHeader(packet)
        message = packet[outer.payload_offset : outer.total_length]
        kind, code, _, rest = _ICMP.unpack_from(message)
        inner = IPHeader(message[8:])
    except (ValueError, struct.error):
        return None
    if outer.fragment or inner.proto != UDP or inner.version != outer.version:
        return None
    if outer.version == 4:
        if (
            outer.proto != ICMP
            or checksum(message, 0)
            or checksum(packet[: outer.payload_offset], 0)
        ):
            return None
        unreachable, too_big = kind == 3, False
        refused = code == 3
    else:
        pseudo = pseudo_header(packet, len(message), ICMPV6)
        if outer.proto != ICMPV6 or checksum(message, pseudo):
            return None
        unreachable, too_big = kind == 1, kind == 2
        refused = code == 4
    sport, dport = inner.sport, inner.dport
    if sport is None or dport is None or not (unreachable or too_big):
        return None
    return Quoted(
        inner.src_bytes + sport.to_bytes(2, "big"),
        inner.dst_bytes + dport.to_bytes(2, "big"),
        unreachable and refused,
        rest if too_big else 0,
    )

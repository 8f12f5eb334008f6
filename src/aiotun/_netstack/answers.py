"""Answers that a stack sends on behalf of the address that a packet was for; pure functions.

Each takes a packet and its header, and returns the packet to send back.
"""

from __future__ import annotations

import enum
import struct

from .._packets import native
from .._packets.ipheader import IPHeader

__all__ = ["Refusal", "echo_reply", "reset", "unreachable"]

_HOPS = 64
_TCP, _ICMP, _ICMPV6 = 6, 1, 58

_IPV4 = struct.Struct("!BxH4xBB2x4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_TCP_HEADER = struct.Struct("!HHIIBB6x")
_RST_ACK = 0x14
_FIN_AND_SYN = 3

# How much of the packet an ICMP error quotes: RFC 1812, section 4.3.2.3; RFC 4443, section 2.4.
_QUOTED = {4: 576 - 28, 6: 1280 - 48}


class Refusal(enum.Enum):
    """What `admit` returns to refuse a connection or a flow with an ICMP error."""

    NET = "net"
    """Network unreachable. A Linux client sees ENETUNREACH."""
    HOST = "host"
    """Host unreachable. A Linux client sees EHOSTUNREACH."""
    PROHIBITED = "prohibited"
    """Administratively prohibited. A Linux client sees EHOSTUNREACH, with IPv6 EACCES."""


# RFC 792 (type 3), RFC 1812; RFC 4443 (type 1).
_CODES = {
    Refusal.NET: {4: 0, 6: 0},
    Refusal.HOST: {4: 1, 6: 3},
    Refusal.PROHIBITED: {4: 13, 6: 1},
    None: {4: 3, 6: 4},
}


def reset(packet: bytes, header: IPHeader) -> bytes:
    """Answer a TCP segment without ACK, such as a SYN, with a reset (RFC 9293, section 3.5.2).

    The packet must hold the whole TCP header.
    """
    at = header.payload_offset
    sport, dport, sequence, _, offset, flags = _TCP_HEADER.unpack_from(packet, at)
    taken = header.total_length - at - (offset >> 4) * 4
    taken += bin(flags & _FIN_AND_SYN).count("1")
    acknowledged = (sequence + taken) & 0xFFFF_FFFF
    segment = _TCP_HEADER.pack(dport, sport, 0, acknowledged, 5 << 4, _RST_ACK)
    return _packet(header, _TCP, segment, 16)


def unreachable(packet: bytes, header: IPHeader, refusal: Refusal | None) -> bytes:
    """Answer a packet with "destination unreachable"; None means "port unreachable"."""
    version = header.version
    code = _CODES[refusal][version]
    quoted = packet[: _QUOTED[version]]
    message = bytes([3 if version == 4 else 1, code, 0, 0, 0, 0, 0, 0]) + quoted
    return _packet(header, _ICMP if version == 4 else _ICMPV6, message, 2)


def echo_reply(packet: bytes, header: IPHeader) -> bytes:
    """Answer an echo request, which must be whole and valid. IPv4 options are left out."""
    version = header.version
    message = packet[header.payload_offset + 4 : header.total_length]
    kind = 0 if version == 4 else 129
    return _packet(header, _ICMP if version == 4 else _ICMPV6, bytes([kind, 0, 0, 0]) + message, 2)


def _packet(refused: IPHeader, protocol: int, payload: bytes, place: int) -> bytes:
    """Build a packet back to the sender; its checksum is `place` bytes into the payload."""
    source, target = refused.dst_bytes, refused.src_bytes
    covered = payload
    if protocol != _ICMP:
        covered = source + target + struct.pack("!II", len(payload), protocol) + payload
    total = native.checksum(covered, 0)
    payload = payload[:place] + total.to_bytes(2, "big") + payload[place + 2 :]
    if refused.version == 6:
        return _IPV6.pack(6 << 28, len(payload), protocol, _HOPS, source, target) + payload
    head = _IPV4.pack(0x45, 20 + len(payload), _HOPS, protocol, source, target)
    return head[:10] + native.checksum(head, 0).to_bytes(2, "big") + head[12:] + payload

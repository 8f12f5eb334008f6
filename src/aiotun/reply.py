"""The answers that every responder writes by hand; pure functions of one packet.

The argument is never changed. A checksum is brought up to date by what changed (RFC 1624) and not
computed anew: so it costs the same for any payload, and a packet that was damaged on its way stays
recognisably damaged.
"""

from __future__ import annotations

import struct

__all__ = ["icmp_echo", "icmpv6_echo"]

_HOPS = 64  # the TTL and hop limit of an answer (RFC 1700's default)

# An IPv4 header without options, then type and code as one number and the checksum of ICMP. One
# unpack and one pack: by indices and slices the same takes twice as long.
_ECHO4 = struct.Struct("!HHHHBBH4s4sHH")

# The same of IPv6 and ICMPv6.
_ECHO6 = struct.Struct("!IHBB16s16sHH")

_UNSPECIFIED = bytes(16)


def icmp_echo(packet: bytes | bytearray | memoryview) -> bytes | None:
    """Answer an ICMP echo request (RFC 792; RFC 1122, section 3.2.2.6).

    Args:
        packet: an IPv4 packet.

    Returns:
        The echo reply, or None where the packet is no echo request that may be answered: another
        version, protocol or type, a fragment (they are to be put together first), a header with
        options (a source route would have to be turned round), cut short, or from or to a multicast
        or broadcast address. Bytes behind the packet's end are left out.
    """
    if len(packet) < 28:
        return None
    (start, length, identity, fragment, ttl, protocol, header_sum,
     source, target, kind, icmp_sum) = _ECHO4.unpack_from(packet)  # fmt: skip
    # Version 4, a 20-byte header; no fragment; ICMP (1); echo request (8), code 0.
    if start >> 8 != 0x45 or fragment & 0x3FFF or protocol != 1 or kind != 0x0800:
        return None
    # Not from nowhere ("this" network, 0), nor from or to a group or everybody (224 and above).
    if not 0 < source[0] < 224 or target[0] >= 224:
        return None
    if length != len(packet):
        if not 28 <= length < len(packet):
            return None
        packet = packet[:length]
    # RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). In the IP header only the TTL changes its value:
    # source and destination change places, which no sum sees.
    header_sum = (header_sum + ((ttl - _HOPS) << 8)) % 0xFFFF
    # The ICMP type falls from 8 to 0, so its checksum grows by 0x0800. Of the two zeroes this gives
    # 0xffff, which is right for any message; 0 would be wrong for one that is all zero.
    icmp_sum += 0x0800
    icmp_sum = (icmp_sum & 0xFFFF) + (icmp_sum >> 16)
    head = _ECHO4.pack(
        start, length, identity, fragment, _HOPS, 1, header_sum, target, source, 0, icmp_sum
    )
    return head + packet[24:]


def icmpv6_echo(packet: bytes | bytearray | memoryview) -> bytes | None:
    """Answer an ICMPv6 echo request (RFC 4443, sections 4.1 and 4.2).

    Args:
        packet: an IPv6 packet.

    Returns:
        The echo reply, or None where the packet is no echo request that may be answered: another
        version or type, anything between the IPv6 and the ICMPv6 header (fragments among it), cut
        short, or from or to a multicast or unspecified address. Bytes behind the packet's end are
        left out.
    """
    if len(packet) < 48:
        return None
    start, length, following, _, source, target, kind, icmp_sum = _ECHO6.unpack_from(packet)
    # Version 6; ICMPv6 (58) follows at once; echo request (128), code 0.
    if start >> 28 != 6 or following != 58 or kind != 0x8000:
        return None
    if source[0] == 0xFF or target[0] == 0xFF or source == _UNSPECIFIED:
        return None
    if length + 40 != len(packet):
        if not 8 <= length < len(packet) - 40:
            return None
        packet = packet[: length + 40]
    # The sum covers the addresses, but does not see their order. The type grows from 128 to 129, so
    # it falls by 0x0100 (RFC 1624, equation 3).
    icmp_sum -= 0x0100
    icmp_sum = (icmp_sum & 0xFFFF) - (icmp_sum < 0)
    head = _ECHO6.pack(start, length, 58, _HOPS, target, source, 0x8100, icmp_sum)
    return head + packet[44:]

"""Which flow a packet belongs to, told cheaply and the same for both directions; pure."""

from __future__ import annotations

from zlib import crc32

__all__ = ["flow_hash"]

# Protocols whose header begins with the two ports: TCP, UDP, DCCP, SCTP, UDP-Lite (IANA numbers).
_WITH_PORTS = frozenset({6, 17, 33, 132, 136})

_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = b"\x08\x00", b"\x86\xdd"
_VLAN_TAGS = (b"\x81\x00", b"\x88\xa8")


def flow_hash(packet: bytes, start: int, *, frame: bool) -> int:
    """Give a number that is the same for all packets of a flow, whichever way they go.

    It is made of the addresses and, where there are such, the ports. All fragments of a packet must
    keep together, and only the first has ports: for fragments it is the addresses alone. What is no
    IP goes by its MAC addresses. Any bytes will do; there is no wrong packet here.

    Args:
        packet: the packet or frame.
        start: where in it the packet begins, behind headers that are not its own.
        frame: whether it is an Ethernet frame.
    """
    if frame:
        ethertype = packet[start + 12 : start + 14]
        ip = start + 14
        while ethertype in _VLAN_TAGS:
            ethertype = packet[ip + 2 : ip + 4]
            ip += 4
        if ethertype not in (_ETHERTYPE_IPV4, _ETHERTYPE_IPV6):
            return _pair(packet[start : start + 6], packet[start + 6 : start + 12])
        start = ip
    if len(packet) < start + 20:
        return 0
    version = packet[start] >> 4
    if version == 4:
        source, target = packet[start + 12 : start + 16], packet[start + 16 : start + 20]
        ports = start + (packet[start] & 15) * 4
        fragment = packet[start + 6] & 0x3F or packet[start + 7]
        protocol = packet[start + 9]
    else:
        source, target = packet[start + 8 : start + 24], packet[start + 24 : start + 40]
        ports = start + 40
        fragment = 0  # a fragment header is a protocol of its own, and has no ports
        protocol = packet[start + 6]
    if protocol in _WITH_PORTS and not fragment:
        source += packet[ports : ports + 2]
        target += packet[ports + 2 : ports + 4]
    return _pair(source, target)


def _pair(one: bytes, other: bytes) -> int:
    # A sum, not an exclusive or: CRCs are linear, and would cancel out what the two have in common.
    return crc32(one) + crc32(other)

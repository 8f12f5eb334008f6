"""A cheap hash of a packet's flow, which is the same in both directions; no I/O."""

from __future__ import annotations

from zlib import crc32

__all__ = ["flow_hash"]

# Protocols whose header begins with two ports: TCP, UDP, DCCP, SCTP, UDP-Lite (IANA numbers).
_WITH_PORTS = frozenset({6, 17, 33, 132, 136})

_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = b"\x08\x00", b"\x86\xdd"
_VLAN_TAGS = (b"\x81\x00", b"\x88\xa8")


def flow_hash(packet: bytes, start: int, *, frame: bool) -> int:
    """Return a number that is the same for all packets of a flow, in both directions.

    It is a hash of the addresses and the ports, if there are ports. For fragments it is a hash of
    the addresses alone, because all fragments of a packet must stay together and only the first one
    has the ports. For frames that are not IP it is a hash of the MAC addresses. Any bytes are
    accepted, and no error is raised.

    Args:
        packet: the packet or frame.
        start: the offset at which the packet begins, after any virtio-net or ``tun_pi`` header.
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
        fragment = 0  # in IPv6 a fragment has the protocol 44, which is not in _WITH_PORTS
        protocol = packet[start + 6]
    if protocol in _WITH_PORTS and not fragment:
        source += packet[ports : ports + 2]
        target += packet[ports + 2 : ports + 4]
    return _pair(source, target)


def _pair(one: bytes, other: bytes) -> int:
    # A sum, not an exclusive or: CRCs are linear, so the bits that both sides share would cancel.
    return crc32(one) + crc32(other)

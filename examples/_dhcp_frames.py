"""The frames that carry DHCP: Ethernet, IPv4 and UDP; and ARP. Pure functions."""

import dataclasses
import struct
from ipaddress import IPv4Address

from _dhcp_message import NOBODY, MalformedError, Message, Type
from _priority import tagged, untagged

from aiotun.offload import checksum

__all__ = ["EVERYBODY", "Arp", "Datagram", "arp_probe", "deliver", "read_arp", "read_udp", "udp"]

EVERYBODY = b"\xff" * 6
_EVERYBODY4 = IPv4Address("255.255.255.255")
_SERVER, _CLIENT = 67, 68  # UDP ports
_UDP = 17

# Ethernet; IPv4 without options (RFC 791); UDP (RFC 768).
_ETHERNET = struct.Struct("!6s6sH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_PORTS = struct.Struct("!HHHH")
# Ethernet and ARP for IPv4 (RFC 826).
_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")
_ARP_FIXED = (0x0806, 1, 0x0800, 6, 4)


@dataclasses.dataclass(frozen=True)
class Datagram:
    """A datagram to the server's port, and its sender."""

    sender_mac: bytes
    target: IPv4Address
    payload: bytes
    tag: bytes = b""  # a tag of VLAN 0, which the answer repeats


def read_udp(frame: bytes) -> Datagram | None:
    """Read a datagram to port 67; returns None for any other frame.

    Raises:
        MalformedError: it is one, but truncated, damaged, or a fragment.
    """
    frame, tag = untagged(frame)
    if frame[12:14] != b"\x08\x00" or frame[23:24] != bytes((_UDP,)):
        return None
    packet = frame[14:]
    header = (packet[0] & 15) * 4
    length = int.from_bytes(packet[2:4], "big")
    if packet[0] >> 4 != 4 or header < 20 or not header + 8 <= length <= len(packet):
        raise MalformedError("no IPv4 packet")
    if packet[6] & 0x3F or packet[7]:
        # Only the first fragment has the port, but the server can't use any of them.
        raise MalformedError("a fragment")
    _, port, udp_length, udp_sum = _PORTS.unpack_from(packet, header)
    if port != _SERVER:
        return None
    if not 8 <= udp_length <= length - header or checksum(packet[:header]) != 0:
        raise MalformedError("lengths, or the header's checksum")
    segment = packet[header : header + udp_length]
    if udp_sum and checksum(segment, _pseudo(packet[12:20], udp_length)) != 0:
        raise MalformedError("checksum")
    return Datagram(frame[6:12], IPv4Address(packet[16:20]), segment[8:], tag)


def udp(
    macs: tuple[bytes, bytes],
    addresses: tuple[IPv4Address, IPv4Address],
    ports: tuple[int, int],
    payload: bytes,
) -> bytes:
    """Write a datagram in its frame; each pair is source and destination."""
    length = 8 + len(payload)
    pair = addresses[0].packed + addresses[1].packed
    head = _IPV4.pack(0x45, 0, 20 + length, 0, 0, 64, _UDP, 0, pair[:4], pair[4:])
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    segment = _PORTS.pack(*ports, length, 0) + payload
    value = checksum(segment, _pseudo(pair, length)) or 0xFFFF  # RFC 768: 0 means none
    return (
        _ETHERNET.pack(macs[1], macs[0], 0x0800)
        + head
        + segment[:6]
        + value.to_bytes(2, "big")
        + payload
    )


def _pseudo(pair: bytes, length: int) -> int:
    total: int = sum(struct.unpack("!4H", pair))
    return total + _UDP + length


def deliver(answer: Message, asker: Datagram, mac: bytes, address: IPv4Address) -> bytes:
    """Wrap an answer in a frame to its receiver (RFC 2131, section 4.1).

    A client without an address can't answer ARP, so its MAC is taken from the message. For other
    receivers, including relays, it is the source MAC of the request.
    """
    target, port, target_mac = answer.yiaddr, _CLIENT, answer.chaddr
    if answer.giaddr != NOBODY:
        target, port, target_mac = answer.giaddr, _SERVER, asker.sender_mac
    elif answer.type is Type.NAK:
        target, target_mac = _EVERYBODY4, EVERYBODY
    elif answer.ciaddr != NOBODY:
        target, target_mac = answer.ciaddr, asker.sender_mac
    elif answer.broadcast or target == NOBODY:
        target, target_mac = _EVERYBODY4, EVERYBODY
    frame = udp((mac, target_mac), (address, target), (_SERVER, port), answer.pack())
    return tagged(frame, asker.tag)


@dataclasses.dataclass(frozen=True)
class Arp:
    """A sender's MAC and address in ARP."""

    sender_mac: bytes
    sender: IPv4Address


def read_arp(frame: bytes) -> Arp | None:
    """Read an ARP request or answer for IPv4 on Ethernet; returns None for any other frame."""
    frame, _ = untagged(frame)
    if len(frame) < _ARP.size:
        return None
    _, _, *fixed, operation, sender_mac, sender, _, _ = _ARP.unpack_from(frame)
    if tuple(fixed) != _ARP_FIXED or operation not in (1, 2):
        return None
    return Arp(sender_mac, IPv4Address(sender))


def arp_probe(mac: bytes, address: IPv4Address) -> bytes:
    """Ask who has an address. The sender address is 0.0.0.0, so caches don't change (RFC 5227)."""
    return _ARP.pack(EVERYBODY, mac, *_ARP_FIXED, 1, mac, NOBODY.packed, bytes(6), address.packed)

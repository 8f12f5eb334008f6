"""Replies to pings, ARP requests and neighbor solicitations; pure functions of one packet or frame.

The argument is never changed. The checksum of an echo reply is not computed from scratch, but
updated for the fields that change (RFC 1624). This takes the same time for any payload, and a
packet that was corrupted on its way still has an invalid checksum.
"""

from __future__ import annotations

import functools
import struct
import time
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from ._kernel.words import parse_mac
from .offload import checksum

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["arp", "ethernet", "icmp_echo", "icmpv6_echo", "neighbour_advertisement"]

_HOPS = 64  # the TTL and hop limit of a reply (RFC 1700's default)

# An IPv4 header without options, then ICMP's type and code as one number, and its checksum. One
# unpack and one pack take half as long as indices and slices.
_ECHO4 = struct.Struct("!HHHHBBH4s4sHH")

# IPv4 options (RFC 791, section 3.1), and the kinds of time stamps.
_END, _NO_OPERATION, _RECORD_ROUTE, _TIME_STAMP = 0, 1, 7, 68
_SOURCE_ROUTES = (131, 137)
_TIMES_ONLY, _WITH_ADDRESSES, _PRESPECIFIED = 0, 1, 3
_DAY = 86_400_000  # milliseconds

# The same for IPv6 and ICMPv6.
_ECHO6 = struct.Struct("!IHBB16s16sHH")

_UNSPECIFIED = bytes(16)

# An Ethernet header and ARP for Ethernet and IPv4 (RFC 826).
_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")
_ARP_FIXED = (0x0806, 1, 0x0800, 6, 4)  # ARP, Ethernet, IPv4, and the lengths of their addresses
_BROADCAST = b"\xff" * 6
_VLAN_TAGS = (b"\x81\0", b"\x88\xa8")  # 802.1Q and 802.1ad

# An Ethernet and an IPv6 header, then a neighbor solicitation or advertisement (RFC 4861, sections
# 4.3 and 4.4) up to its options: type and code as one number, checksum, flags, target.
_ND = struct.Struct("!6s6sHIHBB16s16sHHI16s")
_ND_ADDRESSES = slice(22, 54)  # source and destination in the frame, as in the pseudo-header
_SOLICITATION, _ADVERTISEMENT = 135 << 8, 136 << 8
_SOURCE_LINK, _TARGET_LINK = 1, 2  # options
_SOLICITED, _OVERRIDE = 0x4000_0000, 0x2000_0000
_ALL_NODES = IPv6Address("ff02::1").packed
_SOLICITED_NODE = IPv6Address("ff02::1:ff00:0").packed[:13]  # RFC 4291, section 2.7.1


def icmp_echo(
    packet: bytes | bytearray | memoryview,
    *,
    addresses: Container[IPv4Address | IPv6Address] | None = None,
) -> bytes | None:
    """Answer an ICMP echo request (RFC 792; RFC 1122, section 3.2.2.6).

    Args:
        packet: an IPv4 packet.
        addresses: the addresses to answer for, as for `arp`. None answers for every unicast
            address.

    Returns:
        The echo reply, or None if the packet is not an echo request that may be answered. That is
        another version, protocol or type; a fragment (reassemble it first); a source route (RFC
        7126 advises against following one); invalid options; a truncated packet; a multicast or
        broadcast address as source or destination; or a destination that is not one of the
        `addresses`. Bytes after the packet's end are left out.

        The reply has the request's record route and time stamp options (``ping -R``, ``ping -T``),
        with an entry of this host: the packet's destination, and the time of the system's clock.
        Other options are replaced by "no operation".
    """
    if len(packet) < 28:
        return None
    (start, length, identity, fragment, ttl, protocol, header_sum,
     source, target, kind, icmp_sum) = _ECHO4.unpack_from(packet)  # fmt: skip
    if start >> 12 == 4 and start >> 8 > 0x45:
        return _echo_with_options(packet, addresses)
    # Version 4, a 20-byte header; not a fragment; ICMP (1); echo request (8), code 0.
    if start >> 8 != 0x45 or fragment & 0x3FFF or protocol != 1 or kind != 0x0800:
        return None
    # The source must not be in "this" network (0). Neither source nor destination may be multicast
    # or broadcast (224 and above).
    if not 0 < source[0] < 224 or target[0] >= 224:
        return None
    if addresses is not None and not _is_listed(IPv4Address(target), addresses):
        return None
    if length != len(packet):
        if not 28 <= length < len(packet):
            return None
        packet = packet[:length]
    # RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). In the IP header only the TTL changes its value.
    # Source and destination change places, which does not change the sum.
    header_sum = (header_sum + ((ttl - _HOPS) << 8)) % 0xFFFF
    # The ICMP type changes from 8 to 0, so its checksum grows by 0x0800. One's complement has two
    # zeros, and this results in 0xffff. That is right for any message; 0 would be wrong for one
    # that is all zero.
    icmp_sum += 0x0800
    icmp_sum = (icmp_sum & 0xFFFF) + (icmp_sum >> 16)
    head = _ECHO4.pack(
        start, length, identity, fragment, _HOPS, 1, header_sum, target, source, 0, icmp_sum
    )
    return head + packet[24:]


def _is_listed(
    address: IPv4Address | IPv6Address, addresses: Container[IPv4Address | IPv6Address]
) -> bool:
    """Whether to answer for an address.

    Raises:
        TypeError: `addresses` is a collection of what can never be equal to an address.
    """
    if address in addresses:
        return True
    if isinstance(addresses, (set, frozenset, list, tuple, dict)):
        for first in addresses:
            if type(first) not in (IPv4Address, IPv6Address):
                raise TypeError(
                    f"addresses must hold addresses of the ipaddress module, got {first!r}, which "
                    "never matches; write ipaddress.ip_address(...)"
                )
            break
    return False


def _echo_with_options(
    packet: bytes | bytearray | memoryview, addresses: Container[IPv4Address | IPv6Address] | None
) -> bytes | None:
    """Answer the packet as if it had no options, and insert the reply's options."""
    size, length = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    if not size + 8 <= length <= len(packet):
        return None
    options = bytes(packet[20:size])
    answered = _answered_options(options, bytes(packet[16:20]))
    if answered is None:
        return None
    plain = bytearray(packet[:20]) + packet[size:length]
    plain[0] = 0x45
    plain[2:4] = len(plain).to_bytes(2, "big")
    answer = icmp_echo(plain, addresses=addresses)
    if answer is None:
        return None
    head = bytearray(answer[:20])
    head[:4] = packet[:4]
    # RFC 1624 again. The header's first four bytes equal the request's, so the sum changes only by
    # the options.
    header_sum = int.from_bytes(head[10:12], "big")
    header_sum += int.from_bytes(options, "big") - int.from_bytes(answered, "big")
    head[10:12] = (header_sum % 0xFFFF).to_bytes(2, "big")
    return bytes(head) + answered + answer[20:]


def _answered_options(options: bytes, host: bytes) -> bytes | None:
    """Return a reply's options, as long as the request's; None if we must not reply."""
    made = bytearray(options)
    at = 0
    while at < len(made) and made[at] != _END:
        if made[at] == _NO_OPERATION:
            at += 1
            continue
        end = at + made[at + 1] if at + 1 < len(made) else 0
        if end < at + 2 or end > len(made) or made[at] in _SOURCE_ROUTES:
            return None
        option: bytes | None = bytes([_NO_OPERATION]) * (end - at)
        if made[at] == _RECORD_ROUTE:
            option = _recorded(made[at:end], host)
        elif made[at] == _TIME_STAMP:
            option = _stamped(made[at:end], host)
        if option is None:
            return None
        made[at:end] = option
        at = end
    return bytes(made)


def _recorded(option: bytearray, host: bytes) -> bytes | None:
    """Enter a host into a record route option; if the option is full, return it unchanged."""
    place = option[2] - 1 if len(option) > 2 else 0  # the pointer counts from 1
    if place < 3 or len(option) > place > len(option) - 4:
        return None
    if place < len(option):
        option[place : place + 4] = host
        option[2] += 4
    return bytes(option)


def _stamped(option: bytearray, host: bytes) -> bytes | None:
    """Enter a host and the time into a time stamp option, or count that there was no room."""
    place = option[2] - 1 if len(option) > 3 else 0
    kind = option[3] & 15 if len(option) > 3 else _TIMES_ONLY
    size = 4 if kind == _TIMES_ONLY else 8
    if place < 4 or kind not in (_TIMES_ONLY, _WITH_ADDRESSES, _PRESPECIFIED):
        return None
    if place >= len(option):  # full: count a missed entry, unless the hosts are prespecified
        if option[3] >> 4 == 15:
            return None
        option[3] += (kind != _PRESPECIFIED) << 4
        return bytes(option)
    if place + size > len(option):
        return None
    if kind == _PRESPECIFIED and option[place : place + 4] != host:
        return bytes(option)
    now = (time.time_ns() // 1_000_000 % _DAY).to_bytes(4, "big")
    option[place : place + size] = now if kind == _TIMES_ONLY else host + now
    option[2] += size
    return bytes(option)


def icmpv6_echo(
    packet: bytes | bytearray | memoryview,
    *,
    addresses: Container[IPv4Address | IPv6Address] | None = None,
) -> bytes | None:
    """Answer an ICMPv6 echo request (RFC 4443, sections 4.1 and 4.2).

    Args:
        packet: an IPv6 packet.
        addresses: the addresses to answer for, as for `neighbour_advertisement`. None answers for
            every unicast address.

    Returns:
        The echo reply, or None if the packet is not an echo request that may be answered. That is
        another version or type; a header between the IPv6 and the ICMPv6 header, such as a
        fragment's; a truncated packet; a multicast or unspecified address as source or
        destination; or a destination that is not one of the `addresses`. Bytes after the packet's
        end are left out.
    """
    if len(packet) < 48:
        return None
    start, length, following, _, source, target, kind, icmp_sum = _ECHO6.unpack_from(packet)
    # Version 6; ICMPv6 (58) is the next header; echo request (128), code 0.
    if start >> 28 != 6 or following != 58 or kind != 0x8000:
        return None
    if source[0] == 0xFF or target[0] == 0xFF or source == _UNSPECIFIED:
        return None
    if addresses is not None and not _is_listed(IPv6Address(target), addresses):
        return None
    if length + 40 != len(packet):
        if not 8 <= length < len(packet) - 40:
            return None
        packet = packet[: length + 40]
    # The checksum covers the addresses, but not their order. The type changes from 128 to 129, so
    # the checksum falls by 0x0100 (RFC 1624, equation 3).
    icmp_sum -= 0x0100
    icmp_sum = (icmp_sum & 0xFFFF) - (icmp_sum < 0)
    head = _ECHO6.pack(start, length, 58, _HOPS, target, source, 0x8100, icmp_sum)
    return head + packet[44:]


def ethernet(
    frame: bytes | bytearray | memoryview, packet: bytes | None, mac: str | bytes
) -> bytes | None:
    """Put the answer to a frame's packet into a frame that goes back to the sender.

    The frame's EtherType stays, and so do its VLAN tags. So for a frame without tags::

        answer = reply.ethernet(frame, reply.icmp_echo(frame[14:], addresses=OURS), MAC)

    Args:
        frame: the Ethernet frame to answer.
        packet: the answer, or None if there is none.
        mac: the MAC to answer with, as `"02:00:00:00:00:01"` or 6 bytes.

    Returns:
        The answer's frame. None if `packet` is None, if the frame has no whole header, if it is
        addressed to another unicast MAC, or if its source is not a unicast MAC.

    Raises:
        ValueError: `mac` is not a valid unicast MAC.
        TypeError: `addresses` holds no addresses.
    """
    ours = _mac(mac)
    receiver, sender = bytes(frame[:6]), bytes(frame[6:12])
    at = 12
    while frame[at : at + 2] in _VLAN_TAGS:
        at += 4
    if packet is None or len(frame) < at + 2 or not _unicast(sender):
        return None
    if receiver != ours and _unicast(receiver):
        return None
    return sender + ours + bytes(frame[12 : at + 2]) + packet


def arp(
    frame: bytes | bytearray | memoryview,
    mac: str | bytes,
    addresses: Container[IPv4Address | IPv6Address],
) -> bytes | None:
    """Answer an ARP request (RFC 826; RFC 5227).

    Args:
        frame: an Ethernet frame.
        mac: the MAC to answer with, as `"02:00:00:00:00:01"` or 6 bytes.
        addresses: the addresses to answer for. Any object works that supports ``in`` with an
            `IPv4Address`: a set, which may hold IPv6 addresses too, or an `IPv4Network` (which
            includes its broadcast address). A set of text or of interface objects is a
            TypeError at the first address that is not in it.

    Returns:
        The reply, as a frame of 42 bytes. None if the frame is not an ARP request for one of the
        IPv4 `addresses` on Ethernet, if it is addressed to another MAC, or if the sender's MAC or
        IP address is not unicast. A probe, from 0.0.0.0, is answered: its sender wants to know
        whether the address is taken. An announcement, with the same sender and target, is not
        answered. The reply to a priority-tagged frame (a tag of VLAN 0, which is the same network;
        IEEE 802.1Q) has the same tag, and 46 bytes. Frames of other VLANs are not answered, because
        these are other networks with their own addresses.

    Raises:
        ValueError: `mac` is not a valid unicast MAC.
        TypeError: `addresses` holds no addresses.
    """
    ours = _mac(mac)
    if tag := _priority_tag(frame):
        return _tagged(_arp(_untagged(frame), ours, addresses), tag)
    return _arp(frame, ours, addresses)


def _arp(
    frame: bytes | bytearray | memoryview,
    ours: bytes,
    addresses: Container[IPv4Address | IPv6Address],
) -> bytes | None:
    if len(frame) < 42:
        return None
    (receiver, _, ethertype, hardware, protocol, hardware_length, protocol_length, operation,
     sender_mac, sender, _, target) = _ARP.unpack_from(frame)  # fmt: skip
    fixed = (ethertype, hardware, protocol, hardware_length, protocol_length)
    if fixed != _ARP_FIXED or operation != 1 or receiver not in (ours, _BROADCAST):
        return None
    if not _unicast(sender_mac) or sender == target or sender[0] >= 224:
        return None
    if not _is_listed(IPv4Address(target), addresses):
        return None
    return _ARP.pack(sender_mac, ours, *_ARP_FIXED, 2, ours, target, sender_mac, sender)


def neighbour_advertisement(
    frame: bytes | bytearray | memoryview,
    mac: str | bytes,
    addresses: Container[IPv4Address | IPv6Address],
) -> bytes | None:
    """Answer a neighbor solicitation (RFC 4861, sections 7.1.1 and 7.2.4).

    Args:
        frame: an Ethernet frame.
        mac: the MAC to answer with, as `"02:00:00:00:00:01"` or 6 bytes.
        addresses: the addresses to answer for. Any object works that supports ``in`` with an
            `IPv6Address`: a set, which may hold IPv4 addresses too, or an `IPv6Network`. A set of
            text or of interface objects is a TypeError at the first address that is not in it.

    Returns:
        The advertisement, as a frame of 86 bytes, with the flags *solicited* and *override*. None
        if the frame is not a solicitation for one of the `addresses`, if it is invalid by RFC 4861,
        or if it is addressed to another MAC, or to an address other than the target or its
        solicited-node group. A solicitation from :: (duplicate address detection, RFC 4862) is
        answered to all nodes, without the flag *solicited*. The reply goes to the MAC in the source
        link-layer address option; without the option, to the frame's source. The reply to a
        priority-tagged frame (VLAN 0) has the same tag, and 90 bytes. Frames of other VLANs are not
        answered, because these are other networks.

    Raises:
        ValueError: `mac` is not a valid unicast MAC.
    """
    ours = _mac(mac)
    if tag := _priority_tag(frame):
        return _tagged(_advertisement(_untagged(frame), ours, addresses), tag)
    return _advertisement(frame, ours, addresses)


def _advertisement(
    frame: bytes | bytearray | memoryview,
    ours: bytes,
    addresses: Container[IPv4Address | IPv6Address],
) -> bytes | None:
    if len(frame) < _ND.size:
        return None
    (receiver, sender_mac, ethertype, start, length, following, hops, source, destination, kind, _,
     _, target) = _ND.unpack_from(frame)  # fmt: skip
    # A hop limit of 255 proves that no router has forwarded the packet.
    if (ethertype, start >> 28, following, hops, kind) != (0x86DD, 6, 58, 255, _SOLICITATION):
        return None
    if not 24 <= length <= len(frame) - 54 or target[0] == 0xFF or source[0] == 0xFF:
        return None
    group = _SOLICITED_NODE + target[13:]
    # A bridge may send multicast packets in unicast frames (RFC 6085). So a packet to the group may
    # also come to our MAC.
    if destination == group:
        if receiver not in (ours, b"\x33\x33" + group[12:]):
            return None
    elif destination != target or receiver != ours:
        return None
    message = frame[54 : 54 + length]
    pseudo = int.from_bytes(frame[_ND_ADDRESSES], "big") + length + 58
    options = _options(message[24:])
    if options is None or checksum(message, pseudo) != 0 or source == target:
        return None
    link = options.get(_SOURCE_LINK)
    if source == _UNSPECIFIED:
        if link is not None or destination != group:
            return None
        flags, source, receiver = _OVERRIDE, _ALL_NODES, b"\x33\x33\0\0\0\1"
    else:
        flags, receiver = _SOLICITED | _OVERRIDE, sender_mac if link is None else link[:6]
        if not _unicast(receiver):
            return None
    if not _is_listed(IPv6Address(target), addresses):
        return None
    option = bytes((_TARGET_LINK, 1)) + ours
    pseudo = int.from_bytes(target + source + target + option, "big")
    value = checksum(struct.pack("!HI", _ADVERTISEMENT, flags), pseudo + 32 + 58)
    head = _ND.pack(receiver, ours, 0x86DD, 6 << 28, 32, 58, 255, target, source,
                    _ADVERTISEMENT, value, flags, target)  # fmt: skip
    return head + option


def _priority_tag(frame: bytes | bytearray | memoryview) -> bytes:
    """Return the VLAN tag of a frame of VLAN 0, which has only a priority; otherwise no bytes."""
    tag = bytes(frame[12:16])
    priority_only = len(tag) == 4 and tag[:2] in _VLAN_TAGS and not tag[2] & 0xF and not tag[3]
    return tag if priority_only else b""


def _untagged(frame: bytes | bytearray | memoryview) -> bytes:
    return bytes(frame[:12]) + bytes(frame[16:])


def _tagged(frame: bytes | None, tag: bytes) -> bytes | None:
    return frame and frame[:12] + tag + frame[12:]


def _options(data: bytes | bytearray | memoryview) -> dict[int, bytes] | None:
    """Parse the options of a message (RFC 4861, section 4.6); None if one is invalid."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if at + 2 > len(data) or data[at + 1] == 0 or at + data[at + 1] * 8 > len(data):
            return None
        end = at + data[at + 1] * 8
        found.setdefault(data[at], bytes(data[at + 2 : end]))
        at = end
    return found


def _unicast(mac: bytes) -> bool:
    return not mac[0] & 1 and any(mac)


@functools.lru_cache
def _mac(mac: str | bytes) -> bytes:
    """Parse a MAC. Cached, since a responder passes the same MAC in each call."""
    packed = bytes.fromhex(parse_mac(mac).replace(":", "")) if isinstance(mac, str) else mac
    if len(packed) != 6 or not _unicast(packed):
        raise ValueError(
            f"{mac!r} is not a valid unicast MAC; give 6 bytes, the first of them even and not all "
            "zero"
        )
    return packed

"""Encodes dpkt objects; see `aiotun.encode`. Imported when the first packet is encoded.

dpkt computes a checksum only if the field is zero, stores it in the object, and does not update it
afterwards. It never updates the lengths of UDP and IPv6, or the sizes of headers with options. So
this module writes the layers with lengths and checksums itself, field by field. dpkt writes the
other layers.
"""

from __future__ import annotations

import contextlib
import copy
import struct

from dpkt import Packet
from dpkt.ethernet import (
    ETH_TYPE_8021AD,
    ETH_TYPE_8021Q,
    ETH_TYPE_IPX,
    ETH_TYPE_MPLS,
    ETH_TYPE_MPLS_MCAST,
    Ethernet,
    MPLSlabel,
    VLANtag8021Q,
)
from dpkt.icmp import ICMP
from dpkt.icmp6 import ICMP6
from dpkt.igmp import IGMP
from dpkt.ip import IP
from dpkt.ip6 import (
    EXT_HDRS,
    IP6,
    IP6AHHeader,
    IP6DstOptsHeader,
    IP6ESPHeader,
    IP6ExtensionHeader,
    IP6FragmentHeader,
    IP6HopOptsHeader,
    IP6RoutingHeader,
)
from dpkt.llc import LLC
from dpkt.ospf import OSPF
from dpkt.pim import PIM
from dpkt.pppoe import PPP, PPPoE
from dpkt.sctp import SCTP
from dpkt.tcp import TCP
from dpkt.udp import UDP

from .native import checksum

__all__ = ["check", "encoded", "written_here"]

# IANA's protocol numbers of the layers that this module writes.
_NUMBERS: dict[type[Packet], int] = {
    ICMP: 1,
    IP: 4,
    TCP: 6,
    UDP: 17,
    IP6: 41,
    ICMP6: 58,
    IP6HopOptsHeader: 0,
    IP6RoutingHeader: 43,
    IP6FragmentHeader: 44,
    IP6ESPHeader: 50,
    IP6AHHeader: 51,
    IP6DstOptsHeader: 60,
}

# The layers that this module writes field by field, and those of them for which dpkt keeps parts
# outside of `data`.
_WRITTEN_HERE = (IP, UDP, TCP, IP6, Ethernet)
_WITH_MORE = (IP6, Ethernet)

# For these dpkt computes the checksum if the field is zero. It does so without a pseudo-header,
# which is right only for IPv4.
_SUMMED_BY_DPKT = (IGMP, OSPF, PIM, SCTP)

# The ethertypes of VLAN tags: 802.1Q, 802.1ad, and two that were used before 802.1ad.
_TAGGED = frozenset({ETH_TYPE_8021Q, ETH_TYPE_8021AD, 0x9100, 0x9200})


def encoded(packet: IP | IP6 | Ethernet) -> bytes:
    """Encode a packet or frame; see `aiotun.encode`."""
    if not isinstance(packet, IP | IP6 | Ethernet):
        raise TypeError(
            f"encode needs one of dpkt's IP, IP6 and Ethernet, which a device can send, "
            f"got {type(packet).__name__}"
        )
    try:
        return _layer(packet)
    except ValueError:
        raise
    # A field may hold a value of any type: text for an address, a number that does not fit, None.
    except Exception as error:
        text = f"this {type(packet).__name__} can't be encoded ({type(error).__name__}: {error})"
        raise ValueError(text) from error


def written_here(packet: IP | IP6 | Ethernet) -> bool:
    """Return whether this module writes all layers itself, so that nothing can be lost."""
    layer: object = packet
    while isinstance(layer, _WRITTEN_HERE):
        if isinstance(layer, _WITH_MORE) and _beside(layer):
            return False
        layer = layer.data
    return isinstance(layer, bytes)


def check(packet: IP | IP6 | Ethernet, again: IP | IP6 | Ethernet, data: bytes) -> None:
    """Check that an encoded packet is decoded to the same layers: dpkt may leave some out.

    Args:
        packet: the packet that was encoded.
        again: the packet decoded from `data`.
        data: the encoded bytes.

    Raises:
        ValueError: the layers differ.
    """
    one: object = packet
    other: object = again
    while isinstance(one, Packet) and isinstance(other, Packet):
        if type(one) is not type(other) or _beside(one) != _beside(other):
            raise ValueError(
                f"the layers of this {type(packet).__name__} can't be encoded together: "
                f"{_named(one)} would be decoded as {_named(other)}"
            )
        one, other = one.data, other.data
    # Compare the bytes only if no layers are left. If `data` was bytes, dpkt may decode them to a
    # layer, for which `_layer` would compute other lengths and checksums.
    if not isinstance(other, Packet) and _layer(again) != data:
        raise ValueError(
            f"this {type(packet).__name__} changes when it is encoded, decoded and encoded again"
        )


def _beside(layer: Packet) -> list[str]:
    """Return what dpkt keeps outside of a layer's `data`, as text."""
    if isinstance(layer, IP6):
        return [type(header).__name__ for header in _extensions(layer)]
    if not isinstance(layer, Ethernet):
        return []
    tags = getattr(layer, "vlan_tags", None) or ()
    labels = getattr(layer, "mpls_labels", None) or ()
    return [
        *(f"VLAN {tag.id} {tag.pri}" for tag in tags),
        *(f"label {label.val} {label.exp} {label.ttl}" for label in labels),
    ]


def _named(layer: Packet) -> str:
    return ", ".join([type(layer).__name__, *_beside(layer)])


def _layer(layer: object) -> bytes:
    if isinstance(layer, IP):
        return _ip4(layer)
    if isinstance(layer, IP6):
        return _ip6(layer)
    if isinstance(layer, Ethernet):
        return _frame(layer)
    if isinstance(layer, PPPoE):
        return _pppoe(layer)
    return _verbatim(layer)


def _verbatim(layer: object) -> bytes:
    """Write a layer with the lengths and checksums that it has, and don't change the layer.

    This is for a fragment, and for a packet that an ICMP error quotes: their lengths and checksums
    are about the whole packet, of which we have only a part.
    """
    if isinstance(layer, bytes | bytearray | memoryview):
        return bytes(layer)
    if not isinstance(layer, Packet):
        raise TypeError(
            f"a layer's data must be bytes or a dpkt object, got {type(layer).__name__}"
        )
    if isinstance(layer, IP | TCP):
        return layer.pack_hdr() + bytes(layer.opts) + _verbatim(layer.data)
    if isinstance(layer, IP6):
        extensions = b"".join(map(_stated, _extensions(layer)))
        return layer.pack_hdr() + extensions + _verbatim(layer.data)
    kind = type(layer)
    plain = kind.__bytes__ is Packet.__bytes__ and kind.pack_hdr is Packet.pack_hdr
    if plain or kind is ICMP:
        return layer.pack_hdr() + _verbatim(layer.data)
    # Copy the layer: for some classes bytes() stores the checksum in the object.
    return _whole(bytes(copy.deepcopy(layer)), layer)


def _whole(written: bytes, layer: Packet) -> bytes:
    """Return the bytes that dpkt has written of a layer, if they are complete."""
    if len(written) != len(layer):
        raise ValueError(
            f"dpkt writes only {len(written)} of the {len(layer)} bytes of {type(layer).__name__}"
        )
    return written


# --- Ethernet ------------------------------------------------------------------------------------


def _frame(frame: Ethernet) -> bytes:
    tags = list(getattr(frame, "vlan_tags", None) or ())
    labels: list[MPLSlabel] = list(getattr(frame, "mpls_labels", None) or ())
    if isinstance(frame.data, LLC) or not all(isinstance(tag, VLANtag8021Q) for tag in tags):
        other = copy.deepcopy(frame)
        if not isinstance(frame.data, LLC):
            other.data = _layer(frame.data)
        elif labels or any(isinstance(tag, VLANtag8021Q) for tag in tags):
            raise ValueError("dpkt can't write VLAN tags or labels in front of LLC")
        return _whole(bytes(other), other)
    if frame.type == ETH_TYPE_IPX and "ipx" in vars(frame) and frame._next_type is None:
        # This is how dpkt decodes a raw 802.3 frame (Novell), without the payload's first two
        # bytes.
        raise ValueError(
            "a raw 802.3 frame would become Ethernet II; send the original bytes instead"
        )
    # As in dpkt, the data's class decides the type; if the data is bytes, the `type` field does. In
    # a decoded frame with tags, `type` is the outer tag's type.
    ethertype, outer = frame.type, ETH_TYPE_8021Q if len(tags) < 2 else ETH_TYPE_8021AD
    if tags and frame.type in _TAGGED:
        ethertype, outer = tags[-1].type, frame.type
    if labels:
        if ethertype not in (ETH_TYPE_MPLS, ETH_TYPE_MPLS_MCAST):
            ethertype = ETH_TYPE_MPLS
    elif isinstance(frame.data, Packet):
        # dpkt knows no ethertype for some classes.
        with contextlib.suppress(KeyError):
            ethertype = Ethernet.get_type_rev(type(frame.data))
    parts = [_address(frame.dst, 6, "dst"), _address(frame.src, 6, "src")]
    for tag in tags:
        parts.append(struct.pack("!HH", outer, tag.pri << 13 | tag.cfi << 12 | tag.id))
        outer = tag.type if tag.type in _TAGGED else ETH_TYPE_8021Q
    parts.append(struct.pack("!H", ethertype))
    for place, label in enumerate(labels, 1):
        bottom = place == len(labels)  # of the stack (RFC 3032, section 2.1)
        value = label.val << 12 | label.exp << 9 | bottom << 8 | label.ttl
        parts.append(struct.pack("!I", value))
    return b"".join(parts) + _layer(frame.data)


def _pppoe(layer: PPPoE) -> bytes:
    """Write PPPoE (RFC 2516, sections 4 and 5).

    dpkt writes PPP's protocol in one byte, which the RFC advises against. Zeros after the length
    that the layer states are the frame's padding, which the length does not include.
    """
    data = layer.data
    body = struct.pack("!H", data.p) + _layer(data.data) if isinstance(data, PPP) else _layer(data)
    length = _fitting(len(body), "PPPoE's payload")
    payload = data.data if isinstance(data, PPP) else data
    if isinstance(payload, bytes) and 0 < layer.len < length and not any(body[layer.len :]):
        length = layer.len
    return struct.pack("!BBHH", layer._v_type, layer.code, layer.session, length) + body


# --- IP ------------------------------------------------------------------------------------------


def _ip4(packet: IP) -> bytes:
    """RFC 791, section 3.1."""
    options = _padded(packet.opts, "IP")
    protocol = _number(packet.p, packet.data, "p")
    addresses = _address(packet.src, 4, "src") + _address(packet.dst, 4, "dst")
    fragment = packet.rf << 15 | packet.df << 14 | packet.mf << 13 | packet.offset
    if packet.mf or packet.offset:
        payload = _verbatim(packet.data)
    else:
        payload = _payload(packet.data, protocol, addresses)
    start = packet.v << 4 | 5 + len(options) // 4
    length = _fitting(20 + len(options) + len(payload), "an IPv4 packet")
    head = struct.pack("!BBHHHBB", start, packet.tos, length, packet.id, fragment, packet.ttl,
                       protocol)  # fmt: skip
    value = checksum(head + addresses + options, 0)
    return head + value.to_bytes(2, "big") + addresses + options + payload


def _ip6(packet: IP6) -> bytes:
    """RFC 8200, section 3."""
    headers = _extensions(packet)
    layers = [*headers, packet.data]
    first = protocol = _number(packet.nxt, layers[0], "nxt")
    source, target = _address(packet.src, 16, "src"), _address(packet.dst, 16, "dst")
    final, fragment, extensions = target, False, []
    for header, following in zip(headers, layers[1:], strict=True):
        # dpkt treats all encrypted data as a part of the ESP header, which has no `nxt`.
        esp = isinstance(header, IP6ESPHeader)
        protocol = 59 if esp else _number(header.nxt, following, "nxt")
        extensions.append(_extension(header, protocol))
        if isinstance(header, IP6FragmentHeader):
            fragment = fragment or bool(header.frag_off or header.m_flag)
        elif isinstance(header, IP6RoutingHeader) and header.segs_left:
            # Checksums are computed with the final destination (RFC 8200, section 8.1). It is the
            # last address in types 0 and 2, and the first in segment routing (RFC 8754).
            final = header.data[:16] if header.type == 4 else header.data[-16:]
    if fragment:
        payload = _verbatim(packet.data)
    else:
        payload = _payload(packet.data, protocol, source + final)
    payload = b"".join(extensions) + payload
    start = packet.v << 28 | packet.fc << 20 | packet.flow
    length = _fitting(len(payload), "an IPv6 packet's payload")
    return struct.pack("!IHBB", start, length, first, packet.hlim) + source + target + payload


def _extensions(packet: IP6) -> list[IP6ExtensionHeader]:
    """Return the extension headers. dpkt has two attributes for them; decoding sets both."""
    ordered = getattr(packet, "all_extension_headers", None)
    if ordered:
        return list(ordered)
    by_kind = getattr(packet, "extension_hdrs", {})
    return [by_kind[kind] for kind in EXT_HDRS if kind in by_kind]


def _stated(header: IP6ExtensionHeader) -> bytes:
    # In a decoded authentication header, `data` is the whole rest of the packet.
    return header.pack_hdr() + bytes(getattr(header, "auth_data", header.data))


def _extension(header: IP6ExtensionHeader, following: int) -> bytes:
    """Write an extension header (RFC 8200, section 4; RFC 4302) with its next header and length."""
    whole = bytearray(_stated(header))
    if isinstance(header, IP6ESPHeader):
        return bytes(whole)
    whole[0] = following
    if isinstance(header, IP6FragmentHeader):
        return bytes(whole)
    unit, uncounted = (4, 2) if isinstance(header, IP6AHHeader) else (8, 1)
    length = len(whole) // unit - uncounted
    if len(whole) % unit or header.len > length:
        raise ValueError(
            f"{type(header).__name__} has {len(whole)} bytes, but its len is {header.len} (in "
            f"units of {unit} bytes); if dpkt dropped a part of it, send the original bytes instead"
        )
    whole[1] = length
    return bytes(whole)


# --- What IP carries -----------------------------------------------------------------------------


def _payload(data: object, protocol: int, addresses: bytes) -> bytes:
    """Write the layer above IP, whose checksum includes a pseudo-header.

    The sum is the same for the pseudo-headers of IPv4 (RFC 768, RFC 9293) and IPv6 (RFC 8200).
    """
    pseudo = int.from_bytes(addresses, "big") + protocol
    if isinstance(data, UDP):
        body = _verbatim(data.data)
        length = _fitting(8 + len(body), "a UDP datagram")
        head = struct.pack("!HHH", data.sport, data.dport, length)
        # A checksum of 0 would mean that there is none (RFC 768).
        value = checksum(head + b"\0\0" + body, pseudo + length) or 0xFFFF
        return head + value.to_bytes(2, "big") + body
    if isinstance(data, TCP):
        options = _padded(data.opts, "TCP")
        start = 5 + len(options) // 4 << 12 | data._off_flags & 0xFFF
        head = struct.pack("!HHIIHH", data.sport, data.dport, data.seq, data.ack, start, data.win)
        tail = struct.pack("!H", data.urp) + options + _verbatim(data.data)
        value = checksum(head + b"\0\0" + tail, pseudo + len(head) + 2 + len(tail))
        return head + value.to_bytes(2, "big") + tail
    if isinstance(data, ICMP | ICMP6):
        head = struct.pack("!BB", data.type, data.code)
        body = _verbatim(data.data)
        # ICMP has no pseudo-header (RFC 792), ICMPv6 has one (RFC 4443, section 2.3).
        initial = pseudo + 4 + len(body) if isinstance(data, ICMP6) else 0
        value = checksum(head + b"\0\0" + body, initial)
        return head + value.to_bytes(2, "big") + body
    if isinstance(data, _SUMMED_BY_DPKT) and len(addresses) == 8:
        other = copy.deepcopy(data)
        other.sum = 0
        return bytes(other)
    return _layer(data)


def _number(stated: int, layer: object, field: str) -> int:
    """Return the protocol number of a layer. A stated 0, dpkt's default, is replaced."""
    number = next((n for kind, n in _NUMBERS.items() if isinstance(layer, kind)), None)
    if number is None or number == stated:
        return stated
    if stated == 0:
        return number
    raise ValueError(f"{field} is {stated}, but {type(layer).__name__} has the number {number}")


def _address(address: object, size: int, field: str) -> bytes:
    # struct would silently pad or truncate it. dpkt's default for most addresses is b"".
    if not isinstance(address, bytes | bytearray | memoryview) or len(address) != size:
        raise ValueError(f"{field} must be {size} bytes, got {address!r}")
    return bytes(address)


def _padded(options: bytes, of: str) -> bytes:
    """Pad options with zeros to a multiple of 4 bytes (RFC 791 and RFC 9293, section 3.1)."""
    padded = bytes(options) + bytes(-len(options) % 4)
    if len(padded) > 40:
        raise ValueError(f"{of} options must have at most 40 bytes, got {len(options)}")
    return padded


def _fitting(length: int, what: str) -> int:
    if length > 0xFFFF:
        raise ValueError(f"{what} must have at most 65535 bytes, got {length}")
    return length

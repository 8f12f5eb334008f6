"""One packet as a line of text, in tcpdump's style, and as the fields that the line is made of.

Pure functions, without dpkt. A stranger sent the bytes, so any bytes must give a line. The line
shows them only as numbers and addresses, so that no packet can control a terminal.
"""

import socket
from collections.abc import Iterator
from typing import Any

__all__ = ["Fields", "describe"]

Fields = dict[str, Any]

_ICMP = {
    0: "echo reply",
    3: "unreachable",
    4: "source quench",
    5: "redirect",
    8: "echo request",
    9: "router advertisement",
    10: "router solicitation",
    11: "time exceeded",
    12: "parameter problem",
    13: "timestamp request",
    14: "timestamp reply",
}
_ICMP_UNREACHABLE = {0: "net", 1: "host", 2: "protocol", 3: "port", 4: "need to frag", 13: "admin"}
_ICMP6 = {
    1: "unreachable",
    2: "packet too big",
    3: "time exceeded",
    4: "parameter problem",
    128: "echo request",
    129: "echo reply",
    130: "multicast listener query",
    131: "multicast listener report",
    132: "multicast listener done",
    133: "router solicitation",
    134: "router advertisement",
    135: "neighbor solicitation",
    136: "neighbor advertisement",
    137: "redirect",
    143: "multicast listener report v2",
}
_PROTOCOLS = {
    1: "ICMP",
    2: "IGMP",
    4: "IP-in-IP",
    6: "TCP",
    17: "UDP",
    41: "IPv6",
    47: "GRE",
    50: "ESP",
    51: "AH",
    58: "ICMP6",
    59: "no next header",
    89: "OSPF",
    103: "PIM",
    112: "VRRP",
    132: "SCTP",
}
_TCP_FLAGS = "FSRP.UEW"  # from the lowest bit on; tcpdump's letters
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION, _MOBILITY = 0, 43, 44, 60, 135
_VLANS = (0x8100, 0x88A8, 0x9100, 0x9200)  # 802.1Q, 802.1ad, and two from before that
_MOST_VLANS = 8  # real frames have fewer, and the line must not grow with a hostile one


class _Cut(Exception):  # noqa: N818 - not an error: `describe` catches it
    """The bytes end within a header."""


def describe(data: bytes, *, frame: bool) -> tuple[str, Fields]:
    """Describe a packet, or an Ethernet frame.

    Args:
        data: any bytes.
        frame: whether they begin with an Ethernet header.

    Returns:
        The line, and the same as fields for JSON: numbers and plain ASCII text. The field
        ``length``, the number of bytes, is always present.
    """
    fields: Fields = {"length": len(data)}
    words: list[str] = []
    parts = _frame(data, fields) if frame else _packet(data, 0, fields)
    try:
        words.extend(parts)  # keeps the parts that came before a _Cut
    except _Cut as cut:
        fields["truncated"] = True
        words.append(f"[{cut}]")
    return " ".join(words), fields


def _need(data: bytes, end: int, what: str) -> None:
    if len(data) < end:
        raise _Cut(f"cut within the {what} header, after {len(data)} bytes")


def _u16(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _mac(data: bytes, at: int) -> str:
    return data[at : at + 6].hex(":")


# --- Link layer ----------------------------------------------------------------------------------


def _frame(data: bytes, fields: Fields) -> Iterator[str]:
    _need(data, 14, "Ethernet")
    fields["dst_mac"], fields["src_mac"] = _mac(data, 0), _mac(data, 6)
    kind, at = _u16(data, 12), 14
    vlans: list[int] = []
    while kind in _VLANS and len(vlans) < _MOST_VLANS:
        _need(data, at + 4, "VLAN")
        vlans.append(_u16(data, at) & 0xFFF)
        yield f"vlan {vlans[-1]},"
        fields["vlan"] = vlans
        kind, at = _u16(data, at + 2), at + 4
    if kind in (0x0800, 0x86DD):
        yield from _packet(data, at, fields)
        return
    if kind == 0x0806:
        yield from _arp(data, at, fields)
        return
    yield f"{fields['src_mac']} > {fields['dst_mac']},"
    if kind < 0x600:  # IEEE 802.3: a length
        fields["protocol"] = "802.3"
        yield f"802.3, length {kind}"
    else:
        fields["protocol"], fields["ethertype"] = f"0x{kind:04x}", kind
        yield f"ethertype 0x{kind:04x}, length {len(data) - at}"


def _arp(data: bytes, at: int, fields: Fields) -> Iterator[str]:
    fields["protocol"] = "ARP"
    yield "ARP,"
    _need(data, at + 8, "ARP")
    operation = _u16(data, at + 6)
    fields["operation"] = operation
    if data[at : at + 6] != b"\0\1\x08\0\6\4":  # not the usual one, for Ethernet and IPv4
        yield f"operation {operation}, hardware type {_u16(data, at)}, length {len(data) - at}"
        return
    _need(data, at + 28, "ARP")
    sender, target = _ipv4(data, at + 14), _ipv4(data, at + 24)
    fields["src"], fields["dst"] = sender, target
    fields["sender_mac"], fields["target_mac"] = _mac(data, at + 8), _mac(data, at + 18)
    if operation == 1:
        yield f"Request who-has {target} tell {sender}, length {len(data) - at}"
    elif operation == 2:
        yield f"Reply {sender} is-at {fields['sender_mac']}, length {len(data) - at}"
    else:
        yield f"operation {operation}, {sender} to {target}, length {len(data) - at}"


# --- IP ------------------------------------------------------------------------------------------


def _ipv4(data: bytes, at: int) -> str:
    return socket.inet_ntop(socket.AF_INET, data[at : at + 4])


def _ipv6(data: bytes, at: int) -> str:
    return socket.inet_ntop(socket.AF_INET6, data[at : at + 16])


def _packet(data: bytes, at: int, fields: Fields) -> Iterator[str]:
    _need(data, at + 1, "IP")
    version = data[at] >> 4
    if version == 4:
        yield from _ip4_packet(data, at, fields)
    elif version == 6:
        yield from _ip6_packet(data, at, fields)
    else:
        fields["protocol"] = f"version {version}"
        yield f"not an IP packet: version {version}, length {len(data) - at}"


def _ip4_packet(data: bytes, at: int, fields: Fields) -> Iterator[str]:
    fields["version"] = 4
    yield "IP"
    _need(data, at + 20, "IP")
    header = (data[at] & 15) * 4
    total = _u16(data, at + 2)
    fragment = _u16(data, at + 6)
    offset, more = (fragment & 0x1FFF) * 8, bool(fragment & 0x2000)
    fields |= {"src": _ipv4(data, at + 12), "dst": _ipv4(data, at + 16), "ttl": data[at + 8]}
    protocol = data[at + 9]
    payload = at + header
    # A super-packet may be too long for its length field (BIG TCP), which is 0 then.
    end = min(at + total, len(data)) if total else len(data)
    if header < 20 or payload > end:
        raise _Cut(f"header length {header} in a packet of {total or len(data) - at} bytes")
    if offset or more:
        fields["fragment"] = {"id": _u16(data, at + 4), "offset": offset, "more": more}
    yield from _payload(data, payload, end, protocol, fields)
    if at + total > len(data):
        yield f"[{at + total - len(data)} bytes missing]"
        fields["truncated"] = True


def _ip6_packet(data: bytes, at: int, fields: Fields) -> Iterator[str]:
    fields["version"] = 6
    yield "IP6"
    _need(data, at + 40, "IP6")
    fields |= {"src": _ipv6(data, at + 8), "dst": _ipv6(data, at + 24), "ttl": data[at + 7]}
    length = _u16(data, at + 4)
    end = min(at + 40 + length, len(data)) if length else len(data)
    protocol, payload = data[at + 6], at + 40
    # Each extension header has at least 8 bytes, so the loop can't go beyond the packet's end.
    while protocol in (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION, _MOBILITY):
        if end < payload + 8:
            raise _Cut("cut within an extension header")
        if protocol == _FRAGMENT:
            fragment = _u16(data, payload + 2)
            fields["fragment"] = {
                "id": _u32(data, payload + 4),
                "offset": fragment & 0xFFF8,
                "more": bool(fragment & 1),
            }
            size = 8
        else:
            size = 8 + data[payload + 1] * 8
        protocol, payload = data[payload], payload + size
        if "fragment" in fields and fields["fragment"]["offset"]:
            break
    if payload > end:
        raise _Cut("cut within an extension header")
    yield from _payload(data, payload, end, protocol, fields)
    if at + 40 + length > len(data):
        yield f"[{at + 40 + length - len(data)} bytes missing]"
        fields["truncated"] = True


def _payload(data: bytes, at: int, end: int, protocol: int, fields: Fields) -> Iterator[str]:
    """Describe what an IP packet carries between these two offsets."""
    name = _PROTOCOLS.get(protocol)
    fields["protocol"] = name or f"ip-proto-{protocol}"
    length = end - at
    src, dst = fields["src"], fields["dst"]
    part = fields.get("fragment")
    if part is not None and part["offset"]:  # only the first fragment has the transport header
        yield f"{src} > {dst}: {fields['protocol']}{_fragment(part)}, length {length}"
        return
    data = data[:end]  # the rest is padding
    if protocol in (6, 17):
        if length >= 4:
            fields["sport"], fields["dport"] = _u16(data, at), _u16(data, at + 2)
            src, dst = f"{src}.{fields['sport']}", f"{dst}.{fields['dport']}"
        yield f"{src} > {dst}:"
        yield from (_tcp if protocol == 6 else _udp)(data, at, fields)
    elif protocol in (1, 58):
        yield f"{src} > {dst}:"
        yield from _icmp(data, at, protocol, fields)
    else:
        yield f"{src} > {dst}: {fields['protocol']}, length {length}"
    if part is not None:
        yield _fragment(part).lstrip(", ")


def _fragment(part: Fields) -> str:
    more = "+" if part["more"] else ""
    return f", fragment {part['id']} at {part['offset']}{more}"


def _tcp(data: bytes, at: int, fields: Fields) -> Iterator[str]:
    _need(data, at + 20, "TCP")
    header = (data[at + 12] >> 4) * 4
    bits = data[at + 13]
    flags = "".join(letter for n, letter in enumerate(_TCP_FLAGS) if bits >> n & 1)
    seq, ack, window = _u32(data, at + 4), _u32(data, at + 8), _u16(data, at + 14)
    length = len(data) - at - header
    fields |= {"flags": flags, "seq": seq, "window": window}
    if header < 20 or length < 0:
        raise _Cut(f"TCP header length {header} of {len(data) - at} bytes")
    words = [f"Flags [{flags or 'none'}]"]
    if length or bits & 0b111:  # SYN, FIN or RST
        words.append(f"seq {seq}:{(seq + length) & 0xFFFF_FFFF}" if length else f"seq {seq}")
    if bits & 0x10:
        words.append(f"ack {ack}")
        fields["ack"] = ack
    fields["payload_length"] = length
    yield ", ".join([*words, f"win {window}", f"length {length}"])


def _udp(data: bytes, at: int, fields: Fields) -> Iterator[str]:
    _need(data, at + 8, "UDP")
    # Don't trust the length field: it is 0 in a datagram too long for it, and in a fragment it
    # gives the length of the whole datagram.
    length = fields["payload_length"] = len(data) - at - 8
    yield f"UDP, length {length}"


def _icmp(data: bytes, at: int, protocol: int, fields: Fields) -> Iterator[str]:
    # tcpdump writes this comma for ICMPv6 only.
    yield "ICMP" if protocol == 1 else "ICMP6,"
    _need(data, at + 4, "ICMP")
    kind, code = data[at], data[at + 1]
    fields["type"], fields["code"] = kind, code
    said = (_ICMP if protocol == 1 else _ICMP6).get(kind, f"type {kind}")
    words = [said]
    if (protocol, kind) == (1, 3):
        words = [f"{_ICMP_UNREACHABLE.get(code, f'code {code}')} {said}"]
    elif code:
        words.append(f"code {code}")
    if kind in ((0, 8) if protocol == 1 else (128, 129)):
        _need(data, at + 8, "ICMP")
        fields["id"], fields["seq"] = _u16(data, at + 4), _u16(data, at + 6)
        words += [f"id {fields['id']}", f"seq {fields['seq']}"]
    elif protocol == 58 and kind in (135, 136):
        _need(data, at + 24, "neighbor discovery")
        fields["target"] = _ipv6(data, at + 8)
        words.append(f"{'who has' if kind == 135 else 'tgt is'} {fields['target']}")
    yield ", ".join([*words, f"length {len(data) - at}"])

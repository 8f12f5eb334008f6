"""Splits and merges super-packets, in Python; `_speedups.c` has the same functions, but faster.

Sources: ``include/uapi/linux/virtio_net.h``; the kernel's tcp_gso_segment and udp_gso_segment;
RFC 9293 (TCP), RFC 768 (UDP), RFC 1071 (checksum), RFC 6864 (the IPv4 identification).
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from .._kernel.abi import VNET_HDR, VNET_HDR_SIZE
from .flowtable import FlowTable

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["checksum", "merge", "split"]

_UDP_HEAD = struct.Struct("!4sHH")
_NO_HEADER = bytes(VNET_HDR_SIZE)

# virtio_net.h
_NEEDS_CSUM = 1
_GSO_NONE, _GSO_TCPV4, _GSO_TCPV6, _GSO_UDP_L4, _GSO_ECN = 0, 1, 4, 5, 0x80

_TCP, _UDP = 6, 17
_FIN, _PSH, _ACK, _CWR = 0x01, 0x08, 0x10, 0x80
_VLAN_TAGS = frozenset({0x8100, 0x88A8})
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_DF = 0x4000

# IPv6 headers that may precede TCP or UDP: hop-by-hop, routing and destination options.
_EXTENSIONS = frozenset({0, 43, 60})

_LONGEST = 65_535  # bytes of an IP packet
_MOST_DATAGRAMS = 64  # in one UDP super-packet; UDP_MAX_SEGMENTS, 128 since Linux 6.9
_MOST_PACKETS = 1000  # in any: the C module writes each as one piece, and writev takes 1,024
_MOST_LINK = 22  # bytes before the IP header: Ethernet and two VLAN tags

# The limits of what a super-packet may be split into. Each segment repeats all headers. Without
# limits, a super-packet of 64 KiB with long headers and a gso_size of 1 would become a gigabyte.
# Real headers have less than 142 bytes, or a few hundred with segment routing. The smallest payload
# that Linux sends in long runs has 8 bytes (tcp_min_snd_mss, 48, minus 40 bytes of TCP options).
# After 118 bytes of headers (Ethernet, a VLAN tag, IPv6, TCP) these make 16 times the length of the
# super-packet. Smaller payloads come only in short runs, such as 128 datagrams by UDP_SEGMENT.
# Together these are shorter than the longest packet.
_MOST_SPLIT_HEADERS = 512  # bytes in front of the payload
_MOST_GROWTH = 16  # times its own length

_ROUTING = 43  # IPv6's header
_LOOSE_ROUTE, _STRICT_ROUTE = 0x83, 0x89  # IPv4 options (RFC 791, section 3.1)


def checksum(data: Buffer, initial: int = 0) -> int:
    """See `aiotun.offload.checksum`."""
    initial = operator.index(initial)  # a plain int: a subclass may override the arithmetic
    if initial < 0:
        raise ValueError("initial must not be negative")
    view = memoryview(data).cast("B")
    number = int.from_bytes(view, "big")
    if view.nbytes & 1:
        number <<= 8
    total = number + initial
    # The end-around carry makes this arithmetic modulo 0xffff, in which 0 and 0xffff are the same.
    # The sum is 0 only if all the words are 0 (RFC 1071, section 2).
    return 0xFFFF - (total % 0xFFFF or (0xFFFF if total else 0))


class _Layers(NamedTuple):
    """The offsets of a packet's or frame's headers in bytes."""

    version: int
    ip: int
    protocol: int
    transport: int


def _ip_header(packet: bytes, frame: bool) -> tuple[int, int]:
    """Return the IP version, and where its header begins; ValueError if there is none."""
    ip = 0
    if frame:
        ip = 14
        while int.from_bytes(packet[ip - 2 : ip], "big") in _VLAN_TAGS:
            ip += 4
    version = packet[ip] >> 4 if len(packet) > ip else 0
    if version not in _ETHERTYPES or (
        frame and int.from_bytes(packet[ip - 2 : ip], "big") != _ETHERTYPES[version]
    ):
        raise ValueError("the packet is neither IPv4 nor IPv6")
    return version, ip


def _layers(packet: bytes, frame: bool) -> _Layers:
    """Find the headers, up to TCP or UDP; ValueError if they are truncated or others."""
    version, ip = _ip_header(packet, frame)
    length = len(packet) - ip
    if version == 4:
        size = (packet[ip] & 0xF) * 4
        if size < 20 or length < size or int.from_bytes(packet[ip + 2 : ip + 4], "big") != length:
            raise ValueError("the IPv4 header does not match the packet's length")
        if int.from_bytes(packet[ip + 6 : ip + 8], "big") & 0x3FFF:
            raise ValueError("the packet is a fragment")
        protocol, transport = packet[ip + 9], ip + size
    else:
        if length < 40 or int.from_bytes(packet[ip + 4 : ip + 6], "big") != length - 40:
            raise ValueError("the IPv6 header does not match the packet's length")
        protocol, transport = packet[ip + 6], ip + 40
        while protocol in _EXTENSIONS and len(packet) >= transport + 8:
            protocol = packet[transport]
            transport += (packet[transport + 1] + 1) * 8
    if protocol not in (_TCP, _UDP):
        raise ValueError("the packet is neither TCP nor UDP")
    return _Layers(version, ip, protocol, transport)


def _payload_start(packet: bytes, layers: _Layers) -> int:
    start = layers.transport + 8
    if layers.protocol == _TCP:
        start += 12
        if len(packet) >= start:
            words = packet[layers.transport + 12] >> 4
            start = layers.transport + words * 4 if words >= 5 else len(packet) + 1
    if len(packet) < start:
        raise ValueError("the TCP or UDP header does not match the packet's length")
    return start


def _addresses(packet: bytes, version: int, ip: int) -> bytes:
    start, end = (12, 20) if version == 4 else (8, 40)
    return packet[ip + start : ip + end]


# Splitting


def split(super_packet: Buffer, frame: bool = False) -> list[bytes]:
    """See `aiotun.offload.split`."""
    view = memoryview(super_packet).cast("B")
    if view.nbytes < VNET_HDR_SIZE:
        raise ValueError(f"a super-packet begins with a header of {VNET_HDR_SIZE} bytes")
    flags, gso_type, _, gso_size, start, offset = VNET_HDR.unpack_from(view)
    packet = bytes(view[VNET_HDR_SIZE:])
    if gso_type & ~_GSO_ECN == _GSO_NONE:
        return [_finished(packet, start, offset) if flags & _NEEDS_CSUM else packet]
    layers = _layers(packet, frame)
    payload = _payload_start(packet, layers)
    fits = {
        _GSO_TCPV4: (4, _TCP),
        _GSO_TCPV6: (6, _TCP),
        _GSO_UDP_L4: (layers.version, _UDP),
    }.get(gso_type & ~_GSO_ECN)
    if fits != (layers.version, layers.protocol):
        raise ValueError(f"gso_type {gso_type} does not match the packet's headers")
    if gso_size == 0:
        raise ValueError("gso_size must not be 0")
    count = -(-(len(packet) - payload) // gso_size)
    if payload > _MOST_SPLIT_HEADERS or _out_of_proportion(count, payload, len(packet)):
        raise ValueError(
            f"{len(packet)} bytes would become {count} packets with headers of {payload} bytes, "
            "which is too much"
        )
    place = 16 if layers.protocol == _TCP else 6
    if flags & _NEEDS_CSUM and (start, offset) == (layers.transport, place):
        # The sender computed the partial sum with the final destination and the whole length.
        (partial,) = struct.unpack_from("!H", packet, start + place)
        length = len(packet) - start
        if layers.protocol == _UDP:
            (length,) = struct.unpack_from("!H", packet, start + 4)
        return _segments(packet, layers, payload, gso_size, partial + 0xFFFF - length)
    if _routed(packet, layers):
        raise ValueError("the packet has a source route, but no partial checksum")
    pseudo = int.from_bytes(_addresses(packet, layers.version, layers.ip), "big") + layers.protocol
    return _segments(packet, layers, payload, gso_size, pseudo)


def _out_of_proportion(count: int, headers: int, length: int) -> bool:
    """Return whether the packets would be too long together to come from one super-packet."""
    total = count * headers + length - headers
    return total > max(_LONGEST, _MOST_GROWTH * length)


def _routed(packet: bytes, layers: _Layers) -> bool:
    """Return whether the packet has a source route.

    Then the IP header's destination is not the final one, which the pseudo-header has. A source
    route is an IPv6 routing header with segments left (RFC 8200, section 8.1), or an IPv4 option.
    """
    version, ip, _, transport = layers
    at = ip + (20 if version == 4 else 40)
    kind = packet[ip + 6]
    while version == 6 and at < transport:
        if kind == _ROUTING and packet[at + 3] > 0:
            return True
        kind, at = packet[at], at + (packet[at + 1] + 1) * 8
    while version == 4 and at < transport and packet[at] != 0:
        if packet[at] in (_LOOSE_ROUTE, _STRICT_ROUTE):
            return True
        # "No operation" (1) is the only option without a length.
        at += 1 if packet[at] == 1 else max(packet[at + 1] if at + 1 < transport else 0, 2)
    return False


def _finished(packet: bytes, start: int, offset: int) -> bytes:
    """Finish the checksum that the sender left to the network card (NEEDS_CSUM)."""
    place = start + offset
    if place + 2 > len(packet):
        raise ValueError(f"the checksum at {place} is outside the packet of {len(packet)} bytes")
    # The checksum field holds the sum of the pseudo-header. Never write 0, which in UDP means that
    # there is no checksum.
    value = checksum(packet[start:]) or 0xFFFF
    return b"".join((packet[:place], value.to_bytes(2, "big"), packet[place + 2 :]))


def _segments(
    packet: bytes, layers: _Layers, start: int, gso_size: int, pseudo: int
) -> list[bytes]:
    version, ip, protocol, transport = layers
    end = len(packet)
    # The bytes that are the same in every segment, and their sums.
    if version == 4:
        ip_head = struct.Struct(f"!{ip + 2}sHH4sH{transport - ip - 12}s").pack
        front, middle, back = (
            packet[: ip + 2],
            packet[ip + 6 : ip + 10],
            packet[ip + 12 : transport],
        )
        ip_sum = sum(int.from_bytes(part, "big") for part in (packet[ip : ip + 2], middle, back))
        identity = int.from_bytes(packet[ip + 4 : ip + 6], "big")
    else:
        ip_head = struct.Struct(f"!{ip + 4}sH{transport - ip - 6}s").pack
        front, middle, back = packet[: ip + 4], b"", packet[ip + 6 : transport]
        ip_sum = identity = 0
    ports, sequence, flags = packet[transport : transport + 4], 0, 0
    acknowledged, window, options = packet[transport + 8 : transport + 13], b"", b""
    fixed = pseudo + sum(struct.unpack("!HH", ports))
    if protocol == _TCP:
        sequence, _, data_offset, flags = struct.unpack_from("!IIBB", packet, transport + 4)
        window, options = packet[transport + 14 : transport + 16], packet[transport + 18 : start]
        fixed += int.from_bytes(acknowledged[:4], "big") + (data_offset << 8)
        fixed += int.from_bytes(window + options, "big")
    tcp_head = struct.Struct(f"!4sI5sB2sH{len(options)}s").pack
    fixed %= 0xFFFF
    sum_of = _summing(gso_size)

    segments = []
    for at in range(start, max(end, start + 1), gso_size):
        payload = packet[at : at + gso_size]
        length = start - transport + len(payload)
        total = fixed + length + sum_of(payload)
        if version == 4:
            whole = transport - ip + length
            value = 0xFFFF - ((ip_sum + whole + identity) % 0xFFFF or 0xFFFF)
            head = ip_head(front, whole, identity, middle, value, back)
            identity = (identity + 1) & 0xFFFF
        else:
            head = ip_head(front, transport - ip - 40 + length, back)
        if protocol == _TCP:
            # FIN and PSH stay on the last segment, CWR on the first.
            now = flags & ~(_CWR if at > start else 0)
            now &= ~(_FIN | _PSH if at + gso_size < end else 0)
            total += (sequence >> 16) + (sequence & 0xFFFF) + now
            value = 0xFFFF - (total % 0xFFFF or 0xFFFF)
            head += tcp_head(ports, sequence, acknowledged, now, window, value, options)
            sequence = (sequence + gso_size) & 0xFFFFFFFF
        else:
            head += _UDP_HEAD.pack(ports, length, 0xFFFF - (total + length) % 0xFFFF)
        segments.append(head + payload)
    return segments


def _summing(size: int) -> Callable[[bytes], int]:
    """Return a function that sums the 16-bit words of bytes; it is fastest for `size` bytes.

    2**16 is 1 modulo 0xffff, so a number may be folded at any multiple of 16 bits. Folding it twice
    in half first is faster than dividing the whole number.
    """
    half, quarter = size // 4 * 16, size // 8 * 16
    half_mask, quarter_mask = (1 << half) - 1, (1 << quarter) - 1

    def sum_of(data: bytes) -> int:
        number = int.from_bytes(data, "big")
        if len(data) & 1:
            number <<= 8
        number = (number & half_mask) + (number >> half)
        number = (number & quarter_mask) + (number >> quarter)
        return number % 0xFFFF

    return sum_of


# Merging


def merge(
    packets: Iterable[Buffer],
    frame: bool = False,
    udp: bool = True,
    places: list[int] | None = None,
) -> list[bytes]:
    """See `aiotun.offload.merge`.

    Args:
        packets, frame, udp: as there.
        places: a list to which is added where in `packets` each one was, in their new order.
    """
    runs = _runs(packets, frame, udp)
    if places is not None:
        for run in runs:
            places += run.places
    return [run.whole() for run in runs]


def _runs(packets: Iterable[Buffer], frame: bool, udp: bool) -> list[_Run]:
    """Sort packets into runs, each at the place of its first packet; see `flowtable`."""
    runs: list[_Run] = []
    table: FlowTable[_Run] = FlowTable()
    for place, each in enumerate(packets):
        packet = each if isinstance(each, bytes) else bytes(memoryview(each).cast("B"))
        try:
            layers = _layers(packet, frame)
            payload = _payload_start(packet, layers)
        except ValueError:
            _make_way(table, packet, frame)
            runs.append(_Run(place, packet, None))
            continue
        part = _part(packet, layers, payload) if udp or layers.protocol == _TCP else None
        flow = _flow(packet, layers)
        run = table.get(flow)
        if part is None or run is None or not run.take(place, part):
            if run is not None:
                table.close(flow)
            run = _Run(place, packet, part)
            runs.append(run)
            if run.open:
                table.open(flow, run)
        elif not run.open:
            table.close(flow)
    return runs


def _flow(packet: bytes, layers: _Layers) -> bytes:
    version, ip, protocol, transport = layers
    ports = packet[transport : transport + 4]
    return b"".join((_addresses(packet, version, ip), ports, protocol.to_bytes(1, "big")))


def _make_way(table: FlowTable[_Run], packet: bytes, frame: bool) -> None:
    """Close the runs that must stay before a packet whose ports are unknown.

    What is not IP, or longer than IP packets are, may be refused by the kernel. Then nothing that
    came after it may have been written.
    """
    try:
        version, ip = _ip_header(packet, frame)
    except ValueError:
        return table.close_all()
    addresses = _addresses(packet, version, ip)
    if len(addresses) < (8 if version == 4 else 32) or len(packet) - ip > _LONGEST:
        return table.close_all()
    return table.close_between(addresses)


class _Part(NamedTuple):
    """A packet that may be merged, and the fields that decide whether another one may follow."""

    packet: bytes
    layers: _Layers
    payload: int  # the payload's offset
    same: tuple[bytes, ...]  # the bytes that must be equal in the next packet
    identity: int | None  # None if it does not matter: with DF, and in IPv6
    sequence: int
    last: bool  # no packet may follow, as PSH is set


def _part(packet: bytes, layers: _Layers, payload: int) -> _Part | None:
    version, ip, protocol, transport = layers
    if transport != ip + (20 if version == 4 else 40) or payload == len(packet) or ip > _MOST_LINK:
        return None  # IP options, no payload, or too much in front of the IP header
    identity = None
    if version == 4:
        same = [packet[: ip + 2], packet[ip + 6 : ip + 10], packet[ip + 12 : transport + 4]]
        # A packet that must not be fragmented needs no identification (RFC 6864, section 4).
        if not int.from_bytes(packet[ip + 6 : ip + 8], "big") & _DF:
            identity = int.from_bytes(packet[ip + 4 : ip + 6], "big")
    else:
        same = [packet[: ip + 4], packet[ip + 6 : transport + 4]]
    if protocol == _UDP:
        length, value = struct.unpack_from("!HH", packet, transport + 4)
        if length != len(packet) - transport or value == 0:
            return None
        return _Part(packet, layers, payload, tuple(same), identity, 0, False)
    if packet[transport + 12] & 0xF or packet[transport + 13] & ~_PSH != _ACK:
        return None
    same += [
        packet[transport + 8 : transport + 13],
        packet[transport + 14 : transport + 16],
        packet[transport + 18 : payload],
    ]
    (sequence,) = struct.unpack_from("!I", packet, transport + 4)
    last = bool(packet[transport + 13] & _PSH)
    return _Part(packet, layers, payload, tuple(same), identity, sequence, last)


def _verified(part: _Part) -> bool:
    packet, (version, ip, protocol, transport) = part.packet, part.layers
    pseudo = protocol + len(packet) - transport
    pseudo += int.from_bytes(_addresses(packet, version, ip), "big")
    if version == 4 and checksum(packet[ip:transport]) != 0:
        return False
    return checksum(packet[transport:], pseudo) == 0


class _Run:
    """Packets of one flow, each of which continues the one before; or one that can't be merged.

    Attributes:
        places: where in the batch its packets were.
        open: whether another packet may follow.
    """

    def __init__(self, place: int, packet: bytes, first: _Part | None) -> None:
        self.places = [place]
        self._packet = packet
        self._parts: list[_Part] = []
        self.open = False
        if first is not None:
            self._parts.append(first)
            self._size = len(packet) - first.payload  # of each payload but the last
            self._length = len(packet)
            self.open = not first.last

    def take(self, place: int, part: _Part) -> bool:
        """Add a packet if it continues the open run and its checksums are valid; return whether."""
        first, before = self._parts[0], self._parts[-1]
        size = len(part.packet) - part.payload
        if (
            part.same != first.same
            or part.layers != first.layers
            or part.payload != first.payload
            or size > self._size
            or self._length + size - first.layers.ip > _LONGEST
            or (part.identity is not None and part.identity != (before.identity or 0) + 1 & 0xFFFF)
        ):
            return False
        if len(self._parts) >= (
            _MOST_DATAGRAMS if first.layers.protocol == _UDP else _MOST_PACKETS
        ):
            return False
        if _out_of_proportion(len(self._parts) + 1, first.payload, self._length + size):
            return False
        if first.layers.protocol == _TCP:
            gone = (self._length - first.payload) & 0xFFFFFFFF
            if part.sequence != (first.sequence + gone) & 0xFFFFFFFF:
                return False
        if not _verified(part) or (len(self._parts) == 1 and not _verified(first)):
            return False
        self.places.append(place)
        self._parts.append(part)
        self._length += size
        self.open = size == self._size and not part.last
        return True

    def whole(self) -> bytes:
        """Return the super-packet, or the only packet, with a virtio-net header."""
        if len(self.places) == 1:
            return _NO_HEADER + self._packet
        first = self._parts[0]
        version, ip, protocol, transport = first.layers
        head = bytearray(first.packet[: first.payload])
        if version == 4:
            struct.pack_into("!H", head, ip + 2, self._length - ip)
            struct.pack_into("!H", head, ip + 10, 0)
            struct.pack_into("!H", head, ip + 10, checksum(head[ip:transport]))
        else:
            struct.pack_into("!H", head, ip + 4, self._length - ip - 40)
        length = self._length - transport
        # The uncomplemented sum of the pseudo-header: the kernel adds the rest (NEEDS_CSUM).
        pseudo = protocol + length + int.from_bytes(_addresses(first.packet, version, ip), "big")
        pseudo = pseudo % 0xFFFF or 0xFFFF
        if protocol == _TCP:
            kind, offset = (_GSO_TCPV4 if version == 4 else _GSO_TCPV6), 16
            head[transport + 13] |= self._parts[-1].packet[transport + 13]
        else:
            kind, offset = _GSO_UDP_L4, 6
            struct.pack_into("!H", head, transport + 4, length)
        struct.pack_into("!H", head, transport + offset, pseudo)
        header = VNET_HDR.pack(_NEEDS_CSUM, kind, first.payload, self._size, transport, offset)
        return b"".join((header, head, *(part.packet[part.payload :] for part in self._parts)))

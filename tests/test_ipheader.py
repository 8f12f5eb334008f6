"""The cheap view of an IP header, compared with a slow reader and with dpkt, for any bytes."""

import ipaddress
import itertools
import struct
from typing import Any

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import aiotun
from aiotun import IPHeader

from .helpers import make_icmp_echo

FIELDS = (
    "version",
    "src",
    "dst",
    "src_bytes",
    "dst_bytes",
    "proto",
    "ttl",
    "total_length",
    "payload_offset",
    "fragment",
    "sport",
    "dport",
)


def fields(packet: bytes | bytearray | memoryview) -> dict[str, Any] | None:
    """The fields of IPHeader, or None if it raises ValueError. It must not raise anything else."""
    try:
        header = IPHeader(packet)
    except ValueError:
        return None
    assert repr(header)
    return {name: getattr(header, name) for name in FIELDS}


def reference(packet: bytes) -> dict[str, Any] | None:
    """The same from another reader, byte by byte."""
    if not packet or packet[0] >> 4 not in (4, 6):
        return None
    four = packet[0] >> 4 == 4
    if len(packet) < (20 if four else 40):
        return None
    more = later = False
    if four:
        addresses, ttl, proto = packet[12:20], packet[8], packet[9]
        total, offset = packet[2] << 8 | packet[3], packet[0] % 16 * 4
        more = bool(packet[6] & 0x20)
        later = bool(packet[6] & 0x1F or packet[7])
        if offset < 20 or offset > total or offset > len(packet):
            return None
    else:
        addresses, ttl, proto = packet[8:40], packet[7], packet[6]
        total, offset = 40 + (packet[4] << 8 | packet[5]), 40
        held = packet[:total]
        while proto in (0, 43, 44, 51, 60) and not later:
            head = held[offset : offset + 8]
            if len(head) < 8:
                return None
            if proto == 44:
                place = head[2] << 8 | head[3]
                more, later = bool(place & 1), place >= 8
            offset += {44: 8, 51: 8 + 4 * head[1]}.get(proto, 8 + 8 * head[1])
            proto = head[0]
            if offset > len(held):
                return None
    half = len(addresses) // 2
    ports = packet[:total][offset : offset + 4]
    with_ports = proto in (6, 17, 33, 132, 136) and not later and len(ports) == 4
    return {
        "version": 4 if four else 6,
        "src": ipaddress.ip_address(addresses[:half]),
        "dst": ipaddress.ip_address(addresses[half:]),
        "src_bytes": addresses[:half],
        "dst_bytes": addresses[half:],
        "proto": proto,
        "ttl": ttl,
        "total_length": total,
        "payload_offset": offset,
        "fragment": more or later,
        "sport": ports[0] << 8 | ports[1] if with_ports else None,
        "dport": ports[2] << 8 | ports[3] if with_ports else None,
    }


def ip4(
    payload: bytes = b"", *, options: bytes = b"", proto: int = 17, place: int = 0, **other: int
) -> bytes:
    first = other.get("first", 0x45 + len(options) // 4)
    length = other.get("length", 20 + len(options) + len(payload))
    head = struct.pack("!BBHHHBBH", first, 3, length, 7, place, other.get("ttl", 9), proto, 0xFFFF)
    return head + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + options + payload


def ip6(payload: bytes = b"", *, proto: int = 17, **other: int) -> bytes:
    length = other.get("length", len(payload))
    head = struct.pack("!IHBB", 0x6ABCDEF0, length, proto, other.get("ttl", 9))
    return head + bytes(range(16)) + bytes(range(16, 32)) + payload


PORTS = b"\x12\x34\x00\x35"
UDP = PORTS + b"\x00\x08\x00\x00"


def extension(kind: int, following: int, units: int = 0) -> bytes:
    """An extension header of 8 bytes and `units` more of its own unit."""
    more = units * (4 if kind == 51 else 8)
    return bytes([following, units]) + bytes(6 + more)


def fragment_header(following: int, place: int) -> bytes:
    return struct.pack("!BBHI", following, 0, place, 1)


# --- By hand -------------------------------------------------------------------------------------


def test_every_field_of_an_ipv4_header() -> None:
    header = IPHeader(ip4(UDP))
    assert (header.version, header.proto, header.ttl) == (4, 17, 9)
    assert header.src == ipaddress.IPv4Address("10.0.0.1")
    assert header.dst == ipaddress.IPv4Address("10.0.0.2")
    assert (header.src_bytes, header.dst_bytes) == (b"\x0a\0\0\1", b"\x0a\0\0\2")
    assert (header.total_length, header.payload_offset, header.fragment) == (28, 20, False)
    assert (header.sport, header.dport) == (0x1234, 53)
    assert repr(header) == "<IPHeader 10.0.0.1 > 10.0.0.2 proto=17 ttl=9 sport=4660 dport=53>"


def test_every_field_of_an_ipv6_header() -> None:
    header = IPHeader(ip6(UDP))
    assert (header.version, header.proto, header.ttl) == (6, 17, 9)
    assert header.src == ipaddress.IPv6Address(bytes(range(16)))
    assert header.dst == ipaddress.IPv6Address(bytes(range(16, 32)))
    assert (header.src_bytes, header.dst_bytes) == (bytes(range(16)), bytes(range(16, 32)))
    assert (header.total_length, header.payload_offset, header.fragment) == (48, 40, False)
    assert (header.sport, header.dport) == (0x1234, 53)


def test_options_are_no_payload() -> None:
    for count in range(1, 11):
        header = IPHeader(ip4(UDP, options=bytes(4 * count)))
        assert (header.payload_offset, header.sport) == (20 + 4 * count, 0x1234)


@pytest.mark.parametrize("kinds", list(itertools.permutations([0, 43, 44, 51, 60], 3)))
def test_extension_headers_are_passed(kinds: tuple[int, ...]) -> None:
    chain = b""
    for kind, following in zip(kinds, (*kinds[1:], 6), strict=True):
        chain += fragment_header(following, 1) if kind == 44 else extension(kind, following, 2)
    header = IPHeader(ip6(chain + UDP, proto=kinds[0]))
    assert (header.proto, header.payload_offset) == (6, 40 + len(chain))
    assert header.fragment is (44 in kinds)
    assert (header.sport, header.dport) == (0x1234, 53)


@pytest.mark.parametrize("proto", [50, 59, 135])
def test_the_first_other_header_ends_the_chain(proto: int) -> None:
    header = IPHeader(ip6(extension(0, proto) + UDP, proto=0))
    assert (header.proto, header.payload_offset, header.sport) == (proto, 48, None)
    header = IPHeader(ip6(extension(0, proto), proto=0))  # and nothing after it
    assert (header.payload_offset, header.total_length) == (48, 48)


@pytest.mark.parametrize(
    ("place4", "place6", "fragment", "ports"),
    [
        (0x0000, 0x0000, False, True),  # IPv6: an atomic fragment
        (0x4000, 0x0006, False, True),  # don't fragment; IPv6's two reserved bits
        (0x8000, 0x0000, False, True),
        (0x2000, 0x0001, True, True),
        (0x2001, 0x0009, True, False),
        (0x0001, 0x0008, True, False),
        (0x1FFF, 0xFFF8, True, False),
    ],
)
def test_only_first_fragments_have_ports(
    place4: int, place6: int, fragment: bool, ports: bool
) -> None:
    four = IPHeader(ip4(UDP, place=place4))
    six = IPHeader(ip6(fragment_header(17, place6) + UDP, proto=44))
    for header in (four, six):
        assert header.fragment is fragment
        assert (header.sport is not None, header.dport is not None) == (ports, ports)
        assert header.proto == 17


def test_what_follows_a_later_fragments_header_is_no_header() -> None:
    header = IPHeader(ip6(fragment_header(60, 8) + b"\xff" * 8, proto=44))
    assert (header.proto, header.payload_offset) == (60, 48)


def test_only_protocols_with_ports_have_ports() -> None:
    for proto in range(256):
        header = IPHeader(ip4(PORTS, proto=proto))
        found = (0x1234, 53) if proto in (6, 17, 33, 132, 136) else (None, None)
        assert (header.sport, header.dport) == found


def test_ports_that_are_cut_off() -> None:
    for packet, header in ((ip4(UDP), 20), (ip6(UDP), 40)):
        for length in range(header, header + 4):
            assert IPHeader(packet[:length]).sport is None
            assert IPHeader(packet[:length]).dport is None
        assert IPHeader(packet[: header + 4]).dport == 53
    # The bytes are there, but outside of the packet's length.
    assert IPHeader(ip4(UDP, length=23)).sport is None
    assert IPHeader(ip6(UDP, length=3)).sport is None
    assert IPHeader(ip6(UDP, length=4)).sport == 0x1234


@pytest.mark.parametrize(
    ("packet", "said"),
    [
        (b"", "truncated after 0 bytes"),
        (b"\x45", "truncated after 1 bytes"),
        (ip4()[:19], "truncated after 19 bytes"),
        (ip6()[:39], "truncated after 39 bytes"),
        (b"\x00" * 40, "the version must be 4 or 6, got 0"),
        (b"\x50" + bytes(40), "the version must be 4 or 6, got 5"),
        (b"\xff" * 40, "the version must be 4 or 6, got 15"),
        (ip4(first=0x44), "a header of 16 bytes in a packet of 20"),
        (ip4(first=0x40), "a header of 0 bytes in a packet of 20"),
        (ip4(first=0x46), "a header of 24 bytes in a packet of 20"),
        (ip4(first=0x46, length=24), "the packet has 20"),
        (ip4(length=19), "total length is 19 bytes"),
        (ip4(UDP, length=0), "total length is 0 bytes"),
        (ip6(bytes(7), proto=0), "47 bytes"),
        (ip6(b"\x11\x01" + bytes(13), proto=0), "55 bytes"),
        (ip6(b"\x11\x01" + bytes(14), proto=0, length=15), "55 bytes"),
        (ip6(b"\x3c\x00" + bytes(6), proto=0), "48 bytes"),
        (ip6(b"\x11\x00\xc2\x04" + bytes(4) + UDP, proto=0, length=0), "40 bytes"),  # a jumbogram
        (ip6(bytes(65535), proto=0), "65575 bytes"),  # as many extension headers as possible
    ],
)
def test_malformed_packets_say_what_is_wrong(packet: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IPHeader(packet)
    assert reference(packet) is None


@pytest.mark.parametrize("packet", [ip4(UDP), ip6(UDP), ip6(extension(60, 17) + UDP, proto=60)])
def test_headers_of_any_bytes_like_object_copy_addresses(packet: bytes) -> None:
    expected = fields(packet)
    assert expected is not None
    views = (bytearray(packet), memoryview(packet), memoryview(b"?" + packet)[1:])
    for given_packet in views:
        assert fields(given_packet) == expected
        header = IPHeader(given_packet)
        assert (type(header.src_bytes), type(header.dst_bytes)) == (bytes, bytes)


def test_a_header_takes_no_other_attributes() -> None:
    assert aiotun.IPHeader is IPHeader
    with pytest.raises(AttributeError):
        IPHeader(ip4()).anything = 1  # type: ignore[attr-defined]  # that is the test


# --- Any bytes -----------------------------------------------------------------------------------

U8 = st.integers(0, 255)
STARTS = st.one_of(
    st.builds(
        ip4,
        st.binary(max_size=12),
        options=st.integers(0, 10).map(lambda words: bytes(4 * words)),
        proto=st.sampled_from([1, 6, 17, 132]),
        place=st.sampled_from([0, 0x4000, 0x2000, 1, 0x2001]),
    ),
    st.builds(
        ip6,
        st.lists(
            st.one_of(
                st.builds(extension, st.just(0), st.sampled_from([0, 6, 17, 43, 44, 51, 60]), U8),
                st.builds(
                    fragment_header, st.sampled_from([0, 6, 17, 43, 44, 51, 60]), st.integers(0, 9)
                ),
                st.binary(max_size=16),
            ),
            max_size=4,
        ).map(b"".join),
        proto=st.sampled_from([0, 6, 17, 43, 44, 50, 51, 59, 60]),
    ),
)
CHANGED = st.builds(
    lambda packet, changes, length: bytes(changes.get(i, byte) for i, byte in enumerate(packet))[
        :length
    ],
    STARTS,
    st.dictionaries(st.integers(0, 63), U8, max_size=3),
    st.one_of(st.just(5000), st.integers(0, 120)),
)


@given(st.one_of(st.binary(max_size=100), CHANGED))
@example(ip6(fragment_header(60, 0) + extension(60, 17) + UDP, proto=44))
def test_headers_agree_with_the_reference(packet: bytes) -> None:
    assert fields(packet) == reference(packet)


@given(CHANGED)
def test_headers_agree_with_dpkt(packet: bytes) -> None:
    """Only if dpkt can decode it, and without known differences."""
    found = fields(packet)
    if found is None:
        return
    try:
        decoded = aiotun.decode_packet(packet)
    except aiotun.PacketDecodeError:
        return
    assert (decoded.src, decoded.dst) == (found["src_bytes"], found["dst_bytes"])
    if isinstance(decoded, dpkt.ip.IP):
        assert (decoded.p, decoded.ttl, decoded.len) == (
            found["proto"],
            found["ttl"],
            found["total_length"],
        )
        assert bool(decoded.mf or decoded.offset) is found["fragment"]
    else:
        assert (decoded.hlim, decoded.plen + 40) == (found["ttl"], found["total_length"])
    if isinstance(decoded.data, dpkt.udp.UDP | dpkt.tcp.TCP) and found["sport"] is not None:
        assert (decoded.data.sport, decoded.data.dport) == (found["sport"], found["dport"])


def test_headers_read_the_packets_of_the_test_helpers() -> None:
    for source, target in (("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")):
        packet = make_icmp_echo(source, target)
        header = IPHeader(packet)
        assert (str(header.src), str(header.dst)) == (source, target)
        assert header.total_length == len(packet)
        assert header.proto in (1, 58)

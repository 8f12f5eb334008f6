"""The flow of a packet: the same in both directions, and defined for any bytes."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from aiotun._packets.flow import flow_hash

four = st.binary(min_size=4, max_size=4)
sixteen = st.binary(min_size=16, max_size=16)
ports = st.integers(0, 0xFFFF)


def ipv4(source: bytes, target: bytes, one: int, other: int, protocol: int, fragment: int) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, fragment, 64, protocol, 0)
    return head + source + target + struct.pack("!HH", one, other) + bytes(16)


def ipv6(source: bytes, target: bytes, one: int, other: int, following: int) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, 20, following, 64)
    return head + source + target + struct.pack("!HH", one, other) + bytes(16)


@given(four, four, ports, ports, st.sampled_from([6, 17, 132]))
def test_both_directions_of_ipv4(a: bytes, b: bytes, one: int, other: int, protocol: int) -> None:
    there = ipv4(a, b, one, other, protocol, 0)
    back = ipv4(b, a, other, one, protocol, 0x4000)
    assert flow_hash(there, 0, frame=False) == flow_hash(back, 0, frame=False)


@given(sixteen, sixteen, ports, ports, st.sampled_from([6, 17, 136]))
def test_both_directions_of_ipv6(a: bytes, b: bytes, one: int, other: int, following: int) -> None:
    there = ipv6(a, b, one, other, following)
    back = ipv6(b, a, other, one, following)
    assert flow_hash(there, 0, frame=False) == flow_hash(back, 0, frame=False)


@given(four, four, ports, ports, st.integers(0, 0x3FFF))
def test_fragments_keep_together(a: bytes, b: bytes, one: int, other: int, place: int) -> None:
    """The first has ports and the more-fragments bit, the others have neither."""
    first = ipv4(a, b, one, other, 17, 0x2000)
    later = ipv4(a, b, other, one, 17, place | 1)
    assert flow_hash(first, 0, frame=False) == flow_hash(later, 0, frame=False)


def test_flows_are_told_apart() -> None:
    a, b = b"\x0a\0\0\1", b"\x0a\0\0\2"
    found = {flow_hash(ipv4(a, b, port, 80, 6, 0), 0, frame=False) % 4 for port in range(64)}
    assert found == {0, 1, 2, 3}
    # ICMP has no ports: these bytes are its payload.
    ping = {flow_hash(ipv4(a, b, port, 80, 1, 0), 0, frame=False) for port in range(64)}
    assert len(ping) == 1


@given(four, four, ports, ports, st.sampled_from([b"", b"\x81\0\0\7", b"\x88\xa8\0\7\x81\0\0\7"]))
def test_a_frame_has_the_flow_of_its_packet(
    a: bytes, b: bytes, one: int, other: int, tags: bytes
) -> None:
    """Its tags, its MACs and the header before it don't matter."""
    packet = ipv4(a, b, one, other, 6, 0)
    frame = bytes(10) + b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + tags + b"\x08\0" + packet
    assert flow_hash(frame, 10, frame=True) == flow_hash(packet, 0, frame=False)
    arp = b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + tags + b"\x08\6" + bytes(28)
    back = b"\2\0\0\0\0\2" + b"\2\0\0\0\0\1" + tags + b"\x08\6" + bytes(28)
    assert flow_hash(arp, 0, frame=True) == flow_hash(back, 0, frame=True)


@given(st.binary(max_size=80), st.sampled_from([0, 4, 10]), st.booleans())
def test_any_bytes_have_a_flow(data: bytes, start: int, frame: bool) -> None:
    assert flow_hash(data, start, frame=frame) >= 0

"""Datagrams in IP packets, fragments, and ICMP errors: functions of bytes."""

import random
import struct
from ipaddress import ip_address

import dpkt
import pytest

from aiotun import IPHeader, reply
from aiotun._netstack import answers
from aiotun._packets import fragments, udp
from aiotun._packets.fragments import Reassembler, fragment, fragment_of
from aiotun.netstack import Refusal

from .helpers import checksum, make_icmp_echo

HOSTS = {4: ("10.0.0.1", "192.0.2.9"), 6: ("fd00::1", "2001:db8::9")}
each_version = pytest.mark.parametrize("version", [4, 6])


def end(host: str, port: int) -> bytes:
    return ip_address(host).packed + port.to_bytes(2, "big")


def ends(version: int) -> tuple[bytes, bytes]:
    one, other = HOSTS[version]
    return end(one, 4000), end(other, 53)


def unreachable(packet: bytes, refusal: Refusal | None = None) -> bytes:
    return answers.unreachable(packet, IPHeader(packet), refusal)


def ip_of(packet: bytes) -> dpkt.ip.IP | dpkt.ip6.IP6:
    return dpkt.ip.IP(packet) if packet[0] >> 4 == 4 else dpkt.ip6.IP6(packet)


# --- Datagrams -----------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("size", [0, 1, 64, 1473, 65507])
def test_a_datagram_is_what_another_parser_reads(version: int, size: int) -> None:
    source, target = ends(version)
    data = random.Random(size).randbytes(size)
    packet = udp.build(source, target, data, 0x1234)
    ip = ip_of(packet)
    assert (ip.src + ip.udp.sport.to_bytes(2, "big"), ip.dst + ip.udp.dport.to_bytes(2, "big")) == (
        source,
        target,
    )
    assert bytes(ip.udp.data) == data
    start = 20 if version == 4 else 40
    pseudo = source[:-2] + target[:-2] + struct.pack("!II", len(packet) - start, 17)
    assert checksum(pseudo + packet[start:]) == 0
    if version == 4:
        assert checksum(packet[:20]) == 0
        assert packet[4:8] == b"\x12\x34\0\0"  # routers may fragment it
    assert udp.parse(packet) == (source, target, data)
    assert udp.parse(packet + b"after the end") == (source, target, data)


@each_version
def test_a_sum_of_zero_is_sent_as_ones(version: int) -> None:
    """Zero would mean that the sender has computed none, and in IPv6 that the packet is invalid."""
    source, target = ends(version)
    plain = udp.build(source, target, b"\0\0", 0)
    place = (20 if version == 4 else 40) + 6
    value = plain[place : place + 2]
    packet = udp.build(source, target, value, 0)
    assert packet[place : place + 2] == b"\xff\xff"
    assert udp.parse(packet) == (source, target, value)


@each_version
def test_any_bit_that_is_flipped_leaves_it_to_the_kernel(version: int) -> None:
    packet = udp.build(*ends(version), b"abcd", 7)
    unsummed = range(0 if version == 6 else 20, 0 if version == 4 else 8)
    for at in range(len(packet)):
        if version == 6 and at in unsummed and at not in (4, 5, 6):
            continue  # IPv6's header has no checksum of its own: traffic class, flow, hop limit
        for bit in range(8):
            damaged = bytearray(packet)
            damaged[at] ^= 1 << bit
            assert udp.parse(bytes(damaged)) is None, (at, bit)


@each_version
def test_a_truncated_packet_is_left_to_the_kernel(version: int) -> None:
    packet = udp.build(*ends(version), b"abcd", 7)
    for size in range(len(packet)):
        assert udp.parse(packet[:size]) is None


@each_version
def test_a_missing_checksum_is_valid_in_ipv4_only(version: int) -> None:
    source, target = ends(version)
    packet = bytearray(udp.build(source, target, b"abcd", 7))
    place = (20 if version == 4 else 40) + 6
    packet[place : place + 2] = bytes(2)
    expected = (source, target, b"abcd") if version == 4 else None
    assert udp.parse(bytes(packet)) == expected


@each_version
def test_a_partial_checksum_is_believed_where_the_sender_says_so(version: int) -> None:
    source, target = ends(version)
    packet = bytearray(udp.build(source, target, b"abcd", 7))
    packet[(20 if version == 4 else 40) + 6] ^= 1
    assert udp.parse(bytes(packet)) is None
    assert udp.parse(bytes(packet), True) == (source, target, b"abcd")


def test_options_and_extension_headers_are_skipped() -> None:
    source, target = ends(4)
    ip = dpkt.ip.IP(udp.build(source, target, b"abcd", 7))
    ip.opts = b"\x01\x01\x01\x00"
    ip.hl, ip.len, ip.sum = 6, ip.len + 4, 0
    assert udp.parse(bytes(ip)) == (source, target, b"abcd")

    source, target = ends(6)
    plain = udp.build(source, target, b"abcd", 7)
    padding = bytes((17, 0, 1, 4, 0, 0, 0, 0))  # destination options with PadN
    packet = plain[:4] + struct.pack("!HB", 12 + 8, 60) + plain[7:40] + padding + plain[40:]
    assert udp.parse(packet) == (source, target, b"abcd")
    cut = packet[:40] + b"\x11\xff" + packet[42:]  # longer than the packet
    assert udp.parse(cut) is None


@each_version
def test_other_packets_are_no_datagrams(version: int) -> None:
    assert udp.parse(make_icmp_echo(*HOSTS[version])) is None
    for each in fragment(udp.build(*ends(version), bytes(3000), 1), 1280, 1):
        assert udp.parse(each) is None


# --- ICMP ----------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize(
    ("what", "codes"),
    [
        (Refusal.NET, {4: (3, 0), 6: (1, 0)}),
        (Refusal.HOST, {4: (3, 1), 6: (1, 3)}),
        (None, {4: (3, 3), 6: (1, 4)}),
        (Refusal.PROHIBITED, {4: (3, 13), 6: (1, 1)}),
    ],
)
@pytest.mark.parametrize("size", [4, 4000])
def test_an_error_quotes_the_packet(
    version: int, what: Refusal | None, codes: dict[int, tuple[int, int]], size: int
) -> None:
    source, target = ends(version)
    packet = udp.build(source, target, bytes(size), 7)
    error = unreachable(packet, what)
    ip = ip_of(error)
    assert (ip.src, ip.dst) == (target[:-2], source[:-2])
    icmp = ip.data
    assert (icmp.type, icmp.code) == codes[version]
    start = 20 if version == 4 else 40
    quote = error[start + 8 :]
    assert packet.startswith(quote)
    assert len(quote) >= min(len(packet), 548 if version == 4 else 1232)
    assert len(error) <= (576 if version == 4 else 1280)
    pseudo = target[:-2] + source[:-2] + struct.pack("!II", len(error) - start, 58)
    assert checksum((b"" if version == 4 else pseudo) + error[start:]) == 0
    # What the sender of the packet reads.
    assert udp.quoted(error) == udp.Quoted(source, target, what is None, 0)


@each_version
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_an_echo_reply_repeats_the_request(version: int, size: int) -> None:
    request = make_icmp_echo(*HOSTS[version], 7, 9, random.Random(size).randbytes(size))
    expected = (reply.icmp_echo if version == 4 else reply.icmpv6_echo)(request)
    assert answers.echo_reply(request + b"after the end", IPHeader(request)) == expected


def test_a_packet_too_big_tells_the_mtu() -> None:
    source, target = ends(6)
    packet = udp.build(source, target, bytes(1400), 7)
    error = bytearray(unreachable(packet))
    error[40:48] = struct.pack("!BBHI", 2, 0, 0, 1300)
    pseudo = bytes(error[8:40]) + struct.pack("!II", len(error) - 40, 58)
    error[42:44] = struct.pack("!H", checksum(pseudo + bytes(error[40:])))
    assert udp.quoted(bytes(error)) == udp.Quoted(source, target, False, 1300)


@each_version
def test_a_damaged_error_says_nothing(version: int) -> None:
    error = unreachable(udp.build(*ends(version), b"abcd", 7))
    start = 20 if version == 4 else 40
    for at in range(start, len(error)):
        damaged = bytearray(error)
        damaged[at] ^= 0x10
        assert udp.quoted(bytes(damaged)) is None
    for size in range(len(error)):
        assert udp.quoted(error[:size]) is None
    assert udp.quoted(make_icmp_echo(*HOSTS[version])) is None


# --- Fragments -----------------------------------------------------------------------------------


def together(pieces: list[bytes], reassembler: Reassembler | None = None) -> bytes | None:
    reassembler = reassembler or Reassembler()
    whole = None
    for piece in pieces:
        assert whole is None
        assert fragment_of(piece) == 17
        whole = reassembler.add(piece, 0.0)
    return whole


@each_version
@pytest.mark.parametrize("seed", range(5))
def test_fragments_in_any_order_make_the_packet_again(version: int, seed: int) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(chance.choice([9001, 12_345, 65507]))
    packet = udp.build(*ends(version), data, seed)
    assert fragment_of(packet) == 0
    mtu = chance.choice([1280, 1281, 9000] if version == 6 else [68, 576, 1280])
    pieces = fragment(packet, mtu, seed)
    assert all(len(piece) <= mtu for piece in pieces)
    for piece in pieces:
        ip_of(piece)
        assert version == 6 or checksum(piece[:20]) == 0
    chance.shuffle(pieces)
    again = [piece for piece in pieces for _ in range(2)][:-1]  # the network may copy packets
    reassembler = Reassembler()
    assert together(again, reassembler) == packet
    assert reassembler.dropped == 0
    assert udp.parse(packet) == (*ends(version), data)


@each_version
def test_a_packet_that_fits_is_not_fragmented(version: int) -> None:
    packet = udp.build(*ends(version), bytes(1280 - (28 if version == 4 else 48)), 7)
    assert fragment(packet, len(packet), 1) == [packet]
    assert len(fragment(packet, len(packet) - 1, 1)) == 2


@each_version
def test_overlapping_fragments_are_dropped_with_their_packet(version: int) -> None:
    packet = udp.build(*ends(version), bytes(4000), 7)
    pieces = fragment(packet, 1280, 1)
    other = fragment(packet, 1400, 1)
    reassembler = Reassembler()
    assert together([pieces[0], other[1], *pieces[2:]], reassembler) is None
    changed = bytearray(pieces[1])
    changed[-1] ^= 1
    assert together([pieces[0], pieces[1], bytes(changed)], reassembler) is None
    assert reassembler.dropped == len(pieces) + 3
    reassembler = Reassembler()
    assert together([pieces[-1], pieces[-1][:-1] + b"x"], reassembler) is None
    assert reassembler.dropped == 2


@each_version
def test_incomplete_packets_are_dropped_after_a_while_and_counted(version: int) -> None:
    pieces = fragment(udp.build(*ends(version), bytes(4000), 7), 1280, 1)
    reassembler = Reassembler()
    reassembler.add(pieces[0], 0.0)
    reassembler.add(pieces[1], 29.0)
    for piece in pieces[2:]:
        assert reassembler.add(piece, 31.0) is None
    assert reassembler.dropped == 2
    assert reassembler.add(pieces[1], 32.0) is None
    assert reassembler.add(pieces[0], 33.0) is not None


@each_version
def test_memory_is_bounded(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "_MAX_BYTES", 20_000)
    reassembler = Reassembler()
    sent = [fragment(udp.build(*ends(version), bytes(2000), n), 1280, n) for n in range(50)]
    for pieces in sent:
        assert reassembler.add(pieces[0], 0.0) is None
    assert 30 < reassembler.dropped < 50
    assert reassembler.add(sent[-1][1], 0.0) is not None  # the youngest are kept
    reassembler.clear()
    assert reassembler.dropped == 49


@each_version
def test_invalid_fragments_are_dropped_and_counted(version: int) -> None:
    packet = udp.build(*ends(version), bytes(4000), 7)
    first, *_, last = fragment(packet, 1280, 1)
    reassembler = Reassembler()
    invalid = [first[:-8], first[: 20 if version == 4 else 48]]
    if version == 4:
        invalid += [first[:11] + bytes((first[11] ^ 1,)) + first[12:]]
        beyond = fragments._fragment4(last[:20], 65528, False, bytes(100))
        odd = fragments._fragment4(first[:20], 0, True, bytes(9))
    else:
        beyond = fragments._fragment6(packet, 65528, False, 1, bytes(100))
        odd = fragments._fragment6(packet, 0, True, 1, bytes(9))
    invalid += [beyond, odd]
    for piece in invalid:
        assert fragment_of(piece) == 17
        assert reassembler.add(piece, 0.0) is None
    assert reassembler.dropped == len(invalid)


def test_an_atomic_fragment_is_a_whole_packet() -> None:
    source, target = ends(6)
    packet = udp.build(source, target, b"abcd", 7)
    atomic = fragments._fragment6(packet, 0, False, 1, packet[40:])
    assert fragment_of(atomic) == 0
    assert udp.parse(atomic) == (source, target, b"abcd")


def test_what_is_no_packet_is_no_fragment() -> None:
    for size in range(48):
        assert fragment_of(b"\x60" + bytes(size)) == 0
        assert fragment_of(bytes(size)) == 0

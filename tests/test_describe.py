"""Packets as lines of text: compared with tcpdump's, and for bytes that are not packets."""

import json
import random
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotun._cli.describe import describe
from aiotun.capture import PcapWriter

from .helpers import make_icmp_echo
from .test_capture import run

A, B = "10.0.0.1", "10.0.0.2"


def ip4(protocol: int, payload: bytes, fragment: int = 0, options: bytes = b"") -> bytes:
    header = 20 + len(options)
    return (
        struct.pack("!BBHHHBBH", 0x40 | header // 4, 0, header + len(payload), 7, fragment, 64,
                    protocol, 0)
        + socket.inet_aton(A) + socket.inet_aton(B) + options + payload
    )  # fmt: skip


def ip6(protocol: int, payload: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, "fd00::1")
    addresses += socket.inet_pton(socket.AF_INET6, "fd00::2")
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + addresses + payload


def tcp(flags: int, payload: bytes = b"", options: bytes = b"") -> bytes:
    offset = (20 + len(options)) // 4 << 4
    return (
        struct.pack("!HHIIBBHHH", 40000, 9, 1000, 2000, offset, flags, 512, 0, 0)
        + options
        + payload
    )


def udp(payload: bytes) -> bytes:
    return struct.pack("!HHHH", 40000, 9, 8 + len(payload), 0) + payload


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    return struct.pack("!BBH", kind, code, 0) + rest


def ether(kind: int, payload: bytes) -> bytes:
    return bytes.fromhex("020000000001 020000000002") + struct.pack("!H", kind) + payload


def arp(operation: int) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x800, 6, 4, operation)
    return head + bytes(6) + socket.inet_aton(A) + bytes(6) + socket.inet_aton(B)


NS = icmp(135, 0, bytes(4) + socket.inet_pton(socket.AF_INET6, "fd00::9"))
HOP_BY_HOP = bytes([17, 0]) + bytes(6)

# The same lines as tcpdump's.
AS_TCPDUMP = [
    make_icmp_echo(A, B),
    make_icmp_echo("fd00::1", "fd00::2", ident=3, seq=9),
    ip4(6, tcp(0x02)),
    ip4(6, tcp(0x12, options=bytes([1, 1, 1, 1]))),
    ip4(6, tcp(0x11)),
    ip4(6, tcp(0x00)),
    ip4(17, udp(b"hello")),
    ip4(17, udp(b"hello"), options=bytes(4)),
    ip6(17, udp(b"hello")),
    ip6(58, NS),
]
# Lines that differ from tcpdump's.
OURS = [
    (ip4(6, tcp(0x18, b"hello")), "IP 10.0.0.1.40000 > 10.0.0.2.9: Flags [P.], seq 1000:1005, "
     "ack 2000, win 512, length 5"),
    (ip4(6, tcp(0xFF)), "IP 10.0.0.1.40000 > 10.0.0.2.9: Flags [FSRP.UEW], seq 1000, ack 2000, "
     "win 512, length 0"),
    (ip4(1, icmp(3, 3, bytes(4))), "IP 10.0.0.1 > 10.0.0.2: ICMP port unreachable, length 8"),
    (ip4(1, icmp(77, 5, bytes(4))), "IP 10.0.0.1 > 10.0.0.2: ICMP type 77, code 5, length 8"),
    (ip4(89, bytes(9)), "IP 10.0.0.1 > 10.0.0.2: OSPF, length 9"),
    (ip4(200, bytes(9)), "IP 10.0.0.1 > 10.0.0.2: ip-proto-200, length 9"),
    (ip4(17, udp(b"hello"), fragment=0x2000), "IP 10.0.0.1.40000 > 10.0.0.2.9: UDP, length 5 "
     "fragment 7 at 0+"),
    (ip4(17, bytes(16), fragment=0x0002), "IP 10.0.0.1 > 10.0.0.2: UDP, fragment 7 at 16, "
     "length 16"),
    (ip6(0, HOP_BY_HOP + udp(b"hello")), "IP6 fd00::1.40000 > fd00::2.9: UDP, length 5"),
    (ip6(44, bytes([17, 0, 0, 9, 0, 0, 1, 0]) + bytes(5)), "IP6 fd00::1 > fd00::2: UDP, "
     "fragment 256 at 8+, length 5"),
    (b"", "[cut within the IP header, after 0 bytes]"),
    (b"\x45", "IP [cut within the IP header, after 1 bytes]"),
    (b"\xff" * 30, "not an IP packet: version 15, length 30"),
    (ip4(17, udp(b"hello"))[:-2], "IP 10.0.0.1.40000 > 10.0.0.2.9: UDP, length 3 "
     "[2 bytes missing]"),
    (ip4(6, b"\0\1\0\2\0"), "IP 10.0.0.1.1 > 10.0.0.2.2: [cut within the TCP header, "
     "after 25 bytes]"),
    (b"\x4f" + ip4(17, b"")[1:], "IP [header length 60 in a packet of 20 bytes]"),
    (ip4(17, udp(b"hello")) + b"padding", "IP 10.0.0.1.40000 > 10.0.0.2.9: UDP, length 5"),
]  # fmt: skip
FRAMES = [
    (ether(0x806, arp(1)), "ARP, Request who-has 10.0.0.2 tell 10.0.0.1, length 28"),
    (ether(0x806, arp(2)), "ARP, Reply 10.0.0.1 is-at 00:00:00:00:00:00, length 28"),
    (ether(0x806, arp(9)), "ARP, operation 9, 10.0.0.1 to 10.0.0.2, length 28"),
    (ether(0x806, arp(1)[:9]), "ARP, [cut within the ARP header, after 23 bytes]"),
    (ether(0x800, make_icmp_echo(A, B)), "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, "
     "length 12"),
    (ether(0x8100, b"\x20\x05\x08\x00" + ip4(17, udp(b""))), "vlan 5, IP 10.0.0.1.40000 > "
     "10.0.0.2.9: UDP, length 0"),
    (ether(0x9100, b"\0\5\x92\0\0\6\x08\x00" + ip4(17, udp(b""))), "vlan 5, vlan 6, IP "
     "10.0.0.1.40000 > 10.0.0.2.9: UDP, length 0"),
    (ether(0x88A8, b"\0\5\x88\xa8\0\6\x81\0\0\7\x08\x00" + ip4(17, udp(b""))),
     "vlan 5, vlan 6, vlan 7, IP 10.0.0.1.40000 > 10.0.0.2.9: UDP, length 0"),
    (ether(0x8100, b"\0\5\x81\0" * 9), "vlan 5, " * 8 + "02:00:00:00:00:02 > "
     "02:00:00:00:00:01, ethertype 0x8100, length 4"),
    (ether(0x88CC, bytes(5)), "02:00:00:00:00:02 > 02:00:00:00:00:01, ethertype 0x88cc, length 5"),
    (ether(46, bytes(46)), "02:00:00:00:00:02 > 02:00:00:00:00:01, 802.3, length 46"),
    (bytes(13), "[cut within the Ethernet header, after 13 bytes]"),
]  # fmt: skip


def test_tcpdumps_own_lines(tmp_path: Path) -> None:
    with PcapWriter(tmp_path / "a.pcap") as writer:
        for packet in AS_TCPDUMP:
            writer.write(packet)
    # Without TCP's options, which only tcpdump shows.
    said = run("tcpdump", "-n", "-t", "-S", "-r", str(tmp_path / "a.pcap")).splitlines()
    said = [line.replace(", options [nop,nop,nop,nop]", "") for line in said]
    assert [describe(packet, frame=False)[0] for packet in AS_TCPDUMP] == said


@pytest.mark.parametrize(("packet", "line"), OURS)
def test_each_packet_has_its_line(packet: bytes, line: str) -> None:
    assert describe(packet, frame=False)[0] == line


@pytest.mark.parametrize(("frame", "line"), FRAMES)
def test_each_frame_has_its_line(frame: bytes, line: str) -> None:
    assert describe(frame, frame=True)[0] == line


def test_fields_of_a_tagged_frame_are_complete() -> None:
    assert describe(ether(0x8100, b"\x20\x05\x08\x00" + ip4(6, tcp(0x12))), frame=True)[1] == {
        "length": 58,
        "src_mac": "02:00:00:00:00:02",
        "dst_mac": "02:00:00:00:00:01",
        "vlan": [5],
        "version": 4,
        "src": A,
        "dst": B,
        "ttl": 64,
        "protocol": "TCP",
        "sport": 40000,
        "dport": 9,
        "flags": "S.",
        "seq": 1000,
        "ack": 2000,
        "window": 512,
        "payload_length": 0,
    }


def check(data: bytes, frame: bool) -> None:
    line, fields = describe(data, frame=frame)
    assert line
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 2000
    assert fields["length"] == len(data)
    assert json.dumps(fields).isascii()


SEEDS = [*AS_TCPDUMP, *(packet for packet, _ in OURS)]
FRAME_SEEDS = [frame for frame, _ in FRAMES] + [ether(0x86DD, packet) for packet in SEEDS]


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=1000)
def test_any_bytes_have_a_line(data: bytes, frame: bool) -> None:
    check(data, frame)


@given(
    st.sampled_from([(packet, False) for packet in SEEDS] + [(each, True) for each in FRAME_SEEDS]),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4),
    st.integers(0, 120),
)
@settings(max_examples=3000)
def test_damaged_packets_have_a_line(
    seed: tuple[bytes, bool], changes: list[tuple[int, int]], end: int
) -> None:
    data = bytearray(seed[0])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    check(bytes(data[: max(end, len(data) - end)]), seed[1])


def test_60000_mutated_packets_have_a_line() -> None:
    """60,000 random mutations, different in each run."""
    chance = random.Random()
    seeds = [(packet, False) for packet in SEEDS] + [(each, True) for each in FRAME_SEEDS]
    for _ in range(60_000):
        seed, frame = chance.choice(seeds)
        data = bytearray(seed)
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.choice((0, 1, 6, 17, 43, 44, 60, 255))
        del data[chance.randrange(len(data) + 1) :]
        try:
            describe(bytes(data), frame=frame)
        except Exception as error:
            error.add_note(f"bytes.fromhex({bytes(data).hex()!r}), frame={frame}")
            raise


def test_long_header_chains_end_in_a_short_line() -> None:
    """64 KiB of VLAN tags or extension headers cause neither deep recursion nor a long line."""
    tags = ether(0x8100, b"\0\5\x81\0" * 16_000)
    line, _ = describe(tags, frame=True)
    assert len(line) < 2000
    check(ip6(0, bytes(65_000)), False)

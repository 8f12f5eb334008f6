"""Reading a packet's header, and answering a packet: work in Python, without a device or a loop.

`timeit` runs the statements, because it inlines them: calling a function for each would cost a
tenth of what is measured.
"""

import ipaddress
import struct
import timeit
from collections.abc import Iterator, Sequence
from functools import partial

import aiotun
from aiotun import reply

from ._harness import LAST_CORE, Row, Table, expect, in_turn, pinned

COUNT = 20_000
MAC = b"\2\0\0\0\0\1"
ADDRESSES = {ipaddress.ip_address("10.0.0.2"), ipaddress.ip_address("fd00::2")}

PAIR4 = bytes([10, 0, 0, 1, 10, 0, 0, 2])
PAIR6 = ipaddress.ip_address("fd00::1").packed + ipaddress.ip_address("fd00::2").packed
ECHO4 = struct.pack("!BBHHHBBH", 0x45, 0, 84, 1, 0, 64, 1, 0) + PAIR4 + b"\x08" + bytes(63)
ECHO6 = struct.pack("!IHBB", 6 << 28, 64, 58, 64) + PAIR6 + b"\x80" + bytes(63)
ARP = b"\xff" * 6 + MAC + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
ARP += MAC + PAIR4[:4] + bytes(6) + PAIR4[4:]


def solicitation() -> bytes:
    """Return a neighbor solicitation for fd00::2. Its checksum must be correct."""
    body = struct.pack("!BBHI", 135, 0, 0, 0) + PAIR6[16:]
    group = ipaddress.ip_address("ff02::1:ff00:2").packed
    pseudo = PAIR6[:16] + group + struct.pack("!II", len(body), 58)
    value = aiotun.offload.checksum(pseudo + body)
    head = b"\x33\x33" + group[12:] + MAC + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 24, 58, 255)
    return head + PAIR6[:16] + group + body[:2] + value.to_bytes(2, "big") + body[4:]


FIELDS = "header = IPHeader(packet); header.src_bytes; header.dst_bytes; header.proto"
# The name, the statement, its packet, and the target in nanoseconds.
CASES: list[tuple[str, str, bytes, float | None]] = [
    ("IPHeader, 3 fields, IPv4", FIELDS, ECHO4, 500.0),
    ("IPHeader, 3 fields, IPv6", FIELDS, ECHO6, 500.0),
    ("decode_packet", "decode_packet(packet)", ECHO4, None),
    ("icmp_echo", "icmp_echo(packet)", ECHO4, 1000.0),
    ("icmpv6_echo", "icmpv6_echo(packet)", ECHO6, 1000.0),
    ("arp", "arp(packet, MAC, ADDRESSES)", ARP, None),
    (
        "neighbour_advertisement",
        "neighbour_advertisement(packet, MAC, ADDRESSES)",
        solicitation(),
        None,
    ),
]


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    """The event loop makes no difference here: one table."""
    public = {name: getattr(aiotun, name) for name in aiotun.__all__}  # most are loaded lazily
    names = {**vars(reply), **public, "MAC": MAC, "ADDRESSES": ADDRESSES}
    for name, statement, packet, _ in CASES:
        if name in reply.__all__:
            answer = eval(statement, {**names, "packet": packet})
            expect(f"{name}'s answer", type(answer), bytes)

    def nanoseconds(timer: timeit.Timer) -> float:
        return timer.timeit(COUNT) / COUNT * 1e9

    cases = {
        name: partial(nanoseconds, timeit.Timer(statement, globals={**names, "packet": packet}))
        for name, statement, packet, _ in CASES
    }
    with pinned(LAST_CORE):
        samples = in_turn(cases, runs)
    rows = [Row(name, "ns", samples[name], target=target) for name, _, _, target in CASES]
    yield Table("parse", "any loop", f"each {COUNT} times in a run, in turn", rows)

#!/usr/bin/env python3
"""Feed mutated packets to everything that reads a stranger's bytes.

    make fuzz                       a million inputs
    make fuzz ARGS="--inputs 50000 --seed 7"

Out of `decode_packet` and `decode_frame` may come a `PacketDecodeError` and nothing else, out of
`encode`, given what they decoded, and out of `IPHeader` a `ValueError`, out of the replies nothing.
What does is printed, as the input in hexadecimal, and the exit status is 1.

Mutations by `random`, without a look at what code an input reaches: dpkt is shallow, and a million
of these find each known offender hundreds of times. The same seed makes the same inputs.
"""

import argparse
import collections
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from aiotun import IPHeader, PacketDecodeError, decode_frame, decode_packet, encode, reply

MAC = b"\2\0\0\0\0\1"
NETWORKS = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
MACS = MAC + b"\2\0\0\0\0\2"


# --- Where it begins -----------------------------------------------------------------------------


def ip4(proto: int, payload: bytes, options: bytes = b"") -> bytes:
    start, length = 0x45 + len(options) // 4, 20 + len(options) + len(payload)
    head = struct.pack("!BBHHHBBH", start, 0, min(length, 0xFFFF), 7, 0, 64, proto, 0)
    return head + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + options + payload


def ip6(proto: int, payload: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, min(len(payload), 0xFFFF), proto, 255)
    return head + bytes(range(16)) + bytes(range(16, 32)) + payload


def frame(ethertype: int, payload: bytes) -> bytes:
    return MACS + struct.pack("!H", ethertype) + payload


def nested(levels: int) -> bytes:
    """IPv4 in IPv4 in IPv4: each level of it is one of dpkt's recursion."""
    packet = b""
    for _ in range(levels):
        packet = ip4(4, packet)
    return packet


UDP = struct.pack("!HHHH", 5, 53, 8 + 4, 0) + b"data"
TCP = struct.pack("!HHIIHHHH", 5, 80, 1, 2, 0x6018, 1000, 0, 0) + b"\2\4\5\xb4"
ECHO4, ECHO6 = struct.pack("!BBHHH", 8, 0, 0, 1, 2), struct.pack("!BBHHH", 128, 0, 0, 1, 2)
FRAGMENT = struct.pack("!BBHI", 60, 0, 0, 1)
OPTIONS, PADDED = b"\x3b\0" + bytes(6), b"\x11\0\1\4" + bytes(4)
SOLICITATION = struct.pack("!BBHI", 135, 0, 0, 0) + bytes(range(16, 32)) + b"\1\1" + MACS[6:]

# What is known to make dpkt raise something else: a fragment header with another extension header
# behind it; MPLS labels with nothing behind them; more levels than Python's stack has.
OFFENDERS = {
    AttributeError: [
        ip6(44, FRAGMENT + OPTIONS),
        ip4(41, ip6(44, FRAGMENT + OPTIONS)),
        frame(0x86DD, ip6(44, FRAGMENT + OPTIONS)),
    ],
    IndexError: [frame(0x8847, b"\0\0\x11\xff"), frame(0x8848, b"\0\0\x10\xff\0\0\x11\xff")],
    RecursionError: [nested(600), frame(0x0800, nested(600))],
}
SEEDS = [
    *(packet for packets in OFFENDERS.values() for packet in packets),
    ip4(17, UDP),
    ip4(6, TCP),
    ip4(1, ECHO4),
    ip4(1, struct.pack("!BBHI", 3, 3, 0, 0) + ip4(17, UDP)[:28]),
    ip4(17, UDP, b"\1\1\1\1"),
    ip4(47, b"\0\0\x08\0" + ip4(17, UDP)),
    ip4(51, b"\x11\4\0\0" + bytes(20) + UDP),
    ip4(132, bytes(12) + b"\0\0\0\x08" + bytes(4)),
    ip4(2, b"\x16\0\0\0\xe0\0\0\1"),
    ip4(89, b"\2\1\0\x18" + bytes(20)),
    ip4(112, b"\x21\1\x64\1\0\1\0\0" + bytes(4)),
    nested(5),
    ip6(17, UDP),
    ip6(6, TCP),
    ip6(58, ECHO6),
    ip6(0, PADDED + UDP),
    ip6(44, b"\x11\0\0\1\0\0\0\7" + UDP),
    ip6(43, b"\x11\2\0\1" + bytes(20) + UDP),
    ip6(51, b"\x11\4\0\0" + bytes(20) + UDP),
    ip6(50, bytes(24)),
    ip6(60, PADDED + UDP),
    frame(0x0806, b"\0\1\x08\0\6\4\0\1" + MAC + bytes([10, 0, 0, 1]) + bytes(6) + b"\x0a\0\0\2"),
    frame(0x0800, ip4(17, UDP)),
    frame(0x86DD, ip6(58, SOLICITATION)),
    frame(0x8100, b"\0\5\x08\0" + ip4(17, UDP)),
    frame(0x88A8, b"\0\5\x81\0\0\6\x86\xdd" + ip6(17, UDP)),
    frame(0x8847, b"\0\0\x11\xff" + ip4(17, UDP)),
    frame(0x8847, b"\0\0\x11\xff" + bytes(4) + frame(0x0800, ip4(17, UDP))),
    frame(0x8864, b"\x11\0\0\1\0\x16\0\x21" + ip4(17, UDP)),
    frame(0x88CC, b"\2\7\4" + MAC + b"\4\7\3" + MAC + b"\6\2\0\x78\0\0"),
    frame(0x2000, b"\2\xb4\0\0\0\1\0\x08host"),
    frame(38, b"\x42\x42\3" + bytes(35)),
    frame(40, b"\xaa\xaa\3\0\0\0\x08\0" + ip4(17, UDP)),
    frame(30, b"\xff\xff" + bytes(28)),
    b"\1\0\x0c\0\0" + bytes(21) + frame(0x0800, ip4(17, UDP)),
]

# Bytes that mean something at most places: protocols, extension headers, options, lengths.
TELLING = bytes([0, 1, 2, 4, 5, 6, 8, 17, 41, 43, 44, 50, 51, 58, 59, 60, 0x45, 0x60, 0x80, 0xFF])
ETHERTYPES = [
    0x0800,
    0x0806,
    0x86DD,
    0x8100,
    0x88A8,
    0x8847,
    0x8863,
    0x8864,
    0x88CC,
    0x2000,
    0x6558,
]


def mutate(choose: random.Random) -> bytes:
    """Make one input."""
    data = bytearray(choose.choice(SEEDS))
    for _ in range(choose.randrange(5)):
        way = choose.randrange(7)
        at = choose.randrange(min(len(data), 96) + 1)
        if way <= 1 and at < len(data):
            data[at] = choose.choice(TELLING) if way else choose.randrange(256)
        elif way == 2:
            del data[at:]
        elif way == 3:
            del data[at : at + choose.randrange(16)]
        elif way == 4:
            data[at:at] = choose.randbytes(choose.randrange(16))
        elif way == 5:
            data[at:] = choose.choice(SEEDS)[:1500]
        else:
            data[12:14] = choose.choice(ETHERTYPES).to_bytes(2, "big")
    return bytes(data)


# --- What is asked of it -------------------------------------------------------------------------


class Findings:
    """What came out, and what should not have."""

    def __init__(self) -> None:
        self.inputs = 0
        self.causes: collections.Counter[str] = collections.Counter()
        """What was refused by whom, and which error was behind it."""
        self.wrong: list[str] = []
        self.slowest = 0.0

    def call(
        self, what: Callable[[Any], Any], data: bytes, argument: Any, allowed: type[Exception]
    ) -> Any:
        try:
            return what(argument)
        except allowed as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else "itself"
            self.causes[f"{what.__name__}: {cause}"] += 1
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            self.wrong.append(f"{what.__name__}: {type(error).__name__}: {error}: {data.hex()}")
        return None


def check(data: bytes, found: Findings) -> None:
    """Give an input to everything."""
    found.inputs += 1
    begin = time.perf_counter()
    for decode in (decode_packet, decode_frame):
        decoded = found.call(decode, data, data, PacketDecodeError)
        if decoded is not None:
            found.call(encode, data, decoded, ValueError)
    header = found.call(IPHeader, data, data, ValueError)
    if header is not None:
        found.call(repr, data, header, Never)
    for echo in (reply.icmp_echo, reply.icmpv6_echo):
        found.call(echo, data, data, Never)
    for answer, network in zip((reply.arp, reply.neighbour_advertisement), NETWORKS, strict=True):

        def ask(frame: bytes, answer: Any = answer, network: Any = network) -> Any:
            return answer(frame, MAC, network)

        found.call(ask, data, data, Never)
    found.slowest = max(found.slowest, time.perf_counter() - begin)


class Never(Exception):  # noqa: N818 - nothing raises it
    """What may not be raised at all."""


def inputs(count: int, seed: int) -> Iterator[bytes]:
    """All seeds as they are, then mutations."""
    choose = random.Random(seed)
    yield from SEEDS[:count]
    for _ in range(count - len(SEEDS)):
        yield mutate(choose)


def fuzz(count: int, seed: int, *, most: int = 10) -> Findings:
    """Check that many inputs, or fewer where too much is wrong."""
    found = Findings()
    for data in inputs(count, seed):
        check(data, found)
        if len(found.wrong) >= most:
            break
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    args = parser.parse_args()
    begin = time.monotonic()
    found = fuzz(args.inputs, args.seed)
    seconds = time.monotonic() - begin
    for cause, times in sorted(found.causes.items()):
        print(f"{times:>9}  {cause}")
    print(
        f"{found.inputs} inputs from seed {args.seed} in {seconds:.0f} s, "
        f"the slowest {found.slowest * 1000:.1f} ms; {len(found.wrong)} wrong"
    )
    for line in found.wrong:
        print(line, file=sys.stderr)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

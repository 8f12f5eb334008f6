#!/usr/bin/env python3
"""A UDP echo service that lives on a TUN device alone, reached by the kernel's own sockets.

    sudo python examples/udp_echo.py --name tun0 --address 10.0.0.1/24 --port 7 &
    echo hello | nc -u -w1 10.0.0.77 7

Every address of the device's networks echoes, and answers pings. Prints "ready NAME" when it
serves, and ends cleanly on SIGINT and SIGTERM. It does not answer fragments, datagrams to other
ports, and datagrams from port 0 (which can't be answered) or from another echo service.
"""

import argparse
import struct
import sys

from _service import Networks, parser, run

import aiotun
from aiotun.reply import icmp_echo, icmpv6_echo

UDP = 17
HOPS = 64  # the TTL and hop limit of an answer
# IPv4 without options (RFC 791), IPv6 (RFC 8200), each followed by a UDP header (RFC 768).
HEADERS4 = struct.Struct("!HHHHBBH4s4sHHHH")
HEADERS6 = struct.Struct("!IHBB16s16sHHHH")


def echo4(packet: bytes, port: int) -> bytes | None:
    """Return the answer to a UDP datagram to `port` over IPv4, or None.

    Swaps the addresses and the ports. A checksum does not depend on the order of its words, so
    UDP's stays right (and a checksum of 0, which means none, stays 0). The header's is updated for
    the TTL.
    """
    if len(packet) < HEADERS4.size:
        return None
    (start, length, identity, fragment, ttl, protocol, header_sum, source, target,
     source_port, target_port, udp_length, udp_sum) = HEADERS4.unpack_from(packet)  # fmt: skip
    if start >> 8 != 0x45 or protocol != UDP or fragment & 0x3FFF or target_port != port:
        return None
    # Two echo services would answer each other for ever.
    if source_port in (0, port):
        return None
    if length > len(packet) or not 8 <= udp_length <= length - 20:
        return None
    # RFC 1624, equation 3; see aiotun.reply.
    header_sum = (header_sum + ((ttl - HOPS) << 8)) % 0xFFFF
    return (
        HEADERS4.pack(start, length, identity, fragment, HOPS, UDP, header_sum, target, source,
                      target_port, source_port, udp_length, udp_sum)
        + packet[28:length]
    )  # fmt: skip


def echo6(packet: bytes, port: int) -> bytes | None:
    """Return the answer to a UDP datagram to `port` over IPv6, or None; see `echo4`."""
    if len(packet) < HEADERS6.size:
        return None
    (start, length, following, _, source, target, source_port, target_port, udp_length,
     udp_sum) = HEADERS6.unpack_from(packet)  # fmt: skip
    if start >> 28 != 6 or following != UDP or target_port != port:
        return None
    if source_port in (0, port):
        return None
    if length + 40 > len(packet) or not 8 <= udp_length <= length:
        return None
    return (
        HEADERS6.pack(start, length, UDP, HOPS, target, source, target_port, source_port,
                      udp_length, udp_sum)
        + packet[48 : length + 40]
    )  # fmt: skip


async def serve(tun: aiotun.TunDevice, networks: Networks, port: int) -> None:
    unsent = 0
    async for packet in tun:
        if packet[0] < 0x60:
            wanted = packet[16:20] in networks
            answer = (echo4(packet, port) or icmp_echo(packet)) if wanted else None
        else:
            wanted = packet[24:40] in networks
            answer = (echo6(packet, port) or icmpv6_echo(packet)) if wanted else None
        if answer is not None:
            try:
                await tun.send(answer)
            except (aiotun.LinkDownError, aiotun.PacketError):
                unsent += 1  # the link went down in between; it may come up again
    if unsent:
        print(f"{unsent} answers could not be sent", file=sys.stderr)


def port_number(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535")
    return int(text)


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--port", type=port_number, default=7, help="the UDP port (default: 7)")
    args = command.parse_args()
    sys.exit(run(args, lambda tun, networks: serve(tun, networks, args.port)))

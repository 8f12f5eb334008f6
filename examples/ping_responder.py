#!/usr/bin/env python3
"""Answers pings (ICMP and ICMPv6 echo) for every address of a TUN device's networks.

    sudo python examples/ping_responder.py --name tun0 --address 10.0.0.1/24 &
    ping 10.0.0.77

Prints "ready NAME" when it serves, and ends cleanly on SIGINT and SIGTERM.
"""

import sys

from _service import Networks, parser, run

import aiotun
from aiotun.reply import icmp_echo, icmpv6_echo


async def serve(tun: aiotun.TunDevice, networks: Networks) -> None:
    unsent = 0
    async for packet in tun:
        if packet[0] < 0x60:
            if packet[16:20] not in networks:
                continue
            answer = icmp_echo(packet)
        else:
            if packet[24:40] not in networks:
                continue
            answer = icmpv6_echo(packet)
        if answer is not None:
            try:
                await tun.send(answer)
            except (aiotun.LinkDownError, aiotun.PacketError):
                unsent += 1  # the link went down in between; it may come up again
    if unsent:
        print(f"{unsent} answers could not be sent", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(parser(__doc__).parse_args(), serve))

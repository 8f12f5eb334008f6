#!/usr/bin/env python3
"""A host on an Ethernet that exists only in this program, behind a TAP device.

    sudo ip link add br0 type bridge
    sudo ip addr add 10.203.0.254/24 dev br0
    sudo ip link set br0 up
    sudo python examples/virtual_host.py --bridge br0 --address 10.203.0.1/24 &
    ping 10.203.0.1

It answers ARP and IPv6 neighbor discovery for its addresses, and pings. The addresses and the MAC
belong to this host. The kernel's side of the device has its own MAC, and no address unless you add
one or attach the device to a bridge that has one. Prints "ready NAME" when it serves, and ends
cleanly on SIGINT and SIGTERM.

With --ping A it also pings another host of its network, until a signal comes or --count times. Its
exit status is then 0 if there was an answer, and 1 if there was none.
"""

import argparse
import random
import sys
from ipaddress import ip_address

from _neighbours import Neighbour
from _pinging import Ping
from _priority import tagged, untagged
from _service import addresses_of, parser, run_device

import aiotun
from aiotun import reply

IPV4, ARP, IPV6 = b"\x08\x00", b"\x08\x06", b"\x86\xdd"


class Host:
    """Answers frames, one at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.mac: bytes = args.mac
        self.addresses = {each.ip for each in addresses_of(args)}

    def answer(self, frame: bytes) -> bytes | None:
        """Return the answer to a frame, or None if it does not ask this host for anything."""
        frame, tag = untagged(frame)
        answer = self._answer(frame)
        return None if answer is None else tagged(answer, tag)

    def _answer(self, frame: bytes) -> bytes | None:
        ethertype = frame[12:14]
        if ethertype == ARP:
            return reply.arp(frame, self.mac, self.addresses)
        # Pings must be sent to this host's MAC. Only requests for a MAC go to groups.
        if frame[:6] == self.mac and ethertype in (IPV4, IPV6):
            echo = reply.icmp_echo if ethertype == IPV4 else reply.icmpv6_echo
            packet = echo(frame[14:], addresses=self.addresses)
            if packet is not None:
                return reply.ethernet(frame, packet, self.mac)
        if ethertype == IPV6:
            return reply.neighbour_advertisement(frame, self.mac, self.addresses)
        return None


async def serve(tap: aiotun.TapDevice, host: Host, ping: Ping | None) -> None:
    unsent = 0
    if ping is not None:
        ping.next(tap)
    async for frame in tap:
        answer = host.answer(frame)
        if answer is None and ping is not None:
            answer = ping.take(frame, tap)
        if answer is not None:
            try:
                await tap.send(answer)
            except (aiotun.LinkDownError, aiotun.PacketError):
                unsent += 1  # the link went down in between; it may come up again
    if ping is not None:
        print(ping, flush=True)
    if unsent:
        print(f"{unsent} answers could not be sent", file=sys.stderr)


def host_mac(text: str) -> bytes:
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6 or text.count(":") != 5 or mac[0] & 1 or not any(mac):
        raise argparse.ArgumentTypeError("a host's MAC must be unicast, such as 02:00:00:00:00:01")
    return mac


def random_mac() -> bytes:
    """A random MAC that anybody may use (IEEE 802, locally administered)."""
    return b"\x02" + random.randbytes(5)


def arguments() -> argparse.Namespace:
    command = parser(__doc__)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add = command.add_argument
    add("--mac", type=host_mac, default=random_mac(), help="the host's MAC (default: a random one)")
    add("--bridge", help="attach the device to this bridge")
    add("--ping", type=ip_address, metavar="A", help="ping this host, which may be on the bridge")
    add("--count", type=positive, metavar="N", help="end after this many pings")
    add("--interval", type=duration, metavar="SECONDS", default=1.0,
        help="seconds between two pings (%(default)s)")  # fmt: skip
    args = command.parse_args()
    own = addresses_of(args)
    if args.ping is not None and (
        not any(args.ping in each.network for each in own) or args.ping in [each.ip for each in own]
    ):
        command.error(f"--ping: {args.ping} is not another host in this host's networks")
    if args.count is not None and args.ping is None:
        command.error("--count needs --ping")
    return args


def ping_of(args: argparse.Namespace) -> Ping | None:
    """The pings that --ping asks for, from the address in the same network."""
    if args.ping is None:
        return None
    source = next(each.ip for each in addresses_of(args) if args.ping in each.network)
    neighbour = Neighbour(args.mac, source, args.ping, random.getrandbits(16))
    return Ping(neighbour, args.count, args.interval)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def duration(text: str) -> float:
    value = float(text)
    if not 0 < value < 2**32:
        raise ValueError
    return value


if __name__ == "__main__":
    args = arguments()
    host = Host(args)
    ping = ping_of(args)
    status = run_device(
        lambda: aiotun.open_tap(args.name, bridge=args.bridge),
        lambda tap: serve(tap, host, ping),
        uvloop=args.uvloop,
    )
    # The exit status of ping(8).
    sys.exit(1 if status == 0 and ping is not None and not ping.times else status)

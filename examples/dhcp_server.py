#!/usr/bin/env python3
"""A DHCP server that lives in Python, on a TAP of a bridge, with a MAC and address of its own.

    sudo python examples/dhcp_server.py --bridge br0 --name dhcp0 --address 10.0.0.1/24 \\
        --range 10.0.0.100-10.0.0.199 --router 10.0.0.1 --dns 9.9.9.9 --leases leases.db &

Answers ARP and pings for its address, and DHCPv4 clients (RFC 2131). Before it offers an address it
checks that no host uses it. The leases survive even if the server is killed.

Prints "ready TAP" when it serves, and its counters on SIGUSR1 and at its end. SIGINT or SIGTERM end
it.
"""

import argparse
import asyncio
import dataclasses
import signal
import sqlite3
import sys
import time
from collections import Counter
from ipaddress import IPv4Address

from _addresses import ipv4_with_prefix
from _dhcp_frames import Arp, Datagram, arp_probe, deliver, read_arp, read_udp
from _dhcp_leases import Leases
from _dhcp_message import NOBODY, MalformedError, Message
from _dhcp_rules import Config, Probe, Rules
from _priority import tagged, untagged

import aiotun
from aiotun import reply

MAX_RANGE = 65_536  # addresses


@dataclasses.dataclass
class Asking:
    """A running probe, and the MAC that answered for its address."""

    probe: Probe
    datagram: Datagram
    user: bytes | None = None


class Server:
    """Applies the rules to the frames of a TAP device."""

    def __init__(self, tap: aiotun.TapDevice, args: argparse.Namespace, leases: Leases) -> None:
        self._tap = tap
        self._mac: bytes = args.mac
        self._address: IPv4Address = args.address.ip
        self._patience: float = args.probe
        self._leases = leases
        config = Config(args.address, args.lease, args.router, tuple(args.dns), args.boot_file)
        self._rules = Rules(config, leases)
        self._asking: dict[IPv4Address, Asking] = {}

    @property
    def counters(self) -> Counter[str]:
        return self._rules.counters

    async def serve(self) -> None:
        async for batch in self._tap.batches():
            answers = [answer for frame in batch for answer in self._answers(frame)]
            # Commit before the answers go out, so that the file has every lease that a client is
            # told of; one commit for all answers.
            self._leases.commit()
            self._send(answers)

    def _answers(self, frame: bytes) -> list[bytes]:
        if frame[:6] != self._mac and not frame[0] & 1:
            self.counters["for_others"] += 1  # the bridge floods unknown MACs
            return []
        message = read_arp(frame)
        if message is not None:
            return self._arp(frame, message)
        try:
            datagram = read_udp(frame)
            if datagram is None:
                return self._ping(frame)
            request = Message.parse(datagram.payload)
        except MalformedError:
            self.counters["malformed"] += 1
            return []
        direct = datagram.target == self._address
        return self._next(self._rules.handle(request, time.time(), direct), datagram)

    def _next(self, step: Message | Probe | None, datagram: Datagram) -> list[bytes]:
        """Take the next step of the rules; return the frames to send."""
        if step is None:
            return []
        if isinstance(step, Message):
            return [deliver(step, datagram, self._mac, self._address)]
        self._asking[step.address] = Asking(step, datagram)
        loop = asyncio.get_running_loop()
        # Ask twice, because a frame may be lost (RFC 5227, section 2.1.1).
        loop.call_later(self._patience / 2, self._ask, step.address)
        loop.call_later(self._patience, self._answered, step.address)
        return [arp_probe(self._mac, step.address)]

    def _ask(self, address: IPv4Address) -> None:
        if not self._tap.closed:
            self._send([arp_probe(self._mac, address)])

    def _answered(self, address: IPv4Address) -> None:
        asking = self._asking.pop(address)
        if self._tap.closed:
            return
        step = self._rules.probed(asking.probe, asking.user, time.time())
        answers = self._next(step, asking.datagram)
        self._leases.commit()
        self._send(answers)

    def _arp(self, frame: bytes, message: Arp) -> list[bytes]:
        asking = self._asking.get(message.sender)
        if asking is not None:
            asking.user = message.sender_mac
        answer = reply.arp(frame, self._mac, {self._address})
        if answer is None:
            return []
        self.counters["arp"] += 1
        return [answer]

    def _ping(self, frame: bytes) -> list[bytes]:
        frame, tag = untagged(frame)
        if frame[12:14] != b"\x08\x00":
            return []
        packet = reply.icmp_echo(frame[14:], addresses={self._address})
        answer = reply.ethernet(frame, packet, self._mac)
        if answer is None:
            return []
        self.counters["ping"] += 1
        return [tagged(answer, tag)]

    def _send(self, frames: list[bytes]) -> None:
        for frame in frames:
            try:
                self._tap.send_nowait(frame)
            except (BlockingIOError, aiotun.LinkDownError, aiotun.PacketError):
                self.counters["unsent"] += 1  # the client asks again


# --- The command ---------------------------------------------------------------------------------


async def main(args: argparse.Namespace) -> None:
    first, last = args.range
    with Leases(first, last, args.leases) as leases:
        async with aiotun.open_tap(args.name, bridge=args.bridge) as tap:
            server = Server(tap, args, leases)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, tap.close)  # which ends serve()
            loop.add_signal_handler(signal.SIGUSR1, report, server)
            print(f"ready {tap.name}", flush=True)
            await server.serve()
            report(server)


def report(server: Server) -> None:
    counted = " ".join(f"{name} {value}" for name, value in sorted(server.counters.items()))
    print(f"counters {counted}", flush=True)


def address_range(text: str) -> tuple[IPv4Address, IPv4Address]:
    first, last = (IPv4Address(each) for each in text.split("-"))
    if not 0 <= int(last) - int(first) < MAX_RANGE:
        raise ValueError
    return first, last


def mac_address(text: str) -> bytes:
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise ValueError
    return mac


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 2**32:
        raise ValueError
    return value


def short(text: str) -> float:
    value = positive(text)
    if value > 10:  # clients give up, and an offer ends after a minute
        raise ValueError
    return value


def boot_file(text: str) -> bytes:
    value = text.encode()
    if len(value) > 127:  # RFC 2131, figure 1, with a zero at the end
        raise ValueError
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bridge", metavar="BR", required=True, help="which must exist")
    add("--name", metavar="TAP", help="its name (default: the kernel picks one)")
    add("--address", metavar="A/LEN", type=ipv4_with_prefix, required=True, help="the server's own")
    add("--range", metavar="FIRST-LAST", type=address_range, required=True)
    add("--lease", metavar="SECONDS", type=positive, default=3600.0, help="(%(default)s)")
    add("--router", metavar="A", type=IPv4Address, default=NOBODY)
    add("--dns", metavar="A", type=IPv4Address, action="append", default=[])
    add("--leases", metavar="FILE", default=":memory:", help="default: keep leases in memory")
    add("--probe", metavar="SECONDS", type=short, default=0.5,
        help="how long to probe for a host that uses an address (%(default)s)")  # fmt: skip
    add("--mac", type=mac_address, help="the server's MAC (default: 02:00 and its address)")
    add("--boot-file", metavar="NAME", type=boot_file, default=b"",
        help="the file that machines boot: a path for TFTP, for iPXE also a URL")  # fmt: skip
    args = parser.parse_args()
    first, last = args.range
    network = args.address.network
    hosts = (first, last)
    if network.prefixlen < 31 and {network.network_address, network.broadcast_address} & {*hosts}:
        parser.error("the range includes the network's own address or the broadcast address")
    if first not in network or last not in network:
        parser.error(f"the range is not in {network}")
    # Always the same MAC, so that the clients' caches are right after a restart.
    args.mac = args.mac or b"\x02\x00" + args.address.ip.packed
    return args


if __name__ == "__main__":
    try:
        asyncio.run(main(arguments()))
    except (aiotun.AiotunError, sqlite3.Error, ValueError) as error:
        print(f"{sys.argv[0]}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before it was ready
        sys.exit(130)

#!/usr/bin/env python3
"""A VXLAN endpoint (RFC 7348) on a TAP device: Ethernet over UDP.

    sudo python examples/vxlan.py --name tap0 --vni 42 --local 192.0.2.1 --remote 192.0.2.2

does what "ip link add tap0 type vxlan id 42 local 192.0.2.1 remote 192.0.2.2 dstport 4789" does. It
learns from received frames which remote an Ethernet address is behind. Frames for a group, or for
an address that is not learned yet, go to all remotes.

Prints "ready NAME" when it serves, prints the counts of dropped frames on stderr at SIGUSR1, and
ends cleanly on SIGINT and SIGTERM. VXLAN protects nothing: every host that can send datagrams here
with the address of a remote is on the network.

All datagrams leave from one port. RFC 7348 (section 5) recommends a port for each flow, so that
routers spread the flows. If both ends are on one machine, the kernel leaves the checksums and the
segmentation of its own vxlan device's frames to a network card, and there is none on the way: turn
them off ("ethtool -K vxlan0 tx off tso off"). Between machines this is not needed.
"""

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

from _running import BATCH, QUEUE, run, until_signal
from _tunnel import RECEIVE_BYTES, deliver, report, send

import aiotun
from aiotun.datagrams import Address

# RFC 7348, section 5: the I flag, 24 reserved bits, the VNI, 8 reserved bits.
HEADER_BYTES = 8
_VALID = 0x08

# Outer IPv4 or IPv6, UDP, this header, inner Ethernet.
OVERHEAD = {4: 20 + 8 + 8 + 14, 6: 40 + 8 + 8 + 14}

AGE_SECONDS = 300.0  # the kernel's default
MOST_LEARNED = 4096


class Vxlan:
    """Converts frames to datagrams and back; no I/O.

    Args:
        vni: the network's number, 24 bits.
        remotes: the other endpoints; datagrams from other hosts are dropped.
    """

    def __init__(self, vni: int, remotes: list[Address]) -> None:
        self._head = bytes([_VALID, 0, 0, 0]) + (vni << 8).to_bytes(4, "big")
        self._remotes = remotes
        # By host only: with RFC 7348, answers may come from any port.
        self._by_host = {remote[0]: remote for remote in remotes}
        self._learned: dict[bytes, tuple[Address, float]] = {}
        self.dropped: Counter[str] = Counter()

    def send(self, frames: list[bytes], now: float) -> list[tuple[Address, list[bytes]]]:
        """Return the datagrams of these frames for each remote."""
        runs: list[tuple[Address, list[bytes]]] = []
        flooded: list[bytes] = []
        last: Address | None = None
        for frame in frames:
            remote = self._where(frame[:6], now)
            if remote is None:
                flooded.append(self._head + frame)
                continue
            if remote is not last:
                runs.append((remote, []))
                last = remote
            runs[-1][1].append(self._head + frame)
        runs += [(remote, flooded) for remote in self._remotes if flooded]
        return runs

    def _where(self, mac: bytes, now: float) -> Address | None:
        if mac[0] & 1:  # a group or broadcast address
            return None
        remote, seen = self._learned.get(mac, (None, 0.0))
        return remote if now - seen < AGE_SECONDS else None

    def receive(self, datagrams: list[bytes], source: Address, now: float) -> list[bytes]:
        """Return the frames of our network in these datagrams, and learn their source addresses."""
        remote = self._by_host.get(source[0])
        if remote is None:
            self.dropped["not from a remote"] += len(datagrams)
            return []
        frames: list[bytes] = []
        vni = self._head[4:7]
        last = b""
        for datagram in datagrams:
            # Section 5: the other flags and the reserved bits are ignored.
            if len(datagram) < HEADER_BYTES + 14 or not datagram[0] & _VALID:
                self.dropped["no VXLAN"] += 1
            elif datagram[4:7] != vni:
                self.dropped["of another network"] += 1
            else:
                mac = datagram[14:20]
                if mac != last:
                    last = mac
                    self._learn(mac, remote, now)
                frames.append(datagram[HEADER_BYTES:])
        return frames

    def _learn(self, mac: bytes, remote: Address, now: float) -> None:
        if mac[0] & 1 or not any(mac):
            return  # a group address can't be a source
        if len(self._learned) >= MOST_LEARNED and mac not in self._learned:
            self._learned.clear()  # a host invents addresses; learn all of them again
        self._learned[mac] = (remote, now)


class Service:
    """Connects a TAP device and a UDP socket."""

    def __init__(self, tap: aiotun.TapDevice, sock: aiotun.DatagramSocket, vxlan: Vxlan) -> None:
        self._tap, self._sock, self._vxlan = tap, sock, vxlan

    async def from_device(self) -> None:
        async for frames in self._tap.batches(BATCH):
            for remote, datagrams in self._vxlan.send(frames, time.monotonic()):
                await send(self._sock, datagrams, remote)

    async def from_socket(self) -> None:
        async for datagrams, source in self._sock.batches(BATCH):
            frames = self._vxlan.receive(datagrams, source, time.monotonic())
            await deliver(self._tap, frames, self._vxlan.dropped)

    def show(self, lost: Counter[str]) -> str:
        counts = lost + self._vxlan.dropped
        text = ", ".join(f"{count} {why}" for why, count in counts.items())
        return f"dropped: {text or 'nothing'}"


def address_of(host: IPv4Address | IPv6Address, port: int) -> Address:
    return (str(host), port) if host.version == 4 else (str(host), port, 0, 0)


async def serve(args: argparse.Namespace) -> None:
    vxlan = Vxlan(args.vni, [address_of(each, args.port) for each in args.remote])
    async with contextlib.AsyncExitStack() as stack:
        local = address_of(args.local, args.port)
        sock = await stack.enter_async_context(
            aiotun.open_datagrams(local, receive_bytes=RECEIVE_BYTES)
        )
        opener = aiotun.open_tap(
            args.name,
            addresses=args.address or [],
            mtu=args.mtu or 1500 - OVERHEAD[args.local.version],
            txqueuelen=QUEUE,
            offload="split",
        )
        tap = await stack.enter_async_context(opener)
        service = Service(tap, sock, vxlan)
        await until_signal(
            tap.name,
            service.from_device(),
            service.from_socket(),
            report(tap, [sock], service.show),
        )


def number(most: int) -> Callable[[str], int]:
    """Make a type for argparse: numbers from 0 to `most`."""

    def parse(text: str) -> int:
        value = int(text)
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from 0 to {most}")
        return value

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="the interface's name (default: the kernel picks one)")
    parser.add_argument("--vni", type=number(2**24 - 1), required=True, help="the network's number")
    parser.add_argument("--local", type=ip_address, required=True, metavar="IP")
    parser.add_argument("--remote", type=ip_address, nargs="+", required=True, metavar="IP")
    parser.add_argument("--port", type=number(65535), default=4789)
    parser.add_argument("--address", action="append", metavar="A/LEN", help="for the interface")
    parser.add_argument("--mtu", type=int, help="default: 1450 over IPv4, 1430 over IPv6")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop")
    args = parser.parse_args()
    if any(each.version != args.local.version for each in args.remote):
        parser.error("--local and --remote must be of one version of IP")
    return run(serve(args), args.uvloop)


if __name__ == "__main__":
    sys.exit(main())

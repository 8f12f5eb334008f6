#!/usr/bin/env python3
"""A TUN device whose connections leave through a SOCKS5 proxy.

    sudo python examples/tun2socks.py --proxy socks5://127.0.0.1:1080 --name tun0 \\
        --address 198.18.0.1/15 --route 192.0.2.0/24

Whatever the routes lead to `tun0` reaches the proxy as a connection: TCP by CONNECT, UDP by UDP
ASSOCIATE, with IPv4 and IPv6. A connection is accepted only once the proxy has made it, and a
refusal of the proxy's is the client's refusal. Don't route the proxy's own address to the device.

Needs `python-socks` (pip install 'aiotun[examples]'). Prints "ready NAME" when it serves, and ends
cleanly on SIGINT and SIGTERM. Where the proxy has no UDP ASSOCIATE, datagrams are dropped, with a
note on stderr.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import socket
import struct
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

from _running import run, until_signal
from python_socks import ProxyConnectionError, ProxyError, ProxyTimeoutError
from python_socks.async_.asyncio import Proxy

import aiotun
from aiotun.netstack import Refusal, UdpFlow, pipe

Address = tuple[str, int]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# RFC 1928, section 6: what the proxy answers, and what the client hears of it.
REFUSALS: dict[int, bool | Refusal] = {
    2: Refusal.PROHIBITED,
    3: Refusal.NET,
    4: Refusal.HOST,
    5: False,
}

UNCLAIMED_SECONDS = 10.0  # after that a client that was admitted does not come
TIMEOUT = 60.0
LIMIT = 2**18


class Tun2Socks:
    """Carries connections and datagrams to one proxy."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connected: dict[tuple[Address, Address], Streams] = {}
        self._without_udp = False

    async def admit(self, local: Address, peer: Address) -> bool | Refusal:
        """Have the proxy connect; say what the client gets to hear."""
        local, peer = local[:2], peer[:2]
        try:
            sock = await Proxy.from_url(self._url).connect(*local, timeout=TIMEOUT)
        except ProxyError as error:
            return REFUSALS.get(error.error_code or 0, Refusal.HOST)
        except (ProxyConnectionError, ProxyTimeoutError, OSError):
            return Refusal.NET  # the proxy itself can't be reached
        streams = await asyncio.open_connection(sock=sock, limit=LIMIT)
        self._connected[local, peer] = streams
        loop = asyncio.get_running_loop()
        loop.call_later(UNCLAIMED_SECONDS, self._forget, (local, peer), streams)
        return True

    def _forget(self, key: tuple[Address, Address], streams: Streams) -> None:
        if self._connected.get(key) is streams:
            del self._connected[key]
            streams[1].transport.abort()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join a client's connection to the one that the proxy has made for it."""
        local, peer = (writer.get_extra_info(name)[:2] for name in ("sockname", "peername"))
        streams = self._connected.pop((local, peer), None)
        if streams is None:
            writer.transport.abort()
        else:
            await pipe((reader, writer), streams)

    async def on_flow(self, flow: UdpFlow[tuple[bytes, Address]]) -> None:
        """Carry one client's datagrams, by an association of its own."""
        try:
            async with Association(self._url, flow.send_nowait) as association:
                async for data, local in flow:
                    association.send(data, local)
        except (OSError, EOFError) as error:
            if not self._without_udp:
                self._without_udp = True
                print(f"tun2socks: the proxy carries no UDP: {error}", file=sys.stderr)


class Association:
    """A UDP ASSOCIATE (RFC 1928, sections 4 and 7). python-socks has TCP only."""

    def __init__(self, url: str, deliver: Callable[[bytes, Address], None]) -> None:
        self._url = urlsplit(url)
        self._deliver = deliver  # called with each datagram that comes back, and its sender
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Association":
        host, port = self._url.hostname or "127.0.0.1", self._url.port or 1080
        reader, writer = await asyncio.open_connection(host, port)
        self._stack.callback(writer.close)
        try:
            writer.write(await self._greeting(reader, writer) + b"\5\3\0\1" + bytes(6))
            _, code, _, kind = await reader.readexactly(4)
            if code or kind not in (1, 4):
                raise OSError(f"UDP ASSOCIATE failed with {code}")
            packed = await reader.readexactly(4 if kind == 1 else 16)
            (bound,) = struct.unpack("!H", await reader.readexactly(2))
            relay = ipaddress.ip_address(packed)
            # RFC 1928 does not say so, but proxies answer "where you reached me" like this.
            where = writer.get_extra_info("peername")[0] if relay.is_unspecified else str(relay)
            family = socket.AF_INET6 if ":" in where else socket.AF_INET
            self._sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._stack.callback(self._sock.close)
            self._sock.connect((where, bound))
            loop = asyncio.get_running_loop()
            loop.add_reader(self._sock, self._receive)
            self._stack.callback(loop.remove_reader, self._sock)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def _greeting(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Agree on how to log in; return what to send first after that."""
        user, password = self._url.username or "", self._url.password or ""
        writer.write(b"\5\1\2" if user else b"\5\1\0")
        _, method = await reader.readexactly(2)
        if method == 2:  # RFC 1929
            words = [word.encode() for word in (user, password)]
            writer.write(b"\1" + b"".join(bytes([len(word)]) + word for word in words))
            _, status = await reader.readexactly(2)
            method = 0 if status == 0 else 255
        if method != 0:
            raise OSError("the proxy refuses the user and password")
        return b""

    def send(self, data: bytes, target: Address) -> None:
        packed = ipaddress.ip_address(target[0]).packed
        head = bytes([0, 0, 0, 1 if len(packed) == 4 else 4]) + packed
        with contextlib.suppress(OSError):  # lost, as on a network
            self._sock.send(head + struct.pack("!H", target[1]) + data)

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            data = self._sock.recv(65_535)
            size = {1: 4, 4: 16}.get(data[3] if len(data) > 3 else 0)
            if size and data[2] == 0 and len(data) >= 6 + size:
                source = str(ipaddress.ip_address(data[4 : 4 + size]))
                (port,) = struct.unpack_from("!H", data, 4 + size)
                self._deliver(data[6 + size :], (source, port))


async def serve(options: argparse.Namespace) -> None:
    """Open everything, and run until a signal comes."""
    carrier = Tun2Socks(options.proxy)
    async with (
        aiotun.open_tun(
            options.name, addresses=options.address, routes=options.route, offload="raw"
        ) as tun,
        aiotun.open_netstack(intercept=True, offload="raw") as stack,
        await stack.intercept_tcp(carrier.handle, admit=carrier.admit),
        await stack.intercept_udp(carrier.on_flow, per="client"),
    ):
        await until_signal(tun.name, aiotun.relay(tun, stack.tun))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--proxy", required=True, metavar="socks5://[USER:PASSWORD@]HOST:PORT")
    parser.add_argument("--name", default="tun0", help="the device (default: tun0)")
    parser.add_argument("--address", action="append", default=[], metavar="A/LEN")
    parser.add_argument("--route", action="append", default=[], metavar="NETWORK")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop")
    options = parser.parse_args()
    return run(serve(options), options.uvloop)


if __name__ == "__main__":
    sys.exit(main())

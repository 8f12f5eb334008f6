"""A SOCKS5 and HTTP proxy whose connections leave through a network namespace.

Sources: RFC 1928 (SOCKS5, without authentication), RFC 9110, 9.3.6 (CONNECT).
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import aiotun
from aiotun.netstack import pipe

__all__ = ["Proxy"]

Resolver = Callable[[str], Awaitable[list[str]]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Address = tuple[str, int]

VERSION, NO_AUTHENTICATION, NOT_ACCEPTABLE = 5, 0, 255
CONNECT, UDP_ASSOCIATE = 1, 3
IPV4, NAME, IPV6 = 1, 3, 4
DONE, FAILED, DENIED, NO_NETWORK, NO_HOST, REFUSED, NO_COMMAND, NO_ADDRESS_TYPE = (
    *range(6),
    7,
    8,
)

_REPLIES = {
    errno.ENETUNREACH: NO_NETWORK,
    errno.EADDRNOTAVAIL: NO_NETWORK,
    errno.EHOSTUNREACH: NO_HOST,
    errno.ETIMEDOUT: NO_HOST,
    errno.ECONNREFUSED: REFUSED,
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
}
_HEAD_SECONDS = 10.0  # in which a client says what it wants
_HEAD_BYTES = 2**14
_LIMIT = 2**18


class _WantsNothingError(Exception):
    """The client has said something that is no request; the argument is the answer."""


class Proxy:
    """Serves clients outside, and connects inside.

    Args:
        inside: where connections leave.
        resolve: gives the addresses of a name, as they are known inside.
    """

    def __init__(self, inside: aiotun.Namespace, resolve: Resolver) -> None:
        self._inside = inside
        self._resolve = resolve

    async def serve(self, host: str, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._client, host, port, limit=_LIMIT)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_SECONDS):
                first = await reader.readexactly(1)
                if first[0] == VERSION:
                    command, target = await _socks_request(reader, writer)
                else:
                    command, target = CONNECT, await _http_request(first, reader)
            if command == UDP_ASSOCIATE:
                await _Association(self._inside, self._resolve, reader, writer).run()
            else:
                await self._connect(target, (reader, writer), http=first[0] != VERSION)
        except _WantsNothingError as error:
            writer.write(error.args[0])
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, TimeoutError):
            writer.transport.abort()  # it is gone, or has said nothing in time
        finally:
            writer.close()

    async def _connect(self, target: Address, client: Streams, *, http: bool) -> None:
        """Connect, tell the client how that went, and carry the stream."""
        connecting = asyncio.ensure_future(
            self._inside.open_connection(*target, limit=_LIMIT, resolver=self._resolve)
        )
        try:
            # A client that waits for its answer says nothing. So if it can be read it has gone.
            gone = asyncio.ensure_future(_end_of(client[0]))
            await asyncio.wait({connecting, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not connecting.done():
                return
            server = connecting.result()
        except OSError as error:
            code = _REPLIES.get(error.errno or 0, FAILED)
            raise _WantsNothingError(_failed_http(error) if http else _socks_reply(code)) from error
        finally:
            connecting.cancel()
        if http:
            client[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            client[1].write(_socks_reply(DONE, server[1].get_extra_info("sockname")))
        await pipe(client, server)


async def _end_of(reader: asyncio.StreamReader) -> None:
    """Wait until the stream has ended, without taking anything that came."""
    while not reader.at_eof():
        await asyncio.sleep(0.1)
        if reader.exception() is not None:
            return


# --- Requests and replies ------------------------------------------------------------------------


async def _socks_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[int, Address]:
    methods = await reader.readexactly((await reader.readexactly(1))[0])
    if NO_AUTHENTICATION not in methods:
        raise _WantsNothingError(bytes([VERSION, NOT_ACCEPTABLE]))
    writer.write(bytes([VERSION, NO_AUTHENTICATION]))
    version, command, _ = await reader.readexactly(3)
    if version != VERSION:
        raise _WantsNothingError(_socks_reply(FAILED))
    kind = (await reader.readexactly(1))[0]
    sizes = {IPV4: 4, IPV6: 16}
    if kind == NAME:
        host = (await reader.readexactly((await reader.readexactly(1))[0])).decode(
            "ascii", "replace"
        )
    elif kind in sizes:
        host = str(ipaddress.ip_address(await reader.readexactly(sizes[kind])))
    else:
        raise _WantsNothingError(_socks_reply(NO_ADDRESS_TYPE))
    (port,) = struct.unpack("!H", await reader.readexactly(2))
    if command not in (CONNECT, UDP_ASSOCIATE):
        raise _WantsNothingError(_socks_reply(NO_COMMAND))
    return command, (host, port)


def _socks_reply(code: int, address: Any = ("0.0.0.0", 0)) -> bytes:
    return bytes([VERSION, code, 0]) + _packed(address[:2])


def _packed(address: Address) -> bytes:
    packed = ipaddress.ip_address(address[0].partition("%")[0]).packed
    return bytes([IPV4 if len(packed) == 4 else IPV6]) + packed + struct.pack("!H", address[1])


async def _http_request(first: bytes, reader: asyncio.StreamReader) -> Address:
    head = first + await reader.readuntil(b"\r\n\r\n")
    words = head[:_HEAD_BYTES].split(b"\r\n")[0].decode("ascii", "replace").split(" ")
    if len(words) != 3 or words[0] != "CONNECT":
        raise _WantsNothingError(
            b"HTTP/1.1 405 Method Not Allowed\r\nAllow: CONNECT\r\nContent-Length: 0\r\n\r\n"
        )
    host, _, port = words[1].rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise _WantsNothingError(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    return host.strip("[]"), int(port)


def _failed_http(error: OSError) -> bytes:
    status = "504 Gateway Timeout" if error.errno == errno.ETIMEDOUT else "502 Bad Gateway"
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()


# --- UDP -----------------------------------------------------------------------------------------


class _Association:
    """UDP ASSOCIATE: a port outside for the client's datagrams, as long as its connection stands.

    The port is bound to the address at which the client reached us, and takes what comes from the
    client's address only.
    """

    def __init__(
        self,
        inside: aiotun.Namespace,
        resolve: Resolver,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._inside = inside
        self._resolve = resolve
        self._reader = reader
        self._writer = writer
        self._client: Address | None = None  # known from its first datagram
        self._sockets: dict[int, socket.socket] = {}
        self._names: dict[str, str] = {}
        self.dropped = 0

    async def run(self) -> None:
        here, there = (self._writer.get_extra_info(name) for name in ("sockname", "peername"))
        family = socket.AF_INET6 if ":" in here[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as outer:
            outer.bind((here[0], 0, *here[2:]))
            self._writer.write(_socks_reply(DONE, outer.getsockname()))
            tasks = [asyncio.create_task(self._out(outer, there[0]))]
            try:
                with contextlib.suppress(ConnectionError):
                    while await self._reader.read(_HEAD_BYTES):
                        pass
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                loop = asyncio.get_running_loop()
                for sock in self._sockets.values():
                    loop.remove_reader(sock)
                    sock.close()

    async def _out(self, outer: socket.socket, client: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            data, source = await loop.sock_recvfrom(outer, 65_535)
            if source[0] != client:
                self.dropped += 1  # a stranger's
                continue
            self._client = source
            try:
                target, payload = _unwrapped(data)
                host = await self._address_of(target[0])
                sock = await self._socket(outer, ":" in host)
                sock.sendto(payload, (host, target[1]))
            except (ValueError, OSError):
                self.dropped += 1  # as on a network

    async def _address_of(self, host: str) -> str:
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(host))
        if host not in self._names:
            found = await self._resolve(host)
            if not found:
                raise OSError(errno.EHOSTUNREACH, "no such name", host)
            self._names[host] = found[0]
        return self._names[host]

    async def _socket(self, outer: socket.socket, ipv6: bool) -> socket.socket:
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        if (sock := self._sockets.get(family)) is None:
            sock = self._sockets[family] = await self._inside.socket(family, socket.SOCK_DGRAM)
            sock.bind(("::" if ipv6 else "0.0.0.0", 0))
            asyncio.get_running_loop().add_reader(sock, self._back, sock, outer)
        return sock

    def _back(self, sock: socket.socket, outer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            data, source = sock.recvfrom(65_535)
            assert self._client is not None
            outer.sendto(bytes(3) + _packed(source[:2]) + data, self._client)


def _unwrapped(data: bytes) -> tuple[Address, bytes]:
    """Split a datagram into its target and its data.

    Raises:
        ValueError: the request header is missing or invalid, or the datagram is a fragment.
    """
    try:
        reserved, fragment, kind = struct.unpack_from("!HBB", data)
        if reserved or fragment:
            raise ValueError("a fragment")
        if kind == NAME:
            length = data[4]
            host, at = data[5 : 5 + length].decode("ascii", "replace"), 5 + length
        else:
            size = {IPV4: 4, IPV6: 16}[kind]
            host, at = str(ipaddress.ip_address(data[4 : 4 + size])), 4 + size
        (port,) = struct.unpack_from("!H", data, at)
    except (LookupError, struct.error) as error:
        raise ValueError("no request header") from error
    return (host, port), data[at + 2 :]

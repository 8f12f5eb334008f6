"""Connections, servers and datagram endpoints inside a namespace, in asyncio's shapes.

asyncio accepts a socket that was made elsewhere. So this module only does what asyncio would do
with a host and a port. It never passes a name to asyncio, which would resolve the name in the
program's own network namespace.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from .._kernel import ioctl

__all__ = [
    "Address",
    "Resolver",
    "Servers",
    "bound",
    "check_family",
    "connected",
    "listening",
    "resolve",
]

Resolver = Callable[[str], Iterable[str] | Awaitable[Iterable[str]]]
"""Takes a host's name and returns its addresses; plain or async."""


class _SocketMaker(Protocol):
    async def __call__(self, family: int, type: int, proto: int) -> socket.socket: ...  # noqa: A002


class Address:
    """An address and port, before there is a socket for it."""

    def __init__(self, host: str, port: int) -> None:
        self.ip = ipaddress.ip_address(host)
        self.host = host
        self.port = port
        self.family = socket.AF_INET if self.ip.version == 4 else socket.AF_INET6

    def name(self, sock: socket.socket) -> tuple[Any, ...]:
        """Return the address as the methods of `sock` take it.

        The zone of a link-local address ("fe80::1%tun0") is an interface of the socket's namespace.
        """
        if self.family == socket.AF_INET:
            return str(self.ip), self.port
        assert isinstance(self.ip, ipaddress.IPv6Address)
        zone = self.ip.scope_id
        number = 0
        if zone is not None:
            number = int(zone) if zone.isdigit() else ioctl.get_index(zone, sock)
        return str(self.ip).partition("%")[0], self.port, 0, number


async def resolve(
    host: str, port: int | str, family: int, resolver: Resolver | None, what: str = "host"
) -> list[Address]:
    """Return a host's addresses of one family; family 0 means both.

    Raises:
        TypeError, ValueError: an argument is invalid, or the host is a name without a resolver.
        OSError: the host has no address of this family.
    """
    check_family(family)
    if not isinstance(host, str):
        raise TypeError(f"{what} must be a str, got {host!r}")
    number = _port(port)
    try:
        found = [Address(host, number)]
    except ValueError:
        if resolver is None:
            raise ValueError(
                f"{host!r} is not an IP address; pass an address, or pass 'resolver', because this "
                "program's own resolver would ask in another network namespace"
            ) from None
        texts = resolver(host)
        if inspect.isawaitable(texts):
            texts = await texts
        found = _resolved(host, texts, number)
    fitting = [each for each in found if family in (0, each.family)]
    if not fitting:
        kind = {0: "", socket.AF_INET: "IPv4 ", socket.AF_INET6: "IPv6 "}.get(family, "")
        raise socket.gaierror(socket.EAI_NONAME, f"{host} has no {kind}address")
    return fitting


def _resolved(host: str, texts: object, port: int) -> list[Address]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"the resolver must return a list of addresses for {host!r}, got {texts!r}")
    try:
        return [Address(str(text), port) for text in texts]
    except ValueError as error:
        raise ValueError(f"the resolver's answer for {host!r} is not valid: {error}") from None


def check_family(family: int) -> None:
    """Check that a family is IPv4, IPv6, or 0 for both.

    Raises:
        ValueError: it is something else.
    """
    if family not in (0, socket.AF_INET, socket.AF_INET6):
        raise ValueError(f"family must be socket.AF_INET, socket.AF_INET6 or 0, got {family!r}")


def _port(port: int | str) -> int:
    if isinstance(port, str) and port.isdigit():
        port = int(port)
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port must be a number, got {port!r}")
    if not 0 <= port <= 65_535:
        raise ValueError(f"port must be 0 to 65535, got {port}")
    return port


async def connected(
    make: _SocketMaker, targets: Sequence[Address], local: Sequence[Address], proto: int
) -> socket.socket:
    """Try the addresses in turn; return a TCP socket that is connected to one of them.

    Raises:
        OSError: no address accepts the connection; the same error as asyncio raises.
    """
    errors: list[OSError] = []
    for target in targets:
        sock = await make(target.family, socket.SOCK_STREAM, proto)
        try:
            _bind(sock, target.family, local)
            await _connect(sock, target.name(sock))
        except OSError as error:
            sock.close()
            errors.append(error)
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    if len(errors) == 1:
        raise errors[0]
    raise OSError(f"Multiple exceptions: {', '.join(str(error) for error in errors)}")


async def _connect(sock: socket.socket, name: tuple[Any, ...]) -> None:
    """Connect as an event loop's `sock_connect` does. uvloop's would lose an address's zone."""
    try:
        sock.connect(name)
        return
    except BlockingIOError:
        pass
    source = sock.getsockname()[0]
    if source == "0.0.0.0" or (source == "::1" and name[0] != source):
        # The kernel has a route but no address, and sends the SYN with this source. Nobody answers.
        text = f"no interface inside has an address to connect to {name} from; add one"
        raise OSError(errno.EADDRNOTAVAIL, text)
    loop = asyncio.get_running_loop()
    decided = loop.create_future()

    def decide() -> None:
        if not decided.done():
            decided.set_result(None)

    loop.add_writer(sock, decide)
    try:
        await decided
    finally:
        loop.remove_writer(sock)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, f"Connect call failed {name}")


def _bind(sock: socket.socket, family: int, local: Sequence[Address]) -> None:
    """Bind a socket to the local address of its family, if local addresses were given.

    Raises:
        OSError: the kernel refuses, or no local address has this family.
    """
    if not local:
        return
    for address in local:
        if address.family == family:
            sock.bind(address.name(sock))
            return
    raise OSError(f"local_addr has no address of family {sock.family.name}, as the target has")


async def listening(
    make: _SocketMaker,
    addresses: Sequence[Address],
    *,
    reuse_address: bool | None,
    reuse_port: bool | None,
) -> list[socket.socket]:
    """Return a bound TCP socket for each address. asyncio calls `listen` on them."""
    made: list[socket.socket] = []
    try:
        for address in addresses:
            sock = await make(address.family, socket.SOCK_STREAM, 0)
            made.append(sock)
            if reuse_address is not False:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if address.family == socket.AF_INET6:
                # Otherwise "::" would also take the port at "0.0.0.0".
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address.name(sock))
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made


async def bound(
    make: _SocketMaker,
    local: Sequence[Address],
    remote: Sequence[Address],
    *,
    family: int,
    proto: int,
    reuse_port: bool | None,
    allow_broadcast: bool | None,
) -> socket.socket:
    """Return a UDP socket, bound to the local and connected to the remote address, if given."""
    families: list[int] = [each.family for each in (*remote, *local)]
    families = families or [family or socket.AF_INET]
    sock = await make(families[0], socket.SOCK_DGRAM, proto)
    try:
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if allow_broadcast:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        _bind(sock, families[0], local)
        if remote:
            sock.connect(remote[0].name(sock))  # does not block: UDP sends nothing to connect
    except BaseException:
        sock.close()
        raise
    return sock


class Servers(asyncio.AbstractServer):
    """Several servers as one, because asyncio makes a server of only one given socket."""

    def __init__(self, servers: Sequence[asyncio.Server]) -> None:
        self._servers = servers

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The listening sockets; empty after closing."""
        return tuple(sock for server in self._servers for sock in server.sockets)

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._servers[0].get_loop()

    def is_serving(self) -> bool:
        return any(server.is_serving() for server in self._servers)

    async def start_serving(self) -> None:
        for server in self._servers:
            await server.start_serving()

    async def serve_forever(self) -> None:
        async with asyncio.TaskGroup() as group:
            for server in self._servers:
                group.create_task(server.serve_forever())

    async def wait_closed(self) -> None:
        for server in self._servers:
            await server.wait_closed()

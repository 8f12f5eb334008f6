"""Carries the connections, datagrams and pings of a program inside to the host's network.

Nothing is accepted before it stands outside: a connection waits at its SYN until the host's own
connect() has an answer, and the program inside gets that answer.
"""

import asyncio
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from aiotun.netstack import PipeStats, Refusal, pipe

from .access import Access, Address, NotPermittedError, is_of_this_machine
from .resolvers import Resolvers
from .server_names import server_name

__all__ = ["Inside", "Outside", "as_text"]

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_DNS = 53
_CLAIM_SECONDS = 10.0  # a client that is gone never takes its connection
_LIMIT = 2**18  # bytes of a stream's buffer

# How the host's own errors look to the program inside.
_REFUSALS: dict[int, bool | Refusal] = {
    errno.ECONNREFUSED: False,
    errno.ECONNRESET: False,
    errno.ENETUNREACH: Refusal.NET,
    errno.EAFNOSUPPORT: Refusal.NET,
    errno.EACCES: Refusal.PROHIBITED,
    errno.EPERM: Refusal.PROHIBITED,
}


@dataclass(frozen=True)
class Inside:
    """Addresses that mean something else outside."""

    name_servers: tuple[str, ...]
    """Asked for names inside. Each stands for one of the host's own, in their order."""
    loopback: str | None = None
    """Stands for the host's 127.0.0.1 (or ::1); None where that can't be reached."""


class Outside:
    """The host's network, as the program inside sees it."""

    def __init__(
        self, inside: Inside, access: Access, resolvers: Resolvers, log: Callable[[str], None]
    ) -> None:
        self._inside = inside
        self._access = access
        self._resolvers = resolvers
        self.log = log
        self._connected: dict[tuple[Address, Address], Streams] = {}

    # Where an address leads

    def target(self, local: Address) -> Address:
        """Return the host's address for one that the program inside asked for.

        Raises:
            NotPermittedError: it may not reach that.
            OSError: there is no route to it.
        """
        host, port = local
        if host in self._inside.name_servers:
            if port != _DNS:
                raise NotPermittedError
            servers = self._resolvers.servers
            return servers[self._inside.name_servers.index(host) % len(servers)], _DNS
        # Where mounts are refused, the program inside asks the host's name servers themselves.
        if port == _DNS and host in self._resolvers.servers:
            return local
        if not self._access.permits(local):
            raise NotPermittedError
        if host == self._inside.loopback:
            return "::1" if ":" in host else "127.0.0.1", port
        if is_of_this_machine(host):
            raise NotPermittedError
        return local

    # TCP

    async def admit(self, local: Address, peer: Address) -> bool | Refusal:
        """Connect outside; say what the program inside gets to hear."""
        local, peer = local[:2], peer[:2]
        try:
            streams = await asyncio.open_connection(*self.target(local), limit=_LIMIT)
        except NotPermittedError:
            self.log(f"tcp {as_text(local)} denied")
            return Refusal.PROHIBITED
        except OSError as error:
            self.log(f"tcp {as_text(local)} failed: {_said(error)}")
            return _REFUSALS.get(error.errno or 0, Refusal.HOST)
        self._connected[local, peer] = streams
        asyncio.get_running_loop().call_later(_CLAIM_SECONDS, self._unclaimed, local, peer, streams)
        return True

    def _unclaimed(self, local: Address, peer: Address, streams: Streams) -> None:
        if self._connected.get((local, peer)) is streams:
            del self._connected[local, peer]
            streams[1].transport.abort()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join a connection of the program inside to the one that stands outside."""
        local: Address = writer.get_extra_info("sockname")[:2]
        peer: Address = writer.get_extra_info("peername")[:2]
        streams = self._connected.pop((local, peer), None)
        if streams is None:
            writer.transport.abort()
            return
        began = time.monotonic()
        first, stats = _FirstBytes(reader), PipeStats()
        await pipe((first.reader, writer), streams, stats=stats)
        name = server_name(bytes(first.seen))
        # HTTP's Host is the address itself, if that is what the program was given.
        named = (
            f" {name}" if name and name not in (local[0], f"[{local[0]}]", as_text(local)) else ""
        )
        moved = f"{stats.a_to_b} bytes up, {stats.b_to_a} down"
        self.log(f"tcp {as_text(local)}{named} {moved}, {time.monotonic() - began:.2f} s")


class _FirstBytes:
    """Reads a stream, and remembers how it begins."""

    _ENOUGH = 2**14

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.seen = bytearray()

    @property
    def reader(self) -> asyncio.StreamReader:
        """This, for `pipe`, which only reads."""
        return cast("asyncio.StreamReader", self)

    async def read(self, count: int) -> bytes:
        data = await self._reader.read(count)
        if len(self.seen) < self._ENOUGH:
            self.seen += data[: self._ENOUGH]
        return data


def as_text(address: Address) -> str:
    """Write an address and a port as in a URL."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _said(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)

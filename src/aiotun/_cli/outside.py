"""Carries the connections, datagrams and pings of a program inside to the host's network.

Nothing is accepted before it stands outside: a connection waits at its SYN until the host's own
connect() has an answer, and the program inside gets that answer.
"""

import asyncio
import errno
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from aiotun.netstack import Refusal

from .access import Access, Address, NotPermittedError, is_of_this_machine
from .joining import End, join
from .resolvers import Resolvers
from .server_names import server_name

__all__ = ["Inside", "Outside", "as_text"]

_DNS = 53
_CLAIM_SECONDS = 10.0  # a client that is gone never takes its connection
_FIRST_BYTES = 2**14  # in which a server's name is looked for

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
        self._connected: dict[tuple[Address, Address], End] = {}

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
            host, port = self.target(local)
            _, end = await asyncio.get_running_loop().create_connection(End, host, port)
        except NotPermittedError:
            self.log(f"tcp {as_text(local)} denied")
            return Refusal.PROHIBITED
        except OSError as error:
            self.log(f"tcp {as_text(local)} failed: {_said(error)}")
            return _REFUSALS.get(error.errno or 0, Refusal.HOST)
        self._connected[local, peer] = end
        asyncio.get_running_loop().call_later(_CLAIM_SECONDS, self._unclaimed, local, peer, end)
        return True

    def _unclaimed(self, local: Address, peer: Address, end: End) -> None:
        if self._connected.get((local, peer)) is end:
            del self._connected[local, peer]
            end.transport.abort()

    def handle(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Coroutine[Any, Any, None] | None:
        """Join a connection of the program inside to the one that stands outside.

        The stack calls this when the connection is made. A coroutine would begin later, when the
        reader may have got data.
        """
        local: Address = writer.get_extra_info("sockname")[:2]
        peer: Address = writer.get_extra_info("peername")[:2]
        outside = self._connected.pop((local, peer), None)
        if outside is None:
            writer.transport.abort()
            return None
        inside = End(_FIRST_BYTES)
        inside.take_over(writer.transport)
        return self._carry(local, inside, outside)

    async def _carry(self, local: Address, inside: End, outside: End) -> None:
        began = time.monotonic()
        await join(inside, outside)
        named = f" {name}" if (name := server_name(bytes(inside.first))) else ""
        moved = f"{inside.received} bytes up, {outside.received} down"
        self.log(f"tcp {as_text(local)}{named} {moved}, {time.monotonic() - began:.2f} s")


def as_text(address: Address) -> str:
    """Write an address and a port as in a URL."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _said(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)

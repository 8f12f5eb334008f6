"""Asks name servers for addresses from inside a network namespace.

Sources: RFC 1035; RFC 7766 (TCP).
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Sequence

import dpkt

import aiotun

__all__ = ["Names"]

_PORT = 53
_SECONDS = 3.0
_TYPES = (dpkt.dns.DNS_A, dpkt.dns.DNS_AAAA)


class Names:
    """Resolves names by the servers of a tunnel's configuration, through the tunnel.

    Args:
        inside: where to ask from.
        servers: addresses, in the order in which to ask them.
        search: domains to try for names without a dot.
    """

    def __init__(
        self, inside: aiotun.Namespace, servers: Sequence[str], search: Sequence[str] = ()
    ) -> None:
        self._inside = inside
        self._servers = servers
        self._search = search

    async def resolve(self, name: str) -> list[str]:
        """Return the addresses of a name.

        Raises:
            OSError: the name has no address, or no server answers.
        """
        names = [name]
        if "." not in name.rstrip("."):
            names = [*(f"{name}.{domain}" for domain in self._search), name]
        for each in names:
            # Both at once. The AAAA question may stay without an answer at bad servers.
            both = await asyncio.gather(*(self._ask(each, kind) for kind in _TYPES))
            if found := [address for addresses in both for address in addresses]:
                return found
        raise OSError(0, "the name servers inside know no address for it", name)

    async def _ask(self, name: str, kind: int) -> list[str]:
        number = random.SystemRandom().randrange(2**16)
        question = dpkt.dns.DNS.Q(name=name.rstrip("."), type=kind)
        query = bytes(dpkt.dns.DNS(id=number, qd=[question]))
        for server in self._servers:
            with contextlib.suppress(OSError, TimeoutError, EOFError, dpkt.UnpackError):
                async with asyncio.timeout(_SECONDS):
                    answer = await self._by_udp(server, query, number)
                    if answer.op & dpkt.dns.DNS_TC:
                        answer = await self._by_tcp(server, query)
                return _addresses(answer, kind)
        return []

    async def _by_udp(self, server: str, query: bytes, number: int) -> "dpkt.dns.DNS":
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        with await self._inside.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((server, _PORT))  # takes datagrams of this server only
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, query)
            while True:
                data = await loop.sock_recv(sock, 4096)
                with contextlib.suppress(dpkt.UnpackError, IndexError):
                    answer = dpkt.dns.DNS(data)
                    if answer.id == number and answer.qr:
                        return answer

    async def _by_tcp(self, server: str, query: bytes) -> "dpkt.dns.DNS":
        reader, writer = await self._inside.open_connection(server, _PORT)
        try:
            writer.write(struct.pack("!H", len(query)) + query)
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            return dpkt.dns.DNS(await reader.readexactly(length))
        finally:
            writer.close()


def _addresses(answer: "dpkt.dns.DNS", kind: int) -> list[str]:
    family = socket.AF_INET if kind == dpkt.dns.DNS_A else socket.AF_INET6
    return [socket.inet_ntop(family, each.rdata) for each in answer.an if each.type == kind]

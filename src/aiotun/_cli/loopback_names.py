"""Answers inside on those of the host's name servers that are on loopback.

Where this machine refuses mounts (AppArmor or seccomp in a container), the command keeps the host's
/etc/resolv.conf. A name server on loopback (127.0.0.53 of systemd-resolved, 127.0.0.11 of Docker)
is nobody inside, because the command has a loopback interface of its own. So this listens there,
and asks the same address outside.
"""

import asyncio
import contextlib
import functools
import ipaddress
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiotun
from aiotun.netstack import pipe

from .access import Address

__all__ = ["answering_on_loopback"]

_DNS = 53
_ANSWER_SECONDS = 10.0
_AT_ONCE = 256  # questions; each takes a descriptor


@contextlib.asynccontextmanager
async def answering_on_loopback(
    ns: aiotun.Namespace, servers: list[str], log: Callable[[str], None]
) -> AsyncIterator[None]:
    """Answer inside `ns` on the `servers` that are loopback addresses, over UDP and TCP."""
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            if not ipaddress.ip_address(server).is_loopback:
                continue  # a connection like any other

            async def join(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: str = server
            ) -> None:
                try:
                    outside = await asyncio.open_connection(server, _DNS)
                except OSError:
                    writer.transport.abort()
                else:
                    await pipe((reader, writer), outside)

            try:
                await stack.enter_async_context(await ns.start_server(join, server, _DNS))
                transport, _ = await ns.create_datagram_endpoint(
                    functools.partial(_Questions, server, log), (server, _DNS)
                )
            except OSError as error:  # ::1 where IPv6 is off, for example
                log(f"the name server {server} can't be asked inside: {error.strerror}")
            else:
                stack.callback(transport.close)
        yield


class _Questions(asyncio.DatagramProtocol):
    """Asks the server outside each question that comes, and gives the answer back."""

    def __init__(self, server: str, log: Callable[[str], None]) -> None:
        self._server = server
        self._log = log
        self._asking: set[asyncio.Task[None]] = set()
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Address) -> None:
        if len(self._asking) >= _AT_ONCE:
            self._log(f"udp {self._server} a question was dropped, because {_AT_ONCE} wait")
            return
        task = asyncio.create_task(self._ask(data, addr))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, data: bytes, client: Address) -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        # Without an answer, the client asks again, as on a network.
        with contextlib.suppress(OSError):
            transport, _ = await loop.create_datagram_endpoint(
                lambda: _Answer(answer), remote_addr=(self._server, _DNS)
            )
            try:
                transport.sendto(data)
                async with asyncio.timeout(_ANSWER_SECONDS):
                    self._transport.sendto(await answer, client)
            finally:
                transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        for task in self._asking:
            task.cancel()


class _Answer(asyncio.DatagramProtocol):
    """Takes the first datagram that comes."""

    def __init__(self, answer: asyncio.Future[bytes]) -> None:
        self._answer = answer

    def datagram_received(self, data: bytes, addr: Address) -> None:
        if not self._answer.done():
            self._answer.set_result(data)

    def error_received(self, error: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)

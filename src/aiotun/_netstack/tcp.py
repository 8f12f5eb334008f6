"""Accepts the TCP connections that a mechanism redirects, and calls a handler for each.

asyncio's own server has no limit of connections. When descriptors run out, it stops accepting for a
second, and clients get no answer meanwhile. So this module accepts connections itself.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .._kernel.limits import LIMITS
from ..errors import DeviceClosedError
from .admission import Admission

if TYPE_CHECKING:
    from .admission import Admit
    from .core import Core

__all__ = ["ClientHandler", "TcpInterceptor"]

ClientHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]
"""Called with a reader and a writer for each connection; plain or async."""

# How many connections are accepted before the loop does something else.
_AT_ONCE = 64

# How many seconds to wait before accepting again if no descriptor is left even to refuse one.
_PAUSE = 0.2

# A StreamReader pauses the transport when it holds more than twice this. The transport reads 256
# KiB at once, so with asyncio's default of 64 KiB it would pause after nearly every read.
_READ_LIMIT = 128 * 1024

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger

# Errors of accept(2) that concern one connection only: it has ended, or had a network error.
_ONE_CONNECTION = {
    errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT,
    errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH,
    errno.EINTR,
}  # fmt: skip


class TcpInterceptor:
    """Watches listening sockets (see `mechanism.Receiver`), and serves their connections."""

    def __init__(
        self,
        core: Core,
        handle: ClientHandler,
        admit: Admit | None,
        limit: int,
        backlog: int,
    ) -> None:
        self._core = core
        self._admit = admit
        self._handle = handle
        self._limit = limit
        self.backlog: int = backlog
        self._loop = asyncio.get_running_loop()
        self._listening: set[socket.socket] = set()
        self._open = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        # When no descriptor is left, this one is closed for a moment, so that a connection can be
        # accepted and reset.
        self._spare = _spare()
        self._closed = False
        self._admission: Admission | None = None

    async def start(self) -> None:
        """Begin to accept."""
        mechanism = self._core.mechanism
        assert mechanism is not None
        try:
            if self._admit is not None or mechanism.on_demand:
                injector = await self._core.intake.injector(self._core.namespace, self._core.tun)
                if self._closed:  # with the stack
                    raise DeviceClosedError(f"the stack of {self._core.tun.name} was closed")
                self._admission = Admission(self._core, injector, self._admit, self._is_full)
            await mechanism.start(self)
        except BaseException:
            self.close()
            raise

    def _is_full(self) -> bool:
        return self._open >= self._limit

    def close(self) -> None:
        """Stop accepting. Open connections go on."""
        if self._closed:
            return
        self._closed = True
        assert self._core.mechanism is not None
        self._core.mechanism.stop()
        if self._admission is not None:
            self._admission.close()
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)

    async def wait_closed(self) -> None:
        """Wait until no call of `admit` is under way."""
        if self._admission is not None:
            await self._admission.wait_closed()

    @property
    def closed(self) -> bool:
        return self._closed

    # The receiver

    def add(self, sock: socket.socket) -> None:
        self._listening.add(sock)
        self._loop.add_reader(sock.fileno(), self._accept_some, sock)

    def remove(self, sock: socket.socket) -> None:
        self._listening.discard(sock)
        self._loop.remove_reader(sock.fileno())

    def _accept_some(self, listening: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _ONE_CONNECTION:
                    continue
                self._pause_or_refuse(listening, error)
                return
            if self._is_full():
                self._refuse(sock)
                continue
            sock.setblocking(False)
            self._open += 1
            self._core.counts.connections_open += 1
            self._core.counts.connections_accepted += 1
            self._keep(self._loop.create_task(self._begin(sock)))

    def _refuse(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        sock.close()
        self._core.counts.connections_refused += 1

    def _pause_or_refuse(self, listening: socket.socket, error: OSError) -> None:
        """Refuse a connection with the help of the spare descriptor, or pause accepting."""
        if error.errno in LIMITS and self._spare >= 0:
            os.close(self._spare)
            try:
                self._refuse(listening.accept()[0])
            except OSError:
                pass
            else:
                self._spare = _spare()
                return
            self._spare = _spare()
        else:
            text = "aiotun could not accept a connection"
            self._loop.call_exception_handler({"message": text, "exception": error})
        self._loop.remove_reader(listening.fileno())
        self._loop.call_later(_PAUSE, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        if self._spare < 0 and not self._closed:
            self._spare = _spare()
        if listening in self._listening:
            self._loop.add_reader(listening.fileno(), self._accept_some, listening)

    # Connections

    async def _begin(self, sock: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=_READ_LIMIT, loop=self._loop)
        protocol = _Connection(reader, self._connected, self._ended)
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, sock)
        except BaseException as error:
            protocol.end()
            sock.close()
            if not isinstance(error, OSError):
                raise

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            result = self._handle(reader, writer)
        except Exception as error:  # noqa: BLE001 - it is the program's, and reported
            self._failed(writer, error)
            return
        if inspect.isawaitable(result):
            self._keep(self._loop.create_task(self._wait_for(result, writer)))

    async def _wait_for(self, result: Awaitable[None], writer: asyncio.StreamWriter) -> None:
        try:
            await result
        except asyncio.CancelledError:
            writer.close()
            raise
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(writer, error)

    def _failed(self, writer: asyncio.StreamWriter, error: Exception) -> None:
        writer.close()
        if isinstance(error, ConnectionError) and self._core.closing:
            return  # the stack has reset the connection
        self._loop.call_exception_handler(
            {
                "message": "Unhandled exception in the handler of an intercepted connection",
                "exception": error,
                "transport": writer.transport,
            }
        )

    def _ended(self) -> None:
        self._open -= 1
        self._core.counts.connections_open -= 1

    def _keep(self, task: asyncio.Task[Any]) -> None:
        # An event loop holds its tasks only weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection(asyncio.StreamReaderProtocol):
    """A stream's protocol that reports when the connection has ended."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(reader, connected, asyncio.get_running_loop())
        self._report: Callable[[], None] | None = ended

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.end()

    def end(self) -> None:
        report, self._report = self._report, None
        if report is not None:
            report()


def _spare() -> int:
    """Open a descriptor to keep in reserve; -1 if none is left."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1

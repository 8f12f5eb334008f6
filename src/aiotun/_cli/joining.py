"""Joins two TCP connections: what one receives is written to the other, in the same callback.

`aiotun.netstack.pipe` does the same with streams, which any program can use. A `StreamReader`
copies each byte into its buffer and out of it again, and wakes a task up. Here this is a third of
the processor time, as the connections are all that `aiotun run` does.
"""

import asyncio
import contextlib
import socket
import struct
from typing import cast

__all__ = ["End", "join"]

_NO_LINGER = struct.pack("ii", 1, 0)


class End(asyncio.Protocol):
    """One connection. Until it is joined to the other, it keeps what it receives.

    Args:
        first: how many of the first bytes to remember.
    """

    transport: asyncio.Transport

    def __init__(self, first: int = 0) -> None:
        self.received = 0  # bytes
        self.first = bytearray()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._remember = first
        self._before: asyncio.BaseProtocol | None = None
        self._other: End | None = None
        self._early = bytearray()
        self._ended = False

    def take_over(self, transport: asyncio.WriteTransport) -> None:
        """Become the protocol of a connection, in the callback that reports it as made.

        Later the protocol before may have got data. It is still told when the connection is lost.
        """
        self._before = transport.get_protocol()
        transport.set_protocol(self)
        self.connection_made(transport)

    def reset(self) -> None:
        """Close the connection at once, so that the other end gets a reset instead of an end."""
        if (sock := self.transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):  # closed already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def join(self, other: "End") -> None:
        """Write to `other` from now on, and first what was received already."""
        self._other = other
        if self._early:
            other.transport.write(self._early)
            self._early = bytearray()
        if self._ended:
            self._end(other)
        elif self.lost.done():
            other.reset()
        else:
            self.transport.resume_reading()

    def _end(self, other: "End") -> None:
        other.transport.write_eof()  # goes out after what is buffered
        if other._ended:  # noqa: SLF001 - of this class
            self.transport.close()
            other.transport.close()

    # The protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if len(self.first) < self._remember:
            self.first += data[: self._remember]
        if self._other is not None:
            self._other.transport.write(data)
        else:
            self._early += data
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self._ended = True
        if self._other is not None:
            self._end(self._other)
        return True  # the other way goes on

    # A transport that has ended must not be resumed: asyncio would report the end again.

    def pause_writing(self) -> None:
        if self._other is not None and not self._other._ended:  # noqa: SLF001 - of this class
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and not self._other._ended:  # noqa: SLF001 - of this class
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._before is not None:
            self._before.connection_lost(exc)
        if not self.lost.done():
            self.lost.set_result(None)
        other = self._other
        if other is not None and not (exc is None and self._ended and other._ended):  # noqa: SLF001
            other.reset()


async def join(a: End, b: End) -> None:
    """Move bytes both ways until both ways have ended, or one connection has broken.

    *Cancellation*: resets both connections.
    """
    a.join(b)
    b.join(a)
    try:
        await asyncio.wait([a.lost, b.lost])
    finally:
        for end in (a, b):
            if not end.lost.done():
                end.reset()

"""Bytes both ways between two connections."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import socket
import struct
from typing import Any

__all__ = ["PipeStats", "pipe"]

_READ_SIZE = 256 * 1024

_NO_LINGER = struct.pack("ii", 1, 0)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclasses.dataclass(slots=True)
class PipeStats:
    """Counters of `pipe`: pass it one of these, and read them at any time."""

    a_to_b: int = 0
    """Bytes read from the first connection and written to the second."""
    b_to_a: int = 0
    """Bytes read from the second connection and written to the first."""
    error: OSError | None = None
    """The error of the connection that broke first, for example `ConnectionResetError`."""


async def pipe(a: Streams, b: Streams, *, stats: PipeStats | None = None) -> None:
    """Move bytes both ways between two connections until both ways have ended.

    When one way ends, its end is passed on after all its bytes (half-close), and the other way goes
    on. A slow reader only slows down the writer at the other side. A connection with nothing to
    move costs no processor time. If one connection breaks, the other is reset.

    Args:
        a, b: the reader and writer of a connection, as `asyncio.open_connection` returns them and
            `asyncio.start_server` passes them. `pipe` only calls their methods, so objects of other
            libraries with the same methods work, too. Streams opened with ``limit=`` of 128 KiB or
            more are the fastest.
        stats: an object to count in. One object may be given to several pipes.

    Returns:
        None, when both connections are closed: after both ways have ended, or after one connection
        broke (`PipeStats.error`).

    Raises:
        TypeError: an argument is invalid.
        ValueError: `a` and `b` are the same connection.
        Exception: a reader or writer of another library raised something that is not an `OSError`.
            Both connections are reset then, too.

    *Cancellation*: closes neither connection and loses no byte: all that was read is in the other
    connection's buffer. Both connections can be used afterwards.

    *Concurrency*: no other task may read from these readers meanwhile.
    """
    _check(a, b, stats)
    counts = stats if stats is not None else PipeStats()
    ways = {
        asyncio.create_task(_copy(a[0], b[1], counts, "a_to_b")),
        asyncio.create_task(_copy(b[0], a[1], counts, "b_to_a")),
    }
    # A way that waits for room does not read, so it would not notice that its source broke. So two
    # more tasks wait until the connections close. They must not be cancelled: asyncio would then
    # cancel the future that every `wait_closed` of that writer awaits. They end with the
    # connections.
    watches = {asyncio.create_task(writer.wait_closed()) for _, writer in (a, b)}
    for watch in watches:
        watch.add_done_callback(_retrieve)
    running = ways | watches
    try:
        while running & ways:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    except Exception as error:
        _reset(a[1])
        _reset(b[1])
        if not isinstance(error, OSError):
            raise
        counts.error = error
    finally:
        for task in ways:
            task.cancel()
        await asyncio.wait(ways)
        for task in ways:
            _retrieve(task)
    a[1].close()
    b[1].close()
    await asyncio.wait(watches)


def _check(a: Any, b: Any, stats: object) -> None:
    for pair in (a, b):
        fits = isinstance(pair, tuple) and len(pair) == 2
        if not fits or not hasattr(pair[0], "read") or not hasattr(pair[1], "wait_closed"):
            raise TypeError(f"pipe needs two tuples of a reader and a writer, got {pair!r}")
    if a[1] is b[1]:
        raise ValueError(f"pipe needs two connections, got {a!r} twice")
    if stats is not None and not isinstance(stats, PipeStats):
        raise TypeError(f"stats must be a PipeStats, got {stats!r}")


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: PipeStats, way: str
) -> None:
    while data := await reader.read(_READ_SIZE):
        if writer.is_closing():
            raise ConnectionResetError(errno.ECONNRESET, "the other connection was closed here")
        setattr(counts, way, getattr(counts, way) + len(data))
        writer.write(data)
        await writer.drain()
    if writer.is_closing():
        return
    if writer.can_write_eof():
        writer.write_eof()  # goes out after what is buffered
    else:
        writer.close()  # TLS has no half-close: the connection ends when its buffer is empty


def _retrieve(task: asyncio.Task[None]) -> None:
    """Retrieve a task's exception; otherwise asyncio would log that it was never retrieved."""
    if not task.cancelled():
        task.exception()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once, so that the other end gets a reset instead of an end."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # closed already, or not a socket with this option
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport = getattr(writer, "transport", None)
    if transport is not None:
        transport.abort()
    else:
        writer.close()

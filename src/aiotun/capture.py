"""Writes packets to pcap and pcapng files, with nanosecond times, for Wireshark and tcpdump.

::

    async with PcapWriter("tun0.pcapng", tun.mode) as writer:
        with tun.capture(writer):
            ...

The caller packs the record and a thread writes it, so a slow disk never blocks the event loop. If
the disk is too slow, packets are left out of the file and counted in `PcapWriter.dropped`.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, Self

from ._capture.format import (
    LINK_TYPES,
    MAX_OPTION,
    MAX_SNAPLEN,
    PACKERS,
    WAYS,
    Direction,
    Format,
    header,
)
from ._capture.thread import Sink, open_file
from ._kernel.threads import finish

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

    from ._kernel.words import Mode

__all__ = ["Capture", "Direction", "Format", "PcapWriter"]


class PcapWriter:
    """Writes packets to a pcap or pcapng file, in a thread of its own.

    Attributes:
        mode: ``"tun"`` if the file holds IP packets, ``"tap"`` if it holds Ethernet frames.
        format: the file's format.

    *Concurrency*: `write` may be called from any thread, and one writer may serve several captures
    of devices of its mode. A writer belongs to no event loop.

    *Closing*: always close a writer: only then is it certain that all packets were handed to the
    disk. A writer that is garbage-collected without being closed warns (`ResourceWarning`) and
    still writes the packets that wait. A writer that is open when the interpreter exits writes them
    then.

    Source: draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | BinaryIO,
        mode: Mode = "tun",
        *,
        format: Format | None = None,  # noqa: A002 - the word for it
        snaplen: int = MAX_SNAPLEN,
        max_bytes: int | None = None,
        max_files: int = 2,
        pending_bytes: int = 16 * 1024 * 1024,
        interface: str | None = None,
    ) -> None:
        """Open the file and start the thread.

        Opening a file waits for the disk. If the file is on a network file system, call this in a
        thread (`asyncio.to_thread`).

        Args:
            file: a path, whose file is overwritten; or an open, blocking binary file. An open file
                is not closed by the writer. Nothing else may use it while the writer is open.
            mode: ``"tun"`` for IP packets (LINKTYPE_RAW, 101), ``"tap"`` for Ethernet frames
                (LINKTYPE_ETHERNET, 1).
            format: the default is ``"pcapng"`` for a path that ends in ``.pcapng``, and ``"pcap"``
                for everything else.
            snaplen: how many bytes of each packet are kept, 1 to 262144. The file also records the
                packet's original length.
            max_bytes: the size in bytes at which the writer starts a new file. The previous file is
                renamed to ``NAME.1.SUFFIX``, the one before it to ``NAME.2.SUFFIX``, and so on.
                Each file can be read by itself, and has at least one packet. Needs a path.
            max_files: how many files are kept, including the one being written.
            pending_bytes: how many bytes may wait for the disk before packets are dropped.
            interface: an interface name to write into a pcapng file, of at most 65535 bytes.

        Raises:
            TypeError, ValueError: an argument is invalid.
            OSError: the file can't be opened.
            ResourceLimitError: no thread can be started. The file exists then, and is empty.
        """
        if mode not in LINK_TYPES:
            raise ValueError(f"mode must be 'tun' or 'tap', got {mode!r}")
        _check_int("snaplen", snaplen)
        if not 1 <= snaplen <= MAX_SNAPLEN:
            raise ValueError(f"snaplen must be 1 to {MAX_SNAPLEN} bytes, got {snaplen}")
        for name, value in (
            ("max_bytes", 1 if max_bytes is None else max_bytes),
            ("max_files", max_files),
            ("pending_bytes", pending_bytes),
        ):
            _check_int(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _check_interface(interface)
        path = Path(file) if isinstance(file, str | os.PathLike) else None
        if path is None and max_bytes is not None:
            raise ValueError("max_bytes needs a path: an open file can't be renamed")
        if format is None:
            format = "pcapng" if path is not None and path.suffix == ".pcapng" else "pcap"  # noqa: A001
        if format not in ("pcap", "pcapng"):
            raise ValueError(f"format must be 'pcap' or 'pcapng', got {format!r}")
        begin = header(format, LINK_TYPES[mode], snaplen, interface)
        target: BinaryIO | io.FileIO
        if isinstance(file, str | os.PathLike):
            target = open_file(Path(file))
        else:
            _check_binary(file)
            target = file
        self.mode: Mode = mode
        self.format: Format = format
        self._snaplen = snaplen
        self._max_bytes = max_bytes
        self._pack = PACKERS[format]
        self._header_bytes = self._file_bytes = len(begin)
        self._sink = Sink(target, path, begin, max_files, pending_bytes)
        self._sink.start()

    # Writing

    def write(
        self, packet: Buffer, *, direction: Direction | None = None, time_ns: int | None = None
    ) -> bool:
        """Write one packet; never waits.

        Args:
            packet: an IP packet or an Ethernet frame, any bytes-like object; it is copied.
            direction: the packet's direction; only pcapng files record it.
            time_ns: the time in nanoseconds since 1970; the default is now.

        Returns:
            True if the packet will be written; False if there was no room, and the packet was
            counted in `dropped`.

        Raises:
            TypeError, ValueError: an argument is invalid.
            ValueError: the writer is closed.
        """
        if self.closed:
            raise ValueError(f"{self!r} is closed; make a new PcapWriter")
        if direction not in WAYS:
            raise ValueError(f"direction must be 'in', 'out' or None, got {direction!r}")
        if time_ns is None:
            time_ns = time.time_ns()
        else:
            _check_int("time_ns", time_ns)
            if not 0 <= time_ns < 2**32 * 1_000_000_000:
                raise ValueError(f"time_ns must be a time between 1970 and 2106, got {time_ns}")
        return self._offer(packet, direction, time_ns)

    def record(self, packet: Buffer, direction: Direction) -> None:
        """Write a packet with the current time, for a capture; if closed, drop and count it."""
        self._offer(packet, direction, time.time_ns())

    def _offer(self, packet: Buffer, direction: Direction | None, time_ns: int) -> bool:
        data = packet if isinstance(packet, bytes) else memoryview(packet).tobytes()
        length = len(data)
        if length > self._snaplen:
            data = data[: self._snaplen]
        record = self._pack(data, length, time_ns, WAYS[direction])
        sink = self._sink
        with sink.changed:
            if sink.ending or (sink.pending and sink.pending + len(record) > sink.limit):
                sink.dropped += 1
                return False
            if self._max_bytes is not None:
                if self._file_bytes > self._header_bytes and (
                    self._file_bytes + len(record) > self._max_bytes
                ):
                    sink.records.append(None)
                    self._file_bytes = self._header_bytes
                self._file_bytes += len(record)
            sink.records.append(record)
            sink.pending += len(record)
            sink.accepted += 1
            sink.changed.notify()
        return True

    # State

    @property
    def written(self) -> int:
        """How many packets were handed to the disk so far."""
        return self._sink.written

    @property
    def dropped(self) -> int:
        """How many packets are missing from the file because the disk was too slow, or failed."""
        return self._sink.dropped

    @property
    def error(self) -> OSError | None:
        """The error that stopped the writing, or None; `close` raises it.

        Nothing is written after an error. The file ends with the last complete packet.
        """
        return self._sink.error

    @property
    def closed(self) -> bool:
        """Whether `close` or `aclose` was called."""
        return self._sink.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"written={self.written} dropped={self.dropped}"
        return f"<PcapWriter {self._sink.name} {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} can't be copied or pickled, as it has a file and a thread; use the writer "
            "itself, from any thread"
        )

    # Closing

    def close(self) -> None:
        """Write the packets that wait, and close the file. Blocks; may be called again.

        Raises:
            OSError: the disk failed, now or earlier (with the disk's errno). Only the first call
                raises it.
        """
        self._sink.end(closing=True)
        self._sink.thread.join()
        self._sink.tell()

    async def aclose(self) -> None:
        """Close as `close` does, without blocking the event loop.

        Raises:
            OSError: as `close`.

        *Cancellation*: only the waiting ends. The thread still writes everything and closes.

        *Concurrency*: may be called by several tasks at once.
        """
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        self._sink.end(closing=True, then=lambda: finish(loop, over))
        await over
        self._sink.thread.join()  # the thread is about to return
        self._sink.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError as failure:
            _leave(error, failure)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.aclose()
        except OSError as failure:
            _leave(error, failure)

    def __del__(self) -> None:
        sink: Sink | None = getattr(self, "_sink", None)
        if sink is None or sink.closed:
            return
        shown = repr(self)
        sink.end(closing=True)  # don't wait for the end: this may be the event loop's thread
        warnings.warn(f"unclosed {shown}; call close()", ResourceWarning, source=self, stacklevel=1)


def _check_binary(file: object) -> None:
    if isinstance(file, io.TextIOBase) or not hasattr(file, "write"):
        raise TypeError(f"file must be a path or a file opened in binary mode, got {file!r}")
    if getattr(file, "closed", False) is True:
        raise ValueError(f"{file!r} is closed; open it again, or give its path")
    # Call writable() only on these classes. io.RawIOBase.writable() returns False, and a user's
    # subclass that can write may not have overridden it.
    if isinstance(file, io.BufferedReader | io.FileIO) and not file.writable():
        raise ValueError(f"{file!r} can't be written to; open it with mode 'wb'")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")


def _check_interface(name: object) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"interface must be a name (str) or None, got {name!r}")
    length = len(os.fsencode(name))
    if length > MAX_OPTION:
        raise ValueError(f"interface must have at most {MAX_OPTION} bytes, got {length}")


def _leave(error: BaseException | None, failure: OSError) -> None:
    """Raise the write error.

    If the ``with`` block is already raising (a CancelledError, for example), let that error
    propagate, and attach the write error to it as a note.
    """
    if error is None:
        raise failure
    error.add_note(str(failure))


class Capture:
    """A running capture, returned by `Device.capture`; a context manager."""

    __slots__ = ("_stop",)

    def __init__(self, stop: Callable[[], None]) -> None:
        # Internal: use Device.capture.
        self._stop: Callable[[], None] | None = stop

    def stop(self) -> None:
        """Stop recording. The writer stays open. Idempotent."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop is None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

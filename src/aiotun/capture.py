"""Writing packets to files that Wireshark and tcpdump read: pcap and pcapng, in nanoseconds.

::

    async with PcapWriter("tun0.pcapng", tun.mode) as writer:
        with tun.capture(writer):
            ...

A record is packed where the packet is, and written by a thread: a slow disk never holds up the
event loop. What it has no time for is left out and counted in `PcapWriter.dropped`.
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
        mode: what the file's packets are.
        format: what the file is.

    *Concurrency*: `write` may be called from any thread, and one writer may serve several captures
    of devices of its mode. It belongs to no event loop.

    *Closing*: only that makes sure that everything is on its way to the disk. A writer that is
    thrown away without it warns (`ResourceWarning`), and writes what it has all the same; so does
    one that is open when the interpreter ends.

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
        """Open the file; the packets come later.

        Opening a file can wait for the disk: where that is a network's, do it in a thread
        (`asyncio.to_thread`).

        Args:
            file: a path, whose file is overwritten; or an open binary file that blocks, which is
                not closed here. Nobody else may use it meanwhile.
            mode: ``"tun"`` for IP packets (LINKTYPE_RAW, 101), ``"tap"`` for Ethernet frames
                (LINKTYPE_ETHERNET, 1).
            format: unless given, ``"pcapng"`` for a path that ends so and ``"pcap"`` for all else.
            snaplen: how many bytes are kept of each packet, 1 to 262144; the file tells how long
                it was.
            max_bytes: at which size in bytes to go on in a new file. The one before becomes
                ``NAME.1.SUFFIX``, that one ``NAME.2.SUFFIX`` and so on, and each can be read by
                itself. Needs a path. A file has one packet at least.
            max_files: how many files are kept, the one being written among them.
            pending_bytes: how much may wait for the disk before packets are dropped.
            interface: a name to put into a pcapng file, of at most 65535 bytes.

        Raises:
            TypeError, ValueError: an argument is wrong.
            OSError: the file cannot be opened.
            ResourceLimitError: no thread can be started. The file is there, and empty.
        """
        if mode not in LINK_TYPES:
            raise ValueError(f"mode is 'tun' or 'tap', not {mode!r}")
        _check_int("snaplen", snaplen)
        if not 1 <= snaplen <= MAX_SNAPLEN:
            raise ValueError(f"snaplen is 1 to {MAX_SNAPLEN} bytes, not {snaplen}")
        for name, value in (
            ("max_bytes", 1 if max_bytes is None else max_bytes),
            ("max_files", max_files),
            ("pending_bytes", pending_bytes),
        ):
            _check_int(name, value)
            if value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        _check_interface(interface)
        path = Path(file) if isinstance(file, str | os.PathLike) else None
        if path is None and max_bytes is not None:
            raise ValueError("max_bytes needs a path: an open file has no name to be moved to")
        if format is None:
            format = "pcapng" if path is not None and path.suffix == ".pcapng" else "pcap"  # noqa: A001
        if format not in ("pcap", "pcapng"):
            raise ValueError(f"format is 'pcap' or 'pcapng', not {format!r}")
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
            direction: which way it went; only pcapng has a place for that.
            time_ns: nanoseconds since 1970; now, unless given.

        Returns:
            Whether there was room. Where not it was counted in `dropped`.

        Raises:
            TypeError, ValueError: an argument is wrong.
            ValueError: the writer is closed.
        """
        if self.closed:
            raise ValueError(f"{self!r} is closed; make another to go on")
        if direction not in WAYS:
            raise ValueError(f"direction is 'in', 'out' or None, not {direction!r}")
        if time_ns is None:
            time_ns = time.time_ns()
        else:
            _check_int("time_ns", time_ns)
            if not 0 <= time_ns < 2**32 * 1_000_000_000:
                raise ValueError(f"time_ns is a time between 1970 and 2106, not {time_ns}")
        return self._offer(packet, direction, time_ns)

    def record(self, packet: Buffer, direction: Direction) -> None:
        """Write a packet now, for a capture: a closed writer counts it as dropped."""
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

    # What is known of it

    @property
    def written(self) -> int:
        """How many packets were handed to the disk so far."""
        return self._sink.written

    @property
    def dropped(self) -> int:
        """How many packets are missing from the file: the disk was too slow, or failed."""
        return self._sink.dropped

    @property
    def error(self) -> OSError | None:
        """What ended the writing before its time, once something did; `close` raises it.

        No more is written after it. The file ends with the last packet that is whole.
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
            f"{self!r} can't be copied or pickled: it has one file and one thread; use the writer "
            "itself, from any thread"
        )

    # Closing

    def close(self) -> None:
        """Write what is left and close the file; may be called again. Waits for the disk.

        Raises:
            OSError: the disk failed, now or before (its errno; the text says how many packets are
                missing). Only the first call raises it.
        """
        self._sink.end(closing=True)
        self._sink.thread.join()
        self._sink.tell()

    async def aclose(self) -> None:
        """Close as `close` does, while the event loop goes on.

        Raises:
            OSError: as `close`.

        *Cancellation*: everything is written and closed all the same, only the waiting ends.

        *Concurrency*: may be called by several tasks at once.
        """
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        self._sink.end(closing=True, then=lambda: finish(loop, over))
        await over
        self._sink.thread.join()  # it has but to return
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
        sink.end(closing=True)  # but don't wait: this may be the event loop's thread
        warnings.warn(f"unclosed {shown}; call close()", ResourceWarning, source=self, stacklevel=1)


def _check_binary(file: object) -> None:
    if isinstance(file, io.TextIOBase) or not hasattr(file, "write"):
        raise TypeError(f"file is a path or a file opened in binary mode, not {file!r}")
    if getattr(file, "closed", False) is True:
        raise ValueError(f"{file!r} is closed; open it again, or give its path")
    # Not any file's writable(): io.RawIOBase says False until a class of the user's says otherwise.
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
        raise ValueError(f"interface is a name of {length} bytes; pcapng takes {MAX_OPTION}")


def _leave(error: BaseException | None, failure: OSError) -> None:
    """Raise the disk's error, unless a block ends with one of its own: that goes on, with a note.

    A cancellation, say, has to stay one.
    """
    if error is None:
        raise failure
    error.add_note(str(failure))


class Capture:
    """A capture under way, as `Device.capture` gives it; a context manager."""

    __slots__ = ("_stop",)

    def __init__(self, stop: Callable[[], None]) -> None:
        # Internal: use Device.capture.
        self._stop: Callable[[], None] | None = stop

    def stop(self) -> None:
        """Record no more; may be called again. The writer stays open."""
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

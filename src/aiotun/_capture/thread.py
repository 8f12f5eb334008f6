"""The thread that writes a capture file, and how it finishes when the program ends.

`capture` adds packed records and the thread takes them out; neither waits for the other.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .._kernel import threads

__all__ = ["Sink", "open_file"]

# How many bytes are written at once. While the thread joins that many bytes it holds the
# interpreter's lock, and the event loop has to wait.
_PIECE_BYTES = 256 * 1024


def open_file(path: Path) -> io.FileIO:
    # Unbuffered: after a write error a buffer would try to write the same bytes again.
    return open(path, "wb", buffering=0)


class Sink:
    """The state that a writer and its thread share.

    It is an object of its own, so that the thread holds no reference to the writer. A writer that
    was not closed can then be collected, and warn, while the thread runs. The thread is a daemon:
    any other thread would keep the interpreter from exiting while a writer is open. At exit
    `_finish` writes what is left, so that nothing is lost.
    """

    def __init__(
        self,
        file: BinaryIO | io.FileIO,
        path: Path | None,
        header: bytes,
        max_files: int,
        limit: int,
    ) -> None:
        self.limit = limit
        self.changed = threading.Condition()  # reentrant: __del__ may run while we hold the lock
        # Everything that follows changes only with that lock held.
        self.records: list[bytes | None] = []  # None: start a new file
        self.pending = 0  # bytes in records, and in those that the thread is writing
        self.accepted = self.written = self.dropped = 0
        self.ending = self.closed = False
        self.error: OSError | None = None
        self.name = str(path) if path is not None else getattr(file, "name", "file")
        self._then: list[Callable[[], object]] = []
        self._done = False
        # Only the thread uses what follows.
        self._file = file
        self._path = path
        self._header = header
        self._max_files = max_files
        self._good = 0  # bytes in the file up to the end of the last whole piece
        self.thread = threading.Thread(target=self._run, name="aiotun-pcap", daemon=True)

    def start(self) -> None:
        _running.add(self)
        try:
            threads.start_thread(self.thread)
        except BaseException:
            _running.discard(self)
            self.closed = True
            if self._path is not None:
                self._file.close()
            raise

    def end(self, *, closing: bool, then: Callable[[], object] | None = None) -> None:
        """Tell the thread to write what is left and end. It calls `then` when it is done."""
        with self.changed:
            self.ending = True
            self.closed |= closing
            if then is not None and not self._done:
                self._then.append(then)
                then = None
            self.changed.notify()
        if then is not None:
            then()

    def tell(self) -> None:
        """Raise the error that stopped the writing, if any; only once."""
        if self.error is not None and self in _running:
            _running.discard(self)
            raise self.error

    def _run(self) -> None:
        try:
            try:
                self._write_all()
            except BaseException as error:  # noqa: BLE001 - a file of the user's may raise anything
                self._fail(error)
        finally:  # in every case: a task may wait for the end
            if self.error is None:  # otherwise `tell` must raise the error first, or `_finish`
                _running.discard(self)
            with self.changed:
                self._done = True
                waiting, self._then = self._then, []
            for then in waiting:
                then()

    def _write_all(self) -> None:
        self._write(self._header)
        while True:
            with self.changed:
                while not self.records and not self.ending:
                    self.changed.wait()
                records, self.records = self.records, []
                ending = self.ending
            piece: list[bytes] = []
            size = 0
            for record in records:
                if record is None:
                    self._write_records(piece, size)
                    self._rotate()
                    piece, size = [], 0
                    continue
                piece.append(record)
                size += len(record)
                if size >= _PIECE_BYTES:
                    self._write_records(piece, size)
                    piece, size = [], 0
            self._write_records(piece, size)
            if ending:
                break
        self._close()

    def _write_records(self, piece: list[bytes], size: int) -> None:
        if not piece:
            return
        self._write(b"".join(piece))
        with self.changed:
            self.pending -= size
            self.written += len(piece)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # an unbuffered file may write only a part
            taken = self._file.write(left)
            if not taken:  # None: the file is non-blocking
                raise BlockingIOError(errno.EAGAIN, "the file is non-blocking; open a blocking one")
            left = left[taken:]
        if self._path is None and hasattr(self._file, "flush"):
            self._file.flush()
        self._good += len(data)

    def _rotate(self) -> None:
        assert self._path is not None
        self._close()
        path, stem, suffix = self._path, self._path.stem, self._path.suffix
        # Rename only the files that exist, up to the first gap: max_files may be very large.
        names = [path]
        while len(names) < self._max_files:
            names.append(path.with_name(f"{stem}.{len(names)}{suffix}"))
            if not os.path.lexists(names[-1]):
                break
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)
        self._file = open_file(path)
        self._good = 0
        self._write(self._header)

    def _close(self) -> None:
        if self._path is not None:
            self._file.close()

    def _fail(self, error: BaseException) -> None:
        """Keep the complete part of the file, and count the packets that will not be in it."""
        if self._path is not None and not self._file.closed:
            with contextlib.suppress(OSError):  # pipes and devices can't be truncated
                self._file.truncate(self._good)
            with contextlib.suppress(OSError):
                self._file.close()
        with self.changed:
            self.ending = True
            # The records that wait, and those that the thread has taken and could not write.
            self.dropped += self.accepted - self.written
            self.records, self.pending = [], 0
            why = str(error) or type(error).__name__
            code = errno.EIO
            if isinstance(error, OSError) and error.errno is not None:
                why, code = os.strerror(error.errno), error.errno
            text = (
                f"writing packets failed: {why}; the file ends with the last complete packet. Free "
                "some space, or write to another file"
            )
            self.error = OSError(code, text, self.name)
            self.error.__cause__ = error


_running: set[Sink] = set()


def _disown() -> None:
    """Close all sinks in a forked child: it has no threads, and the parent writes the packets."""
    for sink in _running:
        sink.changed = threading.Condition()  # the parent's thread may have held the lock
        sink.closed = sink.ending = True
    _running.clear()


os.register_at_fork(after_in_child=_disown)


@atexit.register
def _finish() -> None:
    """At exit, write the packets of writers that were not closed."""
    error: OSError | None = None
    for sink in list(_running):
        sink.end(closing=True)
        sink.thread.join()
        error = error or sink.error
    if error is not None:
        raise error  # the interpreter prints it and continues to exit

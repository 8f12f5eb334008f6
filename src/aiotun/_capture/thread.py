"""The thread that writes a capture file, and what is at stake when the program ends.

`capture` puts packed records in, and the thread takes them out; neither waits for the other.
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

# How much is written at once. The thread joins that many bytes while it holds the interpreter's
# lock, for which the event loop waits.
_PIECE_BYTES = 256 * 1024


def open_file(path: Path) -> io.FileIO:
    # Unbuffered: nothing is left in a buffer to be written again after an error.
    return open(path, "wb", buffering=0)


class Sink:
    """What a writer and its thread share.

    Apart from the writer, which can be collected, and say that it was not closed, while the thread
    is at work. The thread is a daemon: any other would keep the interpreter from ending for as long
    as a writer is open. So that nothing is lost at the end, `_finish` is called there.
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
        self.changed = threading.Condition()  # reentrant: __del__ may come anywhere
        # All that follows changes under that lock.
        self.records: list[bytes | None] = []  # None: go on in a new file
        self.pending = 0  # bytes in records, and in what the thread has taken of them
        self.accepted = self.written = self.dropped = 0
        self.ending = self.closed = False
        self.error: OSError | None = None
        self.name = str(path) if path is not None else getattr(file, "name", "file")
        self._then: list[Callable[[], object]] = []
        self._done = False
        # The thread's own.
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
        """Have the thread write what is left and end; call `then`, in that thread, when it has."""
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
        """Raise what ended the writing, once."""
        if self.error is not None and self in _running:
            _running.discard(self)
            raise self.error

    def _run(self) -> None:
        try:
            try:
                self._write_all()
            except BaseException as error:  # noqa: BLE001 - a file of the user's may raise anything
                self._fail(error)
        finally:  # whatever happened: somebody may wait for the end
            if self.error is None:  # else it is told first, at the interpreter's end if need be
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
        while left:  # an unbuffered file may take less than all
            taken = self._file.write(left)
            if not taken:  # None: a file that does not block
                raise BlockingIOError(errno.EAGAIN, "the file takes nothing now, and has to block")
            left = left[taken:]
        if self._path is None and hasattr(self._file, "flush"):
            self._file.flush()
        self._good += len(data)

    def _rotate(self) -> None:
        assert self._path is not None
        self._close()
        path, stem, suffix = self._path, self._path.stem, self._path.suffix
        # Only those that exist are moved, up to the first gap: max_files may be any number.
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
        """Keep what is whole of the file, and count what will never be in it."""
        if self._path is not None and not self._file.closed:
            with contextlib.suppress(OSError):  # a pipe can't be cut, nor a device
                self._file.truncate(self._good)
            with contextlib.suppress(OSError):
                self._file.close()
        with self.changed:
            self.ending = True
            # What waits, and what the thread has taken and could not write.
            self.dropped += self.accepted - self.written
            self.records, self.pending = [], 0
            why = str(error) or type(error).__name__
            code = errno.EIO
            if isinstance(error, OSError) and error.errno is not None:
                why, code = os.strerror(error.errno), error.errno
            text = f"writing packets failed: {why}; they end there. Make room, or write elsewhere"
            self.error = OSError(code, text, self.name)
            self.error.__cause__ = error


_running: set[Sink] = set()


def _disown() -> None:
    """In a child that was forked: it has no such thread, and the packets are its parent's."""
    for sink in _running:
        sink.changed = threading.Condition()  # the thread may have held it just then
        sink.closed = sink.ending = True
    _running.clear()


os.register_at_fork(after_in_child=_disown)


@atexit.register
def _finish() -> None:
    """At the interpreter's end: write what writers still have that nobody closed."""
    error: OSError | None = None
    for sink in list(_running):
        sink.end(closing=True)
        sink.thread.join()
        error = error or sink.error
    if error is not None:
        raise error  # the interpreter prints it, and goes on

"""The port of a datagram socket: runs of datagrams towards the kernel, datagrams to the user.

With UDP_SEGMENT the kernel takes a run of datagrams to one address in one call, and with UDP_GRO it
hands over a run in one. No method here waits: they raise BlockingIOError instead.

If the user takes only a part of a run, the port keeps the rest, and returns it before it reads
again. `pending` tells the socket that there is a rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from .._kernel.udp import (
    CONTROL_BYTES,
    INT,
    LARGEST_DATAGRAM,
    LARGEST_RUN_BYTES,
    LARGEST_RUN_DATAGRAMS,
    MEMINFO,
    MEMINFO_DROPS,
    SO_MEMINFO,
    UDP_GRO,
    UDP_SEGMENT,
    UINT16,
)
from .._packets import native
from .._packets.runs import Run
from .._queue.port import TUN_ENDS
from ..errors import PacketError, PacketTruncatedError
from .addresses import Address, packed
from .counts import Counts
from .cutting import cut
from .icmp import read_errors

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DatagramPort"]

T = TypeVar("T")

# What recvmsg returns: the data or its length, control messages, flags and source.
Received: TypeAlias = tuple[T, list[tuple[int, int, bytes]], int, Address]

Datagrams = tuple[list[bytes], Address]

_send_run = native.send_run

_READ_BYTES = 65_535  # the longest datagram or run
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)  # its own operators would cost microseconds

# With these errnos a run fails although each of its datagrams could be sent: it does not fit the
# path's MTU (EINVAL, EMSGSIZE), or the outgoing interface can't compute checksums (EIO).
_NOT_AT_ONCE = frozenset({errno.EINVAL, errno.EMSGSIZE, errno.EIO})
# How long a destination gets no runs. After that they may work again: its route may have changed,
# or its path's MTU.
_FALLBACK_SECONDS = 60.0
_MOST_FALLBACKS = 1024
_MOST_FAILED = 256

# A system call that finds no datagram costs as much as one that finds one. So `read_many` reads on
# only if the last call found more than one, and on every sixteenth call to see if there is more.
_RETRY = 16


class _Borrowed(socket.socket):
    """A socket object that does not own its fd, and closes nothing when it is collected."""

    def __del__(self) -> None:
        self.detach()


class DatagramPort:
    """Reads and writes one UDP socket.

    Unlike other ports' methods, these take no fd: receiving control messages needs a socket object.
    `drop_rest` makes that object forget the fd.

    Attributes:
        ends: see `_queue.fdowner.Keeper`.
        pending: how many datagrams the port keeps; 1 if it keeps an error.
        counts: what it has counted.
        drained: the last call of `read_many` found the socket empty.
        failed: for each destination that an ICMP error came for, its errno, until the error was
            raised or a datagram has come from there.
    """

    __slots__ = (
        "_control",
        "_error",
        "_fallbacks",
        "_full_tails",
        "_largest",
        "_more",
        "_queues_errors",
        "_reads",
        "_rest",
        "_sock",
        "_source",
        "counts",
        "drained",
        "ends",
        "failed",
        "pending",
    )

    def __init__(self, fd: int, *, segment: bool, full_tails: bool, queues_errors: bool) -> None:
        """Make a port. The caller still owns the fd.

        Args:
            segment: whether runs may be sent.
            full_tails: see `cutting.cut`.
            queues_errors: see `icmp.report_errors`.
        """
        native.keep_freed_memory()
        self._sock = _Borrowed(fileno=fd)
        self._sock.setblocking(False)
        self._largest = LARGEST_DATAGRAM if segment else 0
        self._full_tails = full_tails
        self._queues_errors = queues_errors
        self._control: tuple[int, list[tuple[int, int, bytes]]] = (0, [])
        # By destination: the largest datagram that may go in a run, and until when.
        self._fallbacks: dict[Address | None, tuple[int, float]] = {}
        self._rest: list[bytes] = []  # the next datagram is the last one here
        self._source: Address = ("", 0)  # of the rest
        self._error: OSError | None = None  # comes after the rest
        self._more = False
        self._reads = 0
        self.ends: frozenset[int] = TUN_ENDS
        self.pending: int = 0
        self.counts: Counts = Counts()
        self.drained: bool = False
        self.failed: dict[Address | None, int] = {}

    # Receiving

    def read(self) -> tuple[bytes, Address]:
        """Take one datagram."""
        if not self.pending:
            datagrams, source = self._receive()
            if len(datagrams) == 1:
                return datagrams[0], source
            self._keep(datagrams, source)
        return self._take(1)[0][0], self._source

    def read_many(self, limit: int) -> Datagrams:
        """Take between 1 and `limit` datagrams from one address; raise if there is none."""
        self.drained = False
        batch, source = self._take(limit) if self.pending else self._receive()
        if len(batch) > limit:
            self._keep(batch[limit:], source)
            del batch[limit:]
        self._reads += 1
        if self.pending or not (self._more or self._reads % _RETRY == 0):
            return batch, source
        self._more = False
        largest = len(batch)
        # Stop if another run as long as the longest so far would not fit.
        while len(batch) + largest <= limit:
            try:
                datagrams, whence = self._receive()
            except BlockingIOError:
                self.drained = True
                break
            except OSError as error:
                self._error = error  # raised by the next call, after the datagrams we have
                self.pending = 1
                break
            self._more = True
            if whence != source or len(batch) + len(datagrams) > limit:
                self._keep(datagrams, whence)
                break
            batch += datagrams
            largest = max(largest, len(datagrams))
        return batch, source

    def _take(self, limit: int) -> Datagrams:
        """Take datagrams from the rest; raise the error that came after them if none are left."""
        batch = self._rest[: -limit - 1 : -1]
        if not batch:
            error, self._error = self._error, None
            self.pending = 0
            assert error is not None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        del self._rest[-len(batch) :]
        self.pending -= len(batch)
        return batch, self._source

    def _keep(self, datagrams: list[bytes], source: Address) -> None:
        datagrams.reverse()
        self._rest, self._source = datagrams, source
        self.pending = len(datagrams)

    def _receive(self) -> Datagrams:
        """Receive one datagram, or a run of them."""
        data, ancillary, flags, source = self._noting(
            self._sock.recvmsg, _READ_BYTES, CONTROL_BYTES
        )
        size, count = self._measure(len(data), ancillary, flags)
        if count == 1:
            return [data], source
        return [data[at : at + size] for at in range(0, len(data), size)], source

    def read_run(self, buffer: memoryview) -> tuple[int, int, int, Address]:
        """Receive a run into a buffer of 64 KiB; return its count, size, last and source."""
        if self.pending:
            return self._run_of_rest(buffer)
        length, ancillary, flags, source = self._noting(
            self._sock.recvmsg_into, (buffer[:_READ_BYTES],), CONTROL_BYTES
        )
        size, count = self._measure(length, ancillary, flags)
        return count, size, length - (count - 1) * size, source

    def _run_of_rest(self, buffer: memoryview) -> tuple[int, int, int, Address]:
        """Copy datagrams of the rest into a buffer, as many as can form one run."""
        batch, source = self._take(self.pending)
        size, end, count = len(batch[0]), 0, 0
        for datagram in batch:
            whole = end == count * size
            if not whole or len(datagram) > size or end + len(datagram) > buffer.nbytes:
                break
            buffer[end : end + len(datagram)] = datagram
            end += len(datagram)
            count += 1
        if count < len(batch):
            self._keep(batch[count:], source)
        return count, size, end - (count - 1) * size, source

    def _measure(
        self, length: int, ancillary: list[tuple[int, int, bytes]], flags: int
    ) -> tuple[int, int]:
        """Count what was received; return the size of each datagram but the last, and how many."""
        counts = self.counts
        if flags & _CUT:
            # The size of a run's datagrams is in a control message. If those were cut, the run
            # can't be split.
            counts.truncated += 1
            raise PacketTruncatedError(
                errno.EMSGSIZE,
                "a datagram or a run of datagrams could not be received whole, and was dropped; "
                "switch off what else this socket reports (timestamps, for example)",
                None,
            )
        for level, kind, value in ancillary:
            if kind == UDP_GRO and level == socket.IPPROTO_UDP:
                (size,) = INT.unpack(value)
                if 0 < size < length:
                    count = -(-length // size)
                    counts.runs_received += 1
                    counts.datagrams_received += count
                    return size, count
        counts.datagrams_received += 1
        return length, 1

    def _noting(self, receive: Callable[..., Received[T]], *args: Any) -> Received[T]:
        """Receive, and note the ICMP errors that are raised instead."""
        for _ in range(3):
            try:
                received = receive(*args)
            except BlockingIOError:
                raise
            except OSError as error:
                # The next system call on the socket returns a pending ICMP error, whatever
                # destination the error is about. There may still be a datagram to receive, so note
                # the error and try again.
                if not self._note_errors() or error.errno in self.ends:
                    raise
            else:
                if self.failed:
                    self.failed.pop(received[3], None)  # the other end is back
                return received
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    # ICMP errors

    def _note_errors(self) -> bool:
        """Note for which destinations ICMP errors came; return whether the kernel queues them."""
        if not self._queues_errors:
            return False
        for destination, code in read_errors(self._sock):
            self.counts.refused[code] += 1
            if len(self.failed) >= _MOST_FAILED:
                del self.failed[next(iter(self.failed))]
            self.failed[destination] = code
        return True

    # Sending

    def write(self, datagram: Buffer, address: Address | None) -> None:
        """Send one datagram. None as the address means the address the socket is connected to."""
        length = len(datagram) if type(datagram) is bytes else memoryview(datagram).nbytes
        if length > LARGEST_DATAGRAM:
            raise PacketError(
                errno.EMSGSIZE,
                f"a datagram of {length} bytes is too long; UDP takes {LARGEST_DATAGRAM} at most",
                None,
            )
        self._sendmsg((datagram,), (), address, 1)

    def write_many(self, datagrams: list[Buffer], address: Address | None) -> int:
        """Send as many datagrams as possible without waiting, in order; return how many.

        Raises nothing. The caller sends the first of the rest by itself, which raises the error.
        """
        done = self._write_at_once(datagrams, address)
        if done or not datagrams:
            return done
        sizes = _sizes(datagrams)
        with contextlib.suppress(OSError, BufferError):
            while done < len(sizes):
                largest = self._largest_to(address)
                for start, end in cut(sizes[done:] if done else sizes, largest, self._full_tails):
                    count = end - start
                    run = datagrams
                    if count < len(datagrams):
                        run = datagrams[done : done + count]
                    went = self._write_run(run, sizes[done], address)
                    done += went
                    if went < count:
                        break  # the path does not take this run: cut again, into shorter ones
        return done

    def _write_at_once(self, datagrams: list[Buffer], address: Address | None) -> int:
        """Send all datagrams as one run if possible; return how many were sent: all or 0."""
        largest = self._largest_to(address)
        if not (largest and self._full_tails):
            return 0
        where = None if address is None else packed(address)
        try:
            count = _send_run(self._sock.fileno(), datagrams, where, largest)
        except BlockingIOError:
            return 0
        except OSError:
            self._note_errors()
            return 0  # the caller sends again, and gets the error then
        if count:
            self.counts.datagrams_sent += count
            self.counts.runs_sent += 1
        return count

    def write_run(self, run: Run, address: Address | None) -> int:
        """Send as many datagrams of a run as possible without waiting, as `write_many`.

        If there is no room between the datagrams, the kernel gets them as one piece.
        """
        count, size, last = run.count, run.size, run.last
        length = (count - 1) * size + last
        is_one = count == 1 and last <= LARGEST_DATAGRAM
        if is_one or (
            1 < count <= LARGEST_RUN_DATAGRAMS
            and run.stride == size <= self._largest_to(address)
            and length <= LARGEST_RUN_BYTES
            and 0 < last < size + self._full_tails
        ):
            piece = run.buffer[run.start : run.start + length]
            control = () if is_one else self._segmented(size)
            try:
                self._sendmsg((piece,), control, address, count)
            except OSError:
                pass  # `write_many` handles the error
            else:
                return count
        return self.write_many([*run.views()], address)

    def _segmented(self, size: int) -> list[tuple[int, int, bytes]]:
        if self._control[0] != size:
            self._control = size, [(socket.IPPROTO_UDP, UDP_SEGMENT, UINT16.pack(size))]
        return self._control[1]

    def _write_run(self, run: Sequence[Buffer], size: int, address: Address | None) -> int:
        """Send a run, or only its first datagram if the run is refused; return how many."""
        if len(run) == 1:
            self.write(run[0], address)
            return 1
        try:
            self._sendmsg(run, self._segmented(size), address, len(run))
        except OSError as error:
            if error.errno not in _NOT_AT_ONCE:
                raise
            self.write(run[0], address)  # if this fails, too, the run was not the cause
            self._fall_back(address, 0 if error.errno == errno.EIO else size - 1)
            return 1
        return len(run)

    def _sendmsg(
        self,
        datagrams: Sequence[Buffer],
        control: Sequence[tuple[int, int, bytes]],
        address: Address | None,
        count: int,
    ) -> None:
        counts = self.counts
        try:
            try:
                self._sock.sendmsg(datagrams, control, 0, address)
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno in self.ends or not self._note_errors() or address in self.failed:
                    raise
                # The error may have been an ICMP error about another destination: try again.
                self._sock.sendmsg(datagrams, control, 0, address)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # The outgoing interface's queue was full and dropped the datagram. We can't wait: poll
            # does not report when that queue has room.
            counts.refused[errno.ENOBUFS] += count
            return
        counts.datagrams_sent += count
        if control:
            counts.runs_sent += 1

    def _largest_to(self, address: Address | None) -> int:
        """The size of the largest datagram that may be in a run to an address; 0 for no runs."""
        if self._fallbacks and (fallback := self._fallbacks.get(address)) is not None:
            largest, until = fallback
            if time.monotonic() < until:
                return min(largest, self._largest)
            del self._fallbacks[address]
        return self._largest

    def _fall_back(self, address: Address | None, largest: int) -> None:
        self.counts.fallbacks += 1
        if len(self._fallbacks) >= _MOST_FALLBACKS:
            del self._fallbacks[next(iter(self._fallbacks))]
        self._fallbacks[address] = largest, time.monotonic() + _FALLBACK_SECONDS

    # The socket

    @property
    def address(self) -> Address:
        """The address that the socket is bound to."""
        name: Address = self._sock.getsockname()
        return name

    def buffer_bytes(self, option: int) -> int:
        """Return the granted size for SO_RCVBUF or SO_SNDBUF, in the unit in which it is set.

        The kernel doubles the size that is set, to have room for its bookkeeping.
        """
        return self._sock.getsockopt(socket.SOL_SOCKET, option) // 2

    def count_overflowed(self) -> None:
        with contextlib.suppress(OSError):  # Linux before 4.12, or the socket was given up
            data = self._sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size)
            self.counts.overflowed = MEMINFO.unpack(data)[MEMINFO_DROPS]

    def drop_rest(self) -> None:
        """Drop and count the rest, and forget the fd, which is about to be closed or given away."""
        self.count_overflowed()
        self._sock.detach()
        self.counts.dropped += len(self._rest)
        self._rest = []
        self._error = None
        self.pending = 0


def _sizes(datagrams: list[Buffer]) -> list[int]:
    """The sizes of datagrams in bytes, up to the first that is not bytes-like."""
    if set(map(type, datagrams)) == {bytes}:
        return list(map(len, datagrams))  # type: ignore[arg-type]  # they are bytes
    sizes: list[int] = []
    for datagram in datagrams:
        try:
            with memoryview(datagram) as view:
                sizes.append(view.nbytes)
        except (TypeError, BufferError):
            break
    return sizes

"""What a queue is before any packet passes: an fd that belongs to an event loop, until it ends.

Here is who may use the fd (`_bind`), whether the loop watches it, what the kernel's errors mean,
and how it ends: closed by us, detached, lost, or collected. `queue.py` has the packets.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import errno
import os
import select
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from . import _abi, _threads
from ._interface import Interface
from ._packetio import Mode, Offload, PacketIO, PacketStats
from ._waiting import Line, LossWatch, Registration
from .errors import (
    DeviceClosedError,
    DeviceLostError,
    DeviceMismatchError,
    LinkDownError,
    PacketError,
    PacketTruncatedError,
)

if TYPE_CHECKING:
    from ._several import QueueGroup
    from .capture import PcapWriter

__all__ = ["BUDGET", "QueueBase", "close_queues"]

# How many packets may be read before the loop gets a turn. At one microsecond a packet, and a few
# more for what the user does with it, the loop turns once a millisecond.
BUDGET = 256

# What read and write of an fd that is no TUN device (Queue.from_fd) say when its peer is gone.
_PEER_GONE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE})


class QueueBase(PacketIO):
    """An fd, the loop it belongs to, and its end."""

    __slots__ = (
        "__weakref__",
        "_budget",
        "_burst",
        "_closing",
        "_disabled",
        "_drained",
        "_end",
        "_fd",
        "_free",
        "_full",
        "_group",
        "_header",
        "_interface",
        "_line",
        "_looking",
        "_loop",
        "_loss_watch",
        "_lost",
        "_offload",
        "_poll",
        "_reading",
        "_recorders",
        "_refused",
        "_registration",
        "_resuming",
        "_senders",
        "_truncated",
        "_type",
        "_undecodable",
        "_wakeups",
        "_writing",
    )

    def __init__(
        self,
        fd: int,
        interface: Interface,
        mode: Mode,
        *,
        offload: Offload = "off",
        packet_info: bool = False,
        shared: Line | None = None,
    ) -> None:
        # Internal: fd is attached, non-blocking and close-on-exec, and belongs to this object now.
        # Who waits in the `shared` line waits for this queue among others.
        self._fd = fd
        self._interface = interface
        self._type: Mode = mode
        self._offload: Offload = offload
        self._header = _abi.PI_SIZE if packet_info else 0
        if offload == "raw":
            self._header += _abi.VNET_HDR_SIZE
        self._loop: asyncio.AbstractEventLoop | None = None
        self._line = Line()
        self._senders = Line()
        lines = [self._line, self._senders] + ([] if shared is None else [shared])
        self._registration = Registration(self, *lines)
        self._group: weakref.ref[QueueGroup] | None = None
        self._reading = self._writing = False
        self._budget = BUDGET  # packets that may still be read before the loop gets a turn
        self._free = 0  # of these, what the task being resumed right now may read unasked
        self._resuming = False  # the loop is calling us, and a task runs inside that call
        self._wakeups = 0  # how often the loop called while one task waited
        self._burst = True  # several packets were there at once, the last time
        self._looking = False  # looking for the next packet paid, the last time
        self._poll: select.poll | None = None
        self._drained = False  # the fd was seen empty since the loop last called us
        self._full = False  # the kernel's buffer was seen full since the loop last called us
        self._loss_watch: LossWatch | None = None
        self._disabled = False
        self._lost: DeviceLostError | None = None
        self._end = ""  # why the fd was given up, once it was
        self._closing: asyncio.Future[None] | None = None
        # The captures under way, for `RecordingQueue`, which has no place of its own for them.
        self._recorders: tuple[list[PcapWriter], ...] = ()
        self._truncated = self._refused = self._undecodable = 0

    # The event loop

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Check that this queue is of the running loop, and usable."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError(
                    f"{self!r} belongs to another event loop, the one that first awaited it; "
                    "open the device in the loop that uses it"
                )
            self._loop = loop
        if self._fd < 0 or self._lost is not None:
            self._check_open()
        return loop

    def _start_reading(self) -> None:
        if not self._reading and self._loop is not None:
            self._loop.add_reader(self._fd, self._registration.readable)
            self._reading = True

    def _stop_reading(self) -> None:
        if self._reading and self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._reading = False

    def _start_writing(self) -> None:
        if not self._writing and self._loop is not None:
            self._loss_watch = LossWatch(self._loop, self._fd, self._registration.in_error)
            self._loop.add_writer(self._fd, self._registration.writable)
            self._writing = True

    def _stop_writing(self) -> None:
        if self._writing and self._loop is not None:
            self._loop.remove_writer(self._fd)
            self._writing = False
        if self._loss_watch is not None:
            self._loss_watch.close()
            self._loss_watch = None

    def _in_error(self) -> None:
        """The loop found the fd in error: the interface is gone."""
        self._lose(OSError(errno.EBADFD, os.strerror(errno.EBADFD)))

    @abc.abstractmethod
    def _readable(self) -> None:
        """The loop found the fd readable, or in error."""

    @abc.abstractmethod
    def _writable(self) -> None:
        """The loop found the fd writable, or in error."""

    # For the group of a device's queues

    def join(self, group: QueueGroup) -> None:
        """Become one of several: tasks may wait for a packet of any."""
        self._group = weakref.ref(group)

    def _peers(self) -> QueueGroup | None:
        return self._group() if self._group is not None else None

    def watch(self) -> asyncio.AbstractEventLoop:
        """Have the running loop watch for packets."""
        loop = self._bind()
        self._start_reading()
        return loop

    def nudge(self) -> None:
        """Have the loop call soon where packets wait here, not in the kernel; else do nothing."""

    @property
    def wanted(self) -> bool:
        """Whether tasks wait for a packet of this queue in particular."""
        return bool(self._line)

    # Closing

    def close(self) -> None:
        close_queues([self])

    async def aclose(self) -> None:
        close_queues([self])
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def detach(self) -> int:
        """Give the fd up, open and unregistered, for another process or `Queue.from_fd`.

        It stays non-blocking and close-on-exec. Whoever waits is woken with `DeviceClosedError`;
        this queue is closed.

        Returns:
            The fd, which is the caller's to close.

        Raises:
            DeviceClosedError: it was closed or detached before.
        """
        self._check_open(lost_too=False)
        return self._release("was detached; go on with its fd, or open the device again")

    def _release(self, end: str) -> int:
        """Take the fd out of the loop, wake everybody, and give it away: the order matters.

        From here on `_fd` is -1, so that the number can't be used by mistake once it is another's.
        """
        loop = self._loop
        if loop is not None and not loop.is_closed():
            self._stop_reading()
            self._stop_writing()
            self._line.dismiss()
            self._senders.dismiss()
        fd, self._fd = self._fd, -1
        self._end = end
        self._free = 0
        self._resuming = False
        if (group := self._peers()) is not None:
            group.leave(self)
        return fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def fileno(self) -> int:
        return self._fd

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) < 0:
            return
        # Closed before the warning, which may be made an error and end this.
        shown = repr(self)
        loop, fd = self._loop, self._fd
        if loop is None or loop.is_closed():
            self._fd = -1
            os.close(fd)
        elif loop is _running() or not loop.is_running():
            os.close(self._release("was not closed"))
        else:
            # Collected in another thread: only the loop's own may take the fd out of it.
            self._fd = -1
            loop.call_soon_threadsafe(_close_collected, loop, fd, self._loss_watch)
        warnings.warn(
            f"unclosed {shown}; call aclose()", ResourceWarning, source=self, stacklevel=1
        )

    def __reduce__(self) -> tuple[Callable[..., QueueBase], tuple[Any, ...]]:
        """A duplicate of this queue, on its way to another process.

        multiprocessing sends queues: as arguments of a Process (spawn or forkserver), or over its
        Connections and Queues. This one stays open; close it where only the other shall be used.

        Raises:
            TypeError: pickled in any other way, or copied.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        from ._sending import reduce_queue

        return reduce_queue(self)

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd={self._fd}"
        return f"<Queue of {self._interface.name} {state}>"

    # State

    @property
    def name(self) -> str:
        """The interface's present name."""
        return self._interface.name

    @property
    def offload(self) -> Offload:
        """What packets look like here: ``"raw"`` ones have a virtio-net header."""
        return self._offload

    @property
    def stats(self) -> PacketStats:
        return PacketStats(
            truncated=self._truncated, refused=self._refused, undecodable=self._undecodable
        )

    @property
    def _mode(self) -> Mode:
        return self._type

    @property
    def _header_bytes(self) -> int:
        return self._header

    @property
    def _packet_info(self) -> bool:
        return self._offload == "off" and self._header > 0

    def _count_undecodable(self) -> None:
        self._undecodable += 1

    # Errors

    def _check_open(self, *, lost_too: bool = True) -> None:
        if self._fd < 0:
            raise self._closed_error()
        if lost_too and self._lost is not None:
            raise self._lose(self._lost)

    def _closed_error(self) -> DeviceClosedError:
        return DeviceClosedError(f"this queue of {self._interface.name} {self._end}")

    def _lose(self, error: OSError) -> DeviceLostError:
        """Take a queue whose interface is gone out of the loop, once, and say so to all who wait.

        The kernel reports an error on such an fd for ever: a loop that watched it would spin.
        """
        lost = DeviceLostError(
            error.errno,
            f"{self._interface.name} is gone: somebody deleted it, or its namespace ended; "
            "close this device, and open it again where it shall live on",
            self._interface.name,
        )
        if self._lost is None:
            self._lost = lost
            self._resuming = False
            self._stop_reading()
            self._stop_writing()
            self._line.dismiss()
            self._senders.dismiss()
            if (group := self._peers()) is not None:
                group.lose(self)
        return lost

    def _read_error(self, error: OSError) -> Exception:
        if self._fd < 0:
            return self._closed_error()
        if error.errno in (errno.EBADFD, errno.EBADF) or error.errno in _PEER_GONE:
            return self._lose(error)
        text = f"reading a packet failed: {error.strerror}"
        return OSError(error.errno, text, self._interface.name)

    def _truncation(self, length: int, room: int) -> PacketTruncatedError:
        self._truncated += 1
        return PacketTruncatedError(
            errno.EMSGSIZE,
            f"a packet of {length} bytes came into a buffer of {room}, and its end is lost; give "
            "recv_into a larger buffer, or use recv",
            self._interface.name,
        )

    def _write_error(self, error: OSError) -> Exception:
        code, name = error.errno, self._interface.name
        if self._fd < 0:
            return self._closed_error()
        if code in (errno.EBADFD, errno.EBADF) or code in _PEER_GONE:
            return self._lose(error)
        if code == errno.EIO:
            text = "the link is down and the packet was not sent; bring it up: 'await link.up()'"
            return LinkDownError(code, text, name)
        if code == errno.EBUSY:  # with IFF_NAPI; without it a disabled queue still sends
            text = "this queue is disabled and the packet was not sent; enable() it first"
            return DeviceMismatchError(code, text, name)
        self._refused += 1
        return PacketError(code, f"the kernel refused the packet: {_refusal(self, code)}", name)


def _refusal(queue: QueueBase, code: int | None) -> str:
    if code != errno.EINVAL:
        return f"{os.strerror(code or 0)}; send a shorter one"
    if queue._header:
        return "look at its header, which this device was opened with, and what follows"
    if queue._mode == "tap":
        return "a frame begins with a 14-byte Ethernet header"
    return "it is empty, or its first four bits say neither IPv4 nor IPv6"


def close_queues(queues: Sequence[QueueBase]) -> None:
    """Close what is still open of these, all in one thread where a loop is running.

    Each queue's `_closing` is a future of that loop then, done when the kernel is done.
    """
    queues = [queue for queue in queues if not queue.closed]
    fds = [queue._release("was closed here; open the device again to go on") for queue in queues]
    loop = _running()
    if not fds:
        return
    if loop is None:
        _close_fds(fds)
        return
    over = loop.create_future()
    for queue in queues:
        queue._closing = over

    def finish() -> None:
        if not over.done():
            over.set_result(None)

    def then() -> None:
        # RuntimeError: the loop was closed meanwhile, and nobody waits in it any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(finish)

    _threads.start(lambda: _close_fds(fds), then)


def _close_fds(fds: Iterable[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:  # somebody else closed it: then there is nothing to do
                raise


def _close_collected(
    loop: asyncio.AbstractEventLoop, fd: int, loss_watch: LossWatch | None
) -> None:
    loop.remove_reader(fd)
    loop.remove_writer(fd)
    if loss_watch is not None:
        loss_watch.close()
    os.close(fd)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

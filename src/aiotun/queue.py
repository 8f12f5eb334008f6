"""A queue: one file descriptor on one event loop. The hot path is here and nowhere else.

A packet comes in through `_take` (or straight in `recv`, which is the same in one frame less) and
goes out through `_write`. Everything else decides who may do that, and when:

- `_receive` reads at once where nobody waits before the caller, else it waits in `_line`.
- `_readable`, called by the loop, resumes the tasks in line. While the one it resumed is the only
  one that wants packets, it has so many `_free`: to be read with no question asked.
- A send that finds the kernel's buffer full waits in `_senders` for `_writable`.

The reader stays registered with the loop between packets, and is taken off only when the fd is
readable and nobody waits: registering costs more than a wake-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Self, TypeVar

from . import _abi, _ioctl, _threads
from ._abi import READ_SIZE, Iff
from ._interface import Interface
from ._packetio import Mode, Offload, PacketIO, PacketStats, read_into
from ._waiting import Line, Registration, Waiter
from .errors import (
    AiotunError,
    DeviceClosedError,
    DeviceLostError,
    DeviceMismatchError,
    LinkDownError,
    PacketError,
    PacketTruncatedError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ._several import QueueGroup

__all__ = ["BUDGET", "Queue", "check_offload", "close_queues", "mode_of"]

T = TypeVar("T")

# How many packets may be read before the loop gets a turn. At one microsecond a packet, and a few
# more for what the user does with it, the loop turns several times a millisecond.
BUDGET = 128

# What read and write of an fd that is no TUN device (Queue.from_fd) say when its peer is gone.
_PEER_GONE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE})

# Bound here: a global look-up is cheaper than an attribute of a module.
_read = os.read
_write = os.write


class Queue(PacketIO):
    """One open file descriptor on an interface; `device.queues` has them.

    A queue and its device may be used at the same time. The kernel spreads flows over the queues,
    and sends a flow's packets to the queue that last sent one of that flow.
    """

    __slots__ = (
        "__weakref__",
        "_budget",
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
        "_loop",
        "_lost",
        "_offload",
        "_reading",
        "_refused",
        "_registration",
        "_senders",
        "_truncated",
        "_type",
        "_undecodable",
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
        keep: set[Waiter] | None = None,
    ) -> None:
        # Internal: fd is attached, non-blocking and close-on-exec, and belongs to this object now.
        self._fd = fd
        self._interface = interface
        self._type: Mode = mode
        self._offload: Offload = offload
        self._header = _abi.PI_SIZE if packet_info else 0
        if offload == "raw":
            self._header += _abi.VNET_HDR_SIZE
        self._loop: asyncio.AbstractEventLoop | None = None
        self._registration = Registration(self, set() if keep is None else keep)
        self._line = Line(self._registration.keep)
        self._senders = Line(self._registration.keep)
        self._group: weakref.ref[QueueGroup] | None = None
        self._reading = self._writing = False
        self._budget = BUDGET  # packets that may still be read before the loop gets a turn
        self._free = 0  # of these, what the task being resumed right now may read unasked
        self._drained = False  # the fd was seen empty since the loop last called us
        self._full = False  # the kernel's buffer was seen full since the loop last called us
        self._disabled = False
        self._lost: DeviceLostError | None = None
        self._end = ""  # why the fd was given up, once it was
        self._closing: asyncio.Future[None] | None = None
        self._truncated = self._refused = self._undecodable = 0

    @classmethod
    def from_fd(cls, fd: int, offload: Offload = "off") -> Self:
        """Make a queue of an fd that another process opened, or of any that keeps boundaries.

        The fd becomes the queue's, non-blocking and close-on-exec; where this raises it is still
        the caller's.

        Args:
            fd: a TUN or TAP queue (inherited, or received by SCM_RIGHTS), or a datagram or
                seqpacket socket.
            offload: ``"raw"`` where each packet has a virtio-net header.

        Raises:
            ValueError: not a number of an open fd, or no such `offload`.
            NotImplementedError: ``"split"`` is not built yet.
        """
        check_offload(offload)
        try:
            os.fstat(fd)
        except OSError as error:
            raise ValueError(f"{fd} is not an open file descriptor") from error
        name, flags = f"fd {fd}", Iff.TUN
        try:
            name, flags = _ioctl.get_flags(fd)
        except AiotunError:
            raise
        except OSError:
            pass  # no TUN device, and that is allowed here
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        return cls(fd, Interface(name), mode_of(flags), offload=offload)

    # Receiving

    async def recv(self) -> bytes:
        free = self._free
        if free:
            self._free = free - 1
            try:
                return _read(self._fd, READ_SIZE)
            except OSError as error:
                self._refuse(error)
        return await self._receive(self._take)

    async def __anext__(self) -> bytes:
        # As recv; calling it would cost every packet one coroutine more.
        free = self._free
        if free:
            self._free = free - 1
            try:
                return _read(self._fd, READ_SIZE)
            except OSError as error:
                self._refuse(error)
        try:
            return await self._receive(self._take)
        except DeviceClosedError:
            raise StopAsyncIteration from None

    def recv_nowait(self) -> bytes:
        self._check_open()
        if self._somebody_waits():
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting for the next packet")
        try:
            return self._take()
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._read_error(error) from error

    async def _receive(self, take: Callable[[], T]) -> T:
        loop = self._bind()
        front = False
        wait = self._drained or self._budget + self._free <= 0 or self._somebody_waits()
        while True:
            if wait:
                self._budget = self._free = 0
                self._start_reading()
                await Waiter(loop, self._line, front=front)
                # No await from here on: what is read is returned.
                self._check_open()
                front = True  # in vain only where somebody else was quicker, another process say
            try:
                return take()
            except OSError as error:
                self._refuse(error)
                wait = True

    def _refuse(self, error: OSError) -> None:
        """Note that the fd is empty; raise what any other error means."""
        if isinstance(error, BlockingIOError):
            self._drained = True
        elif isinstance(error, AiotunError):
            raise error
        else:
            raise self._read_error(error) from error

    def _take(self) -> bytes:
        packet = _read(self._fd, READ_SIZE)
        self._spend(1)
        return packet

    def _spend(self, packets: int) -> None:
        if self._free:
            self._free = max(0, self._free - packets)
        else:
            self._budget -= packets

    def _take_into(self, view: memoryview) -> int:
        length = read_into(self._fd, view)
        self._spend(1)
        if length > view.nbytes:
            self._truncated += 1
            raise PacketTruncatedError(
                errno.EMSGSIZE,
                f"a packet of {length} bytes came into a buffer of {view.nbytes}, and its end is "
                "lost; give recv_into a larger buffer, or use recv",
                self._interface.name,
            )
        return length

    def _take_many(self, limit: int) -> list[bytes]:
        fd = self._fd
        batch = [_read(fd, READ_SIZE)]
        append = batch.append
        try:
            for _ in range(limit - 1):
                append(_read(fd, READ_SIZE))
        except BlockingIOError:
            self._drained = True
        except OSError:
            pass  # what we have goes first; the next call meets the error again
        self._spend(len(batch))
        return batch

    def _readable(self) -> None:
        """The loop's reader callback: resume those who wait, in order, while there are packets."""
        group = self._group() if self._group is not None else None
        waiting = len(self._line) + (len(group.line) if group is not None else 0)
        self._budget = BUDGET
        self._drained = False
        if not waiting:
            self._stop_reading()
            if group is not None:
                group.unwatch(self)
            return
        try:
            # Once each who waits now; who comes back in the meantime waits for the next call.
            for _ in range(min(waiting, BUDGET)):
                if self._drained or self._fd < 0:
                    break
                if group is not None and group.comes_before(self._line):
                    group.resume(self)
                elif self._line:
                    waiter = self._line.next()
                    self._free = 0 if self._somebody_waits() else BUDGET
                    self._budget = BUDGET - self._free
                    waiter.wake()
        finally:
            self._budget += self._free
            self._free = 0

    def _somebody_waits(self) -> bool:
        if self._line:
            return True
        group = self._group() if self._group is not None else None
        return group is not None and bool(group.line)

    def _start_reading(self) -> None:
        if not self._reading and self._loop is not None:
            self._loop.add_reader(self._fd, self._registration.readable)
            self._reading = True

    def _stop_reading(self) -> None:
        if self._reading and self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._reading = False

    # Sending

    async def send(self, packet: Buffer) -> None:
        self._bind()
        if not self._senders:
            try:
                _write(self._fd, packet)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._write_error(error) from error
            else:
                return
        await self._send_waiting(packet)

    async def send_many(self, packets: Iterable[Buffer]) -> int:
        sent = 0
        write, senders = _write, self._senders
        try:
            self._bind()
            for packet in packets:
                if not senders:
                    try:
                        write(self._fd, packet)
                    except BlockingIOError:
                        pass
                    except OSError as error:
                        raise self._write_error(error) from error
                    else:
                        sent += 1
                        continue
                await self._send_waiting(packet)
                sent += 1
        except BaseException as error:
            error.sent = sent  # type: ignore[attr-defined]  # promised on foreign classes, too
            raise
        return sent

    def send_nowait(self, packet: Buffer) -> None:
        self._check_open()
        if self._senders:
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting to send before")
        try:
            _write(self._fd, packet)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._write_error(error) from error

    async def _send_waiting(self, packet: Buffer) -> None:
        loop = self._bind()
        front = False
        while True:
            if not self._writing:
                loop.add_writer(self._fd, self._registration.writable)
                self._writing = True
            await Waiter(loop, self._senders, front=front)
            self._check_open()
            try:
                _write(self._fd, packet)
            except BlockingIOError:
                self._full = front = True
            except OSError as error:
                raise self._write_error(error) from error
            else:
                return

    def _writable(self) -> None:
        """The loop's writer callback: resume those who wait to send, until one has to wait on."""
        self._full = False
        for _ in range(min(len(self._senders), BUDGET)):
            if self._full or not self._senders:
                break
            self._senders.next().wake()
        if not self._senders:
            # A queue is nearly always writable: watched for nobody it would spin.
            self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing and self._loop is not None:
            self._loop.remove_writer(self._fd)
            self._writing = False

    # For the group of a device's queues

    def join(self, group: QueueGroup) -> None:
        """Become one of several: tasks may wait for a packet of any."""
        self._group = weakref.ref(group)

    def watch(self) -> asyncio.AbstractEventLoop:
        """Have the running loop watch for packets."""
        loop = self._bind()
        self._start_reading()
        return loop

    @property
    def wanted(self) -> bool:
        """Whether tasks wait for a packet of this queue in particular."""
        return bool(self._line)

    # Queueing in the kernel

    def disable(self) -> None:
        """Stop the kernel choosing this queue (TUNSETQUEUE, IFF_DETACH_QUEUE).

        Packets that wait in it are dropped by the kernel. A task that waits here goes on waiting.

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or it is disabled already.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._check_open()
        _ioctl.set_queue(self._fd, self._interface.name, on=False)
        self._disabled = True

    def enable(self) -> None:
        """Let the kernel choose this queue again (TUNSETQUEUE, IFF_ATTACH_QUEUE).

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or it is enabled already.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._check_open()
        _ioctl.set_queue(self._fd, self._interface.name, on=True)
        self._disabled = False

    @property
    def name(self) -> str:
        """The interface's present name."""
        return self._interface.name

    @property
    def disabled(self) -> bool:
        """Whether `disable` took this queue out of the kernel's choice."""
        return self._disabled

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
        return self._release("was detached: its fd belongs to somebody else now")

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
        group = self._group() if self._group is not None else None
        if group is not None:
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
        warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
        loop, fd = self._loop, self._fd
        if loop is None or loop.is_closed():
            self._fd = -1
            os.close(fd)
        elif loop is _running() or not loop.is_running():
            os.close(self._release("was not closed"))
        else:
            # Collected in another thread: only the loop's own may take the fd out of it.
            self._fd = -1
            loop.call_soon_threadsafe(_close_collected, loop, fd)

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd={self._fd}"
        return f"<Queue of {self._interface.name} {state}>"

    # State and errors

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

    def _count_undecodable(self) -> None:
        self._undecodable += 1

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

    def _check_open(self, *, lost_too: bool = True) -> None:
        if self._fd < 0:
            raise DeviceClosedError(f"this queue of {self._interface.name} {self._end}")
        if lost_too and self._lost is not None:
            raise self._lose(self._lost)

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
            self._stop_reading()
            self._stop_writing()
            self._line.dismiss()
            self._senders.dismiss()
            group = self._group() if self._group is not None else None
            if group is not None:
                group.line.dismiss()
        return lost

    def _read_error(self, error: OSError) -> Exception:
        if self._fd < 0:
            return DeviceClosedError(f"this queue of {self._interface.name} {self._end}")
        if error.errno in (errno.EBADFD, errno.EBADF) or error.errno in _PEER_GONE:
            return self._lose(error)
        text = f"reading a packet failed: {error.strerror}"
        return OSError(error.errno, text, self._interface.name)

    def _write_error(self, error: OSError) -> Exception:
        code, name = error.errno, self._interface.name
        if self._fd < 0:
            return DeviceClosedError(f"this queue of {name} {self._end}")
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


def _refusal(queue: Queue, code: int | None) -> str:
    if code != errno.EINVAL:
        return f"{os.strerror(code or 0)}; send a shorter one"
    if queue._header:
        return "look at its header, which this device was opened with, and what follows"
    if queue._mode == "tap":
        return "a frame begins with a 14-byte Ethernet header"
    return "it is empty, or its first four bits say neither IPv4 nor IPv6"


def close_queues(queues: Sequence[Queue]) -> None:
    """Close what is still open of these, all in one thread where a loop is running.

    Each queue's `_closing` is a future of that loop then, done when the kernel is done.
    """
    queues = [queue for queue in queues if not queue.closed]
    fds = [queue._release("was closed") for queue in queues]
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


def _close_collected(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    loop.remove_reader(fd)
    loop.remove_writer(fd)
    os.close(fd)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def check_offload(offload: Offload) -> None:
    """Raise for what is no offload mode, or none that is built."""
    if offload == "split":
        raise NotImplementedError(
            "offload='split' is not built yet; use offload='off', or 'raw' and split yourself"
        )
    if offload not in ("off", "raw"):
        raise ValueError(f"offload is 'off', 'split' or 'raw', not {offload!r}")


def mode_of(flags: Iff) -> Mode:
    """Tell TUN from TAP by the kernel's flags."""
    return "tap" if flags & Iff.TAP else "tun"

"""What a queue is before any packet passes: the owner of an fd, until that ends.

Here is who may use the fd (`_bind`), and how it ends: closed by us, detached, lost, or collected.
`queue.py` has the packets.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from .._kernel import ioctl
from .._kernel.interface import Interface
from .._kernel.words import Mode, Offload
from ..errors import DeviceClosedError, DeviceLostError, PacketError
from . import refusals
from .closing import Closing, close_queues, running_loop
from .fdwatch import FdWatch
from .lookahead import Lookahead
from .packetio import BUDGET, PacketIO, PacketStats
from .port import Port
from .waiting import Line

__all__ = ["Group", "QueueBase"]

T = TypeVar("T")


class Group(Protocol):
    """What a queue tells and asks, as one of several queues of a device."""

    line: Line
    resuming: Any

    def comes_before(self, line: Line) -> bool: ...
    def resume(self, queue: Any) -> None: ...
    def unwatch(self, queue: Any) -> None: ...
    def choose_again(self) -> None: ...
    def leave(self, queue: Any) -> None: ...
    def lose(self, queue: Any) -> None: ...


class QueueBase(PacketIO):
    """An fd, the port that reads and writes it, the loop that watches it, and its end."""

    __slots__ = (  # noqa: RUF023 - by role
        "__weakref__",
        # What it is.
        "_fd",
        "_interface",
        "_watch",
        "_group",
        # What is read and written, and how; both functions are the port's.
        "port",
        "_read",
        "_write",
        # Who waits.
        "_receivers",
        "_senders",
        "_parked",
        # How much may be read before the loop has a turn.
        "_budget",
        "_free",
        "_drained",
        "_resuming",
        "_ahead",
        # How it ended.
        "_lost",
        "_why_closed",
        "_disabled",
        "closing",
    )

    def __init__(
        self,
        fd: int,
        interface: Interface,
        port: Port,
        *,
        shared: Line | None = None,
    ) -> None:
        # Internal: fd is attached, non-blocking and close-on-exec, and belongs to this object now.
        # Who waits in the `shared` line waits for this queue among others.
        self._fd = fd
        self._interface = interface
        self._receivers, self._senders = Line(), Line()
        self._parked = Line()  # those who can't receive before a run's buffer is free
        lines = [self._receivers, self._senders, self._parked]
        lines += [] if shared is None else [shared]
        self._watch = FdWatch(self, *lines)
        self._group: weakref.ref[Group] | None = None
        self.use(port)
        self._budget = BUDGET
        self._free = 0
        self._drained = self._resuming = self._disabled = False
        self._ahead = Lookahead()
        self._lost: DeviceLostError | None = None
        self._why_closed = ""
        self.closing: Closing | None = None

    def use(self, port: Port) -> None:
        """Have packets pass through this port from now on."""
        self.port: Port = port
        # The hot path would look them up for each packet.
        self._read, self._write = port.read, port.write

    # The event loop

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Check that this queue is of the running loop, and usable."""
        loop = asyncio.get_running_loop()
        if self._watch.loop is not loop:
            if self._watch.loop is not None:
                raise RuntimeError(
                    f"{self!r} belongs to another event loop, the one that first awaited it; "
                    "open the device in the loop that uses it"
                )
            self._watch.bind(loop)
        if self._fd < 0 or self._lost is not None:
            self.check_open()
        return loop

    @abc.abstractmethod
    def _readable(self) -> None:
        """The loop found the fd readable, or in error."""

    @abc.abstractmethod
    def _rest_ready(self) -> None:
        """The loop answers a nudge."""

    @abc.abstractmethod
    def _writable(self) -> None:
        """The loop found the fd writable, or in error."""

    def _link_down(self) -> None:
        """The link went down while tasks wait to send."""
        self._watch.stop_writing(self._fd)
        self._senders.dismiss(lambda: refusals.link_down(self._interface.name))

    # For the group of a device's queues

    def join(self, group: Group) -> None:
        """Become one of several: tasks may wait for a packet of any."""
        self._group = weakref.ref(group)

    def _peers(self) -> Group | None:
        return self._group() if self._group is not None else None

    @abc.abstractmethod
    def watch(self) -> None:
        """Have the loop call when there is a packet: in the fd, or kept by the port."""

    @abc.abstractmethod
    def take(self, take: Callable[[PacketIO], T]) -> T:
        """Take packets now.

        Raises:
            BlockingIOError: there is none.
        """

    def end_free(self) -> None:
        """Have every further packet of this wake-up ask whether somebody waits for it."""
        self._budget += self._free
        self._free = 0

    @property
    def wanted(self) -> bool:
        """Whether tasks wait for a packet of this queue in particular."""
        return bool(self._receivers)

    def _somebody_waits(self) -> bool:
        if self._receivers:
            return True
        group = self._peers()
        return group is not None and bool(group.line)

    # Queueing in the kernel

    def disable(self) -> None:
        """Stop the kernel choosing this queue (TUNSETQUEUE, IFF_DETACH_QUEUE).

        Packets that wait in it are dropped by the kernel. A task that waits here goes on waiting.

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or it is disabled already.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._set_enabled(False)

    def enable(self) -> None:
        """Let the kernel choose this queue again (TUNSETQUEUE, IFF_ATTACH_QUEUE).

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or it is enabled already.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._set_enabled(True)

    def _set_enabled(self, on: bool) -> None:
        self.check_open()
        ioctl.set_queue(self._fd, self._interface.name, on)
        self._disabled = not on
        if (group := self._peers()) is not None:
            group.choose_again()

    @property
    def disabled(self) -> bool:
        """Whether `disable` took this queue out of the kernel's choice."""
        return self._disabled

    # Closing

    def close(self) -> None:
        close_queues([self])

    async def aclose(self) -> None:
        close_queues([self])
        if self.closing is not None:
            await self.closing.wait()

    def detach(self) -> int:
        """Give the fd up, open and unregistered, for another process or `Queue.from_fd`.

        It stays non-blocking and close-on-exec. Whoever waits is woken with `DeviceClosedError`;
        this queue is closed.

        Returns:
            The fd, which is the caller's to close.

        Raises:
            DeviceClosedError: it was closed or detached before.
        """
        self.check_open(lost_too=False)
        return self.release("was detached; go on with its fd, or open the device again")

    def release(self, why: str) -> int:
        """Take the fd out of the loop, wake everybody, and give it away: the order matters.

        From here on `_fd` is -1, so that the number can't be used by mistake once it is another's.
        """
        if self._watch.alive:
            self._watch.stop(self._fd)
            self._receivers.dismiss()
            self._senders.dismiss()
            self._parked.dismiss()
        fd, self._fd = self._fd, -1
        self._why_closed = why
        self._free = 0
        self._resuming = False
        self.port.drop_rest()
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
        watch, fd = self._watch, self._fd
        if not watch.alive or watch.loop is None:
            self._fd = -1
            os.close(fd)
        elif watch.loop is running_loop() or not watch.loop.is_running():
            os.close(self.release("was not closed"))
        else:
            # Collected in another thread: only the loop's own may take the fd out of it.
            self._fd = -1
            watch.loop.call_soon_threadsafe(_close_collected, watch, fd)
        warnings.warn(
            f"unclosed {shown}; call aclose()", ResourceWarning, source=self, stacklevel=1
        )

    def __reduce__(self) -> tuple[Callable[..., QueueBase], tuple[Any, ...]]:
        """A duplicate of this queue, on its way to another process.

        multiprocessing sends queues: as arguments of a Process (spawn or forkserver), or over its
        Connections and Queues. This one stays open; close it where only the other should be used.

        Raises:
            TypeError: pickled in any other way, or copied.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        from .handover import reduce_queue

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
        return self.port.format.offload

    @property
    def vnet_header_size(self) -> int:
        """The size in bytes of the virtio-net header, 10 or 12; 0 with ``offload="off"``.

        With ``"raw"`` each packet begins with it, both ways; with ``"split"`` the program does not
        see it.
        """
        return self.port.format.vnet_header_size

    @property
    def stats(self) -> PacketStats:
        return PacketStats(*dataclasses.astuple(self.port.counts))

    @property
    def _mode(self) -> Mode:
        return self.port.format.mode

    @property
    def _header_bytes(self) -> int:
        return self.port.format.header_bytes

    def _count_undecodable(self) -> None:
        self.port.counts.undecodable += 1

    # Errors

    def check_open(self, *, lost_too: bool = True) -> None:
        if self._fd < 0:
            raise self._closed_error()
        if lost_too and self._lost is not None:
            raise refusals.lost(self._lost.errno, self._interface.name)

    def _closed_error(self) -> DeviceClosedError:
        return DeviceClosedError(f"this queue of {self._interface.name} {self._why_closed}")

    def _lose(self, code: int | None) -> DeviceLostError:
        """Take a queue whose interface is gone out of the loop, once, and tell all who wait.

        The kernel reports an error on such an fd for ever: a loop that watched it would spin.
        """
        if self._lost is None:
            self._lost = refusals.lost(code, self._interface.name)
            self._resuming = False
            self._watch.stop(self._fd)
            self._receivers.dismiss()
            self._senders.dismiss()
            self._parked.dismiss()
            if (group := self._peers()) is not None:
                group.lose(self)
        # Another one: the traceback of what is raised holds this queue, which must not hold it.
        return refusals.lost(code, self._interface.name)

    def _read_error(self, error: OSError) -> Exception:
        if self._fd < 0:
            return self._closed_error()
        if error.errno in self.port.ends:
            return self._lose(error.errno)
        return refusals.unread(error, self._interface.name)

    def _write_error(self, error: OSError) -> Exception:
        if self._fd < 0:
            return self._closed_error()
        if error.errno in self.port.ends:
            return self._lose(error.errno)
        made = refusals.refused(error, self._interface.name, self.port.format)
        if isinstance(made, PacketError):
            self.port.counts.refused += 1
        return made


def _close_collected(watch: FdWatch, fd: int) -> None:
    watch.stop(fd)
    os.close(fd)

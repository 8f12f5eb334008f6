"""The owner of an fd, from the first use until the end, before any packet passes.

Here is who may use the fd (`_bind`), and how it ends: closed by us, detached, lost, or collected.
`serving.py` has who may read or write it now. The packets are a queue's or a datagram socket's.
"""

from __future__ import annotations

import abc
import asyncio
import os
import warnings
import weakref
from typing import Any, Protocol

from .._kernel.interface import Interface
from ..errors import AiotunError, DeviceClosedError, DeviceLostError
from . import refusals
from .closing import AsyncClosing, Closing, close_queues, running_loop
from .fdwatch import FdWatch
from .lookahead import Lookahead
from .packetio import BUDGET
from .waiting import Line

__all__ = ["FdOwner", "Group", "Keeper"]


class Keeper(Protocol):
    """What an owner needs of the port that reads and writes its fd.

    Attributes:
        ends: the errnos that say that nothing will ever come or go here again.
        pending: how many packets the port itself keeps, where no poll sees them.
    """

    ends: frozenset[int]
    pending: int

    def drop_rest(self) -> None:
        """Drop and count what the port keeps; the fd is about to be given up."""


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


class FdOwner(AsyncClosing):
    """An fd, the port that reads and writes it, the loop that watches it, and its end."""

    __slots__ = (  # noqa: RUF023 - by role
        "__weakref__",
        # What it is.
        "_fd",
        "_interface",
        "_watch",
        "_group",
        "ready",
        # What is read and written, and how.
        "port",
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
        "closing",
    )

    def __init__(
        self,
        fd: int,
        interface: Interface,
        port: Keeper,
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
        # Whether a send that need not wait may do without `_bind`: the fd has a loop and is usable,
        # and the loop is not in debug mode. On Python 3.11 get_running_loop makes a system call,
        # which costs more than everything else that a send does besides its write.
        self.ready: bool = False
        self.port: Keeper = port
        self._budget = BUDGET
        self._free = 0
        self._drained = self._resuming = False
        self._ahead = Lookahead()
        self._lost: DeviceLostError | None = None
        self._why_closed = ""
        self.closing: Closing | None = None

    # The event loop

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Check that this is of the running loop, and usable."""
        loop = asyncio.get_running_loop()
        if self._watch.loop is not loop:
            if self._watch.loop is not None:
                raise RuntimeError(
                    f"{self!r} belongs to another event loop, the one that first awaited it; "
                    "open it in the loop that uses it"
                )
            self._watch.bind(loop)
        if self._fd < 0 or self._lost is not None:
            self.check_open()
        self.ready = not loop.get_debug()
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

    def end_free(self) -> None:
        """Have every further packet of this wake-up ask whether somebody waits for it."""
        self._budget += self._free
        self._free = 0

    def _somebody_waits(self) -> bool:
        if self._receivers:
            return True
        group = self._peers()
        return group is not None and bool(group.line)

    # Closing

    def close(self) -> None:
        """Close at once; may be called again.

        Tasks that wait are woken with `DeviceClosedError`. In a running loop the fd is closed in a
        thread; a later `aclose` waits for that.
        """
        close_queues([self])

    async def aclose(self) -> None:
        """Close, and wait until the kernel is done with it; may be called again, also at once.

        Raises nothing: what was lost or closed before is closed all the same.

        *Cancellation*: everything is closed all the same, only the waiting ends.
        """
        close_queues([self])
        if self.closing is not None:
            await self.closing.wait()

    def release(self, why: str) -> int:
        """Take the fd out of the loop, wake everybody, and give it away: the order matters.

        From here on `_fd` is -1, so that the number can't be used by mistake once it is another's.
        """
        self._watch.stop(self._fd)
        if self._watch.alive:
            self._receivers.dismiss()
            self._senders.dismiss()
            self._parked.dismiss()
        fd, self._fd = self._fd, -1
        self._why_closed = why
        self.ready = False
        self._free = 0
        self._resuming = False
        self.port.drop_rest()
        if (group := self._peers()) is not None:
            group.leave(self)
        return fd

    @property
    def closed(self) -> bool:
        """Whether this was closed here. What was lost must be closed, too."""
        return self._fd < 0

    def fileno(self) -> int:
        """The file descriptor, for `select` and its like; -1 once closed."""
        return self._fd

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) < 0:
            return
        # Closed before the warning, which may be made an error and end this.
        shown = repr(self)
        watch, fd = self._watch, self._fd
        if not watch.alive or watch.loop is None:
            self._fd = -1
            self.port.drop_rest()
            os.close(fd)
        elif watch.loop is running_loop() or not watch.loop.is_running():
            os.close(self.release("was not closed"))
        else:
            # Collected in another thread: only the loop's own may take the fd out of it.
            self._fd = -1
            self.port.drop_rest()
            watch.loop.call_soon_threadsafe(_close_collected, watch, fd)
        warnings.warn(
            f"unclosed {shown}; call aclose()", ResourceWarning, source=self, stacklevel=1
        )

    # Errors

    def check_open(self, *, lost_too: bool = True) -> None:
        if self._fd < 0:
            raise self._closed_error()
        if lost_too and self._lost is not None:
            raise self._lost_error(self._lost.errno)

    def _closed_error(self) -> DeviceClosedError:
        return DeviceClosedError(f"this queue of {self._interface.name} {self._why_closed}")

    def _lost_error(self, code: int | None) -> DeviceLostError:
        return refusals.lost(code, self._interface.name)

    def _lose(self, code: int | None) -> DeviceLostError:
        """Take a queue whose interface is gone out of the loop, once, and tell all who wait.

        The kernel reports an error on such an fd for ever: a loop that watched it would spin.
        """
        if self._lost is None:
            self._lost = self._lost_error(code)
            self.ready = False
            self._resuming = False
            self._watch.stop(self._fd)
            self._receivers.dismiss()
            self._senders.dismiss()
            self._parked.dismiss()
            if (group := self._peers()) is not None:
                group.lose(self)
        # Another one: the traceback of what is raised holds this object, which must not hold it.
        return self._lost_error(code)

    def _read_error(self, error: OSError) -> Exception:
        return self._ending(error) or refusals.unread(error, self._interface.name)

    def _ending(self, error: OSError) -> AiotunError | None:
        """Tell that a call failed because the fd was closed or lost; None if for another reason."""
        if self._fd < 0:
            return self._closed_error()
        if error.errno in self.port.ends:
            return self._lose(error.errno)
        return None


def _close_collected(watch: FdWatch, fd: int) -> None:
    watch.stop(fd)
    os.close(fd)

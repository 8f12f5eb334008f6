"""What can happen to an interface while a task waits to send, and polling for room doesn't tell."""

from __future__ import annotations

import asyncio
import contextlib
import select
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._kernel.limits import naming_limits
from ..errors import AiotunError

if TYPE_CHECKING:
    from .._kernel.interface import Interface

__all__ = ["SendWatch"]

# Seconds between two looks at the link's state.
_PERIOD = 0.4


class SendWatch:
    """Calls back when the fd is in error, or the link goes down; if asked, also when it has room.

    *Deleted*: the kernel wakes those who poll for reading then, and not those who poll for writing.
    Polling for reading would wake us for every packet that nobody wants. But the wake-up is for
    urgent data as well (EPOLLPRI), which a TUN device never has. An event loop can't ask for that,
    so an epoll of our own does, and the loop watches it. It tells of any error, such as an ICMP
    error that a socket reports; the write that is tried then says which one it is. A socket's room
    is asked for here, too, as `FdWatch` says.

    *Down*: the kernel tells nobody, and a write says EAGAIN for as long as the buffer is full. So
    we ask for the link's flags, in a short-lived thread in the interface's namespace, for as long
    as a task waits.
    """

    __slots__ = ("_down", "_epoll", "_interface", "_loop", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        interface: Interface,
        failed: Callable[[], object],
        down: Callable[[], object],
        *,
        room: bool = False,
    ) -> None:
        with naming_limits(f"could not wait to send on {interface.name}", interface.name):
            self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLPRI | (select.EPOLLOUT if room else 0))
        self._loop = loop
        self._interface = interface
        self._down = down
        loop.add_reader(self._epoll.fileno(), failed)
        self._timer: asyncio.TimerHandle | None = None
        if interface.namespace is not None:
            self._timer = loop.call_later(_PERIOD, self._look)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        up = True

        def look() -> None:
            nonlocal up
            # What can't be found out is taken to be well.
            with contextlib.suppress(AiotunError, OSError):
                up = self._interface.is_up()

            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._told, up)

        try:
            # Never in this thread: it may have to enter another namespace.
            threading.Thread(target=look, name="aiotun").start()
        except RuntimeError:  # no thread can be started now
            self._told(True)

    def _told(self, up: bool) -> None:
        if self._timer is None:
            return  # closed in the meantime
        self._timer = self._loop.call_later(_PERIOD, self._look)
        if not up:
            self._down()

"""What an event loop watches for a queue: its fd, and the packets that its port keeps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import stat
import weakref
from typing import TYPE_CHECKING, Protocol

from .._kernel.limits import naming_limits
from .sendwatch import SendWatch

if TYPE_CHECKING:
    from .._kernel.interface import Interface
    from .waiting import Line

__all__ = ["FdWatch", "Owner"]


class Owner(Protocol):
    """What the loop calls: a queue."""

    def _readable(self) -> None: ...
    def _rest_ready(self) -> None: ...
    def _writable(self) -> None: ...
    def _link_down(self) -> None: ...


class FdWatch:
    """What the event loop holds of a queue.

    The owner is held weakly. Otherwise a queue that its user has dropped could not be collected,
    and could not warn that it was left open. The lines are held strongly: a waiter must not become
    garbage while only its task refers to it. Both references end with the loop; a registry of our
    own would outlive the loop.

    A socket may be in error for a moment (an ICMP error), and go on. uvloop silently stops watching
    an fd in error. Therefore uvloop watches an epoll fd of ours instead, which is never in error,
    and the epoll watches the socket. asyncio's own loop goes on watching, so it watches the socket
    itself. A second epoll would cost it time: the kernel would wake the program as if from another
    processor, which made a ping between two tunnels take three times as long.

    Attributes:
        loop: the event loop, once a coroutine was awaited in one.
        reading: the loop calls the owner when there is a packet, in the fd or kept by the port.
        writing: the loop calls the owner when the fd has room.
    """

    __slots__ = (
        "_epoll",
        "_lines",
        "_nudge",
        "_owner",
        "_pid",
        "_send_watch",
        "_socket",
        "loop",
        "reading",
        "writing",
    )

    def __init__(self, owner: Owner, *lines: Line) -> None:
        self._owner = weakref.ref(owner)
        self._lines = lines
        self._nudge: asyncio.Handle | None = None
        self._send_watch: SendWatch | None = None
        self._epoll: select.epoll | None = None
        self._socket: bool | None = None  # whether the fd is one; None: not known yet
        self._pid = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.reading = self.writing = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pid = os.getpid()

    @property
    def alive(self) -> bool:
        """Whether the loop may be used: it is open, and belongs to this process.

        After a fork the child has a copy of the loop, which shares the parent's epoll. If the child
        removed an fd there, the parent would miss its events.
        """
        return self.loop is not None and not self.loop.is_closed() and self._pid == os.getpid()

    def start_reading(self, fd: int) -> None:
        """Have the loop call the owner when there is a packet.

        Raises:
            ResourceLimitError: this process can't open the epoll fd to watch a socket with.
        """
        if self.reading or self.loop is None:
            return
        if self._needs_epoll(fd):
            if self._epoll is None:
                with naming_limits("could not wait for a datagram"):
                    self._epoll = select.epoll()
                self.loop.add_reader(self._epoll.fileno(), self._readable)
            self._epoll.register(fd, select.EPOLLIN)
        else:
            self.loop.add_reader(fd, self._readable)
        self.reading = True

    def stop_reading(self, fd: int) -> None:
        if self.reading and self.loop is not None:
            if self._epoll is None:
                self.loop.remove_reader(fd)
            else:
                with contextlib.suppress(OSError):  # something else closed the fd
                    self._epoll.unregister(fd)
            self.reading = False
        if self._nudge is not None:
            self._nudge.cancel()
            self._nudge = None

    def nudge(self) -> None:
        """Have the loop call the owner on its next turn, because its port keeps packets."""
        if self._nudge is None and self.loop is not None and not self.loop.is_closed():
            self._nudge = self.loop.call_soon(self._nudged)

    @property
    def nudging(self) -> bool:
        return self._nudge is not None

    def start_writing(self, fd: int, interface: Interface) -> None:
        """Have the loop call the owner when the fd has room, or if the link goes down meanwhile.

        Raises:
            ResourceLimitError: this process can't open the fds for this.
        """
        if not self.writing and self.loop is not None:
            is_socket = self._is_socket(fd)
            self._send_watch = SendWatch(
                self.loop, fd, interface, self._writable, self._link_down, room=is_socket
            )
            if not is_socket:
                self.loop.add_writer(fd, self._writable)
            self.writing = True

    def stop_writing(self, fd: int) -> None:
        if self.writing and self.loop is not None:
            if not self._socket:
                self.loop.remove_writer(fd)
            self.writing = False
        if self._send_watch is not None:
            self._send_watch.close()
            self._send_watch = None

    def stop(self, fd: int) -> None:
        """Take the fd out of the loop."""
        if self.alive:
            self.stop_reading(fd)
            self.stop_writing(fd)
        if self._epoll is not None:
            if self.alive and self.loop is not None:
                self.loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _needs_epoll(self, fd: int) -> bool:
        return not isinstance(self.loop, asyncio.SelectorEventLoop) and self._is_socket(fd)

    def _is_socket(self, fd: int) -> bool:
        if self._socket is None:
            self._socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        return self._socket

    # Called by the loop.

    def _readable(self) -> None:
        # If a nudge is under way, it reads in this turn or the next. Two readings would exceed the
        # budget of a turn.
        if self._nudge is None and (owner := self._owner()) is not None:
            owner._readable()

    def _nudged(self) -> None:
        self._nudge = None
        if (owner := self._owner()) is not None:
            owner._rest_ready()

    def _writable(self) -> None:
        if (owner := self._owner()) is not None:
            owner._writable()

    def _link_down(self) -> None:
        if (owner := self._owner()) is not None:
            owner._link_down()

"""Tasks waiting in line for a file descriptor, and what the event loop calls to wake them.

asyncio's own way from "the fd is readable" to "the task reads" takes two turns of the loop: the
reader callback fulfils a future, whose own callback resumes the task a turn later. In between the
fd is polled again, reported again, and a task may be cancelled or the fd closed. A `Waiter`
resumes its task *inside* the reader callback. So waking and reading are one step: nothing can come
between them, no wake-up can be lost with a cancelled task, and a packet costs one turn, not two.

A `Waiter` is a future-like object in asyncio's sense (see `asyncio.isfuture`): a task that awaits
one calls `add_done_callback`, and calls `result` when it is resumed. It never carries a value.
"""

import asyncio
import contextvars
import itertools
import select
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Protocol

__all__ = ["Line", "LossWatch", "Registration", "Waiter"]

_tickets = itertools.count()


class Waiter:
    """One task in a line. Awaiting it ends when the task shall try again, for better or worse."""

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_line",
        "_loop",
        "_message",
        "ticket",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, line: "Line", *, front: bool) -> None:
        self._loop = loop
        self._line: Line | None = line  # None once this has left it, which is: done
        self._asyncio_future_blocking = True
        self._callback: Callable[[Waiter], object] | None = None
        self._context: contextvars.Context | None = None
        # None, or a one-tuple of the message that the task was cancelled with.
        self._message: tuple[object] | None = None
        # Orders the waiters of several lines. One that goes back to the front is older than all.
        if front:
            self.ticket: int = -1
            line.appendleft(self)
        else:
            self.ticket = next(_tickets)
            line.append(self)

    def wake(self) -> None:
        """Resume the task now. Only from a callback of the loop: no task may be running."""
        self._line = None
        if self._callback is not None and self._context is not None:
            self._context.run(self._callback, self)

    def wake_soon(self) -> None:
        """Resume the task on the loop's next turn; from anywhere in the loop's thread."""
        self._line = None
        if self._callback is not None:
            self._loop.call_soon(self._callback, self, context=self._context)

    # What a task asks of the thing it awaits.

    def __await__(self) -> Generator[Any, None, None]:
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, callback: Callable[["Waiter"], object], *, context: contextvars.Context | None = None
    ) -> None:
        self._callback = callback
        self._context = context if context is not None else contextvars.copy_context()

    def done(self) -> bool:
        return self._line is None

    def result(self) -> None:
        if self._message is not None:
            raise asyncio.CancelledError(*(part for part in self._message if part is not None))

    def cancel(self, msg: object = None) -> bool:
        """Leave the line; whoever stands behind is woken instead, as if this one had not been."""
        if self._line is None:
            return False
        self._line.remove(self)
        self._message = (msg,)
        self.wake_soon()
        return True


class Line(deque[Waiter]):
    """Waiters in the order they came. Whoever takes one out wakes it."""

    __slots__ = ()

    def dismiss(self) -> None:
        """Wake everybody on the loop's next turn: there is nothing to wait for any more."""
        while self:
            self.popleft().wake_soon()


class Owner(Protocol):
    """What a `Registration` wakes."""

    def _readable(self) -> None: ...
    def _writable(self) -> None: ...
    def _in_error(self) -> None: ...


class Registration:
    """What the event loop holds of a queue.

    The owner is held weakly, or one that its user dropped would never be collected, nor warn that
    it was left open. The lines are held strongly: what a task waits for must not be garbage, even
    where nobody but that task knows it. Both end by themselves when the loop is closed, which a
    registry of our own would not.
    """

    __slots__ = ("_lines", "_owner")

    def __init__(self, owner: Owner, *lines: Line) -> None:
        self._owner = weakref.ref(owner)
        self._lines = lines

    def readable(self) -> None:
        owner = self._owner()
        if owner is not None:
            owner._readable()

    def writable(self) -> None:
        owner = self._owner()
        if owner is not None:
            owner._writable()

    def in_error(self) -> None:
        owner = self._owner()
        if owner is not None:
            owner._in_error()


class LossWatch:
    """Calls back when an interface is deleted, while a task waits to send and nobody to receive.

    The kernel wakes those who poll for reading then, and not those who poll for writing. Watching
    for reading is no way out: packets that nobody wants would wake us for ever. But the wake-up is
    for urgent data as well (EPOLLPRI), which a TUN device never has. The loop cannot ask for that,
    so an epoll of our own does, and the loop watches it.
    """

    __slots__ = ("_epoll", "_loop")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLPRI)
        loop.add_reader(self._epoll.fileno(), callback)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

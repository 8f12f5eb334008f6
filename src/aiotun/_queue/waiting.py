"""Tasks waiting in line for a file descriptor.

asyncio's own way from "the fd is readable" to "the task reads" takes two turns of the loop: the
reader callback fulfils a future, and the future's own callback resumes the task a turn later. In
between, the loop polls the fd again and reports it again, the task may be cancelled, or the fd
closed. A `Waiter` resumes its task *inside* the reader callback. Waking and reading are one step:
nothing can come between them, no wake-up can be lost with a cancelled task, and a packet costs one
turn of the loop, not two.

A `Waiter` is a future-like object in asyncio's sense (see `asyncio.isfuture`): a task that awaits
one calls `add_done_callback`, and calls `result` when it is resumed. It never carries a value.
"""

import asyncio
import contextvars
import itertools
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

__all__ = ["Line", "Waiter"]

_tickets = itertools.count()


class Waiter:
    """One task in a line. Awaiting it returns when the task should retry its read or write.

    The retry may still fail: another process may have been quicker.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_error",
        "_line",
        "_loop",
        "ticket",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, line: "Line", ticket: int | None = None
    ) -> None:
        """Join a line, at its end; or at its front, with the ticket that the task had before."""
        self._loop = loop
        self._line: Line | None = line  # None once the waiter has left the line: it is done
        self._asyncio_future_blocking = True
        self._callback: Callable[[Waiter], object] | None = None
        self._context: contextvars.Context | None = None
        self._error: BaseException | None = None  # what awaiting this raises
        # The ticket orders the waiters of several lines.
        if ticket is None:
            self.ticket: int = next(_tickets)
            line.append(self)
        else:
            self.ticket = ticket
            line.appendleft(self)

    def wake(self) -> None:
        """Resume the task now, once it is out of the line. Only from a callback of the loop."""
        line, self._line = self._line, None
        if line and line[0]._line is None:
            line.trim()
        if self._callback is not None and self._context is not None:
            self._context.run(self._callback, self)

    def wake_soon(self, error: BaseException | None = None) -> None:
        """Resume the task on the loop's next turn; from anywhere in the loop's thread.

        Once the loop is closed the task will never run again, and must not keep anybody from
        closing the device.
        """
        self._line = None
        self._error = error
        # Let go of: an error's traceback will refer to this object, and the task to the error.
        callback, self._callback = self._callback, None
        if callback is not None and not self._loop.is_closed():
            self._loop.call_soon(callback, self, context=self._context)

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
        if self._error is not None:
            # Its traceback will hold this frame, so the frame must not hold the error.
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error

    def cancel(self, msg: object = None) -> bool:
        """Leave the line. The next waiter is woken instead, as if this one had not been there."""
        line = self._line
        if line is None:
            return False
        self.wake_soon(asyncio.CancelledError(*(() if msg is None else (msg,))))
        line.left()
        return True


class Line(deque[Waiter]):
    """Waiters in the order they came. The code that takes a waiter out must wake it.

    A cancelled waiter is not searched for: cancelling n tasks would cost n² steps. It stays in the
    line, done, until it comes to an end of the line, or until half of the line may be cancelled.
    The waiters at both ends are not done: so the truth value of a line says whether anybody waits,
    and ``len(line) == 1`` that one does.
    """

    __slots__ = ("_left",)

    def __init__(self) -> None:
        super().__init__()
        self._left = 0  # how many were cancelled since all of those were last dropped

    def left(self) -> None:
        """Note that a waiter was cancelled."""
        self._left += 1
        if 2 * self._left > len(self):
            waiting = [waiter for waiter in self if not waiter.done()]
            self.clear()
            self.extend(waiting)
            self._left = 0
        else:
            self.trim()

    def trim(self) -> None:
        """Drop waiters that are done from both ends."""
        while self and self[0].done():
            self.popleft()
        while self and self[-1].done():
            self.pop()

    def dismiss(self, error: Callable[[], Exception] | None = None) -> None:
        """Wake everybody on the loop's next turn: there is nothing to wait for any more.

        Each gets an error of its own (what `send_many` notes on it must not be another's), or else
        finds out by trying again.
        """
        while self:
            waiter = self.popleft()
            if not waiter.done():
                waiter.wake_soon(None if error is None else error())

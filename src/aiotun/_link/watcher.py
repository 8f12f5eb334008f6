"""One reader of a link's events: the namespace's thread fills it, a task in its own loop reads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from .._kernel.interface import Interface

if TYPE_CHECKING:
    from .info import LinkEvent
    from .state import Backlog, Change, LinkState

__all__ = ["Watcher", "Which"]

T = TypeVar("T")

Which = int | str
"""A link's index or name."""


class Watcher:
    """The events for one reader that it has not read yet.

    A watcher holds no reference to its reader. So an iterator that is no longer used can be
    collected, although the namespace's thread references the watcher.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interface: Interface) -> None:
        self.loop = loop
        self.interface = interface
        # The index if it is known: it still identifies the link after a rename.
        self.which: Which = interface.name if interface.index is None else interface.index
        self.index = 0  # set when watching begins
        self._lock = threading.Lock()
        self._backlog: Backlog | None = None  # set when watching begins
        self._over = False  # the thread adds no more events
        self._error: BaseException | None = None  # why, if watching failed
        self._waiters: set[asyncio.Future[None]] = set()
        self._waking = False

    # Called in the namespace's thread

    def begin(self, state: LinkState) -> None:
        """Record the link's state when watching begins; all else follows as changes."""
        # Imported here, in the hub's thread: creating its classes takes a few milliseconds.
        from .state import Backlog

        self.index = state.info.index
        self._follow(state)
        with self._lock:
            self._backlog = Backlog(state)
        self._wake_soon()

    def note(self, change: Change) -> None:
        """Record a change of this link."""
        assert self._backlog is not None
        state = self._backlog.state.after(change)
        if state is None:
            self.delete()
        else:
            self.update(state)

    def update(self, state: LinkState) -> None:
        """Record the link's new state."""
        assert self._backlog is not None
        self._follow(state)  # before a reader can see the event
        with self._lock:
            self._backlog.add(state)
        self._wake_soon()

    def delete(self) -> None:
        """Record that the link was deleted."""
        assert self._backlog is not None
        with self._lock:
            self._backlog.add_deleted()
        self.end(None)

    def end(self, error: BaseException | None) -> None:
        """Record that no more events will come; only the first call's error counts."""
        with self._lock:
            if not self._over:
                self._over, self._error = True, error
        self._wake_soon()

    def _follow(self, state: LinkState) -> None:
        known = self.interface
        if (known.name, known.mtu) != (state.info.name, state.info.mtu):
            known.follow(state.info.index)

    def _wake_soon(self) -> None:
        with self._lock:
            if not self._waiters or self._waking:
                return
            self._waking = True
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no task waits
            self.loop.call_soon_threadsafe(self._wake)

    # Called in the reader's loop

    def _wake(self) -> None:
        with self._lock:
            self._waking = False
            waiters = list(self._waiters)
        # Wake all of them: a task that was cancelled, but has not run yet, would not read.
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def begun(self) -> None:
        """Wait until watching has begun.

        Raises:
            LinkError, NotPermittedError, ResourceLimitError: watching can't begin.
        """
        await self._until(self._has_begun)

    async def next(self) -> LinkEvent | None:
        """Wait for an event and take it; None if there will be no more events."""
        (event,) = await self._until(self._next)
        return event

    async def ended(self) -> None:
        """Wait until the thread has released this."""
        await self._until(lambda: True if self._over else None)

    @property
    def over(self) -> bool:
        """Whether the thread has released this."""
        return self._over

    def _has_begun(self) -> bool | None:
        if self._backlog is None and self._over:
            self._raise()
        return True if self._backlog is not None or self._over else None

    def _next(self) -> tuple[LinkEvent | None] | None:
        event = None if self._backlog is None else self._backlog.take()
        if event is None and self._over:
            self._raise()
        return (event,) if event is not None or self._over else None

    def _raise(self) -> None:
        """Raise the error that ended watching, if any; only once."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # the error's traceback references this frame: break the reference cycle

    async def _until(self, look: Callable[[], T | None]) -> T:
        """Wait until `look` finds something and return it, with no await in between."""
        while True:
            with self._lock:
                found = look()
                if found is not None:
                    return found
                waiter = self.loop.create_future()
                self._waiters.add(waiter)
            try:
                await waiter
            finally:
                with self._lock:
                    self._waiters.discard(waiter)

"""One reader of a link's events: told by the namespace's thread, read by a task in its own loop."""

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
"""A link's number or name."""


class Watcher:
    """What one reader has been told and has not taken yet.

    Nothing here knows the reader: an iterator that nobody holds is collected while this lives.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interface: Interface) -> None:
        self.loop = loop
        self.interface = interface
        # A number where it is known: whatever the name is by now, this is the same link.
        self.which: Which = interface.name if interface.index is None else interface.index
        self.index = 0  # once it has begun
        self._lock = threading.Lock()
        self._backlog: Backlog | None = None  # as soon as it has begun
        self._over = False  # nothing more is told
        self._error: BaseException | None = None  # why, if that was no ordinary end
        self._waiters: set[asyncio.Future[None]] = set()
        self._waking = False

    # Told, in the namespace's thread

    def begin(self, state: LinkState) -> None:
        """Note what the link is now; what follows is told as changes."""
        # Imported here, in a thread: its classes take a few milliseconds to make.
        from .state import Backlog

        self.index = state.info.index
        self._follow(state)
        with self._lock:
            self._backlog = Backlog(state)
        self._wake_soon()

    def note(self, change: Change) -> None:
        """Note a change of this link."""
        assert self._backlog is not None
        state = self._backlog.state.after(change)
        if state is None:
            self.delete()
        else:
            self.update(state)

    def update(self, state: LinkState) -> None:
        """Note that the link is so now."""
        assert self._backlog is not None
        self._follow(state)  # before anybody hears of it
        with self._lock:
            self._backlog.add(state)
        self._wake_soon()

    def delete(self) -> None:
        """Note that the link is gone."""
        assert self._backlog is not None
        with self._lock:
            self._backlog.add_deleted()
        self.end(None)

    def end(self, error: BaseException | None) -> None:
        """Note that nothing more will be told; the first reason counts."""
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
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self.loop.call_soon_threadsafe(self._wake)

    # Read, in the reader's loop

    def _wake(self) -> None:
        with self._lock:
            self._waking = False
            waiters = list(self._waiters)
        # All of them: one may have been cancelled and not know it yet.
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def begun(self) -> None:
        """Wait until watching has begun.

        Raises:
            LinkError, NotPermittedError, ResourceLimitError: it can't.
        """
        await self._until(self._has_begun)

    async def next(self) -> LinkEvent | None:
        """Wait for an event and take it; None where none will come."""
        (event,) = await self._until(self._next)
        return event

    async def ended(self) -> None:
        """Wait until the thread has let go of this."""
        await self._until(lambda: True if self._over else None)

    @property
    def over(self) -> bool:
        """Whether the thread has let go of this."""
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
        """Raise what ended it, once."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # or it and this frame would be a ring

    async def _until(self, look: Callable[[], T | None]) -> T:
        """Wait until `look` finds something; nothing is awaited between finding and giving it."""
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

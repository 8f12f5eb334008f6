"""The iterator that `Link.events` gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from .._kernel.interface import Interface
from .._kernel.namespaces import NamespaceFd
from .hub import Hub, watch
from .watcher import Watcher

if TYPE_CHECKING:
    from .info import LinkEvent

__all__ = ["LinkEvents"]


class LinkEvents:
    """The events of one link; see `Link.events`.

    An iterator belongs to the event loop that first awaits it; in another loop it raises
    `RuntimeError`. It stops watching when it is garbage-collected, or within a second or two after
    its loop was closed.
    """

    __slots__ = ("__weakref__", "_closed", "_hub", "_interface", "_namespace", "_watcher")

    def __init__(self, interface: Interface, namespace: Callable[[], NamespaceFd]) -> None:
        # Internal: use Link.events.
        self._interface = interface
        self._namespace = namespace
        self._watcher: Watcher | None = None
        self._hub: Hub | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LinkEvent:
        """Wait for the next event.

        Raises:
            StopAsyncIteration: the link was deleted, or this iterator was closed.
            LinkError: watching can't begin, as there is no such link or namespace.
            NotPermittedError: the program may not enter the namespace.
            ResourceLimitError: no thread can be started, or no file descriptor is left.
            RuntimeError: this iterator belongs to another event loop.

        *Cancellation*: no event is lost; the next call returns it.

        *Concurrency*: several calls may wait at once; each event goes to one of them.
        """
        if self._closed:
            raise StopAsyncIteration
        event = await self._begin().next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> Self:
        """Begin to watch; every later change is an event.

        Raises:
            LinkError: there is no such link or namespace.
            NotPermittedError: the program may not enter the namespace.
            ResourceLimitError: no thread can be started, or no file descriptor is left.
            RuntimeError: this iterator belongs to another event loop, or was closed.

        *Cancellation*: watching ends.

        *Concurrency*: enter each iterator once. Iterators don't affect each other.
        """
        if self._closed:
            raise RuntimeError("these events were closed; call link.events() again")
        try:
            await self._begin().begun()
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop watching; in tasks that wait for an event, iteration ends. Idempotent.

        Events that were not read are dropped. Returns when the watching thread has released this
        iterator. If the iterator was the last one in its namespace, the netlink socket is closed
        and the thread is about to end. Raises nothing.

        *Cancellation*: the iterator is closed anyway, a little later.

        *Concurrency*: may be called by several tasks at once.
        """
        self._leave()
        if self._watcher is not None and self._watcher.loop is asyncio.get_running_loop():
            await self._watcher.ended()

    def __reduce__(self) -> NoReturn:
        raise TypeError("link events can't be copied or pickled; call link.events() again")

    def __del__(self) -> None:
        self._release()

    def _begin(self) -> Watcher:
        loop = asyncio.get_running_loop()
        if self._watcher is None:
            watcher = Watcher(loop, self._interface)
            self._hub = watch(self._namespace(), watcher)
            self._watcher = watcher
        elif self._watcher.loop is not loop:
            raise RuntimeError("these events belong to another event loop; call link.events() here")
        return self._watcher

    def _leave(self) -> None:
        self._closed = True
        self._release()

    def _release(self) -> None:
        """Tell the thread to release this; takes no lock, as the collector may call it anywhere."""
        hub, self._hub = self._hub, None
        if hub is not None and self._watcher is not None and not self._watcher.over:
            hub.leave(self._watcher)

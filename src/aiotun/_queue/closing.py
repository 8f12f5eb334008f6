"""Closing queues' fds: in a thread where a loop is running, as the last close takes about 15 ms."""

from __future__ import annotations

import abc
import asyncio
import errno
import os
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, Self

from .._kernel import threads

if TYPE_CHECKING:
    from types import TracebackType

    class Closable(Protocol):
        """What is needed of a queue."""

        closing: Closing | None

        @property
        def closed(self) -> bool: ...
        def release(self, why: str) -> int: ...


__all__ = ["AsyncClosing", "Closing", "close_queues", "running_loop"]


class AsyncClosing(abc.ABC):
    """What `async with` closes."""

    __slots__ = ()

    @abc.abstractmethod
    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class Closing:
    """fds that a thread is closing, which tasks of any event loop may wait for."""

    __slots__ = ("_done", "_fds", "_lock", "_waiting")

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = fds
        self._done = False
        self._lock = threading.Lock()
        self._waiting: list[asyncio.Future[None]] = []
        threads.start(lambda: _close_fds(fds), self._finish)

    async def wait(self) -> None:
        """Wait until the kernel is done.

        Cancellation: the fds are closed all the same.
        """
        over = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._done:
                return
            self._waiting.append(over)
        await over

    def _finish(self) -> None:
        with self._lock:
            self._done = True
            waiting, self._waiting = self._waiting, []
        for over in waiting:
            threads.finish(over.get_loop(), over)


def close_queues(queues: Iterable[Closable]) -> None:
    """Close what is still open of these queues, all in one thread where a loop is running."""
    still_open = [queue for queue in queues if not queue.closed]
    fds = [queue.release("was closed here; open the device again to go on") for queue in still_open]
    if running_loop() is None:
        _close_fds(fds)
    elif fds:
        closing = Closing(fds)
        for queue in still_open:
            queue.closing = closing


def _close_fds(fds: Iterable[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:  # somebody else closed it: then there is nothing to do
                raise


def running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

"""Run a function in a short-lived thread, inside a network namespace if asked.

The kernel records the network namespace per thread, and only a thread that ends right afterwards
may enter another one: if the event loop's thread did, it would take the whole program along, and a
thread of a pool would run the next function in the wrong namespace. A new thread starts in the
namespace of the thread that started it.
"""

import asyncio
import contextlib
import errno
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from ..errors import ResourceLimitError
from . import places
from .limits import limit_error, naming_limits
from .namespaces import (
    NamespaceFd,
    NetnsArg,
    open_netns,
    setns,
    setns_always,
    staying,
)

__all__ = ["finish", "run", "run_blocking", "run_in", "start", "start_thread"]

T = TypeVar("T")

_BEGINS_WITHIN = 1.0  # seconds; a thread that was started begins at once


class _Outcome(Generic[T]):
    """The value that a function in a thread returned, or the error that it raised."""

    __slots__ = ("error", "value")

    def __init__(self) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None

    def fill(self, function: Callable[[], T], netns: int | None) -> None:
        """Run the function in that namespace, and store what it returns or raises."""
        try:
            if netns is not None:
                setns(netns)
            # If file descriptors run out, even an import fails, with a plain OSError.
            with naming_limits():
                self.value = function()
        except BaseException as error:  # noqa: BLE001 - get() raises it, in the waiting thread
            self.error = error

    def get(self) -> T:
        """Return the value or raise the error. Call this once."""
        if self.error is not None:
            # The error's traceback references this frame. If this frame kept a reference to the
            # error, the two would be a reference cycle, and what the caller's frames hold (a
            # namespace's fd) would stay open until the collector runs.
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error
        value, self.value = self.value, None  # drop our reference to it
        return cast(T, value)


# The outcomes that a thread has delivered and the waiting task has not yet taken. If the loop is
# closed, the waiting task becomes garbage. Without this reference the collector could close the
# result's namespace fd before `undo` runs.
_in_transit: set[_Outcome[Any]] = set()


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        ResourceLimitError: the limit on threads is reached (EAGAIN).
    """
    try:
        thread.start()
    except RuntimeError as error:
        # Drop the traceback: its frames reference the thread, and so all that its function holds.
        cause = error.with_traceback(None)
        raise limit_error(errno.EAGAIN) from cause


def run_blocking(
    function: Callable[[], T],
    netns: int | None = None,
    *,
    on_cancel: Callable[[], None] | None = None,
    undo: Callable[[T], None] | None = None,
) -> T:
    """Run a function in a short-lived thread, and block until it returns.

    If a signal's handler raises meanwhile (Ctrl-C raises KeyboardInterrupt), this calls
    `on_cancel`, waits for the function, and calls `undo` with its value in another thread.

    Raises:
        ResourceLimitError: no thread can be started.
        Exception: whatever the function raises.
    """
    outcome: _Outcome[T] = _Outcome()
    # Not Thread.join: if an exception interrupts it, CPython 3.11 takes the thread for ended.
    begun, over = threading.Event(), threading.Event()

    def body() -> None:
        begun.set()
        try:
            outcome.fill(function, netns)
        finally:
            over.set()

    thread = threading.Thread(target=body, name="aiotun")
    try:
        start_thread(thread)
        over.wait()
    except ResourceLimitError:  # of start_thread
        raise
    except BaseException:
        # It may have come in the middle of start_thread: then the thread begins now, or never.
        if not _wait_through(begun, _BEGINS_WITHIN):
            raise
        if on_cancel is not None:
            on_cancel()
        _wait_through(over)
        if undo is not None and outcome.error is None:
            value, give_up = outcome.get(), undo
            run_blocking(lambda: give_up(value))
        raise
    thread.join()
    return outcome.get()


def _wait_through(event: threading.Event, seconds: float = math.inf) -> bool:
    """Wait for an event, whatever comes: a second Ctrl-C must not leave work half undone.

    Returns:
        Whether it came within these seconds.
    """
    end = time.monotonic() + seconds
    while not event.is_set() and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(BaseException):  # the first one is raised when all is undone
            event.wait(min(left, threading.TIMEOUT_MAX))
    return event.is_set()


def _run_here(function: Callable[[], None]) -> None:
    """Run a function in the calling thread, although it was written for a short-lived one.

    This blocks the event loop that runs in the calling thread. So it is only for what must be done
    even if no thread can be started, such as undoing a step. The function may run an event loop of
    its own and enter another network namespace; afterwards this returns the thread to its own
    namespace. If the kernel would not let the thread return, `setns` raises NotPermittedError in
    the function.
    """
    here: NamespaceFd | None = None
    try:
        here = NamespaceFd(open_netns(None))
        # This does not move the thread, but it needs the same privilege as coming back does.
        setns_always(here.fd)
    except (OSError, ImportError):  # ImportError: no file descriptor is left to import ctypes
        staying.on = True
    # asyncio can't run a loop in a thread where another one is running. So hide the running one.
    loop = asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    if loop is not None and task is not None:
        asyncio._leave_task(loop, task)
    asyncio._set_running_loop(None)
    try:
        function()
    finally:
        asyncio._set_running_loop(loop)
        if loop is not None and task is not None:
            asyncio._enter_task(loop, task)
        staying.on = False
        places.stand(None)
        if here is not None:
            setns(here.fd)


def start(function: Callable[[], None], then: Callable[[], None]) -> None:
    """Run `function` and then `then` in a short-lived thread, without waiting for either.

    The thread is not a daemon thread: at exit the interpreter waits for it. If no thread can be
    started (the limit is reached, or the interpreter is exiting), both run in the calling thread,
    which they block, and this raises what they raise.
    """

    def body() -> None:
        try:
            function()
        finally:
            then()

    try:
        start_thread(threading.Thread(target=body, name="aiotun"))
    except ResourceLimitError:
        _run_here(body)


def finish(loop: asyncio.AbstractEventLoop, over: asyncio.Future[None]) -> bool:
    """Resolve a future of an event loop from another thread.

    Returns:
        False if the loop is closed. Then no task of the loop waits for the future any more.
    """

    def resolve() -> None:
        if not over.done():
            over.set_result(None)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:
        return False
    return True


async def run(
    function: Callable[[], T],
    netns: int | None = None,
    *,
    on_cancel: Callable[[], None] | None = None,
    undo: Callable[[T], None] | None = None,
    or_here: bool = False,
) -> T:
    """Run a function in a short-lived thread and wait for it.

    Args:
        function: called without arguments. This returns what it returns, and raises what it raises.
        netns: an open namespace fd. The thread enters this namespace first.
        on_cancel: called in this thread as soon as the waiting task is cancelled, so that it can
            tell the function to stop.
        undo: called with the function's value, in a thread, if the value can't be delivered any
            more. It runs in this thread if no other can be started. What it raises goes to the
            loop's exception handler.
        or_here: whether the function runs in this thread if no other can be started.

    Raises:
        ResourceLimitError: no thread can be started (EAGAIN), or the function ran out of file
            descriptors or memory.

    Cancellation: a system call in another thread can't be interrupted. So this waits until the
    thread is done, calls `undo` with the value, and only then raises CancelledError.
    """
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    outcome: _Outcome[T] = _Outcome()
    handing_over = threading.Lock()
    # `wanted`: the task still waits for the outcome. `delivered`: the thread has resolved `over`.
    wanted, delivered = True, False

    def undo_value() -> None:
        if undo is not None and outcome.error is None:
            undo(outcome.get())

    def body() -> None:
        nonlocal function, delivered
        outcome.fill(function, netns)
        del function  # release what the function holds now, not when this thread ends
        with handing_over:
            if wanted:
                _in_transit.add(outcome)  # first: the task may take the outcome at once
                delivered = finish(loop, over)
        if not delivered:
            _in_transit.discard(outcome)
            undo_value()

    try:
        start_thread(threading.Thread(target=body, name="aiotun"))
    except ResourceLimitError:
        if not or_here:
            raise
        _run_here(body)
    cancelled: asyncio.CancelledError | None = None
    while not over.done():
        try:
            await asyncio.shield(over)
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
        except GeneratorExit:  # the loop was closed, and the collector destroys the task
            with handing_over:
                wanted = False
            if delivered:
                start(undo_value, lambda: _in_transit.discard(outcome))
            raise
    _in_transit.discard(outcome)
    if cancelled is None:
        return outcome.get()
    if undo is not None and outcome.error is None:
        try:
            await run(undo_value, netns, or_here=True)
        except Exception as error:  # noqa: BLE001 - the caller must get its CancelledError
            message = "aiotun could not undo a cancelled request"
            loop.call_exception_handler({"message": message, "exception": error})
    raise cancelled


async def run_in(
    netns: NetnsArg | None,
    function: Callable[[], T],
    *,
    undo: Callable[[T], None] | None = None,
) -> T:
    """Run a function as `run` does, in a namespace that is given as users give it.

    Args:
        netns: a name, a path, an open fd, or None for the calling thread's namespace.
        function: as for `run`.
        undo: as for `run`; called in that namespace, too.

    Raises:
        LinkError: the namespace does not exist.
        NotPermittedError: this thread has no permission to enter it.
        ResourceLimitError: as for `run`.

    Cancellation: as for `run`.
    """
    # In a list, so that we can drop the reference below. Otherwise the traceback of an error would
    # keep the namespace open for as long as the error exists.
    held = [NamespaceFd(open_netns(netns))]
    fd = held[0].fd

    def inside(held: list[NamespaceFd] = held) -> tuple[T, list[NamespaceFd]]:
        # Return the namespace with the value, so that `_in_transit` keeps both.
        return function(), held

    def take_back(outcome: tuple[T, list[NamespaceFd]]) -> None:
        setns(fd)  # the thread in which `run` calls this may be in another namespace
        if undo is not None:
            undo(outcome[0])

    try:
        value, _ = await run(inside, fd, undo=take_back)
    except (Exception, asyncio.CancelledError):  # not GeneratorExit: the thread may still run then
        held.clear()
        raise
    return value

"""Runs a function in a short-lived thread, inside a network namespace if asked.

A network namespace belongs to a thread. Only a thread that ends right afterwards may change it:
the event loop's own thread would take the whole program along, and a pool's thread would surprise
whoever runs there next. A fresh thread starts in the namespace of the thread that starts it.
"""

import asyncio
import errno
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from ..errors import ResourceLimitError
from . import places
from .limits import limit_error, naming_limits
from .namespaces import (
    NamespaceFd,
    NetnsArg,
    _setns,
    _staying,
    open_netns,
    setns,
)

__all__ = ["finish", "run", "run_blocking", "run_in", "start", "start_thread"]

T = TypeVar("T")


class _Outcome(Generic[T]):
    """What a function in its thread came to: a value or an error."""

    __slots__ = ("error", "value")

    def __init__(self) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None

    def fill(self, function: Callable[[], T], netns: int | None) -> None:
        """Run the function, in that namespace, and keep what it gives or raises."""
        try:
            if netns is not None:
                setns(netns)
            # Where file descriptors run out even an import fails, with a plain OSError.
            with naming_limits():
                self.value = function()
        except BaseException as error:  # noqa: BLE001 - raised again by get(), in its own thread
            self.error = error

    def get(self) -> T:
        if self.error is not None:
            # Its traceback will hold this frame: without letting go of it here the two would be a
            # ring, and what the caller's frames hold (a namespace's fd) would wait for the
            # collector.
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error
        value, self.value = self.value, None  # taken once, and not held here any longer
        return cast(T, value)


# Values between a thread and the task that waits for them. A task whose loop was closed is garbage
# together with all that only it knows, and the collector would close a value's namespace before the
# task could say that nobody wants it.
_in_transit: set[_Outcome[Any]] = set()


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        ResourceLimitError: none can be started any more (EAGAIN).
    """
    try:
        thread.start()
    except RuntimeError as error:
        # Without its traceback, whose frames hold the thread and so all that its function holds.
        cause = error.with_traceback(None)
        raise limit_error(errno.EAGAIN) from cause


def run_blocking(function: Callable[[], T], netns: int | None = None) -> T:
    """Run a function in a short-lived thread and wait for it without an event loop.

    Raises:
        ResourceLimitError: no thread can be started; and what the function raises.
    """
    outcome: _Outcome[T] = _Outcome()
    thread = threading.Thread(target=outcome.fill, args=(function, netns), name="aiotun")
    start_thread(thread)
    thread.join()
    return outcome.get()


def _run_here(function: Callable[[], None]) -> None:
    """Run a function in the calling thread although it was written for a short-lived one.

    Only for what must be done at all costs when no thread can be started: it blocks the event loop
    whose thread this is. The function may run an event loop of its own, and may enter another
    network namespace. This thread comes back from there; where the kernel would not let it come
    back, `setns` raises NotPermittedError instead.
    """
    here: NamespaceFd | None = None
    try:
        here = NamespaceFd(open_netns(None))
        _setns(here.fd)  # stays where it is, but takes the privilege that coming back takes
    except (OSError, ImportError):  # ImportError: ctypes, when file descriptors are short too
        _staying.here = True
    # asyncio refuses to run a loop in a thread where one is running already.
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
        _staying.here = False
        places.stand(None)
        if here is not None:
            setns(here.fd)


def start(function: Callable[[], None], then: Callable[[], None]) -> None:
    """Run a function in a short-lived thread, then `then` in the same thread; wait for neither.

    The thread is no daemon: the interpreter waits for it at its end. Where no thread can be
    started (there are too many, or the interpreter is ending), both run here and now, for as long
    as that takes, and this raises what they raise.
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
        Whether the loop takes it. If not, it was closed meanwhile, and nothing waits in it.
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
        function: called without arguments; what it gives or raises comes out here.
        netns: an open namespace fd which the thread enters first.
        on_cancel: called here, at once, when the waiting task is cancelled: a word to the function.
        undo: called in a thread with the function's value where that can't be delivered any more;
            where no thread can be started, in this one. What it raises goes to the loop's exception
            handler.
        or_here: whether the function runs in this thread where no other can be started.

    Raises:
        ResourceLimitError: no thread can be started (EAGAIN), or something else ran out.

    Cancellation: a system call in another thread can't be interrupted, so this waits until the
    thread is done, undoes what it gave, and only then lets the cancellation through.
    """
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    outcome: _Outcome[T] = _Outcome()
    handing_over = threading.Lock()
    # Whether the loop will see to the value; and if so, whether the thread has told it.
    wanted, told = True, False

    def drop() -> None:
        if undo is not None and outcome.error is None:
            undo(outcome.get())

    def body() -> None:
        nonlocal function, told
        outcome.fill(function, netns)
        del function  # what it holds must not have to wait until this thread has ended
        with handing_over:
            if wanted:
                _in_transit.add(outcome)  # before: the task may have it at once
                told = finish(loop, over)
        if not told:
            _in_transit.discard(outcome)
            drop()

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
        except GeneratorExit:  # the loop was closed, and the task is thrown away
            with handing_over:
                wanted = False
            if told:
                start(drop, lambda: _in_transit.discard(outcome))
            raise
    _in_transit.discard(outcome)
    if cancelled is None:
        return outcome.get()
    if undo is not None and outcome.error is None:
        try:
            await run(drop, netns, or_here=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, this stays a cancellation
            message = "aiotun could not undo what was cancelled"
            loop.call_exception_handler({"message": message, "exception": error})
    raise cancelled


async def run_in(
    netns: NetnsArg | None,
    function: Callable[[], T],
    *,
    undo: Callable[[T], None] | None = None,
) -> T:
    """Run a function as `run` does, in a namespace as users name one.

    Args:
        netns: a name, a path, an open fd, or None for the calling thread's namespace.
        function: as for `run`.
        undo: as for `run`, in that namespace too.

    Raises:
        LinkError: there is no such namespace.
        NotPermittedError: it may not be entered.
        ResourceLimitError: as for `run`.

    Cancellation: as for `run`.
    """
    # In a list, to be let go of: an error's traceback would keep it for as long as anybody has one.
    held = [NamespaceFd(open_netns(netns))]
    fd = held[0].fd

    def inside(held: list[NamespaceFd] = held) -> tuple[T, list[NamespaceFd]]:
        # The namespace comes with the value: see `_in_transit`.
        return function(), held

    def take_back(outcome: tuple[T, list[NamespaceFd]]) -> None:
        setns(fd)  # `run` may call this in a thread that is anywhere
        if undo is not None:
            undo(outcome[0])

    try:
        value, _ = await run(inside, fd, undo=take_back)
    except (Exception, asyncio.CancelledError):  # not GeneratorExit: there the thread may go on
        held.clear()
        raise
    return value

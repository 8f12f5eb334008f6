"""Runs a function in a short-lived thread, inside a network namespace if asked.

A network namespace belongs to a thread. Only a thread that ends right afterwards may change it:
the event loop's own thread would take the whole program along, and a pool's thread would surprise
whoever runs there next. A fresh thread starts in the namespace of the thread that starts it.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from .errors import LinkError, NotPermittedError

__all__ = [
    "Namespace",
    "NetnsArg",
    "check_netns",
    "finish",
    "open_netns",
    "run",
    "run_blocking",
    "run_in",
    "same_namespace",
    "setns",
    "start",
]

T = TypeVar("T")

NetnsArg = str | os.PathLike[str] | int
"""A namespace as users name one: a name under /run/netns, a path, or an open fd."""

# sched.h
_CLONE_NEWNET = 0x4000_0000


def check_netns(netns: object) -> None:
    """Check a namespace as users name one, before anything is opened.

    Raises:
        TypeError, ValueError: it can't be one.
    """
    if isinstance(netns, bool) or not isinstance(netns, str | int | os.PathLike | None):
        raise TypeError(f"netns is a name, a path, an open fd or None, not {netns!r}")
    if isinstance(netns, int):
        if netns < 0:
            raise ValueError(f"netns={netns} is no fd; give an open one, a name or a path")
    elif netns is not None and (not os.fspath(netns) or "\0" in os.fspath(netns)):
        raise ValueError(f"netns={netns!r} is no name or path; name one under /run/netns")


def open_netns(netns: NetnsArg | None) -> int:
    """Open a namespace and give the fd, which is the caller's to close.

    Args:
        netns: a name under /run/netns, a path, an open fd (which is duplicated), or None for the
            calling thread's own.

    Raises:
        LinkError: there is none; it is never created.
        NotPermittedError: it may not be opened.
    """
    if isinstance(netns, int):
        try:
            return os.dup(netns)
        except OSError as error:
            text = f"netns {netns} is no open fd: {error.strerror}; give one that is"
            raise LinkError(error.errno, text) from error
    if netns is None:
        path = "/proc/thread-self/ns/net"
    else:
        path = os.fspath(netns)
        if "/" not in path:
            path = f"/run/netns/{path}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise NotPermittedError(
            error.errno, f"the network namespace {path} may not be opened: {error.strerror}", path
        ) from error
    except OSError as error:
        raise LinkError(
            error.errno,
            f"there is no network namespace {path}; create it first, with 'ip netns add'",
            path,
        ) from error


class Namespace:
    """An open network namespace, closed when nobody holds it any more.

    Apart from what uses it, so that a request under way keeps it open where its asker has gone.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd: int = fd  # owned from here on

    # The function is bound here: at the interpreter's end the module may be empty already.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace that `fd` stands for.

    Where it is there already nothing is done: that would take CAP_SYS_ADMIN all the same, and what
    only looks around needs no privilege at all.

    Raises:
        LinkError: `fd` is no network namespace.
        NotPermittedError: the thread lacks CAP_SYS_ADMIN there or here.
    """
    here, there = os.stat("/proc/thread-self/ns/net"), os.fstat(fd)
    if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
        return
    try:
        _setns(fd)
    except PermissionError as error:
        raise NotPermittedError(
            error.errno,
            "entering another network namespace needs CAP_SYS_ADMIN in it and here; "
            "run as root, or start the whole program inside it",
        ) from error
    except OSError as error:
        raise LinkError(error.errno, f"fd {fd} is not a network namespace") from error


def _setns(fd: int) -> None:
    if hasattr(os, "setns"):  # Python 3.12
        os.setns(fd, _CLONE_NEWNET)
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


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
        return cast(T, self.value)


# Values between a thread and the task that waits for them. A task whose loop was closed is garbage
# together with all that only it knows, and the collector would close a value's namespace before the
# task could say that nobody wants it.
_in_transit: set[_Outcome[Any]] = set()


def run_blocking(function: Callable[[], T], netns: int | None = None) -> T:
    """Run a function in a short-lived thread and wait for it without an event loop."""
    outcome: _Outcome[T] = _Outcome()
    thread = threading.Thread(target=outcome.fill, args=(function, netns), name="aiotun")
    thread.start()
    thread.join()
    return outcome.get()


def start(function: Callable[[], None], then: Callable[[], None]) -> None:
    """Run a function in a short-lived thread, then `then` in the same thread; wait for neither.

    The thread is no daemon: the interpreter waits for it at its end. Where no thread can be
    started any more, both run here and now.
    """

    def body() -> None:
        try:
            function()
        finally:
            then()

    try:
        threading.Thread(target=body, name="aiotun").start()
    except RuntimeError:  # too many threads, or the interpreter is ending
        body()


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
) -> T:
    """Run a function in a short-lived thread and wait for it.

    Args:
        function: called without arguments; what it gives or raises comes out here.
        netns: an open namespace fd which the thread enters first.
        on_cancel: called here, at once, when the waiting task is cancelled: a word to the function.
        undo: called in a thread with the function's value where that can't be delivered any more.

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

    threading.Thread(target=body, name="aiotun").start()
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
        value, undone = outcome.get(), undo
        await run(lambda: undone(value), netns)
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

    Cancellation: as for `run`.
    """
    # In a list, to be let go of: an error's traceback would keep it for as long as anybody has one.
    held = [Namespace(open_netns(netns))]
    fd = held[0].fd

    def inside(held: list[Namespace] = held) -> tuple[T, list[Namespace]]:
        # The namespace comes with the value: see `_in_transit`.
        return function(), held

    def take_back(outcome: tuple[T, list[Namespace]]) -> None:
        setns(fd)  # `run` may call this in a thread that is anywhere
        if undo is not None:
            undo(outcome[0])

    try:
        value, _ = await run(inside, fd, undo=take_back)
    except (Exception, asyncio.CancelledError):  # not GeneratorExit: there the thread may go on
        held.clear()
        raise
    return value


def same_namespace(one: int, other: int) -> bool:
    """Whether two open fds stand for the same namespace."""
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)

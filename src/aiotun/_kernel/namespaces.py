"""Network namespaces: how users name one, and how a thread enters one."""

import errno
import os
import threading
from collections.abc import Callable
from typing import Protocol

from ..errors import LinkError, NotPermittedError
from . import places
from .limits import LIMITS, naming_limits

__all__ = [
    "NamespaceFd",
    "NetnsArg",
    "check_netns",
    "is_here",
    "open_netns",
    "same_namespace",
    "setns",
]


class _HasFileno(Protocol):
    """A `Namespace`, or an open file."""

    def fileno(self) -> int: ...


NetnsArg = str | os.PathLike[str] | int | _HasFileno
"""A namespace as users name one: a `Namespace`, a name under /run/netns, a path, or an open fd."""

# Its attribute `here` is True in a thread that must not enter another namespace; see `_run_here`.
_staying = threading.local()

# sched.h
_CLONE_NEWNET = 0x4000_0000

_MAX_FD = 0x7FFF_FFFF  # a C int


def check_netns(netns: object) -> None:
    """Check a namespace as users name one, before anything is opened.

    Raises:
        TypeError, ValueError: it can't be one.
    """
    if hasattr(netns, "fileno"):
        return
    if isinstance(netns, bool) or not isinstance(netns, str | int | os.PathLike | None):
        raise TypeError(f"netns is a name, a path, an open fd or None, not {netns!r}")
    if isinstance(netns, int):
        if not 0 <= netns <= _MAX_FD:
            raise ValueError(f"netns={netns} is no fd; give an open one, a name or a path")
    elif netns is not None:
        path = os.fspath(netns)
        if not isinstance(path, str):
            raise TypeError(f"netns is a name, a path, an open fd or None, not {netns!r}")
        try:
            if path and "\0" not in path and os.fsencode(path):
                return
        except UnicodeEncodeError:  # a surrogate that stands for no byte
            pass
        raise ValueError(f"netns={netns!r} is no name or path; name one under /run/netns")


def open_netns(netns: NetnsArg | None) -> int:
    """Open a namespace and give the fd, which is the caller's to close.

    Args:
        netns: a `Namespace`, a name under /run/netns, a path, an open fd (which is duplicated), or
            None for the calling thread's own.

    Raises:
        LinkError: there is none (it is never created), or the `Namespace` was closed.
        NotPermittedError: it may not be opened.
        ResourceLimitError: no file descriptor is left.
    """
    with naming_limits("could not open a network namespace"):
        return _open_netns(netns)


def _open_netns(netns: NetnsArg | None) -> int:
    if not isinstance(netns, str | os.PathLike | int | None):
        netns = netns.fileno()
        if netns < 0:
            text = "the network namespace was closed; make another, or keep it open for longer"
            raise LinkError(errno.ESHUTDOWN, text)
    if isinstance(netns, int):
        try:
            return os.dup(netns)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
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
        if error.errno in LIMITS:
            raise  # `open_netns` says so
        raise LinkError(
            error.errno,
            f"there is no network namespace {path}; create it first, with 'ip netns add'",
            path,
        ) from error


class NamespaceFd:
    """An open network namespace, closed when nobody holds it any more.

    Apart from what uses it, so that a request under way keeps it open where its asker has gone.

    Attributes:
        fd: its fd.
        helper: what makes sockets there, where a thread can't enter it; see `places.serving`.
    """

    __slots__ = ("fd", "helper")

    def __init__(self, fd: int) -> None:
        self.fd: int = fd  # owned from here on
        self.helper: places.Place | None = places.serving(fd)

    # The function is bound here: at the interpreter's end the module may be empty already.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace that `fd` stands for.

    Where a helper process serves the namespace, the thread stays where it is, and makes its sockets
    by the helper from now on (`places`).

    Where it is there already nothing is done: that would take CAP_SYS_ADMIN all the same, and what
    only looks around needs no privilege at all.

    Raises:
        LinkError: `fd` is no network namespace.
        NotPermittedError: the thread lacks CAP_SYS_ADMIN there or here.
    """
    helper = places.serving(fd)
    places.stand(helper)
    if helper is not None:
        return
    if is_here(fd):
        return
    if getattr(_staying, "here", False):
        text = "this thread could not come back from another network namespace, so it stays here"
        raise NotPermittedError(errno.EPERM, f"{text}; run as root")
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


def is_here(fd: int) -> bool:
    """Whether the calling thread is in the namespace that an open fd stands for."""
    here, there = os.stat("/proc/thread-self/ns/net"), os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def same_namespace(one: int, other: int) -> bool:
    """Whether two open fds stand for the same namespace."""
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)

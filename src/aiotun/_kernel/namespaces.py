"""Network namespaces: how users name one, and how a thread enters one.

The `netns` argument of the public functions is a name under /run/netns, a path, or an open fd.
"""

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
    "setns_always",
    "staying",
]


class _HasFileno(Protocol):
    """A `Namespace`, or an open file."""

    def fileno(self) -> int: ...


NetnsArg = str | os.PathLike[str] | int | _HasFileno
"""A namespace as users name one: a `Namespace`, a name under /run/netns, a path, or an open fd."""

# Its attribute `on` is True in a thread that must not enter another namespace, because the kernel
# would not let it come back; see `threads._run_here`.
staying = threading.local()

# sched.h
_CLONE_NEWNET = 0x4000_0000

_OWN = "/proc/thread-self/ns/net"

_MAX_FD = 0x7FFF_FFFF  # a C int


def _no_netns(netns: object) -> TypeError:
    return TypeError(
        f"netns must be a Namespace, a name, a path, an open fd or None, got {netns!r}"
    )


def check_netns(netns: object) -> None:
    """Check a `netns` argument, without opening anything.

    Raises:
        TypeError, ValueError: the argument can't be a namespace.
    """
    if hasattr(netns, "fileno"):
        return
    if isinstance(netns, bool) or not isinstance(netns, str | int | os.PathLike | None):
        raise _no_netns(netns)
    if isinstance(netns, int):
        if not 0 <= netns <= _MAX_FD:
            raise ValueError(f"netns={netns} is not a valid fd; pass an open fd, a name or a path")
    elif netns is not None:
        path = os.fspath(netns)
        if not isinstance(path, str):
            raise _no_netns(netns)
        try:
            if path and "\0" not in path and os.fsencode(path):
                return
        except UnicodeEncodeError:  # a surrogate that does not stand for a byte
            pass
        raise ValueError(
            f"netns={netns!r} is not a valid name or path; use a name that 'ip netns' lists"
        )


def open_netns(netns: NetnsArg | None) -> int:
    """Open a namespace and return its fd, which the caller must close.

    Args:
        netns: a `Namespace`, a name under /run/netns, a path, an open fd (which is duplicated), or
            None for the calling thread's own namespace.

    Raises:
        LinkError: the namespace does not exist (it is not created), the path is something else,
            the fd is not open, or the `Namespace` was closed.
        NotPermittedError: this user has no permission to open it.
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
            text = f"netns={netns} is not an open fd; pass one that is open, a name or a path"
            raise LinkError(error.errno, text) from error
    if netns is None:
        return _open_path(_OWN)
    path = os.fspath(netns)
    return _open_path(path if "/" in path else f"/run/netns/{path}")


def _open_path(path: str) -> int:
    nsfs = os.stat(_OWN).st_dev  # all namespaces are files of one filesystem
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise _no_permission(path, error) from error
    except OSError as error:
        if error.errno in LIMITS:
            raise  # open_netns turns it into a ResourceLimitError
        raise LinkError(
            error.errno,
            f"there is no network namespace {path}; create it first, with 'ip netns add'",
            path,
        ) from error
    if os.fstat(fd).st_dev == nsfs:
        return fd
    os.close(fd)
    try:
        os.readlink(path)
    except PermissionError as error:
        # Before Linux 5.11, a process of another user gives an empty folder here, and no error.
        raise _no_permission(path, error) from error
    except OSError:
        pass  # a file, which is no link
    text = f"{path} is not a network namespace; create one with 'ip netns add'"
    raise LinkError(errno.EINVAL, text, path)


def _no_permission(path: str, error: OSError) -> NotPermittedError:
    text = f"this user has no permission to open the network namespace {path}; run as root"
    return NotPermittedError(error.errno, text, path)


class NamespaceFd:
    """The fd of a network namespace, which is closed with the last reference to this object.

    A request in a thread holds a reference. So the fd stays open until the request ends, even if
    the link or the device that made the request is gone.

    Attributes:
        fd: the namespace's fd.
        helper: what makes sockets in a namespace that a thread can't enter; see `places.serving`.
    """

    __slots__ = ("fd", "helper")

    def __init__(self, fd: int) -> None:
        self.fd: int = fd  # owned by this object from now on
        self.helper: places.Place | None = places.serving(fd)

    # os.close is bound as a default: when the interpreter exits, the module may be empty already.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace that `fd` stands for.

    If a helper process serves the namespace, the thread stays where it is, and from now on the
    helper makes its sockets (`places`).

    If the thread is in that namespace already, this makes no system call: setns(2) would need
    CAP_SYS_ADMIN even then, and a request that only reads must work without any privilege.

    Raises:
        LinkError: `fd` is not a network namespace.
        NotPermittedError: the thread lacks CAP_SYS_ADMIN in that namespace or in its own.
    """
    helper = places.serving(fd)
    places.stand(helper)
    if helper is not None:
        return
    if is_here(fd):
        return
    if getattr(staying, "on", False):
        raise NotPermittedError(
            errno.EPERM,
            "this thread can't enter another network namespace, because it could not come back; "
            "run as root",
        )
    try:
        setns_always(fd)
    except PermissionError as error:
        raise NotPermittedError(
            error.errno,
            "entering another network namespace needs CAP_SYS_ADMIN in it and here; "
            "run as root, or start the whole program inside it",
        ) from error
    except OSError as error:
        raise LinkError(error.errno, f"fd {fd} is not a network namespace") from error


def setns_always(fd: int) -> None:
    """Call setns(2), even if the thread is in that namespace already.

    Raises:
        OSError: the system call failed.
    """
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
    here, there = os.stat(_OWN), os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def same_namespace(one: int, other: int) -> bool:
    """Return whether two open fds stand for the same namespace."""
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)

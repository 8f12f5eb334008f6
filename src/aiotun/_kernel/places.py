"""Where a thread makes its sockets and opens its files.

Most threads do it themselves, in the network namespace that they are in. A thread of an ordinary
user can't enter a namespace that belongs to a user namespace, because joining a user namespace
takes a process with a single thread. A helper process in there makes the sockets instead, and
passes them. So "entering" such a namespace means to remember the helper, as the kernel would
remember the namespace: for this thread only.

Code that wants a socket in "its" namespace asks this module and need not know which it is.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from typing import Protocol

from .helper import own_sysfs

__all__ = [
    "Place",
    "here",
    "key_of",
    "make_socket",
    "make_sockets",
    "open_file",
    "serve",
    "served",
    "serving",
    "stand",
]

Key = tuple[int, int]
"""A namespace's device and inode numbers."""


class Place(Protocol):
    """What can make sockets and open files in one network namespace."""

    def make_sockets(self, family: int, kind: int, proto: int, count: int) -> list[socket.socket]:
        """Make sockets, close-on-exec: `count` of them, or fewer where descriptors run out.

        Raises:
            OSError: there is not even one.
            LinkError: this place has gone.
        """

    def open_file(self, path: str, flags: int) -> int:
        """Open a file whose content depends on the namespace; the fd is the caller's to close.

        Raises:
            OSError: open(2) failed.
            LinkError: this place has gone.
        """

    def open_sysfs(self, path: str, flags: int) -> int:
        """Open a file below /sys, which shows the namespace in which it was mounted.

        So it is mounted again, where nobody else sees it. The calling thread may have mounts of its
        own afterwards, so it must be one that ends soon. The fd is the caller's to close.

        Raises:
            OSError: mount(2) or open(2) failed.
            LinkError: this place has gone.
        """


class _Thread:
    """The calling thread itself."""

    def make_sockets(self, family: int, kind: int, proto: int, count: int) -> list[socket.socket]:
        made: list[socket.socket] = []
        try:
            for _ in range(count):
                made.append(socket.socket(family, kind, proto))  # noqa: PERF401 - kept on an error
        except OSError:
            if not made:
                raise
        return made

    def open_file(self, path: str, flags: int) -> int:
        return os.open(path, flags)

    def open_sysfs(self, path: str, flags: int) -> int:
        own_sysfs()
        return os.open(path, flags | os.O_CLOEXEC)


class _Local(threading.local):
    place: Place = _Thread()


_local = _Local()

# Namespaces that a helper serves. Weak: code that has such a namespace open holds its helper
# (`NamespaceFd`), and a helper keeps the namespace, so that its number is not given to another.
_served: weakref.WeakValueDictionary[Key, Place] = weakref.WeakValueDictionary()


def key_of(fd: int) -> Key:
    """Identify the namespace that an fd stands for."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def serve(fd: int, place: Place) -> None:
    """From now on let `place` serve the namespace that `fd` stands for."""
    _served[key_of(fd)] = place


def serving(fd: int) -> Place | None:
    """Give what serves the namespace that `fd` stands for; None where a thread has to enter it."""
    return _served.get(key_of(fd)) if _served else None


def served() -> list[Place]:
    """Give everything that serves a namespace."""
    return list(_served.values())


def stand(place: Place | None) -> None:
    """Have the calling thread use `place` from now on; None: the thread itself again."""
    _local.place = _Local.place if place is None else place


def make_socket(family: int, kind: int, proto: int = 0) -> socket.socket:
    """Make one socket where the calling thread stands; see `Place.make_sockets`."""
    return _local.place.make_sockets(family, kind, proto, 1)[0]


def make_sockets(family: int, kind: int, proto: int, count: int) -> list[socket.socket]:
    """Make sockets where the calling thread stands; see `Place.make_sockets`."""
    return _local.place.make_sockets(family, kind, proto, count)


def open_file(path: str, flags: int) -> int:
    """Open a file where the calling thread stands; see `Place.open_file`."""
    return _local.place.open_file(path, flags)


def here() -> Place:
    """Give the place where the calling thread stands, for another thread to use."""
    return _local.place

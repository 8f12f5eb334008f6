"""Where a thread makes its sockets and opens its files.

Usually a thread does this itself, in the network namespace that it is in. But a thread of an
ordinary user can't enter a namespace that belongs to a user namespace, because only a process with
a single thread may join a user namespace. Instead, a helper process in that namespace makes the
sockets and passes them to this program. "Entering" such a namespace means that this module
remembers the helper, for this thread only, just as the kernel remembers a thread's namespace.

Code that needs a socket in the thread's namespace calls this module, and works in both cases.
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
    """Makes sockets and opens files in one network namespace."""

    def make_sockets(self, family: int, kind: int, proto: int, count: int) -> list[socket.socket]:
        """Make `count` sockets, close-on-exec, or fewer if descriptors run out.

        Raises:
            OSError: not even one socket could be made.
            LinkError: the namespace's helper has ended.
        """

    def open_file(self, path: str, flags: int) -> int:
        """Open a file whose content depends on the namespace. The caller must close the fd.

        Raises:
            OSError: open(2) failed.
            LinkError: the namespace's helper has ended.
        """

    def open_sysfs(self, path: str, flags: int) -> int:
        """Open a file below /sys, as it is in this place's network namespace.

        /sys shows the network namespace in which it was mounted. So this mounts /sys again, in a
        private mount namespace. The calling thread may be in that mount namespace afterwards, so
        call this in a short-lived thread. The caller must close the fd.

        Raises:
            OSError: mount(2) or open(2) failed.
            LinkError: the namespace's helper has ended.
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

# Namespaces that a helper serves. The values are weak: a `NamespaceFd` of such a namespace holds
# its helper. The helper keeps the namespace open, so that the kernel can't reuse its inode number.
_served: weakref.WeakValueDictionary[Key, Place] = weakref.WeakValueDictionary()


def key_of(fd: int) -> Key:
    """Return the key of the namespace that an fd refers to."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def serve(fd: int, place: Place) -> None:
    """Let `place` serve the namespace that `fd` refers to from now on."""
    _served[key_of(fd)] = place


def serving(fd: int) -> Place | None:
    """Return the helper of the namespace that `fd` refers to; None if threads can enter it."""
    return _served.get(key_of(fd)) if _served else None


def served() -> list[Place]:
    """Return all helpers."""
    return list(_served.values())


def stand(place: Place | None) -> None:
    """Have the calling thread use `place` from now on; None means its own namespace again."""
    _local.place = _Local.place if place is None else place


def make_socket(family: int, kind: int, proto: int = 0) -> socket.socket:
    """Make one socket in the calling thread's place; see `Place.make_sockets`."""
    return _local.place.make_sockets(family, kind, proto, 1)[0]


def make_sockets(family: int, kind: int, proto: int, count: int) -> list[socket.socket]:
    """Make sockets in the calling thread's place; see `Place.make_sockets`."""
    return _local.place.make_sockets(family, kind, proto, count)


def open_file(path: str, flags: int) -> int:
    """Open a file in the calling thread's place; see `Place.open_file`."""
    return _local.place.open_file(path, flags)


def here() -> Place:
    """Return the calling thread's place, for another thread to use."""
    return _local.place

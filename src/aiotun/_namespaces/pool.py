"""Sockets of one namespace, made a few at a time."""

from __future__ import annotations

import errno
import socket
import threading

from .._kernel import places, threads
from .._kernel.namespaces import NamespaceFd

__all__ = ["Pool"]

# How many sockets are made at once at most. A batch grows with the demand, so that a program that
# needs one socket does not hold thirty.
_BATCH_MAX = 32

# Kinds of sockets that receive nothing before they are bound or connected, so that they can be made
# in advance. A packet socket, for example, would have received packets before it is used.
_SILENT = {
    (family, kind, proto)
    for family in (socket.AF_INET, socket.AF_INET6)
    for kind, number in (
        (socket.SOCK_STREAM, socket.IPPROTO_TCP),
        (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    )
    for proto in (0, number)
}

Kind = tuple[int, int, int]


class Pool:
    """Makes sockets in a namespace, and keeps some ready.

    A request to the helper takes 30 us, and a thread that enters the namespace takes 100 us. Taking
    a socket that is ready takes 2 us.

    *Concurrency*: may be used in any thread and by any number of tasks.
    """

    def __init__(self) -> None:
        self._ready: dict[Kind, list[socket.socket]] = {}
        self._batch: dict[Kind, int] = {}
        self._lock = threading.Lock()  # held while sockets are made
        self._closed = False

    async def take(self, namespace: NamespaceFd, kind: Kind) -> socket.socket:
        """Return a socket.

        Raises:
            OSError: the kernel refuses.
            LinkError: the namespace's helper has ended.
        """
        if (ready := self._at_hand(kind)) is not None:
            return ready
        return await threads.run(
            lambda: self._make(kind), namespace.fd, undo=lambda made: made.close()
        )

    def take_blocking(self, namespace: NamespaceFd, kind: Kind) -> socket.socket:
        """Return a socket as `take` does. Blocks if the socket has to be made."""
        if (ready := self._at_hand(kind)) is not None:
            return ready
        return threads.run_blocking(
            lambda: self._make(kind), namespace.fd, undo=lambda made: made.close()
        )

    def _at_hand(self, kind: Kind) -> socket.socket | None:
        try:
            return self._ready[kind].pop()
        except LookupError:
            return None

    def _make(self, kind: Kind) -> socket.socket:
        if kind not in _SILENT:
            return _non_blocking(places.make_socket(*kind))
        with self._lock:
            ready = self._ready.setdefault(kind, [])
            if ready:  # another thread has made some meanwhile
                return ready.pop()
            count = self._batch.get(kind, 1)
            self._batch[kind] = min(count * 4, _BATCH_MAX)
            try:
                made = places.make_sockets(*kind, count)
            except OSError as error:
                self._batch[kind] = 1
                # The program has no free descriptor, but this pool may hold some that are not used.
                if error.errno != errno.EMFILE or not self._drain():
                    raise
                made = places.make_sockets(*kind, 1)
            first, *rest = (_non_blocking(each) for each in made)
            ready += rest
            if len(made) < count:  # descriptors have run out: release those that are not needed
                self._batch[kind] = 1
                self._drain()
        if self._closed:
            self._drain()
        return first

    def close(self) -> None:
        """Close the sockets that were not taken. Never waits."""
        self._closed = True
        self._drain()

    def _drain(self) -> bool:
        """Close the sockets that are ready; return whether there were any."""
        found = False
        for ready in list(self._ready.values()):
            while True:
                try:
                    ready.pop().close()
                except IndexError:
                    break
                found = True
        return found


def _non_blocking(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    return sock

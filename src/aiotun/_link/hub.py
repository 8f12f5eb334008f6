"""The thread that listens to rtnetlink: one a namespace, shared by all that watch links there.

It starts with the first watcher and ends with the last. It has no event loop: it reads a socket,
and tells watchers, each of which belongs to some event loop in some other thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from .._kernel import namespaces, threads
from .._kernel.limits import naming_limits
from ..errors import AiotunError, LinkError
from .netlink import in_session
from .watcher import Watcher, Which

if TYPE_CHECKING:
    from .monitor import Monitor
    from .session import Session
    from .state import Change, LinkState

__all__ = ["Hub", "watch"]

# How many datagrams are read before anything else is looked at.
_DATAGRAMS_AT_ONCE = 500

# An event loop that is closed tells nobody, so the thread looks for that now and then. It is also
# when it tries again what could not be looked up (the program had no file descriptor free).
_LOOK_AROUND_MS = 1000


class _Bell:
    """An eventfd, closed when nobody can ring it any more."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd: int = fd  # owned from here on

    # Bound here, as in `_kernel.namespaces.NamespaceFd`: at the interpreter's end the module
    # may be empty.
    def ring(self, write: Callable[[int, int], None] = os.eventfd_write) -> None:
        write(self.fd, 1)

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):  # nobody rang
            os.eventfd_read(self.fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


class Hub:
    """What one namespace's thread has to do. Made by `watch`."""

    def __init__(self, namespace: namespaces.NamespaceFd, key: tuple[int, int]) -> None:
        self._namespace: namespaces.NamespaceFd | None = namespace
        self._key = key
        self._bell = _Bell(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # Appended to by anybody. A deque and an eventfd need no lock: whoever leaves may do so in a
        # finalizer, which may run anywhere, in the middle of a locked section too.
        self._entering: deque[Watcher] = deque()
        self._leaving: deque[Watcher] = deque()
        # What follows is the thread's own.
        self._watchers: dict[int, list[Watcher]] = {}  # by the link's number
        self._missed = False  # messages, so that what is known may be out of date

    def enter(self, watcher: Watcher) -> None:
        self._entering.append(watcher)
        self._bell.ring()

    def leave(self, watcher: Watcher) -> None:
        self._leaving.append(watcher)
        self._bell.ring()

    def run(self) -> None:
        """Serve until nobody watches any more."""
        failure: BaseException | None = None
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - raised again where each watcher is awaited
            failure = error.with_traceback(None) if isinstance(error, AiotunError) else error
        # Already done by _serve, except after a failure. From here on nobody enters.
        with _hubs_lock:
            if _hubs.get(self._key) is self:
                del _hubs[self._key]
        self._namespace = None  # watchers that were told keep this object, but not what it held
        left = [each for group in self._watchers.values() for each in group]
        for watcher in [*left, *_take_all(self._entering), *_take_all(self._leaving)]:
            watcher.end(failure)
        failure = None  # or the error and this frame would be a ring, with all that they hold open

    def _serve(self) -> None:
        assert self._namespace is not None
        namespaces.setns(self._namespace.fd)
        # Imported here, in a thread: pyroute2 takes a hundred milliseconds the first time.
        from .monitor import Monitor

        monitor, gone = Monitor(), list[Watcher]()
        try:
            poll = select.poll()
            poll.register(monitor.fileno(), select.POLLIN)
            poll.register(self._bell.fd, select.POLLIN)
            while True:
                for watcher in gone:
                    watcher.end(None)
                poll.poll(_LOOK_AROUND_MS)
                self._bell.hush()
                gone = self._turn(monitor)
                if self._is_over():
                    break
        finally:
            monitor.close()
        for watcher in gone:  # now that nothing is open any more
            watcher.end(None)

    def _is_over(self) -> bool:
        if self._watchers:
            return False
        with _hubs_lock:  # within which `watch` enters
            if self._entering:
                return False
            del _hubs[self._key]
            return True

    def _turn(self, monitor: Monitor) -> list[Watcher]:
        """Read what there is, let watchers in and out, and give those that are out."""
        drained = self._receive(monitor)
        if self._missed and drained:
            self._catch_up()
        # Those who leave are taken first: each of them entered before, so that is not overlooked.
        gone = _take_all(self._leaving)
        self._let_in(_take_all(self._entering))
        present = [each for group in self._watchers.values() for each in group]
        gone += [each for each in present if each.loop.is_closed()]
        self._drop(gone)
        return gone

    def _receive(self, monitor: Monitor) -> bool:
        """Pass on what has come; whether that was all."""
        for _ in range(_DATAGRAMS_AT_ONCE):
            try:
                changes = monitor.receive(self._watchers)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._missed = True
                continue
            for change in changes:
                self._pass_on(change)
        return False

    def _pass_on(self, change: Change) -> None:
        for watcher in self._watchers.get(change.link, ()):
            watcher.note(change)
        if change.address is None and change.removed:
            self._watchers.pop(change.link, None)

    def _let_in(self, watchers: list[Watcher]) -> None:
        """Begin to watch.

        All that was changed before a watcher came has been read by now, so that it hears of nothing
        that it knows already. What is changed from now on waits in the socket, and what the look-up
        tells of it already is no change when it is read.
        """
        if not watchers:
            return
        try:
            states = _look_up({each.which: each.interface.name for each in watchers})
        except AiotunError as error:
            # Without the frames: this one holds `states`, and so they would be a ring.
            states = {each.which: error.with_traceback(None) for each in watchers}
        for watcher in watchers:
            state = states[watcher.which]
            if isinstance(state, AiotunError):
                watcher.end(state)
            else:
                watcher.begin(state)
                self._watchers.setdefault(state.info.index, []).append(watcher)

    def _catch_up(self) -> None:
        """Look all links up anew, after messages were lost.

        Only once the socket has been read empty: until then the kernel drops more without a word.
        """
        names: dict[Which, str] = {
            index: group[0].interface.name for index, group in self._watchers.items()
        }
        self._missed = False
        try:
            states = _look_up(names)
        except AiotunError as error:
            states = dict.fromkeys(names, error.with_traceback(None))  # as above
        for index, state in states.items():
            if not isinstance(state, AiotunError):
                for watcher in self._watchers[int(index)]:
                    watcher.update(state)
            elif isinstance(state, LinkError) and state.errno == errno.ENODEV:
                for watcher in self._watchers.pop(int(index)):
                    watcher.delete()
            else:  # too few file descriptors, say: try again later
                self._missed = True

    def _drop(self, watchers: Iterable[Watcher]) -> None:
        for watcher in watchers:
            group = self._watchers.get(watcher.index, [])
            if watcher in group:
                group.remove(watcher)
                if not group:
                    del self._watchers[watcher.index]


def _take_all(those: deque[Watcher]) -> list[Watcher]:
    """Empty a deque to which others append at the same time."""
    return [those.popleft() for _ in range(len(those))]


def _look_up(links: Mapping[Which, str]) -> dict[Which, LinkState | AiotunError]:
    """Look up links by their number or name.

    Args:
        links: number or name, and what to call it where there is none.

    Returns:
        What each is, or the error that looking it up came to.

    Raises:
        LinkError: netlink could not be asked.
    """
    from .state import state_of

    async def look(session: Session) -> dict[Which, LinkState | AiotunError]:
        found: dict[Which, LinkState | AiotunError] = {}
        addresses = await session.all_addresses()
        for which, name in links.items():
            try:
                info = await session.get(which, name)
            except AiotunError as error:
                # Without the frames, which hold all that is being looked up.
                found[which] = error.with_traceback(None)
            else:
                found[which] = state_of(info, addresses.get(info.index, []))
        return found

    return in_session(look)


# By the namespace's device and inode number. While a hub is here its thread is alive.
_hubs: dict[tuple[int, int], Hub] = {}
_hubs_lock = threading.Lock()


def _start_anew() -> None:
    """After a fork: the threads are the parent's, and so is who held the lock."""
    global _hubs_lock
    _hubs_lock = threading.Lock()
    _hubs.clear()


os.register_at_fork(after_in_child=_start_anew)


def watch(namespace: namespaces.NamespaceFd, watcher: Watcher) -> Hub:
    """Have a watcher told what happens to its link, by the namespace's thread.

    Raises:
        ResourceLimitError: no thread can be started, or no file descriptor is left.
    """
    status = os.fstat(namespace.fd)
    key = status.st_dev, status.st_ino
    with _hubs_lock:
        hub = _hubs.get(key)
        if hub is not None:
            hub.enter(watcher)
            return hub
        with naming_limits("could not watch links"):
            hub = Hub(namespace, key)
        hub.enter(watcher)
        # A daemon: the interpreter does not wait at its end for an iterator that nobody closed.
        threads.start_thread(threading.Thread(target=hub.run, name="aiotun-events", daemon=True))
        # After that has worked, and before the thread looks whether it is over.
        _hubs[key] = hub
        return hub

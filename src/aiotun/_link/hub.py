"""The thread that listens to rtnetlink: one for each namespace, shared by its watchers.

The thread starts with the first watcher and ends with the last. It has no event loop: it reads a
socket and notifies the watchers. Each watcher belongs to an event loop in another thread.
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

# How many datagrams are read before watchers may enter and leave.
_DATAGRAMS_AT_ONCE = 500

# How often the thread wakes up without being notified. Nothing notifies the thread when an event
# loop is closed, so it has to check. It also retries lookups that failed because the program had no
# free file descriptor.
_LOOK_AROUND = 1.0  # seconds


class _Bell:
    """An eventfd that wakes the thread up; closed when its last reference is gone."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd: int = fd  # owned from here on

    # os.eventfd_write is bound here because finalizers ring, and while the interpreter shuts down
    # the module's globals may be gone. `_kernel.namespaces.NamespaceFd` does the same.
    def ring(self, write: Callable[[int, int], None] = os.eventfd_write) -> None:
        write(self.fd, 1)

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):  # nobody rang
            os.eventfd_read(self.fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


class Hub:
    """The state and the work of one namespace's thread. Made by `watch`."""

    def __init__(self, namespace: namespaces.NamespaceFd, key: tuple[int, int]) -> None:
        self._namespace: namespaces.NamespaceFd | None = namespace
        self._key = key
        self._bell = _Bell(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # Any thread appends to these. A watcher may leave in a finalizer, which can run anywhere,
        # even while its thread holds a lock. So these are deques, which need no lock.
        self._entering: deque[Watcher] = deque()
        self._leaving: deque[Watcher] = deque()
        # Only the hub's thread uses what follows.
        self._watchers: dict[int, list[Watcher]] = {}  # by the link's index
        self._missed = False  # messages were lost, so the known states may be out of date

    def enter(self, watcher: Watcher) -> None:
        self._entering.append(watcher)
        self._bell.ring()

    def leave(self, watcher: Watcher) -> None:
        self._leaving.append(watcher)
        self._bell.ring()

    def run(self) -> None:
        """Serve until the last watcher has left."""
        failure: BaseException | None = None
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - raised again where each watcher is awaited
            failure = error.with_traceback(None) if isinstance(error, AiotunError) else error
        # After a failure `_serve` has not done this. From here on no watcher can enter.
        with _hubs_lock:
            if _hubs.get(self._key) is self:
                del _hubs[self._key]
        self._namespace = None  # iterators may keep this object alive; close the namespace now
        left = [each for group in self._watchers.values() for each in group]
        for watcher in [*left, *_take_all(self._entering), *_take_all(self._leaving)]:
            watcher.end(failure)
        # The error's traceback references this frame. Without this line they would be a reference
        # cycle, which keeps everything in the frame open.
        failure = None

    def _serve(self) -> None:
        assert self._namespace is not None
        namespaces.setns(self._namespace.fd)
        # Imported here, in the hub's thread: importing pyroute2 takes about a hundred milliseconds.
        from .monitor import Monitor

        monitor, gone = Monitor(), list[Watcher]()
        with contextlib.ExitStack() as ending:
            ending.callback(monitor.close)
            # Not poll(2): it fails with EINVAL while RLIMIT_NOFILE is 0, as some sandboxes set it.
            with naming_limits("could not wait for events"):
                poll = ending.enter_context(select.epoll())
            poll.register(monitor.fileno(), select.EPOLLIN)
            poll.register(self._bell.fd, select.EPOLLIN)
            while True:
                for watcher in gone:
                    watcher.end(None)
                poll.poll(_LOOK_AROUND)
                self._bell.hush()
                gone = self._turn(monitor)
                if self._is_over():
                    break
        for watcher in gone:  # only now: `aclose` promises that the socket is closed
            watcher.end(None)

    def _is_over(self) -> bool:
        if self._watchers:
            return False
        with _hubs_lock:  # `watch` holds it while a watcher enters
            if self._entering:
                return False
            del _hubs[self._key]
            return True

    def _turn(self, monitor: Monitor) -> list[Watcher]:
        """Read what waits, let watchers enter and leave, and return those that left."""
        # Take those who leave first. Each of them entered before it left, so it is either among
        # the watchers already or among those that enter.
        gone = _take_all(self._leaving)
        # Take those who enter before reading: the messages of changes that came before them are in
        # the socket then, and are read below.
        entering = _take_all(self._entering)
        drained = self._receive(monitor)
        if self._missed and drained:
            self._catch_up()
        if drained:
            self._let_in(entering)
        else:
            self._entering.extendleft(each for each in reversed(entering) if each not in gone)
        present = [each for group in self._watchers.values() for each in group]
        gone += [each for each in present if each.loop.is_closed()]
        self._drop(gone)
        return gone

    def _receive(self, monitor: Monitor) -> bool:
        """Pass on the messages that wait; return whether the socket is empty."""
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
        """Look up the watchers' links and begin to watch them.

        The messages of earlier changes have been read by now, so a new watcher gets none of them.
        Messages of later changes wait in the socket. If the lookup has already seen such a change,
        its message makes no difference when it is read.
        """
        if not watchers:
            return
        try:
            states = _look_up({each.which: each.interface.name for each in watchers})
        except AiotunError as error:
            # Drop the traceback: it references this frame, which holds `states`, so keeping it
            # would make a reference cycle.
            states = {each.which: error.with_traceback(None) for each in watchers}
        for watcher in watchers:
            state = states[watcher.which]
            if isinstance(state, AiotunError):
                watcher.end(state)
            else:
                watcher.begin(state)
                self._watchers.setdefault(state.info.index, []).append(watcher)

    def _catch_up(self) -> None:
        """Look up all links again, after messages were lost.

        Call this only when the socket has been read empty: until then the kernel drops further
        messages without an error.
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
            else:  # for example, no file descriptor was free: try again later
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
    """Look up links by their index or name.

    Args:
        links: the index or name of each link, and the name that an error about it shows.

    Returns:
        The state of each link, or the error that looking it up raised.

    Raises:
        LinkError: netlink could not be used.
    """
    from .state import state_of

    async def look(session: Session) -> dict[Which, LinkState | AiotunError]:
        found: dict[Which, LinkState | AiotunError] = {}
        addresses = await session.all_addresses()
        for which, name in links.items():
            try:
                info = await session.get(which, name)
            except AiotunError as error:
                # Drop the traceback: its frames reference everything that is being looked up.
                found[which] = error.with_traceback(None)
            else:
                found[which] = state_of(info, addresses.get(info.index, []))
        return found

    return in_session(look)


# Hubs by their namespace's device and inode number. The thread of each of them is alive.
_hubs: dict[tuple[int, int], Hub] = {}
_hubs_lock = threading.Lock()


def _start_anew() -> None:
    """Start empty in a forked child: it has no hub threads, and nobody would release the lock."""
    global _hubs_lock
    _hubs_lock = threading.Lock()
    _hubs.clear()


os.register_at_fork(after_in_child=_start_anew)


def watch(namespace: namespaces.NamespaceFd, watcher: Watcher) -> Hub:
    """Have the namespace's thread notify a watcher of its link's changes.

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
        # A daemon: the interpreter must not wait at exit for an iterator that nobody closed.
        threads.start_thread(threading.Thread(target=hub.run, name="aiotun-events", daemon=True))
        # Only if the thread has started. The lock keeps the thread from ending before this line.
        _hubs[key] = hub
        return hub

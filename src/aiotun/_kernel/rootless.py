"""Network namespaces without root: the program's side of the helper process.

An ordinary user may make a user namespace and, inside it, a network namespace. But a program with
several threads can't make a user namespace: unshare(2) refuses. So a helper process does it
(`helper`). The program starts the helper as its own user, so this user owns the user namespace, and
the kernel gives the owner every capability over it. With sockets that the helper has made, the
program can therefore configure links and open devices by itself.
"""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings

from ..errors import AiotunError, LinkError
from . import helper, interpreters, places, refusals
from .limits import LIMITS, limit_error
from .namespaces import NamespaceFd

__all__ = ["Helper", "start"]

# How many seconds a helper may take to answer. Normally it takes microseconds, and a few
# milliseconds to start. If it takes longer, the process was stopped (SIGSTOP, for example).
_TIMEOUT = 30

# unix(7): SCM_MAX_FD, the most descriptors in one message.
_MAX_FDS = 253

_WHAT = "could not start the helper process of a private network namespace"

_INT_BYTES = array.array("i").itemsize


class _Child:
    """A child process of this program.

    Not `subprocess.Popen`: its finalizer would warn in a fork of the program, which is not the
    parent of this process.
    """

    def __init__(self, pid: int) -> None:
        self.pid: int = pid

    def kill(self) -> None:
        # If the program waits for all of its children, the kernel may have given the pid to another
        # process. waitid raises ChildProcessError then.
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class Helper:
    """A process in a private user namespace and network namespace, which makes sockets there.

    *Concurrency*: may be used in any thread. Requests are answered one by one.

    Attributes:
        pid: the process.
        user: the user namespace, once `begin` has returned.
    """

    user: NamespaceFd
    _pin: NamespaceFd

    def __init__(self, process: _Child, control: socket.socket) -> None:
        self.pid: int = process.pid
        self._process: _Child | None = process
        self._control = control
        self._lock = threading.Lock()  # held from a request to its answer
        self._gone = ""  # why there are no more answers

    def begin(self) -> NamespaceFd:
        """Wait until the helper has made the namespaces; return the network namespace.

        Raises:
            NotPermittedError, LinkError: the kernel refuses.
            OSError: the process ended without an answer, or the answer can't be received.
        """
        told, fds = self._receive()
        if told != b"ok":
            step, _, code = told.decode().partition(" ")
            raise refusals.explain(step, int(code))
        if len(fds) < 2:
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        user, net = fds
        self.user = NamespaceFd(user)
        # `places` finds this object by the namespace's inode number. This fd keeps the namespace
        # open, so that the kernel can't reuse the number. Make it before `serve`: a `NamespaceFd`
        # that is made later would hold this object, and so make a reference cycle.
        self._pin = NamespaceFd(net)
        places.serve(net, self)
        return NamespaceFd(os.dup(net))  # which holds this object from now on

    # Requests; see `places.Place`

    def make_sockets(self, family: int, kind: int, proto: int, count: int) -> list[socket.socket]:
        fds = self._ask(f"socket {family:d} {kind:d} {proto:d} {min(count, _MAX_FDS)}")
        made = [socket.socket(family, kind, proto, fileno=fd) for fd in fds]
        for each in made:
            each.setblocking(not kind & socket.SOCK_NONBLOCK)
        return made

    def open_file(self, path: str, flags: int) -> int:
        (fd,) = self._ask(f"open {flags} {path}")
        return fd

    def open_sysfs(self, path: str, flags: int) -> int:
        (fd,) = self._ask(f"sysfs {flags} {path}")
        return fd

    def _ask(self, line: str) -> list[int]:
        with self._lock:
            if self._gone:
                raise self._refusal()
            try:
                self._control.sendall(os.fsencode(line) + b"\n")
                told, fds = self._receive()
            except BaseException as error:
                # Give up after any interruption, also Ctrl-C: otherwise the late answer to this
                # request would be taken for the answer to the next one.
                self._give_up(
                    f"the helper process of this network namespace (pid {self.pid}) has ended or "
                    "does not answer"
                )
                if isinstance(error, OSError):
                    raise self._refusal() from error
                raise
        if told == b"ok" and fds:
            return fds
        # If this process has no free descriptor, the kernel drops those that were sent.
        code = errno.EMFILE if told == b"ok" else int(told)
        raise OSError(code, os.strerror(code))

    def _receive(self) -> tuple[bytes, list[int]]:
        """Receive an answer: its text, and as many of its descriptors as this process may have."""
        # Don't use socket.recv_fds: the descriptors would not be close-on-exec at once, and a child
        # started at that moment would inherit them.
        space = socket.CMSG_SPACE(_MAX_FDS * _INT_BYTES)
        told, messages, _, _ = self._control.recvmsg(100, space, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, data in messages:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) // _INT_BYTES * _INT_BYTES])
        if not told:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        return told, list(fds)

    def _refusal(self) -> LinkError:
        return LinkError(
            errno.ESHUTDOWN,
            f"{self._gone}; what is open in it works on, and for anything new make another with "
            "new_namespace",
        )

    # The end

    def end(self) -> None:
        """End the process at once, without waiting for it. Sockets that it made stay open."""
        self._gone = self._gone or "this network namespace was closed"
        # shutdown instead of close: it wakes another thread that waits for an answer.
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            self._process.kill()  # it may have been stopped (SIGSTOP)

    def reap(self) -> None:
        """After `end`: wait for the process, and close the socket. Blocks for about 1 ms."""
        process, self._process = self._process, None
        if process is not None:
            process.wait()
        with self._lock:
            self._control.close()

    def forget(self) -> None:
        """After a fork, in the child: leave the helper to the parent.

        The helper ends with the last copy of our end of the socket. If the child kept one, the
        helper would outlive the program.
        """
        self._process = None
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._give_up("this network namespace belongs to the process that forked this one")

    def _give_up(self, why: str) -> None:
        self._gone = self._gone or why
        self._control.close()


def _forget_all() -> None:
    for place in places.served():
        if isinstance(place, Helper):
            place.forget()


os.register_at_fork(after_in_child=_forget_all)


def start() -> tuple[Helper, NamespaceFd]:
    """Start a helper in a new user namespace and a new network namespace. Blocks for about 15 ms.

    Returns:
        The helper, which the caller must end, and the network namespace. For threads that enter
        this namespace (`namespaces.setns`) the helper makes the sockets.

    Raises:
        NotPermittedError: the kernel refuses; the text says what forbids it and what allows it.
        LinkError: the process can't be started, or ended before it was ready.
        ResourceLimitError: no process or file descriptor is left.
    """
    ours, theirs = socket.socketpair()
    # Not settimeout: Python would call poll(2) before each call, and poll fails with EINVAL while
    # RLIMIT_NOFILE is 0, as some sandboxes set it. That would be taken for a helper that has ended.
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", _TIMEOUT, 0))
    try:
        with theirs:
            process = _spawn(theirs)
            told = b"" if process is None else interpreters.packed(helper)
            process = process or _fork(theirs)
    except OSError as error:
        ours.close()
        if error.errno in {*LIMITS, errno.EAGAIN}:
            raise limit_error(error.errno, _WHAT) from error
        raise _not_started(error, "look at the kernel's log (dmesg)") from error
    started = Helper(process, ours)
    try:
        ours.sendall(told)
        return started, started.begin()
    except BaseException as error:
        started.end()
        started.reap()
        if isinstance(error, OSError) and not isinstance(error, AiotunError):
            if error.errno in LIMITS:
                raise limit_error(error.errno, _WHAT) from error
            text = f"check whether '{sys.executable} -ISE -c pass' works"
            raise _not_started(error, text) from error
        raise


def _not_started(error: OSError, advice: str) -> LinkError:
    return LinkError(error.errno, f"{_WHAT}: {error.strerror}; {advice}")


def _spawn(control: socket.socket) -> _Child | None:
    """Start the helper in an interpreter of its own; None if no interpreter can be started."""
    if not interpreters.available():
        return None
    try:
        process = subprocess.Popen(
            interpreters.arguments(control.fileno(), "aiotun-namespace"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(control.fileno(),),
            start_new_session=True,  # Ctrl-C is for the program
        )
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        # The program may have changed its root folder or its user.
        return None
    process.returncode = 0  # `_Child` waits for the process, so Popen must not
    return _Child(process.pid)


def _fork(control: socket.socket) -> _Child:
    """Run the helper in a fork of this program, for frozen programs without an interpreter."""
    import ctypes  # noqa: F401 - the helper needs it, and must import nothing

    with warnings.catch_warnings():
        # Python warns that other threads may hold locks at this moment. The helper takes no locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return _Child(pid)
    try:
        _become_helper(control.fileno())
    finally:
        os._exit(0)


def _become_helper(control: int) -> None:
    gc.disable()  # the program's objects must not run their finalizers here
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.dup2(control, 3)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 3:
            with contextlib.suppress(OSError):  # the fd that listed the folder is closed already
                os.close(int(name))
    with open(3, "rb") as requests:
        helper.main(requests)

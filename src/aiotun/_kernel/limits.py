"""What a program can run out of: file descriptors, memory and threads, and what to do then."""

import contextlib
import errno
from collections.abc import Iterator

from ..errors import AiotunError, ResourceLimitError

__all__ = ["LIMITS", "limit_error", "naming_limits"]

_ADVICE = {
    errno.EAGAIN: (
        "no new thread can be started; raise the limit on threads and processes ('ulimit -u', and "
        "pids.max of the cgroup: TasksMax= in systemd), or end some of them"
    ),
    errno.EMFILE: (
        "this program has no file descriptor left; close some, or raise its limit ('ulimit -n', "
        "LimitNOFILE= in systemd)"
    ),
    errno.ENFILE: (
        "this machine has no file descriptor left; end the programs that hold too many, or raise "
        "the limit ('sysctl fs.file-max')"
    ),
    errno.ENOMEM: (
        "the kernel has no memory left for it; free some, or raise memory.max of the cgroup "
        "(MemoryMax= in systemd)"
    ),
}


LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""The errnos of a system call that say that something ran out. (EAGAIN says so of threads only.)"""


def limit_error(code: int, what: str = "", interface: str | None = None) -> ResourceLimitError:
    """Build the error for something that ran out.

    Args:
        code: one of `LIMITS`, or EAGAIN for a thread.
        what: what failed: ``"could not open /dev/net/tun"``; empty where nobody knows.
        interface: the interface's name, if there is one.
    """
    text = f"{what}: {_ADVICE[code]}" if what else _ADVICE[code]
    # OSError takes None for a third argument as none at all.
    return ResourceLimitError(code, text, interface)


@contextlib.contextmanager
def naming_limits(what: str = "", interface: str | None = None) -> Iterator[None]:
    """Turn a plain OSError that says that something ran out into a `ResourceLimitError`.

    Args:
        what, interface: as for `limit_error`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in LIMITS or isinstance(error, AiotunError):
            raise
        # Without its traceback, whose frames hold what the callers have open.
        raise limit_error(error.errno, what, interface) from error.with_traceback(None)

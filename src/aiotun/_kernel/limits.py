"""Errors for a program that runs out of file descriptors, memory or threads."""

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
        "the kernel has no memory left; free some, or raise memory.max of the cgroup "
        "(MemoryMax= in systemd)"
    ),
}


LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""The errnos that mean that a resource ran out. (EAGAIN means that only when a thread starts.)"""


def limit_error(code: int, what: str = "", interface: str | None = None) -> ResourceLimitError:
    """Build the error for a resource that ran out.

    Args:
        code: one of `LIMITS`, or EAGAIN for a thread.
        what: what failed, such as ``"could not open /dev/net/tun"``; empty if not known.
        interface: the interface's name, if there is one.
    """
    text = f"{what}: {_ADVICE[code]}" if what else _ADVICE[code]
    # OSError treats a third argument of None like a missing one.
    return ResourceLimitError(code, text, interface)


@contextlib.contextmanager
def naming_limits(what: str = "", interface: str | None = None) -> Iterator[None]:
    """Turn a plain OSError that means that a resource ran out into a `ResourceLimitError`.

    Args:
        what, interface: as for `limit_error`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in LIMITS or isinstance(error, AiotunError):
            raise
        # Drop the traceback: its frames keep alive what the callers have open.
        raise limit_error(error.errno, what, interface) from error.with_traceback(None)

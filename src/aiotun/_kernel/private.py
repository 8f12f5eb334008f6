"""Makes private network namespaces: with this program's capabilities, or by a helper process."""

from __future__ import annotations

import contextlib
import os
import sys

from ..errors import NotPermittedError
from . import ioctl, places, refusals, rootless
from .namespaces import NamespaceFd, setns

__all__ = ["make"]

_CLONE_NEWNET = 0x4000_0000  # sched.h

# icmp(7): the groups that may make ICMP sockets, which ping(8) uses. In a new namespace none may.
_PING_GROUPS = "/proc/sys/net/ipv4/ping_group_range"


def make(rootless_only: bool | None) -> NamespaceFd:
    """Make a network namespace in which `lo` is up. Blocks; call it in a short-lived thread.

    Args:
        rootless_only: True uses a helper process, False does not, None uses one if needed.

    Raises:
        NotPermittedError: this is not allowed; the text says what forbids it and what allows it.
        LinkError: the helper process can't be started.
    """
    if rootless_only:
        return _by_helper()
    try:
        return _by_this_thread()
    except NotPermittedError:
        if rootless_only is False:
            raise
    return _by_helper()


def _by_helper() -> NamespaceFd:
    helper, namespace = rootless.start()
    try:
        setns(namespace.fd)
        _prepare()
    except BaseException:
        helper.end()
        helper.reap()
        raise
    return namespace


def _by_this_thread() -> NamespaceFd:
    try:
        _unshare(_CLONE_NEWNET)
        _prepare()
    except OSError as error:
        raise refusals.explain("bare", error.errno or 0) from error
    return NamespaceFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))


def _prepare() -> None:
    """Prepare the calling thread's new namespace for use."""
    ioctl.set_up("lo")
    # Ignore errors: ping(8) may still work, if the file has a capability.
    with contextlib.suppress(OSError):
        fd = places.open_file(_PING_GROUPS, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0 2147483647")
        except OSError:  # in a user namespace all groups must be mapped
            os.write(fd, b"%d %d" % (os.getegid(), os.getegid()))
        finally:
            os.close(fd)


def _unshare(flags: int) -> None:
    if sys.version_info >= (3, 12):
        os.unshare(flags)
        return
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))

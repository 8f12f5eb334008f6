"""Threaded NAPI: the interface's attribute ``threaded`` in sysfs.

netlink (family netdev) can switch it only for NAPI instances that have a number. Those of TUN and
TAP devices have none.

Source: ``Documentation/networking/napi.rst``, threaded NAPI (Linux 5.12).
"""

from __future__ import annotations

import errno
import os

from ..errors import AiotunError, DeviceMismatchError, LinkError, NotPermittedError
from . import places
from .limits import LIMITS
from .threads import run_blocking

__all__ = ["set_threaded"]

_FORBIDDEN = frozenset({errno.EPERM, errno.EACCES, errno.EROFS})
_UNKNOWN = frozenset({errno.ENOENT, errno.EOPNOTSUPP, errno.ENOSYS})


def set_threaded(name: str, on: bool) -> bool:
    """Switch threaded NAPI on or off for an interface in the calling thread's network namespace.

    Nothing is written if this would change nothing.

    Returns:
        Whether threaded NAPI was on before.

    Raises:
        NotPermittedError: sysfs can't be mounted, or this user may not write the file.
        DeviceMismatchError: this kernel has no such file.
        LinkError: the kernel refused, or the namespace's helper has ended.
        ResourceLimitError: no thread can be started, or no file descriptor is left.
    """
    try:
        fd = _open(f"/sys/class/net/{name}/threaded")
        try:
            before = os.read(fd, 16).strip() == b"1"
            if before != on:
                os.pwrite(fd, b"1" if on else b"0", 0)
        finally:
            os.close(fd)
    except AiotunError:
        raise
    except OSError as error:
        if error.errno in LIMITS:
            raise
        raise _explained(error, name) from error
    return before


def _open(path: str) -> int:
    place = places.here()
    # In a new thread, because `open_sysfs` may mount /sys. The new thread is in the same network
    # namespace as this one, and its mounts end with it.
    return run_blocking(lambda: place.open_sysfs(path, os.O_RDWR))


def _explained(error: OSError, name: str) -> AiotunError:
    code = error.errno or 0
    if code in _FORBIDDEN:
        text = (
            "napi='threaded' needs the right to mount sysfs and to write "
            f"/sys/class/net/{name}/threaded ({os.strerror(code)}); run as root, with "
            "CAP_SYS_ADMIN and CAP_NET_ADMIN, or use napi=True"
        )
        return NotPermittedError(code, text, name)
    if code in _UNKNOWN:
        text = (
            f"this kernel can't receive from {name} in a thread ({os.strerror(code)}), which needs "
            "Linux 5.12 and /sys; use napi=True"
        )
        return DeviceMismatchError(code, text, name)
    text = f"the kernel refused a thread for {name}: {os.strerror(code)}; use napi=True"
    return LinkError(code, text, name)

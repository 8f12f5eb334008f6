"""Queues on their way to another process, by multiprocessing.

What goes there is a duplicate of the fd: the queue here stays open, and both may be used. Nothing
is imported, nor done, before a queue is really sent.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from .._kernel import ioctl
from .._kernel.interface import Interface
from .._kernel.limits import limit_error, naming_limits
from .._kernel.namespaces import NamespaceFd
from ..errors import AiotunError
from .port import Port

__all__ = ["reduce_queue"]


def reduce_queue(queue: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Say how to make the queue again, for multiprocessing's pickler.

    Raises:
        TypeError: it is another pickler, whose bytes may go anywhere. An fd can't.
        DeviceClosedError, DeviceLostError: there is nothing to send.
        ResourceLimitError: no file descriptor is left for the duplicate, or no thread can be
            started, which multiprocessing uses to hand it over.
    """
    queue.check_open()
    if not _by_multiprocessing():
        raise TypeError(
            "a queue can be pickled only on its way to another process: as an argument of a "
            "multiprocessing Process (spawn or forkserver), or over a multiprocessing Connection "
            "or Queue; by other ways send its fileno() with socket.send_fds, and make a queue of "
            "it there with Queue.from_fd"
        )
    duplicate = _duplicate(queue)
    return _rebuild, (type(queue), duplicate, queue.name, queue.port, queue.disabled)


def _duplicate(queue: Any) -> Any:
    from multiprocessing.reduction import DupFd

    what = f"could not send a queue of {queue.name} to another process"
    try:
        with naming_limits(what, queue.name):
            return DupFd(queue.fileno())
    except RuntimeError as error:  # threading's: multiprocessing hands fds over in a thread
        raise limit_error(errno.EAGAIN, what, queue.name) from error


def _by_multiprocessing() -> bool:
    """Whether it is multiprocessing's ForkingPickler that asks.

    To register with that pickler would be cleaner, and would have every program that opens a
    device import multiprocessing. A pickler in C has no frame, so the frame before ours belongs to
    the function that called the pickler's `dump`.
    """
    frame = sys._getframe(2)  # this function's caller, and then the queue's __reduce__
    caller = frame.f_back
    return caller is not None and caller.f_globals.get("__name__") == "multiprocessing.reduction"


def _rebuild(
    kind: Callable[..., Any],
    duplicate: Any,
    name: str,
    port: Port,
    disabled: bool,
) -> Any:
    fd = duplicate.detach()
    os.set_blocking(fd, False)
    os.set_inheritable(fd, False)
    queue = kind(fd, Interface(name, namespace=_namespace(fd)), port)
    queue._disabled = disabled
    return queue


def _namespace(fd: int) -> NamespaceFd | None:
    """Where the interface is: a send that waits asks there whether the link is up."""
    try:
        told = ioctl.get_namespace(fd)
    except (AiotunError, OSError):  # lost on the way, as the first call will say; or a socket
        return None
    return None if told is None else NamespaceFd(told)

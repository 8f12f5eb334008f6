"""What this program knows about an interface; shared by its device, its queues and its link."""

from __future__ import annotations

import contextlib
import errno
import threading

from ..errors import LinkError
from . import ioctl, namespaces

__all__ = ["Interface"]


class Interface:
    """An interface's name, index, MTU and namespace.

    A device, its queues and its link share one `Interface`, so that all of them see a change.

    Attributes:
        name: the current name.
        index: the kernel's number, which a rename does not change; None if not yet known.
        mtu: the IP MTU in bytes; None if not yet known.
        namespace: the network namespace that the interface is in; None if not known.
    """

    __slots__ = ("_lock", "index", "mtu", "name", "namespace")

    def __init__(
        self,
        name: str,
        index: int | None = None,
        mtu: int | None = None,
        namespace: namespaces.NamespaceFd | None = None,
    ) -> None:
        self.name: str = name
        self.index: int | None = index
        self.mtu: int | None = mtu
        self.namespace: namespaces.NamespaceFd | None = namespace
        self._lock = threading.Lock()

    def follow(self, index: int) -> None:
        """Update name and MTU from the kernel; the thread must be in the interface's namespace.

        Threads that made a request and the thread that watches for events both call this, and what
        either of them was told may be outdated. So this asks the kernel again while it holds the
        lock, and the last writer has the latest answer. If the interface no longer exists, name and
        MTU keep their values.
        """
        with self._lock, contextlib.suppress(OSError):
            name = ioctl.get_name(index)
            self.name, self.mtu = name, ioctl.get_mtu(name)

    def is_up(self) -> bool:
        """Ask the kernel whether the link is up.

        This moves the calling thread into the interface's namespace, so the thread must be a
        short-lived one.

        Raises:
            LinkError, NotPermittedError, OSError: the state can't be read.
        """
        if self.namespace is None:
            text = f"the network namespace of {self.name} is not known"
            raise LinkError(errno.ENODEV, text, self.name)
        namespaces.setns(self.namespace.fd)
        # Others may have renamed it, and given its name to another.
        return ioctl.is_up(self.name if self.index is None else ioctl.get_name(self.index))

"""What is known of an interface; shared by its device, its queues and its link."""

from __future__ import annotations

import contextlib
import errno
import threading

from ..errors import LinkError
from . import ioctl, namespaces

__all__ = ["Interface"]


class Interface:
    """The one place where a change of name or MTU is written down, for everybody to read.

    Attributes:
        name: the present name.
        index: the kernel's number, which a rename does not change; None while nobody asked for it.
        mtu: the IP MTU in bytes; None while nobody asked for it.
        namespace: where it is; None where that is not known.
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
        """Write down what the kernel says now, in a thread that is in the interface's namespace.

        Requests and the thread that watches come here both, and each knows what was so a moment
        ago. So it is asked anew, within the lock: whoever writes last has asked last. Where the
        interface is gone, what is written stays.
        """
        with self._lock, contextlib.suppress(OSError):
            name = ioctl.get_name(index)
            self.name, self.mtu = name, ioctl.get_mtu(name)

    def is_up(self) -> bool:
        """Ask the kernel whether the link is up; only in a thread of its own, which may move.

        Raises:
            LinkError, NotPermittedError, OSError: that can't be found out.
        """
        if self.namespace is None:
            raise LinkError(errno.ENODEV, "its network namespace is not known", self.name)
        namespaces.setns(self.namespace.fd)
        # Others may have renamed it, and given its name to another.
        return ioctl.is_up(self.name if self.index is None else ioctl.get_name(self.index))

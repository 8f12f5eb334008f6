"""The exceptions that aiotun raises.

::

    AiotunError
    ├── TunUnavailableError      (OSError)              /dev/net/tun or its driver is missing
    ├── NotPermittedError        (PermissionError)      no permission for the node or a request
    ├── DeviceBusyError          (OSError)              in use, or exists already
    ├── DeviceMismatchError      (OSError)              the device is not of the requested kind
    ├── DeviceClosedError                               this program closed the device
    ├── DeviceLostError          (OSError)              the interface was deleted
    ├── LinkDownError            (OSError)              sent while the link is down
    ├── PacketError              (OSError, ValueError)  the kernel rejected the packet
    │   └── PacketTruncatedError                        the packet is longer than the buffer
    ├── PacketDecodeError        (ValueError)           the bytes are not a valid packet
    ├── LinkError                (OSError)              netlink request failed, or no such link
    └── ResourceLimitError       (OSError)              no thread, fd or memory is left

*Closed* means that this program closed the device; *lost* means that something outside this program
ended it. The classes that are an ``OSError`` are built from ``(errno, message, interface)``: read
``errno``, ``strerror`` and ``filename`` (the interface's name). Invalid arguments raise a plain
``ValueError`` or ``TypeError``, before any system call.
"""

from typing import Any

__all__ = [
    "AiotunError",
    "DeviceBusyError",
    "DeviceClosedError",
    "DeviceLostError",
    "DeviceMismatchError",
    "LinkDownError",
    "LinkError",
    "NotPermittedError",
    "PacketDecodeError",
    "PacketError",
    "PacketTruncatedError",
    "ResourceLimitError",
    "TunUnavailableError",
]


class AiotunError(Exception):
    """The base class of aiotun's own exceptions."""

    sent: int
    """How many of the caller's packets were sent. Only `send_many` sets it."""

    unsent: list[Any]
    """The caller's packets that were not sent, in order. Only `send_many` sets it."""


class TunUnavailableError(AiotunError, OSError):
    """This machine has no ``/dev/net/tun``, or no driver behind it."""


class NotPermittedError(AiotunError, PermissionError):
    """The kernel denied permission (EPERM or EACCES) for the node, an ioctl or a netlink request.

    The message names the operation that was denied and how to allow it.
    """


class DeviceBusyError(AiotunError, OSError):
    """The device is in use by another program, all its 256 queues are taken, or it exists already.

    An existing device is an error only for a call that must create a new one.
    """


class DeviceMismatchError(AiotunError, OSError):
    """The device exists, but is of another kind or has other queue or header flags.

    Also raised by an operation that needs a multi-queue device, if the device has a single queue.
    """


class DeviceClosedError(AiotunError):
    """This program closed the device, or called `detach` on the queue."""


class DeviceLostError(AiotunError, OSError):
    """The interface no longer exists: it was deleted, or its network namespace was."""


class LinkDownError(AiotunError, OSError):
    """A packet was sent while the link is down. Only this packet is lost; bring the link up."""


# OSError must come before ValueError. In the other order CPython creates the object as a
# ValueError, and errno, strerror and filename stay None.
class PacketError(AiotunError, OSError, ValueError):
    """The kernel rejected this packet."""


class PacketTruncatedError(PacketError):
    """The packet is longer than the caller's buffer, which holds the beginning of the packet."""


class PacketDecodeError(AiotunError, ValueError):
    """The bytes are not a valid packet or frame; the parser's error is chained (``__cause__``)."""


class LinkError(AiotunError, OSError):
    """A netlink request failed, or the link or the network namespace does not exist."""


class ResourceLimitError(AiotunError, OSError):
    """A resource ran out; the message says which one, and which limit to raise.

    The errno is EAGAIN if no thread can be started, EMFILE or ENFILE if the program or the machine
    has no file descriptor left, and ENOMEM if the kernel has no memory left.
    """

"""The exceptions that aiotun raises.

::

    AiotunError
    ├── TunUnavailableError    (OSError)              no /dev/net/tun, or no driver behind it
    ├── NotPermittedError      (PermissionError)      the node, an ioctl or netlink said no
    ├── DeviceBusyError        (OSError)              somebody else has it, or it exists already
    ├── DeviceMismatchError    (OSError)              it exists, but is not what was asked for
    ├── DeviceClosedError                             you closed it
    ├── DeviceLostError        (OSError)              the interface went away
    ├── LinkDownError          (OSError)              sending while the link is down
    ├── PacketError            (OSError, ValueError)  the kernel refused this packet
    │   └── PacketTruncatedError                      the buffer was smaller than the packet
    ├── PacketDecodeError      (ValueError)           the bytes are no packet we can read
    ├── LinkError              (OSError)              netlink refused, or no such link or namespace
    └── ResourceLimitError     (OSError)              no thread, file descriptor or memory is left

*Closed* means that this program did it; *lost* that the world did. A class that is an ``OSError``
is built from ``(errno, message, interface)``, so that ``errno``, ``strerror`` and ``filename`` (the
interface's name) can be read off it. Arguments that are wrong in themselves raise a plain
``ValueError`` or ``TypeError``, before any system call.
"""

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
    """The root of everything that aiotun raises on its own account."""

    sent: int
    """How many of the caller's packets went out before; only on what `send_many` raises."""


class TunUnavailableError(AiotunError, OSError):
    """This machine offers no TUN/TAP driver: no ``/dev/net/tun``, or nothing behind the node."""


class NotPermittedError(AiotunError, PermissionError):
    """EPERM or EACCES from the node, an ioctl or netlink; the text says which and what mends it."""


class DeviceBusyError(AiotunError, OSError):
    """Attached elsewhere, all 256 queues taken, or there already where it must not be."""


class DeviceMismatchError(AiotunError, OSError):
    """The device exists but is of another kind, or its queue or header flags differ.

    Also raised by an operation on queues that a single-queue device does not have.
    """


class DeviceClosedError(AiotunError):
    """This program closed the device, or gave the queue up with `detach`."""


class DeviceLostError(AiotunError, OSError):
    """The interface went away: somebody deleted it, or its namespace ended."""


class LinkDownError(AiotunError, OSError):
    """A packet was sent while the link is down. Nothing is lost but this packet; bring it up."""


# OSError stands before ValueError: the other way round CPython builds the object as a ValueError,
# and errno, strerror and filename stay None.
class PacketError(AiotunError, OSError, ValueError):
    """The kernel refused this packet."""


class PacketTruncatedError(PacketError):
    """The caller's buffer was smaller than the packet; it holds the packet's beginning."""


class PacketDecodeError(AiotunError, ValueError):
    """These bytes could not be read as a packet or frame; what the parser said is chained."""


class LinkError(AiotunError, OSError):
    """Netlink refused a request, or there is no such link or namespace."""


class ResourceLimitError(AiotunError, OSError):
    """Something ran out; the text says what, and which limit to raise.

    The errno is EAGAIN where no thread can be started, EMFILE or ENFILE where no file descriptor is
    left to the program or the machine, ENOMEM where the kernel has no memory for it.
    """

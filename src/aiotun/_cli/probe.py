"""What `aiotun doctor` asks the driver directly, because no public function does."""

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from .._kernel import ioctl, threads
from .._kernel.abi import Iff, OffloadFlag
from .._packets import native
from ..errors import DeviceMismatchError, NotPermittedError
from ..namespaces import new_namespace

__all__ = ["SPEEDUPS", "features", "may_create", "try_device", "try_namespace"]

SPEEDUPS: bool = native.SPEEDUPS
"""Whether the C module is in use."""

T = TypeVar("T")

_FEATURES = ("TUN", "TAP", "MULTI_QUEUE", "VNET_HDR", "NAPI", "NO_CARRIER")


def features() -> list[str]:
    """Open the node, and return the features that the driver reports.

    Raises:
        TunUnavailableError: there is no node, or no driver behind it.
        NotPermittedError: this user may not open the node.
    """
    return _with_node(lambda fd: _names(ioctl.get_features(fd)))


def _names(flags: Iff) -> list[str]:
    return [name.lower() for name in _FEATURES if flags & Iff[name]]


def may_create() -> bool:
    """Whether this user may create a device in this network namespace. Creates none.

    TUNSETIFF checks CAP_NET_ADMIN before it looks at the kind of device. Asked for neither TUN nor
    TAP, it fails with EPERM if the capability is missing, and else with EINVAL before it creates
    anything (tun_set_iff in drivers/net/tun.c).

    Raises:
        TunUnavailableError, NotPermittedError: as `features`.
    """

    def ask(fd: int) -> bool:
        try:
            ioctl.attach(fd, "", Iff(0))
        except NotPermittedError:
            return False
        except DeviceMismatchError as error:
            return error.errno == errno.EINVAL
        return False  # not reached: the ioctl always fails

    return _with_node(ask)


async def try_namespace(*, device: bool) -> tuple[bool, list[str]]:
    """Create a private network namespace for a moment, and perhaps a device in it.

    Args:
        device: whether to create a device.

    Returns:
        Whether the namespace needs a helper process, and the offloads that the device accepts.

    Raises:
        NotPermittedError: the kernel refuses; the text says what forbids it.
        LinkError: the helper process can't be started.
        TunUnavailableError: as `features`.
    """
    async with new_namespace() as namespace:
        if not device:
            return namespace.rootless, []
        return namespace.rootless, await threads.run(try_device, namespace.fileno())


def try_device() -> list[str]:
    """Create a device in this thread's namespace for a moment; return the offloads it accepts."""

    def attempt(fd: int) -> list[str]:
        try:
            name = ioctl.attach(fd, "", Iff.TUN | Iff.NO_PI | Iff.VNET_HDR)
        except DeviceMismatchError:  # gVisor, which has no offload
            ioctl.attach(fd, "", Iff.TUN | Iff.NO_PI)
            return []
        found = []
        tso = OffloadFlag.CSUM | OffloadFlag.TSO4 | OffloadFlag.TSO6
        uso = OffloadFlag.CSUM | OffloadFlag.USO4 | OffloadFlag.USO6
        for word, mask in (("checksum", OffloadFlag.CSUM), ("TSO", tso), ("USO", uso)):
            try:
                ioctl.set_offload(fd, name, mask)
            except DeviceMismatchError:  # an older kernel
                continue
            found.append(word)
        return found

    return _with_node(attempt)


def nodev_mount() -> str | None:
    """The mount point that the node is on, if that is mounted 'nodev'; else None."""
    return ioctl.nodev_mount()


def _with_node(function: Callable[[int], T]) -> T:
    fd = ioctl.open_node()
    try:
        return function(fd)
    finally:
        os.close(fd)

"""Taking over queues that somebody else opened: what the kernel tells of them, what must fit."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from . import _ioctl, _threads
from ._abi import VNET_HDR_SIZE, Iff
from ._interface import Interface
from ._opening import Opened
from ._packetio import Mode, Offload, check_offload, mode_of
from .errors import DeviceMismatchError

__all__ = ["adopt"]


def adopt(
    mode: Mode,
    fds: Sequence[int],
    *,
    netns: _threads.NetnsArg | None,
    packet_info: bool,
    offload: Offload | None,
) -> tuple[Opened, Offload]:
    """Look at the fds, and only if all is well make them non-blocking and close-on-exec.

    Raises:
        ValueError, DeviceMismatchError, DeviceLostError, LinkError: see `Device.from_fd`.
    """
    if len(set(fds)) < len(fds):
        raise ValueError(f"an fd stands twice in {list(fds)}; each queue has its own")
    if offload is not None:
        check_offload(offload)
    found = [_ask(fd) for fd in fds]
    name, flags = found[0]
    for other, _ in found[1:]:
        if other != name:
            text = f"the fds are queues of {name} and of {other}; make a device of each"
            raise DeviceMismatchError(errno.EINVAL, text, name)
    if mode_of(flags) != mode:
        kind = "TapDevice" if mode == "tun" else "TunDevice"
        text = f"{name} is a {mode_of(flags).upper()} device; use {kind}.from_fd"
        raise DeviceMismatchError(errno.EINVAL, text, name)
    offload = _check_header(fds[0], name, flags, offload, packet_info)
    namespace = _threads.Namespace(_threads.open_netns(netns))

    def look_up() -> Interface:
        return Interface(name, _ioctl.get_index(name), _ioctl.get_mtu(name))

    interface = _threads.run_blocking(look_up, namespace.fd)
    for fd in fds:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
    return Opened(list(fds), interface, namespace), offload


def _ask(fd: int) -> tuple[str, Iff]:
    try:
        return _ioctl.get_flags(fd)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOTTY, errno.EINVAL):
            raise
        what = "not open" if error.errno == errno.EBADF else "not a queue of a TUN or TAP device"
        raise ValueError(f"fd {fd} is {what}") from error


def _check_header(
    fd: int, name: str, flags: Iff, offload: Offload | None, packet_info: bool
) -> Offload:
    has_header = bool(flags & Iff.VNET_HDR)
    if offload is None:
        offload = "raw" if has_header else "off"
    if (offload == "raw") != has_header:
        what = "a" if has_header else "no"
        text = f"{name} has {what} virtio-net header, so offload={offload!r} does not fit it"
        raise DeviceMismatchError(errno.EINVAL, text, name)
    if has_header and packet_info:
        raise ValueError("packet_info=True goes with offload='off' only: one header is enough")
    if has_header:
        size = _ioctl.get_vnet_header_size(fd, name)
        if size != VNET_HDR_SIZE:
            text = f"{name} has a virtio-net header of {size} bytes; have its opener set 10"
            raise DeviceMismatchError(errno.EINVAL, text, name)
    return offload

"""Taking over queues that somebody else opened: what the kernel tells of them, what must fit."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from .._kernel import ioctl, namespaces, threads
from .._kernel.abi import VNET_HDR_SIZE, Iff
from .._kernel.interface import Interface
from .._kernel.words import Mode, Offload, check_offload, mode_of
from .._queue.judging import header_mismatch
from ..errors import DeviceMismatchError, LinkError
from .opening import Opened

__all__ = ["adopt"]


def adopt(
    mode: Mode,
    fds: Sequence[int],
    *,
    netns: namespaces.NetnsArg | None,
    packet_info: bool,
    offload: Offload | None,
) -> tuple[Opened, Offload]:
    """Look at the fds, and only if all is well make them non-blocking and close-on-exec.

    Raises:
        ValueError, DeviceMismatchError, DeviceLostError, LinkError, ResourceLimitError: see
            `Device.from_fd`.
    """
    if len(set(fds)) < len(fds):
        raise ValueError(f"an fd stands twice in {list(fds)}; each queue has its own")
    namespaces.check_netns(netns)
    if offload is not None:
        check_offload(offload)
    found = [_ask(fd) for fd in fds]
    name, flags = found[0]
    for another, _ in found[1:]:
        if another != name:
            text = f"the fds are queues of {name} and of {another}; make a device of each"
            raise DeviceMismatchError(errno.EINVAL, text, name)
    if mode_of(flags) != mode:
        kind = "TapDevice" if mode == "tun" else "TunDevice"
        text = f"{name} is a {mode_of(flags).upper()} device; use {kind}.from_fd"
        raise DeviceMismatchError(errno.EINVAL, text, name)
    offload = _check_header(fds[0], name, flags, offload, packet_info)
    namespace = _namespace(fds[0], name, netns)
    for fd in fds[1:]:
        told = ioctl.get_namespace(fd)
        other = None if told is None else namespaces.NamespaceFd(told)
        if other is not None and not namespaces.same_namespace(other.fd, namespace.fd):
            text = f"the fds are queues of two interfaces {name}, in two network namespaces"
            raise DeviceMismatchError(errno.EINVAL, f"{text}; make a device of each", name)

    def look_up() -> Interface:
        return Interface(name, ioctl.get_index(name), ioctl.get_mtu(name), namespace)

    interface = threads.run_blocking(look_up, namespace.fd)
    for fd in fds:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
    return Opened(list(fds), interface, namespace), offload


def _ask(fd: int) -> tuple[str, Iff]:
    try:
        return ioctl.get_flags(fd)
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
    if (offload != "off") != has_header:
        raise header_mismatch(name, flags, offload)
    if has_header and packet_info:
        raise ValueError("packet_info=True goes with offload='off' only: one header is enough")
    if has_header:
        size = ioctl.get_vnet_header_size(fd, name)
        if size != VNET_HDR_SIZE:
            text = f"{name} has a virtio-net header of {size} bytes; have its opener set 10"
            raise DeviceMismatchError(errno.EINVAL, text, name)
    return offload


def _namespace(fd: int, name: str, netns: namespaces.NetnsArg | None) -> namespaces.NamespaceFd:
    """Find the interface's namespace, and hold it.

    The kernel tells which it is to those with CAP_NET_ADMIN there. Others are taken at their word:
    they can't change what a stranger of the same name is, elsewhere.
    """
    # Opened first: a number that is none must not become one by what the kernel gives us below.
    said = namespaces.NamespaceFd(namespaces.open_netns(netns))
    told = ioctl.get_namespace(fd)
    if told is None:
        return said
    real = namespaces.NamespaceFd(told)
    if netns is not None and not namespaces.same_namespace(real.fd, said.fd):
        raise LinkError(
            errno.ENODEV,
            f"{name} is not in the network namespace {netns}; leave netns out, the kernel knows it",
            name,
        )
    return real

"""Taking over queues that somebody else opened: what the kernel tells of them, what must fit."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from .._kernel import ioctl, namespaces, rtnetlink, threads
from .._kernel.abi import Iff
from .._kernel.interface import Interface
from .._kernel.words import Mode, Offload, check_offload, mode_of
from .._queue.judging import (
    UNKNOWN_OFFLOADS,
    check_packet_info,
    is_another,
    known_offloads,
    packet_format,
)
from .._queue.port import Offloads, PacketFormat
from ..errors import DeviceMismatchError, LinkError, NotPermittedError
from .opening import Opened

__all__ = ["adopt"]


def adopt(
    mode: Mode,
    fds: Sequence[int],
    *,
    netns: namespaces.NetnsArg | None,
    packet_info: bool,
    offload: Offload | None,
) -> tuple[Opened, PacketFormat]:
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
    packets = packet_format(fds[0], name, flags, offload, packet_info)
    told, namespace = _namespace(fds[0], name, netns)
    for fd in fds[1:]:
        other = _told(fd)
        if other is not None and not namespaces.same_namespace(other.fd, namespace.fd):
            text = f"the fds are queues of two interfaces {name}, in two network namespaces"
            raise DeviceMismatchError(errno.EINVAL, f"{text}; make a device of each", name)
    interface, known = _look_up(name, flags, packets, namespace, told=told, said=netns is not None)
    for fd in fds:
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
    return Opened(list(fds), interface, known), packets._replace(accepted=known)


def _ask(fd: int) -> tuple[str, Iff]:
    try:
        return ioctl.get_flags(fd)
    except (OverflowError, ValueError) as error:  # negative, or no C int
        raise ValueError(f"fd {fd} is not open") from error
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOTTY, errno.EINVAL):
            raise
        what = "not open" if error.errno == errno.EBADF else "not a queue of a TUN or TAP device"
        raise ValueError(f"fd {fd} is {what}") from error


def _told(fd: int) -> namespaces.NamespaceFd | None:
    told = ioctl.get_namespace(fd)
    return None if told is None else namespaces.NamespaceFd(told)


def _namespace(
    fd: int, name: str, netns: namespaces.NetnsArg | None
) -> tuple[bool, namespaces.NamespaceFd]:
    """Find the interface's namespace, and hold it; whether the kernel told, and which it is.

    The kernel tells those with CAP_NET_ADMIN there. Others are taken at their word: they can't
    change what a stranger of the same name is, elsewhere.
    """
    # Opened first: a number that is none must not become one by what the kernel gives us below.
    said = namespaces.NamespaceFd(namespaces.open_netns(netns))
    real = _told(fd)
    if real is None:
        return False, said
    if netns is not None and not namespaces.same_namespace(real.fd, said.fd):
        raise LinkError(
            errno.ENODEV,
            f"{name} is not in the network namespace {netns}; leave netns out, the kernel knows it",
            name,
        )
    return True, real


def _look_up(
    name: str,
    flags: Iff,
    packets: PacketFormat,
    namespace: namespaces.NamespaceFd,
    *,
    told: bool,
    said: bool,
) -> tuple[Interface, Offloads]:
    """Look at the interface in its namespace: index, MTU, packet information and offloads.

    Args:
        flags: from TUNGETIFF.
        namespace: where it is, or where we are.
        told: whether the kernel says that it is there.
        said: whether the caller says so.
    """

    def look() -> tuple[int, int, Iff | None, Offloads]:
        index = ioctl.get_index(name)
        offloads = known_offloads(name, packets.offload != "off")
        return index, ioctl.get_mtu(name), rtnetlink.get_flags(index), offloads

    try:
        index, mtu, found, known = threads.run_blocking(look, namespace.fd)
    except NotPermittedError:
        # We may not go there; packets pass all the same.
        return Interface(name, namespace=namespace), UNKNOWN_OFFLOADS
    except LinkError:
        if told or said:
            raise
        return Interface(name), UNKNOWN_OFFLOADS  # it is elsewhere, and nobody tells us where
    if not told and is_another(flags, found):
        if said:
            text = f"the {name} in that network namespace is not the one that the fd is a queue of"
            raise LinkError(errno.ENODEV, f"{text}; leave netns out, or name its own", name)
        return Interface(name), UNKNOWN_OFFLOADS
    check_packet_info(name, found, packets)
    return Interface(name, index, mtu, namespace), known

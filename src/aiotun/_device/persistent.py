"""Persistent devices: what ``ip tuntap`` does, by the same ioctls (if_tun.h)."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from .._kernel import ioctl, namespaces, threads
from .._kernel.abi import Iff
from .._kernel.words import Mode
from .._link.netlink import in_session
from .._link.values import check_name
from ..errors import AiotunError, DeviceBusyError, DeviceMismatchError, LinkError, NotPermittedError
from .options import Options, check, switch

if TYPE_CHECKING:
    from .._link.info import LinkInfo, TunTapInfo
    from .._link.session import Session

__all__ = ["create_persistent", "delete_persistent", "list_devices"]


class _FoundDevice:
    """A device and the flags to attach with. (Not a NamedTuple, which takes time to import.)"""

    __slots__ = ("index", "kind", "name")

    def __init__(self, name: str, index: int, kind: Iff) -> None:
        self.name: str = name
        self.index: int = index
        self.kind: Iff = kind


async def create_persistent(
    name: str | None = None,
    mode: Mode = "tun",
    multi_queue: bool = False,
    owner: int | str | None = None,
    group: int | str | None = None,
    vnet_header: bool = False,
    packet_info: bool = False,
    netns: namespaces.NetnsArg | None = None,
    ipv6_autoconf: bool | None = None,
) -> str:
    """Create a TUN or TAP device that stays without a program attached, as ``ip tuntap add`` does.

    The device is down and has no address. Use ``Link(name)`` to configure it, and `open_tun` or
    `open_tap` to attach to it. The `owner` may attach without any privilege.

    Args:
        name: 1 to 15 bytes; None lets the kernel pick ``tunN`` or ``tapN``, and ``"vpn%d"`` takes
            the lowest free number.
        mode: ``"tun"`` for IP packets, ``"tap"`` for Ethernet frames.
        multi_queue: whether the device can have several queues, 256 at most (IFF_MULTI_QUEUE). Open
            such a device with ``queues`` above 1, or with ``multi_queue=True``.
        owner: the user, by name or number, who may attach without CAP_NET_ADMIN (TUNSETOWNER).
        group: the group, by name or number, whose members may attach without CAP_NET_ADMIN
            (TUNSETGROUP). If both `owner` and `group` are given, both must match; if neither is,
            everyone who can open /dev/net/tun may attach.
        vnet_header: whether packets have the virtio-net header (IFF_VNET_HDR). The first program
            that attaches can change this and `packet_info`.
        packet_info: whether packets have the 4-byte ``tun_pi`` header (no IFF_NO_PI).
        netns: the network namespace to create it in: a `Namespace`, a name under /run/netns, a
            path or an open fd; None is the calling thread's.
        ipv6_autoconf: whether the kernel gives the device an IPv6 link-local address and solicits
            routers when it comes up; None keeps the kernel's default.

    Returns:
        The name that the device got.

    Raises:
        TypeError, ValueError: an argument is invalid, or the user or group does not exist.
        DeviceBusyError: an interface of that name exists already. It was not changed.
        DeviceMismatchError: the kernel rejected the name, the owner or the group. (A user namespace
            has only the users and groups that it maps.)
        LinkError: the namespace does not exist (ENOENT).
        NotPermittedError: CAP_NET_ADMIN is missing in the namespace, or this user has no permission
            to open /dev/net/tun.
        TunUnavailableError: /dev/net/tun or its driver is missing.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    If this raises, it leaves no device behind.

    *Cancellation*: waits until the device is created (a few ms) and deletes it again. If another
    program has attached in the meantime, the device is deleted when that program closes it, or
    stays.

    *Concurrency*: calls may overlap. Of several calls for one name, one succeeds.
    """
    if mode not in ("tun", "tap"):
        raise ValueError(f"mode must be 'tun' or 'tap', got {mode!r}")
    wanted = check(
        mode, name, multi_queue=multi_queue, owner=owner, group=group,
        packet_info=packet_info, netns=netns, ipv6_autoconf=ipv6_autoconf,
    )  # fmt: skip
    flags = _kind_flags(mode, wanted.multi_queue)
    if not wanted.packet_info:
        flags |= Iff.NO_PI
    if switch("vnet_header", vnet_header):
        flags |= Iff.VNET_HDR
    made = await threads.run_in(netns, lambda: _create(name or "", flags, wanted), undo=_undo)
    return made.name


def _kind_flags(mode: Mode, multi_queue: bool) -> Iff:
    kind = Iff.TAP if mode == "tap" else Iff.TUN
    return kind | Iff.MULTI_QUEUE if multi_queue else kind


def _create(name: str, flags: Iff, wanted: Options) -> _FoundDevice:
    fd = ioctl.open_node()
    try:
        try:
            made = ioctl.attach_new(fd, name, flags)
        except DeviceBusyError as error:
            text = f"{name} exists already; delete it, or choose another name"
            raise DeviceBusyError(error.errno, text, name) from error
        index = ioctl.get_index(made)
        if wanted.ipv6_autoconf is not None:
            _set_autoconf(index, wanted.ipv6_autoconf)
        if wanted.group is not None:
            ioctl.set_group(fd, made, wanted.group)
        if wanted.owner is not None:
            ioctl.set_owner(fd, made, wanted.owner)
        # Last: until now, if a step fails, closing the fd deletes the device.
        ioctl.set_persist(fd, made, True)
    finally:
        os.close(fd)
    return _FoundDevice(made, index, flags & (Iff.TUN | Iff.TAP | Iff.MULTI_QUEUE))


def _set_autoconf(index: int, on: bool) -> None:
    from .._link.autoconf import apply, switched
    from .._link.session import in_session

    async def work(session: Session) -> None:
        info = await session.get(index)
        if (now := await session.autoconf(info)) is not None:
            await apply(session, info, now, switched(now, on))

    in_session(work)


def _undo(made: _FoundDevice) -> None:
    with contextlib.suppress(AiotunError):  # another program has attached to it, or deleted it
        _delete_last(made)


async def delete_persistent(name: str, netns: namespaces.NetnsArg | None = None) -> None:
    """Delete a TUN or TAP device, as ``ip tuntap del`` does (TUNSETPERSIST).

    Everyone who may attach to the device may delete it, so its owner needs no privilege. A device
    that a program holds open is not deleted. (``ip tuntap del`` keeps only a single-queue device in
    that case. ``ip link del`` deletes the device anyway, and the program gets `DeviceLostError`.)

    Args:
        name: the device's name.
        netns: the network namespace that it is in: a `Namespace`, a name under /run/netns, a path
            or an open fd; None is the calling thread's.

    Raises:
        TypeError, ValueError: an argument is invalid.
        DeviceBusyError: a program, possibly this one, holds a queue of the device.
        DeviceMismatchError: the interface is not a TUN or TAP device.
        LinkError: the interface (ENODEV) or the namespace (ENOENT) does not exist.
        NotPermittedError: the device belongs to another user or group and CAP_NET_ADMIN is missing,
            or this user has no permission to open /dev/net/tun.
        TunUnavailableError: /dev/net/tun or its driver is missing.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: can't interrupt the deletion. The call waits until it ends (some 15 ms), and
    then raises CancelledError; the device is deleted.

    *Concurrency*: calls may overlap. Of several calls for one device, one succeeds.
    """
    check_name(name)
    namespaces.check_netns(netns)
    await threads.run_in(netns, lambda: _delete(name))


# With the ioctl, not with netlink's RTM_DELLINK. The latter needs CAP_NET_ADMIN even from an owner,
# and would delete the device of a program that attached after we checked.
def _delete(name: str) -> None:
    info = _link_info(name)
    device = info.tuntap
    if device is None:
        raise DeviceMismatchError(
            errno.EINVAL,
            f"{name} is not a TUN or TAP device, so it was not deleted; "
            f"see 'ip -d link show {name}'",
            name,
        )
    # For a single-queue device the kernel makes this check, in `_delete_last`. Netlink does not
    # report its queues, and `attached` then follows the carrier, which the program can switch off.
    if device.multi_queue and device.attached:
        raise _held_error(name)
    _delete_last(_FoundDevice(name, info.index, _kind_flags(device.mode, device.multi_queue)))


def _delete_last(found: _FoundDevice) -> None:
    """Attach a queue to a device, make it not persistent, and close the queue, which deletes it."""
    name = found.name
    fd = ioctl.open_node()
    try:
        try:
            ioctl.attach(fd, name, found.kind)
        except DeviceBusyError as error:
            raise _held_error(name) from error
        except NotPermittedError as error:
            text = f"{name} belongs to another user or group; delete it as its owner, or as root"
            raise NotPermittedError(error.errno, text, name) from error
        # If the device was deleted in the meantime, attaching has created a new one of the same
        # name. Closing the fd deletes that one again.
        if ioctl.get_index(name) != found.index:
            raise LinkError(errno.ENODEV, f"{name} was deleted by another program", name)
        ioctl.set_persist(fd, name, False)
    finally:
        os.close(fd)


def _held_error(name: str) -> DeviceBusyError:
    return DeviceBusyError(
        errno.EBUSY,
        f"a program holds {name}, so it was not deleted; close it there, or end that program",
        name,
    )


def _link_info(name: str) -> LinkInfo:
    return in_session(lambda session: session.get(name))


async def list_devices(netns: namespaces.NetnsArg | None = None) -> list[TunTapInfo]:
    """Return all TUN and TAP devices of a network namespace, persistent or not (RTM_GETLINK).

    This needs no privilege in the program's own namespace, and CAP_SYS_ADMIN for another one.

    Args:
        netns: the namespace: a `Namespace`, a name under /run/netns, a path or an open fd; None is
            the calling thread's.

    Returns:
        The devices, in the order in which they were created.

    Raises:
        TypeError, ValueError: `netns` is invalid.
        LinkError: the namespace does not exist (ENOENT), or the kernel rejected the request.
        NotPermittedError: this program has no permission to enter the namespace.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: can't interrupt the request. The call waits until it ends (a few ms), and then
    raises CancelledError.

    *Concurrency*: calls may overlap.
    """
    namespaces.check_netns(netns)

    def function() -> list[TunTapInfo]:
        return in_session(lambda session: session.devices())

    return await threads.run_in(netns, function)

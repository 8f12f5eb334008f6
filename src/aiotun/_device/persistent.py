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


class _Found:
    """A device, and what one has to say to attach to it. (A NamedTuple costs time at import.)"""

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

    It is down and has no address: ``Link(name)`` gives it those, and `open_tun` or `open_tap`
    attaches to it. An `owner` may do the latter without any privilege.

    Args:
        name: 1 to 15 bytes; None lets the kernel pick ``tunN`` or ``tapN``, and ``"vpn%d"`` takes
            the lowest free number.
        mode: ``"tun"`` for IP packets, ``"tap"`` for Ethernet frames.
        multi_queue: whether it takes several queues, 256 at most (IFF_MULTI_QUEUE). One that does
            is opened with ``queues`` above 1, or with ``multi_queue=True``.
        owner: the user, by name or number, who may attach without CAP_NET_ADMIN (TUNSETOWNER).
        group: the group whose members may, likewise (TUNSETGROUP). With both set both must fit;
            with neither anybody may who can open /dev/net/tun.
        vnet_header: whether packets come with the virtio-net header (IFF_VNET_HDR). Whoever
            attaches first has the last word on this and on `packet_info`.
        packet_info: whether packets come with the 4-byte ``tun_pi`` header (no IFF_NO_PI).
        netns: the network namespace to create it in: a `Namespace`, a name under /run/netns, a
            path or an open fd; None is the calling thread's.
        ipv6_autoconf: False: the kernel gives the device no IPv6 link-local address and solicits no
            routers when it comes up; True: it does; None leaves what is the kernel's default.

    Returns:
        The name that the device got.

    Raises:
        TypeError, ValueError: an argument is wrong, or there is no such user or group.
        DeviceBusyError: an interface of that name exists already. It is left as it is.
        DeviceMismatchError: the kernel refuses the name, or the owner or group, which a user
            namespace may not have.
        LinkError: there is no such namespace (ENOENT).
        NotPermittedError: CAP_NET_ADMIN is missing there, or /dev/net/tun may not be opened.
        TunUnavailableError: there is no /dev/net/tun, or no driver behind it.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    Where it raises there is no device.

    *Cancellation*: the creation is waited for (a few ms) and undone, unless a program has attached
    in the meantime; then the device goes when that program lets it go, or is left to it.

    *Concurrency*: may be called any number of times at once; of several for one name one succeeds.
    """
    if mode not in ("tun", "tap"):
        raise ValueError(f"mode is 'tun' or 'tap', not {mode!r}")
    wanted = check(
        mode, name, multi_queue=multi_queue, owner=owner, group=group,
        packet_info=packet_info, netns=netns, ipv6_autoconf=ipv6_autoconf,
    )  # fmt: skip
    flags = _kind(mode, wanted.multi_queue)
    if not wanted.packet_info:
        flags |= Iff.NO_PI
    if switch("vnet_header", vnet_header):
        flags |= Iff.VNET_HDR
    made = await threads.run_in(netns, lambda: _create(name or "", flags, wanted), undo=_undo)
    return made.name


def _kind(mode: Mode, multi_queue: bool) -> Iff:
    kind = Iff.TAP if mode == "tap" else Iff.TUN
    return kind | Iff.MULTI_QUEUE if multi_queue else kind


def _create(name: str, flags: Iff, wanted: Options) -> _Found:
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
        # Last: until now the device goes with the fd, whatever happens.
        ioctl.set_persist(fd, made, True)
    finally:
        os.close(fd)
    return _Found(made, index, flags & (Iff.TUN | Iff.TAP | Iff.MULTI_QUEUE))


def _set_autoconf(index: int, on: bool) -> None:
    from .._link.autoconf import apply, switched
    from .._link.session import in_session

    async def work(session: Session) -> None:
        info = await session.get(index)
        if (now := await session.autoconf(info)) is not None:
            await apply(session, info, now, switched(now, on))

    in_session(work)


def _undo(made: _Found) -> None:
    with contextlib.suppress(AiotunError):  # somebody else has it by now, or has deleted it
        _let_go(made)


async def delete_persistent(name: str, netns: namespaces.NetnsArg | None = None) -> None:
    """Delete a TUN or TAP device, as ``ip tuntap del`` does (TUNSETPERSIST).

    Whoever may attach to it may delete it: its owner needs no privilege. One that a program holds
    open is left alone, as ``ip tuntap del`` leaves a single-queue one. (``ip link del`` deletes it
    all the same, and the program gets `DeviceLostError`.)

    Args:
        name: its name.
        netns: the network namespace that it is in: a `Namespace`, a name under /run/netns, a path
            or an open fd; None is the calling thread's.

    Raises:
        TypeError, ValueError: an argument is wrong.
        DeviceBusyError: a program holds a queue of it, possibly this one.
        DeviceMismatchError: the interface is no TUN or TAP device.
        LinkError: there is no such interface (ENODEV) or namespace (ENOENT).
        NotPermittedError: it belongs to another user or group and CAP_NET_ADMIN is missing, or
            /dev/net/tun may not be opened.
        TunUnavailableError: there is no /dev/net/tun, or no driver behind it.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: the deletion is not interrupted. It is waited for (some 15 ms), and then the
    cancellation goes through, with the device deleted.

    *Concurrency*: may be called any number of times at once; of several for one device one
    succeeds.
    """
    check_name(name)
    namespaces.check_netns(netns)
    await threads.run_in(netns, lambda: _delete(name))


# By the ioctl, not by netlink's RTM_DELLINK: that takes CAP_NET_ADMIN of an owner too, and would
# pull the device away from under a program that attached while we looked.
def _delete(name: str) -> None:
    info = _get(name)
    device = info.tuntap
    if device is None:
        raise DeviceMismatchError(
            errno.EINVAL,
            f"{name} is no TUN or TAP device, and was left alone; see 'ip -d link show {name}'",
            name,
        )
    # A single-queue one the kernel refuses below; of that netlink tells no more than the carrier,
    # which the program may have switched off.
    if device.multi_queue and device.attached:
        raise _held(name)
    _let_go(_Found(name, info.index, _kind(device.mode, device.multi_queue)))


def _let_go(found: _Found) -> None:
    """Let a device go with its last queue, which is the one that this attaches."""
    name = found.name
    fd = ioctl.open_node()
    try:
        try:
            ioctl.attach(fd, name, found.kind)
        except DeviceBusyError as error:
            raise _held(name) from error
        except NotPermittedError as error:
            text = f"{name} belongs to another user or group; delete it as that one, or as root"
            raise NotPermittedError(error.errno, text, name) from error
        # The device may be gone, and attaching have made one of the same name: that goes with the
        # fd, and is not what was meant.
        if ioctl.get_index(name) != found.index:
            raise LinkError(errno.ENODEV, f"{name} was deleted by somebody else meanwhile", name)
        ioctl.set_persist(fd, name, False)
    finally:
        os.close(fd)


def _held(name: str) -> DeviceBusyError:
    return DeviceBusyError(
        errno.EBUSY,
        f"a program holds {name}, and it was left alone; close it there, or end that program",
        name,
    )


def _get(name: str) -> LinkInfo:
    return in_session(lambda session: session.get(name))


async def list_devices(netns: namespaces.NetnsArg | None = None) -> list[TunTapInfo]:
    """Give all TUN and TAP devices of a network namespace, persistent or not (RTM_GETLINK).

    It needs no privilege, unless the namespace is another than the program's.

    Args:
        netns: the namespace: a `Namespace`, a name under /run/netns, a path or an open fd; None is
            the calling thread's.

    Returns:
        What each of them is, in the order in which they were created.

    Raises:
        TypeError, ValueError: `netns` is of another type, or can't be one.
        LinkError: there is no such namespace (ENOENT), or the kernel refused.
        NotPermittedError: the namespace may not be entered, which takes CAP_SYS_ADMIN.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: the request is waited for (a few ms), and then the cancellation goes through.

    *Concurrency*: may be called any number of times at once.
    """
    namespaces.check_netns(netns)

    def function() -> list[TunTapInfo]:
        return in_session(lambda session: session.devices())

    return await threads.run_in(netns, function)

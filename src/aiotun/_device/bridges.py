"""Bridges, which join TAP devices and other interfaces to one network; by rtnetlink(7)."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from .._kernel import namespaces, threads
from .._kernel.words import parse_mac
from .._link.netlink import in_session
from .._link.values import check_name
from ..errors import AiotunError, DeviceBusyError, DeviceMismatchError, LinkError
from .options import switch

if TYPE_CHECKING:
    from .._link.info import LinkInfo
    from .._link.session import Session

__all__ = ["create_bridge", "delete_bridge"]

# br_private.h: BR_MIN_FORWARD_DELAY and BR_MAX_FORWARD_DELAY, in seconds. With STP the kernel
# silently replaces a value that is out of range by the nearest limit.
_DELAY_MIN, _DELAY_MAX = 2, 30


# Addresses, MTU and alias are not options here, because a `Link` can set them afterwards. The MAC
# is an option, because a bridge makes its IPv6 link-local address from the MAC that it comes up
# with. VLAN filtering is not supported: we have no way to say which interface is in which VLAN.
async def create_bridge(
    name: str,
    *,
    stp: bool = False,
    forward_delay: float | None = None,
    mac: str | None = None,
    up: bool = True,
    netns: namespaces.NetnsArg | None = None,
) -> None:
    """Create a bridge (RTM_NEWLINK with the kind ``bridge``).

    A TAP device joins the bridge with ``open_tap(bridge=...)``, and any interface joins it with
    `Link.set_master`. Use ``Link(name)`` to set the bridge's addresses and its MTU. The bridge
    stays until it is deleted.

    Args:
        name: the name, 1 to 15 bytes, without ``%d``.
        stp: whether the bridge runs the spanning tree protocol (IFLA_BR_STP_STATE), which finds
            loops between bridges. An interface that joins then waits twice the forward delay before
            it forwards packets.
        forward_delay: that delay in seconds (IFLA_BR_FORWARD_DELAY), 2 to 30; the kernel's default
            is 15. Only valid with `stp`, because no interface waits without it.
        mac: the hardware address, such as ``"02:00:00:00:00:01"``. By default a bridge has the
            lowest address of its interfaces, which changes when interfaces join and leave.
        up: whether to bring the bridge up.
        netns: the network namespace to create it in: a `Namespace`, a name under /run/netns, a
            path or an open fd; None is the calling thread's.

    Raises:
        TypeError, ValueError: an argument is invalid.
        DeviceBusyError: an interface of that name exists already (EEXIST).
        LinkError: the namespace does not exist (ENOENT), or the kernel rejected the request.
        NotPermittedError: CAP_NET_ADMIN is missing in the namespace.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: waits until the request ends (a few ms) and deletes the bridge again.

    *Concurrency*: calls may overlap. Of several calls for one name, one succeeds.
    """
    if "%" in check_name(name):
        raise ValueError(
            f"{name!r} is not a valid name for a bridge: the kernel picks no number for '%d'; "
            "write the number"
        )
    switch("stp", stp)
    switch("up", up)
    delay = None if forward_delay is None else _centiseconds(forward_delay, stp)
    address = None if mac is None else parse_mac(mac)
    namespaces.check_netns(netns)

    async def create(session: Session) -> LinkInfo:
        try:
            return await session.create_bridge(
                name, mac=address, stp=stp, forward_delay=delay, up=up
            )
        except LinkError as error:
            if error.errno != errno.EEXIST:
                raise
            text = f"{name} exists already; delete it, or choose another name"
            raise DeviceBusyError(errno.EEXIST, text, name) from error

    def function() -> LinkInfo:
        return in_session(create)

    def undo(made: LinkInfo) -> None:
        with contextlib.suppress(AiotunError):  # another program may have deleted it
            in_session(lambda session: session.delete(made))

    await threads.run_in(netns, function, undo=undo)


async def delete_bridge(name: str, netns: namespaces.NetnsArg | None = None) -> None:
    """Delete a bridge (RTM_DELLINK), up or not. The interfaces that are in it stay.

    Args:
        name: the bridge's name.
        netns: the network namespace that it is in: a `Namespace`, a name under /run/netns, a path
            or an open fd; None is the calling thread's.

    Raises:
        TypeError, ValueError: an argument is invalid.
        DeviceMismatchError: the interface is not a bridge. It was not changed.
        LinkError: the interface (ENODEV) or the namespace (ENOENT) does not exist, or the kernel
            rejected the request.
        NotPermittedError: CAP_NET_ADMIN is missing in the namespace.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: can't interrupt the request. The call waits until it ends (a few ms), and then
    raises CancelledError; the bridge is deleted.

    *Concurrency*: calls may overlap.
    """
    check_name(name)
    namespaces.check_netns(netns)

    async def delete(session: Session) -> None:
        info = await session.get(name)
        if (kind := await session.kind(info)) != "bridge":
            what = "" if kind is None else f" but an interface of the kind {kind!r}"
            text = (
                f"{name} is not a bridge{what}, so it was not deleted; see 'ip -d link show {name}'"
            )
            raise DeviceMismatchError(errno.EINVAL, text, name)
        await session.delete(info)

    def function() -> None:
        in_session(delete)

    await threads.run_in(netns, function)


def _centiseconds(seconds: float, stp: bool) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"forward_delay must be a number of seconds, got {seconds!r}")
    if not stp:
        raise ValueError("forward_delay needs stp=True: no interface waits without it")
    if not _DELAY_MIN <= seconds <= _DELAY_MAX:
        raise ValueError(
            f"forward_delay must be {_DELAY_MIN} to {_DELAY_MAX} seconds, got {seconds}"
        )
    return round(seconds * 100)

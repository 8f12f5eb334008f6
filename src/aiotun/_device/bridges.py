"""Bridges: what joins TAP devices, and a machine's wires, to one network; by rtnetlink(7)."""

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

# br_private.h: BR_MIN_FORWARD_DELAY and BR_MAX_FORWARD_DELAY, in seconds. With STP the kernel moves
# what is out of range into it without a word.
_DELAY_MIN, _DELAY_MAX = 2, 30


# What a Link can set afterwards (addresses, MTU, alias) is left to it. The MAC is not: of the one
# that it comes up with a bridge makes its IPv6 link-local address. VLAN filtering is left out: it
# is of no use without a way to say which interface is in which VLAN.
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

    A TAP device joins it with ``open_tap(bridge=...)`` or `Link.set_master`, another interface with
    the latter. ``Link(name)`` gives it addresses and an MTU. It stays until it is deleted.

    Args:
        name: its name, 1 to 15 bytes; taken as it is, without a ``%d``.
        stp: whether it runs the spanning tree protocol (IFLA_BR_STP_STATE), which finds loops
            between bridges. Each interface that joins then waits twice the forward delay before
            anything passes.
        forward_delay: that delay in seconds (IFLA_BR_FORWARD_DELAY), 2 to 30; the kernel's default
            is 15. Goes with `stp` only: without it nothing waits.
        mac: its hardware address, such as ``"02:00:00:00:00:01"``. Without one it has the lowest of
            its interfaces' addresses, which changes as they come and go.
        up: whether it comes up.
        netns: the network namespace to create it in: a `Namespace`, a name under /run/netns, a
            path or an open fd; None is the calling thread's.

    Raises:
        TypeError, ValueError: an argument is wrong.
        DeviceBusyError: an interface of that name exists already (EEXIST).
        LinkError: there is no such namespace (ENOENT), or the kernel refused.
        NotPermittedError: CAP_NET_ADMIN is missing there.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: the request is waited for (a few ms) and undone: no bridge is left.

    *Concurrency*: may be called any number of times at once; of several for one name one succeeds.
    """
    if "%" in check_name(name):
        raise ValueError(f"{name!r} has a '%', but no number is picked for a bridge; spell it out")
    switch("stp", stp)
    switch("up", up)
    delay = None if forward_delay is None else _hundredths(forward_delay, stp)
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
        with contextlib.suppress(AiotunError):  # somebody else may have deleted it
            in_session(lambda session: session.delete(made))

    await threads.run_in(netns, function, undo=undo)


async def delete_bridge(name: str, netns: namespaces.NetnsArg | None = None) -> None:
    """Delete a bridge (RTM_DELLINK), up or not. The interfaces in it stay, each by itself.

    Args:
        name: its name.
        netns: the network namespace that it is in: a `Namespace`, a name under /run/netns, a path
            or an open fd; None is the calling thread's.

    Raises:
        TypeError, ValueError: an argument is wrong.
        DeviceMismatchError: the interface is no bridge; it is left alone.
        LinkError: there is no such interface (ENODEV) or namespace (ENOENT), or the kernel refused.
        NotPermittedError: CAP_NET_ADMIN is missing there.
        ResourceLimitError: no thread can be started, or no file descriptor or memory is left.

    *Cancellation*: the request is not interrupted. It is waited for (a few ms), and then the
    cancellation goes through, with the bridge deleted.

    *Concurrency*: may be called any number of times at once.
    """
    check_name(name)
    namespaces.check_netns(netns)

    async def delete(session: Session) -> None:
        info = await session.get(name)
        if (kind := await session.kind(info)) != "bridge":
            what = "" if kind is None else f" but of the kind {kind!r}"
            text = (
                f"{name} is no bridge{what}, and was left alone; look at 'ip -d link show {name}'"
            )
            raise DeviceMismatchError(errno.EINVAL, text, name)
        await session.delete(info)

    def function() -> None:
        in_session(delete)

    await threads.run_in(netns, function)


def _hundredths(seconds: float, stp: bool) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"forward_delay is a number of seconds, not {seconds!r}")
    if not stp:
        raise ValueError("forward_delay goes with stp=True: without it no interface waits")
    if not _DELAY_MIN <= seconds <= _DELAY_MAX:
        raise ValueError(
            f"forward_delay may be {_DELAY_MIN} to {_DELAY_MAX} seconds, not {seconds}"
        )
    return round(seconds * 100)

"""Links: an interface's addresses, routes, MTU, state and events, by rtnetlink(7).

Each request runs in a short-lived thread that has entered the interface's network namespace. A
request therefore never blocks the event loop, and the program's own namespace stays as it is.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, TypeVar

from ._kernel import ioctl, namespaces, threads
from ._kernel.abi import MAX_QUEUE_LENGTH
from ._kernel.interface import Interface
from ._kernel.words import parse_mac
from ._link.netlink import in_session
from ._link.values import (
    AddressArg,
    LinkAddress,
    Route,
    RouteArg,
    check_name,
    check_new_name,
    is_utf8,
    parse_address,
    parse_route,
)
from .errors import LinkError, NotPermittedError

if TYPE_CHECKING:
    from ._link.events import LinkEvents
    from ._link.info import LinkInfo, LinkStats
    from ._link.session import Session

__all__ = ["Link", "LinkAddress", "Route"]

T = TypeVar("T")

# if.h: IFALIASZ is 256. The kernel accepts at most 255 bytes, and pyroute2 adds a NUL.
_ALIAS_BYTES = 254

_S32 = 0x7FFF_FFFF
_U32 = 0xFFFF_FFFF


class Link:
    """An interface as the kernel's routing sees it: addresses, routes, MTU, state.

    ``device.link`` is the link of a device. Call ``Link(name)`` for any other interface; each
    request then looks the interface up by its name.

    Args:
        name: the interface's name.
        netns: the interface's network namespace: a `Namespace`, a name under /run/netns, a path, or
            an open fd (duplicated here). None is the namespace of the thread that makes the first
            request.

    The first request opens the namespace, and the link holds it open from then on, so that the
    link still works after ``ip netns del``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the name is not a valid interface name.
        LinkError: `netns` is an fd that is not open.

    Every request raises `LinkError` with ENODEV if the interface does not exist, with ENOENT if
    the namespace does not exist (it is never created), and with the kernel's own message if the
    kernel refuses. It raises `NotPermittedError` without CAP_NET_ADMIN in the namespace. Reading
    needs no privilege, unless the namespace is not the program's own: entering another one takes
    CAP_SYS_ADMIN. A request raises `ResourceLimitError` if no thread can be started, or no file
    descriptor or memory is left.

    *Cancellation*: a request is not interrupted. The task waits until the request is done (a few
    ms), and then the cancellation goes through.

    *Concurrency*: any number of requests may be made at once; they are carried out one by one.
    """

    def __init__(self, name: str, netns: namespaces.NetnsArg | None = None) -> None:
        self._interface = Interface(check_name(name))
        self._netns = netns
        self._adopted = False
        # The thread of a request holds this lock. Otherwise a request that read the name earlier
        # could overwrite what a later request found out.
        self._lock = threading.Lock()
        namespaces.check_netns(netns)
        if isinstance(netns, int) or hasattr(netns, "fileno"):
            # Duplicate the fd now, not at the first request: by then the caller may have closed it,
            # and its number may belong to another file.
            self._interface.namespace = namespaces.NamespaceFd(namespaces.open_netns(netns))

    @classmethod
    def _held(cls, interface: Interface) -> Link:
        """Make the link of a device, which has looked everything up already.

        Args:
            interface: shared with the device and kept up to date. Requests find it by its index,
                not by its name. If its namespace is not known, every
                request raises `LinkError`.
        """
        # Not by __init__, which accepts only names in UTF-8. The kernel accepts others.
        self = cls.__new__(cls)
        self._interface = interface
        self._netns = None
        self._adopted = True
        self._lock = threading.Lock()
        return self

    @property
    def name(self) -> str:
        """The interface's name; updated by `rename`, by `info` and by `events`."""
        return self._interface.name

    def __repr__(self) -> str:
        return f"<Link {self.name}>"

    async def up(self) -> None:
        """Bring the link up (IFF_UP).

        Raises:
            LinkError: there is no such link or namespace, or the kernel refused.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        await self._set("bring the link up", state="up")

    async def down(self) -> None:
        """Take the link down (IFF_UP off). The kernel removes its routes and IPv6 addresses.

        Raises:
            LinkError: there is no such link or namespace, or the kernel refused.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        await self._set("take the link down", state="down")

    async def set_mtu(self, mtu: int) -> None:
        """Set the MTU (IFLA_MTU).

        Args:
            mtu: the largest IP packet in bytes, without any link-layer header. The valid range
                depends on the interface: 68 to 65535 for TUN, 68 to 65521 for TAP. Below 1280 a
                link has no IPv6: the kernel removes its IPv6 addresses and routes.

        Raises:
            ValueError: the MTU is negative or does not fit into 31 bits.
            LinkError: the interface can't have this MTU, or there is no such link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        _check_number(mtu, "an MTU", _S32)

        async def work(session: Session, info: LinkInfo) -> None:
            await session.set(
                info,
                f"set the MTU to {mtu}",
                f"'ip -d link show {info.name}' shows the smallest (minmtu) and largest (maxmtu)",
                mtu=mtu,
            )

        await self._request(work)

    async def set_mac(self, mac: str) -> None:
        """Set the hardware address (IFLA_ADDRESS), also while the link is up.

        Args:
            mac: a unicast address, such as ``"02:00:00:00:00:01"``.

        Raises:
            ValueError: `mac` is not a valid unicast MAC.
            LinkError: the interface has no MAC (a TUN device), or there is no such link or
                namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        address = parse_mac(mac)
        await self._set(
            f"set the MAC to {address}",
            "a TUN device has no MAC, and some interfaces must be taken down first",
            address=address,
        )

    async def set_txqueuelen(self, packets: int) -> None:
        """Set the length of the transmit queue (IFLA_TXQLEN).

        Args:
            packets: how many packets the queue holds. On a TUN or TAP device this is the length of
                each of its queues, and at most 524288. Newer kernels allow at most 32767 (Linux 7.2
                and some stable releases before it).

        Raises:
            ValueError: the number is negative or does not fit into 32 bits.
            LinkError: the interface can't have a queue of this length, or there is no such link or
                namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        _check_number(packets, "a queue length", _U32)

        async def work(session: Session, info: LinkInfo) -> None:
            try:
                await session.set(info, f"set the queue length to {packets}", txqlen=packets)
            except NotPermittedError as error:
                if info.tuntap is None or packets <= MAX_QUEUE_LENGTH:
                    raise
                text = (
                    f"could not set the queue length of {info.name} to {packets}: a queue of a "
                    f"TUN or TAP device holds at most {MAX_QUEUE_LENGTH} packets"
                )
                raise LinkError(error.errno, text, info.name) from error

        await self._request(work)

    async def set_gso_max(self, *, segs: int | None = None, size: int | None = None) -> None:
        """Limit the super-packets that the kernel sends to the link (IFLA_GSO_MAX_SEGS, _SIZE).

        A tunnel asks for super-packets that fit one run of datagrams: see
        `aiotun.datagrams.segments_for`. A TCP connection keeps the limits that it began with.

        Args:
            segs: how many segments a super-packet has at most, from 1.
            size: how many bytes it has at most, with its headers; 65536 on a TUN or TAP device.

        Raises:
            TypeError: neither of them was given, or one is not an int.
            ValueError: a number is negative or does not fit into 32 bits.
            LinkError: the interface can't have this limit, or there is no such link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        attributes = {}
        if segs is not None:
            _check_number(segs, "a number of segments", _U32)
            attributes["gso_max_segs"] = segs
        if size is not None:
            _check_number(size, "a size", _U32)
            attributes["gso_max_size"] = size
        if not attributes:
            raise TypeError("set_gso_max needs 'segs', 'size' or both")
        texts = [f"{name} to {value}" for name, value in attributes.items()]
        await self._set(
            f"set {' and '.join(texts)}",
            f"'ip -d link show {self.name}' shows the largest (tso_max_segs, tso_max_size)",
            **attributes,
        )

    async def set_alias(self, text: str) -> None:
        """Set the link's alias, a free text (IFLA_IFALIAS); an empty text removes it.

        Args:
            text: at most 254 bytes.

        Raises:
            ValueError: the text is longer, contains a NUL, or can't be encoded as UTF-8.
            LinkError: there is no such link or namespace, or the kernel refused.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        if not isinstance(text, str):
            raise TypeError(f"an alias must be a str, got {type(text).__name__}")
        if len(text.encode(errors="replace")) > _ALIAS_BYTES or "\0" in text:
            raise ValueError(
                f"the alias {text!r} has a NUL or more than {_ALIAS_BYTES} bytes; shorten it"
            )
        if not is_utf8(text):
            raise ValueError(f"the alias {text!r} can't be encoded as UTF-8; remove the surrogates")
        await self._set("set the alias", ifalias=text)

    async def rename(self, name: str) -> None:
        """Rename the interface (IFLA_IFNAME); `name` then returns the new name.

        Args:
            name: the new name. In ``"vpn%d"`` the kernel replaces ``%d`` by the lowest free number.

        Raises:
            ValueError: `name` is not a valid interface name.
            LinkError: the name is taken, this kernel can't rename a link that is up (EBUSY), or
                there is no such link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        check_new_name(name)

        async def work(session: Session, info: LinkInfo) -> None:
            try:
                await session.set(
                    info, f"set the name to {name}", "choose another name", ifname=name
                )
            except LinkError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise LinkError(
                    errno.EBUSY,
                    f"this kernel can't rename {info.name} while it is up; take it down first",
                    info.name,
                ) from error

        await self._request(work)

    async def set_master(self, bridge: str | None) -> None:
        """Attach the link to a bridge (IFLA_MASTER); None detaches it.

        Args:
            bridge: the name of a bridge (or bond) in the same namespace.

        Raises:
            ValueError: `bridge` is not a valid interface name.
            LinkError: there is no such bridge, it does not accept this link, or there is no such
                link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        if bridge is not None:
            check_name(bridge)

        async def work(session: Session, info: LinkInfo) -> None:
            if bridge is None:
                await session.set(info, "detach the link from its master", master=0)
                return
            hint = f"check that {bridge} is a bridge"
            if info.tuntap is not None and info.tuntap.mode == "tun":
                hint = "a bridge forwards frames and a TUN device carries packets: use a TAP device"
            master = await session.get(bridge)
            await session.set(info, f"set the master to {bridge}", hint, master=master.index)

        await self._request(work)

    async def add_address(self, address: AddressArg) -> None:
        """Add an address (RTM_NEWADDR); it can be used as soon as this returns.

        IPv6 duplicate address detection is skipped: the wire of a TUN or TAP device ends in this
        program, so that no other host can have the address.

        Args:
            address: ``"10.0.0.1/24"``, ``"fd00::1/64"``, ``"10.0.0.1 peer 10.0.0.2/32"``, or an
                interface object of the ipaddress module.

        Raises:
            ValueError: `address` is not a valid address.
            LinkError: the link already has the address (EEXIST), or there is no such link or
                namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        wanted = parse_address(address)

        async def work(session: Session, info: LinkInfo) -> None:
            await session.add_address(info, wanted)
            if info.up:
                await session.settle(info, [wanted])

        await self._request(work)

    async def remove_address(self, address: AddressArg) -> None:
        """Remove an address (RTM_DELADDR).

        Args:
            address: as for `add_address`, with the prefix length and peer that it was added with.

        Raises:
            ValueError: `address` is not a valid address.
            LinkError: the link does not have the address (EADDRNOTAVAIL), or there is no such link
                or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        unwanted = parse_address(address)
        await self._request(lambda session, info: session.remove_address(info, unwanted))

    async def addresses(self) -> list[LinkAddress]:
        """Return the link's addresses, including those that the kernel added (RTM_GETADDR).

        Raises:
            LinkError: there is no such link or namespace.
        """
        return await self._request(lambda session, info: session.addresses(info))

    async def add_route(
        self,
        dst: RouteArg | Route,
        via: str | IPv4Address | IPv6Address | None = None,
        metric: int | None = None,
        table: int | None = None,
        onlink: bool = False,
    ) -> None:
        """Add a route through this link (RTM_NEWROUTE). The link must be up.

        Args:
            dst: a network, an address or ``"default"``, as text or as an object of the ipaddress
                module. The text may hold the other arguments too:
                ``"10.2.0.0/16 via 10.0.0.2 metric 50 table 100"``, or
                ``"default via 172.31.1.1 onlink"``.
            via: the gateway. Without one the destinations are on the link itself.
            metric: the route with the smallest metric wins. The default is the kernel's.
            table: the number of the routing table. The default is the main table.
            onlink: treat the gateway as a neighbor on this link, even if it is in none of the
                link's networks (RTNH_F_ONLINK). Without it there must be a route to the gateway.

        Raises:
            ValueError: the arguments are not a valid route.
            LinkError: the route exists already (EEXIST), the gateway can't be reached
                (ENETUNREACH, for IPv6 EHOSTUNREACH), the link is down, or there is no such link or
                namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        wanted = parse_route(dst, via, metric, table, onlink)
        await self._request(lambda session, info: session.add_route(info, wanted))

    async def remove_route(
        self,
        dst: RouteArg | Route,
        via: str | IPv4Address | IPv6Address | None = None,
        metric: int | None = None,
        table: int | None = None,
    ) -> None:
        """Remove a route through this link (RTM_DELROUTE).

        Args:
            dst: as for `add_route`, or a Route from `routes`.
            via: the gateway. Without one, a route with any gateway matches.
            metric: the metric. Without one, the kernel removes the first route that matches.
            table: the number of the routing table. The default is the main table.

        Raises:
            ValueError: the arguments are not a valid route.
            LinkError: there is no such route (ESRCH), link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        unwanted = parse_route(dst, via, metric, table)
        await self._request(lambda session, info: session.remove_route(info, unwanted))

    async def routes(self) -> list[Route]:
        """Return the unicast routes through this link, of every table but 'local' (RTM_GETROUTE).

        In the local table (255) the kernel keeps entries for addresses, broadcasts and multicasts.
        Of a multipath route, only the hops through this link are returned.

        Raises:
            LinkError: there is no such link or namespace.
        """
        return await self._request(lambda session, info: session.routes(info))

    async def info(self) -> LinkInfo:
        """Return the link's current properties (RTM_GETLINK), and update `name`.

        Raises:
            LinkError: there is no such link or namespace.
        """

        async def work(session: Session, info: LinkInfo) -> LinkInfo:
            return info

        return await self._request(work)

    async def stats(self) -> LinkStats:
        """Return the kernel's traffic counters (IFLA_STATS64).

        Raises:
            LinkError: there is no such link or namespace.
        """
        return await self._request(lambda session, info: session.stats(info))

    def events(self) -> LinkEvents:
        """Watch the link: an asynchronous iterator of `LinkEvent`.

        ::

            async with link.events() as events:
                await link.up()
                async for event in events:
                    print(event.kind)

        Watching begins when ``async with`` enters its block: every later change is an event, and no
        earlier one is. With ``async for event in link.events()`` alone, watching begins during the
        first step. Only changes are events; use `info` and `addresses` for the current state.

        The iterator watches the link that has this name when watching begins, and follows that link
        through renames. By the time an event is returned, `name`, and a device's `name` and `mtu`,
        are up to date. The last event is ``"deleted"``; then iteration ends. A link that is moved
        to another network namespace, also by `move_to_netns`, counts as deleted: call `events`
        again to watch it there.

        A reader that keeps up gets every event, in the kernel's order. If a reader falls more than
        256 changes behind, or the netlink socket overruns, pending changes are coalesced: the
        reader gets the events that lead from the last state it knows to the current one. An address
        that was added and removed in between is then left out. That the link is down, or deleted,
        is never left out.

        All iterators of a network namespace share one thread, which ends when the last one closes.

        Returns:
            An iterator, which is also an asynchronous context manager, with ``aclose()``. Entering
            it, or its first step, raises LinkError (ENODEV) if there is no such link, LinkError
            (ENOENT) if there is no such namespace, and NotPermittedError if the program may not
            enter the namespace.

        *Cancellation*: a step that is cancelled loses no event.

        *Concurrency*: any number of iterators may be in use, in any number of event loops.

        Source: RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR (``linux/rtnetlink.h``).
        """
        from ._link.events import LinkEvents

        return LinkEvents(self._interface, self._namespace)

    async def move_to_netns(self, netns: namespaces.NetnsArg) -> None:
        """Move the interface to another network namespace (IFLA_NET_NS_FD), and this link with it.

        A device continues to receive and send. In the new namespace the link is down and has no
        addresses, routes or master. Its index changes if that number is taken there. Iterators of
        `events` return ``"deleted"``.

        Args:
            netns: a `Namespace`, the name of one under /run/netns, a path
                (``"/proc/1/ns/net"``), or an open fd.

        Raises:
            TypeError, ValueError: `netns` can't be a namespace.
            LinkError: there is no such namespace (ENOENT; it is never created), it already has an
                interface of this name (EEXIST), the kernel does not move this interface (EINVAL,
                for example `lo`), or there is no such link. The interface has not moved then.
            NotPermittedError: CAP_NET_ADMIN or CAP_SYS_ADMIN is missing in one of the namespaces.
        """
        if netns is None:
            raise TypeError("move_to_netns needs a namespace: a name, a path or an open fd")
        namespaces.check_netns(netns)
        target = namespaces.NamespaceFd(namespaces.open_netns(netns))
        self._namespace()
        known = self._interface

        async def move(session: Session, elsewhere: bool) -> str:
            info = await session.get(known.name if known.index is None else known.index, known.name)
            what = f"move the link to the network namespace {netns}"
            hint = (
                "if that namespace has an interface of this name, rename one of the two; some "
                "interfaces, such as lo, can't be moved"
            )
            attributes: dict[str, int | str] = {"net_ns_fd": target.fd}
            # Without the name, Linux 5.10 says EINVAL if it is taken there. In the namespace where
            # the link is already, Linux 6.1 would take the name for a wish to rename it.
            if elsewhere:
                attributes["ifname"] = info.name
            await session.set(info, what, hint, **attributes)
            return info.name

        def function() -> None:
            with self._lock:
                # Enter the target first. If we may not enter it, fail before the interface moves,
                # as we could not follow it.
                namespaces.setns(target.fd)
                namespaces.setns(self._namespace().fd)
                elsewhere = not os.path.sameopenfile(target.fd, self._namespace().fd)
                name = in_session(lambda session: move(session, elsewhere))
                self._interface.namespace = target
                namespaces.setns(target.fd)
                # Find it by its name, which it keeps: the kernel has just checked that no other
                # interface in the target has that name.
                index = ioctl.get_index(name)
                if known.index is not None:
                    known.index = index
                known.follow(index)

        await threads.run(function)

    async def _set(self, what: str, hint: str = "", **attributes: int | str) -> None:
        await self._request(lambda session, info: session.set(info, what, hint, **attributes))

    async def _request(self, work: Callable[[Session, LinkInfo], Awaitable[T]]) -> T:
        """Look the link up and call `work` with it, in one rtnetlink session in another thread."""
        self._namespace()

        async def conversation(session: Session) -> T:
            known = self._interface
            info = await session.get(known.name if known.index is None else known.index, known.name)
            try:
                return await work(session, info)
            finally:
                # In this thread, so that the name is updated even if the caller was cancelled.
                known.follow(info.index)

        def function() -> T:
            with self._lock:
                # Only with the lock held: the request before this one may have moved the link.
                namespaces.setns(self._namespace().fd)
                return in_session(conversation)

        return await threads.run(function)

    def _namespace(self) -> namespaces.NamespaceFd:
        """Return the link's namespace; the first call opens it."""
        if self._interface.namespace is None:
            if self._adopted:  # not this thread's: an interface of that name here is another
                name = self._interface.name
                text = (
                    f"{name} is in a network namespace that this program can't look into, so its "
                    "link can't be asked or changed from here; do that inside the namespace, or "
                    "take the fd over where this program has CAP_NET_ADMIN in it"
                )
                raise LinkError(errno.ENODEV, text, name)
            self._interface.namespace = namespaces.NamespaceFd(namespaces.open_netns(self._netns))
        return self._interface.namespace


def _check_number(value: object, what: str, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, got {type(value).__name__}")
    if not 0 <= value <= highest:
        raise ValueError(f"{what} must be 0 to {highest}, got {value}")

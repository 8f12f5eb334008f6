"""Links: an interface's addresses, routes, MTU, state and events, by rtnetlink(7).

A request runs in a short-lived thread, inside the interface's network namespace, so that neither
the event loop nor the program's own namespace has a part in it.
"""

from __future__ import annotations

import errno
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

# if.h: IFALIASZ is 256, and the kernel wants less of what it is sent: pyroute2 sends a NUL too.
_ALIAS_BYTES = 254

_S32 = 0x7FFF_FFFF
_U32 = 0xFFFF_FFFF


class Link:
    """An interface as the kernel's routing sees it: addresses, routes, MTU, state.

    ``device.link`` is one, and this makes one for any interface, looked up at each request.

    Args:
        name: the interface's name.
        netns: the network namespace that it is in: a `Namespace`, a name under /run/netns, a path,
            or an open fd (duplicated here). None is the namespace of the thread that makes the
            first request.

    The namespace is opened at the first request and held from then on, so that the link works on
    after ``ip netns del``.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the name is none that an interface can have.
        LinkError: `netns` is an fd that is not open.

    Every request raises `LinkError` with ENODEV where the interface is not there, with ENOENT where
    the namespace is not there (it is never created), and with the kernel's own words where it
    refuses; `NotPermittedError` without CAP_NET_ADMIN there. Reading needs no privilege, unless
    the namespace is another than the program's: entering it takes CAP_SYS_ADMIN. Where no thread
    can be started, or no file descriptor or memory is left, it raises `ResourceLimitError`.

    *Cancellation*: a request is not interrupted. It is waited for (a few ms), and then the
    cancellation goes through, with the request done.

    *Concurrency*: any number of requests may be made at once; they are carried out one by one.
    """

    def __init__(self, name: str, netns: namespaces.NetnsArg | None = None) -> None:
        self._interface = Interface(check_name(name))
        self._netns = netns
        self._adopted = False
        # Held during a request, in its thread: what one finds out (the name) must not be
        # overwritten by another that looked before.
        self._lock = threading.Lock()
        namespaces.check_netns(netns)
        if isinstance(netns, int) or hasattr(netns, "fileno"):
            # Now and not at first use: the caller may close it, and the number be used again.
            self._interface.namespace = namespaces.NamespaceFd(namespaces.open_netns(netns))

    @classmethod
    def _held(cls, interface: Interface) -> Link:
        """Make the link of a device, which has looked everything up already.

        Args:
            interface: shared with the device and kept up to date; found by its index, from now
                on, whatever its name. Where its namespace is not known, every request raises.
        """
        # Not by __init__: it takes only names in UTF-8, and an interface may have another.
        self = cls.__new__(cls)
        self._interface = interface
        self._netns = None
        self._adopted = True
        self._lock = threading.Lock()
        return self

    @property
    def name(self) -> str:
        """The interface's name; follows `rename`, what `info` finds and what `events` sees."""
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
        """Take the link down (IFF_UP off). Its routes go, and its IPv6 addresses too.

        Raises:
            LinkError: there is no such link or namespace, or the kernel refused.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        await self._set("take the link down", state="down")

    async def set_mtu(self, mtu: int) -> None:
        """Set the MTU (IFLA_MTU).

        Args:
            mtu: the largest IP packet in bytes, without any link-layer header. What an interface
                takes is its own: 68 to 65535 for TUN, to 65521 for TAP. Below 1280 a link has no
                IPv6: the kernel removes its IPv6 addresses and routes.

        Raises:
            ValueError: the MTU is negative or no 31-bit number.
            LinkError: the interface can't have it, or there is no such link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        _check_number(mtu, "an MTU", _S32)

        async def work(session: Session, info: LinkInfo) -> None:
            await session.set(
                info,
                f"set the MTU to {mtu}",
                f"'ip -d link show {info.name}' tells the minmtu and maxmtu",
                mtu=mtu,
            )

        await self._request(work)

    async def set_mac(self, mac: str) -> None:
        """Set the hardware address (IFLA_ADDRESS), also while the link is up.

        Args:
            mac: such as ``"02:00:00:00:00:01"``; unicast.

        Raises:
            ValueError: this is no MAC that an interface can have.
            LinkError: the interface has none (a TUN device), or there is no such link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        address = parse_mac(mac)
        await self._set(
            f"set the MAC to {address}",
            "a TUN device has no MAC, and some interfaces must be down for it",
            address=address,
        )

    async def set_txqueuelen(self, packets: int) -> None:
        """Set the length of the queue towards the wire (IFLA_TXQLEN).

        Args:
            packets: how many packets it holds; on a TUN or TAP device each of its queues does,
                and at most 524288.

        Raises:
            ValueError: the number is negative or no 32-bit number.
            LinkError: the interface can't have so long a queue, or there is no such link or
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

    async def set_alias(self, text: str) -> None:
        """Set the free text that is kept with the link (IFLA_IFALIAS); an empty one removes it.

        Args:
            text: at most 254 bytes.

        Raises:
            ValueError: it is longer, or contains a NUL.
            LinkError: there is no such link or namespace, or the kernel refused.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        if not isinstance(text, str):
            raise TypeError(f"an alias is a str, not {type(text).__name__}")
        if len(text.encode(errors="replace")) > _ALIAS_BYTES or "\0" in text:
            raise ValueError(f"the alias {text!r} has a NUL or more than {_ALIAS_BYTES} bytes")
        if not is_utf8(text):
            raise ValueError(f"the alias {text!r} can't be encoded as UTF-8; leave surrogates out")
        await self._set("set the alias", ifalias=text)

    async def rename(self, name: str) -> None:
        """Give the interface another name (IFLA_IFNAME); `name` follows.

        Args:
            name: the name; ``"vpn%d"`` takes the lowest free number.

        Raises:
            ValueError: this is no name that an interface can have.
            LinkError: the name is taken, the kernel renames no link that is up (EBUSY), or there
                is no such link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        check_new_name(name)

        async def work(session: Session, info: LinkInfo) -> None:
            try:
                await session.set(info, f"set the name to {name}", "take another", ifname=name)
            except LinkError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise LinkError(
                    errno.EBUSY,
                    f"this kernel does not rename {info.name} while it is up; take it down first",
                    info.name,
                ) from error

        await self._request(work)

    async def set_master(self, bridge: str | None) -> None:
        """Attach the link to a bridge, or release it with None (IFLA_MASTER).

        Args:
            bridge: the name of a bridge (or bond) in the same namespace.

        Raises:
            ValueError: this is no name that an interface can have.
            LinkError: there is no such bridge, it takes no such link, or there is no such link or
                namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        if bridge is not None:
            check_name(bridge)

        async def work(session: Session, info: LinkInfo) -> None:
            if bridge is None:
                await session.set(info, "release the link from its master", master=0)
                return
            hint = f"look whether {bridge} is a bridge"
            if info.tuntap is not None and info.tuntap.mode == "tun":
                hint = "a TUN device carries packets, and a bridge joins frames only: use a TAP"
            master = await session.get(bridge)
            await session.set(info, f"set the master to {bridge}", hint, master=master.index)

        await self._request(work)

    async def add_address(self, address: AddressArg) -> None:
        """Add an address (RTM_NEWADDR), usable at once.

        IPv6 duplicate address detection is left out: it would ask hosts on a wire that ends here.

        Args:
            address: ``"10.0.0.1/24"``, ``"fd00::1/64"``, ``"10.0.0.1 peer 10.0.0.2/32"``, or an
                interface object of the ipaddress module.

        Raises:
            ValueError: this is no address.
            LinkError: the link has it already (EEXIST), or there is no such link or namespace.
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
            address: as for `add_address`, with prefix length and peer as they were added.

        Raises:
            ValueError: this is no address.
            LinkError: the link does not have it (EADDRNOTAVAIL), or there is no such link or
                namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        unwanted = parse_address(address)
        await self._request(lambda session, info: session.remove_address(info, unwanted))

    async def addresses(self) -> list[LinkAddress]:
        """Give the link's addresses, those that the kernel added itself among them (RTM_GETADDR).

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
                module. A text may go on: ``"10.2.0.0/16 via 10.0.0.2 metric 50 table 100"``, or
                ``"default via 172.31.1.1 onlink"``.
            via: the gateway; without one the destinations are on the link itself.
            metric: the smallest wins; the kernel's default unless given.
            table: the number of the routing table; the main one unless given.
            onlink: whether to take the gateway for a neighbour on this link, though it is in none
                of the link's networks (RTNH_F_ONLINK). Otherwise there must be a route to it.

        Raises:
            ValueError: this is no route.
            LinkError: it exists already (EEXIST), the gateway can't be reached (ENETUNREACH, for
                IPv6 EHOSTUNREACH), the link is down, or there is no such link or namespace.
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
            via: the gateway; without one, that of the route found is not looked at.
            metric: the metric; without one the kernel takes the first route that fits.
            table: the number of the routing table; the main one unless given.

        Raises:
            ValueError: this is no route.
            LinkError: there is no such route (ESRCH), link or namespace.
            NotPermittedError: CAP_NET_ADMIN is missing.
        """
        unwanted = parse_route(dst, via, metric, table)
        await self._request(lambda session, info: session.remove_route(info, unwanted))

    async def routes(self) -> list[Route]:
        """Give the unicast routes through this link, of every table but 'local' (RTM_GETROUTE).

        The local table (255) is the kernel's own bookkeeping of addresses, broadcasts and
        multicasts. Where a route spreads over several links, what goes through this one is given.

        Raises:
            LinkError: there is no such link or namespace.
        """
        return await self._request(lambda session, info: session.routes(info))

    async def info(self) -> LinkInfo:
        """Give what the link is now (RTM_GETLINK); `name` follows it.

        Raises:
            LinkError: there is no such link or namespace.
        """

        async def work(session: Session, info: LinkInfo) -> LinkInfo:
            return info

        return await self._request(work)

    async def stats(self) -> LinkStats:
        """Give the kernel's traffic counters (IFLA_STATS64).

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

        Watching has begun when ``async with`` has entered its block: whatever happens from then on
        is an event, and nothing that happened before. With ``async for event in link.events()``
        alone it begins during the first step. Only changes are events; ask `info` and `addresses`
        for what is so already.

        The link is the one that has this name when watching begins, whatever it is called later.
        `name`, and a device's `name` and `mtu`, are right as soon as an event is there. The last
        event is ``"deleted"``; then iteration ends. A link that is moved to another network
        namespace, by `move_to_netns` too, is deleted from where it was: watch it anew there.

        Events come in the kernel's order, and none is left out, to a reader who keeps up. Of one
        who is more than 256 changes behind, and where the kernel tells faster than can be listened
        (a netlink socket overrun), the changes are summed up: he gets the events that lead from the
        last state he knows to the present one. An address that came and went in between is then
        left out; that the link is down, or gone, never is.

        All that watch a network namespace share one thread, which ends with the last of them.

        Returns:
            An iterator, also an asynchronous context manager, with ``aclose()``. Entering it, or
            its first step, raises LinkError (ENODEV) where there is no such link, LinkError
            (ENOENT) where there is no such namespace, and NotPermittedError where that may not be
            entered.

        *Cancellation*: a step that is cancelled loses no event.

        *Concurrency*: any number of iterators may be at work, in any number of event loops.

        Source: RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR (``linux/rtnetlink.h``).
        """
        from ._link.events import LinkEvents

        return LinkEvents(self._interface, self._namespace)

    async def move_to_netns(self, netns: namespaces.NetnsArg) -> None:
        """Move the interface to another network namespace (IFLA_NET_NS_FD), and this link with it.

        A device goes on receiving and sending. The link is down there, and its addresses, routes
        and master are gone; its index is another where that one is taken there. Who watches it
        hears ``"deleted"``.

        Args:
            netns: a `Namespace`, the name of one under /run/netns, a path
                (``"/proc/1/ns/net"``), or an open fd.

        Raises:
            TypeError, ValueError: `netns` can be none.
            LinkError: there is no such namespace (ENOENT; it is never created), it has an interface
                of this name (EEXIST), the interface is one that stays where it is (EINVAL: `lo`,
                for one), or there is no such link. It has not moved then.
            NotPermittedError: CAP_NET_ADMIN or CAP_SYS_ADMIN is missing here or there.
        """
        if netns is None:
            raise TypeError("move_to_netns needs a namespace: a name, a path or an open fd")
        namespaces.check_netns(netns)
        target = namespaces.NamespaceFd(namespaces.open_netns(netns))
        self._namespace()
        known = self._interface

        async def move(session: Session) -> str:
            info = await session.get(known.name if known.index is None else known.index, known.name)
            what = f"move the link to the network namespace {netns}"
            hint = (
                "if its name is taken there, rename one of the two; lo and its like can't be moved"
            )
            await session.set(info, what, hint, net_ns_fd=target.fd)
            return info.name

        def function() -> None:
            with self._lock:
                # There first: where we may not go we could not follow it.
                namespaces.setns(target.fd)
                namespaces.setns(self._namespace().fd)
                name = in_session(move)
                self._interface.namespace = target
                namespaces.setns(target.fd)
                # By its name, which it keeps: that it had there alone a moment ago.
                index = ioctl.get_index(name)
                if known.index is not None:
                    known.index = index
                known.follow(index)

        await threads.run(function)

    async def _set(self, what: str, hint: str = "", **attributes: int | str) -> None:
        await self._request(lambda session, info: session.set(info, what, hint, **attributes))

    async def _request(self, work: Callable[[Session, LinkInfo], Awaitable[T]]) -> T:
        """Look the link up and do something with it, in one conversation in another thread."""
        self._namespace()

        async def conversation(session: Session) -> T:
            known = self._interface
            info = await session.get(known.name if known.index is None else known.index, known.name)
            try:
                return await work(session, info)
            finally:
                # Here, in the thread, so that it is right also where the caller was cancelled.
                known.follow(info.index)

        def function() -> T:
            with self._lock:
                # Not earlier: the request before this one may have moved the link.
                namespaces.setns(self._namespace().fd)
                return in_session(conversation)

        return await threads.run(function)

    def _namespace(self) -> namespaces.NamespaceFd:
        """Give the namespace that the link is in, opened by the first who asks."""
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
        raise TypeError(f"{what} is an int, not {type(value).__name__}")
    if not 0 <= value <= highest:
        raise ValueError(f"{what} of {value} is out of range; it may be 0 to {highest}")

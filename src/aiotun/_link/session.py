"""Conversations with rtnetlink(7), by pyroute2, in the thread and namespace of whoever calls.

This is the only module that imports pyroute2. It is loaded itself only at the first request, in the
thread that makes it, since pyroute2 takes some 80 ms. A conversation has a selector loop of its
own, because pyroute2 can't open netlink on uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import selectors
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .._kernel import places
from .._kernel.limits import LIMITS, limit_error, naming_limits
from ..errors import AiotunError, LinkError, NotPermittedError
from . import messages as link_messages
from .info import Autoconf, LinkInfo, LinkStats, TunTapInfo
from .values import IPV6_MIN_MTU, LinkAddress, Route

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Session", "in_session", "message_parser", "opening"]

T = TypeVar("T")

# netlink.h
_SOL_NETLINK = 270
_NETLINK_EXT_ACK = 11
_NLM_F_DUMP_INTR = 0x10

# if_addr.h
_IFA_F_NODAD = 0x02

# rtnetlink.h: enum rt_scope_t
_SCOPE_LINK = 253
_SCOPE_NOWHERE = 255

_TABLE_LOCAL = 255
_RTN_LOCAL = 2

_SETTABLE = frozenset(
    {"address", "af_spec", "ifalias", "ifname", "master", "mtu", "net_ns_fd", "state", "txqlen"}
)

_HINTS = {
    errno.ENODEV: "look for it with 'ip link'; it may have been deleted or renamed",
    errno.EPERM: "it needs CAP_NET_ADMIN in the interface's network namespace: run as root or with "
    "that capability",
    errno.EACCES: "a sandbox or a security module of this machine forbids it",
    errno.ENETDOWN: "bring the link up first",
    errno.ENOBUFS: "the kernel is short of memory for netlink; try again",
}

_importing = threading.Lock()


def _pyroute2() -> Any:
    """Import pyroute2, once even where two threads come at the same time.

    Python would let the second go on with half a module where imports are circular.
    """
    with _importing:
        import pyroute2

        return pyroute2


def message_parser() -> Callable[[bytes], Iterator[link_messages.Message]]:
    """Give what reads messages that came by a socket of our own."""
    _pyroute2()
    from pyroute2.netlink.rtnl.marshal import MarshalRtnl

    parse: Callable[[bytes], Iterator[link_messages.Message]] = MarshalRtnl().parse
    return parse


class Session:
    """One conversation with rtnetlink, in the current thread's namespace and on its own loop.

    Made by `in_session` and short-lived: pyroute2 keeps an acknowledgement of most requests as
    long as its object lives. One request at a time: a netlink socket can't take two dumps at once.
    """

    def __init__(self, ipr: Any) -> None:
        self._ipr = ipr

    async def get(self, which: str | int, name: str | None = None) -> LinkInfo:
        """Look up a link by its name or index.

        Args:
            which: the name or the index.
            name: what to call it if there is none.

        Raises:
            LinkError: ENODEV, there is none.
        """
        return await self._info(await self._message(which, name))

    async def find(self, name: str) -> LinkInfo | None:
        """Look up a link by its name; None if there is none."""
        try:
            return await self.get(name)
        except LinkError as error:
            if error.errno != errno.ENODEV:
                raise
            return None

    async def set(self, info: LinkInfo, what: str, hint: str = "", **attributes: Any) -> None:
        """Change a link (RTM_NEWLINK).

        Args:
            info: the link.
            what: what the change is, for an error's message: ``"set the MTU to 1400"``.
            hint: what to do about a refusal.
            attributes: what to change, by pyroute2's names.
        """
        # pyroute2 passes over what it does not know, so that a typo would go unseen.
        if unknown := attributes.keys() - _SETTABLE:
            raise TypeError(f"no such link attribute: {', '.join(sorted(unknown))}")
        request = self._ipr.link("set", index=info.index, **attributes)
        await self._ask(request, what, info.name, hint)

    async def autoconf(self, info: LinkInfo) -> Autoconf | None:
        """Tell what IPv6 the kernel gives the link by itself; None where it has no IPv6."""
        return link_messages.autoconf(await self._message(info.index, info.name))

    async def own_link_locals(self, info: LinkInfo) -> list[LinkAddress]:
        """Give the link-local addresses that the kernel made by itself."""
        messages = await self._dump(self._ipr.addr, "list the addresses", info.name)
        return link_messages.addresses(
            filter(link_messages.is_own_link_local, messages), info.index
        )

    async def addresses(self, info: LinkInfo) -> list[LinkAddress]:
        """Give the link's addresses."""
        messages = await self._dump(self._ipr.addr, "list the addresses", info.name)
        return link_messages.addresses(messages, info.index)

    async def all_addresses(self) -> dict[int, list[LinkAddress]]:
        """Give the addresses of all links, by the links' numbers."""
        messages = await self._dump(self._ipr.addr, "list the addresses", "all interfaces")
        return link_messages.addresses_by_link(messages)

    async def add_address(self, info: LinkInfo, address: LinkAddress) -> None:
        """Add an address (RTM_NEWADDR)."""
        attributes = _address_attributes(info, address)
        attributes["scope"] = link_messages.scope_number(address.scope)
        if address.interface.version == 6:
            # Asking whether another host has the address takes a second, in which it can't be used.
            # On a device whose wire ends in this program there is no other host.
            attributes["flags"] = _IFA_F_NODAD
        await self._ask(
            self._ipr.addr("add", **attributes),
            f"add the address {address}",
            info.name,
            "addresses() lists what is there",
            _ipv6_hints(info, errno.EINVAL) if address.interface.version == 6 else _HINTS,
        )

    async def settle(self, info: LinkInfo, addresses: list[LinkAddress]) -> None:
        """Wait, for a second at most, until a link that is up receives for these addresses.

        For IPv6 the kernel leaves that to a work queue, after it has answered (addrconf_dad_work):
        until it has put the address into the 'local' table, what is sent to it is dropped.
        """
        # As objects: one address has several spellings (::102:304 is ::1.2.3.4).
        wanted = {each.interface.ip for each in addresses if each.interface.version == 6}
        for _ in range(200):
            if not wanted:
                return
            messages = await self._dump(
                functools.partial(self._ipr.route, family=socket.AF_INET6, table=_TABLE_LOCAL),
                "list the routes",
                info.name,
            )
            local = (each.get("dst") for each in messages if each["type"] == _RTN_LOCAL)
            wanted -= {ip_address(dst) for dst in local if dst}
            if wanted:
                await asyncio.sleep(0.005)

    async def remove_address(self, info: LinkInfo, address: LinkAddress) -> None:
        """Remove an address (RTM_DELADDR)."""
        await self._ask(
            self._ipr.addr("del", **_address_attributes(info, address)),
            f"remove the address {address}",
            info.name,
            "addresses() lists what is there",
        )

    async def routes(self, info: LinkInfo) -> list[Route]:
        """Give the link's unicast routes in every table but the kernel's own, 'local'."""
        return [route for route, _ in await self.found_routes(info)]

    async def found_routes(self, info: LinkInfo) -> list[tuple[Route, int]]:
        """Give the same as `routes`, each with who made it (rtm_protocol)."""
        messages = await self._dump(self._ipr.route, "list the routes", info.name)
        return link_messages.routes(messages, info.index)

    async def add_route(self, info: LinkInfo, route: Route, protocol: int | None = None) -> None:
        """Add a route (RTM_NEWROUTE); `protocol` says who made it, by default a user."""
        attributes = _route_attributes(info, route)
        if protocol is not None:
            attributes["proto"] = protocol
        if route.dst.version == 4 and route.via is None:
            # As `ip` does: over a route of universal scope no gateway could be reached.
            attributes["scope"] = _SCOPE_LINK
        await self._ask(
            self._ipr.route("add", **attributes),
            f"add the route {route}",
            info.name,
            "routes() lists what is there, and the link must be up and reach the gateway",
            {
                **(_ipv6_hints(info, errno.ENODEV) if route.dst.version == 6 else _HINTS),
                **_gateway_hints(info, route),
            },
        )

    async def remove_route(self, info: LinkInfo, route: Route) -> None:
        """Remove a route (RTM_DELROUTE)."""
        attributes = _route_attributes(info, route)
        if route.dst.version == 4:
            attributes["scope"] = _SCOPE_NOWHERE  # stands for any
        await self._ask(
            self._ipr.route("del", **attributes),
            f"remove the route {route}",
            info.name,
            "routes() lists what is there",
        )

    async def stats(self, info: LinkInfo) -> LinkStats:
        """Give the link's counters (IFLA_STATS64)."""
        return link_messages.link_stats(await self._message(info.index, info.name))

    async def kind(self, info: LinkInfo) -> str | None:
        """Give the kind of an interface (IFLA_INFO_KIND), which a hardware one does not have."""
        kind: str | None = (await self._message(info.index, info.name)).get(("linkinfo", "kind"))
        return kind

    async def create_bridge(
        self, name: str, *, mac: str | None, stp: bool, forward_delay: int | None, up: bool
    ) -> LinkInfo:
        """Create a bridge (RTM_NEWLINK, exclusive); where it can't be as asked there is none.

        Args:
            name: a name that the kernel takes as it is.
            mac: the hardware address, or None for the kernel to choose.
            stp: whether it runs the spanning tree protocol.
            forward_delay: in hundredths of a second, or None for the kernel's default.
            up: whether it comes up.
        """
        attributes: dict[str, Any] = {"br_stp_state": int(stp)}
        if mac is not None:
            attributes["address"] = mac
        if forward_delay is not None:
            attributes["br_forward_delay"] = forward_delay
        if up:
            attributes["state"] = "up"
        await self._ask(
            self._ipr.link("add", ifname=name, kind="bridge", **attributes),
            f"create the bridge {name}",
            name,
            "the kernel needs its module for bridges: 'modprobe bridge'",
        )
        return await self.get(name)

    async def delete(self, info: LinkInfo) -> None:
        """Delete a link (RTM_DELLINK), whoever uses it."""
        request = self._ipr.link("del", index=info.index)
        await self._ask(request, f"delete {info.name}", info.name, "not every kind can be deleted")

    async def devices(self) -> list[TunTapInfo]:
        """Give all TUN and TAP devices of the namespace, in the order of their indexes."""
        ask = functools.partial(self._ipr.link, kind="tun")
        messages = await self._dump(ask, "list the TUN and TAP devices", None)
        found = [link_messages.link_info(message, None).tuntap for message in messages]
        return sorted((each for each in found if each is not None), key=lambda each: each.index)

    async def _message(self, which: str | int, name: str | None = None) -> link_messages.Message:
        key = {"index": which} if isinstance(which, int) else {"ifname": which}
        named = name or (f"number {which}" if isinstance(which, int) else which)
        request: Awaitable[list[link_messages.Message]] = self._ipr.link("get", **key)
        try:
            (message,) = await self._ask(request, "look up the interface", named)
        except LinkError as error:
            if error.errno != errno.ENODEV:
                raise
            raise LinkError(
                errno.ENODEV,
                f"there is no interface {named} in this network namespace; {_HINTS[errno.ENODEV]}",
                named,
            ) from error.__cause__
        return message

    async def _info(self, message: link_messages.Message) -> LinkInfo:
        master = message.get("master")
        name = None
        if master:
            try:
                name = link_messages.text((await self._message(master)).get("ifname"))
            except LinkError as error:
                if error.errno != errno.ENODEV:  # it may have gone in between
                    raise
        return link_messages.link_info(message, name)

    async def _dump(
        self, ask: Callable[..., Awaitable[Any]], what: str, name: str | None
    ) -> list[link_messages.Message]:
        async def collect() -> list[link_messages.Message]:
            return [message async for message in await ask("dump")]

        messages = await self._ask(collect(), what, name)
        # A change in the middle of a dump may make it miss entries; the kernel tells.
        for _ in range(10):
            if not any(each["header"]["flags"] & _NLM_F_DUMP_INTR for each in messages):
                break
            messages = await self._ask(collect(), what, name)
        return messages

    async def _ask(
        self,
        request: Awaitable[T],
        what: str,
        name: str | None,
        hint: str = "",
        hints: Mapping[int, str] = _HINTS,
    ) -> T:
        """Await a request and say in our words why the kernel refused it.

        Args:
            request: the request.
            what: what it was to do.
            name: the interface.
            hint: what to do about a refusal.
            hints: the same for certain errnos, which comes first.
        """
        try:
            return await request
        except _pyroute2().NetlinkError as error:
            # pyroute2's own frames hold the error, and so would it them.
            cause = error.with_traceback(None)
            code, sentence = error.code, error.args[1]
            raise _refusal(code, sentence, what, name, hints.get(code, hint)) from cause
        except OSError as error:
            code, sentence = error.errno or errno.EIO, error.strerror or str(error)
            raise _refusal(code, sentence, what, name, _HINTS.get(code, hint)) from error


def _refusal(code: int, sentence: str, what: str, name: str | None, hint: str) -> AiotunError:
    if name is not None and name not in what.split():
        what = f"{what} on {name}"
    if code in LIMITS:
        return limit_error(code, f"could not {what}", name)
    text = f"could not {what}: {sentence}" + (f"; {hint}" if hint else "")
    kind = NotPermittedError if code in (errno.EPERM, errno.EACCES) else LinkError
    return kind(code, text, name)


def _ipv6_hints(info: LinkInfo, too_small: int) -> dict[int, str]:
    """What to do where the kernel refuses an address or route because the link has no IPv6.

    Args:
        info: the link.
        too_small: the errno of a link whose MTU is too small for IPv6.
    """
    hints = {
        **_HINTS,
        # Never for want of a privilege, which is EPERM.
        errno.EACCES: f"IPv6 is switched off for {info.name}: its net.ipv6.conf.*.disable_ipv6 is "
        "1. Let root run 'sysctl -w net.ipv6.conf.all.disable_ipv6=0', or run the container with "
        "'--sysctl net.ipv6.conf.all.disable_ipv6=0'",
        errno.EOPNOTSUPP: "this kernel has no IPv6, or was booted with ipv6.disable=1",
    }
    if info.mtu < IPV6_MIN_MTU:
        hints[too_small] = (
            f"IPv6 needs an MTU of at least {IPV6_MIN_MTU} bytes, and that of {info.name} is "
            f"{info.mtu}; raise it first"
        )
    return hints


def _gateway_hints(info: LinkInfo, route: Route) -> dict[int, str]:
    """What to do where the kernel has no route to a gateway: ENETUNREACH, for IPv6 EHOSTUNREACH."""
    if route.via is None or route.onlink:
        return {}
    hint = (
        f"no address or route of {info.name} says that the gateway {route.via} is there: add a "
        f"route to it first ('{route.via}/{route.via.max_prefixlen}'), or write '{route.dst} via "
        f"{route.via} onlink'"
    )
    return {errno.ENETUNREACH: hint, errno.EHOSTUNREACH: hint}


def _address_attributes(info: LinkInfo, address: LinkAddress) -> dict[str, Any]:
    far = address.peer or address.interface
    return {
        "index": info.index,
        "family": _family(far.version),
        "local": str(address.interface.ip),
        "address": str(far.ip),
        "prefixlen": far.network.prefixlen,
    }


def _route_attributes(info: LinkInfo, route: Route) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "family": _family(route.dst.version),
        "dst": str(route.dst),
        "oif": info.index,
        "table": route.table,
    }
    if route.metric is not None:
        attributes["priority"] = route.metric
    if route.onlink:
        attributes["flags"] = link_messages.RTNH_F_ONLINK
    if route.via is not None and route.via.version == route.dst.version:
        attributes["gateway"] = str(route.via)
    elif route.via is not None:  # as routes() may give it: IPv4 by way of an IPv6 neighbour
        attributes["via"] = {"family": _family(route.via.version), "addr": str(route.via)}
    return attributes


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


class _Socket(socket.socket):
    """A netlink socket that names the kernel as the receiver of what it sends.

    Without an address the kernel also wants the capability of whoever made the socket
    (netlink_ns_capable). If a helper process made it in one network namespace, that lacks the
    capability in another one, which moving a link takes. This program has it in both.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())

    def send(self, data: Buffer, flags: int = 0, /) -> int:
        return self.sendto(data, flags, (0, 0))


class _Loop(asyncio.SelectorEventLoop):
    """A loop that is closed where it could not be made.

    Without a free file descriptor asyncio leaves it half-made, and it complains of not having been
    closed whenever the collector finds it, in whatever the program does then.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        try:
            super().__init__(selector)
        except OSError:
            asyncio.BaseEventLoop.close(self)  # the whole close() looks for what is not there
            selector.close()  # or it would wait for the collector
            raise


def in_session(work: Callable[[Session], Awaitable[T]]) -> T:
    """Hold a conversation with rtnetlink, and give what `work` gives.

    To be called in a short-lived thread that has no event loop (`_kernel.threads.run`): it brings a
    selector loop of its own, whatever loop or policy the program uses. It starts no process.

    Raises:
        LinkError, ResourceLimitError: netlink could not be opened; and what `work` raises.
    """
    pyroute2 = _pyroute2()
    with opening():
        loop = _Loop(selectors.DefaultSelector())
    errors: list[Exception] = []
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        value = runner.run(_catch(_converse(pyroute2, work), errors))
    if not errors:
        return cast(T, value)
    error = errors.pop()
    try:
        raise error
    finally:
        del error


async def _catch(conversation: Awaitable[T], errors: list[Exception]) -> T | None:
    """Await the conversation; put aside what it raises.

    An error that comes out of a task makes a ring of the two and all frames between. The Link in
    them, and the namespace that it holds open, would wait for the collector.
    """
    try:
        return await conversation
    except Exception as error:  # noqa: BLE001 - raised again by in_session
        errors.append(error)
        return None


async def _converse(pyroute2: Any, work: Callable[[Session], Awaitable[T]]) -> T:
    with opening():
        # Ours, and not pyroute2's own, which stays open where setting it up fails.
        sock = _Socket(
            places.make_socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE)
        )
    with sock:
        # pyroute2 asks for the kernel's own sentences only on sockets that it made. Kernels before
        # 4.12, and gVisor, have none.
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        async with pyroute2.AsyncIPRoute(ext_ack=True, use_socket=sock) as ipr:
            with opening():
                # By itself, before any request: where it fails, no request is left half-made.
                await ipr.setup_endpoint()
            return await work(Session(ipr))


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """Say in our words why netlink could not be opened.

    Raises:
        ResourceLimitError: for an OSError that says that something ran out.
        LinkError: for any other.
    """
    try:
        with naming_limits("could not open netlink, which takes four file descriptors"):
            yield
    except AiotunError:  # something ran out, or the namespace was closed
        raise
    except OSError as error:
        text = f"netlink could not be opened: {error.strerror}; allow AF_NETLINK in the sandbox"
        raise LinkError(error.errno, text) from error

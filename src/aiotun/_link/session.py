"""Sessions with rtnetlink(7), by pyroute2, in the calling thread and its namespace.

This is the only module that imports pyroute2. Importing it takes some 80 ms, so this module is
loaded at the first request, in the thread of that request. Each session has its own selector loop,
because pyroute2 can't open netlink on uvloop.
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
_SCOPE_HOST = 254
_SCOPE_NOWHERE = 255

_TABLE_LOCAL = 255
_RTN_LOCAL = 2

_SETTABLE = frozenset(
    {
        "address", "af_spec", "gso_max_segs", "gso_max_size", "ifalias", "ifname", "master", "mtu",
        "net_ns_fd", "state", "txqlen",
    }
)  # fmt: skip

_HINTS = {
    errno.ENODEV: "look for it with 'ip link'; it may have been deleted or renamed",
    errno.EPERM: "this needs CAP_NET_ADMIN in the interface's network namespace: run as root or "
    "with that capability",
    errno.EACCES: "a sandbox or a security module of this machine forbids it",
    errno.ENETDOWN: "bring the link up first",
    errno.ENOBUFS: "the kernel is short of memory for netlink; try again",
}
# rtnetlink.c: Linux 7.2 and some stable releases before it allow no more (txqlen_range).
_LONG_QUEUE = {errno.ERANGE: "newer kernels limit a queue to at most 32767 packets"}

_importing = threading.Lock()


def _pyroute2() -> Any:
    """Import pyroute2; the lock lets only one thread at a time do so.

    pyroute2 has circular imports. To avoid a deadlock, Python would give the second thread a
    module that is only half initialized.
    """
    with _importing:
        import pyroute2

        return pyroute2


def message_parser() -> Callable[[bytes], Iterator[link_messages.Message]]:
    """Return pyroute2's parser, for messages that were read from a socket of our own."""
    _pyroute2()
    from pyroute2.netlink.rtnl.marshal import MarshalRtnl

    parse: Callable[[bytes], Iterator[link_messages.Message]] = MarshalRtnl().parse
    return parse


class Session:
    """One session with rtnetlink, in the current thread's namespace and on its own loop.

    `in_session` makes it. A session must be short-lived, because pyroute2 keeps the acknowledgement
    of most requests until its object is closed. Make one request at a time: a netlink socket can't
    handle two dumps at once.
    """

    def __init__(self, ipr: Any) -> None:
        self._ipr = ipr

    async def get(self, which: str | int, name: str | None = None) -> LinkInfo:
        """Look up a link by its name or index.

        Args:
            which: the name or the index.
            name: the name that an error shows if there is no such link.

        Raises:
            LinkError: ENODEV, there is no such link.
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
            what: the change in words, for an error's message: ``"set the MTU to 1400"``.
            hint: what the user can do if the kernel refuses.
            attributes: what to change, by pyroute2's names.
        """
        # pyroute2 silently ignores attributes that it does not know, so a typo would go unnoticed.
        if unknown := attributes.keys() - _SETTABLE:
            raise TypeError(f"no such link attribute: {', '.join(sorted(unknown))}")
        request = self._ipr.link("set", index=info.index, **attributes)
        hints = _HINTS | _LONG_QUEUE if "txqlen" in attributes else _HINTS
        await self._ask(request, what, info.name, hint, hints)

    async def autoconf(self, info: LinkInfo) -> Autoconf | None:
        """Return the settings of the link's IPv6 autoconfiguration; None if it has no IPv6."""
        return link_messages.autoconf(await self._message(info.index, info.name))

    async def own_link_locals(self, info: LinkInfo) -> list[LinkAddress]:
        """Return the link-local addresses that the kernel generated."""
        messages = await self._dump(self._ipr.addr, "list the addresses", info.name)
        return link_messages.addresses(
            filter(link_messages.is_own_link_local, messages), info.index
        )

    async def addresses(self, info: LinkInfo) -> list[LinkAddress]:
        """Return the link's addresses."""
        messages = await self._dump(self._ipr.addr, "list the addresses", info.name)
        return link_messages.addresses(messages, info.index)

    async def all_addresses(self) -> dict[int, list[LinkAddress]]:
        """Return the addresses of all links, by the link's index."""
        messages = await self._dump(self._ipr.addr, "list the addresses", "all interfaces")
        return link_messages.addresses_by_link(messages)

    async def add_address(self, info: LinkInfo, address: LinkAddress) -> None:
        """Add an address (RTM_NEWADDR)."""
        attributes = _address_attributes(info, address)
        attributes["scope"] = link_messages.scope_number(address.scope)
        if address.interface.version == 6:
            # Duplicate address detection takes a second, in which the address can't be used. On a
            # device whose wire ends in this program there is no other host that could have it.
            attributes["flags"] = _IFA_F_NODAD
        await self._ask(
            self._ipr.addr("add", **attributes),
            f"add the address {address}",
            info.name,
            "addresses() lists the present addresses",
            _ipv6_hints(info, errno.EINVAL) if address.interface.version == 6 else _HINTS,
        )

    async def settle(self, info: LinkInfo, addresses: list[LinkAddress]) -> None:
        """Wait, for a second at most, until a link that is up receives packets for these addresses.

        For IPv6 the kernel acknowledges the request first, and a work queue adds the address to the
        'local' table later (addrconf_dad_work). Until then the kernel drops packets to the address.
        """
        # Compare objects, not text: an address has several spellings (::102:304 is ::1.2.3.4).
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
            "addresses() lists the present addresses",
        )

    async def routes(self, info: LinkInfo) -> list[Route]:
        """Return the link's unicast routes in every table but the kernel's own, 'local'."""
        return [route for route, _ in await self.found_routes(info)]

    async def found_routes(self, info: LinkInfo) -> list[tuple[Route, int]]:
        """Return the same routes as `routes`, each with its origin (rtm_protocol)."""
        messages = await self._dump(self._ipr.route, "list the routes", info.name)
        return link_messages.routes(messages, info.index)

    async def add_route(self, info: LinkInfo, route: Route, protocol: int | None = None) -> None:
        """Add a route (RTM_NEWROUTE); `protocol` is the route's origin, by default a user."""
        attributes = _route_attributes(info, route)
        if protocol is not None:
            attributes["proto"] = protocol
        if route.dst.version == 4 and route.via is None:
            # As `ip` does. The kernel accepts a gateway only if a route of link scope leads to it.
            attributes["scope"] = _SCOPE_LINK
        await self._ask(
            self._ipr.route("add", **attributes),
            f"add the route {route}",
            info.name,
            "routes() lists the present routes; the link must be up, and the gateway reachable",
            {
                **(_ipv6_hints(info, errno.ENODEV) if route.dst.version == 6 else _HINTS),
                **_gateway_hints(info, route),
            },
        )

    async def remove_route(self, info: LinkInfo, route: Route) -> None:
        """Remove a route (RTM_DELROUTE)."""
        attributes = _route_attributes(info, route)
        if route.dst.version == 4:
            attributes["scope"] = _SCOPE_NOWHERE  # matches any scope
        await self._ask(
            self._ipr.route("del", **attributes),
            f"remove the route {route}",
            info.name,
            "routes() lists the present routes",
        )

    async def add_local_default(self, family: int, table: int) -> None:
        """Have `table` call every address of a family one of this host (RTN_LOCAL, by `lo`)."""
        lo = await self.get("lo")
        request = self._ipr.route(
            "add",
            family=family,
            type="local",
            scope=_SCOPE_HOST,
            dst="default",
            oif=lo.index,
            table=table,
        )
        await self._ask(request, f"add a local default route to table {table}", lo.name)

    async def remove_local_default(self, family: int, table: int) -> None:
        """Undo `add_local_default`."""
        request = self._ipr.route(
            "del", family=family, type="local", scope=_SCOPE_NOWHERE, dst="default", table=table
        )
        await self._ask(request, f"remove the local default route of table {table}", "lo")

    async def rule(
        self, command: str, family: int, priority: int, table: int, **attributes: Any
    ) -> None:
        """Add or delete (``"del"``) a routing rule that looks a table up (RTM_NEWRULE).

        Args:
            command: ``"add"`` or ``"del"``.
            family, priority, table: of the rule.
            attributes: `iifname`, `suppress_prefixlen`.
        """
        request = self._ipr.rule(
            command, family=family, priority=priority, table=table, **attributes
        )
        await self._ask(request, f"{command} the routing rule {priority}", None)

    async def stats(self, info: LinkInfo) -> LinkStats:
        """Return the link's counters (IFLA_STATS64)."""
        return link_messages.link_stats(await self._message(info.index, info.name))

    async def kind(self, info: LinkInfo) -> str | None:
        """Return the kind of an interface (IFLA_INFO_KIND); None for a hardware interface."""
        kind: str | None = (await self._message(info.index, info.name)).get(("linkinfo", "kind"))
        return kind

    async def create_bridge(
        self, name: str, *, mac: str | None, stp: bool, forward_delay: int | None, up: bool
    ) -> LinkInfo:
        """Create a bridge (RTM_NEWLINK, exclusive). If an option is refused, no bridge is created.

        Args:
            name: a name without ``%d``.
            mac: the hardware address, or None for the kernel to choose.
            stp: whether it runs the spanning tree protocol.
            forward_delay: in hundredths of a second, or None for the kernel's default.
            up: whether to bring it up.
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
            "the kernel needs its bridge module: run 'modprobe bridge'",
        )
        return await self.get(name)

    async def delete(self, info: LinkInfo) -> None:
        """Delete a link (RTM_DELLINK), even if a program uses it."""
        request = self._ipr.link("del", index=info.index)
        await self._ask(request, f"delete {info.name}", info.name, "not every kind can be deleted")

    async def devices(self) -> list[TunTapInfo]:
        """Return all TUN and TAP devices of the namespace, in the order of their indexes."""
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
            text = f"there is no interface {named} in this network namespace; {_HINTS[error.errno]}"
            if isinstance(which, int) and name and (other := await self.find(name)) is not None:
                text = (
                    f"this {name} was deleted or moved, and the {name} that is here now is another "
                    f"interface (number {other.index}, not {which}); open the device again, or use "
                    f"aiotun.Link({name!r}) for the one that is here"
                )
            raise LinkError(errno.ENODEV, text, named) from error.__cause__
        return message

    async def _info(self, message: link_messages.Message) -> LinkInfo:
        master = message.get("master")
        name = None
        if master:
            try:
                name = link_messages.text((await self._message(master)).get("ifname"))
            except LinkError as error:
                if error.errno != errno.ENODEV:  # it may have been deleted in the meantime
                    raise
        return link_messages.link_info(message, name)

    async def _dump(
        self, ask: Callable[..., Awaitable[Any]], what: str, name: str | None
    ) -> list[link_messages.Message]:
        async def collect() -> list[link_messages.Message]:
            return [message async for message in await ask("dump")]

        messages = await self._ask(collect(), what, name)
        # A change during a dump can make it miss entries. The kernel then sets this flag.
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
        """Await a request, and turn the kernel's refusal into an error of ours.

        Args:
            request: the request.
            what: what the request does, in words.
            name: the interface.
            hint: what the user can do if the kernel refuses.
            hints: the same for certain errnos; they take precedence.
        """
        try:
            return await request
        except _pyroute2().NetlinkError as error:
            # Drop the traceback: pyroute2's frames reference the error, so keeping it would make a
            # reference cycle.
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
    """Return what to do if the kernel refuses an address or route because the link has no IPv6.

    Args:
        info: the link.
        too_small: the errno that the kernel returns if the MTU is too small for IPv6.
    """
    hints = {
        **_HINTS,
        # Here EACCES never means a missing privilege; that is EPERM.
        errno.EACCES: f"IPv6 is switched off for {info.name}: its net.ipv6.conf.*.disable_ipv6 is "
        "1. As root run 'sysctl -w net.ipv6.conf.all.disable_ipv6=0', or start the container with "
        "'--sysctl net.ipv6.conf.all.disable_ipv6=0'",
        errno.EOPNOTSUPP: "this kernel has no IPv6, or was booted with ipv6.disable=1",
    }
    if info.mtu < IPV6_MIN_MTU:
        hints[too_small] = (
            f"IPv6 needs an MTU of at least {IPV6_MIN_MTU} bytes, and the MTU of {info.name} is "
            f"{info.mtu}; raise it first"
        )
    return hints


def _gateway_hints(info: LinkInfo, route: Route) -> dict[int, str]:
    """Return what to do if there is no route to a gateway: ENETUNREACH, for IPv6 EHOSTUNREACH."""
    if route.via is None or route.onlink:
        return {}
    hint = (
        f"no address or route of {info.name} leads to the gateway {route.via}: add a route to it "
        f"first ('{route.via}/{route.via.max_prefixlen}'), or write '{route.dst} via {route.via} "
        f"onlink'"
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
    elif route.via is not None:  # routes() can return IPv4 routes with an IPv6 gateway
        attributes["via"] = {"family": _family(route.via.version), "addr": str(route.via)}
    return attributes


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


class _Socket(socket.socket):
    """A netlink socket that sends each message to the kernel's address.

    Without an address, the kernel also checks the capabilities of the process that made the socket
    (netlink_ns_capable). That may be the helper process of a namespace, which has no capability in
    another namespace, so that it can't move a link there. This program has it in both.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())

    def send(self, data: Buffer, flags: int = 0, /) -> int:
        return self.sendto(data, flags, (0, 0))


class _Loop(asyncio.SelectorEventLoop):
    """A loop that closes itself if its constructor fails.

    Without a free file descriptor asyncio's constructor fails halfway. The loop would then warn
    that it was not closed when the collector finds it, at any later point of the program.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        try:
            super().__init__(selector)
        except OSError:
            # Not self.close(): it uses the socket pair, which does not exist.
            asyncio.BaseEventLoop.close(self)
            selector.close()  # otherwise its fd would stay open until the collector runs
            raise


def in_session(work: Callable[[Session], Awaitable[T]]) -> T:
    """Run `work` in a session with rtnetlink, and return its result.

    Call this in a short-lived thread that has no event loop (`_kernel.threads.run`): it makes a
    selector loop of its own, whatever loop or policy the program uses. It starts no process.

    Raises:
        LinkError, ResourceLimitError: netlink could not be opened. Whatever `work` raises, too.
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
    """Await the conversation; store an error instead of raising it.

    An error that leaves a task is part of a reference cycle of the task, the error and the frames
    between them. The Link in these frames would keep its namespace open until the collector runs.
    """
    try:
        return await conversation
    except Exception as error:  # noqa: BLE001 - raised again by in_session
        errors.append(error)
        return None


async def _converse(pyroute2: Any, work: Callable[[Session], Awaitable[T]]) -> T:
    with opening():
        # A socket of ours: pyroute2's own stays open if its setup fails.
        sock = _Socket(
            places.make_socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE)
        )
    with sock:
        # Ask for the kernel's error messages: pyroute2 does so only on sockets that it made.
        # Kernels before 4.12, and gVisor, don't have them.
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        async with pyroute2.AsyncIPRoute(ext_ack=True, use_socket=sock) as ipr:
            with opening():
                # Separately, before any request: if this fails, no request has begun.
                await ipr.setup_endpoint()
            return await work(Session(ipr))


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """Turn an OSError of opening netlink into an error of ours.

    Raises:
        ResourceLimitError: a resource, such as file descriptors, ran out.
        LinkError: any other OSError.
    """
    try:
        with naming_limits("could not open netlink, which takes four file descriptors"):
            yield
    except AiotunError:  # a resource ran out, or the namespace was closed
        raise
    except OSError as error:
        text = f"netlink could not be opened: {error.strerror}; allow AF_NETLINK in the sandbox"
        raise LinkError(error.errno, text) from error

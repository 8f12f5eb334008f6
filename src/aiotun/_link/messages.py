"""Converts rtnetlink messages, as pyroute2 parses them, into our own classes; no I/O.

Sources: ``include/uapi/linux/if_link.h``, ``if_addr.h`` and ``rtnetlink.h``. A message is a mapping
whose ``get`` also takes an attribute's name in lower case without its prefix, or a path of such
names.
"""

import dataclasses
import ipaddress
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Protocol

from .._kernel.abi import Iff
from .info import Autoconf, LinkInfo, LinkStats, TunTapInfo
from .state import Change
from .values import SCOPES, LinkAddress, Route, make_route

__all__ = [
    "RTNH_F_ONLINK",
    "Message",
    "addresses",
    "addresses_by_link",
    "autoconf",
    "change",
    "is_own_link_local",
    "link_info",
    "link_stats",
    "routes",
    "scope_number",
    "text",
]


class Message(Protocol):
    """The part of pyroute2's messages that we use."""

    def __getitem__(self, key: str) -> Any: ...

    def get(self, key: str | tuple[str, ...], default: Any = None) -> Any: ...


_AF_UNSPEC = 0

# socket.h: AF_INET and AF_INET6. A dump may also hold other families, for example MPLS; we skip
# these.
_FAMILIES = {2: 4, 10: 6}

# if.h
_IFF_UP = 0x1

_SCOPE_NAMES = {number: name for name, number in SCOPES.items()}

# if_addr.h
_IFAPROT_KERNEL_LL = 3
_IFA_F_STABLE_PRIVACY = 0x800

_U32 = 0xFFFF_FFFF

# rtnetlink.h
_RT_TABLE_LOCAL = 255
_RTN_UNICAST = 1
_RTM_F_CLONED = 0x200
RTNH_F_ONLINK = 4


def text(value: str | bytes | None) -> str:
    """Return a name or alias as text; pyroute2 leaves those that are not UTF-8 as bytes."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value or ""


def link_info(message: Message, master: str | None) -> LinkInfo:
    """Read an RTM_NEWLINK message; the master's name is not in it."""
    return LinkInfo(
        name=text(message.get("ifname")),
        index=message["index"],
        mtu=message.get("mtu", 0),
        mac=message.get("address") or None,
        up=bool(message["flags"] & _IFF_UP),
        carrier=bool(message.get("carrier")),
        master=master,
        alias=text(message.get("ifalias")) or None,
        txqueuelen=message.get("txqlen", 0),
        tuntap=_tuntap(message),
        gso_max_segs=message.get("gso_max_segs") or 0,
        gso_max_size=message.get("gso_max_size") or 0,
    )


def _tuntap(message: Message) -> TunTapInfo | None:
    if message.get(("linkinfo", "kind")) != "tun":  # a TAP device too
        return None

    def tun(name: str) -> Any:
        return message.get(("linkinfo", "data", f"tun_{name}"))

    multi_queue = bool(tun("multi_queue"))
    persist = bool(tun("persist"))
    if multi_queue:
        queues = (tun("num_queues") or 0) + (tun("num_disabled_queues") or 0)
    else:
        # A device that is not persistent exists only while it has a queue.
        queues = int(not persist or bool(message.get("carrier")))
    return TunTapInfo(
        name=text(message.get("ifname")),
        index=message["index"],
        mode="tap" if tun("type") == Iff.TAP else "tun",
        multi_queue=multi_queue,
        queues=queues,
        persist=persist,
        owner=tun("owner"),
        group=tun("group"),
        packet_info=bool(tun("pi")),
        vnet_header=bool(tun("vnet_hdr")),
        attached=queues > 0,
    )


def change(message: Message, master: str | None) -> Change | None:
    """Read one notification of the kernel; None if it is not about a change of a link.

    Bridges report their ports in messages of the same type: their RTM_DELLINK says that a port was
    detached, not that a link was deleted. Wireless drivers report scan results in them.
    """
    index, removed = message["index"], message["event"] in ("RTM_DELLINK", "RTM_DELADDR")
    if message["event"] in ("RTM_NEWADDR", "RTM_DELADDR"):
        if message["family"] not in _FAMILIES:
            return None
        return Change(index, None, _address(message), removed)
    if message["family"] != _AF_UNSPEC or message.get("ifname") is None:
        return None
    return Change(index, link_info(message, master), None, removed)


def autoconf(message: Message) -> Autoconf | None:
    """Read a link's IPv6 settings from an RTM_NEWLINK message; None if the link has no IPv6."""
    spec = message.get(("af_spec", "af_inet6"))
    mode = None if spec is None else spec.get("inet6_addr_gen_mode")
    if mode is None:
        return None
    solicitations = (spec.get("inet6_conf") or {}).get("router_solicitations", -1)
    return Autoconf(mode, -1 if solicitations == _U32 else solicitations)


def is_own_link_local(message: Message) -> bool:
    """Return whether an address (RTM_NEWADDR) is a link-local one that the kernel generated.

    Kernels before 5.18 don't report who added an address. On these, only randomly generated
    addresses can be recognized.
    """
    if _FAMILIES.get(message["family"]) != 6 or message["scope"] != SCOPES["link"]:
        return False
    flags = message.get("flags") or message["flags"]
    return message.get("proto") == _IFAPROT_KERNEL_LL or bool(flags & _IFA_F_STABLE_PRIVACY)


def link_stats(message: Message) -> LinkStats:
    """Read the counters from an RTM_NEWLINK message."""
    counters = message.get("stats64") or {}
    names = (field.name for field in dataclasses.fields(LinkStats))
    return LinkStats(**{name: counters.get(name, 0) for name in names})


def addresses(messages: Iterable[Message], index: int) -> list[LinkAddress]:
    """Read the addresses of one link from a dump of all addresses (RTM_NEWADDR)."""
    return addresses_by_link(messages).get(index, [])


def addresses_by_link(messages: Iterable[Message]) -> dict[int, list[LinkAddress]]:
    """Read a dump of all addresses, and group them by the link's index."""
    found: dict[int, list[LinkAddress]] = {}
    for message in messages:
        if message["family"] in _FAMILIES:
            found.setdefault(message["index"], []).append(_address(message))
    return found


def _address(message: Message) -> LinkAddress:
    prefix_length = message["prefixlen"]
    # if_addr.h: IFA_ADDRESS is the peer's address. Without a peer it equals IFA_LOCAL, and for IPv6
    # the kernel then sends no IFA_LOCAL.
    far = message.get("address")
    own = message.get("local") or far
    far = far or own
    scope = message["scope"]
    scope_name = _SCOPE_NAMES.get(scope, str(scope))
    reached = ipaddress.ip_interface(f"{far}/{prefix_length}")
    if own == far:
        return LinkAddress(reached, None, scope_name)
    return LinkAddress(ipaddress.ip_interface(own), reached, scope_name)


def scope_number(name: str) -> int:
    """Return the number of a scope that `LinkAddress` has as text."""
    return SCOPES[name] if name in SCOPES else int(name)


def routes(messages: list[Message], index: int) -> list[tuple[Route, int]]:
    """Read the unicast routes through one link from a dump of all routes (RTM_NEWROUTE).

    Each comes with its rtm_protocol, which says who added the route.
    """
    return [(route, message["proto"]) for message in messages for route in _routes(message, index)]


def _routes(message: Message, index: int) -> Iterator[Route]:
    """Yield a message's routes through this link; a message of a multipath route has several."""
    table = message.get("table") or message["table"]
    if (
        message["family"] not in _FAMILIES
        or message["type"] != _RTN_UNICAST
        or table == _RT_TABLE_LOCAL
        or message["flags"] & _RTM_F_CLONED
    ):
        return
    anywhere = "0.0.0.0" if _FAMILIES[message["family"]] == 4 else "::"
    dst = ipaddress.ip_network(f"{message.get('dst') or anywhere}/{message['dst_len']}")
    for hop in message.get("multipath") or (message,):
        if hop.get("oif") == index:
            via = _gateway(hop)
            onlink = via is not None and bool(hop["flags"] & RTNH_F_ONLINK)
            yield make_route(dst, via, message.get("priority"), table, onlink)


def _gateway(hop: Message) -> IPv4Address | IPv6Address | None:
    # RTA_VIA holds a gateway of the other family.
    gateway = hop.get("gateway") or hop.get(("via", "addr"))
    return ipaddress.ip_address(gateway) if gateway else None

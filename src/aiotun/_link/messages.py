"""Reads rtnetlink's messages, as pyroute2 hands them over, into our own classes; no I/O.

Sources: ``include/uapi/linux/if_link.h``, ``if_addr.h`` and ``rtnetlink.h``. A message is a mapping
whose ``get`` also takes an attribute's name in lower case without its prefix, or a path of them.
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
    """What pyroute2 gives, as far as we use it."""

    def __getitem__(self, key: str) -> Any: ...

    def get(self, key: str | tuple[str, ...], default: Any = None) -> Any: ...


_AF_UNSPEC = 0

# socket.h. Others (MPLS, say) may come in a dump and are passed over.
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
    """Give a name or alias as text; pyroute2 leaves those that are not UTF-8 as bytes."""
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
        # A device that does not persist is gone without its queue.
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
    """Read one message of what the kernel tells unasked; None where it is none of a link's changes.

    Beside the links themselves, bridges tell of their ports in messages of the same type (their
    RTM_DELLINK says that a port was released), and wireless drivers of what they found.
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
    """Read how a link is set for IPv6 out of an RTM_NEWLINK message; None where it has no IPv6."""
    spec = message.get(("af_spec", "af_inet6"))
    mode = None if spec is None else spec.get("inet6_addr_gen_mode")
    if mode is None:
        return None
    solicitations = (spec.get("inet6_conf") or {}).get("router_solicitations", -1)
    return Autoconf(mode, -1 if solicitations == _U32 else solicitations)


def is_own_link_local(message: Message) -> bool:
    """Whether an address (RTM_NEWADDR) is a link-local one that the kernel made.

    Kernels before 5.18 do not say who made it; then those that are made at random can be told.
    """
    if _FAMILIES.get(message["family"]) != 6 or message["scope"] != SCOPES["link"]:
        return False
    flags = message.get("flags") or message["flags"]
    return message.get("proto") == _IFAPROT_KERNEL_LL or bool(flags & _IFA_F_STABLE_PRIVACY)


def link_stats(message: Message) -> LinkStats:
    """Read the counters out of an RTM_NEWLINK message."""
    counters = message.get("stats64") or {}
    names = (field.name for field in dataclasses.fields(LinkStats))
    return LinkStats(**{name: counters.get(name, 0) for name in names})


def addresses(messages: Iterable[Message], index: int) -> list[LinkAddress]:
    """Read the addresses of one link out of a dump of all (RTM_NEWADDR)."""
    return addresses_by_link(messages).get(index, [])


def addresses_by_link(messages: Iterable[Message]) -> dict[int, list[LinkAddress]]:
    """Read a dump of all addresses; each link's number has its own."""
    found: dict[int, list[LinkAddress]] = {}
    for message in messages:
        if message["family"] in _FAMILIES:
            found.setdefault(message["index"], []).append(_address(message))
    return found


def _address(message: Message) -> LinkAddress:
    prefix_length = message["prefixlen"]
    # if_addr.h: IFA_ADDRESS is the peer where there is one, else the same as IFA_LOCAL; IPv6
    # without a peer sends no IFA_LOCAL at all.
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
    """Give the number of a scope as `LinkAddress` names it."""
    return SCOPES[name] if name in SCOPES else int(name)


def routes(messages: list[Message], index: int) -> list[tuple[Route, int]]:
    """Read the unicast routes through one link out of a dump of all (RTM_NEWROUTE).

    Each comes with its rtm_protocol, which says who made it.
    """
    return [(route, message["proto"]) for message in messages for route in _routes(message, index)]


def _routes(message: Message, index: int) -> Iterator[Route]:
    """Give a message's routes through this link: several hops may stand in one message."""
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

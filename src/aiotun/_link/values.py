"""Addresses and routes as values: their classes, and how their text is parsed; no I/O."""

import ipaddress
import re
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)

from .._kernel.abi import IFNAMSIZ

__all__ = [
    "DEFAULT_METRICS",
    "IPV6_MIN_MTU",
    "MAIN_TABLE",
    "SCOPES",
    "AddressArg",
    "LinkAddress",
    "Route",
    "RouteArg",
    "check_name",
    "check_new_name",
    "is_utf8",
    "make_route",
    "parse_address",
    "parse_route",
]

MAIN_TABLE = 254
"""RT_TABLE_MAIN (rtnetlink.h): the table of routes that name no table."""

# The metric of a route that is added without one: 0 for IPv4, IP6_RT_PRIO_USER (ipv6_route.h) for
# IPv6.
DEFAULT_METRICS = {4: 0, 6: 1024}

IPV6_MIN_MTU = 1280
"""ipv6.h: a link with a smaller MTU has no IPv6."""

_U32 = 0xFFFF_FFFF

SCOPES = {"global": 0, "site": 200, "link": 253, "host": 254}
"""rtnetlink.h: enum rt_scope_t. Other scopes have a number and no name."""

_ADDRESS_FORMS = "write '10.0.0.1/24', 'fd00::1/64' or '10.0.0.1 peer 10.0.0.2/32'"
_ROUTE_FORMS = (
    "write 'DST [via GATEWAY [onlink]] [metric N] [table N]', where DST is a network, an address "
    "or 'default'; for example '10.2.0.0/16 via 10.0.0.2 metric 50'"
)


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An IP address on a link.

    Attributes:
        interface: the address with its network's prefix length. If there is a peer, the prefix
            length is the full length (32 or 128).
        peer: the address of the other end of a point-to-point link, with the prefix length of the
            network that is reached there; or None.
        scope: ``"global"``, ``"site"``, ``"link"``, ``"host"``, or another scope's number as text.

    Raises:
        TypeError, ValueError: an attribute has the wrong type, or no such scope exists. This class
            does not parse text; `Link.add_address` does.

    Source: RTM_NEWADDR (``linux/if_addr.h``).
    """

    interface: IPv4Interface | IPv6Interface
    peer: IPv4Interface | IPv6Interface | None = None
    scope: str = "global"

    def __post_init__(self) -> None:
        _check_field(self, "interface", _INTERFACES)
        if self.peer is not None:
            _check_field(self, "peer", _INTERFACES)
        _check_field(self, "scope", (str,))
        known = self.scope in SCOPES
        if not known and not (re.fullmatch(r"[0-9]{1,3}", self.scope) and int(self.scope) <= 255):
            raise ValueError(
                f"{self.scope!r} is not a scope; a LinkAddress has 'global', 'site', 'link', "
                "'host' or a number up to 255 as text"
            )

    def __str__(self) -> str:
        if self.peer is None:
            return str(self.interface)
        return f"{self.interface.ip} peer {self.peer}"


@dataclass(frozen=True, slots=True)
class Route:
    """A route through a link.

    Attributes:
        dst: the destination network.
        via: the gateway, or None if the destinations are on the link itself.
        metric: the route with the smallest metric wins. None is the kernel's default (0 for IPv4,
            1024 for IPv6).
        table: the routing table's number; 254 is the main table.
        onlink: whether the gateway is treated as a neighbor on the link, even if no route leads to
            it (RTNH_F_ONLINK). Routes that differ only in this are equal, because the kernel
            accepts only one of them.

    Raises:
        TypeError, ValueError: an attribute has the wrong type or is out of range. This class does
            not parse text; `Link.add_route` does.

    Source: RTM_NEWROUTE (``linux/rtnetlink.h``).
    """

    dst: IPv4Network | IPv6Network
    via: IPv4Address | IPv6Address | None = None
    metric: int | None = None
    table: int = MAIN_TABLE
    onlink: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        _check_field(self, "dst", (IPv4Network, IPv6Network))
        if self.via is not None:
            # IPv4Interface is a subclass of IPv4Address, but its text ("10.0.0.1/24") is not an
            # address for the kernel. The same holds for IPv6.
            _check_field(self, "via", (IPv4Address, IPv6Address), but=_INTERFACES)
        _number(self.metric, "metric", 0, str(self.dst))
        if _number(self.table, "table", 1, str(self.dst)) is None:
            raise TypeError("a Route's table must be an int, not None; 254 is the main table")
        _check_field(self, "onlink", (bool,))
        if self.onlink and self.via is None:
            raise ValueError(f"{str(self.dst)!r} with onlink needs a gateway; give one as 'via'")

    def __str__(self) -> str:
        text = str(self.dst)
        if self.via is not None:
            text += f" via {self.via}" + (" onlink" if self.onlink else "")
        if self.metric is not None:
            text += f" metric {self.metric}"
        if self.table != MAIN_TABLE:
            text += f" table {self.table}"
        return text


_INTERFACES = (IPv4Interface, IPv6Interface)


def _check_field(
    value: object, name: str, kinds: tuple[type, ...], but: tuple[type, ...] = ()
) -> None:
    """Check a field's type when the value is made, not later in the thread of the request."""
    given = getattr(value, name)
    if not isinstance(given, kinds) or isinstance(given, but):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"{name} of a {type(value).__name__} must be of type {expected}, got {given!r}; "
            "addresses and routes can also be given as text, without this class"
        )


AddressArg = str | IPv4Interface | IPv6Interface | LinkAddress
"""An address as users may give it."""

RouteArg = (
    str | IPv4Network | IPv6Network | IPv4Address | IPv6Address | IPv4Interface | IPv6Interface
)
"""A route's destination as users may give it. Text may hold gateway, metric and table too."""


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8: it has no surrogates."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


def check_name(name: str) -> str:
    """Return the name if an interface can have it.

    Raises:
        TypeError: the name is not a str.
        ValueError: the name is empty, longer than 15 bytes, has a character that names can't have,
            or is not UTF-8. (The kernel accepts other bytes, but netlink libraries don't.)
    """
    if not isinstance(name, str):
        raise TypeError(f"an interface name must be a str, got {type(name).__name__}")
    if not is_utf8(name):
        raise ValueError(
            f"the interface name {name!r} can't be encoded as UTF-8; choose another name"
        )
    octets = name.encode()
    size = len(octets)
    if not 0 < size < IFNAMSIZ:
        raise ValueError(f"an interface name must have 1 to 15 bytes, got {name!r} with {size}")
    # The kernel (ctype.c) treats the byte 0xa0 as a space, even if it is part of a letter in UTF-8,
    # as it is in "à".
    if name in (".", "..") or re.search(rb"[/:\s\0\xa0]", octets):
        raise ValueError(
            f"{name!r} is not a valid interface name; leave out '/', ':' and spaces (and letters "
            "with a byte 0xa0 in UTF-8, such as 'à'), and do not use '.' or '..'"
        )
    return name


def check_new_name(name: str) -> str:
    """Return the name if the kernel would give it to an interface.

    The name may have a ``%d``, as in ``"vpn%d"``: the kernel replaces it by the lowest free number.

    Raises:
        TypeError, ValueError: as `check_name`, or the kernel reserves the name.
    """
    check_name(name)
    # The kernel makes a directory of each name under /proc/sys/net/ipv4/conf, and these two exist.
    if name in ("all", "default"):
        raise ValueError(f"the kernel reserves the interface name {name!r}; choose another name")
    if "%" in name and (name.count("%") > 1 or "%d" not in name):
        raise ValueError(
            f"{name!r} is not a valid interface name; it may have one '%d', for a number, and no "
            "other '%'"
        )
    return name


def parse_address(value: AddressArg) -> LinkAddress:
    """Parse an address, such as ``"10.0.0.1/24"`` or ``"10.0.0.1 peer 10.0.0.2/32"``.

    A text without a prefix length is an error. Somebody who forgets the prefix length means the
    network's, but would get an address without a network, whose neighbors can't be reached. A peer
    without a prefix length stands for the peer alone.

    Raises:
        TypeError: the value is neither text nor an object of the ipaddress module.
        ValueError: the text is not a valid address, has no prefix length, or mixes IPv4 and IPv6.
    """
    if isinstance(value, LinkAddress):
        return value
    if isinstance(value, IPv4Interface | IPv6Interface):
        return _link_address(value, None, str(value))
    if not isinstance(value, str):
        raise TypeError(
            f"an address must be a str, an IPv4Interface or an IPv6Interface, got "
            f"{type(value).__name__}; {_ADDRESS_FORMS}"
        )
    match value.split():
        case [own]:
            interface = _interface(own, value)
            if "/" not in own:
                whole, usual = interface.max_prefixlen, 24 if interface.version == 4 else 64
                raise ValueError(
                    f"{value!r} has no prefix length; write '{own}/{usual}' for an address in a "
                    f"network of that prefix length, or '{own}/{whole}' for the address alone"
                )
            return _link_address(interface, None, value)
        case [own, "peer", other]:
            return _link_address(_interface(own, value), _interface(other, value), value)
    raise ValueError(f"{value!r} is not a valid address; {_ADDRESS_FORMS}")


def _interface(word: str, text: str) -> IPv4Interface | IPv6Interface:
    try:
        return ipaddress.ip_interface(word)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a valid address ({error}); {_ADDRESS_FORMS}") from error


def _link_address(
    own: IPv4Interface | IPv6Interface, peer: IPv4Interface | IPv6Interface | None, text: str
) -> LinkAddress:
    for each in (own, peer):
        if each is not None:
            _refuse_zone(each, text)
    if peer is not None:
        if own.version != peer.version:
            raise ValueError(f"{text!r} mixes IPv4 and IPv6; {_ADDRESS_FORMS}")
        if own.ip == peer.ip:
            raise ValueError(f"{text!r} names the same address at both ends; {_ADDRESS_FORMS}")
        if own.network.prefixlen != own.max_prefixlen:
            # The kernel stores one prefix length for each address, and here it is the peer's.
            raise ValueError(
                f"{text!r} has a prefix length before 'peer', but only the peer can have one; "
                f"write '{own.ip} peer {peer}'"
            )
    return LinkAddress(own, peer, _scope(own.ip))


def _scope(address: IPv4Address | IPv6Address) -> str:
    """Return the scope that the kernel gives to an IPv6 address, and `ip` to an IPv4 address."""
    if address.is_loopback:
        return "host"
    if isinstance(address, IPv6Address):
        if address.is_link_local:
            return "link"
        if address.is_site_local:
            return "site"
    return "global"


def _refuse_zone(address: IPv4Address | IPv6Address, text: str) -> None:
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError(
            f"{text!r} has a zone; leave out '%{address.scope_id}', as the link is known"
        )


def parse_route(
    value: RouteArg | Route,
    via: str | IPv4Address | IPv6Address | None = None,
    metric: int | None = None,
    table: int | None = None,
    onlink: bool = False,
) -> Route:
    """Parse a route, such as ``"10.2.0.0/16 via 10.0.0.2 metric 50"`` or ``"default"``.

    Args:
        value: the text, or the destination as an object of the ipaddress module.
        via: the gateway, unless the text has it.
        metric: the metric, unless the text has it.
        table: the table's number, unless the text has it.
        onlink: whether the gateway is on the link even if no route leads to it. The text may have
            this too.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the text is not a valid route, has something twice, or mixes IPv4 and IPv6.
    """
    if not isinstance(onlink, bool):
        raise TypeError(f"onlink must be True or False, got {onlink!r}")
    if isinstance(value, Route):
        if (via, metric, table, onlink) != (None, None, None, False):
            raise ValueError(
                f"the Route {str(value)!r} already has a gateway, metric and table; give no others"
            )
        return value
    if isinstance(value, str):
        dst, named = _route_words(value)
    elif isinstance(
        value,
        IPv4Network | IPv6Network | IPv4Address | IPv6Address | IPv4Interface | IPv6Interface,
    ):
        dst, named = str(value), {}
    else:
        raise TypeError(
            f"a route must be a str or an ipaddress object, got {type(value).__name__}; "
            f"{_ROUTE_FORMS}"
        )
    text = str(value)
    for key, given in (("via", via), ("metric", metric), ("table", table)):
        if given is not None:
            if key in named:
                raise ValueError(f"{key!r} is given twice: in {text!r} and as an argument")
            named[key] = given
    gateway = _gateway(named.get("via"), text)
    onlink = onlink or "onlink" in named
    if onlink and gateway is None:
        raise ValueError(f"{text!r} with 'onlink' needs a gateway; {_ROUTE_FORMS}")
    return make_route(
        _destination(dst, gateway, text),
        gateway,
        _number(named.get("metric"), "metric", 0, text),
        _number(named.get("table"), "table", 1, text),
        onlink,
    )


def _route_words(text: str) -> tuple[str, dict[str, object]]:
    """Split a route's text into its destination and its named parts."""
    dst, *words = text.split() or [""]
    named: dict[str, object] = {}
    rest = iter(words)
    for key in rest:
        value = True if key == "onlink" else next(rest, None)
        if not dst or value is None or key not in ("via", "onlink", "metric", "table"):
            raise ValueError(f"{text!r} is not a valid route; {_ROUTE_FORMS}")
        if key in named:
            raise ValueError(f"{text!r} has {key!r} twice; {_ROUTE_FORMS}")
        named[key] = _digits(key, str(value), text) if key in ("metric", "table") else value
    if not dst:
        raise ValueError(f"{text!r} is not a valid route; {_ROUTE_FORMS}")
    return dst, named


def _digits(key: str, word: str, text: str) -> int:
    # int() alone would also accept '1_0' and '+5'.
    if not (word.isascii() and word.isdigit()):
        raise ValueError(
            f"{text!r} is not a valid route: {key!r} must be a number, got {word!r}; {_ROUTE_FORMS}"
        )
    return int(word)


def _number(value: object, key: str, lowest: int, text: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"a route's {key} must be an int, got {type(value).__name__}")
    if not lowest <= value <= _U32:
        raise ValueError(f"the {key} of the route {text!r} must be {lowest} to {_U32}, got {value}")
    return value


def _gateway(value: object, text: str) -> IPv4Address | IPv6Address | None:
    if value is None:
        return None
    if not isinstance(value, str | IPv4Address | IPv6Address):
        raise TypeError(f"a gateway must be a str or an address object, got {type(value).__name__}")
    try:
        address = ipaddress.ip_address(str(value))
    except ValueError as error:
        raise ValueError(
            f"the gateway {str(value)!r} of the route {text!r} is not a valid address ({error}); "
            f"{_ROUTE_FORMS}"
        ) from error
    _refuse_zone(address, text)
    return address


def _destination(
    word: str, via: IPv4Address | IPv6Address | None, text: str
) -> IPv4Network | IPv6Network:
    if word == "default":
        return ipaddress.ip_network("::/0" if via is not None and via.version == 6 else "0.0.0.0/0")
    try:
        inside = ipaddress.ip_interface(word)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a valid route ({error}); {_ROUTE_FORMS}") from error
    _refuse_zone(inside, text)
    if inside.ip != inside.network.network_address:
        raise ValueError(
            f"{text!r} has host bits set; write {inside.network} for the network, or {inside.ip} "
            "for the address alone"
        )
    if via is not None and via.version != inside.version:
        raise ValueError(f"{text!r} with the gateway {via} mixes IPv4 and IPv6; {_ROUTE_FORMS}")
    return inside.network


def make_route(
    dst: IPv4Network | IPv6Network,
    via: IPv4Address | IPv6Address | None,
    metric: int | None,
    table: int | None,
    onlink: bool,
) -> Route:
    """Make a Route without the defaults, so that Routes are equal if they are to the kernel.

    The kernel treats a metric of 0 as the default, too.
    """
    if metric in (0, DEFAULT_METRICS[dst.version]):
        metric = None
    return Route(dst, via, metric, MAIN_TABLE if table is None else table, onlink)

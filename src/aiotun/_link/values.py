"""What links, addresses and routes are, as values: their classes and their text; no I/O."""

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
"""RT_TABLE_MAIN (rtnetlink.h): where routes live unless told otherwise."""

# ipv6_route.h: IP6_RT_PRIO_USER, which the kernel puts where a route comes without a metric. An
# IPv4 route then has 0.
DEFAULT_METRICS = {4: 0, 6: 1024}

IPV6_MIN_MTU = 1280
"""ipv6.h: a link with a smaller MTU has no IPv6."""

_U32 = 0xFFFF_FFFF

SCOPES = {"global": 0, "site": 200, "link": 253, "host": 254}
"""rtnetlink.h: enum rt_scope_t. Other scopes are numbers without a name."""

_ADDRESS_FORMS = "write '10.0.0.1/24', 'fd00::1/64' or '10.0.0.1 peer 10.0.0.2/32'"
_ROUTE_FORMS = (
    "write 'DST [via GATEWAY [onlink]] [metric N] [table N]', DST a network, an address or "
    "'default', such as '10.2.0.0/16 via 10.0.0.2 metric 50'"
)


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An IP address on a link.

    Attributes:
        interface: the address with its network's prefix length; where there is a peer, with the
            whole length.
        peer: the other end of a point-to-point link with the prefix length of what is reached
            there, or None.
        scope: ``"global"``, ``"site"``, ``"link"``, ``"host"``, or another scope's number as text.

    Raises:
        TypeError, ValueError: an attribute is of another type, or no such scope exists. Text is
            read by `Link.add_address` and the like, not here.

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
        dst: the destinations.
        via: the gateway, or None where they are on the link itself.
        metric: the smallest wins; None is the kernel's default (0 for IPv4, 1024 for IPv6).
        table: the routing table's number; 254 is the main one.
        onlink: whether the gateway is taken for a neighbour on the link, though no route to it says
            so (RTNH_F_ONLINK). Routes that differ in this alone are equal: the kernel takes only
            one of them.

    Raises:
        TypeError, ValueError: an attribute is of another type or out of range. Text is read by
            `Link.add_route` and the like, not here.

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
            # An interface is an address to isinstance(), and its text is none for the kernel.
            _check_field(self, "via", (IPv4Address, IPv6Address), but=_INTERFACES)
        _number(self.metric, "metric", 0, str(self.dst))
        if _number(self.table, "table", 1, str(self.dst)) is None:
            raise TypeError("a Route's table must be an int, not None; 254 is the main table")
        _check_field(self, "onlink", (bool,))
        if self.onlink and self.via is None:
            raise ValueError(f"{str(self.dst)!r}: onlink is about a gateway; name one with 'via'")

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
    """Check a field's type where the value is made, not in the thread that asks the kernel."""
    given = getattr(value, name)
    if not isinstance(given, kinds) or isinstance(given, but):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"{name} of a {type(value).__name__} must be of type {expected}, got {given!r}; "
            "addresses and routes can also be given as text, without this class"
        )


AddressArg = str | IPv4Interface | IPv6Interface | LinkAddress
"""An address as users write it."""

RouteArg = (
    str | IPv4Network | IPv6Network | IPv4Address | IPv6Address | IPv4Interface | IPv6Interface
)
"""A route's destination as users write it; a text may name gateway, metric and table too."""


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: surrogates, which stand for other bytes, can't."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


def check_name(name: str) -> str:
    """Check that the kernel would take this interface name as it is, and give it back.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty, longer than 15 bytes, has a character that names can't have, or is
            not UTF-8. (The kernel takes any bytes, and netlink's own libraries only UTF-8.)
    """
    if not isinstance(name, str):
        raise TypeError(f"an interface name is a str, not {type(name).__name__}")
    if not is_utf8(name):
        raise ValueError(
            f"the interface name {name!r} can't be encoded as UTF-8; choose another name"
        )
    octets = name.encode()
    size = len(octets)
    if not 0 < size < IFNAMSIZ:
        raise ValueError(f"the interface name {name!r} has {size} bytes; it may have 1 to 15")
    # 0xa0 is a space to the kernel (ctype.c), also as a part of a letter in UTF-8: "à" has it.
    if name in (".", "..") or re.search(rb"[/:\s\0\xa0]", octets):
        raise ValueError(
            f"{name!r} is no interface name; leave out '/', ':' and spaces (and letters with a "
            "byte 0xa0 in UTF-8, such as 'à'), and do not use '.' or '..'"
        )
    return name


def check_new_name(name: str) -> str:
    """Check that the kernel would give an interface this name, and give it back.

    ``"vpn%d"`` is one: the kernel puts the lowest free number in.

    Raises:
        TypeError, ValueError: as `check_name`, or the kernel keeps the name for itself.
    """
    check_name(name)
    # It would make directories of these names under /proc/sys/net/ipv4/conf, where they are.
    if name in ("all", "default"):
        raise ValueError(f"the kernel calls no interface {name!r}; choose another name")
    if "%" in name and (name.count("%") > 1 or "%d" not in name):
        raise ValueError(f"{name!r} may have one '%d', for a number, and no other '%'")
    return name


def parse_address(value: AddressArg) -> LinkAddress:
    """Read an address, such as ``"10.0.0.1/24"`` or ``"10.0.0.1 peer 10.0.0.2/32"``.

    A text without a prefix length is refused: whoever forgets it means the network's, and would get
    an address whose neighbours can't be reached. A peer without one is the peer alone.

    Raises:
        TypeError: it is neither text nor an object of the ipaddress module.
        ValueError: it is no address, has no prefix length, or its peer is of the other family.
    """
    if isinstance(value, LinkAddress):
        return value
    if isinstance(value, IPv4Interface | IPv6Interface):
        return _link_address(value, None, str(value))
    if not isinstance(value, str):
        raise TypeError(
            f"an address is a str, an IPv4Interface or an IPv6Interface, not "
            f"{type(value).__name__}; {_ADDRESS_FORMS}"
        )
    match value.split():
        case [own]:
            interface = _interface(own, value)
            if "/" not in own:
                whole, usual = interface.max_prefixlen, 24 if interface.version == 4 else 64
                raise ValueError(
                    f"{value!r} has no prefix length; write '{own}/{usual}' for an address in a "
                    f"network of that length, or '{own}/{whole}' for the address alone"
                )
            return _link_address(interface, None, value)
        case [own, "peer", other]:
            return _link_address(_interface(own, value), _interface(other, value), value)
    raise ValueError(f"{value!r} is no address; {_ADDRESS_FORMS}")


def _interface(word: str, text: str) -> IPv4Interface | IPv6Interface:
    try:
        return ipaddress.ip_interface(word)
    except ValueError as error:
        raise ValueError(f"{text!r} is no address ({error}); {_ADDRESS_FORMS}") from error


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
            # The kernel has one prefix length an address, and it is the peer's.
            raise ValueError(
                f"{text!r} has a prefix length before 'peer'; only the peer has one: "
                f"'{own.ip} peer {peer}'"
            )
    return LinkAddress(own, peer, _scope(own.ip))


def _scope(address: IPv4Address | IPv6Address) -> str:
    """Give the scope that the kernel keeps an IPv6 address with, and `ip` an IPv4 one."""
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
        raise ValueError(f"{text!r} has a zone; leave '%{address.scope_id}' out: the link is known")


def parse_route(
    value: RouteArg | Route,
    via: str | IPv4Address | IPv6Address | None = None,
    metric: int | None = None,
    table: int | None = None,
    onlink: bool = False,
) -> Route:
    """Read a route, such as ``"10.2.0.0/16 via 10.0.0.2 metric 50"`` or ``"default"``.

    Args:
        value: the text, or the destination as an object of the ipaddress module.
        via: the gateway, unless the text names it.
        metric: the metric, unless the text names it.
        table: the table's number, unless the text names it.
        onlink: whether the gateway is on the link though no route says so; the text may say it too.

    Raises:
        TypeError: something is of another type.
        ValueError: the text is no route, something is named twice, or families are mixed.
    """
    if not isinstance(onlink, bool):
        raise TypeError(f"onlink is True or False, not {onlink!r}")
    if isinstance(value, Route):
        if (via, metric, table, onlink) != (None, None, None, False):
            raise ValueError(f"the Route {str(value)!r} has its gateway, metric and table already")
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
            f"a route is a str or an ipaddress object, not {type(value).__name__}; {_ROUTE_FORMS}"
        )
    text = str(value)
    for key, given in (("via", via), ("metric", metric), ("table", table)):
        if given is not None:
            if key in named:
                raise ValueError(f"{text!r} names {key!r}, which is given beside it too")
            named[key] = given
    gateway = _gateway(named.get("via"), text)
    onlink = onlink or "onlink" in named
    if onlink and gateway is None:
        raise ValueError(f"{text!r} with 'onlink' has no gateway that it is about; {_ROUTE_FORMS}")
    return make_route(
        _destination(dst, gateway, text),
        gateway,
        _number(named.get("metric"), "metric", 0, text),
        _number(named.get("table"), "table", 1, text),
        onlink,
    )


def _route_words(text: str) -> tuple[str, dict[str, object]]:
    """Cut a route's text into its destination and its named parts."""
    dst, *words = text.split() or [""]
    named: dict[str, object] = {}
    rest = iter(words)
    for key in rest:
        value = True if key == "onlink" else next(rest, None)
        if not dst or value is None or key not in ("via", "onlink", "metric", "table"):
            raise ValueError(f"{text!r} is no route; {_ROUTE_FORMS}")
        if key in named:
            raise ValueError(f"{text!r} names {key!r} twice; {_ROUTE_FORMS}")
        named[key] = _digits(key, str(value), text) if key in ("metric", "table") else value
    if not dst:
        raise ValueError(f"{text!r} is no route; {_ROUTE_FORMS}")
    return dst, named


def _digits(key: str, word: str, text: str) -> int:
    # int() alone would also take '1_0' and '+5'.
    if not (word.isascii() and word.isdigit()):
        raise ValueError(f"{text!r} has {word!r} where {key!r} needs a number; {_ROUTE_FORMS}")
    return int(word)


def _number(value: object, key: str, lowest: int, text: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"a route's {key} is an int, not {type(value).__name__}")
    if not lowest <= value <= _U32:
        raise ValueError(f"{text!r} with {key} {value}: it may be {lowest} to {_U32}")
    return value


def _gateway(value: object, text: str) -> IPv4Address | IPv6Address | None:
    if value is None:
        return None
    if not isinstance(value, str | IPv4Address | IPv6Address):
        raise TypeError(f"a gateway is a str or an address object, not {type(value).__name__}")
    try:
        address = ipaddress.ip_address(str(value))
    except ValueError as error:
        raise ValueError(
            f"{text!r} has the gateway {str(value)!r}, which is no address ({error}); "
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
        raise ValueError(f"{text!r} is no route ({error}); {_ROUTE_FORMS}") from error
    _refuse_zone(inside, text)
    if inside.ip != inside.network.network_address:
        raise ValueError(
            f"{text!r} has host bits set: the network is {inside.network}, "
            f"the address alone {inside.ip}"
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
    """Build a Route so that equal ones are equal in the kernel: defaults are not spelt out.

    The kernel takes a metric of 0 for the default too.
    """
    if metric in (0, DEFAULT_METRICS[dst.version]):
        metric = None
    return Route(dst, via, metric, MAIN_TABLE if table is None else table, onlink)

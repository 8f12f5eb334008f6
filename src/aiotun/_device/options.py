"""The options of `open_tun` and `open_tap`, which are checked before anything is opened."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Any, NamedTuple, TypedDict, TypeVar

from .._kernel import abi
from .._kernel.namespaces import NetnsArg, check_netns
from .._kernel.words import Mode, Napi, Offload, check_offload, parse_mac
from .._link.values import (
    IPV6_MIN_MTU,
    AddressArg,
    LinkAddress,
    Route,
    RouteArg,
    check_name,
    check_new_name,
    parse_address,
    parse_route,
)

__all__ = ["Options", "TapOptions", "TunOptions", "check", "check_words", "spell_out", "switch"]

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

# The kernel's limits (ip.h, tun.c). An IP packet has at most 65,535 bytes, and a TAP's limit is
# lower by the Ethernet header.
_MTU_MIN, _MTU_MAX = 68, {"tun": 65_535, "tap": 65_521}

_S32 = 0x7FFF_FFFF

# netdevice.h: GSO_MAX_SEGS and GSO_LEGACY_MAX_SIZE, a TUN or TAP device's tso_max_size.
_GSO_MAX_SEGS, _GSO_MAX_SIZE = 65_535, 65_536


# Names that ip(8) and other libraries use for our options, if difflib would not find our name.
_OTHER_NAMES = {
    "ip": "addresses",
    "ns": "netns",
    "namespace": "netns",
    "user": "owner",
    "uid": "owner",
    "gid": "group",
    "pi": "packet_info",
    "vnet_hdr": "offload",
    "txqlen": "txqueuelen",
    "master": "bridge",
    "hwaddr": "mac",
}


class Options(NamedTuple):
    """The options of one opening, after the checks."""

    mode: Mode
    name: str | None
    queues: int
    multi_queue: bool
    addresses: list[LinkAddress]
    routes: list[Route]
    mtu: int | None
    txqueuelen: int | None
    gso_max_segs: int | None
    gso_max_size: int | None
    up: bool
    mac: str | None
    bridge: str | None
    netns: NetnsArg | None
    persist: bool | None
    owner: int | None
    group: int | None
    exclusive: bool
    offload: Offload
    packet_info: bool
    napi: Napi
    ipv6_autoconf: bool | None
    carrier: bool | None
    sndbuf: int | None


class TunOptions(TypedDict, total=False):
    """The keyword arguments of `open_tun`, which describes them.

    A function of your own that passes them on has the parameter
    ``**options: Unpack[aiotun.TunOptions]``.
    """

    queues: int
    multi_queue: bool | None
    addresses: Iterable[AddressArg]
    routes: Iterable[RouteArg | Route]
    mtu: int | None
    txqueuelen: int | None
    gso_max_segs: int | None
    gso_max_size: int | None
    up: bool
    netns: NetnsArg | None
    persist: bool | None
    owner: int | str | None
    group: int | str | None
    exclusive: bool
    offload: Offload
    packet_info: bool
    napi: Napi
    ipv6_autoconf: bool | None
    carrier: bool | None
    sndbuf: int | None


class TapOptions(TunOptions, total=False):
    """The keyword arguments of `open_tap`, which describes them."""

    mac: str | None
    bridge: str | None


def check(
    mode: Mode,
    name: str | None,
    *,
    queues: int = 1,
    multi_queue: bool | None = None,
    addresses: Iterable[AddressArg] = (),
    routes: Iterable[RouteArg | Route] = (),
    mtu: int | None = None,
    txqueuelen: int | None = None,
    gso_max_segs: int | None = None,
    gso_max_size: int | None = None,
    up: bool = True,
    mac: str | None = None,
    bridge: str | None = None,
    netns: NetnsArg | None = None,
    persist: bool | None = None,
    owner: int | str | None = None,
    group: int | str | None = None,
    exclusive: bool = False,
    offload: Offload = "off",
    packet_info: bool = False,
    napi: Napi = False,
    ipv6_autoconf: bool | None = None,
    carrier: bool | None = None,
    sndbuf: int | None = None,
) -> Options:
    """Check the options of `open_tun` and `open_tap`, each by itself and together.

    This makes no system calls, except to look up users and groups.

    Raises:
        TypeError, ValueError: an option is invalid.
    """
    if name is not None:
        check_new_name(name)
    if mode == "tun" and (mac is not None or bridge is not None):
        raise TypeError("a TUN device can't have 'mac' or 'bridge'; use open_tap for a TAP device")
    _check_range("queues", queues, 1, abi.MAX_QUEUES)
    if multi_queue is False and queues > 1:
        raise ValueError(f"queues={queues} needs a multi-queue device; omit 'multi_queue'")
    if mtu is not None:
        _check_range("mtu", mtu, _MTU_MIN, _MTU_MAX[mode])
    if txqueuelen is not None:
        _check_range("txqueuelen", txqueuelen, 0, abi.MAX_QUEUE_LENGTH)
    if gso_max_segs is not None:
        _check_range("gso_max_segs", gso_max_segs, 1, _GSO_MAX_SEGS)
    if gso_max_size is not None:
        _check_range("gso_max_size", gso_max_size, 1, _GSO_MAX_SIZE)
    if sndbuf is not None:
        _check_range("sndbuf", sndbuf, 1, _S32)
    check_offload(offload)
    if packet_info and offload != "off":
        raise ValueError(
            f"packet_info=True can't be combined with offload={offload!r}; use offload='off'"
        )
    check_netns(netns)
    link_addresses = [parse_address(each) for each in _iterable("addresses", addresses)]
    link_routes = [parse_route(each) for each in _iterable("routes", routes)]
    ipv6 = [str(each) for each in link_addresses if each.interface.version == 6]
    ipv6 += [str(each) for each in link_routes if each.dst.version == 6]
    ipv6 += ["ipv6_autoconf=True"] if ipv6_autoconf is True else []
    if ipv6 and mtu is not None and mtu < IPV6_MIN_MTU:
        raise ValueError(
            f"mtu={mtu} is too small for {ipv6[0]}: IPv6 needs at least {IPV6_MIN_MTU}; "
            "raise 'mtu' or omit IPv6"
        )
    return Options(
        mode=mode,
        name=name,
        queues=queues,
        multi_queue=queues > 1 if multi_queue is None else switch("multi_queue", multi_queue),
        addresses=link_addresses,
        routes=link_routes,
        mtu=mtu,
        txqueuelen=txqueuelen,
        gso_max_segs=gso_max_segs,
        gso_max_size=gso_max_size,
        up=switch("up", up),
        mac=None if mac is None else parse_mac(mac),
        bridge=None if bridge is None else check_name(bridge),
        netns=netns,
        persist=None if persist is None else switch("persist", persist),
        owner=_uid(owner),
        group=_gid(group),
        exclusive=switch("exclusive", exclusive),
        offload=offload,
        packet_info=switch("packet_info", packet_info),
        napi=_napi(napi),
        ipv6_autoconf=None if ipv6_autoconf is None else switch("ipv6_autoconf", ipv6_autoconf),
        carrier=None if carrier is None else switch("carrier", carrier),
        sndbuf=sndbuf,
    )


def spell_out(options: Any) -> Callable[[F], F]:
    """Give a function the signature that it has for type checkers, at run time too.

    So help(), completion in a shell and the reference show each keyword argument, with its type and
    its default, instead of ``**options``.

    Args:
        options: the TypedDict of the function's keyword arguments, which `check` has too. A switch
            that `check` does not have is off by default.
    """

    def spelled_out(function: F) -> F:
        own, known = inspect.signature(function), inspect.signature(check).parameters
        kept = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
        words = [word for word in known if word in options.__optional_keys__]
        more = [
            inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
            for word in sorted(options.__optional_keys__ - known.keys())
        ]
        parameters = [*kept, *(known[word] for word in words), *more]
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what inspect reads
        return function

    return spelled_out


def check_words(function: str, given: Iterable[str], options: Any) -> None:
    """Check the names of a function's keyword arguments, as Python checks named parameters.

    Args:
        function: the function's public name.
        given: the names that it was called with.
        options: the TypedDict of its keyword arguments.

    Raises:
        TypeError: the function does not have an argument of this name.
    """
    words: frozenset[str] = options.__optional_keys__
    for word in given:
        if word in words:
            continue
        import difflib

        text = f"{function}() got an unexpected keyword argument {word!r}"
        near = difflib.get_close_matches(word, sorted(words), 1, 0.7)
        for nearest in [*near, *words.intersection([_OTHER_NAMES.get(word, "")])][:1]:
            text += f"; did you mean {nearest!r}?"
        raise TypeError(text)


def _check_range(what: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, got {value!r}")
    if not lowest <= value <= highest:
        raise ValueError(f"{what} must be {lowest} to {highest}, got {value}")


def switch(what: str, value: object) -> bool:
    """Check that an option is True or False, and return it."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {value!r}")
    return value


def _napi(value: Napi) -> Napi:
    if isinstance(value, bool) or value == "threaded":
        return value
    raise TypeError(f"napi must be True, False or 'threaded', got {value!r}")


def _iterable(what: str, values: Iterable[T]) -> Iterable[T]:
    # Text is iterable, too, and a network is an iterable of all its addresses.
    single = isinstance(values, str | bytes | IPv4Network | IPv6Network)
    if single or not isinstance(values, Iterable):
        raise TypeError(f"{what} must be a list; for a single value write {what}=[{values!r}]")
    return values


def _uid(owner: int | str | None) -> int | None:
    if isinstance(owner, str):
        import pwd

        try:
            return pwd.getpwnam(owner).pw_uid
        except (KeyError, ValueError):  # ValueError: a NUL, or a surrogate
            raise ValueError(f"owner={owner!r}: this machine has no such user") from None
    if owner is not None:
        _check_range("owner", owner, 0, _S32)
    return owner


def _gid(group: int | str | None) -> int | None:
    if isinstance(group, str):
        import grp

        try:
            return grp.getgrnam(group).gr_gid
        except (KeyError, ValueError):
            raise ValueError(f"group={group!r}: this machine has no such group") from None
    if group is not None:
        _check_range("group", group, 0, _S32)
    return group

"""Files with which systemd-networkd creates a device at boot; no I/O."""

from __future__ import annotations

import re
from typing import Any, Unpack

from ._device import options as device_options
from ._kernel.words import Mode
from ._link.values import IPV6_MIN_MTU, MAIN_TABLE, LinkAddress, Route, check_new_name

__all__ = ["NetworkdOptions", "networkd_units"]

# The characters that a value may have. It leaves out everything that has a meaning to systemd
# (systemd.syntax(7)), so that a value needs no quotes or escapes: white space, line ends, a
# backslash at a line's end, specifiers and patterns.
_PLAIN = re.compile(r"[A-Za-z0-9_.:/@+$-]+")
# In [Match] networkd treats an interface name as a pattern, and a number as an interface's index.
_NAME = re.compile(r"(?!\d+\Z)[A-Za-z0-9_.@+-]+")
# networkd treats a name of digits as a number. Otherwise this is what useradd(8) allows.
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\$?")

_AT_OPENING = "let the program set it when it opens the device"
_IN_A_LINK_FILE = "set it in a .link file for udev ({}= in systemd.link(5)), or " + _AT_OPENING
# The options that a networkd file can't express: name, default, and what to do instead.
_UNSAYABLE: list[tuple[str, object, str]] = [
    ("txqueuelen", None, _IN_A_LINK_FILE.format("TransmitQueueLength")),
    ("gso_max_segs", None, _IN_A_LINK_FILE.format("GenericSegmentOffloadMaxSegments")),
    ("gso_max_size", None, _IN_A_LINK_FILE.format("GenericSegmentOffloadMaxBytes")),
    ("netns", None, "leave it out, and run another networkd in that namespace"),
    ("exclusive", False, "leave it out: networkd always uses a device that exists already"),
    ("napi", False, _AT_OPENING),
    # With KeepCarrier= networkd would hold a queue. If it is the only queue, no program could
    # attach. With several queues, networkd before systemd 255 drops the packets of its own one.
    ("carrier", None, _AT_OPENING),
    ("sndbuf", None, _AT_OPENING),
]

_Section = tuple[str, list[str]]


class NetworkdOptions(device_options.TapOptions, total=False):
    """The keyword arguments of `networkd_units`, which documents them."""

    vnet_header: bool


@device_options.spell_out(NetworkdOptions)
def networkd_units(
    name: str, mode: Mode = "tun", **options: Unpack[NetworkdOptions]
) -> dict[str, str]:
    """Return the files with which systemd-networkd creates the same device as `open_tun`, at boot.

    Put the files into /etc/systemd/network. networkd reads them when it starts, and on ``networkctl
    reload``. The device is persistent, and has its addresses and routes before a program attaches
    to it. The device's owner needs no privilege to attach, as long as the program asks only for
    settings that the device already has. The same arguments give the same text.

    Args:
        name: the interface's name, without ``%d``. It may have ASCII letters, digits, ``_``, ``.``,
            ``@``, ``+`` and ``-``, but not digits only.
        mode: ``"tun"`` or ``"tap"``.
        vnet_header (bool): whether packets have a virtio-net header in front.
        options: the options of `open_tun` and `open_tap`, and so of `create_persistent`. Any
            `offload` but ``"off"`` gives the device a virtio-net header. `queues` above 1 makes it
            a multi-queue device, whatever the number. networkd looks up an `owner` or `group` that
            is a name. `bridge` needs a ``.netdev`` file of its own (``Kind=bridge``), even if the
            bridge exists already: networkd attaches only to bridges that it has such a file for.

    Returns:
        The text of each file by the file's name: ``50-tun0.netdev`` and ``50-tun0.network``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, or networkd has no setting for it: `txqueuelen`,
            `gso_max_segs`, `gso_max_size`, `netns`, `exclusive`, `napi`, `carrier`, `sndbuf`,
            ``persist=False``, and routes with ``up=False``. These options are accepted with their
            default value.

    Source: ``systemd.netdev(5)``, ``systemd.network(5)``.
    """
    if mode not in ("tun", "tap"):
        raise ValueError(f"mode must be 'tun' or 'tap', got {mode!r}")
    device_options.check_words("networkd_units", options, NetworkdOptions)
    # networkd looks the names up on its machine. `check` would look them up on this one.
    asked: dict[str, Any] = {**options}
    owner, group = _take_name(asked, "owner"), _take_name(asked, "group")
    vnet_header = asked.pop("vnet_header", False)
    if not isinstance(vnet_header, bool):
        raise TypeError(f"vnet_header must be True or False, got {vnet_header!r}")
    wanted = device_options.check(mode, _literal(name), **asked)
    _check_sayable(wanted)
    netdev: list[_Section] = [
        ("NetDev", [_line("Name", name), _line("Kind", mode)]),
        (
            "Tun" if mode == "tun" else "Tap",
            [
                *(["MultiQueue=yes"] if wanted.multi_queue else []),
                *(["PacketInfo=yes"] if wanted.packet_info else []),
                *(["VNetHeader=yes"] if vnet_header or wanted.offload != "off" else []),
                *_if_given("User", owner or wanted.owner),
                *_if_given("Group", group or wanted.group),
            ],
        ),
    ]
    return {
        f"50-{name}.netdev": _text(f"50-{name}.netdev", netdev),
        f"50-{name}.network": _text(f"50-{name}.network", _network(wanted, name)),
    }


def _network(wanted: device_options.Options, name: str) -> list[_Section]:
    link = [
        *_if_given("MTUBytes", wanted.mtu),
        *_if_given("MACAddress", wanted.mac),
        *([] if wanted.up else ["ActivationPolicy=manual"]),
        "# There is no carrier until a program attaches. The boot must not wait for it.",
        "RequiredForOnline=no",
    ]
    network = ["ConfigureWithoutCarrier=yes"]
    if wanted.bridge is not None:
        network += [
            "# This needs a .netdev file with Kind=bridge, even if the bridge exists already.",
            _line("Bridge", _literal(wanted.bridge)),
        ]
    too_small = wanted.mtu is not None and wanted.mtu < IPV6_MIN_MTU
    if too_small:
        network.append(f"# With IPv6 networkd would raise the MTU to {IPV6_MIN_MTU}.")
    if too_small or wanted.ipv6_autoconf is False:
        network += ["LinkLocalAddressing=no", "IPv6AcceptRA=no"]
    elif wanted.ipv6_autoconf:
        network += ["LinkLocalAddressing=ipv6", "IPv6AcceptRA=yes"]
    return [
        ("Match", [_line("Name", name)]),
        ("Link", link),
        ("Network", network),
        *(("Address", _address(address)) for address in wanted.addresses),
        *(("Route", _route(route)) for route in wanted.routes),
    ]


def _address(address: LinkAddress) -> list[str]:
    far = address.peer or address.interface
    # The kernel stores one prefix length for each address; with a peer it is the peer's.
    length = far.network.prefixlen
    lines = [_line("Address", f"{address.interface.ip}/{length}")]
    if address.peer is not None:
        lines.append(_line("Peer", f"{far.ip}/{length}"))
    if far.version == 6:  # the kernel derives the scope from the address
        # As `Link.add_address` does: no other host on this wire could have the address.
        lines.append("DuplicateAddressDetection=none")
    elif address.scope != "global":
        # 200 is RT_SCOPE_SITE (rtnetlink.h), which networkd has no name for.
        lines.append(_line("Scope", "200" if address.scope == "site" else address.scope))
    return lines


def _route(route: Route) -> list[str]:
    return [
        _line("Destination", route.dst),
        *_if_given("Gateway", route.via),
        *(["GatewayOnLink=yes"] if route.onlink else []),
        *_if_given("Metric", route.metric),
        *([] if route.table == MAIN_TABLE else [_line("Table", route.table)]),
    ]


def _literal(name: str) -> str:
    """Return the name if networkd treats it as a literal interface name."""
    if not _NAME.fullmatch(check_new_name(name)):
        raise ValueError(
            f"{name!r} is not a valid interface name for networkd; use ASCII letters, digits, '_', "
            "'.', '@', '+' and '-', without '%d', and not digits only"
        )
    return name


def _take_name(asked: dict[str, Any], what: str) -> str | None:
    """Take a user's or group's name out of the arguments and return it; a number stays."""
    if not isinstance(asked.get(what), str):
        return None
    name: str = asked.pop(what)
    if not _USER.fullmatch(name):
        raise ValueError(
            f"{what}={name!r} is not a valid user or group name; give a number as an int"
        )
    return name


def _check_sayable(wanted: device_options.Options) -> None:
    for option, default, instead in _UNSAYABLE:
        value = getattr(wanted, option)
        if value is not default:
            raise ValueError(f"networkd has no setting for {option}={value!r}; {instead}")
    if wanted.persist is False:
        raise ValueError("networkd creates only persistent devices; leave out persist=False")
    if wanted.routes and not wanted.up:
        raise ValueError(
            "networkd tries to add routes only once, which fails while the link is down; leave out "
            "up=False or the routes"
        )


def _if_given(key: str, value: object) -> list[str]:
    return [] if value is None else [_line(key, value)]


def _line(key: str, value: object) -> str:
    """Return a line of a file; raise if systemd would read more than a plain value in it.

    Every value has been checked before. This is the last check before root writes it to a file.
    """
    text = str(value)
    if not _PLAIN.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a valid value for {key}= in a networkd file; use only ASCII letters, "
            "digits and '_.:/@+$-'"
        )
    return f"{key}={text}"


def _text(file: str, sections: list[_Section]) -> str:
    kind = file.rpartition(".")[2]
    text = f"# Install this as /etc/systemd/network/{file}; see systemd.{kind}(5).\n"
    for title, lines in sections:
        if lines:
            text += "\n".join([f"\n[{title}]", *lines, ""])
    return text

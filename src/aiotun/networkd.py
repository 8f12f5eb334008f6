"""Files that make systemd-networkd create a device at boot; pure: nothing is written or asked."""

from __future__ import annotations

import re
from typing import Any, Unpack

from ._device import options as device_options
from ._kernel.words import Mode
from ._link.values import IPV6_MIN_MTU, MAIN_TABLE, LinkAddress, Route, check_new_name

__all__ = ["NetworkdOptions", "networkd_units"]

# What a value may consist of. It needs no quotes or escapes, whatever systemd gives a meaning to:
# white space, line ends, a backslash at a line's end, specifiers, patterns (systemd.syntax(7)).
_PLAIN = re.compile(r"[A-Za-z0-9_.:/@+$-]+")
# Interface names are patterns in [Match], and networkd takes a number for an interface's index.
_NAME = re.compile(r"(?!\d+\Z)[A-Za-z0-9_.@+-]+")
# A name of digits would be taken for a number; the rest is what useradd(8) allows.
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\$?")

_AT_OPENING = "give it to the program that opens the device"
# What no file can say, its default, and what to do instead.
_UNSAYABLE: list[tuple[str, object, str]] = [
    (
        "txqueuelen",
        None,
        "a .link file, which is for udev, has it (TransmitQueueLength= in systemd.link(5)); or "
        + _AT_OPENING,
    ),
    ("netns", None, "run another networkd in that namespace, and leave it out here"),
    ("exclusive", False, "networkd goes on with a device that is there already"),
    ("napi", False, _AT_OPENING),
    # networkd's KeepCarrier= would occupy the only queue, so that no program could attach. Nor can
    # several queues have it: before systemd 255 it swallows what the kernel puts into its own one.
    ("carrier", None, _AT_OPENING),
    ("sndbuf", None, _AT_OPENING),
]

_Section = tuple[str, list[str]]


class NetworkdOptions(device_options.TapOptions, total=False):
    """The keyword arguments of `networkd_units`; it says what they mean."""

    vnet_header: bool


def networkd_units(
    name: str, mode: Mode = "tun", **options: Unpack[NetworkdOptions]
) -> dict[str, str]:
    """Give the files with which systemd-networkd makes the same device as `open_tun`, at boot.

    They go into /etc/systemd/network; networkd takes them up when it starts, and on ``networkctl
    reload``. The device is persistent. A program attaches to it later: its owner needs no privilege
    for that, as long as it asks for nothing that is not as wanted already. Addresses and routes are
    there before a program is. The same arguments give the same text.

    Args:
        name: the interface's name as it is to be, without ``%d``. Of ASCII, the letters, digits,
            ``_``, ``.``, ``@``, ``+`` and ``-``, and more than a number.
        mode: ``"tun"`` or ``"tap"``.
        vnet_header (bool): whether packets have a virtio-net header in front.
        options: what `open_tun` and `open_tap` take, and so `create_persistent`. `offload` stands
            for a virtio-net header, and `queues` above 1 for a device of several, however many.
            `owner` and `group` by name are looked up by networkd, not here. `bridge` needs a
            ``.netdev`` file of its own (``Kind=bridge``), even if the bridge exists already:
            networkd attaches to no other.

    Returns:
        The text of each file by the file's name: ``50-tun0.netdev`` and ``50-tun0.network``.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is wrong, or networkd has no word for it: `txqueuelen`, `netns`,
            `exclusive`, `napi`, `carrier`, `sndbuf`, ``persist=False``, and routes with
            ``up=False``. What is left at its default is no obstacle.

    Source: ``systemd.netdev(5)``, ``systemd.network(5)``.
    """
    if mode not in ("tun", "tap"):
        raise ValueError(f"mode is 'tun' or 'tap', not {mode!r}")
    device_options.check_words("networkd_units", options, NetworkdOptions)
    # Names of users are for the machine that the files go to; `check` would look them up on this.
    asked: dict[str, Any] = {**options}
    owner, group = _take_name(asked, "owner"), _take_name(asked, "group")
    vnet_header = asked.pop("vnet_header", False)
    if not isinstance(vnet_header, bool):
        raise TypeError(f"vnet_header is True or False, not {vnet_header!r}")
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
        "# There is no carrier until a program attaches; booting does not wait for that.",
        "RequiredForOnline=no",
    ]
    network = ["ConfigureWithoutCarrier=yes"]
    if wanted.bridge is not None:
        network += [
            "# Needs a .netdev file with Kind=bridge, also where the bridge exists already.",
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
    # The kernel has one prefix length an address, and where there is a peer it is the peer's.
    length = far.network.prefixlen
    lines = [_line("Address", f"{address.interface.ip}/{length}")]
    if address.peer is not None:
        lines.append(_line("Peer", f"{far.ip}/{length}"))
    if far.version == 6:  # whose scope is the address's own
        # As `Link.add_address`: there is nobody on this wire to have the same one.
        lines.append("DuplicateAddressDetection=none")
    elif address.scope != "global":
        # rtnetlink.h; networkd has no name for this one.
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
    """Check that networkd would take this interface name, and for nothing but a name."""
    if not _NAME.fullmatch(check_new_name(name)):
        raise ValueError(
            f"networkd takes no name like {name!r}: write it out, without '%d', in ASCII letters, "
            "digits, '_', '.', '@', '+' and '-', and not in digits only"
        )
    return name


def _take_name(asked: dict[str, Any], what: str) -> str | None:
    """Take the name of a user or group out of the arguments; a number stays."""
    if not isinstance(asked.get(what), str):
        return None
    name: str = asked.pop(what)
    if not _USER.fullmatch(name):
        raise ValueError(f"{what}={name!r} is no name of a user or group; write a number as an int")
    return name


def _check_sayable(wanted: device_options.Options) -> None:
    for option, default, instead in _UNSAYABLE:
        value = getattr(wanted, option)
        if value is not default:
            raise ValueError(f"networkd has no setting for {option}={value!r}; {instead}")
    if wanted.persist is False:
        raise ValueError("networkd makes persistent devices only; leave persist=False out")
    if wanted.routes and not wanted.up:
        raise ValueError(
            "networkd adds routes to a link once, and gives up if it is down; leave up=False or "
            "the routes out"
        )


def _if_given(key: str, value: object) -> list[str]:
    return [] if value is None else [_line(key, value)]


def _line(key: str, value: object) -> str:
    """Give a line of a file, whose value can't be anything but that.

    Every value was checked before. This is the last check of what root will write to a file.
    """
    text = str(value)
    if not _PLAIN.fullmatch(text):
        raise ValueError(f"{text!r} can't stand in a networkd file as {key}=; write it plainly")
    return f"{key}={text}"


def _text(file: str, sections: list[_Section]) -> str:
    kind = file.rpartition(".")[2]
    text = f"# To be /etc/systemd/network/{file}; see systemd.{kind}(5).\n"
    for title, lines in sections:
        if lines:
            text += "\n".join([f"\n[{title}]", *lines, ""])
    return text

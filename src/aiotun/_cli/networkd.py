"""``aiotun networkd``: files for systemd-networkd, in the words of ``aiotun add`` and ``ip``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiotun

from .arguments import UsageError, number_or_name, on_or_off, read

__all__ = ["WORDS", "units", "write"]

WORDS = """\
dev NAME         the device; 'dev' may be left out
mode tun | tap   IP packets (unless said otherwise), or Ethernet frames
user USER        who may attach without privilege, by name or number
group GROUP      likewise the members of a group
multi_queue      up to 256 queues instead of one
pi               a packet-info header of 4 bytes in front of each packet
vnet_hdr         a virtio-net header in front of each packet
mtu BYTES        the largest IP packet
address A/LEN [peer B/LEN]
                 an address; may be repeated
route DST [via GATEWAY [onlink]] [metric N] [table N]
                 a route; may be repeated
mac MAC          the TAP's own address
bridge NAME      the bridge that the TAP joins
ipv6_autoconf on | off
                 a link-local address and router solicitations
down             do not bring the link up
"""
"""What may be said, one a line."""

# The argument of `networkd_units` that each word is.
_FLAGS = {"multi_queue": "multi_queue", "pi": "packet_info", "vnet_hdr": "vnet_header"}
_VALUES = {
    "dev": "name",
    "mode": "mode",
    "user": "owner",
    "group": "group",
    "mtu": "mtu",
    "mac": "mac",
    "bridge": "bridge",
    "netns": "netns",
    "ipv6_autoconf": "ipv6_autoconf",
}
_NUMBERS = ("user", "group", "mtu")
_LISTS = {"address": "addresses", "route": "routes"}
# What may follow the value of a word that may be repeated, and whether it has a value itself.
_FOLLOWING = {
    "address": {"peer": True},
    "addr": {"peer": True},
    "route": {"via": True, "onlink": False, "metric": True, "table": True},
}


def units(words: Sequence[str]) -> dict[str, str]:
    """Give the text of each file by its name.

    Raises:
        UsageError: the words make no sense, or networkd has no setting for one.
    """
    try:
        return aiotun.networkd_units(**_read(words))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def write(texts: dict[str, str], folder: Path) -> list[str]:
    """Write files into a folder, over what is there; give their paths.

    Raises:
        AiotunError: one could not be written.
    """
    for name, text in texts.items():
        try:
            (folder / name).write_text(text)
        except OSError as error:
            raise aiotun.AiotunError(f"{error.filename}: {error.strerror}") from error
    return [str(folder / name) for name in texts]


def _read(words: Sequence[str]) -> dict[str, Any]:
    """Read words in any order into the arguments of `networkd_units`."""
    said = read("networkd", words, {*_VALUES, "name", "master"}, {*_FLAGS, "down"}, _FOLLOWING)
    if "dev" not in said.values:
        raise UsageError("say the device's name: 'dev NAME'")
    found: dict[str, Any] = {_LISTS[word]: texts for word, texts in said.lists.items()}
    for word, text in said.values.items():
        found[_VALUES[word]] = number_or_name(text) if word in _NUMBERS else text
    if "ipv6_autoconf" in found:
        found["ipv6_autoconf"] = on_or_off("ipv6_autoconf", found["ipv6_autoconf"])
    for word in said.flags - {"down"}:
        found[_FLAGS[word]] = True
    if "down" in said.flags:
        found["up"] = False
    return found

"""``aiotun networkd``: files for systemd-networkd, in the words of ``aiotun add`` and ``ip``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiotun

from ._commands import UsageError, on_or_off

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

# Words that stand for themselves, and the argument of `networkd_units` that each is.
_FLAGS = {"multi_queue": "multi_queue", "pi": "packet_info", "vnet_hdr": "vnet_header"}
_VALUES = {
    "name": "name",
    "dev": "name",
    "mode": "mode",
    "user": "owner",
    "group": "group",
    "mtu": "mtu",
    "mac": "mac",
    "bridge": "bridge",
    "master": "bridge",
    "netns": "netns",
}
_NUMBERS = ("owner", "group", "mtu")
# Words that may be repeated, and those that may follow with a value of their own.
_LISTS = {
    "address": ("addresses", ("peer",)),
    "addr": ("addresses", ("peer",)),
    "route": ("routes", ("via", "onlink", "metric", "table")),
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
    found: dict[str, Any] = {}
    rest = list(words)

    def value(word: str) -> str:
        if not rest:
            raise UsageError(f"{word!r} needs a value after it; see 'aiotun networkd --help'")
        return rest.pop(0)

    while rest:
        word = rest.pop(0)
        if word in _LISTS:
            key, following = _LISTS[word]
            text = value(word)
            while rest and rest[0] in following:
                more = rest.pop(0)
                text += f" {more}" if more == "onlink" else f" {more} {value(more)}"
            found.setdefault(key, []).append(text)
            continue
        given: object
        if word in _FLAGS:
            key, given = _FLAGS[word], True
        elif word == "down":
            key, given = "up", False
        elif word == "ipv6_autoconf":
            key, given = word, on_or_off(word, value(word))
        elif word in _VALUES:
            key, given = _VALUES[word], value(word)
        elif "name" not in found:
            key, given = "name", word
        else:
            raise UsageError(f"{word!r} is no word of 'aiotun networkd'; see its --help")
        if key in _NUMBERS and isinstance(given, str) and given.isascii() and given.isdigit():
            given = int(given)
        if found.get(key, given) != given:
            raise UsageError(f"{word!r} is said twice: {found[key]!r} and {given!r}")
        found[key] = given
    if "name" not in found:
        raise UsageError("say the device's name: 'dev NAME'")
    return found

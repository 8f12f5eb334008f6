"""``aiotun networkd``: files for systemd-networkd, from the words of ``aiotun add`` and ``ip``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiotun

from .arguments import UsageError, number_or_name, on_or_off, read

__all__ = ["units", "write"]

# Each word and its argument of `networkd_units`.
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
_TAP_ONLY = ("bridge", "mac")
_NUMBERS = ("user", "group", "mtu")
_LISTS = {"address": "addresses", "route": "routes"}
# The words that may follow the value of a repeatable word: whether they take a value themselves.
_FOLLOWING = {
    "address": {"peer": True},
    "addr": {"peer": True},
    "route": {"via": True, "onlink": False, "metric": True, "table": True},
}


def units(words: Sequence[str]) -> dict[str, str]:
    """Return the text of each file by its name.

    Raises:
        UsageError: a word is wrong or missing, or networkd has no setting for it.
    """
    try:
        return aiotun.networkd_units(**_read(words))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def write(texts: dict[str, str], folder: Path) -> list[str]:
    """Write the files into a folder, replace those that exist, and return their paths.

    Raises:
        AiotunError: a file could not be written.
    """
    for name, text in texts.items():
        try:
            (folder / name).write_text(text)
        except OSError as error:
            raise aiotun.AiotunError(f"{error.filename}: {error.strerror}") from error
    return [str(folder / name) for name in texts]


def _read(words: Sequence[str]) -> dict[str, Any]:
    """Parse words in any order into the arguments of `networkd_units`."""
    said = read("networkd", words, {*_VALUES, "name", "master"}, {*_FLAGS, "down"}, _FOLLOWING)
    if "dev" not in said.values:
        raise UsageError("the device's name is missing; give 'dev NAME'")
    # These errors of `networkd_units` name its arguments, which the user has not seen.
    for word in _TAP_ONLY:
        if word in said.values and said.values.get("mode", "tun") == "tun":
            raise UsageError(f"a TUN device can't have a {word}; add 'mode tap', or leave it out")
    if "mtu" in said.values and not said.values["mtu"].isdecimal():
        raise UsageError(f"'mtu' must be a number of bytes, got {said.values['mtu']!r}")
    if "netns" in said.values:
        raise UsageError(
            "networkd has no setting for 'netns'; leave it out, and run another networkd in that "
            "namespace"
        )
    if "down" in said.flags and "route" in said.lists:
        raise UsageError(
            "networkd tries to add routes only once, which fails while the link is down; leave out "
            "'down' or the routes"
        )
    if said.values.get("ipv6_autoconf") == "on" and int(said.values.get("mtu", "1280")) < 1280:
        raise UsageError("'ipv6_autoconf on' needs an MTU of at least 1280; raise 'mtu'")
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

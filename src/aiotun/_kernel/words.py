"""The values that options can have (modes, MAC addresses), and functions that check them."""

from __future__ import annotations

import re
from typing import Literal

from .abi import Iff

__all__ = ["DecodeErrors", "Mode", "Napi", "Offload", "check_offload", "mode_of", "parse_mac"]

Mode = Literal["tun", "tap"]
"""A TUN device carries IP packets, a TAP device Ethernet frames."""

Offload = Literal["off", "split", "raw"]
"""What happens to super-packets.

``"off"``: the kernel hands over none. ``"split"``: they are split. ``"raw"``: the user gets them.
"""

Napi = bool | Literal["threaded"]
"""Whether the kernel uses NAPI for what is sent to it, and in a thread of its own."""

DecodeErrors = Literal["skip", "raise"]
"""What `decoded` does with bytes that are not a valid packet: count and skip them, or raise."""


def check_offload(offload: Offload) -> None:
    """Raise ValueError if `offload` is not a valid mode."""
    if offload not in ("off", "split", "raw"):
        raise ValueError(f"offload must be 'off', 'split' or 'raw', got {offload!r}")


def mode_of(flags: Iff) -> Mode:
    """Return the mode that the kernel's flags stand for."""
    return "tap" if flags & Iff.TAP else "tun"


def parse_mac(value: str, *, multicast: bool = False) -> str:
    """Check a MAC address such as ``"02:00:00:00:00:01"`` and return it in lower case.

    Args:
        value: the text.
        multicast: whether a multicast address is allowed. An interface can't have one.

    Raises:
        TypeError: `value` is not a str.
        ValueError: `value` is not a MAC address, or not one that an interface can have.
    """
    if not isinstance(value, str):
        raise TypeError(
            f"a MAC must be a str such as '02:00:00:00:00:01', got {type(value).__name__}"
        )
    if not re.fullmatch(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", value):
        raise ValueError(
            f"{value!r} is not a valid MAC; write six pairs, as in '02:00:00:00:00:01'"
        )
    mac = value.lower()
    if int(mac[:2], 16) & 1 and not multicast:
        raise ValueError(
            f"{value!r} is a multicast MAC, which an interface can't have; "
            "make the first pair even, as in '02:00:00:00:00:01'"
        )
    if mac == "00:00:00:00:00:00":
        raise ValueError(
            f"{value!r} is not a valid MAC for an interface; write one such as '02:00:00:00:00:01'"
        )
    return mac

"""The words that options are made of, and the checks of them."""

from __future__ import annotations

import re
from typing import Literal

from .abi import Iff

__all__ = ["DecodeErrors", "Mode", "Offload", "check_offload", "mode_of", "parse_mac"]

Mode = Literal["tun", "tap"]
"""A TUN device carries IP packets, a TAP device Ethernet frames."""

Offload = Literal["off", "split", "raw"]
"""What happens to super-packets: none come, they are split, or the user gets them as they are."""

DecodeErrors = Literal["skip", "raise"]
"""What `decoded` does with bytes that are no packet: count and go on, or raise."""


def check_offload(offload: Offload) -> None:
    """Raise for what is no offload mode."""
    if offload not in ("off", "split", "raw"):
        raise ValueError(f"offload is 'off', 'split' or 'raw', not {offload!r}")


def mode_of(flags: Iff) -> Mode:
    """Tell TUN from TAP by the kernel's flags."""
    return "tap" if flags & Iff.TAP else "tun"


def parse_mac(value: str, *, multicast: bool = False) -> str:
    """Read a MAC such as ``"02:00:00:00:00:01"``, and give it in lower case.

    Args:
        value: the text.
        multicast: whether it may be one that stands for many, which no interface has.

    Raises:
        TypeError: it is no text.
        ValueError: it is no MAC, or one that no interface may have.
    """
    if not isinstance(value, str):
        raise TypeError(f"a MAC is a str, not {type(value).__name__}; write '02:00:00:00:00:01'")
    if not re.fullmatch(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", value):
        raise ValueError(f"{value!r} is no MAC; write six pairs, as in '02:00:00:00:00:01'")
    mac = value.lower()
    if int(mac[:2], 16) & 1 and not multicast:
        raise ValueError(
            f"{value!r} is a multicast MAC, which no interface may have; "
            "make the first pair even, as in '02:00:00:00:00:01'"
        )
    if mac == "00:00:00:00:00:00":
        raise ValueError(f"{value!r} is no interface's MAC; write one such as '02:00:00:00:00:01'")
    return mac

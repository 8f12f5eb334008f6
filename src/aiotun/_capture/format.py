"""The layout of pcap and pcapng files; no I/O.

Sources: draft-ietf-opsawg-pcap (4, general header; 5, packet record), draft-ietf-opsawg-pcapng
(4.1, section header; 4.2, interface description; 4.3, enhanced packet), and the link types of
draft-ietf-opsawg-pcaplinktype. Files are little-endian on every machine.
"""

import os
import struct
from collections.abc import Callable
from typing import Literal

__all__ = [
    "LINK_TYPES",
    "MAX_OPTION",
    "MAX_SNAPLEN",
    "PACKERS",
    "WAYS",
    "Direction",
    "Format",
    "header",
]

Format = Literal["pcap", "pcapng"]
"""Every tool reads pcap; pcapng also records each packet's direction."""

Direction = Literal["in", "out"]
"""As the program sees it: ``"in"`` for a packet that it received, ``"out"`` for one it sent."""

LINK_TYPES = {"tun": 101, "tap": 1}  # LINKTYPE_RAW, LINKTYPE_ETHERNET
MAX_SNAPLEN = 262_144  # libpcap rejects files with a larger snaplen
MAX_OPTION = 0xFFFF  # bytes of a pcapng option

# Magic number for nanoseconds, version 2.4, two fields that are always 0, snaplen, link type.
_PCAP_HEADER = struct.Struct("<IHHIIII")
_PCAP_RECORD = struct.Struct("<IIII")  # seconds, nanoseconds, captured length, original length
_SHB = struct.Struct("<IIIHHq")  # type, length, byte-order magic, version 1.0, section length
_IDB = struct.Struct("<IIHHI")  # type, length, link type, reserved, snaplen
# Type, length, interface, time (high, low), captured length, original length.
_EPB = struct.Struct("<IIIIIII")
# The option epb_flags, the end of options, and the block's length again.
_EPB_END = struct.Struct("<HHIHHI")
WAYS: dict[Direction | None, int] = {None: 0, "in": 1, "out": 2}


def header(format: Format, link_type: int, snaplen: int, interface: str | None) -> bytes:  # noqa: A002
    """Return the bytes that a file begins with."""
    if format == "pcap":
        return _PCAP_HEADER.pack(0xA1B2_3C4D, 2, 4, 0, 0, snaplen, link_type)
    options = _option(4, b"aiotun") + _option(0, b"")  # shb_userappl
    length = _SHB.size + len(options) + 4
    # The section's length is -1: unknown.
    section = _SHB.pack(0x0A0D_0D0A, length, 0x1A2B_3C4D, 1, 0, -1) + options
    section += struct.pack("<I", length)
    name = b"" if interface is None else _option(2, os.fsencode(interface))  # if_name
    options = name + _option(9, b"\x09") + _option(0, b"")  # if_tsresol: 10 ** -9 seconds
    length = _IDB.size + len(options) + 4
    return (
        section + _IDB.pack(1, length, link_type, 0, snaplen) + options + struct.pack("<I", length)
    )


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _pack_pcap(data: bytes, length: int, time_ns: int, way: int) -> bytes:
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return _PCAP_RECORD.pack(seconds, nanoseconds, len(data), length) + data


def _pack_pcapng(data: bytes, length: int, time_ns: int, way: int) -> bytes:
    kept = len(data)
    padding = -kept % 4
    size = _EPB.size + kept + padding + _EPB_END.size
    head = _EPB.pack(6, size, 0, time_ns >> 32, time_ns & 0xFFFF_FFFF, kept, length)
    # epb_flags: bits 0 and 1 are the direction.
    return head + data + bytes(padding) + _EPB_END.pack(2, 4, way, 0, 0, size)


PACKERS: dict[Format, Callable[[bytes, int, int, int], bytes]] = {
    "pcap": _pack_pcap,
    "pcapng": _pack_pcapng,
}
"""Functions that make a packet's record from the bytes kept, the packet's original length, the time
in nanoseconds since 1970, and the direction (a value of `WAYS`)."""

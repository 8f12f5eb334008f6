"""aiotun: asyncio packet I/O on Linux TUN and TAP devices.

`open_tun` and `open_tap` open a device, which exchanges IP packets or Ethernet frames with the
kernel::

    async with aiotun.open_tun("tun0", addresses=["10.0.0.1/24"]) as tun:
        async for packet in tun:
            await tun.send(reply_to(packet))
"""

from typing import TYPE_CHECKING

from . import offload, reply
from ._bridges import create_bridge, delete_bridge
from ._ipheader import IPHeader
from ._linktypes import LinkAddress, Route
from ._packetio import PacketIO, PacketStats
from ._persistent import create_persistent, delete_persistent, list_devices
from .decode import decode_frame, decode_packet, encode
from .device import Device, TapDevice, TunDevice, open_tap, open_tun
from .errors import (
    AiotunError,
    DeviceBusyError,
    DeviceClosedError,
    DeviceLostError,
    DeviceMismatchError,
    LinkDownError,
    LinkError,
    NotPermittedError,
    PacketDecodeError,
    PacketError,
    PacketTruncatedError,
    TunUnavailableError,
)
from .link import Link
from .queue import Queue

if TYPE_CHECKING:
    from ._linkinfo import LinkInfo, LinkStats, TunTapInfo

__all__ = [
    "AiotunError",
    "Device",
    "DeviceBusyError",
    "DeviceClosedError",
    "DeviceLostError",
    "DeviceMismatchError",
    "IPHeader",
    "Link",
    "LinkAddress",
    "LinkDownError",
    "LinkError",
    "LinkInfo",
    "LinkStats",
    "NotPermittedError",
    "PacketDecodeError",
    "PacketError",
    "PacketIO",
    "PacketStats",
    "PacketTruncatedError",
    "Queue",
    "Route",
    "TapDevice",
    "TunDevice",
    "TunTapInfo",
    "TunUnavailableError",
    "create_bridge",
    "create_persistent",
    "decode_frame",
    "decode_packet",
    "delete_bridge",
    "delete_persistent",
    "encode",
    "list_devices",
    "offload",
    "open_tap",
    "open_tun",
    "reply",
]


def __getattr__(name: str) -> object:
    # See _linkinfo for why these three are loaded when they are asked for, and nothing else is.
    if name in ("LinkInfo", "LinkStats", "TunTapInfo"):
        from . import _linkinfo

        found: object = globals().setdefault(name, getattr(_linkinfo, name))
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

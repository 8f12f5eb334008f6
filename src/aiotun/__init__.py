"""aiotun: asyncio packet I/O on Linux TUN and TAP devices.

`open_tun` and `open_tap` open a device, which exchanges IP packets or Ethernet frames with the
kernel::

    async with aiotun.open_tun("tun0", addresses=["10.0.0.1/24"]) as tun:
        async for packet in tun:
            await tun.send(reply_to(packet))
"""

import importlib
from typing import TYPE_CHECKING

from ._device.options import TapOptions, TunOptions
from ._link.values import LinkAddress, Route
from ._queue.packetio import PacketIO, PacketStats
from ._queue.port import Offloads
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
    ResourceLimitError,
    TunUnavailableError,
)
from .link import Link
from .queue import Queue

if TYPE_CHECKING:
    from . import capture, netstack, offload, reply, runs
    from ._device.bridges import create_bridge, delete_bridge
    from ._device.persistent import create_persistent, delete_persistent, list_devices
    from ._link.info import LinkEvent, LinkInfo, LinkStats, TunTapInfo
    from ._netstack.relay import relay
    from ._packets.ipheader import IPHeader
    from .datagrams import DatagramSocket, DatagramStats, open_datagrams
    from .decode import decode_frame, decode_packet, encode
    from .namespaces import Namespace, new_namespace, open_namespace
    from .netstack import Netstack, open_netstack
    from .networkd import networkd_units
    from .transport import (
        DeviceTransport,
        PacketProtocol,
        create_tap_endpoint,
        create_tun_endpoint,
        endpoint,
    )

    __version__: str

__all__ = [
    "AiotunError",
    "DatagramSocket",
    "DatagramStats",
    "Device",
    "DeviceBusyError",
    "DeviceClosedError",
    "DeviceLostError",
    "DeviceMismatchError",
    "DeviceTransport",
    "IPHeader",
    "Link",
    "LinkAddress",
    "LinkDownError",
    "LinkError",
    "LinkEvent",
    "LinkInfo",
    "LinkStats",
    "Namespace",
    "Netstack",
    "NotPermittedError",
    "Offloads",
    "PacketDecodeError",
    "PacketError",
    "PacketIO",
    "PacketProtocol",
    "PacketStats",
    "PacketTruncatedError",
    "Queue",
    "ResourceLimitError",
    "Route",
    "TapDevice",
    "TapOptions",
    "TunDevice",
    "TunOptions",
    "TunTapInfo",
    "TunUnavailableError",
    "capture",
    "create_bridge",
    "create_persistent",
    "create_tap_endpoint",
    "create_tun_endpoint",
    "decode_frame",
    "decode_packet",
    "delete_bridge",
    "delete_persistent",
    "encode",
    "endpoint",
    "list_devices",
    "netstack",
    "networkd_units",
    "new_namespace",
    "offload",
    "open_datagrams",
    "open_namespace",
    "open_netstack",
    "open_tap",
    "open_tun",
    "relay",
    "reply",
    "runs",
]


# Loaded on first use, so that a program that only opens a device doesn't wait for these modules.
_LAZY = {
    "DatagramSocket": "datagrams",
    "DatagramStats": "datagrams",
    "DeviceTransport": "transport",
    "IPHeader": "_packets.ipheader",
    "LinkEvent": "_link.info",
    "LinkInfo": "_link.info",
    "LinkStats": "_link.info",
    "Namespace": "namespaces",
    "Netstack": "netstack",
    "PacketProtocol": "transport",
    "TunTapInfo": "_link.info",
    "create_bridge": "_device.bridges",
    "create_persistent": "_device.persistent",
    "create_tap_endpoint": "transport",
    "create_tun_endpoint": "transport",
    "decode_frame": "decode",
    "decode_packet": "decode",
    "delete_bridge": "_device.bridges",
    "delete_persistent": "_device.persistent",
    "encode": "decode",
    "endpoint": "transport",
    "list_devices": "_device.persistent",
    "networkd_units": "networkd",
    "new_namespace": "namespaces",
    "open_datagrams": "datagrams",
    "open_namespace": "namespaces",
    "open_netstack": "netstack",
    "relay": "_netstack.relay",
}

# Modules that users write as `aiotun.datagrams`, without importing them by that name.
_MODULES = frozenset(
    ("capture", "datagrams", "namespaces", "netstack", "offload", "reply", "runs", "testing")
)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and rarely needed

        return version("aiotun")  # as text: PyInstaller then includes the metadata
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    found: object = globals().setdefault(name, getattr(module, name))
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

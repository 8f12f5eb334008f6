"""aiotun: asyncio packet I/O on Linux TUN and TAP devices."""

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

__all__ = [
    "AiotunError",
    "DeviceBusyError",
    "DeviceClosedError",
    "DeviceLostError",
    "DeviceMismatchError",
    "LinkDownError",
    "LinkError",
    "NotPermittedError",
    "PacketDecodeError",
    "PacketError",
    "PacketTruncatedError",
    "TunUnavailableError",
]

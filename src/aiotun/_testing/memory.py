"""Two devices that are connected to each other, without a kernel interface and without root.

They use a socket pair, so waiting, waking up and closing work as in real devices. Two parts differ:
the port rejects the packets that the kernel would reject, and the link raises errors.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Literal, overload

from .._kernel.interface import Interface
from .._kernel.namespaces import NamespaceFd
from .._kernel.words import Mode
from .._queue.port import PacketFormat, SocketPort, is_packet, socket_ends
from .._queue.waiting import Line
from ..device import Device, TapDevice, TunDevice
from ..errors import LinkError
from ..link import Link
from ..queue import Queue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

__all__ = ["memory_pair"]


class MemoryPort(SocketPort):
    """A seqpacket socket that accepts only the packets that the kernel would accept."""

    __slots__ = ()

    def write(self, fd: int, packet: Buffer) -> None:
        if not is_packet(packet, self.format.mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.write(fd, packet)

    def write_many(self, fd: int, packets: list[Buffer]) -> Sequence[int]:
        written = 0
        try:
            for packet in packets:
                self.write(fd, packet)
                written += 1
        except (OSError, TypeError, ValueError, BufferError):
            pass  # the caller writes this packet again and meets the error then
        return range(written, len(packets))


class _MemoryLink(Link):
    def _namespace(self) -> NamespaceFd:  # each request of a link calls this first
        name = self._interface.name
        text = f"{name} exists only in memory, without a kernel interface; use open_tun for one"
        raise LinkError(errno.EOPNOTSUPP, text, name)


@overload
def memory_pair(mode: Literal["tun"] = ..., *, mtu: int = ...) -> tuple[TunDevice, TunDevice]: ...
@overload
def memory_pair(mode: Literal["tap"], *, mtu: int = ...) -> tuple[TapDevice, TapDevice]: ...
@overload
def memory_pair(mode: Mode, *, mtu: int = ...) -> tuple[Device, Device]: ...
def memory_pair(mode: Mode = "tun", *, mtu: int = 1500) -> tuple[Device, Device]:
    """Make two devices, each of which receives what the other sends.

    They handle packets like any `TunDevice` or `TapDevice`, and need neither a kernel interface nor
    any privilege. They don't drop packets that nobody reads. Instead, `send` waits when some 200
    KiB (a hundred or more packets) are waiting to be read.

    When one device is closed, the other raises `DeviceLostError` after it has received the packets
    sent before. If the closed device had unread packets, packets on their way to the other may be
    lost.

    Args:
        mode: ``"tun"`` or ``"tap"``. A packet that the kernel would reject from such a device
            raises `PacketError` here, too, for example an empty one.
        mtu: the value of their `mtu`, in bytes. Longer packets can be sent, as on a real device.

    Returns:
        The two devices, named ``memory0`` and ``memory1``. Close each of them. Every request of
        their `link` raises `LinkError`. Methods that concern the kernel's interface (`set_carrier`,
        ``queues[0].disable``, the filters) raise `DeviceMismatchError`. Both have EOPNOTSUPP.

    Raises:
        ValueError: `mode` is invalid.
    """
    if mode not in ("tun", "tap"):
        raise ValueError(f"mode must be 'tun' or 'tap', got {mode!r}")
    one, other = (
        _memory_device(sock.detach(), mode, Interface(f"memory{place}", None, mtu))
        for place, sock in enumerate(
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        )
    )
    return one, other


def _memory_device(fd: int, mode: Mode, interface: Interface) -> Device:
    ends = socket_ends(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    queue = Queue(fd, interface, MemoryPort(PacketFormat(mode), None, ends))
    kind = TapDevice if mode == "tap" else TunDevice
    device = kind.__new__(kind)
    device._set_up((queue,), Line(), interface, _MemoryLink(interface.name))
    return device

"""Two devices that are connected to each other and to nothing else: no kernel interface, no root.

Under them is a socket pair, so that waiting, waking and closing are the real thing. What differs is
a port that refuses what the kernel would, and a link that isn't there.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Literal, overload

from .._kernel.interface import Interface
from .._kernel.namespaces import NamespaceFd
from .._kernel.words import Mode
from .._queue.port import PacketFormat, SocketPort, socket_ends
from .._queue.waiting import Line
from ..device import Device, TapDevice, TunDevice
from ..errors import LinkError
from ..link import Link
from ..queue import Queue

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["memory_pair"]

_ETHERNET_HEADER = 14


class MemoryPort(SocketPort):
    """A seqpacket socket, which takes only what the kernel would."""

    __slots__ = ()

    def write(self, fd: int, packet: Buffer) -> None:
        with memoryview(packet) as view, view.cast("B") as octets:
            if self.format.mode == "tap":
                fine = len(octets) >= _ETHERNET_HEADER
            else:
                fine = len(octets) > 0 and octets[0] >> 4 in (4, 6)
        if not fine:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.write(fd, packet)

    def write_many(self, fd: int, packets: list[Buffer]) -> int:
        written = 0
        try:
            for packet in packets:
                self.write(fd, packet)
                written += 1
        except (OSError, TypeError, ValueError, BufferError):
            pass  # the first packet left over meets it again
        return written


class _MemoryLink(Link):
    def _namespace(self) -> NamespaceFd:  # whatever a link does begins with it
        name = self._interface.name
        text = f"{name} is in memory alone and has no interface in the kernel; open_tun makes one"
        raise LinkError(errno.EOPNOTSUPP, text, name)


@overload
def memory_pair(mode: Literal["tun"] = ..., *, mtu: int = ...) -> tuple[TunDevice, TunDevice]: ...
@overload
def memory_pair(mode: Literal["tap"], *, mtu: int = ...) -> tuple[TapDevice, TapDevice]: ...
@overload
def memory_pair(mode: Mode, *, mtu: int = ...) -> tuple[Device, Device]: ...
def memory_pair(mode: Mode = "tun", *, mtu: int = 1500) -> tuple[Device, Device]:
    """Make two devices, of which each receives what the other sends.

    They are a `TunDevice` or `TapDevice` in everything that has to do with packets, and need
    neither a kernel interface nor any privilege. Instead of dropping what nobody reads, one makes
    the other's `send` wait once some 200 KiB (a hundred and more packets) are under way.

    When one is closed the other raises `DeviceLostError`, after what was sent before; if the one
    that was closed had packets to read yet, those under way to the other may be lost.

    Args:
        mode: ``"tun"`` or ``"tap"``. What the kernel refuses from such a device is a `PacketError`
            here, too: an empty packet, say.
        mtu: what their `mtu` says, in bytes. Longer packets are sent all the same, as the kernel
            takes them.

    Returns:
        The two, called ``memory0`` and ``memory1``; each is to be closed. Every request of their
        `link` raises `LinkError`; what concerns the kernel's interface (`set_carrier`,
        ``queues[0].disable``, the filters) raises `DeviceMismatchError`, both with EOPNOTSUPP.

    Raises:
        ValueError: no such mode.
    """
    if mode not in ("tun", "tap"):
        raise ValueError(f"mode is 'tun' or 'tap', not {mode!r}")
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

"""Two devices that are connected to each other and to nothing else: no kernel interface, no root.

Under them is a socket pair, so that waiting, waking and closing are the real thing. Three things a
socket does otherwise than a TUN device, and this makes good: its end reads as an empty packet, it
sends anything, and it has no link.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload

from ._interface import Interface
from ._packetio import Mode, PacketIO
from ._threads import Namespace
from .device import Device, TapDevice, TunDevice
from .errors import DeviceMismatchError, LinkError, PacketError
from .link import Link
from .queue import Queue

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["memory_pair"]

T = TypeVar("T")

_ETHERNET_HEADER = 14


class _MemoryQueue(Queue):
    __slots__ = ()

    # Receiving. The hot path of a Queue knows no end of a file, so it is left out.

    recv = PacketIO.recv
    __anext__ = PacketIO.__anext__

    def _take(self) -> bytes:
        return super()._take() or self._end_of_file()

    def _take_into(self, view: memoryview) -> int:
        return super()._take_into(view) or self._end_of_file()

    def _take_many(self, limit: int) -> list[bytes]:
        # The end reads as any number of empty packets; the next call meets it again.
        return [packet for packet in super()._take_many(limit) if packet] or self._end_of_file()

    def _end_of_file(self) -> NoReturn:
        raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    # Sending

    def send(self, packet: Buffer) -> Coroutine[Any, Any, None]:
        return self._checked_first(packet, super().send)

    def send_many(self, packets: Iterable[Buffer]) -> Coroutine[Any, Any, int]:
        return super().send_many(self._checked(packets))

    def send_nowait(self, packet: Buffer) -> None:
        self._check_open()
        self._check(packet)
        super().send_nowait(packet)

    async def _checked_first(
        self, packet: Buffer, send: Callable[[Buffer], Coroutine[Any, Any, None]]
    ) -> None:
        self._bind()
        self._check(packet)
        await send(packet)

    def _checked(self, packets: Iterable[Buffer]) -> Iterator[Buffer]:
        for packet in packets:
            self._check(packet)
            yield packet

    def _check(self, packet: Buffer) -> None:
        """Refuse what the kernel would."""
        with memoryview(packet) as view, view.cast("B") as octets:
            if self._mode == "tap":
                fine = len(octets) >= _ETHERNET_HEADER
            else:
                fine = len(octets) > 0 and octets[0] >> 4 in (4, 6)
        if not fine:
            error = self._write_error(OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
            assert isinstance(error, PacketError)
            raise error

    def _set_enabled(self, on: bool) -> None:
        raise _no_interface(DeviceMismatchError, self.name)


class _MemoryLink(Link):
    def _namespace(self) -> Namespace:  # whatever a link does begins with it
        raise _no_interface(LinkError, self.name)


def _no_interface(
    kind: type[LinkError | DeviceMismatchError], name: str
) -> LinkError | DeviceMismatchError:
    text = f"{name} is in memory alone and has no interface in the kernel; open_tun makes one"
    return kind(errno.EOPNOTSUPP, text, name)


def _set_up(device: Device, queue: Queue, interface: Interface) -> None:
    """What Device.__init__ does, with what an interface would give."""
    device._interface = interface
    device.queues = (queue,)
    device._io = queue
    device.link = _MemoryLink(interface.name)


class _MemoryTun(TunDevice):
    __slots__ = ()

    def __init__(self, queue: Queue, interface: Interface) -> None:
        _set_up(self, queue, interface)

    def _any_fd(self) -> int:
        raise _no_interface(DeviceMismatchError, self.name)


class _MemoryTap(TapDevice):
    __slots__ = ()

    def __init__(self, queue: Queue, interface: Interface) -> None:
        _set_up(self, queue, interface)

    def _any_fd(self) -> int:
        raise _no_interface(DeviceMismatchError, self.name)


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
    queue = _MemoryQueue(fd, interface, mode)
    return _MemoryTap(queue, interface) if mode == "tap" else _MemoryTun(queue, interface)

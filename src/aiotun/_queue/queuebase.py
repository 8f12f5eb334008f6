"""The parts of a queue that don't concern packets: port, the device's other queues, state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .._kernel import ioctl
from .._kernel.interface import Interface
from .._kernel.words import Mode, Offload
from ..errors import PacketError
from . import refusals
from .packetio import PacketIO, PacketStats
from .port import Offloads, PacketFormat, Port
from .serving import ServedFd
from .waiting import Line

__all__ = ["QueueBase"]


class QueueBase(ServedFd, PacketIO):
    """One fd on an interface, as the group of a device's queues sees it."""

    # `_read` and `_write` are functions of the port.
    __slots__ = ("_disabled", "_read", "_write")

    port: Port

    def __init__(
        self,
        fd: int,
        interface: Interface,
        port: Port,
        *,
        shared: Line | None = None,
    ) -> None:
        # Internal: see FdOwner.
        super().__init__(fd, interface, port, shared=shared)
        self.use(port)
        self._disabled = False

    def use(self, port: Port) -> None:
        """Have packets pass through this port from now on."""
        self.port = port
        # Otherwise the hot path would look these up for each packet.
        self._read, self._write = port.read, port.write

    @property
    def wanted(self) -> bool:
        """Whether tasks wait for a packet of this queue in particular."""
        return bool(self._receivers)

    # Queueing in the kernel

    def disable(self) -> None:
        """Stop the kernel choosing this queue (TUNSETQUEUE, IFF_DETACH_QUEUE).

        The kernel drops the packets that wait in the queue. A task that waits here goes on waiting.

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or this queue is disabled.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._set_enabled(False)

    def enable(self) -> None:
        """Let the kernel choose this queue again (TUNSETQUEUE, IFF_ATTACH_QUEUE).

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or this queue is enabled.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._set_enabled(True)

    def _set_enabled(self, on: bool) -> None:
        self.check_open()
        ioctl.set_queue(self._fd, self._interface.name, on)
        self._disabled = not on
        if (group := self._peers()) is not None:
            group.choose_again()

    @property
    def disabled(self) -> bool:
        """Whether this queue was disabled with `disable`, so that the kernel does not choose it."""
        return self._disabled

    # Passing the queue on

    def detach(self) -> int:
        """Give the fd up, open and unregistered, for another process or `Queue.from_fd`.

        The fd stays non-blocking and close-on-exec. Tasks that wait are woken with
        `DeviceClosedError`, and this queue is closed.

        Returns:
            The fd, which the caller must close.

        Raises:
            DeviceClosedError: the queue was closed or detached before.
        """
        self.check_open(lost_too=False)
        return self.release("was detached; go on with its fd, or open the device again")

    def __reduce__(self) -> tuple[Callable[..., QueueBase], tuple[Any, ...]]:
        """Send a duplicate of this queue to another process.

        multiprocessing can send queues: as arguments of a Process (spawn or forkserver), or over
        its Connections and Queues. This queue stays open; close it if only the duplicate should be
        used.

        Raises:
            TypeError: the queue is pickled in any other way, or copied.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        from .handover import reduce_queue

        return reduce_queue(self)

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd={self._fd}"
        return f"<Queue of {self._interface.name} {state}>"

    # State

    @property
    def name(self) -> str:
        """The interface's present name."""
        return self._interface.name

    @property
    def offload(self) -> Offload:
        """The format of packets here: with ``"raw"`` they have a virtio-net header."""
        return self.port.format.offload

    @property
    def vnet_header_size(self) -> int:
        """The size in bytes of the virtio-net header, 10 or 12; 0 with ``offload="off"``.

        With ``"raw"`` each packet begins with it, both ways; with ``"split"`` the program does not
        see it.
        """
        return self.port.format.vnet_header_size

    @property
    def offloads(self) -> Offloads:
        """The kinds of super-packets that the kernel accepts; see `Device.offloads`."""
        return self.port.format.offloads

    @property
    def stats(self) -> PacketStats:
        return PacketStats(**dataclasses.asdict(self.port.counts))

    @property
    def _mode(self) -> Mode:
        return self.port.format.mode

    @property
    def _format(self) -> PacketFormat:
        return self.port.format

    def _count_undecodable(self) -> None:
        self.port.counts.undecodable += 1

    # Errors

    def _write_error(self, error: OSError) -> Exception:
        ending = self._ending(error)
        if ending is not None:
            return ending
        made = refusals.refused(error, self._interface.name, self.port.format)
        if isinstance(made, PacketError):
            self.port.counts.refused += 1
        return made

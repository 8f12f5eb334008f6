"""A wrapper around a device that drops, delays, duplicates, corrupts and reorders packets."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from .._kernel.words import Mode, Offload
from .._queue.packetio import PacketIO, PacketStats
from .._queue.port import Offloads, PacketFormat, copy_into
from .._queue.refusals import truncated
from ..device import Device
from ..errors import AiotunError, DeviceClosedError
from ..link import Link
from .faultyline import FaultCounts, Line, Rate

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._packets.runs import Pool

__all__ = ["FaultCounts", "FaultInjector"]

T = TypeVar("T")


def _copy(packet: Buffer) -> bytes:
    # bytes() alone would make a packet of a number, or of a list of them.
    with memoryview(packet) as view:
        return view.tobytes()


def _check_rate(rate: Rate) -> None:
    each: tuple[object, ...] = rate if isinstance(rate, tuple) else (rate, rate)
    numbers = [one for one in each if isinstance(one, int | float)]
    if not len(each) == len(numbers) == 2:
        raise TypeError(f"a rate must be a number or a pair (received, sent), got {rate!r}")
    for one in numbers:
        if not 0 <= one <= 1:
            raise ValueError(f"a rate must be a number from 0 to 1, got {one}")


class FaultInjector(PacketIO):
    """Wraps a device and can be used like one; adds faults to its traffic in both directions.

    For each direction, the same seed, rates and packets give the same faults. A rate is the
    fraction of packets, 0 to 1, that have the fault. The default of all rates is 0. One number is
    the rate of each direction: with ``drop=0.2`` a fifth of the received packets is dropped, and a
    fifth of the sent ones, so that a ping and its answer both pass in 64 of 100 cases. A pair has
    the rate of received packets first: ``drop=(0.2, 0)`` drops no packet that is sent.

    Args:
        device: the device to wrap. Closing this closes the device. Packets that a program sends and
            receives directly on the device have no faults.
        drop: the rate of packets that are not delivered.
        delay: the rate of packets that are delivered `delay_by` later, so that others overtake
            them.
        duplicate: the rate of packets that are delivered twice.
        corrupt: the rate of packets in which one bit after the first byte is flipped.
        reorder: the rate of packets that are held back until the next packet has passed, or for
            `delay_by` at most.
        delay_by: a time in seconds.
        bandwidth: bits a second; packets wait for those before them, and are not delivered if 1,000
            are waiting. With offload ``"raw"`` a super-packet counts as one packet.
        seed: the seed of the random numbers.

    It has all packet methods of a `Device`, and its `name`, `index`, `mtu`, `mode`, `offload` and
    `link`. A delayed packet is sent later, when no caller can receive an error. If the device has
    no room then, the packet is delayed again. If the device rejects the packet, it is counted in
    `sent.lost`. So are packets that are still held back when this is closed. `send` raises the
    device's errors for the packets that it sends at once.

    Attributes:
        drop, delay, duplicate, corrupt, reorder, delay_by, bandwidth: as the arguments; assign to
            change one.

    Raises:
        TypeError: a rate is neither a number nor a pair of numbers, or `device` is not a device.
        ValueError: a rate is not between 0 and 1, the delay is negative, or the bandwidth not
            above 0.
    """

    __slots__ = (
        "_device",
        "_error",
        "_incoming",
        "_outgoing",
        "_pump",
        "_ready",
        "_waiters",
        "bandwidth",
        "corrupt",
        "delay",
        "delay_by",
        "drop",
        "duplicate",
        "reorder",
    )

    def __init__(
        self,
        device: Device,
        *,
        drop: Rate = 0.0,
        delay: Rate = 0.0,
        duplicate: Rate = 0.0,
        corrupt: Rate = 0.0,
        reorder: Rate = 0.0,
        delay_by: float = 0.05,
        bandwidth: Rate = math.inf,
        seed: int = 0,
    ) -> None:
        given: object = device
        if not isinstance(given, PacketIO):
            raise TypeError(f"device must be an open device, got {given!r}")
        for rate in (drop, delay, duplicate, corrupt, reorder):
            _check_rate(rate)
        if not 0 <= delay_by < float("inf"):
            raise ValueError(f"delay_by must be a number of seconds, got {delay_by}")
        for each in bandwidth if isinstance(bandwidth, tuple) else (bandwidth,):
            if not each > 0:
                raise ValueError(f"bandwidth must be bits a second, above 0, got {each}")
        self._device = device
        self.drop: Rate = drop
        self.delay: Rate = delay
        self.duplicate: Rate = duplicate
        self.corrupt: Rate = corrupt
        self.reorder: Rate = reorder
        self.delay_by: float = delay_by
        self.bandwidth: Rate = bandwidth
        self._incoming = Line(self, "in", seed, device._header_bytes, self._arrive)
        self._outgoing = Line(self, "out", seed, device._header_bytes, device.send_nowait)
        self._ready: deque[bytes] = deque()  # packets to return to the next receivers
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._pump: asyncio.Task[None] | None = None  # reads while receivers wait; otherwise None
        self._error: AiotunError | OSError | None = None  # the error that ended the pump

    # Counts and properties

    @property
    def received(self) -> FaultCounts:
        """The counts of packets received from the device so far (a copy)."""
        return dataclasses.replace(self._incoming.counts)

    @property
    def sent(self) -> FaultCounts:
        """The counts of packets sent to the device so far (a copy)."""
        return dataclasses.replace(self._outgoing.counts)

    @property
    def name(self) -> str:
        """The device's name."""
        return self._device.name

    @property
    def index(self) -> int:
        """The index of the device's interface."""
        return self._device.index

    @property
    def mtu(self) -> int:
        """The device's MTU in bytes."""
        return self._device.mtu

    @property
    def mode(self) -> Mode:
        """``"tun"`` or ``"tap"``."""
        return self._device.mode

    @property
    def offload(self) -> Offload:
        """The device's offload."""
        return self._device.offload

    @property
    def vnet_header_size(self) -> int:
        """The size of the device's virtio-net header."""
        return self._device.vnet_header_size

    @property
    def offloads(self) -> Offloads:
        """The device's offloads."""
        return self._device.offloads

    @property
    def link(self) -> Link:
        """The device's link."""
        return self._device.link

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._device!r}>"

    # Receiving

    def recv_nowait(self) -> bytes:
        if self._waiters:
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting for the next packet")
        while not self._ready:
            self._ready += self._incoming.pass_on(self._device.recv_nowait())
        return self._ready.popleft()

    async def _receive(self, take: Callable[[PacketIO], T]) -> T:
        if self._ready and not self._waiters:
            return take(self)
        self._bind()
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.append(waiter)
        try:
            while True:
                if self._pump is None:
                    self._error = None
                    self._pump = asyncio.Task(self._read(), loop=loop)
                await waiter
                # No await from here on, so that a cancellation can't lose a packet that was taken.
                if self._ready:
                    return take(self)
                if self._error is not None:
                    raise self._error
                place = self._waiters.index(waiter)
                waiter = self._waiters[place] = loop.create_future()
        finally:
            self._waiters.remove(waiter)
            self._wake()
            if not self._waiters and self._pump is not None:
                self._pump.cancel()  # this loses nothing: packets stay in the device or in _ready
                self._pump = None

    async def _read(self) -> None:
        """Receive packets while there are waiters."""
        me = self._pump
        try:
            while self._pump is me:
                # Don't read ahead of the waiters: the kernel's ring is the buffer.
                if not self._ready:
                    for packet in await self._device.recv_many():
                        self._ready += self._incoming.pass_on(packet)
                self._wake()
                await asyncio.sleep(0)
        except (AiotunError, OSError) as error:
            self._error = error
        finally:
            if self._pump is me:
                self._pump = None
                for waiter in self._waiters:
                    if not waiter.done():
                        waiter.set_result(None)

    def _wake(self) -> None:
        if self._ready and self._waiters and not self._waiters[0].done():
            self._waiters[0].set_result(None)

    def _arrive(self, packet: bytes) -> None:
        self._check_open()
        self._ready.append(packet)
        self._wake()

    def _take(self) -> bytes:
        return self._ready.popleft()

    def _take_into(self, octets: memoryview) -> int:
        length = copy_into(octets, self._ready.popleft())
        if length > octets.nbytes:
            self._device.queues[0].port.counts.truncated += 1
            raise truncated(length, octets.nbytes, self.name)
        return length

    async def _wait_for_buffer(self, pool: Pool) -> None:
        await self._device._wait_for_buffer(pool)

    def _take_many(self, limit: int) -> list[bytes]:
        return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    # Sending

    async def send(self, packet: Buffer) -> None:
        self._check_open()
        waiting = deque(self._outgoing.pass_on(_copy(packet)))
        try:
            while waiting:
                await self._device.send(waiting[0])
                waiting.popleft()
        finally:
            # Don't count the first packet: this call raises its error.
            self._outgoing.counts.lost += max(0, len(waiting) - 1)

    def send_nowait(self, packet: Buffer) -> None:
        self._check_open()
        waiting = deque(self._outgoing.pass_on(_copy(packet)))
        try:
            if waiting:
                self._device.send_nowait(waiting.popleft())
        finally:
            self._outgoing.deliver_late(waiting)

    # Closing and state

    def close(self) -> None:
        self._incoming.counts.lost += len(self._ready)
        self._ready.clear()
        self._incoming.end()
        self._outgoing.end()
        self._device.close()  # the pump gets the error and passes it to the waiters

    async def aclose(self) -> None:
        self.close()
        await self._device.aclose()

    @property
    def closed(self) -> bool:
        return self._device.closed

    def fileno(self) -> int:
        return self._device.fileno()

    @property
    def stats(self) -> PacketStats:
        return self._device.stats

    @property
    def _mode(self) -> Mode:
        return self._device.mode

    @property
    def _format(self) -> PacketFormat:
        return self._device._format

    def _count_undecodable(self) -> None:
        self._device._count_undecodable()

    def _bind(self) -> None:
        self._device._bind()

    def _check_open(self) -> None:
        if self.closed:
            raise DeviceClosedError(f"{self.name} was closed here; open it again to go on")

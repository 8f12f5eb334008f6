"""A wrapper around a device that drops, delays, duplicates, corrupts and reorders packets."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from .._kernel.words import Mode, Offload
from .._queue.packetio import PacketIO, PacketStats
from .._queue.port import copy_into
from .._queue.refusals import truncated
from ..device import Device
from ..errors import AiotunError, DeviceClosedError
from ..link import Link

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._packets.runs import Pool

__all__ = ["FaultCounts", "FaultInjector"]

T = TypeVar("T")

_SHORTEST = 0.001  # seconds; with a delay of 0 the loop would spin while the device has no room


@dataclasses.dataclass
class FaultCounts:
    """What a `FaultInjector` has done to the packets of one direction so far."""

    packets: int = 0
    """All packets that entered it."""
    dropped: int = 0
    delayed: int = 0
    duplicated: int = 0
    corrupted: int = 0
    """Packets in which one bit was flipped."""
    reordered: int = 0
    """Packets that were held back until another one had passed."""
    lost: int = 0
    """Packets that were delayed or held back and then could not be delivered, for example because
    the `FaultInjector` was closed."""


class _Line:
    """One direction, with its own random numbers."""

    def __init__(
        self, faults: FaultInjector, name: str, seed: int, deliver: Callable[[bytes], None]
    ) -> None:
        self.counts = FaultCounts()
        self._faults = faults
        # Each direction has its own generator. With a shared one, the faults would depend on the
        # order in which the program sends and receives.
        self._random = random.Random(f"{seed} {name}")
        self._deliver = deliver
        self._delayed: dict[asyncio.TimerHandle, list[bytes]] = {}
        self._held: dict[asyncio.TimerHandle, list[bytes]] = {}  # until another packet passes

    def pass_on(self, packet: bytes) -> list[bytes]:
        """Decide what happens to this packet; return all packets to deliver now."""
        faults, counts = self._faults, self.counts
        # Always draw the same number of random numbers for a packet. So changing one rate does not
        # change which packets the other faults hit.
        drop, delay, duplicate, corrupt, reorder, bit = (self._random.random() for _ in range(6))
        counts.packets += 1
        if drop < faults.drop:
            counts.dropped += 1
            return []
        if corrupt < faults.corrupt:
            packet = self._corrupted(packet, bit)
        copies = [packet]
        if duplicate < faults.duplicate:
            counts.duplicated += 1
            copies.append(packet)
        if delay < faults.delay:
            counts.delayed += 1
            self._keep(copies, self._delayed)
            return []
        if reorder < faults.reorder:
            counts.reordered += 1
            self._keep(copies, self._held)
            return []
        return copies + self._cancelled(self._held)

    def _corrupted(self, packet: bytes, chance: float) -> bytes:
        # Not in the first byte: the kernel rejects a packet that is neither IPv4 nor IPv6.
        first = self._faults._header_bytes + 1
        bits = (len(packet) - first) * 8
        if bits <= 0:
            return packet
        place = first * 8 + int(chance * bits)
        changed = bytearray(packet)
        changed[place // 8] ^= 1 << place % 8
        self.counts.corrupted += 1
        return bytes(changed)

    def _keep(self, packets: list[bytes], kept: dict[asyncio.TimerHandle, list[bytes]]) -> None:
        """Deliver packets later, unless `_cancelled` takes them out before."""

        # One timer for all of them: the loop does not promise to run two timers of the same time in
        # order.
        loop = asyncio.get_running_loop()
        pause = max(self._faults.delay_by, _SHORTEST)

        def release() -> None:
            self.deliver_late(kept.pop(timer))

        timer = loop.call_later(pause, release)
        kept[timer] = packets

    def deliver_late(self, packets: Iterable[bytes]) -> None:
        """Deliver packets that no caller waits for; if the device has no room, try again later."""
        no_room: list[bytes] = []
        for packet in packets:
            try:
                self._deliver(packet)
            except BlockingIOError:
                no_room.append(packet)
            except (AiotunError, OSError):
                self.counts.lost += 1
        if no_room:
            self._keep(no_room, self._delayed)

    def _cancelled(self, kept: dict[asyncio.TimerHandle, list[bytes]]) -> list[bytes]:
        for timer in kept:
            timer.cancel()
        packets = [packet for each in kept.values() for packet in each]
        kept.clear()
        return packets

    def end(self) -> None:
        """Count the packets that are delayed or held back as lost."""
        self.counts.lost += len(self._cancelled(self._delayed)) + len(self._cancelled(self._held))


def _copy(packet: Buffer) -> bytes:
    # bytes() alone would make a packet of a number, or of a list of them.
    with memoryview(packet) as view:
        return view.tobytes()


class FaultInjector(PacketIO):
    """Wraps a device and can be used like one; adds faults to its traffic in both directions.

    For each direction, the same seed, rates and packets give the same faults. A rate is the
    fraction of packets, 0 to 1, that have the fault. The default of all rates is 0.

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
        seed: the seed of the random numbers.

    It has all packet methods of a `Device`, and its `name`, `index`, `mtu`, `mode`, `offload` and
    `link`. A delayed packet is sent later, when no caller can receive an error. If the device has
    no room then, the packet is delayed again. If the device rejects the packet, it is counted in
    `sent.lost`. So are packets that are still held back when this is closed. `send` raises the
    device's errors for the packets that it sends at once.

    Raises:
        ValueError: a rate is not between 0 and 1, or the delay is negative.
    """

    __slots__ = (
        "_device",
        "_error",
        "_incoming",
        "_outgoing",
        "_pump",
        "_ready",
        "_waiters",
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
        drop: float = 0.0,
        delay: float = 0.0,
        duplicate: float = 0.0,
        corrupt: float = 0.0,
        reorder: float = 0.0,
        delay_by: float = 0.05,
        seed: int = 0,
    ) -> None:
        for rate in (drop, delay, duplicate, corrupt, reorder):
            if not 0 <= rate <= 1:
                raise ValueError(f"a rate must be a number from 0 to 1, got {rate}")
        if not 0 <= delay_by < float("inf"):
            raise ValueError(f"delay_by must be a number of seconds, got {delay_by}")
        self._device = device
        self.drop: float = drop
        self.delay: float = delay
        self.duplicate: float = duplicate
        self.corrupt: float = corrupt
        self.reorder: float = reorder
        self.delay_by: float = delay_by
        self._incoming = _Line(self, "in", seed, self._arrive)
        self._outgoing = _Line(self, "out", seed, device.send_nowait)
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
    def _header_bytes(self) -> int:
        return self._device._header_bytes

    def _count_undecodable(self) -> None:
        self._device._count_undecodable()

    def _bind(self) -> None:
        self._device._bind()

    def _check_open(self) -> None:
        if self.closed:
            raise DeviceClosedError(f"{self.name} was closed here; open it again to go on")

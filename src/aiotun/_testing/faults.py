"""A device between a program and its device, on which packets fare as on a bad line."""

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

__all__ = ["FaultCounts", "FaultInjector"]

T = TypeVar("T")

_SHORTEST = 0.001  # seconds: a delay of none at all would have the loop spin while there is no room


@dataclasses.dataclass
class FaultCounts:
    """What a `FaultInjector` did to the packets of one direction, so far."""

    packets: int = 0
    """Packets that came to it, whatever became of them."""
    dropped: int = 0
    delayed: int = 0
    duplicated: int = 0
    corrupted: int = 0
    """Packets in which one bit was turned over."""
    reordered: int = 0
    """Packets that were held back until another one had passed."""
    lost: int = 0
    """Packets delayed or held back that could not be delivered any more: it was closed, say."""


class _Line:
    """One direction: what happens to each packet, by its own numbers of chance."""

    def __init__(
        self, faults: FaultInjector, name: str, seed: int, deliver: Callable[[bytes], None]
    ) -> None:
        self.counts = FaultCounts()
        self._faults = faults
        # Of their own for each direction: in which order the two are used is up to the program.
        self._random = random.Random(f"{seed} {name}")
        self._deliver = deliver
        self._delayed: dict[asyncio.TimerHandle, list[bytes]] = {}
        self._held: dict[asyncio.TimerHandle, list[bytes]] = {}  # until another packet passes

    def pass_on(self, packet: bytes) -> list[bytes]:
        """Give what of this packet, and of those held back, is to be delivered now."""
        faults, counts = self._faults, self.counts
        # As many numbers for each packet, whatever happens: to change one rate must not change
        # what the others do.
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
        # Not in the first byte: a kernel refuses a packet that is neither IPv4 nor IPv6.
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
        """Deliver packets when their time has come, unless they are taken out before."""

        # One timer for all: two of the same time would run in no order that is promised.
        loop = asyncio.get_running_loop()
        pause = max(self._faults.delay_by, _SHORTEST)

        def release() -> None:
            self.deliver_late(kept.pop(timer))

        timer = loop.call_later(pause, release)
        kept[timer] = packets

    def deliver_late(self, packets: Iterable[bytes]) -> None:
        """Deliver packets for which nobody waits: later still, where there is no room for them."""
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
        """Count what is kept as lost."""
        self.counts.lost += len(self._cancelled(self._delayed)) + len(self._cancelled(self._held))


class FaultInjector(PacketIO):
    """Wraps a device, and is one to its user: packets pass as over a bad line, both ways.

    The same seed, rates and packets give the same faults, each direction for itself. A rate is the
    share of packets, 0 to 1, that fare so; all are 0 unless given.

    Args:
        device: is closed with this. Who uses it directly goes around the faults.
        drop: are not delivered.
        delay: are delivered `delay_by` later, and so overtaken by others.
        duplicate: are delivered twice.
        corrupt: have one bit turned over, behind their first byte.
        reorder: are held back until the next packet has passed, `delay_by` at most.
        delay_by: in seconds.
        seed: what chance is made of.

    All of a `Device`'s packet methods are here, and its `name`, `index`, `mtu`, `mode`, `offload`
    and `link`. What is delayed is sent later, with nobody to hear of an error: where the device has
    no room for it, later still; where it refuses it, that is counted in `sent.lost`, as are packets
    that are still held back when this is closed. `send` itself raises what the device raises, for
    what it sends at once.

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
                raise ValueError(f"a rate is a share between 0 and 1, not {rate}")
        if not 0 <= delay_by < float("inf"):
            raise ValueError(f"delay_by is a number of seconds, not {delay_by}")
        self._device = device
        self.drop: float = drop
        self.delay: float = delay
        self.duplicate: float = duplicate
        self.corrupt: float = corrupt
        self.reorder: float = reorder
        self.delay_by: float = delay_by
        self._incoming = _Line(self, "in", seed, self._arrive)
        self._outgoing = _Line(self, "out", seed, device.send_nowait)
        self._ready: deque[bytes] = deque()  # received, and through with its faults
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._pump: asyncio.Task[None] | None = None  # reads for those who wait; else None
        self._error: AiotunError | OSError | None = None  # what ended the pump

    # What it did, and what it is

    @property
    def received(self) -> FaultCounts:
        """What was done to the packets that came from the device, so far (a copy)."""
        return dataclasses.replace(self._incoming.counts)

    @property
    def sent(self) -> FaultCounts:
        """What was done to the packets that went to the device, so far (a copy)."""
        return dataclasses.replace(self._outgoing.counts)

    @property
    def name(self) -> str:
        """The device's name."""
        return self._device.name

    @property
    def index(self) -> int:
        """The device's interface's number."""
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
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.append(waiter)
        try:
            while True:
                if self._pump is None:
                    self._error = None
                    self._pump = asyncio.Task(self._read(), loop=loop)
                await waiter
                # No await from here on: what is taken is returned.
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
                self._pump.cancel()  # which loses nothing: nobody wants a packet any more
                self._pump = None

    async def _read(self) -> None:
        """Receive for those who wait, as long as there is one."""
        me = self._pump
        try:
            while self._pump is me:
                # Not ahead of them: the kernel's ring is the buffer.
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

    def _take_many(self, limit: int) -> list[bytes]:
        return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    # Sending

    async def send(self, packet: Buffer) -> None:
        self._check_open()
        waiting = deque(self._outgoing.pass_on(bytes(packet)))
        try:
            while waiting:
                await self._device.send(waiting[0])
                waiting.popleft()
        finally:
            # Of the first one this call tells itself, by what it raises.
            self._outgoing.counts.lost += max(0, len(waiting) - 1)

    def send_nowait(self, packet: Buffer) -> None:
        self._check_open()
        waiting = deque(self._outgoing.pass_on(bytes(packet)))
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
        self._device.close()  # whoever waits hears of it by the pump

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
        self._check_open()

    def _check_open(self) -> None:
        if self.closed:
            raise DeviceClosedError(f"{self.name} was closed here; open it again to go on")

"""One direction of a `FaultInjector`: what happens to a packet, and when it is delivered."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections.abc import Callable, Iterable
from typing import Protocol

from ..errors import AiotunError

__all__ = ["FaultCounts", "Line", "Rate"]

Rate = float | tuple[float, float]
"""A rate (or bandwidth) of both directions, or the rates of received and of sent packets."""

_SHORTEST = 0.001  # seconds; with a delay of 0 the loop would spin while the device has no room
_QUEUE = 1000  # packets that wait for a narrow line; Linux's usual txqueuelen


@dataclasses.dataclass
class FaultCounts:
    """What a `FaultInjector` has done to the packets of one direction so far."""

    packets: int = 0
    """All packets that entered it."""
    dropped: int = 0
    delayed: int = 0
    overflowed: int = 0
    """Packets that were not delivered because 1,000 others were waiting for the `bandwidth`."""
    duplicated: int = 0
    corrupted: int = 0
    """Packets in which one bit was flipped."""
    reordered: int = 0
    """Packets that were held back until another one had passed."""
    lost: int = 0
    """Packets that were delayed or held back and then could not be delivered, for example because
    the `FaultInjector` was closed."""


class Faults(Protocol):
    """The rates that a line follows; the program may change them at any time."""

    drop: Rate
    delay: Rate
    duplicate: Rate
    corrupt: Rate
    reorder: Rate
    delay_by: float
    bandwidth: Rate


def _now() -> float:
    """The loop's time. Without a loop nothing can be delayed, so any time will do."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return 0.0


class Line:
    """One direction, with its own random numbers."""

    def __init__(
        self,
        faults: Faults,
        name: str,
        seed: int,
        header_bytes: int,
        deliver: Callable[[bytes], None],
    ) -> None:
        self.counts = FaultCounts()
        self._faults = faults
        self._header_bytes = header_bytes
        self._sent = name == "out"
        # Each direction has its own generator. With a shared one, the faults would depend on the
        # order in which the program sends and receives.
        self._random = random.Random(f"{seed} {name}")
        self._deliver = deliver
        self._delayed: dict[asyncio.TimerHandle, list[bytes]] = {}
        self._held: dict[asyncio.TimerHandle, list[bytes]] = {}  # until another packet passes

        self._free_at = 0.0  # when the last packet has left, on a line of limited bandwidth

    def _rate(self, rate: Rate) -> float:
        return rate[self._sent] if isinstance(rate, tuple) else rate

    def pass_on(self, packet: bytes) -> list[bytes]:
        """Decide what happens to this packet; return all packets to deliver now."""
        faults, counts = self._faults, self.counts
        # Always draw the same number of random numbers for a packet. So changing one rate does not
        # change which packets the other faults hit.
        drop, delay, duplicate, corrupt, reorder, bit = (self._random.random() for _ in range(6))
        counts.packets += 1
        if drop < self._rate(faults.drop):
            counts.dropped += 1
            return []
        if corrupt < self._rate(faults.corrupt):
            packet = self._corrupted(packet, bit)
        copies = [packet]
        if duplicate < self._rate(faults.duplicate):
            counts.duplicated += 1
            copies.append(packet)
        now = at = _now()  # `at`: when to deliver it
        if (bandwidth := self._rate(faults.bandwidth)) < math.inf:
            if len(self._delayed) >= _QUEUE:
                counts.overflowed += len(copies)
                return []
            bits = 8 * sum(len(each) - self._header_bytes for each in copies)
            at = self._free_at = max(self._free_at, now) + bits / bandwidth
        if delay < self._rate(faults.delay):
            counts.delayed += 1
            at += max(faults.delay_by, _SHORTEST)
        elif reorder < self._rate(faults.reorder):
            counts.reordered += 1
            line = self._held if at == now else self._delayed
            # On a line of limited bandwidth the packets behind it overtake.
            self._keep(copies, line, at + max(faults.delay_by, _SHORTEST))
            return []
        if at > now:
            self._keep(copies, self._delayed, at)
            return []
        return copies + self._cancelled(self._held)

    def _corrupted(self, packet: bytes, chance: float) -> bytes:
        # Not in the first byte: the kernel rejects a packet that is neither IPv4 nor IPv6.
        first = self._header_bytes + 1
        bits = (len(packet) - first) * 8
        if bits <= 0:
            return packet
        place = first * 8 + int(chance * bits)
        changed = bytearray(packet)
        changed[place // 8] ^= 1 << place % 8
        self.counts.corrupted += 1
        return bytes(changed)

    def _keep(
        self, packets: list[bytes], kept: dict[asyncio.TimerHandle, list[bytes]], at: float
    ) -> None:
        """Deliver packets at a time of the loop's, unless `_cancelled` takes them out before.

        Not after a pause: then packets that follow closely could change places.
        """

        # One timer for all of them: the loop does not promise to run two timers of the same time in
        # order.
        loop = asyncio.get_running_loop()

        def release() -> None:
            self.deliver_late(kept.pop(timer))

        timer = loop.call_at(at, release)
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
            at = asyncio.get_running_loop().time() + max(self._faults.delay_by, _SHORTEST)
            self._keep(no_room, self._delayed, at)

    def _cancelled(self, kept: dict[asyncio.TimerHandle, list[bytes]]) -> list[bytes]:
        for timer in kept:
            timer.cancel()
        packets = [packet for each in kept.values() for packet in each]
        kept.clear()
        return packets

    def end(self) -> None:
        """Count the packets that are delayed or held back as lost."""
        self.counts.lost += len(self._cancelled(self._delayed)) + len(self._cancelled(self._held))

"""Pings a neighbor again and again, after finding its MAC."""

import asyncio
import contextlib
import statistics
import time

from _neighbours import Neighbour

import aiotun

__all__ = ["Ping"]

PATIENCE = 1.0  # how many seconds to wait for the last answer, at least


class Ping:
    """Pings a neighbor and prints the answers, as ping(8) does."""

    def __init__(self, neighbour: Neighbour, count: int | None, interval: float) -> None:
        self._neighbour = neighbour
        self._count = count  # None: for ever
        self._interval = interval  # seconds
        self._mac: bytes | None = None  # the neighbor's
        self._number = 0
        self._unanswered: dict[int, float] = {}  # the times at which pings were sent, by number
        self.times: list[float] = []  # round-trip times, in milliseconds

    def next(self, tap: aiotun.TapDevice) -> None:
        """Send a ping, or ask for the MAC if it is unknown, and schedule the next call."""
        if tap.closed:
            return
        target = self._neighbour.target
        if self._number and self._mac is None:
            print(f"icmp_seq={self._sequence}: nobody answers for {target}", flush=True)
        if self._number == self._count:
            tap.close()
            return
        if self._sequence in self._unanswered:
            self._mac = None  # the address may belong to another host by now
        self._number += 1
        # A ping that can't be sent gets no answer. If the device is lost, serve() reports it.
        with contextlib.suppress(BlockingIOError, aiotun.AiotunError):
            tap.send_nowait(self._neighbour.find() if self._mac is None else self._ping(self._mac))
        wait = max(self._interval, PATIENCE) if self._number == self._count else self._interval
        asyncio.get_running_loop().call_later(wait, self.next, tap)

    def take(self, frame: bytes, tap: aiotun.TapDevice) -> bytes | None:
        """Handle a frame. If it has the neighbor's MAC, return the ping that waited for the MAC."""
        if self._mac is None:
            self._mac = self._neighbour.found(frame)
            if self._mac is not None:
                return self._ping(self._mac)
        reply = self._neighbour.reply(frame)
        if reply is not None and reply.number in self._unanswered:  # duplicates don't count
            took = (time.perf_counter() - self._unanswered.pop(reply.number)) * 1000
            self.times.append(took)
            print(f"{reply.bytes} bytes from {self._neighbour.target}: icmp_seq={reply.number} "
                  f"ttl={reply.ttl} time={took:.3f} ms", flush=True)  # fmt: skip
            if self._number == self._count and not self._unanswered:
                tap.close()
        return None

    def _ping(self, mac: bytes) -> bytes:
        self._unanswered[self._sequence] = time.perf_counter()
        return self._neighbour.ping(mac, self._sequence)

    @property
    def _sequence(self) -> int:
        return self._number & 0xFFFF  # a ping's number has 16 bits

    def __str__(self) -> str:
        said = f"{self._number} sent, {len(self.times)} answered"
        if self.times:
            low, mean, high = min(self.times), statistics.mean(self.times), max(self.times)
            said += f", in {low:.3f}/{mean:.3f}/{high:.3f} ms (min/mean/max)"
        return said

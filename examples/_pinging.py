"""Pings, one after the other, to a neighbour whose MAC is to be found first."""

import asyncio
import contextlib
import statistics
import time

from _neighbours import Neighbour

import aiotun

__all__ = ["Ping"]

PATIENCE = 1.0  # seconds, at least, for the answer to the last one


class Ping:
    """Pings one neighbour, and prints what comes back, as ping(8) does."""

    def __init__(self, neighbour: Neighbour, count: int | None, interval: float) -> None:
        self._neighbour = neighbour
        self._count = count  # None: for ever
        self._interval = interval  # seconds
        self._mac: bytes | None = None  # the neighbour's
        self._number = 0
        self._unanswered: dict[int, float] = {}  # pings by number, and when they were sent
        self.times: list[float] = []  # what answers took, in milliseconds

    def next(self, tap: aiotun.TapDevice) -> None:
        """Send a ping, or where the MAC is not known ask for it; go on so until all are sent."""
        if tap.closed:
            return
        target = self._neighbour.target
        if self._number and self._mac is None:
            print(f"icmp_seq={self._sequence}: nobody answers for {target}", flush=True)
        if self._number == self._count:
            tap.close()
            return
        if self._sequence in self._unanswered:
            self._mac = None  # somebody else may have the address by now
        self._number += 1
        # What can't be sent is not answered either; and if the device is lost, serve() tells.
        with contextlib.suppress(BlockingIOError, aiotun.AiotunError):
            tap.send_nowait(self._neighbour.find() if self._mac is None else self._ping(self._mac))
        wait = max(self._interval, PATIENCE) if self._number == self._count else self._interval
        asyncio.get_running_loop().call_later(wait, self.next, tap)

    def take(self, frame: bytes, tap: aiotun.TapDevice) -> bytes | None:
        """See what a frame tells; give the ping that waited for the MAC, if it tells that."""
        if self._mac is None:
            self._mac = self._neighbour.found(frame)
            if self._mac is not None:
                return self._ping(self._mac)
        reply = self._neighbour.reply(frame)
        if reply is not None and reply.number in self._unanswered:  # and none is counted twice
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
        return self._number & 0xFFFF  # for which a ping has room

    def __str__(self) -> str:
        said = f"{self._number} sent, {len(self.times)} answered"
        if self.times:
            low, mean, high = min(self.times), statistics.mean(self.times), max(self.times)
            said += f", in {low:.3f}/{mean:.3f}/{high:.3f} ms (min/mean/max)"
        return said

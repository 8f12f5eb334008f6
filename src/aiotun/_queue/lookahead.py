"""Whether the next packet is worth looking for, learnt from the last ones."""

from __future__ import annotations

import contextlib
import select

__all__ = ["TURNS", "Lookahead"]

# How often a queue polls for the next packet, which takes some 5 microseconds in all.
_POLLS = 12
# Every sixteenth wake-up polls even though it did not pay the last time, to see whether it would.
_RETRY = 16

TURNS = 16
"""How often one call by the loop may resume the same task."""


class Lookahead:
    """What a queue expects of the next packet.

    To find that there is no second packet costs as much as to read one. So where packets come one
    by one, a resumed task reads one and waits again. And in a request/response exchange the next
    packet arrives within microseconds, where sleeping in epoll costs more than polling for it.

    A run of packets is taken in one read, however many packets it has. So for runs this counts
    reads: a second one is tried where it found something the last time, and now and then.

    Attributes:
        burst: several packets were there at once, the last time.
        pays: polling found the next packet, the last time.
    """

    __slots__ = ("_more_runs", "_poll", "_retry", "_runs", "_wakeups", "burst", "pays")

    def __init__(self) -> None:
        self.burst = True
        self.pays = False
        self._runs = 0  # taken since the loop called
        self._more_runs = False  # a second one was there, the last time that it was tried
        self._wakeups = 0  # how often the loop called while one task waited
        self._retry = True  # this wake-up tries what did not pay the last time
        self._poll: select.poll | None = None

    def due(self) -> bool:
        """Count a wake-up; tell whether to look for another packet after it."""
        if self._runs == 1:  # a second one was not there, or not tried
            self._more_runs = False
        self._runs = 0
        self._wakeups += 1
        self._retry = self._wakeups % _RETRY == 0
        return self.pays or self._retry

    def another(self) -> bool:
        """Count a run that was taken; tell whether to try another at once."""
        self._runs += 1
        if self._runs > 1:
            self._more_runs = True
        return self._more_runs or self._retry

    def look(self, fd: int) -> bool:
        """Poll for the next packet, and learn from what comes of it."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        poll = self._poll.poll
        self.pays = False
        # poll(2) fails with EINVAL while RLIMIT_NOFILE is 0, as some sandboxes set it.
        with contextlib.suppress(OSError):
            for polls in range(1, _POLLS + 1):
                if poll(0):
                    self.pays = True
                    self.burst |= polls == 1
                    return True
        return False

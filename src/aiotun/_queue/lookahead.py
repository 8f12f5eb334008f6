"""Whether the next packet is worth looking for, learnt from the last ones."""

from __future__ import annotations

import contextlib
import os
import select

__all__ = ["TURNS", "Lookahead"]

# How often a queue polls for the next packet, which takes some 5 microseconds in all.
_POLLS = 12
# On a single core the sender can't run while we poll. It has run before, or it runs once we sleep.
_POLLS_ON_ONE_CORE = 1
# These wake-ups poll even though it did not pay the last time, to see whether it would: every
# sixteenth, and some soon after it stopped paying. On a single core an exchange stops whenever the
# scheduler does not let the sender run at once. Each packet until the next try then takes a turn of
# the loop, which costs more than a few polls.
_RETRY = 16
_RETRY_SOON = (2, 4, 8)

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

    __slots__ = (
        "_more_runs", "_poll", "_polls", "_retry", "_runs", "_since", "_wakeups", "burst", "pays"
    )  # fmt: skip

    def __init__(self) -> None:
        self.burst = True
        self.pays = False
        self._runs = 0  # taken since the loop called
        self._more_runs = False  # a second one was there, the last time that it was tried
        self._wakeups = 0  # how often the loop called while one task waited
        self._since = 0  # the same, from the call on in which polling last found a packet
        self._retry = True  # this wake-up tries what did not pay the last time
        self._poll: select.poll | None = None
        self._polls = _POLLS

    def due(self) -> bool:
        """Count a wake-up; tell whether to look for another packet after it."""
        if self._runs == 1:  # a second one was not there, or not tried
            self._more_runs = False
        self._runs = 0
        self._wakeups += 1
        self._since += 1
        self._retry = self._wakeups % _RETRY == 0
        return self.pays or self._since % _RETRY == 0 or self._since in _RETRY_SOON

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
        paid, self.pays = self.pays, False
        # poll(2) fails with EINVAL while RLIMIT_NOFILE is 0, as some sandboxes set it.
        with contextlib.suppress(OSError):
            if not paid:
                # Not each time: the answer seldom changes, and asking takes a microsecond.
                alone = len(os.sched_getaffinity(0)) == 1
                self._polls = _POLLS_ON_ONE_CORE if alone else _POLLS
            for polls in range(1, self._polls + 1):
                if poll(0):
                    self.pays = True
                    self.burst |= polls == 1
                    self._since = 1
                    return True
        return False

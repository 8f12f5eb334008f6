"""Who may read or write an fd now, and who waits: a queue's, or a datagram socket's.

Reading, by who waits and what the loop does for it:

=========  =================  ======================================================================
state      the loop watches   what leads out of it
=========  =================  ======================================================================
idle       nothing            `recv` reads at once while there is a budget; else it waits: *watched*
watched    fd and rest        readable, or nudged: *resuming*; or *idle* again, where nobody waits
resuming   fd and rest        the resumed task waits again, or does something else: *watched*
lost       nothing            the interface is gone: every call raises, until `close`: *closed*
closed     nothing            nothing; `_fd` is -1
=========  =================  ======================================================================

The *rest* is what the port keeps, such as the segments of a super-packet that nobody took yet. No
poll sees it, so a *nudge* (`call_soon`) stands for it. There is one rule, kept by `watch`, `take`
and `_readable`: while the loop watches this fd and its port keeps packets, a nudge is under way. An
fd that is readable while nobody waits is no longer watched: registering it again costs more than a
wake-up, but a loop that watched it would spin.

Invariants, which `check_invariants` (in `tests`) asserts around every callback of every test:

- `_free` > 0 only while a task is being resumed here, and nobody else waits, here or in the group.
- `_free` + `_budget` is what may still be read before the loop has a turn: 0 to `BUDGET`.
- A task waits in `_receivers` only while the loop watches the fd; in `_senders` only while it
  watches for room; in the group's line only while it watches every open queue.
- A task waits in `_parked` only while a pool without a free buffer knows that line.
- A lost or closed one is not watched, has no nudge under way, and nobody waits in its lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, TypeVar

from .._packets.runs import Pool
from ..errors import AiotunError
from .fdowner import FdOwner, Group
from .lookahead import TURNS
from .packetio import BUDGET
from .waiting import Waiter

__all__ = ["ServedFd"]

T = TypeVar("T")


class ServedFd(FdOwner):
    """An fd that tasks read and write in turn.

    What they do with it is a function that never waits (BlockingIOError): it is called until it
    succeeds, and in between its task waits.
    """

    __slots__ = ()

    # Receiving

    async def _receive(self, take: Callable[[Self], T]) -> T:
        loop = self._watch.loop if self._resuming else None
        if loop is None:
            loop = self._bind()
            wait = self._budget <= 0
        else:
            wait = not self._free
        ticket: int | None = None
        wait = wait or self._drained or self._somebody_waits()
        while True:
            if wait:
                if self._free:
                    self.end_free()
                if self.port.pending or not self._watch.reading:
                    self.watch()
                # If another process reads first, this task keeps its place in the line.
                waiter = Waiter(loop, self._receivers, ticket)
                ticket = waiter.ticket
                await waiter
                # No await from here on: what is read is returned.
                if self._fd < 0 or self._lost is not None:
                    self.check_open()
            try:
                return self.take(take)
            except BlockingIOError:
                wait = True

    async def _wait_for_buffer(self, pool: Pool) -> None:
        """Wait until the pool of a run's buffers may have one."""
        while not pool.free:
            loop = self._bind()
            pool.wake(self._parked)
            await Waiter(loop, self._parked)

    def take(self, take: Callable[[Self], T]) -> T:
        """Take packets now.

        Raises:
            BlockingIOError: there is none.
        """
        try:
            return take(self)
        except OSError as error:
            self._refuse(error)
            raise
        finally:  # also where a packet was cut, which raises and leaves a rest all the same
            if not self._resuming and self.port.pending and self._watch.reading:
                self._watch.nudge()

    def _refuse(self, error: OSError) -> None:
        """Note that the fd is empty; raise what any other error means."""
        if isinstance(error, BlockingIOError):
            self._drained = True
        elif isinstance(error, AiotunError):
            raise error
        else:
            raise self._read_error(error) from error

    def _spend(self, packets: int) -> None:
        free = self._free
        if free >= packets:
            self._free = free - packets
        else:
            self._free = 0
            self._budget = max(0, self._budget + free - packets)

    def watch(self) -> None:
        """Have the loop call when there is a packet: in the fd, or kept by the port."""
        watch = self._watch
        if not watch.reading:
            self._bind()
            watch.start_reading(self._fd)
        if self.port.pending:
            watch.nudge()

    # What the loop calls

    def _readable(self) -> None:
        """Resume those who wait, in order, while there are packets."""
        self._drained = False
        self._budget = BUDGET
        group = self._peers()
        shared = group is not None and bool(group.line)
        if not self._receivers and not shared:
            self._watch.stop_reading(self._fd)
            if group is not None:
                group.unwatch(self)
            return
        try:
            if shared or len(self._receivers) > 1:
                self._serve_many(group)
            else:
                self._serve_one(group)
        finally:
            self._resuming = False
            if self._free:
                self.end_free()
        if self.port.pending and self._watch.reading:
            self._watch.nudge()

    def _rest_ready(self) -> None:
        if self.port.pending:
            self._readable()

    def _serve_one(self, group: Group | None) -> None:
        """Resume the only task that waits, again and again while that pays; see `Lookahead`."""
        receivers, ahead = self._receivers, self._ahead
        look = ahead.due()
        self._resuming = True
        for _ in range(TURNS):
            self._drained = False
            left = self._budget
            free = left if ahead.burst or self.port.pending else 1
            self._free, self._budget = free, left - free
            if group is not None:
                group.resuming = self
            receivers.popleft().wake()
            if self._free:
                self.end_free()
            taken = left - self._budget
            ahead.burst = taken > 1
            if not taken or self._budget <= 0 or len(receivers) != 1 or (group and group.line):
                break
            if not self.port.pending and not (look and ahead.look(self._fd)):
                break

    def _serve_many(self, group: Group | None) -> None:
        """Resume each who waits now, once; who comes back in the meantime waits for the next call.

        The first packet that is missing ends it.
        """
        receivers = self._receivers
        for _ in range(len(receivers) + (len(group.line) if group is not None else 0)):
            if self._drained or self._budget <= 0 or not self._watch.reading:
                break
            if group is not None and group.comes_before(receivers):
                group.resume(self)
            elif receivers:
                waiter = receivers.popleft()
                if not self._somebody_waits():
                    self._free, self._budget = self._budget, 0
                if group is not None:
                    group.resuming = self
                self._resuming = True
                waiter.wake()
                self._resuming = False
                self.end_free()

    def _writable(self) -> None:
        """Resume those who wait to send, until one has to wait on."""
        senders = self._senders
        for _ in range(min(len(senders), BUDGET)):
            if not senders:
                break
            waiter = senders.popleft()
            waiter.wake()
            if senders and senders[0].ticket == waiter.ticket:
                break  # its task found the buffer full again
        if not senders:
            # A queue is nearly always writable: watched for nobody it would spin.
            self._watch.stop_writing(self._fd)

    # Sending

    async def _send_waiting(self, write: Callable[[], T]) -> T:
        """Call `write` once there is room, until it succeeds; wait in between, in line."""
        loop = self._bind()
        ticket: int | None = None
        while True:
            self._watch.start_writing(self._fd, self._interface)
            waiter = Waiter(loop, self._senders, ticket)
            ticket = waiter.ticket
            await waiter
            self.check_open()
            try:
                return write()
            except BlockingIOError:
                continue

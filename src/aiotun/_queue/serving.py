"""Decides which task may read or write an fd now, and which must wait.

The fd belongs to a queue or a datagram socket. The states of reading:

=========  =================  ======================================================================
state      the loop watches   what leads out of it
=========  =================  ======================================================================
idle       nothing            `recv` reads at once while there is a budget; else it waits: *watched*
watched    fd and rest        readable, or nudged: *resuming*; or *idle* again, where nobody waits
resuming   fd and rest        the resumed task waits again, or does something else: *watched*
lost       nothing            the interface is gone: every call raises, until `close`: *closed*
closed     nothing            nothing; `_fd` is -1
=========  =================  ======================================================================

The *rest* is the packets that the port keeps, such as the segments of a super-packet that no task
has taken yet. Polling the fd does not show the rest, so a *nudge* (`call_soon`) takes the place of
a wake-up. `watch`, `take` and `_readable` keep one rule: while the loop watches this fd and its
port keeps packets, a nudge is under way. If the fd becomes readable while no task waits, the loop
stops watching it; otherwise the loop would spin. It keeps watching until then, because a needless
wake-up costs less than registering the fd again.

Invariants, which `check_invariants` (in `tests`) asserts around every callback of every test:

- `_free` > 0 only while a task is being resumed here, and no other waits, here or in the group.
- `_free` + `_budget` is how many packets may be read before the loop has a turn: 0 to `BUDGET`.
- A task waits in `_receivers` only while the loop watches the fd; in `_senders` only while it
  watches for room; in the group's line only while it watches every open queue.
- A task waits in `_parked` only while a pool without a free buffer is to wake that line.
- A lost or closed fd is not watched, has no nudge under way, and no task waits in its lines.
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

    A task passes a function that reads or writes without waiting. While the function raises
    BlockingIOError, the task waits, and then calls it again.
    """

    __slots__ = ()

    # Receiving

    async def _receive(self, take: Callable[[Self], T]) -> T:
        if self._free and not self._drained:  # being resumed, and nobody else waits
            try:
                return take(self)
            except OSError as error:
                self._refuse(error)
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
                # No await from here on, so that a cancellation can't lose what is read.
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
            BlockingIOError: there is no packet.
        """
        try:
            return take(self)
        except OSError as error:
            self._refuse(error)
            raise
        finally:  # also on an error: a truncated packet raises one, and a rest may be left
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
        """Have the loop call back when there is a packet, in the fd or kept by the port."""
        watch = self._watch
        if not watch.reading:
            self._bind()
            watch.start_reading(self._fd)
        if self.port.pending:
            watch.nudge()

    # What the loop calls

    def _readable(self) -> None:
        """Resume the tasks that wait, in order, while there are packets."""
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
        """Resume the only task that waits, repeatedly while that saves time; see `Lookahead`."""
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
        """Resume each task that waits now, once, until there are no more packets.

        A task that waits again in the meantime has to wait for the next call.
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
        """Resume the tasks that wait to send, until one finds the buffer full again."""
        senders = self._senders
        for _ in range(min(len(senders), BUDGET)):
            if not senders:
                break
            waiter = senders.popleft()
            waiter.wake()
            if senders and senders[0].ticket == waiter.ticket:
                break  # its task found the buffer full again
        if not senders:
            # A queue is nearly always writable. If no task waited, watching it would make the loop
            # spin.
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

"""Several queues of one device, read and written as if they were one.

Here is no fd and no system call: which queue is ready, whose turn it is, and which one a flow's
packets go to. The reading and writing itself is each queue's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from .._kernel.abi import READ_SIZE
from .._kernel.words import Mode
from .._packets.flow import flow_hash
from .._packets.runs import Layout, Pool, Run
from ..errors import (
    AiotunError,
    DeviceClosedError,
    DeviceLostError,
    LinkDownError,
    PacketTruncatedError,
)
from .closing import close_queues
from .packetio import BUDGET, PacketIO, PacketStats, take_one
from .port import is_packet
from .waiting import Line, Waiter

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .port import PacketFormat
    from .queuebase import QueueBase

__all__ = ["QueueGroup"]

T = TypeVar("T")


class QueueGroup(PacketIO):
    """The queues of a device that has more than one."""

    __slots__ = (
        "__weakref__",
        "_bound",
        "_budget",
        "_lost",
        "_offer",
        "_open",
        "_parked",
        "_ready",
        "_undecodable",
        "_unwatched",
        "_usable",
        "line",
        "queues",
        "resuming",
    )

    def __init__(self, queues: tuple[QueueBase, ...], line: Line) -> None:
        self.queues: tuple[QueueBase, ...] = queues
        self.line: Line = line  # tasks that want a packet of any queue
        self._open: list[QueueBase] = list(queues)
        self._usable: list[QueueBase] | None = None  # open and enabled; None: to be found again
        self._lost: QueueBase | None = None  # one that found the interface gone
        # Queues that had packets when last seen; the first one is whose turn it is.
        self._ready: deque[QueueBase] = deque()
        # Open queues that the loop does not watch, and has to before a task may wait here.
        self._unwatched: set[QueueBase] = set(queues)
        self._offer: QueueBase | None = None  # the queue that is resuming a task right now
        self.resuming: QueueBase | None = None  # the last one that resumed a task of its own
        self._parked = Line()  # tasks that can't receive before a run's buffer is free
        self._bound = False
        self._budget = BUDGET
        self._undecodable = 0
        for queue in queues:
            queue.join(self)

    # What a queue tells and asks

    def comes_before(self, line: Line) -> bool:
        """Whether the first who waits here began before the first in a queue's own line."""
        return bool(self.line) and (not line or self.line[0].ticket < line[0].ticket)

    def resume(self, queue: QueueBase) -> None:
        """Resume the first who waits here; a queue with packets calls it, from its callback."""
        self._has_packets(queue)
        # All queues may call in one turn of the loop, so they share what one has for itself.
        self._budget = max(1, BUDGET // len(self.queues))
        self._offer = queue
        self.line.popleft().wake()
        self._offer = None

    def unwatch(self, queue: QueueBase) -> None:
        """Note that a queue has packets, nobody wanted them, and the loop stopped watching it."""
        self._has_packets(queue)
        self._unwatched.add(queue)

    def leave(self, queue: QueueBase) -> None:
        """Note that a queue was closed."""
        self._open = [each for each in self._open if each is not queue]
        self._ready = deque(each for each in self._ready if each is not queue)
        self._unwatched.discard(queue)
        self._usable = None
        if self._lost is queue:
            self._lost = None
        if not self._open:
            self.line.dismiss()
            self._parked.dismiss()

    def lose(self, queue: QueueBase) -> None:
        """Note that a queue found the interface gone."""
        self._lost = queue
        self.line.dismiss()
        self._parked.dismiss()

    def choose_again(self) -> None:
        """Note that a queue was disabled or enabled."""
        self._usable = None

    def _has_packets(self, queue: QueueBase) -> None:
        if queue not in self._ready:
            self._ready.append(queue)

    # Receiving

    async def _receive(self, take: Callable[[PacketIO], T]) -> T:
        loop = self._bind()
        ticket: int | None = None
        if self._budget > 0 and not self.line:
            try:
                return take(self)
            except BlockingIOError:
                pass
        while True:
            while self._unwatched:
                queue = next(iter(self._unwatched))
                queue.watch()  # it stays in the set where this raises
                self._unwatched.discard(queue)
            if self.resuming is not None:
                # An eager task may come here from within the one that a queue is resuming: who
                # goes on reading there must not overtake it any more.
                self.resuming.end_free()
                self.resuming = None
            waiter = Waiter(loop, self.line, ticket)
            ticket = waiter.ticket
            await waiter
            # No await from here on: what is read is returned.
            self._check_open()
            try:
                return take(self)
            except BlockingIOError:
                continue

    def _take(self) -> bytes:
        return self._take_with(take_one)

    def _take_into(self, octets: memoryview) -> int:
        return self._take_with(lambda queue: queue._take_into(octets))

    def _take_with(self, take: Callable[[PacketIO], T]) -> T:
        """Take from the ready queues in turn, leaving alone those for whose packets tasks wait.

        Except the queue that resumed this task: it has already checked that none of its own tasks
        has waited longer.
        """
        ready, offer = self._ready, self._offer
        self._offer = None
        if offer is not None and offer in ready:
            ready.remove(offer)
            ready.appendleft(offer)
        for _ in range(len(ready)):
            queue = ready[0]
            if queue.wanted and queue is not offer:
                ready.rotate(-1)
                continue
            try:
                taken = queue.take(take)
            except BlockingIOError:
                ready.popleft()
                continue
            except PacketTruncatedError:
                self._took_one()
                raise
            self._took_one()
            return taken
        raise BlockingIOError(errno.EAGAIN, "no queue has a packet")

    def _took_one(self) -> None:
        self._ready.rotate(-1)
        self._budget -= 1

    def _take_many(self, limit: int) -> list[bytes]:
        batch = [self._take()]
        try:
            while len(batch) < limit:
                batch.append(self._take())
        except (BlockingIOError, DeviceLostError):
            pass  # what we have goes first; the next call meets the loss again
        return batch

    def _take_run(self, pool: Pool, layout: Layout) -> Run:
        run = self._take_with(lambda queue: queue._take_run(pool, layout))
        self._budget -= run.count - 1
        return run

    async def _wait_for_buffer(self, pool: Pool) -> None:
        while not pool.free:
            loop = self._bind()
            pool.wake(self._parked)
            await Waiter(loop, self._parked)

    def recv_nowait(self) -> bytes:
        self._check_open()
        if self.line:
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting for the next packet")
        # Nobody told us lately which are ready: ask them all, those that are known first.
        for queue in self._open:
            self._has_packets(queue)
        return self._take()

    # Sending

    async def send(self, packet: Buffer) -> None:
        queue = self._queue_for(packet)
        if not queue.ready:
            self._bind()
        await queue.send(packet)

    def _send_at_once(self, packets: list[Buffer]) -> Sequence[int]:
        sent = 0
        try:
            if self.queues[0].offload == "split":
                return self._send_by_queue(packets)
            # One call for as many as go to the same queue.
            for queue, group in itertools.groupby(packets, self._queue_for):
                run = list(group)
                left = queue._send_at_once(run)
                sent += len(run) - len(left)
                if left:
                    break
        except (AiotunError, TypeError, ValueError, BufferError):
            pass  # the first packet left over meets it again
        return range(sent, len(packets))

    def _send_by_queue(self, packets: list[Buffer]) -> Sequence[int]:
        """Send as `_send_at_once`, with one call for each queue: the more to merge."""
        batches: dict[QueueBase, list[int]] = {}
        place = 0
        with contextlib.suppress(AiotunError, TypeError, ValueError, BufferError):
            for place, packet in enumerate(packets):
                if not is_packet(packet, self._mode) or memoryview(packet).nbytes > READ_SIZE:
                    break  # the kernel may refuse this one: nothing behind it goes before it
                batches.setdefault(self._queue_for(packet), []).append(place)
            else:
                place = len(packets)
        left: list[int] = []
        for queue, places in batches.items():
            kept = queue._send_at_once([packets[each] for each in places])
            left += [places[each] for each in kept]
        return [*sorted(left), *range(place, len(packets))]

    def send_nowait(self, packet: Buffer) -> None:
        self._queue_for(packet).send_nowait(packet)

    def _queue_for(self, packet: Buffer) -> QueueBase:
        """The queue that this packet's flow goes to, both ways: the kernel follows our choice."""
        usable = self._usable
        if usable is None:
            usable = self._usable = [queue for queue in self._open if not queue.disabled]
        if not usable:
            self._check_open()
            raise LinkDownError(
                errno.ENETDOWN, "every queue is disabled; enable() one to send", self._shown
            )
        first = self.queues[0]
        head = packet if isinstance(packet, bytes) else bytes(memoryview(packet).cast("B")[:128])
        flow = flow_hash(head, first._header_bytes, frame=first._mode == "tap")
        return usable[flow % len(usable)]

    # Closing and state

    def close(self) -> None:
        close_queues(self.queues)

    async def aclose(self) -> None:
        close_queues(self.queues)
        for queue in self.queues:
            await queue.aclose()

    @property
    def closed(self) -> bool:
        return not self._open

    def fileno(self) -> int:
        if self.closed:
            return -1
        raise ValueError(
            f"{self._shown} has {len(self.queues)} queues and no single fd; ask device.queues"
        )

    @property
    def stats(self) -> PacketStats:
        own = PacketStats(undecodable=self._undecodable)
        return sum((queue.stats for queue in self.queues), own)

    @property
    def _mode(self) -> Mode:
        return self.queues[0]._mode

    @property
    def _format(self) -> PacketFormat:
        return self.queues[0]._format

    @property
    def _shown(self) -> str:
        return self.queues[0].name

    def _count_undecodable(self) -> None:
        self._undecodable += 1

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Check that the queues are of the running loop, and usable."""
        self._check_open()
        loop = self._open[0]._bind()
        # All belong to the loop of the first one: a call that need not wait asks only one queue.
        if not self._bound:
            for queue in self._open:
                queue._bind()
            self._bound = True
        return loop

    def _check_open(self) -> None:
        if not self._open:
            raise DeviceClosedError(f"{self._shown} was closed here; open it again to go on")
        if self._lost is not None:
            self._lost.check_open()

"""A queue: one file descriptor on one event loop. Who may read or write now, and who waits.

A packet comes in through `_take` (or straight in `recv`, which does the same in one frame less) and
goes out in `send` (a list of them in `_send_at_once`). What is read and written, and how, is the
port's business. Everything else here decides who may do that, and when.

Receiving, by who waits and what the loop does for the queue:

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
and `_readable`: while the loop watches this queue and its port keeps packets, a nudge is under way.
A queue that is readable while nobody waits is no longer watched: registering it again costs more
than a wake-up, but a loop that watched it would spin.

Invariants, which `check_invariants` (in `tests`) asserts around every callback of every test:

- `_free` > 0 only while a task is being resumed here, and nobody else waits, here or in the group.
- `_free` + `_budget` is what may still be read before the loop has a turn: 0 to `BUDGET`.
- A task waits in `_receivers` only while the loop watches the fd; in `_senders` only while it
  watches for room; in the group's line only while it watches every open queue.
- A task waits in `_parked` only while a pool of runs that has no free buffer knows that line.
- A lost or closed queue is not watched, has no nudge under way, and nobody waits in its lines.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TypeVar

from ._kernel.abi import READ_SIZE
from ._kernel.words import Offload, check_offload
from ._packets.runs import Layout, Pool, Run
from ._queue import refusals
from ._queue.fdowner import Group, QueueBase
from ._queue.judging import judge
from ._queue.lookahead import TURNS
from ._queue.packetio import BUDGET, NoBufferError, PacketIO, take_one
from ._queue.waiting import Waiter
from .errors import AiotunError, DeviceClosedError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Queue"]

T = TypeVar("T")

_ETHERNET_HEADER = 14


class Queue(QueueBase):
    """One open file descriptor on an interface; `device.queues` has them.

    A queue and its device may be used at the same time. The kernel spreads flows over the queues,
    and sends a flow's packets to the queue that last sent one of that flow.
    """

    __slots__ = ()

    @classmethod
    def from_fd(cls, fd: int, offload: Offload = "off", packet_info: bool = False) -> Self:
        """Make a queue of an fd that another process opened, or of any that keeps boundaries.

        The fd becomes the queue's, non-blocking and close-on-exec; where this raises it is still
        the caller's. Of a TUN or TAP queue the kernel is asked for name, kind, packet information,
        and virtio-net header and its size. That takes well below a millisecond.

        Args:
            fd: a TUN or TAP queue (inherited, or received by SCM_RIGHTS), or a datagram or
                seqpacket socket. Nobody else may make it blocking again: a read that finds nothing
                would stop the loop (signals still get through).
            offload: ``"raw"`` or ``"split"`` where each packet has a virtio-net header. That of a
                TUN or TAP queue may have 10 or 12 bytes (`vnet_header_size`), a socket's has 10.
            packet_info: whether each packet comes with the 4-byte ``tun_pi`` header. Of a socket,
                and of an interface in a namespace that this program may not enter, this is
                believed.

        Raises:
            ValueError: the fd is not open, or does not keep packets apart; or no such `offload`, or
                `packet_info` together with one.
            DeviceMismatchError: a TUN or TAP queue that has a virtio-net header or packet
                information where `offload` and `packet_info` say it has none, or the other way
                round; or a virtio-net header of neither 10 nor 12 bytes.
            DeviceLostError: a TUN or TAP queue whose interface is gone.
            ResourceLimitError: no thread can be started, or no file descriptor is left to ask with.

        The end of a seqpacket or Unix socket is a `DeviceLostError`. An ICMP error that a connected
        UDP socket reports is raised once, as a `PacketError`, and the queue goes on.
        """
        check_offload(offload)
        interface, port = judge(fd, offload, packet_info)
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        return cls(fd, interface, port)

    # Receiving

    async def recv(self) -> bytes:
        free = self._free
        if free:
            read = self._read
            try:
                packet = read(self._fd, READ_SIZE)
            except OSError as error:
                self._refuse(error)
            else:
                self._free = free - 1
                return packet
        return await self._receive(take_one)

    async def __anext__(self) -> bytes:
        # As recv; calling it would cost every packet one coroutine more.
        free = self._free
        if free:
            read = self._read
            try:
                packet = read(self._fd, READ_SIZE)
            except OSError as error:
                self._refuse(error)
            else:
                self._free = free - 1
                return packet
        try:
            return await self._receive(take_one)
        except DeviceClosedError:
            raise StopAsyncIteration from None

    def recv_nowait(self) -> bytes:
        self.check_open()
        if self._somebody_waits():
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting for the next packet")
        return self.take(take_one)

    async def _receive(self, take: Callable[[PacketIO], T]) -> T:
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
        while not pool.free:
            loop = self._bind()
            pool.wake(self._parked)
            await Waiter(loop, self._parked)

    def take(self, take: Callable[[PacketIO], T]) -> T:
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

    def _take(self) -> bytes:
        packet = self._read(self._fd, READ_SIZE)
        free = self._free
        if free:
            self._free = free - 1
        else:
            self._spend(1)
        return packet

    def _take_into(self, octets: memoryview) -> int:
        length = self.port.read_into(self._fd, octets)
        self._spend(1)
        if length > octets.nbytes:
            self.port.counts.truncated += 1
            raise refusals.truncated(length, octets.nbytes, self._interface.name)
        return length

    def _take_many(self, limit: int) -> list[bytes]:
        # A batch may be larger than what is left of the budget, and never larger than a whole one.
        batch = self.port.read_many(self._fd, limit)
        taken = len(batch)
        if taken < limit:
            self._drained = True
        self._spend(taken)
        return batch

    def _take_run(self, pool: Pool, layout: Layout) -> Run:
        if not pool.free:
            raise NoBufferError
        port = self.port.for_runs()
        if port is not self.port:
            self.use(port)
        before, after, align, _, limit = layout
        # A packet is no longer than the MTU, and is not padded to be.
        most = (self._interface.mtu or 0) + (_ETHERNET_HEADER if port.format.mode == "tap" else 0)
        buffer = pool.free[-1]
        layout = Layout(before, after, align, most, limit)
        count, size, last, stride, drained = port.read_run(self._fd, buffer, layout)
        pool.free.pop()
        if drained:
            self._drained = True
        self._spend(count)
        return Run(buffer, before, stride, size, last, count, pool)

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

    async def send(self, packet: Buffer) -> None:
        if not self._resuming:  # else it is the right loop that has just resumed this task
            self._bind()
        if not self._senders:
            try:
                self._write(self._fd, packet)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._write_error(error) from error
            else:
                return
        await self._send_waiting(packet)

    def send_nowait(self, packet: Buffer) -> None:
        self.check_open()
        if self._senders:
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting to send before")
        try:
            self._write(self._fd, packet)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._write_error(error) from error

    def _send_at_once(self, packets: list[Buffer]) -> int:
        if self._senders or self._fd < 0:  # closed while `send_many` gave the loop a turn
            return 0
        return self.port.write_many(self._fd, packets)

    def _send_run_at_once(
        self, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> int:
        if self._senders or self._fd < 0:
            return 0
        return self.port.write_run(self._fd, buffer, start, stride, lengths)

    async def _send_waiting(self, packet: Buffer) -> None:
        loop = self._bind()
        ticket: int | None = None
        while True:
            self._watch.start_writing(self._fd, self._interface)
            waiter = Waiter(loop, self._senders, ticket)
            ticket = waiter.ticket
            await waiter
            self.check_open()
            try:
                self._write(self._fd, packet)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._write_error(error) from error
            return

"""A queue: one file descriptor on one event loop. The hot path is here and nowhere else.

A packet comes in through `_take` (or straight in `recv`, which is the same in one frame less) and
goes out through `_write` (a list of them through `_write_many`). Everything else decides who may do
that, and when:

- `_receive` reads at once where nobody waits before the caller, else it waits in `_line`.
- `_readable`, called by the loop, resumes the tasks in line. While the one it resumed is the only
  one that wants packets, it has so many `_free`: to be read with no question asked. It is resumed
  again in the same call where the next packet comes at once.
- A send that finds the kernel's buffer full waits in `_senders` for `_writable`.

The reader stays registered with the loop between packets, and is taken off only when the fd is
readable and nobody waits: registering costs more than a wake-up.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self, TypeVar, cast

from . import _ioctl, _native
from ._abi import READ_SIZE, Iff
from ._interface import Interface
from ._packetio import Offload, PacketIO, check_offload, mode_of, read_into, take_one
from ._queuebase import BUDGET, QueueBase
from ._waiting import Waiter
from .errors import AiotunError, DeviceClosedError, DeviceMismatchError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ._several import QueueGroup

__all__ = ["Queue"]

T = TypeVar("T")


# Bound here: a global look-up is cheaper than an attribute of a module.
_read = _native.read
_read_many = _native.read_many
_write = os.write
_write_many = _native.write_many

# How often a queue looks whether the next packet is there already, which takes some 5 microseconds
# in all, and how often one call by the loop may resume a task so.
_LOOKS = 12
_TURNS = 16


class Queue(QueueBase):
    """One open file descriptor on an interface; `device.queues` has them.

    A queue and its device may be used at the same time. The kernel spreads flows over the queues,
    and sends a flow's packets to the queue that last sent one of that flow.
    """

    __slots__ = ()

    @classmethod
    def from_fd(cls, fd: int, offload: Offload = "off") -> Self:
        """Make a queue of an fd that another process opened, or of any that keeps boundaries.

        The fd becomes the queue's, non-blocking and close-on-exec; where this raises it is still
        the caller's.

        Args:
            fd: a TUN or TAP queue (inherited, or received by SCM_RIGHTS), or a datagram or
                seqpacket socket. The end of a seqpacket socket reads as empty packets.
            offload: ``"raw"`` or ``"split"`` where each packet has a virtio-net header.

        Raises:
            ValueError: not a number of an open fd, or no such `offload`.
            DeviceMismatchError: a TUN or TAP queue that has a virtio-net header where `offload`
                says it has none, or the other way round.
            DeviceLostError: a TUN or TAP queue whose interface is gone.
        """
        check_offload(offload)
        try:
            os.fstat(fd)
        except OSError as error:
            raise ValueError(f"{fd} is not an open file descriptor") from error
        name, flags = f"fd {fd}", Iff.TUN
        try:
            name, flags = _ioctl.get_flags(fd)
        except AiotunError:
            raise
        except OSError:
            pass  # no TUN device, and that is allowed here
        else:
            has_header = bool(flags & Iff.VNET_HDR)
            if has_header != (offload != "off"):
                what = "a" if has_header else "no"
                text = (
                    f"{name} has {what} virtio-net header, so offload={offload!r} does not fit it"
                )
                raise DeviceMismatchError(errno.EINVAL, text, name)
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)
        kind = cls.kind_for(offload)
        return kind(fd, Interface(name), mode_of(flags), offload=offload)

    @classmethod
    def kind_for(cls, offload: Offload) -> type[Self]:
        """Internal: the class of queues with this offload."""
        if offload != "off":
            _native.keep_freed_memory()
        if offload != "split":
            return cls
        from ._split import SplitQueue

        return cast("type[Self]", SplitQueue)

    # Receiving

    async def recv(self) -> bytes:
        free = self._free
        if free:
            try:
                packet = _read(self._fd, READ_SIZE)
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
            try:
                packet = _read(self._fd, READ_SIZE)
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
        self._check_open()
        if self._somebody_waits():
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting for the next packet")
        try:
            return self._take()
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._read_error(error) from error

    async def _receive(self, take: Callable[[PacketIO], T]) -> T:
        loop = self._loop if self._resuming else None
        if loop is None:
            loop = self._bind()
        front = False
        wait = self._drained or self._budget + self._free <= 0 or self._somebody_waits()
        while True:
            if wait:
                self.end_free()
                if not self._reading:
                    self._start_reading()
                await Waiter(loop, self._line, front=front)
                # No await from here on: what is read is returned.
                if self._fd < 0 or self._lost is not None:
                    self._check_open()
                front = True  # in vain only where somebody else was quicker, another process say
            try:
                return take(self)
            except OSError as error:
                self._refuse(error)
                wait = True

    def _refuse(self, error: OSError) -> None:
        """Note that the fd is empty; raise what any other error means."""
        if isinstance(error, BlockingIOError):
            self._drained = True
        elif isinstance(error, AiotunError):
            raise error
        else:
            raise self._read_error(error) from error

    def _take(self) -> bytes:
        packet = _read(self._fd, READ_SIZE)
        if self._free:
            self._free -= 1
        else:
            self._budget -= 1
        return packet

    def _spend(self, packets: int) -> None:
        # A batch may be larger than what was left.
        free = min(self._free, packets)
        self._free -= free
        self._budget -= packets - free

    def _take_into(self, view: memoryview) -> int:
        length = read_into(self._fd, view)
        self._spend(1)
        return self._check_fits(length, view)

    def _check_fits(self, length: int, view: memoryview) -> int:
        if length > view.nbytes:
            raise self._truncation(length, view.nbytes)
        return length

    def _take_many(self, limit: int) -> list[bytes]:
        batch = _read_many(self._fd, READ_SIZE, limit)
        taken = len(batch)
        if taken < limit:
            self._drained = True
        self._spend(taken)
        return batch

    def _readable(self) -> None:
        """The loop's reader callback: resume those who wait, in order, while there are packets."""
        group = self._peers()
        if len(self._line) == 1 and (group is None or not group.line):
            self._serve_one(group)
        else:
            self._serve_many(group)

    def _serve_one(self, group: QueueGroup | None) -> None:
        """Resume the only task that waits, again and again while that is worth it.

        To find that there is no second packet costs as much as to read one. So where packets come
        one by one, one is all that the task may read; then it waits again.

        And where the next one comes at once, as in a dialogue, going to sleep costs more than to
        look around for it. So we look a few times before the loop does, where that paid the last
        time, and else at every sixteenth wake-up, to see whether it would.
        """
        line = self._line
        self._wakeups += 1
        look = self._looking or self._wakeups % 16 == 0
        left = BUDGET
        free = BUDGET if self._burst else 1
        self._resuming = True
        try:
            for _ in range(_TURNS):
                self._drained = False
                self._budget, self._free = 0, free
                if group is not None:
                    group.resuming = self
                line.popleft().wake()
                taken = free - self._free - self._budget
                left -= taken
                self._burst = taken > 1
                if not look or not taken or left <= 0 or len(line) != 1 or (group and group.line):
                    break
                looks = self._look()
                self._looking = look = looks > 0
                if not look:
                    break
                self._burst |= looks == 1
                free = left if self._burst else 1
        finally:
            self._resuming = False
            self._free = 0
            self._budget = left

    def _look(self) -> int:
        """Whether there is a packet soon: the number of looks that it took, or 0."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)
        poll = self._poll.poll
        for looks in range(1, _LOOKS + 1):
            if poll(0):
                return looks
        return 0

    def _serve_many(self, group: QueueGroup | None) -> None:
        self._drained = False
        waiting = len(self._line) + (len(group.line) if group is not None else 0)
        self._budget = BUDGET
        if not waiting:
            self._stop_reading()
            if group is not None:
                group.unwatch(self)
            return
        try:
            # Once each who waits now; who comes back in the meantime waits for the next call.
            for _ in range(min(waiting, BUDGET)):
                if self._drained or self._fd < 0:
                    break
                if group is not None and group.comes_before(self._line):
                    group.resume(self)
                elif self._line:
                    waiter = self._line.popleft()
                    self._free = 0 if self._somebody_waits() else BUDGET
                    self._budget = BUDGET - self._free
                    if group is not None:
                        group.resuming = self
                    self._resuming = True
                    waiter.wake()
                    self._resuming = False
        finally:
            self._resuming = False
            self.end_free()

    def end_free(self) -> None:
        """Have every further packet of this wake-up ask whether somebody waits for it."""
        self._budget += self._free
        self._free = 0

    def _somebody_waits(self) -> bool:
        if self._line:
            return True
        group = self._peers()
        return group is not None and bool(group.line)

    # Sending

    async def send(self, packet: Buffer) -> None:
        if not self._resuming:  # else it is the right loop that has just resumed this task
            self._bind()
        if not self._senders:
            try:
                _write(self._fd, packet)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._write_error(error) from error
            else:
                return
        await self._send_waiting(packet)

    async def send_many(self, packets: Iterable[Buffer]) -> int:
        sent = 0
        write: Callable[[int, Buffer], object] = _write
        senders = self._senders
        try:
            self._bind()
            if type(packets) is list and not senders:
                # What goes without further ado; the rest meets below whatever is in its way.
                sent = _write_many(self._fd, packets)
                if sent == len(packets):
                    return sent
                packets = packets[sent:]
            for packet in packets:
                if not senders:
                    try:
                        write(self._fd, packet)
                    except BlockingIOError:
                        pass
                    except OSError as error:
                        raise self._write_error(error) from error
                    else:
                        sent += 1
                        continue
                await self._send_waiting(packet)
                sent += 1
                write = self._put  # capturing may have begun meanwhile, or ended
        except BaseException as error:
            error.sent = sent  # type: ignore[attr-defined]  # promised on foreign classes, too
            raise
        return sent

    def send_nowait(self, packet: Buffer) -> None:
        self._check_open()
        if self._senders:
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting to send before")
        try:
            _write(self._fd, packet)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._write_error(error) from error

    async def _send_waiting(self, packet: Buffer) -> None:
        loop = self._bind()
        front = False
        while True:
            self._start_writing()
            await Waiter(loop, self._senders, front=front)
            self._check_open()
            try:
                self._put(self._fd, packet)
            except BlockingIOError:
                self._full = front = True
            except OSError as error:
                raise self._write_error(error) from error
            else:
                return

    def _put(self, fd: int, packet: Buffer) -> None:
        """Write a packet that had to wait; looked up when its turn comes, for capturing's sake."""
        _write(fd, packet)

    def _writable(self) -> None:
        """The loop's writer callback: resume those who wait to send, until one has to wait on."""
        self._full = False
        for _ in range(min(len(self._senders), BUDGET)):
            if self._full or not self._senders:
                break
            self._senders.popleft().wake()
        if not self._senders:
            # A queue is nearly always writable: watched for nobody it would spin.
            self._stop_writing()

    # Queueing in the kernel

    def disable(self) -> None:
        """Stop the kernel choosing this queue (TUNSETQUEUE, IFF_DETACH_QUEUE).

        Packets that wait in it are dropped by the kernel. A task that waits here goes on waiting.

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or it is disabled already.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._set_enabled(False)

    def enable(self) -> None:
        """Let the kernel choose this queue again (TUNSETQUEUE, IFF_ATTACH_QUEUE).

        Raises:
            DeviceMismatchError: the device was not opened multi-queue, or it is enabled already.
            DeviceClosedError, DeviceLostError: as `recv`.
        """
        self._set_enabled(True)

    def _set_enabled(self, on: bool) -> None:
        self._check_open()
        _ioctl.set_queue(self._fd, self._interface.name, on)
        self._disabled = not on
        if (group := self._peers()) is not None:
            group.choose_anew()

    @property
    def disabled(self) -> bool:
        """Whether `disable` took this queue out of the kernel's choice."""
        return self._disabled

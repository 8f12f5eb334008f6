"""A queue: one file descriptor on one event loop, and the packets that pass through it.

A packet comes in through `_take` (or straight in `recv`, which does the same in one frame less) and
goes out in `send` (a list of them in `_send_at_once`). What is read and written, and how, is the
port's business. Who may do that, and when, is decided in `_queue/serving.py`.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from ._kernel.abi import READ_SIZE
from ._kernel.limits import naming_limits
from ._kernel.words import Offload, check_offload
from ._packets.runs import Layout, Pool, Run
from ._queue import refusals
from ._queue.packetio import take_one
from ._queue.queuebase import QueueBase
from ._queue.runio import NoBufferError, padded_to
from .errors import DeviceClosedError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Queue"]

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

        Of a socket's message that is longer than 65,581 bytes, which no packet is, the rest is lost.

        The end of a seqpacket or Unix socket is a `DeviceLostError`. An ICMP error that a connected
        UDP socket reports is raised once, as a `PacketError`, and the queue goes on.
        """
        check_offload(offload)
        with naming_limits():  # even an import needs a file descriptor
            from ._queue.judging import judge
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
        # A packet is no longer than the MTU, and is not padded to be.
        most = (self._interface.mtu or 0) + (_ETHERNET_HEADER if port.format.mode == "tap" else 0)
        buffer = pool.free[-1]
        count, size, last, stride, drained = port.read_run(
            self._fd, buffer, padded_to(layout, most)
        )
        pool.free.pop()
        if drained or not self._ahead.another():
            self._drained = True
        self._spend(count)
        return Run(buffer, layout.before, stride, size, last, count, pool)

    # Sending

    async def send(self, packet: Buffer) -> None:
        if not self.ready:
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
        # Not a lambda: every send would make a cell for its variables, also where none waits.
        await self._send_waiting(functools.partial(self._put, packet))

    def send_nowait(self, packet: Buffer) -> None:
        self.check_open()
        if self._senders:
            raise BlockingIOError(errno.EAGAIN, "a task has been waiting to send before")
        self._put(packet)

    def _put(self, packet: Buffer) -> None:
        try:
            self._write(self._fd, packet)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._write_error(error) from error

    def _send_at_once(self, packets: list[Buffer]) -> Sequence[int]:
        if self._senders or self._fd < 0:  # closed while `send_many` gave the loop a turn
            return range(len(packets))
        return self.port.write_many(self._fd, packets)

    def _send_run_at_once(
        self, buffer: memoryview, start: int, stride: int, lengths: list[int]
    ) -> Sequence[int]:
        if self._senders or self._fd < 0:
            return range(len(lengths))
        return self.port.write_run(self._fd, buffer, start, stride, lengths)

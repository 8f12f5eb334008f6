"""One flow of datagrams: its queue of datagrams to receive, and the object its handler gets."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from ..errors import DeviceClosedError
from .addresses import Address, address, end

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Flow", "Sender", "UdpFlow"]

T = TypeVar("T")

# Roughly the memory that a queued datagram takes in addition to its data. Counting it bounds a
# flood of empty datagrams, too.
OVERHEAD = 256

Item = tuple[bytes, bytes]
"""A datagram, and the end that it was sent to."""


class Sender(Protocol):
    """Where a flow's answers go.

    Attributes:
        queued: the bytes in the queues of all its flows.
    """

    queued: int

    def send(self, flow: Flow, source: bytes, data: bytes) -> None:
        """Send a datagram to the flow's peer, from this end; see `Injector.send`."""

    async def room(self) -> None:
        """Wait until there may be room to send."""

    def end(self, flow: Flow) -> None:
        """End a flow because its handler closed it."""


class Flow:
    """A flow as the table keeps it; `UdpFlow` is its public interface.

    Attributes:
        key: its place in the table.
        local: the end that its first datagram was sent to.
        peer: the end that sent it.
        first: the packet of the first datagram, until the flow is admitted.
        admitted: whether it has a handler.
        ended: whether it was closed, has expired, or was closed to make room for another.
        task: the question to `admit`, while it is open.
        line, since: its place among the flows in the order of their last datagrams, and that time.
        dns: whether all its datagrams so far were for port 53.
    """

    __slots__ = (
        "_waiters",
        "admitted",
        "bytes",
        "dns",
        "ended",
        "first",
        "key",
        "line",
        "local",
        "peer",
        "queue",
        "sender",
        "since",
        "task",
    )

    def __init__(
        self,
        sender: Sender,
        key: bytes,
        peer: bytes,
        local: bytes,
        first: bytes,
        line: OrderedDict[bytes, Flow],
    ) -> None:
        self.sender: Sender = sender
        self.key: bytes = key
        self.peer: bytes = peer
        self.local: bytes = local
        self.first: bytes = first
        self.line: OrderedDict[bytes, Flow] = line
        self.since: float = 0.0
        self.dns: bool = True
        self.admitted: bool = False
        self.ended: bool = False
        self.task: asyncio.Future[Any] | None = None
        self.queue: deque[Item] = deque()
        self.bytes: int = 0  # in the queue
        self._waiters: deque[asyncio.Future[None]] = deque()

    def put(self, item: Item) -> None:
        """Add a datagram to the queue, and wake one task that waits for it."""
        size = len(item[0]) + OVERHEAD
        self.queue.append(item)
        self.bytes += size
        self.sender.queued += size
        self._wake()

    def take(self) -> Item:
        """Take the oldest datagram; there must be one."""
        item = self.queue.popleft()
        size = len(item[0]) + OVERHEAD
        self.bytes -= size
        self.sender.queued -= size
        return item

    async def wait(self) -> None:
        """Wait until there may be a datagram.

        Raises:
            DeviceClosedError: the flow has ended.
        """
        self.check_open()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            # The future carries no datagram, so none is lost. The wake-up must not be lost either.
            if waiter.done() and not waiter.cancelled() and self.queue:
                self._wake()
            raise

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break

    def finish(self) -> int:
        """End the flow: wake the tasks that wait, drop the queue, and return how many it held."""
        self.ended = True
        dropped = len(self.queue)
        self.queue.clear()
        self.sender.queued -= self.bytes
        self.bytes = 0
        for waiter in self._waiters:
            if not waiter.done() and not waiter.get_loop().is_closed():
                waiter.set_result(None)
        self._waiters.clear()
        return dropped

    def check_open(self) -> None:
        """Raise DeviceClosedError if the flow has ended."""
        if self.ended:
            peer, port = address(self.peer)
            raise DeviceClosedError(
                f"the flow of {peer} port {port} was closed or has expired; the client's next "
                "datagram begins another flow"
            )


class UdpFlow(Generic[T]):
    """The datagrams of one client, as `intercept_udp` gives them to its handler.

    With ``per="flow"`` a flow has the datagrams from one client's address and port to one address
    and port, and `recv` returns `bytes`. With ``per="client"`` a flow has all datagrams from one
    client's address and port, and `recv` returns a tuple: the data, and the address and port that
    it was sent to.

    A flow ends when it is closed, has been idle for too long, is closed to make room for another,
    or when the server or the stack is closed. With ``per="flow"`` it also ends when the client's
    host reports that no socket has the client's port any more. Datagrams that were not received
    until then are dropped and counted. If the client sends again, that begins another flow.

    *Cancellation*: a cancelled call loses no datagram.

    *Concurrency*: belongs to the stack's event loop. Calls may overlap; each datagram goes to one
    receiver.
    """

    __slots__ = ("_flow", "_pick")

    def __init__(self, flow: Flow, pick: Callable[[Item], T]) -> None:
        # Internal: intercept_udp makes them.
        self._flow = flow
        self._pick = pick

    @property
    def local(self) -> Address:
        """The address and port that the client sent its first datagram to."""
        return address(self._flow.local)

    @property
    def peer(self) -> Address:
        """The client's address and port."""
        return address(self._flow.peer)

    @property
    def closed(self) -> bool:
        """Whether the flow has ended."""
        return self._flow.ended

    async def recv(self) -> T:
        """Receive one datagram, waiting until there is one.

        Returns:
            The data; with ``per="client"`` the data, and the address and port it was sent to. A
            datagram may be empty.

        Raises:
            DeviceClosedError: the flow has ended, before or while waiting.

        *Cancellation*: loses no datagram.
        """
        flow = self._flow
        while not flow.queue:
            await flow.wait()
        return self._pick(flow.take())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.recv()
        except DeviceClosedError:
            raise StopAsyncIteration from None

    def send_nowait(self, data: Buffer, source: tuple[Any, ...] | None = None) -> None:
        """Send the client a datagram, at once.

        Args:
            data: up to 65,507 bytes (IPv6: 65,527). A datagram larger than the MTU is fragmented.
            source: the sender that the client sees: any host's address, of the flow's IP version,
                and any port, in a tuple as `socket.recvfrom` returns it. None means `local`.

        Raises:
            BlockingIOError: there is no room for the datagram; see `send`.
            DeviceClosedError: the flow has ended.
            LinkDownError: the stack's device is down.
            PacketError: there is too much data (EMSGSIZE).
            ValueError: `source` is not a valid address and port for this flow.
        """
        flow = self._flow
        flow.check_open()
        if source is None:
            sender = flow.local
        else:
            sender = end(source[0], source[1], 4 if len(flow.peer) == 6 else 6)
        octets = data if type(data) is bytes else bytes(memoryview(data))
        flow.sender.send(flow, sender, octets)

    async def send(self, data: Buffer, source: tuple[Any, ...] | None = None) -> None:
        """Send the client a datagram.

        This waits only if a traffic shaper (``tc``) holds back the packets that leave the stack. As
        always with UDP, the program does not learn whether the datagram arrives.

        Args:
            data, source: as for `send_nowait`.

        Raises:
            DeviceClosedError, LinkDownError, PacketError, ValueError: as `send_nowait`.

        *Cancellation*: the datagram was not sent.
        """
        while True:
            try:
                return self.send_nowait(data, source)
            except BlockingIOError:
                await self._flow.sender.room()

    def close(self) -> None:
        """End the flow. Idempotent."""
        self._flow.sender.end(self._flow)

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<UdpFlow {self.peer} to {self.local}{state}>"

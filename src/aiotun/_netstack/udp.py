"""The table of UDP flows: which datagram belongs to which flow, and when a flow ends.

Intercepted datagrams bypass the kernel. They are taken out of the packets that the program sends to
the TUN device, and answers are packets that are made here (`Injector`). That is faster than sockets
are, and needs neither nf_tables nor a descriptor for each flow or port. An answer can come from any
address and port; a socket could answer only from the port that it is bound to. And ICMP errors can
quote the client's own packet.

This code runs inside the call that sends a packet to the device. The program's functions must not
run inside that call, so the loop calls them in its next turn.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import inspect
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .._packets.ipheader import IPHeader
from .._packets.udp import MAX_DATA, build, parse, quoted
from ..errors import PacketError
from .addresses import Address, address, unicast
from .answers import Refusal, unreachable
from .asking import ask, report, result_of
from .flows import Flow, Item, UdpFlow

if TYPE_CHECKING:
    from .counts import Counts
    from .injector import Injector

__all__ = ["Admit", "OnFlow", "UdpInterceptor"]

Admit = Callable[[Address, Address], Any]
OnFlow = Callable[[UdpFlow[Any]], Awaitable[None] | None]

# How many bytes may wait to be received: in one flow, about as much as a socket's default buffer
# holds, and in all flows.
_FLOW_BYTES = 256 * 1024
_ALL_BYTES = 64 * 1024 * 1024

_DNS = (53).to_bytes(2, "big")

# How many seconds after an answer from port 53 a flow of nothing but DNS ends. Not at once: a
# resolver asks for IPv4 and IPv6 addresses at the same time, so another answer may follow.
_DNS_IDLE = 5.0


class UdpInterceptor:
    """Gives datagrams to flows, and each new flow to a handler.

    Invariants, which the tests assert after each packet and each call of the timer:

    - A flow that has not ended is in the table and in one of the two lines, and no other flow is.
    - `queued` is the sum of the bytes in the queues of these flows.
    - A timer is set while there are flows, unless none of them expires. It may be early.

    Attributes:
        queued: the bytes that wait in all flows.
    """

    def __init__(
        self,
        own: frozenset[bytes],
        counts: Counts,
        injector: Injector,
        on_flow: OnFlow,
        *,
        per_client: bool,
        admit: Admit | None,
        idle: float,
        max_flows: int,
    ) -> None:
        self.queued = 0
        self._own = own
        self._counts = counts
        self._injector = injector
        self._on_flow = on_flow
        self._per_client = per_client
        self._admit = admit
        self._most = max_flows
        self._loop = asyncio.get_running_loop()
        # Handlers run in the context of the call to intercept_udp, not in that of the task that
        # happens to send a packet.
        self._context = contextvars.copy_context()
        self._flows: dict[bytes, Flow] = {}
        # The flows in the order of their last datagrams. There is one line for each idle time, so
        # that the first flow of a line is the first to expire.
        self._line: OrderedDict[bytes, Flow] = OrderedDict()
        self._dns_line: OrderedDict[bytes, Flow] = OrderedDict()
        self._idle = ((self._dns_line, min(idle, _DNS_IDLE)), (self._line, idle))
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._asking: set[asyncio.Future[Any]] = set()
        self._handlers: set[asyncio.Future[Any]] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    # Packets from clients

    def take(self, packet: bytes, checked: bool = False) -> bool:
        """Take a datagram; return False if the packet is for the kernel instead.

        Args:
            packet: a whole IP packet, not a fragment.
            checked: as for `parse`.
        """
        parsed = parse(packet, checked)
        if parsed is None or self._closed:
            return False
        peer, local, data = parsed
        key = peer if self._per_client else peer + local
        flow = self._flows.get(key)
        if flow is None or self._per_client:
            if not self._is_foreign(local) or not self._is_foreign(peer):
                return False
            if flow is None:
                flow = self._begin(key, peer, local, packet)
                if flow is None:
                    return True
        if flow.bytes >= _FLOW_BYTES or self.queued >= _ALL_BYTES:
            self._counts.datagrams_dropped += 1
            return True
        if flow.dns and local[-2:] != _DNS:
            flow.dns = False
        flow.put((data, local))
        self._touch(flow, self._line)
        return True

    def take_error(self, packet: bytes) -> bool:
        """Take an ICMP error, and return whether it is about a datagram of a flow."""
        error = quoted(packet)
        if error is None or self._closed:
            return False
        flow = self._flows.get(error.target if self._per_client else error.target + error.source)
        if flow is None or not flow.admitted:
            return False
        if error.mtu:
            self._injector.limit(error.target[:-2], error.mtu)
        elif error.port_unreachable:
            self._counts.flows_unreachable += 1
            # No socket accepts the datagram at the client's port. With one flow for each client,
            # the flow goes on: the client may refuse datagrams from one host only, as a connected
            # socket does, and still receive those from others.
            if not self._per_client:
                self.end(flow)
        return True

    def _is_foreign(self, end: bytes) -> bool:
        packed = end[:-2]
        return packed not in self._own and unicast(packed)

    # The beginning of a flow

    def _begin(self, key: bytes, peer: bytes, local: bytes, packet: bytes) -> Flow | None:
        # Handlers may go on after their flows have ended; bound their number, too.
        if len(self._handlers) >= 2 * self._most:
            self._counts.flows_refused += 1
            self._counts.packets_refused += 1
            return None
        if len(self._flows) >= self._most:
            self._counts.flows_displaced += 1
            line = self._dns_line or self._line
            self.end(next(iter(line.values())))
        flow = Flow(self, key, peer, local, packet, self._line)
        flow.since = self._loop.time()
        self._flows[key] = self._line[key] = flow
        self._loop.call_soon(self._start, flow, context=self._context)
        return flow

    def _start(self, flow: Flow) -> None:
        if flow.ended:
            return
        admit = self._admit
        if admit is None:
            self._decided(flow, True)
            return
        local, peer = address(flow.local), address(flow.peer)
        task = ask("admit", lambda: admit(local, peer), lambda got: self._decided(flow, got))
        if task is not None:
            flow.task = task
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    def _decided(self, flow: Flow, answer: bool | Refusal) -> None:
        flow.task = None
        if flow.ended:
            return
        if answer is not True:
            self._counts.flows_refused += 1
            self._counts.packets_refused += self._remove(flow)
            refusal = answer if isinstance(answer, Refusal) else None
            self._injector.try_send(unreachable(flow.first, IPHeader(flow.first), refusal))
            return
        flow.first = b""
        flow.admitted = True
        self._counts.flows_open += 1
        self._counts.flows_accepted += 1
        face = UdpFlow(flow, _with_local if self._per_client else _data_only)
        try:
            handling = self._on_flow(face)
        except Exception as error:  # noqa: BLE001 - as above
            report("on_flow", error)
            self.end(flow)
            return
        if inspect.isawaitable(handling):
            task = asyncio.ensure_future(handling)
            self._handlers.add(task)
            task.add_done_callback(lambda done: self._handled(flow, done))

    def _handled(self, flow: Flow, done: asyncio.Future[Any]) -> None:
        self._handlers.discard(done)
        result_of("on_flow", done, None)  # an error is reported
        self.end(flow)

    # Answers; see `flows.Sender`

    def send(self, flow: Flow, source: bytes, data: bytes) -> None:
        if len(data) > MAX_DATA[4 if len(source) == 6 else 6]:
            raise _too_long(len(data))
        injector = self._injector
        injector.send(build(source, flow.peer, data, injector.next_ident()))
        dns = flow.dns and source[-2:] == _DNS
        self._touch(flow, self._dns_line if dns else self._line)

    async def room(self) -> None:
        await self._injector.room()

    # The end of a flow

    def _touch(self, flow: Flow, line: OrderedDict[bytes, Flow]) -> None:
        """Note that a datagram was received or sent, and move the flow to the end of a line."""
        flow.since = self._loop.time()
        if flow.line is line:
            line.move_to_end(flow.key)
        else:
            del flow.line[flow.key]
            flow.line = line
            line[flow.key] = flow
        if self._timer is None or line is self._dns_line:
            self._set_timer()

    def _set_timer(self) -> None:
        due = min(
            (next(iter(line.values())).since + idle for line, idle in self._idle if line),
            default=float("inf"),
        )
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
            self._timer = None
        if due != float("inf"):
            self._timer = self._loop.call_at(due, self._expire)
            self._timer_at = due

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        for line, idle in self._idle:
            while line:
                flow = next(iter(line.values()))
                if flow.since + idle > now:
                    break
                self._counts.flows_expired += 1
                self.end(flow)
        self._set_timer()

    def end(self, flow: Flow) -> None:
        if flow.ended:
            return
        self._counts.flows_open -= flow.admitted
        self._counts.datagrams_dropped += self._remove(flow)
        if flow.task is not None and not self._loop.is_closed():
            flow.task.cancel()

    def _remove(self, flow: Flow) -> int:
        """Take a flow out of the table; return how many datagrams were still in its queue."""
        del self._flows[flow.key]
        del flow.line[flow.key]
        return flow.finish()

    def close(self) -> None:
        """End all flows. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for flow in [*self._flows.values()]:
            self.end(flow)

    async def wait_closed(self) -> None:
        """Wait until no call of `admit` is under way. This does not wait for handlers."""
        while self._asking:
            await asyncio.wait([*self._asking])


def _data_only(item: Item) -> bytes:
    return item[0]


def _with_local(item: Item) -> tuple[bytes, Address]:
    return item[0], address(item[1])


def _too_long(size: int) -> PacketError:
    text = f"a datagram of {size} bytes is too long; send at most 65507 bytes"
    return PacketError(errno.EMSGSIZE, text)

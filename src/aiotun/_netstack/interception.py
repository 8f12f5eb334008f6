"""Interception of datagrams and pings: the part of `Netstack` that needs no socket."""

from __future__ import annotations

import abc
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, overload

from .addresses import Address
from .core import spare_descriptors
from .flows import UdpFlow
from .pings import OnPing, PingInterceptor
from .server import Server
from .udp import Admit, UdpInterceptor

if TYPE_CHECKING:
    from .core import Core
    from .server import Interceptor

__all__ = ["DatagramInterception", "Per"]

Per = Literal["flow", "client"]

_PER: tuple[Per, ...] = ("flow", "client")


def _check(on_flow: object, admit: object, per: object, idle: object, max_flows: object) -> None:
    """Check the arguments of `intercept_udp`."""
    if not callable(on_flow) or not (admit is None or callable(admit)):
        raise TypeError(f"on_flow and admit must be functions, got {on_flow!r} and {admit!r}")
    if per not in _PER:
        raise ValueError(f"per must be 'flow' or 'client', got {per!r}")
    if not isinstance(idle, int | float) or math.isnan(idle) or idle <= 0:
        raise ValueError(f"idle must be a positive number of seconds, got {idle!r}")
    if not isinstance(max_flows, int) or max_flows < 1:
        raise ValueError(f"max_flows must be an int of at least 1, got {max_flows!r}")


class DatagramInterception(abc.ABC):
    """See `Netstack`."""

    _core: Core

    @abc.abstractmethod
    def _check_intercepting(self, what: str, kind: type[Interceptor]) -> None:
        """Raise RuntimeError or DeviceClosedError if this can't be intercepted now."""

    @abc.abstractmethod
    def _remember(self, server: Server) -> None:
        """Close the server with the stack."""

    def _serve(self, interceptor: Interceptor) -> Server:
        server = Server(interceptor)
        self._remember(server)
        return server

    @overload
    async def intercept_udp(
        self,
        on_flow: Callable[[UdpFlow[bytes]], Awaitable[None] | None],
        *,
        per: Literal["flow"] = ...,
        admit: Admit | None = ...,
        idle: float = ...,
        max_flows: int = ...,
    ) -> Server: ...
    @overload
    async def intercept_udp(
        self,
        on_flow: Callable[[UdpFlow[tuple[bytes, Address]]], Awaitable[None] | None],
        *,
        per: Literal["client"],
        admit: Admit | None = ...,
        idle: float = ...,
        max_flows: int = ...,
    ) -> Server: ...
    async def intercept_udp(
        self,
        on_flow: Callable[[UdpFlow[Any]], Awaitable[None] | None],
        *,
        per: Per = "flow",
        admit: Admit | None = None,
        idle: float = 60.0,
        max_flows: int = 4096,
    ) -> Server:
        """Receive every UDP datagram to an address that is not the stack's own.

        ::

            async def echo(flow):
                async for data in flow:
                    await flow.send(data)

            server = await stack.intercept_udp(echo)

        Datagrams to any unicast address and any port are received, but not multicast and broadcast.

        Args:
            on_flow: called with a `UdpFlow` for each new flow; plain or async. When an async
                function returns, the flow is closed. When a plain function returns, the flow stays
                open. If it raises, the error goes to the loop's exception handler, and the flow is
                closed.
            per: what belongs to one flow. ``"flow"``: the datagrams from one client's address and
                port to one address and port. ``"client"``: all datagrams from one client's address
                and port, to any destination. With this a program can be a *full cone* NAT, as STUN,
                games and torrents need it: each flow gets one socket outside, and the client gets
                the datagrams that any host sends to that socket.
            admit: decides about each flow, plain or async. It is called as ``admit(local, peer)``
                with two tuples of address and port when the first datagram comes. The flow's
                datagrams wait for the decision. True accepts the flow. False refuses it (the
                client's socket raises ECONNREFUSED), and a `Refusal` with another ICMP error.
            idle: after how many seconds without a datagram a flow ends. A flow with nothing but
                port 53 (DNS) ends 5 seconds after its last answer, if that is sooner.
            max_flows: how many flows may be open at once. The limit is at most half the number of
                descriptors that the program may have (RLIMIT_NOFILE), because a flow that is passed
                on takes one. To make room for another, the flow that was idle for longest ends.

        Returns:
            A server. Closing it ends all flows. Closing the stack closes it, too.

        Raises:
            TypeError, ValueError: an argument is invalid.
            RuntimeError: the stack was opened without ``intercept=True``, or already intercepts
                UDP.
            DeviceClosedError: the stack was closed.
            OSError, LinkError: the kernel has no packet sockets, or no descriptor is left.

        *Cancellation*: nothing is intercepted.

        *Concurrency*: one server at a time.

        A flow holds up to 256 KiB of datagrams that were not received yet, and all flows together
        64 MiB. More datagrams are dropped, and counted in `stats`.
        """
        _check(on_flow, admit, per, idle, max_flows)
        self._check_intercepting("UDP", UdpInterceptor)
        intake = self._core.intake
        injector = await intake.injector(self._core.namespace, self._core.tun)
        self._check_intercepting("UDP", UdpInterceptor)  # another call may have run meanwhile
        intake.udp = UdpInterceptor(
            self._core.own,
            self._core.counts,
            injector,
            on_flow,
            per_client=per == "client",
            admit=admit,
            idle=float(idle),
            max_flows=min(max_flows, max(spare_descriptors() // 2, 1)),
        )
        return self._serve(intake.udp)

    async def intercept_ping(self, on_ping: OnPing) -> Server:
        """Decide which echo requests (pings) to addresses other than the stack's own are answered.

        Without this the kernel answers all of them, or none if the stack was opened with
        ``answer_pings=False``.

        Args:
            on_ping: called with a `Ping` for each request; plain or async. When it returns True,
                the stack sends the reply. False means no answer, and a `Refusal` an ICMP error. If
                it raises, the error goes to the loop's exception handler, and there is no answer.
                At most 256 requests wait for a decision; more are dropped and counted.

        Returns:
            A server. Closing the stack closes it, too.

        Raises:
            TypeError: `on_ping` is not a function.
            RuntimeError: the stack was opened without ``intercept=True``, or already intercepts
                pings.
            DeviceClosedError: the stack was closed.
            OSError, LinkError: the kernel has no packet sockets, or no descriptor is left.

        *Cancellation*: nothing is intercepted.

        *Concurrency*: one server at a time.
        """
        if not callable(on_ping):
            raise TypeError(f"on_ping must be a function, got {on_ping!r}")
        self._check_intercepting("pings", PingInterceptor)
        intake = self._core.intake
        injector = await intake.injector(self._core.namespace, self._core.tun)
        self._check_intercepting("pings", PingInterceptor)
        intake.pings = PingInterceptor(self._core.own, self._core.counts, injector, on_ping)
        return self._serve(intake.pings)

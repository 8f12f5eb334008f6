"""The kernel of a private network namespace as a TCP/IP stack for the program's own packets."""

from __future__ import annotations

import asyncio
import dataclasses
import socket as sockets
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from ._kernel.once import Once
from ._kernel.words import Offload
from ._link.values import AddressArg, Route, RouteArg
from ._netstack import closing, opening
from ._netstack.admission import Admit
from ._netstack.answers import Refusal
from ._netstack.core import spare_descriptors
from ._netstack.flows import UdpFlow
from ._netstack.interception import DatagramInterception
from ._netstack.pings import Ping
from ._netstack.pipe import PipeStats, pipe
from ._netstack.relay import RelayCounts, RelayStats, relay
from ._netstack.server import Server
from ._netstack.tcp import ClientHandler, TcpInterceptor
from .device import TunDevice
from .errors import DeviceClosedError
from .namespaces import Namespace

if TYPE_CHECKING:
    from types import TracebackType

    from ._namespaces.connections import Servers
    from ._netstack.opening import Options, Prepared

__all__ = [
    "Netstack",
    "NetstackOpener",
    "NetstackStats",
    "Ping",
    "PipeStats",
    "Refusal",
    "RelayCounts",
    "RelayStats",
    "Server",
    "UdpFlow",
    "open_netstack",
    "pipe",
    "relay",
]

P = TypeVar("P", bound=asyncio.BaseProtocol)

_BACKLOG_MAX = 2**31 - 1  # listen(2) takes an int; the kernel then limits it to `somaxconn`


@dataclasses.dataclass(frozen=True, slots=True)
class NetstackStats:
    """What a stack has counted since it was opened, and what is open now.

    ``await stack.tun.link.stats()`` returns the kernel's own counters for packets.
    """

    connections_open: int = 0
    """TCP connections that `intercept_tcp` accepted and that have not ended."""
    connections_accepted: int = 0
    """TCP connections that `intercept_tcp` accepted."""
    connections_refused: int = 0
    """TCP connections that were refused: by `admit`, or because a limit was reached."""
    connections_expired: int = 0
    """TCP connections whose client went away while `admit` was asked."""
    flows_open: int = 0
    """UDP flows that are open."""
    flows_accepted: int = 0
    """UDP flows that `intercept_udp` gave to its function."""
    flows_refused: int = 0
    """UDP flows that were refused: by `admit`, or because a limit was reached."""
    flows_expired: int = 0
    """UDP flows that were closed because nothing came or went for a while."""
    flows_displaced: int = 0
    """UDP flows that were closed to make room for others."""
    flows_unreachable: int = 0
    """Answers in UDP flows that the client's host refused: no socket had the port any more."""
    datagrams_dropped: int = 0
    """Datagrams dropped because their flow's queue was full, or left in it when the flow ended."""
    fragments_dropped: int = 0
    """Fragments of intercepted packets that were invalid, or whose packet never became complete."""
    packets_refused: int = 0
    """Packets that the stack itself dropped: of refused flows, pings without an answer, and SYNs
    that `admit` is not asked about, for example because a checksum is wrong."""


class Netstack(DatagramInterception):
    """A TCP/IP stack; see `open_netstack`.

    A stack that was not closed emits a `ResourceWarning` when it is collected, and is closed then.

    *Concurrency*: belongs to the event loop in which it was opened. In another one, `start_server`
    and the methods that intercept raise RuntimeError; use `namespace` there. Methods may be called
    at the same time, from any number of tasks.
    """

    def __init__(self, prepared: Prepared) -> None:
        # Internal: use open_netstack.
        self._prepared = prepared
        self._core = prepared.core
        self._servers: list[Server | asyncio.AbstractServer] = []
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @property
    def tun(self) -> TunDevice:
        """The device: the stack's packets are received from it, and packets sent to it arrive."""
        return self._core.tun

    @property
    def namespace(self) -> Namespace:
        """The network namespace that is the stack."""
        return self._core.namespace

    @property
    def closed(self) -> bool:
        """Whether the stack was closed."""
        return self._closed

    @property
    def stats(self) -> NetstackStats:
        """A snapshot of what the stack has counted; see `NetstackStats`."""
        return NetstackStats(**dataclasses.asdict(self._core.counts))

    def __repr__(self) -> str:
        return f"<Netstack {self.tun.name}{' closed' if self._closed else ''}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self!r} can't be copied or pickled: use the same object everywhere")

    # What the namespace has

    async def socket(
        self,
        family: int = sockets.AF_INET,
        type: int = sockets.SOCK_STREAM,  # noqa: A002 - as socket.socket has it
        proto: int = 0,
    ) -> sockets.socket:
        """Make a socket of the stack; see `Namespace.socket`.

        Raises: as there.

        *Cancellation*, *Concurrency*: as there.
        """
        return await self.namespace.socket(family, type, proto)

    async def open_connection(
        self, host: str, port: int, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a TCP connection through the stack; see `Namespace.open_connection`.

        Raises: as there.

        *Cancellation*, *Concurrency*: as there.
        """
        return await self.namespace.open_connection(host, port, **options)

    async def start_server(
        self,
        client_connected_cb: ClientHandler,
        host: str | Sequence[str] | None = None,
        port: int = 0,
        **options: Any,
    ) -> asyncio.Server | Servers:
        """Start a TCP server at the stack's own addresses; see `Namespace.start_server`.

        Closing the stack closes the server.

        Raises: as there; DeviceClosedError if the stack was closed.

        *Cancellation*, *Concurrency*: as there.
        """
        self._check_open()
        if self._core.mechanism is not None and isinstance(port, int):
            self._core.mechanism.give_up(port)
        started = await self.namespace.start_server(client_connected_cb, host, port, **options)
        self._remember(started)
        return started

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], P],
        local_addr: tuple[str, int] | None = None,
        remote_addr: tuple[str, int] | None = None,
        **options: Any,
    ) -> tuple[asyncio.DatagramTransport, P]:
        """Make a UDP endpoint of the stack; see `Namespace.create_datagram_endpoint`.

        Raises: as there.

        *Cancellation*, *Concurrency*: as there.
        """
        return await self.namespace.create_datagram_endpoint(
            protocol_factory, local_addr, remote_addr, **options
        )

    async def create_subprocess_exec(
        self, *args: Any, **options: Any
    ) -> asyncio.subprocess.Process:
        """Start a program whose network is the stack; see `Namespace.create_subprocess_exec`.

        Raises: as there.

        *Cancellation*, *Concurrency*: as there.
        """
        return await self.namespace.create_subprocess_exec(*args, **options)

    async def create_subprocess_shell(
        self, cmd: str | bytes, **options: Any
    ) -> asyncio.subprocess.Process:
        """Start a shell command in the stack; see `Namespace.create_subprocess_shell`.

        Raises: as there.

        *Cancellation*, *Concurrency*: as there.
        """
        return await self.namespace.create_subprocess_shell(cmd, **options)

    # Interception

    async def intercept_tcp(
        self,
        handle: ClientHandler,
        *,
        admit: Admit | None = None,
        limit: int | None = None,
        backlog: int = 1024,
    ) -> Server:
        """Accept every TCP connection to an address that is not the stack's own.

        ``writer.get_extra_info("sockname")`` is the address that the client connected to. Any
        unicast address works, with any port.

        Args:
            handle: called with a reader and a writer for each connection, like the callback of
                `asyncio.start_server`; plain or async. If it raises, the error goes to the loop's
                exception handler, and the connection is closed.
            admit: decides about each connection, plain or async. It is called as
                ``admit(local, peer)`` with two tuples of address and port when the first packet
                (SYN) comes, which waits for the decision. True accepts the connection. False
                refuses it with a reset (the client sees ConnectionRefusedError), and a `Refusal`
                with an ICMP error. An async `admit` is cancelled when the client gives up. If
                `admit` raises, the error goes to the loop's exception handler, and the connection
                is refused. At most 512 connections to one address and port wait, and 4096 in all;
                the packets of others are dropped and counted.
            limit: how many connections may be open at once; others are reset, and counted as
                refused. The default is half the number of descriptors that the program may have
                (RLIMIT_NOFILE), because a connection that is passed on takes two.
            backlog: how many connections may wait until the loop accepts them.

        Returns:
            A server. Closing the stack closes it, too.

        Raises:
            TypeError, ValueError: an argument is invalid.
            RuntimeError: the stack was opened without ``intercept=True``, or already intercepts
                TCP.
            DeviceClosedError: the stack was closed.
            OSError, LinkError: no socket can be made.

        *Cancellation*: nothing is intercepted.

        *Concurrency*: one server at a time.
        """
        most = _positive("limit", max(spare_descriptors() // 2, 1) if limit is None else limit)
        backlog = min(_positive("backlog", backlog), _BACKLOG_MAX)
        _function("handle", handle)
        if admit is not None:
            _function("admit", admit)
        self._check_intercepting("TCP", TcpInterceptor)
        interceptor = TcpInterceptor(self._core, handle, admit, most, backlog)
        server = Server(interceptor)
        self._remember(server)  # before the await, so that a second call meanwhile is refused
        await interceptor.start()
        return server

    def _check_intercepting(self, what: str, kind: type) -> None:
        self._check_open()
        if self._core.mechanism is None:
            raise RuntimeError(
                "this stack answers only for its own addresses; open it with "
                "open_netstack(intercept=True)"
            )
        for server in self._servers:
            if isinstance(server, Server) and not server.closed and server.is_of(kind):
                raise RuntimeError(f"this stack already intercepts {what}; close that server first")

    def _remember(self, server: Server | asyncio.AbstractServer) -> None:
        self._servers = [
            each for each in self._servers if not (isinstance(each, Server) and each.closed)
        ]
        self._servers.append(server)

    # Closing

    def close(self) -> None:
        """Close at once; may be called again. Prefer `aclose`.

        Connections are reset, but their peers don't learn about it: no other task gets a turn to
        carry the resets to them.
        """
        if self._begin_closing():
            closing.reset_now(self._prepared)
            closing.close_now(self._prepared)

    async def aclose(self) -> None:
        """Close the stack; may be called again, also while another call is under way.

        This closes the stack's servers. Then it resets every connection: a task that waits for one
        gets ConnectionAbortedError, and the tasks that read `tun` get a turn to carry the resets to
        the peers (a few milliseconds at most). Then it closes `tun`, and `namespace` if the stack
        made it.

        Raises nothing.

        *Cancellation*: everything is closed nevertheless; the task only stops waiting.
        """
        if self._begin_closing():
            try:
                await closing.reset(self._prepared)
            finally:
                closing.close_now(self._prepared)
        await self.tun.aclose()
        if self._prepared.owns_namespace:
            await self.namespace.aclose()

    def _begin_closing(self) -> bool:
        if self._closed:
            return False
        self._closed = self._core.closing = True
        for server in self._servers:
            server.close()
        self._servers = []
        self._core.intake.close()
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceClosedError(f"the stack of {self.tun.name} was closed; open another")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                f"the stack of {self.tun.name} was opened in another event loop; call this there"
            )

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        if not getattr(self, "_closed", True):
            warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


class NetstackOpener(Once[Netstack]):
    """What `open_netstack` returns; await it or use ``async with``, once."""

    _opens, _example, _result = Netstack, "open_netstack(...)", "stack"

    def __init__(self, options: Options) -> None:
        # Internal: use open_netstack.
        super().__init__()
        self._options = options

    async def _open(self) -> Netstack:
        return Netstack(await opening.open_core(self._options))


def open_netstack(
    *,
    addresses: Iterable[AddressArg] = (),
    routes: Iterable[RouteArg | Route] = opening.DEFAULT_ROUTES,
    mtu: int = 1500,
    offload: Offload = "split",
    intercept: bool = False,
    answer_pings: bool = True,
    namespace: Namespace | None = None,
    name: str | None = None,
    txqueuelen: int | None = None,
) -> NetstackOpener:
    """Use the kernel of a private network namespace as a TCP/IP stack for this program's packets.

    ::

        async with aiotun.open_netstack(addresses=["10.0.0.2/24"]) as stack:
            pump = asyncio.create_task(aiotun.relay(stack.tun, vpn))
            reader, writer = await stack.open_connection("10.0.0.1", 80)

    The program receives the stack's packets from `tun`, and packets that it sends to `tun` arrive
    at the stack. Root is not needed if the kernel allows user namespaces; see `new_namespace`.

    With ``intercept=True`` the stack answers for every address: `intercept_tcp` accepts connections
    to any address and port, and the kernel answers echo requests. What nobody intercepts is refused
    as an ordinary host refuses it.

    Args:
        addresses: the stack's own addresses, as for `open_tun`. A stack needs one to open
            connections, and none to intercept.
        routes: the destinations that the stack reaches through `tun`, as for `open_tun`. The
            default is all destinations. The default route for IPv6 is left out if the kernel has no
            IPv6, or if `mtu` is too small for it.
        mtu: the largest packet in bytes, 68 to 65535.
        offload: as for `open_tun`. ``"raw"`` is twice as fast as ``"split"`` if the packets are
            only passed on to a device or a program that takes super-packets.
        intercept: whether the stack answers for addresses that are not its own.
        answer_pings: whether a stack that intercepts answers echo requests to addresses that are
            not its own. With False only those are answered that `intercept_ping` accepts; others
            are dropped and counted.
        namespace: a `Namespace` to use instead of a private one. Closing the stack leaves it open.
            Only one stack in a namespace can intercept.
        name: the interface's name, by default `tun0` in a private namespace. No interface of that
            name may exist.
        txqueuelen: how many packets the device holds for the program, as for `open_tun`.

    Returns:
        An opener of a `Netstack`: await it, or enter it with ``async with``, which closes the stack
        at the end.

    Raises:
        TypeError, ValueError: an argument is invalid.

    Awaiting or entering it raises:
        NotPermittedError: the kernel refuses a namespace, or ``/dev/net/tun`` can't be opened; the
            text says what forbids it and what would allow it.
        TunUnavailableError: this machine has no TUN/TAP driver.
        LinkError: the kernel refuses an address, a route or another step, or the helper process
            can't be started.
        ResourceLimitError: no thread can be started, or no descriptor or memory is left.
        ValueError: the environment variable ``AIOTUN_NETSTACK`` has an unknown value. It is for
            tests: ``tproxy`` or ``listeners`` chooses how connections are intercepted.

    *Cancellation*: waits for the step under way (about 20 ms), then undoes every step.

    *Concurrency*: any number may be opened at once.
    """
    return NetstackOpener(
        opening.check(
            addresses=addresses,
            routes=routes,
            mtu=mtu,
            offload=offload,
            intercept=intercept,
            answer_pings=answer_pings,
            namespace=namespace,
            name=name,
            txqueuelen=txqueuelen,
        )
    )


def _function(what: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{what} must be a function, got {value!r}")


def _positive(what: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{what} must be at least 1, got {value}")
    return value

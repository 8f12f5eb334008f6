"""Network namespaces as objects: sockets, connections, devices and programs inside."""

from __future__ import annotations

import asyncio
import errno
import operator
import socket as sockets
import threading
import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from ._kernel import private, threads
from ._kernel.namespaces import NamespaceFd, NetnsArg, check_netns, open_netns, setns
from ._kernel.once import Once
from ._kernel.rootless import Helper
from ._namespaces import connections, subprocesses
from ._namespaces.connections import Resolver, Servers
from ._namespaces.pool import Pool
from ._namespaces.subprocesses import Word
from .errors import LinkError

if TYPE_CHECKING:
    from ssl import SSLContext
    from types import TracebackType

__all__ = ["Namespace", "NamespaceOpener", "new_namespace", "open_namespace"]

P = TypeVar("P", bound=asyncio.BaseProtocol)

# asyncio's own default for a stream's buffer (asyncio/streams.py).
_LIMIT = 2**16


class Namespace:
    """A network namespace; see `new_namespace` and `open_namespace`.

    Every argument `netns` in aiotun takes a `Namespace`: `open_tun`, `open_tap`, `Link`,
    `create_bridge`, `list_devices` and so on.

    Devices, sockets and programs inside go on working after the namespace is closed. Links of a
    `rootless` namespace don't: their requests raise `LinkError` then.

    A namespace that was not closed emits a `ResourceWarning` when it is collected, and is closed
    then.

    *Cancellation*: a cancelled method leaves no socket and no program behind.

    *Concurrency*: belongs to no event loop and to no thread. Methods may be called at the same
    time, also in several loops.
    """

    def __init__(self, namespace: NamespaceFd, ends: Helper | None) -> None:
        # Internal: use new_namespace or open_namespace.
        self._namespace: NamespaceFd | None = namespace
        self._rootless = isinstance(namespace.helper, Helper)
        self._ends = ends  # the helper process to end when this object is closed
        self._ended = threading.Event()
        self._pool = Pool()

    @property
    def rootless(self) -> bool:
        """Whether a helper process in a user namespace holds the namespace."""
        return self._rootless

    @property
    def closed(self) -> bool:
        """Whether this object was closed."""
        return self._namespace is None

    def fileno(self) -> int:
        """Return the namespace's fd, for setns(2) and the like; -1 after closing."""
        return -1 if self._namespace is None else self._namespace.fd

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self.fileno()}"
        helper = f" helper={self._ends.pid}" if self._ends is not None and not self.closed else ""
        return f"<Namespace {state}{helper}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: always. The helper process belongs to this process.
        """
        raise TypeError(
            f"{self!r} can't be copied or pickled; use the same object everywhere in this process, "
            "and send its fd to other processes"
        )

    # Sockets

    async def socket(
        self,
        family: int = sockets.AF_INET,
        type: int = sockets.SOCK_STREAM,  # noqa: A002 - as socket.socket has it
        proto: int = 0,
    ) -> sockets.socket:
        """Make a socket inside.

        Args:
            family, type, proto: as for `socket.socket`.

        Returns:
            An ordinary `socket.socket`, non-blocking and close-on-exec. The caller must close it.

        Raises:
            TypeError, ValueError: an argument is not a number, or is too large.
            OSError: the kernel refuses, as for `socket.socket`.
            LinkError: the namespace was closed (ESHUTDOWN), or its helper process has ended.

        *Cancellation*: no socket is left.

        *Concurrency*: may be called any number of times at once.

        TCP and UDP sockets come from a small pool, which holds at most 31 of each kind.
        """
        return await self._pool.take(self._opened(), _kind(family, type, proto))

    def socket_blocking(
        self,
        family: int = sockets.AF_INET,
        type: int = sockets.SOCK_STREAM,  # noqa: A002 - as socket.socket has it
        proto: int = 0,
    ) -> sockets.socket:
        """Make a socket inside, in code that can't await, or in another thread.

        This blocks for about 10 us, or up to a few milliseconds if it has to start a thread.

        Args:
            family, type, proto: as for `socket`.

        Returns:
            As for `socket`: the socket is non-blocking. For blocking calls, call its method
            ``setblocking(True)``.

        Raises:
            TypeError, ValueError, OSError, LinkError: as for `socket`.

        *Concurrency*: may be called in any thread, also at the same time as `socket`.
        """
        return self._pool.take_blocking(self._opened(), _kind(family, type, proto))

    async def open_connection(
        self,
        host: str,
        port: int,
        *,
        limit: int = _LIMIT,
        family: int = 0,
        proto: int = 0,
        local_addr: tuple[str, int] | None = None,
        ssl: SSLContext | bool | None = None,
        server_hostname: str | None = None,
        resolver: Resolver | None = None,
        **options: Any,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a TCP connection from inside, as `asyncio.open_connection` does outside.

        Args:
            host: an IPv4 or IPv6 address. A zone is an interface inside (``"fe80::1%tun0"``). A
                name needs `resolver`.
            port: the port.
            limit: the size of the reader's buffer in bytes.
            family, proto: as for `asyncio.open_connection`.
            local_addr: the address and port to connect from.
            ssl, server_hostname: as for `asyncio.open_connection`.
            resolver: a plain or async function that takes a name and returns a list of addresses
                as text. They are tried in that order. Without `resolver` a name is an error: the
                program's own resolver would send the name to the network outside.
            options: other options of `asyncio.open_connection` that apply to an open connection,
                such as ``ssl_handshake_timeout``.

        Returns:
            The reader and the writer.

        Raises:
            TypeError, ValueError: an argument is invalid, or `host` is a name and there is no
                `resolver`.
            OSError: no address accepts the connection, as for `asyncio.open_connection`.
            LinkError: the namespace was closed (ESHUTDOWN), or its helper process has ended.

        *Cancellation*: no connection is left.

        *Concurrency*: may be called any number of times at once.
        """
        targets = await connections.resolve(host, port, family, resolver)
        local = await self._local(local_addr, resolver)
        sock = await connections.connected(self.socket, targets, local, proto)
        if ssl:
            options["server_hostname"] = host if server_hostname is None else server_hostname
        try:
            return await asyncio.open_connection(sock=sock, limit=limit, ssl=ssl, **options)
        except BaseException:
            sock.close()
            raise

    async def start_server(
        self,
        client_connected_cb: Callable[
            [asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None
        ],
        host: str | Sequence[str] | None = None,
        port: int = 0,
        *,
        limit: int = _LIMIT,
        family: int = 0,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
        resolver: Resolver | None = None,
        **options: Any,
    ) -> asyncio.Server | Servers:
        """Start a TCP server inside, as `asyncio.start_server` does outside.

        Args:
            client_connected_cb: called with a reader and a writer for each connection.
            host: the address to listen on, several of them, or None for all addresses.
            port: the port. With 0 the kernel chooses one for each address.
            limit: the size of each reader's buffer in bytes.
            family, reuse_address, reuse_port: as for `asyncio.start_server`.
            resolver: as for `open_connection`.
            options: other options of `asyncio.start_server` (``backlog``, ``ssl``,
                ``start_serving``).

        Returns:
            An `asyncio.Server`. For several addresses, an object with the same methods.

        Raises:
            TypeError, ValueError: an argument is invalid, or `host` is a name and there is no
                `resolver`.
            OSError: the kernel refuses, for example with EADDRINUSE.
            LinkError: the namespace was closed (ESHUTDOWN), or its helper process has ended.

        *Cancellation*: nothing listens.

        *Concurrency*: may be called any number of times at once.
        """
        connections.check_family(family)
        hosts = [host] if isinstance(host, str) and host else host or self._everywhere(family)
        found: list[connections.Address] = []
        for each in hosts:
            found += await connections.resolve(each, port, family, resolver)
        listening = await connections.listening(
            self.socket, found, reuse_address=reuse_address, reuse_port=reuse_port
        )
        servers: list[asyncio.Server] = []
        try:
            for sock in listening:
                server = asyncio.start_server(
                    client_connected_cb, sock=sock, limit=limit, **options
                )
                servers.append(await server)
        except BaseException:
            for started in servers:
                started.close()
            for sock in listening:
                sock.close()
            raise
        return servers[0] if len(servers) == 1 else Servers(servers)

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], P],
        local_addr: tuple[str, int] | None = None,
        remote_addr: tuple[str, int] | None = None,
        *,
        family: int = 0,
        proto: int = 0,
        reuse_port: bool | None = None,
        allow_broadcast: bool | None = None,
        resolver: Resolver | None = None,
    ) -> tuple[asyncio.DatagramTransport, P]:
        """Make a UDP endpoint inside, as an event loop's `create_datagram_endpoint` does outside.

        Args:
            protocol_factory: returns the protocol.
            local_addr: the address and port to receive at.
            remote_addr: the only address and port to exchange datagrams with.
            family, proto, reuse_port, allow_broadcast: as for asyncio.
            resolver: as for `open_connection`.

        Returns:
            The transport and the protocol.

        Raises:
            TypeError, ValueError: an argument is invalid, or a host is a name and there is no
                `resolver`.
            OSError: the kernel refuses.
            LinkError: the namespace was closed (ESHUTDOWN), or its helper process has ended.

        *Cancellation*: no socket is left.

        *Concurrency*: may be called any number of times at once.
        """
        local = await self._local(local_addr, resolver, family)
        remote = await self._local(remote_addr, resolver, family)
        sock = await connections.bound(
            self.socket,
            local,
            remote,
            family=family,
            proto=proto,
            reuse_port=reuse_port,
            allow_broadcast=allow_broadcast,
        )
        loop = asyncio.get_running_loop()
        endpoint = loop.create_task(loop.create_datagram_endpoint(protocol_factory, sock=sock))
        try:
            return await asyncio.shield(endpoint)
        except BaseException:
            # Don't cancel the loop's own call, which ends in a turn or two: uvloop's would leave
            # the transport open.
            await asyncio.wait([endpoint])
            if endpoint.exception() is None:
                endpoint.result()[0].close()
            else:
                sock.close()
            raise

    async def _local(
        self, address: Any, resolver: Resolver | None, family: int = 0
    ) -> list[connections.Address]:
        if address is None:
            return []
        # IPv6 addresses that getsockname returns have four parts.
        if not isinstance(address, tuple) or len(address) not in (2, 4):
            raise TypeError(f"an address must be a tuple of host and port, got {address!r}")
        host, port = address[:2]
        if len(address) == 4 and address[3]:
            host = f"{host}%{address[3]}"
        return await connections.resolve(host, port, family, resolver, "an address")

    def _everywhere(self, family: int) -> list[str]:
        hosts = {sockets.AF_INET: "0.0.0.0", sockets.AF_INET6: "::"}
        if family:
            return [hosts[sockets.AddressFamily(family)]]
        return [*hosts.values()] if sockets.has_ipv6 else [hosts[sockets.AF_INET]]

    # Programs

    async def create_subprocess_exec(
        self,
        program: Word,
        *args: Word,
        resolv_conf: str | None = None,
        **options: Any,
    ) -> asyncio.subprocess.Process:
        """Start a program inside, as `asyncio.create_subprocess_exec` does outside.

        In a `rootless` namespace the program runs as the same user without capabilities, otherwise
        with the caller's credentials. ``ping`` works in both, if the kernel lets aiotun set
        ``ping_group_range``.

        The program has a mount namespace of its own. Its ``/sys`` shows the network namespace
        (except in a container that hides parts of ``/sys``). Services outside that resolve names
        (nscd, systemd-resolved, avahi) are hidden, so that the program resolves names inside.

        Args:
            program, args: the program and its arguments.
            resolv_conf: the text of the program's ``/etc/resolv.conf``. With None the file is the
                same as outside.
            options: options of `asyncio.create_subprocess_exec`.

        Returns:
            The process, after it has executed the program.

        Raises:
            TypeError, ValueError: an argument is invalid.
            FileNotFoundError, PermissionError: the program does not exist, or can't be executed.
            NotPermittedError: the process can't enter the namespace, or can't mount its files.
            OSError: the process can't have `user`, `group` or `extra_groups`.
            LinkError: the namespace was closed (ESHUTDOWN).

        *Cancellation*: the process is killed.

        *Concurrency*: may be called any number of times at once.
        """
        namespace = self._opened()
        user = namespace.helper.user if isinstance(namespace.helper, Helper) else None
        return await subprocesses.start(namespace, user, (program, *args), resolv_conf, options)

    async def create_subprocess_shell(
        self, cmd: str | bytes, *, resolv_conf: str | None = None, **options: Any
    ) -> asyncio.subprocess.Process:
        """Start a shell command inside, as `asyncio.create_subprocess_shell` does outside.

        Args:
            cmd: the command, for ``/bin/sh -c``.
            resolv_conf: as for `create_subprocess_exec`.
            options: options of `asyncio.create_subprocess_shell`.

        Returns:
            The process.

        Raises:
            TypeError, ValueError, NotPermittedError, OSError, LinkError: as for
                `create_subprocess_exec`.

        *Cancellation*: the process is killed.

        *Concurrency*: may be called any number of times at once.
        """
        if not isinstance(cmd, str | bytes):
            raise TypeError(f"cmd must be str or bytes, got {cmd!r}")
        return await self.create_subprocess_exec(
            "/bin/sh", "-c", cmd, resolv_conf=resolv_conf, **options
        )

    # Closing

    def close(self) -> None:
        """Close the namespace, and end its helper process. Never waits; may be called again.

        Devices, sockets and programs inside go on working. The kernel removes the namespace and its
        interfaces when none is left.
        """
        namespace, self._namespace = self._namespace, None
        if namespace is None:
            return
        self._pool.close()
        helper, self._ends = self._ends, None  # drop it: it keeps the kernel's namespace alive
        if helper is None:
            self._ended.set()
            return
        helper.end()
        threads.start(helper.reap, self._ended.set)

    async def aclose(self) -> None:
        """Close the namespace, and wait until its helper process has ended; may be called again.

        Raises nothing.

        *Cancellation*: the namespace is closed nevertheless; the task only stops waiting.

        *Concurrency*: may be called any number of times at once.
        """
        self.close()
        if not self._ended.is_set():
            await threads.run(self._wait_ended, or_here=True)

    def _wait_ended(self) -> None:
        self._ended.wait()

    async def __aenter__(self) -> Self:
        self._opened()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_namespace", None) is not None:
            warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def _opened(self) -> NamespaceFd:
        if self._namespace is None:
            raise LinkError(
                errno.ESHUTDOWN,
                "this network namespace was closed; call new_namespace or open_namespace again",
            )
        return self._namespace


def _kind(family: int, type: int, proto: int) -> tuple[int, int, int]:  # noqa: A002 - as above
    kind = operator.index(type) & ~(sockets.SOCK_NONBLOCK | sockets.SOCK_CLOEXEC)
    numbers = operator.index(family), kind, operator.index(proto)
    if not all(-(2**31) <= each < 2**31 for each in numbers):
        raise ValueError(f"family, type and proto must fit into 32 bits, got {numbers}")
    return numbers


class NamespaceOpener(Once[Namespace]):
    """What `new_namespace` and `open_namespace` return; await it or use ``async with``, once."""

    _opens, _example, _result = Namespace, "new_namespace()", "ns"

    def __init__(self, make: Callable[[], tuple[NamespaceFd, bool]]) -> None:
        # Internal: use new_namespace or open_namespace.
        super().__init__()
        self._make = make

    async def _open(self) -> Namespace:
        def make() -> Namespace:
            namespace, is_new = self._make()
            helper = namespace.helper
            return Namespace(namespace, helper if is_new and isinstance(helper, Helper) else None)

        return await threads.run(make, undo=lambda made: made.close())


def new_namespace(*, rootless: bool | None = None) -> NamespaceOpener:
    """Make a private network namespace, which has only the interface `lo`, up.

    ::

        async with aiotun.new_namespace() as ns:
            async with aiotun.open_tun("tun0", netns=ns, addresses=["10.0.0.1/24"]) as tun:
                sock = await ns.socket(socket.AF_INET, socket.SOCK_DGRAM)
                process = await ns.create_subprocess_exec("ping", "-c1", "10.0.0.2")

    An ordinary user can do this if the kernel allows user namespaces. Then a helper process holds
    the namespace, and makes the sockets inside. The helper is a child of this program. It starts in
    15 to 40 ms and uses about 3 MB. It ends when the namespace is closed, or when the program ends
    for any reason.

    Args:
        rootless: True uses a helper process in a user namespace. False uses none, which takes
            CAP_SYS_ADMIN and CAP_NET_ADMIN. None uses a helper if this program lacks these
            capabilities.

    Returns:
        An opener of a `Namespace`: await it, or enter it with ``async with``, which closes the
        namespace at the end.

    Raises:
        TypeError: `rootless` is not True, False or None.

    Awaiting or entering it raises:
        NotPermittedError: the kernel refuses. The text says what forbids it (a limit, AppArmor, a
            seccomp filter, ...) and what would allow it; so does ``aiotun doctor``.
        LinkError: the helper process can't be started.

    *Cancellation*: waits for the step under way (about 20 ms), then undoes everything.

    *Concurrency*: any number may be made at once.

    Source: user_namespaces(7), network_namespaces(7).
    """
    if rootless is not None and not isinstance(rootless, bool):
        raise TypeError(f"rootless must be True, False or None, got {rootless!r}")
    return NamespaceOpener(lambda: (private.make(rootless), True))


def open_namespace(netns: NetnsArg) -> NamespaceOpener:
    """Open an existing network namespace.

    Args:
        netns: a name under /run/netns, a path (``"/proc/1234/ns/net"``), an open fd, which is
            duplicated, or a `Namespace`, whose helper process still belongs to it.

    Returns:
        An opener, as for `new_namespace`. Closing the `Namespace` closes only this object.

    Raises:
        TypeError, ValueError: `netns` is not a valid namespace.

    Awaiting or entering it raises:
        LinkError: the namespace does not exist (ENOENT). aiotun does not create it.
        NotPermittedError: this program can't enter the namespace, which takes CAP_SYS_ADMIN in it
            and outside.

    *Cancellation*: nothing is left open.

    *Concurrency*: may be called any number of times at once.
    """
    if netns is None:
        raise TypeError("open_namespace needs a namespace: a name, a path or an open fd")
    check_netns(netns)

    def enter() -> tuple[NamespaceFd, bool]:
        namespace = NamespaceFd(open_netns(netns))
        setns(namespace.fd)
        return namespace, False

    return NamespaceOpener(enter)

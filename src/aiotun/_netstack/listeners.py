"""The mechanism `listeners`: a socket for a port is made when the first packet for it is seen.

For kernels without nf_tables. The packet is held until the socket waits: IPv4's kernel would say
nothing meanwhile, but IPv6's resets a connection for good. A socket that nothing asks for is closed
after a while, and the one that was not asked for longest when there are too many.

Limits that `tproxy` does not have: port 0, for which no socket can wait, and a port at which a
server of the stack listens at all addresses. What is sent there is refused.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING

from .answers import unreachable
from .core import spare_descriptors
from .gate import Gate, Seen, guard, unguard
from .mechanism import SO_BINDTODEVICE, Mechanism, Receiver, make_transparent

if TYPE_CHECKING:
    from .._packets.ipheader import IPHeader
    from ..device import TunDevice
    from ..namespaces import Namespace
    from .counts import Counts

__all__ = ["Listeners"]

# How long a socket waits for another packet that opens something, in seconds.
_IDLE, _SWEEP = 60.0, 10.0

_SOCKETS_MAX = 4096

# How many datagrams wait for one socket, and for how many sockets.
_DATAGRAMS, _WAITED_FOR = 16, 256

_UDP = 17

Key = tuple[int, int, int, bytes]
"""Kind, family, port, and the address, which is empty for all."""


class _Waiting:
    """A socket that waits for something to be opened."""

    __slots__ = ("sock", "used")

    def __init__(self, sock: socket.socket, used: float) -> None:
        self.sock = sock
        self.used = used


class Listeners(Mechanism):
    """Sockets on demand; see above."""

    on_demand = True

    def __init__(
        self, namespace: Namespace, tun: TunDevice, own: frozenset[bytes], counts: Counts
    ) -> None:
        self._namespace = namespace
        self._tun = tun
        self._own = own
        self._counts = counts
        self._loop = asyncio.get_running_loop()
        self._receivers: dict[int, Receiver] = {}
        # The one that was not asked for longest comes first.
        self._waiting: dict[Key, _Waiting] = {}
        self._most = min(max(spare_descriptors() // 4, 1), _SOCKETS_MAX)
        self._timer: asyncio.TimerHandle | None = None
        self._gate: Gate | None = None  # that of UDP
        self._held: dict[Key, list[Seen]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, kind: int, receiver: Receiver) -> None:
        self._receivers[kind] = receiver
        if kind == socket.SOCK_DGRAM:
            self._gate = guard(self._tun.queues[0], _UDP, self._see_datagram, self._counts)

    def stop(self, kind: int) -> None:
        if kind not in self._receivers:
            return
        for key in [key for key in self._waiting if key[0] == kind]:
            self._close(key)
        del self._receivers[kind]
        if kind == socket.SOCK_DGRAM:
            unguard(self._tun.queues[0], _UDP)
            self._held.clear()
        if not self._receivers and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Sockets

    def ready(self, kind: int, header: IPHeader) -> bool:
        for key in _keys(kind, header):
            waiting = self._waiting.pop(key, None)
            if waiting is not None:
                waiting.used = self._loop.time()
                self._waiting[key] = waiting
                return True
        return False

    def shadows(self, kind: int, header: IPHeader) -> bool:
        return _keys(kind, header)[0] in self._waiting

    async def prepare(self, kind: int, header: IPHeader) -> bool:
        if not header.dport:
            return False
        keys = _keys(kind, header)
        sock = await self._namespace.socket(keys[0][1], kind)
        receiver = self._receivers.get(kind)
        if receiver is None or self.ready(kind, header):  # stopped, or made meanwhile
            sock.close()
            return receiver is not None
        try:
            make_transparent(sock)
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, os.fsencode(self._tun.name))
            key = _bind(sock, keys, header)
            if key is not None and kind == socket.SOCK_STREAM:
                sock.listen(receiver.backlog)
        except BaseException:
            sock.close()
            raise
        if key is None:
            sock.close()
            return False
        if len(self._waiting) >= self._most:
            self._close(next(iter(self._waiting)))
        self._waiting[key] = _Waiting(sock, self._loop.time())
        receiver.add(sock)
        if self._timer is None:
            self._timer = self._loop.call_later(_SWEEP, self._sweep)
        return True

    def give_up(self, kind: int, port: int) -> None:
        for key in [key for key in self._waiting if key[0] == kind and key[2] == port]:
            self._close(key)

    def _close(self, key: Key) -> None:
        waiting = self._waiting.pop(key)
        self._receivers[key[0]].remove(waiting.sock)
        waiting.sock.close()

    def _sweep(self) -> None:
        before = self._loop.time() - _IDLE
        for key in [key for key, each in self._waiting.items() if each.used < before]:
            self._close(key)
        self._timer = self._loop.call_later(_SWEEP, self._sweep) if self._waiting else None

    # Datagrams

    def _see_datagram(self, seen: Seen) -> bool:
        """Hold a datagram until there is a socket for it."""
        header = seen.header
        assert self._gate is not None
        if not header.dport or header.dst_bytes[0] in (0xE0, 0xFF):
            return False
        if header.dst_bytes in self._own:
            if self.shadows(socket.SOCK_DGRAM, header):
                self._gate.answer(unreachable(seen.packet, header, None))
                return True
            return False
        if self.ready(socket.SOCK_DGRAM, header):
            return False
        key = _keys(socket.SOCK_DGRAM, header)[1]
        held = self._held.get(key)
        if held is None and len(self._held) < _WAITED_FOR:
            self._held[key] = [seen]
            task = self._loop.create_task(self._let_in(key, header))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif held is not None and len(held) < _DATAGRAMS:
            held.append(seen)
        else:
            self._counts.packets_refused += 1
        return True

    async def _let_in(self, key: Key, header: IPHeader) -> None:
        made = False
        try:
            made = await self.prepare(socket.SOCK_DGRAM, header)
        except OSError as error:
            text = "aiotun refused datagrams: no socket could be made"
            self._loop.call_exception_handler({"message": text, "exception": error})
        for seen in self._held.pop(key, []):
            if made and self._gate is not None:
                self._gate.let_in(seen)
            else:
                self._counts.packets_refused += 1


def _keys(kind: int, header: IPHeader) -> tuple[Key, Key]:
    """Give where a socket for a packet may wait: at all addresses, or at the one asked for."""
    family = socket.AF_INET if header.version == 4 else socket.AF_INET6
    port = header.dport or 0
    return (kind, family, port, b""), (kind, family, port, header.dst_bytes)


def _bind(sock: socket.socket, keys: tuple[Key, Key], header: IPHeader) -> Key | None:
    """Bind a socket to a port; None where a server of the stack has it at all addresses."""
    for key, address in zip(keys, ("", str(header.dst)), strict=True):
        try:
            sock.bind((address, key[2]))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return key
    return None

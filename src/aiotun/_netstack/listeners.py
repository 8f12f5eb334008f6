"""The mechanism `listeners`: a socket for a port is made when the first SYN for it is seen.

For kernels without nf_tables. The SYN is held until its socket listens. With IPv4 the kernel would
ignore a SYN without a socket, but with IPv6 it answers with a reset, which ends the connection. A
socket that no SYN has come for is closed after a while. If there are too many sockets, the one that
was unused for longest is closed.

This mechanism can't accept connections to port 0, where no socket can listen, nor to a port at
which a server of the stack listens at all addresses. Both are refused. `tproxy` has no such limits.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING

from ..errors import ResourceLimitError
from .core import spare_descriptors
from .mechanism import SO_BINDTODEVICE, Mechanism, Receiver, make_transparent

if TYPE_CHECKING:
    from .._packets.ipheader import IPHeader
    from ..namespaces import Namespace

__all__ = ["Listeners"]

# How long a socket waits for another connection, in seconds.
_IDLE, _SWEEP = 60.0, 10.0

_SOCKETS_MAX = 4096

Key = tuple[int, int, bytes]
"""Family, port, and the address, which is empty for all."""


class _Waiting:
    """A socket that listens, and when the last SYN for it came."""

    __slots__ = ("sock", "used")

    def __init__(self, sock: socket.socket, used: float) -> None:
        self.sock = sock
        self.used = used


class Listeners(Mechanism):
    """Sockets on demand; see above."""

    on_demand = True

    def __init__(self, namespace: Namespace, tun: str, mtu: int) -> None:
        self._namespace = namespace
        self._tun = os.fsencode(tun)
        self._mtu = mtu
        self._loop = asyncio.get_running_loop()
        self._receiver: Receiver | None = None
        # The socket that was unused for longest comes first.
        self._waiting: dict[Key, _Waiting] = {}
        self._most = min(max(spare_descriptors() // 4, 1), _SOCKETS_MAX)
        self._timer: asyncio.TimerHandle | None = None
        self._making = asyncio.Lock()
        self._shortages = 0  # how many times no socket could be made

    async def start(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def stop(self) -> None:
        for key in list(self._waiting):
            self._close(key)
        self._receiver = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Sockets

    def ready(self, header: IPHeader) -> bool:
        for key in _keys(header):
            waiting = self._waiting.pop(key, None)
            if waiting is not None:
                waiting.used = self._loop.time()
                self._waiting[key] = waiting
                return True
        return False

    def shadows(self, header: IPHeader) -> bool:
        return _keys(header)[0] in self._waiting

    async def prepare(self, header: IPHeader) -> bool:
        if not header.dport:
            return False
        # Many SYNs for one port may wait here at once. They need one socket, not one each: those
        # would take the program's last descriptors, and connections would be refused.
        before = self._shortages
        await self._making.acquire()
        try:
            receiver = self._receiver
            if receiver is None or self.ready(header):  # stopped, or made while this one waited
                return receiver is not None
            if self._shortages > before:  # another call has just tried, and has reported why not
                return False
            return await self._listen(header)
        except ResourceLimitError:
            self._shortages += 1
            raise
        finally:
            # Not if the collector destroys this task after its loop: no waiting task can be woken.
            if not self._loop.is_closed():
                self._making.release()

    async def _listen(self, header: IPHeader) -> bool:
        keys = _keys(header)
        sock = await self._namespace.socket(keys[0][0])
        receiver = self._receiver
        if receiver is None:  # stopped meanwhile
            sock.close()
            return False
        try:
            make_transparent(sock, self._mtu)
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, self._tun)
            key = _bind(sock, keys, header)
            if key is not None:
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

    def give_up(self, port: int) -> None:
        for key in [key for key in self._waiting if key[1] == port]:
            self._close(key)

    def _close(self, key: Key) -> None:
        waiting = self._waiting.pop(key)
        assert self._receiver is not None
        self._receiver.remove(waiting.sock)
        waiting.sock.close()

    def _sweep(self) -> None:
        before = self._loop.time() - _IDLE
        for key in [key for key, each in self._waiting.items() if each.used < before]:
            self._close(key)
        self._timer = self._loop.call_later(_SWEEP, self._sweep) if self._waiting else None


def _keys(header: IPHeader) -> tuple[Key, Key]:
    """Return the two places where a socket may listen for a SYN: at all addresses, or at one."""
    family = socket.AF_INET if header.version == 4 else socket.AF_INET6
    port = header.dport or 0
    return (family, port, b""), (family, port, header.dst_bytes)


def _bind(sock: socket.socket, keys: tuple[Key, Key], header: IPHeader) -> Key | None:
    """Bind a socket to a port; None if a server of the stack has the port at all addresses."""
    for key, address in zip(keys, ("", str(header.dst)), strict=True):
        try:
            sock.bind((address, key[1]))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return key
    return None

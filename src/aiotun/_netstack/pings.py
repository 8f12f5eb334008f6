"""Echo requests to addresses that are not the stack's own, answered by the program.

The kernel of a stack that intercepts answers echo requests to every address. A program that relays
packets must first find out whether the real host answers.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._packets.ipheader import IPHeader
from .._packets.native import checksum
from .._packets.udp import ICMP, ICMPV6, pseudo_header
from .addresses import unicast
from .answers import Refusal, echo_reply, unreachable
from .asking import ask

if TYPE_CHECKING:
    from .counts import Counts
    from .injector import Injector

__all__ = ["OnPing", "Ping", "PingInterceptor", "echo_request", "is_foreign_ping"]

# How many requests may wait for the program's answer. More are dropped and counted.
_MOST = 256

_ECHO = struct.Struct("!BBHHH")  # RFC 792, RFC 4443: type, code, checksum, identifier, sequence
_ECHO4, _ECHO6 = 8, 128


@dataclasses.dataclass(frozen=True, slots=True)
class Ping:
    """An echo request."""

    local: str
    """The address that is pinged."""
    peer: str
    """The address of the host that sent the request."""
    ident: int
    """The identifier, which tells that host's ping programs apart."""
    sequence: int
    """The sequence number."""
    ttl: int
    """The TTL or hop limit that the request arrived with."""
    data: bytes
    """The data, which the reply repeats."""


OnPing = Callable[[Ping], Any]
"""Decides whether a ping is answered: returns True, False or a `Refusal`; plain or async."""


class PingInterceptor:
    """Takes echo requests, and answers those that `on_ping` accepts."""

    def __init__(
        self, own: frozenset[bytes], counts: Counts, injector: Injector, on_ping: OnPing
    ) -> None:
        self._own = own
        self._counts = counts
        self._injector = injector
        self._on_ping = on_ping
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._waiting = 0
        self._tasks: set[asyncio.Future[Any]] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def take(self, packet: bytes) -> bool:
        """Take an echo request; return False if the packet is for the kernel instead.

        Args:
            packet: a whole IP packet, not a fragment.
        """
        header = _foreign_request(packet, self._own)
        if header is None:
            return False
        if self._waiting >= _MOST:
            self._counts.packets_refused += 1
            return True
        self._waiting += 1
        self._loop.call_soon(self._ask, packet, header, context=self._context)
        return True

    def _ask(self, packet: bytes, header: IPHeader) -> None:
        if self._closed:
            self._answer(packet, header, False)
            return
        ping = _ping(packet, header)
        task = ask(
            "on_ping",
            lambda: self._on_ping(ping),
            lambda answer: self._answer(packet, header, answer),
        )
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _answer(self, packet: bytes, header: IPHeader, answer: bool | Refusal) -> None:
        self._waiting -= 1
        answered = answer is True and not self._closed
        if not answered:
            self._counts.packets_refused += 1
        if answered:
            self._injector.try_send(echo_reply(packet, header))
        elif isinstance(answer, Refusal) and not self._closed:
            self._injector.try_send(unreachable(packet, header, answer))

    def close(self) -> None:
        """Take no more requests, and cancel the calls of `on_ping` under way. Idempotent."""
        self._closed = True
        if not self._loop.is_closed():
            for task in self._tasks:
                task.cancel()

    async def wait_closed(self) -> None:
        """Wait until no call of `on_ping` is under way."""
        while self._tasks:
            await asyncio.wait([*self._tasks])


def is_foreign_ping(packet: bytes, own: frozenset[bytes]) -> bool:
    """Whether a packet is an echo request to an address that is not in `own`."""
    return _foreign_request(packet, own) is not None


def _foreign_request(packet: bytes, own: frozenset[bytes]) -> IPHeader | None:
    header = echo_request(packet)
    if header is None:
        return None
    ends = (header.src_bytes, header.dst_bytes)
    return header if all(each not in own and unicast(each) for each in ends) else None


def echo_request(packet: bytes) -> IPHeader | None:
    """Parse an echo request; None if it is anything else, or invalid."""
    try:
        header = IPHeader(packet)
        start, end = header.payload_offset, header.total_length
        kind, code, *_ = _ECHO.unpack_from(packet, start)
    except (ValueError, struct.error):
        return None
    if code or header.fragment or not start + 8 <= end <= len(packet):
        return None
    message = packet[start:end]
    if (header.version, header.proto, kind) == (4, ICMP, _ECHO4):
        valid = not checksum(message, 0) and not checksum(packet[:start], 0)
    elif (header.version, header.proto, kind) == (6, ICMPV6, _ECHO6):
        valid = not checksum(message, pseudo_header(packet, len(message), ICMPV6))
    else:
        return None
    return header if valid else None


def _ping(packet: bytes, header: IPHeader) -> Ping:
    family = socket.AF_INET if header.version == 4 else socket.AF_INET6
    start = header.payload_offset
    _, _, _, ident, sequence = _ECHO.unpack_from(packet, start)
    return Ping(
        socket.inet_ntop(family, header.dst_bytes),
        socket.inet_ntop(family, header.src_bytes),
        ident,
        sequence,
        header.ttl,
        packet[start + 8 : header.total_length],
    )

"""Passes the pings of a program inside on to the host that they ask.

So a ping is answered if and only if that host answers. The kernel's ICMP sockets need no privilege
where ``net.ipv4.ping_group_range`` has the user's group.
"""

import asyncio
import os
import socket
import struct

from aiotun.netstack import Ping, Refusal

from .access import NotPermittedError
from .outside import Outside

__all__ = ["PingsOutside"]

_SECONDS = 10.0  # no ping(8) waits for longer by default
_ECHO = {socket.AF_INET: 8, socket.AF_INET6: 128}


class PingsOutside:
    """Answers for `intercept_pings`."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._forbidden = False

    async def answered(self, ping: Ping) -> bool | Refusal:
        """Whether the host answers."""
        try:
            host, _ = self._outside.target((ping.local, 0))
        except NotPermittedError:
            return Refusal.PROHIBITED
        except OSError:
            return Refusal.NET
        try:
            sock = self._socket(host)
        except PermissionError as error:
            if not self._forbidden:
                self._forbidden = True
                self._outside.log(
                    f"pings stay unanswered, this user may not send any: {error.strerror}; "
                    "net.ipv4.ping_group_range decides"
                )
            return False
        except OSError as error:
            self._outside.log(f"ping {ping.local} failed: {os.strerror(error.errno or 0)}")
            return False
        with sock:
            return await _ask(sock, host, ping)

    def _socket(self, host: str) -> socket.socket:
        if ":" in host:
            family, proto = socket.AF_INET6, socket.IPPROTO_ICMPV6
        else:
            family, proto = socket.AF_INET, socket.IPPROTO_ICMP
        return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, proto)


async def _ask(sock: socket.socket, host: str, ping: Ping) -> bool | Refusal:
    loop = asyncio.get_running_loop()
    # The kernel fills in the checksum, and the identifier by which it knows the answer.
    request = struct.pack("!BBHHH", _ECHO[sock.family], 0, 0, 0, ping.sequence) + ping.data
    try:
        # sock_connect would take the host for a name, and has no port for it.
        sock.connect((host, 0))
        async with asyncio.timeout(_SECONDS):
            await loop.sock_sendall(sock, request)
            await loop.sock_recv(sock, 65_535)
    except TimeoutError:
        return False
    except OSError:
        return Refusal.HOST
    return True

"""Socket addresses: checked, and brought into the form that the kernel returns."""

from __future__ import annotations

import functools
import ipaddress
import socket
import struct

__all__ = ["Address", "check_address", "family_of", "packed", "shown"]

Address = tuple[str, int] | tuple[str, int, int, int]
"""A socket address: ``("192.0.2.1", 4500)``, or ``("2001:db8::1", 4500, flow_info, scope_id)``."""


_SOCKADDR_IN = struct.Struct("=HH4s8x")
_SOCKADDR_IN6 = struct.Struct("=HHI16sI")


def family_of(address: object) -> socket.AddressFamily:
    """Return the family of an address.

    Raises:
        TypeError, ValueError: it is not an address; see `check_address`.
    """
    host, *_ = _parts(address)
    return socket.AF_INET if _parsed(host).version == 4 else socket.AF_INET6


@functools.lru_cache(maxsize=4096)
def check_address(family: int, address: Address) -> Address:
    """Return an address in the form that the kernel returns: 2 parts for IPv4, 4 parts for IPv6.

    Names are not resolved: that would block the event loop, and the host's resolver may give wrong
    addresses for another namespace.

    Raises:
        TypeError: the address is not a tuple of text and numbers.
        ValueError: it has no valid IP address, is of another family, or a number is out of range.
    """
    host, port, *more = _parts(address)
    parsed = _parsed(host)
    if family == socket.AF_INET6:
        if parsed.version != 6:
            raise ValueError(f"{host} is not an IPv6 address, and the socket is an IPv6 socket")
        flow, scope = (*more, 0, 0)[:2]
        return socket.inet_ntop(socket.AF_INET6, parsed.packed), port, flow, scope
    if parsed.version != 4 or more:
        raise ValueError(f"{address!r} is not an IPv4 address, and the socket is an IPv4 socket")
    return host, port


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        text = f"{host!r} is not a valid IP address; resolve names first"
        raise ValueError(text) from None
    if getattr(parsed, "scope_id", None) is not None:
        raise ValueError(
            f"{host!r} has a zone; give the interface's index as the address's fourth part"
        )
    return parsed


def _parts(address: object) -> tuple[str, int, *tuple[int, ...]]:
    if not isinstance(address, tuple) or len(address) < 2:
        raise TypeError(f"an address must be a tuple of host and port, got {address!r}")
    host, *numbers = address
    if not isinstance(host, str) or not all(isinstance(number, int) for number in numbers):
        raise TypeError(f"an address must be a tuple of text and numbers, got {address!r}")
    limits = (0xFFFF, 0xFFFFF, 0xFFFF_FFFF)
    for number, most in zip(numbers, limits, strict=False):
        if not 0 <= number <= most:
            raise ValueError(f"{number} in the address {address!r} must be 0 to {most}")
    if len(numbers) > len(limits):
        raise ValueError(f"{address!r} is not a valid address: it has more than four parts")
    return (host, *numbers)


@functools.lru_cache(maxsize=4096)
def packed(address: Address) -> bytes:
    """Pack a checked address as struct sockaddr_in (in.h) or sockaddr_in6 (in6.h)."""
    host, port, *more = address
    if not more:
        return _SOCKADDR_IN.pack(
            socket.AF_INET, socket.htons(port), socket.inet_pton(socket.AF_INET, host)
        )
    flow, scope = more
    return _SOCKADDR_IN6.pack(
        socket.AF_INET6,
        socket.htons(port),
        socket.htonl(flow),
        socket.inet_pton(socket.AF_INET6, host),
        scope,
    )


def shown(address: Address | None) -> str:
    """Return an address as error messages show it."""
    if address is None:
        return "the other end"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

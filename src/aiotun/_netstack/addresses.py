"""Addresses as bytes in packets, and as the tuples that sockets use."""

from __future__ import annotations

import functools
import socket
from ipaddress import IPv4Address, IPv6Address

__all__ = ["Address", "address", "end", "unicast"]

Address = tuple[str, int]
"""An IPv4 or IPv6 address as text, and a port."""


@functools.lru_cache(4096)
def address(end: bytes) -> Address:
    """Return the address and port of an end (see `_packets.udp`)."""
    family = socket.AF_INET if len(end) == 6 else socket.AF_INET6
    return socket.inet_ntop(family, end[:-2]), end[-2] << 8 | end[-1]


@functools.lru_cache(4096)
def end(host: str, port: int, version: int) -> bytes:
    """Return the end of an address and port.

    Raises:
        ValueError: this is not a valid address and port of this IP version, or not the address of
            one host.
    """
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    if version == 4:
        host = host.removeprefix("::ffff:")  # a dual-stack socket gives IPv4 addresses like this
    try:
        packed = socket.inet_pton(family, host)
    except OSError:
        packed = b""
    if not unicast(packed):
        raise ValueError(f"source must have the IPv{version} address of one host, got {host!r}")
    if not 0 <= port <= 65535:
        raise ValueError(f"source must have a port from 0 to 65535, got {port!r}")
    return packed + port.to_bytes(2, "big")


@functools.lru_cache(4096)
def unicast(packed: bytes) -> bool:
    """Whether an address may belong to a host on the Internet or in a private network.

    Multicast, loopback, unspecified and link-local addresses, and IPv4 addresses in IPv6 form, do
    not count: the stack leaves packets with these to the kernel.
    """
    if len(packed) == 4:
        four = IPv4Address(packed)
        return not (
            four.is_multicast
            or four.is_loopback
            or four.is_unspecified
            or packed == b"\xff\xff\xff\xff"
        )
    if len(packed) != 16:
        return False
    six = IPv6Address(packed)
    return not (
        six.is_multicast
        or six.is_loopback
        or six.is_unspecified
        or six.is_link_local
        or six.ipv4_mapped is not None
    )

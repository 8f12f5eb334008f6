"""Making UDP sockets, and checking those that were made elsewhere.

Opening blocks (it may enter another namespace), so it runs in a short-lived thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import sys
from typing import NoReturn

from .._kernel import places
from .._kernel.namespaces import NetnsArg, check_netns
from .._kernel.udp import (
    MTU_DISCOVER,
    PMTUDISC_DONT,
    SO_PROTOCOL,
    SO_RCVBUFFORCE,
    SO_SNDBUFFORCE,
    UDP_GRO,
    UDP_SEGMENT,
    corrupts_full_tails,
)
from ..errors import DeviceBusyError, LinkError, NotPermittedError
from .addresses import Address, check_address, family_of, shown
from .icmp import report_errors
from .port import DatagramPort

__all__ = ["GSO_VARIABLE", "Options", "check_options", "check_socket", "make_port", "open_socket"]

GSO_VARIABLE = "AIOTUN_UDP_GSO"
"""The environment variable that switches sending in runs off."""

_MOST_BYTES = 0x3FFF_FFFF  # the kernel doubles it, and takes an int


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The arguments of `open_datagrams`, checked."""

    family: socket.AddressFamily
    address: Address
    netns: NetnsArg | None
    mark: int
    receive_bytes: int
    send_bytes: int | None
    reuse_port: bool
    offload: bool


def check_options(
    address: object,
    netns: object,
    mark: object,
    receive_bytes: object,
    send_bytes: object,
    reuse_port: bool,
    offload: bool,
) -> Options:
    """Check the arguments of `open_datagrams`.

    Raises:
        TypeError, ValueError: one of them is not valid.
    """
    family = family_of(address)
    check_netns(netns)
    return Options(
        family,
        check_address(family, address),
        netns,  # type: ignore[arg-type]  # checked above
        _number("mark", mark, 0, 0xFFFF_FFFF),
        _number("receive_bytes", receive_bytes, 1, _MOST_BYTES),
        None if send_bytes is None else _number("send_bytes", send_bytes, 1, _MOST_BYTES),
        bool(reuse_port),
        bool(offload),
    )


def _number(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most}, got {value}")
    return value


def open_socket(options: Options) -> socket.socket:
    """Make the socket in the calling thread's network namespace, and bind it.

    Raises:
        DeviceBusyError, NotPermittedError, LinkError, OSError: see `open_datagrams`.
    """
    family = options.family
    sock = places.make_socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            # A socket has one family. Without this, "::" would take the port of "0.0.0.0", too.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if options.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Let routers fragment a tunnel's datagrams: without fragmentation they would be dropped,
        # and the sender inside the tunnel would not learn why.
        sock.setsockopt(*MTU_DISCOVER[family], PMTUDISC_DONT)
        report_errors(sock)
        _set_buffer(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF, options.receive_bytes)
        if options.send_bytes is not None:
            _set_buffer(sock, SO_SNDBUFFORCE, socket.SO_SNDBUF, options.send_bytes)
        if options.mark:
            _mark(sock, options.mark)
        try:
            sock.bind(options.address)
        except OSError as error:
            _raise_unbound(error, options.address)
    except BaseException:
        sock.close()
        raise
    return sock


def _set_buffer(sock: socket.socket, force: int, option: int, size: int) -> None:
    """Set the size of a buffer; without CAP_NET_ADMIN the kernel grants rmem_max or wmem_max."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, option, size)


def _mark(sock: socket.socket, mark: int) -> None:
    try:
        # As bytes: the mark is unsigned, and setsockopt takes only signed ints.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark.to_bytes(4, sys.byteorder))
    except PermissionError as error:
        text = "setting the socket's mark needs CAP_NET_ADMIN; run as root, or leave mark out"
        raise NotPermittedError(error.errno, text) from error


def _raise_unbound(error: OSError, address: Address) -> NoReturn:
    code, where = error.errno, shown(address)
    if code == errno.EADDRINUSE:
        text = (
            f"another socket is bound to {where}; choose another port, close that socket, or open "
            "both with reuse_port=True"
        )
        raise DeviceBusyError(code, text) from error
    if code in (errno.EACCES, errno.EPERM):
        text = (
            f"binding to {where} needs CAP_NET_BIND_SERVICE; choose a port from "
            "net.ipv4.ip_unprivileged_port_start (1024) on, or run as root"
        )
        raise NotPermittedError(code, text) from error
    if code == errno.EADDRNOTAVAIL:
        text = f"no interface has the address of {where} here; add it to one first, or bind to all"
        raise LinkError(code, text) from error
    raise LinkError(code, f"binding to {where} failed: {os.strerror(code or 0)}") from error


def check_socket(sock: object) -> socket.socket:
    """Check that a socket is an open UDP socket.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(sock, socket.socket):
        raise TypeError(f"from_socket needs a socket.socket, got {sock!r}")
    if sock.fileno() < 0:
        raise ValueError("the socket is closed; give one that is open")
    if sock.family in MTU_DISCOVER and sock.type == socket.SOCK_DGRAM:
        with contextlib.suppress(OSError):
            protocol = sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)
            if protocol == socket.IPPROTO_UDP:
                return sock
    raise ValueError(f"{sock!r} is not a UDP socket; give one of AF_INET or AF_INET6, SOCK_DGRAM")


def make_port(sock: socket.socket, *, offload: bool, queues_errors: bool) -> DatagramPort:
    """Make the port of a socket, and switch receiving runs on. The caller still owns the fd."""
    segment = offload and os.environ.get(GSO_VARIABLE, "") != "off"
    if segment:
        # Ask the kernel instead of trying: kernels before 4.18 send the whole run as one datagram.
        try:
            sock.getsockopt(socket.IPPROTO_UDP, UDP_SEGMENT)
        except OSError:
            segment = False
    with contextlib.suppress(OSError):  # Linux before 5.0
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, int(offload))
    full_tails = not corrupts_full_tails(os.uname().release)
    return DatagramPort(
        sock.fileno(), segment=segment, full_tails=full_tails, queues_errors=queues_errors
    )

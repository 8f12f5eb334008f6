"""What an fd is that somebody else opened: whether it carries packets, and what they look like."""

from __future__ import annotations

import errno
import os
import socket
import stat

from .._kernel import ioctl, namespaces
from .._kernel.abi import Iff
from .._kernel.interface import Interface
from .._kernel.words import Offload, mode_of
from ..errors import DeviceMismatchError
from .port import PacketFormat, Port
from .splitport import make_port

__all__ = ["header_mismatch", "judge"]

# Those that keep packets apart.
_KINDS = (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW)


def judge(fd: int, offload: Offload) -> tuple[Interface, Port]:
    """Find out what an fd is, and make its port.

    Raises:
        ValueError, DeviceMismatchError, DeviceLostError: see `Queue.from_fd`.
    """
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise ValueError(f"{fd} is not an open file descriptor") from error
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.type not in _KINDS:
                text = f"fd {fd} is a stream socket, which does not keep packets apart"
                raise ValueError(f"{text}; give a datagram or seqpacket socket")
            packets = PacketFormat("tun", offload)
            return Interface(f"fd {fd}"), make_port(packets, (sock.family, sock.type))
    try:
        name, flags = ioctl.get_flags(fd)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EBADF):
            raise
        text = f"fd {fd} is neither a queue of a TUN or TAP device nor a socket"
        raise ValueError(text) from error
    if bool(flags & Iff.VNET_HDR) != (offload != "off"):
        raise header_mismatch(name, flags, offload)
    told = ioctl.get_namespace(fd)
    namespace = None if told is None else namespaces.NamespaceFd(told)
    return Interface(name, namespace=namespace), make_port(PacketFormat(mode_of(flags), offload))


def header_mismatch(name: str, flags: Iff, offload: Offload) -> DeviceMismatchError:
    what = "a" if flags & Iff.VNET_HDR else "no"
    text = f"{name} has {what} virtio-net header, so offload={offload!r} does not fit it"
    return DeviceMismatchError(errno.EINVAL, text, name)

"""What an fd is that somebody else opened: whether it carries packets, and what they look like."""

from __future__ import annotations

import errno
import os
import socket
import stat

from .._kernel import features, ioctl, namespaces, rtnetlink, threads
from .._kernel.abi import VNET_HDR_SIZE, VNET_HDR_SIZES, Iff
from .._kernel.interface import Interface
from .._kernel.limits import naming_limits
from .._kernel.words import Offload, mode_of
from ..errors import DeviceMismatchError, LinkError, NotPermittedError
from .port import Offloads, PacketFormat, Port
from .splitport import make_port

__all__ = [
    "UNKNOWN_OFFLOADS",
    "check_packet_info",
    "is_another",
    "judge",
    "known_offloads",
    "packet_format",
]

# Those that keep packets apart.
_KINDS = (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW)

# Linux accepts TCP from every device with a virtio-net header, and UDP from 6.2 on.
UNKNOWN_OFFLOADS = ~Offloads.USO

# What both TUNGETIFF and rtnetlink tell of a device.
_TOLD_BY_BOTH = Iff.TUN | Iff.TAP | Iff.VNET_HDR | Iff.PERSIST | Iff.MULTI_QUEUE


def judge(fd: int, offload: Offload, packet_info: bool) -> tuple[Interface, Port]:
    """Find out what an fd is, and make its port.

    Raises:
        ValueError, DeviceMismatchError, DeviceLostError, ResourceLimitError: see `Queue.from_fd`.
    """
    try:
        mode = os.fstat(fd).st_mode
    except (OSError, OverflowError) as error:
        raise ValueError(f"{fd} is not an open file descriptor") from error
    if stat.S_ISSOCK(mode):
        with naming_limits(f"could not look at fd {fd}"):
            duplicate = os.dup(fd)  # a socket object closes its fd
        with socket.socket(fileno=duplicate) as sock:
            if sock.type not in _KINDS:
                text = f"fd {fd} is a stream socket, which does not keep packets apart"
                raise ValueError(f"{text}; give a datagram or seqpacket socket")
            _check_one_header(offload, packet_info)
            packets = PacketFormat("tun", offload, bool(packet_info))
            return Interface(f"fd {fd}"), make_port(packets, (sock.family, sock.type))
    try:
        name, flags = ioctl.get_flags(fd)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EBADF):
            raise
        text = f"fd {fd} is neither a queue of a TUN or TAP device nor a socket"
        raise ValueError(text) from error
    packets = packet_format(fd, name, flags, offload, packet_info)
    told = ioctl.get_namespace(fd)
    namespace = None if told is None else namespaces.NamespaceFd(told)

    def look_up() -> tuple[Iff | None, Offloads]:
        return rtnetlink.get_flags(ioctl.get_index(name)), known_offloads(
            name, packets.offload != "off"
        )

    try:
        if namespace is None or namespaces.is_here(namespace.fd):
            found, known = look_up()  # a thread would take several times as long
        else:
            found, known = threads.run_blocking(look_up, namespace.fd)
    except (LinkError, NotPermittedError):
        found, known = None, UNKNOWN_OFFLOADS  # it is in a namespace that we can't look into
    if namespace is not None or not is_another(flags, found):
        check_packet_info(name, found, packets)
    else:
        known = UNKNOWN_OFFLOADS
    packets = packets._replace(accepted=known)
    return Interface(name, namespace=namespace), make_port(packets)


def known_offloads(name: str, has_header: bool = True) -> Offloads:
    """Return the super-packets that the kernel accepts from a device.

    For a device whose offloads are not ours to set: setting them is the only other way to find out.

    Args:
        name: a TUN or TAP interface in this thread's network namespace.
        has_header: whether it has a virtio-net header. Without one the kernel is not asked.
    """
    if has_header and features.has_feature(name, "tx-udp-segmentation"):
        return ~Offloads(0)
    return UNKNOWN_OFFLOADS


def packet_format(
    fd: int, name: str, flags: Iff, offload: Offload | None, packet_info: bool
) -> PacketFormat:
    """What packets of a TUN or TAP queue look like, by what the kernel and the caller say.

    Args:
        flags: from TUNGETIFF.
        offload: None means ``"raw"`` where there is a virtio-net header.

    Raises:
        ValueError: `packet_info` together with a virtio-net header.
        DeviceMismatchError: the virtio-net header is not as `offload` says, or of a size that we
            do not read.
    """
    has_header = bool(flags & Iff.VNET_HDR)
    if offload is None:
        offload = "raw" if has_header else "off"
    if (offload != "off") != has_header:
        what = "a" if has_header else "no"
        text = f"{name} has {what} virtio-net header, so offload={offload!r} does not fit it"
        raise DeviceMismatchError(errno.EINVAL, text, name)
    _check_one_header(offload, packet_info)
    size = VNET_HDR_SIZE
    if has_header:
        size = ioctl.get_vnet_header_size(fd, name)
        if size not in VNET_HDR_SIZES:
            text = f"{name} has a virtio-net header of {size} bytes; have its opener set 10 or 12"
            raise DeviceMismatchError(errno.EINVAL, text, name)
    return PacketFormat(mode_of(flags), offload, bool(packet_info), size)


def _check_one_header(offload: Offload, packet_info: bool) -> None:
    if offload != "off" and packet_info:
        raise ValueError("packet_info=True goes with offload='off' only: one header is enough")


def is_another(flags: Iff, found: Iff | None) -> bool:
    """Whether what netlink tells of an interface of the same name is of another device.

    Without privilege nobody tells in which namespace a queue's interface is, and the namespace of
    this thread may have a stranger of that name.

    Args:
        flags: from TUNGETIFF.
        found: from `rtnetlink.get_flags`; None, which says nothing, speaks for no other.
    """
    return found is not None and bool((flags ^ found) & _TOLD_BY_BOTH)


def check_packet_info(name: str, found: Iff | None, packets: PacketFormat) -> None:
    """Check that packets come with packet information just where the caller says so.

    Args:
        found: from `rtnetlink.get_flags`; where it does not tell, the caller is believed.

    Raises:
        DeviceMismatchError: they differ.
    """
    if found is None or packets.packet_info != bool(found & Iff.NO_PI):
        return
    if packets.packet_info:
        text = f"{name} has no packet-info header; leave packet_info out"
    elif packets.offload == "off":
        text = f"{name} has a packet-info header in front of each packet; give packet_info=True"
    else:
        text = (
            f"{name} has a packet-info header in front of the virtio-net header; have its opener "
            "set IFF_NO_PI"
        )
    raise DeviceMismatchError(errno.EINVAL, text, name)

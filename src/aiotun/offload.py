"""Checksums and super-packets; pure functions of bytes, no asyncio and no os.

Sources: RFC 1071; ``include/uapi/linux/virtio_net.h``, struct virtio_net_hdr, which the kernel puts
in front of each packet of a device opened with ``offload="raw"``.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from ._kernel.abi import VNET_HDR, VNET_HDR_LONG, VNET_HDR_SIZE, VNET_HDR_SIZES
from ._packets import native

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

__all__ = ["GsoType", "VnetHeader", "checksum", "merge", "split"]


class GsoType(enum.IntEnum):
    """What a super-packet is to be cut into (virtio_net.h); ECN is a bit beside the others."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5
    ECN = 0x80


class _VnetFields(NamedTuple):
    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int | None = None


class VnetHeader(_VnetFields):
    """The virtio-net header of 10 or 12 bytes, its fields by the kernel's names.

    Attributes:
        flags: NEEDS_CSUM where the checksum is yet to be finished, DATA_VALID where it is verified.
        gso_type: a `GsoType`, perhaps with the ECN bit.
        hdr_len: the length in bytes of all headers; a hint only.
        gso_size: the payload in bytes of each segment.
        csum_start: where in the packet the checksum's data begins.
        csum_offset: where behind that the checksum itself stands.
        num_buffers: None in a header of 10 bytes. One of 12 has this number, of a guest's receive
            buffers, which the kernel's driver neither sets (it gives 0) nor reads.

    Source: ``struct virtio_net_hdr``, ``struct virtio_net_hdr_mrg_rxbuf`` (``linux/virtio_net.h``).
    """

    __slots__ = ()

    SIZE: ClassVar[int] = VNET_HDR_SIZE
    """The length in bytes of a header without `num_buffers`, which every device opened here has."""

    NEEDS_CSUM: ClassVar[int] = 1
    DATA_VALID: ClassVar[int] = 2

    def pack(self) -> bytes:
        """Give the header as the kernel takes it: 10 bytes, or 12 where `num_buffers` is a number.

        Raises:
            ValueError: a field does not fit (8 bits for the first two, 16 for the others).
        """
        try:
            if self.num_buffers is None:
                return VNET_HDR.pack(*self[:-1])
            return VNET_HDR_LONG.pack(*self)
        except struct.error as error:
            raise ValueError(f"{self} does not fit a virtio-net header: {error}") from error

    @classmethod
    def unpack(cls, data: Buffer, size: int = VNET_HDR_SIZE) -> Self:
        """Read the header in front of a packet.

        Args:
            data: the header, and whatever follows it.
            size: its length in bytes, 10 or 12: the `vnet_header_size` of the device or queue.

        Raises:
            ValueError: there are fewer bytes, or `size` is another number.
        """
        if size not in VNET_HDR_SIZES:
            raise ValueError(f"a virtio-net header has 10 or 12 bytes, not {size!r}")
        layout = VNET_HDR if size == VNET_HDR_SIZE else VNET_HDR_LONG
        try:
            return cls(*layout.unpack_from(data))
        except struct.error as error:
            raise ValueError(f"a virtio-net header has {size} bytes: {error}") from error


def checksum(data: Buffer, initial: int = 0) -> int:
    """Compute the Internet checksum (RFC 1071).

    Args:
        data: any bytes; an odd length is taken as if a zero byte followed.
        initial: an uncomplemented sum to begin with, of a pseudo-header say.

    Returns:
        The complement of the sum, 16 bits: what goes into the packet, in network byte order. Over
        data that has its right checksum in it, 0.
    """
    return native.checksum(data, initial)


def split(super_packet: Buffer, *, frame: bool = False) -> list[bytes]:
    """Cut a super-packet into the packets that it stands for.

    Each gets the headers of the whole, with lengths, checksums, IPv4 identification and TCP
    sequence number of its own; FIN and PSH stay on the last one, CWR on the first. What is no
    super-packet comes out alone, its checksum finished where that was left to the network card.
    Checksums begin with the partial one that the super-packet carries (NEEDS_CSUM), as the kernel's
    do: it has the final destination, where a source route has another one in the header.

    Args:
        super_packet: a virtio-net header of 10 bytes and a packet, as ``offload="raw"`` gives and
            takes them; TCP or UDP, IPv4 or IPv6. (Where `vnet_header_size` is 12, leave the last
            two bytes of the header out: ``data[:10] + data[12:]``.)
        frame: whether an Ethernet frame follows the header, perhaps with VLAN tags.

    Returns:
        Packets (or frames), in order, without virtio-net headers.

    Raises:
        ValueError: it is shorter than its headers say, or of a kind that nobody cuts up (a
            fragment, an unknown `GsoType`, another protocol), or one that no sender makes: headers
            of more than 512 bytes, or packets that would together be longer than 64 KiB and than 16
            times the super-packet. Or the packet has a source route (an IPv6 routing header, or
            IPv4's LSRR or SSRR), and there is no partial checksum to begin with.

    Source: ``include/uapi/linux/virtio_net.h``; the kernel's tcp_gso_segment and udp_gso_segment.
    """
    return native.split(super_packet, frame)


def merge(packets: Iterable[Buffer], *, frame: bool = False, udp: bool = True) -> list[bytes]:
    """Put packets of one flow together to super-packets, as the kernel takes them.

    A packet joins the one before it where the two adjoin: the same addresses, ports and options,
    for TCP the same acknowledgement and window, consecutive sequence numbers, and no flag but ACK
    (and PSH, which ends the run); a payload no larger than the first one's, and after a smaller one
    nothing. Both checksums are verified first: the kernel will not look at them again. Only
    neighbours are merged, so that the order stays what it was.

    Args:
        packets: IP packets of at most 65,535 bytes, or Ethernet frames; what can't be merged goes
            through as it is.
        frame: whether they are frames, perhaps with VLAN tags.
        udp: whether UDP is merged. Linux takes such super-packets from version 6.2 on.

    Returns:
        As many items or fewer, each with a 10-byte virtio-net header in front, which is all zero
        where nothing was merged. `split` gives back what went in, but for the IPv4 identification
        of packets that must not be fragmented.

    Raises:
        TypeError: one of them is not bytes-like.
    """
    return native.merge(packets, frame, udp)

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
    """What a super-packet is split into (virtio_net.h). ECN is a flag added to the other values."""

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
    """The virtio-net header of 10 or 12 bytes, with the kernel's field names.

    Attributes:
        flags: NEEDS_CSUM if the checksum is only partial and must be finished, DATA_VALID if it has
            been verified.
        gso_type: a `GsoType`, perhaps with the ECN flag.
        hdr_len: the length of all headers in bytes; only a hint.
        gso_size: the payload of each segment in bytes.
        csum_start: the offset in the packet at which the checksummed data begins.
        csum_offset: the offset of the checksum itself, from csum_start.
        num_buffers: None in a header of 10 bytes. A header of 12 bytes has this number of a guest's
            receive buffers; the kernel's driver sets it to 0 and does not read it.

    Source: ``struct virtio_net_hdr``, ``struct virtio_net_hdr_mrg_rxbuf`` (``linux/virtio_net.h``).
    """

    __slots__ = ()

    SIZE: ClassVar[int] = VNET_HDR_SIZE
    """The length in bytes of a header without `num_buffers`, which every device opened here has."""

    NEEDS_CSUM: ClassVar[int] = 1
    DATA_VALID: ClassVar[int] = 2

    def pack(self) -> bytes:
        """Return the header as the kernel expects it: 10 bytes, or 12 if `num_buffers` is an int.

        Raises:
            ValueError: a field's value does not fit (8 bits for the first two fields, 16 for the
                others).
        """
        try:
            if self.num_buffers is None:
                return VNET_HDR.pack(*self[:-1])
            return VNET_HDR_LONG.pack(*self)
        except struct.error as error:
            raise ValueError(f"{self} does not fit into a virtio-net header: {error}") from error

    @classmethod
    def unpack(cls, data: Buffer, size: int = VNET_HDR_SIZE) -> Self:
        """Parse the header in front of a packet.

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
            raise ValueError(f"a virtio-net header must have {size} bytes: {error}") from error


def checksum(data: Buffer, initial: int = 0) -> int:
    """Compute the Internet checksum (RFC 1071).

    Args:
        data: any bytes. Data of odd length is padded with a zero byte.
        initial: an uncomplemented sum to begin with, for example of a pseudo-header.

    Returns:
        The complement of the sum, 16 bits. Write it into the packet in network byte order. For data
        that includes its correct checksum, the result is 0.
    """
    return native.checksum(data, initial)


def split(super_packet: Buffer, *, frame: bool = False) -> list[bytes]:
    """Split a super-packet into the packets that it consists of.

    Each packet gets a copy of the headers, with its own lengths, checksums, IPv4 identification and
    TCP sequence number. FIN and PSH are set only on the last packet, CWR only on the first. An
    ordinary packet is returned as one packet; if its checksum is partial (NEEDS_CSUM), it is
    finished. The checksums of the segments are computed from the super-packet's partial checksum,
    as the kernel does. That one covers the final destination, which differs from the header's
    destination if the packet has a source route.

    Args:
        super_packet: a virtio-net header of 10 bytes and a packet, as a device with
            ``offload="raw"`` receives and sends them; TCP or UDP, IPv4 or IPv6. (If
            `vnet_header_size` is 12, remove the last two bytes of the header:
            ``data[:10] + data[12:]``.)
        frame: whether an Ethernet frame follows the header, perhaps with VLAN tags.

    Returns:
        Packets (or frames), in order, without virtio-net headers.

    Raises:
        ValueError: the super-packet is shorter than its headers say; it can't be split (a fragment,
            an unknown `GsoType`, another protocol); it is one that no sender makes (headers of more
            than 512 bytes, or packets that would together be longer than 64 KiB and longer than 16
            times the super-packet); or it has a source route (an IPv6 routing header, or IPv4's
            LSRR or SSRR) and no partial checksum.

    Source: ``include/uapi/linux/virtio_net.h``; the kernel's tcp_gso_segment and udp_gso_segment.
    """
    return native.split(super_packet, frame)


def merge(packets: Iterable[Buffer], *, frame: bool = False, udp: bool = True) -> list[bytes]:
    """Merge packets of one flow into super-packets, as the kernel accepts them.

    A packet is merged with the previous packet of its flow if it continues it. Both must have the
    same addresses, ports and options. TCP segments must also have the same acknowledgment and
    window, consecutive sequence numbers, and no flag but ACK (and PSH, which ends the
    super-packet). No payload may be larger than the first one, and a smaller one ends the
    super-packet. The checksums of both packets are verified before, because the kernel does not
    verify them again.

    Packets of several flows may be interleaved. The packets of each flow stay in order, and a
    super-packet takes the place of its first packet, so it may overtake packets of other flows. A
    packet whose ports are unknown, such as a fragment or an ICMP packet, keeps its place among all
    packets between its addresses. What is not IP keeps its place among all packets. Up to 128
    flows can be merged at the same time; with more, the one that was begun first ends.

    Args:
        packets: IP packets of at most 65,535 bytes, or Ethernet frames. A packet that can't be
            merged is returned as it is.
        frame: whether they are frames, perhaps with VLAN tags.
        udp: whether to merge UDP. Linux accepts such super-packets from version 6.2 on.

    Returns:
        As many items or fewer, each with a 10-byte virtio-net header in front. The header is all
        zero for a packet that was not merged. For each flow, `split` returns the original packets,
        except for the IPv4 identification of packets that must not be fragmented.

    Raises:
        TypeError: a packet is not bytes-like.
    """
    return native.merge(packets, frame, udp)

"""The Internet checksum and the virtio-net header; pure functions of bytes, no asyncio and no os.

Sources: RFC 1071; ``include/uapi/linux/virtio_net.h``, struct virtio_net_hdr, which the kernel puts
in front of each packet of a device opened with ``offload="raw"``.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from ._abi import VNET_HDR_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["GsoType", "VnetHeader", "checksum"]

# In the machine's own byte order: nobody calls TUNSETVNETLE or TUNSETVNETBE.
_HEADER = struct.Struct("=BBHHHH")


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


class VnetHeader(_VnetFields):
    """The 10-byte virtio-net header, its fields by the kernel's names.

    Attributes:
        flags: NEEDS_CSUM where the checksum is yet to be finished, DATA_VALID where it is verified.
        gso_type: a `GsoType`, perhaps with the ECN bit.
        hdr_len: the length in bytes of all headers; a hint only.
        gso_size: the payload in bytes of each segment.
        csum_start: where in the packet the checksum's data begins.
        csum_offset: where behind that the checksum itself stands.
    """

    __slots__ = ()

    SIZE: ClassVar[int] = VNET_HDR_SIZE
    """The header's length in bytes."""

    NEEDS_CSUM: ClassVar[int] = 1
    DATA_VALID: ClassVar[int] = 2

    def pack(self) -> bytes:
        """Give the header as the kernel takes it.

        Raises:
            ValueError: a field does not fit (8 bits for the first two, 16 for the others).
        """
        try:
            return _HEADER.pack(*self)
        except struct.error as error:
            raise ValueError(f"{self} does not fit a virtio-net header: {error}") from error

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Read the header in front of a packet.

        Raises:
            ValueError: there are fewer than 10 bytes.
        """
        try:
            return cls(*_HEADER.unpack_from(data))
        except struct.error as error:
            raise ValueError(f"a virtio-net header has {VNET_HDR_SIZE} bytes: {error}") from error


def checksum(data: Buffer, initial: int = 0) -> int:
    """Compute the Internet checksum (RFC 1071).

    Args:
        data: any bytes; an odd length is taken as if a zero byte followed.
        initial: an uncomplemented sum to begin with, of a pseudo-header say.

    Returns:
        The complement of the sum, 16 bits: what goes into the packet, in network byte order. Over
        data that has its right checksum in it, 0.
    """
    view = memoryview(data).cast("B")
    number = int.from_bytes(view, "big")
    if view.nbytes & 1:
        number <<= 8
    total = number + initial
    # The end-around carry makes this arithmetic modulo 0xffff, where 0 stands for 0xffff too: a sum
    # is 0 only where nothing but zeroes was added (RFC 1071, section 2).
    return 0xFFFF - (total % 0xFFFF or (0xFFFF if total else 0))

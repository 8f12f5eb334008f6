"""What the C module does where there is one, and Python where there is none.

The environment variable AIOTUN_SPEEDUPS chooses: ``require`` makes a missing C module an error
rather than a slower program, ``forbid`` leaves it alone. Each function here has the same signature
and behaviour either way.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from .._kernel.abi import READ_SIZE, VNET_HDR, VNET_HDR_SIZE, VNET_HDR_SIZES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

__all__ = [
    "SPEEDUPS",
    "checksum",
    "keep_freed_memory",
    "long_header",
    "merge",
    "packets_in",
    "read",
    "read_many",
    "read_split",
    "split",
    "write_many",
    "write_merged",
]

_choice = os.environ.get("AIOTUN_SPEEDUPS", "")
if _choice not in ("", "require", "forbid"):
    raise ImportError(f"AIOTUN_SPEEDUPS is {_choice!r}; it may be 'require' or 'forbid', or unset")


def _read_many(fd: int, size: int, limit: int) -> list[bytes]:
    """Read packets from a non-blocking fd until none waits, or there are `limit`.

    Raises:
        OSError: the first read failed. A later failure ends the batch, and the next call meets it.
    """
    read = os.read
    batch = [read(fd, size)] if limit > 0 else []
    append = batch.append
    try:
        for _ in range(limit - 1):
            append(read(fd, size))
    except OSError:
        pass
    return batch


def _read_split(
    fd: int, frame: bool, limit: int, header: int = VNET_HDR_SIZE
) -> tuple[list[bytes], int]:
    """Read super-packets from a non-blocking fd, and split them, until there are `limit` packets.

    A super-packet that can't be split is dropped, and counts as a packet.

    Args:
        header: the size of the virtio-net header in front of each; what goes beyond 10 bytes
            (num_buffers) is skipped.

    Returns:
        The packets, which are more than `limit` where the last super-packet held more; and how many
        super-packets were dropped.

    Raises:
        OSError: the first read failed, or gave no byte at all (ENODATA), as the end of a socket
            does. A later failure ends the batch, and the next call meets it.
        ValueError: no such header.
    """
    _check_header(header)
    packets: list[bytes] = []
    lost = 0
    while len(packets) + lost < limit:
        try:
            super_packet = os.read(fd, READ_SIZE)
            if not super_packet:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        except OSError:
            if not packets and not lost:
                raise
            break
        try:
            packets += split(_short_header(super_packet, header), frame)
        except ValueError:
            lost += 1
    return packets, lost


def _write_many(fd: int, packets: list[Buffer]) -> int:
    """Write packets to a non-blocking fd, until it takes no more.

    Returns:
        How many were written. Those left meet the reason, whatever it is, when they are written one
        by one; among them what is no `bytes` object, where the C module stops.
    """
    written = 0
    try:
        for packet in packets:
            os.write(fd, packet)
            written += 1
    except (OSError, TypeError, ValueError, BufferError):
        pass
    return written


def _write_merged(
    fd: int, packets: Iterable[Buffer], frame: bool, header: int = VNET_HDR_SIZE
) -> int:
    """Merge packets, and write what comes of it to a non-blocking fd, until it takes no more.

    Args:
        header: the size of the virtio-net header in front of each; what goes beyond 10 bytes
            (num_buffers) is written as zero.

    Returns:
        How many of the packets were written. Those left meet the reason, whatever it is, when they
        are written one by one.

    Raises:
        TypeError, BufferError: one of them is no packet; nothing was written.
        ValueError: no such header.
    """
    _check_header(header)
    written = 0
    try:
        for super_packet in merge(packets, frame):
            os.write(fd, long_header(super_packet, header))
            written += packets_in(super_packet)
    except OSError:
        pass
    return written


def _check_header(size: int) -> None:
    if size not in VNET_HDR_SIZES:
        raise ValueError(f"a virtio-net header has 10 or 12 bytes, not {size}")


def _short_header(super_packet: bytes, size: int) -> bytes:
    """Take off what a virtio-net header of `size` bytes has beyond 10.

    Raises:
        ValueError: the super-packet is shorter than that.
    """
    if size == VNET_HDR_SIZE:
        return super_packet
    if len(super_packet) < size:
        raise ValueError(f"a super-packet begins with a header of {size} bytes")
    return super_packet[:VNET_HDR_SIZE] + super_packet[size:]


def long_header(super_packet: bytes, size: int) -> bytes:
    """Make the 10-byte virtio-net header of a super-packet one of `size` bytes, with zeroes."""
    if size == VNET_HDR_SIZE:
        return super_packet
    padding = bytes(size - VNET_HDR_SIZE)
    return b"".join((super_packet[:VNET_HDR_SIZE], padding, super_packet[VNET_HDR_SIZE:]))


def packets_in(super_packet: bytes) -> int:
    """How many packets a super-packet stands for."""
    _, kind, head, size, _, _ = VNET_HDR.unpack_from(super_packet)
    if not kind:
        return 1
    payload = len(super_packet) - VNET_HDR_SIZE - int(head)
    return -(-payload // int(size))


SPEEDUPS = False
"""Whether the C module is in use."""


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed, where packets of 64 KiB come and go.

    glibc gives memory at the heap's end back to the kernel from 128 KiB on. Then every super-packet
    would have its 16 pages mapped and zeroed anew, which costs more than reading it. Once a larger
    block was freed, glibc keeps twice as much as that (mallopt(3), M_MMAP_THRESHOLD); this block is
    never touched, and takes no memory. Other allocators don't care.
    """
    bytearray(16 * 1024 * 1024)


read: Callable[[int, int], bytes] = os.read
"""Read one packet from a non-blocking fd: ``read(fd, size)``, as `os.read`."""

read_many: Callable[[int, int, int], list[bytes]] = _read_many
read_split: Callable[..., tuple[list[bytes], int]] = _read_split
write_many: Callable[[int, list[Buffer]], int] = _write_many
write_merged: Callable[..., int] = _write_merged
split: Callable[[Buffer, bool], list[bytes]]
merge: Callable[..., list[bytes]]
checksum: Callable[[Buffer, int], int]

if _choice != "forbid":
    try:
        from ._speedups import (
            checksum,
            merge,
            read,
            read_many,
            read_split,
            split,
            write_many,
            write_merged,
        )

        SPEEDUPS = True
    except ImportError as error:
        if _choice == "require":
            raise ImportError(
                "AIOTUN_SPEEDUPS=require, and aiotun was installed without its C module: install "
                "it again with AIOTUN_SPEEDUPS=require, a C compiler and Python's headers, or "
                f"unset the variable ({error})"
            ) from error
if not SPEEDUPS:
    from .gso import checksum, merge, split

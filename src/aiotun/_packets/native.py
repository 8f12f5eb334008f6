"""The functions of the C module, or their Python twins if there is no C module.

The environment variable AIOTUN_SPEEDUPS chooses: ``require`` makes a missing C module an error,
``forbid`` always uses Python. Each function has the same signature and behavior in both.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from typing import TYPE_CHECKING

from .._kernel.abi import READ_SIZE, VNET_HDR, VNET_HDR_SIZE, VNET_HDR_SIZES
from . import runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

__all__ = [
    "SPEEDUPS",
    "checksum",
    "find_other",
    "keep_freed_memory",
    "long_header",
    "merge",
    "packets_in",
    "read",
    "read_many",
    "read_run",
    "read_split",
    "send_run",
    "short_header",
    "split",
    "write_many",
    "write_merged",
    "write_run",
]

_TCP, _SYN_OR_RST = 6, 0x06
_GSO_ECN = 0x80  # virtio_net.h

_choice = os.environ.get("AIOTUN_SPEEDUPS", "")
if _choice not in ("", "require", "forbid"):
    raise ImportError(f"AIOTUN_SPEEDUPS must be 'require', 'forbid' or unset, got {_choice!r}")


def _read_many(fd: int, size: int, limit: int) -> list[bytes]:
    """Read packets from a non-blocking fd until none waits, or `limit` packets were read.

    Raises:
        OSError: the first read failed. A later error ends the batch, and the next call raises it.
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
        The packets, and how many super-packets were dropped. There can be more than `limit`
        packets, because the last super-packet is split completely.

    Raises:
        OSError: the first read failed, or returned no bytes (ENODATA), as at the end of a socket. A
            later error ends the batch, and the next call raises it.
        ValueError: `header` is neither 10 nor 12.
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
            packets += split(short_header(super_packet, header), frame)
        except ValueError:
            lost += 1
    return packets, lost


def _write_many(fd: int, packets: list[Buffer]) -> int:
    """Write packets to a non-blocking fd, until a write fails.

    Returns:
        How many were written. No error is raised for the next packet: the caller writes it again by
        itself and meets the error then. The C module also stops at a packet that is not `bytes`.
    """
    written = 0
    try:
        for packet in packets:
            os.write(fd, packet)
            written += 1
    except (OSError, TypeError, ValueError, BufferError):
        pass
    return written


def _send_run(fd: int, datagrams: list[Buffer], address: bytes | None, largest: int) -> int:
    """Send datagrams through a UDP socket with UDP_SEGMENT, if one call can send all of them.

    The C module does that for the usual case: `bytes` objects of one size, of which the last may be
    shorter, that fit one run.

    Args:
        address: where to, as the kernel's sockaddr; None where the socket is connected.
        largest: how long a datagram of a run may be, in bytes.

    Returns:
        How many were sent: all, or 0 if the caller has to cut them into runs. Without the C module
        it always has to.

    Raises:
        OSError: sendmsg(2) failed. Nothing was sent.
    """
    return 0


def _write_merged(
    fd: int,
    packets: Iterable[Buffer],
    frame: bool,
    header: int = VNET_HDR_SIZE,
    udp: bool = True,
) -> Sequence[int]:
    """Merge packets, and write the results to a non-blocking fd, until a write fails.

    Args:
        header: the size of the virtio-net header in front of each; what goes beyond 10 bytes
            (num_buffers) is written as zero.
        udp: whether to merge UDP: see `aiotun.offload.merge`.

    Returns:
        Where in `packets` those are that were not written, in order. The first of them is the first
        packet of what could not be written, or an object that is not bytes-like; then everything
        before it was written, and nothing after it. No error is raised for it: the caller writes it
        again by itself and meets the error then.

    Raises:
        TypeError: `packets` is not iterable.
        ValueError: `header` is neither 10 nor 12.
    """
    _check_header(header)
    batch = list(packets)
    good: list[bytes] = []
    with contextlib.suppress(TypeError, ValueError, BufferError):
        good.extend(bytes(memoryview(packet).cast("B")) for packet in batch)
    places: list[int] = []
    written = 0
    try:
        for super_packet in merge(good, frame, udp, places):
            os.write(fd, long_header(super_packet, header))
            written += packets_in(super_packet)
    except OSError:
        pass
    return [*sorted(places[written:]), *range(len(good), len(batch))]


Taken = tuple[int, int, int, int, bytes | None, bool]


def _read_run(
    fd: int,
    first: bytes | None,
    buffer: memoryview,
    layout: tuple[int, int, int, int, int],
    frame: bool,
    header: int,
) -> Taken:
    """Read a run of packets from a non-blocking fd into a buffer.

    A super-packet is a run by itself. A packet that comes singly is followed by more of the same
    addresses and size, for as long as they wait; a shorter one is the last.

    Args:
        first: what was read before: it comes before anything that is read now.
        layout: see `runs.Layout`. A single packet must fit into the buffer.
        header: the size of the virtio-net header, 0 without one.

    Returns:
        The run's count, size, last and stride; what was read last and does not belong to it, else
        None; and whether nothing more waits. A count of 0 means that what was read is a
        super-packet of too many segments for the buffer or the layout.

    Raises:
        OSError: the first read failed, or returned no bytes (ENODATA). A later error ends the run.
        ValueError: the first super-packet can't be split, and is lost; or an argument is invalid.
    """
    if header:
        _check_header(header)
    wanted = runs.Layout(*layout)
    if min(wanted) < 0 or wanted.align < 1 or wanted.limit < 1:
        raise ValueError("no such layout or header")
    data = os.read(fd, READ_SIZE) if first is None else first
    if not data:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    packets = _packets_of(data, frame, header)
    measures = runs.place(buffer, wanted, packets)
    if measures is None:
        return 0, 0, 0, 0, data, False
    if header and data[1] & ~_GSO_ECN:
        return *measures, None, False
    most = min(wanted.limit, buffer.nbytes // (measures[3] or 1))
    kept: bytes | None = None
    drained = False
    while len(packets) < most and len(packets[-1]) == len(packets[0]):
        try:
            kept = os.read(fd, READ_SIZE)
        except OSError:  # the next call meets any error again
            drained = True
            break
        single = len(kept) >= header and not (header and kept[1] & ~_GSO_ECN)
        # The packet as it came: a strange checksum that is written later may change an address.
        if not single or not runs.follows(packets[0], kept[header:], frame):
            break
        try:
            packets += _packets_of(kept, frame, header)
        except ValueError:
            break  # the next call counts it
        kept = None
    measures = runs.place(buffer, wanted, packets)
    assert measures is not None
    return *measures, kept, drained


def _packets_of(data: bytes, frame: bool, header: int) -> list[bytes]:
    return split(short_header(data, header), frame) if header else [data]


def _write_run(
    fd: int,
    buffer: Buffer,
    start: int,
    stride: int,
    lengths: list[int],
    frame: bool,
    header: int,
    udp: bool = True,
) -> Sequence[int]:
    """Write packets of a buffer to a non-blocking fd, until a write fails; merge them before.

    Args:
        buffer: bytes.
        start, stride: where the first packet begins, and how far from there the next one.
        lengths: of each packet, at most 256.
        header: the size of the virtio-net header; with 0 each packet is written as it is.
        udp: whether datagrams are merged.

    Returns:
        Which were not written, in order; as `write_merged`.

    Raises:
        TypeError: `lengths` is not a list of so many.
        ValueError: a packet does not end inside the buffer, or `header` is none of 0, 10 and 12.
            Nothing was written then.
    """
    if type(lengths) is not list or len(lengths) > runs.LIMIT:
        raise TypeError(f"write_run takes a list of at most {runs.LIMIT} lengths")
    if header:
        _check_header(header)
    view = memoryview(buffer).cast("B")
    packets: list[Buffer] = []
    for index, length in enumerate(lengths):
        at = start + index * stride
        if length < 0 or at < 0 or at + length > view.nbytes:
            raise ValueError(f"packet {index} does not end inside the buffer")
        packets.append(view[at : at + length])
    if header:
        return _write_merged(fd, packets, frame, header, udp)
    return range(_write_many(fd, packets), len(packets))


def _check_header(size: int) -> None:
    if size not in VNET_HDR_SIZES:
        raise ValueError(f"a virtio-net header has 10 or 12 bytes, not {size}")


def short_header(super_packet: bytes, size: int) -> bytes:
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
    """Return the number of packets in a super-packet."""
    _, kind, head, size, _, _ = VNET_HDR.unpack_from(super_packet)
    if not kind:
        return 1
    payload = len(super_packet) - VNET_HDR_SIZE - int(head)
    return -(-payload // int(size))


SPEEDUPS = False
"""Whether the C module is in use."""


@functools.cache
def keep_freed_memory() -> None:
    """Make the allocator keep freed memory, for programs that handle packets of 64 KiB.

    glibc returns memory to the kernel when more than 128 KiB at the end of the heap are free. The
    kernel would then map and zero 16 pages again for every super-packet, which costs more than
    reading it. When a larger block is freed, glibc raises that limit to twice the block's size
    (mallopt(3), M_MMAP_THRESHOLD). The block allocated here is never touched, so it uses no memory.
    A second block would use 16 MiB: it comes from the heap, and the allocator clears it. So this
    happens once. Other allocators are not affected.
    """
    bytearray(16 * 1024 * 1024)


def _find_other(packets: list[Buffer], start: int, header: int, tcp: bool) -> int:
    """Find the next packet that a netstack's program is asked about before the kernel gets it.

    These are all but TCP. With `tcp` they are also the segments that may open a connection or end
    an attempt, with SYN or RST, and those that may hide it: fragments, and IPv4 with options.

    Args:
        packets: what is not `bytes` is always found.
        start: where to begin.
        header: the size of the virtio-net header in front of each.
        tcp: see above.

    Returns:
        Its place; the number of packets if there is none. A packet that is too short to tell is not
        found, because the kernel knows what is wrong with it.
    """
    for at in range(start, len(packets)):
        packet = packets[at]
        if type(packet) is not bytes:
            return at
        try:
            if _is_other(packet, header, tcp):
                return at
        except IndexError:
            pass
    return max(start, len(packets))


def _is_other(packet: bytes, at: int, tcp: bool) -> bool:
    if packet[at] >> 4 != 4:
        if packet[at + 6] != _TCP:
            return True
        return tcp and packet[at + 53] & _SYN_OR_RST != 0
    if packet[at + 9] != _TCP:
        return True
    if not tcp:
        return False
    if packet[at] != 0x45 or packet[at + 6] & 0x3F or packet[at + 7]:
        return True
    return packet[at + 33] & _SYN_OR_RST != 0


read: Callable[[int, int], bytes] = os.read
"""Read one packet from a non-blocking fd: ``read(fd, size)``, like `os.read`."""

read_many: Callable[[int, int, int], list[bytes]] = _read_many
read_split: Callable[..., tuple[list[bytes], int]] = _read_split
write_many: Callable[[int, list[Buffer]], int] = _write_many
find_other: Callable[[list[Buffer], int, int, bool], int] = _find_other
send_run: Callable[[int, list[Buffer], bytes | None, int], int] = _send_run
write_merged: Callable[..., Sequence[int]] = _write_merged
read_run: Callable[..., Taken] = _read_run
write_run: Callable[..., Sequence[int]] = _write_run
split: Callable[[Buffer, bool], list[bytes]]
merge: Callable[..., list[bytes]]
checksum: Callable[[Buffer, int], int]

if _choice != "forbid":
    try:
        from ._speedups import (
            checksum,
            find_other,
            merge,
            read,
            read_many,
            read_run,
            read_split,
            send_run,
            split,
            write_many,
            write_merged,
            write_run,
        )

        SPEEDUPS = True
    except ImportError as error:
        if _choice == "require":
            raise ImportError(
                "AIOTUN_SPEEDUPS is 'require', but aiotun was installed without its C module; "
                "install it again with AIOTUN_SPEEDUPS=require, a C compiler and Python's headers, "
                f"or unset the variable ({error})"
            ) from error
if not SPEEDUPS:
    from .gso import checksum, merge, split

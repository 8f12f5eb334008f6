"""Compares `split` with the kernel's segmentation of the same super-packets."""

import random
import struct
from typing import Any

from aiotun._packets import gso
from aiotun.offload import GsoType, VnetHeader
from tests.test_gso import LINKS, Packet

from . import _kernel
from ._target import Choices, Target
from .superpackets import MODULE, damaged, exact

__all__ = ["TARGETS"]

# IPv4 options: none, router alert, loose and strict source route, record route.
_OPTIONS4 = [b"", b"\x94\4\0\0", b"\1\x83\7\4\x0a\0\0\x09", b"\x89\7\4\x0a\0\0\x09\0",
             b"\7\7\4\0\0\0\0\0"]  # fmt: skip
_ROUTING = bytes([0, 2, 4, 1]) + bytes(4) + bytes.fromhex("fd000000000000000000000000000009")
# IPv6 extension headers behind a next header of 60 (destination options): none, one, a routing
# header with a segment left, the same with none left. The last byte of each list of types follows.
_OPTIONS6 = [b"", b"\0\0\1\4\0\0\0\0", b"\x2b\0\1\4\0\0\0\0" + _ROUTING,
             b"\x2b\0\1\4\0\0\0\0" + _ROUTING[:3] + b"\0" + _ROUTING[4:]]  # fmt: skip


def segmenting(data: bytes) -> None:
    """Build a super-packet from the input, perhaps damage it, and split it in both ways."""
    choices = Choices(data)
    frame, header, packet = _super_packet(choices)
    whole = header.pack() + packet
    changed = whole if choices.randrange(2) else damaged(choices, whole)
    kernels = _kernel.segments(changed, frame)
    for split in (MODULE.split, gso.split):
        ours = _attempt(split, exact(changed), frame)
        if changed == whole:
            # A correct super-packet must be split, unless the result is out of proportion.
            count = -(-(len(packet) - header.hdr_len) // header.gso_size)
            total = len(packet) + max(count - 1, 0) * header.hdr_len
            expected = total <= max(65_535, 16 * len(packet)) and _checksum_known(header, packet)
            assert (ours is not None) == expected, (changed, ours)
        if ours is None or kernels is None or not _comparable(changed, frame):
            continue
        # If it fits into one segment, the kernel does not segment it and leaves wrong checksums.
        if changed == whole or len(ours) > 1:
            assert len(ours) == len(kernels), (changed, ours, kernels)
            for one, other in zip(ours, kernels, strict=True):
                assert _alike(one, other), (changed, one, other)


def _super_packet(choices: Choices) -> tuple[bool, VnetHeader, bytes]:
    version, protocol = choices.choice((4, 6)), choices.choice(("tcp", "udp"))
    link = choices.choice(list(LINKS.values()))
    options = choices.choice(_OPTIONS4 if version == 4 else _OPTIONS6)
    if version == 6 and options:
        # The next header of the last extension header is the transport's.
        last = 8 if len(options) > 8 else 0
        options = options[:last] + (b"\6" if protocol == "tcp" else b"\x11") + options[last + 1 :]
    size = choices.choice((choices.randrange(1, 2000), choices.randrange(1, 60)))
    segments = choices.choice((choices.randrange(1, 6), choices.randrange(1, 130)))
    length = min(size * segments - choices.randrange(size), 65_535 - 200)
    packet = Packet(
        payload=random.Random(choices.getrandbits(16)).randbytes(length),
        version=version,
        protocol=protocol,
        link=link,
        options=options,
        fragment=choices.choice((0x4000, 0)),
        identity=choices.choice((1, 0xFFFE)),
        flags=choices.choice((0x10, 0x18, 0x11, 0x90, 0xFF)),
        sequence=choices.choice((1, 0xFFFFFFF0)),
        tcp_options=choices.choice((b"", Packet.tcp_options)),
    )
    head = len(bytes(packet)) - length
    start = head - (8 if protocol == "udp" else 20 + len(packet.tcp_options))
    offset = 6 if protocol == "udp" else 16
    kind = GsoType.TCPV4 if version == 4 else GsoType.TCPV6
    made = bytearray(bytes(packet))
    flags = 1
    if protocol == "udp":
        kind = GsoType.UDP_L4
    elif choices.randrange(4) == 3:
        flags = 0
    if flags:
        # Any partial checksum is valid: the sender computes it.
        struct.pack_into("!H", made, start + offset, choices.getrandbits(16))
    header = VnetHeader(flags, kind, head, size, start, offset)
    return bool(link), header, bytes(made)


def _attempt(split: Any, data: memoryview, frame: bool) -> list[bytes] | None:
    try:
        parts: list[bytes] = split(data, frame)
    except ValueError:
        return None
    return parts


def _checksum_known(header: VnetHeader, packet: bytes) -> bool:
    """Whether `split` can know the checksums: not with a source route and no partial checksum."""
    routed = b"\x83\7\4\x0a" in packet or b"\x89\7\4\x0a" in packet or _ROUTING[1:8] in packet
    return bool(header.flags) or not routed


def _comparable(data: bytes, frame: bool) -> bool:
    """Whether kernel and `split` must agree: is the checksum where the protocol has it?

    The kernel completes a checksum at any place that the virtio-net header names.
    """
    head, packet = VnetHeader.unpack(data), data[VnetHeader.SIZE :]
    if not head.flags & VnetHeader.NEEDS_CSUM or head.gso_type & ~GsoType.ECN == GsoType.NONE:
        return True
    layers = gso._layers(packet, frame)
    place = 16 if layers.protocol == 6 else 6
    return (head.csum_start, head.csum_offset) == (layers.transport, place)


def _alike(one: bytes, other: bytes) -> bool:
    """Whether both are the same, except that a checksum may be 0 in one and 0xffff in the other."""
    if one == other:
        return True
    places = [at for at in range(min(len(one), len(other))) if one[at] != other[at]]
    if len(one) != len(other) or len(places) != 2:
        return False
    here = slice(places[0], places[1] + 1)
    return {one[here], other[here]} == {b"\0\0", b"\xff\xff"}


TARGETS = [
    Target(
        "segmenting",
        segmenting,
        "if both split and the kernel segment a super-packet, the segments are the same; split "
        "accepts every correct super-packet that is in proportion",
        missing=_kernel.missing,
    )
]

"""Packets both ways between two devices, each in its own format."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._kernel.abi import PI_SIZE
from .._packets import native
from .._queue.packetio import PacketIO
from .._queue.port import Offloads
from ..errors import AiotunError, DeviceClosedError, LinkDownError, PacketError

if TYPE_CHECKING:
    from .._queue.port import PacketFormat

__all__ = ["RelayCounts", "RelayStats", "relay"]

# A super-packet may become 45 packets of 1,460 bytes, and many more if they are small.
_SUPER_PACKETS = 16

_UDP = 5  # VIRTIO_NET_HDR_GSO_UDP_L4, the only kind that a kernel may lack
_ECN = 0x80

# if_tun.h: struct tun_pi { __u16 flags; __be16 proto; }, proto as in if_ether.h.
_IPV4, _IPV6 = b"\0\0\x08\x00", b"\0\0\x86\xdd"

# Returns the packets for the target, and how many of the source's packets could not be read.
Convert = Callable[[list[bytes]], tuple[list[bytes], int]]


@dataclasses.dataclass(slots=True)
class RelayCounts:
    """What `relay` has done in one direction so far.

    Packets are counted as the other device gets them: a super-packet that is passed on whole is one
    packet. Each packet is counted in one of these fields.
    """

    passed: int = 0
    """Packets that the other device took."""
    link_down: int = 0
    """Packets dropped because the other device's link was down."""
    refused: int = 0
    """Packets dropped because the other device refused them (`PacketError`)."""
    undecodable: int = 0
    """Super-packets dropped because they could not be split."""
    unsent: int = 0
    """Packets dropped because the relay ended, or was cancelled, before there was room for them."""


@dataclasses.dataclass(slots=True)
class RelayStats:
    """Counters of `relay`: pass it one of these, and read them at any time."""

    a_to_b: RelayCounts = dataclasses.field(default_factory=RelayCounts)
    """From the first device to the second."""
    b_to_a: RelayCounts = dataclasses.field(default_factory=RelayCounts)
    """From the second device to the first."""


async def relay(a: PacketIO, b: PacketIO, *, stats: RelayStats | None = None) -> None:
    """Move packets both ways between two devices, until one of them is closed.

    Each device gets packets in its own format, whatever the other's is. Between two devices with
    ``offload="raw"`` the relay passes super-packets on whole. Otherwise it splits them, or merges
    packets as far as the device accepts super-packets (`Device.offloads`). Virtio-net headers get
    the size that the device has, and packet information is added or removed.

    A packet that a device can't take is dropped and counted, and the relay goes on. That happens
    while the link is down, or if the kernel refuses the packet. If a device has no room, the relay
    waits, and does not read more packets for that device meanwhile.

    Args:
        a, b: two TUN devices, or two TAP devices: what `open_tun` and `open_tap` return, what
            `memory_pair` returns, a `FaultInjector`, or single queues of devices.
        stats: an object to count in. One object may be given to several relays.

    Returns:
        None, as soon as one device is closed here.

    Raises:
        DeviceLostError: one device's interface is gone.
        TypeError: `a` or `b` is not a device, or `stats` is not a `RelayStats`.
        ValueError: one is a TUN device and the other a TAP device, or both are the same.

    *Cancellation*: closes neither device. Packets that were received but not sent yet are sent if
    there is room for them; otherwise they are dropped and counted in `RelayCounts.unsent`.

    *Concurrency*: other tasks may use both devices meanwhile; each packet goes to one receiver.
    Other tasks run after every 256 packets, or 1,024 with ``offload="split"``. Several relays may
    share a device.
    """
    for each in (a, b):
        if not isinstance(each, PacketIO):
            raise TypeError(
                f"relay needs two devices, got {type(each).__name__}; a stack's is its 'tun'"
            )
    if a is b:
        raise ValueError(f"relay needs two devices, got {a!r} twice")
    if a._format.mode != b._format.mode:
        raise ValueError(
            f"relay can't connect a TUN and a TAP device, got {a!r} and {b!r}; a TAP carries "
            "Ethernet frames, whose headers the packets of a TUN lack"
        )
    if stats is not None and not isinstance(stats, RelayStats):
        raise TypeError(f"stats must be a RelayStats, got {stats!r}")
    counts = stats if stats is not None else RelayStats()
    pumps = [
        asyncio.create_task(_pump(a, b, counts.a_to_b)),
        asyncio.create_task(_pump(b, a, counts.b_to_a)),
    ]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        # A cancelled pump ends at once: it sends only as many packets as possible without waiting.
        await asyncio.wait(pumps)
    for failure in [pump.exception() for pump in pumps if not pump.cancelled()]:
        if failure is not None:
            raise failure


async def _pump(source: PacketIO, target: PacketIO, counts: RelayCounts) -> None:
    """Move packets one way until one device is closed here."""
    convert = converter(source._format, target._format)
    limit = _SUPER_PACKETS if source._format.offload == "raw" else source._format.batch
    try:
        while True:
            try:
                packets = await source.recv_many(limit)
            except PacketError:
                continue  # from a connected UDP socket: the other end refused an earlier packet
            if convert is not None:
                packets, unreadable = convert(packets)
                counts.undecodable += unreadable
            await _send(target, packets, counts)
    except DeviceClosedError:
        pass


async def _send(target: PacketIO, packets: list[bytes], counts: RelayCounts) -> None:
    """Send packets, and count for each whether it was sent or why it was dropped."""
    left = packets
    try:
        while left:
            try:
                counts.passed += await target.send_many(left)
            except BaseException as error:
                sent = len(left)
                left = error.unsent  # type: ignore[attr-defined]  # promised on foreign classes, too
                counts.passed += sent - len(left)
                if isinstance(error, LinkDownError):
                    counts.link_down += len(left)
                    left = []
                elif isinstance(error, PacketError):
                    counts.refused += 1
                    left = left[1:]
                else:
                    raise
            else:
                left = []
    except asyncio.CancelledError:
        sent = _send_at_once(target, left)
        counts.passed += sent
        left = left[sent:]
        raise
    finally:
        counts.unsent += len(left)


def _send_at_once(target: PacketIO, packets: list[bytes]) -> int:
    """Send as many packets as possible without waiting; return how many."""
    sent = 0
    try:
        for packet in packets:
            target.send_nowait(packet)
            sent += 1
    except (AiotunError, OSError):
        pass
    return sent


# From one format to another


def converter(source: PacketFormat, target: PacketFormat) -> Convert | None:
    """Return the function that converts packets between two formats; None if there is no need."""
    if source.offload == target.offload == "raw":
        return _repack(source, target)
    if source.offload == "raw":
        return _split(source, target)
    if target.offload == "raw":
        return _merge(source, target)
    if source.packet_info != target.packet_info:
        change = _add_information(target) if target.packet_info else _remove_information
        return lambda packets: (change(packets), 0)
    return None


def _repack(source: PacketFormat, target: PacketFormat) -> Convert | None:
    """Convert super-packets for a device with another header size, or without USO."""
    without_udp = Offloads.USO not in target.offloads
    if source.vnet_bytes == target.vnet_bytes and not without_udp:
        return None
    no_header, frames = bytes(target.vnet_bytes), source.mode == "tap"

    def repack(super_packets: list[bytes]) -> tuple[list[bytes], int]:
        packets: list[bytes] = []
        unreadable = 0
        for each in super_packets:
            try:
                short = native.short_header(each, source.vnet_bytes)
                if without_udp and short[1] & ~_ECN == _UDP:
                    packets += [no_header + packet for packet in native.split(short, frames)]
                else:
                    packets.append(native.long_header(short, target.vnet_bytes))
            except ValueError:
                unreadable += 1
        return packets, unreadable

    return repack


def _split(source: PacketFormat, target: PacketFormat) -> Convert:
    frames = source.mode == "tap"
    add = _add_information(target) if target.packet_info else None

    def split(super_packets: list[bytes]) -> tuple[list[bytes], int]:
        packets: list[bytes] = []
        unreadable = 0
        for each in super_packets:
            try:
                packets += native.split(native.short_header(each, source.vnet_bytes), frames)
            except ValueError:
                unreadable += 1
        return packets if add is None else add(packets), unreadable

    return split


def _merge(source: PacketFormat, target: PacketFormat) -> Convert:
    udp, frames = Offloads.USO in target.offloads, source.mode == "tap"

    def merge(packets: list[bytes]) -> tuple[list[bytes], int]:
        if source.packet_info:
            packets = _remove_information(packets)
        merged = native.merge(packets, frames, udp)
        return [native.long_header(each, target.vnet_bytes) for each in merged], 0

    return merge


def _remove_information(packets: list[bytes]) -> list[bytes]:
    return [packet[PI_SIZE:] for packet in packets]


def _add_information(target: PacketFormat) -> Callable[[list[bytes]], list[bytes]]:
    """Put a ``struct tun_pi`` in front of packets: no flags, and the ethertype."""
    if target.mode == "tap":
        return lambda frames: [b"\0\0" + frame[12:14] + frame for frame in frames]
    return lambda packets: [
        (_IPV6 if packet[:1] >= b"\x60" else _IPV4) + packet for packet in packets
    ]

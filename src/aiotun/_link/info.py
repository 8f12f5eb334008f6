"""Snapshots of links and devices, as the kernel reports them; no I/O.

This module is separate from `values` and is loaded at the first reply: creating dataclasses with
so many fields takes a fifth of the time that `import aiotun` may take.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .values import LinkAddress

__all__ = ["Autoconf", "EventKind", "LinkEvent", "LinkInfo", "LinkStats", "TunTapInfo"]

EventKind = Literal[
    "renamed", "mtu", "up", "down", "carrier", "address_removed", "address_added", "deleted"
]
"""The kinds of events. Events of one change come in this order."""


@dataclass(frozen=True, slots=True)
class TunTapInfo:
    """The properties of a TUN or TAP device, from if_link.h's IFLA_TUN attributes.

    Attributes:
        name: the interface's name.
        index: the interface's index.
        mode: ``"tun"`` for packets, ``"tap"`` for frames.
        multi_queue: whether the device can have several queues.
        queues: how many queues it has now, including disabled ones.
        persist: whether the device remains when the last queue is closed.
        owner: the user ID that may attach, or None for any.
        group: the ID of the group whose members may attach, or None for any.
        packet_info: whether each packet comes with the 4-byte ``tun_pi`` header.
        vnet_header: whether each packet comes with the virtio-net header.
        attached: whether a program holds a queue. The kernel does not report this for a persistent
            single-queue device. There it is derived from the carrier, so a program that switched
            the carrier off is not seen.
    """

    name: str
    index: int
    mode: Literal["tun", "tap"]
    multi_queue: bool
    queues: int
    persist: bool
    owner: int | None
    group: int | None
    packet_info: bool
    vnet_header: bool
    attached: bool


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """The properties of a link at one moment.

    Attributes:
        name: the interface's name.
        index: the interface's index, which a rename does not change.
        mtu: the largest IP packet, in bytes.
        mac: the hardware address, or None if the link has none (a TUN device).
        up: whether the link is administratively up.
        carrier: whether something is attached at the other end of the wire.
        master: the name of the bridge or bond that the link belongs to, or None.
        alias: the link's alias, a free text, or None.
        txqueuelen: how many packets the transmit queue can hold.
        tuntap: the properties of a TUN or TAP device; None for other links.
        gso_max_segs, gso_max_size: how many segments and how many bytes a super-packet for the link
            has at most; 0 if the kernel does not report it.

    Source: RTM_NEWLINK (``linux/rtnetlink.h``, ``linux/if_link.h``).
    """

    name: str
    index: int
    mtu: int
    mac: str | None
    up: bool
    carrier: bool
    master: str | None
    alias: str | None
    txqueuelen: int
    tuntap: TunTapInfo | None
    gso_max_segs: int = 0
    gso_max_size: int = 0


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """Something that happened to a link.

    Attributes:
        kind: ``"up"`` and ``"down"``, ``"carrier"`` (gained or lost: see `info`), ``"mtu"``,
            ``"renamed"``, ``"address_added"``, ``"address_removed"``, and ``"deleted"``, which is
            the last event: the link was deleted, or moved to another network namespace.
        info: the link right after the event; with ``"deleted"``, its last known state.
        address: the address that was added or removed; None for other events.

    Source: RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR and RTM_DELADDR (``linux/rtnetlink.h``).
    """

    kind: EventKind
    info: LinkInfo
    address: LinkAddress | None = None


@dataclass(frozen=True, slots=True)
class LinkStats:
    """The kernel's counters, with the names of ``struct rtnl_link_stats64`` (if_link.h).

    On a TUN or TAP device, *rx* counts the packets that a program writes and *tx* those that it
    reads. ``tx_dropped`` counts the packets that the kernel dropped because the queue was full.
    """

    rx_packets: int
    rx_bytes: int
    rx_dropped: int
    rx_errors: int
    tx_packets: int
    tx_bytes: int
    tx_dropped: int
    tx_errors: int
    multicast: int
    collisions: int
    rx_length_errors: int
    rx_over_errors: int
    rx_crc_errors: int
    rx_frame_errors: int
    rx_fifo_errors: int
    rx_missed_errors: int
    tx_aborted_errors: int
    tx_carrier_errors: int
    tx_fifo_errors: int
    tx_heartbeat_errors: int
    tx_window_errors: int
    rx_compressed: int
    tx_compressed: int


class Autoconf(NamedTuple):
    """The settings of the kernel's IPv6 autoconfiguration of a link.

    Attributes:
        mode: how link-local addresses are generated (IFLA_INET6_ADDR_GEN_MODE).
        solicitations: how many router solicitations are sent; -1 means no limit.
    """

    mode: int
    solicitations: int

"""What links and devices are at one moment, as the kernel tells it; no I/O.

Apart from `values`, and loaded at the first answer: making dataclasses of so many fields takes
a fifth of the time that `import aiotun` may take.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .values import LinkAddress

__all__ = ["Autoconf", "EventKind", "LinkEvent", "LinkInfo", "LinkStats", "TunTapInfo"]

EventKind = Literal[
    "renamed", "mtu", "up", "down", "carrier", "address_removed", "address_added", "deleted"
]
"""What an event may be, in the order in which those stand that come at once."""


@dataclass(frozen=True, slots=True)
class TunTapInfo:
    """What a TUN or TAP device is, as if_link.h's IFLA_TUN attributes tell it.

    Attributes:
        name: the interface's name.
        index: its number.
        mode: ``"tun"`` for packets, ``"tap"`` for frames.
        multi_queue: whether it takes several queues.
        queues: how many it has now, disabled ones among them.
        persist: whether it stays when the last queue is closed.
        owner: the user who may attach, or None for no such limit.
        group: the group whose members may attach, or None.
        packet_info: whether each packet comes with the 4-byte ``tun_pi`` header.
        vnet_header: whether each packet comes with the virtio-net header.
        attached: whether a program holds a queue. The kernel does not tell this for a persistent
            single-queue device, so it is read off the carrier there: a program that switched the
            carrier off goes unseen.
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
    """What a link is at one moment.

    Attributes:
        name: the interface's name.
        index: its number, which stays through a rename.
        mtu: the largest IP packet, in bytes.
        mac: the hardware address, or None where there is none (a TUN device).
        up: whether it is administratively up.
        carrier: whether something is attached at the other end of the wire.
        master: the name of the bridge or bond that it belongs to, or None.
        alias: the free text kept with it, or None.
        txqueuelen: the packets that its queue towards the wire may hold.
        tuntap: more, for a TUN or TAP device, or None.

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


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """Something that happened to a link.

    Attributes:
        kind: ``"up"`` and ``"down"``, ``"carrier"`` (gained or lost: see `info`), ``"mtu"``,
            ``"renamed"``, ``"address_added"``, ``"address_removed"``, and ``"deleted"``, after
            which nothing comes: the link is gone, or moved to another network namespace.
        info: the link as it was right after that; with ``"deleted"``, as it was last.
        address: the address that came or went, else None.

    Source: RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR and RTM_DELADDR (``linux/rtnetlink.h``).
    """

    kind: EventKind
    info: LinkInfo
    address: LinkAddress | None = None


@dataclass(frozen=True, slots=True)
class LinkStats:
    """The kernel's counters, by the names of ``struct rtnl_link_stats64`` (if_link.h).

    The kernel's *rx* is what a program wrote to a TUN or TAP device, its *tx* what the program
    reads; ``tx_dropped`` counts what found the queue full.
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
    """What IPv6 the kernel gives a link by itself.

    Attributes:
        mode: how link-local addresses are made (IFLA_INET6_ADDR_GEN_MODE).
        solicitations: how many router solicitations are sent; -1 is without end.
    """

    mode: int
    solicitations: int

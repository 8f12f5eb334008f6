"""A packet of TCP on its way to the stack's device."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .._packets.ipheader import IPHeader

__all__ = ["Seen", "TcpTaker"]


class Seen(NamedTuple):
    """What admission looks at.

    Attributes:
        sent: as the program sent it. Its virtio-net header may say that the checksum is not
            complete, so this and nothing else is written later.
        packet: the same without that header.
        header: its IP header.
    """

    sent: bytes
    packet: bytes
    header: IPHeader


class TcpTaker(Protocol):
    """What decides about connections: `admission.Admission`."""

    def take(self, seen: Seen) -> bool:
        """Take a packet, and return whether it was taken; if not, the kernel gets it."""

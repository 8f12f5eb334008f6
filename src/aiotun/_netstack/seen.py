"""A TCP packet on its way to the stack's device."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .._packets.ipheader import IPHeader

__all__ = ["Seen", "TcpTaker"]


class Seen(NamedTuple):
    """A TCP packet, as `Admission.take` gets it.

    Attributes:
        sent: the packet as the program sent it. Its virtio-net header may say that the checksum is
            not complete, so the packet must be written later with this header.
        packet: the packet without the virtio-net header.
        header: its IP header.
        checked: whether TCP's checksum needs no check: the virtio-net header says that it is known
            to be right, or is partial.
    """

    sent: bytes
    packet: bytes
    header: IPHeader
    checked: bool


class TcpTaker(Protocol):
    """Decides about connections; see `admission.Admission`."""

    def take(self, seen: Seen) -> bool:
        """Take a packet; return False if it is for the kernel instead."""
